"""README's kernel table: what it says of made-up results, what it refuses, and that the committed one is current."""

import copy
import json
import subprocess

import pytest

from bench import report

PLACES = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"


def row(path, median, *, op="modulated_layernorm", passes="forward", device="NVIDIA H200", **info):
    return {
        "fullname": f"bench/test_it.py::test_it[{path}]",
        "extra_info": {
            "op": op,
            "pass": passes,
            "shape": "B64 N256 D1152",
            "dtype": "bfloat16",
            "path": path,
            "backend": "triton" if path == "ours" else path,
            "device": device,
            "gb_per_s": 3771.0,
            "tflop_per_s": 0.0,
            "bound_by": "copy",
            "percent_of_ceiling": 91.2,
            "rms_error": 1.6e-3,
            "rms_bound": 2e-3,
            "absent": {"apex": "apex: not installed"} if path == "ours" else {},
            **info,
        },
        "stats": {"median": median, "iqr": median / 50},
    }


def run(*rows, device="NVIDIA H200", moment="2026-11-22T08:00:00.000000+00:00", commit="0123456789"):
    return {
        "datetime": moment,
        "machine_info": {
            "device": device,
            "capability": "sm_90",
            "driver": "580.1",
            "cuda": "13.0",
            "torch": "2.11.0",
            "triton": "3.6.0",
        },
        "commit_info": {"id": commit, "time": None, "dirty": False},
        "ceilings": {"copy_gb_per_s": 4300.0, "bfloat16_tflop_per_s": 780.0},
        "benchmarks": list(rows),
    }


GOOD = (row("ours", 40e-6), row("eager", 200e-6), row("compiled", 60e-6), row("liger", 50e-6))


def house(tmp_path, *runs, readme=PLACES):
    (tmp_path / "README.md").write_text(readme)
    for number, of in enumerate(runs):
        path = tmp_path / "bench" / "results" / "device" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(of))
    return tmp_path


def lines(root, start):
    return [line for line in (root / "README.md").read_text().splitlines() if line.startswith(start)]


def test_row_is_against_the_best_of_the_others(tmp_path):
    root = house(tmp_path, run(*GOOD))
    assert report.main([], root) == 0
    assert lines(root, "| fused") == [
        "| fused adaLN, forward | triton | B64 N256 D1152, bf16 | 40 µs ± 1 % | 3.77e+03 GB/s | 91 % (copy) | 1.6e-03 "
        "| liger, 50 µs | 1.25 × |"
    ]
    assert lines(root, "| NVIDIA H200") == ["| NVIDIA H200 | 1.25 × |" + " not measured yet |" * 4]
    (conditions,) = lines(root, "**NVIDIA H200**")
    for told in ("sm_90", "driver 580.1", "PyTorch 2.11.0", "Triton 3.6.0", "commit 0123456,", "2026-11-22", "4300"):
        assert told in conditions
    assert lines(root, "Not beside them") == ["Not beside them: apex: apex: not installed."]


def test_what_was_not_measured_is_said(tmp_path):
    root = house(tmp_path)
    assert report.main([], root) == 0
    for device in ("NVIDIA H100", "NVIDIA H200", "NVIDIA A100"):
        assert lines(root, f"| {device}") == [f"| {device} |" + " not measured yet |" * len(report.OPS)]
    text = (root / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


def test_a_measured_device_goes_by_its_own_name(tmp_path):
    name = "NVIDIA H100 80GB HBM3"
    root = house(tmp_path, run(row("ours", 1e-3, device=name), row("compiled", 2e-3, device=name), device=name))
    assert report.main([], root) == 0
    assert [line.split(" | ")[0] for line in lines(root, "| NVIDIA H100")] == [f"| {name}"]


def test_newest_results_of_every_case(tmp_path):
    backward = [row(path, 1e-3 * factor, passes="backward") for path, factor in (("ours", 1), ("compiled", 3))]
    old = run(*GOOD, *backward, moment="2026-11-20T08:00:00+00:00", commit="aaaaaaaaaa")
    new = run(row("ours", 10e-6), row("compiled", 60e-6), moment="2026-11-21T08:00:00+00:00", commit="bbbbbbbbbb")
    for runs in ((old, new), (new, old)):
        root = house(tmp_path, *runs)
        assert report.main([], root) == 0
        assert [line.split(" | ")[-1] for line in lines(root, "| fused")] == ["6.00 × |", "3.00 × |"]
        (conditions,) = lines(root, "**NVIDIA H200**")
        assert "aaaaaaa" in conditions and "bbbbbbb" in conditions
        assert lines(root, "| NVIDIA H200")[0].startswith("| NVIDIA H200 | 3.00 to 6.00 × |")


def test_paths_of_different_runs_are_not_compared(tmp_path):
    old = run(*GOOD, moment="2026-11-20T08:00:00+00:00")
    root = house(tmp_path, old, run(row("ours", 10e-6), moment="2026-11-21T08:00:00+00:00"))
    assert report.main([], root) == 1


def broken(**changes):
    rows = copy.deepcopy(list(GOOD))
    for key, value in changes.items():
        rows[0]["extra_info"][key] = value
        if value is None:
            del rows[0]["extra_info"][key]
    return rows


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (broken(rms_error=None), "lacks rms_error"),
        (broken(rms_bound=None), "lacks rms_bound"),
        (broken(rms_error=3e-3), "not within its bound"),
        (broken(rms_error=float("nan")), "not within its bound"),
        (broken(rms_bound=float("inf")), "not within its bound"),
        (broken(rms_error="UNSERIALIZABLE"), "not within its bound"),
        (broken(op="magic"), "no operator 'magic'"),
        (broken(**{"pass": "sideways"}), "sideways"),
        (GOOD[1:], "no row of the project's own path"),
        (GOOD[:2], "nothing compiled stands beside it, only eager"),
        (GOOD[:1], "nothing compiled stands beside it, only nothing"),
    ],
    ids=range(11),
)
def test_refused(tmp_path, capsys, rows, reason):
    root = house(tmp_path, run(*rows))
    assert report.main([], root) == 1
    assert reason in capsys.readouterr().err
    assert (root / "README.md").read_text() == PLACES


def test_other_benchmarks_are_left_alone(tmp_path):
    other = {"fullname": "bench/test_train.py::test_step", "extra_info": {}, "stats": {"median": 1.0, "iqr": 0.0}}
    root = house(tmp_path, run(*GOOD, other))
    assert report.main([], root) == 0 and len(lines(root, "| fused")) == 1


def test_check_tells_a_stale_table(tmp_path, capsys):
    root = house(tmp_path, run(*GOOD))
    assert report.main(["--check"], root) == 1
    assert "make report" in capsys.readouterr().err and (root / "README.md").read_text() == PLACES
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    house(tmp_path, run(row("ours", 39e-6), *GOOD[1:]), readme=(root / "README.md").read_text())
    assert report.main(["--check"], root) == 1


@pytest.mark.parametrize(
    "readme",
    [
        "no",
        report.BEGIN,
        PLACES + PLACES,
        report.BEGIN + PLACES,
        PLACES + report.END,
        f"{report.END}\n{report.BEGIN}\n",
    ],
    ids=range(6),
)
def test_markers_are_there_once(tmp_path, readme):
    root = house(tmp_path, run(*GOOD), readme=readme)
    assert report.main([], root) == 1 and (root / "README.md").read_text() == readme


def test_results_from_elsewhere(tmp_path):
    root = house(tmp_path)
    file = tmp_path / "adaln.json"
    file.write_text(json.dumps(run(*GOOD, device="NVIDIA A100-SXM4-80GB")))
    assert report.main(["--add", str(file)], root) == 0
    (added,) = (root / "bench" / "results").glob("*/*.json")
    assert added.relative_to(root).parts[-2:] == ("nvidia-a100-sxm4-80gb", "2026-11-22-080000-0123456.json")
    assert json.loads(added.read_text()) == json.loads(file.read_text())
    assert sum('"fullname"' in line for line in added.read_text().splitlines()) == len(GOOD)  # a line for each row
    assert len(lines(root, "| fused")) == 1


def test_refused_results_are_not_added(tmp_path):
    root = house(tmp_path)
    file = tmp_path / "adaln.json"
    file.write_text(json.dumps(run(*GOOD[1:])))
    assert report.main(["--add", str(file)], root) == 1
    assert not list(root.glob("bench/results/*/*.json"))


def test_refused_cases_are_left_out(tmp_path, capsys):
    """One inaccurate row takes its case along and no other; the caller is told."""
    root = house(tmp_path)
    file = tmp_path / "adaln.json"
    other = {"fullname": "bench/test_train.py::test_step", "extra_info": {}, "stats": {"median": 1.0, "iqr": 0.0}}
    backward = [row(path, 1e-3, passes="backward", rms_error=1.0) for path in ("ours", "compiled")]
    file.write_text(json.dumps(run(*GOOD, *backward, other)))
    assert report.main(["--add", str(file)], root) == 1
    assert "Left out: bench/test_it.py::test_it[ours]: error 1.0" in capsys.readouterr().err
    (added,) = root.glob("bench/results/*/*.json")
    assert json.loads(added.read_text())["benchmarks"] == [*GOOD, other]
    assert len(lines(root, "| fused")) == 1 and report.main(["--check"], root) == 0


@pytest.mark.parametrize("status", [0, 1])
def test_measure_runs_the_benchmark_and_adds_what_it_wrote(tmp_path, monkeypatch, status):
    def pytest_of(command, cwd):
        assert command[1:5] == ["-m", "pytest", "bench", "--benchmark-only"] and command[-2:] == ["-k", "layernorm"]
        (file,) = (part.removeprefix("--benchmark-json=") for part in command if part.startswith("--benchmark-json"))
        with open(file, "w") as out:
            json.dump(run(*GOOD), out)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(report.subprocess, "run", pytest_of)
    root = house(tmp_path)
    assert report.main(["--measure", "--", "-k", "layernorm"], root) == status
    assert len(lines(root, "| fused")) == 1


def test_committed_readme_is_current(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err

"""The benchmark's report: what it says of made-up results, what it refuses, and that the committed one is current."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bench import plots, records, report, tables

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("kernel table", "model table", "ladder table", "memory table")
PLACES = "before\n" + "".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nbetween\n" for name in NAMES)
H200, EPYC = "NVIDIA H200", "AMD EPYC, 2 threads"


def row(path, median, *, op="modulated_layernorm", passes="forward", device=H200, **info):
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


def model(path, median, *, op="forward", batch=16, pixels=256, **info):
    """A row of XL/2; its rate of images follows from batch and seconds."""
    of = {
        "shape": f"XL/2 28 blocks {pixels}px B{batch}",
        "images_per_s": batch / median,
        "mfu_percent": 41.3,
        "compile_s": None if path.endswith("eager") else 33.0,
        "layers": 28,
        "batch": batch,
        "pixels": pixels,
        "bound_by": "matmul",
        "tflop_per_s": 408.0,
        "gb_per_s": 1000.0,
        **info,
    }
    return row(path, median, op=op, **of)


def rung(place, path, median, **info):
    return model(path, median, op="ladder", batch=2, rung=place, **info)


def memory(path, modulation, *, setting="paper", device=H200, what="batch 16", layers=28, processes=1, **held):
    """A memory row; of a prediction the classes that are not named are 0 and the total is their sum, in GB."""
    bytes_of = {"total": int(held.get("total", sum(held.values())) * 1e9)}
    if path == "predicted":
        bytes_of |= {name: int(held.get(name, 0) * 1e9) for name in records.CLASSES}
    info = {
        "op": "memory", "path": path, "setting": setting, "what": what, "modulation": modulation, "layers": layers,
        "batch": 16, "pixels": 256, "processes": processes, "zero_stage": 0, "dtype": "float32", "device": device,
        "bytes": bytes_of,
    }  # fmt: skip
    if path == "measured":
        info["error_percent"] = -1.25
    name = f"bench/test_memory.py::test_memory[{setting}-{modulation}-{path}]"
    return {"fullname": name, "extra_info": info, "stats": {"median": 1.0, "iqr": 0.0}}


def loader(workers, rate, **info):
    info = {
        "op": "loader", "path": f"{workers} workers", "what": "92 tokens", "workers": workers, "images_per_s": rate,
        "mb_per_s": 0.75 * rate, "workers_for_an_h100": 450.5 / rate, "device": H200,
        "h100_images_per_s": {"planned": 298.1, "known": "assumed", "at_40_percent_mfu": 450.5}, **info,
    }  # fmt: skip
    name = f"bench/test_loader.py::test_loader[{workers}]"
    return {"fullname": name, "extra_info": info, "stats": {"median": 1.0, "iqr": 0.0}}


def run(*rows, device=H200, moment="2026-11-22T08:00:00.000000+00:00", commit="0123456789", **machine):
    return {
        "datetime": moment,
        "machine_info": {
            "device": device,
            "capability": "sm_90",
            "driver": "580.1",
            "cuda": "13.0",
            "torch": "2.11.0",
            "triton": "3.6.0",
            **machine,
        },
        "commit_info": {"id": commit, "time": None, "dirty": False},
        "ceilings": {"copy_gb_per_s": 4300.0, "bfloat16_tflop_per_s": 780.0},
        "benchmarks": list(rows),
    }


GOOD = (row("ours", 40e-6), row("eager", 200e-6), row("compiled", 60e-6), row("liger", 50e-6))
FORWARD = (
    model("ours", 0.010, backend="triton"),
    model("ours eager", 0.012),
    model("reference eager", 0.030),
    model("reference compiled", 0.015),
    model("diffusers eager", 0.032),
    model("diffusers compiled", 0.016, compile_s=71.4),
)
LADDER = (
    rung(0, "eager", 0.8, absent={"+ CUDA graphs": "needs a CUDA device"}),
    rung(1, "+ compile", 0.5),
    rung(2, "+ fused adaLN", 0.4),
)
MEMORY = (
    memory("predicted", "adaln", parameters=3.5, gradients=3.5, optimizer=7, activations=14),
    memory("predicted", "adaln_single", parameters=2.5, gradients=2.5, optimizer=5, activations=11),
    memory("measured", "adaln", total=28.4),
)


def house(tmp_path, *runs, readme=PLACES):
    (tmp_path / "README.md").write_text(readme)
    for number, of in enumerate(runs):
        path = tmp_path / "bench" / "results" / "device" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(of))
    return tmp_path


def lines(root, start, file="README.md"):
    return [line for line in (root / file).read_text().splitlines() if line.startswith(start)]


def details(root, start):
    return lines(root, start, "docs/benchmarks.md")


def test_row_is_against_the_best_of_the_others(tmp_path):
    root = house(tmp_path, run(*GOOD))
    assert report.main([], root) == 0
    assert details(root, "| fused") == [
        "| fused adaLN, forward | triton | B64 N256 D1152, bf16 | 40 µs ± 1 % | 3770 GB/s | 91 % (copy) | 1.6e-03 "
        "| liger 50 µs, compiled 60 µs, eager 200 µs | 1.25 × |"
    ]
    assert lines(root, "| NVIDIA H200")[0] == "| NVIDIA H200 | 1.25 × |" + " not measured yet |" * 4
    (conditions,) = details(root, "- sm_90")
    for told in ("driver 580.1", "PyTorch 2.11.0", "Triton 3.6.0", "commit 0123456,", "2026-11-22", "4300"):
        assert told in conditions
    assert details(root, "Not beside them") == ["Not beside them: apex: apex: not installed."]


def test_what_was_not_measured_is_said(tmp_path):
    root = house(tmp_path)
    assert report.main([], root) == 0
    for device in ("NVIDIA H100", "NVIDIA H200", "NVIDIA A100"):
        operators, models = lines(root, f"| {device}")
        assert operators == f"| {device} |" + " not measured yet |" * len(records.KERNELS)
        assert models == f"| {device} | not measured yet |" + " – |" * 6
    assert lines(root, "| predicted") == ["| predicted | not measured yet | not measured yet | not measured yet |"]
    text = (root / "README.md").read_text()
    assert "CUDA graphs: not measured yet." in text
    assert text.startswith("before\n") and text.endswith("\nbetween\n") and "old" not in text


def test_a_measured_device_goes_by_its_own_name(tmp_path):
    name = "NVIDIA H100 80GB HBM3"
    root = house(tmp_path, run(row("ours", 1e-3, device=name), row("compiled", 2e-3, device=name), device=name))
    assert report.main([], root) == 0
    assert {line.split(" | ")[0] for line in lines(root, "| NVIDIA H100")} == {f"| {name}"}


def test_newest_gpu_first_and_processors_after_it(tmp_path):
    def on(name, **machine):
        return run(*(row(path, 1e-3, device=name) for path in ("ours", "compiled")), device=name, **machine)

    root = house(
        tmp_path,
        on(EPYC, capability="AVX512"),
        on("NVIDIA A100", capability="sm_80", memory_gib=79.1),
        on("NVIDIA H100", capability="sm_90", memory_gib=79.1),
        on("NVIDIA B200", capability="sm_100", memory_gib=178.0),
        on("NVIDIA H200", capability="sm_90", memory_gib=139.8),
    )
    assert report.main([], root) == 0
    ordered = [line.removeprefix("## ") for line in details(root, "## ")]
    assert ordered == ["NVIDIA B200", "NVIDIA H200", "NVIDIA H100", "NVIDIA A100", EPYC]


def test_newest_results_of_every_case(tmp_path):
    backward = [row(path, 1e-3 * factor, passes="backward") for path, factor in (("ours", 1), ("compiled", 3))]
    old = run(*GOOD, *backward, moment="2026-11-20T08:00:00+00:00", commit="aaaaaaaaaa")
    new = run(row("ours", 10e-6), row("compiled", 60e-6), moment="2026-11-21T08:00:00+00:00", commit="bbbbbbbbbb")
    for runs in ((old, new), (new, old)):
        root = house(tmp_path, *runs)
        assert report.main([], root) == 0
        assert [line.split(" | ")[-1] for line in details(root, "| fused")] == ["6.00 × |", "3.00 × |"]
        assert sorted(line.split("commit ")[1][:7] for line in details(root, "- sm_90")) == ["aaaaaaa", "bbbbbbb"]
        assert lines(root, "| NVIDIA H200")[0].startswith("| NVIDIA H200 | 3.00 to 6.00 × |")


def test_paths_of_different_runs_are_not_compared(tmp_path):
    old = run(*GOOD, moment="2026-11-20T08:00:00+00:00")
    root = house(tmp_path, old, run(row("ours", 10e-6), moment="2026-11-21T08:00:00+00:00"))
    assert report.main([], root) == 1


def test_model_against_the_best_and_against_diffusers(tmp_path):
    """1.5 = 15 ms / 10 ms; of two batch sizes the one with more images/s, 16 / 10 ms; no other case is crowded out."""
    slow = [model(path, 0.002, batch=1) for path in ("ours", "reference compiled")]
    large = [model(path, 0.1, pixels=1024, mfu_percent=None) for path in ("ours", "reference compiled")]
    root = house(tmp_path, run(*slow, *FORWARD, *large))
    assert report.main([], root) == 0
    assert lines(root, "| NVIDIA H200 | forward") == [
        "| NVIDIA H200 | forward, XL/2 28 blocks 256px B16, bf16 | 1600 | 41 % MFU | 1.50 × (reference compiled) "
        "| 3.20 × | 1.60 × | 33, 71 |",
        "| NVIDIA H200 | forward, XL/2 28 blocks 1024px B16, bf16 | 160 | 91 % of the ceiling "
        "| 1.00 × (reference compiled) | – | – | 33, – |",
    ]
    at = details(root, "").index(details(root, "| forward, XL/2 28 blocks 256px B16, bf16")[0])
    assert details(root, "")[at : at + 6] == [
        "| forward, XL/2 28 blocks 256px B16, bf16 | ours (triton) | 10 ms ± 1 % | 1600 | 41.3 % | 408 TFLOP/s "
        "| 91 % (matmul) | 1.6e-03 | 33.0 s | 1.00 × |",
        "|  | ours eager | 12 ms ± 1 % | 1330 | 41.3 % | 408 TFLOP/s | 91 % (matmul) | 1.6e-03 | – | 1.20 × |",
        "|  | reference eager | 30 ms ± 1 % | 533 | 41.3 % | 408 TFLOP/s | 91 % (matmul) | 1.6e-03 | – | 3.00 × |",
        "|  | reference compiled | 15 ms ± 1 % | 1070 | 41.3 % | 408 TFLOP/s | 91 % (matmul) | 1.6e-03 | 33.0 s "
        "| 1.50 × |",
        "|  | diffusers eager | 32 ms ± 1 % | 500 | 41.3 % | 408 TFLOP/s | 91 % (matmul) | 1.6e-03 | – | 3.20 × |",
        "|  | diffusers compiled | 16 ms ± 1 % | 1000 | 41.3 % | 408 TFLOP/s | 91 % (matmul) | 1.6e-03 | 71.4 s "
        "| 1.60 × |",
    ]


def test_models_come_in_the_order_of_their_size(tmp_path):
    sizes = [(512, 4), (256, 16), (512, 1), (256, 4)]
    rows = [model(path, 1.0, batch=b, pixels=px) for px, b in sizes for path in ("ours", "reference compiled")]
    root = house(tmp_path, run(*rows))
    assert report.main([], root) == 0
    assert [line.split(",")[1].split()[-2:] for line in details(root, "| forward")] == [
        ["256px", "B4"],
        ["256px", "B16"],
        ["512px", "B1"],
        ["512px", "B4"],
    ]


def test_ladder_is_cumulative(tmp_path):
    """2 images in 0.8, 0.5 and 0.4 s; a column for each device, an empty place and a sentence where a rung is none."""
    whole = [copy.deepcopy(of) for of in (*LADDER, rung(3, "+ CUDA graphs", 0.2))]
    for of in LADDER:
        of["extra_info"]["device"] = EPYC
    root = house(tmp_path, run(*LADDER, device=EPYC, capability="AVX512"), run(*reversed(whole)))
    assert report.main([], root) == 0
    assert [line for line in lines(root, "| ") if line.startswith(("| eager", "| +"))] == [
        "| eager | 2.5, 1.00 × | 2.5, 1.00 × |",
        "| + compile | 4, 1.60 × | 4, 1.60 × |",
        "| + fused adaLN | 5, 2.00 × | 5, 2.00 × |",
        "| + CUDA graphs | 10, 4.00 × | – |",
    ]
    assert lines(root, "|  | NVIDIA H200: XL/2 28 blocks 256px B2, bf16 | AMD EPYC, 2 threads: XL/2")
    assert "Not beside them: + CUDA graphs: needs a CUDA device." in lines(root, "Not beside")
    assert details(root, "|  | + fused adaLN")[0].endswith("| 2.00 × |")


def test_memory_beside_the_paper(tmp_path):
    """21 GB of 28 are 25 % less; the newest prediction counts, whoever made it, and no small model is among them."""
    of = {"setting": "small", "what": "4 blocks", "layers": 4, "parameters": 0.04}
    small = [memory("predicted", name, device=EPYC, **of) for name in records.MODULATIONS]
    old = [memory("predicted", name, device=EPYC, parameters=9) for name in records.MODULATIONS]
    unpaired = memory("predicted", "adaln_single", setting="zero", what="ZeRO 3", parameters=1)
    root = house(
        tmp_path,
        run(*MEMORY, unpaired),
        run(*small, *old, device=EPYC, moment="2026-11-20T08:00:00+00:00", capability="AVX512"),
    )
    assert report.main([], root) == 0
    assert lines(root, "| the paper") == ["| the paper | 29 GB | 23 GB | 21 % | – |"]
    assert lines(root, "| predicted") == ["| predicted: batch 16 | 28.0 GB | 21.0 GB | 25 % | 28.4 GB (−1.2 %), – |"]
    assert details(root, "| ZeRO 3") == ["| ZeRO 3 | adaln_single | predicted | 1.0 GB | 1.0 GB |" + " – |" * 7]
    assert details(root, "| 4 blocks")[0].startswith("| 4 blocks | adaln | predicted | 40 MB | 40 MB | –")
    assert details(root, "|  | adaln | measured") == ["|  | adaln | measured | 28.4 GB |" + " – |" * 7 + " −1.2 % |"]


def test_memory_keeps_the_order_of_the_settings(tmp_path):
    """The paper's setting comes first where it was measured first, also when it alone is measured again."""
    settings = {
        name: [memory("predicted", of, setting=name, what=name, ema=1) for of in records.MODULATIONS]
        for name in ("paper", "batch 64", "ZeRO 3")
    }
    later = run(*settings["paper"], moment="2026-11-23T08:00:00.000000+00:00")
    root = house(tmp_path, run(*(of for pair in settings.values() for of in pair)), later)
    assert report.main([], root) == 0
    assert [line.split(" |")[0] for line in lines(root, "| predicted")] == [f"| predicted: {name}" for name in settings]


def broken(rows, place=0, **changes):
    rows = copy.deepcopy(list(rows))
    for key, value in changes.items():
        rows[place]["extra_info"][key] = value
        if value is None:
            del rows[place]["extra_info"][key]
    return rows


def with_bytes(rows, **changes):
    rows = copy.deepcopy(list(rows))
    rows[0]["extra_info"]["bytes"] |= changes
    rows[0]["extra_info"]["bytes"] = {of: n for of, n in rows[0]["extra_info"]["bytes"].items() if n is not None}
    return rows


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (broken(GOOD, rms_error=None), "lacks rms_error"),
        (broken(GOOD, rms_bound=None), "lacks rms_bound"),
        (broken(GOOD, rms_error=3e-3), "not within its bound"),
        (broken(GOOD, rms_error=float("nan")), "not within its bound"),
        (broken(GOOD, rms_bound=float("inf")), "not within its bound"),
        (broken(GOOD, rms_error="UNSERIALIZABLE"), "not within its bound"),
        (broken(GOOD, op="magic"), "no operator 'magic'"),
        (broken(GOOD, **{"pass": "sideways"}), "sideways"),
        (GOOD[1:], "no row of the project's own path"),
        (GOOD[:2], "nothing compiled stands beside it, only eager"),
        (GOOD[:1], "nothing compiled stands beside it, only nothing"),
        (broken(FORWARD, images_per_s=None), "lacks images_per_s"),
        (broken(FORWARD, 3, compile_s=None), "lacks compile_s"),
        (broken(FORWARD, 3, rms_error=1.0), "error 1.0 is not within its bound"),
        (FORWARD[1:], "no row of the project's own path"),
        ((FORWARD[0], model("ours compiled", 1.0), FORWARD[4]), "nothing compiled stands beside it, only diffusers"),
        (LADDER[1:], "no row of its first rung, eager"),
        ((LADDER[0], LADDER[2]), "nothing compiled stands beside it, only eager, + fused adaLN"),
        (broken(LADDER, rung=None), "lacks rung"),
        (with_bytes(MEMORY, ema=None), "lacks ema"),
        (with_bytes(MEMORY, ema=7), "add up to 28000000007, not 28000000000"),
        (broken(MEMORY, 2, error_percent=None), "does not say how far off"),
        (broken(MEMORY, 2, error_percent=float("nan")), "does not say how far off"),
        (broken(MEMORY, what=None), "lacks what"),
        (broken(MEMORY, path="guessed"), "no memory 'guessed'"),
        ([loader(1, float("nan"))], "nan is no rate"),
        (broken(MEMORY, modulation="film"), "a modulation 'film'"),
    ],
    ids=range(27),
)
def test_refused(tmp_path, capsys, rows, reason):
    root = house(tmp_path, run(*rows))
    assert report.main([], root) == 1
    assert reason in capsys.readouterr().err
    assert (root / "README.md").read_text() == PLACES and not (root / "docs").exists()


def test_loader_beside_what_a_step_takes(tmp_path):
    root = house(tmp_path, run(*GOOD, loader(2, 1200.4), loader(0, 2000.0), loader(1, 600.0)))
    assert report.main([], root) == 0
    table = (root / "docs" / "benchmarks.md").read_text().partition("### Loader")[2].splitlines()
    assert table[2].endswith("92 tokens. An H100 takes 450 images/s at 40 % MFU,")
    assert table[-3:] == [
        "| none, in the training process | 2000 | 1500 | – |",
        "| 1 | 600 | 450 | 0.75 |",
        "| 2 | 1200 | 900 | 0.38 |",
    ]


def test_other_benchmarks_are_left_alone(tmp_path):
    other = {"fullname": "bench/test_train.py::test_step", "extra_info": {}, "stats": {"median": 1.0, "iqr": 0.0}}
    root = house(tmp_path, run(*GOOD, other))
    assert report.main([], root) == 0 and len(details(root, "| fused")) == 1


def test_roofline_joins_ours_and_the_best_other(tmp_path):
    """408 TFLOP/s at 1000 GB/s are 408 flop/byte; adaLN has no products, and keeps its distance from the copy."""
    other = model("reference compiled", 0.015, tflop_per_s=272.0, gb_per_s=272 / 0.408)
    (entry,) = records.entries([run(FORWARD[0], other)])[H200]
    slower = row("compiled", 60e-6, gb_per_s=2514.0)
    (adaln,) = records.entries([run(GOOD[0], slower)])[H200]
    panel = plots.roofline({H200: [adaln, entry]})[H200]
    assert panel["ceilings"] == {"copy_gb_per_s": 4300.0, "bfloat16_tflop_per_s": 780.0}
    pointwise, whole = panel["points"]
    assert whole == pytest.approx(
        {"op": "forward", "dtype": "bfloat16", "products": True, "intensity": 408, "ours": 408, "other": 272}
    )
    assert pointwise["ours"] / (pointwise["intensity"] * 4.3) == pytest.approx(3771 / 4300)
    assert pointwise["other"] / pointwise["ours"] == pytest.approx(2514 / 3771) and not pointwise["products"]


def test_pictures_are_those_of_the_results(tmp_path, capsys):
    root = house(tmp_path, run(*GOOD, *FORWARD, *LADDER, *MEMORY))
    assert report.main([], root) == 0 and report.main(["--check"], root) == 0
    for name in ("roofline", "ladder", "memory"):
        with Image.open(root / "docs" / f"{name}.png") as image:
            assert image.width == 1200 and image.height < 1000
        assert f"](docs/{name}.png)" in (root / "README.md").read_text()
        assert f"]({name}.png)" in (root / "docs" / "benchmarks.md").read_text()
    # Another picture in its place, none at all, and the one of former results.
    ladder, memory_png = (root / "docs" / f"{name}.png" for name in ("ladder", "memory"))
    drawn = ladder.read_bytes()
    for spoil in (lambda: shutil.copy(memory_png, ladder), ladder.unlink):
        spoil()
        assert report.main(["--check"], root) == 1
        assert "Not what bench/results says: docs/ladder.png. Run `make report`." in capsys.readouterr().err
        ladder.write_bytes(drawn)
    faster = broken(LADDER)
    faster[1]["stats"]["median"] = 0.4
    house(root, run(*GOOD, *FORWARD, *faster, *MEMORY), readme=(root / "README.md").read_text())
    assert report.main(["--check"], root) == 1 and "docs/ladder.png" in capsys.readouterr().err


def test_memory_is_drawn_of_one_process():
    """Sharded states are in the tables; beside whole ones they would be slivers."""
    sharded = [memory("predicted", name, setting="zero", processes=8, ema=1) for name in records.MODULATIONS]
    (group,) = plots.memory(records.entries([run(*MEMORY, *sharded)]))["groups"]
    assert group["what"] == "batch 16" and group["predicted"]["adaln"]["activations"] == 14e9
    assert group["measured"] == {H200: {"adaln": (28_400_000_000, -1.25)}}


def test_no_picture_without_rows(tmp_path, capsys):
    root = house(tmp_path, run(*GOOD, *LADDER))
    assert report.main([], root) == 0
    assert {path.name for path in root.glob("docs/*.png")} == {"roofline.png", "ladder.png"}
    assert "memory.png" not in (root / "README.md").read_text() + (root / "docs" / "benchmarks.md").read_text()
    house(root, run(*GOOD), readme=(root / "README.md").read_text())
    assert report.main(["--check"], root) == 1 and "docs/ladder.png" in capsys.readouterr().err
    assert report.main([], root) == 0 and report.main(["--check"], root) == 0
    assert [path.name for path in root.glob("docs/*.png")] == ["roofline.png"]


def test_check_tells_a_stale_table(tmp_path, capsys):
    root = house(tmp_path, run(*GOOD))
    assert report.main(["--check"], root) == 1
    assert "make report" in capsys.readouterr().err and (root / "README.md").read_text() == PLACES
    assert not (root / "docs").exists()
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    page = root / "docs" / "benchmarks.md"
    page.write_text(page.read_text().replace("40 µs", "39 µs"))
    assert report.main(["--check"], root) == 1
    assert "says: docs/benchmarks.md. Run" in capsys.readouterr().err
    page.unlink()
    assert report.main(["--check"], root) == 1
    assert report.main([], root) == 0
    house(tmp_path, run(row("ours", 30e-6), *GOOD[1:]), readme=(root / "README.md").read_text())
    assert report.main(["--check"], root) == 1
    assert "says: README.md, docs/benchmarks.md. Run" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text, begin, end: text.replace(begin, ""),
        lambda text, begin, end: text.replace(end, ""),
        lambda text, begin, end: begin + text,
        lambda text, begin, end: text + end,
        lambda text, begin, end: text.replace(begin, "-").replace(end, begin).replace("-" + begin, end + begin),
        lambda text, begin, end: text.replace(begin, "\0").replace(end, begin).replace("\0", end),
    ],
    ids=range(6),
)
def test_markers_are_there_once(tmp_path, capsys, name, spoil):
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    readme = spoil(PLACES, begin, end)
    root = house(tmp_path, run(*GOOD), readme=readme)
    assert report.main([], root) == 1 and (root / "README.md").read_text() == readme
    assert f"README needs the lines {begin} and {end}" in capsys.readouterr().err


def test_results_from_elsewhere(tmp_path):
    root = house(tmp_path)
    file = tmp_path / "adaln.json"
    file.write_text(json.dumps(run(*GOOD, *MEMORY, device="NVIDIA A100-SXM4-80GB")))
    assert report.main(["--add", str(file)], root) == 0
    (added,) = (root / "bench" / "results").glob("*/*.json")
    assert added.relative_to(root).parts[-2:] == ("nvidia-a100-sxm4-80gb", "2026-11-22-080000-0123456.json")
    assert json.loads(added.read_text()) == json.loads(file.read_text())
    each = sum('"fullname"' in line for line in added.read_text().splitlines())  # a line for each row
    assert each == len(GOOD) + len(MEMORY)
    assert len(details(root, "| fused")) == 1 and len(lines(root, "| predicted")) == 1


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
    wrong = with_bytes(MEMORY[:1], total=1)
    file.write_text(json.dumps(run(*GOOD, *backward, other, *wrong, *MEMORY[1:])))
    assert report.main(["--add", str(file)], root) == 1
    told = capsys.readouterr().err
    assert (
        "Left out: bench/test_it.py::test_it[ours]: error 1.0" in told
        and "[paper-adaln-predicted]: the classes" in told
    )
    (added,) = root.glob("bench/results/*/*.json")
    assert json.loads(added.read_text())["benchmarks"] == [*GOOD, other, *MEMORY[1:]]
    assert len(details(root, "| fused")) == 1 and report.main(["--check"], root) == 0


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
    assert len(details(root, "| fused")) == 1


def test_last_results_of_a_device(tmp_path):
    """Of every benchmark the newest row, from whichever file of the device; memory is not a matter of seconds."""
    old = run(*GOOD, *MEMORY, moment="2026-11-20T08:00:00+00:00")
    new = run(row("ours", 30e-6), row("compiled", 60e-6), moment="2026-11-21T08:00:00+00:00")
    elsewhere = run(row("ours", 1.0), device="NVIDIA H100", moment="2026-11-22T08:00:00+00:00")
    root = house(tmp_path, new, old, elsewhere)
    last = records.last(root / "bench" / "results", H200)
    medians = {of["extra_info"]["path"]: of["stats"]["median"] for of in last["benchmarks"]}
    assert medians == {"ours": 30e-6, "eager": 200e-6, "compiled": 60e-6, "liger": 50e-6}
    assert last["file"] == "0.json, 1.json"
    assert records.last(root / "bench" / "results", "NVIDIA A100") is None


COMPARED = """
import time

def test_slower(benchmark):
    benchmark.pedantic(time.sleep, args=(0.02,), rounds=3)

def test_faster(benchmark):
    benchmark.pedantic(time.sleep, args=(0.02,), rounds=3)
"""


def test_regressions_against_the_committed_results_fail(tmp_path):
    """One benchmark is committed at half of its 20 ms and one at twice."""
    from bench import conftest

    shutil.copy(ROOT / "bench" / "conftest.py", tmp_path)
    (tmp_path / "test_sleep.py").write_text(COMPARED)
    then = json.loads(next((ROOT / "bench" / "results").glob("*/*.json")).read_text())
    then["machine_info"]["device"] = conftest.device_name(conftest.DEVICE)
    then["benchmarks"] = [
        {"fullname": f"test_sleep.py::{name}", "extra_info": {}, "stats": {**of["stats"], "median": seconds}}
        for of, name, seconds in zip(then["benchmarks"], ("test_slower", "test_faster"), (0.01, 0.04), strict=False)
    ]
    folder = tmp_path / "results" / "device"
    folder.mkdir(parents=True)
    (folder / "committed-then.json").write_text(json.dumps(then))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path), "--benchmark-only"]
    command.append("--benchmark-compare-fail=median:50%")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = result.stdout + result.stderr
    assert result.returncode == 1 and "committed results to compare with: committed-then.json of" in told
    regressed = told.partition("Performance has regressed:")[2].splitlines()
    assert "test_slower" in regressed[1] and "PercentageRegressionCheck" in regressed[1]
    assert "test_faster" not in regressed[1] + regressed[2]


def test_nothing_to_compare_with_is_an_error(tmp_path, monkeypatch):
    from bench import conftest

    monkeypatch.setattr(conftest, "RESULTS", tmp_path)
    with pytest.raises(pytest.UsageError, match=r"no results of .* to compare with: add some with `make report"):
        conftest._compare_with_committed(SimpleNamespace())
    committed = {"file": "then.json", "benchmarks": [{"fullname": "bench/test_it.py::test_other"}]}
    config = SimpleNamespace(stash={conftest.COMMITTED: committed})
    chosen = [SimpleNamespace(nodeid=f"bench/test_it.py::test_{name}") for name in ("it", "other")]
    conftest.pytest_collection_modifyitems(config, chosen)
    with pytest.raises(pytest.UsageError, match=r"none of the chosen benchmarks is in then\.json"):
        conftest.pytest_collection_modifyitems(config, chosen[:1])


def test_committed_report_is_current(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_sizes_and_times_as_people_read_them():
    assert [tables.size(n) for n in (28_000_000_000, 999_000_000, 40_000)] == ["28.0 GB", "999 MB", "< 0.1 MB"]
    assert [tables.duration(s) for s in (40e-6, 1.06e-3, 2.5)] == ["40 µs", "1.06 ms", "2.5 s"]
    assert [tables.three(n) for n in (3771, 0.0586, 12.34)] == ["3770", "0.0586", "12.3"]

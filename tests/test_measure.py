"""The benchmark's measuring: errors decide who is timed, paths take turns, graphs and seconds are counted rightly."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from bench import kernels, measure, records
from bench.cost import Cost
from bench.measure import Case, Ceilings, compare

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def square(x):
    return x * x


def case(paths, passes="forward", plain=(square,), **changes):
    def inputs(generator):
        x, dy = torch.randn(2, 40, 64, generator=generator)
        return (x.requires_grad_(passes != "forward"),), (dy,)

    paths = {name: path if isinstance(path, str) else measure.Path(path) for name, path in paths.items()}
    plain = tuple(map(measure.Path, plain))
    of = Case("square", passes, "N40 D64", torch.float32, CPU, inputs, plain, paths, "cpu", 2**24)
    return replace(of, **changes)


def failing(error):
    def function(x):
        raise error

    return function


def test_paths_take_turns_and_meet_every_input_set():
    calls = []

    def path(name):
        def function(x):
            calls.append((name, x.data_ptr()))
            return x * x

        return function

    rows = compare(case({"ours": path("ours"), "other": path("other")}), rounds=10)
    # 16 MiB a call, 32 MiB of cache: eight input sets; 10 rounds become two whole turns.
    timed = calls[-32:]
    assert [name for name, _ in timed] == ["ours", "other"] * 16
    for name in rows:
        met = [pointer for of, pointer in timed if of == name]
        assert len(set(met)) == 8 and met[:8] == met[8:]
        assert len(rows[name].seconds) == 16 and min(rows[name].seconds) > 0


def test_slower_path_has_the_larger_median():
    def slow(x):
        for _ in range(200):
            square(x)
        return square(x)

    rows = compare(case({"ours": square, "slow": slow}), rounds=16)
    assert rows["slow"].median > 20 * rows["ours"].median


@pytest.mark.parametrize(("factor", "ours", "other"), [(1, True, True), (5, False, True), (20, False, False)])
def test_inaccurate_paths_are_not_timed(monkeypatch, factor, ours, other):
    """Ours errs at most 1.25 times as much as plain PyTorch, the others 10 times."""

    def plain(x):  # errs by 1e-4
        return x * x if x.dtype == torch.float64 else x * x * (1 + 1e-4)

    def path(x):
        return x * x * (1 + factor * 1e-4)

    rows = compare(case({"ours": path, "other": path}, plain=(square, plain, square)), rounds=8)
    assert (bool(rows["ours"].seconds), bool(rows["other"].seconds)) == (ours, other)
    assert (rows["ours"].error <= rows["ours"].bound, rows["other"].error <= rows["other"].bound) == (ours, other)
    assert rows["ours"].error == pytest.approx(factor * 1e-4, rel=1e-2)
    assert rows["ours"].bound == pytest.approx(1.25e-4, rel=1e-2)


@pytest.mark.parametrize("order", [1, -1])
def test_nan_in_any_result_counts(order):
    def plain(x):
        return x * x, x + 1

    def path(x):
        return tuple([x * float("nan"), x + 1][::order])

    rows = compare(case({"ours": path}, plain=(lambda x: plain(x)[::order],)), rounds=8)
    assert math.isnan(rows["ours"].error) and not rows["ours"].seconds


def test_worst_gradient_decides():
    def wrong_backward(x):
        return x.detach() * x + 0 * x  # half of the gradient

    rows = compare(case({"ours": square, "half": wrong_backward}, "forward+backward"), rounds=8)
    assert rows["half"].error == pytest.approx(0.5) and not rows["half"].seconds
    assert rows["ours"].error < 1e-6 and rows["ours"].seconds
    assert compare(case({"half": wrong_backward}, "backward"), rounds=8)["half"].error == pytest.approx(0.5)
    assert compare(case({"half": wrong_backward}, "forward"), rounds=8)["half"].error < 1e-6


def test_backward_alone_runs_no_forward():
    runs = []

    def function(x):
        runs.append(x)
        return x * x

    compare(case({"ours": function}, "backward"), rounds=24)
    assert len(runs) == 1 + 8  # for the accuracy, and once per input set


def test_compiled_backward_runs_again():
    """Its graph stays, though torch.compile would like to write into what it saved."""
    of = tiny("backward", torch.float32)["modulated_layernorm"]
    rows = compare(replace(of, paths={name: of.paths[name] for name in ("eager", "compiled")}), rounds=24)
    assert len(rows["compiled"].seconds) == 24 and rows["compiled"].error <= rows["compiled"].bound


def test_absent_baselines_are_named_and_ours_may_not_fail():
    paths = {"ours": square, "not here": "liger is not installed", "fails": failing(RuntimeError("no kernel\nmore"))}
    rows = compare(case(paths), rounds=8)
    assert rows["not here"] == "liger is not installed" and rows["fails"] == "does not run: no kernel"
    with pytest.raises(NotImplementedError):
        compare(case({"ours": failing(NotImplementedError("CUDA"))}))


def test_wrong_shapes_are_no_matter_of_accuracy():
    with pytest.raises(ValueError, match=r"square.*\[40\] instead of \[40, 64\]"):
        compare(case({"ours": lambda x: x.sum(-1)}))


def test_gradients_of_a_model_keep_the_bound_together():
    """One of many may err up to twice as much as plain PyTorch, all of them together 1.25 times."""

    def path(*errors):
        return measure.Path(lambda x: tuple(x * (1 + error) for error in errors))

    usual = [1e-3] * 7
    paths = {
        "ours": path(1.6e-3, *usual),
        "ours, one": path(2.2e-3, *usual),
        "ours, all": path(*[1.4e-3] * 8),
        "other": path(*[9e-3] * 8),
    }
    of = replace(case({}), paths=paths, plain=(path(1e-3, *usual),), truth=path(*[0] * 8), images=1)
    accepted = {name: row.error <= row.bound for name, row in compare(of, rounds=0).items()}
    assert accepted == {"ours": True, "ours, one": False, "ours, all": False, "other": True}


def test_few_samples_are_checked_and_all_are_timed():
    """Truth and plain PyTorch see two of four samples; only those two reach the gradients that are compared."""
    seen, updates = [], []

    def path(dtype, **more):
        weight = torch.full((64,), 2.0, dtype=dtype, requires_grad=True)

        def function(x):
            seen.append((x.dtype, len(x)))
            return x.to(dtype) * weight

        return measure.Path(function, weights=(weight,), **more)

    def inputs(generator):
        return (torch.randn(4, 64, generator=generator),), (torch.randn(4, 64, generator=generator),)

    of = case({}, passes="forward+backward", inputs=inputs, checked=2, images=4)
    of = replace(of, plain=(path(torch.float32),), truth=path(torch.float64))
    of = replace(of, paths={"ours": path(torch.float32, update=updates.append)})
    (row,) = compare(of, rounds=8).values()
    assert row.error <= row.bound and len(row.seconds) == 8
    assert seen[:2] == [(torch.float64, 2), (torch.float32, 2)] and set(seen[2:]) == {(torch.float32, 4)}
    # Not in the accuracy check: it must not move the weights of the paths to come.
    assert len(updates) == len(seen) - 3 and updates[0][0].shape == (64,)


def test_accuracy_alone():
    assert compare(case({"ours": square}), rounds=0)["ours"].seconds == []


def test_limit_is_the_larger_of_bytes_and_arithmetic():
    ceilings = Ceilings(copy=2e9, matmul={"float32": 1e12})
    assert ceilings.limit(case({}, bytes=4 * 10**9, flops=10**12)) == (2.0, "copy")
    assert ceilings.limit(case({}, bytes=4 * 10**9, flops=3 * 10**12)) == (3.0, "matmul")


def test_limit_of_a_model_is_the_sum_over_its_operators():
    ceilings = Ceilings(copy=2e9, matmul={"float32": 1e12})
    parts = (Cost(10**12, 10**9), Cost(0, 6 * 10**9))
    assert ceilings.limit(case({}, bytes=7 * 10**9, flops=10**12, parts=parts)) == (4.0, "copy")


def test_ceilings_are_measured(monkeypatch):
    """A copy counts bytes read and written, a product 2 n³; two seconds for every call."""
    monkeypatch.setattr(measure, "_median_seconds", lambda call, device: call() is not None and 2.0)
    monkeypatch.setattr(torch, "matmul", lambda a, b: a)
    ceilings = measure.measure_ceilings(CPU)
    assert ceilings.copy == 2 * 4 * 2**26 / 2 and ceilings.matmul == dict.fromkeys(["float32", "bfloat16"], 1024.0**3)


def tiny(passes, dtype):
    return {
        "modulated_layernorm": kernels.modulated_layernorm(passes, 3, 40, dtype, CPU, D=96),
        "self_attention": kernels.self_attention(passes, 2, 40, dtype, CPU, H=2, d=24),
        "cross_attention": kernels.cross_attention(passes, 4, 40, dtype, CPU, L=20, H=2, d=24),
        "gated_linear": kernels.gated_linear(2, 40, 96, dtype, CPU, D=64),
        "linear_gelu": kernels.linear_gelu(2, 40, dtype, CPU, K=64, D=96),
    }


@pytest.mark.parametrize("op", records.KERNELS)
def test_every_path_computes_the_same(op):
    """All paths that run on a CPU, fp32, gradients too; the project's operators have tests of their own."""
    of = tiny("forward" if "linear" in op else "forward+backward", torch.float32)[op]
    rows = compare(replace(of, paths={name: path for name, path in of.paths.items() if name != "ours"}), rounds=2)
    assert rows and all(row.error <= row.bound and row.seconds for row in rows.values())


def test_least_bytes_and_flops():
    """By hand, bf16: adaLN moves 4 tensors forward and 6 back; attention reads q, k, v and writes o."""
    forward, both = tiny("forward", torch.bfloat16), tiny("forward+backward", torch.bfloat16)
    assert forward["modulated_layernorm"].bytes == 4 * 3 * 40 * 96 * 2
    assert tiny("backward", torch.bfloat16)["modulated_layernorm"].bytes == 6 * 3 * 40 * 96 * 2
    assert both["modulated_layernorm"].bytes == 10 * 3 * 40 * 96 * 2
    assert forward["self_attention"].bytes == 4 * 2 * 40 * 48 * 2
    assert forward["self_attention"].flops == 4 * 2 * 40 * 40 * 48
    assert both["self_attention"].flops == 14 * 2 * 40 * 40 * 48
    lengths = forward["cross_attention"].inputs(torch.Generator())[0][3]
    assert lengths.min() >= 1 and lengths.max() <= 20 and len(set(lengths.tolist())) > 1
    tokens = int(lengths.sum())
    assert forward["cross_attention"].flops == 4 * 40 * tokens * 48
    assert forward["cross_attention"].bytes == (2 * 4 * 40 + 2 * tokens) * 48 * 2
    assert forward["gated_linear"].flops == 2 * 80 * 96 * 64
    assert forward["gated_linear"].bytes == (80 * 96 + 96 * 64 + 2 * 80 * 64) * 2
    assert forward["linear_gelu"].bytes == (80 * 64 + 64 * 96 + 80 * 96) * 2


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_unpadded_captions(passes):
    """A variable-length attention in loops, with the arguments of flash-attn: packed and unpacked, it is the same."""

    def attention(q, k, v, starts_q, starts_k, longest_q, longest_k):
        assert longest_q == 40 and longest_k == 20 and starts_q.dtype == starts_k.dtype == torch.int32
        parts = []
        for sample in range(len(starts_q) - 1):
            queries, tokens = (slice(*starts[sample : sample + 2].tolist()) for starts in (starts_q, starts_k))
            heads = (t.transpose(0, 1) for t in (q[queries], k[tokens], v[tokens]))
            parts.append(F.scaled_dot_product_attention(*heads).transpose(0, 1))
        return torch.cat(parts), None

    of = tiny(passes, torch.float32)["cross_attention"]
    rows = compare(replace(of, paths={"varlen": kernels._varlen(attention, 20)}), rounds=2)
    assert rows["varlen"].error <= rows["varlen"].bound and rows["varlen"].seconds


def test_missing_packages_are_named():
    assert kernels.installed("flash-attn 9", "flash_attn_9.cute") == "flash-attn 9 is not installed"
    assert kernels.installed("statistics", "statistics").mean([1, 3]) == 2


class Clock:
    """Stands for a CUDA device: a replay takes as long as the calls that its graph holds, 1 ms each."""

    def __init__(self):
        self.now, self.capturing, self.graphs = 0.0, None, []

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def graph(self):
        graph = SimpleNamespace(calls=0)

        def replay():
            self.now += 1.0 * graph.calls

        graph.replay = replay
        self.graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def capture(self, graph, stream):
        self.capturing = graph
        yield
        self.capturing = None


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    stands_for = {
        "Event": clock.event,
        "CUDAGraph": clock.graph,
        "graph": clock.capture,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: None,
    }
    for name, stand_in in stands_for.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return clock


def test_graph_replays_are_counted_per_call(clock):
    """The logic alone, with stand-ins for CUDA: the calls of a graph are counted, its time divided among them."""

    def function(x):
        if clock.capturing is not None:
            clock.capturing.calls += 1
        return x * x

    def uncapturable(x):
        if clock.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x * x

    def twice(x):
        function(x)
        return function(x)

    paths = {"ours": function, "twice": twice, "uncapturable": uncapturable}
    of = case(paths, device=SimpleNamespace(type="cuda"), bytes=2**28)
    generator = torch.Generator().manual_seed(0)
    sets = [of.inputs(generator) for _ in range(5)]
    results = {}
    seconds = measure._timed(of, list(of.paths), sets, 7, results)
    assert seconds == {"ours": [pytest.approx(1e-3)] * 7, "twice": [pytest.approx(2e-3)] * 7}
    assert results["uncapturable"].startswith("does not run in a CUDA graph: operation not permitted")
    # 256 MiB a call, 2 GiB a graph: one turn of 5 sets, two of 4; small ones up to 16.
    for count, bytes_moved, turns in ((5, 2**28, 1), (4, 2**28, 2), (8, 2**20, 16)):
        graph, _ = measure._captured(of, of.paths["ours"], sets[:1] * count, turns)
        assert graph.calls == count * turns
        graphs = []
        clock.graphs = graphs
        measure._timed(replace(of, bytes=bytes_moved), ["ours"], sets[:1] * count, 1, results)
        assert [graph.calls for graph in graphs] == [count * turns]
    # 5 calls of 1 ms and 5 of 2 ms a round: 2 s are 133 rounds, and 60 the most.
    assert len(measure._timed(of, ["ours", "twice"], sets, None, results)["ours"]) == 60
    heavy = replace(of, bytes=2**20)  # 16 turns: 240 ms a round, 9 rounds at least
    assert len(measure._timed(heavy, ["ours", "twice"], sets, None, results)["ours"]) == 9


ROWS = """
from dataclasses import replace
import pytest, torch
from bench.cost import Cost
from bench.measure import Case, Path

def inputs(generator):
    return (torch.randn(40, 64, generator=generator),), ()

def square(x):
    return x * x

def case(op, ours):
    paths = {"ours": Path(ours), "compiled": Path(square), "apex": "apex: not installed"}
    plain = (Path(square),)
    return Case(op, "forward", "N40 D64", torch.float32, torch.device("cpu"), inputs, plain, paths, "cpu", 64)

@pytest.mark.parametrize("path", ["ours", "compiled", "apex"])
def test_right(row, path):
    row(case("linear_gelu", square), path)

@pytest.mark.parametrize("path", ["ours", "compiled"])
def test_wrong(row, path):
    row(case("gated_linear", lambda x: x * x * 1.001), path)

def model():
    labels = {"layers": 1, "batch": 2, "pixels": 8}
    paths = {"ours": Path(square, compiled=True), "+ more": Path(square), "other compiled": Path(square)}
    return replace(case("forward", square), paths=paths, images=2, labels=labels, parts=(Cost(0, 64), Cost(64, 64)))

@pytest.mark.sizes("path", small=["ours", "other compiled"], full=["ours"])
def test_model(row, path):
    row(model(), path)

def test_rung(row):
    row(model(), "+ more", ladder={"path": "+ more", "rung": 1})
"""


@pytest.fixture(scope="module")
def pytest_run(tmp_path_factory):
    """A benchmark of two tiny cases under the suite's conftest: what pytest printed and the JSON that it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    shutil.copy(ROOT / "bench" / "conftest.py", folder)
    (folder / "test_rows.py").write_text(ROWS)

    def of(*arguments):
        command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(folder), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout

    file = folder / "rows.json"
    printed = of("--benchmark-only", f"--benchmark-json={file}", "--commit", "0123456789")
    return SimpleNamespace(of=of, printed=printed, file=file, json=json.loads(file.read_text()))


def test_rows_of_pytest_benchmark(pytest_run):
    assert "1 failed, 6 passed, 1 skipped" in pytest_run.printed
    assert "apex: not installed" in pytest_run.printed and "exceeds" in pytest_run.printed
    rows = {benchmark["fullname"].split("::")[-1]: benchmark for benchmark in pytest_run.json["benchmarks"]}
    operators = {name for name in rows if name.startswith(("test_right", "test_wrong"))}
    assert operators == {"test_right[ours]", "test_right[compiled]", "test_wrong[compiled]"}
    ours, other = rows["test_right[ours]"], rows["test_right[compiled]"]
    info = ours["extra_info"]
    assert set(records.NEEDED) <= set(info)
    assert info["backend"] == "cpu" and other["extra_info"]["backend"] == "compiled"
    assert info["best_baseline"] == "compiled" and info["absent"] == {"apex": "apex: not installed"}
    assert info["speedup"] == pytest.approx(other["stats"]["median"] / ours["stats"]["median"], abs=1e-3)
    assert info["gb_per_s"] == pytest.approx(64 / ours["stats"]["median"] / 1e9, rel=1e-3)
    copy = pytest_run.json["ceilings"]["copy_gb_per_s"]
    assert info["percent_of_ceiling"] == pytest.approx(100 * info["gb_per_s"] / copy, abs=0.06)
    assert ours["stats"]["iqr"] > 0 and ours["stats"]["rounds"] >= 9


def test_rows_of_models(pytest_run):
    rows = {row["fullname"].split("::")[-1]: row for row in pytest_run.json["benchmarks"]}
    ours, rung = rows["test_model[ours]"]["extra_info"], rows["test_rung"]["extra_info"]
    median = rows["test_model[ours]"]["stats"]["median"]
    assert set(records.OF_A_MODEL) <= set(ours) and ours["op"] == "forward" and ours["pixels"] == 8
    assert ours["images_per_s"] == pytest.approx(2 / median, rel=1e-3) and ours["mfu_percent"] is None
    assert ours["compile_s"] is not None and rung["compile_s"] is None
    assert ours["best_baseline"] == "other compiled"  # a rung is the project's own
    assert (rung["op"], rung["path"], rung["rung"]) == ("ladder", "+ more", 1)
    assert rows["test_rung"]["group"] != rows["test_model[ours]"]["group"]


def test_what_is_printed_of_a_row(pytest_run):
    """Error and bound, share of the limit, ratio to the best baseline; as in the JSON."""
    rows = {row["fullname"].split("::")[-1]: row for row in pytest_run.json["benchmarks"]}
    for name in ("test_right[ours]", "test_model[ours]"):
        info, lines = rows[name]["extra_info"], pytest_run.printed.splitlines()
        line = lines[lines.index(rows[name]["group"]) + 1]
        assert line.startswith("  ours ") and f"{info['percent_of_ceiling']:.1f} % of {info['bound_by']}" in line
        assert f"{rows[name]['stats']['median'] * 1e3:.3f} ms" in line
        assert f"error {info['rms_error']:.1e} of {info['rms_bound']:.1e}" in line
        assert line.endswith(f"{info['speedup']:.2f} x {info['best_baseline']}")


def test_scale_chooses_the_sizes(pytest_run):
    printed = pytest_run.of("--collect-only", "-q", "--scale", "full")
    assert "test_model[ours]" in printed and "test_model[other compiled]" not in printed
    assert "test_model[other compiled]" in pytest_run.of("--collect-only", "-q", "--scale", "small")


def numbers(stats):
    return [stat for stat in stats.values() if isinstance(stat, float)]


def test_json_is_fit_to_be_committed(pytest_run):
    text = pytest_run.file.read_text()
    assert pytest_run.json["commit_info"] == {"id": "0123456789", "time": None, "dirty": False}
    machine = pytest_run.json["machine_info"]
    assert machine["torch"] == torch.__version__ and {"device", "triton", "python", "threads"} <= set(machine)
    assert os.uname().nodename not in text and str(ROOT) not in text and '"data"' not in text
    assert all(stat == float(f"{stat:.6g}") for row in pytest_run.json["benchmarks"] for stat in numbers(row["stats"]))


def test_report_takes_the_json(pytest_run, tmp_path):
    """The wrong path has no row, and so its case is refused; the right one becomes a row of the table."""
    run = pytest_run.json
    with pytest.raises(records.Refused, match="no row of the project's own path"):
        records.entries([run])
    right = {**run, "benchmarks": [row for row in run["benchmarks"] if "test_right" in row["fullname"]]}
    ((device, (entry,)),) = records.entries([right]).items()
    assert device == run["machine_info"]["device"] and entry.baseline == "compiled"


def test_accuracy_is_checked_without_timing_too(pytest_run):
    printed = pytest_run.of("--benchmark-disable")
    assert "FAILED test_rows.py::test_wrong[ours]" in printed and "6 passed" in printed

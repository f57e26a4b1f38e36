"""What every benchmark shares: the device, its ceilings, the fixture `row`, and what goes into the JSON.

`row(case, path)` turns one path of a `bench.measure.Case` into a row of pytest-benchmark; with `ladder`, of a
ladder. All paths of a case are measured together, in turns, when its first row is asked for; each row then plays its
own seconds back, so that the tables, `--benchmark-json` and `--benchmark-compare` are pytest-benchmark's own. A path
that is absent skips and says why; one whose result is not accurate fails and has no row.
"""

import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench import records
from bench.measure import DEVICE, Case, Ceilings, Row, compare, is_project, measure_ceilings
from pixart_fast import env, ops
from pixart_fast.cost import peak_flops

_now = 0.0


def playback_clock() -> float:
    return _now


def _play(seconds: Iterator[float]) -> None:
    global _now
    _now += next(seconds)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pixart_fast", "benchmarks of pixart_fast")
    group.addoption("--commit", help="the commit that is measured, where git cannot tell it")
    group.addoption("--rounds", type=int, help="how often a path is timed; by default as often as a second or two take")
    group.addoption(
        "--scale",
        choices=("small", "full"),
        help="full: XL/2 with its 28 blocks, minutes on a GPU and the default there; small: XL/2's width with few "
        "blocks, minutes on two CPU cores",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sizes(names, small, full): parametrize with the list of --scale")
    config.addinivalue_line("markers", "paths(*names, cuda): parametrize `path`, with further ones on a CUDA device")
    if config.getoption("benchmark_compare_fail") and not config.getoption("benchmark_compare"):
        _compare_with_committed(config)


COMMITTED = pytest.StashKey[dict]()
RESULTS = Path(__file__).resolve().parent / "results"


def _compare_with_committed(config: pytest.Config) -> None:
    """`--benchmark-compare-fail` alone is against the newest committed results of this device."""
    device = device_name(DEVICE)
    committed = records.last(RESULTS, device)
    if committed is None:
        raise pytest.UsageError(
            f"bench/results has no results of {device} to compare with: add some with `make report ARGS=--measure`, "
            "or name others with --benchmark-compare"
        )
    # pytest-benchmark reads one file, and does so when it is configured, after this.
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    file = Path(folder.name) / "committed.json"
    file.write_text(json.dumps(committed))
    config.option.benchmark_compare = str(file)
    config.stash[COMMITTED] = committed


def pytest_report_header(config: pytest.Config) -> str | None:
    if committed := config.stash.get(COMMITTED, None):
        return f"committed results to compare with: {committed['file']} of {committed['machine_info']['device']}"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for marker in metafunc.definition.iter_markers("paths"):
        metafunc.parametrize("path", marker.args + (marker.kwargs.get("cuda", ()) if DEVICE.type == "cuda" else ()))
    for marker in metafunc.definition.iter_markers("sizes"):
        metafunc.parametrize(marker.args[0], marker.kwargs[_scale(metafunc.config)], ids=_name)


def _name(value: object) -> str | None:
    """A dtype's name in a test's; None leaves it to pytest."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def _scale(config: pytest.Config) -> str:
    return config.getoption("--scale") or ("full" if DEVICE.type == "cuda" else "small")


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> str:
    return _scale(request.config)


@pytest.hookimpl(trylast=True)  # after -k has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "row" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=playback_clock))
    committed = config.stash.get(COMMITTED, None)
    if committed and not {item.nodeid for item in items} & {row["fullname"] for row in committed["benchmarks"]}:
        raise pytest.UsageError(f"none of the chosen benchmarks is in {committed['file']}: there is nothing to compare")


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest) -> Ceilings:
    measured = measure_ceilings(DEVICE)
    request.config.stash[CEILINGS] = measured
    return measured


CEILINGS = pytest.StashKey[Ceilings]()


@pytest.fixture(scope="session")
def measured() -> dict[str, dict[str, Row | str]]:
    """The cases measured so far, by name."""
    return {}


@pytest.fixture
def row(benchmark, request, measured) -> Callable[..., None]:
    def of(case: Case, path: str, ladder: dict[str, str | int] | None = None) -> None:
        if case.name not in measured:
            measured[case.name] = compare(case, request.config.getoption("--rounds") if benchmark.enabled else 0)
        rows = measured[case.name]
        result = rows[path]
        if isinstance(result, str):
            pytest.skip(result)
        assert result.error <= result.bound, (
            f"{case.name}, {path}: relative RMS error {result.error:.3g} exceeds {result.bound:.3g}"
        )
        if not benchmark.enabled:
            benchmark.pedantic(lambda: None)
            return
        benchmark.group = case.name if ladder is None else f"ladder of {case.name}"
        benchmark.extra_info.update(extra_info(case, path, rows, request.getfixturevalue("ceilings")))
        if ladder is not None:
            absent = {name: why for name, why in rows.items() if name.startswith("+") and isinstance(why, str)}
            benchmark.extra_info.update(op="ladder", absent=absent, **ladder)
        seconds = iter(result.seconds)
        benchmark.pedantic(_play, args=(seconds,), rounds=len(result.seconds))

    return of


def extra_info(case: Case, path: str, rows: dict[str, Row | str], ceilings: Ceilings) -> dict:
    """What a row holds besides its seconds; `bench.report` reads this."""
    result = rows[path]
    timed = {name: row.median for name, row in rows.items() if isinstance(row, Row) and row.seconds}
    baselines = {name: median for name, median in timed.items() if not is_project(name)}
    best = min(baselines, key=baselines.get) if baselines else None
    limit, bound_by = ceilings.limit(case)
    rate = {"gb_per_s": case.bytes / result.median / 1e9, "tflop_per_s": case.flops / result.median / 1e12}
    info = {
        "op": case.op,
        "pass": case.passes,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "path": path,
        "backend": case.backend if path == "ours" else path,
        "device": device_name(case.device),
        **{name: float(f"{value:.4g}") for name, value in rate.items()},
        "bound_by": bound_by,
        "percent_of_ceiling": round(100 * limit / result.median, 1),
        "rms_error": float(f"{result.error:.3g}"),
        "rms_bound": float(f"{result.bound:.3g}"),
        "best_baseline": best,
        "speedup": round(baselines[best] / result.median, 3) if best else None,
        "absent": {name: reason for name, reason in rows.items() if isinstance(reason, str)} if path == "ours" else {},
    }
    return info | model_info(case, result) if case.images else info


def model_info(case: Case, result: Row) -> dict:
    """What a row of a model holds besides."""
    peak = peak_flops(device_name(case.device))
    return case.labels | {
        "images_per_s": float(f"{case.images / result.median:.4g}"),
        "mfu_percent": round(100 * case.flops / result.median / peak, 1) if peak else None,
        "compile_s": result.compile_seconds and round(result.compile_seconds, 1),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What a reader needs to judge a row, instead of what pytest-benchmark collects: no host name and no paths."""
    machine_info.clear()
    machine_info.update(
        device=device_name(DEVICE),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=env.version("triton"),
        pixart_fast=env.version("pixart_fast"),
        native=ops.native_problem or "loaded",
    )
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        machine_info.update(
            capability=f"sm_{properties.major}{properties.minor}",
            cuda=torch.version.cuda,
            driver=_driver(),
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
        )


def _driver() -> str:
    """The version of NVIDIA's driver as its kernel module tells it."""
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.\d+(\.\d+)*)\s", version.read_text()) if version.exists() else None
    return found.group(1) if found else "unknown"


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    told = config.getoption("--commit")
    kept = {"id": commit_info["id"], "time": commit_info["time"], "dirty": commit_info["dirty"]}
    commit_info.clear()
    commit_info.update({"id": told, "time": None, "dirty": False} if told else kept)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    """Statistics stay, to six digits; the single rounds and pytest-benchmark's settings go: the file is committed."""
    measured = config.stash.get(CEILINGS, None)
    if measured is not None:
        output_json["ceilings"] = {"copy_gb_per_s": round(measured.copy / 1e9, 1)}
        output_json["ceilings"] |= {
            f"{dtype}_tflop_per_s": round(rate / 1e12, 3) for dtype, rate in measured.matmul.items()
        }
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"] = {
            name: float(f"{stat:.6g}") if isinstance(stat, float) else stat
            for name, stat in benchmark["stats"].items()
            if name != "data"
        }
        for name in ("options", "params", "param"):
            benchmark.pop(name, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What pytest-benchmark's tables do not say of a row: error, share of the limit, ratio to the best baseline."""
    rows = [row for row in config._benchmarksession.benchmarks if "rms_error" in row.extra_info]
    if not rows:
        return
    terminalreporter.section("against fp64, the limit and the best baseline")
    group = None
    for row in rows:
        info = row.extra_info
        if row.group != group:
            group = row.group
            terminalreporter.write_line(group)
        ratio = "" if info["speedup"] is None else f"  {info['speedup']:.2f} x {info['best_baseline']}"
        terminalreporter.write_line(
            f"  {info['path']:26} {row.stats.median * 1e3:10.3f} ms"
            f"  {info['percent_of_ceiling']:5.1f} % of {info['bound_by']:6}"
            f"  error {info['rms_error']:.1e} of {info['rms_bound']:.1e}{ratio}"
        )

"""`python -m bench.report`: README's kernel table from the committed results, `bench/results/<device>/*.json`.

    python -m bench.report                             writes the table between README's markers
    python -m bench.report --check                     exits with 1 where README is not what the results say
    python -m bench.report --measure                   runs the benchmark, adds its results, writes the table
    python -m bench.report --measure -- -k layernorm   the same with arguments for pytest
    python -m bench.report --add FILE...               adds files that `--benchmark-json` wrote elsewhere

Of every case (operator, pass, shape, dtype) the newest results of a device count. A case is refused where a row kept no
accuracy bound, where the project's own row is missing, or where nothing that is compiled or tuned stands beside it: the
speed-up is that over the best of the other paths in the same file. What is added goes in without its refused cases.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- kernel table: begin -->", "<!-- kernel table: end -->"
OPS = {
    "modulated_layernorm": "fused adaLN",
    "cross_attention": "cross-attention",
    "self_attention": "self-attention",
    "gated_linear": "linear + gate + residual",
    "linear_gelu": "linear + GELU",
}
PASSES = ("forward", "backward", "forward+backward")
AWAITED = ("NVIDIA H100", "NVIDIA H200", "NVIDIA A100")  # a section each, measured or not
NOT_YET = "not measured yet"
NEEDED = (
    "op",
    "pass",
    "shape",
    "dtype",
    "path",
    "backend",
    "device",
    "bound_by",
    "percent_of_ceiling",
    "rms_error",
    "rms_bound",
)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


Case = tuple[str, str, str, str]  # operator, pass, shape, dtype


class Refused(ValueError):
    """Results that may not become a row of the table; the message says which and why."""


@dataclass(frozen=True)
class Entry:
    """One row of the table: the project's path of a case beside the best of the others, in seconds."""

    case: Case
    backend: str
    median: float
    iqr: float
    rate: str
    percent: str
    error: float
    baseline: str
    baseline_median: float
    absent: dict[str, str]
    run: dict[str, Any]

    @property
    def speedup(self) -> float:
        return self.baseline_median / self.median


def load(results: Path) -> list[dict[str, Any]]:
    """All runs, oldest first."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*/*.json"))]
    return sorted(runs, key=lambda run: run["datetime"])


def entries(runs: list[dict[str, Any]]) -> dict[str, list[Entry]]:
    """Device to its rows in the table's order, of every case the newest. Raises `Refused`."""
    newest: dict[str, dict[Case, Entry]] = defaultdict(dict)
    for run in runs:
        accepted, refused = judge(run)
        if refused:
            raise Refused("\n".join(refused))
        for (device, case), entry in accepted.items():
            newest[device][case] = entry
    return {device: sorted(of.values(), key=_order) for device, of in sorted(newest.items())}


def judge(run: dict[str, Any]) -> tuple[dict[tuple[str, Case], Entry], list[str]]:
    """The cases of a run by device, and a sentence for each that is refused. Other benchmarks are left alone."""
    cases: dict[tuple, dict[str, dict]] = defaultdict(dict)
    refused, accepted = [], {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        if "op" in info:
            cases[_key(info)][info.get("path")] = benchmark
    for (device, case), rows in cases.items():
        try:
            for row in rows.values():
                _check_row(row["fullname"], row["extra_info"])
            accepted[device, case] = _entry(device, case, rows, run)
        except Refused as problem:
            refused.append(str(problem))
    return accepted, refused


def _key(info: dict[str, Any]) -> tuple[str | None, Case]:
    return info.get("device"), tuple(info.get(key) for key in ("op", "pass", "shape", "dtype"))


def _check_row(name: str, info: dict[str, Any]) -> None:
    missing = [key for key in NEEDED if key not in info]
    if missing:
        raise Refused(f"{name}: the row lacks {', '.join(missing)}")
    if info["op"] not in OPS or info["pass"] not in PASSES:
        raise Refused(f"{name}: no operator {info['op']!r} with a pass {info['pass']!r} is known")
    # NaN is no number below a bound.
    if not (isinstance(info["rms_error"], int | float) and info["rms_error"] <= info["rms_bound"] < math.inf):
        raise Refused(f"{name}: error {info['rms_error']} is not within its bound, {info['rms_bound']}")


def _entry(device: str, case: Case, rows: dict[str, dict], run: dict[str, Any]) -> Entry:
    name = f"{device}, {' '.join(case)}"
    baselines = {path: row["stats"]["median"] for path, row in rows.items() if path != "ours"}
    if "ours" not in rows:
        raise Refused(f"{name}: no row of the project's own path")
    if not any(path == "compiled" or path.startswith("SDPA") for path in baselines):
        raise Refused(f"{name}: nothing compiled stands beside it, only {', '.join(baselines) or 'nothing'}")
    info, stats = rows["ours"]["extra_info"], rows["ours"]["stats"]
    best = min(baselines, key=baselines.get)
    rate = f"{info['gb_per_s']:.3g} GB/s" if info["bound_by"] == "copy" else f"{info['tflop_per_s']:.3g} TFLOP/s"
    return Entry(
        case,
        info["backend"],
        stats["median"],
        stats["iqr"],
        rate,
        f"{info['percent_of_ceiling']:.0f} % ({info['bound_by']})",
        info["rms_error"],
        best,
        baselines[best],
        info.get("absent", {}),
        run,
    )


def _order(entry: Entry) -> tuple:
    op, passes, shape, dtype = entry.case
    numbers = [int(number) for number in re.findall(r"\d+", shape)]
    return list(OPS).index(op), PASSES.index(passes), math.prod(numbers), shape, dtype


def table(devices: dict[str, list[Entry]]) -> str:
    """The generated part of README: a summary of devices by operators, then every device's rows."""
    awaited = [name for name in AWAITED if not any(name in device for device in devices)]
    lines = [
        "Speed-up of each operator over the fastest other path of the same run (eager and compiled PyTorch, SDPA's",
        "kernels, flash-attn, apex, liger-kernel where installed):",
        "",
        f"| device | {' | '.join(OPS.values())} |",
        f"|---|{'---|' * len(OPS)}",
    ]
    for device, rows in [*devices.items(), *((name, []) for name in awaited)]:
        cells = [_range([row.speedup for row in rows if row.case[0] == op]) for op in OPS]
        lines.append(f"| {device} | {' | '.join(cells)} |")
    for device, rows in devices.items():
        lines += ["", f"**{device}** ({'; '.join(dict.fromkeys(_conditions(row.run) for row in rows))}):", ""]
        lines += [
            "| operator, pass | backend | shape, dtype | median ± quartiles | rate | of the ceiling | RMS error | best other | against it |",  # noqa: E501
            f"|{'---|' * 9}",
        ]
        lines += map(_line, rows)
        absent = sorted({f"{path}: {reason}" for row in rows for path, reason in row.absent.items()})
        if absent:
            lines += ["", f"Not beside them: {'; '.join(absent)}."]
    return "\n".join(lines)


def _range(speedups: list[float]) -> str:
    if not speedups:
        return NOT_YET
    low, high = (f"{value:.2f}" for value in (min(speedups), max(speedups)))
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def _line(entry: Entry) -> str:
    op, passes, shape, dtype = entry.case
    spread = entry.iqr / 2 / entry.median
    cells = (
        f"{OPS[op]}, {passes.replace('+', ' + ')}",
        entry.backend,
        f"{shape}, {DTYPES.get(dtype, dtype)}",
        f"{_time(entry.median)} ± {spread:.0%}".replace("%", " %"),
        entry.rate,
        entry.percent,
        f"{entry.error:.1e}",
        f"{entry.baseline}, {_time(entry.baseline_median)}",
        f"{entry.speedup:.2f} ×",
    )
    return f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _conditions(run: dict[str, Any]) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    told = [machine["capability"]]
    if "driver" in machine:
        told += [f"driver {machine['driver']}", f"CUDA {machine['cuda']}"]
    told += [f"PyTorch {machine['torch']}", f"Triton {machine['triton']}"]
    changed = " with changes" if commit["dirty"] else ""
    told += [f"commit {commit['id'][:7]}{changed}", run["datetime"][:10]]
    ceilings = run.get("ceilings", {})
    if ceilings:
        products = [f"{DTYPES[name.removesuffix('_tflop_per_s')]} {rate:.3g}" for name, rate in ceilings.items()
                    if name != "copy_gb_per_s"]  # fmt: skip
        told.append(f"ceilings: copy {ceilings['copy_gb_per_s']:.4g} GB/s, products {', '.join(products)} TFLOP/s")
    return ", ".join(told)


def rewritten(readme: str, generated: str) -> str:
    """README with the generated part between its markers. Raises ValueError where the markers are not there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README needs the lines {BEGIN} and {END}, once each and in this order")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"


def add(file: Path, results: Path) -> list[str]:
    """Puts a file of `--benchmark-json` beside the others of its device, and returns a sentence for each refused case.

    Raises `Refused` where no case is left.
    """
    run = json.loads(file.read_text())
    accepted, refused = judge(run)
    if not accepted:
        raise Refused("\n".join([f"{file.name} has no results that could be added", *refused]))
    run["benchmarks"] = [
        row for row in run["benchmarks"] if "op" not in row["extra_info"] or _key(row["extra_info"]) in accepted
    ]
    slug = re.sub(r"[^a-z0-9]+", "-", run["machine_info"]["device"].lower()).strip("-")
    moment = run["datetime"][:19].replace("T", "-").replace(":", "")
    path = results / slug / f"{moment}-{run['commit_info']['id'][:7]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in run.pop("benchmarks"))
    rest = json.dumps(run, indent=1, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{rest},\n "benchmarks": [\n{rows}\n ]\n}}\n')  # a line for each row
    print(f"Added {path}")
    return refused


def measure(arguments: list[str], results: Path) -> tuple[int, list[str]]:
    """Runs the benchmark and adds what it wrote; returns pytest's exit status and what was refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={file}", *arguments]
        status = subprocess.run(command, cwd=ROOT).returncode
        return status, add(file, results) if file.exists() else []


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing; exit with 1 where README is stale")
    what.add_argument("--measure", action="store_true", help="run the benchmark first")
    what.add_argument("--add", nargs="+", type=Path, default=[], metavar="FILE", help="add results from elsewhere")
    parser.add_argument("pytest_arguments", nargs="*", help="after --, for pytest")
    options = parser.parse_args(arguments)
    results, readme, status = root / "bench" / "results", root / "README.md", 0
    refused: list[str] = []
    try:
        if options.measure:
            status, refused = measure(options.pytest_arguments, results)
        for file in options.add:
            refused += add(file, results)
        text = readme.read_text()
        current = rewritten(text, table(entries(load(results))))
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    if options.check:
        if text != current:
            print("README's kernel table is not what bench/results says: run `make report`", file=sys.stderr)
        return int(text != current)
    readme.write_text(current)
    for sentence in refused:
        print(f"Left out: {sentence}", file=sys.stderr)
    return status or int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())

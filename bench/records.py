"""What `bench/results/<device>/*.json` says: which rows are accepted, which are the newest, and why a case is refused.

A case is what is compared with itself alone: operator, pass, shape and dtype of an operator or a model; setting,
modulation and path of a memory row; workers of the loader. Of every case the newest results of a device count. A
case is refused where

- a row of time kept no accuracy bound, or the project's own row (of a ladder: its first rung) is missing;
- nothing that is compiled or tuned stands beside it: "compiled" or SDPA for an operator, another's " compiled" path
  for a model, "+ compile" for a ladder;
- the classes of a memory prediction do not add up to its total, or a measurement does not say how far off the
  prediction was.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = {
    "modulated_layernorm": "fused adaLN",
    "cross_attention": "cross-attention",
    "self_attention": "self-attention",
    "gated_linear": "linear + gate + residual",
    "linear_gelu": "linear + GELU",
}
MODELS = {
    "block": "block",
    "forward": "forward",
    "train_step": "training step",
    "generate": "generation",
    "ladder": "ladder",
}
TITLES = {**KERNELS, **MODELS}
PASSES = ("forward", "backward", "forward+backward")
MODULATIONS = ("adaln", "adaln_single")
CLASSES = ("parameters", "gradients", "optimizer", "ema", "buffers", "activations", "workspace")
NEEDED = (
    "op",
    "pass",
    "shape",
    "dtype",
    "path",
    "backend",
    "device",
    "gb_per_s",
    "tflop_per_s",
    "bound_by",
    "percent_of_ceiling",
    "rms_error",
    "rms_bound",
)
OF_A_MODEL = ("images_per_s", "mfu_percent", "compile_s", "layers", "batch", "pixels")
OF_THE_LOADER = ("what", "workers", "images_per_s", "mb_per_s", "workers_for_an_h100", "h100_images_per_s")
OF_MEMORY = ("setting", "what", "modulation", "path", "layers", "batch", "pixels", "processes", "dtype", "device")

# Operator, pass, shape, dtype; or "memory", setting, modulation, path; or "loader", what, workers.
Case = tuple[str, ...]
CASES = {"memory": ("setting", "modulation", "path"), "loader": ("what", "workers")}


class Refused(ValueError):
    """Results that may not enter the report; the message says which and why."""


@dataclass(frozen=True)
class Entry:
    """A case as one run measured it: path to row (`extra_info` and `stats` of pytest-benchmark), and the run."""

    case: Case
    rows: dict[str, dict[str, Any]]
    run: dict[str, Any]

    @property
    def op(self) -> str:
        return self.case[0]

    @property
    def infos(self) -> dict[str, dict[str, Any]]:
        return {path: row["extra_info"] for path, row in self.rows.items()}

    @property
    def medians(self) -> dict[str, float]:
        """Seconds by path."""
        return {path: row["stats"]["median"] for path, row in self.rows.items()}

    @property
    def baselines(self) -> list[str]:
        """The paths that are not the project's, fastest first."""
        medians = self.medians
        return sorted((path for path in medians if not path.startswith("ours")), key=medians.get)

    @property
    def baseline(self) -> str:
        return self.baselines[0]

    @property
    def absent(self) -> dict[str, str]:
        """Paths that were not measured, and why."""
        return {path: why for info in self.infos.values() for path, why in info.get("absent", {}).items()}

    def against(self, path: str) -> float | None:
        """How many times faster than a path the project's own is; None where the path was not measured."""
        return self.medians[path] / self.medians["ours"] if path in self.medians else None

    @property
    def speedup(self) -> float:
        return self.against(self.baseline)


def load(results: Path) -> list[dict[str, Any]]:
    """All runs, oldest first."""
    runs = [json.loads(path.read_text()) | {"file": str(path)} for path in sorted(results.glob("*/*.json"))]
    return sorted(runs, key=lambda run: run["datetime"])


def entries(runs: list[dict[str, Any]]) -> dict[str, list[Entry]]:
    """Device to its cases in the report's order, of each the newest; GPUs first, the newest first. Raises `Refused`."""
    newest: dict[str, dict[Case, Entry]] = defaultdict(dict)
    for run in runs:
        accepted, refused = judge(run)
        if refused:
            raise Refused("\n".join(refused))
        for (device, case), entry in accepted.items():
            newest[device][case] = entry
    devices = {device: sorted(of.values(), key=_order) for device, of in newest.items()}
    return dict(sorted(devices.items(), key=_generation))


def judge(run: dict[str, Any]) -> tuple[dict[tuple[str, Case], Entry], list[str]]:
    """The cases of a run by device, and a sentence for each that is refused. Other benchmarks are left alone."""
    cases: dict[tuple, dict[str, dict]] = defaultdict(dict)
    refused, accepted = [], {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        if "op" in info:
            cases[key(info)][info.get("path")] = benchmark
    for (device, case), rows in cases.items():
        try:
            for row in rows.values():
                check = {"memory": _check_memory, "loader": _check_loader}.get(case[0], _check_time)
                check(row["fullname"], row["extra_info"])
            if case[0] not in CASES:
                _check_company(f"{device}, {' '.join(case)}", case[0], rows)
            accepted[device, case] = Entry(case, rows, run)
        except Refused as problem:
            refused.append(str(problem))
    return accepted, refused


def key(info: dict[str, Any]) -> tuple[str | None, Case]:
    """Device and case of a row."""
    names = CASES.get(info["op"], ("pass", "shape", "dtype"))
    return info.get("device"), (info["op"], *(info.get(name) for name in names))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _lacking(name: str, info: dict[str, Any], needed: tuple[str, ...]) -> None:
    missing = [field for field in needed if field not in info]
    if missing:
        raise Refused(f"{name}: the row lacks {', '.join(missing)}")


def _check_time(name: str, info: dict[str, Any]) -> None:
    _lacking(name, info, NEEDED + (OF_A_MODEL if info["op"] in MODELS else ()))
    if info["op"] not in TITLES or info["pass"] not in PASSES:
        raise Refused(f"{name}: no operator {info['op']!r} with a pass {info['pass']!r} is known")
    # NaN is no number below a bound.
    if not (_number(info["rms_error"]) and info["rms_error"] <= info["rms_bound"] < math.inf):
        raise Refused(f"{name}: error {info['rms_error']} is not within its bound, {info['rms_bound']}")
    if info["op"] == "ladder":
        _lacking(name, info, ("rung",))


def _check_company(name: str, op: str, rows: dict[str, dict]) -> None:
    """The project's own path and a compiled or tuned one have to be among the rows of a case."""
    beside = [path for path in rows if not path.startswith("ours")]
    own = "eager" if op == "ladder" else "ours"
    if own not in rows:
        raise Refused(f"{name}: no row of " + ("its first rung, eager" if op == "ladder" else "the project's own path"))
    if op == "ladder":
        tuned = "+ compile" in rows
    elif op in MODELS:
        tuned = any(path.endswith(" compiled") for path in beside)
    else:
        tuned = any(path == "compiled" or path.startswith("SDPA") for path in beside)
    if not tuned:
        raise Refused(f"{name}: nothing compiled stands beside it, only {', '.join(beside) or 'nothing'}")


def _check_memory(name: str, info: dict[str, Any]) -> None:
    _lacking(name, info, (*OF_MEMORY, "bytes"))
    if info["path"] not in ("predicted", "measured") or info["modulation"] not in MODULATIONS:
        raise Refused(f"{name}: no memory {info['path']!r} of a modulation {info['modulation']!r} is known")
    bytes_of = info["bytes"]
    _lacking(f"{name}, bytes", bytes_of, (*CLASSES, "total") if info["path"] == "predicted" else ("total",))
    if info["path"] == "predicted":
        total = sum(bytes_of[of] for of in CLASSES)
        if total != bytes_of["total"]:
            raise Refused(f"{name}: the classes of the prediction add up to {total}, not {bytes_of['total']}")
    elif not _number(info.get("error_percent")):
        raise Refused(f"{name}: the measurement does not say how far off the prediction was (error_percent)")


def _check_loader(name: str, info: dict[str, Any]) -> None:
    _lacking(name, info, OF_THE_LOADER)
    if not _number(info["images_per_s"]):
        raise Refused(f"{name}: {info['images_per_s']} is no rate")


def _order(entry: Entry) -> tuple:
    """Operators as listed, then passes, sizes, dtypes; memory in the order in which it was measured; the loader."""
    if entry.op == "loader":
        return len(TITLES) + 1, *entry.case
    if entry.op == "memory":
        _, setting, modulation, path = entry.case
        settings = [row["extra_info"].get("setting") for row in entry.run["benchmarks"]]
        return len(TITLES), 0, (settings.index(setting),), modulation, path == "measured"
    op, passes, shape, dtype = entry.case
    if op in MODELS:
        info = next(iter(entry.infos.values()))
        size = info["layers"], info["pixels"], info["batch"]
    else:
        size = (math.prod(int(number) for number in re.findall(r"\d+", shape)),)
    return list(TITLES).index(op), PASSES.index(passes), size, shape, dtype


def _generation(item: tuple[str, list[Entry]]) -> tuple:
    """GPUs before processors, the newer architecture and the larger memory first."""
    device, of = item
    machine = of[-1].run["machine_info"]
    architecture = re.fullmatch(r"sm_(\d+)", machine["capability"])
    return -int(architecture[1]) if architecture else 1, -machine.get("memory_gib", 0), device


@dataclass(frozen=True)
class Pair:
    """Peak memory of a training step in one setting, adaLN beside adaLN-single.

    predicted   bytes by class and in total, by modulation
    measured    bytes in total and the error of the prediction in percent, by device and modulation
    """

    info: dict[str, Any]
    predicted: dict[str, dict[str, int]]
    measured: dict[str, dict[str, tuple[int, float]]]


def pairs(devices: dict[str, list[Entry]]) -> list[Pair]:
    """The settings of XL/2's 28 blocks that both modulations were predicted for.

    Of a setting's predictions the newest counts: from machine to machine only the workspaces of cuBLAS differ.
    """
    found: dict[str, Pair] = {}
    memory = [entry for of in devices.values() for entry in of if entry.op == "memory"]
    for entry in sorted(memory, key=lambda entry: entry.run["datetime"]):
        ((path, info),) = entry.infos.items()
        if info["layers"] != 28:
            continue
        pair = found.setdefault(info["setting"], Pair(info, {}, {}))
        if path == "predicted":
            pair.predicted[info["modulation"]] = info["bytes"]
        else:
            of = pair.measured.setdefault(info["device"], {})
            of[info["modulation"]] = info["bytes"]["total"], info["error_percent"]
    # In the order of the run that has most of them: a later run of a few settings does not move those.
    settings = [[row["extra_info"].get("setting") for row in entry.run["benchmarks"]] for entry in memory]
    order = list(dict.fromkeys([*max(settings, key=lambda of: len(set(of)), default=[]), *found]))
    complete = [pair for pair in found.values() if set(pair.predicted) == set(MODULATIONS)]
    return sorted(complete, key=lambda pair: order.index(pair.info["setting"]))


def last(results: Path, device: str) -> dict[str, Any] | None:
    """The newest row of each benchmark of a device, as one run, for `--benchmark-compare`; "file" names the files.

    Memory rows are not among them: their seconds are those of a prediction. None where the device has no results.
    """
    runs = [run for run in load(results) if run["machine_info"]["device"] == device]
    newest: dict[str, tuple[dict[str, Any], str]] = {}
    for run in runs:
        for row in run["benchmarks"]:
            if row["extra_info"].get("op") != "memory":
                newest[row["fullname"]] = row, run["file"]
    if not newest:
        return None
    files = sorted({Path(file).name for _, file in newest.values()})
    return runs[-1] | {"benchmarks": [row for row, _ in newest.values()], "file": ", ".join(files)}

"""The report's words: README's generated parts and `docs/benchmarks.md`, as Markdown."""

import re
from typing import Any

from bench.records import CLASSES, KERNELS, MODELS, MODULATIONS, TITLES, Entry, pairs

Devices = dict[str, list[Entry]]

AWAITED = ("NVIDIA H200", "NVIDIA H100", "NVIDIA A100")  # a line each, measured or not
NOT_YET = "not measured yet"
NONE = "–"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OURS = ("ours", "ours compiled")
DIFFUSERS = ("diffusers eager", "diffusers compiled")
# PixArt-α, the ablation of adaLN-single: GB of GPU memory in training. Neither batch nor precision is stated.
PAPER = {"adaln": 29, "adaln_single": 23}
PICTURES = {
    "roofline": "achieved rates below the measured ceilings",
    "ladder": "one change after the other, against eager PyTorch",
    "memory": "memory of a training step by class, adaLN beside adaLN-single",
}


def parts(devices: Devices, pictures: set[str]) -> dict[str, str]:
    """README's generated parts by the name in their markers, with those of the pictures that there are."""
    shown = {"kernel table": "roofline", "model table": None, "ladder table": "ladder", "memory table": "memory"}
    texts = {
        "kernel table": kernel_summary(devices),
        "model table": model_summary(devices),
        "ladder table": ladder(devices),
        "memory table": memory_summary(devices),
    }
    for name, picture in shown.items():
        if picture in pictures:
            texts[name] += ["", _picture(picture, "docs/")]
    return {name: "\n".join(lines) for name, lines in texts.items()}


def page(devices: Devices, pictures: set[str]) -> str:
    """All of `docs/benchmarks.md`: every case of every device."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.report` from `bench/results/`: change the results, not this file. A median stands",
        "with half the distance of the quartiles. A ceiling is what a large copy or matrix product reached in the same",
        "run on the same device; a rate counts the least bytes and arithmetic of a case, so that redundant work lowers",
        "it. The RMS error is relative to fp64; no path is timed that errs more than its bound.",
    ]
    for picture in (name for name in PICTURES if name in pictures):
        lines += ["", _picture(picture, "")]
    for device, of in devices.items():
        lines += ["", f"## {device}", ""]
        lines += [f"- {told}" for told in dict.fromkeys(_conditions(entry.run) for entry in of)]
        models = [op for op in MODELS if op != "ladder"]
        for title, ops, table in (("Operators", KERNELS, _kernels), ("Models", models, _models),
                                  ("Ladder", ("ladder",), _models), ("Memory", ("memory",), _memory),
                                  ("Loader", ("loader",), _loader)):  # fmt: skip
            chosen = [entry for entry in of if entry.op in ops]
            if chosen:
                lines += ["", f"### {title}", "", *table(chosen), *_absent(chosen)]
    return "\n".join([*lines, ""])


def kernel_summary(devices: Devices) -> list[str]:
    lines = [
        "Speed-up of each operator over the fastest other path of the same run (eager and compiled PyTorch, SDPA's",
        "kernels, flash-attn, apex, liger-kernel where installed), every case of which is in",
        "[docs/benchmarks.md](docs/benchmarks.md):",
        "",
        *_head("device", *KERNELS.values()),
    ]
    for device, of in _with_awaited(devices):
        cells = [_range([entry.speedup for entry in of if entry.op == op]) for op in KERNELS]
        lines.append(_line(device, *cells))
    return lines


def model_summary(devices: Devices) -> list[str]:
    """Of the batch sizes of a case, the one with the most images/s."""
    lines = [
        "Whole models, 28 blocks, or fewer where it says so; of several batch sizes the one at which ours makes the",
        "most images/s. Ours is so many times as fast as the best other path, as diffusers' class in eager PyTorch,",
        "and as diffusers' compiled. To compile is the first call of a compiled path, with an empty cache.",
        "",
        *_head("device", "what", "images/s", "of the peak", "against the best other", "diffusers eager",
               "diffusers compiled", "to compile, s: ours, diffusers"),
    ]  # fmt: skip
    for device, of in _with_awaited(devices):
        best: dict[tuple, Entry] = {}
        for entry in (entry for entry in of if entry.op in ("forward", "train_step", "generate")):
            case = (*entry.case[:2], re.sub(r"\bB\d+\b", "", entry.case[2]), entry.case[3])
            if case not in best or _rate(entry) > _rate(best[case]):
                best[case] = entry
        for entry in best.values():
            info = entry.infos["ours"]
            share = f"{info['percent_of_ceiling']:.0f} % of the ceiling"
            if info["mfu_percent"] is not None:
                share = f"{info['mfu_percent']:.0f} % MFU"
            compiling = [_seconds(entry, OURS), _seconds(entry, DIFFUSERS)]
            lines.append(
                _line(device, f"{TITLES[entry.op]}, {_shape(entry)}", three(_rate(entry)), share,
                      f"{_ratio(entry.speedup)} ({entry.baseline})", *map(_ratio, map(entry.against, DIFFUSERS)),
                      ", ".join(compiling))
            )  # fmt: skip
        if not best:
            lines.append(_line(device, NOT_YET, *[NONE] * 6))
    return lines


def ladder(devices: Devices) -> list[str]:
    """A row a rung, a column a case."""
    cases = [(device, entry) for device, of in devices.items() for entry in of if entry.op == "ladder"]
    if not cases:
        return [f"The ladder of changes, from eager PyTorch to CUDA graphs: {NOT_YET}."]
    rungs = {}
    for _, entry in cases:
        rungs |= {path: info["rung"] for path, info in entry.infos.items()}
    lines = [
        "One change a row; images/s, and how often faster than the first row:",
        "",
        *_head("", *(f"{device}: {_shape(entry)}" for device, entry in cases)),
    ]
    for rung in sorted(rungs, key=rungs.get):
        lines.append(_line(rung, *(_rung(entry, rung) for _, entry in cases)))
    return lines + _absent([entry for _, entry in cases])


def memory_summary(devices: Devices) -> list[str]:
    """The settings that have a prediction of both modulations, after the paper's own figures."""
    found = pairs(devices)
    measured = list(dict.fromkeys(device for pair in found for device in pair.measured))
    told = [f"measured on {device}: adaLN, adaLN-single (error of the prediction)" for device in measured]
    gb = {name: f"{value} GB" for name, value in PAPER.items()}
    lines = [
        "Peak memory of a training step at XL/2 with DiT's modulation MLP in every block (adaLN, 833M parameters in",
        "the paper) and with adaLN-single (611M, −26 %). The paper states neither batch nor precision:",
        "",
        *_head("", "adaLN", "adaLN-single", "saved", *told),
        _line("the paper", *(gb[name] for name in MODULATIONS), _saving(PAPER), *[NONE] * len(measured)),
    ]
    if not found:
        lines.append(_line("predicted", *[NOT_YET] * 3))
    for pair in found:
        totals = {name: of["total"] for name, of in pair.predicted.items()}
        cells = [_measured(pair.measured.get(device, {})) for device in measured]
        sizes = [size(totals[name]) for name in MODULATIONS]
        lines.append(_line(f"predicted: {pair.info['what']}", *sizes, _saving(totals), *cells))
    return lines


def _kernels(entries: list[Entry]) -> list[str]:
    lines = _head("operator, pass", "backend", "shape, dtype", "median", "rate", "of the ceiling", "RMS error",
                  "others", "against the best")  # fmt: skip
    for entry in entries:
        info, medians = entry.infos["ours"], entry.medians
        others = ", ".join(f"{path} {duration(medians[path])}" for path in entry.baselines)
        lines.append(
            _line(_what(entry), info["backend"], _shape(entry), _median(entry, "ours"),
                  _achieved(info), f"{info['percent_of_ceiling']:.0f} % ({info['bound_by']})",
                  f"{info['rms_error']:.1e}", others, _ratio(entry.speedup))
        )  # fmt: skip
    return lines


def _models(entries: list[Entry]) -> list[str]:
    """A row for each path; of a ladder, how often faster it is than eager, else how often faster ours is than it."""
    of_a_ladder = entries[0].op == "ladder"
    lines = _head("what, shape, dtype", "path", "median", "images/s", "MFU", "rate", "of the ceiling", "RMS error",
                  "to compile", "against eager" if of_a_ladder else "ours against it")  # fmt: skip
    for entry in entries:
        what = f"{_what(entry)}, {_shape(entry)}"
        for path, info in entry.infos.items():
            ratio = entry.medians["eager"] / entry.medians[path] if of_a_ladder else entry.against(path)
            cells = (
                what,
                path if info["backend"] == path else f"{path} ({info['backend']})",
                _median(entry, path),
                three(info["images_per_s"]),
                NONE if info["mfu_percent"] is None else f"{info['mfu_percent']:.1f} %",
                _achieved(info),
                f"{info['percent_of_ceiling']:.0f} % ({info['bound_by']})",
                f"{info['rms_error']:.1e}",
                NONE if info["compile_s"] is None else f"{info['compile_s']:.1f} s",
                _ratio(ratio),
            )
            lines.append(_line(*cells))
            what = ""  # said once for all paths
    return lines


def _memory(entries: list[Entry]) -> list[str]:
    lines = _head("setting", "modulation", "", "total", *CLASSES, "prediction off by")
    said = None
    for entry in entries:
        ((path, info),) = entry.infos.items()
        held = info["bytes"]
        error = _error(info["error_percent"]) if path == "measured" else NONE
        cells = [size(held[of]) if held.get(of) else NONE for of in CLASSES]
        what = "" if info["what"] == said else info["what"]
        lines.append(_line(what, info["modulation"], path, size(held["total"]), *cells, error))
        said = info["what"]
    return lines


def _loader(entries: list[Entry]) -> list[str]:
    """Workers that prepare batches, beside what a training step of an H100 takes."""
    infos = [info for entry in entries for info in entry.infos.values()]
    h100, what = (infos[-1][name] for name in ("h100_images_per_s", "what"))
    lines = [
        f"Stored features to batches: {what}. An H100 takes {three(h100['at_40_percent_mfu'])} images/s at 40 % MFU,",
        f"{three(h100['planned'])} by `bench.plan` ({h100['known']}); workers for an H100 are for the larger of both.",
        "",
        *_head("workers", "images/s", "MB/s of the store", "workers for an H100"),
    ]
    for info in infos:
        workers = str(info["workers"]) if info["workers"] else "none, in the training process"
        needed = f"{info['workers_for_an_h100']:.2f}" if info["workers"] else NONE
        lines.append(_line(workers, three(info["images_per_s"]), three(info["mb_per_s"]), needed))
    return lines


def _absent(entries: list[Entry]) -> list[str]:
    absent = sorted({f"{path}: {why}" for entry in entries for path, why in entry.absent.items()})
    return ["", f"Not beside them: {'; '.join(absent)}."] if absent else []


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


def _with_awaited(devices: Devices) -> list[tuple[str, list[Entry]]]:
    awaited = [name for name in AWAITED if not any(name in device for device in devices)]
    return [*devices.items(), *((name, []) for name in awaited)]


def _picture(name: str, folder: str) -> str:
    return f"![{PICTURES[name]}]({folder}{name}.png)"


def _head(*names: str) -> list[str]:
    return [_line(*names), f"|{'---|' * len(names)}"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _what(entry: Entry) -> str:
    """The title, with the pass of what may be run in several."""
    passes = f", {entry.case[1].replace('+', ' + ')}" if entry.op in (*KERNELS, "block") else ""
    return f"{TITLES[entry.op]}{passes}"


def _shape(entry: Entry) -> str:
    return f"{entry.case[2]}, {DTYPES.get(entry.case[3], entry.case[3])}"


def _rate(entry: Entry) -> float:
    return entry.infos["ours"]["images_per_s"]


def _achieved(info: dict[str, Any]) -> str:
    if info["bound_by"] == "copy":
        return f"{three(info['gb_per_s'])} GB/s"
    return f"{three(info['tflop_per_s'])} TFLOP/s"


def _rung(entry: Entry, rung: str) -> str:
    if rung not in entry.rows:
        return NONE
    return f"{three(entry.infos[rung]['images_per_s'])}, {_ratio(entry.medians['eager'] / entry.medians[rung])}"


def _seconds(entry: Entry, paths: tuple[str, ...]) -> str:
    """How long the first of some paths that is compiled took to compile."""
    told = [entry.infos[path]["compile_s"] for path in paths if path in entry.rows]
    return next((f"{seconds:.0f}" for seconds in told if seconds is not None), NONE)


def _median(entry: Entry, path: str) -> str:
    stats = entry.rows[path]["stats"]
    return f"{duration(stats['median'])} ± {100 * stats['iqr'] / 2 / stats['median']:.0f} %"


def _measured(of: dict[str, tuple[int, float]]) -> str:
    told = [f"{size(of[name][0])} ({_error(of[name][1])})" if name in of else NONE for name in MODULATIONS]
    return ", ".join(told) if of else NONE


def _error(percent: float) -> str:
    return f"{round(percent, 1) + 0.0:+.1f} %".replace("-", "−")  # no −0.0


def _saving(totals: dict[str, float]) -> str:
    return f"{100 * (1 - totals['adaln_single'] / totals['adaln']):.0f} %"


def _range(speedups: list[float]) -> str:
    if not speedups:
        return NOT_YET
    low, high = (f"{value:.2f}" for value in (min(speedups), max(speedups)))
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f} ×"


def three(value: float) -> str:
    """Three digits, and noughts where there are more before the point."""
    return f"{float(f'{value:.3g}'):g}"


def duration(seconds: float) -> str:
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(count: int) -> str:
    """Bytes in GB of 1e9."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else "< 0.1 MB"

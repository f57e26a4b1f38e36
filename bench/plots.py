"""The report's pictures in `docs/`: roofline, ladder and memory, each drawn from plain data that is derived here.

A PNG keeps the hash of its data in a text chunk, so that `python -m bench.report --check` tells a stale one without
comparing pixels, which differ between versions of matplotlib and its fonts.
"""

import hashlib
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.records import CLASSES, MODULATIONS, TITLES, Entry, pairs
from bench.tables import DTYPES, PAPER, duration

Data = dict[str, Any]

CHUNK = "Data-SHA256"
WIDTH = 10.0  # inches; 1200 pixels, which README shows at about 900
DPI = 120
COLORS = dict(zip(TITLES, plt.get_cmap("tab10").colors, strict=False))
# Of a pair of bars: what stays as it is in blues, then buffers, activations, workspace.
SHADES = ("#08519c", "#3182bd", "#6baed6", "#bdd7e7", "#31a354", "#fd8d3c", "#969696")
STYLES = {"adaln": "--", "adaln_single": ":"}
MARKERS = {"float32": "s", "bfloat16": "o", "float16": "^"}
# flop/byte between which cases without matrix products stand side by side: they have no intensity, and only how far
# they are below the line of the copy counts.
WITHOUT_PRODUCTS = (0.5, 2.0)


def drawings(devices: dict[str, list[Entry]]) -> dict[str, Data | None]:
    """What each picture shows, by its name; None where there is nothing to show."""
    return {"roofline": roofline(devices), "ladder": ladder(devices), "memory": memory(devices)}


def digest(data: Data) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def shown(path: Path) -> str | None:
    """The hash of what a picture shows; None where there is no picture."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(CHUNK, "none")


def draw(name: str, data: Data | None, path: Path) -> None:
    """Writes a picture, or removes it where it has nothing to show."""
    if data is None:
        path.unlink(missing_ok=True)
        return
    figure = {"roofline": _draw_roofline, "ladder": _draw_ladder, "memory": _draw_memory}[name](data)
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={CHUNK: digest(data)})
    plt.close(figure)


def roofline(devices: dict[str, list[Entry]]) -> Data | None:
    """By device the measured ceilings and a point for each case: intensity (flop/byte), TFLOP/s of ours, of the best
    other path, operator, dtype. Of the runs of a device the newest ceilings are drawn."""
    panels = {}
    for device, of in devices.items():
        timed = [entry for entry in of if entry.op in TITLES and entry.op != "ladder"]
        runs = [entry.run for entry in timed if entry.run.get("ceilings")]
        if timed and runs:
            ceilings = max(runs, key=lambda run: run["datetime"])["ceilings"]
            panels[device] = {"ceilings": ceilings, "points": _points(timed)}
    return panels or None


def _points(entries: list[Entry]) -> list[Data]:
    points, (low, high) = [], WITHOUT_PRODUCTS
    without = [entry for entry in entries if not entry.infos["ours"]["tflop_per_s"]]
    for entry in entries:
        ours, other = entry.infos["ours"], entry.infos[entry.baseline]
        if entry in without:
            intensity = low * (high / low) ** ((without.index(entry) + 0.5) / len(without))
        else:
            intensity = ours["tflop_per_s"] * 1e3 / ours["gb_per_s"]
        numbers = {"intensity": intensity, "ours": intensity * ours["gb_per_s"] / 1e3}
        numbers["other"] = intensity * other["gb_per_s"] / 1e3
        point = {"op": entry.op, "dtype": entry.case[3], "products": entry not in without}
        # Six digits: the last ones of a power are not the same on every machine, and would change the hash.
        points.append(point | {name: float(f"{number:.6g}") for name, number in numbers.items()})
    return points


def ladder(devices: dict[str, list[Entry]]) -> Data | None:
    """By device and case the rungs in order: seconds, and how often faster than eager; None for one that is absent."""
    panels, places = {}, {}
    for device, of in devices.items():
        for entry in (entry for entry in of if entry.op == "ladder"):
            infos, medians = entry.infos, entry.medians
            places |= {rung: info["rung"] for rung, info in infos.items()}
            title = f"{device}\n{entry.case[2]}, {DTYPES.get(entry.case[3], entry.case[3])}"
            panels[title] = {rung: [medians[rung], medians["eager"] / medians[rung]] for rung in infos}
    rungs = sorted(places, key=places.get)
    return {title: {rung: of.get(rung) for rung in rungs} for title, of in panels.items()} or None


def memory(devices: dict[str, list[Entry]]) -> Data | None:
    """A group for each setting of one process that both modulations were predicted for: bytes by class, and totals as
    measured."""
    groups = [
        {"what": pair.info["what"], "predicted": pair.predicted, "measured": pair.measured}
        for pair in pairs(devices)
        if pair.info["processes"] == 1
    ]
    return {"groups": groups, "paper": PAPER} if groups else None


def _panels(count: int, height: float) -> tuple[plt.Figure, list[Axes]]:
    """Two to a row, each of a height in inches."""
    columns, rows = min(2, count), math.ceil(count / 2)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.08)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _draw_roofline(panels: Data) -> plt.Figure:
    figure, grid = _panels(len(panels), 5.2)
    for axes, (device, panel) in zip(grid, panels.items(), strict=True):
        _roof(axes, panel)
        axes.set(title=device, xlabel="least arithmetic / least bytes, flop/byte", ylabel="TFLOP/s")
    points = [point for panel in panels.values() for point in panel["points"]]
    ops = [op for op in TITLES if any(point["op"] == op for point in points)]
    dtypes = [dtype for dtype in MARKERS if any(point["dtype"] == dtype for point in points)]
    handles = [Line2D([], [], color=COLORS[op], marker="o", ls="", label=_name(op, points)) for op in ops]
    handles += [Line2D([], [], color="0.3", marker=MARKERS[dtype], ls="", label=DTYPES[dtype]) for dtype in dtypes]
    handles.append(Line2D([], [], color="0.3", marker="o", mfc="white", ls="", label="hollow: the best other path"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _name(op: str, points: list[Data]) -> str:
    products = any(point["products"] for point in points if point["op"] == op)
    return TITLES[op] if products else f"{TITLES[op]} (bytes alone: no products)"


def _roof(axes: Axes, panel: Data) -> None:
    """Ceilings as lines, every case as a point of ours, joined to that of the best other path."""
    ceilings, points = panel["ceilings"], panel["points"]
    copy = ceilings["copy_gb_per_s"] / 1e3
    dtypes = [dtype for dtype in MARKERS if any(point["dtype"] == dtype for point in points)]
    ridges = {dtype: ceilings[f"{dtype}_tflop_per_s"] / copy for dtype in dtypes}
    left = min(point["intensity"] for point in points) / 2
    right = max(*(point["intensity"] for point in points), *ridges.values())
    # The names of the ceilings stand to the right of all points.
    edge = right * (right / left) ** 0.35
    axes.set(xscale="log", yscale="log", xlim=(left, edge))
    for dtype, ridge in ridges.items():
        axes.plot([left, ridge, edge], [left * copy, ridge * copy, ridge * copy], color="0.45", lw=1, zorder=1)
        axes.annotate(f"{DTYPES[dtype]} products\n{ridge * copy:.3g} TFLOP/s", (edge, ridge * copy), xytext=(-4, -3),
                      textcoords="offset points", ha="right", va="top", fontsize=8, color="0.3")  # fmt: skip
    middle = math.sqrt(left * max(ridges.values()))
    axes.text(middle, middle * copy * 1.15, f"copy, {copy * 1e3:.4g} GB/s", fontsize=8, color="0.3", ha="center",
              va="bottom", rotation=math.degrees(math.atan(copy)), rotation_mode="anchor",
              transform_rotates_text=True)  # fmt: skip
    for point in points:
        color, marker, x = COLORS[point["op"]], MARKERS[point["dtype"]], point["intensity"]
        axes.plot([x, x], [point["other"], point["ours"]], color=color, lw=0.8, alpha=0.6, zorder=2)
        axes.plot(x, point["other"], marker, mfc="white", mec=color, ms=5, zorder=3)
        axes.plot(x, point["ours"], marker, color=color, mec="white", mew=0.5, ms=6.5, zorder=4)
    axes.grid(alpha=0.25, which="major")


def _draw_ladder(panels: Data) -> plt.Figure:
    rungs = list(next(iter(panels.values())))
    figure, grid = _panels(len(panels), 1.1 + 0.36 * len(rungs))
    for axes, (title, of) in zip(grid, panels.items(), strict=True):
        ratios = [of[rung][1] if of[rung] else 0 for rung in rungs]
        bars = axes.barh(rungs, ratios, color=["0.6", *["tab:blue"] * (len(rungs) - 1)], height=0.65)
        labels = [f"{of[rung][1]:.2f} ×, {duration(of[rung][0])}" if of[rung] else "none here" for rung in rungs]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set(xlim=(0, max(ratios) * 1.45), xlabel="times as fast as eager PyTorch")
        axes.set_title(title, fontsize=10)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_memory(data: Data) -> plt.Figure:
    """A pair of stacked bars for each setting, adaLN above adaLN-single; diamonds are measurements."""
    groups, shades = data["groups"], dict(zip(CLASSES, SHADES, strict=True))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.7 + 0.68 * len(groups)), layout="constrained")
    devices = sorted({device for group in groups for device in group["measured"]})
    behind = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}  # the paper's lines do not cross the words
    for number, group in enumerate(groups):
        what = textwrap.shorten(group["what"], 160, placeholder=" …")  # a line of the picture's width
        axes.text(0, number - 0.31, f" {what}", fontsize=8, va="bottom", bbox=behind, zorder=4)
        for modulation, y in zip(MODULATIONS, (number - 0.13, number + 0.21), strict=True):
            left = 0.0
            for of in CLASSES:
                width = group["predicted"][modulation][of] / 1e9
                axes.barh(y, width, 0.3, left, color=shades[of])
                left += width
            measured = [of[modulation][0] / 1e9 for of in group["measured"].values() if modulation in of]
            axes.plot(measured, [y] * len(measured), "kD", ms=5, mfc="white", zorder=5)
            told = "".join(f", measured {total:.1f}" for total in measured)
            axes.annotate(f"predicted {left:.1f} GB{told}", (max(left, *measured, 0), y), xytext=(7, 0), zorder=4,
                          textcoords="offset points", va="center", fontsize=8, bbox=behind)  # fmt: skip
    places = [number + offset for number in range(len(groups)) for offset in (-0.13, 0.21)]
    axes.set_yticks(places, ["adaLN", "adaLN-single"] * len(groups), fontsize=8)
    for modulation, style in STYLES.items():
        axes.axvline(data["paper"][modulation], color="tab:red", lw=1, ls=style, zorder=3)
    axes.set(ylim=(len(groups) - 0.55, -0.6), xlabel="peak memory of a training step at XL/2, GB")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.28)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=shades[of], label=f"{of}, predicted") for of in CLASSES]
    for name, (modulation, style) in zip(("adaLN", "adaLN-single"), STYLES.items(), strict=True):
        told = f"the paper, {name}: {data['paper'][modulation]} GB"
        handles.append(Line2D([], [], color="tab:red", ls=style, label=told))
    if devices:
        told = f"measured on {', '.join(devices)}"
        handles.append(Line2D([], [], color="k", marker="D", mfc="white", ls="", label=told))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure

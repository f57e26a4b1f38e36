"""The end of a run on one page: `report.json` for programs, `report.md` with curves and pictures for people."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from train.monitor import EVALUATIONS, METRICS, read_rows

SPLITS = {"seen": "new captions", "held_out": "never-seen pairs", "classes": "classes"}
RATES = ("background", "colour", "size", "count", "binding", "position", "relation", "all_correct")


def plot_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and its two parts over the steps."""
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = [row["step"] for row in rows]
    for name in ("loss", "mse", "vb"):
        axes.plot(steps, [row[name] for row in rows], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_timesteps(rows: list[dict[str, Any]], path: Path) -> None:
    """The squared error by bin of timesteps over the steps, from almost clean to pure noise."""
    rows = [row for row in rows if row.get("mse_by_timestep")]
    figure, axes = plt.subplots(figsize=(7, 4))
    bins = len(rows[0]["mse_by_timestep"])
    for place in range(bins):
        values = [row["mse_by_timestep"][place] for row in rows]
        values = [float("nan") if value is None else value for value in values]
        label = f"{place / bins:g} to {(place + 1) / bins:g}"
        colour = plt.colormaps["viridis"](place / max(bins - 1, 1))
        axes.plot([row["step"] for row in rows], values, label=label, color=colour, linewidth=1)
    axes.set(xlabel="step", ylabel="squared error of the noise", yscale="log")
    axes.legend(title="t / T", fontsize=7, ncols=2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_accuracy(rows: list[dict[str, Any]], path: Path) -> None:
    """What the oracle finds right in the pictures of the first split, over the steps; dashed: never-seen pairs."""
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = [row["step"] for row in rows]
    split = next(name for name in SPLITS if name in rows[0])
    for rate in (name for name in RATES if any(name in row[split] for row in rows)):
        (line,) = axes.plot(steps, [row[split].get(rate, float("nan")) for row in rows], label=rate, marker=".")
        if rate == "binding" and "held_out" in rows[0]:
            held_out = [row["held_out"][rate] for row in rows]
            axes.plot(steps, held_out, "--", color=line.get_color(), label="binding, never-seen pairs", marker=".")
    axes.set(xlabel="step", ylabel="pictures right", ylim=(0, 1.02))
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def write_report(output: Path, summary: dict[str, Any], grid: str | None) -> None:
    """Write `report.json`, `report.md` and the plots they show into a run's folder."""
    (output / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = [f"# {output.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {_text(value)} |" for name, value in summary.items() if name != "accuracy"]
    metrics = read_rows(output / METRICS)
    if metrics:
        plot_loss(metrics, output / "loss.png")
        lines += ["", "![loss](loss.png)"]
        if any(row.get("mse_by_timestep") for row in metrics):
            plot_timesteps(metrics, output / "timesteps.png")
            lines += ["", "![squared error by timestep](timesteps.png)"]
    accuracy = summary.get("accuracy")
    if accuracy:
        splits = [split for split in SPLITS if split in accuracy]
        lines += ["", "Pictures that are right, as the oracle reads them:", ""]
        lines += [f"| | {' | '.join(SPLITS[split] for split in splits)} |", "|---" * (1 + len(splits)) + "|"]
        for rate in (name for name in RATES if any(name in accuracy[split] for split in splits)):
            cells = " | ".join(_rate(accuracy[split], rate) for split in splits)
            lines.append(f"| {rate.replace('_', ' ')} | {cells} |")
    evaluations = [row for row in read_rows(output / EVALUATIONS) if row.keys() & SPLITS.keys()]
    if evaluations:
        plot_accuracy(evaluations, output / "accuracy.png")
        lines += ["", "![accuracy](accuracy.png)"]
    if grid:
        lines += [
            "",
            f"![samples]({grid})",
            "",
            "![the same from the same noise, over the steps](samples/progress.png)",
        ]
    (output / "report.md").write_text("\n".join(lines) + "\n")


def _rate(rates: dict[str, float], name: str) -> str:
    return f"{rates[name]:.3f}" if name in rates else "–"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else f"{value}"

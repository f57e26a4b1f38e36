"""The end of a run on one page: `report.json` for programs, `report.md` with curves and pictures for people."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from train.monitor import EVALUATIONS, METRICS, read_rows

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


def plot_accuracy(rows: list[dict[str, Any]], path: Path) -> None:
    """What the oracle finds right in pictures of new captions, over the steps; dashed: never-seen pairs."""
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = [row["step"] for row in rows]
    for rate in (name for name in RATES if any(name in row["seen"] for row in rows)):
        (line,) = axes.plot(steps, [row["seen"].get(rate, float("nan")) for row in rows], label=rate, marker=".")
        if rate == "binding":
            held_out = [row["held_out"][rate] for row in rows]
            axes.plot(steps, held_out, "--", color=line.get_color(), label="binding, never-seen pairs", marker=".")
    axes.set(xlabel="step", ylabel="captions right", ylim=(0, 1.02))
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
    if summary.get("accuracy"):
        lines += [
            "",
            "Captions whose picture is right, as the oracle reads it:",
            "",
            "| | new captions | never-seen pairs |",
            "|---|---|---|",
        ]
        seen, held_out = summary["accuracy"]["seen"], summary["accuracy"]["held_out"]
        lines += [f"| {rate.replace('_', ' ')} | {_rate(seen, rate)} | {_rate(held_out, rate)} |" for rate in RATES]
    evaluations = read_rows(output / EVALUATIONS)
    if evaluations:
        plot_accuracy(evaluations, output / "accuracy.png")
        lines += ["", "![accuracy](accuracy.png)"]
    if grid:
        lines += ["", f"![samples]({grid})"]
    (output / "report.md").write_text("\n".join(lines) + "\n")


def _rate(rates: dict[str, float], name: str) -> str:
    return f"{rates[name]:.3f}" if name in rates else "–"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else f"{value}"

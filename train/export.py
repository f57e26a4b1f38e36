"""The weights of a checkpoint of any ZeRO stage and number of processes, whole: `python -m train.export RUN OUT`.

One process, no GPU, no process group. A diffusers folder is what a run's final/ is; an official .pth is what PixArt's
own code reads; a DiT has its original names alone.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pixart_fast import DiT
from pixart_fast.checkpoint import save_official
from train.checkpoints import MANIFEST, TAG, Checkpoints
from train.optimizer import build_optimizer
from train.settings import Settings, UserError, load_settings
from train.start import build_source, new_model
from train.universal import MASTERS, Shards, read_state

AVERAGE = "ema"


def find(path: Path) -> tuple[Path, Path]:
    """A run's folder and its newest sound checkpoint, or the one that `path` is. Raises UserError."""
    if (path / MANIFEST).is_file():
        fault = Checkpoints.fault(path)
        if fault is not None:
            raise UserError(
                f"{path} is damaged ({fault}): name another checkpoint, or the run for its newest sound one."
            )
        run, checkpoint = path.resolve().parents[1], path
    else:
        sound = (each for each in reversed(Checkpoints(path / "checkpoints", 0).all()) if not Checkpoints.fault(each))
        run, checkpoint = path, next(sound, None)
    if checkpoint is None or not (run / "config.yaml").is_file():
        raise UserError(
            f"{path} has no sound checkpoint: name a run, with its config.yaml and checkpoints/step_*, or one of these."
        )
    return run, checkpoint


def weights_of(checkpoint: Path, model: nn.Module, settings: Settings, average: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and whole fp32 tensor of each parameter, one at a time.

    Args:
        model: of the run's shapes.
        average: the moving average; before the first update, which fp16 may skip, it is the weights themselves.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if manifest["zero_stage"]:
        shards = Shards(checkpoint / TAG, manifest["zero_stage"], manifest["processes"])
        yield from shards.whole(AVERAGE if average and AVERAGE in shards.kinds else MASTERS)
    else:
        saved = read_state(checkpoint / TAG / "mp_rank_00_model_states.pt")
        yield from _without_zero(saved, model, settings, average)


def _without_zero(
    saved: dict[str, Any], model: nn.Module, settings: Settings, average: bool
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO-0: every process has everything; DeepSpeed keeps fp32 copies by group where the weights are half."""
    # The optimizer numbers parameters in its own order, that of its groups.
    plain = settings.optimizer.model_copy(update={"implementation": "auto"})
    optimizer = build_optimizer(model, settings.model_copy(update={"optimizer": plain}), torch.device("cpu"))
    groups = [group["params"] for group in optimizer.param_groups]
    names = {p: name for name, p in model.named_parameters()}
    state = saved["optimizer"]
    entries = state.get("optimizer_state_dict", state)["state"]
    if average and any(AVERAGE in entry for entry in entries.values()):
        values = [entries[number][AVERAGE] for number in sorted(entries)]
    elif "fp32_groups_flat" in state:
        values = state["fp32_groups_flat"]
    elif "fp32_groups" in state:
        values = [copy for copies in state["fp32_groups"] for copy in copies]
    else:
        values = [saved["module"][names[p]] for params in groups for p in params]
    if "fp32_groups_flat" in state:  # its fused optimizer: one flat tensor per group
        pieces = [value.split([p.numel() for p in params]) for value, params in zip(values, groups, strict=True)]
        values = [piece for group in pieces for piece in group]
    for p, value in zip([p for params in groups for p in params], values, strict=True):
        yield names[p], value.view_as(p)


def export(path: Path, out: Path, *, to: str, average: bool) -> None:
    """Write the weights of a run's newest sound checkpoint, or of one checkpoint, to `out`.

    Args:
        to: "diffusers", a folder such as final/, or "official", a .pth (of a DiT, a .pt).
        average: the moving average, as in final/, instead of the trained fp32 weights.

    Raises UserError.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another name, or delete it.")
    run, checkpoint = find(path)
    settings = load_settings(run / "config.yaml", [])
    source = build_source(settings, 1)
    model = new_model(settings, source).eval()
    if isinstance(model, DiT) and to == "diffusers":
        raise UserError("a class-conditional DiT has no diffusers folder here: choose --to official, DiT's own names.")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights_of(checkpoint, model, settings, average):
            parameters.pop(name).copy_(tensor)
    if parameters:
        raise UserError(f"{checkpoint} lacks {', '.join(sorted(parameters)[:3])}: it is not of {run / 'config.yaml'}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(model, DiT):
        model.save(out)
    elif to == "official":
        save_official(model, out)
    else:
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial)
            source.save(partial, settings)
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote the {'average' if average else 'trained weights'} of {checkpoint} to {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Whole weights from a run's checkpoint, of any ZeRO stage and number of processes.",
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN", help="a run, for its newest sound checkpoint, or a checkpoint"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder (--to diffusers) or file (--to official)")
    parser.add_argument("--to", choices=("diffusers", "official"), default="diffusers")
    parser.add_argument(
        "--weights", choices=("ema", "trained"), default="ema", help="ema (default): the moving average, as in final/"
    )
    options = parser.parse_args(arguments)
    try:
        export(options.path, options.out, to=options.to, average=options.weights == "ema")
    except (UserError, OSError, ValueError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""PixArt checkpoints between the official form and diffusers', and a DiT re-parameterised into a PixArt.

    python -m pixart_fast.checkpoint convert SRC DST --to diffusers|official
    python -m pixart_fast.checkpoint reparameterize DIT.pt DST --timestep 500 --null zero|class

diffusers' own converter drops the official caption embedding for guidance; here it goes to `Transformer.null_caption`,
and the scale of the position table to `interpolation_scale`, so that the way back loses nothing.
"""

import argparse
import inspect
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from pixart_fast import dit
from pixart_fast.interop import NULL_CAPTION_FILE
from pixart_fast.layers import sinusoid
from pixart_fast.naming import HEADS, NULL_CAPTION, heads_of, infer_config, key_map, position_table, to_our_names
from pixart_fast.transformer import Transformer
from pixart_fast.weights import (
    AVERAGED,
    FOLDER_STEM,
    TRAINED,
    check_fit,
    listed,
    read_file,
    read_json,
    read_weights,
    shape_of,
    write_file,
)

# What the functions' errors ask for, on the command line.
OPTIONS = {
    "num_attention_heads=": "--heads",
    "num_heads=": "--heads",
    "sample_size=": "--sample-size",
    "ema=True": "--ema",
}


def load_transformer(source: str | Path | Mapping[str, Any], *, ema: bool = False, **config: Any) -> Transformer:
    """A `Transformer` from PixArt weights of any of the usual forms, which is detected.

    Args:
        source: an official `.pth` (`{"state_dict", "state_dict_ema", …}` or bare), a diffusers folder (of the model or
            of a pipeline) or weight file, or a state dict with either's names.
        ema: take `state_dict_ema`; the official inference takes `state_dict`.
        config: arguments of `Transformer` that win over what the tensors and a `config.json` tell. Tensors do not tell
            the number of heads: without `num_attention_heads=` or `config.json` heads are 72 wide, as in all published
            models.

    Returns:
        The model in eval mode with a copy of every tensor in its own dtype; `y_embedder.y_embedding` as `null_caption`.

    Raises:
        FileNotFoundError, ValueError: as `weights.read_weights`. Keys missing, left over or of another shape are named,
            and so is what a `Transformer` does not have (query-key norm, key-value compression).
    """
    stored: dict[str, Any] = {}
    caption_file = None
    if not isinstance(source, Mapping):
        source = Path(source)
        if (source / "transformer" / "config.json").is_file():
            source = source / "transformer"
        folder = source if source.is_dir() else source.parent
        if source.is_dir() or source.name.startswith(FOLDER_STEM):
            stored = _stored_config(folder / "config.json")
            caption_file = folder / NULL_CAPTION_FILE
    named = to_our_names(read_weights(source, AVERAGED if ema else TRAINED))
    if caption_file is not None and caption_file.is_file():
        named = named._replace(null_caption=read_file(caption_file).get("null_caption"))
    if not stored:
        stored = infer_config(named, **config)
    elif any(name in config for name in HEADS):
        width = shape_of(named.weights, "pos_embed.proj.weight", 4)[0]
        stored |= heads_of(width, *(config.get(name) for name in HEADS))
    config = {**stored, **config}
    with torch.device("meta"):
        model = Transformer(**config)
    check_fit(model.state_dict(), named.weights, named.origin)
    # Copies: parts of one official matrix share memory, which safetensors refuses, and a mapped file may be rewritten.
    model.load_state_dict({name: _copy(tensor) for name, tensor in named.weights.items()}, assign=True)
    model.null_caption = None if named.null_caption is None else _copy(named.null_caption)
    return model.eval()


def save_official(transformer: Transformer, path: str | Path) -> None:
    """Write `{"state_dict": …}` with the official names to `path`, aside and renamed.

    The position table is made from the config, and `y_embedder.y_embedding` written where there is a `null_caption`.
    Raises ValueError for a model that the official code could not load.
    """
    config = transformer.config
    required = {
        "modulation": "adaln_single",
        "activation_fn": "gelu-approximate",
        "norm_eps": 1e-6,
        "attention_bias": True,
    }
    differing = [f"{name}={config[name]!r}" for name, value in required.items() if config[name] != value]
    if config.caption_channels is None:
        differing.append("caption_channels=None")
    if differing:
        raise ValueError(f"the official format has no {listed(differing)}: save this model with save_pretrained.")
    weights = {name: tensor.detach().cpu() for name, tensor in transformer.state_dict().items()}
    keys = key_map(config.num_layers, transformer.use_additional_conditions)
    left_over = weights.keys() - {ours for names in keys.values() for ours in names}
    if left_over:
        raise ValueError(f"the official format has no place for {listed(left_over)}: merge or unload adapters first.")
    official = {
        name: torch.cat([weights[part] for part in ours]) if len(ours) > 1 else weights[ours[0]]
        for name, ours in keys.items()
    }
    embed = transformer.pos_embed
    table = position_table(embed.base_size, embed.proj.out_channels, embed.interpolation_scale)
    official["pos_embed"] = table[None].to(embed.proj.weight.dtype)
    if transformer.null_caption is not None:
        official[NULL_CAPTION] = transformer.null_caption.detach().cpu()
    write_file({"state_dict": official}, path)


@torch.no_grad()
def reparameterize(
    dit_state_dict: Mapping[str, Any],
    *,
    caption_channels: int | None,
    num_attention_heads: int,
    timestep: float = 500,
    null: str = "zero",
    **config: Any,
) -> Transformer:
    """PixArt-α's start from a class-conditional DiT (section 2.3, "re-parameterization").

    The shared MLP is block 0's; each block's table takes what its own MLP would add at one timestep,
    E⁽ⁱ⁾ = f⁽ⁱ⁾(e) - f⁽⁰⁾(e) with e = SiLU(c(timestep)), and the final table f_final(e) - c(timestep). At that timestep
    the result equals the DiT to rounding while cross-attention is at its initial zero; `reparameterization_error`
    measures the others.

    Args:
        dit_state_dict: the original DiT's names, bare or wrapped (`{"ema"}` before `{"model"}`).
        caption_channels: width of the text features, 4096 for T5-XXL.
        num_attention_heads: of the DiT.
        timestep: where the two agree, 0 to 999.
        null: "zero" leaves the class out of c; "class" folds DiT's null-class embedding, the last row of its table,
            into the time embedding's bias, which is exact.
        config: further arguments of `Transformer`, such as `sample_size` or `use_additional_conditions`. Micro-
            conditions start at random as in `Transformer.initialize_weights`: with them the two models only come close.

    Returns:
        The model in eval mode in the DiT's dtype; layers that a DiT lacks are drawn from torch's global generator.

    Raises:
        ValueError: for a state dict that is not a DiT's, naming the keys, or another argument out of range.
    """
    if null not in ("zero", "class"):
        raise ValueError(f"null must be 'zero' or 'class', got {null!r}.")
    if not 0 <= timestep <= 999:
        raise ValueError(f"timestep must be from 0 to 999, got {timestep}.")
    weights = read_weights(dit_state_dict, AVERAGED + TRAINED)
    with torch.device("meta"):
        model = dit.DiT(**dit.infer_config(weights, num_heads=num_attention_heads))
    check_fit(model.state_dict(), weights)
    depth = len(model.blocks)

    def linear(x: Tensor, layer: str) -> Tensor:
        return F.linear(x, weights[f"{layer}.weight"].double(), weights[f"{layer}.bias"].double())

    table = weights.pop("y_embedder.embedding_table.weight")
    if null == "class":
        bias = weights["t_embedder.mlp.2.bias"]
        weights["t_embedder.mlp.2.bias"] = (bias.double() + table[-1].double()).to(bias.dtype)
    features = sinusoid(torch.tensor([timestep], device=table.device))
    time = F.silu(linear(features.double(), "t_embedder.mlp.0"))
    c = linear(time, "t_embedder.mlp.2")  # [1, D]
    e = F.silu(c)
    modulations = [linear(e, f"blocks.{i}.adaLN_modulation.1").unflatten(1, (6, -1))[0] for i in range(depth)]  # [6, D]
    final = linear(e, "final_layer.adaLN_modulation.1").unflatten(1, (2, -1))[0]  # [2, D]

    dtype = weights["x_embedder.proj.weight"].dtype
    for kind in ("weight", "bias"):
        weights[f"t_block.1.{kind}"] = weights[f"blocks.0.adaLN_modulation.1.{kind}"]
    weights = {name: tensor for name, tensor in weights.items() if "adaLN_modulation" not in name}
    weights["final_layer.scale_shift_table"] = (final - c).to(dtype)
    for i, modulation in enumerate(modulations):
        weights[f"blocks.{i}.scale_shift_table"] = (modulation - modulations[0]).to(dtype)

    named = to_our_names(weights)
    config = {"caption_channels": caption_channels, "num_attention_heads": num_attention_heads} | config
    config.setdefault("use_additional_conditions", False)
    transformer = Transformer(**infer_config(named, **config)).initialize_weights()
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    complete = transformer.state_dict() | named.weights
    check_fit(transformer.state_dict(), complete, named.origin)
    transformer.load_state_dict(complete)
    return transformer.eval()


@torch.no_grad()
def reparameterization_error(
    dit_state_dict: Mapping[str, Any],
    transformer: Transformer,
    timesteps: Iterable[int],
    *,
    null: str = "zero",
) -> dict[int, float]:
    """Relative RMS error of a re-parameterised model against its DiT, by timestep, on two latents of gaussian noise.

    `null` as it was given to `reparameterize`: the DiT gets no class embedding ("zero") or that of its null class.
    """
    weights = read_weights(dit_state_dict, AVERAGED + TRAINED)
    table = weights["y_embedder.embedding_table.weight"][-1:]
    weights["y_embedder.embedding_table.weight"] = table if null == "class" else torch.zeros_like(table)
    teacher = dit.DiT.from_state_dict(weights, num_heads=transformer.config.num_attention_heads)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, teacher.in_channels, teacher.input_size, teacher.input_size, generator=generator)
    latents = latents.to(transformer.dtype)
    channels = transformer.config.caption_channels or transformer.config.cross_attention_dim
    text = latents.new_zeros(2, 1, channels)
    errors = {}
    for timestep in timesteps:
        t = torch.full((2,), timestep)
        expected = teacher(latents, t, torch.zeros_like(t)).double()
        difference = transformer(latents, text, t, added_cond_kwargs={}).sample - expected
        errors[timestep] = (difference.square().mean() / expected.square().mean()).sqrt().item()
    return errors


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _stored_config(path: Path) -> dict[str, Any]:
    """What a `config.json` says of `Transformer`'s arguments (older diffusers stored more); empty without a file."""
    stored = read_json(path) if path.is_file() else {}
    return {name: stored[name] for name in inspect.signature(Transformer).parameters if name in stored}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pixart_fast.checkpoint",
        description="Convert PixArt checkpoints between the official and the diffusers form, or start one from a DiT.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser(
        "convert",
        help="official .pth or diffusers folder to the other form",
        description="Every tensor is kept as it is, in its dtype, y_embedder.y_embedding included.",
    )
    convert.add_argument(
        "source", metavar="SRC", help="official .pth, diffusers folder or weight file; its form is detected"
    )
    convert.add_argument("destination", metavar="DST", help="a new folder (--to diffusers) or file (--to official)")
    convert.add_argument("--to", choices=("diffusers", "official"), required=True)
    convert.add_argument(
        "--ema", action="store_true", help="take state_dict_ema of an official file instead of state_dict"
    )
    convert.add_argument(
        "--sample-size", type=int, help="latent size the model is for (128 at 1024 px) if the file lacks pos_embed"
    )
    convert.add_argument(
        "--interpolation-scale", type=float, help="of the position embedding, where the file's is not right"
    )

    start = commands.add_parser(
        "reparameterize",
        help="a PixArt that starts from a class-conditional DiT",
        description="Writes a diffusers folder and prints, by timestep, how far the new model is from the DiT.",
    )
    start.add_argument("source", metavar="DIT.pt", help="a DiT checkpoint with the original names")
    start.add_argument("destination", metavar="DST", help="a new folder")
    start.add_argument(
        "--timestep", type=int, default=500, help="where both models agree exactly (500, as in the paper)"
    )
    start.add_argument(
        "--null",
        choices=("zero", "class"),
        default="zero",
        help="zero (default): leave the class out; class: fold in the null class, which the DiT was trained with",
    )
    start.add_argument("--caption-channels", type=int, default=4096, help="width of the text features (4096, T5-XXL)")
    start.add_argument("--seed", type=int, default=0, help="of the layers that a DiT does not have (0)")
    for command in (convert, start):
        command.add_argument("--heads", type=int, help="attention heads, where they are not 72 wide")
    return parser


def _save_folder(transformer: Transformer, folder: Path) -> None:
    """`save_pretrained` aside and renamed. OSError on a full disk."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        transformer.save_pretrained(partial)
        os.replace(partial, folder)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written ({error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line; a user's mistake ends it with one sentence and exit code 2."""
    parser = _arguments()
    args = parser.parse_args(arguments)
    destination = Path(args.destination)
    try:
        if destination.exists():
            raise ValueError(f"{destination} exists already: choose another name, or delete it.")
        if args.command == "convert":
            given = {
                "num_attention_heads": args.heads,
                "sample_size": args.sample_size,
                "interpolation_scale": args.interpolation_scale,
            }
            given = {name: value for name, value in given.items() if value is not None}
            transformer = load_transformer(args.source, ema=args.ema, **given)
            if args.to == "official":
                save_official(transformer, destination)
            else:
                _save_folder(transformer, destination)
        else:
            torch.manual_seed(args.seed)
            weights = read_weights(args.source, AVERAGED + TRAINED)
            heads = args.heads or dit.infer_config(weights)["num_heads"]
            transformer = reparameterize(
                weights,
                caption_channels=args.caption_channels,
                num_attention_heads=heads,
                timestep=args.timestep,
                null=args.null,
            )
            _save_folder(transformer, destination)
            print("timestep  relative error against the DiT")
            timesteps = sorted({0, 250, 400, 500, 600, 750, 999, args.timestep})
            errors = reparameterization_error(weights, transformer, timesteps, null=args.null)
            for timestep, error in errors.items():
                print(f"{timestep:8d}  {error:.2e}")
    except (ValueError, OSError) as error:
        sentence = str(error)
        for argument, option in OPTIONS.items():
            sentence = sentence.replace(f"pass {argument}", f"pass {option}")
        print(f"{parser.prog}: {sentence}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {destination}")


if __name__ == "__main__":
    main()

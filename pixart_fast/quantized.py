"""Faster linear layers for inference: oneDNN's own weight layout on CPUs, and 8-bit weights and activations (W8A8).

    prepack(model)              the same numbers, sooner; CPU, bf16 and fp32
    quantize(model, "int8")     CPU, NVIDIA GPUs from sm_80 (Ampere): twice the rate of bf16 products, half the memory
    quantize(model, "fp8")      NVIDIA GPUs from sm_89 (Ada, Hopper); elsewhere computed in fp32, to look at its quality

Both replace the linear layers of the blocks in place, before `engine.compile_blocks`. W8A8: weights with one scale per
output channel, rounded once; activations with one scale per token, rounded as they come (vector-wise quantisation,
LLM.int8() without its outliers: Dettmers et al. 2022, arXiv 2208.07339). LayerNorm hands its rows on in 8 bits. What is
small or worked out once per prompt keeps its precision: embeddings, modulation, keys and values of the caption, the
final layer. 8-bit results are an approximation: `deviation` measures it.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixart_fast import ops, samplers
from pixart_fast.denoise import Guidance, denoise
from pixart_fast.interop import NULL_CAPTION_FILE
from pixart_fast.layers import PackedLinear, is_plain
from pixart_fast.transformer import Transformer
from pixart_fast.weights import check_fit, read_json

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
WEIGHTS_FILE, DESCRIPTION_FILE, CONFIG_FILE = "quantized.safetensors", "quantized.json", "config.json"
FORMAT = 1


class QuantizedLinear(nn.Module):
    """A linear layer of an 8-bit weight and 8-bit rows: x `[..., K]`, or `ops.Rows` of it, to `[..., M]`."""

    weight: Tensor  # [M, K], int8 or float8_e4m3fn
    weight_scale: Tensor  # [M], fp32: weight · weight_scale is what it stands for
    bias: Tensor | None  # [M], of the model's dtype

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def of(cls, linears: list[nn.Linear], dtype: torch.dtype) -> "QuantizedLinear":
        """One layer of the outputs of all `linears`, which have the same input."""
        rounded = [ops.round_rows(linear.weight, dtype) for linear in linears]
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        # Joined as bytes: PyTorch's cat of fp8 is not there on every device.
        values = torch.cat([rows.values.view(torch.uint8) for rows in rounded]).view(dtype)
        return cls(values, torch.cat([rows.scale for rows in rounded]), bias)

    def forward(self, x: Tensor | ops.Rows) -> Tensor:
        rows = x if isinstance(x, ops.Rows) else ops.round_rows(x, self.weight.dtype)
        return ops.rounded_linear(rows, self.weight, self.weight_scale, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `model.to(dtype)` means the floating tensors: as integers, the 8-bit weight and its scales only move.
        dtype = self.weight.dtype
        self.weight, self.weight_scale = self.weight.view(torch.int8), self.weight_scale.view(torch.int32)
        super()._apply(fn, recurse)
        self.weight, self.weight_scale = self.weight.view(dtype), self.weight_scale.view(torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[1]}, out={self.weight.shape[0]}, {self.weight.dtype}"


def _linears(model: Transformer) -> Iterator[tuple[nn.Module, str, str]]:
    """The linear layers of the blocks that see image tokens: parent, name in it, name in the model."""
    for index, block in enumerate(model.transformer_blocks):
        places = (
            *((f"attn1.{name}", block.attn1, name) for name in block.attn1.fused_names),
            ("attn1.to_out.0", block.attn1.to_out, "0"),
            ("attn2.to_q", block.attn2, "to_q"),
            ("attn2.to_out.0", block.attn2.to_out, "0"),
            ("ff.net.0.proj", block.ff.net[0], "proj"),
            ("ff.net.2", block.ff.net, "2"),
        )
        for path, parent, name in places:
            yield parent, name, f"transformer_blocks.{index}.{path}"


def _check_linears(model: Transformer, what: str) -> None:
    """Raises ValueError naming the first linear layer that cannot be replaced."""
    for parent, name, path in _linears(model):
        layer = getattr(parent, name)
        if layer is None or isinstance(layer, QuantizedLinear):
            raise ValueError(f"{path} is in 8 bits already: load the model anew to {what} it.")
        if not is_plain(layer):
            raise ValueError(
                f"{path} is no plain linear layer ({type(layer).__name__}, adapted, prepacked, hooked or offloaded): "
                f"merge or unload adapters and load the whole model on one device, then {what} it."
            )


def prepack(model: Transformer) -> Transformer:
    """Let the blocks' linear layers read their weights in oneDNN's layout, in inference on a CPU; returns the model.

    In place. Names, parameters and training stay; a weight that changes is packed again. In bf16 products are those of
    plain PyTorch bit for bit, and GELU is taken of the sum before it is rounded; in fp32 they take half the time of
    MKL's on an AMD CPU and err twice as much (5.5e-7 at XL/2's width, relative RMS). It costs a second copy of the
    blocks' weights in memory, made on first use.

    Raises ValueError where a layer is adapted or in 8 bits, or this device or dtype has no such layout.
    """
    _check_linears(model, "prepack")
    for parent, name, path in _linears(model):
        problem = ops.packing_problem(getattr(parent, name).weight)
        if problem is not None:
            raise ValueError(f"{path} cannot be prepacked: {problem}.")
    model.unfuse_qkv_projections()  # copies, which would pass by the packed weights
    for parent, name, _ in _linears(model):
        setattr(parent, name, PackedLinear.of(getattr(parent, name)))
    return model


def quantize(model: Transformer, dtype: str = "int8") -> Transformer:
    """Round the blocks' linear layers to 8 bits, weights now and activations as they come; returns the model.

    In place and for inference alone: `model` with recorded gradients raises RuntimeError. The memory of these layers
    halves beside bf16. dtype: "int8" or "fp8" (e4m3).

    Raises ValueError for another dtype, a device that has no such products, and layers that carry an adapter.
    """
    rounded = _dtype(dtype)
    _check_linears(model, "quantise")
    _check_device(model, rounded)
    model.unfuse_qkv_projections()
    for block in model.transformer_blocks:
        _install(block, lambda linears: QuantizedLinear.of(linears, rounded))
        block.rounded = rounded
    return _for_inference(model)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"8-bit layers are {' or '.join(DTYPES)}, not {name!r}.")
    return DTYPES[name]


def _check_device(model: Transformer, dtype: torch.dtype, device: torch.device | None = None) -> None:
    widths = {width for parent, name, _ in _linears(model) for width in getattr(parent, name).weight.shape}
    problem = ops.rounding_problem(dtype, device or model.device, *sorted(widths))
    if problem is not None:
        raise ValueError(f"this model cannot be quantised here: {problem}.")


def _install(block: nn.Module, make: Callable[[list[nn.Linear]], QuantizedLinear]) -> None:
    """Replace a block's linear layers by what `make` gives for them; q, k and v of self-attention by one layer."""
    attn1, attn2, ff = block.attn1, block.attn2, block.ff
    attn1.to_qkv = make([attn1.to_q, attn1.to_k, attn1.to_v])
    attn1.to_q = attn1.to_k = attn1.to_v = None
    attn2.to_q = make([attn2.to_q])
    ff.net[0].proj = make([ff.net[0].proj])
    for layers, index in ((attn1.to_out, 0), (attn2.to_out, 0), (ff.net, 2)):
        layers[index] = make([layers[index]])


def _for_inference(model: Transformer) -> Transformer:
    model.register_forward_pre_hook(_refuse_training)
    return model.eval().requires_grad_(False)


def _refuse_training(model: nn.Module, inputs: tuple) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "8-bit layers have no gradients: run this model under torch.no_grad(), and train the one it was made of."
        )


def save_quantized(model: Transformer, folder: str | Path, *, source: str | None = None) -> None:
    """Write a quantised model: `quantized.safetensors`, `config.json`, `quantized.json` with its dtype and source.

    `source` says what it was made of; by default the name or path that the model was loaded from. Files are written
    aside and renamed. Raises ValueError for a model that is not quantised, and OSError where writing fails.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype = names.get(model.transformer_blocks[0].rounded)
    if dtype is None:
        raise ValueError("this model is not quantised: call quantize(model) first, or save it with save_pretrained.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "dtype": dtype,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "source": source or getattr(model.config, "_name_or_path", None) or None,
    }
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _write(folder / WEIGHTS_FILE, lambda path: save_file(weights, path))
    if model.null_caption is None:
        (folder / NULL_CAPTION_FILE).unlink(missing_ok=True)
    else:
        null_caption = {"null_caption": model.null_caption.contiguous()}
        _write(folder / NULL_CAPTION_FILE, lambda path: save_file(null_caption, path))
    _write(folder / CONFIG_FILE, lambda path: path.write_text(model.to_json_string()))
    _write(folder / DESCRIPTION_FILE, lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}): is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def load_quantized(folder: str | Path, *, device: torch.device | str = "cpu") -> Transformer:
    """The model that `save_quantized` wrote, in eval mode; weights of full precision are never in memory.

    Raises FileNotFoundError for a missing file, and ValueError for a damaged or unfitting one or a device without such
    products.
    """
    folder, device = Path(folder), torch.device(device)
    for file in (DESCRIPTION_FILE, CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: it is not a folder that save_quantized wrote.")
    description = read_json(folder / DESCRIPTION_FILE)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{folder / DESCRIPTION_FILE} is of format {description.get('format')!r}, this version reads {FORMAT}: "
            "quantise the model again."
        )
    dtype = _dtype(description.get("dtype"))
    with torch.device("meta"):
        model = Transformer.from_config(read_json(folder / CONFIG_FILE))
    _check_device(model, dtype, device)
    for block in model.transformer_blocks:
        _install(block, lambda linears: _hollow(linears, dtype))
        block.rounded = dtype
    weights = _read(folder / WEIGHTS_FILE, device)
    expected = model.state_dict()
    check_fit(expected, weights)
    model_dtype = getattr(torch, str(description.get("model_dtype")), None)
    for name, tensor in expected.items():
        fixed = name.endswith("weight_scale") or not tensor.dtype.itemsize > 1
        belongs = tensor.dtype if fixed else model_dtype
        if weights[name].dtype != belongs:
            raise ValueError(
                f"{name} is {weights[name].dtype} in {folder / WEIGHTS_FILE}, where {DESCRIPTION_FILE} says {belongs}: "
                "the files are of different models; quantise the model again."
            )
    model.load_state_dict(weights, assign=True)
    if (folder / NULL_CAPTION_FILE).is_file():
        model.null_caption = _read(folder / NULL_CAPTION_FILE, device)["null_caption"]
    return _for_inference(model)


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): quantise the model again.") from error


def _hollow(linears: list[nn.Linear], dtype: torch.dtype) -> QuantizedLinear:
    """The layer that `QuantizedLinear.of` gives, without its content."""
    outputs = sum(linear.out_features for linear in linears)
    weight = torch.empty(outputs, linears[0].in_features, dtype=dtype, device="meta")
    bias = None if linears[0].bias is None else torch.empty(outputs, device="meta")
    return QuantizedLinear(weight, torch.empty(outputs, dtype=torch.float32, device="meta"), bias)


class Deviation(NamedTuple):
    """How far an approximation is from the exact model, relative RMS."""

    predictions: float  # of all steps, both given the exact model's latents
    latents: float  # at the end, each on its own way from the same noise

    def __str__(self) -> str:
        return f"deviation: {self.predictions:.2%} in a prediction, {self.latents:.2%} in the final latents"


Evaluate = Callable[[Tensor, float, bool], Tensor]  # `denoise.Denoiser`, or what approximates one


def deviation(
    exact: Evaluate, approximate: Evaluate, noise: Tensor, *, steps: int = 20, guidance: float = 4.5
) -> Deviation:
    """Measure an approximation beside the exact model on the same prompts and noise `[B, C, h, w]`, by DPM-Solver++.

    `exact` and `approximate` are `Denoiser`s of the same captions (or functions of latents, time and guided like one).
    It takes 2 · `steps` evaluations of the approximation and `steps` of the exact model.
    """
    squares = torch.zeros(2, dtype=torch.float64)

    def beside(latents: Tensor, t: float, guided: bool) -> Tensor:
        output = exact(latents, t, guided)
        difference = approximate(latents, t, guided).double() - output.double()
        squares.add_(torch.stack([difference.square().sum(), output.double().square().sum()]).cpu())
        return output

    def run(evaluate: Evaluate) -> Tensor:
        return denoise(evaluate, samplers.build("dpm", steps), noise, Guidance(guidance)).double()

    latents = run(beside)
    off = run(approximate) - latents
    return Deviation((squares[0] / squares[1]).sqrt().item(), (off.norm() / latents.norm()).item())

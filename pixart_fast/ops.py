"""The operators of the model, and the one place that decides which kernel runs them.

    modulated_layernorm   x₁ = x + gate · h;  LayerNorm(x₁) (1 + scale) + shift   x, h [B, N, D]
    self_attention        softmax(q kᵀ / √d + bias) v                 q, k, v [B, N, H, d]
    cross_attention       the same, image to ragged caption           q [B, N, H, d]   k, v [B, L, H, d]   lengths [B]
    gated_linear          x + gate · (a Wᵀ + b)                       x [B, N, D]   a [B, N, K]
    linear_gelu           GELU(a Wᵀ + b)                              a [B, N, K]

Two more products are layers' own choice (`quantized.py`), not a backend's: `packed_linear` and `rounded_linear`.

Every operator takes `backend`: "auto" decides by device capability (`resolve` says what and why, and
`python -m pixart_fast.env` prints it); a name insists on that backend and raises if it cannot serve. "reference" is
plain PyTorch, "cpu" the native C++ of `kernels/cpu`, "triton" the kernels of `kernels/*.py`; self-attention also has
"cudnn" and "flash_attn". Nothing here reads the environment or touches a device at import.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from pixart_fast.kernels import reference
from pixart_fast.operators import LIBRARY

OPS = ("modulated_layernorm", "self_attention", "cross_attention", "gated_linear", "linear_gelu")
BACKENDS = ("auto", "reference", "cpu", "triton", "cudnn", "flash_attn")
SERVED_BY = {
    "cpu": ("modulated_layernorm", "self_attention", "cross_attention"),
    "triton": ("modulated_layernorm", "cross_attention", "gated_linear", "linear_gelu"),
    "cudnn": ("self_attention",),
    "flash_attn": ("self_attention",),
}


class Choice(NamedTuple):
    name: str
    reason: str


class Row(NamedTuple):
    """One modulation: what the sample brings plus what the block adds, S̄ + E⁽ⁱ⁾ (PixArt-α section 2.3)."""

    sample: Tensor  # [B, D]
    table: Tensor | None = None  # [D]

    def total(self) -> Tensor:
        """The sum `[B, 1, D]`."""
        return (self.sample if self.table is None else self.sample + self.table)[:, None]


class Rows(NamedTuple):
    """Rows rounded to 8 bits: values · scale of what was `dtype`, which products with them return to."""

    values: Tensor  # [..., K], int8 or float8_e4m3fn
    scale: Tensor  # [...], fp32
    dtype: torch.dtype


@dataclass(frozen=True)
class Capability:
    """What the decisions depend on. `sm` is the compute capability of an NVIDIA GPU, None for any other device."""

    device: str
    sm: tuple[int, int] | None
    has_bf16: bool
    has_flash_attention: bool


def capability(device: torch.device | str) -> Capability:
    """The `Capability` of a torch device ("cpu", "cuda:1", …)."""
    device = torch.device(device)
    if device.type != "cuda":
        return Capability(device.type, None, torch.backends.mkldnn.is_available(), False)
    sm = torch.cuda.get_device_capability(device)
    # `torch.cuda.is_bf16_supported()` says yes on a V100, where bf16 is emulated.
    return Capability(torch.cuda.get_device_name(device), sm, sm >= (8, 0), sm >= (8, 0))


@torch.compiler.assume_constant_result
def _sm(index: int | None) -> tuple[int, int]:
    """The compute capability of a CUDA device, a constant to compiled graphs."""
    return torch.cuda.get_device_capability(index)


def precision_for(capability: Capability) -> str:
    """The training precision that a device is fastest at without losing accuracy: "bf16", "fp16" or "fp32"."""
    if capability.sm is None or capability.sm < (7, 0):
        return "fp32"
    return "bf16" if capability.has_bf16 else "fp16"


def attention_kernel(capability: Capability) -> str:
    """The kernel that "auto" takes for maskless self-attention with heads of 72 in half precision."""
    if capability.sm is None:
        return "native C++, else flash (CPU)" if capability.device == "cpu" else "math"
    if not capability.has_flash_attention:
        return "memory-efficient"
    return "flash" if capability.sm < (9, 0) else "cuDNN, else flash"


def _load_native() -> str | None:
    """Loads the operators that CMakeLists.txt builds; returns what is wrong with them, or None."""
    library = Path(__file__).with_name("native.so")
    if not library.exists():
        return "the native operators are not built (run `pip install --no-build-isolation -e .` with a C++ compiler)"
    # Operators of another schema than the one in operators.py would end the process while they load.
    sources = Path(__file__).with_name("kernels").glob("cpu/*")
    if any(source.stat().st_mtime > library.stat().st_mtime for source in sources):
        return "the native operators are older than their sources; run `pip install --no-build-isolation -e .` again"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0].replace(f"{library.parent}/", "")
        return f"the native operators do not load ({reason}); run `pip install --no-build-isolation -e .` again"
    return None


def _register_triton() -> tuple[str | None, str]:
    """Registers the Triton kernels; returns what is wrong with them, or None, and the type of device that they serve.

    That is "cuda", or "cpu" where Triton interprets its kernels instead of compiling them (TRITON_INTERPRET=1).
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)", "cuda"
    import triton

    from pixart_fast.kernels import cross_attention, linear, modulated_layernorm

    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    for name, kernel in {
        "modulated_layernorm": modulated_layernorm.forward,
        "modulated_layernorm_backward": modulated_layernorm.backward,
        "modulated_layernorm_quantized": modulated_layernorm.forward_quantized,
        "cross_attention": cross_attention.forward,
        "cross_attention_backward": cross_attention.backward,
        "gated_linear": linear.gated_linear,
        "linear_gelu": linear.linear_gelu,
    }.items():
        LIBRARY.impl(name, kernel, device.upper())
    return None, device


triton_problem, triton_device = _register_triton()
native_problem = (
    _load_native() if triton_device != "cpu" else "Triton's interpreter has the operators (TRITON_INTERPRET=1 is set)"
)

# The largest N · L of an attention measured on a CPU: the native operator led scaled_dot_product_attention by 1.2
# to 3.5 times in fp32 and bf16 up to here, one core, but for what `_plain_products` says.
MEASURED_SCORES = 1024 * 1024


def _plain_products(op: str, dtype: torch.dtype | None, needs_grad: bool, scores: int) -> bool:
    """bf16 self-attention in training on a CPU: oneDNN's products lead by 1.12 to 1.16 in a middle range of tokens."""
    if op != "self_attention" or dtype != torch.bfloat16 or not needs_grad:
        return False  # without a look at the size, which a compiled graph would then guard
    return 16 * 16 < scores <= 256 * 256


def _cpu_problem(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if device.type != "cpu":
        return f"the data is on {device}"
    if dtype not in (None, torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    return native_problem


def _triton_problem(op: str, device: torch.device, dtype: torch.dtype | None, needs_grad: bool) -> str | None:
    if triton_problem is not None:
        return triton_problem
    if device.type != triton_device:
        return f"the data is on {device}"
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    if needs_grad and op in ("gated_linear", "linear_gelu"):
        return "it has no backward: it serves inference"
    if device.type == "cpu":
        return None
    sm = _sm(device.index)
    if sm < (7, 0) or (sm < (8, 0) and op != "modulated_layernorm"):
        return f"sm_{sm[0]}{sm[1]} has no tensor cores that Triton can use" if sm >= (7, 0) else "Triton needs sm_70"
    return None


def flash_attn_version() -> int | None:
    """The flash-attn that is installed: 3 (`flash_attn_interface`, Hopper) before 2 (`flash_attn`), or None."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return 3
    return 2 if importlib.util.find_spec("flash_attn") is not None else None


def _library_problem(backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if device.type != "cuda":
        return f"the data is on {device}"
    if _sm(device.index) < (8, 0):
        return "it needs an NVIDIA GPU of sm_80 or later"
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    if backend == "flash_attn" and flash_attn_version() is None:
        return "flash-attn is not installed"
    return None


def _problem(
    op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None, needs_grad: bool = False
) -> str | None:
    """Why a backend cannot serve, or None."""
    if op not in SERVED_BY[backend]:
        return f"it has no such kernel; backend {backend!r} serves {', '.join(SERVED_BY[backend])}"
    if backend == "cpu":
        return _cpu_problem(device, dtype)
    if backend == "triton":
        return _triton_problem(op, device, dtype, needs_grad)
    return _library_problem(backend, device, dtype)


def resolve(
    op: str,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    needs_grad: bool = False,
    scores: int | None = None,
) -> Choice:
    """The backend that `op` runs on, and the reason. `scores` is N · L of an attention, where that is known.

    Raises ValueError for an unknown op or backend, and RuntimeError for a requested backend that cannot serve: it never
    falls back silently.
    """
    if op not in OPS or backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r} of {op!r}: the operators are {OPS}, the backends {BACKENDS}")
    device = torch.device(device)
    if backend == "reference":
        return Choice("reference", "requested")
    if backend != "auto":
        problem = _problem(op, backend, device, dtype, needs_grad)
        if problem is not None:
            raise RuntimeError(
                f"{op} cannot run on backend {backend!r}: {problem}; backend='auto' takes what is available"
            )
        return Choice(backend, "requested")
    if device.type == "cuda":
        return _auto_on_cuda(op, device, dtype, needs_grad)
    if device.type == "cpu":
        return _auto_on_cpu(op, device, dtype, needs_grad, scores)
    return Choice("reference", f"no kernel of ours runs on {device.type}")


def _auto_on_cuda(op: str, device: torch.device, dtype: torch.dtype | None, needs_grad: bool) -> Choice:
    sm = _sm(device.index)
    if op == "self_attention":
        # Published (not measured here): on Hopper 1.7 to 2.3 times PyTorch's default, on Ampere 0.8 of it.
        if sm >= (9, 0) and _problem(op, "cudnn", device, dtype) is None:
            return Choice("cudnn", f"cuDNN's attention leads on sm_{sm[0]}{sm[1]}")
        return Choice("reference", "scaled_dot_product_attention")
    problem = _problem(op, "triton", device, dtype, needs_grad)
    if problem is not None:
        return Choice("reference", problem)
    if op in ("gated_linear", "linear_gelu") and dtype == torch.float32:
        return Choice("reference", "fp32 products of Triton run without tensor cores")
    return Choice("triton", f"one fused kernel on sm_{sm[0]}{sm[1]}")


def _auto_on_cpu(
    op: str, device: torch.device, dtype: torch.dtype | None, needs_grad: bool, scores: int | None
) -> Choice:
    if op == "modulated_layernorm" and torch.compiler.is_compiling():
        return Choice("reference", "torch.compile fuses plain PyTorch with its neighbours")
    if op not in SERVED_BY["cpu"]:
        return Choice("reference", "the matrix product is the library's")
    problem = _problem(op, "cpu", device, dtype)
    if problem is not None:
        return Choice("reference", problem)
    if op == "modulated_layernorm":
        return Choice("cpu", "native operator, one pass over memory")
    if scores is not None and scores > MEASURED_SCORES:
        return Choice("reference", f"scaled_dot_product_attention: N * L is above {MEASURED_SCORES}")
    if scores is not None and _plain_products(op, dtype, needs_grad, scores):
        return Choice("reference", "plain matrix products")
    return Choice("cpu", f"native operator, N * L up to {MEASURED_SCORES}")


def fuses(op: str, backend: str, a: Tensor, weight: Tensor) -> bool:
    """Whether a linear operator of inference runs on one of our kernels; not where autocast is to choose the dtypes."""
    if torch.is_grad_enabled() or a.dtype != weight.dtype:
        return False
    ours = resolve(op, backend, a.device, dtype=a.dtype).name == "triton"
    return ours and not torch.is_autocast_enabled(a.device.type)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _row(name: str, given: Tensor | Row, x: Tensor) -> Row:
    """A modulation as a checked `Row` of `[B, D]` and `[D]`."""
    B, D = x.shape[0], x.shape[-1]
    sample, table = given if isinstance(given, Row) else (given, None)
    # Number by number: Dynamo takes a shape with a symbol in it for unequal to the tuple of the same numbers.
    per_sample = sample.ndim in (2, 3) and sample.shape[0] == B and sample.shape[-1] == D and sample.numel() == B * D
    if x.ndim != 3 or not per_sample or (table is not None and (table.ndim != 1 or table.shape[0] != D)):
        raise ValueError(
            f"modulated_layernorm takes x [B, N, D] and {name} [B, D] or [B, 1, D] (with a table row [D]), not "
            f"{list(x.shape)} and {list(sample.shape)}{'' if table is None else f' (with {list(table.shape)})'}"
        )
    return Row(sample.reshape(B, D), table)


def modulated_layernorm(
    x: Tensor,
    shift: Tensor | Row,
    scale: Tensor | Row,
    *,
    residual: Tensor | None = None,
    gate: Tensor | Row | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x₁ = x + gate · residual and LayerNorm(x₁) (1 + scale) + shift (adaLN: DiT 3.2, PixArt-α 2.3).

    x, residual         [B, N, D]             any floating dtype; no residual: x₁ is x; no gate: it counts as 1
    shift, scale, gate  [B, D] or [B, 1, D]   one modulation per sample, any floating dtype, or a `Row` of two parts
    returns             x₁, y [B, N, D]       x's dtype; statistics and arithmetic in fp32, each result rounded once

    Raises ValueError where the shapes do not fit, and see `resolve` for `backend`.
    """
    shift, scale = _row("shift", shift, x), _row("scale", scale, x)
    gate = None if gate is None else _row("gate", gate, x)
    if residual is None and gate is not None:
        raise ValueError("modulated_layernorm takes a gate with a residual only")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"modulated_layernorm takes a residual like x, {list(x.shape)}, not {list(residual.shape)}"
            )
        residual = residual.to(x.dtype)  # under autocast the stream is fp32 and what joins it is not
    needs_grad = _needs_grad(x, residual, *shift, *scale, *(gate or ()))
    if resolve("modulated_layernorm", backend, x.device, dtype=x.dtype, needs_grad=needs_grad).name == "reference":
        totals = {"residual": residual, "gate": None if gate is None else gate.total()}
        return reference.modulated_layernorm(x, shift.total(), scale.total(), **totals, eps=eps)
    x1, y, _, _ = torch.ops.pixart_fast.modulated_layernorm(x, residual, *(gate or (None, None)), *shift, *scale, eps)
    return x if residual is None else x1, y


def modulated_layernorm_quantized(
    x: Tensor,
    shift: Tensor | Row,
    scale: Tensor | Row,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gate: Tensor | Row | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`modulated_layernorm` whose y is rounded to `dtype` with one scale per row, for the matrix product that follows.

    dtype    torch.int8 (largest magnitude to 127) or torch.float8_e4m3fn (to 448; CUDA from sm_89, and CPU)
    returns  x₁ [B, N, D] of x's dtype; y [B, N, D] of `dtype`; its scale fp32 [B, N]: y · scale is LayerNorm's result

    Inference only. Raises as `modulated_layernorm`, and ValueError for another dtype.
    """
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"modulated_layernorm_quantized rounds to int8 or float8_e4m3fn, not {dtype}")
    shift, scale = _row("shift", shift, x), _row("scale", scale, x)
    gate = None if gate is None else _row("gate", gate, x)
    if _problem("modulated_layernorm", "triton", x.device, x.dtype) is None and backend in ("auto", "triton"):
        x1, y, y_scale = torch.ops.pixart_fast.modulated_layernorm_quantized(
            x, residual, *(gate or (None, None)), *shift, *scale, eps, dtype
        )
        return x if residual is None else x1, y, y_scale
    if backend not in ("auto", "reference"):
        raise RuntimeError(f"modulated_layernorm_quantized has no backend {backend!r} on {x.device}; use 'auto'")
    totals = {"residual": residual, "gate": None if gate is None else gate.total()}
    return reference.modulated_layernorm_quantized(x, shift.total(), scale.total(), **totals, dtype=dtype, eps=eps)


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √d + bias) v for every head.

    q, k, v  [B, N, H, d]                       one floating dtype
    bias     broadcastable to [B, H, N, N]      added to the scores
    returns  [B, N, H, d]                       q's dtype

    Raises ValueError where the shapes do not fit, and see `resolve` for `backend`.
    """
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "self_attention takes q, k, v [B, N, H, d] of one shape, "
            f"not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    N, needs_grad = q.shape[1], _needs_grad(q, k, v)
    if bias is not None:
        if backend not in ("auto", "reference"):
            raise RuntimeError(f"self_attention cannot run on backend {backend!r}: it has a bias; use backend='auto'")
        return _attention(q, k, v, bias)
    kernel = resolve("self_attention", backend, q.device, dtype=q.dtype, needs_grad=needs_grad, scores=N * N).name
    if kernel == "cpu":
        return torch.ops.pixart_fast.cross_attention(q, k, v, None)[0]
    if kernel == "flash_attn":
        return _flash_attn(q, k, v)
    if kernel == "cudnn":
        # In this order: what cuDNN does not take, it leaves to the next.
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        with sdpa_kernel(backends, set_priority=True):
            return _attention(q, k, v, None)
    return _attention(q, k, v, None)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if flash_attn_version() == 3:
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    o = flash_attn_func(q, k, v)
    return o[0] if isinstance(o, tuple) else o  # early versions of 3 return the log-sum-exp too


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every image token to the tokens of its caption, ragged by `lengths` or by an additive `bias`.

    q        [B, N, H, d]         one floating dtype for q, k, v
    k, v     [B, L, H, d]         whatever they hold beyond a caption's length is ignored, NaN included
    lengths  int64 [B]            tokens that count; 0 gives zeros, and zero gradients
    bias     [B, L] or [B, 1, L]  added to the scores (diffusers: 0 for a token, -10000 for padding); plain PyTorch only
    returns  [B, N, H, d]         q's dtype

    Raises ValueError where the shapes do not fit or both lengths and bias are given, and see `resolve` for `backend`.
    """
    B, L = q.shape[0], k.shape[1]
    if q.ndim != 4 or k.shape != (B, L, *q.shape[2:]) or v.shape != k.shape:
        raise ValueError(
            "cross_attention takes q [B, N, H, d] and k, v [B, L, H, d], "
            f"not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if lengths is not None and bias is not None:
        raise ValueError("cross_attention takes lengths or bias, not both: they are two ways to say which tokens count")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"cross_attention takes lengths [B] with B = {B}, not {list(lengths.shape)}")
    if bias is not None:
        if bias.shape not in ((B, L), (B, 1, L)):
            raise ValueError(f"cross_attention takes bias [B, L] or [B, 1, L] = [{B}, 1, {L}], not {list(bias.shape)}")
        if backend not in ("auto", "reference"):
            raise RuntimeError(f"cross_attention cannot run on backend {backend!r}: it has a bias; use lengths")
        return _attention(q, k, v, bias.reshape(B, 1, 1, L))
    needs_grad, scores = _needs_grad(q, k, v), q.shape[1] * L
    kernel = resolve("cross_attention", backend, q.device, dtype=q.dtype, needs_grad=needs_grad, scores=scores).name
    if kernel != "reference":
        return torch.ops.pixart_fast.cross_attention(q, k, v, lengths)[0]
    if lengths is not None:
        k, v, bias = reference.drop_padding(k, v, lengths)
    return _attention(q, k, v, bias)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # In bf16 on a CPU, forward and backward of scaled_dot_product_attention take 9 times as long as plain products for
    # 16 tokens, 3 for 64, 1.8 for 256, and half as long for 1024, whose scores leave the cache (one core, torch 2.13).
    training = _needs_grad(q, k, v)
    if training and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] * k.shape[1] <= 256 * 256:
        return reference.self_attention(q, k, v, bias=bias)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def gated_linear(
    x: Tensor, gate: Row, a: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = "auto"
) -> Tensor:
    """x + gate · (a Wᵀ + b): a projection back onto the residual stream, in one kernel where there is one (inference).

    x [B, N, D]; a [B, N, K], weight [D, K], bias [D] of one floating dtype; gate one row per sample -> [B, N, D]
    """
    needs_grad = _needs_grad(x, a, weight, bias, *gate)
    if resolve("gated_linear", backend, a.device, dtype=a.dtype, needs_grad=needs_grad).name == "triton":
        return torch.ops.pixart_fast.gated_linear(a, weight, bias, x, *_row("gate", gate, x))
    return reference.gated_linear(x, gate.total(), a, weight, bias)


def linear_gelu(a: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = "auto") -> Tensor:
    """GELU(a Wᵀ + b), tanh-approximated, in one kernel where there is one (inference).

    a [B, N, K], weight [M, K], bias [M] of one floating dtype -> [B, N, M]
    """
    needs_grad = _needs_grad(a, weight, bias)
    if resolve("linear_gelu", backend, a.device, dtype=a.dtype, needs_grad=needs_grad).name == "triton":
        return torch.ops.pixart_fast.linear_gelu(a, weight, bias)
    return reference.linear_gelu(a, weight, bias)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 for `a [B, N, K]`, `b [B, K, M]` of one dtype: scores that are not rounded before their softmax."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


class _Packed(NamedTuple):
    """A weight in oneDNN's layout, and what it was made of."""

    storage: StorageWeakRef
    version: int
    weight: Tensor


# By the plain weight, and gone with it. Not an attribute of the layer: a compiled graph takes no opaque tensor.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _pack(weight: Tensor) -> Tensor:
    """The weight in oneDNN's layout, made anew after it was written or got other memory."""
    kept, storage = _packed.get(weight), StorageWeakRef(weight.untyped_storage())
    # A weak reference keeps the address of a storage from being given to another: equal means the same.
    if kept is None or kept.storage != storage or kept.version != weight._version:
        kept = _Packed(storage, weight._version, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
        _packed[weight] = kept
    return kept.weight


def _packed_linear(a: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(a, _pack(weight), bias, *activation)


LIBRARY.impl("packed_linear", _packed_linear, "CPU")


def packing_problem(weight: Tensor) -> str | None:
    """Why `packed_linear` cannot serve a weight, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if weight.device.type != "cpu":
        return f"the weights are on {weight.device}, and packing is for CPUs"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"packing takes float32 and bfloat16, not {weight.dtype}"
    if weight.is_inference():
        return "the weights were made under torch.inference_mode, where changes to them go unseen"
    return None


def packed_linear(a: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """a Wᵀ + b, with `gelu` GELU of it (tanh-approximated), by a copy of the weight in oneDNN's own layout (inference).

    a [..., K], weight [M, K], bias [M] of one dtype -> [..., M]. The copy is made on first use, again after the weight
    has changed, and lives as long as the weight. Autocast, mixed dtypes and recorded gradients get plain PyTorch.
    """
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled(a.device.type) or a.dtype != weight.dtype
    if plain or a.device.type != "cpu" or a.dtype not in (torch.float32, torch.bfloat16):
        y = F.linear(a, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y
    return torch.ops.pixart_fast.packed_linear(a, weight, bias, gelu)


def rounding_problem(dtype: torch.dtype, device: torch.device, *widths: int) -> str | None:
    """Why `rounded_linear` cannot take int8 or float8_e4m3fn of these widths on a device, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"8-bit products run on CPUs and NVIDIA GPUs, not on {device.type}"
    if device.type == "cpu":
        return None
    sm, least, multiple = _sm(device.index), *(((8, 0), 8) if dtype == torch.int8 else ((8, 9), 16))
    if sm < least:
        return f"{dtype} products need an NVIDIA GPU of sm_{least[0]}{least[1]} or later, this is sm_{sm[0]}{sm[1]}"
    if any(width % multiple for width in widths):
        return f"{dtype} products on a GPU need widths that divide by {multiple}, not {', '.join(map(str, widths))}"
    return None


def round_rows(x: Tensor, dtype: torch.dtype) -> Rows:
    """Each row of x [..., K] as int8 (its largest magnitude to 127) or float8_e4m3fn (to 448); a zero row has scale 1.

    NaN and infinity give a scale that is no finite number, so that they show in the product.
    """
    wide = x.float()
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = wide.abs().amax(-1) / largest
    scale = torch.where(scale == 0, 1, scale)
    values = wide / scale[..., None]
    return Rows((values.round() if dtype == torch.int8 else values).to(dtype), scale, x.dtype)


def rounded_linear(a: Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """a Wᵀ + b of 8-bit rows and an 8-bit weight with one scale per output (W8A8, inference).

    a             Rows of [..., K]      `round_rows` or `modulated_layernorm_quantized` make them
    weight        [M, K] of their dtype, weight_scale fp32 [M], bias [M] or None
    returns       [..., M] of a.dtype   products of int8 are exact, scales and bias in fp32; those of fp8 are summed in
                                        fp32, and on a GPU rounded to bf16 before the bias
    """
    rows = a.values.flatten(0, -2)
    if weight.dtype == torch.int8:
        sums = _int8_product(rows, weight).unflatten(0, a.values.shape[:-1])
        y = sums.float() * a.scale[..., None] * weight_scale
    elif rows.device.type == "cuda":
        scales = a.scale.reshape(-1, 1), weight_scale[None]
        y = torch._scaled_mm(rows, weight.t(), *scales, out_dtype=torch.bfloat16).unflatten(0, a.values.shape[:-1])
    else:
        y = F.linear(a.values.float(), weight.float()) * a.scale[..., None] * weight_scale
    return (y if bias is None else y + bias).to(a.dtype)


def _int8_product(a: Tensor, weight: Tensor) -> Tensor:
    """a [R, K] and weight [M, K] to exact int32 sums [R, M]."""
    least = 17 if a.device.type == "cuda" else 1  # cuBLAS takes no fewer rows
    if a.shape[0] >= least:
        return torch._int_mm(a, weight.t())
    return torch._int_mm(F.pad(a, (0, 0, 0, least - a.shape[0])), weight.t())[: a.shape[0]]

"""What operators, blocks, training steps and generations cost: FLOPs and bytes from a model's configuration.

Every function returns a list of `Cost`, one for each kernel that runs, in order: `total` adds them up, `limit` says how
long a device needs for them at best. `passes` is "forward" (inference), or of training "forward+backward" or one of
its halves, "training forward" and "backward".

FLOPs are those of matrix products, multiply-adds counted twice; an attention's backward computes the scores again.
Bytes come in two counts:

    fused=True    what has to move: each operand of a fused operator once. Products read and write their three matrices,
                  attention its q, k, v and o, and whatever is pointwise between two products is one kernel
    fused=False   plain PyTorch, eager (backend "reference"): each pointwise operation reads its operands from memory
                  and writes its result there, LayerNorm and modulation in fp32 with their conversions

Left out of both: modulations, statistics and biases, whose size is that of a row or a column beside the matrix.
B samples have N image tokens and L caption tokens that count, on average, each. `itemsize` is that of weights and
activations in bytes (2 for bf16 and fp16); the optimizer works on fp32.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PASSES = ("forward", "training forward", "backward", "forward+backward")
RECOMPUTE = ("none", "pointwise", "block")


@dataclass(frozen=True)
class Cost:
    """Arithmetic of matrix products in FLOP, and bytes read and written."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)

    __rmul__ = __mul__


Costs = list[Cost]


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def limit(costs: Cost | Costs, copy: float, matmul: float) -> tuple[float, str]:
    """The least seconds of some costs on a device, and which ceiling sets most of them, "copy" or "matmul".

    A kernel takes the longer of moving its bytes at `copy` bytes/s and multiplying at `matmul` FLOP/s: within a kernel
    they overlap. Kernels run one after the other, each waiting for the results of the one before, so their times add
    up; one kernel's idle tensor cores do not help the next.
    """
    seconds = {"copy": 0.0, "matmul": 0.0}
    for cost in [costs] if isinstance(costs, Cost) else costs:
        moving, multiplying = cost.bytes / copy, cost.flops / matmul
        seconds["matmul" if multiplying > moving else "copy"] += max(moving, multiplying)
    return sum(seconds.values()), max(seconds, key=seconds.get)


@dataclass(frozen=True)
class Model:
    """The sizes that costs depend on; the width is that of `Transformer.inner_dim`.

    Without `caption_channels` the model has no cross-attention and no caption: the class-conditional DiT.
    """

    layers: int
    width: int
    caption_channels: int | None = 4096
    patch_features: int = 16
    out_features: int = 32
    modulation: str = "adaln_single"

    @classmethod
    def of(cls, config: Any) -> "Model":
        """From a `Transformer`'s config, or the arguments that `pixart_fast.config.transformer_config` gives."""
        patch = config["patch_size"] ** 2
        return cls(
            layers=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            caption_channels=config["caption_channels"],
            patch_features=patch * config["in_channels"],
            out_features=patch * config["out_channels"],
            modulation=config.get("modulation", "adaln_single"),
        )

    @property
    def parameters(self) -> int:
        """Trained numbers, without those of micro-conditions, with the 1001 class embeddings of a DiT."""
        D, C = self.width, self.caption_channels
        attention = 4 * (D * D + D)
        per_block = (2 if C else 1) * attention + 8 * D * D + 5 * D
        outside = D * (self.patch_features + 1) + (D + 1) * self.out_features + 257 * D + D * D + D
        if C:
            outside += (C + 1) * D + D * D + D
        if self.modulation == "adaln_single":
            return self.layers * (per_block + 6 * D) + outside + 6 * D * (D + 1) + 2 * D
        outside += (C + 1) * D if C else 1001 * D
        return self.layers * (per_block + 6 * D * (D + 1)) + outside + 2 * D * (D + 1)


def linear(
    rows: float, K: int, D: int, itemsize: int, passes: str = "forward", *, input_gradient: bool = True
) -> Costs:
    """a Wᵀ + b of `a [rows, K]`, `W [D, K]`: one product forward, one for each gradient; the bias's is a sum."""
    product = Cost(2 * rows * K * D, (rows * K + K * D + rows * D) * itemsize)
    backward = [product] * (2 if input_gradient else 1) + [Cost(0, rows * D * itemsize)]
    return _of(passes, [product], backward)


def modulated_layernorm(
    rows: int,
    D: int,
    itemsize: int,
    passes: str = "forward",
    *,
    fused: bool = True,
    residual: bool = True,
    gate: bool = True,
) -> Costs:
    """x₁ = x + gate · residual, y = LayerNorm(x₁) (1 + scale) + shift of `[rows, D]`; without a residual x₁ is x.

    Fused: forward reads x and the residual and writes x₁ and y; backward reads dy, dx₁, x₁ and writes dx, and with a
    gate reads the residual and writes its gradient.
    """
    if fused:
        forward = 4 if residual else 2
        backward = (6 if gate else 4) if residual else 3
        return _of(passes, _moved(rows * D * itemsize, forward), _moved(rows * D * itemsize, backward))
    s, wide = itemsize, max(itemsize, 4)
    conversion = [] if wide == s else [s + wide]
    forward = [*conversion, 2 * wide, 2 * wide, 2 * wide, *conversion]  # LayerNorm, · (1 + scale), + shift
    # Sum for dshift, · LayerNorm(x₁) and its sum for dscale, · (1 + scale), LayerNorm's own, + dx₁.
    backward = [*conversion, wide, 3 * wide, wide, 2 * wide, 3 * wide, *conversion, 3 * s]
    if residual and gate:
        forward = [*conversion * 2, 2 * wide, 3 * wide, *conversion, *forward]
        # · gate, · residual and its sum; dx from fp32 and back for each of the two.
        backward += [*conversion, 2 * wide, 3 * wide, wide, *conversion * 2]
    elif residual:
        forward = [3 * s, *forward]
    return _of(passes, *([Cost(0, rows * D * bytes) for bytes in part] for part in (forward, backward)))


def attention(
    query: float, key: float, pairs: float, itemsize: int, passes: str = "forward", *, masked: bool = False
) -> Costs:
    """softmax(q kᵀ / √d) v by a kernel that keeps no scores, which plain PyTorch has too.

    Args:
        query, key: how many numbers q and k hold.
        pairs: how many multiplications q kᵀ has.
        masked: padding of k and v is zeroed before, and its gradients after, as plain PyTorch does.

    Forward reads q, k, v and writes o, two products; backward reads those and do, writes dq, dk, dv, five products.
    """
    mask = [Cost(0, 2 * key * itemsize)] * (2 if masked else 0)
    forward = [*mask, Cost(4 * pairs, (2 * query + 2 * key) * itemsize)]
    return _of(passes, forward, [Cost(10 * pairs, 4 * (query + key) * itemsize), *mask])


def gated_linear(rows: int, K: int, D: int, itemsize: int, passes: str = "forward", *, fused: bool = True) -> Costs:
    """x + gate · (a Wᵀ + b): one kernel in inference; in training a product and what is pointwise."""
    one = rows * D * itemsize
    if fused and passes == "forward":
        return [Cost(2 * rows * K * D, (rows * K + K * D) * itemsize + 2 * one)]
    forward = _moved(one, 3) if fused else _moved(one, 2, 3)  # · gate, + x
    backward = _moved(one, 3) if fused else _moved(one, 2, 3, 1)  # · gate, · h and its sum
    return _around(rows, K, D, itemsize, passes, forward, backward)


def linear_gelu(rows: int, K: int, D: int, itemsize: int, passes: str = "forward", *, fused: bool = True) -> Costs:
    """GELU(a Wᵀ + b): one kernel in inference; in training a product and a pointwise kernel, fused or not."""
    one = rows * D * itemsize
    if fused and passes == "forward":
        return [Cost(2 * rows * K * D, (rows * K + K * D) * itemsize + one)]
    return _around(rows, K, D, itemsize, passes, _moved(one, 2), _moved(one, 3))


def block(
    model: Model, B: int, N: int, L: float, itemsize: int, passes: str = "forward", *, fused: bool = True
) -> Costs:
    """One transformer block, keys and values of the caption given: `text` computes them.

    In training the last gated residual is left to the LayerNorm of the next block. Fused, q, k and v are one product in
    inference, and in training every product is the library's.
    """
    D, rows = model.width, B * N
    training = passes != "forward"
    one = rows * D * itemsize
    cross = model.caption_channels is not None
    fuse = {"fused": fused}
    costs = modulated_layernorm(rows, D, itemsize, passes, residual=training, **fuse)
    if fused and not training:
        costs += linear(rows, D, 3 * D, itemsize, passes)
    else:
        costs += linear(rows, D, D, itemsize, passes) * 3
    costs += attention(rows * D, rows * D, B * N * N * D, itemsize, passes)
    costs += gated_linear(rows, D, D, itemsize, passes, **fuse)
    if cross:
        costs += linear(rows, D, D, itemsize, passes)
        costs += attention(rows * D, B * L * D, B * N * L * D, itemsize, passes, masked=not fused)
        costs += linear(rows, D, D, itemsize, passes)
    costs += modulated_layernorm(rows, D, itemsize, passes, residual=cross, gate=False, **fuse)
    costs += linear_gelu(rows, D, 4 * D, itemsize, passes, **fuse)
    down = linear if training else gated_linear
    costs += down(rows, 4 * D, D, itemsize, passes, **({} if training else fuse))
    if training:
        # Gradients that meet: those of q, k and v's input, and cross-attention's with the stream's, where the gate's
        # kernel reads one operand more and writes the sum.
        meet = [4] if fused else [3, 3]
        if cross:
            meet.append(2 if fused else 3)
        costs += _of(passes, [], _moved(one, *meet))
    if model.modulation == "adaln":
        costs += linear(B, D, 6 * D, itemsize, passes)
    return costs


def text(model: Model, B: int, L: float, itemsize: int, passes: str = "forward") -> Costs:
    """What sees the caption alone: its projection, and keys and values of all blocks as one product."""
    if model.caption_channels is None:
        return []
    C, D, rows = model.caption_channels, model.width, B * L
    pairs = 2 * D * model.layers
    costs = linear(rows, C, D, itemsize, passes, input_gradient=False)
    costs += _of(passes, _moved(rows * D * itemsize, 2), _moved(rows * D * itemsize, 3))  # GELU
    costs += linear(rows, D, D, itemsize, passes)
    costs += _of(passes, _moved(pairs * D * itemsize, 2), [])  # the weights are joined for the occasion
    return costs + linear(rows, D, pairs, itemsize, passes)


def transformer(
    model: Model,
    B: int,
    N: int,
    L: float,
    itemsize: int,
    passes: str = "forward",
    *,
    fused: bool = True,
    recompute: str = "none",
    captions: bool = True,
) -> Costs:
    """The whole model, forward and backward as `passes` has it.

    Args:
        recompute: what training's backward computes again: "none", "pointwise" (`engine.recompute_pointwise`: what is
            no product and no attention), "block" (each block, as published).
        captions: False where `Transformer.encode_caption` has run before.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}.")
    D, rows = model.width, B * N
    training = passes != "forward"
    costs = linear(rows, model.patch_features, D, itemsize, passes, input_gradient=False)
    costs += linear(B, 256, D, itemsize, passes, input_gradient=False) + linear(B, D, D, itemsize, passes)
    if model.modulation == "adaln_single":
        costs += linear(B, D, 6 * D, itemsize, passes)
    else:
        costs += linear(B, D, 2 * D, itemsize, passes)
        if model.caption_channels:
            costs += linear(B, model.caption_channels, D, itemsize, passes, input_gradient=False)
    if captions:
        costs += text(model, B, L, itemsize, passes)
    costs += block(model, B, N, L, itemsize, passes, fused=fused) * model.layers
    if "backward" in passes and recompute != "none":
        again = block(model, B, N, L, itemsize, "training forward", fused=fused)
        again.remove(linear(rows, 4 * D, D, itemsize)[0])  # its result is no backward's operand: PyTorch stops before
        costs += [cost for cost in again if recompute == "block" or not cost.flops] * model.layers
    costs += modulated_layernorm(rows, D, itemsize, passes, fused=fused, residual=training)
    return costs + linear(rows, D, model.out_features, itemsize, passes)


def optimizer(parameters: int, itemsize: int, *, fused: bool = True) -> Costs:
    """AdamW on fp32 master weights and moments, which also writes the weights that the model multiplies with.

    Fused: gradient, weight and both moments read, the latter three written, and the copy where it is another dtype.
    Unfused, in passes over all of them: decay; both moments; √, / and + of the denominator; the update.
    """
    copies = itemsize < 4
    if fused:
        return [Cost(0, parameters * (itemsize * (2 if copies else 1) + 24))]
    passes = [8, 12, 8, 12, 8, 8, 8, 16]
    return _moved(parameters, *passes, *([itemsize + 4] * 2 if copies else []))


def step(
    model: Model, B: int, N: int, L: float, itemsize: int, *, fused: bool = True, recompute: str = "none"
) -> Costs:
    """A training step of B samples on one device: forward, backward, optimizer."""
    both = transformer(model, B, N, L, itemsize, "forward+backward", fused=fused, recompute=recompute)
    return both + optimizer(model.parameters, itemsize, fused=fused)


def generation(
    model: Model, B: int, N: int, L: float, itemsize: int, steps: int, *, fused: bool = True, guided: bool = True
) -> Costs:
    """B pictures in some steps of the transformer, 2B samples a step with guidance; no text encoder, no decoder.

    Fused, the captions pass through once; unfused in every step, as in diffusers' pipelines.
    """
    samples = (2 if guided else 1) * B
    costs = transformer(model, samples, N, L, itemsize, fused=fused, captions=not fused) * steps
    return (text(model, samples, L, itemsize) if fused else []) + costs


def _of(passes: str, forward: Costs, backward: Costs) -> Costs:
    if passes not in PASSES:
        raise ValueError(f"passes must be one of {', '.join(PASSES)}, got {passes!r}.")
    return {"backward": backward, "forward+backward": forward + backward}.get(passes, forward)


def _moved(unit: float, *times: float) -> Costs:
    """Kernels that only move memory, each some times a tensor's bytes."""
    return [Cost(0, unit * count) for count in times]


def _around(rows: int, K: int, D: int, itemsize: int, passes: str, forward: Costs, backward: Costs) -> Costs:
    """A product with what is pointwise behind it."""
    before, after = (linear(rows, K, D, itemsize, half) for half in ("training forward", "backward"))
    return _of(passes, before + forward, backward + after)

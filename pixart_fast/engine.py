"""How the transformer is run: what is compiled, and what training keeps for its backward. One function per policy."""

from collections import OrderedDict
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Matrix products and attention: dear to compute again. Everything between them is pointwise or a LayerNorm.
KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.pixart_fast.cross_attention.default,
)


def compile_blocks(model: nn.Module) -> nn.Module:
    """Compile each transformer block in place; returns the model.

    Blocks have the same code and shapes, so all of them share one graph: a cold start compiles one block instead of 28,
    and training, checkpointing and sharding still see separate modules. Token counts are dynamic: other resolutions and
    aspect ratios reuse the graph.
    """
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True)
    return model


class Graphs:
    """Evaluations of a transformer as CUDA graphs, one per shape; beyond `limit` the one unused for longest goes.

    A replay launches all kernels of a step at once: at 256 px and small batches an evaluation is bound by launches.
    Weights are read where they lay at the capture, so a model that moved needs new `Graphs`.
    """

    def __init__(self, limit: int = 8):
        self.limit = limit
        self.captured: OrderedDict[tuple, _Graph] = OrderedDict()

    def evaluate(self, model: nn.Module, caption: tuple, latents: Tensor, time: Tensor, added: dict | None) -> Tensor:
        """`model(latents, caption, time, added)`'s sample; it is overwritten by the next evaluation of its shape."""
        inputs = {"latents": latents, "time": time, **(added or {})}
        key = (id(model), *(_form(t) for t in (*inputs.values(), *_tensors(caption))), added is None)
        if key in self.captured:
            self.captured.move_to_end(key)
        else:
            self.captured[key] = _Graph(model, caption, inputs)
            while len(self.captured) > self.limit:
                self.captured.popitem(last=False)
        return self.captured[key].replay(caption, inputs)


class _Graph:
    def __init__(self, model: nn.Module, caption: tuple, inputs: dict[str, Tensor]):
        self.model = model  # its id is the key: while this graph lives no other model has it
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.caption, self.bound = _cloned(caption), caption
        device = inputs["latents"].device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):  # compiled code and libraries settle before the capture
                self.run()
        torch.cuda.current_stream(device).wait_stream(side)
        self.kept = list(model.pos_embed.positions.values())  # the graph reads one, which must not be dropped before it
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.run()

    def run(self) -> Tensor:
        added = {name: t for name, t in self.inputs.items() if name not in ("latents", "time")} or None
        return self.model(self.inputs["latents"], self.caption, self.inputs["time"], added, return_dict=False)[0]

    def replay(self, caption: tuple, inputs: dict[str, Tensor]) -> Tensor:
        if caption is not self.bound:  # once per prompt, not per step
            for mine, given in zip(_tensors(self.caption), _tensors(caption), strict=True):
                mine.copy_(given)
            self.bound = caption
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.output


def _form(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _tensors(caption: tuple) -> list[Tensor]:
    """Every tensor of nested tuples and lists, in order."""
    found = []
    for part in caption:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list)):
            found += _tensors(part)
    return found


def _cloned(part):
    """Nested tuples and lists with a copy of each tensor."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(_cloned, part))
    return type(part)(map(_cloned, part)) if isinstance(part, (tuple, list)) else part


def uncompiled():
    """A context in which compiled blocks run eagerly."""
    return torch.compiler.set_stance("force_eager")


def _policy(context, op, *arguments, **options) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_pointwise(model: nn.Module) -> nn.Module:
    """Let each block's backward compute again what is cheap, and keep results of matrix products and attention only.

    In place, before `compile_blocks`; returns the model. Gradients are the same, bit for bit; full checkpointing
    (`enable_gradient_checkpointing`) saves more memory and repeats every product.
    """
    for block in model.transformer_blocks:
        block.forward = MethodType(_recomputing_forward, block)
    return model


def _recomputing_forward(block: nn.Module, *inputs):
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, context_fn=contexts)

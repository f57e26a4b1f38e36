"""How the transformer is run: what is compiled, and what training keeps for its backward. One function per policy."""

from functools import partial
from types import MethodType

import torch
from torch import nn
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

"""How the transformer is compiled: one function, one policy."""

import torch
from torch import nn


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

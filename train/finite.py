"""Which layer went wrong first, when a loss or a gradient is no longer a number."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GradientWatch:
    """Norms of this process's gradients as backward produces them: one reduction per parameter, read once per step."""

    def __init__(self, model: nn.Module):
        self.norms: list[tuple[str, Tensor]] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: self._note(name, gradient))

    def _note(self, name: str, gradient: Tensor) -> None:
        self.norms.append((name, torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)))

    def clear(self) -> None:
        self.norms.clear()

    def all_finite(self) -> Tensor:
        """A boolean on the device."""
        return torch.stack([norm for _, norm in self.norms]).isfinite().all()

    def first(self) -> str | None:
        """The first parameter, in the order of backward, whose gradient is not finite."""
        return next((name for name, norm in self.norms if not norm.isfinite()), None)


@torch.no_grad()
def first_nonfinite_layer(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run `forward` once more and name the first module of `model` to finish with an output that is not finite."""
    found: list[str] = []

    def check(name: str, output: object) -> None:
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        if not found and any(isinstance(x, Tensor) and not x.isfinite().all() for x in tensors):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: check(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None

"""Optimizers that keep the weights' moving average in their state: ZeRO shards and saves it with the moments."""

from collections.abc import Iterator

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from train.muon import Muon
from train.settings import Optimizer, Settings, UserError


def with_ema(base: type[TorchOptimizer]) -> type[TorchOptimizer]:
    """`base`, keeping `state[p]["ema"]`, an fp32 average of `p`: ema <- d·ema + (1 - d)·p after each step, d =
    group["ema_decay"].

    Under ZeRO `p` is this process's fp32 partition, so the average costs 4 bytes per parameter over all processes
    together.
    """

    class WithEMA(base):
        @torch.no_grad()
        def step(self, closure=None):
            groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
            # The first average is the weights before their first update; it enters the state after the step because
            # optimizers take an empty state for "first step".
            start = {p: p.detach().clone() for _, params in groups for p in params if "ema" not in self.state[p]}
            result = super().step(closure)
            for group, params in groups:
                if not params:
                    continue
                for p in params:
                    if p in start:
                        self.state[p]["ema"] = start[p]
                torch._foreach_lerp_([self.state[p]["ema"] for p in params], params, 1 - group["ema_decay"])
            return result

    WithEMA.__name__ = WithEMA.__qualname__ = f"{base.__name__}WithEMA"
    return WithEMA


class MuonAdamW(TorchOptimizer):
    """Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

    Muon orthogonalises whole matrices, so no parameter may be flattened or split: ZeRO stage 0 only.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], settings: Optimizer, lr: float, fused: bool
    ):
        self.muon = Muon(matrices, lr=settings.muon_lr)
        self.adamw = torch.optim.AdamW(others, **_adamw_arguments(settings, lr), fused=fused)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Both halves work on this optimizer's groups and state; loading a checkpoint replaces those objects."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure=None):
        self._link()
        self.muon.step()
        self.adamw.step()


def _adamw_arguments(settings: Optimizer, lr: float) -> dict:
    return {
        "lr": lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def build_optimizer(model: nn.Module, run: Settings, device: torch.device) -> TorchOptimizer:
    """The optimizer of a run, with its EMA. All weights decay, as published; groups remember `initial_lr`.

    `implementation`: "auto" and "torch" take torch's AdamW, fused on CUDA; "deepspeed" DeepSpeed's FusedAdam, or
    CPUAdam under offload (built on first use, minutes); "apex" NVIDIA apex's FusedAdam. Raises UserError where the
    choice cannot be had.
    """
    settings, lr, offload = run.optimizer, run.effective_lr(), run.offload
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = device.type == "cuda" and not offload
    if run.optimizer_kind() == "muon":
        if run.zero_stage:
            raise UserError(
                "optimizer.kind=muon needs whole matrices, so zero_stage=0; with ZeRO choose optimizer.kind=adamw."
            )
        if settings.implementation not in ("auto", "torch"):
            raise UserError("optimizer.kind=muon has one implementation: leave optimizer.implementation at auto.")
        matrices = [p for name, p in model.named_parameters() if _is_block_matrix(name, p)]
        chosen = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in chosen]
        optimizer = with_ema(MuonAdamW)(matrices, others, settings, lr, fused)
    elif settings.implementation == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise UserError(
                "optimizer.implementation=apex needs NVIDIA apex, built from its source (PyPI's `apex` is another "
                "project): install it or choose optimizer.implementation=auto."
            ) from error
        optimizer = with_ema(FusedAdam)(parameters, adam_w_mode=True, **_adamw_arguments(settings, lr))
    elif settings.implementation == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if device.type != "cuda" or offload:
            optimizer = with_ema(DeepSpeedCPUAdam)(parameters, adamw_mode=True, **_adamw_arguments(settings, lr))
        else:
            optimizer = with_ema(FusedAdam)(parameters, adam_w_mode=True, **_adamw_arguments(settings, lr))
    else:
        optimizer = with_ema(torch.optim.AdamW)(parameters, **_adamw_arguments(settings, lr), fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["ema_decay"] = settings.ema
    return optimizer


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return name.startswith(("transformer_blocks.", "blocks.")) and name.endswith(".weight") and parameter.ndim == 2


def learning_rate_factor(step: int, steps: int, settings: Optimizer) -> float:
    """What multiplies every learning rate at 0-based `step`: linear warm-up, then constant or cosine to zero."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    return float(0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))))


def set_step(optimizer, step: int, steps: int, settings: Optimizer) -> None:
    """Learning rates and EMA decay of a 0-based step: functions of the step alone, so that nothing of them needs
    saving.

    The average warms up by (1 + step) / (10 + step), so that short runs do not average in their first weights.
    """
    factor = learning_rate_factor(step, steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        group["ema_decay"] = min(settings.ema, (1 + step) / (10 + step))


def full_ema(engine) -> Iterator[tuple[str, Tensor]]:
    """`(name, fp32 average)` of every parameter, whole, one at a time; collective: every process runs it to the end.

    Before the first update (fp16 may skip some while it finds its loss scale) the average is the weights.
    """
    optimizer, state = engine.optimizer, engine.basic_optimizer.state
    started = any("ema" in entry for entry in state.values())

    def average(master: Tensor) -> Tensor:
        return state[master]["ema"] if started else master.detach()

    whole: dict[nn.Parameter, Tensor] = {}
    if hasattr(optimizer, "fp32_groups_flat"):  # DeepSpeed's stage 0 with a fused optimizer: one flat tensor per group
        for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            pieces = average(flat).split([p.numel() for p in params])
            whole.update({p: piece.view_as(p) for p, piece in zip(params, pieces, strict=True)})
    elif hasattr(optimizer, "fp32_groups"):  # its stage 0 in half precision: an fp32 copy of each parameter
        for params, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            whole.update({p: average(copy) for p, copy in zip(params, copies, strict=True)})
    for name, p in engine.module.named_parameters():
        if p in whole:
            yield name, whole[p]
        elif hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
            yield name, safe_get_full_optimizer_state(p, "ema") if started else safe_get_full_fp32_param(p)
        else:
            yield name, average(p)

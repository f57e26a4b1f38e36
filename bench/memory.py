"""Memory of a training step, by what it is for: predicted on any machine, and measured.

    parameters    weights, as the forward reads them       buffers       gradient buckets of data parallelism
    gradients     of the weights                           activations   what the forward makes and keeps
    optimizer     AdamW's moments, fp32 master weights     workspace     temporaries of backward and update; cuBLAS's
    ema           fp32 moving average of the weights       total         their sum, at the peak of the step

`predict` runs the step under fake tensors, which have shapes and no data, and follows every storage from the operator
that makes it to its end (`Ledger`). `measure` runs it for real. A prediction for a CUDA device models, with fake CPU
tensors:
- the fused operators where the setting has them: what they keep is settled by one autograd formula for all devices.
  Other attention is `scaled_dot_product_attention`: CUDA's flash, memory-efficient and cuDNN kernels keep what the
  CPU's flash kernel does (q, k, v, the result, one fp32 number per query). The plain products that `ops` prefers for
  short bf16 sequences on a CPU are avoided. A flash backward's fp32 sum of the gradient of q is counted;
- blocks of 512 bytes. What the allocator leaves on a large block, up to 1 MiB, is not modelled;
- cuBLAS's workspaces, 32 MiB on Hopper and 8.1 MiB before, twice: forward and backward have a thread each;
- torch's fused AdamW, which has no temporaries, and no clipping. An update frees the gradients;
- ZeRO as DeepSpeed 0.19 does it with the buckets of train/configs/zero, in the last process, whose shard fills first.
Not in it: the CUDA context, NCCL's buffers, fragmentation, and what a compiler would fuse.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixart_fast import Transformer, ops
from pixart_fast.config import SIZES, Size, transformer_config
from pixart_fast.diffusion import GaussianDiffusion
from pixart_fast.engine import recompute_pointwise

CLASSES = ("parameters", "gradients", "optimizer", "ema", "buffers", "activations", "workspace")
CUDA_BLOCK = 512
# PyTorch's defaults (CublasHandlePool.cpp); cuBLASLt shares them.
CUBLAS_WORKSPACE = {"sm_90": 32 * 2**20, "other": 8320 * 2**10}
# Their forward records no gradients inside, so that one that is computed again would pass for a backward.
FUSED = (torch.ops.pixart_fast.modulated_layernorm.default, torch.ops.pixart_fast.cross_attention.default)
BUCKET = {1: 200_000_000, 2: 200_000_000, 3: 10_000_000}  # gradients per bucket, as in train/configs/zero
REUSE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance
MEASURED = "measured step"


@dataclass(frozen=True)
class Setting:
    """A training step of one process.

    precision    "fp32"; "autocast": fp32 weights, bf16 products; "bf16": bf16 weights and gradients, fp32 masters
    kernels      "ours", or "reference" for plain PyTorch
    recompute    "nothing", "pointwise" (`engine.recompute_pointwise`) or "blocks" (`enable_gradient_checkpointing`)
    buckets      buffers of the size of all gradients: DistributedDataParallel has one for each model that it wraps
    zero_stage   of DeepSpeed over `processes`, with precision="bf16"; 0 keeps everything in every process
    """

    modulation: str = "adaln_single"
    batch: int = 16
    pixels: int = 256
    layers: int = SIZES["XL"].layers
    width: int = SIZES["XL"].width
    heads: int = SIZES["XL"].heads
    text_tokens: int = 120
    caption_channels: int = 4096
    precision: str = "autocast"
    kernels: str = "ours"
    recompute: str = "nothing"
    ema: bool = True
    buckets: int = 0
    zero_stage: int = 0
    processes: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Ledger(TorchDispatchMode):
    """Bytes of every storage alive, by class, and what they were when their sum was largest.

    Tensors from before it was entered have to be declared with `own`. What is made inside is "activations" in the
    forward or where it is computed again, else "workspace", until `own` knows better. Sizes are multiples of `block`;
    `flash` adds what a flash attention allocates inside its backward.
    """

    def __init__(self, block: int = 1, flash: bool = False):
        super().__init__()
        self.block, self.flash = block, flash
        self.forward = True
        self.live = dict.fromkeys(CLASSES, 0)
        self.peak = dict(self.live)
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}

    def own(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are for."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._storages:
                reference, former, size = self._storages[key]
                self.live[former] -= size
            else:
                reference = weakref.ref(storage, lambda _, key=key: self._forget(key))
                size = -(-storage.nbytes() // self.block) * self.block
            self._storages[key] = reference, name, size
            self.live[name] += size

    def _forget(self, key: int) -> None:
        _, name, size = self._storages.pop(key)
        self.live[name] -= size

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = "activations" if self.forward or torch.is_grad_enabled() or function in FUSED else "workspace"
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.own(name, [t for t in made if id(t.untyped_storage()) not in self._storages])
        inside = _flash_workspace(function, arguments) if self.flash else 0
        if sum(self.live.values()) + inside > sum(self.peak.values()):
            self.peak = self.live | {"workspace": self.live["workspace"] + inside}
        return result


def _flash_workspace(function, arguments: tuple) -> int:
    """Bytes of the fp32 gradient of q, [B, H, N, d rounded up to 32], in a flash attention's backward."""
    if function is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    B, H, N, d = arguments[1].shape
    return 4 * B * H * N * (-(-d // 32) * 32)


class Step:
    """A training step and what it keeps from one to the next, on `device`, or on fake tensors in a fake mode.

    With ZeRO it is what one process does of it, its communication left out, and it needs a ledger to run.
    """

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        self.model = build(setting, device)
        self.parameters = list(self.model.parameters())
        sizes = [p.numel() for p in self.parameters]
        if setting.zero_stage:
            self.masters = [torch.zeros(shard(setting, sizes), device=device)]
        elif setting.precision == "bf16":
            self.masters = [p.detach().float() for p in self.parameters]
        else:
            self.masters = self.parameters
        self.optimizer = torch.optim.AdamW(self.masters, fused=True)
        for master in self.masters:  # the first update makes the moments
            master.grad = torch.zeros_like(master)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema = [master.detach().clone() for master in self.masters] if setting.ema else []
        self.buckets = [self._empty(sum(sizes)) for _ in range(setting.buckets)]
        self.shards: list[Tensor] = []  # of gradients
        side = setting.pixels // 16
        like = torch.empty(1, 1, setting.width, device=device)
        self.position = self.model.pos_embed.position(side, side, like)  # which the model keeps, unless it is fake
        if setting.zero_stage == 3:
            self._open_bucket()
            self._open_shard()

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.setting.dtype, device=self.device)

    def _open_bucket(self) -> None:
        self.buckets, self.collected = [self._empty(BUCKET[self.setting.zero_stage])], 0

    def _open_shard(self) -> None:
        self.shards = [self._empty(self.masters[0].numel())]

    def kept(self) -> dict[str, list[Tensor]]:
        """What lives between two steps, by class."""
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        masters = [] if self.masters is self.parameters else self.masters
        return {
            "parameters": self.parameters,
            "gradients": self.shards,
            "optimizer": [*masters, *states],
            "ema": self.ema,
            "buffers": self.buckets,
        }

    def run(self, ledger: Ledger | None = None) -> None:
        """One step, followed by a ledger where there is one."""
        if ledger is None:
            loss_of(self.model, self.setting, self.device).backward()
            self.update()
            return
        for name, tensors in self.kept().items():
            ledger.own(name, tensors)
        ledger.own("activations", [self.position])
        hooks = [p.register_post_accumulate_grad_hook(partial(self._accumulated, ledger)) for p in self.parameters]
        with ledger:
            loss = loss_of(self.model, self.setting, self.device)
            ledger.forward = False
            loss.backward()
            del loss
            if self.setting.zero_stage in (1, 2):
                self.buckets.clear()
            self.update()
        for hook in hooks:
            hook.remove()

    def _accumulated(self, ledger: Ledger, parameter: Tensor) -> None:
        """A gradient is ready. ZeRO moves it to the bucket, and what is in a full bucket to the shard."""
        if not self.setting.zero_stage:
            ledger.own("gradients", [parameter.grad])
            return
        parameter.grad = None
        if not self.buckets:
            self._open_bucket()
        self.collected += parameter.numel()
        if not self.shards and self.collected > BUCKET[self.setting.zero_stage]:
            self._open_shard()
        ledger.own("buffers", self.buckets)
        ledger.own("gradients", self.shards)

    @torch.no_grad()
    def update(self) -> None:
        """AdamW and the moving average; the gradients are gone afterwards."""
        copies = self.setting.precision == "bf16" and not self.setting.zero_stage
        if self.setting.zero_stage:
            if not self.shards:
                self._open_shard()
            self.masters[0].grad = self.shards[0].clone().float()  # DeepSpeed flattens its list of gradients first
            if self.setting.zero_stage < 3:
                self.shards.clear()
        elif copies:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = parameter.grad.float()
        self.optimizer.step()
        if self.ema:
            torch._foreach_lerp_(self.ema, self.masters, 1e-4)
        self.optimizer.zero_grad()
        if copies:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)
                parameter.grad = None


def build(setting: Setting, device: torch.device) -> Transformer:
    """The model of a setting, in training mode."""
    config = transformer_config(
        Size(setting.layers, setting.width, setting.heads),
        sample_size=setting.pixels // 8,
        caption_channels=setting.caption_channels,
        modulation=setting.modulation,
        use_additional_conditions=False,
    )
    with device, _default_dtype(setting.dtype):  # fake parameters cannot be cast once they are made
        model = Transformer(**config).train()
    if setting.kernels == "reference":
        model.set_backend("reference")
    if setting.recompute == "pointwise":
        recompute_pointwise(model)
    elif setting.recompute == "blocks":
        model.enable_gradient_checkpointing()
    return model


def loss_of(model: Callable, setting: Setting, device: torch.device) -> Tensor:
    """The training loss of random latents under captions of full length."""
    batch, side, dtype = setting.batch, setting.pixels // 8, setting.dtype
    x0, noise = (torch.randn(batch, 4, side, side, device=device) for _ in range(2))
    text = torch.randn(batch, setting.text_tokens, setting.caption_channels, dtype=dtype, device=device)
    mask = torch.ones(batch, setting.text_tokens, dtype=torch.bool, device=device)
    t = torch.zeros(batch, dtype=torch.long, device=device)
    diffusion = GaussianDiffusion()
    xt = diffusion.q_sample(x0, t, noise)
    with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "autocast"):
        predicted = model(xt.to(dtype), text, t, encoder_attention_mask=mask, return_dict=False)[0]
    return diffusion.training_losses(predicted, x0, xt, t, noise)["loss"].mean()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def shard(setting: Setting, sizes: list[int]) -> int:
    """How many of a model's numbers one process of ZeRO holds: stage 3 cuts each parameter, 1 and 2 their sequence."""
    n = setting.processes
    if setting.zero_stage == 3:
        return sum(-(-size // n) for size in sizes)
    return -(-sum(sizes) // (2 * n)) * 2


def predict(setting: Setting, device: str = "sm_90") -> dict[str, int]:
    """Bytes of each class at the peak of a step, and their "total", on a GPU ("sm_90", "sm_80", …) or on this "cpu".

    Two seconds for all 28 blocks. Nothing is extrapolated: memory is linear in depth only while the peak stays at the
    same moment of the step.
    """
    gpu = device != "cpu"
    with _as_on_cuda() if gpu else nullcontext(), FakeTensorMode(allow_non_fake_inputs=True):
        step = Step(setting, torch.device("cpu"))
        if gpu and setting.kernels == "ours":
            step.model.set_backend("reference", op="self_attention")
            for op in ("modulated_layernorm", "cross_attention"):
                step.model.set_backend("triton", op=op)
        ledger = Ledger(CUDA_BLOCK if gpu else 1, flash=gpu)
        step.run(ledger)
    peak = dict(ledger.peak)
    if setting.zero_stage == 3:
        sizes = [p.numel() for p in step.parameters]
        # DeepSpeed drops a gathered weight unless it serves again within REUSE numbers of others. When the backward
        # begins, the last half of them do. Gathers in flight are not counted.
        peak["parameters"] = 2 * (shard(setting, sizes) + min(sum(sizes), REUSE // 2))
    if gpu:
        peak["workspace"] += 2 * CUBLAS_WORKSPACE["sm_90" if device == "sm_90" else "other"]
    return peak | {"total": sum(peak.values())}


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """On a CPU, take the branches that a CUDA device takes: for fake tensors, since nothing there can compute."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    with patch.multiple(ops, triton_device="cpu", triton_problem=None, _attention=attention):
        yield


def measure(setting: Setting, device: torch.device) -> dict[str, int]:
    """As `predict`, of a real step. The total is the peak of the CUDA allocator, or of the running sum of what the
    CPU's allocator tells torch's profiler (oneDNN's own memory it does not). A ledger in the step before tells how it
    divides; what no tensor accounts for is workspace.
    """
    on_gpu = device.type == "cuda"
    gc.collect()  # what dies while the profiler counts would be subtracted
    elsewhere = _clear(device) if on_gpu else 0
    profiled = nullcontext() if on_gpu else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    ledger = Ledger(CUDA_BLOCK if on_gpu else 1)
    with profiled:
        step = Step(setting, device)
        step.run(ledger)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with record_function(MEASURED):
            step.run()
    peak = dict(ledger.peak)
    total = torch.cuda.max_memory_allocated(device) - elsewhere if on_gpu else profiled_peak(profiled)
    peak["workspace"] += total - sum(peak.values())
    del step
    gc.collect()
    if on_gpu:
        _clear(device)
    return peak | {"total": total}


def _clear(device: torch.device) -> int:
    """Frees what can be; returns the bytes that others hold."""
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def profiled_peak(profiled: profile) -> int:
    """The largest sum of allocations and frees since a profile began, within the range named `MEASURED`: bytes.

    Of several such ranges the least: threads of a collective free its copies when they come to it, which only adds.
    """
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    ranges = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == MEASURED]
    peaks, allocated = [0] * len(ranges), 0
    for event in events:
        if event.name() == "[memory]":
            allocated += event.nbytes()
            for place, (begin, end) in enumerate(ranges):
                if begin <= event.start_ns() <= end:
                    peaks[place] = max(peaks[place], allocated)
    return min(peaks)

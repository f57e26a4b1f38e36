"""Train a PixArt transformer: `deepspeed train/run.py [--config FILE.yaml] [key=value …]`.

A step is a function of the settings and its number alone (train/data/source.py), the rest of the state is in the checkpoint
(train/checkpoints.py): that is why a run that was killed goes on bit for bit.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the launcher puts train/ itself on the path

import deepspeed
import torch
import torch.distributed as dist
import yaml

from pixart_fast import GaussianDiffusion, Transformer, ops
from pixart_fast.config import transformer_config
from pixart_fast.cost import forward_flops, peak_flops
from pixart_fast.engine import compile_blocks, uncompiled
from train.checkpoints import Checkpoints
from train.data.source import Batch, Probe, ScenesSource, Steps, load_steps
from train.finite import GradientWatch, first_nonfinite_layer
from train.monitor import Monitor
from train.optimizer import build_optimizer, full_ema, set_step
from train.report import write_report
from train.sampling import generate, save_grid
from train.settings import DEFAULT, Settings, UserError, changed_keys, flatten, load_settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRID = 24


def connect() -> tuple[torch.device, int, int]:
    """Join the process group, alone when no launcher started us; returns device, rank and number of processes."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed would compile a shared-memory all-reduce with the system's compiler at the first start on a CPU: a minute, or an
    # error without ninja. gloo does the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return device, dist.get_rank(), dist.get_world_size()


def claim(settings: Settings, rank: int) -> None:
    """Take the output folder, or refuse one that holds a different run; every process hears the verdict."""
    verdict: list[str | None] = [None]
    if rank == 0:
        output, record = settings.output, settings.output / "config.yaml"
        if not record.exists() and output.is_dir() and any(output.iterdir()):
            verdict = [f"{output} is not empty and holds no run: choose another output=."]
        elif record.exists() and settings.resume == "never":
            verdict = [f"{output} holds a run already: choose another output=, or go on with it by resume=auto."]
        elif record.exists():
            changed = changed_keys(yaml.safe_load(record.read_text()), flatten(settings))
            if changed:
                verdict = [f"{output} holds a run with other {', '.join(changed)}: choose another output= for this one."]
        if verdict[0] is None:
            try:
                output.mkdir(parents=True, exist_ok=True)
                record.write_text(yaml.safe_dump(flatten(settings), sort_keys=False))
            except OSError as error:
                verdict = [f"{output} cannot be written ({error.strerror}): choose another output=."]
    dist.broadcast_object_list(verdict)
    if verdict[0]:
        raise UserError(verdict[0])


def build_model(settings: Settings, source: ScenesSource) -> Transformer:
    """The transformer that the settings describe, the same on every process, fresh or from `init_from`."""
    torch.manual_seed(settings.seed)
    try:
        config = transformer_config(
            settings.model.resolved_size(),
            sample_size=source.latent_size,
            patch_size=settings.model.patch_size,
            in_channels=source.latent_channels,
            caption_channels=source.caption_channels,
            modulation=settings.model.modulation,
            dropout=settings.model.dropout,
        )
        model = Transformer(**config).initialize_weights(gate=settings.model.gate)
        if settings.init_from is not None:
            model.load_state_dict(_weights(settings.init_from))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    model.null_caption = source.null_caption
    if settings.activation_checkpointing:
        model.enable_gradient_checkpointing()
    return compile_blocks(model) if settings.compile else model


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"init_from={folder} is not a model folder: name one with a config.json, as a run's final/ is.")
    return Transformer.from_pretrained(folder).state_dict()


def deepspeed_config(settings: Settings, precision: str, processes: int) -> dict:
    """DeepSpeed's configuration: a ZeRO stage's file and what the settings say."""
    path = Path(__file__).parent / "configs" / "zero" / f"{settings.zero_stage}.json"
    config = json.loads(path.read_text())
    if settings.offload:
        if settings.zero_stage == 0:
            raise UserError("offload=true moves ZeRO's optimizer shards to the CPU: choose zero_stage=1, 2 or 3 with it.")
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config | {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.rows_per_process(processes),
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.optimizer.clip,
        "zero_allow_untested_optimizer": True,  # AdamW with an average beside its moments
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": None,
    }


class Stop:
    """Remembers a SIGTERM or SIGINT until the step is over."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.signal = number


class Run:
    """One process's part of a training run."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.device, self.rank, self.processes = connect()
        capability = ops.capability(self.device)
        precision = ops.precision_for(capability) if settings.precision == "auto" else settings.precision
        config = deepspeed_config(settings, precision, self.processes)
        claim(settings, self.rank)
        self.precision, self.dtype, self.capability = precision, DTYPES[precision], capability
        self.source = ScenesSource(settings.data, settings.seed)
        self.diffusion = GaussianDiffusion(settings.diffusion.num_timesteps)
        self.model = build_model(settings, self.source).to(self.device)
        optimizer = build_optimizer(
            self.model,
            settings.optimizer,
            device=self.device,
            zero_stage=settings.zero_stage,
            offload=settings.offload,
        )
        self.watch = GradientWatch(self.model)
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        self.checkpoints = Checkpoints(settings.output / "checkpoints", settings.keep_checkpoints)
        self.stop = Stop()

    def train(self) -> None:
        """All steps that are left, then the report."""
        settings = self.settings
        step = self.resume()
        monitor = self.open_monitor(step)
        steps = load_steps(
            Steps(self.source, settings, self.rank, self.processes), step, settings.data.workers, self.device.type == "cuda"
        )
        probes = {split: self.source.probe(split, settings.sampling.captions) for split in ("seen", "held_out")}
        with contextlib.closing(monitor):
            for step, batches in enumerate(steps, start=step + 1):  # noqa: B020  `step` counts finished steps
                values = self.step(step, batches)
                monitor.advance(step, values["loss"])
                if step % settings.log_every == 0 or step == settings.steps:
                    monitor.log(step, values)
                stopping = values.pop("stopping") > 0
                if settings.sampling.every and step % settings.sampling.every == 0 and step < settings.steps and not stopping:
                    monitor.evaluation(step, self.evaluate(probes, f"step_{step:08d}.png"))
                    monitor.pause()
                if step % settings.checkpoint_every == 0 or step == settings.steps or stopping:
                    self.checkpoints.save(self.engine, step)
                    monitor.pause()
                if stopping and step < settings.steps:
                    monitor.say(f"stopped on request: step {step} is saved, the same command goes on from there.")
                    return
            self.finish(monitor, step)

    def resume(self) -> int:
        """Finished steps: those of the newest sound checkpoint, or none."""
        found = self.checkpoints.newest_sound()
        if found is None:
            return 0
        step = self.checkpoints.load(self.engine, *found)
        if self.rank == 0:
            print(f"going on from step {step} ({found[0]}).", file=sys.stderr, flush=True)
        return step

    def open_monitor(self, step: int) -> Monitor:
        config, tokens = self.model.config, (self.source.latent_size // self.settings.model.patch_size) ** 2
        flops = 3 * forward_flops(
            layers=config.num_layers,
            width=self.model.inner_dim,
            tokens=tokens,
            text_tokens=self.source.max_tokens,
            caption_channels=config.caption_channels,
            patch_features=config.in_channels * config.patch_size**2,
            out_features=config.out_channels * config.patch_size**2,
        )
        peak = peak_flops(self.capability.device)
        return Monitor(
            self.settings.output,
            self.device,
            main=self.rank == 0,
            step=step,
            steps=self.settings.steps,
            batch_size=self.settings.batch_size,
            flops_per_image=flops,
            peak_flops=peak and peak * self.processes,
        )

    def step(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """Optimizer step number `step` (from 1); the mean of its losses over all processes, gradient norm and learning rate.

        Raises UserError, before the weights change, when the loss or (but in fp16, where the scaler handles it) a gradient is
        not finite.
        """
        settings = self.settings
        set_step(self.engine.optimizer, step - 1, settings.steps, settings.optimizer)
        torch.manual_seed(hash((settings.seed, step, self.rank)) % 2**63)  # dropout, where the model has any
        sums = torch.zeros(3, device=self.device)
        self.watch.clear()
        for i, batch in enumerate(batches, start=1):
            batch = batch.to(self.device)
            xt = self.diffusion.q_sample(batch.latents, batch.t, batch.noise)
            losses = self.diffusion.training_losses(self.forward(batch, xt), batch.latents, xt, batch.t, batch.noise)
            weight = (1 + 1 / self.diffusion.at("snr", batch.t, batch.t)).clamp(max=settings.diffusion.max_weight)
            self.engine.backward((weight * losses["mse"] + losses["vb"]).mean())
            sums += torch.stack([losses[name].detach().mean() for name in ("loss", "mse", "vb")]) / len(batches)
            if i < len(batches):
                self.engine.step()
        finite = torch.ones((), device=self.device) if self.precision == "fp16" else self.watch.all_finite().float()
        state = torch.cat([sums, torch.stack([1 - finite, torch.tensor(float(self.stop.signal is not None), device=self.device)])])
        dist.all_reduce(state)
        loss, mse, vb, broken, stopping = state.tolist()
        loss, mse, vb = (value / self.processes for value in (loss, mse, vb))
        if not (abs(loss) < float("inf")) or broken:
            self.refuse(step, loss, batches)
        norm = self.gradient_norm()
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        rate = max(group["lr"] for group in self.engine.optimizer.param_groups)
        return {"loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, "lr": rate, "stopping": stopping}

    def forward(self, batch: Batch, xt: torch.Tensor) -> torch.Tensor:
        return self.engine(
            xt.to(self.dtype),
            encoder_hidden_states=batch.text.to(self.dtype),
            timestep=batch.t,
            encoder_attention_mask=batch.mask,
            return_dict=False,
        )[0]

    def gradient_norm(self) -> torch.Tensor | None:
        """Without ZeRO in fp32 DeepSpeed keeps no norm: take it here, before clipping. None where DeepSpeed knows it."""
        if self.settings.zero_stage or self.precision != "fp32":
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def refuse(self, step: int, loss: float, batches: list[Batch]) -> None:
        layer = None
        for batch in batches:
            batch = batch.to(self.device)
            xt = self.diffusion.q_sample(batch.latents, batch.t, batch.noise)
            layer = layer or first_nonfinite_layer(self.model, lambda: self.forward(batch, xt))  # noqa: B023  called at once
        gradient = self.watch.first()
        found: list[tuple[str | None, str | None] | None] = [None] * self.processes
        dist.all_gather_object(found, (layer, gradient))
        layer, gradient = (next((pair[i] for pair in found if pair[i]), None) for i in (0, 1))
        where = f"the first output that is not finite is that of {layer}" if layer else f"the first bad gradient is that of {gradient}"
        raise UserError(
            f"step {step}: loss {loss:.4g}, and {where}; nothing of this step was saved. Lower optimizer.lr, or go on from the last "
            "checkpoint with another precision."
        )

    @contextlib.contextmanager
    def ema_model(self):
        """A model with the averaged weights on the first process, None on the others; collective."""
        model = None
        if self.rank == 0:
            model = Transformer.from_config(self.model.config).to(self.device).eval()
            model.null_caption = self.source.null_caption
            parameters = dict(model.named_parameters())
        for name, value in full_ema(self.engine):
            if model is not None:
                parameters[name].data.copy_(value)
        yield model

    def evaluate(self, probes: dict[str, Probe], grid: str) -> dict[str, dict[str, float]]:
        """Oracle accuracy of the averaged model by split, and a grid of its first pictures; empty but on the first process."""
        accuracy = {}
        with self.ema_model() as model, uncompiled():
            if model is not None:
                for split, probe in probes.items():
                    images = generate(model, self.source, probe, self.settings.sampling)
                    accuracy[split] = self.source.measure(probe, images)
                    if split == "seen":
                        save_grid(images[:GRID], probe.captions[:GRID], self.settings.output / "samples" / grid)
        dist.barrier()
        return accuracy

    def finish(self, monitor: Monitor, step: int) -> None:
        """The averaged weights in `final/`, their accuracy on more captions, and the report."""
        settings = self.settings
        count = settings.sampling.final_captions
        probes = {split: self.source.probe(split, count) for split in ("seen", "held_out")}
        accuracy = self.evaluate(probes, "final.png")
        monitor.evaluation(step, accuracy)
        with self.ema_model() as model:
            if model is None:
                return
            model.save_pretrained(settings.output / "final")
        images = step * settings.batch_size
        summary = {
            "steps": step,
            "images": images,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": monitor.seconds,
            "images_per_second": images / monitor.seconds if monitor.seconds else None,
            "device": self.capability.device,
            "processes": self.processes,
            "precision": self.precision,
            "zero_stage": settings.zero_stage,
            "optimizer": settings.optimizer.kind,
            "accuracy": accuracy,
        }
        write_report(settings.output, summary, "samples/final.png")
        monitor.say(f"done: {settings.output / 'report.md'}, weights in {settings.output / 'final'}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed train/run.py",
        description="Train a PixArt transformer. Without arguments: the embedded default, captioned scenes, minutes on a CPU.",
        epilog="examples: model.size=B   zero_stage=2 optimizer.kind=adamw   optimizer.lr=1e-4   output=runs/mine   "
        "steps=1000. A run that was interrupted goes on with the same command. All keys: train/settings.py.",
    )
    parser.add_argument("--config", type=Path, default=DEFAULT, help="YAML file of settings (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file's")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        run = Run(load_settings(options.config, options.overrides))
        run.train()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

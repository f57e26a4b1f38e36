"""Train a PixArt transformer: `deepspeed train/run.py [--config FILE.yaml] [key=value …]`.

A step is a function of the settings and its number alone (train/data/source.py), the rest of the state is in the
checkpoint (train/checkpoints.py): that is why a run that was killed goes on bit for bit.
"""

import argparse
import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the launcher puts train/ itself on the path

import deepspeed
import torch
import torch.distributed as dist

from pixart_fast import GaussianDiffusion, Transformer, ops
from pixart_fast.cost import forward_flops, peak_flops
from pixart_fast.engine import uncompiled
from train.checkpoints import Checkpoints
from train.data.source import Batch, Probe, ScenesSource, Steps, load_steps
from train.finite import GradientWatch, first_nonfinite_layer
from train.monitor import METRICS, Monitor, read_rows
from train.optimizer import build_optimizer, full_ema, set_step
from train.report import write_report
from train.sampling import generate, save_grid
from train.settings import DEFAULT, Settings, UserError, load_settings
from train.start import build_model, choose_precision, claim, connect, deepspeed_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRID = 24


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
        precision = choose_precision(settings.precision, capability)
        config = deepspeed_config(settings, precision, self.processes)
        claim(settings, self.rank)
        self.precision, self.dtype, self.capability = precision, DTYPES[precision], capability
        self.source = ScenesSource(settings.data, settings.seed)
        self.diffusion = GaussianDiffusion(settings.diffusion.num_timesteps)
        self.model = build_model(settings, self.source).to(self.device)
        optimizer = build_optimizer(self.model, settings, self.device)
        self.watch = GradientWatch(self.model)
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        self.checkpoints = Checkpoints(settings.output / "checkpoints", settings.keep_checkpoints)
        self.stop = Stop()
        every = settings.sampling.every
        self.sampled = range(every, settings.steps, every) if every else range(0)  # the last step has its own sampling

    def train(self) -> None:
        """All steps that are left, then the report."""
        settings = self.settings
        step = self.resume()
        if self.finished(step):
            return
        monitor = self.open_monitor(step)
        dataset = Steps(self.source, settings, self.rank, self.processes)
        steps = load_steps(dataset, step, settings.data.workers, pin=self.device.type == "cuda")
        probes = {split: self.source.probe(split, settings.sampling.captions) for split in ("seen", "held_out")}
        with contextlib.closing(monitor):
            for step, batches in enumerate(steps, start=step + 1):  # noqa: B020  `step` counts finished steps
                values, stopping = self.step(step, batches)
                monitor.advance(step, values["loss"])
                if step % settings.log_every == 0 or step == settings.steps:
                    monitor.log(step, values)
                if step in self.sampled and not stopping:
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

    def finished(self, step: int) -> bool:
        """Whether nothing is left to do; rank 0 looks, and says so."""
        report = self.settings.output / "report.md"
        done = [self.rank == 0 and step >= self.settings.steps and report.exists()]
        dist.broadcast_object_list(done)
        if done[0] and self.rank == 0:
            print(f"this run is finished, see {report}; more steps= go on with it, another output= starts anew.")
        return done[0]

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

    def step(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], bool]:
        """Optimizer step number `step` (from 1): the mean of its losses over all processes, gradient norm, effective
        learning rate; and whether some process was asked to stop.

        Raises UserError, before the weights change, when the loss or (but in fp16, where the scaler handles it) a
        gradient is not finite.
        """
        settings = self.settings
        set_step(self.engine.optimizer, step - 1, settings.steps, settings.optimizer)
        # For dropout, where the model has any; everything else random is keyed by the sample (train/data/source.py).
        torch.manual_seed(((settings.seed * 2**32 + step) * self.processes + self.rank) % 2**63)
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
        state = torch.cat(
            [sums, torch.stack([1 - finite, torch.tensor(float(self.stop.signal is not None), device=self.device)])]
        )
        dist.all_reduce(state)
        loss, mse, vb, broken, stopping = state.tolist()
        loss, mse, vb = (value / self.processes for value in (loss, mse, vb))
        if not (abs(loss) < float("inf")) or broken:
            self.refuse(step, loss, batches)
        norm = self.gradient_norm()
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        *matrices, rest = (group["lr"] for group in self.engine.optimizer.param_groups)
        rates = {"lr": rest, "muon_lr": matrices[0]} if matrices else {"lr": rest}
        return {"loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, **rates}, stopping > 0

    def forward(self, batch: Batch, xt: torch.Tensor) -> torch.Tensor:
        return self.engine(
            xt.to(self.dtype),
            encoder_hidden_states=batch.text.to(self.dtype),
            timestep=batch.t,
            encoder_attention_mask=batch.mask,
            return_dict=False,
        )[0]

    def gradient_norm(self) -> torch.Tensor | None:
        """Without ZeRO in fp32 DeepSpeed keeps no norm: take it before clipping. None where DeepSpeed knows it."""
        if self.settings.zero_stage or self.precision != "fp32":
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def refuse(self, step: int, loss: float, batches: list[Batch]) -> NoReturn:
        """Stop with the step and the layer where it began; collective, as a forward pass under ZeRO-3 is."""
        layers = []
        for batch in batches:
            batch = batch.to(self.device)
            xt = self.diffusion.q_sample(batch.latents, batch.t, batch.noise)
            layers.append(first_nonfinite_layer(self.model, partial(self.forward, batch, xt)))
        layer = next(filter(None, layers), None)
        found: list[tuple[str | None, str | None]] = [(None, None)] * self.processes
        dist.all_gather_object(found, (layer, self.watch.first()))
        layer, gradient = (next((pair[i] for pair in found if pair[i]), None) for i in (0, 1))
        where = (
            f"first output that is not finite is that of {layer}" if layer else f"first bad gradient is of {gradient}"
        )
        raise UserError(
            f"step {step}: loss {loss:.4g}, and the {where}; nothing of this step was saved. "
            "Lower optimizer.lr, or go on from the last checkpoint with another precision."
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
        """Oracle accuracy of the averaged model by split, and a grid of its first pictures; empty beyond rank 0."""
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
        self.source.save(settings.output / "final", settings.diffusion, settings.sampling.guidance)
        images = step * settings.batch_size
        summary = {
            "steps": step,
            "images": images,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": monitor.seconds,
            "images_per_second": median(row["images_per_second"] for row in read_rows(settings.output / METRICS)),
            "device": self.capability.device,
            "processes": self.processes,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "zero_stage": settings.zero_stage,
            "optimizer": settings.optimizer_kind(),
            "accuracy": accuracy,
        }
        write_report(settings.output, summary, "samples/final.png")
        monitor.say(f"done: {settings.output / 'report.md'}, weights in {settings.output / 'final'}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed train/run.py",
        description=(
            "Train a PixArt transformer. Without arguments: the embedded default, captioned scenes, minutes on a CPU."
        ),
        epilog=(
            "examples: model.size=B   zero_stage=2   optimizer.kind=adamw   optimizer.lr=1e-4   steps=1000   "
            "output=runs/mine. A run that was interrupted goes on with the same command. All keys: train/settings.py."
        ),
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

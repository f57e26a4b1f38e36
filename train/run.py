"""Train a PixArt transformer: `deepspeed train/run.py [--config FILE.yaml] [key=value …]`.

A step is a function of the settings and its number alone (train/data/source.py), the rest of the state is in the
checkpoint (train/checkpoints.py): that is why a run that was killed goes on bit for bit.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the launcher puts train/ itself on the path

import deepspeed
import torch
import torch.distributed as dist

from pixart_fast import DiT, GaussianDiffusion, ops
from pixart_fast.cost import forward_flops
from pixart_fast.engine import uncompiled
from train.checkpoints import Checkpoints
from train.data.source import Batch, Steps, load_steps
from train.finite import GradientWatch, first_nonfinite_layer
from train.monitor import METRICS, Monitor, read_rows
from train.optimizer import build_optimizer, full_ema, set_step
from train.report import write_report
from train.sampling import GRID, Painter, build_painter, save_grid, save_progress
from train.settings import DEFAULT, Settings, UserError, load_settings
from train.start import DIT, build_model, build_source, choose_precision, claim, connect, deepspeed_config, new_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL")  # what a process says whose peer died
BINS = 10  # of timesteps, for the loss by noise level


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
        self.source = build_source(settings, self.processes)
        tokens = (self.source.latent_size // settings.model.patch_size) ** 2
        claim(settings, self.rank)  # as given: accumulation may follow from the number of processes
        settings = self.settings = settings.resolved(self.processes, tokens)
        config = deepspeed_config(settings, precision, self.processes)
        self.precision, self.dtype, self.capability = precision, DTYPES[precision], capability
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
        painter = self.painter(settings.sampling.captions) if len(self.sampled) else None
        monitor = self.open_monitor(step)
        dataset = Steps(self.source, settings, self.rank, self.processes)
        with contextlib.closing(monitor):
            monitor.say(self.terms())
            steps = load_steps(dataset, step, settings.data.workers, pin=self.device.type == "cuda")
            for step, batches in enumerate(self.waited(steps, monitor), start=step + 1):  # noqa: B020  finished steps
                values, bins, stopping = self.step(step, batches)
                monitor.advance(step, values["loss"], sum(len(batch.t) for batch in batches) * self.processes, bins)
                if step % settings.log_every == 0 or step == settings.steps:
                    monitor.log(step, values)
                if step in self.sampled and not stopping:
                    monitor.evaluation(step, self.evaluate(painter, step))
                    monitor.pause()
                if step % settings.checkpoint_every == 0 or step == settings.steps or stopping:
                    self.checkpoints.save(self.engine, step)
                    monitor.pause()
                if stopping and step < settings.steps:
                    monitor.say(f"stopped on request: step {step} is saved, the same command goes on from there.")
                    return
            self.finish(monitor, step)

    def terms(self) -> str:
        """What a run trains with, where the files that name it leave a doubt."""
        settings, optimizer = self.settings, self.settings.optimizer
        rule = f" = {optimizer.lr:g} · √({settings.batch_size} / 256)" if optimizer.lr_rule == "sqrt" else ""
        return (
            f"learning rate {settings.effective_lr():.3g}{rule} after {optimizer.warmup_steps} steps of warm-up, "
            f"eps {optimizer.eps:g}, clip {optimizer.clip:g}; {settings.batch_size} pictures a step on "
            f"{self.processes} process{'es' * (self.processes > 1)}, {self.precision}, ZeRO {settings.zero_stage}."
        )

    @staticmethod
    def waited(steps, monitor: Monitor) -> Iterator[list[Batch]]:
        """The steps' batches; the monitor hears how long the loop waited for them. Raises UserError."""
        batches = iter(steps)
        while True:
            begin = time.perf_counter()
            prepared = next(batches, None)
            monitor.waited(time.perf_counter() - begin)
            if prepared is None:
                return
            if isinstance(prepared, UserError):
                prepared.one_process = True  # the others wait for this one, until the launcher ends them
                raise prepared
            yield prepared

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
        source, chosen = self.source, self.settings.model
        size, patch = chosen.resolved_size(), chosen.patch_size
        flops = 3 * forward_flops(
            layers=size.layers,
            width=size.width,
            tokens=(source.latent_size // patch) ** 2,
            text_tokens=source.max_tokens or 0,
            caption_channels=source.caption_channels or 0,
            patch_features=source.latent_channels * patch**2,
            out_features=2 * source.latent_channels * patch**2,
            cross_attention=chosen.kind == "pixart",
        )
        return Monitor(
            self.settings,
            self.device,
            main=self.rank == 0,
            step=step,
            processes=self.processes,
            device_name=self.capability.device,
            flops_per_image=flops,
        )

    def step(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], list[float], bool]:
        """Optimizer step number `step` (from 1): the mean of its losses over all processes, gradient norm, effective
        learning rate; the sums of its squared errors by bin of timesteps, with the counts behind them; and whether some
        process was asked to stop.

        Raises UserError, before the weights change, when the loss or (but in fp16, where the scaler handles it) a
        gradient is not finite.
        """
        settings = self.settings
        set_step(self.engine.optimizer, step - 1, settings.steps, settings.optimizer)
        bins = torch.zeros(2, BINS, device=self.device)
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
            where = batch.t * BINS // settings.diffusion.num_timesteps
            bins[0].index_add_(0, where, losses["mse"].detach())
            bins[1].index_add_(0, where, torch.ones_like(losses["mse"]))
            if i < len(batches):
                self.engine.step()
        finite = torch.ones((), device=self.device) if self.precision == "fp16" else self.watch.all_finite().float()
        state = torch.cat(
            [
                sums,
                torch.stack([1 - finite, torch.tensor(float(self.stop.signal is not None), device=self.device)]),
                bins.flatten(),
            ]
        )
        dist.all_reduce(state)
        loss, mse, vb, broken, stopping, *by_bin = state.tolist()
        loss, mse, vb = (value / self.processes for value in (loss, mse, vb))
        if not (abs(loss) < float("inf")) or broken:
            self.refuse(step, loss, batches)
        norm = self.gradient_norm()
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        *matrices, rest = (group["lr"] for group in self.engine.optimizer.param_groups)
        rates = {"lr": rest, "muon_lr": matrices[0]} if matrices else {"lr": rest}
        return {"loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, **rates}, by_bin, stopping > 0

    def forward(self, batch: Batch, xt: torch.Tensor) -> torch.Tensor:
        xt = xt.to(self.dtype)
        if batch.label is not None:
            # Labels were dropped with the sample's own number.
            return self.engine(xt, batch.t, batch.label, drop_mask=torch.zeros_like(batch.label, dtype=torch.bool))
        added = None
        if batch.resolution is not None:
            added = {"resolution": batch.resolution, "aspect_ratio": batch.aspect_ratio}
        return self.engine(
            xt,
            encoder_hidden_states=batch.text.to(self.dtype),
            timestep=batch.t,
            added_cond_kwargs=added,
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
            model = new_model(self.settings, self.source).to(self.device).eval()
            parameters = dict(model.named_parameters())
        for name, value in full_ema(self.engine):
            if model is not None:
                parameters[name].data.copy_(value)
        yield model

    def painter(self, captions: int) -> Painter | None:
        """On the first process."""
        return build_painter(self.source, self.settings, captions, self.device) if self.rank == 0 else None

    def evaluate(self, painter: Painter | None, step: int, *, final: bool = False) -> dict[str, dict[str, float]]:
        """The averaged model's pictures, as grid and as another row of `progress.png`, and what an oracle reads in
        them, by split; empty beyond rank 0."""
        accuracy = {}
        samples = self.settings.output / "samples"
        with self.ema_model() as model, uncompiled(), torch.no_grad():
            if model is not None and painter is not None:
                images, accuracy = painter.paint(model)
                save_progress(images, samples / f"step_{step:08d}.png")
                if final:
                    save_grid(images[:GRID], painter.captions[:GRID], samples / "final.png")
        dist.barrier()
        return accuracy

    def finish(self, monitor: Monitor, step: int) -> None:
        """The averaged weights in `final/`, their accuracy on more captions, and the report."""
        settings = self.settings
        painter = self.painter(settings.sampling.final_captions)
        accuracy = self.evaluate(painter, step, final=True)
        monitor.evaluation(step, accuracy)
        final = settings.output / "final"
        with self.ema_model() as model:
            if model is None:
                return
            if isinstance(model, DiT):
                model.save(final / DIT)
            else:
                model.save_pretrained(final)
        self.source.save(final, settings)
        summary = {
            "steps": step,
            "images": monitor.images,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": monitor.seconds,
            "images_per_second": median(row["images_per_second"] for row in read_rows(settings.output / METRICS)),
            "device": self.capability.device,
            "processes": self.processes,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "zero_stage": settings.zero_stage,
            "optimizer": settings.optimizer_kind(),
            "learning_rate": settings.effective_lr(),
            **({"region": settings.cost.region} if self.device.type == "cuda" else {}),
            **{name: value for name, value in monitor.cost().items() if value is not None},
            "accuracy": accuracy,
        }
        write_report(settings.output, summary, "samples/final.png" if painter is not None else None)
        monitor.say(f"done: {settings.output / 'report.md'}, weights in {final}")


def loss_of_a_process(message: str) -> str | None:
    """What to say where an error means that another process died, else None. Checkpoints are untouched by that."""
    if "DataLoader worker (pid" in message:  # raised by a signal's handler, wherever the loop is
        return (
            f"a loader worker died ({message.split('. ')[0].strip()}), of memory perhaps: the same command goes on "
            "from the last checkpoint, with fewer data.workers= if it happens again."
        )
    if any(words in message for words in LOST):
        rank = os.environ.get("RANK", "0")
        return (
            f"process {rank} lost another one ({message.splitlines()[0][-120:]}): see what that one said last; the "
            "same command goes on from the last checkpoint."
        )
    return None


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
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help=f"YAML file of settings; given again, the later over the earlier (default: {DEFAULT})",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file's")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        run = Run(load_settings(options.config or [DEFAULT], options.overrides))
        run.train()
    except UserError as error:
        if error.one_process or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:  # NCCL's DistBackendError is one, too
        told = loss_of_a_process(str(error))
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr, flush=True)
        return 3
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

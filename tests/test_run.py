"""`train/run.py`: every ZeRO stage and precision trains, and what goes wrong is said in a sentence."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from PIL import Image

from pixart_fast import DiT, Transformer
from pixart_fast.checkpoint import save_official
from tests.runs import ROOT, Processes, allow_fp16, finished, free_port, run
from train.data.source import ScenesSource
from train.settings import load_settings
from train.start import build_model


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in metrics(output)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """One process, fp32, no ZeRO: what every other arrangement must reproduce."""
    output = tmp_path_factory.mktemp("plain") / "run"
    finished("steps=5", f"output={output}")
    return output


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_agree(plain, tmp_path, zero_stage):
    finished("steps=5", f"zero_stage={zero_stage}", f"output={tmp_path / 'run'}")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_processes_agree_with_one(plain, tmp_path, zero_stage):
    finished("steps=5", f"zero_stage={zero_stage}", f"output={tmp_path / 'run'}", processes=2)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(plain), rtol=1e-5, atol=0)
    assert (tmp_path / "run" / "final" / "config.json").is_file()


@pytest.mark.parametrize(
    "options",
    [
        ("accumulation=4",),
        ("activation_checkpointing=true",),
        ("activation_checkpointing=pointwise",),
        ("data.workers=2",),
        ("zero_stage=2", "offload=true"),
        ("zero_stage=3", "offload=true", "accumulation=2"),
    ],
    ids=" ".join,
)
def test_arrangements_do_not_change_the_losses(plain, tmp_path, options):
    finished("steps=5", *options, f"output={tmp_path / 'run'}")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(plain, tmp_path, precision, zero_stage):
    before = allow_fp16 if precision == "fp16" else None
    output = tmp_path / "run"
    options = [f"precision={precision}", f"zero_stage={zero_stage}", f"output={output}", "optimizer.warmup_steps=1"]
    finished("steps=5", *options, before=before)
    torch.testing.assert_close(losses(output)[0], losses(plain)[0], rtol=1e-2, atol=0)
    early = Transformer.from_pretrained(output / "final").state_dict()
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in early.values())
    # fp16 starts at a loss scale of 65536 and skips the first steps; then it learns, after a resume too.
    assert "going on from step 5" in finished("steps=30", *options, before=before)
    late = Transformer.from_pretrained(output / "final").state_dict()
    assert all((late[name] - early[name]).abs().max() > 0 for name in late if name.endswith("proj_out.weight"))
    assert sum(losses(output)[-5:]) < 0.98 * sum(losses(output)[:5])


def test_compiled_blocks_train_alike(plain, tmp_path):
    finished("steps=5", "compile=true", f"output={tmp_path / 'run'}")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(plain), rtol=1e-4, atol=0)


def test_average_is_the_average_of_the_weights(tmp_path):
    """The EMA in the optimizer's state against one that is taken by hand of the weights of each step."""
    output = tmp_path / "run"
    finished(
        "steps=4",
        "checkpoint_every=1",
        "keep_checkpoints=9",
        "zero_stage=0",
        "optimizer.lr=0.05",
        "optimizer.warmup_steps=0",
        f"output={output}",
    )
    settings = load_settings(output / "config.yaml", [])
    average = build_model(settings, ScenesSource(settings.data, settings.seed)).state_dict()
    for step, checkpoint in enumerate(sorted((output / "checkpoints").iterdir())):
        weights = torch.load(next((checkpoint / "state").glob("*model_states.pt")), weights_only=False)["module"]
        decay = (1 + step) / (10 + step)
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    final = Transformer.from_pretrained(output / "final").state_dict()
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-7)


def test_run_folder_is_what_readme_promises(tmp_path):
    output = tmp_path / "run"
    finished("steps=6", "log_every=2", "sampling.every=3", "sampling.captions=4", f"output={output}")
    rows = metrics(output)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[0].keys() >= {
        "step", "loss", "mse", "vb", "grad_norm", "lr", "mse_by_timestep", "images", "images_per_second", "data_wait",
        "peak_memory", "mfu", "seconds", "gpu_days", "dollars", "kg_co2",
    }  # fmt: skip
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["images_per_second"] > 0 for row in rows)
    assert rows[0]["mfu"] is None  # a CPU's peak is not on a data sheet
    report = json.loads((output / "report.json").read_text())
    assert report["steps"] == 6 and report["images"] == 48
    assert {"background", "colour", "binding"} <= report["accuracy"]["seen"].keys() & report["accuracy"][
        "held_out"
    ].keys()
    pictures = ("loss.png", "timesteps.png", "accuracy.png", "samples/final.png", "samples/progress.png")
    for name in pictures:
        with Image.open(output / name) as picture:
            assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(1 << 24)) > 2, name
    page = (output / "report.md").read_text()
    assert all(f"({name})" in page for name in pictures)
    assert list((output / "tensorboard").glob("events*"))

    ours = Transformer.from_pretrained(output / "final")
    assert ours.null_caption is not None
    theirs = PixArtTransformer2DModel.from_pretrained(output / "final")
    latents, text, t = torch.randn(2, 8, 4, 4), torch.randn(2, 5, ours.config.caption_channels), torch.tensor([3, 700])
    inputs = {"encoder_hidden_states": text, "timestep": t, "return_dict": False}
    with torch.no_grad():
        torch.testing.assert_close(ours(latents, **inputs)[0], theirs(latents, **inputs)[0], rtol=1e-4, atol=1e-5)


def test_starts_from_another_runs_weights(plain, tmp_path):
    finished("steps=1", f"init_from={plain / 'final'}", f"output={tmp_path / 'run'}")
    assert losses(tmp_path / "run")[0] != losses(plain)[0]
    code, output = run("steps=1", f"init_from={plain / 'final'}", "model.width=64", f"output={tmp_path / 'other'}")
    assert code == 2 and "size mismatch" in output and "Traceback" not in output
    code, output = run("steps=1", f"init_from={tmp_path}", f"output={tmp_path / 'third'}")
    assert code == 2 and "is not a model folder" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("model.patch_size=3",), "does not divide by patch_size 3"),
        (("model.heads=5",), "5 heads do not divide a width of 32"),
        (("optimizer.kind=muon", "zero_stage=1"), "optimizer.kind=adamw"),
        (("offload=true",), "choose zero_stage=1, 2 or 3"),
        (("batch_size=9", "accumulation=2"), "choose a multiple of 2"),
        (("precision=fp16",), "choose precision=bf16 or fp32"),
        (("optimizer.implementation=apex",), "NVIDIA apex"),
        (("output=/proc/nowhere",), "choose another output="),
        (("--config", "nothing.yaml"), "no configuration nothing.yaml"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, options, words):
    if options == ("precision=fp16",) and deepspeed.accelerator.get_accelerator().is_fp16_supported():
        pytest.skip("this CPU has fp16")
    code, output = run("steps=1", f"output={tmp_path / 'run'}", *options)
    assert code == 2 and words in output and "Traceback" not in output, output[-2000:]


def test_output_of_another_run_is_refused(plain, tmp_path):
    code, output = run("steps=5", "seed=7", f"output={plain}")
    assert code == 2 and "holds a run with other seed" in output
    code, output = run("steps=5", "resume=never", f"output={plain}")
    assert code == 2 and "resume=auto" in output
    record = plain / "config.yaml"
    content = record.read_text()
    record.write_text(content + "unheard_of: 1\n")
    both = Processes("steps=5", f"output={plain}", processes=2)
    code, output = both.wait()
    record.write_text(content)
    assert code == 2 and "unknown key unheard_of" in output
    assert not any("Traceback" in both.output(rank) for rank in (0, 1))
    (tmp_path / "letter.txt").write_text("mine")
    code, output = run("steps=5", f"output={tmp_path}")
    assert code == 2 and "is not empty" in output


def _infinite_learning_rate():
    from train import optimizer

    optimizer.learning_rate_factor = lambda step, *rest: 1e30 if step == 1 else 1.0


def _broken_gradient():
    """The gradient that reaches one layer becomes infinite in step 2, with finite outputs everywhere."""
    forward = Transformer.forward
    steps = itertools.count(1)

    def spoil(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient / 0)

    def broken(self, *args, **kwargs):
        if next(steps) == 2:
            self.transformer_blocks[1].ff.net[2].register_forward_hook(spoil)
        return forward(self, *args, **kwargs)

    Transformer.forward = broken


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_nonfinite_loss_stops_with_the_layer(tmp_path, zero_stage):
    code, output = run(
        "steps=5", f"zero_stage={zero_stage}", f"output={tmp_path / 'run'}", before=_infinite_learning_rate
    )
    assert code == 2 and "step 3: loss nan" in output and "Traceback" not in output, output[-2000:]
    assert "the first output that is not finite is that of " in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_nonfinite_gradient_stops_with_the_layer(tmp_path):
    code, output = run("steps=5", f"output={tmp_path / 'run'}", before=_broken_gradient)
    assert code == 2 and "step 2" in output and "transformer_blocks.1.ff.net.2." in output, output[-2000:]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher(tmp_path, processes):
    """As README has it, `deepspeed train/run.py`, with its own imports and its own command line."""
    options = ["steps=2", "batch_size=8", "model.layers=1", "sampling.final_captions=2", "sampling.steps=2"]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes)]
    command += ["--master_port", str(free_port()), "train/run.py", *options, f"output={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["processes"] == processes


def test_help_teaches():
    done = subprocess.run(
        [sys.executable, "train/run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "key=value" in done.stdout and "zero_stage=2" in done.stdout


def test_a_dit_trains_and_starts_a_transformer(plain, tmp_path):
    """Stage 1 and what stage 2 makes of it: the same function at t = 500, while cross-attention is at its zeros."""
    dit, output = tmp_path / "dit", tmp_path / "run"
    finished("steps=5", "model.kind=dit", "zero_stage=2", f"output={dit}", processes=2)
    alone = tmp_path / "alone"
    finished("steps=5", "model.kind=dit", f"output={alone}")
    torch.testing.assert_close(losses(dit), losses(alone), rtol=1e-5, atol=0)
    report = json.loads((dit / "report.json").read_text())
    assert report["accuracy"].keys() == {"classes"}
    teacher = DiT.from_file(dit / "final" / "dit.pt", num_heads=2)
    assert teacher.y_embedder.num_classes == 24
    settings = load_settings(plain / "config.yaml", [f"init_from={dit / 'final'}"])
    student = build_model(settings, ScenesSource(settings.data, settings.seed)).eval()
    latents, t = torch.randn(2, 8, 4, 4), torch.full((2,), 500)
    with torch.no_grad():
        expected = teacher(latents, t, torch.full((2,), 24))
        got = student(latents, torch.zeros(2, 1, 256), t).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    finished("steps=2", f"init_from={dit / 'final'}", f"output={output}")
    code, said = run("steps=1", f"init_from={dit / 'final'}", "model.modulation=adaln", f"output={tmp_path / 'other'}")
    assert code == 2 and "choose model.modulation=adaln_single" in said and "Traceback" not in said


def test_starts_from_an_official_file(plain, tmp_path):
    model = Transformer.from_pretrained(plain / "final")
    save_official(model, tmp_path / "official.pth")
    settings = load_settings(plain / "config.yaml", [f"init_from={tmp_path / 'official.pth'}"])
    started = build_model(settings, ScenesSource(settings.data, settings.seed)).state_dict()
    assert all(torch.equal(tensor, started[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [("zero_stage=3",), ("compile=true", "activation_checkpointing=pointwise")], ids=" ".join
)
def test_dits_in_bf16(tmp_path, options):
    finished("steps=3", "model.kind=dit", f"output={tmp_path / 'plain'}")
    finished("steps=3", "model.kind=dit", "precision=bf16", *options, f"output={tmp_path / 'run'}")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=1e-2, atol=0)

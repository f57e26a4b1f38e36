"""`python -m pixart_fast.doctor`: sound folders pass; each fault, planted alone, is named, and nothing beside it."""

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from safetensors.torch import load_file, save_file

from pixart_fast import Transformer, doctor
from pixart_fast.checkpoint import save_official
from pixart_fast.embedded import Autoencoder, HashedText
from pixart_fast.recipe import PUBLISHED, Recipe
from tests import published

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
KINDS = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}
SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "caption_channels": published.TEXT_WIDTH,
}
SOUND = {
    "alpha": {"sample_size": 32, "interpolation_scale": 1.0},
    "sigma": {"sample_size": 32, "interpolation_scale": 0.5},
    "alpha with micro-conditions": {"sample_size": 128, "interpolation_scale": None},
    "sigma at 1024 px": {"sample_size": 128, "interpolation_scale": 2.0, "use_additional_conditions": False},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound folder of every kind, not to be changed."""
    root = tmp_path_factory.mktemp("sound")
    return {
        name: published.save(root / name.replace(" ", "-"), KINDS[name.split()[0]], **changes)
        for name, changes in SOUND.items()
    }


def find(folder: Path, *, weights: bool = False) -> list[doctor.Finding]:
    """What is not ok."""
    found = doctor.examine(doctor.ModelFolder.read(folder), weights=weights)
    return [finding for finding in found if finding.status != doctor.OK]


def edit(path: Path, **changes) -> None:
    """Change a JSON file; None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change(path: Path, how) -> None:
    """Change a weight file: `how` takes its tensors and returns others."""
    save_file(how({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


def filled(part: str, value: float):
    return lambda weights: {n: torch.full_like(t, value) if part in n else t for n, t in weights.items()}


def without(part: str):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def in_half(weights: dict) -> dict:
    return {name: tensor.half() for name, tensor in weights.items()}


def transformer(**changes):
    return lambda folder: edit(folder / "transformer" / "config.json", **changes)


def part(name: str, **changes):
    """A change of the config of vae, text_encoder, tokenizer or scheduler."""
    file = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}.get(name, "config.json")
    return lambda folder: edit(folder / name / file, **changes)


def tensors(file: str, how):
    return lambda folder: change(folder / file, how)


def recipe(**changes):
    def plant(folder: Path) -> None:
        sigma = "Sigma" in (folder / "model_index.json").read_text()
        PUBLISHED["sigma" if sigma else "alpha"].model_copy(update=changes).save(folder)

    return plant


def null_caption(rows: int, **changes):
    """A null caption beside the weights, and a recipe."""

    def plant(folder: Path) -> None:
        save_file({"null_caption": torch.randn(rows, 16)}, folder / "transformer" / "null_caption.safetensors")
        if changes:
            recipe(**changes)(folder)

    return plant


def official_table(scale: float):
    """The weights by their official names, with the position table of a scale."""

    def plant(folder: Path) -> None:
        ours = Transformer.from_pretrained(folder / "transformer")
        ours.pos_embed.interpolation_scale = scale
        save_official(ours, folder / "official.pth")
        (folder / WEIGHTS).unlink()
        weights = torch.load(folder / "official.pth", weights_only=True)["state_dict"]
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)

    return plant


def stored_table(scale: float):
    """The position table in the weights, by diffusers' name."""
    grid = doctor.sincos_2d(16, 16, 24, base_size=16, scale=scale, device=torch.device("cpu"))
    return tensors(WEIGHTS, lambda weights: weights | {"pos_embed.pos_embed": grid[None]})


def gone(file: str):
    return lambda folder: (folder / file).unlink()


W, L = doctor.WRONG, doctor.LOOK
# What is planted in which sound folder; the status and the subject of the one finding, and what its text must say.
FAULTS = {
    "half scale, as a converter has it": (
        "alpha",
        transformer(interpolation_scale=0.5),
        W,
        "position scale",
        "0.5 (expected: 1 for PixArt-α at 256 px)",
    ),
    "Σ without a scale": ("sigma", transformer(interpolation_scale=None), W, "position scale", "1, diffusers' default"),
    "Σ's scale in α at 1024 px": (
        "alpha with micro-conditions",
        transformer(interpolation_scale=4.0),
        W,
        "position scale",
        "expected: 2 for",
    ),
    "unknown size": ("alpha", transformer(sample_size=16), L, "position scale", "has sample_size 16"),
    "table of another scale, official names": ("alpha", official_table(2.0), W, "position table in the weights", "2"),
    "table of another scale": (
        "sigma",
        stored_table(1.0),
        W,
        "position table in the weights",
        "of scale 1 (expected: 0",
    ),
    "table of no published scale": ("sigma", stored_table(0.7), L, "position table in the weights", "none of"),
    "SDXL's VAE in α": ("alpha", part("vae", scaling_factor=0.13025), W, "VAE's scaling factor", "the VAE of SDXL"),
    "SD's VAE in Σ": ("sigma", part("vae", scaling_factor=0.18215), W, "VAE's scaling factor", "expected: 0.13025"),
    "a factor of nobody": (
        "alpha",
        part("vae", scaling_factor=1.0),
        W,
        "VAE's scaling factor",
        "correct vae/config.json",
    ),
    "SDXL's VAE by its name": (
        "alpha",
        part("vae", _name_or_path="stabilityai/sdxl-vae"),
        W,
        "VAE",
        "of stabilityai/sdxl-vae",
    ),
    "Σ's VAE in fp16": ("sigma", part("vae", force_upcast=False), L, "VAE", "overflows to black"),
    "VAE of other channels": ("alpha", part("vae", latent_channels=16), W, "VAE's channels", "16 (expected: 4)"),
    "VAE of another reduction": (
        "alpha",
        part("vae", block_out_channels=[4] * 3),
        W,
        "VAE's reduction",
        "4 (expected: 8)",
    ),
    "no VAE": ("alpha", lambda folder: shutil.rmtree(folder / "vae"), L, "VAE", "--components"),
    "no VAE weights": (
        "alpha",
        gone("vae/diffusion_pytorch_model.safetensors"),
        W,
        "VAE's weights",
        "has no diffusion_pytorch_model",
    ),
    "token limit": ("sigma", recipe(max_tokens=120), W, "token limit", "120 in recipe.json (expected: 300)"),
    "tokenizer's limit": (
        "alpha",
        part("tokenizer", model_max_length=512),
        L,
        "tokenizer",
        "512 tokens (expected: 120)",
    ),
    "no tokenizer": ("alpha", lambda folder: shutil.rmtree(folder / "tokenizer"), L, "tokenizer", "--components"),
    "cleaning": ("sigma", recipe(clean=True), L, "caption cleaning", "on (expected: off)"),
    "no size layers": ("alpha with micro-conditions", tensors(WEIGHTS, without("_embedder.linear_")), W, None, "time"),
    "micro-conditions not in the weights": (
        "sigma at 1024 px",
        transformer(use_additional_conditions=None),
        W,
        "micro-conditions",
        "the weights have none",
    ),
    "micro-conditions not in the config": (
        "alpha with micro-conditions",
        transformer(use_additional_conditions=False),
        W,
        "micro-conditions",
        "off, but the weights have them (expected: on)",
    ),
    "two output channels": ("alpha", transformer(out_channels=2), W, None, "expected: 8"),
    "no null caption": ("alpha", recipe(null="checkpoint"), W, "null caption", "set null to t5_empty"),
    "null caption of Σ": ("alpha", null_caption(300), W, "null caption", "[300, 16] (expected: [120, 16]"),
    "null caption unused": ("alpha", null_caption(120, null="t5_empty"), L, "null caption", "null: checkpoint uses it"),
    "all rows count": (
        "alpha",
        null_caption(120, null="checkpoint", null_mask="own"),
        L,
        "null caption",
        "set null_mask to cond",
    ),
    "T5 in fp16": (
        "alpha",
        tensors("text_encoder/model.safetensors", in_half),
        L,
        "text encoder's dtype",
        "issue 8604",
    ),
    "T5 of another width": ("alpha", transformer(caption_channels=17), W, None, "16 (expected: 17"),
    "no T5": ("alpha", part("text_encoder", model_type="clip_text_model"), W, "text encoder", "T5 alone"),
    "T5's weights": ("alpha", gone("text_encoder/model.safetensors"), W, "text encoder's weights", "fetch it again"),
    "T5 incomplete": (
        "alpha",
        tensors("text_encoder/model.safetensors", without("wi_0")),
        W,
        "text encoder's weights",
        "wi_0.weight",
    ),
    "no text encoder": ("sigma", lambda f: shutil.rmtree(f / "text_encoder"), L, "text encoder", "--components"),
    "Stable Diffusion's schedule": (
        "alpha",
        part("scheduler", beta_schedule="scaled_linear"),
        W,
        "noise schedule, beta_schedule",
        "'scaled_linear' (expected: 'linear')",
    ),
    "betas": ("alpha", part("scheduler", beta_end=0.012), W, "noise schedule, beta_end", "0.012 (expected: 0.02)"),
    "prediction": (
        "sigma",
        part("scheduler", prediction_type="v_prediction"),
        W,
        "noise schedule, prediction_type",
        "'epsilon'",
    ),
    "activation": ("alpha", transformer(activation_fn="gelu"), W, "activation_fn", "'gelu-approximate'"),
    "missing tensor": (
        "alpha",
        tensors(WEIGHTS, without("blocks.1.ff.net.2.bias")),
        W,
        "transformer's weights",
        "ff.net.2",
    ),
    "missing file": ("alpha", gone(WEIGHTS), W, "transformer's weights", "has no diffusion_pytorch_model"),
    "cut file": (
        "alpha",
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        W,
        "transformer's weights",
        "damaged",
    ),
    "untrained": ("alpha", tensors(WEIGHTS, filled("attn2.to_out.0", 0)), W, "influence of the text", "in every block"),
    "half trained": ("alpha", tensors(WEIGHTS, filled("1.attn2.to_out.0", 0)), L, "influence of the text", "blocks.1."),
}
SEVERAL = {  # what cannot be planted alone
    "no size layers": {"transformer's weights", "micro-conditions"},
    "two output channels": {"transformer's weights", "output channels"},
    "T5 of another width": {"transformer's weights", "text encoder's width (d_model)"},
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_folder_passes(sound, kind):
    found = doctor.examine(doctor.ModelFolder.read(sound[kind]), weights=True)
    assert {f.status for f in found} == {doctor.OK}, [str(f) for f in found]
    subjects = [f.subject for f in found]
    for subject in ("position scale", "micro-conditions", "VAE's scaling factor", "tokenizer", "text encoder"):
        assert subject in subjects


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_beside_it(sound, tmp_path, name):
    kind, plant, status, subject, words = FAULTS[name]
    folder = shutil.copytree(sound[kind], tmp_path / "model")
    before = find(folder)
    plant(folder)
    after = [finding for finding in find(folder) if finding not in before]
    assert {f.subject for f in after} == SEVERAL.get(name, {subject}), [str(f) for f in after]
    assert {f.status for f in after} == {status}
    assert any(words in str(finding) for finding in after), [str(f) for f in after]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("file", "tensor", "subject"),
    [
        (WEIGHTS, "proj_out.bias", "transformer's values"),
        ("text_encoder/model.safetensors", "final_layer_norm", "text encoder's values"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias", "VAE's values"),
    ],
)
def test_values_that_are_not_finite(sound, tmp_path, file, tensor, subject, value):
    folder = shutil.copytree(sound["alpha"], tmp_path / "model")
    change(folder / file, filled(tensor, value))
    (found,) = [finding for finding in find(folder, weights=True) if finding.status == doctor.WRONG]
    assert found.subject == subject and tensor in found.found
    assert not [finding for finding in find(folder) if finding.status == doctor.WRONG], "values are read on request"


def test_shards_are_read_and_a_missing_one_is_named(sound, tmp_path):
    folder = shutil.copytree(sound["alpha"], tmp_path / "model")
    (folder / WEIGHTS).unlink()
    Transformer.from_pretrained(sound["alpha"] / "transformer").save_pretrained(
        folder / "transformer", max_shard_size="30KB"
    )
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and find(folder) == find(sound["alpha"])
    shards[0].unlink()
    (found,) = [finding for finding in find(folder) if finding.status == doctor.WRONG]
    assert found.subject == "transformer's weights" and shards[0].name in found.found


def test_weights_are_not_read_unless_asked(tmp_path):
    """A gigabyte of zeros that no disk holds: reading it would fill as much memory."""
    config = SMALL | {"caption_channels": 10_000_000}
    with torch.device("meta"):
        shapes = Transformer(**config).state_dict()
    header, end = {}, 0
    for name, tensor in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    with (tmp_path / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = resident()
    found = {finding.subject: finding.status for finding in doctor.examine(doctor.ModelFolder.read(tmp_path))}
    assert found["transformer's weights"] == doctor.OK and found["influence of the text"] == doctor.WRONG
    assert found["family"] == doctor.LOOK, "nothing in the folder tells it"
    assert resident() - before < end / 10


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_an_official_file_with_components(sound, tmp_path):
    """The file's position table tells its scale; its family is that of the folder with the rest."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 72, "cross_attention_dim": 144, "out_channels": 8}
    ours = Transformer(**SMALL | heads | SOUND["sigma"])
    save_official(ours, tmp_path / "sigma.pth")
    model = doctor.ModelFolder.read(tmp_path / "sigma.pth", sound["sigma"])
    assert model.recipe == PUBLISHED["sigma"] and model.told_by == "model_index.json"
    found = doctor.examine(model)
    assert {f.status for f in found} == {doctor.OK}, [str(f) for f in found]
    assert "position table in the weights" in [f.subject for f in found]


@pytest.fixture
def embedded(tmp_path):
    """A folder as training leaves it."""
    folder, text = tmp_path / "final", HashedText()
    text.save(folder / "text_encoder")
    Recipe(family="embedded", max_tokens=text.max_tokens, clean=False, keep_cjk=True).save(folder)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "Autoencoder"}')
    Autoencoder().save(folder / "vae" / Autoencoder.file_name)
    size = {"in_channels": 8, "out_channels": 16, "sample_size": 4, "patch_size": 1}
    model = Transformer(**SMALL | size | {"caption_channels": text.channels})
    model.null_caption = torch.randn(1, text.channels)
    model.save_pretrained(folder)
    return folder


def test_the_embedded_default(embedded):
    found = doctor.examine(doctor.ModelFolder.read(embedded), weights=True)
    assert {f.status for f in found} == {doctor.OK}, [str(f) for f in found]
    Autoencoder(latent_channels=4).save(embedded / "vae" / Autoencoder.file_name)
    (wrong,) = find(embedded)
    assert (wrong.status, wrong.subject) == (doctor.WRONG, "VAE's channels") and "4 (expected: 8)" in str(wrong)


LR = "effective learning rate"
TRAINING = {
    "the paper's": ("optimizer: {lr: 2e-5}\nbatch_size: 256", {}),
    "a published stage": ("optimizer: {lr: 1.33e-4}\nbatch_size: 11264", {}),
    "small models have their own": ("model: {size: S}\noptimizer: {lr: 2e-3}\nbatch_size: 64", {}),
    "unknown keys": ("nonsense: 1\nbatch_size: 256\nother: {a: b}", {}),
    "too high": ("optimizer: {lr: 2e-3}\nbatch_size: 256", {LR: doctor.WRONG}),
    "too low": ("optimizer: {lr: 1e-7}\nbatch_size: 256", {LR: doctor.LOOK}),
    "no batch": ("optimizer: {lr: 2e-5}", {LR: doctor.LOOK}),
    "no clipping": ("batch_size: 256\noptimizer: {clip: 0}", {"gradient clipping": doctor.LOOK}),
    "decay": ("batch_size: 256\noptimizer: {weight_decay: 0.5}", {"weight decay": doctor.LOOK}),
    "epsilon": ("batch_size: 256\noptimizer: {eps: 1e-3}", {"epsilon of the optimizer": doctor.LOOK}),
    "no dropout": ("batch_size: 256\ndata: {caption_dropout: 0}", {"caption dropout": doctor.WRONG}),
    "much dropout": ("batch_size: 256\ndata: {caption_dropout: 0.5}", {"caption dropout": doctor.LOOK}),
    "timesteps": ("batch_size: 256\ndiffusion: {num_timesteps: 500}", {"timesteps": doctor.WRONG}),
    "fp16": ("batch_size: 256\nprecision: fp16", {"precision": doctor.LOOK}),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_configurations(tmp_path, name):
    content, expected = TRAINING[name]
    (tmp_path / "train.yaml").write_text(content)
    found = doctor.examine_training(doctor.read_settings(tmp_path / "train.yaml"))
    assert {f.subject: f.status for f in found if f.status != doctor.OK} == expected


def test_the_effective_learning_rate_is_that_of_the_official_code(tmp_path, capsys):
    """2e-5 · √(batch / 256): 1.8e-6 at two pictures a step, of which the official code says nothing."""
    (tmp_path / "train.yaml").write_text("optimizer: {lr: 2e-5}\nbatch_size: 2")
    assert doctor.main(["--config", str(tmp_path / "train.yaml")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2e-05 at 2 pictures a step" in printed and "2e-05 by the paper, 1.77e-06 by the official code" in printed
    assert "0.000133 at 11264, 6.32e-05 at 2560, 2.45e-05 at 384" in printed
    (tmp_path / "train.yaml").write_text("optimizer: {lr: 2e-5, lr_rule: sqrt}\nbatch_size: 11264")
    assert doctor.main(["--config", str(tmp_path / "train.yaml")]) == 0
    assert "2e-05 · √(11264/256) = 0.000133 at 11264" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("config", sorted((ROOT / "train" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_our_own_configurations_are_sound(config):
    assert {f.status for f in doctor.examine_training(doctor.read_settings(config))} == {doctor.OK}


def test_exit_codes_and_forms_of_the_report(sound, tmp_path, capsys):
    folder = shutil.copytree(sound["alpha"], tmp_path / "model")
    assert doctor.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(str(folder)) and "nothing wrong, 0 to look at" in printed
    transformer(interpolation_scale=2.0)(folder)
    assert doctor.main([str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (wrong,) = [finding for finding in report["findings"] if finding["status"] == "WRONG"]
    assert report["wrong"] == 1 and wrong["subject"] == "position scale" and "lewei_scale" in wrong["source"]
    assert doctor.main([str(folder)]) == 1
    assert "WRONG  position scale: 2 (expected: 1" in capsys.readouterr().out


MISTAKES = {
    "no folder": (["nowhere"], "nowhere is neither a folder nor the name of a model"),
    "empty folder": (["."], "holds no transformer"),
    "no configuration": (["--config", "nowhere.yaml"], "there is no configuration nowhere.yaml"),
    "no YAML": (["--config", "bad.yaml"], "bad.yaml is not YAML"),
    "no keys": (["--config", "list.yaml"], "it holds a list"),
    "no number": (["--config", "word.yaml"], "optimizer.lr is 'much', which is no number"),
    "no batch": (["--config", "zero.yaml"], "a step takes one picture at least"),
    "damaged config": (["broken"], "config.json is not valid JSON"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    contents = {
        "bad.yaml": "a: [",
        "list.yaml": "- 1",
        "word.yaml": "batch_size: 1\noptimizer: {lr: much}",
        "zero.yaml": "batch_size: 0",
        "broken/config.json": "{",
    }
    for file, content in contents.items():
        (tmp_path / file).write_text(content)
    given, message = MISTAKES[name]
    assert doctor.main(given) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("python -m pixart_fast.doctor: ") and message in line


def test_help_teaches():
    shown = doctor.arguments().format_help()
    for word in ("--components", "--config", "--weights", "--json", "WRONG: mend it", "Exit code 0"):
        assert word in " ".join(shown.split())

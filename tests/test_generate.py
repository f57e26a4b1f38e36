"""`python -m pixart_fast.generate`: files with their settings, and mistakes told in a sentence."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart_fast import generate
from pixart_fast.pictures import read_settings
from tests import published
from tests.runs import finished

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.save(tmp_path_factory.mktemp("model") / "alpha", sample_size=32, interpolation_scale=1.0)


def run(folder: Path, *arguments: str) -> int:
    return generate.main(["--model", str(folder), "--device", "cpu", "--text-precision", "fp32", *arguments])


def test_pictures_settings_and_contact_sheet(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n\n  snow, ünicode 雪  \n")
    out = tmp_path / "out"
    chosen = ("--size", "64x32", "--steps", "2", "--seed", "7", "--num-images", "2", "--sampler", "ddim")
    assert run(folder, "a cat", "--prompts-file", str(prompts), "--out", str(out), *chosen) == 0
    pictures = sorted(out.glob("*-*.png"))
    assert len(pictures) == 6 and all(Image.open(path).size == (64, 32) for path in pictures)
    settings = [read_settings(path) for path in pictures]
    assert {s["prompt"] for s in settings} == {"a cat", "a dog", "snow, ünicode 雪"}
    assert {s["seed"] for s in settings} == {7, 8}
    assert all(s["sampler"] == "ddim" and s["steps"] == 2 and s["guidance"] == 4.5 for s in settings)
    assert Image.open(out / "contact_sheet.png").width > 2 * 64
    printed = capsys.readouterr().out
    assert f"6 pictures in {out}, see {out / 'contact_sheet.png'}" in printed and "GB memory of the process" in printed


def test_the_settings_in_a_file_make_its_picture_again(folder, tmp_path):
    assert run(folder, "a cat", "--steps", "2", "--seed", "3", "--num-images", "2", "--out", str(tmp_path / "a")) == 0
    for path in sorted((tmp_path / "a").glob("*-*.png")):
        s = read_settings(path)
        again = ("--steps", str(s["steps"]), "--seed", str(s["seed"]), "--guidance", str(s["guidance"]))
        assert run(folder, s["prompt"], *again, "--out", str(tmp_path / "b")) == 0
        levels = [np.asarray(Image.open(where)).astype(int) for where in (tmp_path / "b" / path.name, path)]
        assert np.abs(levels[0] - levels[1]).max() <= 1, "but for what the batch does to rounding"


def test_aspect_and_init_image(folder, tmp_path):
    assert run(folder, "a cat", "--aspect", "16:9", "--steps", "1", "--out", str(tmp_path)) == 0
    (wide,) = tmp_path.glob("*.png")
    assert Image.open(wide).size == (336, 192)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.jpg")
    chosen = ("--init-image", str(tmp_path / "in.jpg"), "--strength", "0.5", "--steps", "2")
    assert run(folder, "a cat", *chosen, "--out", str(tmp_path / "changed")) == 0
    (changed,) = (tmp_path / "changed").glob("*.png")
    assert Image.open(changed).size == (336, 192) and read_settings(changed)["strength"] == 0.5


def test_an_approximation_is_measured_and_printed(folder, tmp_path, capsys):
    assert run(folder, "a cat", "--steps", "4", "--size", "32x32", "--t-gate", "2", "--out", str(tmp_path)) == 0
    assert "T-GATE after step 2 of 4: latents deviate by " in capsys.readouterr().out


def test_what_the_model_does_not_read_is_printed(folder, tmp_path, capsys):
    assert run(folder, "a cat " * 100, "--steps", "1", "--size", "32x32", "--out", str(tmp_path)) == 0
    assert "note: the model reads 120 tokens; of 'a cat a cat" in capsys.readouterr().out


MISTAKES = {
    "no prompt": ([], "there is no prompt: give one"),
    "size": (["a cat", "--size", "1000x750"], "1000x750 does not divide by 16: take 992x752"),
    "no size": (["a cat", "--size", "big"], "'big' is no size"),
    "aspect": (["a cat", "--aspect", "wide"], "'wide' is no aspect ratio"),
    "no file": (["--prompts-file", "nowhere.txt"], "nowhere.txt cannot be read (No such file or directory)"),
    "steps": (["a cat", "--steps", "0"], "dpm takes 1 to 999 steps, got 0"),
    "gate": (["a cat", "--steps", "4", "--t-gate", "5"], "T-GATE takes a gate from 1 to 4"),
    "cache": (["a cat", "--cache-blocks", "0"], "blocks can be evaluated every 1 or more steps, got interval 0"),
    "image": (["a cat", "--init-image", "nowhere.png"], "nowhere.png"),
    "mask": (["a cat", "--mask", "nowhere.png"], "a mask needs the picture that it masks"),
    "strength": (["a cat", "--strength", "0.5"], "starts from a picture"),
    "null": (["a cat", "--null", "checkpoint"], "the checkpoint, which has none"),
    "device": (["a cat", "--device", "gpu"], "there is no device 'gpu': choose cpu, cuda or cuda:1"),
    "components": (["a cat", "--components", "nowhere"], "nowhere is neither a folder nor the name of a model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(folder, name, capsys, tmp_path):
    arguments, message = MISTAKES[name]
    assert run(folder, "--out", str(tmp_path), *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("python -m pixart_fast.generate: ") and message in error


def test_a_folder_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(folder, "a cat", "--steps", "1", "--size", "32x32", "--out", str(tmp_path / "file")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_broken_weights_are_one_sentence(tmp_path, capsys):
    folder = published.save(tmp_path / "alpha")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(folder, "a cat", "--out", str(tmp_path / "out")) == 2
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    published.transformers()[1].save_pretrained(folder / "transformer")
    assert run(folder, "a cat", "--steps", "1", "--out", str(tmp_path / "out")) == 2
    assert "vae" in capsys.readouterr().err


def test_help_teaches():
    shown = subprocess.run(
        [sys.executable, "-m", "pixart_fast.generate", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    for word in ("--prompts-file", "--low-memory", "dpm: DPM-Solver++", "examples:", "--aspect W:H"):
        assert word in shown


def test_the_model_that_training_leaves(tmp_path, monkeypatch, capsys):
    """Without --model: the folder of the embedded default, after a run of its own trainer."""
    output = tmp_path / "runs" / "scenes"
    finished("steps=2", f"output={output}")
    monkeypatch.chdir(tmp_path)
    assert generate.main(["a red circle", "--num-images", "2", "--steps", "2"]) == 0
    pictures = sorted((tmp_path / "pictures").glob("*-*.png"))
    assert len(pictures) == 2 and Image.open(pictures[0]).size == (32, 32)
    assert read_settings(pictures[0])["guidance"] == 2.5
    assert generate.main(["a red circle", "--size", "64x64"]) == 2
    assert "this model paints 32x32 alone" in capsys.readouterr().err

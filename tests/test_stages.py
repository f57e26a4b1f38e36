"""The paper's stages as configurations and as one chain."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from bench.plan import STAGES
from pixart_fast import Transformer
from pixart_fast.checkpoint import load_transformer
from train import pipeline
from train.pipeline import MINIATURE, PAPER, command, load_chain, main
from train.settings import CONFIGS, UserError, flatten, load_settings
from train.start import DIT

OVERLAYS = sorted(CONFIGS.glob("*/*.yaml"))


@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_papers_values(name):
    """Table 4, beside which the planner of the bench suite stands."""
    settings, row = load_settings(CONFIGS / f"{name}.yaml", []), STAGES[name]
    assert (settings.steps, settings.batch_size) == (row.steps, row.batch)
    assert settings.model.resolved_size() == (28, 1152, 16) and settings.model.patch_size == 2
    assert (settings.model.kind == "dit") == (row.caption == 0)
    optimizer = settings.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.weight_decay, optimizer.schedule) == (
        "adamw",
        2e-5,
        0.03,
        "constant",
    )
    assert settings.effective_lr() == 2e-5
    assert settings.model.interpolation_scale == (2.0 if row.pixels == 1024 else None)
    assert (settings.model.micro_conditions == "original") == (row.pixels > 256)


def test_the_codes_other_values_are_named():
    """2e-5 · √(178 · 64 / 256) = 1.33e-4, which the paper does not say."""
    files = [CONFIGS / "align_256.yaml", CONFIGS / "values" / "published_code.yaml"]
    settings = load_settings(files, [])
    assert abs(settings.effective_lr() - 1.334e-4) < 1e-6
    assert (settings.optimizer.eps, settings.optimizer.clip) == (1e-10, 0.01)
    assert settings.optimizer.weight_decay == 0.03 and settings.steps == 150_000


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", STAGES)
def test_overlays_change_what_they_name_alone(name, overlay):
    stage = CONFIGS / f"{name}.yaml"
    plain, over = (flatten(load_settings(files, [])) for files in ([stage], [stage, overlay]))
    named = set()

    def walk(values, prefix=""):
        for key, value in values.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else named.add(prefix + key)

    walk(yaml.safe_load(overlay.read_text()))
    assert {key for key in plain if plain[key] != over[key]} <= named <= plain.keys()


def test_micro_batches_fit_the_tokens_and_divide_the_batch():
    settings = load_settings(CONFIGS / "align_256.yaml", ["micro_tokens=12288"])
    # 11392 = 2 · 2 · 16 · 178 pictures over 8 processes are 1424 = 2^4 · 89 each; 48 of 256 tokens fit, 16 divide
    assert settings.resolved(8, 256).accumulation == 89
    assert settings.resolved(64, 256).accumulation == 89  # 178 = 2 · 89 rows
    assert settings.resolved(64, 256).rows_per_process(64) == 2
    assert load_settings(CONFIGS / "align_256.yaml", []).resolved(8, 256).accumulation == 1
    with pytest.raises(UserError, match="does not divide by 7 processes"):
        settings.resolved(7, 256)
    with pytest.raises(UserError, match="less than a picture's 16384 tokens"):
        settings.resolved(8, 16384)
    with pytest.raises(UserError, match="do not go together"):
        load_settings(CONFIGS / "align_256.yaml", ["micro_tokens=12288", "data.token_budget=9"]).resolved(8, 256)


def test_each_stage_starts_from_the_one_before(tmp_path):
    chain = load_chain(PAPER, tmp_path)
    commands = [command(chain, place, ["deepspeed"], [Path("hw.yaml")], ["seed=1"]) for place in range(5)]
    assert [stage.name for stage in chain.stages] == list(STAGES)
    assert not any(word.startswith("init_from") for word in commands[0])
    for before, words in zip(chain.stages, commands[1:], strict=False):
        assert f"init_from={tmp_path / before.name / 'final'}" in words
        assert words[-1] == "seed=1" and words[words.index("hw.yaml") - 1] == "--config"


def test_mistakes_get_a_sentence(tmp_path, capsys):
    broken = tmp_path / "chain.yaml"
    broken.write_text("output: x\nstages: [{name: a, config: b, unheard: 1}]")
    assert main(["--pipeline", str(broken)]) == 2
    assert "unheard" in capsys.readouterr().err
    assert main(["--pipeline", str(tmp_path / "nowhere.yaml")]) == 2
    assert "no configuration" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The miniature, smaller still."""
    folder = tmp_path_factory.mktemp("chain")
    chain = yaml.safe_load(MINIATURE.read_text())
    for stage in chain["stages"]:
        stage["settings"] |= {
            "steps": 6, "batch_size": 8, "sampling.every": 3, "sampling.captions": 4, "sampling.final_captions": 4,
            "sampling.steps": 2, "log_every": 2, "model.layers": 2, "model.width": 32, "model.heads": 2,
        }  # fmt: skip
        stage["prepare"] = [line.replace("--count 10000", "--count 60") for line in stage.get("prepare", [])]
    chain["stages"][-1]["aspects"] = 2
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump(chain))
    return file


def test_the_chain_from_classes_to_aspects(small, monkeypatch):
    """All three stages, stopped by a failure in the middle and taken up again there."""
    output = small.parent / "out"
    arguments = ["--pipeline", str(small), "--output", str(output), "--launcher", "python"]
    train = pipeline.run

    def refuse(words, what):
        if what == "stage aesthetic_64":
            raise UserError(f"{what} ended with exit code 1")
        train(words, what)

    monkeypatch.setattr(pipeline, "run", refuse)
    assert main(arguments) == 2
    assert (output / "pixel_32" / "final" / DIT).is_file() and not (output / "aesthetic_64").exists()
    finished = [output / "pixel_32" / "report.json", output / "align_32" / "report.json", output / "pictures"]
    written = [path.stat().st_mtime_ns for path in finished]
    monkeypatch.setattr(pipeline, "run", train)
    assert main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in finished] == written

    first = json.loads((output / "align_32" / "report.json").read_text())
    assert first["accuracy"].keys() == {"seen", "held_out"}
    store = json.loads((output / "features" / "manifest.json").read_text())
    assert store["count"] == 60 and len(store["buckets"]) > 2
    last = load_transformer(output / "aesthetic_64" / "final")
    assert last.config.interpolation_scale == 2.0 and last.config.sample_size == 8
    aspects = json.loads((output / "aesthetic_64" / "aspects.json").read_text())
    assert len(aspects) == 5 and all("binding" in rates for rates in aspects.values())
    page = (output / "report.md").read_text()
    for name in ("pixel_32/samples/progress.png", "align_32/samples/final.png", "aesthetic_64/aspects.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 64 and f"({name})" in page
    config = Transformer.load_config(output / "align_32" / "final")
    assert config["sample_size"] == 4

"""Settings: what a user can get wrong gets one sentence."""

from pathlib import Path

import pytest
import yaml

from train.settings import CONFIGS, DEFAULT, Settings, UserError, changed_keys, flatten, known_keys, load_settings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path):
    load_settings(path, [])


def test_overrides_reach_nested_keys_with_their_types():
    settings = load_settings(
        DEFAULT, ["optimizer.lr=1e-4", "model.layers=6", "compile=true", "output=runs/x", "zero_stage=2"]
    )
    assert (settings.optimizer.lr, settings.model.layers, settings.compile, settings.zero_stage) == (1e-4, 6, True, 2)
    assert settings.output == Path("runs/x")
    assert settings.batch_size == load_settings(DEFAULT, []).batch_size


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.lr=1", "unknown key optimiser"),
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate"),
        ("optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("zero_stge=1", "did you mean zero_stage?"),
        ("modle.size=B", "did you mean model?"),
        ("zero_stage=4", "zero_stage=4"),
        ("steps=many", "steps='many'"),
        ("steps=-1", "steps=-1"),
        ("seed=-1", "seed=-1"),
        ("batch_size", "is not key=value"),
        ("steps.more=1", "steps holds a value"),
        ("optimizer.ema=1.5", "optimizer.ema=1.5"),
    ],
)
def test_mistakes_are_named_in_one_sentence(override, words):
    with pytest.raises(UserError) as caught:
        load_settings(DEFAULT, [override])
    message = str(caught.value)
    assert words in message and "\n" not in message


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"no configuration .*scenes\.yaml"):
        load_settings(tmp_path / "nothing.yaml", [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1")
    with pytest.raises(UserError, match="is not YAML"):
        load_settings(broken, [])
    broken.write_text("- steps")
    with pytest.raises(UserError, match="must hold keys and values"):
        load_settings(broken, [])
    broken.write_text("steps: 3")
    with pytest.raises(UserError, match="is not set"):
        load_settings(broken, [])


def test_batch_must_divide():
    settings = load_settings(DEFAULT, ["batch_size=10", "accumulation=2"])
    assert settings.rows_per_process(1) == 5
    with pytest.raises(UserError, match="choose a multiple of 6"):
        settings.rows_per_process(3)


def test_every_key_is_known_and_flat():
    keys = known_keys()
    assert {"steps", "optimizer.lr", "model.size", "sampling.guidance"} <= set(keys)
    assert flatten(load_settings(DEFAULT, [])).keys() == set(keys)
    assert yaml.safe_load(DEFAULT.read_text()).keys() <= Settings.model_fields.keys()


def test_what_a_continued_run_may_change():
    old = flatten(load_settings(DEFAULT, []))
    assert not changed_keys(
        old, flatten(load_settings(DEFAULT, ["log_every=3", "sampling.every=7", "steps=9", "data.workers=2"]))
    )
    assert changed_keys(old, flatten(load_settings(DEFAULT, ["seed=1", "optimizer.lr=1", "log_every=3"]))) == [
        "optimizer.lr",
        "seed",
    ]

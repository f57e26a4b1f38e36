"""Whole weights out of checkpoints of every ZeRO stage: the average is final/ bit for bit, and DeepSpeed is the oracle
of the trained weights."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from pixart_fast import Transformer
from pixart_fast.checkpoint import load_transformer
from tests.runs import allow_fp16, finished
from train.checkpoints import Checkpoints
from train.export import main, weights_of
from train.settings import load_settings
from train.start import build_source, new_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if one[name].dtype != other[name].dtype or not one[name].equal(other[name])]
    assert not different, different[:5]


@pytest.mark.parametrize(
    ("zero_stage", "processes", "precision", "kind"),
    [
        (0, 1, "fp32", "muon"),
        (0, 1, "fp16", "adamw"),
        (1, 2, "fp32", "adamw"),
        (2, 1, "fp16", "adamw"),
        (3, 2, "bf16", "adamw"),
    ],
)
def test_weights_are_those_of_the_run(tmp_path, capsys, zero_stage, processes, precision, kind):
    run, options = tmp_path / "run", (f"precision={precision}", f"optimizer.kind={kind}", f"zero_stage={zero_stage}")
    before = allow_fp16 if precision == "fp16" else None
    finished("steps=3", *options, f"output={run}", processes=processes, before=before)

    assert main([str(run), str(tmp_path / "ema")]) == 0
    assert not dist.is_initialized()
    assert "wrote the average of" in capsys.readouterr().out
    files = sorted(str(file.relative_to(run / "final")) for file in (run / "final").rglob("*") if file.is_file())
    assert {WEIGHTS, "null_caption.safetensors", "recipe.json"} < set(files)
    for name in files:
        assert (tmp_path / "ema" / name).read_bytes() == (run / "final" / name).read_bytes(), name

    (checkpoint,) = (run / "checkpoints").iterdir()
    assert main([str(checkpoint), str(tmp_path / "trained"), "--weights", "trained"]) == 0
    trained = load_file(tmp_path / "trained" / WEIGHTS)
    if zero_stage:
        oracle = get_fp32_state_dict_from_zero_checkpoint(checkpoint, tag="state")
    else:
        # The test's own file: DeepSpeed pickles its settings beside the tensors.
        saved = torch.load(checkpoint / "state" / "mp_rank_00_model_states.pt", weights_only=False)
        oracle = saved["module"]
        if precision != "fp32":  # its weights are half, rounded from the masters
            same({name: tensor.to(oracle[name].dtype) for name, tensor in trained.items()}, oracle)
            masters = {t.double().sum().item() for t in saved["optimizer"]["fp32_groups"][0]}
            assert masters == {t.double().sum().item() for t in trained.values()}
            oracle = trained
    same(trained, dict(oracle))
    average = load_file(tmp_path / "ema" / WEIGHTS)
    assert any(not average[name].equal(trained[name]) for name in trained)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    finished("steps=4", "checkpoint_every=2", "zero_stage=1", f"output={folder}")
    return folder


def test_official_form(run, tmp_path):
    assert main([str(run), str(tmp_path / "out.pth"), "--to", "official"]) == 0
    final = Transformer.from_pretrained(run / "final")
    model = load_transformer(tmp_path / "out.pth", num_attention_heads=2)
    same(model.state_dict(), final.state_dict())
    assert model.null_caption.equal(final.null_caption)


def test_class_conditional_model(tmp_path, capsys):
    run = tmp_path / "run"
    finished("steps=2", "model.kind=dit", "zero_stage=3", f"output={run}")
    assert main([str(run), str(tmp_path / "dit.pt"), "--to", "official"]) == 0
    same(torch.load(tmp_path / "dit.pt"), torch.load(run / "final" / "dit.pt"))
    assert main([str(run), str(tmp_path / "folder")]) == 2
    assert "choose --to official" in capsys.readouterr().err


def test_damaged_checkpoints_are_passed_over(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000004"
    shard = next((newest / "state").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main([str(newest), str(tmp_path / "out")]) == 2
    assert f"{newest} is damaged (state/{shard.name} has other bytes" in capsys.readouterr().err
    assert main([str(copy), str(tmp_path / "out")]) == 0
    assert "step_00000002" in capsys.readouterr().out
    assert newest.is_dir()  # only a run renames it


def test_before_the_first_update_the_average_is_the_weights(run, tmp_path):
    """As fp16 leaves it while it looks for its loss scale."""
    checkpoint = tmp_path / "step_00000004"
    shutil.copytree(run / "checkpoints" / checkpoint.name, checkpoint)
    file = next((checkpoint / "state").glob("*optim_states.pt"))
    saved = torch.load(file, weights_only=False)
    saved["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}
    torch.save(saved, file)
    settings = load_settings(run / "config.yaml", [])
    one, other = (dict(weights_of(checkpoint, None, settings, average)) for average in (True, False))
    same(one, other)


def test_flat_groups_of_fused_optimizers(run, tmp_path):
    """DeepSpeed's ZeRO-0 in half precision with a FusedAdam, which needs a GPU: one flat tensor for all parameters."""
    settings = load_settings(run / "config.yaml", ["zero_stage=0"])
    model = new_model(settings, build_source(settings, 1))
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    state = {"fp32_groups_flat": [flat], "optimizer_state_dict": {"state": {0: {"step": 3, "ema": -flat}}}}
    (tmp_path / "state").mkdir()
    torch.save({"module": {}, "optimizer": state}, tmp_path / "state" / "mp_rank_00_model_states.pt")
    (tmp_path / "manifest.json").write_text(json.dumps({"zero_stage": 0, "processes": 4}))
    same(dict(weights_of(tmp_path, model, settings, average=False)), weights)
    same(dict(weights_of(tmp_path, model, settings, average=True)), {name: -t for name, t in weights.items()})


def test_mistakes_are_one_sentence(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for arguments, words in (
        ([tmp_path / "nowhere", tmp_path / "out"], "has no sound checkpoint"),
        ([run / "final", tmp_path / "out"], "has no sound checkpoint"),
        ([run, tmp_path / "there"], "exists already"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_failed_write_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(self, folder):
        folder.mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(Transformer, "save_pretrained", full)
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert Checkpoints(run / "checkpoints", 1).all()

"""A checkpoint goes on with another number of processes: weights, moments, average bit for bit, then equal losses."""

import json
import shutil

import pytest
import torch

import train.universal
from tests.runs import finished, run, state_of
from train.checkpoints import MANIFEST, Checkpoints
from train.settings import UserError
from train.universal import Shards, deal

HALF, WHOLE = 2, 4
# 61136 parameters do not divide by 3: the last part is padded.
OPTIONS = ("batch_size=6", "model.layers=1", "model.width=40", "optimizer.lr=1e-3", "sampling.final_captions=2")


def shards_of(checkpoint):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    return Shards(checkpoint / "state", manifest["zero_stage"], manifest["processes"])


def whole(checkpoint):
    shards = shards_of(checkpoint)
    assert shards.kinds == ["fp32", "exp_avg", "exp_avg_sq", "ema"]
    return {f"{name}/{key}": tensor for key in shards.kinds for name, tensor in shards.whole(key)}


def same(one, other):
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different[:5]


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def _save_what_was_loaded():
    """A checkpoint right after the load, by DeepSpeed, as the present processes have it."""
    load = Checkpoints.load

    def load_and_save(self, engine, path, manifest):
        step = load(self, engine, path, manifest)
        Checkpoints(self.folder.parent / "loaded", 1).save(engine, step)
        return step

    Checkpoints.load = load_and_save


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished short runs, by ZeRO stage, processes and precision; each is made once and must be left alone."""
    made = {}

    def make(zero_stage, processes, precision="fp32", steps=HALF):
        key = zero_stage, processes, precision, steps
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            options = (f"zero_stage={zero_stage}", f"precision={precision}", f"steps={steps}", f"output={made[key]}")
            finished(*OPTIONS, *options, processes=processes)
        return made[key]

    return make


@pytest.mark.parametrize(
    ("zero_stage", "before", "after", "precision"), [(1, 2, 3, "fp32"), (2, 1, 2, "bf16"), (3, 2, 1, "fp32")]
)
def test_goes_on_with_another_number_of_processes(tmp_path, runs, zero_stage, before, after, precision):
    shutil.copytree(runs(zero_stage, before, precision), tmp_path, dirs_exist_ok=True)
    options = (*OPTIONS, f"zero_stage={zero_stage}", f"precision={precision}", f"steps={WHOLE}", f"output={tmp_path}")
    output = finished(*options, processes=after, before=_save_what_was_loaded)
    assert f"step_{HALF:08d} has the shards of {before} process(es): dealing them to {after}." in output

    checkpoints, loaded = tmp_path / "checkpoints", tmp_path / "loaded" / f"step_{HALF:08d}"
    assert shards_of(loaded).processes == after
    same(whole(checkpoints / loaded.name), whole(loaded))
    # In fp32 losses are the same for every ZeRO stage and number of processes (tests/test_run.py).
    uninterrupted = losses(runs(0, 1, precision, WHOLE))
    assert losses(tmp_path) == pytest.approx(uninterrupted, abs=1e-5 if precision == "fp32" else 1e-2)
    assert not list(checkpoints.glob(".partial*"))


@pytest.fixture(params=[1, 3])
def checkpoint(request, runs):
    return runs(request.param, 2) / "checkpoints" / f"step_{HALF:08d}"


@pytest.mark.parametrize("processes", [1, 3, 7, 64])
def test_dealing_there_and_back_gives_the_same_files(tmp_path, checkpoint, processes):
    shards = shards_of(checkpoint)
    for rank in range(processes):
        shards.write(tmp_path / "there" / "state", rank, processes)
    there = Shards(tmp_path / "there" / "state", shards.stage, processes)
    for rank in range(2):
        there.write(tmp_path / "back" / "state", rank, 2)
    same(state_of(checkpoint), state_of(tmp_path / "back"))
    assert whole(checkpoint).keys() == {f"{name}/{key}" for key in there.kinds for name, _ in there.whole(key)}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_element_is_dealt_once(stage, processes):
    sizes = {"a": 7, "b": 1, "c": 24, "d": 12}
    parts = deal(stage, sizes, processes)
    assert len(parts) == processes and len({part.length for part in parts}) == 1
    for name, size in sizes.items():
        elements = [i for part in parts for f in part.fragments if f.name == name for i in range(f.start, f.stop)]
        assert elements == list(range(size))
    for part in parts:
        taken = [f.offset + i for f in part.fragments for i in range(f.stop - f.start)]
        assert len(set(taken)) == len(taken) and max(taken, default=0) < part.length


def test_another_layout_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    stage = shards_of(checkpoint).stage
    file = next((tmp_path / "state").glob("*pp_rank_1_mp_rank_00_optim_states.pt"))
    saved = torch.load(file, weights_only=False)  # the test's own file
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    saved["optimizer_state_dict"][key] = [torch.zeros(10)]
    torch.save(saved, file)
    with pytest.raises(UserError, match=rf"^{tmp_path}/state is laid out in another way .* go on with 2 process"):
        shards_of(tmp_path)


def _full_disk():
    def full(content, path):
        path.parent.mkdir(parents=True)
        raise OSError(f"{path} could not be written: is the disk full?")

    train.universal.write_file = full


def test_full_disk_leaves_the_checkpoint(tmp_path, runs):
    shutil.copytree(runs(1, 2), tmp_path, dirs_exist_ok=True)
    options = (*OPTIONS, "zero_stage=1", "precision=fp32", f"steps={WHOLE}", f"output={tmp_path}")
    code, output = run(*options, before=_full_disk)
    assert code == 2 and "is the disk full" in output and "or go on with 2" in output and "Traceback" not in output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]

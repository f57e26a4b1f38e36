"""When things break in training on features: a sentence, no hang, and a checkpoint from which the run goes on."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from pixart_fast import embedded
from tests.runs import Processes, assert_same_state, finished, run, wait_for
from train.data import features
from train.data.encode import Encoders
from train.data.extract import extract
from train.data.raw import open_raw
from train.data.scenes import Scenes, export
from train.data.source import ScenesSource
from train.data.store import FeatureStore

PLAIN = (
    "data.source=features",
    "optimizer.schedule=constant",
    "model.interpolation_scale=2.0",
    "optimizer.warmup_steps=2",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Text encoder and autoencoder as `make train` leaves them."""
    folder = tmp_path_factory.mktemp("model")
    embedded.HashedText().save(folder / "text_encoder")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "Autoencoder"}')
    shutil.copy(Path("train/data/autoencoder.safetensors"), folder / "vae")
    (folder / "recipe.json").write_text('{"family": "embedded", "max_tokens": 16, "clean": false, "keep_cjk": true}')
    return folder


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> Path:
    """60 scenes in five aspect ratios, from pictures to features."""
    folder = tmp_path_factory.mktemp("data")
    export(Scenes(0), folder / "pictures", 60, 64, aspects=True)
    encoders = Encoders(model, resolution=64, multi_aspect=True)
    extract(open_raw(folder / "pictures"), folder / "store", encoders, workers=0, shard_size=20, quiet=True)
    return folder / "store"


def settings(store: Path, output: Path, *more: str) -> tuple[str, ...]:
    return (*PLAIN, f"data.store={store}", f"output={output}", *more)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """An undisturbed run of two epochs and a half over all buckets, on two processes."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finished(*settings(store, output, "steps=18", "checkpoint_every=18"), processes=2)
    return output


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_resume_in_the_middle_of_a_multi_aspect_epoch(store, tmp_path, zero_stage):
    """kill -9 to both processes, data workers or not; the state at the end has the bits of the undisturbed run."""
    common = ("steps=18", "checkpoint_every=5", "keep_checkpoints=9", f"zero_stage={zero_stage}")
    finished(*settings(store, tmp_path / "whole", *common), processes=2)
    killed = Processes(*settings(store, tmp_path / "run", *common), processes=2)
    wait_for((tmp_path / "run" / "checkpoints" / "step_00000005").exists, killed)
    killed.kill()
    finished(*settings(store, tmp_path / "run", *common, "data.workers=2"), processes=2)
    assert_same_state(*(tmp_path / name / "checkpoints" / "step_00000018" for name in ("whole", "run")))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_step_takes_one_bucket_on_all_processes(store, tmp_path, whole):
    """And the run shows all of them: one process alone computes the same losses."""
    finished(*settings(store, tmp_path / "run", "steps=18", "checkpoint_every=18"))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(whole), rtol=1e-5, atol=0)


def test_pictures_encoded_in_the_loader_train_bit_for_bit_as_their_features(store, model, tmp_path):
    common = ("steps=8", "checkpoint_every=8")
    finished(*settings(store, tmp_path / "features", *common))
    images = ("data.source=images", f"data.images={store.parent / 'pictures'}", f"data.encoders={model}")
    images += ("data.resolution=64", "data.multi_aspect=true", f"output={tmp_path / 'images'}")
    finished(*PLAIN[1:], *images, *common)
    assert losses(tmp_path / "images") == losses(tmp_path / "features")
    code, said = run("steps=2", "data.source=images", f"output={tmp_path / 'other'}")
    assert code == 2 and "needs data.images=, data.encoders=, data.resolution= as well" in said


def copied(store: Path, to: Path) -> Path:
    shutil.copytree(store, to)
    return to


def test_a_corrupt_shard(store, tmp_path):
    """Named with its file; after it was mended the run goes on as if nothing had been."""
    mine, output = copied(store, tmp_path / "store"), tmp_path / "run"
    common = settings(mine, output, "steps=12", "checkpoint_every=2")
    finished(*settings(mine, output, "steps=4", "checkpoint_every=2"))
    shard = mine / "shards" / "00001.safetensors"
    sound = shard.read_bytes()
    for place in range(len(sound) - 40_000, len(sound), 500):  # text and latents of many of its samples
        torn = bytearray(shard.read_bytes())
        torn[place] ^= 0x40
        shard.write_bytes(torn)
    code, said = run(*common)
    assert code == 2 and str(shard) in said and "Traceback" not in said, said[-2000:]
    shard.write_bytes(sound)
    assert "going on from step" in finished(*common)
    undisturbed = tmp_path / "undisturbed"
    finished(*settings(mine, undisturbed, "steps=12", "checkpoint_every=2"))
    assert losses(output) == losses(undisturbed)


def _spoil_a_sample():
    """The features of one sample hold a NaN, as a text encoder in fp16 leaves them."""
    multiprocessing.set_start_method("fork", force=True)  # loader workers inherit what is broken here
    read = FeatureStore.read

    def spoiled(self, index):
        sample = read(self, index)
        if index == 7:
            sample.text[0, 3] = float("nan")
        return sample

    FeatureStore.read = spoiled


@pytest.mark.parametrize("workers", [0, 1])
def test_nan_in_a_feature(store, tmp_path, workers):
    output = tmp_path / "run"
    code, said = run(
        *settings(store, output, "steps=30", f"data.workers={workers}", "checkpoint_every=1"), before=_spoil_a_sample
    )
    assert code == 2 and "sample 7 (" in said and "text is not finite" in said and "Traceback" not in said, said[-2000:]


def test_nan_in_a_feature_is_told_by_the_process_that_met_it(store, tmp_path):
    """Whichever it is; the other one does not hang beyond the launcher's end of it."""
    both = Processes(*settings(store, tmp_path / "run", "steps=30"), processes=2, before=_spoil_a_sample)
    told = lambda: any("sample 7 (" in both.output(rank) for rank in (0, 1))  # noqa: E731
    code, _ = both.wait()
    assert code and told()


def _kill_a_worker():
    """The process that prepares the sixth step is killed, as by a kernel that is out of memory."""
    multiprocessing.set_start_method("fork", force=True)
    for kind in (features.FeaturesSource, ScenesSource):
        plan = kind.plan

        def dying(self, step, plan=plan):
            if step == 6 and get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return plan(self, step)

        kind.plan = dying


def test_a_loader_worker_that_is_killed(store, tmp_path):
    output = tmp_path / "run"
    common = settings(store, output, "steps=12", "checkpoint_every=2")
    code, said = run(*common, "data.workers=2", before=_kill_a_worker)
    assert code == 3 and "a loader worker died" in said and "Traceback" not in said, said[-2000:]
    assert "going on from step" in finished(*common, "data.workers=1")


def test_a_process_that_dies(store, tmp_path, whole):
    """The one that is left says so and ends; the same command goes on, to the same losses."""
    output = tmp_path / "run"
    common = settings(store, output, "steps=18", "checkpoint_every=4")
    both = Processes(*common, processes=2)
    wait_for((output / "checkpoints" / "step_00000004").exists, both)
    both.send(signal.SIGKILL, 1)
    both.ranks[0].join(120)
    assert both.ranks[0].exitcode == 3, both.output()[-2000:]
    assert "process 0 lost another one" in both.output() and "Traceback" not in both.output()
    assert "going on from step" in finished(*common, processes=2)
    assert losses(output) == losses(whole)


def test_a_store_of_classes_asks_for_a_dit(store, tmp_path):
    code, said = run(*settings(store, tmp_path / "run", "steps=2", "model.kind=dit"))
    assert code == 2 and "choose model.kind=pixart" in said and "Traceback" not in said
    code, said = run("steps=2", "data.source=features", f"output={tmp_path / 'other'}")
    assert code == 2 and "data.store=FOLDER" in said and "Traceback" not in said


def test_prompts_are_painted_by_components_that_are_not_in_the_run(store, model, tmp_path):
    output = tmp_path / "run"
    prompts = "[a red circle, a small blue square on a white background]"
    common = settings(store, output, "steps=6", "sampling.every=3", f"sampling.components={model}")
    finished(*common, f"sampling.prompts={prompts}")
    assert (output / "samples" / "progress.png").is_file() and (output / "samples" / "final.png").is_file()
    recipe = json.loads((output / "final" / "recipe.json").read_text())
    assert recipe["family"] == "embedded"
    weights = load_file(output / "final" / "diffusion_pytorch_model.safetensors")
    assert not any("vae" in name or "encoder." in name for name in weights)
    code, said = run(*settings(store, tmp_path / "other", "steps=6", "sampling.every=3", "sampling.components=nowhere"))
    assert code == 2 and "sampling.components: nowhere" in said and "Traceback" not in said


def test_micro_conditions_from_a_stage_without_them(store, model, tmp_path):
    """As from 256 px to 512: new embedders beside the old weights, told as named, painted with, and on record."""
    first, output = tmp_path / "first", tmp_path / "run"
    wide = ("steps=4", "model.width=48")
    finished(*settings(store, first, *wide))
    options = (f"init_from={first / 'final'}", "model.micro_conditions=original", "sampling.every=2")
    finished(*settings(store, output, *wide, *options, f"sampling.components={model}"))
    recipe = json.loads((output / "final" / "recipe.json").read_text())
    assert recipe["micro_conditions"] == "original"
    before, after = (load_file(folder / "final" / "diffusion_pytorch_model.safetensors") for folder in (first, output))
    new = {name for name in after if "resolution_embedder" in name or "aspect_ratio_embedder" in name}
    assert new and after.keys() - before.keys() == new
    assert (output / "samples" / "progress.png").is_file()

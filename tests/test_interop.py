"""Files: diffusers reads what `Transformer` writes and the reverse, without a warning."""

import json
import logging
import pickle
import re
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import AutoModel, PixArtTransformer2DModel, Transformer2DModel
from huggingface_hub.errors import EntryNotFoundError

from pixart_fast import Transformer, interop

CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "caption_channels": 20,
    "interpolation_scale": 0.5,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@contextmanager
def no_warning():
    """Fails where diffusers' log or Python's warnings have something to say."""
    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert not heard, heard


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture
def ours() -> Transformer:
    torch.manual_seed(0)
    return Transformer(**CONFIG)


@pytest.fixture
def theirs() -> PixArtTransformer2DModel:
    torch.manual_seed(1)
    return PixArtTransformer2DModel(**CONFIG)


def test_config_file_is_that_of_diffusers(ours, theirs, tmp_path):
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours/config.json").read_bytes() == (tmp_path / "theirs/config.json").read_bytes()
    assert sorted(f.name for f in (tmp_path / "ours").iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    ("options", "safe_serialization"),
    [({}, True), ({"max_shard_size": "20KB"}, True), ({"variant": "fp16"}, True), ({}, False)],
    ids=["one file", "shards", "variant", "pickle"],
)
def test_files_go_both_ways_without_a_warning(ours, theirs, tmp_path, low_cpu_mem_usage, options, safe_serialization):
    load = {"low_cpu_mem_usage": low_cpu_mem_usage, **{k: v for k, v in options.items() if k == "variant"}}
    for saved, reader in ((ours, PixArtTransformer2DModel), (theirs, Transformer), (ours, Transformer)):
        folder = tmp_path / f"{type(saved).__name__} to {reader.__name__}"
        with no_warning() if safe_serialization else nullcontext():  # diffusers warns of every pickle
            saved.save_pretrained(folder, safe_serialization=safe_serialization, **options)
            loaded = reader.from_pretrained(folder, **load)
        assert type(loaded) is reader and same(loaded, saved) and not loaded.training
    if "max_shard_size" in options:
        (index,) = folder.glob("*.index.json")
        shards = set(json.loads(index.read_text())["weight_map"].values())
        assert len(shards) > 1 and all((folder / shard).is_file() for shard in shards)
    if "variant" in options:
        assert [f.name for f in folder.glob("*model*")] == ["diffusion_pytorch_model.fp16.safetensors"]
        with pytest.raises(OSError, match="no file named"):
            Transformer.from_pretrained(folder)


def test_sharded_variant(ours, tmp_path):
    ours.save_pretrained(tmp_path, max_shard_size="20KB", variant="ema")
    files = [f.name for f in tmp_path.iterdir() if f.name != "config.json"]
    assert len(files) > 2 and all(".ema" in name for name in files)
    assert same(Transformer.from_pretrained(tmp_path, variant="ema"), ours)


def test_saving_again_leaves_no_old_shards(ours, tmp_path):
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    ours.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*-of-*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(ours, tmp_path, dtype):
    ours.to(dtype).save_pretrained(tmp_path / "model")
    for low_cpu_mem_usage in (True, False):
        loaded = Transformer.from_pretrained(
            tmp_path, subfolder="model", torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert loaded.dtype == dtype and same(loaded, ours)
    assert same(Transformer.from_pretrained(tmp_path / "model", dtype=dtype), ours)


def test_device_map(ours, tmp_path):
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    for device_map in ("auto", "balanced", "cpu"):
        assert same(Transformer.from_pretrained(tmp_path, device_map=device_map), ours)


def test_offload_to_disk(ours, tmp_path):
    """Part of the model stays on disk; accelerate moves whole blocks (`_no_split_modules`) in and out."""
    ours.save_pretrained(tmp_path / "model")
    size = sum(t.numel() * t.element_size() for t in ours.state_dict().values())
    loaded = Transformer.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert not [name for name in loaded.hf_device_map if re.match(r"transformer_blocks\.\d+\.", name)], (
        "a block is split"
    )
    arguments = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.tensor([3, 4]),
    }
    with torch.no_grad():
        torch.testing.assert_close(loaded(**arguments).sample, ours.eval()(**arguments).sample)


def test_classes_are_mapped(ours, theirs, tmp_path):
    ours.save_pretrained(tmp_path)
    for loaded in (AutoModel.from_pretrained(str(tmp_path)), Transformer2DModel.from_pretrained(tmp_path)):
        assert type(loaded) is PixArtTransformer2DModel and same(loaded, ours)
    assert type(Transformer2DModel.from_config(CONFIG | {"norm_type": "ada_norm_single"})) is PixArtTransformer2DModel
    # Published files name the class under which diffusers had the model at first.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    assert same(Transformer.from_pretrained(tmp_path), ours)


def test_from_config(ours, theirs):
    for config in (ours.config, theirs.config):
        with no_warning():
            model = Transformer.from_config(config)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
        assert model.config.interpolation_scale == 0.5
    assert json.loads(Transformer.from_config(ours.config).to_json_string()) == json.loads(theirs.to_json_string())


def test_published_config_with_unknown_keys_loads(ours, tmp_path):
    """The published transformers' config.json carries keys of the old class, which diffusers ignores with a notice."""
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_vector_embeds": None, "only_cross_attention": False, "double_self_attention": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(Transformer.from_pretrained(tmp_path), ours)


def test_loading_info_and_missing_weights(ours, tmp_path):
    ours.null_caption = torch.ones(4, 20)
    ours.save_pretrained(tmp_path)
    loaded, info = Transformer.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == [] and loaded.null_caption.sum() == 80


def test_adaln_model_is_saved_under_its_own_name(tmp_path):
    model = Transformer(**CONFIG, modulation="adaln")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "Transformer" and config["modulation"] == "adaln"
    with no_warning():
        loaded = Transformer.from_pretrained(tmp_path)
    assert same(loaded, model) and loaded.config.modulation == "adaln"


def test_null_caption_stays_beside_the_weights(ours, tmp_path):
    assert ours.null_caption is None
    ours.null_caption = torch.randn(6, 20)
    keys = ours.state_dict().keys()
    ours.save_pretrained(tmp_path / "sub")
    assert "null_caption" not in keys
    loaded = Transformer.from_pretrained(tmp_path, subfolder="sub")
    assert torch.equal(loaded.null_caption, ours.null_caption)
    half = Transformer.from_pretrained(str(tmp_path / "sub"), torch_dtype=torch.float16)
    assert torch.equal(half.null_caption, ours.null_caption.half())
    assert torch.equal(loaded.to(torch.bfloat16).null_caption, ours.null_caption.bfloat16())
    with no_warning():
        PixArtTransformer2DModel.from_pretrained(tmp_path / "sub")


def test_null_caption_is_no_older_than_the_weights(ours, tmp_path):
    ours.null_caption = torch.randn(6, 20)
    ours.save_pretrained(tmp_path)
    ours.null_caption = None
    ours.save_pretrained(tmp_path, is_main_process=False)
    assert Transformer.from_pretrained(tmp_path).null_caption is not None, "only the main process writes"
    ours.save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).null_caption is None


def test_null_caption_of_a_model_on_the_hub(ours, tmp_path, monkeypatch):
    """The hub is played by a folder: same arguments, same error for a file that is not there."""
    ours.null_caption = torch.randn(6, 20)
    ours.save_pretrained(tmp_path / "transformer")
    asked = {}

    def download(repository: str, name: str, **options) -> str:
        asked.update(options, repository=repository)
        path = tmp_path / options["subfolder"] / name
        if not path.is_file():
            raise EntryNotFoundError(f"no {name}")
        return str(path)

    monkeypatch.setattr(interop, "hf_hub_download", download)
    options = {"subfolder": "transformer", "revision": "main", "torch_dtype": torch.float16}
    assert interop._null_caption_path("someone/model", options) == tmp_path / "transformer/null_caption.safetensors"
    assert asked == {"repository": "someone/model", "subfolder": "transformer", "revision": "main"}
    assert interop._null_caption_path("someone/model", {"subfolder": "elsewhere"}) is None


def test_copies_and_pickles(ours):
    assert same(pickle.loads(pickle.dumps(ours)), ours)


def test_a_file_where_the_folder_should_be(ours, tmp_path):
    """diffusers logs an error and returns; the file stays as it is."""
    path = tmp_path / "file"
    path.write_text("mine")
    ours.save_pretrained(path)
    assert path.read_text() == "mine"

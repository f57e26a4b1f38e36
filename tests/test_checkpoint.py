"""Checkpoints: official and diffusers' forms there and back, a DiT re-parameterised, files that must not be trusted."""

import json
import os
import pickle
import re
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from pixart_fast import DiT, Transformer, load_transformer, reparameterize, save_official
from pixart_fast.checkpoint import main, reparameterization_error

CAPTION = 20
LAYERS = {  # official name: (rows, columns) as multiples of the width, or numbers of their own
    "t_embedder.mlp.0": ("D", 256),
    "t_embedder.mlp.2": ("D", "D"),
    "t_block.1": ("6D", "D"),
    "y_embedder.y_proj.fc1": ("D", CAPTION),
    "y_embedder.y_proj.fc2": ("D", "D"),
    "final_layer.linear": (32, "D"),
}
BLOCK_LAYERS = {
    "attn.qkv": ("3D", "D"),
    "attn.proj": ("D", "D"),
    "cross_attn.q_linear": ("D", "D"),
    "cross_attn.kv_linear": ("2D", "D"),
    "cross_attn.proj": ("D", "D"),
    "mlp.fc1": ("4D", "D"),
    "mlp.fc2": ("D", "4D"),
}
SIZE_LAYERS = {
    f"{name}.mlp.{i}": ("D/3", 256 if i == 0 else "D/3") for name in ("csize_embedder", "ar_embedder") for i in (0, 2)
}


def position_table(grid, width, scale):
    """The published table in NumPy: columns first, sines before cosines."""
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    place = np.arange(grid) / scale
    rows, columns = (axis.reshape(-1, 1) * omega for axis in np.meshgrid(place, place, indexing="ij"))
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return torch.from_numpy(table).float()[None]


def official_weights(width=144, depth=2, *, micro=True, length=120, grid=8, scale=1, dtype=torch.float32, seed=0):
    """An official state dict, written down from the official names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"D": width, "2D": 2 * width, "3D": 3 * width, "4D": 4 * width, "6D": 6 * width, "D/3": width // 3}
    layers = LAYERS | (SIZE_LAYERS if micro else {})
    layers |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in BLOCK_LAYERS.items()}
    shapes = {name: tuple(sizes.get(n, n) for n in shape) for name, shape in layers.items()}
    shapes["x_embedder.proj"] = (width, 4, 2, 2)
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / np.prod(shape[1:]) ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    for name, rows in [("final_layer", 2), *((f"blocks.{i}", 6) for i in range(depth))]:
        weights[f"{name}.scale_shift_table"] = torch.randn(rows, width, generator=generator) / width**0.5
    if length:
        weights["y_embedder.y_embedding"] = torch.randn(length, CAPTION, generator=generator)
    weights["pos_embed"] = position_table(grid, width, scale)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def diffusers_weights(official):
    """An official state dict by diffusers' names: one rule after another on the text of each name."""
    rules = [
        (r"^x_embedder", "pos_embed"),
        (r"^y_embedder\.y_proj\.fc", "caption_projection.linear_"),
        (r"^t_embedder\.mlp", "adaln_single.emb.timestep_embedder"),
        (r"^csize_embedder\.mlp", "adaln_single.emb.resolution_embedder"),
        (r"^ar_embedder\.mlp", "adaln_single.emb.aspect_ratio_embedder"),
        (r"embedder\.0\.", "embedder.linear_1."),
        (r"embedder\.2\.", "embedder.linear_2."),
        (r"^t_block\.1", "adaln_single.linear"),
        (r"^final_layer\.linear", "proj_out"),
        (r"^final_layer\.", ""),
        (r"^blocks", "transformer_blocks"),
        (r"\.cross_attn\.proj", ".attn2.to_out.0"),
        (r"\.cross_attn\.q_linear", ".attn2.to_q"),
        (r"\.cross_attn\.", ".attn2."),
        (r"\.attn\.proj", ".attn1.to_out.0"),
        (r"\.attn\.", ".attn1."),
        (r"\.mlp\.fc1", ".ff.net.0.proj"),
        (r"\.mlp\.fc2", ".ff.net.2"),
    ]
    renamed = {}
    for name, tensor in official.items():
        if name in ("pos_embed", "y_embedder.y_embedding"):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        fused = re.search(r"\.(qkv|kv_linear)\.", name)
        parts = fused[1].removesuffix("_linear") if fused else ""
        for i, part in enumerate(parts):
            rows = tensor.shape[0] // len(parts)
            renamed[name.replace(fused[1], f"to_{part}")] = tensor[i * rows : (i + 1) * rows]
        if not fused:
            renamed[name] = tensor
    return renamed


def oracle(official, width=144, heads=2, sample_size=16, scale=1, micro=True):
    """diffusers' model with an official state dict in it."""
    model = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_layers=2,
        cross_attention_dim=width,
        sample_size=sample_size,
        caption_channels=CAPTION,
        interpolation_scale=scale,
        use_additional_conditions=micro,
    )
    model.load_state_dict(diffusers_weights(official))
    return model.eval()


def run(model, size=16, micro=True):
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, size, size, generator=generator).to(model.dtype)
    text = torch.randn(2, 5, CAPTION, generator=generator).to(model.dtype)
    added = (
        {"resolution": torch.tensor([[128.0, 96.0]] * 2), "aspect_ratio": torch.tensor([[1.3]] * 2)} if micro else {}
    )
    if not micro:
        added = {"resolution": None, "aspect_ratio": None}
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        return model(latents, text, torch.tensor([10, 900]), added, encoder_attention_mask=mask).sample


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def save(weights, path):
    torch.save({"state_dict": weights}, path)
    return path


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        if name == "pos_embed":
            assert (actual[name] - tensor).abs().max() <= 1e-6
        else:
            assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    "config",
    [
        {},  # α with micro-conditions
        {"micro": False, "length": 300, "scale": 0.5},  # Σ
        {"dtype": torch.float16, "scale": 2},
        {"dtype": torch.bfloat16, "micro": False, "length": None},  # without the caption embedding
    ],
)
def test_round_trip_loses_nothing(tmp_path, config):
    official = official_weights(**config)
    first = load_transformer(save(official, tmp_path / "official.pth"))
    first.save_pretrained(tmp_path / "folder")
    second = load_transformer(tmp_path / "folder")
    save_official(second, tmp_path / "back" / "official.pth")
    assert_same(torch.load(tmp_path / "back" / "official.pth")["state_dict"], official)
    assert_same(second.state_dict(), diffusers_weights(official))
    third = Transformer.from_pretrained(tmp_path / "folder", torch_dtype=config.get("dtype"))
    if config.get("length", 120):
        assert torch.equal(third.null_caption, official["y_embedder.y_embedding"])
    assert first.config.interpolation_scale == config.get("scale", 1)
    assert os.listdir(tmp_path / "back") == ["official.pth"]


@pytest.mark.parametrize(("width", "heads", "micro"), [(144, 2, True), (24, 3, False)])
def test_model_computes_what_diffusers_computes(tmp_path, width, heads, micro):
    official = official_weights(width, micro=micro, scale=2, length=None)
    model = load_transformer(save(official, tmp_path / "official.pth"), num_attention_heads=heads)
    expected = run(oracle(official, width, heads, scale=2, micro=micro), micro=micro)
    assert relative_error(run(model, micro=micro), expected) <= 1e-5
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_diffusers_loads_what_we_saved_without_a_warning(tmp_path, caplog, recwarn):
    official = official_weights()
    model = load_transformer(save(official, tmp_path / "official.pth"))
    model.save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder" / "null_caption.safetensors").is_file()
    diffusers.utils.logging.enable_propagation()
    try:
        loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "folder")
    finally:
        diffusers.utils.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []
    assert [str(warning.message) for warning in recwarn] == []
    assert relative_error(run(loaded), run(oracle(official))) == 0
    assert relative_error(run(model), run(loaded)) <= 1e-5


def test_every_form_of_a_source(tmp_path):
    official = official_weights()
    expected = diffusers_weights(official)
    torch.save(
        {"state_dict": official, "state_dict_ema": {}, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "a.pth"
    )
    torch.save(official, tmp_path / "bare.pth")
    torch.save({"state_dict": official}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {f"module._orig_mod.{k}": v for k, v in official.items()}}, tmp_path / "wrapped.pth")
    blocks = {re.sub(r"^(blocks\.\d)", r"\1._orig_mod", k): v for k, v in official.items()}
    torch.save(blocks, tmp_path / "compiled.pth")
    save_file(official, tmp_path / "official.safetensors")
    sources = [tmp_path / name for name in ("a.pth", "bare.pth", "old.pth", "wrapped.pth", "compiled.pth")]
    sources += [str(tmp_path / "official.safetensors"), official, {"state_dict": official}]
    for source in sources:
        model = load_transformer(source)
        assert_same(model.state_dict(), expected)
        assert torch.equal(model.null_caption, official["y_embedder.y_embedding"])

    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    file = tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    for source in (tmp_path / "pipeline", file, tmp_path / "sharded", tmp_path / "bin", tmp_path / "variant"):
        model = load_transformer(source)
        assert_same(model.state_dict(), expected)
        assert torch.equal(model.null_caption, official["y_embedder.y_embedding"]), source
        assert model.config.sample_size == 16
    assert_same(load_transformer(expected, sample_size=16).state_dict(), expected)


def test_loading_copies(tmp_path):
    official = official_weights()
    save(official, tmp_path / "official.pth")
    for source in (official, tmp_path / "official.pth"):
        model = load_transformer(source)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for tensor in official.values():
            tensor.zero_()
        (tmp_path / "official.pth").write_bytes(b"\0" * (tmp_path / "official.pth").stat().st_size)
        assert_same(model.state_dict(), expected)
        save(official_weights(), tmp_path / "official.pth")


def test_ema_is_taken_when_asked_for(tmp_path):
    trained, average = official_weights(seed=1), official_weights(seed=2)
    torch.save({"state_dict": trained, "state_dict_ema": average}, tmp_path / "both.pth")
    assert_same(load_transformer(tmp_path / "both.pth").state_dict(), diffusers_weights(trained))
    assert_same(load_transformer(tmp_path / "both.pth", ema=True).state_dict(), diffusers_weights(average))
    save(trained, tmp_path / "one.pth")
    for source in (tmp_path / "one.pth", trained):
        with pytest.raises(ValueError, match="has no state_dict_ema or ema: take its only weights, without ema"):
            load_transformer(source, ema=True)
    with pytest.raises(ValueError, match="has no state_dict or model, only state_dict_ema: pass ema=True"):
        load_transformer({"state_dict_ema": average})


@pytest.mark.parametrize("scale", [0.5, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_table_tells_size_and_scale(scale, dtype):
    model = load_transformer(official_weights(24, depth=1, scale=scale, grid=6, dtype=dtype), num_attention_heads=1)
    assert (model.config.sample_size, model.config.interpolation_scale) == (12, scale)


@pytest.mark.parametrize(
    ("length", "sample_size", "scale"),
    [(120, 32, 1), (120, 64, 1), (120, 128, 2), (300, 32, 0.5), (300, 128, 2), (300, 256, 4)],
)
def test_without_a_position_table_the_family_tells_the_scale(length, sample_size, scale):
    weights = official_weights(24, depth=1, length=length)
    del weights["pos_embed"]
    with pytest.raises(ValueError, match="pass sample_size="):
        load_transformer(weights, num_attention_heads=1)
    model = load_transformer(weights, num_attention_heads=1, sample_size=sample_size)
    assert model.config.interpolation_scale == scale


def test_an_unknown_position_table_warns():
    weights = official_weights(24, depth=1, scale=3)
    with pytest.warns(UserWarning, match="none of the tables"):
        assert load_transformer(weights, num_attention_heads=1).config.interpolation_scale == 1


def test_config_is_read_off_the_tensors_and_explicit_config_wins(tmp_path):
    config = load_transformer(official_weights(depth=3, micro=False)).config
    expected = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 72, "cross_attention_dim": 144}
    expected |= {"in_channels": 4, "out_channels": 8, "patch_size": 2, "caption_channels": CAPTION, "sample_size": 16}
    expected |= {"use_additional_conditions": False, "attention_bias": True, "modulation": "adaln_single"}
    assert {name: config[name] for name in expected} == expected
    model = load_transformer(official_weights(), num_attention_heads=9, interpolation_scale=4, sample_size=32)
    assert (model.config.attention_head_dim, model.pos_embed.interpolation_scale, model.config.sample_size) == (
        16,
        4,
        32,
    )
    model.save_pretrained(tmp_path)
    assert load_transformer(tmp_path, interpolation_scale=3).pos_embed.interpolation_scale == 3
    assert load_transformer(official_weights(24), attention_head_dim=8).config.num_attention_heads == 3


def test_a_folder_of_an_older_diffusers_class_loads(tmp_path):
    official = official_weights(micro=False)
    model = load_transformer(official)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("use_additional_conditions", "interpolation_scale"):
        del config[name]
    config |= {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_transformer(tmp_path)
    assert_same(loaded.state_dict(), diffusers_weights(official))
    assert loaded.pos_embed.interpolation_scale == 1


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "blocks.1.attn.qkv.bias"), r"missing: blocks\.1\.attn\.qkv\.bias\."),
        (lambda w: without(w, *(k for k in w if "cross_attn" in k)), r"missing: .*cross_attn.*\(12 in all\)"),
        (lambda w: without(w, "x_embedder.proj.weight"), r"missing: pos_embed\.proj\.weight"),
        (lambda w: w | {"surprise": torch.zeros(1)}, r"left over: surprise\."),
        (
            lambda w: w | {"t_block.1.bias": torch.zeros(5)},
            r"adaln_single\.linear\.bias is \[5\] in the checkpoint and \[864\]",
        ),
        (lambda w: w | {"x_embedder.proj.weight": torch.zeros(5)}, r"is \[5\] in the checkpoint, where 4 dim"),
        (lambda w: w | {"pos_embed": torch.zeros(1, 5, 144)}, r"not square .*pass sample_size="),
        (lambda w: w | {"blocks.0.attn.q_norm.weight": torch.zeros(72)}, r"query-key norm.*: blocks\.0\.attn\.q_norm"),
        (lambda w: w | {"blocks.0.attn.sr.weight": torch.zeros(72)}, r"key-value compression.*blocks\.0\.attn\.sr"),
        (lambda w: w | {"controlnet.0.bias": torch.zeros(72)}, r"a ControlNet"),
        (lambda w: {"model.diffusion_model.a": torch.zeros(1)}, r"not a PixArt transformer; it has model\.diffusion"),
        (lambda w: DiT(8, hidden_size=24, depth=1, num_heads=1).state_dict(), r"class-conditional DiT.*reparameterize"),
        (lambda w: {}, "holds no state dict"),
        (lambda w: {"state_dict": {"epoch": 3}}, "holds no state dict"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_transformer(change(official_weights()))


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"width 24 does not divide into heads of 72: pass num_attention_heads="):
        load_transformer(official_weights(24))
    with pytest.raises(ValueError, match="width 144 does not divide into 5 heads"):
        load_transformer(official_weights(), num_attention_heads=5)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, kind):
    file, mark = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"state_dict": official_weights(24, depth=1), "epoch": Payload(mark)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content["epoch"], protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"needs more than tensors \(it asks for posix\.mkdir\).*not loaded"):
        load_transformer(file)
    assert not mark.exists()
    if kind == "zip":  # the payload is live: a loader that trusts the file runs it
        torch.load(file, weights_only=False)
        assert mark.exists()


def test_damaged_and_foreign_files_are_explained(tmp_path):
    whole = save(official_weights(24, depth=1), tmp_path / "whole.pth").read_bytes()
    torch.save(official_weights(24, depth=1), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    save_file(official_weights(24, depth=1), tmp_path / "whole.safetensors")
    garbled = bytearray(whole)
    garbled[100:200] = bytes(range(100))
    contents = {
        "half.pth": (whole[: len(whole) // 2], "damaged or cut short"),
        "end.pth": (whole[:-1], "damaged or cut short"),
        "start.pth": (whole[:70], "damaged or cut short"),
        "garbled.pth": (bytes(garbled), "damaged or cut short"),
        "oldhalf.pth": (old[: len(old) // 2], "damaged or cut short"),
        "oldstart.pth": (old[:40], "damaged or cut short"),
        "empty.pth": (b"", "not a PyTorch checkpoint"),
        "page.pth": (b"<html>404</html>", "not a PyTorch checkpoint"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "half.safetensors": ((tmp_path / "whole.safetensors").read_bytes()[:5000], "damaged or not a safetensors"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_transformer(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not named tensors"):
        load_transformer(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        load_transformer(tmp_path / "nowhere.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="not a diffusers model folder"):
        load_transformer(tmp_path / "folder")


def test_a_missing_shard_is_named(tmp_path):
    load_transformer(official_weights()).save_pretrained(tmp_path, max_shard_size="500KB")
    shard = sorted(tmp_path.glob("diffusion*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_transformer(tmp_path)


def test_adaln_models_keep_to_our_own_format(tmp_path):
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "num_layers": 2, "cross_attention_dim": 144, "caption_channels": CAPTION}
    model = Transformer(**config, sample_size=16, use_additional_conditions=False, modulation="adaln").eval()
    model.save_pretrained(tmp_path / "folder")
    loaded = load_transformer(tmp_path / "folder")
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(run(loaded, micro=False), run(model, micro=False))
    assert load_transformer(model.state_dict(), sample_size=16).config.modulation == "adaln"
    with pytest.raises(ValueError, match=r"the official format has no modulation='adaln'"):
        save_official(model, tmp_path / "official.pth")
    assert not (tmp_path / "official.pth").exists()


def test_save_official_refuses_what_it_would_lose(tmp_path):
    config = {"num_attention_heads": 2, "num_layers": 1, "cross_attention_dim": 144, "sample_size": 16}
    with pytest.raises(ValueError, match=r"has no attention_bias=False, caption_channels=None"):
        save_official(Transformer(**config, attention_bias=False), tmp_path / "official.pth")
    model = Transformer(**config, caption_channels=CAPTION)
    model.transformer_blocks[0].attn1.to_q.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"no place for .*attn1\.to_q\.extra\.bias"):
        save_official(model, tmp_path / "official.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 2_000_000])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, size):
    model = load_transformer(official_weights(24, depth=1), num_attention_heads=1)
    save_official(model, tmp_path / "official.pth")
    before = (tmp_path / "official.pth").read_bytes()

    def to_full_disk(obj, file):
        file.write_bytes(before[:1000])
        write({"a": torch.ones(size)}, "/dev/full")  # raises for the large tensor, and for the small one nothing

    write = torch.save
    monkeypatch.setattr(torch, "save", to_full_disk)
    with pytest.raises(OSError, match=r"official\.pth could not be written: is the disk full"):
        save_official(model, tmp_path / "official.pth")
    assert (tmp_path / "official.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["official.pth"]


def random_dit(width=144, heads=2, **config):
    torch.manual_seed(1)
    model = DiT(16, hidden_size=width, depth=3, num_heads=heads, num_classes=5, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return model.eval()


@pytest.mark.parametrize("null", ["zero", "class"])
@pytest.mark.parametrize(("width", "heads", "timestep"), [(144, 2, 500), (24, 3, 120)])
def test_reparameterized_model_equals_the_dit_at_its_timestep(null, width, heads, timestep):
    dit = random_dit(width, heads)
    weights = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    model = reparameterize(
        dit.state_dict(), caption_channels=CAPTION, num_attention_heads=heads, timestep=timestep, null=null
    )
    assert_same(dit.state_dict(), weights)  # the DiT is left alone
    if null == "zero":
        torch.nn.init.zeros_(dit.y_embedder.embedding_table.weight)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, CAPTION)
    errors = {}
    for t in (timestep, timestep + 100):
        times = torch.full((2,), t)
        expected = dit(latents, times, torch.full((2,), 5))
        errors[t] = relative_error(model(latents, text, times).sample, expected)
    assert errors[timestep] <= 1e-5 < 1e-2 < errors[timestep + 100]
    assert torch.count_nonzero(model.transformer_blocks[0].scale_shift_table) == 0
    assert (model.config.sample_size, model.config.interpolation_scale) == (16, 1)


def test_reparameterized_layers_that_a_dit_lacks_start_as_published():
    weights = random_dit().state_dict()
    model = reparameterize(weights, caption_channels=CAPTION, num_attention_heads=2, use_additional_conditions=True)
    for block in model.transformer_blocks:
        assert block.attn2.to_out[0].weight.abs().max() == 0 and block.attn2.to_q.weight.std() > 0.05
    for layer in (model.caption_projection.linear_2, model.adaln_single.emb.resolution_embedder.linear_1):
        assert abs(layer.weight.std().item() / 0.02 - 1) < 0.05 and layer.bias.abs().max() == 0


def test_reparameterization_error_is_that_of_the_two_models():
    dit = random_dit()
    model = reparameterize(dit.state_dict(), caption_channels=CAPTION, num_attention_heads=2, null="class")
    errors = reparameterization_error(dit.state_dict(), model, (499, 500, 900), null="class")
    assert errors[500] <= 1e-5 < errors[499] < errors[900] < 2
    assert reparameterization_error(dit.state_dict(), model, (500,), null="zero")[500] > 1e-3
    half = {name: tensor.half() for name, tensor in dit.state_dict().items()}
    model = reparameterize(half, caption_channels=CAPTION, num_attention_heads=2)
    assert model.dtype == torch.float16
    assert reparameterization_error(half, model, (500,))[500] < 5e-3


def test_reparameterize_explains_mistakes():
    weights = random_dit().state_dict()
    config = {"caption_channels": CAPTION, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="null must be 'zero' or 'class', got 'none'"):
        reparameterize(weights, **config, null="none")
    with pytest.raises(ValueError, match="timestep must be from 0 to 999, got 1000"):
        reparameterize(weights, **config, timestep=1000)
    with pytest.raises(ValueError, match="not a DiT checkpoint"):
        reparameterize(official_weights(), **config)
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.attn\.proj\.bias"):
        reparameterize(without(weights, "blocks.2.attn.proj.bias"), **config)


def test_command_line_converts_both_ways(tmp_path, capsys):
    official = official_weights(dtype=torch.float16)
    source, folder, back = (str(tmp_path / name) for name in ("official.pth", "folder", "back.pth"))
    torch.save({"state_dict": {}, "state_dict_ema": official}, source)
    main(["convert", source, folder, "--to", "diffusers", "--ema"])
    main(["convert", folder, back, "--to", "official"])
    assert_same(torch.load(back)["state_dict"], official)
    assert capsys.readouterr().out == f"wrote {folder}\nwrote {back}\n"
    assert sorted(os.listdir(tmp_path)) == ["back.pth", "folder", "official.pth"]

    main(
        [
            "convert",
            folder,
            str(tmp_path / "other"),
            "--to",
            "diffusers",
            "--heads",
            "4",
            "--interpolation-scale",
            "0.5",
        ]
    )
    model = PixArtTransformer2DModel.from_pretrained(tmp_path / "other")
    assert (model.config.num_attention_heads, model.config.interpolation_scale) == (4, 0.5)


def test_command_line_reparameterizes(tmp_path, capsys):
    random_dit().save(tmp_path / "dit.pt")
    arguments = ["--timestep", "411", "--null", "class", "--caption-channels", str(CAPTION), "--heads", "2"]
    for name in ("one", "two"):
        main(["reparameterize", str(tmp_path / "dit.pt"), str(tmp_path / name), *arguments])
    rows = dict(re.findall(r"^ +(\d+)  (\d\.\d+e[-+]\d+)$", capsys.readouterr().out, re.MULTILINE))
    assert float(rows["411"]) <= 1e-5 and float(rows["750"]) > 1e-3 and len(rows) == 8
    one, two = (load_transformer(tmp_path / name).state_dict() for name in ("one", "two"))
    assert_same(one, two)  # seeded
    assert one["caption_projection.linear_1.weight"].shape == (144, CAPTION)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere.pth", "new", "--to", "diffusers"], "nowhere.pth does not exist"),
        (["convert", "page.pth", "new", "--to", "official"], "not a PyTorch checkpoint"),
        (["convert", "page.pth", "page.pth", "--to", "official"], "page.pth exists already"),
        (["convert", "page.pth", "new", "--to", "flux"], "invalid choice: 'flux'"),
        (["reparameterize", "official.pth", "new"], "not a DiT checkpoint"),
        (["reparameterize", "dit.pt", "new"], "pass --heads"),
    ],
)
def test_command_line_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pth").write_text("<html>")
    save(official_weights(24, depth=1), tmp_path / "official.pth")
    random_dit().save(tmp_path / "dit.pt")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_command_line_reports_a_folder_that_could_not_be_written(tmp_path, monkeypatch, capsys):
    def full(model, folder):
        folder.mkdir()
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(Transformer, "save_pretrained", full)
    save(official_weights(depth=1), tmp_path / "official.pth")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "official.pth"), str(tmp_path / "folder"), "--to", "diffusers"])
    assert "folder could not be written (No space left on device)." in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["official.pth"]


def test_module_runs_as_a_program(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pixart_fast.checkpoint",
        "convert",
        "nowhere.pth",
        str(tmp_path / "x"),
        "--to",
        "official",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "python -m pixart_fast.checkpoint: nowhere.pth does not exist.\n"

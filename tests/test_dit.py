"""DiT against diffusers' `DiTTransformer2DModel`, its published start, its files, and what it refuses."""

import argparse

import pytest
import torch
from diffusers import DiTTransformer2DModel

from pixart_fast import DiT
from pixart_fast.layers import sinusoid

TINY = {"input_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
BLOCK_KEYS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]


def random_dit(**config):
    """A DiT in which nothing is zero, so that every parameter matters."""
    model = DiT(**{**TINY, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return model.eval()


def to_diffusers(weights, depth):
    """The original names by diffusers' names; diffusers keeps a copy of both embedders in every block."""
    layers = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    layers["proj_out_2"] = "final_layer.linear"
    mapped = {}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        layers[f"{block}.norm1.emb.timestep_embedder.linear_1"] = "t_embedder.mlp.0"
        layers[f"{block}.norm1.emb.timestep_embedder.linear_2"] = "t_embedder.mlp.2"
        layers[f"{block}.norm1.linear"] = f"blocks.{i}.adaLN_modulation.1"
        layers[f"{block}.attn1.to_out.0"] = f"blocks.{i}.attn.proj"
        layers[f"{block}.ff.net.0.proj"] = f"blocks.{i}.mlp.fc1"
        layers[f"{block}.ff.net.2"] = f"blocks.{i}.mlp.fc2"
        table = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
        mapped[table] = weights["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            q, k, v = weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            mapped |= {f"{block}.attn1.to_{n}.{kind}": part for n, part in zip("qkv", (q, k, v), strict=True)}
    for name, original in layers.items():
        mapped |= {f"{name}.{kind}": weights[f"{original}.{kind}"] for kind in ("weight", "bias")}
    return mapped


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "config",
    [
        {},  # heads of 8
        {"hidden_size": 144, "num_heads": 2},  # heads of 72, as in every published model
        {"patch_size": 1, "input_size": 5, "learn_sigma": False, "in_channels": 3},  # odd grid, other channels
    ],
)
def test_output_and_gradients_equal_diffusers(config):
    torch.manual_seed(0)
    model = random_dit(**config)
    width, heads, grid = model.blocks[0].attn.proj.in_features, model.num_heads, model.input_size
    oracle = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=grid,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.y_embedder.num_classes,
        norm_eps=1e-6,
    ).eval()
    for block in oracle.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the original divides by half, diffusers by half - 1
    x = torch.randn(3, model.in_channels, grid, grid)
    t, y = torch.tensor([0, 501, 999]), torch.tensor([4, 0, 5])  # 5 is the null class
    actual = model(x, t, y)
    mapped = to_diffusers(dict(model.named_parameters()), len(model.blocks))
    assert mapped.keys() == dict(oracle.named_parameters()).keys()
    expected = torch.func.functional_call(oracle, mapped, (x, t, y)).sample
    assert relative_error(actual, expected) <= 1e-5

    weight = torch.randn_like(expected)
    parameters = dict(model.named_parameters())
    expected_gradients = torch.autograd.grad((expected * weight).sum(), list(parameters.values()))
    actual_gradients = torch.autograd.grad((actual * weight).sum(), list(parameters.values()))
    for name, ours, theirs in zip(parameters, actual_gradients, expected_gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-5, name


def test_time_enters_the_sinusoid_in_fp32():
    torch.manual_seed(0)
    model = random_dit().bfloat16()
    x, y = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([0])
    at = {t: model(x, torch.tensor([t]), y) for t in (999, 1000)}
    assert not torch.equal(at[999], at[1000])  # bf16 rounds 999 to 1000
    features = model.t_embedder.mlp(sinusoid(torch.tensor([999.0])).bfloat16())
    assert torch.equal(model.t_embedder(torch.tensor([999]), torch.bfloat16), features)


@pytest.mark.parametrize(("name", "count"), [("XL/2", 674_834_720), ("S/2", 32_865_056)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = DiT.preset(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == count + 256 * model.pos_embed.shape[-1]


def test_state_dict_has_the_original_names():
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1", *(f"blocks.{i}.{name}" for i in range(2) for name in BLOCK_KEYS)]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert DiT(**TINY).state_dict().keys() == expected | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_published_initialisation():
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=144, depth=2, num_heads=2)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    assert model(x, t, y).abs().max() == 0
    tokens, c = torch.randn(2, 16, 144), torch.randn(2, 144)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)
    for module in (model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.y_embedder.embedding_table):
        assert abs(module.weight.std().item() / 0.02 - 1) < 0.03
    for weight in (model.blocks[1].mlp.fc1.weight, model.x_embedder.proj.weight.flatten(1)):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))


def test_labels_drop_in_training_only():
    torch.manual_seed(0)
    embedder = random_dit(class_dropout_prob=0.25).y_embedder
    y = torch.zeros(4000, dtype=torch.long)
    null = embedder.embedding_table.weight[5]
    assert torch.equal(embedder(y), embedder.embedding_table(y))
    dropped = (embedder.train()(y) == null).all(1).float().mean().item()
    assert abs(dropped - 0.25) < 0.03  # 4 standard deviations
    mask = torch.arange(4000) % 2 == 0
    assert torch.equal((embedder(y, mask) == null).all(1), mask)
    with pytest.raises(ValueError, match="no null class"):
        DiT(**TINY, class_dropout_prob=0).y_embedder(y, mask)


def test_drop_mask_is_the_null_class():
    torch.manual_seed(0)
    model = random_dit()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    dropped = model(x, t, y, drop_mask=torch.tensor([False, True]))
    assert torch.equal(dropped, model(x, t, torch.tensor([1, 5])))
    assert not torch.equal(dropped, model(x, t, y))


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    torch.manual_seed(0)
    model = random_dit()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(x, t, y).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.enable_gradient_checkpointing()
    assert len(calls) == 3  # once, then forward and backward
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_one_graph():
    torch.manual_seed(0)
    model = random_dit()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(x, t, y), model(x, t, y)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_file_round_trip_is_bit_identical(tmp_path, dtype):
    torch.manual_seed(0)
    model = random_dit(patch_size=4, learn_sigma=False, num_classes=7, mlp_ratio=2).to(dtype)
    model.save(tmp_path / "new" / "dit.pt")
    loaded = DiT.from_file(tmp_path / "new" / "dit.pt", num_heads=3)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name])
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dit.pt"]


def test_training_files_give_the_average_unless_told_otherwise(tmp_path):
    torch.manual_seed(0)
    model, average = random_dit().state_dict(), random_dit().state_dict()
    options = argparse.Namespace(model="DiT-S/2", epochs=3)
    torch.save({"model": model, "ema": average, "opt": {"state": {}}, "args": options}, tmp_path / "0001.pt")
    for ema, expected in ((None, average), (True, average), (False, model)):
        loaded = DiT.from_file(tmp_path / "0001.pt", ema=ema, num_heads=3).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_preset_widths_tell_their_heads(tmp_path):
    DiT.preset("S/2", depth=1, input_size=8, num_classes=2).save(tmp_path / "dit.pt")
    assert DiT.from_file(tmp_path / "dit.pt").num_heads == 6


def test_mistakes_are_explained():
    weights = random_dit().state_dict()
    with pytest.raises(ValueError, match=r"width 24: pass num_heads="):
        DiT.from_state_dict(weights)
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.mlp\.fc1\.bias"):
        DiT.from_state_dict({k: v for k, v in weights.items() if k != "blocks.1.mlp.fc1.bias"}, num_heads=3)
    with pytest.raises(ValueError, match="left over: surprise"):
        DiT.from_state_dict({**weights, "surprise": torch.zeros(1)}, num_heads=3)
    with pytest.raises(ValueError, match=r"embedding_table\.weight is \[6, 24\] in the checkpoint and \[9, 24\]"):
        DiT.from_state_dict(weights, num_heads=3, num_classes=8)
    with pytest.raises(ValueError, match="not a DiT checkpoint"):
        DiT.from_state_dict({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="no DiT-M/2: choose one of XL/2"):
        DiT.preset("M/2")
    with pytest.raises(ValueError, match="divide by num_heads 5"):
        DiT(**{**TINY, "num_heads": 5})
    with pytest.raises(ValueError, match="input_size 9 does not divide by patch_size 2"):
        DiT(**{**TINY, "input_size": 9})
    with pytest.raises(ValueError, match=r"takes latents \[B, 4, 8, 8\], got \[1, 4, 8, 6\]"):
        random_dit()(torch.zeros(1, 4, 8, 6), torch.tensor([0]), torch.tensor([0]))

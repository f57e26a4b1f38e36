"""`Transformer` by itself: the block's equation, captions, the adaLN baseline, initialisation, mistakes of a user."""

import ast
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pixart_fast
from pixart_fast import Transformer, ops
from pixart_fast.config import SIZES, transformer_config
from pixart_fast.layers import CrossAttention, KeysValues, keys_values
from pixart_fast.transformer import AdaLNBlock, Block, Stream, pack_caption

CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "caption_channels": 20,
}


def build(**changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(**CONFIG | changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model.double()


def inputs(batch: int = 2, tokens: int = 5, **changes) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 12, generator=generator, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(batch, tokens, 20, generator=generator, dtype=torch.float64),
        "timestep": 100 + 300 * torch.arange(batch),
        **changes,
    }


def parameters_on_meta(**config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(**config).parameters())


def test_parameter_counts_of_the_paper():
    """Figure of the ablation: 611M against 833M parameters; with micro-conditions those of the multi-scale model."""
    small = {"sample_size": 32, "caption_channels": 4096}
    assert parameters_on_meta(**small) == 610_856_096
    assert parameters_on_meta(**small, modulation="adaln") == 833_213_984
    assert parameters_on_meta(sample_size=128, caption_channels=4096) == 611_349_152
    assert parameters_on_meta(**transformer_config(SIZES["XL"], sample_size=32)) == 610_856_096


def layer_norm(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_block_is_the_equation_of_the_paper():
    block = build().transformer_blocks[1]
    x, shared = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 6, 24, dtype=torch.float64)
    text = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = []
    for sample in range(2):
        y, caption = x[sample : sample + 1], text[sample : sample + 1]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.scale_shift_table + shared[sample]
        y = y + gate_msa * block.attn1(layer_norm(y) * (1 + scale_msa) + shift_msa)
        y = y + block.attn2(y, caption)
        expected.append(y + gate_mlp * block.ff(layer_norm(y) * (1 + scale_mlp) + shift_mlp))
    torch.testing.assert_close(block(Stream(x), shared, text).total(), torch.cat(expected))
    h, gate = torch.randn_like(x), torch.randn(2, 1, 24, dtype=torch.float64)
    for incoming in (Stream(x - h, h), Stream(x - gate * h, h, gate)):
        torch.testing.assert_close(block(incoming, shared, text).total(), torch.cat(expected))
    with torch.no_grad():
        torch.testing.assert_close(block(Stream(x), shared, text).x, torch.cat(expected))


def test_adaln_block_is_the_same_but_for_its_own_modulation():
    block = build(modulation="adaln").transformer_blocks[0]
    assert type(block) is AdaLNBlock and not hasattr(block, "scale_shift_table")
    single = Block(24, 3, 8, 24, bias=True, dropout=0.0, exact_gelu=False, eps=1e-6).double()
    missing, unexpected = single.load_state_dict(block.state_dict(), strict=False)
    assert missing == ["scale_shift_table"] and unexpected == ["adaln.weight", "adaln.bias"]
    nn.init.zeros_(single.scale_shift_table)
    x, text = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    condition = torch.randn(2, 24, dtype=torch.float64)
    shared = block.adaln(condition * torch.sigmoid(condition)).view(2, 6, 24)
    x = Stream(x)
    torch.testing.assert_close(block(x, condition, text).total(), single(x, shared, text).total())


def test_adaln_model_pools_the_kept_tokens_of_the_caption():
    model = build(modulation="adaln")
    arguments = inputs()
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    bias = (1 - mask.double())[:, None] * -10000.0
    expected = model(**arguments, encoder_attention_mask=mask).sample
    torch.testing.assert_close(model(**arguments, encoder_attention_mask=bias).sample, expected)
    kept = arguments["encoder_hidden_states"][:1, mask[0].bool()]
    alone = {name: value[:1] for name, value in arguments.items()} | {"encoder_hidden_states": kept}
    torch.testing.assert_close(model(**alone).sample, expected[:1])
    # Without cross-attention the caption still reaches the picture, through the condition.
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    changed = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"] + 1}
    assert not torch.allclose(model(**arguments).sample, model(**changed).sample)


def test_every_parameter_of_the_adaln_model_has_a_gradient():
    model = build(modulation="adaln", sample_size=128)
    model(**inputs(), added_cond_kwargs={}).sample.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_pack_caption_moves_kept_tokens_to_the_front_in_order():
    text = torch.arange(12.0).view(2, 6, 1)
    packed = pack_caption(text, torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]))
    assert packed.lengths.tolist() == [3, 2] and packed.bias is None
    assert packed.text[0, :3, 0].tolist() == [1, 3, 4] and packed.text[1, :2, 0].tolist() == [6, 7]
    bias = torch.zeros(2, 1, 6)
    assert pack_caption(text, bias).bias is bias and pack_caption(text, None).text is text


def test_padding_cannot_be_seen_and_batch_mates_neither():
    model = build()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    arguments = inputs(encoder_attention_mask=mask)
    expected = model(**arguments).sample
    poisoned = arguments["encoder_hidden_states"].masked_fill(mask[..., None] == 0, float("nan"))
    torch.testing.assert_close(model(**{**arguments, "encoder_hidden_states": poisoned}).sample, expected)
    first = {name: value[:1] for name, value in arguments.items()}
    torch.testing.assert_close(model(**first).sample, expected[:1])


def test_micro_conditions_default_to_the_latents_size():
    model = build(sample_size=128)
    given = {
        "resolution": torch.tensor([[64.0, 96.0]] * 2, dtype=torch.float64),
        "aspect_ratio": torch.tensor([[8 / 12]] * 2, dtype=torch.float64),
    }
    expected = model(**inputs(), added_cond_kwargs=given).sample
    for added in ({}, {"resolution": None, "aspect_ratio": None}):
        torch.testing.assert_close(model(**inputs(), added_cond_kwargs=added).sample, expected, rtol=1e-5, atol=1e-5)
    for name in given:
        other = model(**inputs(), added_cond_kwargs={**given, name: given[name] * 2}).sample
        assert not torch.allclose(other, expected)


def test_unused_null_caption():
    model = build()
    expected = model(**inputs()).sample
    model.null_caption = torch.full((5, 20), float("nan"))
    assert torch.equal(model(**inputs()).sample, expected)


def test_initialize_weights():
    torch.manual_seed(0)
    model = Transformer(**CONFIG | {"num_layers": 3, "sample_size": 128})
    tables = [block.scale_shift_table.clone() for block in model.transformer_blocks]
    assert model.initialize_weights() is model
    small = (model.adaln_single, model.caption_projection)
    small_linears = {m for part in small for m in part.modules() if isinstance(m, nn.Linear)}
    zeros = {block.attn2.to_out[0] for block in model.transformer_blocks} | {model.proj_out}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        assert module.bias.abs().max() == 0, name
        weight = module.weight.flatten(1)
        if module in zeros:
            assert weight.abs().max() == 0, name
        elif module in small_linears:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.9 * bound < weight.abs().max() <= bound, name
    assert all(torch.equal(t, b.scale_shift_table) for t, b in zip(tables, model.transformer_blocks, strict=True))
    assert model.double()(**inputs(), added_cond_kwargs={}).sample.abs().max() == 0


def test_text_enters_gradually_after_initialisation():
    model = Transformer(**CONFIG).initialize_weights()
    block = model.transformer_blocks[0]
    x, shared, text = torch.randn(2, 7, 24), torch.randn(2, 6, 24), torch.randn(2, 5, 24)
    y = block(Stream(x), shared, text).total()
    assert torch.equal(y, block(Stream(x), shared, torch.randn(2, 5, 24)).total())
    assert not torch.equal(y, x)


def test_initial_gate_and_adaln_zero():
    model = Transformer(**CONFIG).initialize_weights(gate=1.0)
    for block in model.transformer_blocks:
        assert (block.scale_shift_table[[2, 5]] == 1).all() and not (block.scale_shift_table[[0, 1, 3, 4]] == 1).any()
    baseline = Transformer(**CONFIG, modulation="adaln").initialize_weights()
    x = torch.randn(2, 7, 24)
    y = baseline.transformer_blocks[0](Stream(x), torch.randn(2, 24), torch.randn(2, 5, 24))
    assert torch.equal(y.total(), x)


def test_chosen_backend_computes(monkeypatch):
    model = build().float()
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in inputs().items()}
    expected = model(**arguments).sample
    seen = []
    computed = ops.modulated_layernorm
    monkeypatch.setattr(
        ops, "modulated_layernorm", lambda *args, backend, **rest: seen.append(backend) or computed(*args, **rest)
    )
    for op in (None, "modulated_layernorm"):
        model.set_backend("auto")
        assert model.set_backend("reference", op=op) is model
        seen.clear()
        torch.testing.assert_close(model(**arguments).sample, expected)
        assert seen == ["reference"] * 5
        cross = [m.backends["cross_attention"] for m in model.modules() if isinstance(m, CrossAttention)]
        assert cross == ["auto" if op else "reference"] * 2
    for wrong in ({"backend": "gpu"}, {"backend": "auto", "op": "attention"}):
        with pytest.raises(ValueError, match=r"backend must be one of auto, reference, .* and op one of"):
            model.set_backend(**wrong)


def test_text_is_projected_once_for_all_blocks_and_steps(monkeypatch):
    model = build()
    arguments = inputs()
    text, mask = arguments.pop("encoder_hidden_states"), torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    products = []
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[1] == 5:  # the caption's tokens
            products.append(weight.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    caption = model.encode_caption(text, mask)
    assert products[2:] == [2 * 2 * 24], "keys and values of two blocks, beside the caption's projection"
    assert caption.lengths.tolist() == [3, 0]
    storages = {t.untyped_storage().data_ptr() for context in caption.context for t in (context.k, context.v)}
    assert len(storages) == 1
    for timestep in (7, 900):
        arguments["timestep"] = torch.full((2,), timestep)
        expected = model(**arguments, encoder_hidden_states=text, encoder_attention_mask=mask).sample
        products.clear()
        assert torch.equal(model(**arguments, encoder_hidden_states=caption).sample, expected)
        assert not products


def test_projected_text_is_what_each_block_projects():
    model = build()
    text = torch.randn(2, 5, 24, dtype=torch.float64)
    layers = [block.attn2 for block in model.transformer_blocks]
    for layer, (k, v, *_) in zip(layers, keys_values(text, layers), strict=True):
        for actual, expected in zip((k, v), layer.project(text), strict=True):
            assert actual.shape == (2, 5, 3, 8)
            torch.testing.assert_close(actual, expected)


def test_a_caption_of_one_token_needs_no_attention(monkeypatch):
    """Its weight is 1 whatever the query: neither query nor output is projected for its sample."""
    model = build()
    arguments = inputs()
    text, mask = arguments.pop("encoder_hidden_states"), torch.tensor([[0, 0, 0, 1, 0], [1, 0, 1, 1, 0]])
    expected = model(**arguments, encoder_hidden_states=text, encoder_attention_mask=mask).sample
    rows = []
    attend = CrossAttention.attend
    monkeypatch.setattr(CrossAttention, "attend", lambda layer, x, *of: rows.append(len(x)) or attend(layer, x, *of))
    caption = model.encode_caption(text, mask, single=1)
    torch.testing.assert_close(model(**arguments, encoder_hidden_states=caption).sample, expected)
    assert rows == [1, 1]


@pytest.mark.parametrize("bias", [True, False])
def test_folded_captions_give_the_same(bias):
    model = build(attention_bias=bias)
    arguments = inputs()
    text, mask = arguments.pop("encoder_hidden_states"), torch.tensor([[0, 0, 0, 1, 0], [1, 0, 1, 1, 0]])
    expected = model(**arguments, encoder_hidden_states=text, encoder_attention_mask=mask).sample
    monkey = [block.attn2.to_q for block in model.transformer_blocks]
    for single in (0, 1):
        caption = model.encode_caption(text, mask, single=single, fold=True)
        assert all(context.k is None and context.folded is not None for context in caption.context)
        for projection in monkey:
            projection.forward = None  # not called
        actual = model(**arguments, encoder_hidden_states=caption).sample
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        for projection in monkey:
            del projection.forward
    model.transformer_blocks[1].attn2.to_q.register_forward_hook(lambda *of: None)
    assert [context.folded is None for context in model.encode_caption(text, mask, fold=True).context] == [False, True]


def test_results_of_cross_attention_can_be_given():
    model = build()
    arguments = inputs()
    text = arguments.pop("encoder_hidden_states")
    results = {}
    for i, block in enumerate(model.transformer_blocks):
        block.attn2.register_forward_hook(lambda module, inputs, output, i=i: results.update({i: output}))
    expected = model(**arguments, encoder_hidden_states=text).sample
    given = [KeysValues(None, None, results[i]) for i in sorted(results)]
    caption = model.encode_caption(text)._replace(context=given)
    assert torch.equal(model(**arguments, encoder_hidden_states=caption).sample, expected)


@pytest.mark.parametrize("change", ["subclass", "hook", "forward", "partitioned"])
def test_a_projection_that_is_more_than_a_linear_layer_is_called(change):
    model = build()
    layers = [block.attn2 for block in model.transformer_blocks]
    projection = layers[1].to_v
    if change == "subclass":
        layers[1].to_v = nn.Sequential(projection)
    elif change == "hook":
        projection.register_forward_hook(lambda module, inputs, output: output + 1)
    elif change == "forward":
        projection.forward = lambda text: nn.Linear.forward(projection, text) + 1
    else:
        projection.weight.data = projection.weight.data[:0]
    text = torch.randn(2, 5, 24, dtype=torch.float64)
    assert keys_values(text, layers) == [text, text]


MISTAKES = {
    "modulation": ({"modulation": "film"}, "modulation must be 'adaln_single' or 'adaln', got 'film'"),
    "norm": ({"norm_type": "ada_norm_zero"}, "norm_type must be 'ada_norm_single'"),
    "norm without embeddings": ({"num_embeds_ada_norm": None}, "with num_embeds_ada_norm set"),
    "affine norm": ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True is not part of PixArt"),
    "gated attention": ({"attention_type": "gated"}, "attention_type must be 'default', got 'gated'"),
    "activation": ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate' or 'gelu', got 'geglu'"),
    "no text width": ({"cross_attention_dim": None}, "cross_attention_dim must be set; .* it is the width, 24"),
    "text width": ({"cross_attention_dim": 32}, "cross_attention_dim is 32, .* = 24: set cross_attention_dim=24"),
    "width by four": (
        {"num_attention_heads": 3, "attention_head_dim": 2, "cross_attention_dim": 6},
        "3 heads x 2 = 6, must divide by 4",
    ),
    "width by three": (
        {"num_attention_heads": 2, "cross_attention_dim": 16, "sample_size": 128},
        "2 heads x 8 = 16 does not divide: set use_additional_conditions=False",
    ),
    "patches": ({"sample_size": 9}, "sample_size 9 does not divide by patch_size 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_config_get_one_sentence(name):
    changes, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as error:
        Transformer(**CONFIG | changes)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_mistakes_in_a_call_get_one_sentence():
    model = build()
    odd = torch.zeros(2, 4, 7, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"latents of \(7, 8\) do not divide by the patch size 2"):
        model(**inputs(hidden_states=odd))
    for name in ("encoder_hidden_states", "timestep"):
        with pytest.raises(ValueError, match=r"forward needs encoder_hidden_states .* and timestep"):
            model(**inputs() | {name: None})
    with pytest.raises(ValueError, match="this model has micro-conditions: pass added_cond_kwargs"):
        build(sample_size=128)(**inputs())
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        Transformer(**CONFIG, depth=3)
    with pytest.warns(UserWarning, match=r"cross_attention_kwargs \['scale'\] have no effect"):
        model(**inputs(), cross_attention_kwargs={"scale": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs(), cross_attention_kwargs={})


def test_no_environment_variable_is_read():
    package = Path(pixart_fast.__file__).parent
    for stem in ("transformer", "layers", "interop", "diffusion", "ops"):
        for node in ast.walk(ast.parse((package / f"{stem}.py").read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert "os" not in names, f"{stem}.py imports os"
            assert not (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")), stem


def test_output_does_not_alias_and_inputs_stay():
    model = build()
    arguments = inputs(encoder_attention_mask=torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]))
    copies = {name: value.clone() for name, value in arguments.items()}
    first = model(**arguments).sample
    first.detach().zero_()
    assert model(**arguments).sample.abs().max() > 0
    assert all(torch.equal(arguments[name], copy) for name, copy in copies.items())


def test_non_contiguous_latents_and_expanded_gradients():
    model = build()
    arguments = inputs()
    strided = arguments["hidden_states"].to(memory_format=torch.channels_last)
    output = model(**{**arguments, "hidden_states": strided}).sample
    torch.testing.assert_close(output, model(**arguments).sample)
    model.zero_grad()
    output.sum().backward()  # a gradient of stride 0
    torch.testing.assert_close(model.proj_out.bias.grad, torch.full((32,), 2.0 * 24, dtype=torch.float64))

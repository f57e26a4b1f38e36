"""`pixart_fast.Transformer` computes what `diffusers.PixArtTransformer2DModel` computes, and answers as it does."""

import copy
from unittest.mock import Mock

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from pixart_fast import Transformer

TOKENS = 7
HOLES = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1]])


def tiny(heads: int = 3, head_dim: int = 8, **changes) -> dict:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": 2,
        "cross_attention_dim": heads * head_dim,
        "sample_size": 8,
        "caption_channels": 20,
        **changes,
    }


def pair(config: dict, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """diffusers' model and ours with the same weights, none of which is zero."""
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(**config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    ours = Transformer(**config)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def inputs(model: nn.Module, height: int = 8, width: int = 8, tokens: int = TOKENS, **changes) -> dict:
    """Arguments of `forward` for a batch of three, drawn from a seed, in the model's dtype."""
    generator = torch.Generator().manual_seed(1)
    config = model.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    added = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        added = {
            "resolution": torch.tensor([[512.0, 768.0], [1024.0, 1024.0], [256.0, 200.0]]).to(model.dtype),
            "aspect_ratio": torch.tensor([[0.67], [1.0], [1.28]]).to(model.dtype),
        }
    return {
        "hidden_states": draw(3, config.in_channels, height, width),
        "encoder_hidden_states": draw(3, tokens, config.caption_channels or config.cross_attention_dim),
        "timestep": torch.tensor([999, 3, 500]),
        "added_cond_kwargs": added,
        **changes,
    }


def run(model: nn.Module, arguments: dict) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients of the parameters and gradients of the inputs under one fixed direction."""
    arguments = dict(arguments)
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
    model.zero_grad()
    output = model(**{**arguments, **leaves}).sample
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    (output * direction).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters()}, {n: x.grad for n, x in leaves.items()}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def bias_mask(mask: Tensor) -> Tensor:
    return ((1 - mask.float()) * -10000.0)[:, None]


CASES = {
    "one head size of 8, text through a projection": (tiny(), {}),
    "head size 2, text as it is, of another width": (tiny(2, 2, caption_channels=None, cross_attention_dim=8), {}),
    "head size 72": (tiny(2, 72), {"height": 8, "width": 12, "encoder_attention_mask": HOLES}),
    "not square, larger than sample_size": (tiny(), {"height": 10, "width": 18}),
    "not square, smaller than sample_size": (tiny(sample_size=16), {"height": 4, "width": 10}),
    "ragged captions": (
        tiny(),
        {"encoder_attention_mask": (torch.arange(TOKENS) < torch.tensor([[7], [1], [4]])).int()},
    ),
    "captions with holes": (tiny(), {"encoder_attention_mask": HOLES}),
    "boolean mask": (tiny(), {"encoder_attention_mask": HOLES.bool()}),
    "additive bias": (tiny(), {"encoder_attention_mask": bias_mask(HOLES)}),
    "soft additive bias": (tiny(), {"encoder_attention_mask": torch.linspace(-3, 2, 3 * TOKENS).view(3, 1, TOKENS)}),
    "one-token captions": (tiny(), {"tokens": 1, "encoder_attention_mask": torch.ones(3, 1)}),
    "image mask": (tiny(), {"attention_mask": (torch.arange(16) < torch.tensor([[16], [9], [1]])).float()}),
    "image bias": (tiny(), {"attention_mask": torch.linspace(-2, 2, 48).view(3, 1, 16)}),
    "micro-conditions": (tiny(sample_size=128), {"height": 12, "width": 8}),
    "micro-conditions off at 128": (tiny(sample_size=128, use_additional_conditions=False), {}),
    "positions interpolated": (tiny(interpolation_scale=2, sample_size=16), {"height": 12, "width": 16}),
    "positions interpolated by the size": (tiny(sample_size=256, use_additional_conditions=False), {}),
    "no attention bias": (tiny(attention_bias=False), {"encoder_attention_mask": HOLES}),
    "exact gelu": (tiny(activation_fn="gelu"), {}),
    "another eps": (tiny(norm_eps=1e-2), {}),
    "outputs as many as inputs": (tiny(out_channels=None), {}),
    "patch 4, 3 channels": (tiny(patch_size=4, in_channels=3, out_channels=6), {"height": 16, "width": 8}),
    "patch 1": (tiny(patch_size=1), {"height": 4, "width": 6}),
    "many layers": (tiny(num_layers=6), {"encoder_attention_mask": HOLES}),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_equal_diffusers(name):
    config, changes = CASES[name]
    theirs, ours = pair(config)
    arguments = inputs(theirs, **changes)
    expected, expected_gradients, expected_inputs = run(theirs.train(), arguments)
    output, gradients, input_gradients = run(ours.train(), arguments)
    assert rms(output - expected) <= 1e-5 * rms(expected)
    assert gradients.keys() == expected_gradients.keys()
    for key, expected_gradient in expected_gradients.items():
        # Softmax does not see what all scores share, so the gradient of a key's bias is zero, and with one key that of
        # the query and key weights too: what both models have there is rounding.
        zero = key.endswith("to_k.bias") or (
            changes.get("tokens") == 1 and ("attn2.to_q" in key or "attn2.to_k" in key)
        )
        of = key.replace("to_k.bias", "to_v.weight").replace("to_q", "to_v").replace("to_k", "to_v") if zero else key
        scale = rms(expected_gradients[of])
        assert scale > 0, key
        assert rms(gradients[key] - expected_gradient) <= 1e-5 * scale, key
    for key, expected_gradient in expected_inputs.items():
        assert rms(input_gradients[key] - expected_gradient) <= 1e-5 * rms(expected_gradient), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_half_precision_is_as_accurate_as_diffusers(dtype, backend):
    config = tiny(2, 72, num_layers=4)
    theirs, ours = pair(config, dtype)
    ours.set_backend(backend)
    oracle = copy.deepcopy(theirs).double()
    arguments = inputs(theirs, height=16, width=24, encoder_attention_mask=HOLES)
    exact = {k: v.double() if torch.is_tensor(v) and v.dtype == dtype else v for k, v in arguments.items()}
    expected, expected_gradients, _ = run(oracle, exact)
    floor = torch.finfo(dtype).eps / 8

    def errors(model: nn.Module) -> tuple[float, float]:
        output, gradients, _ = run(model, arguments)
        relative = [
            rms(gradients[k].double() - g) / rms(g) for k, g in expected_gradients.items() if "to_k.bias" not in k
        ]
        return rms(output.double() - expected) / rms(expected), rms(torch.tensor(relative))

    for ours_error, their_error in zip(errors(ours), errors(theirs), strict=True):
        assert ours_error <= 1.25 * max(their_error, floor)


def test_dropout_is_where_diffusers_has_it():
    theirs, ours = pair(tiny(dropout=0.5))
    arguments = inputs(theirs)
    places = [name for name, module in theirs.named_modules() if isinstance(module, nn.Dropout)]
    assert [name for name, module in ours.named_modules() if isinstance(module, nn.Dropout)] == places
    torch.manual_seed(3)
    expected = theirs.train()(**arguments).sample
    torch.manual_seed(3)
    torch.testing.assert_close(ours.train()(**arguments).sample, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(**arguments).sample, theirs.eval()(**arguments).sample, rtol=1e-4, atol=1e-5)


def test_a_seed_gives_the_weights_it_gives_diffusers():
    for config in (tiny(), tiny(sample_size=128), tiny(caption_channels=None, attention_bias=False)):
        torch.manual_seed(5)
        theirs = PixArtTransformer2DModel(**config).state_dict()
        torch.manual_seed(5)
        ours = Transformer(**config).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_type_attributes_and_signature_are_those_of_diffusers():
    theirs, ours = pair(tiny())
    assert isinstance(ours, PixArtTransformer2DModel)
    assert ours.config.keys() - theirs.config.keys() == {"modulation"}
    assert all(ours.config[key] == value for key, value in theirs.config.items() if key != "_use_default_values")
    for name in ("height", "width", "inner_dim", "out_channels", "attention_head_dim", "use_additional_conditions"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.num_parameters() == theirs.num_parameters() and ours.dtype == theirs.dtype
    arguments = inputs(ours)
    named = ours(**arguments)
    (bare,) = ours(**arguments, return_dict=False)
    (positional,) = ours(*arguments.values(), return_dict=False)
    ordered = [arguments[k] for k in ("hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs")]
    torch.testing.assert_close(positional, ours(*ordered).sample, rtol=0, atol=0)
    assert type(named) is type(theirs(**arguments)) and torch.equal(named.sample, bare) and torch.equal(named[0], bare)
    with pytest.raises(AttributeError, match="'Transformer' object has no attribute 'does_not_exist'"):
        ours.does_not_exist  # noqa: B018


def test_scalar_time_and_official_text_shape():
    _, ours = pair(tiny())
    arguments = inputs(ours, timestep=torch.tensor([500, 500, 500]))
    expected = ours(**arguments).sample
    for timestep in (torch.tensor(500), torch.tensor([500]), torch.tensor([500.0] * 3)):
        torch.testing.assert_close(ours(**{**arguments, "timestep": timestep}).sample, expected, rtol=0, atol=0)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, None]
    torch.testing.assert_close(ours(**arguments).sample, expected, rtol=0, atol=0)


def test_captions_without_a_token_add_nothing():
    """Not diffusers' behaviour, which attends to the padding: documented in `forward`."""
    _, ours = pair(tiny())
    mask = HOLES.clone()
    mask[1] = 0
    arguments = inputs(ours, encoder_attention_mask=mask)
    output, gradients, input_gradients = run(ours, arguments)
    noise = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].clone()}
    noise["encoder_hidden_states"][1] = float("nan")
    torch.testing.assert_close(ours(**noise).sample[1], output[1], rtol=0, atol=0)
    assert all(g.isfinite().all() for g in gradients.values())
    assert input_gradients["encoder_hidden_states"][1].abs().max() == 0


def test_gradient_checkpointing_changes_no_bit():
    for dropout in (0.0, 0.3):
        _, ours = pair(tiny(dropout=dropout, num_layers=3))
        arguments = inputs(ours, encoder_attention_mask=HOLES)
        assert not ours.is_gradient_checkpointing
        torch.manual_seed(4)
        output, gradients, input_gradients = run(ours.train(), arguments)
        block = Mock(wraps=ours.transformer_blocks[0].forward)
        ours.transformer_blocks[0].forward = block
        ours.enable_gradient_checkpointing()
        assert ours.is_gradient_checkpointing
        torch.manual_seed(4)
        again, again_gradients, again_inputs = run(ours, arguments)
        assert block.call_count == 2, "the block was not computed again in the backward pass"
        assert torch.equal(again, output)
        assert all(torch.equal(again_gradients[k], g) for k, g in gradients.items())
        assert all(torch.equal(again_inputs[k], g) for k, g in input_gradients.items())
        ours.disable_gradient_checkpointing()
        assert not ours.is_gradient_checkpointing


def test_the_same_input_gives_the_same_bits():
    _, ours = pair(tiny())
    first, second = (run(ours, inputs(ours, encoder_attention_mask=HOLES)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])


def test_ema_of_diffusers(tmp_path):
    _, ours = pair(tiny())
    ema = EMAModel(ours.parameters(), decay=0.5, model_cls=Transformer, model_config=ours.config)
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for _ in range(2):
        ours(**inputs(ours)).sample.square().mean().backward()
        optimizer.step()
        ema.step(ours.parameters())
    assert any(not torch.equal(b, s) for b, s in zip(before, ema.shadow_params, strict=True))
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, Transformer)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, loaded.shadow_params, strict=True))
    ema.copy_to(ours.parameters())
    assert all(torch.equal(p, s) for p, s in zip(ours.parameters(), ema.shadow_params, strict=True))


def test_fused_projections():
    theirs, ours = pair(tiny())
    arguments = inputs(ours, encoder_attention_mask=HOLES)
    keys = ours.state_dict().keys()
    with torch.no_grad():
        expected = ours(**arguments).sample
        ours.fuse_qkv_projections()
        assert all(type(p) is FusedAttnProcessor2_0 for p in ours.attn_processors.values())
        assert ours.original_attn_processors.keys() == ours.attn_processors.keys()
        assert ours.state_dict().keys() == keys
        fused = ours(**arguments).sample
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
        for projection in ("to_q", "to_k", "to_v"):
            nn.init.zeros_(getattr(ours.transformer_blocks[0].attn1, projection).weight)
        torch.testing.assert_close(ours(**arguments).sample, fused, rtol=0, atol=0)  # the fused copies are in use
        ours.unfuse_qkv_projections()
        ours.load_state_dict(theirs.state_dict())
        assert all(type(p) is AttnProcessor2_0 for p in ours.attn_processors.values())
        torch.testing.assert_close(ours(**arguments).sample, expected, rtol=0, atol=0)
    _, gradients, _ = run(ours, arguments)
    ours.fuse_qkv_projections()
    _, fused_gradients, _ = run(ours, arguments)
    assert all(torch.equal(fused_gradients[key], gradient) for key, gradient in gradients.items())


def test_attention_processors():
    theirs, ours = pair(tiny())
    arguments = inputs(ours)
    assert ours.attn_processors.keys() == theirs.attn_processors.keys()
    assert all(type(p) is AttnProcessor2_0 for p in ours.attn_processors.values())
    expected = ours(**arguments).sample
    ours.set_default_attn_processor()
    assert all(type(p) is AttnProcessor for p in ours.attn_processors.values())
    ours.set_attn_processor({name: AttnProcessor2_0() for name in ours.attn_processors})
    assert all(type(p) is AttnProcessor2_0 for p in ours.attn_processors.values())
    torch.testing.assert_close(ours(**arguments).sample, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="number of processors"):
        ours.set_attn_processor({next(iter(ours.attn_processors)): AttnProcessor()})
    with pytest.raises(ValueError, match="IPAdapterAttnProcessor2_0 computes another attention"):
        ours.set_attn_processor(IPAdapterAttnProcessor2_0(hidden_size=24, cross_attention_dim=24))


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting_stores_and_computes_as_diffusers(storage, compute):
    theirs, ours = pair(tiny(), compute)
    arguments = inputs(ours, encoder_attention_mask=HOLES)
    for model in (theirs, ours):
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    dtypes = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    assert storage in dtypes.values()
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == dtypes
    tolerance = 1e-5 if compute == torch.float32 else 3e-2
    with torch.no_grad():
        expected = theirs(**arguments).sample
        assert rms(ours(**arguments).sample - expected) <= tolerance * rms(expected)
    ours(**arguments).sample.float().square().mean().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "block_level", "num_blocks_per_group": 1, "non_blocking": True},
        {"offload_type": "leaf_level"},
    ],
    ids=["block", "block, non-blocking", "leaf"],
)
def test_group_offloading(options):
    _, ours = pair(tiny())
    arguments = inputs(ours)
    with torch.no_grad():
        expected = ours.eval()(**arguments).sample
        ours.enable_group_offload(torch.device("cpu"), **options)
        hooked = [module for module in ours.modules() if hasattr(module, "_diffusers_hook")]
        assert hooked and all(m._diffusers_hook.get_hook("group_offloading") is not None for m in hooked)
        torch.testing.assert_close(ours(**arguments).sample, expected, rtol=0, atol=0)


def test_autocast_equals_diffusers():
    theirs, ours = pair(tiny(2, 72))
    arguments = inputs(ours, encoder_attention_mask=HOLES)
    with torch.no_grad():
        exact = theirs(**arguments).sample
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        error = rms(theirs(**arguments).sample - exact)
        assert rms(ours(**arguments).sample - exact) <= 1.25 * error
    with torch.autocast("cpu", torch.bfloat16):
        ours(**arguments).sample.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())

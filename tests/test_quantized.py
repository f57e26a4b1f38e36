"""Prepacked and 8-bit linear layers: against fp64, plain PyTorch, their compiled selves and files."""

import copy
import gc
import json

import pytest
import torch
from accuracy import assert_rms, rms_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pixart_fast import Transformer, ops
from pixart_fast.layers import PackedLinear
from pixart_fast.quantized import (
    QuantizedLinear,
    deviation,
    load_quantized,
    prepack,
    quantize,
    save_quantized,
)

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 3,
    "cross_attention_dim": 64,
    "sample_size": 8,
    "caption_channels": 20,
}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def inference():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def build(dtype: torch.dtype = torch.bfloat16, **changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(**CONFIG | changes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def inputs(model: Transformer, batch: int = 2, height: int = 8, width: int = 12, tokens: int = 7) -> dict:
    generator = torch.Generator().manual_seed(batch * height * width)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator).to(model.dtype),
        "encoder_hidden_states": torch.randn(batch, tokens, 20, generator=generator).to(model.dtype),
        "timestep": torch.arange(batch) * 300 + 20,  # another modulation for every sample
        "encoder_attention_mask": (torch.arange(tokens) < 1 + torch.arange(batch)[:, None] % tokens).int(),
    }


def run(model: Transformer, arguments: dict) -> Tensor:
    return model(**arguments).sample


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same roundings of rows and weight, the product in fp64."""

    def rounded(matrix: Tensor) -> Tensor:
        scale = matrix.float().abs().amax(-1, keepdim=True) / (127 if dtype == torch.int8 else 448)
        scale[scale == 0] = 1
        values = matrix.float() / scale
        return (values.round() if dtype == torch.int8 else values.to(dtype)).double() * scale.double()

    y = rounded(x) @ rounded(weight).mT
    return y if bias is None else y + bias.double()


def layer(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight *= torch.logspace(-3, 3, outputs)[:, None]  # a scale for all channels would lose the small ones
    return linear.to(dtype)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "outputs", "bias"), [(1, 72, 24, True), (16, 24, 72, False), (231, 96, 40, True)]
)
def test_product_is_that_of_the_rounded_operands(kind, dtype, rows, width, outputs, bias):
    torch.manual_seed(rows)
    linear = layer(width, outputs, bias, dtype)
    x = torch.randn(2, rows, width).to(dtype) * torch.logspace(-4, 4, rows)[:, None].to(dtype)
    actual = QuantizedLinear.of([linear], DTYPES[kind])(x)
    expected = oracle(x, linear.weight, linear.bias, DTYPES[kind])
    assert actual.dtype == dtype and actual.shape == expected.shape
    by_row = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)  # no row is lost beside a larger one
    assert rms_error(actual, expected) <= torch.finfo(dtype).eps / 2 and by_row.max() <= 2 * torch.finfo(dtype).eps


def test_int8_sums_are_exact_at_the_widest_layer_of_xl():
    a, weight = (torch.full((17, 4608), 127, dtype=torch.int8) for _ in range(2))
    ones = torch.ones(17)
    y = ops.rounded_linear(ops.Rows(a, ones, torch.float64), weight, ones, None)
    assert torch.equal(y, torch.full((17, 17), 127.0 * 127 * 4608, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_rows_of_zeros_and_of_nan(dtype):
    x = torch.randn(3, 16)
    x[0], x[1, 4] = 0, torch.nan
    y = QuantizedLinear.of([nn.Linear(16, 8, bias=False)], dtype)(x)
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isfinite().all()


def test_joined_layer_gives_the_outputs_of_each():
    q, k = layer(24, 16, True, torch.float32), layer(24, 8, True, torch.float32)
    x = torch.randn(2, 5, 24)
    joined = QuantizedLinear.of([q, k], torch.int8)(x)
    assert torch.equal(joined, torch.cat([QuantizedLinear.of([part], torch.int8)(x) for part in (q, k)], dim=-1))


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("fp8", 0.05)])
@pytest.mark.parametrize("changes", [{}, {"modulation": "adaln"}, {"attention_bias": False, "activation_fn": "gelu"}])
def test_model_deviates_as_8_bits_do(kind, bound, changes):
    """Half a step of int8 is 0.4 % of a row's largest value, of e4m3 6 % of each; averaged over a product's terms."""
    model = build(torch.float32, **changes)
    arguments = inputs(model, batch=3)
    exact = run(model, arguments)
    approximate = run(quantize(model, kind), arguments)
    assert approximate.dtype == torch.float32
    for sample in range(3):
        assert 1e-4 < rms_error(approximate[sample], exact[sample]) <= bound


def test_half_precision_adds_nothing_to_the_error_of_8_bits():
    model = build()
    arguments = inputs(model)
    truth = run(
        copy.deepcopy(model).double(), {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    )
    plain, wide = rms_error(run(model, arguments), truth), copy.deepcopy(model).float()
    eight = run(quantize(wide), {k: v.float() if v.is_floating_point() else v for k, v in arguments.items()})
    error = rms_error(run(quantize(model), arguments), truth)
    assert error <= 1.25 * (plain**2 + rms_error(eight, truth) ** 2) ** 0.5


def test_layernorm_hands_its_rows_on_in_8_bits():
    """Rounded once, from fp32: the rows of the two adaLNs never exist in bf16."""
    model = quantize(build(num_layers=1))
    block, taken = model.transformer_blocks[0], []
    for module in (block.attn1.to_qkv, block.ff.net[0].proj):
        module.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]))
    run(model, inputs(model))
    assert [type(rows) for rows in taken] == [ops.Rows, ops.Rows]
    assert all(rows.values.dtype == torch.int8 and rows.scale.dtype == torch.float32 for rows in taken)


@pytest.mark.parametrize(
    ("make", "backend", "bound"),
    [
        (prepack, "inductor", 1e-5),
        (quantize, "inductor", 2e-3),  # a row that rounds to the neighbouring code is farther off than fp32 rounds
        (lambda model: quantize(model, "fp8"), "aot_eager", 1e-5),
    ],
    ids=["packed", "int8", "fp8"],
)
def test_blocks_compile_to_one_graph_that_gives_the_same(make, backend, bound):
    model = build(torch.float32, num_layers=2)
    cases = [inputs(model), inputs(model, 3, 14, 10, 5)]
    eager = [run(make(copy.deepcopy(model)), arguments) for arguments in cases]
    gc.collect()
    make(model)
    packed = len(ops._packed)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True, backend=backend)  # as engine.compile_blocks
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for arguments, expected in zip(cases, eager, strict=True):
            assert rms_error(run(model, arguments), expected) <= bound
    # The graph hands on the weights themselves: one packed copy of each, whatever was run.
    assert len(ops._packed) - packed == (16 if make is prepack else 0)


def test_fewer_rows_than_a_gpu_takes():
    """A picture of one token; on a GPU the rows are padded to 17."""
    model = quantize(build(torch.float32))
    both = inputs(model, 2, 2, 2)
    assert run(model, both).shape == (2, 8, 2, 2)


@pytest.mark.parametrize("kind", DTYPES)
def test_saved_and_loaded_model_is_the_same(tmp_path, kind):
    model = build()
    model.null_caption = torch.randn(5, 20).bfloat16()
    quantize(model, kind)
    save_quantized(model, tmp_path, source="a test")
    loaded = load_quantized(tmp_path)
    arguments = inputs(model)
    assert torch.equal(run(loaded, arguments), run(model, arguments))
    assert torch.equal(loaded.null_caption, model.null_caption) and loaded.to_json_string() == model.to_json_string()
    state, read = model.state_dict(), loaded.state_dict()
    assert state.keys() == read.keys()
    assert all(value.dtype == read[name].dtype for name, value in state.items())
    assert json.loads((tmp_path / "quantized.json").read_text())["source"] == "a test"
    assert not list(tmp_path.glob("*.partial"))


def test_names_and_bytes_of_a_quantised_model():
    model = build()
    names = set(model.state_dict())
    before = sum(value.nbytes for name, value in model.state_dict().items() if ".attn1." in name or ".ff." in name)
    state = quantize(model).state_dict()
    after = sum(value.nbytes for name, value in state.items() if ".attn1." in name or ".ff." in name)
    assert after < 0.56 * before
    new, gone = state.keys() - names, names - state.keys()
    assert {name.rpartition(".")[2] for name in new if ".to_qkv." not in name} == {"weight_scale"}
    assert {name.split(".")[2:4][1] for name in gone} == {"to_q", "to_k", "to_v"}
    assert all(".attn1." in name for name in gone)


@pytest.mark.parametrize("kind", DTYPES)
def test_another_dtype_leaves_codes_and_scales_alone(kind):
    model = quantize(build(torch.float32), kind)
    layer = model.transformer_blocks[0].ff.net[2]
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    model.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == DTYPES[kind]
    assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(layer.weight_scale, scale)
    assert run(model, inputs(model)).dtype == torch.bfloat16


def damage(folder, what):
    description, weights = folder / "quantized.json", folder / "quantized.safetensors"
    if what == "missing":
        weights.unlink()
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "format":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 99}))
    elif what in ("other dtype", "no dtype"):
        other = "fp8" if what == "other dtype" else None
        description.write_text(json.dumps(json.loads(description.read_text()) | {"dtype": other}))
    elif what == "other model dtype":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"model_dtype": "float32"}))
    else:
        tensors = load_file(weights)
        del tensors["transformer_blocks.0.ff.net.2.weight_scale"]
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("what", "error", "sentence"),
    [
        ("missing", FileNotFoundError, "has no quantized.safetensors"),
        ("cut", ValueError, "is damaged"),
        ("format", ValueError, "is of format 99, this version reads 1: quantise the model again"),
        ("other dtype", ValueError, "the files are of different models"),
        ("no dtype", ValueError, "int8 or fp8, not None"),
        ("other model dtype", ValueError, "the files are of different models"),
        ("scale", ValueError, r"missing: transformer_blocks\.0\.ff\.net\.2\.weight_scale"),
    ],
)
def test_bad_folders_are_refused_in_a_sentence(tmp_path, what, error, sentence):
    save_quantized(quantize(build(num_layers=1)), tmp_path)
    damage(tmp_path, what)
    with pytest.raises(error, match=sentence):
        load_quantized(tmp_path)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "quantized.safetensors").mkdir()
    with pytest.raises(OSError, match=r"quantized\.safetensors"):
        save_quantized(quantize(build(num_layers=1)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quantized.safetensors"]


def test_training_is_refused():
    model = quantize(build())
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"no gradients: run this model under torch\.no_grad"):
        run(model, inputs(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("change", [prepack, quantize])
def test_adapters_are_refused_before_anything_changes(change):
    from peft import LoraConfig

    model = build()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"]))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1\.to_out\.0 is no plain .* merge or unload"):
        change(model)
    assert [type(module) for module in model.modules()] == before


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="int8 or fp8, not 'int4'"):
        quantize(build(), "int4")
    with pytest.raises(ValueError, match="in 8 bits already: load the model anew"):
        quantize(quantize(build()))
    with pytest.raises(ValueError, match=r"attn1\.to_q is no plain linear layer \(PackedLinear"):
        quantize(prepack(build()))
    with pytest.raises(ValueError, match="call quantize"):
        save_quantized(build(), "nowhere")
    with pytest.raises(ValueError, match=r"packing takes float32 and bfloat16, not torch\.float64"):
        prepack(build(torch.float64))
    with pytest.raises(ValueError, match="on CPUs and NVIDIA GPUs, not on meta"):
        quantize(Transformer(**CONFIG).to("meta"))


@pytest.mark.parametrize(
    ("kind", "sm", "sentence"),
    [("int8", (7, 5), "sm_80 or later, this is sm_75"), ("fp8", (8, 0), "sm_89 or later, this is sm_80"),
     ("int8", (8, 0), None), ("fp8", (8, 9), None), ("fp8", (9, 0), None)],
)  # fmt: skip
def test_gpus_without_such_products_are_told(monkeypatch, kind, sm, sentence):
    monkeypatch.setattr(ops, "_sm", lambda index: sm)
    problem = ops.rounding_problem(DTYPES[kind], torch.device("cuda"), 64, 1152)
    assert problem is None if sentence is None else sentence in problem
    assert "divide by" in ops.rounding_problem(torch.int8, torch.device("cuda", 0), 12) if sm >= (8, 0) else True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "bias"), [((231,), True), ((2, 3), False), ((1,), True)])
def test_packed_product_is_the_plain_one(dtype, rows, bias):
    torch.manual_seed(0)
    linear = nn.Linear(72, 40, bias=bias).to(dtype)
    x = torch.randn(*rows, 72).to(dtype)
    plain, actual = linear(x), PackedLinear.of(linear)(x)
    wide = None if linear.bias is None else linear.bias.double()
    truth = F.linear(x.double(), linear.weight.double(), wide)
    if dtype == torch.bfloat16:
        assert torch.equal(actual, plain)
    else:  # oneDNN's sums in fp32 are longer than those of the BLAS beside it
        assert rms_error(actual, truth) <= 2.5 * rms_error(plain, truth)
    gelu = ops.packed_linear(x, linear.weight, linear.bias, gelu=True)
    assert_rms(gelu, F.gelu(truth, approximate="tanh"), F.gelu(actual, approximate="tanh"))


def test_packed_weight_follows_the_weight():
    linear = PackedLinear.of(nn.Linear(16, 8))
    x = torch.randn(3, 16)

    def follows() -> bool:
        return rms_error(linear(x), F.linear(x, linear.weight, linear.bias)) <= 1e-6

    assert follows()
    linear.weight.mul_(2)
    assert follows()
    linear.load_state_dict({"weight": torch.randn(8, 16), "bias": torch.randn(8)})
    assert follows()
    for _ in range(4):  # the allocator likes to hand out the memory that was freed last
        linear.weight.data = torch.empty(0)
        linear.weight.data = torch.randn(8, 16)
        assert follows()
    linear.to(torch.bfloat16)
    x = x.bfloat16()
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_packed_copies_go_with_the_weights():
    gc.collect()
    before = len(ops._packed)
    model = prepack(build())
    run(model, inputs(model))
    assert len(ops._packed) - before == 8 * len(model.transformer_blocks)
    del model
    gc.collect()
    assert len(ops._packed) == before


def test_prepacked_model_keeps_names_and_parameters():
    model = build()
    parameters = dict(model.named_parameters())
    model.fuse_qkv_projections()
    prepack(model)
    assert list(model.state_dict()) == list(parameters)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert model.transformer_blocks[0].attn1.fused_weight is None


@pytest.mark.parametrize("changes", [{}, {"modulation": "adaln"}, {"attention_bias": False, "activation_fn": "gelu"}])
def test_prepacked_model_gives_the_same(changes):
    model = build(torch.float32, **changes)
    arguments = inputs(model, batch=3)
    exact = run(model, arguments)
    assert rms_error(run(prepack(model), arguments), exact) <= 2e-6


def test_prepacked_model_still_trains():
    model = build(torch.float32)
    arguments = inputs(model)
    with torch.enable_grad():
        run(model, arguments).square().sum().backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        run(prepack(model), arguments).square().sum().backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


def test_packed_operator_is_well_formed():
    linear = nn.Linear(16, 8).bfloat16().requires_grad_(False)
    for bias in (linear.bias, None):
        torch.library.opcheck(
            torch.ops.pixart_fast.packed_linear.default, (torch.randn(2, 3, 16).bfloat16(), linear.weight, bias, True)
        )


def test_autocast_and_mixed_dtypes_get_plain_pytorch():
    linear = PackedLinear.of(nn.Linear(16, 8))
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.bfloat16())


class Tilted:
    """A stand-in for a model, of which the approximation is off by a known share."""

    def __init__(self, factor: float):
        self.factor, self.calls = factor, 0

    def __call__(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        self.calls += 1
        prediction = self.factor * torch.cat([latents, latents], dim=1)
        return torch.cat([prediction, prediction]) if guided else prediction


def test_deviation_is_the_relative_error():
    noise = torch.randn(2, 4, 4, 4)
    exact, approximate = Tilted(0.9), Tilted(0.9 * 1.02)
    measured = deviation(exact, approximate, noise, steps=4)
    assert abs(measured.predictions - 0.02) < 1e-6 and measured.latents > 0
    assert (exact.calls, approximate.calls) == (4, 8)
    assert deviation(exact, Tilted(0.9), noise, steps=4) == (0, 0)
    assert str(measured).startswith("deviation: 2.00% in a prediction, ")

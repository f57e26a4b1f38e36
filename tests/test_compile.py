"""`torch.compile` takes the transformer whole, without a graph break, and gives eager's outputs and gradients."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from pixart_fast import Transformer
from pixart_fast.engine import compile_blocks

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "caption_channels": 20,
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(**CONFIG | changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def inputs(model: Transformer, batch: int = 2, height: int = 8, width: int = 12, tokens: int = 6) -> dict:
    generator = torch.Generator().manual_seed(batch * height * width)
    lengths = 1 + torch.arange(batch) % tokens
    arguments = {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator).to(model.dtype),
        "encoder_hidden_states": torch.randn(batch, tokens, 20, generator=generator).to(model.dtype),
        "timestep": torch.arange(batch) * 300,
        "encoder_attention_mask": (torch.arange(tokens) < lengths[:, None]).int(),
    }
    if model.use_additional_conditions:
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return arguments


def step(run: nn.Module, model: nn.Module, arguments: dict) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = run(**arguments).sample
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * direction).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def worst_gradient(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient; those of keys' biases are zero but for rounding."""
    return max(relative(gradients[name], g) for name, g in expected.items() if not name.endswith("to_k.bias"))


@pytest.mark.slow
def test_training_in_one_graph():
    model = build(num_layers=1)
    compiled = torch.compile(model, fullgraph=True)
    arguments = inputs(model)
    output, gradients = step(model, model.train(), arguments)
    compiled_output, compiled_gradients = step(compiled, model, arguments)
    assert relative(compiled_output, output) <= 1e-5
    assert worst_gradient(compiled_gradients, gradients) <= 1e-5


@pytest.mark.slow
def test_inference_in_one_graph_for_all_resolutions_batches_and_caption_lengths():
    model = build(num_layers=1).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 8, 12, 6), (2, 8, 12, 6), (3, 16, 10, 9), (4, 6, 20, 5)):
            arguments = inputs(model, *shape)
            assert relative(compiled(**arguments).sample, model(**arguments).sample) <= 1e-5


def test_blocks_of_guided_sampling_share_one_graph():
    """The empty prompt is worked out beforehand; other numbers of pictures, sizes and tokens need no new graph."""
    model = build(num_layers=3).eval()
    expected, captions = [], []
    shapes = ((10, 8, 10, 7), (6, 16, 10, 9), (8, 6, 20, 11))  # without a size twice: Dynamo would take both for one
    with torch.no_grad():
        for shape in shapes:
            arguments = inputs(model, *shape)
            half = shape[0] // 2
            arguments["encoder_attention_mask"][:half] = torch.arange(shape[-1]) < 1
            expected.append(model(**arguments).sample)
            text, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
            captions.append(model.encode_caption(text, mask, single=half))
        compile_blocks(model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape, caption, sample in zip(shapes, captions, expected, strict=True):
                arguments = inputs(model, *shape) | {"encoder_hidden_states": caption, "encoder_attention_mask": None}
                assert relative(model(**arguments).sample, sample) <= 1e-5


@pytest.mark.slow
def test_bf16_training_has_finite_and_right_gradients():
    """The compiled backward pass of a bf16 LayerNorm over transposed tokens once gave NaN on a CPU."""
    model = build(torch.bfloat16, num_layers=1)
    arguments = inputs(model)
    oracle = build(num_layers=1).double()
    oracle.load_state_dict(model.state_dict())
    exact = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    exact_output, exact_gradients = step(oracle, oracle, exact)
    output, gradients = step(model, model, arguments)
    compiled_output, compiled_gradients = step(torch.compile(model, fullgraph=True), model, arguments)
    assert all(gradient.isfinite().all() for gradient in compiled_gradients.values())
    assert relative(compiled_output, exact_output) <= 1.25 * relative(output, exact_output)
    assert worst_gradient(compiled_gradients, exact_gradients) <= 1.5 * worst_gradient(gradients, exact_gradients)


@pytest.mark.parametrize(("modulation", "backend"), [("adaln_single", "inductor"), ("adaln", "aot_eager")])
def test_repeated_blocks_share_one_graph(modulation, backend):
    model = build(modulation=modulation, num_layers=3)
    arguments = inputs(model)
    output, gradients = step(model, model, arguments)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        compiled_output, compiled_gradients = step(model, model, arguments)
    assert relative(compiled_output, output) <= 1e-5
    assert worst_gradient(compiled_gradients, gradients) <= 1e-5


def test_gradient_checkpointing_compiles():
    model = build().train()
    arguments = inputs(model)
    output, gradients = step(model, model, arguments)
    model.enable_gradient_checkpointing()
    compiled_output, compiled_gradients = step(
        torch.compile(model, fullgraph=True, backend="aot_eager"), model, arguments
    )
    assert relative(compiled_output, output) <= 1e-5
    assert worst_gradient(compiled_gradients, gradients) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"modulation": "adaln"}, {"sample_size": 128}, {"activation_fn": "gelu", "attention_bias": False}],
    ids=["adaln", "micro-conditions", "exact gelu, no bias"],
)
def test_other_kinds_compile_without_a_graph_break(changes):
    model = build(**changes)
    arguments = inputs(model)
    output, gradients = step(model, model, arguments)
    compiled_output, compiled_gradients = step(
        torch.compile(model, fullgraph=True, backend="aot_eager"), model, arguments
    )
    assert relative(compiled_output, output) <= 1e-5
    assert worst_gradient(compiled_gradients, gradients) <= 1e-5


def test_exported_program_gives_the_same_output():
    model = build().eval()
    arguments = inputs(model)
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0]
        program = torch.export.export(model, args=(), kwargs={**arguments, "return_dict": False})
        assert relative(program.module()(**arguments, return_dict=False)[0], expected) <= 1e-5


def test_compiled_pipeline_transformer_keeps_its_type():
    model = build()
    compiled = torch.compile(model)
    assert compiled.config == model.config and isinstance(compiled._orig_mod, PixArtTransformer2DModel)

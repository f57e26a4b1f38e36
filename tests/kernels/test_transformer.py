"""The whole transformer on the Triton kernels: as near to fp64 as plain PyTorch is, output and every gradient."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from pixart_fast import Transformer, ops
from tests.accuracy import assert_rms
from tests.kernels.conftest import DEVICE, DTYPES

B, TOKENS, L, CHANNELS = 3, (3, 4), 7, 20
KERNELS = ("modulated_layernorm", "cross_attention", "gated_linear", "linear_gelu")


def build(modulation: str) -> Transformer:
    """Two blocks with heads of 72, in fp64, and weights that let every part be seen."""
    torch.manual_seed(0)
    model = Transformer(
        num_attention_heads=2,
        attention_head_dim=72,
        num_layers=2,
        cross_attention_dim=144,
        sample_size=16,
        caption_channels=CHANNELS,
        use_additional_conditions=False,
        modulation=modulation,
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model.to(DEVICE)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    height, width = (2 * size for size in TOKENS)
    arguments = {
        "hidden_states": torch.randn(B, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(B, L, CHANNELS, generator=generator),
        "timestep": torch.tensor([3, 500, 980]),
        "encoder_attention_mask": torch.arange(L) < torch.tensor([0, 3, 7])[:, None],
    }
    return {name: value.to(DEVICE, dtype if value.is_floating_point() else None) for name, value in arguments.items()}


def training(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    output = model(**inputs(dtype)).sample
    (output * torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=dtype).view_as(output)).sum().backward()
    return {"output": output.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modulation", ["adaln_single", "adaln"])
def test_training(modulation, dtype):
    exact = build(modulation)
    model = exact.to(dtype) if dtype == torch.float64 else deepcopy(exact).to(dtype)
    plain = deepcopy(model).set_backend("reference")
    for op in KERNELS[:2]:
        model.set_backend("triton", op=op)
    exact.load_state_dict(model.state_dict())
    expected = training(exact.set_backend("reference"), torch.float64)
    baseline = training(plain, dtype)
    actual = training(model, dtype)
    vectors = []
    for name, truth in expected.items():
        if name.endswith("to_k.bias"):  # zero but for rounding
            continue
        if truth.ndim > 1:
            try:
                assert_rms(actual[name], truth, baseline[name])
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        else:  # few numbers, whose error is a draw: together they are enough
            vectors.append([tensors[name].double() / truth.norm() for tensors in (actual, expected, baseline)])
    assert len(vectors) > 10
    together = [torch.cat(kind) for kind in zip(*vectors, strict=True)]
    assert_rms(together[0].float(), together[1], together[2].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference(dtype, monkeypatch):
    exact = build("adaln_single")
    model = deepcopy(exact).to(dtype)
    plain = deepcopy(model).set_backend("reference")
    for op in KERNELS:
        model.set_backend("triton", op=op)
    exact.load_state_dict(model.state_dict())
    calls = []
    for op in KERNELS:
        function = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, f=function, op=op, **o: calls.append((op, o["backend"])) or f(*a, **o))
    with torch.no_grad():
        actual = model(**inputs(dtype)).sample
        used = [op for op, backend in calls if backend == "triton"]
        assert {op: used.count(op) for op in KERNELS} == dict(zip(KERNELS, (5, 2, 4, 2), strict=True))
        assert_rms(actual, exact(**inputs(torch.float64)).sample, plain(**inputs(dtype)).sample)


def test_gradients_are_the_same_bits_again():
    model = build("adaln_single").float()
    for op in KERNELS[:2]:
        model.set_backend("triton", op=op)
    first = {name: value.clone() for name, value in training(model, torch.float32).items()}
    model.zero_grad()
    second = training(model, torch.float32)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_cuda_graph_capture():
    model = build("adaln_single").to(torch.bfloat16).eval()
    arguments = inputs(torch.bfloat16)
    with torch.no_grad():
        caption = model.encode_caption(arguments.pop("encoder_hidden_states"), arguments.pop("encoder_attention_mask"))
        expected = model(encoder_hidden_states=caption, **arguments).sample
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(encoder_hidden_states=caption, **arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = model(encoder_hidden_states=caption, **arguments).sample
        actual.fill_(float("nan"))
        graph.replay()
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_compiled_blocks_on_the_kernels():
    model = build("adaln_single").float()
    expected = training(model, torch.float32)
    expected = {name: value.clone() for name, value in expected.items()}
    model.zero_grad()
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True)
    for name, actual in training(model, torch.float32).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-3, atol=1e-4)

"""Approximations of sampling: what they leave out, what they keep, and that both are what they say."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart_fast import Transformer
from pixart_fast.approximate import Approximation, BlockCache, CachedBlocks, TGate, deviation
from pixart_fast.denoise import Denoiser, Guidance, denoise
from pixart_fast.engine import Graphs
from pixart_fast.samplers import build
from pixart_fast.transformer import Stream
from tests import published

STEPS, DEPTH = 6, 4
GUIDANCE = Guidance(3.0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return published.transformers(num_layers=DEPTH)[1].requires_grad_(False)


def sampler(steps: int = STEPS):
    """Predicting velocity: a random model's noise would make the first step's x_0 drown all that follow."""
    return build("dpm", steps, config={"prediction_type": "v_prediction"})


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser(model: Transformer, rows: tuple[int, ...] = (0, 1), *, empty: int = 1, graphs=None) -> Denoiser:
    """For pictures of two captions, of 5 tokens and 3; the unconditional one has `empty`."""
    text, lengths = randn(2, 5, published.TEXT_WIDTH, seed=1), torch.tensor([5, 3])
    null = randn(1, empty, published.TEXT_WIDTH, seed=2).expand(len(rows), -1, -1)
    chosen = list(rows)
    return Denoiser(model, text[chosen], lengths[chosen], null, torch.full((len(rows),), empty), None, graphs)


def sample(evaluate, guidance: Guidance | None = None, rows: tuple[int, ...] = (0, 1)) -> Tensor:
    guidance = evaluate.guidance if guidance is None else guidance
    return denoise(evaluate, sampler(), randn(2, 4, 8, 8, seed=3)[list(rows)], guidance)


def tgate(of: Denoiser, gate: int, guidance: Guidance = GUIDANCE) -> TGate:
    return TGate(of, sampler(), guidance, gate)


def cache(of: Denoiser, interval: int, blocks=(1, 3), guidance: Guidance = GUIDANCE) -> BlockCache:
    return BlockCache(of, sampler(), guidance, CachedBlocks(of.model, blocks), interval)


APPROXIMATIONS = {"tgate": lambda of: tgate(of, 3), "block cache": lambda of: cache(of, 3)}


@pytest.fixture(params=APPROXIMATIONS)
def approximate(request):
    return APPROXIMATIONS[request.param]


@contextmanager
def calls(modules):
    """The batch size of every call of some modules, by their place."""
    seen: list[list[int]] = [[] for _ in modules]

    def note(index: int):
        def hook(module, inputs, output) -> None:
            seen[index].append((inputs[0].x if isinstance(inputs[0], Stream) else inputs[0]).shape[0])

        return hook

    hooks = [module.register_forward_hook(note(index)) for index, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def evaluate_at(approximation: Approximation, index: int, latents: Tensor) -> Tensor:
    t = approximation.times[index]
    return approximation(latents, t, approximation.guidance.applies(t))


def test_what_leaves_nothing_out_is_exact(model):
    exact = sample(denoiser(model), GUIDANCE)
    assert torch.equal(sample(tgate(denoiser(model), STEPS)), exact)
    assert torch.equal(sample(cache(denoiser(model), 1)), exact)
    assert deviation(exact, exact) == 0


def test_approximations_deviate(model, approximate):
    exact = sample(denoiser(model), GUIDANCE)
    assert 1e-3 < deviation(exact, sample(approximate(denoiser(model)))) < 2


def with_dits_modulation() -> Transformer:
    """Of the ablation: its modulation reads the caption too, which is not frozen."""
    torch.manual_seed(0)
    return Transformer(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=DEPTH,
        cross_attention_dim=24,
        caption_channels=published.TEXT_WIDTH,
        sample_size=8,
        modulation="adaln",
    ).eval()


@pytest.mark.parametrize("modulation", ["adaln_single", "adaln"])
@pytest.mark.parametrize("empty", [1, 2], ids=["one token", "two tokens"])
@pytest.mark.parametrize("guided", [True, False])
def test_frozen_is_the_mean_of_both_branches(model, monkeypatch, modulation, empty, guided):
    """Beside each branch evaluated alone, in fp64, and then every layer's result put in by hand."""
    model = (copy.deepcopy(model) if modulation == "adaln_single" else with_dits_modulation()).double()
    guidance = GUIDANCE if guided else Guidance(1.0)
    of = denoiser(model, empty=empty)
    approximation = tgate(of, 2, guidance)
    before, after = randn(2, 4, 8, 8, seed=4), randn(2, 4, 8, 8, seed=5)
    evaluate_at(approximation, 1, before)
    got = evaluate_at(approximation, 2, after)

    results = []
    branches = [(of.text, of.lengths)] + [(of.empty, of.empty_lengths)] * guided
    layers = [block.attn2 for block in model.transformer_blocks]
    for text, lengths in branches:
        outputs: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda *args, to=outputs: to.append(args[2])) for layer in layers]
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        time = torch.full((2,), approximation.times[1])
        with torch.no_grad():
            model(before.double(), text.double(), time, None, encoder_attention_mask=mask)
        for hook in hooks:
            hook.remove()
        results.append(outputs)
    for layer, *frozen in zip(layers, *results, strict=True):
        mean = torch.stack(frozen).mean(0)
        monkeypatch.setattr(layer, "forward", lambda *args, h=mean: h)
    time, mask = torch.full((2,), approximation.times[2]), torch.arange(5) < of.lengths[:, None]
    with torch.no_grad():
        expected = model(after.double(), of.text.double(), time, None, encoder_attention_mask=mask).sample
    assert got.shape == (2, 8, 8, 8)
    assert deviation(expected, got) <= 1e-7  # got is fp32


def test_tgate_evaluates_one_branch_and_no_cross_attention_after_its_gate(model, monkeypatch):
    attended = []
    attend = type(model.transformer_blocks[0].attn2).attend
    monkeypatch.setattr(
        type(model.transformer_blocks[0].attn2), "attend", lambda *args: attended.append(1) or attend(*args)
    )
    with calls(model.transformer_blocks) as seen:
        sample(tgate(denoiser(model), 4))
    assert seen == [[4, 4, 4, 4, 2, 2]] * DEPTH
    assert len(attended) == 4 * DEPTH
    assert not any(block.attn2._forward_hooks for block in model.transformer_blocks)


def test_block_cache_evaluates_its_blocks_at_some_steps(model):
    with calls(model.transformer_blocks) as seen:
        sample(cache(denoiser(model), 3))
    assert [len(batches) for batches in seen] == [6, 4, 4, 6]  # full: 0, 1, 4, 5
    assert all(batch == 4 for batches in seen for batch in batches)


def test_block_cache_adds_the_last_residual(model, monkeypatch):
    model = copy.deepcopy(model).double()
    approximation = cache(denoiser(model), 4)
    latents = randn(3, 2, 4, 8, 8, seed=6)
    inputs: dict[int, list[Tensor]] = {1: [], 3: []}
    hooks = [
        model.transformer_blocks[i].register_forward_pre_hook(lambda _, args, to=inputs[i]: to.append(args[0].x))
        for i in inputs
    ]
    evaluate_at(approximation, 0, latents[0])
    evaluate_at(approximation, 1, latents[1])
    for hook in hooks:
        hook.remove()
    got = evaluate_at(approximation, 2, latents[2])
    residual = inputs[3][1] - inputs[1][1]
    first, second = model.transformer_blocks[1:3]
    monkeypatch.setattr(first, "forward", lambda stream, *_: Stream(stream.total() + residual))
    monkeypatch.setattr(second, "forward", lambda stream, *_: stream)
    with torch.no_grad():
        expected = denoiser(model)(latents[2], approximation.times[2], True)
    assert deviation(expected, got) <= 1e-7


def test_block_cache_evaluates_all_where_guidance_turns(model):
    """The residual of two branches does not fit one."""
    times = sampler().timesteps.tolist()
    guidance = GUIDANCE._replace(low=times[3] / 1000, high=times[2] / 1000)
    approximation = cache(denoiser(model), 5, guidance=guidance)
    assert approximation.full == {times[i] for i in (0, 1, 2, 4, 5)}
    with calls(model.transformer_blocks) as seen:
        sample(approximation)
    assert seen[0] == [2, 2, 4, 4, 2, 2] and seen[1] == [2, 2, 4, 2, 2]


def test_tgate_keeps_to_a_guidance_interval(model):
    times = sampler().timesteps.tolist()
    with calls(model.transformer_blocks[:1]) as seen:
        sample(tgate(denoiser(model), 4, GUIDANCE._replace(high=times[1] / 1000)))
        sample(tgate(denoiser(model), 4, GUIDANCE._replace(low=times[1] / 1000)))
    assert seen == [[2, 4, 4, 4, 2, 2, 4, 4, 2, 2, 2, 2]]


def test_a_picture_does_not_depend_on_its_batch(model, approximate):
    together = sample(approximate(denoiser(model)))
    apart = torch.cat([sample(approximate(denoiser(model, (i,))), rows=(i,)) for i in (0, 1)])
    assert deviation(apart, together) <= 1e-5


def test_a_second_run_repeats_the_first(model, approximate):
    """Nothing of the batch before is left."""
    approximation = approximate(denoiser(model))
    first = sample(approximation)
    denoise(approximation, sampler(), randn(2, 4, 8, 8, seed=9), approximation.guidance)
    assert torch.equal(sample(approximation), first)


def test_projections_with_an_adapter(model, approximate):
    """Keys and values are then made in every step, by layers that are called; the results are the same."""
    expected = sample(approximate(denoiser(model)))
    adapted = copy.deepcopy(model)
    for block in adapted.transformer_blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: None)
    assert deviation(expected, sample(approximate(denoiser(adapted)))) <= 1e-5


def test_compiled_blocks_compute_the_same_without_a_graph_per_step(model, approximate):
    torch.compiler.reset()
    expected = sample(approximate(denoiser(model)))
    compiled, graphs = copy.deepcopy(model), []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    for block in compiled.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True, backend=keep)
    approximation = approximate(denoiser(compiled))
    assert deviation(expected, sample(approximation)) <= 1e-5
    first = len(graphs)
    assert first <= 2  # with and without cross-attention
    sample(approximation)
    sample(approximate(denoiser(compiled)))
    assert len(graphs) == first
    torch.compiler.reset()


class Replays:
    """Stands for `engine.Graphs` on a CPU: what it would capture, and a result that the next evaluation overwrites."""

    def __init__(self):
        self.seen: dict[tuple, Tensor] = {}
        self.batches: list[int] = []

    def evaluate(self, model, caption, latents, time, added) -> Tensor:
        output = model(latents, caption, time, added, return_dict=False)[0]
        assert model.pos_embed.positions
        self.batches.append(len(latents))
        return self.seen.setdefault((id(model), *latents.shape), torch.empty_like(output)).copy_(output)


def test_evaluations_can_be_graphs(model):
    """Few forms, the same in every batch, and a residual that stays where it was."""
    graphs, cached = Replays(), CachedBlocks(model, (1, 3))
    places = set()
    for _ in range(2):
        of = denoiser(model, graphs=graphs)
        approximation = BlockCache(of, sampler(), GUIDANCE, cached, 3)
        assert torch.equal(sample(approximation), sample(cache(denoiser(model), 3)))
        places |= {memory.data_ptr() for memory in cached.storage}
    assert len(graphs.seen) == 2 and len(places) == 1
    sample(BlockCache(denoiser(model, (0,)), sampler(), GUIDANCE, cached, 3), rows=(0,))
    assert len(cached.storage) == 1

    graphs = Replays()
    assert torch.equal(sample(tgate(denoiser(model, graphs=graphs), 3)), sample(tgate(denoiser(model), 3)))
    assert graphs.batches == [4, 4, 2, 2, 2]  # hooks record at the gate, which a graph would run once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_what_eager_gives(model, approximate):
    model = copy.deepcopy(model).cuda()
    noise = randn(2, 4, 8, 8, seed=3).cuda()

    def latents(approximation: Approximation) -> Tensor:
        return denoise(approximation, sampler(), noise, approximation.guidance).cpu()

    expected = latents(approximate(denoiser(model)))
    approximation = approximate(denoiser(model, graphs=Graphs()))
    assert deviation(expected, latents(approximation)) <= 1e-5
    assert deviation(expected, latents(approximation)) <= 1e-5


def test_weights_are_shared_and_follow_the_model(model):
    model = copy.deepcopy(model)
    cached = CachedBlocks(model)
    assert (cached.first, cached.stop) == (1, 3)
    model.to(torch.float64)
    assert cached.refresh.dtype == torch.float64
    assert {id(p) for p in cached.reuse.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("empty", [1, 3], ids=["one token", "three tokens"])
def test_share_is_that_of_counted_flops(model, approximate, empty):
    model = copy.deepcopy(model).set_backend("reference")
    of = denoiser(model, (0, 0), empty=empty)
    for guided in (True, False):
        of.captions[guided] = of.caption(guided)  # once per prompt, not counted
    if empty > 1:
        of.empty_lengths = of.lengths  # what is computed: all are padded to the longest

    def counted(evaluate, guidance: Guidance) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's
            sample(evaluate, guidance)
        return counter.get_total_flops()

    approximation = approximate(of)
    share = counted(approximation, approximation.guidance) / counted(of, GUIDANCE)
    assert approximation.share(torch.empty(2, 4, 8, 8)) == pytest.approx(share, rel=1e-6)
    assert share < 0.9


def test_a_report_says_what_was_approximated_how_far_off_and_what_for(model):
    exact = torch.ones(2, 4, 8, 8)
    gate, blocks = tgate(denoiser(model), 3), cache(denoiser(model), 3)
    assert gate.report(exact, exact * 1.02) == (
        "T-GATE after step 3 of 6: latents deviate by 2.0% (relative RMS, 2 pictures), "
        f"{1 / gate.share(exact):.2f} × fewer FLOPs"
    )
    assert blocks.report(exact, exact).startswith(
        "blocks 1:3 of 4 at 4 of 6 steps (interval 3): latents deviate by 0.0%"
    )


def test_user_mistakes(model):
    of = denoiser(model)
    for gate in (0, STEPS + 1):
        with pytest.raises(ValueError, match=f"a gate from 1 to 6, the steps of this sampler, got {gate}"):
            tgate(of, gate)
    for blocks in ((3, 3), (-1, 2), (2, 5)):
        with pytest.raises(ValueError, match=f"a range from 0 to 4, the model's depth, got {blocks[0]}:{blocks[1]}"):
            CachedBlocks(model, blocks)
    with pytest.raises(ValueError, match="every 1 or more steps, got interval 0"):
        cache(of, 0)
    with pytest.raises(ValueError, match="of another model than the denoiser's"):
        BlockCache(of, sampler(), GUIDANCE, CachedBlocks(copy.deepcopy(model)), 2)
    with pytest.raises(ValueError, match=r"cannot be compared with \(2, 4, 8, 8\)"):
        deviation(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="its own guidance"):
        sample(tgate(of, 3), GUIDANCE)
    with pytest.raises(ValueError, match="the sampler that it was made with"):
        denoise(cache(of, 2), sampler(4), randn(2, 4, 8, 8), GUIDANCE)
    with pytest.raises(ValueError, match="without the one at its gate"):
        evaluate_at(tgate(of, 3), 3, randn(2, 4, 8, 8))

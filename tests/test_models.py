"""The model's benchmark cases: every path is the same model, and what is timed is what the case says."""

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline

from bench import models
from bench.measure import compare
from bench.models import Workload
from pixart_fast import Transformer
from pixart_fast.config import SIZES

CPU = torch.device("cpu")
SMALL = Workload(SIZES["scenes"]._replace(layers=2), 64, 3, torch.float32, CPU, tokens=9, channels=24)
EAGER = ("ours eager", "reference eager", "diffusers eager")


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def cases(dtype=torch.float32, names=EAGER):
    workload = replace(SMALL, dtype=dtype)
    return {
        "block": models.block("forward+backward", workload, names),
        "forward": models.forward(workload, names),
        "train_step": models.train_step(workload, names),
        "generate": models.generate(replace(workload, steps=4), names),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ["block", "forward", "train_step", "generate"])
def test_every_path_is_the_same_model(op, dtype):
    case = cases(dtype)[op]
    rows = compare(case, rounds=2)
    assert [name for name in rows if name in EAGER] == list(EAGER)
    for name in EAGER:
        assert rows[name].error <= rows[name].bound and rows[name].seconds and rows[name].compile_seconds is None, name
    assert case.op == op and case.images == 3 and case.labels == {"layers": 2, "batch": 3, "pixels": 64}


@pytest.mark.parametrize("op", ["block", "forward", "train_step", "generate"])
def test_a_wrong_path_is_noticed(op, monkeypatch):
    """A gate that is off by a hundredth, in one path's model alone."""
    plain = models.ours

    def wrong(workload, backends=None, *, compiled=False):
        model = plain(workload, backends, compiled=compiled)
        if backends is None:
            tables = (
                model.transformer_blocks[0].scale_shift_table.detach() * torch.tensor([1, 1, 1.01, 1, 1, 1])[:, None]
            )
            model.transformer_blocks[0].scale_shift_table = torch.nn.Parameter(tables)
        return model

    monkeypatch.setattr(models, "ours", wrong)
    workload = replace(SMALL, tokens=8)  # another case than those that are kept
    case = {
        "block": lambda: models.block("forward", workload, EAGER),
        "forward": lambda: models.forward(workload, EAGER),
        "train_step": lambda: models.train_step(workload, EAGER),
        "generate": lambda: models.generate(replace(workload, steps=3), EAGER),
    }[op]()
    rows = compare(case, rounds=0)
    assert rows["ours eager"].error > rows["ours eager"].bound
    assert all(rows[name].error <= rows[name].bound for name in EAGER[1:])


@pytest.mark.slow
def test_compiled_paths_and_what_they_took_to_compile():
    names = ("ours", "diffusers fused qkv", "+ text K/V once")
    case = models.generate(replace(SMALL, steps=2), names)
    rows = compare(case, rounds=0)
    assert rows.pop("+ CUDA graphs") == "needs a CUDA device"
    assert list(rows) == list(names)
    for name, row in rows.items():
        assert row.error <= row.bound, name
        assert name not in models.COMPILED or row.compile_seconds > 0.5, name


def test_all_models_share_their_weights():
    built = models.models(SMALL, models.PATHS)
    assert list(built) == list(models.PATHS)
    first = dict(built["ours"].named_parameters())
    for name, model in built.items():
        if name != "diffusers fused qkv":
            parameters = {key.removeprefix("_orig_mod."): of for key, of in model.named_parameters()}
            assert parameters.keys() == first.keys()
            assert all(parameters[key] is first[key] for key in first), name
    larger = dict(models.ours(replace(SMALL, pixels=128, batch=1)).named_parameters())
    assert all(larger[key] is first[key] for key in first)


def test_the_update_is_adamw_and_leaves_the_weights():
    case = models.train_step(replace(SMALL, dtype=torch.bfloat16), EAGER)
    path = case.paths["ours eager"]
    before = [weight.detach().clone() for weight in path.weights]
    names = [name for name, _ in models.ours(SMALL).named_parameters()]
    assert len(path.weights) == len(names)
    path.update(tuple(torch.ones_like(weight) for weight in path.weights))
    assert all(torch.equal(old, new) for old, new in zip(before, path.weights, strict=True))
    held = [cell.cell_contents for cell in path.update.__wrapped__.__closure__]
    (optimizer,) = [of for of in held if isinstance(of, torch.optim.AdamW)]
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert len(moments) == len(names) and all(m.dtype == torch.float32 and (m == 0.1).all() for m in moments)


def test_denoising_is_that_of_the_pipeline():
    """The loop against diffusers' own, the same noise and text features, negative prompt of one token."""
    workload = replace(SMALL, batch=2, steps=5)
    case = models.generate(workload, ("diffusers eager",))
    (text, keep, noise), _ = case.inputs(torch.Generator().manual_seed(1))
    vae = AutoencoderKL(
        block_out_channels=(2, 2, 2, 2),
        norm_num_groups=1,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": DPMSolverMultistepScheduler()}
    pipe = PixArtAlphaPipeline(transformer=models.theirs(workload), **parts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt_embeds=text[:, 1], prompt_attention_mask=keep[:, 1], negative_prompt=None, latents=noise,
        negative_prompt_embeds=text[:, 0], negative_prompt_attention_mask=keep[:, 0], guidance_scale=models.GUIDANCE,
        num_inference_steps=5, height=64, width=64, use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        actual = case.paths["diffusers eager"].function(text, keep, noise)
    assert keep.sum(2).tolist() == [[1, 5], [1, 9]]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.std().item())


def test_each_rung_changes_what_it_says():
    rungs = models.rungs(SMALL, models.RUNGS)
    assert tuple(rungs) == models.RUNGS == tuple(models.LADDER)[2:-2]
    assert rungs["+ fused linear"].startswith("no kernel of ours on cpu")
    backends = {rung: backends_of(model) for rung, model in rungs.items() if isinstance(model, Transformer)}
    native = {"modulated_layernorm"}
    assert {op for op, name in backends["+ fused adaLN"].items() if name == {"cpu"}} == native
    assert {op for op, name in backends["+ cross-attention"].items() if name == {"cpu"}} == native | {"cross_attention"}
    all_native = native | {"cross_attention", "self_attention"}
    for rung in ("+ self-attention", "+ text K/V once", "+ empty prompt once"):
        assert {op for op, name in backends[rung].items() if name == {"cpu"}} == all_native


def backends_of(model):
    found = {}
    for module in model.modules():
        for op, backend in getattr(module, "backends", {}).items():
            found.setdefault(op, set()).add(backend)
    return found


def test_captions_are_ragged_and_sizes_are_the_models():
    assert replace(SMALL, batch=4, tokens=120).lengths().tolist() == [30, 60, 90, 120]
    xl = Workload(SIZES["XL"]._replace(layers=2), 1024, 2, torch.bfloat16, CPU, steps=20)
    assert xl.image_tokens == 4096 and xl.name == "XL/2 2 blocks 1024px B2 20 steps"
    assert xl.config()["attention_head_dim"] == 72 and xl.config()["caption_channels"] == 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_generation_on_a_gpu():
    """The CUDA graph of the first prompt, replayed for another."""
    workload = replace(SMALL, dtype=torch.bfloat16, device=torch.device("cuda"), steps=4)
    case = models.generate(workload, ("ours", "ours eager"))
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            operands, _ = case.inputs(generator)
            graphed, eager = (case.paths[name].function(*operands).float() for name in ("ours", "ours eager"))
            torch.cuda.synchronize()
            assert (graphed - eager).norm() <= 0.05 * eager.norm()

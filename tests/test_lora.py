"""LoRA with PEFT: trains, merges, goes to files and back, and the files serve diffusers' class as well."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pixart_fast import Transformer

TARGETS = [
    *("to_k", "to_q", "to_v", "to_out.0"),
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1", "linear_2"),
]
CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 128,  # with micro-conditions
    "caption_channels": 20,
}
INPUTS = {
    "hidden_states": torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)),
    "encoder_hidden_states": torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(2)),
    "timestep": torch.tensor([900, 20]),
    "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
    "added_cond_kwargs": {
        "resolution": torch.tensor([[64.0, 96.0], [64.0, 96.0]]),
        "aspect_ratio": torch.tensor([[0.67], [0.67]]),
    },
}


def pair() -> tuple[PixArtTransformer2DModel, Transformer]:
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(**CONFIG)
    ours = Transformer(**CONFIG)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS, return_dict=False)[0]


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**INPUTS, return_dict=False)[0].square().mean().backward()
        optimizer.step()


def test_adapter_sits_on_the_same_layers_as_on_diffusers_model():
    config = LoraConfig(r=4, target_modules=TARGETS)
    theirs, ours = (get_peft_model(model, config) for model in pair())
    assert adapted_layers(ours) == adapted_layers(theirs)
    assert len(adapted_layers(ours)) == 1 + 2 * 10 + 1 + 3 * 2 + 1 + 2  # patches, blocks, out, conditions, table, text
    trainable = {name: p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in ours.named_parameters() if p.requires_grad} == trainable


def test_training_moves_every_adapter_and_nothing_else():
    _, ours = pair()
    before = {name: p.clone() for name, p in ours.named_parameters()}
    plain = output(ours)
    adapted = get_peft_model(ours, LoraConfig(r=4, target_modules=TARGETS))
    torch.testing.assert_close(output(adapted), plain, rtol=0, atol=0)  # B starts at zero
    train(adapted)
    assert (output(adapted) - plain).abs().max() > 1e-3
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            assert parameter.abs().max() > 0, f"{name} has not moved"
    frozen = {name: p for name, p in adapted.base_model.model.named_parameters() if "lora" not in name}
    assert all(torch.equal(p, before[name.replace(".base_layer", "")]) for name, p in frozen.items())


def test_gradients_of_the_adapter_equal_those_on_diffusers_model():
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    models = [get_peft_model(model, config) for model in pair()]
    models[1].load_state_dict(models[0].state_dict())
    gradients = []
    for model in models:
        model(**INPUTS, return_dict=False)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_checkpointed_training_reaches_the_adapter():
    _, ours = pair()
    ours.enable_gradient_checkpointing()
    adapted = get_peft_model(ours, LoraConfig(r=4, target_modules=TARGETS))
    train(adapted, steps=1)
    assert all(p.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)


def test_file_gives_the_same_output_on_diffusers_model(tmp_path):
    theirs, ours = pair()
    adapted = get_peft_model(ours, LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS))
    train(adapted)
    expected = output(adapted)
    adapted.save_pretrained(tmp_path)
    for base in (theirs, pair()[1]):
        torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path)), expected, rtol=1e-4, atol=1e-5)


def test_merging_gives_a_plain_model_with_the_same_output():
    _, ours = pair()
    keys = ours.state_dict().keys()
    adapted = get_peft_model(ours, LoraConfig(r=4, target_modules=TARGETS))
    train(adapted)
    expected = output(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is Transformer and merged.state_dict().keys() == keys
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)
    merged.fuse_qkv_projections()
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


def test_adapter_of_diffusers_mixin(tmp_path):
    """`add_adapter`, `save_lora_adapter`, `load_lora_adapter` and their kin, as in diffusers' models with LoRA."""
    _, ours = pair()
    plain = output(ours)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    ours.add_adapter(config)
    expected = output(ours)
    assert (expected - plain).abs().max() > 1e-3
    ours.save_lora_adapter(tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(ValueError, match="Adapter name foo not found"):
        ours.save_lora_adapter(tmp_path, adapter_name="foo")
    metadata = ours.peft_config["default"].to_dict()

    ours.disable_adapters()
    torch.testing.assert_close(output(ours), plain, rtol=0, atol=0)
    ours.enable_adapters()
    torch.testing.assert_close(output(ours), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="adapter"):
        ours.fuse_qkv_projections()
    ours.fuse_lora()
    torch.testing.assert_close(output(ours), expected, rtol=1e-4, atol=1e-5)
    ours.unfuse_lora()
    ours.unload_lora()
    assert not adapted_layers(ours)
    torch.testing.assert_close(output(ours), plain, rtol=1e-4, atol=1e-5)

    for fresh in (ours, pair()[1]):
        fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert fresh.peft_config["default_0"].to_dict() == metadata
        torch.testing.assert_close(output(fresh), expected, rtol=1e-4, atol=1e-5)
    fresh.delete_adapters("default_0")
    torch.testing.assert_close(output(fresh), plain, rtol=1e-4, atol=1e-5)


def test_two_adapters_and_hot_swapping(tmp_path):
    outputs = []
    for seed in (1, 2):
        _, ours = pair()
        torch.manual_seed(seed)
        ours.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
        ours.save_lora_adapter(tmp_path / str(seed))
        outputs.append(output(ours))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    _, ours = pair()
    plain = output(ours)
    ours.load_lora_adapter(tmp_path / "1", prefix=None, adapter_name="first", use_safetensors=True)
    torch.testing.assert_close(output(ours), outputs[0])
    ours.load_lora_adapter(tmp_path / "2", prefix=None, adapter_name="first", hotswap=True, use_safetensors=True)
    torch.testing.assert_close(output(ours), outputs[1])
    ours.load_lora_adapter(tmp_path / "1", prefix=None, adapter_name="second", use_safetensors=True)
    ours.set_adapters(["first", "second"], [0.0, 1.0])
    torch.testing.assert_close(output(ours), outputs[0])
    ours.set_adapters(["first", "second"], [0.0, 0.0])
    torch.testing.assert_close(output(ours), plain)


def test_an_adapter_on_the_adaln_model():
    model = Transformer(**CONFIG, modulation="adaln")
    plain = output(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=[*TARGETS, "adaln", "adaln_out"]))
    train(adapted)
    assert (output(adapted) - plain).abs().max() > 1e-3

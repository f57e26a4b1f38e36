"""The report for bugs."""

import json
import sys

import pytest
import torch

from pixart_fast import env, ops


def test_text_report(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["env"])
    env.main()
    text = capsys.readouterr().out
    for line in (f"torch         {torch.__version__}", "deepspeed ops", "self_attention", "cpu"):
        assert line in text
    choice = ops.resolve("modulated_layernorm")
    assert f"{choice.name} ({choice.reason})" in text


def test_json_report(monkeypatch, capsys):
    """Nothing but JSON on the standard output, though DeepSpeed is imported on the way."""
    monkeypatch.setattr(sys, "argv", ["env", "--json"])
    env.main()
    sections = json.loads(capsys.readouterr().out)
    assert sections["versions"]["torch"].startswith(torch.__version__)
    assert set(sections["optional packages"]) == {"flash-attn", "NVIDIA apex", "liger-kernel", "deepspeed ops"}
    assert sections["kernels"]["native.so"] == (ops.native_problem or "loaded")


def test_unavailable_native_operators_are_shown_with_the_remedy(monkeypatch):
    monkeypatch.setattr(ops, "native_problem", "the native operators are not built (run this)")
    report = env.report()
    assert report["kernels"]["native.so"] == ops.native_problem
    assert env.backends(torch.device("cpu"))["modulated_layernorm"] == f"reference ({ops.native_problem})"


@pytest.fixture
def apex_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "apex"
    folder.mkdir()
    # The unrelated package does not import on Python 3; looking for it must not try.
    (folder / "__init__.py").write_text("raise ImportError('imported')\n")
    return folder


def test_no_apex():
    assert env.apex() == "not installed"


def test_an_unrelated_apex_is_named_as_such(apex_folder):
    assert "unrelated package" in env.apex()


def test_nvidia_apex_is_told_by_its_optimizers(apex_folder):
    (apex_folder / "optimizers").mkdir()
    assert env.apex().startswith("NVIDIA apex")


@pytest.mark.parametrize(
    ("name", "sm", "expected"),
    [
        ("Tesla V100", (7, 0), "Tesla V100, sm_70, 32 GiB; trains in fp16; attention: memory-efficient"),
        ("NVIDIA A100", (8, 0), "NVIDIA A100, sm_80, 32 GiB; trains in bf16; attention: flash"),
    ],
)
def test_a_gpu_is_described(monkeypatch, name, sm, expected):
    class Properties:
        total_memory = 32 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: sm)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert env.describe(torch.device("cuda", 0)) == expected

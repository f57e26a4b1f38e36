"""`python -m pixart_fast.env [--json]`: everything a bug report needs, ready to paste.

Versions, devices with their capability, the backend of every operator and why it was chosen, the kernels, and the
optional packages that were found. It names no folder of the machine.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import shutil
from pathlib import Path

import torch

import pixart_fast
from pixart_fast import ops

PACKAGES = (
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "deepspeed",
    "kernels",
    "pydantic",
    "numpy",
)


def version(package: str) -> str:
    """The installed version of a distribution, found without importing it; "not installed" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    return {
        "pixart_fast": pixart_fast.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        **{package: version(package) for package in PACKAGES},
    }


def devices() -> dict[str, str]:
    """What every device is, the training precision it gets, and the kernel that its attention runs on."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {str(device): describe(device) for device in found}


def describe(device: torch.device) -> str:
    capability = ops.capability(device)
    if capability.sm is None:
        name = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    else:
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = f"{capability.device}, sm_{capability.sm[0]}{capability.sm[1]}, {memory:.0f} GiB"
    return f"{name}; trains in {ops.precision_for(capability)}; attention: {ops.attention_kernel(capability)}"


def backends(device: torch.device) -> dict[str, str]:
    """What "auto" takes for every operator on `device`, in inference and in training, and why."""
    chosen = {}
    for op in ops.OPS:
        inference, training = (ops.resolve(op, "auto", device, needs_grad=needs_grad) for needs_grad in (False, True))
        chosen[op] = f"{inference.name} ({inference.reason})"
        if training != inference:
            chosen[f"{op}, training"] = f"{training.name} ({training.reason})"
    return chosen


def apex() -> str:
    """NVIDIA apex is told by its `apex.optimizers`; the `apex` on PyPI is another project of the same name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    if any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return f"NVIDIA apex {version('apex')}"
    return f"not installed; apex {version('apex')} is an unrelated package of that name, and is not used"


def deepspeed_ops() -> str:
    """Which of DeepSpeed's own operators are built, and which it can build on first use."""
    if importlib.util.find_spec("deepspeed") is None:
        return "not installed"
    # DeepSpeed reports its search for devices and libraries on import, on both streams.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            import deepspeed.ops
            from deepspeed.git_version_info import installed_ops
        except (ImportError, OSError, RuntimeError) as error:
            return f"deepspeed does not import: {error}"
        buildable = [name for name, compatible in deepspeed.ops.__compatible_ops__.items() if compatible]
    built = [name for name, is_built in installed_ops.items() if is_built]
    tools = [tool for tool in ("ninja", "c++", "nvcc") if shutil.which(tool) is None]
    return (
        f"built: {', '.join(built) or 'none'}; can be built on first use: {', '.join(buildable) or 'none'}"
        f"{'; not on the PATH: ' + ', '.join(tools) if tools else ''}"
    )


def optional_packages() -> dict[str, str]:
    return {
        "flash-attn": version("flash-attn"),
        "NVIDIA apex": apex(),
        "liger-kernel": version("liger-kernel"),
        "deepspeed ops": deepspeed_ops(),
    }


def report() -> dict[str, dict[str, str]]:
    """The whole report, section by section."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": versions(),
        "devices": devices(),
        f"backends on {device}": backends(device),
        "kernels": {"native.so": ops.native_problem or "loaded", "Triton": ops.triton_problem or "loaded"},
        "optional packages": optional_packages(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pixart_fast.env", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    sections = report()
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    for title, entries in sections.items():
        print(title)
        width = max(map(len, entries))
        for name, value in entries.items():
            print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    main()

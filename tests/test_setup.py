"""What an install holds, with a compiler and without one, and the set-up rules of the Makefile."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(folder, **environment):
    """The wheel of a copy of the project, unpacked, and what the build said."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pixart_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*pip, "-w", folder, source],
        capture_output=True,
        text=True,
        env={**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "1", **environment},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    unpacked = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked, built.stdout + built.stderr


def run_python(code, site):
    """Runs code in a fresh folder, with an unpacked wheel before everything else on the path."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=site.parent, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel(tmp_path):
    site, _ = build_wheel(tmp_path)
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert {"pixart_fast/ops.py", "pixart_fast/kernels/reference.py", "pixart_fast/native.so"} <= files
    assert {path.partition("/")[0] for path in files if ".dist-info" not in path} == {"pixart_fast"}
    code = (
        "import torch, kernels, pixart_fast.kernels.reference as reference\n"
        "from pixart_fast import ops\n"
        "print(reference.__file__, kernels.__file__, ops.native_problem, ops.resolve('modulated_layernorm').name)\n"
    )
    ours, hugging_face, problem, backend = run_python(code, site).split()
    assert ours == str(site / "pixart_fast" / "kernels" / "reference.py")
    assert not hugging_face.startswith(str(site))
    assert (problem, backend) == ("None", "cpu")


@pytest.mark.slow
def test_an_install_without_a_compiler_works_and_says_so(tmp_path):
    site, said = build_wheel(tmp_path, CXX="no-such-compiler")
    (line,) = [line for line in said.splitlines() if "WITHOUT the native CPU operators" in line]
    assert "--no-build-isolation" in line
    assert not (site / "pixart_fast" / "native.so").exists()
    code = (
        "import torch\nfrom pixart_fast import ops\n"
        "x = torch.randn(2, 3, 4)\n"
        "assert ops.modulated_layernorm(x, x[:, 0], x[:, 0])[1].shape == x.shape\n"
        "print(ops.resolve('modulated_layernorm'))\n"
    )
    assert "name='reference', reason='the native operators are not built (run" in run_python(code, site)


def test_requirements_are_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines and "apex" not in lines
    assert not [line for line in lines if line.partition(";")[0].count("==") != 1]


def test_the_build_backend_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["build-backend"] == "setuptools.build_meta"


@pytest.fixture
def project(tmp_path):
    """A copy of the files that the set-up depends on, with the stamps of a finished set-up."""
    for name in ("Makefile", "requirements.txt", "setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "kernels" / "cpu").mkdir(parents=True)
    shutil.copy(ROOT / "kernels" / "cpu" / "modulated_layernorm.cpp", tmp_path / "kernels" / "cpu")
    (tmp_path / ".venv").mkdir()
    for path in tmp_path.rglob("*"):
        os.utime(path, (1000, 1000))
    for age, stamp in enumerate(("requirements", "package")):
        path = tmp_path / ".venv" / f"{stamp}.stamp"
        path.touch()
        os.utime(path, (2000 + age, 2000 + age))
    return tmp_path


def make(project, *arguments):
    # `make test` runs these tests: its own flags are not theirs.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *arguments], cwd=project, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("target", "command"),
    [("train", ".venv/bin/deepspeed train/run.py zero_stage=2"), ("test", ".venv/bin/python -m pytest zero_stage=2")],
)
def test_a_second_run_does_no_set_up(project, target, command):
    assert make(project, "-n", target, "ARGS=zero_stage=2").stdout.splitlines() == [command]


@pytest.mark.parametrize(
    ("changed", "pip_runs"), [("requirements.txt", 3), ("setup.py", 1), ("kernels/cpu/modulated_layernorm.cpp", 1)]
)
def test_a_change_is_installed(project, changed, pip_runs):
    (project / changed).touch()
    said = make(project, "-n", "test").stdout
    assert said.count("-m pip") == pip_runs
    assert "--no-deps --no-build-isolation -e ." in said


def test_pytorch_can_be_chosen_or_kept(project):
    (project / "requirements.txt").touch()
    chosen = make(project, "-n", "test", "TORCH=torch==2.12.0 --index-url URL").stdout
    assert "install torch==2.12.0 --index-url URL" in chosen and "--system-site-packages" not in chosen
    kept = make(project, "-n", "test", "TORCH=installed").stdout
    assert "install torch" not in kept and "-m venv --system-site-packages" in kept


def test_a_missing_python_is_explained(project):
    (project / "requirements.txt").touch()
    result = make(project, "test", "PYTHON=/no/such/python")
    assert result.returncode != 0
    assert "No Python 3.11 or 3.12 was found" in result.stderr


def test_a_missing_venv_module_is_explained(project):
    """As on a Debian with python3 and without python3-venv."""
    (project / "requirements.txt").touch()
    python = project / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    python.chmod(0o755)
    result = make(project, "test", f"PYTHON={python}")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr
    assert not (project / ".venv" / "bin").exists()

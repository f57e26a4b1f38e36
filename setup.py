import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildNative(build_ext):
    """Builds the C++ operators with CMake. Where that fails the install goes on without them, and one line says so."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        try:
            self.run_cmake(library)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            # A library of an earlier build must not pass for this one's.
            for stale in (library, ROOT / self.get_ext_filename(extension.name)):
                stale.unlink(missing_ok=True)
            print(
                f"pixart_fast: installed WITHOUT the native CPU operators ({error}); plain PyTorch takes "
                "their place. They need a C++20 compiler, CMake, and the PyTorch they will run with: "
                "pip install -v --no-build-isolation -e .",
                file=sys.stderr,
            )

    def run_cmake(self, library):
        import torch  # noqa: F401 - stops an isolated build, which has no PyTorch, with the plain reason

        # CMake and Ninja from pip lie beside the interpreter, which need not be on the PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise FileNotFoundError("cmake was not found")
        ninja = shutil.which("ninja", path=path)
        build = Path(self.build_temp).resolve() / "native"
        configure = [cmake, "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
        configure.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}")
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # A cached configuration of another generator or interpreter is an error to CMake.
        shutil.rmtree(build, ignore_errors=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build, "--parallel"], check=True)


setup(
    name="pixart_fast",
    version="0.1.0",
    description="Training and inference of PixArt-α diffusion transformers, fast",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=["pixart_fast", "pixart_fast.kernels"],
    # pixart_fast/kernels is a link to kernels/. A top-level `kernels` must not be installed: that is Hugging Face's,
    # which diffusers and transformers import. A package_dir entry would do for a wheel, but an editable install cannot
    # find a package without __init__.py by it.
    ext_modules=[
        Extension(
            "pixart_fast.native",
            sources=["kernels/cpu/cross_attention.cpp", "kernels/cpu/modulated_layernorm.cpp"],
            depends=["kernels/cpu/simd.h"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    install_requires=[
        "torch>=2.11",
        "beautifulsoup4",  # diffusers' cleaning of captions asks for it and for ftfy
        "diffusers>=0.36",
        "ftfy",
        "numpy",
        "pillow>=10",
        "protobuf",
        "pydantic>=2",
        "pyyaml>=6",
        "safetensors>=0.4",
        "sentencepiece",  # the published tokenizers are its models, which transformers reads with protobuf
        "tqdm>=4.66",
        "transformers>=4.56",
    ],
    extras_require={
        "demo": ["gradio>=6"],
        "train": [
            "deepspeed>=0.18",
            "matplotlib>=3.8",
            "ninja",
            "ray[data]>=2.40",
            "scipy>=1.11",
            "tensorboard>=2.15",
        ],
        "test": ["kernels", "peft>=0.17", "pytest>=8", "pytest-benchmark>=5", "ruff>=0.14", "selenium"],
    },
)

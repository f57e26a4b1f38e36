"""The arrows between the rooms of the house: who may import whom, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pixart_fast", "kernels", "train", "bench", "tests")


def sources(*rooms):
    """Every Python file of some rooms, by its path from the root. Links, as pixart_fast/kernels, are not followed."""
    return sorted(path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported(path):
    """The absolute names of the modules that a file imports: `from a import b` names both a and a.b."""
    module = path.with_suffix("").parts
    package = module[:-1]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = [*package[: len(package) - node.level + 1]] if node.level else []
            origin += node.module.split(".") if node.module else []
            names |= {".".join(origin), *(".".join([*origin, alias.name]) for alias in node.names)}
    return names


def within(name, *packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def offenders(paths, *forbidden):
    return {f"{path}: {name}" for path in paths for name in imported(path) if within(name, *forbidden)}


def test_the_rooms_are_found():
    """The tests below hold for an empty house too."""
    assert Path("kernels/reference.py") in sources("kernels")
    assert "pixart_fast.kernels.reference" in imported(Path("pixart_fast/ops.py"))


def test_kernels_import_nothing_of_ours():
    assert not offenders(sources("kernels"), *ROOMS)


def test_the_reference_needs_torch_alone():
    assert {name.partition(".")[0] for name in imported(Path("kernels/reference.py"))} == {"torch"}


def test_only_ops_imports_kernels():
    others = sources("pixart_fast", "train", "bench")
    others.remove(Path("pixart_fast/ops.py"))
    assert not offenders(others, "pixart_fast.kernels", "kernels")


def test_only_kernels_and_ops_know_triton():
    others = sources("pixart_fast", "train")
    others.remove(Path("pixart_fast/ops.py"))
    assert not offenders(others, "triton")


@pytest.mark.parametrize("room", ["pixart_fast", "train", "bench"])
def test_nothing_imports_train_bench_or_tests(room):
    assert not offenders(sources(room), *({"train", "bench", "tests"} - {room}))


@pytest.mark.parametrize("module", ["ops", "layers", "transformer"])
def test_the_model_reads_no_environment_variable(module):
    tree = ast.parse((ROOT / "pixart_fast" / f"{module}.py").read_text())
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not named & {"environ", "getenv"}


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_kernels_package_of_hugging_face_is_not_hidden():
    """With the working directory at the root, where our kernels/ comes first on the path."""
    code = (
        "import sys; assert sys.path[0] == ''\n"
        "from kernels import get_kernel\n"
        "import kernels, diffusers, transformers\n"
        "import pixart_fast.ops, pixart_fast.kernels.reference\n"
        "assert sys.modules['kernels'] is kernels and sys.modules['pixart_fast.kernels'] is not kernels\n"
        "print(kernels.__file__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.splitlines()[-1]).parts[-3:] == ("site-packages", "kernels", "__init__.py")

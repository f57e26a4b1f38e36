"""What README tells exists: its commands' files, its paths, its tree, its pictures."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MADE = ("runs/", ".venv", "final/")  # what the commands make


def test_tree_is_the_repository():
    (tree,) = re.findall(r"```tree\n(.*?)```", README, re.S)
    listed, folders = set(), []
    for line in filter(str.strip, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split("#")[0].strip()
        folders[depth:] = [name]
        path = ROOT / "".join(folders)
        assert path.exists(), name
        listed.add(path.resolve())
    for folder, pattern in (
        ("pixart_fast", "*.py"),
        ("train", "*.py"),
        ("train/data", "*.py"),
        ("kernels", "**/*.*p*"),
    ):
        for file in (ROOT / folder).glob(pattern):
            if file.name != "__init__.py" and "__pycache__" not in file.parts:
                assert file.resolve() in listed, f"README's tree lacks {file.relative_to(ROOT)}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_and_pictures_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w./]+\.(?:py|yaml|json|sh|txt|toml)\b", README))))
def test_named_files_exist(path):
    if not path.startswith(MADE) and "/" in path:
        assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (\w+)", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_modules_exist(module):
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists() or module == "pytest"


def test_overrides_in_commands_are_known_keys():
    from train.settings import known_keys

    for command in re.findall(r"deepspeed [^\n`]*train/run\.py([^\n`]*)", README):
        for key in re.findall(r"([\w.]+)=", command):
            assert key in known_keys(), key

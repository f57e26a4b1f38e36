"""The list of mutations fits the sources, and the check that runs it sees what survives."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.mutations import Mutation, Subject
from tests.mutations import __main__ as check

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = [subject for subjects in check.KERNELS.values() for subject in subjects]
MUTATIONS = [
    pytest.param(subject, mutation, id=f"{Path(subject.file).name}: {mutation.name}")
    for subject in SUBJECTS
    for mutation in subject.mutations
]


@pytest.mark.parametrize(("subject", "mutation"), MUTATIONS)
def test_mutation_fits_its_source(subject, mutation):
    """Its text is there exactly once, it changes the code, and its tests are there."""
    source = (ROOT / subject.file).read_text()
    mutated = check.mutate(source, mutation)
    assert mutated != source
    if subject.file.endswith(".py"):
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))
    tests = {
        node.name
        for node in ast.parse((ROOT / subject.test_file).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert mutation.tests and {test.partition("[")[0] for test in mutation.tests} <= tests


def test_names_are_told_apart():
    for subject in SUBJECTS:
        names = [mutation.name for mutation in subject.mutations]
        assert names and len(set(names)) == len(names)


def test_every_kernel_has_mutations():
    files = {path for pattern in ("*.py", "cpu/*") for path in (ROOT / "kernels").glob(pattern)}
    files = {str(path.relative_to(ROOT)) for path in files if path.stem not in ("reference", "inspect")}
    assert files == {subject.file for subject in SUBJECTS}


def test_text_that_is_not_there_once_is_an_error():
    mutation = Mutation("", "a", "b", ())
    for source, count in (("x", 0), ("a a", 2)):
        with pytest.raises(ValueError, match=f"'a' is there {count} times, not once"):
            check.mutate(source, mutation)
    assert check.mutate("x a", mutation) == "x b"


FAILED = "FAILED tests/test_x.py::test_y[1 - 2] - {}\n1 failed in 0.1s\n"


@pytest.mark.parametrize(
    ("status", "said", "verdict"),
    [
        (1, FAILED.format("AssertionError: too far"), "caught"),
        (1, FAILED.format("triton.runtime.errors.InterpreterError: NameError"), "INVALID"),
        (0, "..\n2 passed in 0.1s\n", "SURVIVED"),
        (0, "s.\n1 passed, 1 skipped in 0.1s\n", "SURVIVED"),
        (0, "s\n1 skipped in 0.1s\n", "INVALID"),
        (2, "ERROR tests/test_x.py - SyntaxError\n1 error in 0.1s\n", "INVALID"),
        (4, "ERROR: not found: tests/test_x.py::test_z\nno tests ran in 0.1s\n", "INVALID"),
        (-11, "Fatal Python error: Segmentation fault\n", "crashed"),
        (None, "", "timed out"),
    ],
)
def test_verdicts(status, said, verdict):
    assert check.judge(status, said).verdict == verdict


def test_a_command_without_an_end_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "TIMEOUT", 0.2)
    assert check.run(["sleep", "60"], tmp_path, native=True) == (None, "")


def test_help_and_list(capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("SURVIVED", "--jobs 4", "exit status"))
    assert check.main(["--list", "--kernel", "linear"]) == 0
    listed = capsys.readouterr().out
    assert "wrong sample's gate\n      test_gated_linear[" in listed and "modulated_layernorm" not in listed


def small_check(monkeypatch, *mutations):
    """Runs the command with these mutations of the matrix products alone, and returns its exit status."""
    subject = Subject("kernels/linear.py", "tests/kernels/test_linear.py", mutations)
    monkeypatch.setattr(check, "KERNELS", {"linear": (subject,)})
    return check.main([])


TESTS = ("test_linear_gelu[(2, 63, 100, 72)-dtype0]",)
HARMLESS = Mutation("harmless", "0.044715 * x * x", "0.044715 * (x * x)", TESTS)
HARMFUL = Mutation("harmful", "0.044715 * x * x", "0.05 * x * x", TESTS)
MEANINGLESS = Mutation("meaningless", "0.044715 * x * x", "no_such_name * x * x", TESTS)
INTERPRETED = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@INTERPRETED
@pytest.mark.slow
def test_what_survives_is_reported(monkeypatch, capsys):
    before = (ROOT / "kernels/linear.py").read_text()
    assert small_check(monkeypatch, HARMFUL, HARMLESS, MEANINGLESS) == 1
    verdicts = re.findall(r"^(\w+) +\d+ s  linear\.py: (\w+)", capsys.readouterr().out, re.M)
    assert verdicts == [("caught", "harmful"), ("SURVIVED", "harmless"), ("INVALID", "meaningless")]
    assert (ROOT / "kernels/linear.py").read_text() == before


@INTERPRETED
@pytest.mark.slow
def test_all_caught_is_success(monkeypatch, capsys):
    assert small_check(monkeypatch, HARMFUL) == 0
    assert "1 caught, of 1" in capsys.readouterr().out


@INTERPRETED
@pytest.mark.slow
def test_a_broken_tree_is_refused(monkeypatch, capsys):
    gone = ("test_linear_gelu[of another shape]",)
    assert small_check(monkeypatch, HARMFUL._replace(tests=gone)) == 2
    printed = capsys.readouterr()
    assert "the unbroken tree fails or skips tests" in printed.err and printed.out == ""

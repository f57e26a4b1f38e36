"""Breaks each kernel in many ways, one at a time, and shows that the tests catch every one."""

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tests.mutations import Mutation, Subject, cpu, cross_attention, linear, modulated_layernorm

ROOT = Path(__file__).resolve().parents[2]
KERNELS: dict[str, tuple[Subject, ...]] = {
    "modulated_layernorm": (modulated_layernorm.SUBJECT,),
    "cross_attention": (cross_attention.SUBJECT,),
    "linear": (linear.SUBJECT,),
    "cpu": cpu.SUBJECTS,
}
# All that the kernels' tests need of the tree.
COPIED = ("kernels", "pixart_fast", "tests", "pyproject.toml", "CMakeLists.txt")
# A mutant takes seconds, one in C++ twenty, some minutes on a busy machine: this is one that never ends.
TIMEOUT = 600
DESCRIPTION = """\
Breaks each kernel in many ways, one at a time, and shows that the tests catch every one.

A mutation is a piece of a kernel's source, what it becomes, and the tests that must then fail. Each is applied to a
copy of the tree, never to the tree itself, and its tests are run there: the Triton kernels in Triton's interpreter, the
C++ operators rebuilt by CMake. No GPU is needed. The unbroken copy must pass all these tests first.
"""
EPILOG = f"""\
results:
  caught      a test failed, as it must; which one, and what it said
  crashed     the process died of a signal
  timed out   nothing came within {TIMEOUT} s
  SURVIVED    every test passed: they do not cover what was broken
  INVALID     the mutation itself does not run: no compilation, no import, an error inside the interpreter

exit status: 0 all caught, 1 a mutation survived or is invalid, 2 the unbroken tree fails

examples:
  python -m tests.mutations                          all, a quarter of an hour on one core
  python -m tests.mutations --kernel linear          one kernel
  python -m tests.mutations --kernel cpu --list      what would be broken, and the tests that must notice
  python -m tests.mutations --jobs 4                 four at a time

To add one: an entry in tests/mutations/<kernel>.py. tests/test_mutations.py checks that its text is there once.
"""


class Result(NamedTuple):
    verdict: str
    reason: str


def mutate(source: str, mutation: Mutation) -> str:
    """The source with the mutation. Raises ValueError unless the old text is there exactly once."""
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} is there {count} times, not once")
    return source.replace(mutation.old, mutation.new)


def is_native(subject: Subject) -> bool:
    return not subject.file.endswith(".py")


def node_ids(subject: Subject, mutations: Sequence[Mutation]) -> list[str]:
    """Every test that the mutations name, once."""
    return list(dict.fromkeys(f"{subject.test_file}::{test}" for mutation in mutations for test in mutation.tests))


def run(command: Sequence[str | Path], tree: Path, *, native: bool) -> tuple[int | None, str]:
    """Exit status (None: no end within TIMEOUT) and output of a command in a tree."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if not native:
        environment["TRITON_INTERPRET"] = "1"
    # Bytecode is told from stale by the second and the size: two mutants of one second would be one. pytest cuts what a
    # test says to the terminal's width. One thread: with more, a break between samples can fall together with theirs.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    # CMake from pip lies beside the interpreter, which need not be on the PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def build(tree: Path) -> tuple[int | None, str]:
    """Compiles the C++ operators of a tree into its package, after the first time only what changed."""
    if not (tree / "build").exists():
        output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tree / 'pixart_fast'}"
        command = ["cmake", "-S", tree, "-B", tree / "build", f"-DPython_EXECUTABLE={sys.executable}", output]
        status, said = run(command, tree, native=True)
        if status != 0:
            return status, said
    return run(["cmake", "--build", tree / "build", "--parallel"], tree, native=True)


def run_tests(tree: Path, ids: Sequence[str], *, native: bool) -> tuple[int | None, str]:
    """Runs tests up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *ids]
    return run(command, tree, native=native)


def judge(status: int | None, said: str) -> Result:
    """What pytest's exit status and summary say of a mutant."""
    if status is None:
        return Result("timed out", f"after {TIMEOUT} s")
    if status < 0:
        return Result("crashed", signal.Signals(-status).name)
    failure = re.search(r"^FAILED [^:]*::(.*)", said, re.M)
    if status == 1 and failure and "InterpreterError" not in failure[1]:
        return Result("caught", failure[1])
    # Tests that were skipped saw nothing.
    if status == 0 and re.search(r"^\d+ passed", said, re.M):
        return Result("SURVIVED", said.splitlines()[-1])
    return Result("INVALID", failure[1] if failure else said[-300:])


def copy_tree(tree: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


def complaint(tree: Path, subjects: Sequence[Subject]) -> str | None:
    """Why the unbroken tree is no ground to judge mutants from; None if all their tests pass, and none is skipped."""
    for native in {is_native(subject): None for subject in subjects}:
        if native:
            status, said = build(tree)
            if status != 0:
                return f"the C++ operators do not build:\n{said[-3000:]}"
        ids = [i for s in subjects if is_native(s) == native for i in node_ids(s, s.mutations)]
        status, said = run_tests(tree, ids, native=native)
        if status != 0 or not re.fullmatch(rf"{len(ids)} passed( in|, \d+ warn).*", said.splitlines()[-1]):
            return f"the unbroken tree fails or skips tests:\n{said[-3000:]}"
    return None


def try_mutation(tree: Path, subject: Subject, mutation: Mutation) -> Result:
    """Applies a mutation to a tree, runs its tests, and mends the tree."""
    path = tree / subject.file
    source = path.read_text()
    path.write_text(mutate(source, mutation))
    try:
        if is_native(subject):
            status, said = build(tree)
            if status != 0:
                return Result("INVALID", f"does not compile: {said[-300:]}")
        return judge(*run_tests(tree, node_ids(subject, [mutation]), native=is_native(subject)))
    finally:
        path.write_text(source)


def results(
    trees: Sequence[Path], tasks: Sequence[tuple[Subject, Mutation]]
) -> Iterator[tuple[Subject, Mutation, Result, float]]:
    """Every mutation's result and seconds, in order, as many at a time as there are trees."""
    free = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def attempt(task: tuple[Subject, Mutation]) -> tuple[Subject, Mutation, Result, float]:
        tree, start = free.get(), time.monotonic()
        try:
            return *task, try_mutation(tree, *task), time.monotonic() - start
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        yield from pool.map(attempt, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", choices=KERNELS, help="this kernel's mutations only; cpu is the C++ operators")
    parser.add_argument("--list", action="store_true", help="print the mutations and their tests, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time (1), each on one thread")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is at least 1, not {options.jobs}")

    subjects = [s for kernel, of_kernel in KERNELS.items() if options.kernel in (None, kernel) for s in of_kernel]
    tasks = [(subject, mutation) for subject in subjects for mutation in subject.mutations]
    if options.list:
        for subject in subjects:
            print(subject.file)
            for mutation in subject.mutations:
                print(f"  {mutation.name}", *(f"      {test}" for test in mutation.tests), sep="\n")
        return 0

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trees = [copy_tree(Path(folder, str(job))) for job in range(options.jobs)]
        print("The unbroken tree first: its tests must pass.", file=sys.stderr)
        problem = complaint(trees[0], subjects)
        if problem is not None:
            print(f"python -m tests.mutations: {problem}", file=sys.stderr)
            return 2
        counts = {}
        with tqdm(total=len(tasks), unit="mutant", dynamic_ncols=True, file=sys.stderr) as bar:
            for subject, mutation, result, seconds in results(trees, tasks):
                counts[result.verdict] = counts.get(result.verdict, 0) + 1
                name = f"{Path(subject.file).name}: {mutation.name}"
                bar.write(f"{result.verdict:<9} {seconds:4.0f} s  {name:<76} {' '.join(result.reason.split())[:150]}")
                bar.update()
    print(*(f"{count} {verdict}" for verdict, count in counts.items()), f"of {len(tasks)}", sep=", ", end="")
    print(f", in {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if counts.keys() & {"SURVIVED", "INVALID"} else 0


if __name__ == "__main__":
    sys.exit(main())

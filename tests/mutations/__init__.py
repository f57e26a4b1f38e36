"""Kernels broken on purpose: which change, and which tests must notice. `python -m tests.mutations` tries them all."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which the file holds exactly once, becomes `new`; at least one of the tests must then fail."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


class Subject(NamedTuple):
    """A source file, the test file that its mutations name tests of, and the mutations."""

    file: str
    test_file: str
    mutations: tuple[Mutation, ...]

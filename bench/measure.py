"""How a row of the benchmark is measured: an operator or a model at one shape, every path side by side.

`compare` takes a `Case` and gives a `Row` for each of its paths, or the sentence that says why there is none:

1. accuracy: relative RMS error against fp64 of every output and gradient, for "ours" at most 1.25 times that of plain
   PyTorch at the same dtype (of a model's: all together, each at most twice), for the others 10 times, which shows
   that they compute the same; a path that errs more is not timed;
2. time: the paths take turns, round by round, so that a slow spell of the machine hits all of them. On CUDA a round is
   the replay of a CUDA graph that calls the path with one input set after the other, between two events; on the CPU,
   and for whole models, it is one call. The input sets are so many that a set has left the cache when its turn comes
   again;
3. limit: the larger of the least bytes over the rate of a copy and the least arithmetic over the rate of a large matrix
   product, both measured in the same run (`Ceilings`); of a model the sum over its operators, which run one by one.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._inductor.utils import fresh_cache

from bench import cost

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A CPU's last-level cache is not told by PyTorch; 32 MB is that of the machines seen so far.
CPU_CACHE = 32 * 2**20
ACCURACY = 1.25
ACCURACY_OF_ONE = 2.0  # of a model's results
# Compiled PyTorch sums the 4096 rows of a fp32 gradient 7 times less accurately than eager PyTorch.
ACCURACY_OF_BASELINES = 10.0
SECONDS_PER_CASE = {"cuda": 2.0, "cpu": 0.7}
# What a graph moves at least, so that the launch of the graph, some microseconds, is nothing beside it.
GRAPH_BYTES = 2 * 2**30
ROUNDS = (9, 60)
ROUNDS_OF_MODELS = (6, 60)

Operands = tuple[Any, ...]


@dataclass(frozen=True)
class Path:
    """One way to compute an operator.

    `pack` makes the function's own operands from the case's (a mask, an unpadded copy), outside of the clock: what a
    model would do once for all its blocks. `unpack` brings packed gradients back to the shapes of the case's operands.
    Of a model, `weights` are leaves besides the operands and `update` is what an optimizer does with all gradients;
    the first call of a `compiled` path is timed with an empty compiler cache. `accuracy` is how many times plain
    PyTorch's error it may have, where that is not what its name implies: 8 bits are an approximation.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    pack: Callable[..., Operands] = lambda *operands: operands
    unpack: Callable[[tuple[Tensor, ...], Operands], tuple[Tensor, ...]] = lambda gradients, operands: gradients
    weights: tuple[Tensor, ...] = ()
    update: Callable[[tuple[Tensor, ...]], None] | None = None
    compiled: bool = False
    accuracy: float | None = None


@dataclass(frozen=True)
class Case:
    """An operator at one shape and dtype, in one pass ("forward", "backward" or "forward+backward").

    inputs     a generator to operands and upstream gradients; operands that require a gradient are the leaves
    plain      the operator in plain PyTorch, any floating dtype: in fp64 the first is the truth, in `dtype` the least
               accurate of them is the accuracy to keep
    paths      by name; "ours" is the project's. A sentence stands for a path that this machine does not have
    backend    the backend of "ours"
    bytes      the least that has to move: every operand read once, every result written once
    flops      the least arithmetic of the matrix products, 0 where there are none
    by_sample  every operand has the samples first, so that truth can be computed one sample at a time
    parts      the costs of what runs one after the other, where the case is more than one operator
    checked    how many samples the accuracy check looks at: truth in fp64 is dear, and may not fit
    images     pictures per call, of a model
    labels     what a row of a model says of its size
    graphed    whether a CUDA graph holds the calls; a model is called as its users call it
    truth      what gives the truth in fp64, where it is not the first of `plain`: a model with fp64 weights
    """

    op: str
    passes: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    inputs: Callable[[torch.Generator], tuple[Operands, tuple[Tensor, ...]]]
    plain: tuple[Path, ...]
    paths: dict[str, Path | str]
    backend: str
    bytes: int
    flops: int = 0
    by_sample: bool = False
    parts: tuple[cost.Cost, ...] = ()
    checked: int | None = None
    images: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    graphed: bool = True
    truth: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.passes} {self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Row:
    """What is known of one path: the error, the bound that it kept, seconds per call of every round, and those of the
    first call where that compiled."""

    error: float
    bound: float
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, as measured: bytes read and written per second by a copy, flop per second."""

    copy: float
    matmul: dict[str, float]

    def limit(self, case: Case) -> tuple[float, str]:
        """The least seconds of a case, and which ceiling sets them, or most of them."""
        rate = self.matmul[str(case.dtype).removeprefix("torch.")]
        return cost.limit(case.parts or cost.Cost(case.flops, case.bytes), self.copy, rate)


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy far larger than the caches and a large square product of random matrices, medians."""
    on_gpu = device.type == "cuda"
    source = torch.randn(2**29 if on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median_seconds(partial(target.copy_, source), device)
    size, matmul = 8192 if on_gpu else 1024, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if on_gpu else (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _median_seconds(partial(torch.matmul, a, b), device)
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return Ceilings(copy, matmul)


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(5):
        call()
    clock = _events if device.type == "cuda" else _perf_counter
    return statistics.median(clock([call], 11)[0])


def compare(case: Case, rounds: int | None = None) -> dict[str, Row | str]:
    """Every path of a case: its `Row`, or why it has none.

    `rounds` is chosen so that the case takes about `SECONDS_PER_CASE`; 0 checks accuracy alone.
    Raises whatever a path of the project raises; a baseline that raises RuntimeError, ValueError, TypeError,
    AssertionError or ImportError is reported as absent.
    """
    if case.device.type != "cuda":
        return _compare(case, rounds)
    # One side stream for all of it: autograd runs a backward on the stream of its forward and gathers gradients on the
    # stream that first met their leaf, and a capture may not touch a stream but its own.
    torch.cuda.synchronize(case.device)
    with torch.cuda.stream(torch.cuda.Stream(case.device)):
        results = _compare(case, rounds)
    torch.cuda.synchronize(case.device)
    torch.cuda.empty_cache()  # the graphs' pools
    return results


def _compare(case: Case, rounds: int | None) -> dict[str, Row | str]:
    torch.compiler.reset()  # the recompilation limit counts over all cases otherwise
    generator = torch.Generator(case.device).manual_seed(0)
    first = case.inputs(generator)
    operands, upstream = first
    few = slice(case.checked)
    truth, plain = _truth(case, tuple(_of(operand, few) for operand in operands), tuple(of[few] for of in upstream))
    # The rest of the batch has no part in the gradients that are compared.
    upstream = tuple(torch.cat([of[few], torch.zeros_like(of[len(of[few]) :])]) for of in upstream)
    results: dict[str, Row | str] = {}
    for name, path in case.paths.items():
        results[name] = (
            path if isinstance(path, str) else _checked(case, name, path, (operands, upstream), truth, plain)
        )
    del truth, plain
    timed = [name for name, row in results.items() if isinstance(row, Row) and row.error <= row.bound]
    if rounds != 0 and timed:
        sets = [first] + [case.inputs(generator) for _ in range(_rotation(case) - 1)]
        for name, seconds in _timed(case, timed, sets, rounds, results).items():
            results[name].seconds = seconds
    return results


def _of(operand: Any, samples: slice) -> Any:
    """Some samples of an operand that has samples."""
    return operand[samples] if samples.stop is not None and isinstance(operand, Tensor) else operand


def _rotation(case: Case) -> int:
    """How many input sets leave the cache behind: four caches' worth, two at least, eight at most."""
    cache = CPU_CACHE
    if case.device.type == "cuda":
        cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    return min(8, max(2, -(-4 * cache // case.bytes)))


def _prepare(
    case: Case, path: Path, operands: Operands, upstream: tuple[Tensor, ...], *, update: bool = False
) -> Callable[[], tuple]:
    """A call without arguments that gives the outputs, the gradients, or both, as the case's pass has it."""
    operands = path.pack(*operands)
    leaves = [operand for operand in operands if isinstance(operand, Tensor) and operand.requires_grad]
    leaves += path.weights

    def outputs() -> tuple[Tensor, ...]:
        result = path.function(*operands)
        return result if isinstance(result, tuple) else (result,)

    if case.passes == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return outputs()

        return forward
    if case.passes == "backward":
        # The gradients of a graph that stays: torch.compile must not reuse its buffers for them.
        with torch._functorch.config.patch(donated_buffer=False):
            results = outputs()
        return lambda: torch.autograd.grad(results, leaves, upstream, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        results = outputs()
        gradients = torch.autograd.grad(results, leaves, upstream)
        if update and path.update is not None:
            path.update(gradients)
        return *(result.detach() for result in results), *gradients

    return both


def _results(case: Case, path: Path, operands: Operands, upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The path's results of the samples that are checked, its gradients in the shapes of the case's leaves."""
    results = _prepare(case, path, operands, upstream)()
    few = slice(case.checked)
    if case.passes == "forward":
        return tuple(result[few] for result in results)
    gradients = len(upstream) if case.passes == "forward+backward" else 0
    return tuple(result[few] for result in results[:gradients]) + path.unpack(results[gradients:], operands)


def _truth(case: Case, operands: Operands, upstream: tuple[Tensor, ...]) -> tuple[list[Tensor], list[float]]:
    """The results in fp64, and how far plain PyTorch at the case's dtype is from each at most."""

    def as_double(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    def one(value: Any, sample: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach()[sample : sample + 1].requires_grad_(value.requires_grad)

    samples = [(operands, upstream)]
    if case.by_sample:
        samples = [
            (tuple(one(value, sample) for value in operands), tuple(one(value, sample) for value in upstream))
            for sample in range(operands[0].shape[0])
        ]
    doubles = [(tuple(map(as_double, operands)), tuple(map(as_double, upstream))) for operands, upstream in samples]
    truth = _joined(case, case.truth or case.plain[0], doubles)
    errors = []
    for path in case.plain:
        results = _joined(case, path, samples)
        errors.append([rms_error(result, expected) for result, expected in zip(results, truth, strict=True)])
    return truth, [max(of) for of in zip(*errors, strict=True)]


def _joined(case: Case, path: Path, samples: list[tuple[Operands, tuple[Tensor, ...]]]) -> list[Tensor]:
    """The path's results, computed part by part."""
    results = [[result.detach() for result in _results(case, path, *inputs)] for inputs in samples]
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def _checked(case: Case, name: str, path: Path, inputs: tuple, truth: list[Tensor], plain: list[float]) -> Row | str:
    """The error of a path and its bound, those of the output that comes closest to its bound or is farthest beyond."""
    try:
        results, seconds = _first_results(case, path, inputs)
    except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
        if is_project(name):
            raise
        return f"does not run: {(str(error) or type(error).__name__).strip().splitlines()[0]}"
    factor = path.accuracy or (ACCURACY if is_project(name) else ACCURACY_OF_BASELINES)
    errors, bounds = [], []
    for result, expected, plain_error in zip(results, truth, plain, strict=True):
        if result.shape != expected.shape:
            raise ValueError(f"{case.name}, {name}: {list(result.shape)} instead of {list(expected.shape)}")
        errors.append(rms_error(result, expected))
        bounds.append(max(factor * plain_error, torch.finfo(result.dtype).eps / 8))
    rows = [Row(error, bound, compile_seconds=seconds) for error, bound in zip(errors, bounds, strict=True)]
    worst = max(rows, key=lambda row: math.inf if math.isnan(row.error) else row.error / row.bound)
    if not case.images:
        return worst
    # The error of each of a model's many gradients is a draw: compiled PyTorch exceeds 1.25 times eager PyTorch in
    # some. So all of them keep the bound together, by the root mean square, and each keeps twice plain PyTorch's error.
    together = (math.hypot(*of) / len(of) ** 0.5 for of in (errors, bounds))
    together = Row(*together, compile_seconds=seconds)
    slack = ACCURACY_OF_ONE / ACCURACY if is_project(name) else 1.0
    return together if worst.error <= slack * worst.bound else worst


def is_project(path: str) -> bool:
    """Whether a path is the project's own: "ours" with what it adds, or a rung of the ladder."""
    return path.startswith(("ours", "+"))


def _first_results(case: Case, path: Path, inputs: tuple) -> tuple[tuple[Tensor, ...], float | None]:
    """The results, and of a compiled path the seconds until they were there, with nothing in the compiler's cache."""
    if not path.compiled:
        return _results(case, path, *inputs), None
    _warm_compiler(case.device)
    with fresh_cache():
        begin = time.perf_counter()
        results = _results(case, path, *inputs)
        if case.device.type == "cuda":
            torch.cuda.synchronize(case.device)
        return results, time.perf_counter() - begin


@cache
def _warm_compiler(device: torch.device) -> None:
    """The compiler's own start, imports and worker processes, belongs to no path."""
    with fresh_cache():
        torch.compile(lambda x: torch.nn.functional.gelu(x) + 1)(torch.zeros(4096, device=device))


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error |actual - expected| / |expected| in fp64; absolute where expected is all zero."""
    expected = expected.double()
    norm = expected.norm().item()
    return (actual.double() - expected).norm().item() / (norm or 1.0)


def _timed(
    case: Case, names: list[str], sets: list, rounds: int | None, results: dict[str, Row | str]
) -> dict[str, list[float]]:
    """Seconds per call of every round, by path. Paths that a CUDA graph cannot hold are noted in `results`."""
    calls, kept, per_round = {}, [], 1
    turns = min(16, max(1, GRAPH_BYTES // (case.bytes * len(sets))))
    for name in names:
        if case.device.type != "cuda" or not case.graphed:
            prepared = [_prepare(case, case.paths[name], *inputs, update=True) for inputs in sets]
            calls[name] = _in_turn(prepared)
            continue
        try:
            graph, memory = _captured(case, case.paths[name], sets, turns)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if is_project(name):
                raise
            results[name] = f"does not run in a CUDA graph: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        kept.append(memory)
        calls[name], per_round = graph.replay, len(sets) * turns
    clock = _events if case.device.type == "cuda" else _perf_counter
    clock(list(calls.values()), len(sets) if per_round == 1 else 2)  # every input set, or every graph, has run
    if rounds is None:
        once = sum(map(statistics.mean, clock(list(calls.values()), 1 if case.images else 2)))
        least, most = ROUNDS_OF_MODELS if case.images else ROUNDS
        rounds = min(most, max(least, int(SECONDS_PER_CASE[case.device.type] / once)))
    # A whole number of turns, so that every path meets every input set equally often.
    rounds = -(-rounds // len(sets)) * len(sets) if per_round == 1 else rounds
    with _no_collector():
        seconds = clock(list(calls.values()), rounds)
    return {name: [s / per_round for s in of] for name, of in zip(calls, seconds, strict=True)}


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    turn = iter(range(10**9))
    return lambda: calls[next(turn) % len(calls)]()


def _captured(case: Case, path: Path, sets: list, turns: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call per input set, some turns of them, and the memory that it reads and writes."""
    calls = [_prepare(case, path, *inputs) for inputs in sets]
    for _ in range(3):
        for call in calls:
            call()
    torch.cuda.synchronize(case.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(case.device)):
        # All kept, so that each call writes memory of its own.
        results = [call() for _ in range(turns) for call in calls]
    return graph, (calls, results)


def _events(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds between two events around each call, the calls taking turns."""
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, of in zip(calls, marks, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            of.append((start, end))
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) / 1e3 for start, end in of] for of in marks]


def _perf_counter(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call on the CPU, the calls taking turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, of in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            of.append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

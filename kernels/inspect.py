"""`python -m pixart_fast.kernels.inspect`: what the GPU kernels are made of, compiled here and read, without a GPU.

Every configuration that the launchers use at XL/2's shapes (`variants` of each kernel module, from what its launchers
read too) is compiled for an architecture, and its PTX, its SASS and the assembler's resource usage are counted:

    regs         registers of a thread; 255 is the end, and what does not fit goes to
    spill        bytes of local memory of a thread: registers that spilled
    shared       bytes of shared memory of a CTA (a program in Triton's terms)
    mma, sass    tensor-core instructions in PTX (mma.sync, wgmma) and in SASS (HMMA, HGMMA, ...), a loop counted once;
                 "-" where the disassembler does not know the architecture (sm_70, with Triton 3.7)
    load, store  global memory instructions in PTX, those of 128 bits and all of them; cp.async is a load
    bar          barriers of a CTA
    CTAs, warps  that fit on one multiprocessor at a time: its occupancy, by registers, shared memory and warps

It is evidence of what will run, not of how long it takes. Triton 3.6 and 3.7 are known to work.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = ("modulated_layernorm", "cross_attention", "linear")

# What a launch finds at the model's shapes: PyTorch's tensors and their rows begin at multiples of 16 elements.
DIVISIBILITY = 16


class Limits(NamedTuple):
    """One multiprocessor: CUDA C++ Programming Guide, technical specifications per compute capability.

    `shared` is bytes in all; a CTA takes `reserved` of them for the system (NVIDIA Ampere and Hopper tuning guides) and
    is given a multiple of `granule`. A warp is given a multiple of 256 registers of one of four register files.
    """

    registers: int
    warps: int
    ctas: int
    shared: int
    reserved: int
    granule: int


LIMITS = {
    70: Limits(65536, 64, 32, 96 * 1024, 0, 256),
    80: Limits(65536, 64, 32, 164 * 1024, 1024, 128),
    90: Limits(65536, 64, 32, 228 * 1024, 1024, 128),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled configuration. `mma_flops` is the work of a CTA's tensor-core instructions, a loop counted once."""

    module: str
    variant: str
    sm: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: int
    mma_sass: int | None
    mma_flops: int
    loads_128: int
    loads: int
    stores_128: int
    stores: int
    barriers: int
    num_warps: int
    ctas: int
    triton: str

    @property
    def warps(self) -> int:
        return self.ctas * self.num_warps


def resident_ctas(sm: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many CTAs fit on one multiprocessor at a time; 0 where one is too large."""
    limits = LIMITS[sm]
    registers_of_warp = triton.cdiv(registers * 32, 256) * 256
    warps = limits.registers // 4 // registers_of_warp * 4
    shared = triton.cdiv(shared_bytes + limits.reserved, limits.granule) * limits.granule
    by_shared = limits.shared // shared if shared else limits.ctas
    return min(limits.ctas, limits.warps // num_warps, warps // num_warps, by_shared)


def compile_variant(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], options: dict[str, int], sm: int
) -> Any:
    """Triton's compiled kernel for sm, by cross-compilation.

    A signature has the type of every argument that is not in `constexprs`. Pointers, "i32:16" and what has "stride" in
    its name are divisible by 16, as Triton finds them at a launch: without it the loads are 2 to 4 bytes wide.
    Raises ValueError where an argument has no type, or a type no argument.
    """
    types = {name: type_ for name, type_ in signature.items() if name not in constexprs}
    if problem := set(kernel.arg_names) ^ (types.keys() | constexprs.keys()):
        raise ValueError(f"{kernel.__name__}: {sorted(problem)} stand in its arguments or in its variant, not in both")
    aligned = {
        name
        for name, type_ in types.items()
        if type_.startswith("*") or type_.endswith(":16") or (type_.startswith("i") and "stride" in name)
    }
    attributes = {
        (index,): [["tt.divisibility", DIVISIBILITY]] for index, name in enumerate(kernel.arg_names) if name in aligned
    }
    signature = {name: types.get(name, "constexpr").removesuffix(":16") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def measure(compiled: Any, sm: int, *, sass: bool = True) -> dict[str, Any]:
    """The counts of a `Row`, without its names, from a kernel that `compile_variant` returned.

    Without `sass` nothing is disassembled, which takes as long as many a kernel takes to compile.
    """
    ptx, num_warps = compiled.asm["ptx"], compiled.metadata.num_warps
    registers, stack = _resources(compiled.asm["cubin"])
    loads = [*_widths(ptx, "ld"), *(8 * int(n, 0) for n in re.findall(r"\bcp\.async\.c[ag]\..*?\], (\w+)", ptx))]
    stores = _widths(ptx, "st")
    # wgmma is one instruction of the four warps of a group, mma one of a warp.
    shapes = re.findall(r"\b(wgmma\.mma_async|mma)\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    flops = sum(
        2 * int(m) * int(n) * int(k) * num_warps // (4 if name == "wgmma.mma_async" else 1) for name, m, n, k in shapes
    )
    return {
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "mma": len(shapes),
        "mma_sass": _tensor_cores_in_sass(compiled.asm["cubin"]) if sass else None,
        "mma_flops": flops,
        "loads_128": loads.count(128),
        "loads": len(loads),
        "stores_128": stores.count(128),
        "stores": len(stores),
        "barriers": len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync\b", ptx)),
        "num_warps": num_warps,
        "ctas": resident_ctas(sm, registers, compiled.metadata.shared, num_warps),
    }


def _widths(ptx: str, instruction: str) -> list[int]:
    """Bits that every global `ld` or `st` in PTX moves for a thread, vectors as a whole."""
    found = re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return [int(vector or 1) * int(bits) for vector, bits in found]


def _cuobjdump(cubin: bytes, option: str) -> subprocess.CompletedProcess:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True)


def _resources(cubin: bytes) -> tuple[int, int]:
    result = _cuobjdump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", result.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no resource usage: {result.stdout}{result.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _tensor_cores_in_sass(cubin: bytes) -> int | None:
    sass = _cuobjdump(cubin, "-sass").stdout
    return len(re.findall(r"\b[BDHIQ]G?MMA\b", sass)) if "EXIT" in sass else None  # every program ends with EXIT


def variants(sms: Iterable[int], names: Iterable[str] = MODULES) -> Iterator[tuple[str, int, tuple]]:
    """(module, sm, variant) of every kernel module in `names` that exists, for every architecture."""
    for name in names:
        if importlib.util.find_spec(f"{__package__}.{name}") is not None:
            module = importlib.import_module(f"{__package__}.{name}")
            for sm in sms:
                yield from ((name, sm, variant) for variant in module.variants(sm))


def inspect_kernels(
    sms: Iterable[int] = (80, 90), names: Iterable[str] = MODULES, *, sass: bool = True, workers: int = 2
) -> list[Row]:
    """Compiles the variants of the kernel modules `names` for the architectures `sms`, `workers` at a time.

    The rows come in the order of modules, architectures and variants. Raises RuntimeError in a process in which Triton
    interprets the kernels instead of compiling them.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets the kernels here (TRITON_INTERPRET=1): to inspect them, compile them")

    def inspect(job: tuple[str, int, tuple]) -> Row:
        module, sm, (label, *variant) = job
        return Row(
            module, label, sm, triton=triton.__version__, **measure(compile_variant(*variant, sm), sm, sass=sass)
        )

    jobs = list(variants(sms, names))
    with ThreadPoolExecutor(workers) as pool:
        return list(_progress(pool.map(inspect, jobs), len(jobs)))


def _progress(rows: Iterator[Row], total: int) -> Iterable[Row]:
    """The rows, with a bar on a terminal's stderr if tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        return rows
    from tqdm import tqdm

    return tqdm(rows, "compiling", total, unit="kernel", leave=False, disable=None)


def table(rows: list[Row]) -> str:
    """The rows as text, one line each under a line of names, columns aligned."""
    head = (
        "module",
        "variant",
        "sm",
        "regs",
        "spill",
        "shared",
        "mma",
        "sass",
        "load",
        "store",
        "bar",
        "CTAs",
        "warps",
    )
    lines = [head]
    for row in rows:
        sass = "-" if row.mma_sass is None else row.mma_sass
        counts = (row.sm, row.registers, row.spill_bytes, row.shared_bytes, row.mma, sass)
        memory = (f"{row.loads_128}/{row.loads}", f"{row.stores_128}/{row.stores}")
        lines.append(
            (row.module, row.variant, *map(str, counts), *memory, *map(str, (row.barriers, row.ctas, row.warps)))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust, str.ljust, *[str.rjust] * (len(head) - 2)]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)) for line in lines
    )


def main(arguments: list[str] | None = None) -> None:
    summary, _, explanation = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pixart_fast.kernels.inspect",
        description=summary,
        epilog=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sm",
        type=int,
        nargs="+",
        default=[80, 90],
        choices=sorted(LIMITS),
        metavar="CAPABILITY",
        help="compute capabilities: 70 is V100, 80 A100, 90 H100 and H200 (default: 80 90)",
    )
    parser.add_argument(
        "--kernel", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE", help=f"some of {', '.join(MODULES)}"
    )
    parser.add_argument("--workers", type=int, default=2, help="kernels compiled at a time (default: 2)")
    parser.add_argument("--json", action="store_true", help="print a JSON list, with more columns, instead of a table")
    options = parser.parse_args(arguments)
    try:
        rows = inspect_kernels(options.sm, options.kernel, workers=options.workers)
    except RuntimeError as error:
        sys.exit(f"{parser.prog}: {error}")
    if options.json:
        print(json.dumps([dataclasses.asdict(row) | {"warps": row.warps} for row in rows], indent=1))
    else:
        print(f"{table(rows)}\nTriton {triton.__version__}")


if __name__ == "__main__":
    main()

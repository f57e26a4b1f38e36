"""The GPU kernels, compiled for V100, A100 and H100 without a GPU: their budgets, and that the tool counts truly."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets the kernels in this process instead of compiling them", allow_module_level=True)

import triton.language as tl  # noqa: E402 - after the skips

from pixart_fast.kernels import cross_attention, inspect, linear, modulated_layernorm  # noqa: E402

KERNELS = {"modulated_layernorm": modulated_layernorm, "cross_attention": cross_attention, "linear": linear}
HEAD_DIM = 72
TYPES = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*i64": torch.int64,
    "*i8": torch.int8,
}
TYPES["*fp8e4nv"] = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def rows():
    """Every shipped configuration on sm_80 and sm_90, and those that V100 gets."""
    return inspect.inspect_kernels((80, 90), sass=False) + inspect.inspect_kernels((70,), sass=False)


def of(rows, module, label="", sms=(80, 90)):
    """The rows of a module whose label begins so; some on each of `sms`, so that no budget holds for nothing."""
    found = [row for row in rows if row.module == module and row.variant.startswith(label)]
    assert {row.sm for row in found} >= set(sms), f"no {module} {label!r} on every one of {sms}"
    return found


def variant_of(row):
    """kernel, signature, constexprs, options"""
    return next(rest for label, *rest in KERNELS[row.module].variants(row.sm) if label == row.variant)


@pytest.mark.slow
@pytest.mark.parametrize("module", KERNELS)
def test_nothing_spills(rows, module):
    spilling = {(row.variant, row.sm): row.spill_bytes for row in of(rows, module) if row.sm >= 80 and row.spill_bytes}
    assert not spilling


@pytest.mark.slow
@pytest.mark.parametrize(("label", "registers"), [("forward", 64), ("backward", 128)])
def test_registers_of_the_fused_layernorm(rows, label, registers):
    found = [row for row in of(rows, "modulated_layernorm", label) if row.sm >= 80]
    assert {(row.variant, row.sm): row.registers for row in found if row.registers > registers} == {}


@pytest.mark.slow
def test_v100_has_the_fused_layernorm_alone(rows):
    found = [row for row in rows if row.sm == 70]
    assert {row.module for row in found} == {"modulated_layernorm"}
    assert {row.variant.split(",")[0] for row in found} == {"forward", "backward", "sum over programs"}
    assert not {row.variant: row.spill_bytes for row in found if row.spill_bytes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "data"),
    [("forward", {"x_ptr", "residual_ptr"}), ("backward", {"dx1_ptr", "dy_ptr", "x1_ptr", "residual_ptr"})],
)
def test_the_fused_layernorm_reads_128_bits_at_a_time(rows, label, data):
    """As many 128-bit loads as the first 1024 columns of all operands take, or more; the last 128 are too few."""
    for row in of(rows, "modulated_layernorm", label):
        _, signature, constexprs, _ = variant_of(row)
        inputs = data & signature.keys()
        inputs |= {name for name in signature if re.fullmatch("(gate|shift|scale)(_row)?_ptr", name)}
        itemsizes = [TYPES[signature[name]].itemsize for name in inputs]
        assert len(itemsizes) >= 4
        needed = sum(constexprs["HEAD"] * itemsize // (32 * row.num_warps * 16) for itemsize in itemsizes)
        assert row.loads_128 >= needed, (row.variant, row.sm)


@pytest.mark.slow
def test_products_run_on_tensor_cores(rows):
    products = of(rows, "cross_attention") + of(rows, "linear")
    assert all(row.mma > 0 for row in products)
    assert not any(row.mma for row in of(rows, "modulated_layernorm"))
    assert not any(row.sm < 80 for row in products)


@pytest.mark.slow
def test_heads_of_72_are_padded_to_80_at_most(rows):
    """Work of the tensor-core instructions in PTX over that of the products of one pair of tiles, 72 columns each.

    A loop is in the program once, and so is every product of a pair of tiles: forward q kᵀ, p v; dq: q kᵀ, do vᵀ, ds k;
    dk and dv: q kᵀ, do vᵀ, pᵀ do, dsᵀ q; in one pass all five.
    """
    work = {}
    for row in of(rows, "cross_attention"):
        kernel, _, constexprs, _ = variant_of(row)
        products = {"_forward_kernel": 2, "_image_kernel": 3, "_text_kernel": 4 + constexprs.get("ONE_PASS", False)}
        exact = products[kernel.__name__] * 2 * constexprs["BLOCK_N"] * constexprs["BLOCK_L"] * HEAD_DIM
        work[row.variant, row.sm] = row.mma_flops / exact
    assert not {variant: ratio for variant, ratio in work.items() if not 1 <= ratio <= 80 / 72}


@pytest.mark.slow
def test_a_multiprocessor_holds_every_program(rows):
    assert all(row.ctas >= 1 for row in rows)
    # Loads in flight are what a kernel that only moves bytes lives on.
    assert all(row.warps >= 16 for row in of(rows, "modulated_layernorm"))


@pytest.mark.parametrize("sm", [70, 80, 90])
def test_what_is_inspected_is_what_is_launched(sm, monkeypatch):
    """Every launch at XL/2's shapes is one of the variants of its kernel, and every variant is launched."""
    shipped = {name: list(module.variants(sm)) for name, module in KERNELS.items()}
    launches = record_launches(sm, monkeypatch)
    for name, variants in shipped.items():
        unused = {label for label, *_ in variants}
        for kernel, arguments in launches[name]:
            matching = {label for label, *variant in variants if matches(kernel, arguments, *variant)}
            assert matching, f"{name}.{kernel.__name__} is launched on sm_{sm} with {arguments}, which no variant has"
            unused -= matching
        assert not unused, f"{name} launches nothing on sm_{sm} of {unused}"


def matches(kernel, arguments, variant_kernel, signature, constexprs, options):
    def fits(name):
        value = arguments[name]
        if name in constexprs:
            return value is constexprs[name] or value == constexprs[name]
        kind = signature[name].removesuffix(":16")
        if kind.startswith("*"):
            return isinstance(value, torch.Tensor) and value.dtype == TYPES[kind]
        aligned = signature[name] != kind or "stride" in name
        return isinstance(value, float if kind == "fp32" else int) and not (aligned and value % 16)

    return (
        kernel is variant_kernel
        and arguments.keys() == {*kernel.arg_names, *options}
        and all(arguments[name] == value for name, value in options.items())
        and all(map(fits, kernel.arg_names))
    )


def record_launches(sm, monkeypatch):
    """module -> [(kernel, arguments and options by name)] at XL/2's shapes, on tensors without data."""
    launches = {name: [] for name in KERNELS}

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                arguments = dict(zip(self.kernel.arg_names, args, strict=False))
                launches[self.name].append((self.kernel, arguments | kwargs))

            return launch

    for name, module in KERNELS.items():
        for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder(name, getattr(module, kernel)))
    monkeypatch.setattr(modulated_layernorm, "_device", lambda device: (sm, 108))
    monkeypatch.setattr(linear, "_sm", lambda device: sm)
    dtype = torch.bfloat16 if sm >= 80 else torch.float16
    N, D, H = 256, 1152, 16

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    table = empty(6, D, dtype=torch.float32)
    for B in (2, 32):
        x, condition, statistic = empty(B, N, D), empty(B, 6, D), empty(B, N, dtype=torch.float32)
        shift, scale, gate = ((condition[:, i], table[i]) for i in range(3))
        for residual, pair in ((x, gate), (x, (None, None)), (None, (None, None))):
            modulation = (x, residual, *pair, *shift, *scale, 1e-6)
            modulated_layernorm.forward(*modulation)
            modulated_layernorm.forward_quantized(*modulation, torch.int8)
            if sm >= 89:
                modulated_layernorm.forward_quantized(*modulation, torch.float8_e4m3fn)
            for dx1 in (x, None):
                gated = (residual, *pair) if pair[0] is not None else (None, None, None)
                modulated_layernorm.backward(dx1, x, x, statistic, statistic, *scale, *gated)
        if sm < 80:
            continue
        q, lengths = empty(B, N, H, HEAD_DIM), empty(B, dtype=torch.int64)
        for L in (40, 120, 300):
            k, v = empty(B, L, 28, 2, H, HEAD_DIM)[:, :, 5].unbind(2)
            o, lse = cross_attention.forward(q, k, v, lengths, sm=sm)
            cross_attention.backward(q, q, k, v, o, lse, lengths, sm=sm)
        row, gate = table[2].to(dtype), condition[:, 2]
        for K in (D, 4 * D):
            linear.gated_linear(empty(B, N, K), empty(D, K), empty(D), x, gate, row)
        linear.linear_gelu(x, empty(4 * D, D), empty(4 * D))
    if sm >= 80:  # one small image
        linear.linear_gelu(empty(1, N, D), empty(4 * D, D), empty(4 * D))
    return launches


@triton.jit
def _tiny_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, TOTAL: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < n, other=0.0)
    if TOTAL:
        x -= tl.sum(x, 0)
    tl.store(y_ptr + columns, x, mask=columns < n)


@triton.jit
def _square_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x))


def tiny(sm, size="i32:16", total=False, **options):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": size}
    constexprs = {"BLOCK": 1024, "TOTAL": total}
    compiled = inspect.compile_variant(_tiny_kernel, signature, constexprs, {"num_warps": 4, **options}, sm)
    return inspect.measure(compiled, sm)


@pytest.mark.parametrize("sm", [70, 80, 90])
def test_counts_of_a_copy(sm):
    """1024 floats by 128 threads: two times 128 bits each, nothing to share and nobody to wait for."""
    counts = tiny(sm)
    expected = {"loads": 2, "loads_128": 2, "stores": 2, "stores_128": 2, "barriers": 0, "mma": 0, "spill_bytes": 0}
    assert {name: counts[name] for name in expected} == expected
    assert counts["mma_sass"] == 0 or (
        sm == 70 and counts["mma_sass"] is None
    )  # Triton 3.6 brings a disassembler of sm_70
    assert counts["shared_bytes"] == 0 and counts["num_warps"] == 4 and 0 < counts["registers"] < 64


def test_counts_of_a_sum():
    """A sum over four warps goes through shared memory."""
    counts = tiny(80, total=True)
    assert counts["shared_bytes"] >= 4 * 4 and counts["barriers"] >= 1


def test_divisibility_widens_loads(monkeypatch):
    """A mask at a size of which nothing is known parts a vector, and so does a pointer of which nothing is known."""
    assert tiny(80, size="i32")["loads_128"] == 0
    monkeypatch.setattr(inspect, "DIVISIBILITY", 1)
    counts = tiny(80)
    assert counts["loads_128"] == 0 and counts["stores_128"] == 0 and counts["loads"] == 8


@pytest.mark.parametrize("sm", [80, 90])
def test_work_of_tensor_cores(sm):
    """64³ multiply-adds, whatever the instruction: mma.sync of one warp, wgmma of four."""
    signature = {"x_ptr": "*fp16", "y_ptr": "*fp32"}
    for num_warps in (4, 8):
        compiled = inspect.compile_variant(_square_kernel, signature, {"BLOCK": 64}, {"num_warps": num_warps}, sm)
        counts = inspect.measure(compiled, sm)
        assert counts["mma"] > 0 and counts["mma_sass"] == counts["mma"]
        assert counts["mma_flops"] == 2 * 64**3
        assert ("wgmma.mma_async" in compiled.asm["ptx"]) == (sm == 90)


def test_spills_are_seen():
    """The large tile of a matrix product in the registers of a small one."""
    _, kernel, signature, constexprs, options = next(linear.variants(80))
    compiled = inspect.compile_variant(kernel, signature, constexprs, {**options, "maxnreg": 64}, 80)
    counts = inspect.measure(compiled, 80, sass=False)
    assert counts["registers"] <= 64 and counts["spill_bytes"] > 0 and counts["mma_sass"] is None


@pytest.mark.parametrize(
    ("sm", "registers", "shared", "num_warps", "ctas"),
    [
        (80, 32, 0, 4, 16),  # 64 warps: all that there are
        (80, 32, 0, 1, 32),  # 32 CTAs: all that there are
        (80, 64, 0, 4, 8),  # 64 · 32 registers a warp: 8 warps in each of 4 files
        (80, 65, 0, 4, 7),  # 72 · 32: 7 warps in each
        (80, 255, 0, 4, 2),  # 256 · 32: 2 warps in each
        (80, 255, 0, 8, 1),
        (80, 32, 40 * 1024, 4, 4),  # 164 KB, and 1 KB of each for the system
        (80, 32, 41 * 1024, 4, 3),
        (90, 32, 75 * 1024, 4, 3),  # 228 KB
        (90, 32, 76 * 1024, 4, 2),
        (70, 32, 48 * 1024, 4, 2),  # 96 KB, and nothing for the system
        (70, 64, 0, 8, 4),
        (80, 168, 0, 16, 0),  # 168 · 512 registers are more than there are
    ],
)
def test_occupancy(sm, registers, shared, num_warps, ctas):
    """By hand, from the tables of the CUDA programming guide."""
    assert inspect.resident_ctas(sm, registers, shared, num_warps) == ctas


def test_a_variant_has_a_type_for_every_argument():
    with pytest.raises(ValueError, match=r"_tiny_kernel: \['n', 'size'\] stand"):
        inspect.compile_variant(
            _tiny_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32"}, {"BLOCK": 64, "TOTAL": 0}, {}, 80
        )


def test_json(capsys):
    inspect.main(["--sm", "90", "--kernel", "linear", "--json"])
    records = json.loads(capsys.readouterr().out)
    assert [record["variant"] for record in records] == [label for label, *_ in linear.variants(90)]
    assert all(record["module"] == "linear" and record["mma_sass"] == record["mma"] > 0 for record in records)
    assert all(record["warps"] == record["ctas"] * record["num_warps"] >= 8 for record in records)


def test_table(capsys, monkeypatch):
    """Every count under its own name, in the order of the rows."""
    counts = {"registers": 101, "spill_bytes": 102, "shared_bytes": 103, "mma": 104, "mma_sass": 105, "mma_flops": 106}
    counts |= {"loads_128": 107, "loads": 108, "stores_128": 109, "stores": 110, "barriers": 111}
    first = inspect.Row("linear", "square", 90, **counts, num_warps=4, ctas=3, triton="3")
    second = dataclasses.replace(first, module="cross_attention", sm=70, mma_sass=None)
    asked = []
    monkeypatch.setattr(
        inspect, "inspect_kernels", lambda *args, **kwargs: asked.append((args, kwargs)) or [first, second]
    )
    inspect.main(["--sm", "90", "70", "--kernel", "linear", "cross_attention", "--workers", "1"])
    assert asked == [(([90, 70], ["linear", "cross_attention"]), {"workers": 1})]
    text = capsys.readouterr().out
    head, *lines, version = (" ".join(line.split()) for line in text.splitlines())
    assert head == "module variant sm regs spill shared mma sass load store bar CTAs warps"
    assert lines[0] == "linear square 90 101 102 103 104 105 107/108 109/110 111 3 12"
    assert lines[1] == "cross_attention square 70 101 102 103 104 - 107/108 109/110 111 3 12"
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1
    assert version == f"Triton {triton.__version__}"


def test_interpreted_kernels_are_nothing_to_inspect():
    command = [sys.executable, "-m", "pixart_fast.kernels.inspect", "--kernel", "linear"]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("python -m pixart_fast.kernels.inspect: Triton interprets the kernels here")
    assert len(result.stderr.splitlines()) == 1

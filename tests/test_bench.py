"""The bench suite runs: every test of it at its smallest scale, and rows of each group that the report takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import records

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments):
    """`pytest bench` at small scale, nothing compiled: that is most of its time, and tests/test_models.py compiles."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--scale", "small", *arguments]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    return run.stdout


@pytest.mark.slow
def test_every_row_is_accurate():
    """Without the clock. What is skipped says that it needs a device, or a package."""
    printed = bench("--benchmark-disable", "-rs")
    passed = int(re.search(r"(\d+) passed", printed).group(1))
    assert passed > 100
    reasons = {line.partition(": ")[2] for line in printed.splitlines() if line.startswith("SKIPPED")}
    assert all(
        re.search(r"CUDA|cpu|CPU|no kernel of ours|not installed|256 px|empty parameter set", reason)
        for reason in reasons
    ), reasons


GROUPS = {
    "kernels": "test_modulated_layernorm and forward and 64-16-128-float32 and not backward",
    "block": "test_forward_of_blocks",
    "train": "embedded_default",
    "generate": "test_generate",
    "memory": "small_fp32_reference",
    "loader": "test_loader and 1",
}


@pytest.mark.slow
def test_timed_rows_of_every_group_are_taken_by_the_report(tmp_path):
    chosen = " or ".join(f"({expression})" for expression in GROUPS.values())
    file = tmp_path / "rows.json"
    bench("--benchmark-only", "--rounds=2", f"--benchmark-json={file}", "-k", chosen)
    run = json.loads(file.read_text())
    accepted, refused = records.judge(run)
    assert not refused and accepted
    ops = {row["extra_info"]["op"] for row in run["benchmarks"]}
    assert ops == {"modulated_layernorm", "forward", "train_step", "generate", "ladder", "memory", "loader"}
    assert {Path(row["fullname"].partition("::")[0]).stem for row in run["benchmarks"]} == {
        f"test_{group}" for group in GROUPS
    }

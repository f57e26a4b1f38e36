"""`python -m bench.report`: tables and pictures of the committed results, `bench/results/<device>/*.json`.

    python -m bench.report                             writes README's generated parts, docs/benchmarks.md and its plots
    python -m bench.report --check                     exits with 1 where one of them is not what the results say
    python -m bench.report --measure                   runs the benchmark, adds its results, writes the report
    python -m bench.report --measure -- -k layernorm   the same with arguments for pytest
    python -m bench.report --add FILE...               adds files that `--benchmark-json` wrote elsewhere

Which results count and which are refused: `bench.records`. What is added goes in without its refused cases.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import plots, tables
from bench.records import Refused, entries, judge, key, load

ROOT = Path(__file__).resolve().parents[1]


def rewritten(readme: str, parts: dict[str, str]) -> str:
    """README with each part between its markers. Raises ValueError where these are not there once."""
    for name, text in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
            raise ValueError(f"README needs the lines {begin} and {end}, once each and in this order")
        before, _, rest = readme.partition(begin)
        after = rest.partition(end)[2]
        readme = f"{before}{begin}\n{text}\n{end}{after}"
    return readme


def add(file: Path, results: Path) -> list[str]:
    """Puts a file of `--benchmark-json` beside the others of its device, and returns a sentence for each refused case.

    Raises `Refused` where no case is left.
    """
    run = json.loads(file.read_text())
    accepted, refused = judge(run)
    if not accepted:
        raise Refused("\n".join([f"{file.name} has no results that could be added", *refused]))
    run["benchmarks"] = [
        row for row in run["benchmarks"] if "op" not in row["extra_info"] or key(row["extra_info"]) in accepted
    ]
    slug = re.sub(r"[^a-z0-9]+", "-", run["machine_info"]["device"].lower()).strip("-")
    moment = run["datetime"][:19].replace("T", "-").replace(":", "")
    path = results / slug / f"{moment}-{run['commit_info']['id'][:7]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in run.pop("benchmarks"))
    rest = json.dumps(run, indent=1, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{rest},\n "benchmarks": [\n{rows}\n ]\n}}\n')  # a line for each row
    print(f"Added {path}")
    return refused


def measure(arguments: list[str], results: Path) -> tuple[int, list[str]]:
    """Runs the benchmark and adds what it wrote; returns pytest's exit status and what was refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={file}", *arguments]
        status = subprocess.run(command, cwd=ROOT).returncode
        return status, add(file, results) if file.exists() else []


def stale(root: Path, texts: dict[Path, str], drawings: dict[str, plots.Data | None]) -> list[str]:
    """The files that are not what the results say; a plot carries the hash of what it shows."""
    found = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for name, data in drawings.items():
        path = root / "docs" / f"{name}.png"
        if plots.shown(path) != (plots.digest(data) if data else None):
            found.append(path)
    return [str(path.relative_to(root)) for path in found]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the report is stale")
    what.add_argument("--measure", action="store_true", help="run the benchmark first")
    what.add_argument("--add", nargs="+", type=Path, default=[], metavar="FILE", help="add results from elsewhere")
    parser.add_argument("pytest_arguments", nargs="*", help="after --, for pytest")
    options = parser.parse_args(arguments)
    results, readme, status = root / "bench" / "results", root / "README.md", 0
    refused: list[str] = []
    try:
        if options.measure:
            status, refused = measure(options.pytest_arguments, results)
        for file in options.add:
            refused += add(file, results)
        devices = entries(load(results))
        drawings = plots.drawings(devices)
        pictures = {name for name, data in drawings.items() if data}
        texts = {
            readme: rewritten(readme.read_text(), tables.parts(devices, pictures)),
            root / "docs" / "benchmarks.md": tables.page(devices, pictures),
        }
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    if options.check:
        of_old = stale(root, texts, drawings)
        if of_old:
            print(f"Not what bench/results says: {', '.join(of_old)}. Run `make report`.", file=sys.stderr)
        return int(bool(of_old))
    (root / "docs").mkdir(exist_ok=True)
    for path, text in texts.items():
        path.write_text(text)
    for name, data in drawings.items():
        plots.draw(name, data, root / "docs" / f"{name}.png")
    for sentence in refused:
        print(f"Left out: {sentence}", file=sys.stderr)
    return status or int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())

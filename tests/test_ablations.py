"""The ablations: which runs they are, and what is read from them."""

import json

import pytest
from PIL import Image

from train import ablations
from train.ablations import ARMS, CLASSES, curve, folder, main, plot, settings_of, table
from train.settings import DEFAULT, UserError, load_settings

RATES = {"re-parameterised": 0.6, "from scratch": 0.5, "adaLN": 0.4, "sparse captions": 0.1}


@pytest.fixture
def runs(tmp_path):
    """Three seeds of every arm, whose rates at step s are seed / 100 + rate · s / 9."""
    for seed in range(3):
        for arm in (CLASSES, *ARMS):
            where = folder(tmp_path, arm, seed)
            where.mkdir()
            steps = (3, 6, 9)
            metrics = [{"step": step, "seconds": 10.0 * step + seed} for step in steps]
            rates = [RATES.get(arm, 0) * step / 9 + seed / 100 for step in steps]
            seen = [
                {"step": step, "seen": {"binding": rate, "count": 1 - rate}}
                for step, rate in zip(steps, rates, strict=True)
            ]
            for name, rows in (("metrics.jsonl", metrics), ("evaluations.jsonl", seen)):
                (where / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            (where / "report.json").write_text(json.dumps({"seconds": 100.0 + seed}))
    return tmp_path


def test_arms_differ_in_one_thing(tmp_path):
    def read(arm):
        return load_settings(DEFAULT, settings_of(arm, 1, tmp_path, 900, 100)).model_dump(exclude={"output"})

    base = read("from scratch")
    differ = {arm: [key for key, value in read(arm).items() if value != base[key]] for arm in ARMS}
    assert differ == {
        "re-parameterised": ["init_from"], "from scratch": [], "adaLN": ["model"], "sparse captions": ["data"],
    }  # fmt: skip
    assert read("re-parameterised")["init_from"] == folder(tmp_path, CLASSES, 1) / "final"
    assert read("adaLN")["model"]["modulation"] == "adaln" and read("sparse captions")["data"]["captions"] == "sparse"
    assert read(CLASSES)["model"]["kind"] == "dit" and base["seed"] == 1


def test_means_and_deviations_over_the_seeds(runs):
    points = curve("from scratch", range(3), runs, "binding")
    assert [point.step for point in points] == [3, 6, 9]
    last = points[-1]
    assert (last.seconds, round(last.rate, 6), round(last.deviation, 6)) == (91.0, 0.51, 0.01)
    rows = {line.split(" | ")[0].strip("| "): line for line in table(runs, range(3)).splitlines()[2:]}
    assert rows.keys() == ARMS.keys()
    assert "0.510 ± 0.010" in rows["from scratch"] and rows["from scratch"].endswith("| 91 |")
    assert "0.410 ± 0.010" in rows["adaLN"]


def test_plot(runs):
    plot(runs, range(3), runs / "ablations.png")
    with Image.open(runs / "ablations.png") as picture:
        assert min(picture.size) > 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_finished_runs_are_kept_and_the_rest_is_trained_after_its_dit(tmp_path, runs, monkeypatch, capsys):
    started = []

    class Done:
        returncode, stderr = 0, ""

    def start(command, **_):
        where = next(word for word in command if word.startswith("output=")).removeprefix("output=")
        started.append(where.rpartition("/")[2])
        (runs / started[-1] / "report.json").write_text('{"seconds": 1.0}')
        return Done()

    monkeypatch.setattr(ablations.subprocess, "run", start)
    for name in ("classes_1", "re-parameterised_1", "adaLN_2"):
        (runs / name / "report.json").unlink()
    assert main(["--output", str(runs), "--jobs", "1"]) == 0
    assert started == ["classes_1", "re-parameterised_1", "adaLN_2"]
    assert "± 0.010" in capsys.readouterr().out and (runs / "ablations.md").is_file()


def test_a_run_that_fails_is_told(tmp_path, monkeypatch):
    class Failed:
        returncode, stderr = 2, "error: no space"

    monkeypatch.setattr(ablations.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(UserError, match="adaLN_0 ended with exit code 2: error: no space"):
        ablations.train("adaLN", 0, tmp_path, 9, 3)

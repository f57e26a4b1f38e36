"""Batches over buckets: every sample once a pass, buckets in proportion, any step from its number alone."""

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pixart_fast.aspect import BUCKETS
from train.data.buckets import BucketBatches, rows_by_tokens
from train.settings import UserError

SIZES = {"0.5": 17, "1.0": 100, "1.46": 3, "2.0": 41}


def test_each_sample_once_a_pass_and_no_leftover_is_dropped():
    """17 samples in batches of 8 leave one over: it begins the next pass, and 41 passes are 41 times every sample."""
    batches = BucketBatches(SIZES, 8, seed=3)
    streams = {key: [] for key in SIZES}
    for step in range(1200):
        key, places = batches.batch(step)
        assert places.dtype == np.int64 and len(places) == 8
        streams[key].extend(places.tolist())
    for key, size in SIZES.items():
        assert len(streams[key]) > 3 * size
        passes = [streams[key][i : i + size] for i in range(0, len(streams[key]) - size + 1, size)]
        assert all(sorted(order) == list(range(size)) for order in passes)
        assert len({tuple(order) for order in passes}) > min(len(passes) / 2, 3), "each pass in an order of its own"


def test_buckets_in_proportion_to_their_samples():
    """In every epoch, not only in the long run: after e of them a bucket has given floor(e n / r) batches."""
    batches, drawn, step = BucketBatches(SIZES, 8, seed=0), Counter(), 0
    for epochs in range(1, 40):
        given = {key: epochs * size // 8 for key, size in SIZES.items()}
        while step < sum(given.values()):
            drawn[batches.batch(step)[0]] += 1
            step += 1
        assert drawn == Counter(given)


def test_epochs_mix_their_buckets():
    keys = [BucketBatches({"a": 1000, "b": 1000}, 10, seed=1).batch(step)[0] for step in range(200)]
    assert Counter(keys) == {"a": 100, "b": 100}
    changes = sum(left != right for left, right in pairwise(keys))
    assert 70 < changes < 130  # 99.5 expected, deviation 7


def test_a_step_follows_from_its_number_alone():
    """In order, in reverse, alone in a fresh object: whichever steps were asked for before."""
    rows = {"0.5": 6, "1.0": 10, "1.46": 4, "2.0": 12}
    forward, backward = BucketBatches(SIZES, rows, seed=5), BucketBatches(dict(reversed(SIZES.items())), rows, seed=5)
    expected = [forward.batch(step) for step in range(120)]
    for step in reversed(range(120)):
        for again in (backward, BucketBatches(SIZES, rows, seed=5)):
            key, places = again.batch(step)
            assert key == expected[step][0] and np.array_equal(places, expected[step][1])
            assert len(places) == rows[key]
    other = [BucketBatches(SIZES, rows, seed=6).batch(step) for step in range(120)]
    assert [key for key, _ in other] != [key for key, _ in expected]


def test_the_same_in_another_process_whatever_its_hashes():
    code = f"from train.data.buckets import BucketBatches; print(BucketBatches({SIZES}, 5, 7).batch(1234))"
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "99"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == str(BucketBatches(SIZES, 5, 7).batch(1234))


def test_the_choice_never_changes():
    """A run of months goes on with the samples it was planned with."""
    key, places = BucketBatches({"1.0": 1000, "2.0": 500}, 4, seed=0).batch(1000)
    assert (key, places.tolist()) == ("1.0", [311, 100, 991, 573])


def test_buckets_smaller_than_a_batch():
    batches = BucketBatches({"rare": 3, "rarer": 1}, 8, seed=0)
    drawn = [batches.batch(step) for step in range(40)]
    assert Counter(key for key, _ in drawn) == {"rare": 30, "rarer": 10}
    assert np.bincount(np.concatenate([places for key, places in drawn if key == "rare"])).tolist() == [80, 80, 80]


def test_a_large_store_at_any_step(monkeypatch):
    """SAM's 14 million in 40 buckets, far into a run: only where a pass begins is an order drawn."""
    sizes = dict.fromkeys(BUCKETS[256], 14_000_000 // 40)
    batches, drawn = BucketBatches(sizes, 11392, seed=0), []
    draw = batches._pass
    monkeypatch.setattr(batches, "_pass", lambda *of: drawn.append(of) or draw(*of))
    for step in range(150_000, 150_200):
        key, places = batches.batch(step)
        assert len(set(places.tolist())) > 11000 and places.min() >= 0 and places.max() < sizes[key]
    assert len(drawn) == len(set(drawn)) <= 2 * 40
    for step in range(200_000, 210_000, 1000):
        batches.batch(step)
    assert max(map(len, batches._passes.values())) <= 2, "older orders are forgotten"


def test_without_samples():
    with pytest.raises(UserError, match="no samples to train on"):
        BucketBatches({"1.0": 0}, 4, seed=0)
    assert BucketBatches({"1.0": 0, "2.0": 9}, 4, seed=0).batch(0)[0] == "2.0"


def test_rows_by_tokens():
    tokens = {key: height // 16 * (width // 16) for key, (height, width) in BUCKETS[512].items()}
    rows = rows_by_tokens(tokens, budget=64 * 1024, multiple=16)
    assert rows["1.0"] == 64 and set(rows.values()) == {64}  # 924 to 1024 tokens: 70 do not divide by 16
    single = rows_by_tokens(tokens, budget=64 * 1024, multiple=1)
    assert single["1.0"] == 64 and single["0.6"] == 64 * 1024 // tokens["0.6"] == 68
    assert all(65536 - tokens[key] < count * tokens[key] <= 65536 for key, count in single.items())
    with pytest.raises(UserError, match=r"8 samples of bucket 0\.25.* have 8192"):
        rows_by_tokens(tokens, budget=8191, multiple=8)
    assert rows_by_tokens(tokens, budget=8192, multiple=8)["1.0"] == 8

"""Nouns of a store's captions, counted as the paper's table 1 does."""

import pytest

from tests.test_store import make, sample
from train.data import nouns
from train.data.nouns import count, main, write
from train.data.store import FeatureStore
from train.settings import UserError


@pytest.fixture
def store(tmp_path):
    make(tmp_path / "store", [sample(number) for number in range(25)])
    return FeatureStore(tmp_path / "store")


def words(captions):
    """Every second word of "caption 7" is its number; the first counts as a noun, and even numbers do."""
    for caption in captions:
        word, number = caption.split()
        yield [word] + [number] * (int(number) % 2 == 0)


def test_counts(store):
    """25 times "caption", which alone occurs more than ten times, and the 13 even numbers once each."""
    found = count(store, words, quiet=True)
    assert (found.distinct, found.valid, found.total, found.per_picture) == (14, 1, 38, 38 / 25)


def test_the_manifest_keeps_them_and_the_store_stays_readable(store):
    found = count(store, words, quiet=True)
    before = store.read(3)
    write(store, found)
    again = FeatureStore(store.folder)
    assert again.manifest.nouns == found and again.manifest.shards == store.manifest.shards
    assert again.read(3).text.equal(before.text)
    again.check()


def test_the_command(store, monkeypatch, capsys):
    monkeypatch.setattr(nouns, "tagger", lambda model, processes: words)
    assert main([str(store.folder)]) == 0
    assert "14 distinct nouns, 1 of them more than 10 times; 38 in all, 1.5 a picture" in capsys.readouterr().out


def test_mistakes_are_one_sentence(store, tmp_path, capsys):
    assert main([str(store.folder), "--model", "no_such_model"]) == 2
    assert "pip install spacy" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is no finished store" in capsys.readouterr().err
    make(tmp_path / "classes", [sample(number, captions=False) for number in range(3)])
    with pytest.raises(UserError, match="holds classes"):
        count(FeatureStore(tmp_path / "classes"), words)


def test_spacy_tags(store):
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed: pip install spacy")
    if not spacy.util.is_package("en_core_web_sm"):
        pytest.skip("its English model is not installed: python -m spacy download en_core_web_sm")
    (found,) = nouns.tagger("en_core_web_sm", 1)(["two dogs and a cat in the snow"])
    assert found == ["dog", "cat", "snow"]

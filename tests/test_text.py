import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixart_fast.embedded import END, HashedText, tokenize
from train.data.scenes import Scenes


def word(text, features, offset=0):
    """The slot of a token's features that holds the word `offset` places away."""
    start = (text.before + offset) * text.word_channels
    return features[start : start + text.word_channels]


def test_form_of_the_features():
    text = HashedText()
    features, lengths = text.encode(["a large red circle", "", "circle"])
    assert features.shape == (3, text.max_tokens, text.channels) and features.dtype == torch.float32
    assert lengths.tolist() == [4, 1, 2] and lengths.dtype == torch.int64
    for row, length in enumerate(lengths):
        assert (features[row, :length].abs().sum(1) > 0).all()
        assert not features[row, length:].any()


def test_features_never_change():
    """A checkpoint holds the projection that was learned for exactly these features."""
    text = HashedText(word_channels=16)
    features, _ = text.encode(["circle"])
    signs = (word(text, features[0, 0]) > 0).int().tolist()
    assert signs == [0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 0]
    assert word(text, features[0, 0]).abs().unique().tolist() == [1.0]


def test_another_process_encodes_the_same():
    encode = "HashedText().encode(['a small cyan cross'])[0].double().sum().item()"
    there = subprocess.run(
        [sys.executable, "-c", f"from pixart_fast.embedded import HashedText; print({encode})"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(there.stdout) == HashedText().encode(["a small cyan cross"])[0].double().sum().item()


def test_a_caption_does_not_depend_on_its_batch():
    captions = Scenes(captions="mixed").batch(range(40)).captions
    together, lengths = HashedText().encode(captions)
    text = HashedText()
    for row, caption in reversed(list(enumerate(captions))):
        alone, length = text.encode([caption])
        assert torch.equal(alone[0], together[row]) and length[0] == lengths[row]


def test_tokens_carry_their_neighbours():
    text = HashedText()
    features = text.encode(["a large red circle in the top left"])[0][0]
    circle = features[2]
    for offset, place in ((-2, 0), (-1, 1), (0, 2), (1, 3), (2, 4), (3, 5)):
        assert torch.equal(word(text, circle, offset), word(text, features[place]))
    assert not word(text, circle, -3).any() and not word(text, features[0], -1).any()


def test_order_and_words_matter():
    text = HashedText()
    one, other = text.encode(["red circle or blue square", "red square or blue circle"])[0]
    words = [[word(text, token) for token in caption[:5]] for caption in (one, other)]
    assert torch.equal(torch.stack(words[0]).sum(0), torch.stack(words[1]).sum(0)), "the same words"
    assert all(not torch.equal(mine, theirs) for mine, theirs in zip(one[:5], other[:5], strict=True))


def test_words_are_nearly_orthogonal():
    text = HashedText()
    names = sorted({token for caption in Scenes().batch(range(500)).captions for token in tokenize(caption)})
    vectors = torch.stack([word(text, text.encode([name])[0][0, 0]) for name in names])
    cosines = vectors @ vectors.T / text.word_channels - torch.eye(len(names))
    assert len(names) >= 20
    assert cosines.abs().max() < 0.75 and cosines.square().mean() < 1.5 / text.word_channels


def test_the_empty_caption_is_the_end_token():
    features, lengths = HashedText().encode([""])
    text = HashedText()
    assert lengths.tolist() == [1]
    assert torch.equal(word(text, features[0, 0]), word(text, text.encode(["x"])[0][0, 1]))
    assert END not in tokenize("x")


def test_long_captions_are_cut_and_counted():
    text = HashedText(max_tokens=4)
    features, lengths = text.encode(["one two three four five six", "one two three", "one"])
    assert lengths.tolist() == [4, 4, 2] and text.truncated == 1
    assert torch.equal(features[0], features[1])
    text.encode(["one two three four"])
    assert text.truncated == 2


def test_scene_captions_fit():
    text = HashedText()
    for split in ("train", "seen", "held_out"):
        text.encode(Scenes(split=split, captions="mixed").batch(range(1000)).captions)
    assert text.truncated == 0


def test_tokenize():
    assert tokenize("A large Red circle, the artist's.") == ["large", "red", "circle", ",", "artist's", "."]
    assert tokenize("Größe  \n snake_case") == ["größe", "snake", "case"]


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"word_channels": 0}, {"before": -1}, {"position_channels": 3}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="positive"):
        HashedText(**wrong)


def test_travels_to_a_worker_process():
    text = HashedText(max_tokens=8)
    features, _ = text.encode(["red circle"])
    again, _ = pickle.loads(pickle.dumps(text)).encode(["red circle"])
    assert torch.equal(features, again)


def test_other_windows():
    text = HashedText(max_tokens=6, word_channels=80, before=0, after=1, position_channels=0)
    features, _ = text.encode(["red circle"])
    assert text.channels == 160 and features.shape == (1, 6, 160)
    assert torch.equal(features[0, 0, 80:], features[0, 1, :80])
    assert not torch.equal(features[0, 0, :16], features[0, 0, 64:80])

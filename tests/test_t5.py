"""T5 features against diffusers' pipelines and transformers' own loading; their precisions; the cache on disk."""

import json
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from importlib import metadata
from pathlib import Path

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from pixart_fast import text
from pixart_fast.text import PRECISIONS, Int8Linear, T5Text, clean_caption, load_encoder, quantize_rows, skeleton
from tests import published
from tests.accuracy import assert_rms, rms_error

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PROMPTS = [
    "a red cat",
    "",
    "A painting of the blue dog (bad) in http://example.com/page snow &amp; snow",
    "blurry, " * 40,
    "a red cat",
    "the cat in the snow. " * 4,
]
# google/t5-v1_1-xxl's encoder, as text_encoder/config.json of the published models has it.
XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """tokenizer/ and text_encoder/ of a model folder: three layers, norms that are not all ones."""
    folder = tmp_path_factory.mktemp("alpha")
    words = published.tokenizer(120)
    words.save_pretrained(folder / "tokenizer")
    encoder = published.text_encoder(len(words))
    config = type(encoder.config)(**encoder.config.to_dict() | {"num_layers": 3})
    torch.manual_seed(3)
    encoder = T5EncoderModel(config)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(pristine, tmp_path / "model")


def t5(folder: Path, **changes) -> T5Text:
    return T5Text(folder, **{"max_tokens": 120, "precision": "fp32", "clean": False, "keep_cjk": False, **changes})


def no_weights(monkeypatch) -> None:
    """From here on a loaded encoder is a mistake."""

    def load_encoder(*_):
        pytest.fail("the encoder was loaded")

    monkeypatch.setattr(text, "load_encoder", load_encoder)


def kept(features: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(features, lengths, strict=True)])


def published_cleaning(caption: str) -> str:
    pipe = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)
    return pipe._text_preprocessing(caption, clean_caption=True)[0]


@pytest.mark.parametrize("keep_cjk", [False, True])
@pytest.mark.parametrize(
    "caption",
    [
        "A   RED Cat<br/>, &quot;fine&quot; @someone #12345 (2021) [x] {y} a_b-c_d-e_f 1234567 photo.jpg",
        "see https://www.example.com/a/b?c=d and www.example.org; page 12, 1920x1080, jc6640vc ... ***SALE***",
        "caf\u00c3\u00a9 \u2014 \u201cquoted\u201d \u2018it\u2019 %41+b free shipping &amp;lt;b&amp;gt;",
        "",
        "'in quotes'",
        "\u00e9t\u00e9 \u0434\u043e\u043c \U0001f600 \u05d1\u05d9\u05ea",
    ],
)
def test_cleaning_is_the_published_one(caption, keep_cjk):
    assert clean_caption(caption, keep_cjk=keep_cjk) == published_cleaning(caption)


CHINESE = "一只红猫，坐在「雪地」里。（第２章）卡尔"
JAPANESE = "雪の中の赤い猫〜ｶﾀｶﾅ・ー々"
KOREAN = "눈 속의 빨간 고양이 한국"


def test_published_cleaning_drops_cjk_and_ours_can_keep_it():
    assert clean_caption(CHINESE, keep_cjk=False) == published_cleaning(CHINESE)
    assert not set("一只红猫坐在雪地里") & set(clean_caption(CHINESE, keep_cjk=False))
    for caption in (CHINESE, JAPANESE, KOREAN):
        assert clean_caption(caption, keep_cjk=True) == caption


@pytest.mark.parametrize("words", [CHINESE, JAPANESE, KOREAN])
def test_what_surrounds_cjk_is_cleaned_and_takes_none_of_it_along(words):
    """Nicknames and addresses end where other letters end, not where CJK does: it has no spaces."""
    cleaned = clean_caption(f"A RED Cat (big) @someone{words}www.example.com{words} &quot;1234567", keep_cjk=True)
    assert cleaned.count(words) == 2
    assert cleaned.replace(words, "").split() == ["a", "red", "cat", "big", '"']


def test_private_characters_do_not_turn_into_cjk():
    assert clean_caption("a \U000f4e00cat", keep_cjk=True) == "a cat"


def test_cleaning_names_the_packages_it_needs(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ValueError, match="cleaning captions needs ftfy: `pip install ftfy beautifulsoup4`"):
        clean_caption("a cat", keep_cjk=False)


@pytest.mark.parametrize(("kind", "max_tokens"), [(PixArtAlphaPipeline, 120), (PixArtSigmaPipeline, 300)])
def test_features_are_those_of_diffusers(kind, max_tokens, tmp_path):
    folder = published.save(tmp_path, kind)
    theirs = kind.from_pretrained(folder)
    prompts = [*PROMPTS, "a cat in the snow and no bad painting of it, " * 20]
    expected, mask, *_ = theirs.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        clean_caption=True,
        max_sequence_length=max_tokens,
        device="cpu",
    )
    ours = t5(folder, max_tokens=max_tokens, clean=True)
    features, lengths = ours.encode(prompts)
    assert ours.channels == published.TEXT_WIDTH and features.dtype == torch.float32
    assert lengths.dtype == torch.int64 and lengths.tolist() == mask.sum(1).tolist() and lengths[1] == 1
    assert features.shape[1] == lengths.max() == max_tokens
    assert rms_error(kept(features, lengths), kept(expected, lengths)) <= 1e-6
    for row, length in zip(features, lengths, strict=True):
        assert row[length:].abs().max() == 0 if length < max_tokens else True


def test_a_caption_has_the_same_features_alone_in_company_and_padded(pristine):
    ours = t5(pristine)
    prompts = [" ".join((published.WORDS * 5)[:n]) for n in (1, 3, 20, 7, 60, 2)]
    features, lengths = ours.encode(prompts)
    assert features.shape == (6, lengths.max(), published.TEXT_WIDTH)
    alone = [ours.encode([prompt]) for prompt in prompts]
    assert [row.shape[1] for row, _ in alone] == [one.item() for _, one in alone] == lengths.tolist()
    theirs = T5EncoderModel.from_pretrained(pristine / "text_encoder")
    words = ours.tokenizer(prompts, padding="max_length", max_length=120, return_tensors="pt")
    with torch.no_grad():
        padded = kept(theirs(**words).last_hidden_state, lengths)
    assert rms_error(torch.cat([row[0] for row, _ in alone]), padded) <= 1e-6
    assert rms_error(kept(features, lengths), padded) <= 1e-6


def test_batches_hold_captions_of_similar_length(pristine, monkeypatch):
    ours = t5(pristine)
    expected, lengths = ours.encode(PROMPTS)
    shapes = []
    ours.encoder.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append((tuple(inputs["input_ids"].shape), inputs["attention_mask"].sum().item())),
        with_kwargs=True,
    )
    monkeypatch.setattr(text, "BATCH_TOKENS", 100)
    features, _ = ours.encode(PROMPTS)
    assert rms_error(features, expected) <= 1e-6
    assert all(rows == 1 or rows * longest <= 100 for (rows, longest), _ in shapes) and len(shapes) > 2
    assert sum(tokens for _, tokens in shapes) == lengths.sum() - lengths[0]  # a caption that comes twice enters once


def test_raw_prompts_are_tokenised_as_they_are(pristine):
    raw, clean = (t5(pristine, clean=clean).encode(["A RED cat"]) for clean in (False, True))
    lower = t5(pristine).encode(["a red cat"])
    assert torch.equal(clean[0], lower[0]) and raw[1] != lower[1]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precisions_are_those_of_transformers(pristine, precision, dtype):
    ours = t5(pristine, precision=precision)
    features, _ = ours.encode(["a red cat in the snow"])
    theirs = T5EncoderModel.from_pretrained(pristine / "text_encoder", dtype=dtype)
    for name, parameter in theirs.named_parameters():
        other = ours.encoder.get_parameter(name)
        assert other.dtype == parameter.dtype and torch.equal(other, parameter), name
    assert features.dtype == dtype
    words = ours.tokenizer(["a red cat in the snow"], return_tensors="pt")
    with torch.no_grad():  # attention is another kernel with gradients
        assert torch.equal(features, theirs(**words).last_hidden_state)


def test_fp16_survives_activations_beyond_its_range(folder):
    """T5-XXL's residual stream leaves fp16's range; here `wo` of the first block makes it (diffusers issue 8604)."""
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    weights[name] = 4e4 * weights[name]
    save_file(weights, file, {"format": "pt"})
    prompts = ["a red cat in the snow"]

    exact = t5(folder)
    expected, _ = exact.encode(prompts)
    widest = []
    exact.encoder.encoder.block[0].register_forward_hook(lambda _, __, out: widest.append(out[0].abs().max().item()))
    exact.encode(prompts)
    assert widest[0] > torch.finfo(torch.float16).max

    features, _ = t5(folder, precision="fp16").encode(prompts)
    error = rms_error(features, expected)
    assert error <= 0.01
    words = exact.tokenizer(prompts, return_tensors="pt")
    corrupted = exact.encoder.to(torch.float16)(**words).last_hidden_state
    assert not rms_error(corrupted, expected) <= 10 * error  # far off, or NaN


def test_int8_codes_are_within_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(33, 70) * torch.logspace(-6, 4, 33)[:, None]
    weight[5] = 0
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (33,)
    assert ((codes * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert (codes.abs().amax(1) == 127).sum() == 32 and codes[5].abs().max() == 0 and (scale > 0).all()


def test_int8_errs_as_its_weights_and_bf16_do(pristine):
    """Beside the same encoder with the quantised weights written out: fp64 is the truth, plain bf16 the measure."""
    ours = t5(pristine, precision="int8")
    prompts = ["a red cat in the snow", "a blurry painting of the blue dog"]
    features, lengths = ours.encode(prompts)
    written_out = T5EncoderModel.from_pretrained(pristine / "text_encoder")
    quantised = {name: module for name, module in ours.encoder.named_modules() if isinstance(module, Int8Linear)}
    linears = {name for name, module in written_out.named_modules() if isinstance(module, nn.Linear)}
    assert quantised.keys() == linears and len(linears) == 3 * 7
    for name, module in quantised.items():
        written_out.get_submodule(name).weight.data = module.weight * module.scale[:, None]
    ids = [ours.tokenizer([prompt], return_tensors="pt") for prompt in prompts]
    truth = torch.cat([written_out.double()(**words).last_hidden_state[0] for words in ids])
    plain = torch.cat([written_out.bfloat16()(**words).last_hidden_state[0] for words in ids])
    assert_rms(kept(features, lengths), truth, plain)
    exact = kept(*t5(pristine).encode(prompts))
    assert rms_error(truth, exact) <= 0.05 and rms_error(kept(features, lengths), exact) <= 0.05


def test_sizes_of_t5_xxl():
    """Bytes of weights, in the GB that the docstring of T5Text names."""
    linears = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    rest = 32128 * 4096 + 24 * 2 * 4096 + 4096 + 32 * 64
    wo = 24 * 10240 * 4096
    scales = 24 * (4 * 4096 + 2 * 10240 + 4096)
    expected = {
        "bf16": 2 * (linears + rest),
        "fp16": 2 * (linears + rest) + 2 * wo,
        "int8": linears + 2 * rest + 4 * scales,
        "fp32": 4 * (linears + rest),
    }
    documented = {"bf16": "9.5", "fp16": "11.5", "int8": "4.9", "fp32": "19.0"}
    for precision in PRECISIONS:
        state = skeleton(XXL, precision).state_dict()
        del state["encoder.embed_tokens.weight"]  # the same table again
        size = sum(tensor.nbytes for tensor in state.values())
        assert size == expected[precision], precision
        assert f"{size / 1e9:.1f}" == documented[precision]
        assert f"| {documented[precision]} GB |" in T5Text.__doc__


def test_the_embedding_is_in_memory_once(pristine):
    for precision in PRECISIONS:
        encoder = load_encoder(pristine / "text_encoder", t5(pristine).config, precision, CPU)
        assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()
        assert not any(parameter.requires_grad for parameter in encoder.parameters()) and not encoder.training


def test_weights_are_read_one_at_a_time(pristine, monkeypatch):
    """Of what was read from the file no tensor is alive when the one after the next is taken."""
    alive, most = weakref.WeakSet(), []
    convert = text.quantize_rows

    def watched(weight):
        alive.add(weight)
        most.append(len(alive))
        return convert(weight)

    monkeypatch.setattr(text, "quantize_rows", watched)
    load_encoder(pristine / "text_encoder", t5(pristine).config, "int8", CPU)
    assert len(most) == 21 and max(most) <= 2


def test_every_published_form_of_weights(pristine, folder):
    expected, _ = t5(pristine).encode(["a red cat"])
    encoder = folder / "text_encoder"
    weights = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()

    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, encoder / file, {"format": "pt"})
    index = encoder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    assert torch.equal(t5(folder).encode(["a red cat"])[0], expected)
    (encoder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks model-00002-of-00002.safetensors, which model.safetensors.inde"
    ):
        t5(folder).encode(["a red cat"])
    index.unlink()

    embedding = weights.pop("shared.weight")
    for forms in (["shared.weight", "encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight"]):
        decoder = {"decoder.block.0.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}
        torch.save(weights | dict.fromkeys(forms, embedding) | decoder, encoder / "pytorch_model.bin")
        assert torch.equal(t5(folder).encode(["a red cat"])[0], expected)


def test_cached_captions_need_no_encoder(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "text"
    expected, lengths = t5(folder, cache=cache, precision="bf16").encode(PROMPTS)
    assert len(list(cache.glob("*.safetensors"))) == len(set(PROMPTS))
    with monkeypatch.context() as patch:
        no_weights(patch)
        again, again_lengths = t5(folder, cache=cache, precision="bf16").encode(PROMPTS)
        assert torch.equal(again, expected) and again.dtype == torch.bfloat16 and torch.equal(again_lengths, lengths)
        one, _ = t5(folder, cache=cache, precision="bf16").encode(["a red cat"])
        assert torch.equal(one[0], expected[0, : lengths[0]])

    (folder / "text_encoder" / "model.safetensors").unlink()
    deleted = t5(folder, cache=cache, precision="bf16")
    assert torch.equal(deleted.encode(PROMPTS)[0], expected)
    with pytest.raises(FileNotFoundError, match=r"text_encoder has no model\.safetensors"):
        deleted.encode(["a blue dog"])
    with pytest.raises(FileNotFoundError, match=r"text_encoder has no model\.safetensors"):
        t5(folder, cache=tmp_path / "other").encode(["a red cat"])


def test_only_what_is_not_cached_is_encoded(pristine, tmp_path):
    ours = t5(pristine, cache=tmp_path)
    ours.encode(PROMPTS[:2])
    inputs = []
    ours.encoder.register_forward_pre_hook(lambda *x: inputs.append(x[2]["input_ids"]), with_kwargs=True)
    features, lengths = ours.encode([*PROMPTS[:2], "the dog"])
    assert [len(ids) for ids in inputs] == [1]
    assert rms_error(kept(features, lengths), kept(*t5(pristine).encode([*PROMPTS[:2], "the dog"]))) <= 1e-6


def test_the_key_is_all_that_features_depend_on(folder, tmp_path):
    """Each change finds nothing in the cache; cleaning that changes nothing, a copied folder and its dates find it."""
    keys = set()

    def key(**changes) -> str:
        return t5(folder, cache=tmp_path / "cache", **changes).key("a red cat")

    def is_new(**changes) -> bool:
        found = key(**changes)
        new = found not in keys
        keys.add(found)
        return new

    assert is_new() and not is_new()
    assert all(is_new(precision=precision) for precision in ("bf16", "fp16", "int8")) and is_new(max_tokens=300)
    assert not is_new(clean=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "text_encoder" / "model.safetensors", (0, 0))
    assert t5(copy, cache=tmp_path / "cache").key("a red cat") in keys

    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.final_layer_norm.weight"] = -weights["encoder.final_layer_norm.weight"]
    save_file(weights, file, {"format": "pt"})
    assert is_new()
    words = folder / "tokenizer" / "tokenizer.json"
    words.write_text(words.read_text().replace("painting", "portrait"))
    assert is_new()
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    assert is_new()


def test_a_sample_of_every_part_of_a_file_is_in_its_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SAMPLE_BYTES", 16)
    file = tmp_path / "weights"
    content = bytearray(range(256)) * 1024
    found = set()
    for change in (None, slice(0, 600), slice(100_000, 100_600), slice(-600, None)):
        changed = bytearray(content)
        if change is not None:
            changed[change] = bytes(600)
        file.write_bytes(changed)
        found.add(text.fingerprint([file]))
    for size in (512_000, 512_512):  # as many stretches, of zeros alone
        file.write_bytes(bytes(size))
        found.add(text.fingerprint([file]))
    assert len(found) == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "other", "dtype", "width"])
def test_damaged_cache_files_are_replaced(pristine, tmp_path, damage):
    expected, _ = t5(pristine, cache=tmp_path).encode(["a red cat"])
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "zeros":
        file.write_bytes(content[:-64] + bytes(64))
    else:
        other = {"other": expected[0], "dtype": expected[0].half(), "width": expected[0, :, :8].contiguous()}[damage]
        name = "other" if damage == "other" else "features"
        save_file({name: other}, file, {"sha256": text.checksum(other)})
    damaged = t5(pristine, cache=tmp_path)
    assert rms_error(damaged.encode(["a red cat"])[0], expected) <= 1e-6
    assert damaged.encoder is not None and file.read_bytes() == content


def test_a_cache_that_cannot_be_written_warns_once(pristine, tmp_path):
    (tmp_path / "file").write_text("no folder")
    ours = t5(pristine, cache=tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="text features cannot be kept in .*: free some space there or choose") as seen:
        features, _ = ours.encode(PROMPTS)
        ours.encode(["the dog"])
    assert len(seen) == 1 and rms_error(features, t5(pristine).encode(PROMPTS)[0]) <= 1e-6


def test_a_full_disk_leaves_no_half_file(pristine, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match=r"\(No space left on device\)") as seen:
        t5(pristine, cache=tmp_path).encode(PROMPTS)
    assert len(seen) == 1 and not list(tmp_path.iterdir())


def test_a_shared_cache_is_not_written_for_reading(pristine, tmp_path, monkeypatch):
    t5(pristine, cache=tmp_path).encode(PROMPTS)
    no_weights(monkeypatch)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("the cache was written"))
    with warnings.catch_warnings(action="error"):
        t5(pristine, cache=tmp_path).encode(PROMPTS)


def test_cut_is_what_the_features_do_not_know(pristine):
    ours = t5(pristine, max_tokens=6, clean=True)
    words = ["a", "red", "cat", "in", "the"]
    assert ours.cut("") == ours.cut("a RED  cat in the") == ""
    assert ours.cut("a RED  cat in the snow") == "snow"
    assert ours.cut("a red cat in the Blue snow, blurry") == "blue snow, blurry"
    assert t5(pristine, max_tokens=6).cut("a red cat in the snow  of   blue") == "snow  of   blue"
    features, lengths = ours.encode([" ".join([*words, "snow of blue"]), " ".join(words)])
    assert lengths.tolist() == [6, 6] and torch.equal(features[0], features[1])


def test_weights_are_dropped_and_loaded_again(pristine):
    ours = t5(pristine)
    assert ours.encoder is None
    expected, _ = ours.encode(["a red cat"])
    alive = weakref.ref(ours.encoder), weakref.ref(ours.encoder.shared.weight)
    ours.free()
    assert ours.encoder is None and [reference() for reference in alive] == [None, None]
    assert torch.equal(ours.encode(["a red cat"])[0], expected)


def test_nothing_heavy_is_loaded_before_it_is_needed(pristine, tmp_path):
    """Making a T5Text and reading cached captions needs neither weights nor transformers."""
    t5(pristine, cache=tmp_path).encode(PROMPTS)
    arguments = {"max_tokens": 120, "precision": "fp32", "clean": False, "keep_cjk": False}
    code = (
        "import sys\n"
        "from pixart_fast.text import T5Text\n"
        f"ours = T5Text({str(pristine)!r}, cache={str(tmp_path)!r}, **{arguments!r})\n"
        f"ours.encode({PROMPTS!r})\n"
        "assert ours.encoder is None and not {'transformers', 'diffusers'} & set(sys.modules), 'imported'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_spoilt_folders_are_explained(folder):
    for part, match in (
        ("text_encoder", "lacks text_encoder/ with config.json"),
        ("tokenizer", "lacks tokenizer/ with"),
    ):
        (folder / part).rename(folder / "away")
        with pytest.raises(FileNotFoundError, match=f"{match}.*: a model folder has tokenizer/, text_encoder/"):
            t5(folder)
        (folder / "away").rename(folder / part)

    weights = folder / "text_encoder" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a safetensors file .*: fetch it again"):
        t5(folder).encode(["a cat"])
    weights.write_bytes(content)

    config = folder / "text_encoder" / "config.json"
    settings = config.read_text()
    config.write_text(json.dumps(json.loads(settings) | {"num_layers": 4}))
    with pytest.raises(ValueError, match=r"the checkpoint does not fit the model; missing: encoder\.block\.3"):
        t5(folder).encode(["a cat"])
    config.write_text(settings.replace('"t5"', '"clip_text_model"'))
    with pytest.raises(ValueError, match="holds a clip_text_model, but PixArt reads the features of a T5 encoder"):
        t5(folder)
    config.write_text(settings)

    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"the tokenizer in .* is damaged or incomplete: fetch it again"):
        t5(folder).encode(["a cat"])


def test_published_tokenizers_name_the_packages_they_need(folder, monkeypatch):
    """They are sentencepiece files, which transformers cannot read alone: it then asks for tiktoken."""
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "spiece.model")

    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(
        ValueError, match=r"reading .*spiece.model needs sentencepiece: `pip install sentencepiece prot"
    ):
        t5(folder).encode(["a cat"])


def test_user_mistakes(pristine):
    with pytest.raises(ValueError, match="precision 'int4' is not one of bf16, fp16, int8, fp32"):
        t5(pristine, precision="int4")
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        t5(pristine, max_tokens=0)
    for prompts in ("a cat", []):
        with pytest.raises(ValueError, match="encode takes a list of one or more prompts"):
            t5(pristine).encode(prompts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu(pristine, precision):
    ours = t5(pristine, precision=precision, device="cuda")
    features, lengths = ours.encode(PROMPTS)
    assert features.is_cuda and not lengths.is_cuda
    expected, _ = t5(pristine, precision=precision).encode(PROMPTS)
    assert rms_error(features.cpu(), expected) <= 0.05
    ours.free()
    assert torch.cuda.memory_allocated() <= features.nbytes + 2**20

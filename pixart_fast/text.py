"""Captions to T5 features as PixArt was trained on them: cleaned, cut to 120 or 300 tokens, encoded, kept on disk.

The encoder is much larger than the image model and is needed once per caption: its weights are loaded at the first
caption that is not in the cache, at most one tensor at a time beside the finished model, and `T5Text.free` drops them.
"""

import gc
import hashlib
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pixart_fast.weights import TRAINED, check_fit, listed, read_file, read_json, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

PRECISIONS = ("bf16", "fp16", "int8", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16, "fp32": torch.float32}

# What `keep_cjk` protects: Hangul, kana, bopomofo, ideographs, their punctuation and full-width forms. The ideographic
# space U+3000 is white space like any other. Shifted, all of it lies in the private-use plane 15.
CJK = re.compile(
    "[\u1100-\u11ff\u2e80-\u2fff\u3001-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef]"
)
PRIVATE = re.compile("[\U000f0000-\U000fffff]")
SHIFT = 0xF0000

LAYOUT = (
    "a model folder has tokenizer/, text_encoder/, transformer/, vae/ and scheduler/, as published and as diffusers' "
    "save_pretrained writes it."
)
BATCH_TOKENS = 4096  # of one forward pass, padding included: 84 MB in the widest activation of T5-XXL in bf16
SAMPLES, SAMPLE_BYTES = 512, 4096  # of each weight file: at least one stretch of every matrix of T5-XXL


def clean_caption(caption: str, *, keep_cjk: bool) -> str:
    """A caption as PixArt-α's training data was cleaned: diffusers' copy of the published procedure, applied twice.

    It lower-cases, repairs encodings, and drops URLs, HTML, nicknames, file names, ids, brackets and more; also,
    without a word, the ideographs of Chinese, Japanese and Korean. `keep_cjk` keeps text of these languages as it is:
    during the cleaning private-use characters, which none of its rules names, stand for it (and a caption's own
    characters of plane 15 are dropped).

    Raises:
        ValueError: ftfy or beautifulsoup4 is not installed.
    """
    require("ftfy", "beautifulsoup4", purpose="cleaning captions")
    from diffusers import PixArtAlphaPipeline  # seconds of import, which raw captions do not need

    if keep_cjk:
        caption = CJK.sub(lambda match: chr(ord(match[0]) + SHIFT), PRIVATE.sub("", caption))
    for _ in range(2):
        # Its `self` need only have the pattern of bad punctuation, which is the class's.
        caption = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, caption)
    return PRIVATE.sub(lambda match: chr(ord(match[0]) - SHIFT), caption) if keep_cjk else caption


def require(*packages: str, purpose: str) -> None:
    """ValueError with the command that installs what is missing of `packages`."""
    for package in packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise ValueError(f"{purpose} needs {package}: `pip install {' '.join(packages)}`.") from error


class Int8Linear(nn.Module):
    """A bias-free linear layer with int8 weights and one scale per output row; activations keep their dtype.

    The codes are exact in bf16, so that the product is that of the quantised weights; the scale, in fp32, comes after.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight.to(x.dtype)).float() * self.scale).to(x.dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `[out, in]` and fp32 scales `[out]` of `weight [out, in]`: codes * scales[:, None] ≈ weight."""
    weight = weight.float()
    # The norm is the largest magnitude without a copy of all of them; a row of zeros has codes 0 at any scale.
    scale = torch.linalg.vector_norm(weight, math.inf, dim=1).clamp_min(1e-30) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def skeleton(config: dict[str, Any], precision: str) -> "T5EncoderModel":
    """The encoder without its weights (meta device), every tensor in the dtype that `precision` gives it.

    In fp16 the `wo` projections stay in fp32, as transformers' `from_pretrained` has it and `.to(torch.float16)` does
    not: the residual stream is of their dtype from the first of them on, and in T5-XXL it exceeds fp16's range
    (diffusers issue 8604).
    """
    from transformers import T5Config, T5EncoderModel  # seconds of import, which cached captions do not need

    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(config)).to(DTYPES[precision]).eval().requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and precision == "int8":
                model.set_submodule(name, Int8Linear(module.in_features, module.out_features))
            elif precision == "fp16" and name.endswith(".wo"):
                module.float()
    return model


def load_encoder(folder: Path, config: dict[str, Any], precision: str, device: torch.device) -> "T5EncoderModel":
    """The encoder with the weights of `folder` on `device`.

    Files are memory-mapped: beyond the model and what the system may take back at any time, memory holds copies of one
    tensor at a time. Weights that are of the right dtype and stay on the CPU are the mapped file itself.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a file is damaged, or the weights are not those of `config`.
    """
    model = skeleton(config, precision)
    expected = model.state_dict()
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        found |= unwrap(read_file(file), TRAINED, file)
    # The table of embeddings has two names, of which files hold either or both; whole T5s have a decoder besides.
    embedding = found.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        found.setdefault("shared.weight", embedding)
    found = {name: tensor for name, tensor in found.items() if not name.startswith(("decoder.", "lm_head."))}
    made_here = {name for name in expected if name.endswith(".scale")} | {"encoder.embed_tokens.weight"}
    check_fit({name: tensor for name, tensor in expected.items() if name not in made_here}, found)

    state: dict[str, Tensor] = {}
    del embedding
    for name in list(found):
        tensor = found.pop(name).to(device)
        if expected[name].dtype == torch.int8:
            state[name], state[name.removesuffix("weight") + "scale"] = quantize_rows(tensor)
        else:
            state[name] = tensor.to(expected[name].dtype)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    return model


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder of transformers: one, or its shards. FileNotFoundError where they are not there."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent or not files:
                raise FileNotFoundError(
                    f"{folder} lacks {listed(absent) or 'every shard'}, which {index.name} names: fetch it again."
                )
            return files
        plain = folder / f"{stem}{suffix}"
        if plain.is_file():
            return [plain]
    raise FileNotFoundError(f"{folder} has no model.safetensors, pytorch_model.bin or shards of one: fetch it again.")


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over name, size and 512 stretches of each file, where reading all of T5-XXL would take long."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb", buffering=0) as stream:
            for offset in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def checksum(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().view(torch.uint8).numpy()).hexdigest()


class FeatureCache:
    """Features of captions on disk, one file each, written aside and renamed. It never raises.

    A file that is damaged counts as absent. After the first failure to write it warns, and writes no more.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.writable = True

    def read(self, key: str, channels: int, dtype: torch.dtype) -> Tensor | None:
        """Features `[n, channels]` of a caption on the CPU, or None."""
        try:
            with safe_open(self.folder / f"{key}.safetensors", "pt") as file:
                features, metadata = file.get_tensor("features"), file.metadata() or {}
        except (OSError, SafetensorError):
            return None
        # Zeros where data should be, as a power failure leaves them, are well-formed safetensors.
        intact = features.ndim == 2 and features.shape[1] == channels and features.dtype == dtype
        return features if intact and checksum(features) == metadata.get("sha256") else None

    def write(self, key: str, features: Tensor) -> None:
        features = features.cpu().contiguous()
        self.write_bytes(f"{key}.safetensors", save({"features": features}, {"sha256": checksum(features)}))

    def write_bytes(self, name: str, content: bytes) -> None:
        if not self.writable:
            return
        partial = self.folder / f"{name}.{secrets.token_hex(4)}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(content)
                os.replace(partial, self.folder / name)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            self.writable = False
            warnings.warn(
                f"text features cannot be kept in {self.folder} ({error.strerror}), so captions are encoded anew each "
                "time: free some space there or choose another folder.",
                stacklevel=2,
            )


class T5Text:
    """Captions to features of a T5 encoder in the published folder layout.

    | precision | weights | T5-XXL (4.76 B parameters) |
    |---|---|---|
    | bf16 | bf16 | 9.5 GB |
    | fp16 | fp16, but the `wo` projections fp32 | 11.5 GB |
    | int8 | linear layers int8 with one scale per output row; embedding, norms and all activations bf16 | 4.9 GB |
    | fp32 | fp32 | 19.0 GB |

    fp16 is for GPUs: its matrix products are slow on CPUs.

    Args:
        folder: has `tokenizer/` and `text_encoder/`. Weights are loaded at the first caption that is not cached.
        max_tokens: 120 for PixArt-α, 300 for PixArt-Σ, the end token included. What lies beyond is cut off.
        precision: one of `PRECISIONS`.
        device: where the encoder runs and features are returned.
        clean: whether captions go through `clean_caption` (as α's did); else they are tokenised as they are (as Σ's
            own scripts do; diffusers' pipelines lower-case and strip them).
        keep_cjk: see `clean_caption`.
        cache: folder for features, made when there are some. They are kept by everything that determines them: the
            cleaned caption, weights, tokenizer, precision and token limit. Where all captions are in it, the encoder's
            weights need not exist any more.

    Attributes:
        channels: width of the features, 4096 for T5-XXL.

    Raises:
        FileNotFoundError: `folder` is not in the published layout.
        ValueError: unknown precision, token limit below 1, or an encoder that is no T5.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_tokens: int,
        precision: str = "bf16",
        device: torch.device | str = "cpu",
        clean: bool,
        keep_cjk: bool,
        cache: Path | None = None,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}.")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        self.folder = Path(folder)
        # Checked here because transformers makes an empty tokenizer of a folder without these files.
        if not any((self.folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            raise FileNotFoundError(f"{self.folder} lacks tokenizer/ with tokenizer.json or spiece.model: {LAYOUT}")
        if not (self.folder / "text_encoder" / "config.json").is_file():
            raise FileNotFoundError(f"{self.folder} lacks text_encoder/ with config.json: {LAYOUT}")
        self.config = read_json(self.folder / "text_encoder" / "config.json")
        if self.config.get("model_type") != "t5" or not isinstance(self.config.get("d_model"), int):
            raise ValueError(
                f"{self.folder / 'text_encoder'} holds a {self.config.get('model_type', 'model of no named type')}, "
                "but PixArt reads the features of a T5 encoder: take text_encoder/ and tokenizer/ of a PixArt model."
            )
        self.channels: int = self.config["d_model"]
        self.max_tokens = max_tokens
        self.precision = precision
        self.device = torch.device(device)
        self.clean = clean
        self.keep_cjk = keep_cjk
        self.cache = None if cache is None else FeatureCache(Path(cache))
        self.encoder: T5EncoderModel | None = None

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Features `[B, L, channels]`, zeros beyond each caption, and lengths int64 `[B]` on the CPU.

        L is the longest caption's number of tokens in this call, end token included ("" has one). Features are of the
        encoder's dtype (bf16 for int8) on `device`, equal to those of the published padding to `max_tokens` up to
        rounding.

        Raises:
            FileNotFoundError: there are no weights to encode what is not cached.
            ValueError: no prompts, a damaged file, or a missing package, named with the command that installs it.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError("encode takes a list of one or more prompts.")
        captions = [self.caption(prompt) for prompt in prompts]
        rows: dict[str, Tensor] = {}
        for caption in dict.fromkeys(captions) if self.cache is not None else ():
            cached = self.cache.read(self.key(caption), self.channels, DTYPES[self.precision])
            if cached is not None:
                rows[caption] = cached.to(self.device)
        for caption, features in self.encode_captions(sorted(set(captions) - rows.keys())):
            rows[caption] = features
            if self.cache is not None:
                self.cache.write(self.key(caption), features)
        lengths = torch.tensor([len(rows[caption]) for caption in captions])
        return pad_sequence([rows[caption] for caption in captions], batch_first=True), lengths

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Each caption with its features `[n, channels]`, in batches of similar lengths."""
        if not captions:
            return
        tokens = self.tokenizer(captions, truncation=True, max_length=self.max_tokens).input_ids
        if self.encoder is None:
            self.encoder = load_encoder(self.folder / "text_encoder", self.config, self.precision, self.device)
        pending = sorted(zip(captions, tokens, strict=True), key=lambda pair: len(pair[1]))
        while pending:
            longest = len(pending[-1][1])
            count = max(1, BATCH_TOKENS // longest)
            batch, pending = pending[-count:], pending[:-count]
            ids = pad_sequence([torch.tensor(row) for _, row in batch], batch_first=True)
            mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for _, row in batch], batch_first=True)
            encoded = self.encoder(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            for (caption, row), features in zip(batch, encoded.last_hidden_state, strict=True):
                yield caption, features[: len(row)].clone()

    def cut(self, prompt: str) -> str:
        """What of the cleaned prompt lies beyond `max_tokens`, as it stands there; "" if all of it fits."""
        caption = self.caption(prompt)
        spans = self.tokenizer(caption, return_offsets_mapping=True, verbose=False).offset_mapping
        if len(spans) <= self.max_tokens:
            return ""
        return caption[spans[self.max_tokens - 1][0] :].strip()  # the last token that fits is the end token

    def free(self) -> None:
        """Drops the weights; the next caption that is not cached loads them again."""
        self.encoder = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def caption(self, prompt: str) -> str:
        return clean_caption(prompt, keep_cjk=self.keep_cjk) if self.clean else prompt

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer  # seconds of import, which cached captions do not need

        folder = self.folder / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            require("sentencepiece", "protobuf", purpose=f"reading {folder / 'spiece.model'}")
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (ValueError, LookupError, OSError) as error:
            raise ValueError(f"the tokenizer in {folder} is damaged or incomplete: fetch it again.") from error

    def key(self, caption: str) -> str:
        """The name of a caption's features: SHA-256 of all that they depend on."""
        content = json.dumps([self.identity, self.precision, self.max_tokens, caption])
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def identity(self) -> list[str]:
        """Fingerprints of tokenizer, configuration and weights.

        That of the weights is noted in the cache by the folder's path, and serves when they have been deleted.
        """
        encoder = self.folder / "text_encoder"
        small = [path for path in (self.folder / "tokenizer").iterdir() if path.is_file()] + [encoder / "config.json"]
        note = self.cache.folder / f"{hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()}.weights"
        noted = note.read_text() if note.is_file() else None
        try:
            weights = fingerprint(weight_files(encoder))
        except OSError:
            if noted is None:
                raise
            weights = noted
        if weights != noted:
            self.cache.write_bytes(note.name, weights.encode())
        return [fingerprint(small), weights]

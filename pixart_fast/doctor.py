"""`python -m pixart_fast.doctor DIR`: what silently spoils pictures, in words, with the right value and its source.

A wrong scale of positions, a VAE of the other family or a text encoder in fp16 raise no error: the pictures are grey,
repeated, or beside the prompt. Weight files are memory-mapped; without `--weights` little but their headers is read.
"""

import argparse
import inspect
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from pixart_fast.embedded import Autoencoder
from pixart_fast.interop import NULL_CAPTION_FILE
from pixart_fast.layers import sincos_2d
from pixart_fast.naming import infer_config, to_our_names
from pixart_fast.recipe import FILE, PUBLISHED, Recipe, find, read_recipe, transformer_folder
from pixart_fast.text import skeleton, weight_files
from pixart_fast.transformer import Transformer
from pixart_fast.weights import TRAINED, check_fit, listed, read_file, read_json, read_weights, unwrap

OK, LOOK, WRONG = "ok", "look", "WRONG"
NAMES = {"alpha": "PixArt-α", "sigma": "PixArt-Σ", "embedded": "the embedded default"}

POSITION_SCALES = {"alpha": {32: 1.0, 64: 1.0, 128: 2.0}, "sigma": {32: 0.5, 64: 1.0, 128: 2.0, 256: 4.0}}
POSITION_SOURCES = {
    "alpha": "PixArt-alpha, configs/pixart_config (lewei_scale)",
    "sigma": "PixArt-sigma, configs/pixart_sigma_config (pe_interpolation)",
}
VAE_SCALES = {"alpha": 0.18215, "sigma": 0.13025}
VAE_SOURCES = {
    "alpha": "PixArt-alpha, configs/PixArt_xl2_internal.py (scale_factor)",
    "sigma": "PixArt-sigma, configs/pixart_sigma_config (scale_factor)",
}
TOKEN_SOURCES = {"alpha": "PixArt-α, section 3.1", "sigma": "PixArt-sigma, configs/pixart_sigma_config"}
TELLING = (FILE, "model_index.json", "tokenizer/tokenizer_config.json")  # of a model's family, the first that exists
OTHER_VAE = {"alpha": "the VAE of SDXL, which Σ uses", "sigma": "the VAE of Stable Diffusion, which α uses"}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
}
ARCHITECTURE = {"activation_fn": "gelu-approximate", "norm_eps": 1e-6, "patch_size": 2}
XL_WIDTH, XL_HEADS = 1152, 16
STORED_TABLE = "pos_embed.pos_embed"  # diffusers' name for a position table, which its PixArt does not save

BASE_LR, BASE_BATCH = 2e-5, 256
STAGES = (176 * 64, 40 * 64, 12 * 32)  # pictures per step of the published stages at 256, 512 and 1024 px
LR_SOURCE = "PixArt-α, section 3.1; PixArt-alpha, diffusion/utils/optimizer.py (auto_scale_lr)"
CONFIG_SOURCE = "PixArt-alpha, configs/PixArt_xl2_internal.py and the stages' configs"


class Finding(NamedTuple):
    """One line of the report: what was looked at, what is there, what belongs there and who says so."""

    status: str  # ok, look (unusual, may be meant), WRONG
    subject: str
    found: str
    expected: str = ""
    words: str = ""  # what it does to pictures, and the remedy
    source: str = ""

    def __str__(self) -> str:
        text = f"{self.subject}: {self.found}"
        text += f" (expected: {self.expected})." if self.expected else "." * (not text.endswith("."))
        return " ".join(filter(None, (text, self.words, f"[{self.source}]" if self.source else "")))


@dataclass(frozen=True)
class ModelFolder:
    """What the files of a model say of it, read once.

    `config` is the transformer's, complete; `weights` and `text_weights` are memory-mapped, by our names and by T5's.
    A part is None where its file is absent or, for weights, cannot be read: `problems` has the sentence.
    """

    name: str
    recipe: Recipe
    config: dict[str, Any]
    told_by: str | None = None  # the file that tells the family; None: none does, and it is taken for α
    weights: dict[str, Tensor] | None = None
    position: Tensor | None = None  # [1, N, D]: a table stored beside the weights
    null_caption: Tensor | None = None  # [L, C]
    text: dict[str, Any] | None = None
    text_weights: dict[str, Tensor] | None = None
    tokenizer: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    vae_weights: dict[str, Tensor] | None = None
    scheduler: dict[str, Any] | None = None
    problems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, source: str | Path | None, components: str | Path | None = None) -> "ModelFolder":
        """The model of a folder, an official file or a name on the hub; None: what `make train` left.

        `components`: where text encoder, tokenizer, VAE and scheduler are, if not beside the transformer.

        Raises OSError, ValueError, one sentence, where there is no such model, or its config or recipe is damaged.
        """
        place = find(source)
        shared = find(components) if components is not None else place
        problems: dict[str, str] = {}

        def attempt(part: str, read: Callable[[], Any]) -> Any:
            try:
                return read()
            except (ValueError, OSError) as error:
                problems[part] = str(error)
                return None

        if place.is_file():
            named = to_our_names(read_weights(place))
            stored, null_caption = infer_config(named), named.null_caption
        else:
            transformer = transformer_folder(place)
            stored = read_json(transformer / "config.json")
            named = attempt("transformer", lambda: to_our_names(read_weights(transformer)))
            file = transformer / NULL_CAPTION_FILE
            null_caption = None if named is None else named.null_caption
            if file.is_file():
                read = attempt("null caption", lambda: read_file(file)) or {}
                null_caption = read.get("null_caption", null_caption)
        arguments = inspect.signature(Transformer).parameters.values()
        weights = None if named is None else dict(named.weights)
        position = None if named is None else named.position
        if weights is not None and STORED_TABLE in weights:
            position = weights.pop(STORED_TABLE)
        told = [(f, name) for f in dict.fromkeys((place, shared)) for name in TELLING if (f / name).is_file()]
        text = _json(shared / "text_encoder" / "config.json")
        vae = _json(shared / "vae" / "config.json")
        return cls(
            name=str(source or place),
            recipe=read_recipe(told[0][0] if told else place, null_caption=null_caption is not None),
            told_by=told[0][1] if told else None,
            config={a.name: stored.get(a.name, a.default) for a in arguments if a.default is not a.empty},
            weights=weights,
            position=position,
            null_caption=null_caption,
            text=text,
            text_weights=attempt("text encoder", lambda: _text_weights(shared / "text_encoder"))
            if _is_t5(text)
            else None,
            tokenizer=_json(shared / "tokenizer" / "tokenizer_config.json"),
            vae=vae,
            vae_weights=attempt("vae", lambda: _vae_weights(shared / "vae", vae)) if vae else None,
            scheduler=_json(shared / "scheduler" / "scheduler_config.json"),
            problems=problems,
        )

    @property
    def published(self) -> bool:
        return self.recipe.family in PUBLISHED

    @property
    def micro_conditions(self) -> bool:
        """Whether the config asks for them; unset, diffusers takes them at 1024 px."""
        asked = self.config["use_additional_conditions"]
        return self.config["sample_size"] == 128 if asked is None else asked

    @property
    def has_size_layers(self) -> bool:
        """Whether the weights have micro-conditions; as the config says where there are no weights."""
        if self.weights is None:
            return self.micro_conditions
        return any("resolution_embedder." in name for name in self.weights)


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _is_t5(text: dict[str, Any] | None) -> bool:
    return text is not None and text.get("model_type") == "t5"


def _text_weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        found |= unwrap(read_file(file), TRAINED, file)
    # The table of embeddings has two names; whole T5s have a decoder besides.
    embedding = found.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        found.setdefault("shared.weight", embedding)
    return {name: tensor for name, tensor in found.items() if not name.startswith(("decoder.", "lm_head."))}


def _vae_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    embedded = config.get("_class_name") == Autoencoder.__name__
    return read_weights(folder / Autoencoder.file_name if embedded else folder)


def check_recipe(model: ModelFolder) -> Iterator[Finding]:
    """Cleaning and token limit against the family's."""
    recipe = model.recipe
    kind = NAMES[recipe.family]
    found = f"{kind}, {8 * model.config['sample_size']} px"
    if model.told_by is None:
        words = "No file tells the family, and all below goes by it: name the folder with the rest by --components."
        yield Finding(LOOK, "family", found, f"one of {', '.join(TELLING)}", words)
    else:
        yield Finding(OK, "family", f"{found}, as {model.told_by} tells")
    if not model.published:
        return
    usual = PUBLISHED[recipe.family]
    if recipe.max_tokens != usual.max_tokens:
        yield Finding(
            WRONG,
            "token limit",
            f"{recipe.max_tokens} in {FILE}",
            str(usual.max_tokens),
            f"{kind} was trained on captions of that length: set max_tokens in {FILE}.",
            TOKEN_SOURCES[recipe.family],
        )
    if recipe.clean != usual.clean:
        yield Finding(
            LOOK,
            "caption cleaning",
            "on" if recipe.clean else "off",
            "on" if usual.clean else "off",
            "The model reads captions otherwise than in its training, unless it was fine-tuned so.",
            "PixArt-alpha, diffusion/model/t5.py" if recipe.family == "alpha" else "PixArt-sigma, scripts/inference.py",
        )


def check_weights(model: ModelFolder) -> Iterator[Finding]:
    """Every tensor that the config asks for is there, in its shape."""
    subject = "transformer's weights"
    if "transformer" in model.problems:
        yield Finding(WRONG, subject, model.problems["transformer"])
    if model.weights is None:
        return
    try:
        with torch.device("meta"):
            expected = Transformer(**model.config | {"use_additional_conditions": model.has_size_layers}).state_dict()
        check_fit(expected, model.weights)
    except ValueError as error:
        yield Finding(
            WRONG, subject, str(error), words="diffusers fills what is missing with random numbers and paints on."
        )
        return
    count = sum(tensor.numel() for tensor in model.weights.values())
    yield Finding(OK, subject, f"all {len(expected)} tensors, {count:,} parameters in {_dtypes(model.weights)}")


def check_architecture(model: ModelFolder) -> Iterator[Finding]:
    """What shapes of tensors do not tell: heads, activation, epsilon of the norms."""
    if not model.published:
        return
    config, source = model.config, "PixArt-alpha, diffusion/model/nets/PixArt.py (PixArt_XL_2)"
    wrong = [(name, config[name], value) for name, value in ARCHITECTURE.items() if config[name] != value]
    heads = config["num_attention_heads"]
    if heads * config["attention_head_dim"] == XL_WIDTH and heads != XL_HEADS:
        wrong.append(("num_attention_heads", heads, XL_HEADS))
    for name, found, expected in wrong:
        yield Finding(
            WRONG, name, repr(found), repr(expected), "The weights load all the same: correct config.json.", source
        )
    if not wrong:
        yield Finding(OK, "architecture", f"{heads} heads of {config['attention_head_dim']}, {config['activation_fn']}")


def check_position_scale(model: ModelFolder) -> Iterator[Finding]:
    """The scale of the position embedding: by the family's size, and by a table in the weights."""
    config, family, subject = model.config, model.recipe.family, "position scale"
    size, given = config["sample_size"], config["interpolation_scale"]
    scale = max(size // 64, 1) if given is None else given
    found = f"{scale:g}" + (", diffusers' default for a config without one" if given is None else "")
    if model.published:
        expected, source = POSITION_SCALES[family].get(size), POSITION_SOURCES[family]
        if expected is None:
            words = f"No published {NAMES[family]} has sample_size {size}: it must be the scale of the training."
            yield Finding(LOOK, subject, found, words=words, source=source)
        elif scale != expected:
            yield Finding(
                WRONG,
                subject,
                found,
                f"{expected:g} for {NAMES[family]} at {8 * size} px",
                f"Objects are repeated or stretched: set interpolation_scale to {expected:g} in the transformer's "
                "config.json.",
                source,
            )
        else:
            yield Finding(OK, subject, found, source=source)
    if model.position is None or model.position.ndim != 3 or model.position.shape[1] < 2 or model.position.shape[2] % 4:
        return
    row = model.position[0, 1].float()  # of the token right of the first: the scale alone decides it
    errors = {s: _distance(row, s) for s in sorted({0.5, 1.0, 2.0, 4.0, float(scale)}, key=lambda s: s != scale)}
    stored = min(errors, key=errors.get)
    subject = "position table in the weights"
    if errors[stored] > 0.02:  # several roundings of bf16
        yield Finding(LOOK, subject, "none of the published tables", words="It is not used; the config's scale is.")
    elif stored != scale:
        yield Finding(
            WRONG,
            subject,
            f"of scale {stored:g}",
            f"{scale:g}, as the config has it",
            "The model was trained with the table: set interpolation_scale in config.json to its scale.",
        )
    else:
        yield Finding(OK, subject, f"of scale {stored:g}, as the config has it")


def _distance(row: Tensor, scale: float) -> float:
    table = sincos_2d(1, 2, len(row), base_size=2, scale=scale, device=row.device)
    return (table[1] - row).abs().max().item()


def check_micro_conditions(model: ModelFolder) -> Iterator[Finding]:
    """Picture size and aspect ratio as conditions: in the config, in the weights and in the family."""
    subject, family, size = "micro-conditions", model.recipe.family, model.config["sample_size"]
    asked, present = model.micro_conditions, model.has_size_layers
    state = "on" if asked else "off"
    unset = ", diffusers' default for a config without use_additional_conditions"
    found = state + (unset if model.config["use_additional_conditions"] is None else "")
    source = f"PixArt-{family}, diffusion/model/nets/PixArtMS.py"
    if asked != present:
        yield Finding(
            WRONG,
            subject,
            f"{found}, but the weights have {'them' if present else 'none'}",
            "on" if present else "off",
            ("They are dropped" if present else "diffusers makes them up at random")
            + f": set use_additional_conditions to {str(present).lower()} in the transformer's config.json.",
            source,
        )
    elif family == "sigma" and asked:
        words = "Published Σ has none, and diffusers' Σ pipeline tells the model of no size."
        yield Finding(LOOK, subject, found, "off", words, source)
    elif family == "alpha" and size == 128 and not asked:
        words = "Published α has them at 1024 px; right for a model that was trained without."
        yield Finding(LOOK, subject, found, "on", words, source)
    elif asked and size != 128:
        words = "diffusers' pipelines tell the model of its size at 1024 px alone; pixart_fast always does."
        yield Finding(LOOK, subject, found, words=words, source="diffusers, PixArtAlphaPipeline")
    elif model.published:
        told = f", told the aspect ratio as {model.recipe.micro_conditions}" if asked else ""
        yield Finding(OK, subject, found + told, source=source)


def check_outputs(model: ModelFolder) -> Iterator[Finding]:
    """Twice the input channels: noise and its learned variance."""
    inputs = model.config["in_channels"]
    outputs = inputs if model.config["out_channels"] is None else model.config["out_channels"]
    subject, expected = "output channels", f"{2 * inputs}: noise and variance"
    if outputs == 2 * inputs:
        yield Finding(OK, subject, expected)
    elif outputs == inputs:
        words = "There is no learned variance: the sampler iddpm refuses, all others work."
        yield Finding(LOOK, subject, f"{outputs}, the noise alone", expected, words, "PixArt-alpha, diffusion/iddpm.py")
    else:
        words = f"No sampler takes that for {inputs} channels of latents."
        yield Finding(WRONG, subject, str(outputs), expected, words, "PixArt-alpha, diffusion/iddpm.py")


def check_cross_attention(model: ModelFolder) -> Iterator[Finding]:
    """Output projections of zero, as training starts with: the prompt then says nothing."""
    layers = {n: t for n, t in (model.weights or {}).items() if n.endswith("attn2.to_out.0.weight") and t.ndim == 2}
    zero = [name for name, weight in layers.items() if not weight[0].any() and not weight.any()]
    subject, source = "influence of the text", "PixArt-α, section 2.3"
    if layers and len(zero) == len(layers):
        words = "The prompt changes nothing: this is a model before its training on captions."
        yield Finding(WRONG, subject, "cross-attention ends in zeros in every block", "trained weights", words, source)
    elif zero:
        words = "These blocks read nothing of the prompt."
        yield Finding(LOOK, subject, f"zeros in {listed(zero)}", "trained weights", words, source)
    elif layers:
        yield Finding(OK, subject, f"cross-attention of {len(layers)} blocks is trained")


def check_null_caption(model: ModelFolder) -> Iterator[Finding]:
    """What guidance leads away from."""
    subject, recipe, null = "null caption", model.recipe, model.null_caption
    if "null caption" in model.problems:
        yield Finding(WRONG, subject, model.problems["null caption"])
    if recipe.null == "checkpoint" and null is None:
        words = f"Guidance has nothing to lead away from: set null to t5_empty in {FILE}, or convert the official file."
        yield Finding(WRONG, subject, "the recipe takes the checkpoint's, which has none", NULL_CAPTION_FILE, words)
        return
    source = "PixArt-alpha, diffusion/model/nets/PixArt_blocks.py (CaptionEmbedder); diffusers, PixArtAlphaPipeline"
    expected = [recipe.max_tokens, model.config["caption_channels"]]
    if null is not None and model.published and list(null.shape) != expected:
        words = "It is of another family or text encoder: remove it, or convert the official file again."
        yield Finding(WRONG, subject, f"{list(null.shape)}", f"{expected}, tokens and channels", words, source)
        return
    if recipe.null == "checkpoint" and recipe.null_mask != "cond" and recipe.family == "alpha":
        words = "The official α counts as many of its rows as the prompt has tokens: set null_mask to cond."
        yield Finding(LOOK, subject, "the checkpoint's, all rows of it", "as many rows as the prompt", words, source)
    elif recipe.family == "alpha" and null is not None and recipe.null == "t5_empty":
        words = "The weights carry the embedding that α was trained with: null: checkpoint uses it."
        yield Finding(LOOK, subject, "the empty prompt's features", "the checkpoint's", words, source)
    elif recipe.null == "checkpoint":
        words = "diffusers' pipelines do not read it and lead away from the empty prompt."
        yield Finding(OK, subject, f"the checkpoint's, mask: {recipe.null_mask}", words=words, source=source)
    elif recipe.family == "alpha":
        words = "So do diffusers' pipelines; the official α has an embedding of its own, which their conversion drops."
        yield Finding(OK, subject, "the empty prompt's features", words=words, source=source)
    else:
        yield Finding(OK, subject, "the empty prompt's features")


def check_vae(model: ModelFolder) -> Iterator[Finding]:
    """The autoencoder's channels, size and scale, and whether it is the family's."""
    subject, family, vae = "VAE", model.recipe.family, model.vae
    if vae is None:
        words = "Name the folder that has one by --components."
        yield Finding(LOOK, subject, "none beside the transformer", words=words)
        return
    if "vae" in model.problems:
        yield Finding(WRONG, "VAE's weights", model.problems["vae"])
    if vae.get("_class_name") == Autoencoder.__name__:
        wanted = (model.vae_weights or {}).get("norm.running_mean")
        channels = None if wanted is None else len(wanted)
    else:
        # What AutoencoderKL takes where its config is silent.
        channels = vae.get("latent_channels", 4)
        downsample = 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
        if downsample != 8:
            words = "Pictures come out in another size than asked for."
            yield Finding(WRONG, "VAE's reduction", str(downsample), "8", words, "PixArt-α, section 2.3")
    if channels is not None and channels != model.config["in_channels"]:
        words = "It is another model's autoencoder: take the one that the transformer was trained with."
        yield Finding(WRONG, "VAE's channels", str(channels), str(model.config["in_channels"]), words)
    if not model.published:
        return
    scale, expected, source = vae.get("scaling_factor", 0.18215), VAE_SCALES[family], VAE_SOURCES[family]
    origin = str(vae.get("_name_or_path", ""))
    is_sdxl = "sdxl" in origin.lower()
    if not math.isclose(scale, expected, rel_tol=1e-3):
        other = next((f for f, value in VAE_SCALES.items() if math.isclose(scale, value, rel_tol=1e-3)), None)
        words = "Colours are washed out or burnt: " + (
            f"this is {OTHER_VAE[family]}; take the one of {NAMES[family]}." if other else "correct vae/config.json."
        )
        yield Finding(WRONG, "VAE's scaling factor", f"{scale:g}", f"{expected:g}", words, source)
    elif is_sdxl and family == "alpha":
        words = "Its scaling factor is α's, its latents are not: take the VAE of Stable Diffusion (sd-vae-ft-ema)."
        yield Finding(WRONG, "VAE", f"of {origin}, SDXL's", "Stable Diffusion's", words, source)
    elif family == "sigma" and not vae.get("force_upcast", True) and "fp16" not in origin:
        words = "In fp16 SDXL's VAE overflows to black pictures; pixart_fast decodes in fp32 or bf16."
        yield Finding(LOOK, "VAE", "force_upcast is off", "on", words, "diffusers, AutoencoderKL")
    else:
        yield Finding(OK, "VAE's scaling factor", f"{scale:g}", source=source)


def check_tokenizer(model: ModelFolder) -> Iterator[Finding]:
    """How many tokens the tokenizer keeps by itself."""
    if not model.published:
        return
    subject, limit = "tokenizer", model.recipe.max_tokens
    if model.tokenizer is None:
        words = "Name the folder that has one by --components."
        yield Finding(LOOK, subject, "none beside the transformer", words=words)
        return
    usual = PUBLISHED[model.recipe.family].max_tokens
    found = model.tokenizer.get("model_max_length")
    if found != usual:
        words = f"Programs that go by it cut or pad captions there; pixart_fast and diffusers' pipelines use {limit}."
        source = TOKEN_SOURCES[model.recipe.family]
        yield Finding(LOOK, subject, f"keeps {found} tokens", str(usual), words, source)
    else:
        yield Finding(OK, subject, f"keeps {found} tokens", source=TOKEN_SOURCES[model.recipe.family])


def check_text_encoder(model: ModelFolder) -> Iterator[Finding]:
    """A T5 whose features have the transformer's width, all of it there, in a dtype that works."""
    if not model.published:
        return
    subject, text, weights = "text encoder", model.text, model.text_weights
    source = "PixArt-alpha, diffusion/model/t5.py"
    if text is None:
        words = "Name the folder that has one by --components."
        yield Finding(LOOK, subject, "none beside the transformer", words=words)
        return
    if not _is_t5(text):
        words = "PixArt reads the features of T5 alone: take text_encoder/ and tokenizer/ of a PixArt model."
        yield Finding(WRONG, subject, str(text.get("model_type")), "t5", words, source)
        return
    width, wanted = text.get("d_model"), model.config["caption_channels"]
    if width != wanted:
        words = "It is a T5 of another size than the transformer was trained with."
        yield Finding(WRONG, f"{subject}'s width (d_model)", str(width), f"{wanted}, caption_channels", words, source)
    if "text encoder" in model.problems:
        yield Finding(WRONG, f"{subject}'s weights", model.problems["text encoder"])
    if not weights:
        return
    expected = skeleton(text, "fp32").state_dict()
    del expected["encoder.embed_tokens.weight"]
    try:
        check_fit(expected, weights)
    except ValueError as error:
        words = "transformers fills what is missing with random numbers and goes on."
        yield Finding(WRONG, f"{subject}'s weights", str(error), words=words)
        return
    half = [name for name, tensor in weights.items() if name.endswith(".wo.weight") and tensor.dtype == torch.float16]
    if half:
        words = (
            "Kept in fp16 they overflow, and pictures are corrupt: load them with from_pretrained, which holds wo in "
            "fp32, never with .to(torch.float16) after; --text-precision bf16, fp16 and int8 are safe."
        )
        expected = "fp32 or bf16 for wo"
        yield Finding(
            LOOK, f"{subject}'s dtype", f"{_dtypes(weights)}, wo too", expected, words, "diffusers issue 8604"
        )
    else:
        yield Finding(OK, subject, f"T5 of width {width}, {len(weights)} tensors in {_dtypes(weights)}")


def check_scheduler(model: ModelFolder) -> Iterator[Finding]:
    """The noise that the model was trained on."""
    subject, source = "noise schedule", "PixArt-alpha, diffusion/iddpm.py; diffusion/model/gaussian_diffusion.py"
    if model.scheduler is None:
        words = "pixart_fast takes the published one."
        yield Finding(OK, subject, "none in the folder", words=words)
        return
    # A scheduler's own defaults differ; what its config does not say is not judged.
    wrong = {n: v for n, v in SCHEDULE.items() if n in model.scheduler and not _same(model.scheduler[n], v)}
    for name, expected in wrong.items():
        words = "The sampler takes other noise away than there is: correct scheduler/scheduler_config.json."
        yield Finding(WRONG, f"{subject}, {name}", repr(model.scheduler[name]), repr(expected), words, source)
    if not wrong:
        yield Finding(OK, subject, "linear betas, 1e-4 to 0.02 in 1000 steps, noise is predicted", source=source)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == expected


def check_finite(model: ModelFolder) -> Iterator[Finding]:
    """Reads every weight: none may be infinite or NaN."""
    for part in ("weights", "text_weights", "vae_weights"):
        tensors: Mapping[str, Tensor] = getattr(model, part) or {}
        bad = [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        subject = {"weights": "transformer", "text_weights": "text encoder", "vae_weights": "VAE"}[part] + "'s values"
        if bad:
            words = "Pictures are black or noise: fetch the file again, or take an earlier checkpoint."
            yield Finding(WRONG, subject, f"infinite or NaN in {listed(bad)}", "finite", words)
        elif tensors:
            yield Finding(OK, subject, "all finite")


def _dtypes(weights: Mapping[str, Tensor]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))


CHECKS = (
    check_recipe,
    check_weights,
    check_architecture,
    check_position_scale,
    check_micro_conditions,
    check_outputs,
    check_cross_attention,
    check_null_caption,
    check_vae,
    check_tokenizer,
    check_text_encoder,
    check_scheduler,
)


def examine(model: ModelFolder, *, weights: bool = False) -> list[Finding]:
    """All findings; `weights` reads every value too."""
    return [finding for check in (*CHECKS, *([check_finite] if weights else [])) for finding in check(model)]


def read_settings(path: Path) -> dict[str, Any]:
    """A training configuration by dotted keys. Raises OSError, ValueError, one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration {path}: name a YAML file of train/run.py.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, it holds a {type(values).__name__}.")
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def number(settings: Mapping[str, Any], key: str, default: float) -> float:
    """A setting as a number: YAML 1.1 reads 1e-4 as a word. ValueError, one sentence."""
    try:
        return float(settings.get(key, default))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is {settings[key]!r}, which is no number.") from error


def examine_training(settings: Mapping[str, Any]) -> list[Finding]:
    """Findings about a training configuration, by dotted keys of train/settings.py; unknown keys are passed over."""
    return [*check_learning_rate(settings), *check_optimizer(settings), *check_training(settings)]


def is_xl(settings: Mapping[str, Any]) -> bool:
    """Whether the published values of the optimizer are for this model."""
    own = any(settings.get(f"model.{key}") for key in ("layers", "width", "heads"))
    return settings.get("model.size", "XL") == "XL" and not own


def check_learning_rate(settings: Mapping[str, Any]) -> Iterator[Finding]:
    """The step that a picture's batch really takes, by the paper and by the official code."""
    subject = "effective learning rate"
    if "batch_size" not in settings:
        yield Finding(LOOK, subject, "batch_size is not set", words="What optimizer.lr means depends on it.")
        return
    lr, batch = number(settings, "optimizer.lr", BASE_LR), number(settings, "batch_size", 0)
    if batch < 1:
        raise ValueError(f"batch_size is {settings['batch_size']!r}: a step takes one picture at least.")
    found = f"{lr:g} at {batch:g} pictures a step, taken as it is"
    if settings.get("optimizer.lr_rule") == "sqrt":
        factor = math.sqrt(batch / BASE_BATCH)
        found = f"{lr:g} · √({batch:g}/{BASE_BATCH}) = {lr * factor:.3g} at {batch:g} pictures a step"
        lr *= factor
    if not is_xl(settings):
        yield Finding(OK, subject, found, words="Smaller models take larger ones; the papers train XL alone.")
        return
    scaled = BASE_LR * math.sqrt(batch / BASE_BATCH)
    stages = ", ".join(f"{BASE_LR * math.sqrt(stage / BASE_BATCH):.3g} at {stage}" for stage in STAGES)
    expected = f"{BASE_LR:g} by the paper, {scaled:.3g} by the official code"
    words = f"That code multiplies its {BASE_LR:g} by √(batch/{BASE_BATCH}): {stages} pictures a step."
    low, high = min(scaled, BASE_LR), max(scaled, BASE_LR)
    status = WRONG if lr > 10 * high else OK if low / 3 <= lr <= 3 * high else LOOK
    if status == WRONG:
        words += " A published model forgets what it knows within a few hundred steps of this."
    yield Finding(status, subject, found, expected, words, LR_SOURCE)


def check_optimizer(settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Clipping, weight decay and epsilon of a published model's training."""
    if not is_xl(settings):
        return
    clip = number(settings, "optimizer.clip", 1.0)
    decay, eps = number(settings, "optimizer.weight_decay", 0.03), number(settings, "optimizer.eps", 1e-8)
    unusual = {
        "gradient clipping": (clip == 0 or clip > 1, f"{clip:g}" if clip else "off", "0.01 in every stage, 1 at most"),
        "weight decay": (decay > 0.1, f"{decay:g}", "0.03 (Σ: 0)"),
        "epsilon of the optimizer": (eps > 1e-6, f"{eps:g}", "1e-10; PyTorch's 1e-8 is as good"),
    }
    words = {
        "gradient clipping": "One bad batch can undo a checkpoint.",
        "weight decay": "It pulls all weights to zero, tables of the time included.",
        "epsilon of the optimizer": "It is as large as the gradients and shortens their steps.",
    }
    for subject, (odd, found, expected) in unusual.items():
        yield Finding(LOOK if odd else OK, subject, found, expected, words[subject] if odd else "", CONFIG_SOURCE)


def check_training(settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Caption dropout, timesteps and precision."""
    dropout = number(settings, "data.caption_dropout", 0.1)
    source = "PixArt-alpha, diffusion/model/nets/PixArt_blocks.py (CaptionEmbedder)"
    if dropout == 0:
        words = "The branch without a caption is not trained, which guidance subtracts: colours burn in."
        yield Finding(WRONG, "caption dropout", "0", "0.1", words, source)
    elif dropout > 0.3:
        words = "Much of the training then sees no caption."
        yield Finding(LOOK, "caption dropout", f"{dropout:g}", "0.1", words, source)
    else:
        yield Finding(OK, "caption dropout", f"{dropout:g}", source=source)
    timesteps = number(settings, "diffusion.num_timesteps", 1000)
    if timesteps != 1000:
        words = "A published model, and every sampler here, counts 1000."
        yield Finding(
            WRONG, "timesteps", f"{timesteps:g}", "1000", words, "PixArt-alpha, configs (train_sampling_steps)"
        )
    if settings.get("precision") == "fp16":
        words = (
            "Fine-tuning in fp16 is where reports of NaN come from; the loss is scaled, but bf16 needs no scale: "
            "choose it where the device has it."
        )
        yield Finding(LOOK, "precision", "fp16", "bf16 or fp32", words, "Sana issue 65; PixArt-alpha pull request 122")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pixart_fast.doctor",
        description="Names what silently spoils the pictures of a PixArt model, with the right value and its source.",
        epilog="each line is: ok; look: unusual, may be meant; WRONG: mend it. Exit code 0 without a WRONG, 1 with "
        "one, 2 where there was nothing to examine. Nothing is changed, and without --weights little but headers of "
        "weight files is read.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="DIR",
        help="a model folder as published, or as training leaves it in final/; an official .pth; a name on the hub; "
        "default: what `make train` left",
    )
    parser.add_argument(
        "--components", metavar="DIR", help="where text encoder, tokenizer and VAE are, if not in the model's folder"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="also a configuration of train/run.py: what its learning rate means at its batch size, and more; without "
        "DIR it alone",
    )
    parser.add_argument("--weights", action="store_true", help="read every weight, and report infinite ones and NaN")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = arguments()
    args = parser.parse_args(argv)
    findings, name = [], str(args.config)
    try:
        if args.model is not None or args.config is None:
            model = ModelFolder.read(args.model, args.components)
            name = model.name
            findings += examine(model, weights=args.weights)
        if args.config is not None:
            findings += examine_training(read_settings(args.config))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    wrong = sum(finding.status == WRONG for finding in findings)
    if args.json:
        print(json.dumps({"model": name, "wrong": wrong, "findings": [f._asdict() for f in findings]}, indent=2))
    else:
        print(name)
        width = min(shutil.get_terminal_size().columns, 110)
        for finding in findings:
            print(textwrap.fill(f"{finding.status:<7}{finding}", width, subsequent_indent=" " * 7))
        print(f"{wrong or 'nothing'} wrong, {sum(f.status == LOOK for f in findings)} to look at")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

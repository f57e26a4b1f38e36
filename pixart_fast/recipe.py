"""How the model in a folder wants to be used: what its pictures depend on beside the weights.

Published folders say little of it, so a family's published habit stands for what is not written. `recipe.json` beside
the weights, which training writes, says it all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from pixart_fast.interop import NULL_CAPTION_FILE
from pixart_fast.weights import read_json

FILE = "recipe.json"
EMBEDDED = Path("runs/scenes/final")  # what `make train` leaves
PARTS = ("model_index.json", FILE, "transformer/*", "text_encoder/*", "tokenizer/*", "vae/*", "scheduler/*")


class Recipe(BaseModel):
    """What a model was trained with, as far as generation has to do the same.

    null             what the unconditional branch of guidance reads: "t5_empty", the text encoder's features of the
                     empty prompt (diffusers, Σ), or "checkpoint", the embedding that α checkpoints carry
    null_mask        how many of its tokens count: "own", as many as it has, or "cond", as many as the prompt's
                     (the official α code keeps the caption's mask when it drops the caption)
    micro_conditions what a model with micro-conditions was told in training: a picture's "original" height and width
                     with the key of its bucket, rounded, for the aspect ratio (the official training); the "bucket"'s
                     own height and width with that key; or these with their "exact" ratio. Generation tells the sizes
                     of what it paints, and the ratio exactly (as diffusers' pipeline does) for the last alone
    clean, keep_cjk  the published cleaning of captions; it drops Chinese, Japanese and Korean signs unless told not to
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["alpha", "sigma", "embedded"]
    max_tokens: PositiveInt
    clean: bool
    keep_cjk: bool
    null: Literal["t5_empty", "checkpoint"] = "t5_empty"
    null_mask: Literal["own", "cond"] = "own"
    micro_conditions: Literal["original", "bucket", "exact"] = "original"
    guidance: float | None = None  # None: the sampler's own

    def save(self, folder: Path) -> None:
        """Write `recipe.json`."""
        (folder / FILE).write_text(json.dumps(self.model_dump(), indent=2) + "\n")


PUBLISHED = {
    "alpha": Recipe(family="alpha", max_tokens=120, clean=True, keep_cjk=False),
    "sigma": Recipe(family="sigma", max_tokens=300, clean=False, keep_cjk=True),
}


def find(source: str | Path | None, *, parts: tuple[str, ...] = PARTS) -> Path:
    """The local folder of a model: a folder, what `make train` left (None), or a repository of the Hugging Face hub.

    Raises OSError, one sentence, where there is none or the hub cannot be reached.
    """
    if source is None:
        if not (EMBEDDED / "config.json").is_file():
            raise FileNotFoundError(
                f"there is no model in {EMBEDDED}: run `make train` first (minutes on a CPU), or name a model, as in "
                "--model PixArt-alpha/PixArt-XL-2-1024-MS."
            )
        return EMBEDDED
    path = Path(source)
    if path.exists():
        return path
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} is neither a folder nor the name of a model on the Hugging Face hub.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(parts)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{source} is no folder here, and the Hugging Face hub gave none ({reason})") from error


def transformer_folder(folder: Path) -> Path:
    """Where the transformer of a model folder lies: in `transformer/`, or at the top as training leaves it.

    Raises FileNotFoundError.
    """
    for place in (folder / "transformer", folder):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"{folder} holds no transformer: a model folder has transformer/config.json beside text_encoder/, tokenizer/ "
        "and vae/, as published, or config.json at its top."
    )


def read_recipe(folder: Path, given: Mapping[str, Any] | None = None, null_caption: bool | None = None) -> Recipe:
    """What a folder's `recipe.json` says, or else its family's published habit, with `given` changes.

    `null_caption`: whether the transformer carries one, where that is known without a look at the folder. Σ's is the
    empty prompt's features, α's is not.

    Raises ValueError, one sentence, for a value that a recipe does not have.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    written = folder / FILE
    try:
        if written.is_file():
            return Recipe(**read_json(written) | given)
        recipe = PUBLISHED[family(folder)]
        if null_caption is None:
            null_caption = (transformer_folder(folder) / NULL_CAPTION_FILE).is_file()
        if null_caption and recipe.family == "alpha":
            recipe = recipe.model_copy(update={"null": "checkpoint", "null_mask": "cond"})
        return Recipe(**recipe.model_dump() | given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"the recipe of {folder} has a wrong {where} ({problem['msg']}).") from error


def family(folder: Path) -> str:
    """ "alpha" or "sigma", of a published folder: by its pipeline's class, else by the tokens its tokenizer takes."""
    index = folder / "model_index.json"
    if index.is_file():
        return "sigma" if "Sigma" in read_json(index).get("_class_name", "") else "alpha"
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    if tokenizer.is_file() and read_json(tokenizer).get("model_max_length") == PUBLISHED["sigma"].max_tokens:
        return "sigma"
    return "alpha"

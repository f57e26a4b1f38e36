"""Settings of a run: a YAML file, `key=value` on the command line on top, every key known and every value checked."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from pixart_fast.config import SIZES, Size

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = CONFIGS / "scenes.yaml"


class UserError(Exception):
    """A mistake that the user can mend; its one sentence is printed without a stack trace."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The transformer. `size` names a row of `pixart_fast.config.SIZES`; the other keys override parts of it."""

    size: Literal["scenes", "S", "B", "L", "XL"] = "XL"
    layers: PositiveInt | None = None
    width: PositiveInt | None = None
    heads: PositiveInt | None = None
    patch_size: PositiveInt = 2
    modulation: Literal["adaln_single", "adaln"] = "adaln_single"
    dropout: float = Field(0.0, ge=0, lt=1)
    gate: float | None = None

    def resolved_size(self) -> Size:
        given = {"layers": self.layers, "width": self.width, "heads": self.heads}
        return SIZES[self.size]._replace(**{key: value for key, value in given.items() if value is not None})


class Data(Section):
    """What it learns from. `workers` processes prepare batches ahead; 0 prepares them in the training process."""

    source: Literal["scenes"] = "scenes"
    captions: Literal["dense", "sparse", "mixed"] = "dense"
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    workers: int = Field(0, ge=0)


class Diffusion(Section):
    """Which timesteps are drawn and what they weigh. The paper: uniform, unweighted."""

    num_timesteps: PositiveInt = 1000
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    max_weight: float = Field(1.0, ge=1)


class Optimizer(Section):
    """The paper's AdamW by default. "muon" orthogonalises the updates of the blocks' matrices, which needs them whole:
    zero_stage=0; "auto" takes it there, and AdamW with ZeRO."""

    kind: Literal["adamw", "muon", "auto"] = "adamw"
    implementation: Literal["auto", "torch", "deepspeed", "apex"] = "auto"
    lr: PositiveFloat = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.03, ge=0)
    muon_lr: PositiveFloat = 0.02
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = Field(1.0, ge=0)
    ema: float = Field(0.9999, ge=0, lt=1)


class Sampling(Section):
    """Pictures and oracle accuracy along the way: captions per split, solver steps, guidance."""

    every: int = Field(0, ge=0)
    captions: PositiveInt = 96
    final_captions: PositiveInt = 192
    steps: PositiveInt = 20
    guidance: float = Field(4.5, ge=1)


class Settings(Section):
    """One training run; the defaults are the paper's where it states a value, `configs/*.yaml` name the rest."""

    output: Path
    seed: int = Field(0, ge=0)
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="images per optimizer step, over all processes")
    accumulation: PositiveInt = 1
    model: Model = Model()
    data: Data = Data()
    diffusion: Diffusion = Diffusion()
    optimizer: Optimizer = Optimizer()
    sampling: Sampling = Sampling()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    activation_checkpointing: bool | Literal["pointwise"] = Field(
        False, description='whole blocks are computed again in the backward; "pointwise": all but their matrix products'
    )
    compile: bool = False
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    resume: Literal["auto", "never"] = "auto"
    init_from: Path | None = None

    def optimizer_kind(self) -> str:
        """ "adamw" or "muon"."""
        if self.optimizer.kind == "auto":
            return "adamw" if self.zero_stage else "muon"
        return self.optimizer.kind

    def rows_per_process(self, processes: int) -> int:
        """Rows of a micro-batch; every process runs `accumulation` of them per step."""
        parts = processes * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"batch_size {self.batch_size} does not divide by {processes} process(es) x accumulation "
                f"{self.accumulation}: choose a multiple of {parts}."
            )
        return self.batch_size // parts


# What may differ when a run goes on. `steps` bends a cosine schedule, and workers, on one thread each, round latents in
# their own way; nothing else here changes a number that is still to be computed.
FREE_ON_RESUME = {
    "steps",
    "output",
    "resume",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sampling",
    "data.workers",
    "init_from",
}


def load_settings(path: Path, overrides: list[str]) -> Settings:
    """Read a YAML file and apply `key=value` overrides (`optimizer.lr=1e-4`, values in YAML's notation).

    Raises UserError, one sentence, for a missing file, an unknown key (with the nearest known one) or a bad value.
    """
    if not path.is_file():
        known = ", ".join(
            sorted(
                str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)
                for file in CONFIGS.glob("*.yaml")
            )
        )
        raise UserError(f"no configuration {path}: the ones that come with the project are {known}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, it holds a {type(values).__name__}.")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"{override!r} is not key=value: write, for instance, steps=1000 or optimizer.lr=1e-4.")
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{key} is not a key: {section} holds a value, not a section.")
        place[leaf] = _scalar(text)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error)) from error


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text) if text else None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as a word
        try:
            return float(value)
        except ValueError:
            return value
    return value


def known_keys(section: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every key in dotted notation."""
    keys = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        leaf = key.rsplit(".", 1)[-1]
        known = known_keys()
        sections = [name.rpartition(".")[0] for name in known if "." in name]
        near = difflib.get_close_matches(key, known + sections, n=1) or [
            name for name in known if difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1]], n=1)
        ]
        hint = f"did you mean {near[0]}?" if near else f"the known keys are {', '.join(known)}."
        return f"unknown key {key}: {hint}"
    if first["type"] == "missing":
        return f"{key} is not set: give it in the configuration or as {key}=VALUE."
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}."


def flatten(settings: Settings) -> dict[str, Any]:
    """Dotted key to plain value, for comparison and for the log."""
    flat: dict[str, Any] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    walk(settings.model_dump(mode="json"), "")
    return flat


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys whose change would make a continued run another run."""

    def free(key: str) -> bool:
        return key in FREE_ON_RESUME or key.partition(".")[0] in FREE_ON_RESUME

    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not free(key))

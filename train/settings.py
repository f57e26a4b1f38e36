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
    """A mistake that the user can mend; its one sentence is printed without a stack trace, once for all processes
    unless it is that of `one_process`."""

    one_process = False


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The transformer. `size` names a row of `pixart_fast.config.SIZES`; the other keys override parts of it.

    kind: "dit" is the class-conditional model of the paper's first stage. interpolation_scale: of the position
    embedding; None is 1 up to 512 px and 2 at 1024. micro_conditions: what the model is told of a picture's size:
    "original" its height and width and its bucket's ratio (the published training), "bucket" the bucket's own, "exact"
    the bucket's height and width and their exact ratio (diffusers).
    """

    kind: Literal["pixart", "dit"] = "pixart"
    size: Literal["scenes", "S", "B", "L", "XL"] = "XL"
    layers: PositiveInt | None = None
    width: PositiveInt | None = None
    heads: PositiveInt | None = None
    patch_size: PositiveInt = 2
    modulation: Literal["adaln_single", "adaln"] = "adaln_single"
    dropout: float = Field(0.0, ge=0, lt=1)
    gate: float | None = None
    interpolation_scale: PositiveFloat | None = None
    micro_conditions: Literal["none", "original", "bucket", "exact"] = "none"

    def resolved_size(self) -> Size:
        given = {"layers": self.layers, "width": self.width, "heads": self.heads}
        return SIZES[self.size]._replace(**{key: value for key, value in given.items() if value is not None})


class Data(Section):
    """What it learns from. `workers` processes prepare batches ahead; 0 prepares them in the training process.

    source: "scenes" are drawn on the fly; "features" are a folder `store` that `python -m train.data.extract` made;
    "images" are what it would read, encoded in the loader by the model folder `encoders`, on the CPU, to the same bits:
    for small sets.
    token_budget: image tokens of a step over all processes, instead of batch_size pictures whatever their bucket.
    null_mask: a dropped caption leaves the empty one with its "own" tokens, or as many as the caption had ("cond", as
    published).
    """

    source: Literal["scenes", "features", "images"] = "scenes"
    store: Path | None = None
    images: Path | None = None
    encoders: Path | None = None
    resolution: PositiveInt | None = None
    multi_aspect: bool = False
    token_budget: PositiveInt | None = None
    null_mask: Literal["own", "cond"] = "own"
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
    lr_rule: Literal["constant", "sqrt"] = Field(
        "constant", description='"sqrt": times the root of batch_size / 256, as the published code has it'
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.03, ge=0)
    muon_lr: PositiveFloat = 0.02
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = Field(1.0, ge=0)
    ema: float = Field(0.9999, ge=0, lt=1)


class Sampling(Section):
    """Pictures along the way, with the averaged weights: solver steps, guidance; of scenes also the oracle's accuracy,
    over so many captions per split. With features `prompts` (or the store's first captions) are painted, by the text
    encoder and VAE in the model folder `components`, which are in memory only then.
    """

    components: Path | None = None
    prompts: tuple[str, ...] = ()
    every: int = Field(0, ge=0)
    captions: PositiveInt = 96
    final_captions: PositiveInt = 192
    steps: PositiveInt = 20
    guidance: float = Field(4.5, ge=1)


class Cost(Section):
    """What a run is reckoned to cost: the price of a GPU hour, kg of CO2 per kWh (0.436: the world in 2022, Ember) in a
    region, which the report names, and what a data centre draws beside its computers (1.58: Uptime Institute 2023)."""

    dollars_per_gpu_hour: float | None = Field(None, ge=0)
    region: str = "world"
    kg_co2_per_kwh: float = Field(0.436, ge=0)
    pue: float = Field(1.58, ge=1)


class Settings(Section):
    """One training run; the defaults are the paper's where it states a value, `configs/*.yaml` name the rest."""

    output: Path
    seed: int = Field(0, ge=0)
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="images per optimizer step, over all processes")
    accumulation: PositiveInt = 1
    micro_tokens: PositiveInt | None = Field(
        None, description="image tokens that a process computes at a time at most: sets accumulation"
    )
    model: Model = Model()
    data: Data = Data()
    diffusion: Diffusion = Diffusion()
    optimizer: Optimizer = Optimizer()
    sampling: Sampling = Sampling()
    cost: Cost = Cost()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    activation_checkpointing: bool | Literal["pointwise"] = Field(
        False,
        description='whole blocks are computed again in the backward; "pointwise": all but their matrix products '
        "(a DiT's whole blocks)",
    )
    compile: bool = False
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    resume: Literal["auto", "never"] = "auto"
    init_from: Path | None = Field(
        None, description="a model folder, official .pth, or a DiT, which is re-parameterised (section 2.3)"
    )
    init_timestep: int = Field(500, ge=0, le=999, description="where the re-parameterised model equals its DiT")
    wandb: str | None = Field(None, description="project of Weights & Biases to log to as well")

    def resolved(self, processes: int, tokens: int) -> "Settings":
        """With the least accumulation that keeps a micro-batch of pictures of `tokens` within `micro_tokens`."""
        if self.micro_tokens is None:
            return self
        if self.data.token_budget is not None:
            raise UserError("data.token_budget and micro_tokens do not go together: choose accumulation= instead.")
        if self.batch_size % processes:
            raise UserError(
                f"batch_size {self.batch_size} does not divide by {processes} processes: choose a multiple."
            )
        rows, most = self.batch_size // processes, self.micro_tokens // tokens
        if not most:
            raise UserError(f"micro_tokens={self.micro_tokens} is less than a picture's {tokens} tokens: raise it.")
        least = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)
        return self.model_copy(update={"accumulation": least})

    def effective_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.optimizer.lr * (self.batch_size / 256) ** (0.5 if self.optimizer.lr_rule == "sqrt" else 0)

    def optimizer_kind(self) -> str:
        """ "adamw" or "muon"."""
        if self.optimizer.kind == "auto":
            return "adamw" if self.zero_stage else "muon"
        return self.optimizer.kind

    def rows_per_process(self, processes: int, rows: int | None = None) -> int:
        """Rows of a micro-batch, of a step of `rows` (None: batch_size); every process runs `accumulation` of them."""
        rows = self.batch_size if rows is None else rows
        parts = processes * self.accumulation
        if rows % parts:
            raise UserError(
                f"batch_size {rows} does not divide by {processes} process(es) x accumulation "
                f"{self.accumulation}: choose a multiple of {parts}."
            )
        return rows // parts


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
    "cost",
    "wandb",
}


def load_settings(path: Path | list[Path], overrides: list[str]) -> Settings:
    """Read YAML files, the later over the earlier, and apply `key=value` overrides (`optimizer.lr=1e-4`, values in
    YAML's notation).

    Raises UserError, one sentence, for a missing file, an unknown key (with the nearest known one) or a bad value.
    """
    values: dict[str, Any] = {}
    for file in [path] if isinstance(path, Path) else path:
        _merge(values, read_yaml(file))
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


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a file. Raises UserError."""
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
    return values


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


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

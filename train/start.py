"""What a run needs before its first step: processes, precision, output folder, model, DeepSpeed's settings."""

import json
import os
import socket
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import yaml

from pixart_fast import DiT, Transformer, ops
from pixart_fast.checkpoint import load_transformer, reparameterize
from pixart_fast.config import transformer_config
from pixart_fast.engine import compile_blocks, recompute_pointwise
from pixart_fast.weights import AVERAGED, TRAINED, read_weights
from train.data.encode import Encoders, OnlineStore
from train.data.features import FeaturesSource
from train.data.raw import open_raw
from train.data.source import ScenesSource, Source
from train.data.store import FeatureStore
from train.settings import Data, Settings, UserError, changed_keys, flatten, load_settings

DIT = "dit.pt"  # in the final/ of a run that trained one


def connect() -> tuple[torch.device, int, int]:
    """Join the process group, alone when no launcher started us; returns device, rank and number of processes."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed would compile a shared-memory all-reduce with the system's compiler at the first start on a CPU: a
    # minute, or an error without ninja. gloo does the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return device, dist.get_rank(), dist.get_world_size()


def choose_precision(asked: str, capability: ops.Capability) -> str:
    """The precision of a run: what was asked for if the device can, with "auto" what its capability suggests."""
    accelerator = deepspeed.accelerator.get_accelerator()
    if asked == "fp16" and not accelerator.is_fp16_supported():
        raise UserError(
            f"precision=fp16 does not run on this device ({capability.device}): choose precision=bf16 or fp32."
        )
    if asked == "bf16" and not (capability.has_bf16 and accelerator.is_bf16_supported()):
        raise UserError(
            f"precision=bf16 does not run on this device ({capability.device}): choose precision=fp16 or fp32."
        )
    return ops.precision_for(capability) if asked == "auto" else asked


def claim(settings: Settings, rank: int) -> None:
    """Take the output folder, or refuse one that holds a different run; every process hears the verdict."""
    verdict: list[str | None] = [None]
    if rank == 0:
        output = settings.output
        record = output / "config.yaml"  # --config reads it back: the run, to be repeated
        if not record.exists() and output.is_dir() and any(output.iterdir()):
            verdict = [f"{output} is not empty and holds no run: choose another output=."]
        elif record.exists() and settings.resume == "never":
            verdict = [f"{output} holds a run already: choose another output=, or go on with it by resume=auto."]
        elif record.exists():
            try:
                changed = changed_keys(flatten(load_settings(record, [])), flatten(settings))
            except UserError as error:  # told to the other processes, which wait for the verdict
                changed, verdict = [], [f"{record} is not this version's ({error}): choose another output=."]
            if changed:
                verdict = [
                    f"{output} holds a run with other {', '.join(changed)}: choose another output= for this one."
                ]
        if verdict[0] is None:
            try:
                output.mkdir(parents=True, exist_ok=True)
                record.write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
            except OSError as error:
                verdict = [f"{output} cannot be written ({error.strerror}): choose another output=."]
    dist.broadcast_object_list(verdict)
    if verdict[0]:
        raise UserError(verdict[0])


def build_source(settings: Settings, processes: int) -> Source:
    """The data set that the settings name. Raises UserError."""
    data, classes = settings.data, settings.model.kind == "dit"
    if data.source == "scenes":
        for key, value in (("store", data.store), ("token_budget", data.token_budget)):
            if value is not None:
                raise UserError(f"data.{key} is for data.source=features: scenes are drawn on the fly.")
        if settings.model.micro_conditions != "none":
            raise UserError("scenes have one size: leave model.micro_conditions at none.")
        return ScenesSource(data, settings.seed, settings.batch_size, classes=classes)
    store = open_store(data)
    if classes != (store.manifest.classes is not None):
        raise UserError(
            f"{data.store or data.images} holds {'classes' if store.manifest.classes else 'captions'}: choose "
            f"model.kind={'dit' if store.manifest.classes else 'pixart'} for it."
        )
    return FeaturesSource(
        store,
        batch_size=None if data.token_budget else settings.batch_size,
        token_budget=data.token_budget,
        multiple=processes * settings.accumulation,
        patch_size=settings.model.patch_size,
        seed=settings.seed,
        micro_conditions=settings.model.micro_conditions,
        null_mask=data.null_mask,
    )


def open_store(data: Data) -> FeatureStore | OnlineStore:
    """Features, or pictures that become them in the loader. Raises UserError."""
    if data.source == "features":
        if data.store is None:
            raise UserError("data.source=features needs data.store=FOLDER, which `python -m train.data.extract` makes.")
        return FeatureStore(data.store)
    missing = [key for key in ("images", "encoders", "resolution") if getattr(data, key) is None]
    if missing:
        raise UserError(f"data.source=images needs {', '.join(f'data.{key}=' for key in missing)} as well.")
    raw = open_raw(data.images)
    options = {"resolution": data.resolution, "multi_aspect": data.multi_aspect, "classes": raw.classes is not None}
    return OnlineStore(raw, Encoders(data.encoders, **options))


def new_model(settings: Settings, source: Source) -> Transformer | DiT:
    """The model that the settings describe, with the weights that training from scratch starts from.

    Raises ValueError.
    """
    size, chosen = settings.model.resolved_size(), settings.model
    if chosen.kind == "dit":
        if source.num_classes is None:
            raise ValueError("model.kind=dit learns classes, and this data has captions: choose model.kind=pixart.")
        return DiT(
            input_size=source.latent_size,
            patch_size=chosen.patch_size,
            in_channels=source.latent_channels,
            hidden_size=size.width,
            depth=size.layers,
            num_heads=size.heads,
            num_classes=source.num_classes,
        )
    if source.caption_channels is None:
        raise ValueError("model.kind=pixart learns captions, and this data has classes: choose model.kind=dit.")
    config = transformer_config(
        size,
        sample_size=source.latent_size,
        patch_size=chosen.patch_size,
        in_channels=source.latent_channels,
        caption_channels=source.caption_channels,
        modulation=chosen.modulation,
        dropout=chosen.dropout,
        interpolation_scale=chosen.interpolation_scale,
        use_additional_conditions=chosen.micro_conditions != "none",
    )
    model = Transformer(**config).initialize_weights(gate=chosen.gate)
    model.null_caption = source.null_caption
    return model


def build_model(settings: Settings, source: Source) -> Transformer | DiT:
    """The model of a run, the same on every process, fresh or from `init_from`, ready to train. Raises UserError."""
    torch.manual_seed(settings.seed)
    try:
        model = new_model(settings, source)
        if settings.init_from is not None:
            model.load_state_dict(_weights(settings, source))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if settings.activation_checkpointing == "pointwise" and settings.model.kind == "pixart":
        recompute_pointwise(model)
    elif settings.activation_checkpointing:
        model.enable_gradient_checkpointing()
    if not settings.compile:
        return model
    if settings.model.kind == "dit":
        for block in model.blocks:
            block.compile(dynamic=False)
        return model
    return compile_blocks(model)


def _weights(settings: Settings, source: Source) -> dict[str, torch.Tensor]:
    """Of `init_from`: as they are, or a DiT's re-parameterised."""
    folder = settings.init_from
    dit = folder / DIT if folder.is_dir() else folder
    is_dit = dit.is_file() and "y_embedder.embedding_table.weight" in (weights := read_weights(dit, AVERAGED + TRAINED))
    if is_dit and settings.model.kind == "dit":
        return weights
    if is_dit:
        if settings.model.modulation != "adaln_single":
            raise ValueError("a DiT is re-parameterised into adaLN-single: choose model.modulation=adaln_single.")
        return reparameterize(
            weights,
            caption_channels=source.caption_channels,
            num_attention_heads=settings.model.resolved_size().heads,
            timestep=settings.init_timestep,
            null="class",
            use_additional_conditions=settings.model.micro_conditions != "none",
        ).state_dict()
    if folder.is_dir() and not any((folder / name / "config.json").is_file() for name in (".", "transformer")):
        raise ValueError(
            f"init_from={folder} is not a model folder: name one with a config.json, as a run's final/ is."
        )
    heads = {} if folder.is_dir() else {"num_attention_heads": settings.model.resolved_size().heads}
    loaded = load_transformer(folder, **heads).state_dict()
    if settings.model.micro_conditions != "none" and not any("resolution_embedder" in name for name in loaded):
        # Stages without micro-conditions come before those with them: the new embedders start at random.
        fresh = new_model(settings, source).state_dict()
        loaded |= {name: t for name, t in fresh.items() if "resolution_embedder" in name or "ratio_embedder" in name}
    return loaded


def deepspeed_config(settings: Settings, precision: str, processes: int) -> dict:
    """DeepSpeed's configuration: a ZeRO stage's file and what the settings say."""
    path = Path(__file__).parent / "configs" / "zero" / f"{settings.zero_stage}.json"
    config = json.loads(path.read_text())
    if settings.offload:
        if settings.zero_stage == 0:
            raise UserError(
                "offload=true moves ZeRO's optimizer shards to the CPU: choose zero_stage=1, 2 or 3 with it."
            )
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config | {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.rows_per_process(processes),
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.optimizer.clip,
        "zero_allow_untested_optimizer": True,  # AdamW with an average beside its moments
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": None,
    }

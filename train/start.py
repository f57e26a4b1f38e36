"""What a run needs before its first step: processes, precision, output folder, model, DeepSpeed's settings."""

import json
import os
import socket
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import yaml

from pixart_fast import Transformer, ops
from pixart_fast.config import transformer_config
from pixart_fast.engine import compile_blocks, recompute_pointwise
from train.data.source import ScenesSource
from train.settings import Settings, UserError, changed_keys, flatten, load_settings


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


def build_model(settings: Settings, source: ScenesSource) -> Transformer:
    """The transformer that the settings describe, the same on every process, fresh or from `init_from`."""
    torch.manual_seed(settings.seed)
    try:
        config = transformer_config(
            settings.model.resolved_size(),
            sample_size=source.latent_size,
            patch_size=settings.model.patch_size,
            in_channels=source.latent_channels,
            caption_channels=source.caption_channels,
            modulation=settings.model.modulation,
            dropout=settings.model.dropout,
        )
        model = Transformer(**config).initialize_weights(gate=settings.model.gate)
        if settings.init_from is not None:
            model.load_state_dict(_weights(settings.init_from))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    model.null_caption = source.null_caption
    if settings.activation_checkpointing == "pointwise":
        recompute_pointwise(model)
    elif settings.activation_checkpointing:
        model.enable_gradient_checkpointing()
    return compile_blocks(model) if settings.compile else model


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"init_from={folder} is not a model folder: name one with a config.json, as a run's final/ is."
        )
    return Transformer.from_pretrained(folder).state_dict()


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

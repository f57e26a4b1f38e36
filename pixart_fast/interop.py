"""What diffusers asks of a model besides computing: files, attention processors, fused projections, LoRA.

`DiffusersModel` is a `diffusers.PixArtTransformer2DModel`, so that type checks in pipelines hold, of which nothing that
computes is left: `transformer.py` has that.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    XFormersAttnProcessor,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from pixart_fast.layers import Attention

NULL_CAPTION_FILE = "null_caption.safetensors"
PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, XFormersAttnProcessor)


class DiffusersModel(PixArtTransformer2DModel, PeftAdapterMixin):
    """The interface of diffusers' models around a transformer that has `Attention` layers and a `null_caption`.

    `from_pipe` of diffusers' pipelines wants their own class to the letter: give it `transformer=pipe.transformer`.
    """

    original_attn_processors: Mapping[str, Any] | None = None
    _processors: Mapping[str, Any] = MappingProxyType({})

    def _attention_layers(self) -> Iterator[tuple[str, Attention]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Attention))

    @property
    def attn_processors(self) -> dict[str, Any]:
        """diffusers' word for the attention in every layer; what computes it is chosen with `set_backend`."""
        names = [f"{name}.processor" for name, _ in self._attention_layers()]
        return {**dict.fromkeys(names, AttnProcessor2_0()), **self._processors}

    def set_attn_processor(self, processor: Any) -> None:
        """Take diffusers' processors of plain attention, one for all layers or `{name: processor}`, and change nothing.

        Their result is what our operators give; `set_backend` chooses how. Raises ValueError for any other processor.
        """
        names = self.attn_processors.keys()
        given = dict(processor) if isinstance(processor, Mapping) else dict.fromkeys(names, processor)
        if given.keys() != names:
            raise ValueError(
                f"the number of processors, {len(given)}, or their names are not those of the {len(names)} attention "
                "layers: take the keys of attn_processors."
            )
        for other in given.values():
            if type(other) not in PLAIN_PROCESSORS:
                raise ValueError(
                    f"{type(other).__name__} computes another attention than this model's operators: "
                    "use diffusers.PixArtTransformer2DModel for it, which loads the same files."
                )
        self._processors = given

    def set_default_attn_processor(self) -> None:
        """As `set_attn_processor(AttnProcessor())`."""
        self.set_attn_processor(AttnProcessor())

    def fuse_qkv_projections(self) -> None:
        """One matrix product for q, k, v (k, v in cross-attention) from copies of the weights, without gradients.

        Call it last: `unfuse_qkv_projections` before loading or training weights or adding an adapter.
        """
        for _, layer in self._attention_layers():
            layer.fuse_projections()
        self.original_attn_processors = self.attn_processors
        self.set_attn_processor(FusedAttnProcessor2_0())

    def unfuse_qkv_projections(self) -> None:
        """Back to the separate projections."""
        for _, layer in self._attention_layers():
            layer.unfuse_projections()
        if self.original_attn_processors is not None:
            self.set_attn_processor(self.original_attn_processors)

    def to_json_string(self) -> str:
        """The config as diffusers writes it; adaLN-single names diffusers' class, which loads it without a warning."""
        config = json.loads(super().to_json_string())
        if config.get("modulation", "adaln_single") == "adaln_single":
            config.pop("modulation", None)
            config["_class_name"] = PixArtTransformer2DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As diffusers' (safetensors, sharded by `max_shard_size`), with a `null_caption` beside the weights."""
        folder = Path(save_directory)
        if is_main_process and not folder.is_file():
            # Before the weights, which `push_to_hub=True` uploads with everything in the folder.
            folder.mkdir(parents=True, exist_ok=True)
            if self.null_caption is None:
                (folder / NULL_CAPTION_FILE).unlink(missing_ok=True)
            else:
                save_file({"null_caption": self.null_caption.contiguous()}, folder / NULL_CAPTION_FILE)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As diffusers': a folder or a hub name, `subfolder=`, `torch_dtype=`, `variant=` and the rest."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        null_caption = _null_caption_path(pretrained_model_name_or_path, kwargs)
        if null_caption is not None:
            tensor = load_file(null_caption)["null_caption"]
            model.null_caption = tensor.to(device=model.device, dtype=model.dtype)
        return loaded


def _null_caption_path(source: str | Path, options: Mapping[str, Any]) -> Path | None:
    """Where `from_pretrained` finds the null caption of a folder, or of a repository on the hub, or None."""
    if Path(source).is_dir():
        path = Path(source, options.get("subfolder") or "", NULL_CAPTION_FILE)
        return path if path.is_file() else None
    names = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
    try:
        return Path(hf_hub_download(str(source), NULL_CAPTION_FILE, **{n: options[n] for n in names if n in options}))
    except EntryNotFoundError:
        return None

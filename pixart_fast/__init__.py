"""pixart_fast: a fast, tested engine for PixArt diffusion transformers."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Transformer": "pixart_fast.transformer",
    "PixArtPipeline": "pixart_fast.pipeline",
    "DiT": "pixart_fast.dit",
    "GaussianDiffusion": "pixart_fast.diffusion",
    "load_transformer": "pixart_fast.checkpoint",
    "save_official": "pixart_fast.checkpoint",
    "reparameterize": "pixart_fast.checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    # Lazy: diffusers takes seconds to import, and `pixart_fast.env` must work where it is broken.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pixart_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

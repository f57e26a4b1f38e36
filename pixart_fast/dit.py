"""DiT, the class-conditional transformer with adaLN-Zero that PixArt-α's first training stage starts from.

Peebles & Xie 2022 (arXiv 2212.09748), figure 3. Parameter names are those of the published checkpoints, so reading and
writing them is `load_state_dict` and `state_dict`. Shapes: B samples, N image tokens, D width, H heads, d = D / H.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pixart_fast import ops
from pixart_fast.layers import sincos_2d, sinusoid, unpatchify
from pixart_fast.weights import AVERAGED, TRAINED, check_fit, count_blocks, read_weights, shape_of, write_file


class PatchEmbedder(nn.Module):
    """Latents `[B, C, h, w]` to tokens `[B, N, D]`."""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, as in layers.PatchEmbed: a token's values lie next to each other.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Timesteps `[B]` to `[B, D]`; they enter the sinusoid in fp32."""

    def __init__(self, dim: int, channels: int = 256):
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(t, self.channels).to(dtype))


class LabelEmbedder(nn.Module):
    """Class labels `[B]` to `[B, D]`; in training a label becomes the null class, the last row, with `dropout_prob`."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)

    def forward(self, y: Tensor, drop_mask: Tensor | None = None) -> Tensor:
        if drop_mask is None and self.training and self.dropout_prob > 0:
            drop_mask = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop_mask is not None:
            if self.dropout_prob == 0:
                raise ValueError("this DiT has no null class to drop labels to: build it with class_dropout_prob > 0.")
            y = torch.where(drop_mask, self.num_classes, y)
        return self.embedding_table(y)


class Attention(nn.Module):
    """Self-attention `[B, N, D]` to `[B, N, D]`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, H, d]
        return self.proj(ops.self_attention(q, k, v).flatten(2))


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Self-attention and MLP, each behind a modulated LayerNorm and a gate that starts at zero (adaLN-Zero).

    `x [B, N, D]`, condition `c [B, D]` to `[B, N, D]`.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        rows = self.adaLN_modulation(c).chunk(6, dim=-1)  # six of [B, D]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows
        _, y = ops.modulated_layernorm(x, shift_msa, scale_msa, eps=1e-6)  # [B, N, D]
        x, y = ops.modulated_layernorm(x, shift_mlp, scale_mlp, residual=self.attn(y), gate=gate_msa, eps=1e-6)
        return x + gate_mlp[:, None] * self.mlp(y)  # [B, N, D]


class FinalLayer(nn.Module):
    """Tokens `[B, N, D]` to patches `[B, N, p * p * C]`, behind a last modulated LayerNorm."""

    def __init__(self, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(ops.modulated_layernorm(x, shift, scale, eps=1e-6)[1])


class DiT(nn.Module):
    """The class-conditional diffusion transformer; it starts as published, with every block the identity (adaLN-Zero).

    DiT-XL/2 has 674,834,720 parameters; the position table, stored but not trained, makes them 675,129,632.

    Args:
        input_size: height and width of the latents; the position embedding is made for them.
        mlp_ratio: width of the MLP in units of `hidden_size`.
        class_dropout_prob: how often training drops the label. Above 0 there is a null class, index `num_classes`.
        learn_sigma: predict the variance beside the noise, which doubles the output channels.

    Raises ValueError where heads or patches do not divide.
    """

    presets: ClassVar[dict[str, dict[str, int]]] = {
        "XL/2": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2},
        "L/2": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "patch_size": 2},
        "B/2": {"hidden_size": 768, "depth": 12, "num_heads": 12, "patch_size": 2},
        "S/2": {"hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2},
    }

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must divide by num_heads {num_heads} and by 4.")
        if input_size % patch_size:
            raise ValueError(
                f"input_size {input_size} does not divide by patch_size {patch_size}: choose a multiple of it."
            )
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_heads = num_heads
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        grid = input_size // patch_size
        position = sincos_2d(
            grid, grid, hidden_size, base_size=grid, scale=1.0, device=self.x_embedder.proj.weight.device
        )
        self.register_buffer("pos_embed", position[None])  # [1, N, D]
        self.initialize_weights()

    @classmethod
    def preset(cls, name: str, **config: Any) -> "DiT":
        """A size of the paper's table 1 by name, "XL/2" to "S/2"; `config` goes to the constructor."""
        if name not in cls.presets:
            raise ValueError(f"there is no DiT-{name}: choose one of {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **config})

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier-uniform layers with zero biases, N(0, 0.02) embeddings, zero modulations and final layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(module.weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for module in [*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.gradient_checkpointing = True

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, drop_mask: Tensor | None = None) -> Tensor:
        """Predict noise (and variance) of noisy latents.

        Args:
            x: `[B, C, input_size, input_size]` in the model's dtype.
            t: timesteps `[B]`, integer or fp32.
            y: class labels, int64 `[B]`; `num_classes` is the null class.
            drop_mask: bool `[B]`, True where the label becomes the null class. None: random in training, none in eval.

        Returns:
            `[B, 2C, input_size, input_size]`, or C channels without `learn_sigma`.

        Raises ValueError for latents of another shape.
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise ValueError(
                f"this DiT takes latents [B, {self.in_channels}, {self.input_size}, {self.input_size}], "
                f"got {list(x.shape)}: build it with their input_size and in_channels."
            )
        tokens = self.x_embedder(x)
        tokens = (tokens + self.pos_embed).to(tokens.dtype)  # [B, N, D]
        c = self.t_embedder(t, x.dtype) + self.y_embedder(y, drop_mask)  # [B, D]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, use_reentrant=False)
            else:
                tokens = block(tokens, c)  # [B, N, D]
        grid = self.input_size // self.patch_size
        return unpatchify(self.final_layer(tokens, c), grid, grid, self.patch_size)

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor], **config: Any) -> "DiT":
        """A DiT of the size that the tensors tell, with copies of them in their dtypes, in eval mode.

        `config` overrides what was read. The number of heads is not in the tensors: it is the presets' for their
        widths, else `num_heads=` must be given. The last class is taken for the null class.
        Raises ValueError naming keys that are missing, left over or of another shape.
        """
        config = infer_config(weights, **config)
        with torch.device("meta"):
            model = cls(**config)
        check_fit(model.state_dict(), weights)
        model.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
        return model.eval()

    @classmethod
    def from_file(cls, path: str | Path, *, ema: bool | None = None, **config: Any) -> "DiT":
        """A DiT from a checkpoint file with the original names.

        Args:
            path: a published file (bare) or one of DiT's training script (`{"model", "ema", …}`).
            ema: take the averaged weights (True) or the trained ones (False); None: averaged where the file has them.
            config: as in `from_state_dict`.

        Raises as `weights.read_weights` and `from_state_dict` do.
        """
        wrappers = {None: AVERAGED + TRAINED, True: AVERAGED, False: TRAINED}[ema]
        return cls.from_state_dict(read_weights(path, wrappers), **config)

    def save(self, path: str | Path) -> None:
        """Write the bare state dict under the original names, aside and renamed."""
        write_file({name: tensor.cpu() for name, tensor in self.state_dict().items()}, path)


def infer_config(weights: Mapping[str, Tensor], **config: Any) -> dict[str, Any]:
    """The constructor's arguments that DiT's tensors tell; `config` wins. ValueError where they do not tell enough."""
    if "blocks.0.adaLN_modulation.1.weight" not in weights:
        raise ValueError("this is not a DiT checkpoint: it has no blocks.0.adaLN_modulation.1.weight.")
    width, channels, patch, _ = shape_of(weights, "x_embedder.proj.weight", 4)
    rows, _ = shape_of(weights, "y_embedder.embedding_table.weight", 2)
    _, tokens, _ = shape_of(weights, "pos_embed", 3)
    if "num_heads" not in config:
        heads = {preset["hidden_size"]: preset["num_heads"] for preset in DiT.presets.values()}
        if width not in heads:
            raise ValueError(f"the tensors do not tell the number of heads of a DiT of width {width}: pass num_heads=.")
        config["num_heads"] = heads[width]
    dropout = config.get("class_dropout_prob", 0.1)
    read = {
        "input_size": round(tokens**0.5) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": count_blocks(weights, "blocks"),
        "mlp_ratio": shape_of(weights, "blocks.0.mlp.fc1.weight", 2)[0] / width,
        "num_classes": rows - (dropout > 0),
        "learn_sigma": shape_of(weights, "final_layer.linear.weight", 2)[0] == 2 * patch * patch * channels,
    }
    return read | config

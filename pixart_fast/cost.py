"""What a forward pass costs, counted from the configuration: one place for logging, benchmarks and documentation."""

# Dense tensor-core peak of published data sheets in FLOP/s: bf16, and fp16 on V100, which has no bf16.
PEAK_FLOPS = {"V100": 125e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}


def forward_flops(
    *,
    layers: int,
    width: int,
    tokens: int,
    text_tokens: int,
    caption_channels: int,
    patch_features: int,
    out_features: int,
) -> float:
    """Multiply-adds count two. One sample through `Transformer`: linear layers, both attentions, embeddings of text and
    patches.

    Args:
        tokens, text_tokens: image tokens N and caption tokens L of the sample.
        patch_features, out_features: values that a token reads from the latents, and writes (patch² · channels).
    """
    self_attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    cross_attention = 2 * tokens * width * width + 2 * text_tokens * width * width + 2 * tokens * text_tokens * width
    feed_forward = 8 * tokens * width * width
    text = text_tokens * (caption_channels * width + width * width)
    patches = tokens * width * (patch_features + out_features)
    time = 256 * width + width * width + 6 * width * width
    return 2.0 * (layers * (self_attention + cross_attention + feed_forward) + text + patches + time)


def peak_flops(device_name: str) -> float | None:
    """The data-sheet peak of a device whose name contains a known model, else None."""
    return next((peak for model, peak in PEAK_FLOPS.items() if model in device_name), None)

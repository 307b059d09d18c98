"""Which shapes the CPU kernels support. A separate file, so that this check does not import a compiler."""

from __future__ import annotations

from chatwright.model.config import GPTConfig


def unsupported(config: GPTConfig) -> str | None:
    """Why the kernels cannot run this shape, or None when they can."""
    for wrong, reason in (
        (not config.pre_norm, "post-norm blocks"),
        (config.position == "sinusoidal", "sinusoidal positions"),
        (config.head_dim % 2 == 1, "an odd head size"),
    ):
        if wrong:
            return reason
    return None

"""Positions as angles: sinusoids that are added to embeddings, rotary positions that turn queries and keys.

Rotary rates may be stretched so that a model trained on short texts reads longer ones (`RotaryScaling`). The
result is always one rate per pair of features and one factor on cosine and sine (`rotary_rates`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chatwright.model.config import GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, T, width): first sines, then cosines (Vaswani et al. 2017, section 3.5).

    The paper interleaves the two; the order of features is a permutation that the first layer absorbs.
    """
    rates = torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(10_000.0) / width))
    angles = positions[..., None].float() * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def rotary_rates(
    config: GPTConfig, device: torch.device | None = None, *, windowed: bool = False
) -> tuple[Tensor, float]:
    """Angle per position of each pair, (R / 2,) in float32, and the factor on cosine and sine.

    base ** (-2 i / R) (Su et al. 2021, arXiv:2104.09864, eq. 15), then as `config.rope_scaling` says. R
    features of a head are rotated. With `windowed` those of the layers with a window, to which
    `config.window_rope_base` may give a base of their own.
    """
    own = windowed and config.window_rope_base
    base, size = own or config.rope_base, config.rotated
    rates = base ** -(torch.arange(0, size, 2, device=device).float() / size)
    scaling = None if own else config.rope_scaling
    if scaling is None:
        return rates, 1.0
    if scaling.divisors:
        rates = rates / torch.tensor(scaling.divisors, device=device)
    if scaling.kind == "llama3":
        rates = _by_wavelength(rates, scaling)
    elif scaling.kind == "yarn":
        stretched = _stretched(config.rope_base, size, scaling, device)
        rates = rates * (1 - stretched) + rates / scaling.factor * stretched
    else:
        rates = rates / scaling.factor  # Chen et al. 2023, arXiv:2306.15595, eq. 4
    return rates, scaling.attention_factor


def _by_wavelength(rates: Tensor, scaling: RotaryScaling) -> Tensor:
    """Llama 3.1: slow pairs are slowed by the factor, fast ones stay, those between are blended."""
    turns = scaling.original_context * rates / (2 * math.pi)  # of each pair within the original context
    kept = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
    return rates * kept + rates / scaling.factor * (1 - kept)


def _stretched(base: float, size: int, scaling: RotaryScaling, device: torch.device | None) -> Tensor:
    """YaRN's ramp, 0 to 1: how far each pair is interpolated (Peng et al. 2023, arXiv:2309.00071, sec. 3.2).

    It runs over the number of the pair, as in the authors' program; in the paper it runs over its turns.
    """

    def pair(turns: float) -> float:  # the pair that turns this often within the original context
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.high_turns), pair(scaling.low_turns)
    if scaling.whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(size // 2, device=device).float() - low) / (high - low)).clamp(0, 1)


def rotary_angles(positions: Tensor, rates: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(B, T) and (R / 2,) -> cos and sin, each (B, 1, T, R / 2), in float32, times `factor`."""
    angles = (positions[..., None].float() * rates)[:, None]
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + R/2}) of the first R features of (B, H, T, K) by its angle: the order of
    Llama, Qwen and GPT-NeoX. The other features stay."""
    size = 2 * cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

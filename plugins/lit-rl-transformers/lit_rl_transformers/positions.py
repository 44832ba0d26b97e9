"""Positions for attention: sinusoids of a distance, and rotations by a position.

Shapes: B rows, T steps, D features, H heads of width C, ``...`` any dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0  # of the geometric series of wavelengths, as in both papers


def frequencies(pairs: int, device: torch.device | None = None) -> Tensor:
    """Angles a step turns by, ``BASE ** (-i / pairs)``, in float64."""
    return BASE ** (-torch.arange(pairs, device=device, dtype=torch.float64) / pairs)


def sinusoids(distances: Tensor, width: int) -> Tensor:
    """R of Transformer-XL, ``[..., width]`` in float64: sines, then cosines."""
    angles = distances[..., None].double() * frequencies((width + 1) // 2, distances.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


def rotation(position_BT: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine by which `rotate` turns heads of even `width` at each position, ``[B, T, 1, C]``.

    The angles are float64: an episode may be of any length, and a position times a frequency in float32 would
    be wrong by 1e-3 after ten thousand steps.
    """
    angles = position_BT[:, :, None, None] * frequencies(width // 2, position_BT.device)
    sine = angles.sin()
    return torch.cat([angles, angles], -1).cos().to(dtype), torch.cat([-sine, sine], -1).to(dtype)


def rotate(x_BTHC: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (c, c + C/2) of a head in its plane (Su et al. 2021, arXiv:2104.09864, section 3.2.2).

    The product of a query and a key so turned depends on the difference of their positions alone.
    """
    cosine, sine = by
    return x_BTHC * cosine + x_BTHC.roll(x_BTHC.shape[-1] // 2, dims=-1) * sine

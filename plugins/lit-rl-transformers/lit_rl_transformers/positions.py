"""Positions for attention: sinusoids of a distance, and rotations by a position.

Shapes: B rows, T steps, D features, H heads of width C, ``...`` any dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0  # of the geometric series of wavelengths, as in both papers


def frequencies(pairs: int) -> Tensor:
    """Angles a step turns by, ``BASE ** (-i / pairs)``, in float64."""
    return BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def sinusoids(distances: Tensor, width: int) -> Tensor:
    """R of Transformer-XL, ``[..., width]`` in float64: sines, then cosines."""
    angles = distances[..., None] * frequencies((width + 1) // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


def signed_frequencies(width: int) -> list[float]:
    """What `rotation` needs of a head of even `width`: minus the frequencies, then the frequencies."""
    positive = frequencies(width // 2).tolist()
    return [-f for f in positive] + positive


def rotation(position_BT: Tensor, signed: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine by which `rotate` turns heads at each position, ``[B, T, 1, C]``.

    The angles are float64: an episode may be of any length, and a position times a frequency in float32 would
    be wrong by 1e-3 after ten thousand steps.
    """
    turns = torch.tensor(signed, dtype=torch.float64, device=position_BT.device)
    angles = position_BT[:, :, None, None] * turns
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHC: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (c, c + C/2) of a head in its plane (Su et al. 2021, arXiv:2104.09864).

    The product of a query and a key so turned depends on the difference of their positions alone.
    """
    cosine, signed_sine = by
    return torch.addcmul(x_BTHC * cosine, x_BTHC.roll(x_BTHC.shape[-1] // 2, dims=-1), signed_sine)

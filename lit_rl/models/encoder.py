"""Encoders: an observation of any supported space -> features, one step at a time.

Shapes: N sequences, T steps, F features; an observation is a tensor ``[N, T, *space.shape]`` or, for a
Dict space, a mapping of such tensors.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any, TypeVar

import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.errors import UserError
from lit_rl.trunks import Linear

Observation = Any  # a tensor, or a mapping of tensors for a Dict space
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def orthogonal(layer: Layer, gain: float = sqrt(2)) -> Layer:
    """Orthogonal weight and zero bias, the usual start of PPO networks."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == "uint8"


def is_continuous(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and not is_image(space)


def one_line(space: spaces.Space) -> str:
    """The space as text for a message: arrays of bounds are printed over several lines."""
    return " ".join(str(space).split())


def parts_of(space: spaces.Space) -> dict[str, spaces.Space]:
    """The entries of a Dict space in its order; a plain space is one entry, `observation`."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}


class Flat(nn.Module):
    """A Box of numbers as it is, flattened."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.event_dims = len(space.shape)
        self.out_features = prod(space.shape)

    def forward(self, x_NT: Tensor) -> Tensor:
        x_NT = x_NT.float()
        return x_NT if self.event_dims == 1 else x_NT.reshape(*x_NT.shape[:2], self.out_features)


class OneHot(nn.Module):
    """Discrete, MultiDiscrete and MultiBinary: one group of zeros and a one for each variable."""

    offsets: Tensor

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary) -> None:
        super().__init__()
        if isinstance(space, spaces.Discrete):
            sizes, start = torch.tensor([int(space.n)]), torch.tensor([int(space.start)])
        elif isinstance(space, spaces.MultiDiscrete):
            sizes, start = torch.as_tensor(space.nvec).flatten(), torch.as_tensor(space.start).flatten()
        else:
            sizes = torch.full((prod(space.shape),), 2)
            start = torch.zeros_like(sizes)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes - start, persistent=False)
        self.out_features = int(sizes.sum())

    def forward(self, x_NT: Tensor) -> Tensor:
        N, T = x_NT.shape[:2]
        index = x_NT.reshape(N, T, -1).long() + self.offsets
        return torch.zeros(N, T, self.out_features, device=x_NT.device).scatter_(-1, index, 1.0)


class NatureCNN(nn.Module):
    """Channel-first uint8 images through the network of Mnih et al. 2015 (Nature 518, methods)."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        channels, height, width = space.shape
        if min(height, width) < 36 or channels > min(height, width):
            raise UserError(
                f"image observations of shape {space.shape} do not fit the convolutional encoder: it needs "
                "[channels, height, width] with height and width >= 36; resize or transpose with a wrapper"
            )
        self.conv = nn.Sequential(
            orthogonal(nn.Conv2d(channels, 32, 8, 4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, 2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, 1)),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.conv(torch.zeros(1, channels, height, width)).shape[1]
        self.project = nn.Sequential(orthogonal(Linear(flat, 512)), nn.ReLU())
        self.out_features = 512

    def forward(self, x_NT: Tensor) -> Tensor:
        images = x_NT.flatten(0, 1).float() / 255
        return self.project(self.conv(images)).unflatten(0, x_NT.shape[:2])


def _leaf(space: spaces.Space) -> nn.Module:
    if is_image(space):
        return NatureCNN(space)  # type: ignore[arg-type]
    if isinstance(space, spaces.Box):
        return Flat(space)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return OneHot(space)
    raise UserError(
        f"observation space {one_line(space)} is not supported: use Box, Discrete, MultiDiscrete, "
        "MultiBinary or a Dict of these"
    )


class Encoder(nn.Module):
    """Features of an observation: each part by its space, concatenated, then optionally a linear + ReLU.

    Args:
        space: of a single environment's observation; the entries of a Dict are read in its order.
        width: output features of the linear layer; none if absent.
    """

    def __init__(self, space: spaces.Space, width: int | None = None) -> None:
        super().__init__()
        self.is_dict = isinstance(space, spaces.Dict)
        parts = parts_of(space)
        self.keys = tuple(parts)
        # A list, because a module cannot be called all that a Dict's entry may be, such as `type` or `a.b`.
        self.parts = nn.ModuleList(_leaf(part) for part in parts.values())
        features = sum(part.out_features for part in self.parts)  # type: ignore[misc]
        self.project = nn.Sequential(orthogonal(Linear(features, width)), nn.ReLU()) if width else None
        self.out_features: int = width or features

    def forward(self, observation: Observation) -> Tensor:
        """Features ``[N, T, F]`` of an observation ``[N, T, ...]``."""
        if self.is_dict:
            keyed = zip(self.keys, self.parts, strict=True)
            features = torch.cat([part(observation[key]) for key, part in keyed], dim=-1)
        else:
            features = self.parts[0](observation)
        return features if self.project is None else self.project(features)

"""Agents: encoder -> trunk -> heads, and what acting gives. Here is what all of them share.

Shapes: N sequences (environments or windows), T steps, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Generator, Tensor, nn

from lit_rl.errors import UserError
from lit_rl.models.encoder import Encoder, Observation, is_continuous, parts_of
from lit_rl.models.normalization import ObservationNorm
from lit_rl.trunks import Trunk

TrunkFactory = Callable[[int], Trunk]
P = ParamSpec("P")
R = TypeVar("R")


class Acted(Protocol):
    """What every agent's acting step of N environments gives, whatever else it gives."""

    @property
    def action(self) -> Tensor:
        """``[N, *action_shape]``; `Agent.to_env` gives the environment's form."""

    @property
    def state(self) -> TensorDict:
        """Memory after this step, ``[N]``."""


def leaves_no_graph(method: Callable[P, R]) -> Callable[P, R]:
    """As `torch.no_grad`, but for its cost where gradients are off already."""

    @wraps(method)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return without_gradients


class Agent(nn.Module, ABC):
    """An encoder, a trunk and whatever heads a subclass puts on it.

    `is_memoryless` tells whether every step stands alone, so that minibatches may split sequences.

    Args:
        observation_space: of a single environment.
        trunk: makes a trunk for a number of input features.
        encoder_width: features of a linear + ReLU layer before the trunk; none if absent.
        normalize_observation: running mean and variance of every continuous part of the observation.
    """

    is_memoryless: bool

    def __init__(
        self,
        observation_space: spaces.Space,
        trunk: TrunkFactory,
        *,
        encoder_width: int | None = None,
        normalize_observation: bool = False,
    ) -> None:
        super().__init__()
        self.is_dict = isinstance(observation_space, spaces.Dict)
        continuous = {k: part for k, part in parts_of(observation_space).items() if is_continuous(part)}
        self.normalized = tuple(continuous) if normalize_observation else ()
        self.norms = nn.ModuleList(ObservationNorm(continuous[key].shape) for key in self.normalized)  # type: ignore[arg-type]
        self.encoder = Encoder(observation_space, encoder_width)
        self.trunk = build_trunk(trunk, self.encoder)
        self.is_memoryless = self.trunk.initial_state(1).is_empty()

    @abstractmethod
    def act(
        self,
        observation: Observation,
        state: TensorDict,
        is_init: Tensor,
        *,
        greedy: bool = False,
        generator: Generator | None = None,
    ) -> Acted:
        """Acts once in each of N environments: observation ``[N, ...]``, state ``[N]``, is_init ``[N]``.

        Actions are drawn from `generator`, unless `greedy`.
        """

    def to_env(self, action: Tensor) -> Tensor:
        """The action in the environment's own units."""
        return action

    def trunks(self) -> Iterator[Trunk]:
        yield self.trunk

    @property
    def acting_trunk(self) -> Trunk:
        """What is called at every step while acting."""
        return self.trunk

    def initial_state(self, batch_size: int) -> TensorDict:
        """Memory ``[N]`` of an agent that acts, at the start of an episode."""
        return self.acting_trunk.initial_state(batch_size)

    def auxiliary_loss(self) -> Tensor | None:
        """The sum of what the trunks ask for beside the algorithm's loss; None if nothing."""
        losses = [trunk.auxiliary_loss for trunk in self.trunks() if trunk.auxiliary_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def trunk_metrics(self) -> dict[str, Tensor]:
        """What the trunks measured in their last pass."""
        return dict(self.trunk.metrics)

    def update_normalization(self, observation: Observation) -> None:
        """Merges observations ``[N, T, ...]`` into the running statistics."""
        for key, norm in zip(self.normalized, self.norms, strict=True):
            cast(ObservationNorm, norm).update(observation[key] if self.is_dict else observation)

    def _normalize(self, observation: Observation) -> Observation:
        if not self.normalized:
            return observation
        if not self.is_dict:
            return self.norms[0](observation)
        norms = zip(self.normalized, self.norms, strict=True)
        return dict(observation.items()) | {key: norm(observation[key]) for key, norm in norms}

    def _add_time(self, observation: Observation) -> Observation:
        if self.is_dict:
            return {key: observation[key].unsqueeze(1) for key in self.encoder.keys}
        return observation.unsqueeze(1)

    def _in_float32(self, head: nn.Module, features: Tensor) -> Tensor:
        """Heads run in float32 whatever the precision of the trunk: ratios need every digit."""
        device = features.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return head(features.float())
        return head(features)


def build_trunk(trunk: TrunkFactory, encoder: Encoder) -> Trunk:
    try:
        return trunk(encoder.out_features)
    except Exception as error:  # somebody else's constructor, and options that no type tells to be wrong
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the trunk cannot be built ({cause}): check its options") from error

"""The Q-network: action values over any trunk, and how it explores.

Shapes: N sequences (environments or windows), T steps, A actions, Z numbers an action (`QHead`), D latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Generator, Tensor

from lit_rl.errors import UserError
from lit_rl.models.agent import Agent, TrunkFactory, leaves_no_graph
from lit_rl.models.encoder import Observation, one_line
from lit_rl.models.q_heads import QHead
from lit_rl.models.windowed import Windowed
from lit_rl.trunks import Trunk

HeadFactory = Callable[[int, int], QHead]
Exploration = Literal["epsilon_greedy", "softmax"]


class QAction(NamedTuple):
    """One acting step of N environments."""

    action: Tensor
    """int64 ``[N]``, counted from 0"""
    latent: Tensor
    """What the trunk made of the observation (and all before it), ``[N, D]``."""
    state: TensorDict
    """Memory after this step, ``[N]``."""


class QNetwork(Agent):
    """Action values of a discrete action space.

    `exploration_rate` is the share of random actions, or the temperature of the softmax over action
    values; the algorithm sets it.

    Args:
        observation_space, action_space: of a single environment.
        trunk: makes a trunk for a number of input features.
        head: makes a head for a number of features and of actions.
        encoder_width: features of a linear + ReLU layer before the trunk; none if absent.
        normalize_observation: running mean and variance of every continuous part of the observation.
        exploration: how actions are sampled.
        acting_window: act on the last so many observations alone, from an empty memory, instead of
            carrying memory along (Latent Mamba-DQN's way); carry it if absent.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        trunk: TrunkFactory,
        head: HeadFactory,
        *,
        encoder_width: int | None = None,
        normalize_observation: bool = False,
        exploration: Exploration = "epsilon_greedy",
        acting_window: int | None = None,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise UserError(
                f"LitDQN chooses among discrete actions, not in {one_line(action_space)}: use LitPPO"
            )
        super().__init__(
            observation_space,
            trunk,
            encoder_width=encoder_width,
            normalize_observation=normalize_observation,
        )
        self.num_actions = int(action_space.n)
        self.start = int(action_space.start)
        self.head = head(self.trunk.out_features, self.num_actions)
        self.exploration = exploration
        self.exploration_rate = 0.0
        self.windowed: Windowed | None = None
        if acting_window is not None and not self.is_memoryless:
            self.windowed = Windowed(self.trunk, self.encoder.out_features, acting_window)

    @property
    def acting_trunk(self) -> Trunk:
        return self.windowed or self.trunk

    def forward(
        self, observation: Observation, state: TensorDict, is_init: Tensor
    ) -> tuple[Tensor, Tensor, TensorDict]:
        """What the head gives ``[N, T, A, Z]``, latents ``[N, T, D]``, the trunk state after the last step.

        Args:
            observation: ``[N, T, ...]``, or a mapping of such for a Dict space.
            state: the trunk's state ``[N]`` before the first step.
            is_init: bool ``[N, T]``, first observation of an episode.
        """
        latent, state = self.trunk(self.encoder(self._normalize(observation)), state, is_init)
        return self.of_latent(latent), latent, state

    def last_steps(
        self, observation: Observation, state: TensorDict, is_init: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """What the head gives ``[N, steps, A, Z]`` and latents ``[N, steps, D]`` of the last `steps` of T."""
        features = self.encoder(self._normalize(observation))
        latent = self.trunk.last_steps(features, state, is_init, steps)
        return self.of_latent(latent), latent

    def of_latent(self, latent: Tensor) -> Tensor:
        """What the head gives ``[..., A, Z]`` for latents ``[..., D]``."""
        return self._in_float32(self.head, latent)

    @leaves_no_graph
    def act(
        self,
        observation: Observation,
        state: TensorDict,
        is_init: Tensor,
        *,
        greedy: bool = False,
        noise: Tensor | None = None,
        generator: Generator | None = None,
    ) -> QAction:
        """Acts once in each of N environments: observation ``[N, ...]``, state ``[N]``, is_init ``[N]``.

        Explores with `noise` ``[N, A]`` or else with random numbers from `generator`, unless `greedy`.
        """
        latent, state = self.latent(observation, state, is_init)
        values = self.head.values(self.of_latent(latent))
        if greedy:
            return QAction(values.argmax(-1), latent, state)
        noise = self.noise(len(values), generator=generator) if noise is None else noise
        return QAction((values + noise).argmax(-1), latent, state)

    @leaves_no_graph
    def latent(
        self, observation: Observation, state: TensorDict, is_init: Tensor
    ) -> tuple[Tensor, TensorDict]:
        """Latents ``[N, D]`` of observations ``[N, ...]`` while acting, and the memory after them."""
        features = self.encoder(self._normalize(self._add_time(observation)))
        latent, state = self.acting_trunk(features, state, is_init.unsqueeze(1))
        return latent.squeeze(1), state

    def noise(self, *shape: int, generator: Generator | None = None) -> Tensor:
        """What exploring adds to action values before the largest is taken, ``[*shape, A]``.

        `epsilon_greedy`: infinity to a random action with probability `exploration_rate`, else nothing.
        `softmax`: Gumbel noise times `exploration_rate`, so that action a is taken with probability
        proportional to ``exp(value_a / exploration_rate)`` (Maddison et al. 2014, arXiv 1411.0030).
        """
        device = next(self.parameters()).device
        uniform = torch.rand(*shape, 1 + self.num_actions, generator=generator, device=device)
        coin, race = uniform[..., :1], uniform[..., 1:]
        if self.exploration == "softmax":
            return self.exploration_rate * gumbel(race)
        winner = race == race.amax(-1, keepdim=True)
        return torch.zeros_like(race).masked_fill_(winner & (coin < self.exploration_rate), torch.inf)

    def to_env(self, action: Tensor) -> Tensor:
        return action + self.start if self.start else action


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers of uniform ones from 0 (which counts as the smallest above it) to below 1."""
    return -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()

"""The actor-critic: a policy and a value function over any trunk.

Shapes: N sequences (environments or windows), T steps, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from gymnasium import spaces
from tensordict import TensorDict
from torch import Generator, Tensor, nn

from lit_rl.errors import UserError
from lit_rl.models.agent import Agent, TrunkFactory, build_trunk, leaves_no_graph
from lit_rl.models.encoder import Encoder, Observation, orthogonal
from lit_rl.models.heads import policy_head
from lit_rl.trunks import Trunk


class Action(NamedTuple):
    """One acting step of N environments."""

    action: Tensor
    """As sampled, ``[N, *action_shape]``; `Agent.to_env` gives the environment's form."""
    params: Tensor
    """Of the distribution it was drawn from, ``[N, P]``: `PolicyHead.log_prob` tells its probability."""
    value: Tensor | None
    """``[N]``, unless left out"""
    state: TensorDict
    """Trunk state after this step, ``[N]``."""


class ActorCritic(Agent):
    """A policy and a value function over any trunk.

    `values_can_wait` tells whether values share nothing with acting, so that one pass over a whole rollout
    gives them for less than one pass a step.

    Args:
        observation_space, action_space: of a single environment.
        trunk: makes a trunk for a number of input features.
        value_trunk: `shared` reads the value off the policy's trunk; `separate` gives the value an
            encoder and a trunk of its own.
        encoder_width: features of a linear + ReLU layer before the trunk; none if absent.
        normalize_observation: running mean and variance of every continuous part of the observation.
        squash: tanh-squash continuous actions to their bounds.
        log_std: initial log standard deviation of continuous actions.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        trunk: TrunkFactory,
        *,
        value_trunk: Literal["shared", "separate"] = "shared",
        encoder_width: int | None = None,
        normalize_observation: bool = False,
        squash: bool = False,
        log_std: float = 0.0,
    ) -> None:
        super().__init__(
            observation_space,
            trunk,
            encoder_width=encoder_width,
            normalize_observation=normalize_observation,
        )
        if value_trunk not in ("shared", "separate"):
            raise UserError(f"value_trunk is {value_trunk!r}: choose shared or separate")
        self.value_encoder: Encoder | None = None
        self.value_trunk: Trunk | None = None
        if value_trunk == "separate":
            self.value_encoder = Encoder(observation_space, encoder_width)
            self.value_trunk = build_trunk(trunk, self.value_encoder)
        self.is_memoryless = all(t.initial_state(1).is_empty() for t in self.trunks())
        self.values_can_wait: bool = self.is_memoryless and self.value_trunk is not None
        self.policy = policy_head(self.trunk.out_features, action_space, squash=squash, log_std=log_std)
        self.value_head = orthogonal(nn.Linear((self.value_trunk or self.trunk).out_features, 1), gain=1.0)

    def trunks(self) -> Iterator[Trunk]:
        yield self.trunk
        if self.value_trunk is not None:
            yield self.value_trunk

    def initial_state(self, batch_size: int) -> TensorDict:
        """Trunk state ``[N]`` at the start of an episode."""
        state = self.trunk.initial_state(batch_size)
        if self.value_trunk is None or self.is_memoryless:
            return state
        value_state = self.value_trunk.initial_state(batch_size)
        return TensorDict({"policy": state, "value": value_state}, [batch_size])

    def forward(
        self, observation: Observation, state: TensorDict, is_init: Tensor
    ) -> tuple[Tensor, Tensor, TensorDict]:
        """Policy parameters ``[N, T, P]``, values ``[N, T]`` and the trunk state ``[N]`` after the last step.

        Args:
            observation: ``[N, T, ...]``, or a mapping of such for a Dict space.
            state: trunk state ``[N]`` before the first step.
            is_init: bool ``[N, T]``, first observation of an episode.
        """
        observation = self._normalize(observation)
        if self.value_trunk is None or self.value_encoder is None:
            policy_features, state = self.trunk(self.encoder(observation), state, is_init)
            value_features = policy_features
        else:
            memory = (state, state) if self.is_memoryless else (state["policy"], state["value"])
            policy_features, policy_state = self.trunk(self.encoder(observation), memory[0], is_init)
            value_features, value_state = self.value_trunk(
                self.value_encoder(observation), memory[1], is_init
            )
            if not self.is_memoryless:
                state = TensorDict({"policy": policy_state, "value": value_state}, state.batch_size)
        params = self._in_float32(self.policy, policy_features)
        return params, self._in_float32(self.value_head, value_features).squeeze(-1), state

    @leaves_no_graph
    def act(
        self,
        observation: Observation,
        state: TensorDict,
        is_init: Tensor,
        *,
        greedy: bool = False,
        with_value: bool = True,
        noise: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Action:
        """Acts once in each of N environments: observation ``[N, ...]``, state ``[N]``, is_init ``[N]``.

        Actions are sampled with `noise` (of `PolicyHead.noise`) or else drawn from `generator`, unless
        `greedy`. Without its value only where `values_can_wait`.
        """
        observation, is_init = self._add_time(observation), is_init.unsqueeze(1)
        value: Tensor | None = None
        if with_value:
            params, value, state = self(observation, state, is_init)
            value = value.squeeze(1)
        else:
            features, _ = self.trunk(self.encoder(self._normalize(observation)), state, is_init)
            params = self._in_float32(self.policy, features)
        params = params.squeeze(1)
        if greedy:
            action = self.policy.mode(params)
        else:
            noise = self.policy.noise(len(params), generator=generator) if noise is None else noise
            action = self.policy.choose(params, noise)
        return Action(action, params, value, state)

    @leaves_no_graph
    def value(self, observation: Observation, state: TensorDict, is_init: Tensor) -> Tensor:
        """Values ``[N]`` of observations ``[N, ...]`` seen after `state`."""
        observation, is_init = self._add_time(observation), is_init.unsqueeze(1)
        if self.values_can_wait and self.value_trunk is not None and self.value_encoder is not None:
            features, _ = self.value_trunk(self.value_encoder(self._normalize(observation)), state, is_init)
            return self._in_float32(self.value_head, features).flatten()
        return self(observation, state, is_init)[1].squeeze(1)

    def to_env(self, action: Tensor) -> Tensor:
        """The action in the environment's own units."""
        return self.policy.to_env(action)

    def trunk_metrics(self) -> dict[str, Tensor]:
        """What the trunks measured in their last pass; the value's own trunk under ``value/``."""
        metrics = super().trunk_metrics()
        if self.value_trunk is not None:
            metrics |= {f"value/{name}": value for name, value in self.value_trunk.metrics.items()}
        return metrics

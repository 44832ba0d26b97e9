"""The agent: encoder -> trunk -> policy and value heads.

Shapes: N sequences (environments or windows), T steps, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Literal, NamedTuple, ParamSpec, TypeVar, cast

import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Generator, Tensor, nn

from lit_rl.errors import UserError
from lit_rl.models.encoder import Encoder, Observation, is_continuous, orthogonal, parts_of
from lit_rl.models.heads import policy_head
from lit_rl.models.normalization import ObservationNorm
from lit_rl.trunks import Trunk

TrunkFactory = Callable[[int], Trunk]
P = ParamSpec("P")
R = TypeVar("R")


class Action(NamedTuple):
    """One acting step of N environments."""

    action: Tensor
    """As sampled, ``[N, *action_shape]``; `ActorCritic.to_env` gives the environment's form."""
    params: Tensor
    """Of the distribution it was drawn from, ``[N, P]``: `PolicyHead.log_prob` tells its probability."""
    value: Tensor | None
    """``[N]``, unless left out"""
    state: TensorDict
    """Trunk state after this step, ``[N]``."""


def leaves_no_graph(method: Callable[P, R]) -> Callable[P, R]:
    """As `torch.no_grad`, but for its cost where gradients are off already."""

    @wraps(method)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return without_gradients


class ActorCritic(nn.Module):
    """A policy and a value function over any trunk.

    `is_memoryless` tells whether every step stands alone, so that minibatches may split sequences;
    `values_can_wait`, whether values share nothing with acting, so that one pass over a whole rollout
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
        super().__init__()
        self.is_dict = isinstance(observation_space, spaces.Dict)
        continuous = {k: part for k, part in parts_of(observation_space).items() if is_continuous(part)}
        self.normalized = tuple(continuous) if normalize_observation else ()
        self.norms = nn.ModuleList(ObservationNorm(continuous[key].shape) for key in self.normalized)  # type: ignore[arg-type]

        self.encoder = Encoder(observation_space, encoder_width)
        self.trunk = _build(trunk, self.encoder)
        self.value_encoder: Encoder | None = None
        self.value_trunk: Trunk | None = None
        if value_trunk == "separate":
            self.value_encoder = Encoder(observation_space, encoder_width)
            self.value_trunk = _build(trunk, self.value_encoder)
        self.is_memoryless: bool = all(t.initial_state(1).is_empty() for t in self.trunks())
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

    def _in_float32(self, head: nn.Module, features: Tensor) -> Tensor:
        """Heads run in float32 whatever the precision of the trunk: ratios need every digit."""
        device = features.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return head(features.float())
        return head(features)

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

    def auxiliary_loss(self) -> Tensor | None:
        """The sum of what the trunks ask for beside the algorithm's loss; None if nothing."""
        losses = [trunk.auxiliary_loss for trunk in self.trunks() if trunk.auxiliary_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def trunk_metrics(self) -> dict[str, Tensor]:
        """What the trunks measured in their last pass; the value's own trunk under ``value/``."""
        metrics = dict(self.trunk.metrics)
        if self.value_trunk is not None:
            metrics |= {f"value/{name}": value for name, value in self.value_trunk.metrics.items()}
        return metrics

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


def _build(trunk: TrunkFactory, encoder: Encoder) -> Trunk:
    try:
        return trunk(encoder.out_features)
    except Exception as error:  # somebody else's constructor, and options that no type tells to be wrong
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the trunk cannot be built ({cause}): check its options") from error

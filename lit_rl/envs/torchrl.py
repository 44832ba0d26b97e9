"""Both ways between TorchRL's environments and the batched environments of this package.

`as_vector_env` lets the collector run any batched TorchRL environment, transforms included; `as_torchrl_env`
lets TorchRL's own collectors run an `EnvConfig`. TorchRL's `GymWrapper` cannot do the latter: on vector
environments with same-step resets it fails for Dict observations, and drops an episode whenever all rows end
together.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensordict import TensorDict, TensorDictBase
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import EnvBase

from lit_rl.envs.checks import check_spaces
from lit_rl.envs.config import EnvConfig
from lit_rl.envs.vector import Obs, StepResult, base_seed, map_leaves, replace_rows
from lit_rl.envs.wrappers import StandardForm, leaf_spaces
from lit_rl.errors import UserError


def as_vector_env(env: EnvBase, *, keys: Sequence[str] | None = None, seed: int | None = None) -> VectorEnv:
    """A TorchRL environment of batch size [N] under the contract of `lit_rl.envs.vector`.

    Args:
        env: `SerialEnv`, `ParallelEnv`, a batched `GymWrapper`, ..., also within `TransformedEnv`.
        keys: The entries to observe: one is an array, several are a dict. None is all of `observation_spec`.
        seed: Seed of the first reset.

    Raises:
        UserError: another batch size, an entry that is missing or nested, or a spec without a space.
    """
    adapted = _FromTorchRL(env, keys, seed)
    check_spaces(adapted.name, adapted.single_observation_space, adapted.single_action_space)
    return StandardForm(adapted) if StandardForm.needed(adapted.single_observation_space) else adapted


def as_torchrl_env(env: EnvConfig | VectorEnv, *, seed: int | None = None) -> EnvBase:
    """An `EnvConfig`, or an environment that it made, as a TorchRL environment of batch size [N].

    Entries are `observation` (or those of the Dict space), `action` (categorical), `reward`, `done`,
    `terminated` and `truncated`. Rows can be reset one by one only at their episodes' ends.
    """
    return _ToTorchRL(env.make(seed=seed) if isinstance(env, EnvConfig) else env)


class _FromTorchRL(VectorEnv):
    def __init__(self, env: EnvBase, keys: Sequence[str] | None, seed: int | None) -> None:
        self.name = type(env).__name__
        if len(env.batch_size) != 1:
            raise UserError(
                f"{self.name} has batch size {list(env.batch_size)}, but [N] is needed: "
                "wrap it in torchrl.envs.SerialEnv(N, ...)"
            )
        self.num_envs = env.batch_size[0]
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self._env, self._first_seed = env, seed
        self._keys = list(env.observation_spec.keys()) if keys is None else list(keys)
        single = {key: self._space_at(key) for key in self._keys}
        self._plain = len(self._keys) == 1
        self.single_observation_space = single[self._keys[0]] if self._plain else spaces.Dict(single)
        self.single_action_space = _to_space(self.name, "action", env.action_spec[0])
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._carrier = TensorDict()

    def _space_at(self, key: str) -> gym.Space:
        known = list(self._env.observation_spec.keys())
        if key not in known:
            raise UserError(f"{self.name} observes no {key!r}: choose among {', '.join(map(str, known))}")
        return _to_space(self.name, key, self._env.observation_spec[key][0])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        if seed is not None:
            self._env.set_seed(base_seed(seed))
        self._carrier = self._env.reset()
        return self._observe(self._carrier), {}

    def step(self, actions: Any) -> StepResult:
        action = torch.as_tensor(actions, device=self._env.device)
        action_spec = self._env.action_spec
        if isinstance(action_spec, OneHot):
            action = torch.nn.functional.one_hot(action.long(), action_spec.shape[-1])
        self._carrier.set(self._env.action_key, action.to(action_spec.dtype).reshape(action_spec.shape))
        stepped, self._carrier = self._env.step_and_maybe_reset(self._carrier)
        last = stepped["next"]
        truncated = _flags(last.get("truncated", torch.zeros_like(last["done"])))
        terminated = _flags(last.get("terminated", last["done"]))
        info = {"final_obs": self._observe(last)} if (terminated | truncated).any() else {}
        reward = last[self._env.reward_key].reshape(self.num_envs).cpu().numpy()
        return self._observe(self._carrier), reward, terminated, truncated, info

    def _observe(self, carrier: TensorDictBase) -> Obs:
        obs = {key: carrier[key].cpu().numpy().copy() for key in self._keys}
        return obs[self._keys[0]] if self._plain else obs

    def close_extras(self, **kwargs: Any) -> None:
        if not self._env.is_closed:
            self._env.close()


def _flags(flags: torch.Tensor) -> np.ndarray:
    return flags.reshape(-1).cpu().numpy().copy()


def _to_space(name: str, key: str, spec: TensorSpec) -> gym.Space:
    """The gymnasium space of one row's spec."""
    dtype = np.dtype(str(spec.dtype).removeprefix("torch."))
    match spec:
        case OneHot():  # before Categorical's kin: seen as a one-hot vector, acted as a number
            n = spec.shape[-1]
            return spaces.Discrete(n) if key == "action" else spaces.MultiBinary(n)
        case Categorical() if not spec.shape:
            return spaces.Discrete(int(spec.space.n))
        case MultiCategorical():
            return spaces.MultiDiscrete(spec.nvec.cpu().numpy(), dtype=dtype.type)
        case Binary():
            return spaces.MultiBinary(list(spec.shape))
        case Bounded():
            return spaces.Box(spec.low.cpu().numpy(), spec.high.cpu().numpy(), dtype=dtype.type)
        case Unbounded() if dtype.kind == "f":
            return spaces.Box(-np.inf, np.inf, tuple(spec.shape), dtype.type)
        case Unbounded():
            limits = np.iinfo(dtype)
            return spaces.Box(limits.min, limits.max, tuple(spec.shape), dtype.type)
    raise UserError(
        f"{name}: no space for {type(spec).__name__} {key!r}: leave it out by `keys`, or transform it"
    )


class _ToTorchRL(EnvBase):
    def __init__(self, env: VectorEnv) -> None:
        super().__init__(batch_size=torch.Size([env.num_envs]), device="cpu")
        self._env = env
        self._seed: int | None = None
        leaves = leaf_spaces(env.single_observation_space)
        self._plain = not isinstance(leaves, dict)
        specs = map_leaves(lambda space: _to_spec(space, env.num_envs), leaves)
        self.observation_spec = Composite(
            {"observation": specs} if self._plain else specs, shape=[env.num_envs]
        )
        self.action_spec = _to_spec(env.single_action_space, env.num_envs)
        self.reward_spec = Unbounded((env.num_envs, 1))
        self.done_spec = Composite(
            {
                key: Categorical(2, shape=(env.num_envs, 1), dtype=torch.bool)
                for key in ("done", "terminated", "truncated")
            },
            shape=[env.num_envs],
        )
        self._begun: Obs = None  # where the rows are: for ended ones, the next episode's first observation

    def _set_seed(self, seed: int | None) -> None:
        self._seed = seed

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        if tensordict is None or tensordict.get("_reset", None) is None:
            self._begun, _ = self._env.reset(seed=self._seed)
            self._seed = None  # the next reset goes on with the random state
        return self._pack(self._begun)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self._begun, reward, terminated, truncated, info = self._env.step(tensordict["action"].numpy())
        ended = terminated | truncated
        last = replace_rows(self._begun, ended, info["final_obs"]) if info else self._begun
        packed = self._pack(last)
        packed["reward"] = torch.from_numpy(reward).float()[:, None]
        for key, flags in (("done", ended), ("terminated", terminated), ("truncated", truncated)):
            packed[key] = torch.from_numpy(flags)[:, None]
        return packed

    def _pack(self, obs: Obs) -> TensorDict:
        tensors = map_leaves(torch.from_numpy, {"observation": obs} if self._plain else obs)
        return TensorDict(tensors, batch_size=self.batch_size)

    def close(self, *, raise_if_closed: bool = True) -> None:
        self._env.close()
        super().close(raise_if_closed=raise_if_closed)


def _to_spec(space: gym.Space, rows: int) -> TensorSpec:
    """The spec of `rows` rows of a space."""
    shape = (rows, *(space.shape or ()))
    dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), shape=shape, dtype=dtype)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return MultiCategorical(space.nvec, shape=shape, dtype=dtype)
    if isinstance(space, spaces.MultiDiscrete):
        high = torch.from_numpy(space.nvec - 1).expand(shape)
        return Bounded(0, high, shape=shape, dtype=dtype)
    if isinstance(space, spaces.MultiBinary):
        return Binary(shape=shape, dtype=dtype)
    assert isinstance(space, spaces.Box)  # `check_spaces` lets nothing else pass
    low, high = (torch.from_numpy(bound).expand(shape) for bound in (space.low, space.high))
    return Bounded(low, high, shape=shape, dtype=dtype)

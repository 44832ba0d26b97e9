"""What several tests build: scripted environments, small agents, quiet Trainers."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import lightning as L
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from lightning.pytorch.loggers.logger import DummyLogger
from tensordict import TensorDict
from torch import Tensor

from lit_rl import registry
from lit_rl.algorithms import LitDQN, LitPPO
from lit_rl.data import RolloutDataModule
from lit_rl.data.window_replay import Drawn
from lit_rl.envs import EnvConfig
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.agent import Agent, TrunkFactory
from lit_rl.models.q_heads import CategoricalQ, ExpectedQ, QuantileQ
from lit_rl.testing.envs import Counter
from lit_rl.trunks import MLP

COUNTER, WALK, PICTURES = "lit_rl/Counter-v0", "lit_rl_tests/Walk-v0", "lit_rl_tests/Pictures-v0"

Q_HEADS: dict[str, Callable] = {
    "expected": ExpectedQ,
    "categorical": partial(CategoricalQ, v_min=-2.0, v_max=3.0, atoms=11),
    "quantile": partial(QuantileQ, quantiles=8),
}


def counter(
    num_envs: int = 2, lengths: Sequence[int] = (3, 5), truncations: Sequence[bool] = (False, True)
) -> EnvConfig:
    """Episodes of known lengths and ends, observation (episode, t), reward t + 1."""
    kwargs = {"lengths": list(lengths), "truncations": list(truncations)}
    return EnvConfig(COUNTER, num_envs=num_envs, kwargs=kwargs)


class Balanced(MLP):
    """An MLP with an auxiliary loss, as a mixture of experts has one."""

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        y, state = super().forward(x, state, is_init)
        self.auxiliary_loss = y.square().mean()
        return y, state


class Walk(Counter):
    """A Counter with any kind of action, seen as numbers of order one that tell the steps apart."""

    ACTIONS: ClassVar[dict[str, spaces.Space]] = {
        "discrete": spaces.Discrete(3),
        "multidiscrete": spaces.MultiDiscrete([2, 3]),
        "continuous": spaces.Box(-1.0, 1.0, (2,), np.float32),
    }

    def __init__(self, action: str = "discrete", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = self.ACTIONS[action]

    def _obs(self) -> np.ndarray:
        return np.sin([self.t + 0.3, 3 * self.t + self.episode], dtype=np.float32)


def walk(action: str = "discrete", num_envs: int = 4) -> EnvConfig:
    """Episodes of 3, 5, 1 and 8 steps, by turns terminated and truncated; rollouts of 16 end within one."""
    if WALK not in gym.registry:
        gym.register(WALK, entry_point=Walk)
    kwargs = {"action": action, "lengths": [3, 5, 1, 8], "truncations": [False, True]}
    return EnvConfig(WALK, num_envs=num_envs, kwargs=kwargs)


class Pictures(gym.Env):
    """A picture that shows how often it was stepped; 5 steps, then truncated, then terminated, by turns."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        self.action_space = spaces.Discrete(2)
        self.steps = self.episodes = self.t = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.episodes, self.t = self.episodes + 1, 0
        return self.picture(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        ended, cut = self.t == 5, self.episodes % 2 == 0
        return self.picture(), float(self.steps), ended and not cut, ended and cut, {}

    def picture(self) -> np.ndarray:
        self.steps += 1
        return np.full((1, 36, 36), self.steps, np.uint8)


def pictures(num_envs: int = 2) -> EnvConfig:
    """Episodes seen as images."""
    if PICTURES not in gym.registry:
        gym.register(PICTURES, entry_point=Pictures)
    return EnvConfig(PICTURES, num_envs=num_envs)


def small(name: str) -> TrunkFactory:
    """A trunk of width 8 by its registered name, with heads of width 4 where it has a word for them."""
    trunk = registry.load(name)
    sizes = {"d_model": 8, "headdim": 4, "n_heads": 2}
    return partial(
        trunk, **{word: sizes[word] for word in sizes.keys() & inspect.signature(trunk).parameters}
    )


def installed_trunks() -> list[str]:
    """Ours: others' plugins may be installed too."""
    return sorted({entry.name for entry in registry.entries() if entry.package.startswith("lit-rl")})


def make_agent(env: EnvConfig, trunk: str = "mlp", *, seed: int = 0, **options: Any) -> ActorCritic:
    """An agent whose policy and values are clearly not flat, as they would be at initialisation."""
    torch.manual_seed(seed)
    agent = ActorCritic(*env.spaces(), small(trunk), **options)
    sharpen(agent)
    return agent


@torch.no_grad()
def sharpen(agent: ActorCritic) -> None:
    """Larger weights of the policy head, which starts near zero: actions then depend on what is seen."""
    for name, parameter in agent.policy.named_parameters():
        if name.endswith("weight"):
            parameter.mul_(100.0)


def ppo(env: EnvConfig, trunk: str = "mlp", **options: Any) -> LitPPO:
    return LitPPO(env, small(trunk), **options)


class Records(DummyLogger):
    """A logger that keeps its records: (frames, metrics)."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        assert step is not None
        self.records.append((step, dict(metrics)))

    def series(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.records if key in metrics]


def make_trainer(**options: Any) -> L.Trainer:
    """A silent Trainer on the CPU that ends where the algorithm says so."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
    }
    return L.Trainer(**(quiet | options))


def train(
    env: EnvConfig,
    trunk: str = "mlp",
    *,
    rollouts: int = 1,
    rollout_length: int = 16,
    sequence_length: int | None = None,
    seed: int = 0,
    algorithm: type[LitPPO] = LitPPO,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[LitPPO, Records]:
    """Some rollouts of PPO: the learner after them and what it logged."""
    torch.manual_seed(seed)
    frames = env.num_envs * rollout_length
    usual = {"total_frames": rollouts * frames, "num_minibatches": 2, "lr": 1e-2}
    model = algorithm(env, small(trunk), **(usual | options))
    sharpen(model.agent)
    data = RolloutDataModule(
        env,
        rollout_length=rollout_length,
        sequence_length=sequence_length,
        frames_per_epoch=frames,
        seed=seed,
    )
    records = Records()
    make_trainer(**({"logger": records} | (trainer or {}))).fit(model, data)
    return model, records


def parameters(module: torch.nn.Module) -> Tensor:
    """All parameters as one vector, copied."""
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def sample(space: spaces.Space, *batch: int, seed: int = 0) -> Any:
    """Random elements of a space as tensors ``[*batch, ...]`` (a mapping for a Dict space)."""
    space.seed(seed)
    if isinstance(space, spaces.Dict):
        return {key: sample(part, *batch, seed=seed) for key, part in space.spaces.items()}
    count = int(torch.tensor(batch).prod())
    return torch.stack([torch.as_tensor(space.sample()) for _ in range(count)]).unflatten(0, batch)


@dataclass(frozen=True)
class Step:
    """What a `Scripted` row does at one step."""

    observation: list[float]  # (row, episode, t), seen before the step
    is_init: bool
    reward: float
    terminated: bool
    truncated: bool
    last: list[float]  # seen after the step; at an end the episode's last observation
    so_far: float  # return of the episode up to and with this step


def script(row: int, episodes: Sequence[tuple[int, str]]) -> Iterator[Step]:
    """Episodes of (length, end), over and over; `end` says terminated, truncated or both."""
    for episode, (length, end) in enumerate(itertools.cycle(episodes)):
        rewards = [row + 10.0 * episode + t for t in range(length)]
        for t, reward in enumerate(rewards):
            at_end = t == length - 1
            yield Step(
                observation=[row, episode, t],
                is_init=t == 0,
                reward=reward,
                terminated=at_end and end in ("terminated", "both"),
                truncated=at_end and end in ("truncated", "both"),
                last=[row, episode, t + 1],
                so_far=sum(rewards[: t + 1]),
            )


class Scripted(VectorEnv):
    """Rows that end at different times, as written in a script; it keeps the actions that it was given."""

    single_observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, rows: Sequence[Sequence[tuple[int, str]]], action_space: spaces.Space) -> None:
        self.num_envs, self.rows = len(rows), rows
        self.single_action_space = action_space
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.scripts = [script(row, episodes) for row, episodes in enumerate(self.rows)]
        self.now = [next(steps) for steps in self.scripts]
        return self._seen("observation"), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.actions.append(actions.copy())
        last = self._seen("last")
        reward, terminated, truncated = (
            np.array([getattr(step, name) for step in self.now])
            for name in ("reward", "terminated", "truncated")
        )
        self.now = [next(steps) for steps in self.scripts]
        info = {}
        if (terminated | truncated).any():
            last[~(terminated | truncated)] = -1e6  # only the ended rows mean something
            info = {"final_obs": last}
        return self._seen("observation"), reward, terminated, truncated, info

    def _seen(self, name: str) -> np.ndarray:
        return np.array([getattr(step, name) for step in self.now], np.float32)


def window_loss(model: LitDQN, drawn: Drawn) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What an optimizer step descends on these windows; new priorities; what was measured."""
    lesson = model.loss.lesson(model.target, drawn)
    prediction = model.loss.predict(model.agent, lesson)
    priority, measured = model.loss.judge(model.agent.head, lesson, [prediction])
    auxiliary = 0.0 if prediction.auxiliary is None else prediction.auxiliary
    return prediction.loss + auxiliary, priority, measured


def nothing(*_: Any) -> None:
    """A hook that only listens."""


def replaced(path: str, new: Any) -> Callable[[Agent], None]:
    """Puts something else in the place of a module or parameter."""
    parent, _, name = path.rpartition(".")
    return lambda agent: setattr(agent.get_submodule(parent), name, new)


def patched(path: str, name: str = "forward") -> Callable[[Agent], None]:
    """Puts something else in the place of a module's method."""

    def patch(agent: Agent) -> None:
        setattr(agent.get_submodule(path), name, lambda *args: None)

    return patch


def made_of_another(agent: Agent) -> None:
    """Makes a weight of the trunk out of a parameter elsewhere."""
    layer, agent.source = agent.trunk.layers[1], torch.nn.Parameter(torch.ones(9, 9))
    del layer.weight
    layer.weight = 2 * agent.source

"""TorchRL's environments feed the collector, and the collector's environments feed TorchRL's collectors."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import (
    Compose,
    EnvBase,
    GymEnv,
    GymWrapper,
    ObservationNorm,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from lit_rl.envs import EnvConfig
from lit_rl.envs.torchrl import as_torchrl_env, as_vector_env
from lit_rl.errors import UserError
from lit_rl.testing.envs import Counter, DictObservation, register

SCRIPT = {"lengths": [2, 3], "truncations": [False, True]}


def counters() -> EnvBase:
    rows = SyncVectorEnv([lambda: Counter(**SCRIPT)] * 2, autoreset_mode=AutoresetMode.DISABLED)
    return GymWrapper(rows)


def serial() -> EnvBase:
    register()
    return SerialEnv(2, lambda: GymEnv("lit_rl/Counter-v0", **SCRIPT))


@pytest.mark.parametrize("make", [counters, serial])
@pytest.mark.parametrize("transformed", [False, True])
def test_a_torchrl_environment_follows_the_contract(make: Any, transformed: bool) -> None:
    env = make()
    if transformed:
        halved = ObservationNorm(loc=0.0, scale=0.5, in_keys=["observation"])
        env = TransformedEnv(env, Compose(StepCounter(), halved))
    scale = 0.5 if transformed else 1.0
    vector = as_vector_env(env, keys=["observation"])
    assert vector.single_observation_space.shape == (2,)
    assert vector.single_action_space == spaces.Discrete(2)
    obs, info = vector.reset()
    episode = obs[0, 0] / scale  # building the environment may have begun some
    cut = [False, True] if episode % 2 == 0 else [True, False]
    lengths = [2, 3] if episode % 2 == 0 else [3, 2]
    for k, length in enumerate(lengths):
        for t in range(1, length + 1):
            obs, reward, terminated, truncated, info = vector.step(np.array([0, 1]))
            assert reward.tolist() == [t, t]
            ends = t == length
            assert terminated.tolist() == [ends and not cut[k]] * 2
            assert truncated.tolist() == [ends and cut[k]] * 2
            here = [scale * (episode + k), scale * t]
            if ends:
                assert info["final_obs"].tolist() == [here] * 2
                here = [scale * (episode + k + 1), 0.0]
            else:
                assert info == {}
            assert obs.tolist() == [here] * 2
    vector.close()


def test_several_entries_are_a_dict() -> None:
    rows = SyncVectorEnv([DictObservation] * 3, autoreset_mode=AutoresetMode.DISABLED)
    vector = as_vector_env(GymWrapper(rows, categorical_action_encoding=True))
    obs, _ = vector.reset()
    assert obs.keys() == {"cells", "position", "symbol"}
    assert obs in vector.observation_space
    assert vector.step(np.array([0, 1, 2]))[0] in vector.observation_space


def test_truncation_by_a_transform_is_truncation() -> None:
    vector = as_vector_env(TransformedEnv(serial(), StepCounter(max_steps=1)), keys=["observation"])
    vector.reset()
    _, _, terminated, truncated, info = vector.step(np.zeros(2, dtype=np.int64))
    assert truncated.all()
    assert not terminated.any()
    assert info["final_obs"][:, 1].tolist() == [1.0, 1.0]


def test_seeds_reach_the_torchrl_environment() -> None:
    def first(seed: int) -> np.ndarray:
        return as_vector_env(SerialEnv(2, lambda: GymEnv("CartPole-v1")), seed=seed).reset()[0]

    np.testing.assert_array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))


def test_what_cannot_be_adapted_is_one_line() -> None:
    with pytest.raises(UserError, match=r"batch size \[\].*SerialEnv"):
        as_vector_env(GymEnv("CartPole-v1"))
    with pytest.raises(UserError, match="no 'pixels': choose among observation"):
        as_vector_env(serial(), keys=["pixels"])


CONFIGS = [
    EnvConfig("CartPole-v1", num_envs=3),
    EnvConfig("CartPole-v1", num_envs=3, backend="envpool", frame_stack=2),
    EnvConfig("Pendulum-v1", num_envs=3),
    EnvConfig("FrozenLake-v1", num_envs=3),
    EnvConfig("MiniGrid-MemoryS9-v0", num_envs=3, view_size=3),
    EnvConfig("lit_rl/Dict-v0", num_envs=3),
    EnvConfig("lit_rl/MultiDiscrete-v0", num_envs=3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.id}-{config.backend}")
def test_specs_hold(config: EnvConfig) -> None:
    env = as_torchrl_env(config, seed=0)
    check_env_specs(env)
    env.close()


def test_torchrl_rolls_out_the_script_without_losing_an_episode() -> None:
    env = as_torchrl_env(EnvConfig("lit_rl/Counter-v0", num_envs=2, kwargs=SCRIPT), seed=0)
    steps = env.rollout(7, break_when_any_done=False)
    assert steps["observation"][0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1]]
    assert steps["next", "observation"][1].tolist() == [
        [0, 1],
        [0, 2],
        [1, 1],
        [1, 2],
        [1, 3],
        [2, 1],
        [2, 2],
    ]
    assert steps["next", "reward"][0, :, 0].tolist() == [1, 2, 1, 2, 3, 1, 2]
    flags = {
        key: steps["next", key][0, :, 0].nonzero()[:, 0].tolist()
        for key in ("terminated", "truncated", "done")
    }
    assert flags == {"terminated": [1, 6], "truncated": [4], "done": [1, 4, 6]}


def test_torchrls_own_collector_runs_it() -> None:
    env = as_torchrl_env(EnvConfig("CartPole-v1", num_envs=4), seed=0)
    left = TensorDictModule(
        lambda obs: torch.zeros(obs.shape[0], dtype=torch.int64), ["observation"], ["action"]
    )
    collector = Collector(env, left, frames_per_batch=160, total_frames=320)
    ends = 0
    for batch in collector:
        before, after = batch["observation"], batch["next", "observation"]
        # Euler's position through every end, and the fresh start after it
        torch.testing.assert_close(after[..., 0], before[..., 0] + 0.02 * before[..., 1], atol=1e-6, rtol=0)
        done = batch["next", "done"][:, :-1, 0]
        assert (before[:, 1:][done].abs() <= 0.05).all()
        ends += int(done.sum())
    collector.shutdown()
    assert ends > 10

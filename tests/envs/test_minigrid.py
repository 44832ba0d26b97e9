"""MiniGrid's symbolic view: the crop, the symbols, the direction, on both backends."""

import gymnasium as gym
import minigrid
import numpy as np
import pytest
from gymnasium import spaces
from minigrid.core import constants

from lit_rl.envs import EnvConfig
from lit_rl.envs.minigrid import SYMBOLS

gym.register_envs(minigrid)
MEMORY = "MiniGrid-MemoryS9-v0"


def test_symbols_are_as_many_as_minigrid_has() -> None:
    words = (constants.OBJECT_TO_IDX, constants.COLOR_TO_IDX, constants.STATE_TO_IDX)
    assert tuple(len(kind) for kind in words) == SYMBOLS
    assert all(sorted(kind.values()) == list(range(len(kind))) for kind in words)


@pytest.mark.parametrize("view_size", [3, 5, 7])
@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_the_view_is_a_space_to_encode_from(view_size: int, backend: str) -> None:
    env = EnvConfig(MEMORY, num_envs=2, backend=backend, view_size=view_size).make(seed=0)
    leaves = env.single_observation_space.spaces
    assert leaves["image"].nvec.shape == (view_size, view_size, 3)
    assert leaves["image"].dtype == np.uint8
    assert leaves["direction"] == spaces.Discrete(4)
    obs, _ = env.reset()
    assert obs["image"].dtype == np.uint8
    for _ in range(50):
        assert obs in env.observation_space
        obs = env.step(env.action_space.sample())[0]


def test_the_crop_holds_what_stands_before_the_agent() -> None:
    """Against MiniGrid's own grid: the cell ahead, and both beside the agent, where they are seen."""
    config = EnvConfig("MiniGrid-DoorKey-6x6-v0", num_envs=1, view_size=3)
    env = config.make(seed=0)
    obs, _ = env.reset()
    row = env.unwrapped.envs[0].unwrapped  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        image = obs["image"][0]
        for cell, where in ((image[1, 1], row.front_pos), (image[2, 2], row.agent_pos + row.right_vec)):
            there = row.grid.get(*where)
            expected = (1, 0, 0) if there is None else there.encode()
            assert tuple(cell) in (expected, (0, 0, 0))
            kinds.add(int(cell[0]))
        assert obs["direction"][0] == row.agent_dir
        obs = env.step(rng.integers(0, 6, 1))[0]
    assert {constants.OBJECT_TO_IDX[kind] for kind in ("empty", "wall", "key", "door")} <= kinds


def test_the_crop_shows_at_least_what_the_smaller_view_shows() -> None:
    """Where MiniGrid's own view of 3 sees a cell, the crop shows the same; the crop may see more."""
    own = gym.make(MEMORY, agent_view_size=3).unwrapped
    full = gym.make(MEMORY).unwrapped
    small, large = own.reset(seed=0)[0]["image"], full.reset(seed=0)[0]["image"]
    rng = np.random.default_rng(0)
    more = 0
    for _ in range(2000):
        crop = large[2:5, 4:7]
        seen = small[..., 0] != 0
        np.testing.assert_array_equal(crop[seen], small[seen])
        more += int((crop[~seen][:, 0] != 0).sum())
        action = int(rng.integers(0, 3))
        small, _, terminated, truncated, _ = own.step(action)
        large = full.step(action)[0]["image"]
        small = small["image"]
        if terminated or truncated:
            small, large = own.reset()[0]["image"], full.reset()[0]["image"]
    assert more > 0  # the two views are not the same, as the docstring of MiniGridView says


def test_success_is_a_reward_at_the_end() -> None:
    """In Memory, the wrong object ends the episode, too: terminated is not yet success."""
    env = EnvConfig(MEMORY, num_envs=16, actions=[0, 1, 2], view_size=3).make(seed=0)
    env.reset()
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(1500):
        _, reward, terminated, truncated, info = env.step(rng.integers(0, 3, 16))
        if info:
            ended = terminated | truncated
            np.testing.assert_array_equal(info["success"][ended], reward[ended] > 0)
            outcomes += list(zip(terminated[ended], info["success"][ended], strict=True))
    assert {(True, 1.0), (True, 0.0), (False, 0.0)} >= set(outcomes) >= {(True, 1.0), (True, 0.0)}

"""The toy environments give what their docstrings promise."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from lit_rl.envs import EnvConfig
from lit_rl.testing.envs import IDS, register


@pytest.mark.parametrize(
    "env_id", [env_id for env_id in IDS if "Fault" not in env_id and "NaN" not in env_id]
)
def test_gymnasium_finds_no_fault(env_id: str) -> None:
    register()
    register()  # a second time changes nothing
    check_env(gym.make(env_id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("cues", [2, 4])
def test_recall_pays_memory_1_and_chance_1_in_cues(cues: int) -> None:
    env = EnvConfig("lit_rl/Recall-v0", num_envs=2000, kwargs={"delay": 3, "cues": cues}).make(seed=0)
    obs, _ = env.reset()
    cue = obs.argmax(axis=1)
    assert np.bincount(cue, minlength=cues).min() > 2000 / cues - 5 * np.sqrt(2000 * (cues - 1) / cues**2)
    shown = []
    for _ in range(4):
        obs, reward, terminated, _, _ = env.step(np.zeros(2000, dtype=np.int64))
        shown.append(obs.argmax(axis=1))
        assert not terminated.any()
        assert not reward.any()
    assert (np.array(shown[:3]) == cues).all()  # three blanks
    assert (shown[3] == cues + 1).all()  # then go
    paid = env.step(np.where(np.arange(2000) < 1000, cue, 0))[1]
    assert paid[:1000].mean() == 1.0
    assert abs(paid[1000:].mean() - 1 / cues) < 5 * np.sqrt((cues - 1) / cues**2 / 1000)


def test_the_best_policies_get_what_is_stated() -> None:
    choices = EnvConfig("lit_rl/MultiDiscrete-v0", num_envs=3000).make(seed=0)
    obs, _ = choices.reset()
    best = np.stack([obs[:, :3].argmax(axis=1), obs[:, 3:].argmax(axis=1)], axis=1)
    np.testing.assert_allclose(choices.step(best)[1], 1.0)
    assert abs(choices.step(choices.action_space.sample())[1].mean() - 5 / 18) < 0.04

    bandit = EnvConfig("lit_rl/Bandit-v0", num_envs=10).make(seed=0)
    context, _ = bandit.reset()
    np.testing.assert_allclose(bandit.step(context * [0.5, -0.5])[1], 0.0, atol=1e-12)

    named = EnvConfig("lit_rl/Dict-v0", num_envs=10, kwargs={"length": 4}).make(seed=0)
    entries, _ = named.reset()
    for _ in range(4):
        entries, reward, _, truncated, _ = named.step(entries["symbol"])
        assert (reward == 1.0).all()
    assert truncated.all()

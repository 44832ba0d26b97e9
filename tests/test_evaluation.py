"""Evaluation: as many episodes as asked for, none preferred, nothing moves."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import Records, Scripted, counter, make_agent, make_trainer, ppo, small, train, walk
from tensordict import TensorDict

from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.evaluation import Episode, Episodes, summarize
from lit_rl.models.actor_critic import ActorCritic

SHORT_AND_LONG = [[(2, "terminated")], [(2, "terminated")], [(10, "truncated")]]


def scripted_agent() -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(Scripted.single_observation_space, spaces.Discrete(2), small("gru"))


def scripted(episodes: int, **options) -> list[Episode]:
    return list(Episodes(Scripted(SHORT_AND_LONG, spaces.Discrete(2)), scripted_agent(), episodes, **options))


@pytest.mark.parametrize("episodes", [1, 2, 3, 4, 9, 10])
def test_as_many_episodes_as_asked_for(episodes: int) -> None:
    assert len(scripted(episodes)) == episodes


def test_short_episodes_are_not_preferred() -> None:
    """Each row plays its share. The first to end would be short ones only: 9 of them take 10 steps."""
    played = scripted(9)
    assert sorted(episode.length for episode in played) == [2] * 6 + [10] * 3
    assert summarize(played)["length"] == pytest.approx((6 * 2 + 3 * 10) / 9)


def test_returns_are_those_of_the_script() -> None:
    # Row r pays r + 10 e + t: row 2's first episode 10 * 2 + 45, row 0's first 0 + 1, row 1's 1 + 2
    by_row = {episode.length: episode.episode_return for episode in scripted(3)}
    assert by_row[10] == 65.0
    assert sorted(episode.episode_return for episode in scripted(3)) == [1.0, 3.0, 65.0]


def test_success() -> None:
    env = EnvConfig("lit_rl/Recall-v0", num_envs=2, kwargs={"delay": 1})
    episodes = list(Episodes(env.make(), make_agent(env), 20, greedy=False))
    assert {episode.success for episode in episodes} == {0.0, 1.0}
    assert summarize(episodes)["success"] == summarize(episodes)["return"]
    assert scripted(1)[0].success is None
    assert "success" not in summarize(scripted(1))


def test_summary_by_hand() -> None:
    episodes = [Episode(1.0, 2), Episode(3.0, 4, success=1.0), Episode(5.0, 9, success=0.0)]
    assert summarize(episodes) == {
        "return": 3.0,
        "return_std": pytest.approx((8 / 3) ** 0.5),
        "length": 5.0,
        "success": 0.5,
    }


@pytest.mark.parametrize("greedy", [True, False])
def test_one_seed_one_result(greedy: bool) -> None:
    env = EnvConfig("CartPole-v1", num_envs=3, observation_noise=0.1)
    agent = make_agent(env, "gru")

    def returns(seed: int) -> list[float]:
        torch.rand(5)  # global random state has no part in it
        return [e.episode_return for e in Episodes(env.make(), agent, 6, greedy=greedy, seed=seed)]

    assert returns(1) == returns(1)
    assert returns(1) != returns(2)
    again = Episodes(env.make(), agent, 6, greedy=greedy, seed=1)
    assert [e.episode_return for e in again] == [e.episode_return for e in again] == returns(1)


def test_greedy_takes_the_mode() -> None:
    env = EnvConfig("lit_rl/MultiDiscrete-v0", num_envs=4)
    agent = make_agent(env)
    with torch.no_grad():
        agent.policy.logits.weight.zero_()
        agent.policy.logits.bias[[1, 6]] = 0.5  # of 3 and 4 choices: (1, 3) is likeliest

    def actions(greedy: bool) -> set[tuple[int, ...]]:
        episodes = Episodes(env.make(), agent, 40, greedy=greedy, record=True)
        return {tuple(episode.steps["action"][0].tolist()) for episode in episodes}

    assert actions(greedy=True) == {(1, 3)}
    assert len(actions(greedy=False)) > 4


def test_recorded_steps_follow_the_script() -> None:
    env = counter(num_envs=2, lengths=[3, 4], truncations=[False, True])
    episodes = list(Episodes(env.make(), make_agent(env, "gru"), 4, record=True))
    assert sorted(len(episode.steps) for episode in episodes) == [3, 3, 4, 4]
    for episode in episodes:
        steps, length = episode.steps, episode.length
        number = 0 if length == 3 else 1
        assert steps["observation"].tolist() == [[number, t] for t in range(length)]
        assert steps["next", "observation"].tolist() == [[number, t + 1] for t in range(length)]
        assert steps["next", "reward"].flatten().tolist() == [t + 1 for t in range(length)]
        ends = [False] * (length - 1) + [True]
        never = [False] * length
        assert steps["next", "terminated"].flatten().tolist() == (ends if length == 3 else never)
        assert steps["next", "truncated"].flatten().tolist() == (ends if length == 4 else never)
        assert steps["next", "done"].flatten().tolist() == ends
        assert steps["is_init"].flatten().tolist() == ends[::-1]


def test_recorded_dict_observations() -> None:
    env = EnvConfig("lit_rl/Dict-v0", num_envs=2, kwargs={"length": 4})
    (episode,) = Episodes(env.make(), make_agent(env), 1, record=True)
    assert episode.steps["observation", "position"].flatten().tolist() == [0, 0.25, 0.5, 0.75]
    assert episode.steps["next", "observation", "position"].flatten().tolist() == [0.25, 0.5, 0.75, 1.0]


def test_memory_is_the_policys_own() -> None:
    """Greedy actions equal those of one pass over each recorded episode, from an empty memory."""
    env = EnvConfig("CartPole-v1", num_envs=2)
    agent = make_agent(env, "gru")
    for episode in Episodes(env.make(), agent, 4, record=True):
        steps = episode.steps
        is_init = torch.zeros(1, len(steps), dtype=torch.bool)
        with torch.no_grad():
            params, _, _ = agent(steps["observation"][None], agent.initial_state(1), is_init)
        assert torch.equal(agent.policy.mode(params)[0], steps["action"])


def test_observations_that_are_not_finite() -> None:
    env = EnvConfig("lit_rl/NaN-v0", num_envs=2, kwargs={"after": 5})
    with pytest.raises(UserError, match="lit_rl/NaN-v0 is not finite at step 6"):
        list(Episodes(env.make(), make_agent(env), 1))


# ------------------------------------------------------------------ through Lightning


def test_statistics_stand_still() -> None:
    model, _ = train(walk(), "gru", normalize_observation=True, normalize_reward=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before["agent.norms.0.count"] > 0
    data = RolloutDataModule(walk(), episodes=5)
    for stage in ("validate", "test"):
        getattr(make_trainer(limit_val_batches=1.0), stage)(model, datamodule=data, verbose=False)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_statistics_are_used() -> None:
    """The other mistake: evaluating without them. The same weights act otherwise."""
    model, _ = train(walk("continuous"), normalize_observation=True)

    def actions() -> torch.Tensor:
        episodes = Episodes(walk("continuous").make(), model.agent, 1, record=True)
        return next(iter(episodes)).steps["action"]

    with_statistics = actions()
    model.agent.norms[0].center += 1.0
    assert not torch.allclose(actions(), with_statistics)


def test_evaluation_within_training() -> None:
    records = Records()
    options = {"limit_val_batches": 1.0, "logger": records}
    train(counter(num_envs=4, lengths=[3]), rollouts=2, trainer=options)
    assert records.series("val/return") == [6.0, 6.0]
    assert records.series("val/length") == [3.0, 3.0]
    assert [frames for frames, metrics in records.records if "val/return" in metrics] == [64, 128]


def test_evaluation_leaves_no_trace_in_training() -> None:
    plain, _ = train(walk(), "gru", rollouts=3)
    watched, _ = train(walk(), "gru", rollouts=3, trainer={"limit_val_batches": 1.0})
    checked, _ = train(
        walk(), "gru", rollouts=3, trainer={"limit_val_batches": 1.0, "num_sanity_val_steps": 2}
    )
    for other in (watched, checked):
        for one, another in zip(plain.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, another)


def test_a_sanity_check_is_not_a_result() -> None:
    records = Records()
    options = {"limit_val_batches": 1.0, "num_sanity_val_steps": 2, "logger": records}
    train(walk(), rollouts=1, trainer=options)
    assert [frames for frames, metrics in records.records if "val/return" in metrics] == [64]


def test_test_reports_the_mean() -> None:
    env = counter(num_envs=4, lengths=[3])
    data = RolloutDataModule(env, episodes=7)
    trainer = make_trainer()
    [metrics] = trainer.test(ppo(env), datamodule=data, verbose=False)
    assert metrics == {"test/return": 6.0, "test/return_std": 0.0, "test/length": 3.0, "step": 0.0}


def test_predict_gives_episodes() -> None:
    env = counter(num_envs=4, lengths=[3])
    episodes = make_trainer().predict(ppo(env), datamodule=RolloutDataModule(env, episodes=3))
    assert len(episodes) == 3
    assert all(isinstance(episode, TensorDict) and episode.batch_size == (3,) for episode in episodes)


def test_options_reach_the_episodes() -> None:
    env = EnvConfig("lit_rl/Bandit-v0", num_envs=2)
    torch.manual_seed(0)
    model = ppo(env)

    def actions(**options: Any) -> torch.Tensor:
        data = RolloutDataModule(env, episodes=4, **options)
        return torch.cat([episode["action"] for episode in make_trainer().predict(model, datamodule=data)])

    greedy = actions()
    assert torch.equal(actions(seed=5), greedy)  # that of training has no part in it
    assert not torch.equal(actions(evaluation_seed=5), greedy)
    sampled = actions(greedy=False)
    assert (sampled - greedy).abs().max() > 0.1  # a new policy: standard deviation 1 about nearly 0
    assert torch.equal(actions(greedy=False), sampled)
    assert not torch.equal(actions(greedy=False, evaluation_seed=5), sampled)


def test_environments_are_closed() -> None:
    made, closed = [], []

    class Watched(EnvConfig):
        def make(self, *args, **kwargs):
            env = super().make(*args, **kwargs)
            made.append(env)
            close = env.close
            env.close = lambda **options: (closed.append(env), close(**options))
            return env

    env = Watched("CartPole-v1", num_envs=2)
    train(env, trainer={"limit_val_batches": 1.0})
    assert len(made) == 3  # for the spaces, to train, to evaluate
    assert {id(env) for env in closed} == {id(env) for env in made}


@pytest.mark.parametrize(("most", "pictures"), [(3, 3), (10**6, None)])
def test_pictures(most: int, pictures: int | None) -> None:
    env = EnvConfig("CartPole-v1", num_envs=2)
    vector = env.make(num_envs=1, render_mode="rgb_array")
    (episode,) = Episodes(vector, make_agent(env), 1, render=most)
    assert len(episode.frames) == episode.length == (pictures or max(4, episode.length))
    assert pictures or (episode.frames[0] != episode.frames[-1]).any()
    assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in episode.frames)

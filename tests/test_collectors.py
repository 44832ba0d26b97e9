"""The collector: every entry of a rollout against a script, memory against a replay from scratch.

Shapes: E environments, T steps a rollout, R rollouts one after the other.
"""

import itertools
from functools import partial
from math import isnan

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers import Scripted, Step, make_agent, script, sharpen, small
from tensordict import TensorDict
from torch import Tensor
from torchrl.collectors import BaseCollector
from torchrl.envs import GymEnv, SerialEnv, TransformedEnv
from torchrl.envs.transforms import ObservationNorm as TorchRLObservationNorm
from torchrl.envs.transforms import RenameTransform

from lit_rl import keys
from lit_rl.collectors import RolloutCollector
from lit_rl.envs import EnvConfig
from lit_rl.envs.torchrl import as_vector_env
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic

# Ends at the borders of rollouts (of 8 steps) and sequences, episodes of one step and of two rollouts.
ROWS = [
    [(3, "terminated"), (5, "truncated"), (1, "terminated"), (7, "truncated")],
    [(8, "truncated"), (1, "truncated"), (1, "terminated"), (2, "both")],
    [(19, "truncated"), (2, "terminated")],
    [(4, "both"), (4, "terminated")],
]
E, T, R = len(ROWS), 8, 3
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-0.5, 0.5, (2,))


def scripted_agent(trunk: str = "gru", action_space: spaces.Space = DISCRETE, **options) -> ActorCritic:
    torch.manual_seed(0)
    agent = ActorCritic(Scripted.single_observation_space, action_space, small(trunk), **options)
    sharpen(agent)
    return agent


def collector_of(agent: ActorCritic, action_space: spaces.Space = DISCRETE, **options) -> RolloutCollector:
    return RolloutCollector(
        lambda: Scripted(ROWS, action_space), agent, **({"frames_per_batch": E * T} | options)
    )


def collect(collector: RolloutCollector, rollouts: int = R) -> list[TensorDict]:
    return [collector.rollout().clone() for _ in range(rollouts)]


def column(rollouts: list[TensorDict], key: str) -> Tensor:
    """One entry of the steps of all rollouts in a row, ``[E, R * T, ...]``."""
    return torch.cat([rollout[keys.STEPS, key] for rollout in rollouts], dim=1)


def written(steps: int = R * T) -> list[list[Step]]:
    """What the script says, by row."""
    return [list(itertools.islice(script(row, episodes), steps)) for row, episodes in enumerate(ROWS)]


# ------------------------------------------------------------------ alignment


def test_every_entry_follows_the_script() -> None:
    """Through the borders of rollouts; the observation after a reset is never reached by a transition."""
    rollouts = collect(collector_of(scripted_agent()))
    for key in ("observation", "reward", "terminated", "truncated", "is_init"):
        expected = [[getattr(step, key) for step in row] for row in written()]
        assert column(rollouts, key).tolist() == expected, key


def test_the_script_ends_where_it_hurts() -> None:
    """The rows above have what the tests below need, or they would test little."""
    ends = np.array([[step.terminated + 2 * step.truncated for step in row] for row in written()])
    last = ends[:, T - 1 :: T]  # the last step of each rollout
    assert {0, 1, 2} <= set(last.flatten())
    assert {0, 1, 2, 3} == set(ends.flatten())
    assert (ends[:, :T] == 0).all(axis=1).any()  # a row without an end in the first rollout


def test_episodes_are_told_where_they_end() -> None:
    rollouts = collect(collector_of(scripted_agent()))
    returns, lengths = column(rollouts, keys.EPISODE_RETURN), column(rollouts, keys.EPISODE_LENGTH)
    for row, steps in enumerate(written()):
        for t, step in enumerate(steps):
            told, length = returns[row, t].item(), lengths[row, t].item()
            if step.terminated or step.truncated:
                assert told == step.so_far
                assert length == step.last[2]
            else:
                assert isnan(told)
                assert isnan(length)
    assert column(rollouts, keys.EPISODE_SUCCESS).isnan().all()


def test_success_is_told_where_the_environment_tells_it() -> None:
    env = EnvConfig("lit_rl/Recall-v0", num_envs=4, kwargs={"delay": 1})
    collector = RolloutCollector(env.make, make_agent(env), frames_per_batch=4 * 30)
    steps = collector.rollout()[keys.STEPS]
    success, ended = steps[keys.EPISODE_SUCCESS], steps[keys.TERMINATED]
    assert ended.sum() == 40
    assert torch.equal(success[ended], steps[keys.REWARD][ended])
    assert set(success[ended].tolist()) == {0.0, 1.0}
    assert success[~ended].isnan().all()


def test_shapes_and_types() -> None:
    rollout = collector_of(scripted_agent(), sequence_length=2).rollout()
    steps = rollout[keys.STEPS]
    assert rollout.batch_size == (E,)
    assert steps.batch_size == (E, T)
    assert rollout[keys.TRUNK_STATE].batch_size == (E, T // 2)
    types = {key: tensor.dtype for key, tensor in steps.items()}
    flags = {keys.TERMINATED, keys.TRUNCATED, keys.IS_INIT}
    assert {key for key, dtype in types.items() if dtype == torch.bool} == flags
    assert types[keys.ACTION] == torch.int64
    assert {types[key] for key in types.keys() - flags - {keys.ACTION}} == {torch.float32}


# ------------------------------------------------------------------ the policy that acted


@pytest.mark.parametrize("trunk", ["mlp", "lstm"])
@pytest.mark.parametrize("value_trunk", ["shared", "separate"])
def test_log_prob_and_value_are_those_of_the_whole_history(trunk: str, value_trunk: str) -> None:
    agent = scripted_agent(trunk, value_trunk=value_trunk)
    rollouts = collect(collector_of(agent, sequence_length=4))
    with torch.no_grad():
        params, value, _ = agent(
            column(rollouts, keys.OBSERVATION), agent.initial_state(E), column(rollouts, keys.IS_INIT)
        )
        log_prob = agent.policy.log_prob(params, column(rollouts, keys.ACTION))
    torch.testing.assert_close(column(rollouts, keys.VALUE), value, atol=1e-5, rtol=0)
    torch.testing.assert_close(column(rollouts, keys.LOG_PROB), log_prob, atol=1e-5, rtol=0)
    assert log_prob.std() > 0.1


@pytest.mark.parametrize("action_space", [DISCRETE, BOX, spaces.MultiDiscrete([2, 3])], ids=str)
def test_one_call_acts_as_the_agent_does(action_space: spaces.Space, monkeypatch) -> None:
    """Policy and value of an MLP as one compiled call each, against the agent's own pass."""
    rollouts = []
    for may_fuse in (True, False):
        if not may_fuse:
            monkeypatch.setattr("lit_rl.collectors.rollout.fused", lambda *_: None)
        collector = collector_of(scripted_agent("mlp", action_space, value_trunk="separate"), action_space)
        rollouts.append(collect(collector))
        assert (collector._fused is not None) == may_fuse
    by_one_call, by_agent = rollouts
    for key in (keys.OBSERVATION, keys.IS_INIT, keys.TERMINATED, keys.REWARD):
        assert torch.equal(column(by_one_call, key), column(by_agent, key))
    for key in (keys.ACTION, keys.LOG_PROB, keys.VALUE, keys.NEXT_VALUE):
        torch.testing.assert_close(column(by_one_call, key), column(by_agent, key), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("squash", [False, True])
def test_the_environment_gets_the_action_in_its_units(squash: bool) -> None:
    """The rollout keeps what was sampled; only the environment's copy is clipped or squashed."""
    agent = scripted_agent(action_space=BOX, squash=squash)
    collector = collector_of(agent, BOX)
    sampled = column(collect(collector), keys.ACTION)
    given = torch.from_numpy(np.stack(collector.env.actions, axis=1))
    assert torch.equal(given, agent.to_env(sampled))
    assert (given.abs() <= 0.5).all()
    assert (sampled.abs() > 0.5).any()


# ------------------------------------------------------------------ memory


def next_value_by_hand(agent: ActorCritic, row: int) -> list[float]:
    """V after each step of a row: every episode replayed alone, from its start to its last observation."""
    values: list[float] = []
    steps = written(R * T + 30)[row]
    while len(values) < R * T:
        length = next(i for i, step in enumerate(steps) if step.terminated or step.truncated) + 1
        episode, steps = steps[:length], steps[length:]
        seen = torch.tensor([[step.observation for step in episode] + [episode[-1].last]])
        is_init = torch.zeros(1, length + 1, dtype=torch.bool)
        with torch.no_grad():
            after = agent(seen, agent.initial_state(1), is_init)[1][0, 1:].tolist()
        if episode[-1].terminated:
            after[-1] = 0.0
        values += after
    return values[: R * T]


@pytest.mark.parametrize("trunk", ["mlp", "gru"])
def test_next_value(trunk: str) -> None:
    """After a truncation V of the true last observation with its memory, 0 after a termination, and
    at the end of a rollout V of the observation that the next one begins with."""
    agent = scripted_agent(trunk)
    next_value = column(collect(collector_of(agent)), keys.NEXT_VALUE)
    for row in range(E):
        expected = next_value_by_hand(agent, row)
        assert next_value[row].tolist() == pytest.approx(expected, abs=1e-5), f"row {row}"
        assert len(set(np.round(expected, 4))) > 10  # values tell the steps apart


@pytest.mark.parametrize("sequence_length", [None, 8, 4, 1])
def test_trunk_state_is_that_of_the_whole_history(sequence_length: int | None) -> None:
    agent = scripted_agent()
    rollouts = collect(collector_of(agent, sequence_length=sequence_length))
    states = torch.cat([rollout[keys.TRUNK_STATE] for rollout in rollouts], dim=1)
    length = sequence_length or T
    assert states.shape == (E, R * T // length)
    observation, is_init = column(rollouts, keys.OBSERVATION), column(rollouts, keys.IS_INIT)
    assert not states["h"][:, 0].any()
    for k in range(1, states.shape[1]):
        with torch.no_grad():
            _, _, expected = agent(
                observation[:, : k * length], agent.initial_state(E), is_init[:, : k * length]
            )
        torch.testing.assert_close(states["h"][:, k], expected["h"], atol=1e-5, rtol=0)
        assert states["h"][:, k].abs().max() > 0.1


def test_memory_goes_on_in_the_next_rollout() -> None:
    """A row without an end: its memory at the second rollout's start is not zero, and matters."""
    agent = scripted_agent()
    _, second, _ = collect(collector_of(agent))
    row = 2
    steps = second[keys.STEPS][row : row + 1]
    given = (steps[keys.OBSERVATION], second[keys.TRUNK_STATE][row : row + 1, 0], steps[keys.IS_INIT])
    with torch.no_grad():
        replayed = agent(*given)[1]
        from_zero = agent(given[0], agent.initial_state(1), given[2])[1]
    torch.testing.assert_close(replayed, steps[keys.VALUE], atol=1e-5, rtol=0)
    assert (from_zero - steps[keys.VALUE]).abs().max() > 1e-3


def test_new_weights_act_at_once() -> None:
    agent = scripted_agent("mlp")
    collector = collector_of(agent)
    collector.rollout()
    with torch.no_grad():
        agent.value_head.bias.fill_(100.0)
    assert collector.rollout()[keys.STEPS, keys.VALUE].min() > 50


# ------------------------------------------------------------------ sizes, seeds, state


def test_total_frames() -> None:
    collector = collector_of(scripted_agent(), total_frames=3 * E * T)
    assert len([rollout.clone() for rollout in collector]) == 3
    assert list(collector) == []
    endless = iter(collector_of(scripted_agent()))
    assert sum(1 for _ in itertools.islice(endless, 5)) == 5


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(UserError, match=f"{E * T + 1} frames .* {E} environments"):
        collector_of(scripted_agent(), frames_per_batch=E * T + 1)
    with pytest.raises(UserError, match=f"sequence_length 3 .* {T}"):
        collector_of(scripted_agent(), sequence_length=3)


def test_buffers_are_reused() -> None:
    collector = collector_of(scripted_agent())
    first = collector.rollout()
    before = first[keys.STEPS, keys.OBSERVATION].clone()
    second = collector.rollout()
    assert not torch.equal(first[keys.STEPS, keys.OBSERVATION], before)
    assert first[keys.STEPS, keys.OBSERVATION].data_ptr() == second[keys.STEPS, keys.OBSERVATION].data_ptr()


def cartpole(seed: int, agent: ActorCritic | None = None) -> RolloutCollector:
    env = EnvConfig("CartPole-v1", num_envs=2)
    return RolloutCollector(env.make, agent or make_agent(env, "gru"), frames_per_batch=2 * 16, seed=seed)


def test_the_same_seed_gives_the_same_rollouts() -> None:
    torch.manual_seed(1)
    first = collect(cartpole(3), 2)
    torch.manual_seed(2)  # global random state has no part in it
    again = collect(cartpole(3), 2)
    for one, other in zip(first, again, strict=True):
        for key, tensor in one[keys.STEPS].items():
            torch.testing.assert_close(tensor, other[keys.STEPS, key], atol=0, rtol=0, equal_nan=True)


def test_another_seed_gives_other_environments_and_other_actions() -> None:
    one, other = (collect(cartpole(seed), 1)[0][keys.STEPS] for seed in (3, 4))
    starts = torch.cat([one[keys.OBSERVATION][:, 0], other[keys.OBSERVATION][:, 0]])
    assert len(starts.unique(dim=0)) == 4  # rows of neighbouring seeds share nothing
    agent = scripted_agent()
    actions = [column(collect(collector_of(agent, seed=seed)), keys.ACTION) for seed in (3, 4)]
    assert not torch.equal(*actions)


def test_set_seed_starts_anew() -> None:
    collector = cartpole(3)
    first = collect(collector, 2)
    assert collector.set_seed(3) == 5  # two environments
    again = collect(collector, 2)
    assert torch.equal(column(first, keys.OBSERVATION), column(again, keys.OBSERVATION))
    assert torch.equal(column(first, keys.ACTION), column(again, keys.ACTION))


def test_state_dict() -> None:
    agent = make_agent(EnvConfig("CartPole-v1", num_envs=2), "gru")
    collector = cartpole(3, agent)
    first = collect(collector, 2)
    saved = dict(collector.state_dict())
    assert saved["frames"] == 64
    resumed, twin = (cartpole(9, agent) for _ in range(2))  # the saved state decides, not the new seed
    for other in (resumed, twin):
        other.load_state_dict(saved)
        assert other.state_dict()["frames"] == 64
        assert other.state_dict()["steps"] == saved["steps"] == 32  # which errors name
        assert torch.equal(other.state_dict()["generator"], saved["generator"])
    after, again = collect(resumed, 1), collect(twin, 1)
    assert torch.equal(column(after, keys.OBSERVATION), column(again, keys.OBSERVATION))
    assert torch.equal(column(after, keys.ACTION), column(again, keys.ACTION))
    assert column(after, keys.IS_INIT)[:, 0].all()
    start = column(after, keys.OBSERVATION)[:, 0]
    assert not torch.isin(start, column(first, keys.OBSERVATION)).any()  # other episodes than before


def test_a_state_of_another_kind_of_device_gives_other_random_numbers_but_the_same_each_time() -> None:
    """A random state on CUDA is of 16 bytes."""
    agent = make_agent(EnvConfig("CartPole-v1", num_envs=2))
    collectors = [cartpole(3, agent) for _ in range(2)]
    for collector in collectors:
        saved = collector.state_dict() | {"frames": 64, "generator": torch.zeros(16, dtype=torch.uint8)}
        collector.load_state_dict(saved)
    of_start = column(collect(cartpole(3, agent), 1), keys.ACTION)
    one, other = (column(collect(collector, 1), keys.ACTION) for collector in collectors)
    assert torch.equal(one, other)
    assert not torch.equal(one, of_start)


def test_resuming_elsewhere_starts_other_episodes() -> None:
    """Environments are seeded anew by the seed and the frame count of the saved run."""
    agent = make_agent(EnvConfig("CartPole-v1", num_envs=2))
    starts = []
    for seed, rollouts in ((3, 1), (3, 2), (4, 1)):
        collector = cartpole(seed, agent)
        collect(collector, rollouts)
        collector.load_state_dict(collector.state_dict())
        starts.append(column(collect(collector, 1), keys.OBSERVATION)[:, 0])
    assert len(torch.cat(starts).unique(dim=0)) == 6


# ------------------------------------------------------------------ other spaces


def test_dict_observations() -> None:
    env = EnvConfig("lit_rl/Dict-v0", num_envs=3, kwargs={"length": 4})
    agent = make_agent(env, "gru")
    rollouts = collect(RolloutCollector(env.make, agent, frames_per_batch=3 * 6), 2)
    observation = column(rollouts, keys.OBSERVATION)
    assert set(observation.keys()) == {"cells", "position", "symbol"}
    assert observation["cells"].shape == (3, 12, 2)
    assert observation["position"][0, :, 0].tolist() == [0, 0.25, 0.5, 0.75] * 3
    with torch.no_grad():
        _, value, _ = agent(observation, agent.initial_state(3), column(rollouts, keys.IS_INIT))
    torch.testing.assert_close(column(rollouts, keys.VALUE), value, atol=1e-5, rtol=0)
    # The final observation of a truncated Dict episode: position 1.0, which no stored step ever shows.
    cut = column(rollouts, keys.TRUNCATED)
    assert cut.sum() == 9
    assert (column(rollouts, keys.NEXT_VALUE)[cut] != 0).all()


# ------------------------------------------------------------------ faults


def test_an_environment_that_raises_names_itself_and_the_step() -> None:
    env = EnvConfig("lit_rl/Fault-v0", num_envs=2, kwargs={"after": 5})
    collector = RolloutCollector(env.make, make_agent(env), frames_per_batch=2 * 4)
    collector.rollout()
    with pytest.raises(UserError, match=r"lit_rl/Fault-v0.*5 steps") as error:
        collector.rollout()
    assert "\n" not in str(error.value)


def test_observations_that_are_not_finite() -> None:
    env = EnvConfig("lit_rl/NaN-v0", num_envs=2, kwargs={"after": 5})
    collector = RolloutCollector(env.make, make_agent(env), frames_per_batch=2 * 4)
    collector.rollout()
    with pytest.raises(UserError, match=r"environment 0 of lit_rl/NaN-v0 is not finite at step 6") as error:
        collector.rollout()
    assert "\n" not in str(error.value)


class Broken(Scripted):
    """Gives what is not finite at the step number `at`: as a reward, or as an episode's last observation."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__(ROWS, DISCRETE)
        self.what, self.at = what, at

    def step(self, actions: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, info = super().step(actions)
        if len(self.actions) == self.at and self.what == "reward":
            reward[1] = np.inf
        if len(self.actions) == self.at and self.what == "last":
            info["final_obs"][0, 2] = np.nan
        if info and self.what == "unused":
            info["final_obs"][~(terminated | truncated)] = np.nan
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize(("what", "row", "at"), [("reward", 1, 11), ("last", 0, 3)])
def test_rewards_and_last_observations_that_are_not_finite(what: str, row: int, at: int) -> None:
    agent = scripted_agent()
    collector = RolloutCollector(lambda: Broken(what, at), agent, frames_per_batch=E * T)
    with pytest.raises(UserError, match=f"environment {row} of Broken is not finite at step {at}"):
        collect(collector)


def test_rows_that_did_not_end_have_no_last_observation() -> None:
    agent = scripted_agent()
    clean = collect(collector_of(agent))
    broken = collect(RolloutCollector(lambda: Broken("unused", 0), agent, frames_per_batch=E * T))
    assert torch.equal(column(clean, keys.NEXT_VALUE), column(broken, keys.NEXT_VALUE))


# ------------------------------------------------------------------ TorchRL


class Modes(gym.Env):
    """Writes down under what it is stepped."""

    observation_space, action_space = spaces.Box(-1, 1, (3,)), DISCRETE

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        product = torch.ones(1, 1) @ torch.ones(1, 1, requires_grad=True)
        self.seen = (torch.is_inference_mode_enabled(), product.dtype)
        return np.zeros(3, np.float32), 0.0, False, False, {}


def test_precision_of_the_policy_is_not_for_the_environment() -> None:
    """One that computes with torch, and differentiates."""
    collector = RolloutCollector(
        lambda: SyncVectorEnv([Modes], autoreset_mode=AutoresetMode.SAME_STEP),
        scripted_agent(),
        frames_per_batch=2,
        context=partial(torch.autocast, "cpu", torch.bfloat16),
    )
    collector.rollout()
    assert collector.env.envs[0].seen == (False, torch.float32)


def test_it_is_a_torchrl_collector() -> None:
    collector = collector_of(scripted_agent())
    assert isinstance(collector, BaseCollector)
    assert collector.next()[keys.STEPS].batch_size == (E, T)
    collector.shutdown()


def test_postproc_takes_a_transform_or_a_function() -> None:
    rename = RenameTransform(in_keys=[(keys.STEPS, "reward")], out_keys=[(keys.STEPS, "paid")])
    steps = collector_of(scripted_agent(), postproc=rename).rollout()[keys.STEPS]
    assert {"paid", "reward"} & set(steps.keys()) == {"paid"}
    mark = collector_of(scripted_agent(), postproc=lambda rollout: rollout.set("seen", torch.ones(E)))
    rollout = mark.rollout()
    assert rollout["seen"].sum() == E


def test_given_weights_are_copied_in() -> None:
    agent, other = scripted_agent(), scripted_agent()
    with torch.no_grad():
        other.value_head.bias.fill_(100.0)
    collector = collector_of(agent)
    collector.update_policy_weights_()  # the policy is the caller's own: nothing to do
    assert collector.rollout()[keys.STEPS, keys.VALUE].max() < 50
    collector.update_policy_weights_(other)
    assert collector.rollout()[keys.STEPS, keys.VALUE].min() > 50
    assert agent.value_head.bias is not other.value_head.bias


def test_a_torchrl_environment_with_transforms() -> None:
    """Observations come through TorchRL's transform, and memory and ends through the collector."""
    make = lambda: GymEnv("CartPole-v1")  # noqa: E731
    env = TransformedEnv(
        SerialEnv(2, make), TorchRLObservationNorm(loc=1.0, scale=10.0, in_keys=["observation"])
    )
    batched = as_vector_env(env, seed=0)
    torch.manual_seed(0)
    agent = ActorCritic(batched.single_observation_space, batched.single_action_space, small("gru"))
    rollouts = collect(RolloutCollector(lambda: batched, agent, frames_per_batch=2 * 40), 2)
    observation, is_init = column(rollouts, keys.OBSERVATION), column(rollouts, keys.IS_INIT)
    starts = observation[is_init]
    assert len(starts) > 2
    assert ((starts - 1).abs() <= 0.5).all()  # CartPole starts within 0.05, here 1 + 10 x
    # CartPole's own physics through the transform: x' = x + 0.02 v, but where an episode ended
    x = (observation - 1) / 10
    predicted = x[:, :-1, 0] + 0.02 * x[:, :-1, 1]
    within = ~is_init[:, 1:]
    torch.testing.assert_close(x[:, 1:, 0][within], predicted[within], atol=1e-5, rtol=0)
    assert torch.equal(is_init[:, 1:], column(rollouts, keys.TERMINATED)[:, :-1])
    with torch.no_grad():
        _, value, _ = agent(observation, agent.initial_state(2), is_init)
    torch.testing.assert_close(column(rollouts, keys.VALUE), value, atol=1e-5, rtol=0)

"""The collector of windows: against streams written out in plain Python, memory against one pass.

Shapes: E environments, T steps a block, W windows of L steps (with those that only follow).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from helpers import Scripted, counter, pictures, script, small
from tensordict import TensorDict

from lit_rl import keys
from lit_rl.collectors import WindowCollector
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.models.q_network import QNetwork

# Episodes shorter and longer than windows; several ends in a row; both ends at once.
ROWS = [
    [(3, "terminated"), (5, "truncated"), (1, "truncated"), (1, "truncated"), (7, "both"), (1, "terminated")],
    [(8, "truncated"), (1, "truncated"), (1, "both"), (1, "terminated"), (2, "truncated")],
    [(19, "truncated"), (2, "terminated"), (40, "terminated")],
]
STEPS = 56  # of each environment: 56 blocks of 1, 14 of 4, 8 of 7
DISCRETE = spaces.Discrete(3)


@dataclass
class Entry:
    """A step of a stream."""

    observation: Any
    is_init: bool
    has_action: bool
    action: int = 0
    reward: float = 0.0
    terminated: bool = False


Stream = list[Entry]


class Recorder(VectorWrapper):
    """Writes down the stream of each row; `streams` has one more list of them for each reset."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self.streams: list[list[Stream]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        observation, info = self.env.reset(**kwargs)
        self.streams.append([[] for _ in range(self.num_envs)])
        self.now, self.is_init = copied(observation), np.ones(self.num_envs, bool)
        return observation, info

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict]:
        observation, reward, terminated, truncated, info = self.env.step(actions)
        for row, stream in enumerate(self.streams[-1]):
            stream.append(
                Entry(
                    row_of(self.now, row),
                    bool(self.is_init[row]),
                    True,
                    int(actions[row]),
                    float(reward[row]),
                    bool(terminated[row]),
                )
            )
            if truncated[row] and not terminated[row]:
                stream.append(Entry(row_of(info["final_obs"], row), False, False))
        self.now, self.is_init = copied(observation), terminated | truncated
        return observation, reward, terminated, truncated, info


def copied(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: value.copy() for key, value in observation.items()}
    return observation.copy()


def row_of(observation: Any, row: int) -> Any:
    if isinstance(observation, dict):
        return {key: np.array(value[row]) for key, value in observation.items()}
    return np.array(observation[row])


def agent_of(trunk: str = "mlp", env: Any = Scripted, **options: Any) -> QNetwork:
    """Its actions depend on what it sees, and are sometimes drawn."""
    torch.manual_seed(0)
    space = getattr(env, "single_action_space", DISCRETE)
    agent = QNetwork(env.single_observation_space, space, small(trunk), ExpectedQ, **options)
    agent.exploration_rate = 0.5
    return agent


def collector_of(
    agent: QNetwork,
    rows: Sequence[Any] = ROWS,
    block: int = 4,
    action_space: spaces.Space = DISCRETE,
    **options,
) -> WindowCollector:
    make = lambda: Recorder(Scripted(rows, action_space))  # noqa: E731
    return WindowCollector(make, agent, frames_per_batch=len(rows) * block, **options)


def collect(collector: WindowCollector, steps: int = STEPS) -> list[TensorDict]:
    """The windows of each block."""
    return [collector.rollout()[keys.WINDOWS] for _ in range(steps // collector.num_steps)]


def starts_of(stream: Stream, window: int, lookahead: int, stride: int, unlearnt: int) -> Iterator[int]:
    """Where windows start: the definition, in plain Python."""
    for start in range(0, len(stream) - window - lookahead + 1, stride):
        if any(entry.has_action for entry in stream[start + unlearnt : start + window]):
            yield start


def window_of(stream: Stream, start: int, length: int) -> dict[str, Any]:
    entries = stream[start : start + length]
    columns = {key: [getattr(entry, key) for entry in entries] for key in FLAT}
    return columns | {"observation": [plain(entry.observation) for entry in entries]}


FLAT = ("is_init", "has_action", "action", "reward", "terminated")


def plain(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: np.asarray(value).tolist() for key, value in observation.items()}
    return np.asarray(observation).tolist()


def plain_windows(windows: TensorDict) -> list[dict[str, Any]]:
    """Windows as `window_of` writes them."""
    steps = windows[keys.STEPS]
    columns = {key: steps[key].tolist() for key in FLAT}
    observation = steps[keys.OBSERVATION]
    if isinstance(observation, TensorDict):
        parts = {key: value.tolist() for key, value in observation.items()}
        told = [
            [{key: parts[key][w][t] for key in parts} for t in range(steps.shape[1])]
            for w in range(len(steps))
        ]
    else:
        told = observation.tolist()
    return [{key: columns[key][w] for key in FLAT} | {"observation": told[w]} for w in range(len(windows))]


def expected(streams: list[Stream], **shape: int) -> list[list[dict[str, Any]]]:
    """By row."""
    length = shape["window"] + shape["lookahead"]
    return [[window_of(stream, start, length) for start in starts_of(stream, **shape)] for stream in streams]


def shape_of(window: int, lookahead: int = 1, stride: int = 1, unlearnt: int = 0) -> dict[str, int]:
    return {"window": window, "lookahead": lookahead, "stride": stride, "unlearnt": unlearnt}


# ------------------------------------------------------------------ which steps are in which windows

SHAPES = [
    shape_of(1, lookahead=3),
    shape_of(4, stride=1),
    shape_of(4, lookahead=2, stride=3, unlearnt=3),
    shape_of(10, lookahead=2, stride=4, unlearnt=2),
    shape_of(10, lookahead=5, stride=10),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("E", [1, 3])
def test_every_window_once_and_as_soon_as_it_is_complete(E: int, block: int, shape: dict[str, int]) -> None:
    """All entries of all windows, the rows one after the other within a block."""
    collector = collector_of(agent_of(), ROWS[:E], block, **shape)
    env: Recorder = collector.env
    told = [0] * E
    for _ in range(STEPS // block):
        windows = plain_windows(collector.rollout()[keys.WINDOWS])
        complete = expected(env.streams[-1], **shape)
        new = [window for row in range(E) for window in complete[row][told[row] :]]
        assert windows == new
        told = [len(windows) for windows in complete]
    assert min(told) > 0
    kept = collector._observation.shape[1]
    if block < 7 and shape["window"] < 10:
        assert kept < STEPS  # or old steps were never dropped, and this would not test that


def test_the_streams_are_what_the_script_says() -> None:
    """What the tests compare with is right, and has what hurts."""
    collector = collector_of(agent_of())
    collect(collector)
    kinds = set()
    for row, stream in enumerate(collector.env.streams[-1]):
        entries = iter(stream)
        for _, step in zip(range(STEPS), script(row, ROWS[row]), strict=False):
            entry = next(entries)
            assert entry.observation.tolist() == step.observation
            assert (entry.is_init, entry.has_action, entry.reward) == (step.is_init, True, step.reward)
            assert entry.terminated == step.terminated  # both at once: a termination
            if step.truncated and not step.terminated:
                entry = next(entries)
                assert entry.observation.tolist() == step.last
                assert entry == Entry(entry.observation, is_init=False, has_action=False)
            kinds.add((step.terminated, step.truncated))
        assert next(entries, None) is None
    assert len(kinds) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"stride": 5}, "stride is 5: it must be at least 1 and at most 4"),
        ({"unlearnt": 4}, "unlearnt is 4: it must be at least 0 and at most 3"),
        ({"lookahead": 0}, "lookahead is 0: it must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collector_of(agent_of(), [[(1000, "terminated")]], **(shape_of(4) | sizes))


@pytest.mark.parametrize(("window", "stride"), [(4, 1), (4, 3), (5, 5)])
def test_every_acted_step_is_learnt_from_as_often_as_it_should(window: int, stride: int) -> None:
    """Adjacent windows have each step once; a stride of 1 has it `window` times; ends of the run aside."""
    collector = collector_of(agent_of(), [[(1000, "terminated")]], **shape_of(window, stride=stride))
    seen = torch.cat([w[keys.STEPS, keys.OBSERVATION][:, :window, 2].flatten() for w in collect(collector)])
    counts = torch.bincount(seen.long())
    inner = counts[window : STEPS - 2 * window]
    if stride in (1, window):
        assert (inner == window // stride).all()
    else:
        assert set(inner.tolist()) == {1, 2}


def test_windows_without_any_action_to_learn_from_are_left_out() -> None:
    """Episodes of one step, truncated: every second step of the stream has no action."""
    rows, shape = [[(1, "truncated")]], shape_of(2, stride=2, unlearnt=1)
    collector = collector_of(agent_of(), rows, **shape)
    assert sum(map(len, collect(collector))) == 0
    collector = collector_of(agent_of(), rows, **(shape | {"unlearnt": 0}))
    windows = torch.cat(collect(collector))
    assert len(windows) > 40
    assert windows[keys.STEPS, keys.HAS_ACTION].tolist() == [[True, False, True]] * len(windows)


def test_actions_are_counted_from_0_and_given_in_the_environments_numbers() -> None:
    space = spaces.Discrete(3, start=5)
    agent = QNetwork(Scripted.single_observation_space, space, small("mlp"), ExpectedQ)
    agent.exploration_rate = 1.0
    collector = collector_of(agent, [[(1000, "terminated")]], action_space=space, **shape_of(1))
    kept = torch.cat([windows[keys.STEPS, keys.ACTION][:, 0] for windows in collect(collector)])
    given = np.concatenate(collector.env.unwrapped.actions)[: len(kept)]
    assert (given - 5).tolist() == kept.tolist()
    assert set(kept.tolist()) == {0, 1, 2}


def test_actions_that_the_environment_changes_are_kept_as_they_were() -> None:
    class Rude(Scripted):
        def step(self, actions: np.ndarray) -> Any:
            result = super().step(actions)
            actions[:] = 77
            return result

    agent = agent_of()
    collector = WindowCollector(
        lambda: Recorder(Rude(ROWS, DISCRETE)), agent, frames_per_batch=len(ROWS) * 4, **shape_of(2)
    )
    kept = torch.cat([windows[keys.STEPS, keys.ACTION].flatten() for windows in collect(collector)])
    assert kept.max() == 2


def test_episodes_are_told() -> None:
    collector = collector_of(agent_of(), block=7, **shape_of(3))
    batches = [collector.rollout() for _ in range(STEPS // 7)]
    assert batches[0][keys.EPISODES].batch_size == (3, 7)
    returns = torch.cat([batch[keys.EPISODES, keys.EPISODE_RETURN].clone() for batch in batches[-1:]], 1)
    for row in range(3):
        steps = [step for _, step in zip(range(STEPS), script(row, ROWS[row]), strict=False)][-7:]
        ended = [step.so_far if step.terminated or step.truncated else None for step in steps]
        assert [None if np.isnan(value) else value for value in returns[row].tolist()] == ended


# ------------------------------------------------------------------ resets

SHAPE = shape_of(5, lookahead=2, stride=2)


def anew(collector: WindowCollector, how: str) -> None:
    if how == "reset":
        collector.reset()
    else:
        collector.load_state_dict(collector.state_dict())


@pytest.mark.parametrize("how", ["reset", "load_state_dict"])
def test_no_window_crosses_a_reset_of_the_simulators(how: str) -> None:
    collector = collector_of(agent_of("lstm"), with_state=True, **SHAPE)
    before = collect(collector, 24)
    anew(collector, how)
    after = collect(collector, 24)
    first, second = collector.env.streams[-2:]
    for windows, streams in ((before, first), (after, second)):
        by_row = [window for row in expected(streams, **SHAPE) for window in row]
        told = [window for part in windows for window in plain_windows(part)]
        key = str
        assert sorted(told, key=key) == sorted(by_row, key=key)
    opening = torch.cat(after)
    opening = opening[(opening[keys.STEPS, keys.OBSERVATION][:, 0, 1:] == 0).all(-1)]  # episode 0, t 0
    assert len(opening) == len(ROWS)
    assert opening[keys.STEPS, keys.IS_INIT][:, 0].all()
    for leaf in opening[keys.TRUNK_STATE].values():
        assert not leaf.any()


def test_a_saved_state_gives_the_same_windows_again() -> None:
    agent = agent_of("lstm")
    collector = collector_of(agent, with_state=True, with_latent=True, **SHAPE)
    collect(collector, 12)
    saved = dict(collector.state_dict())
    again = []
    for seed in (3, 4):  # the saved state decides, not the new seed
        other = collector_of(agent, with_state=True, with_latent=True, seed=seed, **SHAPE)
        other.load_state_dict(saved)
        assert other.state_dict()["frames"] == 12 * len(ROWS)
        again.append(torch.cat(collect(other, 24)))
    assert (again[0] == again[1]).all()


# ------------------------------------------------------------------ memory

MEMORY_SHAPES = [
    shape_of(1),
    shape_of(4, lookahead=2, stride=3),
    shape_of(10, lookahead=1, stride=1, unlearnt=3),
]


def tensors(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """A stream as one sequence, ``[1, T, ...]``."""
    observation = torch.from_numpy(np.stack([entry.observation for entry in stream]))
    return observation[None], torch.tensor([[entry.is_init for entry in stream]])


def one_pass(agent: QNetwork, stream: Stream) -> tuple[torch.Tensor, list[TensorDict]]:
    """Latents ``[T, D]`` of one pass over the stream, and the memory before each of its steps."""
    observation, is_init = tensors(stream)
    trunk = agent.windowed or agent.trunk
    with torch.no_grad():
        features = agent.encoder(observation)
        latents, _ = trunk(features, trunk.initial_state(1), is_init)
        states = [agent.initial_state(1)]
        for t in range(len(stream)):
            states.append(trunk(features[:, : t + 1], trunk.initial_state(1), is_init[:, : t + 1])[1])
    return latents[0], states


@pytest.mark.parametrize("shape", MEMORY_SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
@pytest.mark.parametrize("trunk", ["lstm", "mlp", "windowed"])
@pytest.mark.parametrize("block", [1, 4])
def test_memory_and_latents_are_those_of_one_pass(trunk: str, block: int, shape: dict[str, int]) -> None:
    """Of the frozen network over the whole stream, the observations without an action included."""
    is_windowed = trunk == "windowed"
    agent = agent_of("lstm" if is_windowed else trunk, acting_window=shape["window"] if is_windowed else None)
    keeps_state = trunk == "lstm"
    collector = collector_of(agent, block=block, with_state=keeps_state, with_latent=True, **shape)
    by_row: list[list[TensorDict]] = [[] for _ in ROWS]
    for windows in collect(collector):
        for window in windows:
            by_row[int(window[keys.STEPS, keys.OBSERVATION][0, 0])].append(window)
    length = shape["window"] + shape["lookahead"]
    at_resets = 0
    for row, stream in enumerate(collector.env.streams[-1]):
        latents, states = one_pass(agent, stream)
        starts = list(starts_of(stream, **shape))
        assert len(by_row[row]) == len(starts)
        for start, window in zip(starts, by_row[row], strict=True):
            kept = window[keys.STEPS, keys.LATENT]
            torch.testing.assert_close(kept, latents[start : start + length], atol=1e-5, rtol=0)
            if not keeps_state:
                continue
            if stream[start].is_init:  # whatever is kept there is reset
                at_resets += 1
            else:
                for key, value in states[start].items():
                    torch.testing.assert_close(
                        window[keys.TRUNK_STATE, key], value[0], atol=1e-5, rtol=0, msg=f"{key} at {start}"
                    )
            replayed = learnt(agent, window[None])
            torch.testing.assert_close(replayed[0], kept, atol=1e-5, rtol=0)
    assert not keeps_state or at_resets > 5
    assert latents.std() > 0.05


@pytest.mark.parametrize("options", [{}, {"exploration": "softmax"}, {"encoder_width": 5}], ids=str)
def test_one_call_acts_as_the_agent_does(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents and action values of an MLP as one compiled call, against the agent's own pass."""
    collected = []
    for may_fuse in (True, False):
        if not may_fuse:
            monkeypatch.setattr("lit_rl.collectors.windows.fused_q", lambda *_: None)
        collector = collector_of(agent_of("mlp", **options), with_latent=True)
        collected.append(torch.cat(collect(collector))[keys.STEPS])
        assert (collector._fused is not None) == may_fuse
    by_one_call, by_agent = collected
    assert (~by_agent[keys.HAS_ACTION]).any()
    assert len(by_agent[keys.ACTION].unique()) == 3
    for key in (keys.OBSERVATION, keys.ACTION, keys.REWARD, keys.TERMINATED, keys.IS_INIT, keys.HAS_ACTION):
        assert torch.equal(by_one_call[key], by_agent[key]), key
    torch.testing.assert_close(by_one_call[keys.LATENT], by_agent[keys.LATENT], atol=1e-5, rtol=1e-5)


def learnt(agent: QNetwork, windows: TensorDict, state: TensorDict | None = None) -> torch.Tensor:
    """Latents ``[W, L, D]`` as a learner finds them."""
    steps = windows[keys.STEPS]
    state = windows[keys.TRUNK_STATE] if state is None else state
    with torch.no_grad():
        return agent(steps[keys.OBSERVATION], state, steps[keys.IS_INIT])[1]


def test_what_is_kept_matters() -> None:
    """Negative control: from an empty memory, windows within an episode have other latents."""
    agent = agent_of("lstm")
    collector = collector_of(agent, [[(1000, "terminated")]], with_state=True, with_latent=True, **SHAPE)
    windows = torch.cat(collect(collector))
    empty = learnt(agent, windows, agent.initial_state(len(windows)))
    distance = (empty - windows[keys.STEPS, keys.LATENT]).abs().amax((1, 2))
    assert distance[0] < 1e-5  # the first window does start from there
    assert (distance[1:] > 1e-3).all()


# ------------------------------------------------------------------ other observations


@pytest.mark.parametrize(
    "config",
    [EnvConfig("lit_rl/Dict-v0", num_envs=2), pictures(), counter()],
    ids=["dict", "images", "numbers"],
)
def test_observations_of_every_kind(config: EnvConfig) -> None:
    env = Recorder(config.make())
    agent, shape = agent_of(env=env), shape_of(3, lookahead=2, stride=2)
    collector = WindowCollector(lambda: env, agent, frames_per_batch=2 * 4, seed=1, with_latent=True, **shape)
    told = 0
    types = {}
    for _ in range(7):
        windows = collector.rollout()[keys.WINDOWS]
        told += len(windows)
        steps = windows[keys.STEPS]
        types = {key: steps[key].dtype for key in FLAT}
        complete = [window for row in expected(env.streams[-1], **shape) for window in row]
        for window in plain_windows(windows):
            assert complete.count(window) >= 1
    assert told == len(complete)
    assert len({str(window) for window in complete}) > 10
    flags = {"is_init", "has_action", "terminated"}
    assert {key for key, dtype in types.items() if dtype == torch.bool} == flags
    assert types["action"] == torch.int64
    space = env.single_observation_space
    for key, part in space.spaces.items() if isinstance(space, spaces.Dict) else [((), space)]:
        leaf = steps[keys.OBSERVATION] if key == () else steps[keys.OBSERVATION, key]
        assert leaf.dtype == torch.from_numpy(np.zeros(0, part.dtype)).dtype


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize("what", ["reward", "observation", "last"])
def test_what_is_not_finite_ends_the_run(what: str) -> None:
    class Broken(Scripted):
        def step(self, actions: np.ndarray) -> Any:
            observation, reward, terminated, truncated, info = super().step(actions)
            if len(self.actions) == 8:  # the end of row 1's first episode
                broken = {"reward": reward, "observation": observation}.get(what, info["final_obs"])
                broken[1] = np.nan
            return observation, reward, terminated, truncated, info

    collector = WindowCollector(
        lambda: Broken(ROWS, DISCRETE), agent_of(), frames_per_batch=len(ROWS) * 4, **SHAPE
    )
    collector.rollout()
    with pytest.raises(UserError, match="environment 1 of Broken is not finite at step 8"):
        collector.rollout()

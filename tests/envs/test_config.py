"""`EnvConfig`: what it makes, and the one line for each thing that it cannot."""

import subprocess
import sys
from typing import Any

import gymnasium as gym
import jsonargparse
import numpy as np
import pytest
from gymnasium import spaces

from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError

BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"id": "CartPol-v1"}, ["unknown environment 'CartPol-v1'", "CartPole-v1"]),
    ({"id": "CartPole-v9"}, ["CartPole-v1"]),
    ({"id": "MiniGrid-MemoryS12-v0"}, ["MiniGrid-MemoryS11-v0"]),
    ({"id": "ALE/Pnog-v5"}, ["ALE/Pong-v5"]),
    ({"id": "no such id"}, ["no such id"]),
    ({"id": "nobody/Nothing-v0"}, ["nobody/Nothing-v0"]),
    ({"id": "no_such_module:Env-v0"}, ["no_such_module"]),
    ({"id": "Pong", "backend": "envpool"}, ["unknown environment 'Pong'", "Pong-v5"]),
    ({"num_envs": 0}, ["env.num_envs is 0", "at least 1"]),
    ({"frame_stack": 0}, ["env.frame_stack", "at least 1"]),
    ({"reward_delay": -1}, ["env.reward_delay", "at least 0"]),
    ({"observation_noise": -0.1}, ["env.observation_noise", "at least 0"]),
    ({"observation_noise": float("nan")}, ["env.observation_noise"]),
    ({"time_limit": 0}, ["env.time_limit", "at least 1"]),
    ({"backend": "isaac"}, ["env.backend", "envpool"]),
    ({"vectorization": "threads"}, ["env.vectorization", "async"]),
    ({"kwargs": {"no_such_option": 1}}, ["no_such_option", "env.kwargs"]),
    ({"kwargs": {"no_such_option": 1}, "vectorization": "async"}, ["no_such_option", "env.kwargs"]),
    ({"kwargs": {"no_such_option": 1}, "backend": "envpool"}, ["no_such_option", "env.kwargs"]),
    ({"backend": "envpool", "kwargs": {"max_episode_steps": "x"}}, ["CartPole-v1", "env.kwargs"]),
    ({"backend": "envpool", "kwargs": {"batch_size": 2}}, ["batch_size"]),
    ({"backend": "envpool", "vectorization": "async"}, ["env.vectorization"]),
    ({"backend": "envpool", "wrappers": ["gymnasium.wrappers.ClipAction"]}, ["env.wrappers", "gymnasium"]),
    ({"id": "HalfCheetah-v5", "mask_velocity": True}, ["env.mask_velocity", "HalfCheetah-v5", "CartPole"]),
    ({"id": "CartPole-v1", "view_size": 3}, ["env.view_size", "MiniGrid", "CartPole-v1"]),
    ({"id": "MiniGrid-Empty-5x5-v0", "view_size": 4}, ["env.view_size is 4", "3, 5 or 7"]),
    ({"id": "MiniGrid-Empty-5x5-v0", "kwargs": {"agent_view_size": 3}}, ["agent_view_size", "env.view_size"]),
    ({"id": "MiniGrid-Empty-5x5-v0", "observation_noise": 0.1}, ["env.observation_noise", "none"]),
    ({"actions": [0, 2]}, ["env.actions [0, 2]", "0 to 1"]),
    ({"actions": []}, ["env.actions []"]),
    ({"actions": [1, 1]}, ["each once"]),
    ({"id": "Pendulum-v1", "actions": [0]}, ["env.actions", "Discrete", "Pendulum-v1"]),
    ({"id": "Blackjack-v1"}, ["Blackjack-v1", "unsupported observation space", "Tuple"]),
    ({"wrappers": ["no.such.Wrapper"]}, ["no.such.Wrapper"]),
    ({"wrappers": ["gymnasium.wrappers.NoSuch"]}, ["gymnasium.wrappers.NoSuch"]),
    ({"wrappers": ["NoDots"]}, ["NoDots"]),
    ({"wrappers": [{"path": "x"}]}, ["class_path"]),
    ({"wrappers": [{"class_path": "gymnasium.wrappers.ClipAction"}]}, ["ClipAction"]),
    ({"wrappers": [{"class_path": "gymnasium.wrappers.TimeLimit", "init_args": {"x": 1}}]}, ["init_args"]),
    ({"wrappers": ["gymnasium.wrappers.RescaleAction"]}, ["RescaleAction"]),
]


@pytest.mark.parametrize(("options", "parts"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_bad_value_is_one_line(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        EnvConfig(**options).make()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


class Odd(gym.Env):
    """Spaces that nothing here has a form for, as its options say."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space


BOX = spaces.Box(0.0, 1.0, (2,))
ODD = {
    "Text": (spaces.Text(5), BOX),
    "Graph": (spaces.Graph(BOX, None), BOX),
    "Sequence": (spaces.Sequence(BOX), BOX),
    "Dict": (spaces.Dict({"deep": spaces.Dict({"x": BOX})}), BOX),
    "Discrete": (spaces.Discrete(3, start=1), BOX),
    "Tuple": (BOX, spaces.Tuple([BOX])),
    "MultiBinary": (BOX, spaces.MultiBinary((3, 2))),
    "Box": (BOX, spaces.Box(0, 5, (2,), np.int64)),
}


@pytest.mark.parametrize("name", ODD)
def test_an_unsupported_space_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gym.envs.registration.EnvSpec(f"Odd{name}-v0", entry_point=lambda: Odd(*ODD[name]))
    monkeypatch.setitem(gym.registry, spec.id, spec)
    with pytest.raises(UserError, match=rf"Odd{name}-v0: unsupported \w+ space.*{name}") as caught:
        EnvConfig(spec.id).spaces()
    assert "\n" not in str(caught.value)


def test_actions_that_do_not_start_at_zero_are_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo(gym.Env):
        observation_space = BOX
        action_space = spaces.Discrete(3, start=-1)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
            return np.zeros(2, np.float32), {}

        def step(self, action: Any) -> tuple:
            return np.zeros(2, np.float32), float(action), False, False, {}

    spec = gym.envs.registration.EnvSpec("Echo-v0", entry_point=Echo)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    env = EnvConfig("Echo-v0", num_envs=3).make()
    assert env.single_action_space == spaces.Discrete(3)
    env.reset()
    assert env.step(np.array([0, 1, 2]))[1].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("envpool", {"backend": "envpool"}, "lit-rl[envpool]"),
        ("ale_py", {"id": "ALE/Pong-v5"}, "lit-rl[atari]"),
        ("cv2", {"id": "ALE/Pong-v5"}, "lit-rl[atari]"),
    ],
)
def test_a_missing_extra_names_the_command(
    module: str, options: dict[str, Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(UserError, match="pip install") as caught:
        EnvConfig(**options).make()
    assert f"pip install '{extra}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_backends_are_imported_only_when_chosen() -> None:
    heavy = "envpool minigrid mujoco ale_py cv2 Box2D torch"
    code = (
        "import sys; from lit_rl.envs import EnvConfig; EnvConfig().make().reset();"
        f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


IDS = [
    "CartPole-v1",
    "FrozenLake-v1",
    "LunarLander-v3",
    "BipedalWalker-v3",
    "HalfCheetah-v4",
    "HalfCheetah-v5",
    "Walker2d-v5",
    "MiniGrid-MemoryS9-v0",
    "MiniGrid-DoorKey-5x5-v0",
    "ALE/Pong-v5",
]


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
@pytest.mark.parametrize("env_id", IDS)
def test_ids_make_and_step_within_their_spaces(env_id: str, backend: str) -> None:
    config = EnvConfig(env_id, num_envs=2, backend=backend)
    env = config.make(seed=0)
    assert (env.single_observation_space, env.single_action_space) == config.spaces()
    obs, _ = env.reset()
    assert obs in env.observation_space
    for _ in range(10):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert obs in env.observation_space
        assert reward.shape == terminated.shape == truncated.shape == (2,)
        assert terminated.dtype == truncated.dtype == np.bool_
    env.close()


def test_both_backends_have_the_same_spaces() -> None:
    for env_id in ("CartPole-v1", "HalfCheetah-v5", "MiniGrid-MemoryS9-v0", "ALE/Pong-v5"):
        ours, theirs = EnvConfig(env_id).spaces(), EnvConfig(env_id, backend="envpool").spaces()
        for one, other in zip(ours, theirs, strict=True):
            assert type(one) is type(other)
            assert one.shape == other.shape
            assert one.dtype == other.dtype


def test_atari_is_one_grey_frame_of_84_by_84_and_four_are_stacked() -> None:
    for backend in ("gymnasium", "envpool"):
        space, _ = EnvConfig("ALE/Pong-v5", backend=backend, frame_stack=4).spaces()
        assert space == spaces.Box(0, 255, (4, 84, 84), np.uint8)


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5", "MiniGrid-MemoryS9-v0", "ALE/Pong-v5"])
def test_time_limit_truncates_at_its_step(env_id: str, backend: str) -> None:
    # MiniGrid: turning on the spot, as a goal reached would end the episode first
    actions = [0] if env_id.startswith("MiniGrid") else None
    env = EnvConfig(env_id, num_envs=2, backend=backend, time_limit=7, actions=actions).make(seed=0)
    env.reset()
    cut = []
    for _ in range(21):
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        assert not terminated.any()
        assert truncated.all() == truncated.any() == bool(info)
        cut.append(truncated.all())
    assert np.flatnonzero(cut).tolist() == [6, 13, 20]


@pytest.mark.parametrize(
    ("env_id", "options", "steps"),
    [
        ("CartPole-v1", {}, 500),
        ("CartPole-v1", {"time_limit": 7}, 7),
        ("CartPole-v1", {"vectorization": "async"}, 500),
        ("CartPole-v1", {"backend": "envpool"}, 500),
        ("MiniGrid-MemoryS11-v0", {}, 605),
        ("MiniGrid-MemoryS11-v0", {"backend": "envpool", "time_limit": 9}, 9),
        ("highway-fast-v0", {"kwargs": {"config": {"duration": 20, "policy_frequency": 2}}}, 40),
        ("highway-fast-v0", {"backend": "envpool"}, 30),
        ("lit_rl/Counter-v0", {"kwargs": {"lengths": [2]}}, None),
    ],
)
def test_an_episodes_limit_is_known(env_id: str, options: dict[str, Any], steps: int | None) -> None:
    assert EnvConfig(env_id, **options).episode_limit == steps


def test_wrappers_wrap_each_row_in_order() -> None:
    rescaled = {
        "class_path": "gymnasium.wrappers.RescaleAction",
        "init_args": {"min_action": -1, "max_action": 1},
    }
    config = EnvConfig("Pendulum-v1", num_envs=2, wrappers=[rescaled, "gymnasium.wrappers.ClipAction"])
    _, action = config.spaces()
    assert np.isinf(action.high).all()  # ClipAction is the outer one
    env, plain = config.make(seed=0), EnvConfig("Pendulum-v1", num_envs=2).make(seed=0)
    env.reset(), plain.reset()
    np.testing.assert_allclose(
        env.step(np.full((2, 1), 5.0, np.float32))[0], plain.step(np.full((2, 1), 2.0, np.float32))[0]
    )


def test_render_gives_a_frame_for_each_row() -> None:
    env = EnvConfig("MiniGrid-Empty-5x5-v0", num_envs=2).make(seed=0, render_mode="rgb_array")
    env.reset()
    frames = env.render()
    assert len(frames) == 2
    assert frames[0].ndim == 3
    with pytest.raises(UserError, match=r"env\.backend: gymnasium"):
        EnvConfig(backend="envpool").make(render_mode="rgb_array")


def test_the_command_line_and_yaml_reach_every_field() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--env", type=EnvConfig)
    words = [
        "--env.id=Pendulum-v1",
        "--env.num_envs=3",
        "--env.kwargs.g=9.0",
        "--env.time_limit=50",
        "--env.actions=null",
        "--env.wrappers=[{class_path: gymnasium.wrappers.RescaleAction, "
        "init_args: {min_action: -1.0, max_action: 1.0}}, gymnasium.wrappers.TimeAwareObservation]",
    ]
    parsed = parser.parse_args(words)
    again = parser.parse_string(parser.dump(parsed))
    config = parser.instantiate_classes(again).env
    assert isinstance(config, EnvConfig)
    assert (config.id, config.num_envs, config.kwargs, config.time_limit) == (
        "Pendulum-v1",
        3,
        {"g": 9.0},
        50,
    )
    _, action = config.spaces()
    assert action == spaces.Box(-1.0, 1.0, (1,), np.float32)
    with pytest.raises((SystemExit, jsonargparse.ArgumentError)):
        parser.parse_args(["--env.frames=3"])

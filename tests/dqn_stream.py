"""A stream of scripted episodes, what DQN makes of windows of it, and what the equations say of it.

The reference knows no windows: it goes through whole episodes step by step, in plain Python.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from helpers import Scripted, Step, script, small, window_loss
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.algorithms.dqn import LitDQN
from lit_rl.collectors import WindowCollector
from lit_rl.data.window_replay import Drawn
from lit_rl.models.q_heads import ExpectedQ
from lit_rl.models.q_network import QNetwork

GAMMA = 0.9
SCALE = np.array([0.5, 0.125, 0.125], np.float32)  # powers of two: what was seen tells exactly where it was
REWARD_SCALE = 1 / 16  # that of the script grows
ROWS = [
    [(3, "terminated"), (5, "truncated"), (1, "truncated"), (8, "terminated")],
    [(1, "terminated"), (4, "truncated"), (2, "both"), (7, "truncated")],
    [(40, "truncated"), (2, "terminated")],
]

Place = tuple[int, int, int]  # row, episode, step of the episode


class Stream(Scripted):
    """Rows of episodes of known lengths and ends, seen as numbers of order one that tell all steps apart."""

    single_observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self) -> None:
        super().__init__(ROWS, spaces.Discrete(3))

    def _seen(self, name: str) -> np.ndarray:
        return super()._seen(name) * SCALE

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        observation, reward, *rest = super().step(actions)
        return observation, reward * REWARD_SCALE, *rest


class Told(ExpectedQ):
    """Keeps what it was told to learn: predicted values and targets ``[M, L]``."""

    def loss(self, predicted: Tensor, reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
        self.told = predicted.squeeze(-1), reward + discount * bootstrap.squeeze(-1)
        return super().loss(predicted, reward, discount, bootstrap)


@torch.no_grad()
def make(trunk: str, *, algorithm: type[LitDQN] = LitDQN, **options: Any) -> LitDQN:
    """A learner whose memory has some weight, and whose target network has another head.

    Of another trunk windows cannot tell the memory: they start from that of the network that acted.
    """
    torch.manual_seed(0)
    env = SimpleNamespace(id="stream", spaces=lambda: (Stream.single_observation_space, spaces.Discrete(3)))
    model = algorithm(env, small(trunk), Told, gamma=GAMMA, **options)
    model.agent.update_normalization(torch.tensor([0.5, 0.1, 0.4]) + torch.rand(9, 3))
    for parameter in model.agent.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    model.target.load_state_dict(model.agent.state_dict())
    for parameter in model.target.head.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    model.agent.exploration_rate = 0.5
    return model


def collect(model: LitDQN, stride: int = 1, blocks: int = 6, steps: int = 7) -> tuple[Stream, TensorDict]:
    """What the model's agent lived through, and the windows of it."""
    env = Stream()
    frames = env.num_envs * steps
    shape = model.window_shape._asdict()
    collector = WindowCollector(lambda: env, model.agent, **shape, stride=stride, frames_per_batch=frames)
    return env, torch.cat([collector.rollout()[keys.WINDOWS] for _ in range(blocks)])


def loss_of(model: LitDQN, windows: TensorDict) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return window_loss(model, Drawn(windows, torch.ones(len(windows)), torch.arange(len(windows))))


def passed(model: LitDQN, windows: TensorDict) -> tuple[Tensor, Tensor]:
    """Action values and latents ``[M, L, ...]`` of whole windows."""
    steps, agent = windows[keys.STEPS][:, : model.loss.window], model.agent
    state = windows.get(keys.TRUNK_STATE, None)
    state = agent.trunk.initial_state(len(windows)) if state is None else state
    out, latent, _ = agent(steps[keys.OBSERVATION], state, steps[keys.IS_INIT])
    return agent.head.values(out), latent


def taught(model: LitDQN, windows: TensorDict) -> dict[Place, list[tuple[float, float]]]:
    """Predicted value and target wherever an action was taken in a step with a loss, window by window."""
    loss_of(model, windows)
    steps = windows[keys.STEPS][:, model.loss.window - model.loss.loss_steps : model.loss.window]
    places = (steps[keys.OBSERVATION].numpy() / SCALE).astype(int)
    found: dict[Place, list[tuple[float, float]]] = {}
    for m, i in np.argwhere(steps[keys.HAS_ACTION].numpy()):
        predicted, target = (numbers[m, i].item() for numbers in model.agent.head.told)
        found.setdefault(tuple(places[m, i].tolist()), []).append((predicted, target))
    return found


# ------------------------------------------------------------------ the reference


def episodes_of(env: Stream) -> Iterator[tuple[list[Step], list[int]]]:
    """Every episode of every row: its steps and the actions taken; the last of a row is not over."""
    for row, lengths in enumerate(env.rows):
        steps: list[Step] = []
        actions: list[int] = []
        for step, taken in zip(script(row, lengths), env.actions, strict=False):
            steps.append(step)
            actions.append(int(taken[row]))
            if step.terminated or step.truncated:
                yield steps, actions
                steps, actions = [], []
        if steps:
            yield steps, actions


@torch.no_grad()
def values_along(network: QNetwork, steps: list[Step]) -> list[list[float]]:
    """Action values at each observation of one episode, the true last one included."""
    observations = [step.observation for step in steps] + [steps[-1].last]
    state = network.trunk.initial_state(1)
    values = []
    for t, observation in enumerate(observations):
        seen = torch.tensor(np.array(observation, np.float32) * SCALE)[None, None]
        out, _, state = network(seen, state, torch.tensor([[t == 0]]))
        values.append(network.head.values(out)[0, 0].tolist())
    return values


Values = Callable[[QNetwork, int], list[float]]  # action values at a step of one episode


def equations(
    model: LitDQN,
    steps: list[Step],
    t: int,
    action: int,
    predicted: Values,
    bootstrap: Values,
    *,
    truncation_ends: bool = False,
) -> tuple[float, float]:
    """Predicted value and target of step t, as the equations say it."""
    total, k = 0.0, 0
    while k < model.loss.n_step and t + k < len(steps):
        total += GAMMA**k * steps[t + k].reward * REWARD_SCALE
        k += 1
    if not (t + k == len(steps) and (steps[-1].terminated or (truncation_ends and steps[-1].truncated))):
        best = int(np.argmax(bootstrap(model.agent if model.loss.double else model.target, t + k)))
        total += GAMMA**k * bootstrap(model.target, t + k)[best]
    return predicted(model.agent, t)[action], total


def _value_along(along: dict[QNetwork, list[list[float]]], network: QNetwork, t: int) -> list[float]:
    return along[network][t]


def reference(
    model: LitDQN, env: Stream, *, truncation_ends: bool = False
) -> dict[Place, tuple[float, float]]:
    """Predicted value and target of every step, from passes over whole episodes."""
    expected = {}
    for steps, actions in episodes_of(env):
        along = {network: values_along(network, steps) for network in (model.agent, model.target)}
        values = partial(_value_along, along)
        for t, action in enumerate(actions):
            place = tuple(map(int, steps[t].observation))
            expected[place] = equations(
                model, steps, t, action, values, values, truncation_ends=truncation_ends
            )
    return expected


def worst(found: dict[Place, list[tuple[float, float]]], expected: dict[Place, tuple[float, float]]) -> float:
    """The largest deviation of a predicted value or target; these are up to 20."""
    pairs = [(pair, expected[place]) for place, pairs in found.items() for pair in pairs]
    return float(np.abs(np.array([np.subtract(*pair) for pair in pairs])).max())


def worst_of_windows(model: LitDQN, env: Stream, windows: TensorDict, *, longer: int = 0) -> float:
    """The largest deviation where every value is one of a window, and those to bootstrap from are of windows
    that begin n steps later; of longer ones by so many steps, to compare."""
    episodes = list(episodes_of(env))
    places = {
        tuple(map(int, steps[t].observation)): (number, t)
        for number, (steps, actions) in enumerate(episodes)
        for t in range(len(actions))
    }

    @functools.cache
    @torch.no_grad()
    def values_from(number: int, begin: int, network: QNetwork, t: int) -> list[float]:
        """At step t of an episode, of the observations since step `begin` and an empty memory."""
        steps, _ = episodes[number]
        observations = [step.observation for step in steps] + [steps[-1].last]
        seen = torch.tensor(np.array(observations[max(0, begin) : t + 1], np.float32) * SCALE)[None]
        nothing_begins = torch.zeros(seen.shape[:2], dtype=torch.bool)
        out, _, _ = network(seen, network.trunk.initial_state(1), nothing_begins)
        return network.head.values(out)[0, -1].tolist()

    loss_of(model, windows)
    told, first, deviations = model.agent.head.told, model.loss.window - model.loss.loss_steps, []
    acted = windows[keys.STEPS, keys.HAS_ACTION][:, first : model.loss.window]
    for m, i in np.argwhere(acted.numpy()):
        observation = windows[keys.STEPS, keys.OBSERVATION][m, first + i].numpy() / SCALE
        number, t = places[tuple(observation.astype(int).tolist())]
        steps, actions = episodes[number]
        begin = t - int(first + i)
        of_window = partial(values_from, number, begin)
        of_later_window = partial(values_from, number, begin + model.loss.n_step - longer)
        expected = equations(model, steps, t, actions[t], of_window, of_later_window)
        deviations += np.subtract([numbers[m, i].item() for numbers in told], expected).tolist()
    return float(np.abs(deviations).max())

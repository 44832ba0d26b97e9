"""DQN on windows of a stream, held to the stream itself: targets, contexts of memory, stored latents."""

from typing import Any

import numpy as np
import pytest
import torch
from dqn_stream import (
    GAMMA,
    ROWS,
    collect,
    episodes_of,
    loss_of,
    make,
    passed,
    reference,
    taught,
    worst,
    worst_of_windows,
)
from helpers import installed_trunks
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.algorithms.window_loss import LEAST_PRIORITY

torch.set_num_threads(1)

TRUNKS = [name for name in ("mlp", "lstm", "mamba2", "transformer") if name in installed_trunks()]
WITH_MEMORY = [name for name in TRUNKS if name != "mlp"]

# ------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("stride", "options"),
    [
        (1, {"window": 6}),
        (6, {"window": 6, "n_step": 3}),
        (4, {"window": 9, "n_step": 3, "burn_in": 3}),
        (2, {"window": 2, "double": False}),
        (1, {"window": 1, "n_step": 3}),
        (3, {"window": 5, "burn_in": 1, "normalize_observation": True}),
    ],
    ids=["every step", "adjacent, n=3", "burn-in, n=3", "not double", "single steps, n=3", "normalised"],
)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_windows_teach_what_the_stream_teaches(trunk: str, stride: int, options: dict[str, Any]) -> None:
    model = make(trunk, context="stored", **options)
    env, windows = collect(model, stride)
    found, expected = taught(model, windows), reference(model, env)
    assert worst(found, expected) < 1e-5
    if stride == 1:  # every step, but for the last few of each row and what burn-in leaves out
        assert len(found) > len(expected) - len(ROWS) * (model.loss.window + model.loss.n_step)
    at_end = {(*map(int, s[-1].observation),): s[-1] for s, _ in episodes_of(env)}
    ends = [at_end[place] for place in found if place in at_end]
    assert {(step.terminated, step.truncated) for step in ends} >= {
        (True, False),
        (False, True),
        (True, True),
    }


@pytest.mark.parametrize("trunk", installed_trunks())
def test_every_trunk_is_taught_right(trunk: str) -> None:
    model = make(trunk, context="stored", window=7, burn_in=2, n_step=2)
    env, windows = collect(model, 3)
    assert worst(taught(model, windows), reference(model, env)) < 1e-5


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_truncation_is_no_termination(trunk: str, n_step: int) -> None:
    model = make(trunk, context="stored", window=6, n_step=n_step)
    env, windows = collect(model)
    assert worst(taught(model, windows), reference(model, env, truncation_ends=True)) > 1e-2


@pytest.mark.parametrize("trunk", WITH_MEMORY)
def test_windows_from_an_empty_memory_teach_something_else(trunk: str) -> None:
    model = make(trunk, context="stored", window=6)
    env, windows = collect(model)
    empty = windows.exclude(keys.TRUNK_STATE)
    assert worst(taught(model, empty), reference(model, env)) > 1e-2


@pytest.mark.parametrize("trunk", WITH_MEMORY)
def test_resets_inside_windows_count(trunk: str) -> None:
    model = make(trunk, context="stored", window=6)
    env, windows = collect(model)
    windows[keys.STEPS, keys.IS_INIT].zero_()
    assert worst(taught(model, windows), reference(model, env)) > 1e-2


# ------------------------------------------------------------------ contexts


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("trunk", installed_trunks())
def test_acting_on_a_window_is_learning_on_it(trunk: str, window: int) -> None:
    """The last step of a window: memory is empty at its start, for either."""
    model = make(trunk, context="window", window=window, loss_steps=1, latents=True)
    _, windows = collect(model, blocks=3)
    values, latent = passed(model, windows)
    acting = windows[keys.STEPS, keys.LATENT][:, window - 1]
    torch.testing.assert_close(latent[:, -1], acting, atol=1e-5, rtol=0)
    acting_values = model.agent.head.values(model.agent.of_latent(acting))
    torch.testing.assert_close(values[:, -1], acting_values, atol=1e-5, rtol=0)
    _, _, measured = loss_of(model, windows)
    assert measured["drift"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 5, "loss_steps": 1},
        {"window": 4, "double": False},
        {"window": 4, "loss_steps": 2, "n_step": 2},
        {"window": 5, "loss_steps": 1, "n_step": 3, "burn_in": 2},
    ],
    ids=["one step", "loss on the last", "loss on all, not double", "on two, n=2", "burn-in, n=3"],
)
@pytest.mark.parametrize("trunk", installed_trunks())
def test_windows_bootstrap_from_windows(trunk: str, options: dict[str, Any]) -> None:
    """From values of windows that begin n steps later, not of longer ones, which nothing is learnt of."""
    model = make(trunk, context="window", **options)
    env, windows = collect(model, blocks=3)
    assert worst_of_windows(model, env, windows) < 1e-5
    if trunk != "mlp":
        assert worst_of_windows(model, env, windows, longer=1) > 1e-4


@pytest.mark.parametrize("trunk", WITH_MEMORY)
def test_windows_reach_back_for_ends_of_episodes(trunk: str) -> None:
    """With a loss on all steps, n of them ahead, a cut may come before the later window begins."""
    model = make(trunk, context="window", window=4, n_step=3, double=False)
    _, windows = collect(model)
    loss_of(model, windows)
    steps = windows[keys.STEPS]
    cut = ~steps[keys.HAS_ACTION][:, 1] & ~steps[keys.TERMINATED][:, 0] & steps[keys.HAS_ACTION][:, 0]
    assert cut.any()
    with torch.no_grad():
        later = windows[keys.STEPS][cut][:, 1:]
        out, _, _ = model.target(
            later[keys.OBSERVATION], model.target.trunk.initial_state(len(later)), later[keys.IS_INIT]
        )
    best = model.target.head.values(out)[:, 0].amax(-1)
    _, target = model.agent.head.told
    torch.testing.assert_close(target[cut, 0], steps[cut][keys.REWARD][:, 0] + GAMMA * best)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("trunk", WITH_MEMORY)
def test_memory_carried_into_a_window_is_not_its_own(trunk: str, window: int) -> None:
    """Negative control: an agent that carries memory along, and windows that start without."""
    model = make(trunk, context="stored", window=window, loss_steps=1, latents=True)
    _, windows = collect(model, blocks=3)
    _, _, measured = loss_of(model, windows.exclude(keys.TRUNK_STATE))
    assert measured["drift"] > 1e-3


def test_what_is_kept_depends_on_the_context() -> None:
    def state(trunk: str, context: str) -> bool:
        return keys.TRUNK_STATE in collect(make(trunk, context=context, window=3), blocks=2)[1]

    assert state("lstm", "stored")
    assert not state("lstm", "window")
    assert not state("mlp", "stored")


def test_the_target_network_has_a_window_of_its_own() -> None:
    model = make("lstm", context="window", window=4)
    assert model.target.windowed._trunk[0] is model.target.trunk
    assert model.target.trunk is not model.agent.trunk


# ------------------------------------------------------------------ stored latents


@pytest.mark.parametrize("trunk", installed_trunks())
def test_stored_latents_are_those_of_acting(trunk: str) -> None:
    """With ``context: stored`` every step, the true last observations included."""
    model = make(trunk, context="stored", window=6, n_step=2, latents=True)
    _, windows = collect(model, 4)
    _, latent = passed(model, windows)
    torch.testing.assert_close(latent, windows[keys.STEPS, keys.LATENT][:, :6], atol=1e-5, rtol=0)
    assert not windows[keys.STEPS, keys.HAS_ACTION].all()


@pytest.mark.parametrize("trunk", TRUNKS)
def test_drift_is_how_far_the_network_has_moved(trunk: str) -> None:
    model = make(trunk, context="stored", window=6, burn_in=2, latents=True)
    _, windows = collect(model)
    loss, _, before = loss_of(model, windows)
    assert before["drift"].item() == pytest.approx(0.0, abs=1e-5)
    assert before["delta_q"].item() == pytest.approx(0.0, abs=1e-5)
    optimizer = model.configure_optimizers()
    loss.backward()
    optimizer.step()
    _, _, after = loss_of(model, windows)
    assert after["drift"] > 1e-3
    assert after["delta_q"] > 1e-5


@pytest.mark.parametrize("loss_steps", [4, 2])
def test_delta_q_is_relative_to_the_largest_value(loss_steps: int) -> None:
    """Of the steps with a loss."""
    model = make("lstm", context="stored", window=4, loss_steps=loss_steps, latents=True)
    _, windows = collect(model)
    stored = windows[keys.STEPS, keys.LATENT]
    stored += torch.randn_like(stored)
    _, _, measured = loss_of(model, windows)
    head, expected, drifts = model.agent.head, [], []
    values, latent = passed(model, windows)
    learnt = slice(4 - loss_steps, 4)
    for m in range(len(windows)):
        now = values[m, learnt]
        was = head.values(head(stored[m, learnt]))
        acted = windows[keys.STEPS, keys.HAS_ACTION][m, learnt]
        expected += ((now - was).square().sum(-1).sqrt() / now.max().abs())[acted].tolist()
        drifts.append((latent[m, learnt] - stored[m, learnt]).square().sum(-1).sqrt()[acted].mean().item())
    assert measured["delta_q"].item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert measured["drift"].item() == pytest.approx(np.mean(drifts), rel=1e-5)


def test_drift_enters_the_priority_by_its_share() -> None:
    def priority(share: float) -> tuple[Tensor, float]:
        model = make("lstm", context="stored", window=4, latents=True, latent_priority=share)
        _, windows = collect(model)
        stored = windows[keys.STEPS, keys.LATENT]
        stored += torch.randn(stored.shape, generator=torch.Generator().manual_seed(1))
        _, priority, measured = loss_of(model, windows)
        return priority - LEAST_PRIORITY, measured["drift"].item()

    error, _ = priority(0.0)
    drift, mean = priority(1.0)
    assert drift.mean().item() == pytest.approx(mean, rel=1e-5)
    assert (error - drift).abs().mean() > 1e-2
    torch.testing.assert_close(priority(0.3)[0], 0.7 * error + 0.3 * drift)


@pytest.mark.parametrize("context", ["stored", "window"])
@pytest.mark.parametrize("latent_targets", [True, False])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_latents_may_stand_for_what_follows_the_window(
    trunk: str, latent_targets: bool, context: str
) -> None:
    options = {"context": context, "window": 4, "burn_in": 1, "n_step": 2, "latents": True}
    model = make(trunk, **options, latent_targets=latent_targets)
    env, windows = collect(model)
    if context == "stored":  # else values are of windows, not of the whole episode
        assert worst(taught(model, windows), reference(model, env)) < 1e-5

    def targets(of: TensorDict) -> Tensor:
        loss_of(model, of)
        return model.agent.head.told[1]

    before = targets(windows)
    for key in (keys.LATENT, keys.OBSERVATION):
        other = windows.clone()
        other[keys.STEPS, key][:, 4:] += 1.0
        moved = (targets(other) != before).any(0).tolist()
        is_used = latent_targets == (key == keys.LATENT)
        assert moved == ([False, True, True] if is_used else [False] * 3)  # the last n_step of them


def test_stored_latents_get_no_gradient_and_give_none() -> None:
    model = make("lstm", context="stored", window=3, latents=True, latent_targets=True)
    _, windows = collect(model)
    windows[keys.STEPS, keys.LATENT].requires_grad_()
    loss_of(model, windows)[0].backward()
    assert windows[keys.STEPS, keys.LATENT].grad is None
    assert all(parameter.grad is None for parameter in model.target.parameters())


def test_stored_latents_are_heard_in_float32() -> None:
    """Else an unchanged network would seem to have moved under mixed precision."""
    model = make("mlp", context="stored", window=3, latents=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, windows = collect(model)
        _, _, measured = loss_of(model, windows)
    assert measured["drift"] == 0.0
    assert measured["delta_q"] == 0.0

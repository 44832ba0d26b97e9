"""DQN as a whole: the target network, schedules, guards, and toys that it learns."""

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import Q_HEADS, Records, counter, make_trainer, parameters, pictures, walk
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.algorithms import dqn
from lit_rl.algorithms.dqn import LitDQN
from lit_rl.algorithms.fused_dqn import FusedTDLoss
from lit_rl.algorithms.window_loss import Lesson, Prediction
from lit_rl.data import ReplayDataModule
from lit_rl.data.window_replay import Drawn, WindowReplay
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.models.q_heads import CategoricalQ, ExpectedQ, QuantileQ
from lit_rl.models.q_network import QNetwork
from lit_rl.trunks import LSTM, MLP

torch.set_num_threads(1)

# ------------------------------------------------------------------ whole runs


class Look(L.Callback):
    """After each block: frames, exploration, and all weights of both networks."""

    def __init__(self) -> None:
        self.frames: list[int] = []
        self.exploration: list[float] = []
        self.online: list[Tensor] = []
        self.target: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        self._look(model)

    def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, *rest: Any) -> None:
        self._look(model)

    def _look(self, model: Any) -> None:
        self.frames.append(model.frames)
        self.exploration.append(model.agent.exploration_rate)
        self.online.append(parameters(model.agent))
        self.target.append(parameters(model.target))


def train(
    env: EnvConfig,
    trunk: Any = MLP,
    head: Any = None,
    *,
    algorithm: type[LitDQN] = LitDQN,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[LitDQN, ReplayDataModule, Look, Records]:
    """A short run; learning starts at once unless told otherwise."""
    torch.manual_seed(seed)
    usual = {"total_frames": 160, "learning_starts": 0, "batch_size": 8, "log_frames": 16}
    model = algorithm(env, trunk, head, **(usual | options))
    replay = ReplayDataModule(env, seed=seed, save_replay=False, **(data or {}))
    look, records = Look(), Records()
    make_trainer(callbacks=[look], logger=records, **(trainer or {})).fit(model, replay)
    return model, replay, look, records


def test_the_target_network_is_copied_every_so_many_frames() -> None:
    """Blocks of 16 frames: at 48 for 40, 80 for 80, 128 for 120, 160 for 160."""
    _, _, look, _ = train(walk(), target_update_frames=40)
    moved = [
        frames
        for frames, (was, now) in zip(look.frames[1:], pairwise(look.target), strict=True)
        if not was.equal(now)
    ]
    assert moved == [48, 80, 128, 160]
    for frames, online, target in zip(look.frames, look.online, look.target, strict=True):
        assert torch.equal(online, target) == (frames in (0, 48, 80, 128, 160))


def test_the_target_network_follows_by_its_share() -> None:
    _, _, look, _ = train(walk(), tau=0.25, target_update_frames=40, lr=1e-2)
    for (was, now), online in zip(pairwise(look.target), look.online[1:], strict=True):
        torch.testing.assert_close(now, 0.75 * was + 0.25 * online)
    assert not look.target[-1].equal(look.online[-1])


@pytest.mark.parametrize("exploration", ["epsilon_greedy", "softmax"])
def test_exploration_falls_linearly(exploration: Any) -> None:
    options = {"exploration_initial": 0.9, "exploration_final": 0.1, "exploration_frames": 64}
    _, _, look, records = train(walk(), exploration=exploration, **options)
    assert look.exploration[:6] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1])
    assert records.series("train/exploration")[:5] == pytest.approx([0.7, 0.5, 0.3, 0.1, 0.1])


def test_learning_rates_reach_their_parameters() -> None:
    for still in ("trunk.", "head."):
        rates = {"lr": 1e-2, "trunk_lr": 0.0} if still == "trunk." else {"lr": 0.0, "trunk_lr": 1e-2}
        torch.manual_seed(0)
        before = dict(LitDQN(walk(), MLP).agent.named_parameters())
        model, _, _, _ = train(walk(), **rates)
        for name, parameter in model.agent.named_parameters():
            assert torch.equal(parameter, before[name]) == name.startswith(still), name


def test_learning_rates_fall_to_nothing() -> None:
    _, _, _, records = train(walk(), lr=1e-2, trunk_lr=1e-3, anneal_lr=True, total_frames=64)
    assert records.series("train/lr") == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0.0])
    assert records.series("train/trunk_lr") == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0.0])


def test_importance_weights_correct_more_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    betas: list[float] = []
    sample = WindowReplay.sample

    def spy(replay: WindowReplay, size: int, *, beta: float) -> Drawn:
        betas.append(beta)
        return sample(replay, size, beta=beta)

    monkeypatch.setattr(WindowReplay, "sample", spy)
    prioritized = {"priority_exponent": 0.6}
    train(walk(), total_frames=64, beta=0.2, beta_final=0.6, data=prioritized, updates_per_block=2)
    assert betas == pytest.approx([0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.6, 0.6])


@pytest.mark.parametrize("double", [False, True])
def test_updates_may_share_a_lesson(double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where windows are drawn uniformly and the target network stands still, nothing depends on it."""
    options = {"updates_per_block": 6, "window": 3, "n_step": 2, "double": double, "lr": 1e-2}
    drawn: list[int] = []
    ends = []
    sample = WindowReplay.sample

    def spy(replay: WindowReplay, size: int, **options: Any) -> Drawn:
        drawn.append(size)
        return sample(replay, size, **options)

    monkeypatch.setattr(WindowReplay, "sample", spy)
    for steps_a_lesson in (8 * (3 + 2), 4 * 8 * (3 + 2)):
        monkeypatch.setattr(dqn, "STEPS_A_LESSON", steps_a_lesson)
        model, _, look, _ = train(walk(), LSTM, **options, total_frames=64)
        ends.append(parameters(model.agent))
        assert not ends[-1].equal(look.online[0])
    assert drawn == [8] * 18 + [32, 16] * 3  # in all blocks but the first, which holds no whole window
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    "options",
    [
        {"double": True},
        {"double": False, "updates_per_block": 3, "weight_decay": 0.1, "n_step": 2},
        {"tau": 0.1, "encoder_width": 5, "normalize_observation": True},
        {"data": {"priority_exponent": 0.6}, "window": 4, "loss_steps": 2},
    ],
    ids=str,
)
def test_training_is_the_same_without_autograd(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a perceptron, to what rounding makes of it."""
    called: list[FusedTDLoss] = []
    call = FusedTDLoss.__call__

    def counting(self: FusedTDLoss, lesson: Lesson) -> Prediction:
        called.append(self)
        return call(self, lesson)

    monkeypatch.setattr(FusedTDLoss, "__call__", counting)
    options = {"lr": 1e-2, "anneal_lr": True, "max_grad_norm": 0.1} | options
    model, _, look, records = train(walk(), **options)
    assert len(called) == model.trainer.global_step > 5
    assert not look.online[0].equal(look.online[-1])
    monkeypatch.setattr(LitDQN, "_fused_loss", lambda self: None)
    other, _, _, others = train(walk(), **options)
    assert len(called) == model.trainer.global_step
    torch.testing.assert_close(parameters(model.agent), parameters(other.agent), atol=1e-4, rtol=1e-3)
    for key in ("td_loss", "td_error", "q", "grad_norm"):
        assert records.series(f"train/{key}") == pytest.approx(others.series(f"train/{key}"), rel=1e-3), key


def test_lessons_that_compiled_loops_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a perceptron, but with weights in float64: autograd learns from them."""
    sample = WindowReplay.sample

    def in_float64(self: WindowReplay, *args: Any, **options: Any) -> Drawn:
        drawn = sample(self, *args, **options)
        return drawn._replace(weight=drawn.weight.double())

    called: list[FusedTDLoss] = []
    call = FusedTDLoss.__call__
    monkeypatch.setattr(
        FusedTDLoss, "__call__", lambda self, lesson: called.append(self) or call(self, lesson)
    )
    monkeypatch.setattr(WindowReplay, "sample", in_float64)
    model, _, look, _ = train(walk(), lr=1e-2)
    assert not called
    assert model.trainer.global_step > 5
    assert not look.online[0].equal(look.online[-1])


class Counting(MLP):
    """Has a buffer that moves: the batches that it has learnt from."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, d_model=8)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        self.batches += torch.is_grad_enabled()
        return super().forward(x, state, is_init)


@pytest.mark.parametrize("tau", [None, 0.1])
def test_buffers_of_the_trunk_are_followed(tau: float | None) -> None:
    model, _, _, _ = train(walk(), Counting, tau=tau, target_update_frames=160)
    assert model.target.trunk.batches == model.agent.trunk.batches == model.trainer.global_step > 5


@pytest.mark.parametrize("activation", ["tanh", "silu"], ids=["without autograd", "autograd"])
def test_a_head_put_in_later_learns_like_any(activation: str) -> None:
    """Its gradient is clipped, and gone after the step."""

    class Replaced(LitDQN):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.agent.head.last = nn.Linear(64, 3)
            self.before = self.agent.head.last.bias.detach().clone()

    model, _, _, _ = train(
        walk(), partial(MLP, activation=activation), algorithm=Replaced, max_grad_norm=1e-9
    )
    moved = (model.agent.head.last.bias - model.before).abs().max()
    assert 0 < moved < 1e-3  # Adam's step would be of 1e-3 a time, but for its epsilon beside such gradients
    assert all(parameter.grad is None for parameter in model.agent.parameters())


def test_updates_are_counted() -> None:
    """10 blocks, of which those from 48 frames on are learnt from, three times each."""
    model, _, look, _ = train(walk(), learning_starts=48, updates_per_block=3)
    assert model.trainer.global_step == 3 * 8
    [count] = {int(state["step"]) for state in model.trainer.optimizers[0].state.values()}
    assert count == 3 * 8
    assert [now.equal(look.online[0]) for now in look.online] == [True] * 3 + [False] * 8


def test_ranks_begin_to_learn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no window yet takes no step: none does, or they would wait for each other for ever."""
    others = [0, 0, 0, 0, 2, 5]  # before the first block, and after each
    monkeypatch.setattr(dqn, "gather_list", lambda mine: [*mine, others.pop(0)])
    model, _, look, _ = train(walk())
    assert [now.equal(look.online[0]) for now in look.online] == [True] * 4 + [False] * 7
    assert others == [5]  # once all have some they need not be asked again
    assert model.trainer.global_step == 7


def test_observations_are_normalised_for_both_networks() -> None:
    model, _, _, _ = train(walk(), normalize_observation=True, window=2)
    [norm] = model.agent.norms
    assert norm.count > 100
    assert model.target.norms is model.agent.norms
    assert 0.1 < norm.var.min() < norm.var.max() < 1.0  # sines


def test_ranks_normalise_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 9 + 1 steps is complete in the third block of 4, in another process in the first."""
    updates: list[int] = []
    monkeypatch.setattr(
        QNetwork, "update_normalization", lambda self, observation: updates.append(len(observation))
    )
    options = {"normalize_observation": True, "window": 9, "total_frames": 64}
    train(walk(), **options)
    assert updates == [4]
    monkeypatch.setattr(dqn, "gather_list", lambda mine: [*mine, 1])
    updates.clear()
    train(walk(), **options, learning_starts=10_000)
    assert updates == [0, 0, 4, 0]


@pytest.mark.parametrize("env", [pictures(), EnvConfig("lit_rl/Dict-v0", num_envs=2)], ids=["images", "dict"])
@pytest.mark.parametrize("trunk", [MLP, partial(LSTM, d_model=8)], ids=["mlp", "lstm"])
def test_other_observations_are_learnt_from(env: EnvConfig, trunk: Any) -> None:
    """From a replay on disk, where images belong."""
    options = {"window": 4, "n_step": 2, "context": "stored", "latents": True}
    model, _, look, records = train(env, trunk, data={"storage": "disk"}, **options)
    assert model.trainer.global_step > 5
    assert not look.online[0].equal(look.online[-1])
    assert look.online[-1].isfinite().all()
    assert all(math.isfinite(value) for _, record in records.records for value in record.values())


# ------------------------------------------------------------------ guards


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_starts": 64}, None),
        ({"learning_starts": 65}, "nothing will be learnt before frame 65: lower model.learning_starts\n"),
        ({"window": 13, "n_step": 3}, None),  # 16 steps of 4 environments
        ({"window": 30, "n_step": 3}, "nothing was learnt: no 33 steps in a row for a window: lower"),
    ],
)
def test_a_run_too_short_to_learn_says_so(
    options: dict[str, Any], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, _, _ = train(walk(), total_frames=64, batch_size=1, **options)
    assert (model.trainer.global_step > 0) == (said is None)
    printed = capsys.readouterr().out
    assert printed.count("nothing w") == (said is not None)
    assert (said or "") in printed


def test_checkpoints_of_other_heads_are_refused() -> None:
    """By what their numbers mean, whether or not all tensors have the same shapes."""
    saved = LitDQN(walk(), head=partial(CategoricalQ, v_min=-5.0, v_max=5.0))
    checkpoint: dict[str, Any] = {"state_dict": saved.state_dict()}
    saved.on_save_checkpoint(checkpoint)
    saved.check_checkpoint(checkpoint)
    others: dict[str, Any] = {
        "CategoricalQ(v_min=-5, v_max=200)": partial(CategoricalQ, v_min=-5.0, v_max=200.0),
        "QuantileQ()": partial(QuantileQ, quantiles=51),
        "ExpectedQ()": ExpectedQ,
    }
    for name, head in others.items():
        message = f"its head is CategoricalQ(v_min=-5, v_max=5), this run's {name}: set --model.head"
        with pytest.raises(UserError, match=re.escape(message)):
            LitDQN(walk(), head=head).check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "options", [{"priority_clip": 1.0}, {"latents": True, "latent_priority": 0.5}], ids=["clip", "latents"]
)
def test_what_only_priorities_feel_is_refused_without_them(options: dict[str, Any]) -> None:
    model = LitDQN(walk(), **options)
    name = list(options)[-1]
    with pytest.raises(UserError, match=f"{name} is .* drawn uniformly: set --data.priority_exponent"):
        model.check_data(ReplayDataModule(walk()))
    model.check_data(ReplayDataModule(walk(), priority_exponent=0.6))


def poison(number: float) -> type[LitDQN]:
    """From 64 frames on the loss has this value; its gradient is finite."""

    class Poisoned(LitDQN):
        def _predict(self, lesson: Lesson) -> Prediction:
            prediction = super()._predict(lesson)
            if self.frames < 64:
                return prediction
            self.before = parameters(self)
            return prediction._replace(loss=prediction.loss + torch.tensor(number))

    return Poisoned


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_learnt_from(number: float) -> None:
    models: list[LitDQN] = []

    class Kept(poison(number)):  # type: ignore[misc]
        def on_fit_start(self) -> None:
            super().on_fit_start()
            models.append(self)

    with pytest.raises(UserError, match="not finite at 64 frames") as error:
        train(walk(), algorithm=Kept)
    assert "\n" not in str(error.value)
    assert torch.equal(parameters(models[0]), models[0].before)
    assert parameters(models[0]).isfinite().all()


def test_a_gradient_that_is_not_finite_is_not_learnt_from() -> None:
    class Steep(LitDQN):
        def _predict(self, lesson: Lesson) -> Prediction:
            self.before = parameters(self)
            models.append(self)
            prediction = super()._predict(lesson)
            # The square root at 0: finite itself, with an infinite slope.
            steep = (0.0 * next(self.agent.parameters())).abs().sum().sqrt()
            return prediction._replace(loss=prediction.loss + steep)

    models: list[LitDQN] = []
    with pytest.raises(UserError, match="not finite"):
        train(walk(), algorithm=Steep)
    assert torch.equal(parameters(models[0]), models[0].before)


def test_observations_that_are_not_finite_are_not_learnt_from() -> None:
    looks: list[Look] = []

    class Kept(LitDQN):
        def on_train_start(self) -> None:
            looks.append(next(c for c in self.trainer.callbacks if isinstance(c, Look)))

    env = EnvConfig("lit_rl/NaN-v0", num_envs=4, kwargs={"after": 10})
    with pytest.raises(UserError, match="not finite"):
        train(env, algorithm=Kept)
    assert looks[0].frames[-1] == 32  # of 40
    assert looks[0].online[-1].isfinite().all()


def test_a_temperature_may_be_above_one() -> None:
    assert LitDQN(counter(), MLP, exploration="softmax", exploration_initial=5.0)


# ------------------------------------------------------------------ toys that it learns


class TwoSteps(gym.Env):
    """One of two doors, then a button: behind the first door the first gives 1, behind the other the other 2.

    Seen one-hot: the hall, the room behind each door.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.room = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.room = 0
        return np.eye(3, dtype=np.float32)[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.room == 0:
            self.room = 1 + int(action)
            return np.eye(3, dtype=np.float32)[self.room], 0.0, False, False, {}
        right = int(action) == self.room - 1
        return np.eye(3, dtype=np.float32)[0], float(self.room * right), True, False, {}


def two_steps() -> EnvConfig:
    if "lit_rl_tests/TwoSteps-v0" not in gym.registry:
        gym.register("lit_rl_tests/TwoSteps-v0", entry_point=TwoSteps)
    return EnvConfig("lit_rl_tests/TwoSteps-v0", num_envs=4)


@pytest.mark.parametrize(
    "head", [*Q_HEADS.values(), partial(ExpectedQ, dueling=True, hidden=16)], ids=[*Q_HEADS, "dueling"]
)
def test_every_head_learns_the_values_of_two_steps(head: Callable) -> None:
    model, _, _, _ = train(
        two_steps(),
        partial(MLP, d_model=16, n_layers=1),
        head,
        total_frames=2_400,
        gamma=0.5,
        batch_size=32,
        target_update_frames=80,
        exploration_final=1.0,
        lr=1e-2,
        log_frames=10_000,
        data={"priority_exponent": 0.6},
    )
    rooms = torch.eye(3)[:, None]
    out, _, _ = model.agent(rooms, model.agent.initial_state(3), torch.ones(3, 1, dtype=torch.bool))
    values = model.agent.head.values(out)[:, 0]
    torch.testing.assert_close(values, torch.tensor([[0.5, 1.0], [1.0, 0.0], [0.0, 2.0]]), atol=0.2, rtol=0)


def success_at_recall(trunk: Any, **options: Any) -> float:
    """Share of cues recalled over a blank step, after a few seconds of learning."""
    env = EnvConfig("lit_rl/Recall-v0", num_envs=8, kwargs={"delay": 1, "cues": 2})
    model, data, _, _ = train(
        env,
        trunk,
        total_frames=6_000,
        batch_size=32,
        window=3,
        lr=5e-3,
        learning_starts=500,
        target_update_frames=200,
        exploration_frames=3_000,
        log_frames=100_000,
        data={"episodes": 200, "stride": 2},
        **options,
    )
    trainer = make_trainer()
    trainer.test(model, datamodule=data, verbose=False)
    return trainer.callback_metrics["test/success"].item()


@pytest.mark.parametrize("context", ["window", "stored"])
def test_memory_recalls_the_cue(context: str) -> None:
    assert success_at_recall(partial(LSTM, d_model=16), context=context) >= 0.95


def test_an_mlp_does_not() -> None:
    """One of two cues: 0.5, and 0.65 is more than four standard deviations of 200 episodes away."""
    assert success_at_recall(partial(MLP, d_model=16)) < 0.65

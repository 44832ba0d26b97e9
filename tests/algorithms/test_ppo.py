"""PPO as a whole: exact memory in the update, advantages, schedules, guards, and toys that it learns."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Balanced, counter, installed_trunks, make_trainer, parameters, ppo, train, walk
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from tensordict import TensorDict
from torch import Tensor

from lit_rl import keys
from lit_rl.algorithms import LitPPO
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.returns import generalized_advantage
from lit_rl.trunks import MLP

FIRST = "train/first_ratio_deviation"
NUMBERS = (keys.LOG_PROB, keys.VALUE, keys.ADVANTAGE, keys.VALUE_TARGET)
ONE_MINIBATCH = {"num_epochs": 1, "num_minibatches": 1}  # so that what is logged is of the first minibatch


# ------------------------------------------------------------------ the ratio is 1 before the first step


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "continuous", "squashed"])
@pytest.mark.parametrize("trunk", installed_trunks())
def test_ratio_is_one_at_the_first_minibatch(trunk: str, action: str, layout: str) -> None:
    """In later rollouts, too: memory carried over from the rollout before and from other weights."""
    _, records = train(
        walk(action.replace("squashed", "continuous")),
        trunk,
        rollouts=3,
        sequence_length=None if layout == "shared" else 4,
        value_trunk=layout,
        squash=action == "squashed",
        normalize_observation=True,
        normalize_reward=True,
        **ONE_MINIBATCH,
    )
    first, kl = records.series(FIRST), records.series("train/approx_kl")
    assert len(first) == len(kl) == 3
    assert max(first) <= 1e-5
    assert max(map(abs, kl)) <= 1e-6
    assert records.series("train/clip_fraction") == [0.0] * 3


def test_ratio_moves_after_the_first_minibatch() -> None:
    """Else the test above would hold for a learner that does nothing."""
    _, records = train(walk(), "gru", rollouts=2, num_epochs=4)
    assert min(records.series("train/approx_kl")) > 1e-4
    assert max(records.series(FIRST)) <= 1e-5


class ZeroState(LitPPO):
    """The published mistake: memory carried in the rollout, from zero in the update."""

    def _sequences(self, steps_ET: TensorDict, state_EK: TensorDict) -> tuple[TensorDict, TensorDict]:
        steps, state = super()._sequences(steps_ET, state_EK)
        return steps, self.agent.initial_state(len(state))


class NoResets(LitPPO):
    """The other one: resets ignored inside sequences."""

    def _sequences(self, steps_ET: TensorDict, state_EK: TensorDict) -> tuple[TensorDict, TensorDict]:
        steps, state = super()._sequences(steps_ET, state_EK)
        return steps.set(keys.IS_INIT, torch.zeros_like(steps[keys.IS_INIT])), state


class MovingStatistics(LitPPO):
    """Observation statistics that move between a rollout and its update."""

    def _add_advantages(self, steps_ET: TensorDict) -> None:
        self.agent.update_normalization(steps_ET[keys.OBSERVATION])
        super()._add_advantages(steps_ET)


@pytest.mark.parametrize("wrong", [ZeroState, NoResets, MovingStatistics])
@pytest.mark.parametrize("sequence_length", [None, 4])
def test_ratio_shows_the_usual_mistakes(wrong: type[LitPPO], sequence_length: int | None) -> None:
    _, records = train(
        walk(),
        "gru",
        rollouts=2,
        sequence_length=sequence_length,
        algorithm=wrong,
        normalize_observation=True,
        **ONE_MINIBATCH,
    )
    assert records.series(FIRST)[1] > 1e-2


@pytest.mark.parametrize("trunk", installed_trunks())
def test_bf16_mixed(trunk: str) -> None:
    model, records = train(
        walk(), trunk, rollouts=2, encoder_width=8, trainer={"precision": "bf16-mixed"}, **ONE_MINIBATCH
    )
    assert max(records.series(FIRST)) <= 1e-5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    exact, _ = train(walk(), trunk, rollouts=2, encoder_width=8, **ONE_MINIBATCH)
    assert not torch.equal(parameters(model), parameters(exact))


@pytest.mark.parametrize("learns", [True, False])
def test_bf16_mixed_minibatches_see_what_the_ones_before_have_learnt(learns: bool) -> None:
    """All are in one autocast, whose cache of rounded weights Lightning turns off; only the trunk learns."""
    rates = {"lr": 0.0, "trunk_lr": 1e-2 if learns else 0.0}
    _, records = train(walk(), num_epochs=2, num_minibatches=1, **rates, trainer={"precision": "bf16-mixed"})
    [kl] = records.series("train/approx_kl")
    assert (kl > 1e-6) == learns


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"{precision}.*bf16-mixed"):
        train(walk(), trainer={"precision": precision})


# ------------------------------------------------------------------ advantages


class Watched(LitPPO):
    """Keeps what the update was given: whole rows, sequences, state, coefficients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[TensorDict] = []
        self.sequences: list[TensorDict] = []
        self.coefficients: list[dict[str, float]] = []

    def training_step(self, rollout: TensorDict, batch_idx: int) -> None:
        super().training_step(rollout, batch_idx)
        self.rows.append(rollout[keys.STEPS].clone())

    def _learn(self, steps_NT: TensorDict, state_N: TensorDict, **schedule: float) -> dict[str, float]:
        self.sequences.append(steps_NT.clone())
        self.coefficients.append(schedule)
        return super()._learn(steps_NT, state_N, **schedule)


@pytest.mark.parametrize(("trunk", "N", "T"), [("gru", 16, 4), ("mlp", 64, 1)])
def test_advantages_are_those_of_whole_rows(trunk: str, N: int, T: int) -> None:
    """However short the sequences are: an advantage looks beyond the end of its sequence."""
    model, _ = train(walk(), trunk, sequence_length=4, algorithm=Watched, gamma=0.9, gae_lambda=0.8)
    (rows,), (sequences,) = model.rows, model.sequences
    assert sequences.batch_size == (N, T)
    names = (keys.REWARD, keys.VALUE, keys.NEXT_VALUE, keys.TERMINATED, keys.TRUNCATED)
    advantage, target = generalized_advantage(*(rows[name] for name in names), gamma=0.9, gae_lambda=0.8)
    assert torch.equal(sequences[keys.ADVANTAGE].reshape(4, 16), advantage)
    assert torch.equal(sequences[keys.VALUE_TARGET].reshape(4, 16), target)
    assert torch.equal(sequences[keys.OBSERVATION].reshape(4, 16, 2), rows[keys.OBSERVATION])
    cut, _ = generalized_advantage(*(rows[name].reshape(16, 4) for name in names), gamma=0.9, gae_lambda=0.8)
    assert not torch.allclose(cut.reshape(4, 16), advantage)


def test_every_sequence_is_learnt_from_once_an_epoch() -> None:
    class Counting(LitPPO):
        def _loss(self, steps_MT: TensorDict, *args: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
            self.__dict__.setdefault("seen", []).append(steps_MT[keys.LOG_PROB][:, 0].clone())
            return super()._loss(steps_MT, *args)

    model, _ = train(walk("continuous"), "gru", sequence_length=4, algorithm=Counting, num_epochs=3)
    assert [len(minibatch) for minibatch in model.seen] == [8] * 6
    epochs = [torch.cat(model.seen[i : i + 2]) for i in (0, 2, 4)]
    for epoch in epochs[1:]:
        assert torch.equal(epoch.sort().values, epochs[0].sort().values)
        assert not torch.equal(epoch, epochs[0])  # in another order


@pytest.mark.parametrize("trunk", ["mlp", "gru"])
@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_are_normalized_in_each_minibatch(normalize: bool, trunk: str) -> None:
    learnt_from: list[Tensor] = []

    class Counting(Watched):
        def _loss(self, steps_MT: Any, *args: Any) -> Any:
            learnt_from.append(steps_MT[keys.ADVANTAGE].clone())
            return super()._loss(steps_MT, *args)

    model, _ = train(walk(), trunk, algorithm=Counting, normalize_advantage=normalize, num_epochs=2)
    assert [advantage.numel() for advantage in learnt_from] == [32] * 4
    raw = model.rows[0][keys.ADVANTAGE]
    for advantage in learnt_from:
        if normalize:
            assert advantage.mean().item() == pytest.approx(0.0, abs=1e-5)
            assert advantage.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
        else:
            assert torch.isin(advantage, raw).all()
    assert abs(raw.mean()) > 0.1
    assert abs(raw.std() - 1) > 0.1


def test_rewards_are_scaled_for_learning_only() -> None:
    model, records = train(
        walk(), rollouts=2, algorithm=Watched, normalize_reward=True, gae_lambda=0.0, gamma=0.5
    )
    std = (model.reward_scale.var + 1e-8).sqrt().float()
    rows = model.rows[1]
    reward = rows[keys.REWARD]
    assert reward.max() == 8.0  # the environment's own
    assert records.series("episode/return")[1] > 1.0
    bootstrap = 0.5 * rows[keys.NEXT_VALUE] * ~rows[keys.TERMINATED]
    torch.testing.assert_close(rows[keys.VALUE_TARGET], reward / std + bootstrap)  # lambda 0: one step


def test_the_running_return_crosses_the_border_of_rollouts() -> None:
    model, _ = train(counter(lengths=[32], num_envs=2), rollouts=2, normalize_reward=True, gamma=0.5)
    running, returns = 0.0, []
    for t in range(32):
        running = t + 1 + 0.5 * running
        returns.append(running)
    assert model.reward_scale.mean.item() == pytest.approx(sum(returns) / 32, rel=1e-6)


# ------------------------------------------------------------------ schedules and budgets, by frames


def test_schedules_follow_the_frames() -> None:
    model, records = train(
        walk(),
        rollouts=4,
        algorithm=Watched,
        lr=1e-2,
        trunk_lr=1e-3,
        clip=0.3,
        clip_final=0.1,
        entropy_coef=0.0,
        entropy_coef_final=0.04,
    )
    assert [frames for frames, _ in records.records] == [64, 128, 192, 256]
    assert records.series("train/lr") == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert records.series("train/trunk_lr") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [c["clip"] for c in model.coefficients] == pytest.approx([0.3, 0.25, 0.2, 0.15])
    assert [c["entropy_coef"] for c in model.coefficients] == pytest.approx([0.0, 0.01, 0.02, 0.03])


def test_without_schedules_nothing_moves() -> None:
    model, records = train(walk(), rollouts=3, algorithm=Watched, lr=1e-2, anneal_lr=False)
    assert records.series("train/lr") == records.series("train/trunk_lr") == [1e-2] * 3
    assert model.coefficients == [{"clip": 0.2, "entropy_coef": 0.01}] * 3


@pytest.mark.parametrize(("total_frames", "expected"), [(64, 64), (192, 192), (193, 256), (1, 64)])
def test_training_stops_at_the_budget(total_frames: int, expected: int) -> None:
    model, records = train(walk(), total_frames=total_frames)
    assert model.frames == expected
    assert [frames for frames, _ in records.records] == list(range(64, expected + 1, 64))


def test_training_stops_within_a_lightning_epoch() -> None:
    model = ppo(walk(), total_frames=128)
    data = RolloutDataModule(walk(), rollout_length=16, frames_per_epoch=64 * 100)
    make_trainer().fit(model, data)
    assert model.frames == 128


@pytest.mark.parametrize(("target_kl", "epochs"), [(None, 6), (1e-9, 1), (1e9, 6)])
def test_target_kl_stops_the_epochs(target_kl: float | None, epochs: int) -> None:
    model, _ = train(walk(), num_epochs=6, target_kl=target_kl)
    [count] = {int(state["step"]) for state in model.trainer.optimizers[0].state.values()}
    assert count == model.trainer.global_step == epochs * 2


@pytest.mark.parametrize("value_trunk", ["shared", "separate"])
@pytest.mark.parametrize("still", ["trunk", "rest"])
def test_learning_rates_reach_their_parameters(still: str, value_trunk: str) -> None:
    options = {"value_trunk": value_trunk, "encoder_width": 8}
    before, _ = train(walk("continuous"), "gru", lr=0.0, trunk_lr=0.0, **options)
    rates = {"lr": 1e-2, "trunk_lr": 0.0} if still == "trunk" else {"lr": 0.0, "trunk_lr": 1e-2}
    after, _ = train(walk("continuous"), "gru", **options, **rates)
    old = dict(before.agent.named_parameters())
    for name, parameter in after.agent.named_parameters():
        in_trunk = name.startswith(("trunk.", "value_trunk."))
        assert torch.equal(parameter, old[name]) == (in_trunk == (still == "trunk")), name


def test_gradients_are_clipped() -> None:
    # Adam's step does not show a gradient's size; plain descent does.
    class Descent(LitPPO):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = super().configure_optimizers().param_groups
            return torch.optim.SGD([{"params": g["params"]} for g in groups], lr=1.0)

    options = {"algorithm": Descent, "lr": 1.0, "anneal_lr": False, **ONE_MINIBATCH}
    before = parameters(train(walk(), **(options | {"lr": 0.0}))[0])
    model, records = train(walk(), max_grad_norm=0.01, **options)
    assert records.series("train/grad_norm")[0] > 0.1  # as it was
    assert (parameters(model) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_auxiliary_losses_join_the_loss() -> None:
    model = LitPPO(walk(), Balanced)
    T = 6
    steps = TensorDict(
        {
            keys.OBSERVATION: torch.randn(1, T, 2),
            keys.ACTION: torch.zeros(1, T, dtype=torch.long),
            **{
                key: torch.randn(1, T)
                for key in (keys.LOG_PROB, keys.VALUE, keys.ADVANTAGE, keys.VALUE_TARGET)
            },
            keys.IS_INIT: torch.zeros(1, T, dtype=torch.bool),
        },
        [1, T],
    )
    loss, measured, _ = model._loss(steps, model.agent.initial_state(1), 0.2, 0.03)
    terms = measured["policy_loss"] + 0.5 * measured["value_loss"] - 0.03 * measured["entropy"]
    assert measured["auxiliary_loss"] > 0.01
    torch.testing.assert_close(loss.detach(), terms + measured["auxiliary_loss"])


def test_what_a_trunk_measures_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(MLP):
        def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
            self.metrics = {"largest": x.abs().max().detach()}
            return super().forward(x, state, is_init)

    monkeypatch.setattr("helpers.small", lambda _: Measured)
    _, records = train(walk(), rollouts=2)
    assert len(records.series("trunk/largest")) == 2


# ------------------------------------------------------------------ guards


def test_strategies_that_split_parameters_are_refused() -> None:
    model = ppo(walk())
    model.check_strategy(DDPStrategy())
    with pytest.raises(UserError, match="strategy FSDPStrategy is not supported: use auto or ddp"):
        model.check_strategy(FSDPStrategy())


@pytest.mark.parametrize(
    ("trunk", "sequence_length", "minibatches", "unit"),
    [("mlp", None, 3, "64 steps"), ("gru", None, 8, "4 sequences of 16"), ("gru", 4, 5, "16 sequences of 4")],
)
def test_minibatches_must_divide(
    trunk: str, sequence_length: int | None, minibatches: int, unit: str
) -> None:
    with pytest.raises(UserError, match=f"{unit}.*{minibatches} minibatches"):
        train(walk(), trunk, sequence_length=sequence_length, num_minibatches=minibatches)


@pytest.mark.parametrize("name", ["num_epochs", "num_minibatches", "total_frames"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(UserError, match=name):
        ppo(walk(), **{name: 0})


class Infinite(MLP):
    """Finite features whose gradient is not: the derivative of the square root at 0."""

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        y, state = super().forward(x, state, is_init)
        return y + (y - y.detach()).sqrt(), state


class Poisoned(LitPPO):
    """Loses its mind at the minibatch number `at`."""

    at = 0

    def _loss(self, *args: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        loss, measured, log_ratio = super()._loss(*args)
        self.at -= 1
        if self.at < 0:
            self.spared = parameters(self)
            loss, measured["value_loss"] = loss * math.nan, measured["value_loss"] * math.nan
        return loss, measured, log_ratio


@pytest.mark.parametrize("at", [0, 3])
def test_a_loss_that_is_not_finite_spares_the_weights(at: int) -> None:
    model = Poisoned(walk(), total_frames=64, num_minibatches=2)
    model.at = at
    start = parameters(model)
    data = RolloutDataModule(walk(), rollout_length=16)
    with pytest.raises(UserError, match="value_loss is not finite at 64 frames") as error:
        make_trainer().fit(model, data)
    assert "\n" not in str(error.value)
    assert torch.equal(parameters(model), model.spared)
    assert torch.equal(parameters(model), start) == (at == 0)


def test_a_gradient_that_is_not_finite_spares_the_weights() -> None:
    model = LitPPO(walk(), Infinite, total_frames=64)
    start = parameters(model)
    with pytest.raises(UserError, match=r"gradient \(of a finite loss\) is not finite"):
        make_trainer().fit(model, RolloutDataModule(walk(), rollout_length=16))
    assert torch.equal(parameters(model), start)


# ------------------------------------------------------------------ what is logged


def test_episode_statistics() -> None:
    """16 steps end episodes of 3, 5 and 1, the next 16 those of 8, 3 and 5 steps; step t is paid t."""
    model, records = train(walk(), rollouts=2)
    assert records.series("episode/length") == pytest.approx([(3 + 5 + 1) / 3, (8 + 3 + 5 + 1) / 4])
    assert records.series("episode/return") == pytest.approx([(6 + 15 + 1) / 3, (36 + 6 + 15 + 1) / 4])
    assert list(model.recent_returns)[:12] == [6.0, 15.0, 1.0] * 4
    assert records.series("episode/success") == []


def test_no_episode_statistics_where_none_ended() -> None:
    _, records = train(counter(lengths=[100]), rollouts=2)
    assert records.series("episode/return") == []
    assert len(records.records) == 2


# ------------------------------------------------------------------ seeds


def test_one_seed_one_result() -> None:
    options = {"trunk": "gru", "rollouts": 3, "normalize_observation": True}
    first, again, other = (parameters(train(walk(), **options, seed=s)[0]) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_seed_of_the_data_counts_alone() -> None:
    env = EnvConfig("CartPole-v1", num_envs=4)

    def learnt(seed: int) -> Tensor:
        torch.manual_seed(0)  # the same network and minibatches
        model = ppo(env, total_frames=64)
        make_trainer().fit(model, RolloutDataModule(env, rollout_length=16, seed=seed))
        return parameters(model)

    assert torch.equal(learnt(1), learnt(1))
    assert not torch.equal(learnt(1), learnt(2))


# ------------------------------------------------------------------ toys


def mean_of_last(records: Any, key: str = "episode/return", n: int = 3) -> float:
    return sum(records.series(key)[-n:]) / n


def test_learns_two_choices_at_once() -> None:
    env = EnvConfig("lit_rl/MultiDiscrete-v0", num_envs=16)
    _, records = train(env, rollouts=25, rollout_length=32, lr=2e-2, num_minibatches=4)
    assert records.series("episode/return")[0] < 0.5  # 5 / 18 at random
    assert mean_of_last(records) > 0.95


@pytest.mark.parametrize("squash", [False, True])
def test_learns_a_continuous_bandit(squash: bool) -> None:
    env = EnvConfig("lit_rl/Bandit-v0", num_envs=16)
    options = {"rollouts": 40, "rollout_length": 32, "lr": 2e-2, "num_minibatches": 4, "entropy_coef": 0.0}
    _, records = train(env, squash=squash, **options)
    assert records.series("episode/return")[0] < -0.5
    assert mean_of_last(records) > -0.1


@pytest.mark.parametrize(("trunk", "solves"), [("gru", True), ("mlp", False)])
def test_recall_needs_memory(trunk: str, solves: bool) -> None:
    env = EnvConfig("lit_rl/Recall-v0", num_envs=16, kwargs={"delay": 3})
    _, records = train(env, trunk, rollouts=50, rollout_length=40, lr=1e-2, num_minibatches=4, gamma=0.9)
    success = mean_of_last(records, "episode/success", 5)
    assert success > 0.95 if solves else success < 0.65


def test_annealed_coefficients_do_not_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr("lit_rl.algorithms.ppo.torch.compile", partial(torch.compile, backend=backend))
    train(walk(), rollouts=8, compile_loss=True, entropy_coef_final=0.0, clip_final=0.1)
    assert 1 <= len(graphs) <= 3  # for constants, then for numbers that move


@pytest.mark.parametrize("trunk", ["mlp", "gru"])
def test_a_compiled_loss_learns_the_same(trunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for the compiler; its code generation is torch's own affair."""
    plain, _ = train(walk(), trunk, rollouts=2)
    compiler = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("lit_rl.algorithms.ppo.torch.compile", compiler)
    compiled, _ = train(walk(), trunk, rollouts=2, compile_loss=True)
    for name, parameter in plain.agent.named_parameters():
        torch.testing.assert_close(parameter, compiled.agent.get_parameter(name), msg=name)

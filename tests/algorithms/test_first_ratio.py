"""At the first minibatch of a rollout the learner computes what the actor computed: every ratio is 1.

For every installed trunk with its default options, where episodes are cut short and reset inside the rollout,
and where memory comes from the rollout before, which other weights made.
"""

import pytest
import torch
from helpers import Records, make_trainer, sharpen
from tensordict import TensorDict
from torch import Tensor

from lit_rl.algorithms import LitPPO
from lit_rl.benchmarks.measure import Contender, contenders
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.trunks import GRU, MLP

torch.set_num_threads(1)

ROLLOUT = 32
ENVS = {
    # Time limits that divide neither rollout nor sequence.
    "masked CartPole": EnvConfig("CartPole-v1", num_envs=4, mask_velocity=True, time_limit=11),
    "Pendulum": EnvConfig("Pendulum-v1", num_envs=4, time_limit=13),
}


def three_rollouts(env: EnvConfig, contender: Contender, **options: str) -> Records:
    """What PPO logs; one minibatch a rollout, so that all of it is of the first."""
    torch.manual_seed(0)
    model = LitPPO(
        env,
        lambda in_features: contender.trunk(in_features, **contender.options),
        total_frames=3 * env.num_envs * ROLLOUT,
        num_epochs=1,
        num_minibatches=1,
        lr=1e-2,
        normalize_observation=True,
        **options,
    )
    sharpen(model.agent)
    data = RolloutDataModule(env, rollout_length=ROLLOUT, sequence_length=ROLLOUT // 2)
    records = Records()
    make_trainer(logger=records).fit(model, data)
    return records


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS)
@pytest.mark.parametrize("trunk", contenders([]), ids=lambda trunk: trunk.name)
def test_first_ratio_is_one(trunk: Contender, env: EnvConfig) -> None:
    records = three_rollouts(env, trunk.with_usual(d_model=16))
    first, kl = records.series("train/first_ratio_deviation"), records.series("train/approx_kl")
    assert len(first) == len(kl) == 3
    assert max(first) <= 1e-5
    assert max(map(abs, kl)) <= 1e-6
    assert all(length <= env.time_limit for length in records.series("episode/length"))
    assert len(records.series("episode/length")) == 3  # resets inside every rollout


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS)
def test_first_ratio_is_one_where_acting_is_one_call(env: EnvConfig) -> None:
    """The fused policy acts with the weights of its rollout."""
    records = three_rollouts(env, Contender("mlp", MLP, {"d_model": 16}), value_trunk="separate")
    assert max(records.series("train/first_ratio_deviation")) <= 1e-5


class IgnoresResets(GRU):
    """Where it learns; acting, it heeds them."""

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        return super().forward(x, state, is_init if x.shape[1] == 1 else is_init & False)


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS)
def test_a_trunk_that_learns_otherwise_than_it_acts_is_caught(env: EnvConfig) -> None:
    records = three_rollouts(env, Contender("faulty", IgnoresResets, {"d_model": 16}))
    assert min(records.series("train/first_ratio_deviation")) > 1e-3

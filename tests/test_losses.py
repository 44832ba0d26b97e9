"""Losses: numbers worked by hand, gradients, and TorchRL's ClipPPOLoss as an oracle of PPO's whole loss."""

from math import log

import pytest
import torch
from helpers import counter, make_agent, ppo
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical as Categories
from torch.distributions import Independent, Normal
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss

from lit_rl import keys
from lit_rl.algorithms.ppo import normalized
from lit_rl.envs import EnvConfig
from lit_rl.losses import approx_kl, clip_fraction, clipped_surrogate, ppo_loss, value_loss
from lit_rl.models.actor_critic import ActorCritic
from lit_rl.models.heads import Gaussian
from lit_rl.trunks import Trunk


def test_clipped_surrogate_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 10.0])
    # min(r A, clip(r) A) with clip at [0.8, 1.2]:
    #   min(3, 2.4) = 2.4, min(-3, -2.4) = -3, min(1, 1.6) = 1, min(-1, -1.6) = -1.6, min(11, 11) = 11
    # loss = -(2.4 - 3 + 1 - 1.6 + 11) / 5 = -9.8 / 5
    assert clipped_surrogate(ratio, advantage, 0.2).item() == pytest.approx(-1.96)


def test_gradient_of_the_surrogate_is_zero_where_clipped() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], requires_grad=True)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 10.0])
    clipped_surrogate(ratio, advantage, 0.2).backward()
    # Too high with a positive advantage, too low with a negative one: nothing more to gain.
    assert ratio.grad.tolist() == pytest.approx([0.0, 0.4, -0.4, 0.0, -2.0])  # -A / 5 elsewhere


def test_value_loss_by_hand() -> None:
    value, target = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    # half of (4 + 1) / 2
    assert value_loss(value, target, torch.zeros(2), None).item() == 1.25


def test_value_clipping_counts_the_worse_error() -> None:
    value = torch.tensor([3.0, 1.0, 2.0, -1.0], requires_grad=True)
    target = torch.tensor([5.0, 2.0, 0.0, -1.0])
    old = torch.tensor([1.0, 1.25, 1.0, 1.0])
    # clipped to old +- 0.5:  1.5,  1.0 (inside),  1.5,  0.5
    # errors (3-5)^2 = 4 | 3.5^2 = 12.25 -> 12.25;  1 | 1 -> 1;  4 | 2.25 -> 4;  0 | 2.25 -> 2.25
    loss = value_loss(value, target, old, 0.5)
    assert loss.item() == pytest.approx(0.5 * (12.25 + 1 + 4 + 2.25) / 4)
    loss.backward()
    # The first and last have moved past the clip while their clipped error is the worse one: no gradient.
    assert value.grad.tolist() == pytest.approx([0.0, -1 / 4, 2 / 4, 0.0])


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_gradient_of_the_whole_loss_is_that_of_its_terms(
    value_clip: float | None, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_rl.losses.can_be_compiled", lambda *_: is_compiled)
    generator = torch.Generator().manual_seed(0)
    log_prob, value, entropy, moved, drift, advantage, target = (
        torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(7)
    )
    learnt = [part.requires_grad_() for part in (log_prob, value, entropy)]
    old_log_prob, old_value = (log_prob + 0.3 * moved).detach(), (value + 0.5 * drift).detach()

    found = ppo_loss(
        *learnt,
        old_log_prob=old_log_prob,
        old_value=old_value,
        advantage=advantage,
        target=target,
        clip=0.2,
        value_clip=value_clip,
        value_coef=0.7,
        entropy_coef=0.03,
    )
    policy_loss = clipped_surrogate((log_prob - old_log_prob).exp(), advantage, 0.2)
    critic_loss = value_loss(value, target, old_value, value_clip)
    loss = policy_loss + 0.7 * critic_loss - 0.03 * entropy.mean()

    terms = (loss, policy_loss, critic_loss, entropy.mean(), log_prob - old_log_prob)
    torch.testing.assert_close(tuple(found), terms)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found.loss, learnt), torch.autograd.grad(3 * loss, learnt)
    )


def test_approx_kl_by_hand() -> None:
    assert approx_kl(torch.zeros(4)) == 0.0
    # (2 - 1 - log 2 + 1/2 - 1 + log 2) / 2 = (2 + 1/2 - 2) / 2
    assert approx_kl(torch.tensor([log(2), -log(2)])).item() == pytest.approx(0.25)


def test_approx_kl_estimates_the_divergence() -> None:
    old, new = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.4, 0.3, 0.3])
    exact = (old * (old / new).log()).sum().item()
    action = torch.multinomial(old, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert approx_kl((new / old).log()[action]).item() == pytest.approx(exact, rel=0.02)


def test_clip_fraction_by_hand() -> None:
    ratio = torch.tensor([0.5, 0.85, 1.0, 1.15, 1.5])
    assert clip_fraction(ratio, 0.2).item() == pytest.approx(0.4)
    assert clip_fraction(ratio, 0.1).item() == pytest.approx(0.8)


def test_normalized_advantage() -> None:
    # mean 2, variance 2/3 (of all entries, not of a sample)
    advantage = normalized(torch.tensor([[1.0], [2.0], [3.0]]))
    assert advantage.flatten().tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    assert normalized(torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    # two minibatches of two rows, each by its own moments
    two = normalized(torch.tensor([[1.0], [3.0], [10.0], [30.0]]), num_minibatches=2)
    assert two.flatten().tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0])


def minibatch(agent: ActorCritic, observation: torch.Tensor) -> TensorDict:
    """Single steps with an old policy that differs, so that some ratios are clipped."""
    n = len(observation)
    with torch.no_grad():
        params, value, _ = agent(observation, agent.initial_state(n), torch.zeros(n, 1, dtype=torch.bool))
        action = agent.policy.sample(params)
        log_prob = agent.policy.log_prob(params, action)
    steps = {
        keys.OBSERVATION: observation,
        keys.ACTION: action,
        keys.LOG_PROB: log_prob + 0.3 * torch.randn(n, 1),
        keys.VALUE: value + 0.5 * torch.randn(n, 1),
        keys.VALUE_TARGET: value + torch.randn(n, 1),
        keys.ADVANTAGE: torch.randn(n, 1) + 0.5,
        keys.IS_INIT: torch.zeros(n, 1, dtype=torch.bool),
    }
    return TensorDict(steps, [n, 1])


class Features(torch.nn.Module):
    """A memoryless trunk as a plain network."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x, self.trunk.initial_state(len(x)), torch.zeros(x.shape[:2], dtype=torch.bool))[0]


class Parameters(torch.nn.Module):
    """The policy's trunk and head as TorchRL's distributions want them: logits, or mean and scale."""

    def __init__(self, agent: ActorCritic) -> None:
        super().__init__()
        self.trunk, self.head = Features(agent.trunk), agent.policy

    def forward(self, observation: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        params = self.head(self.trunk(observation))
        if not isinstance(self.head, Gaussian):
            return params
        return params, self.head.log_std.exp().expand_as(params)


@pytest.mark.parametrize("env_id", ["lit_rl/Counter-v0", "lit_rl/Bandit-v0"])
@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_ppo_loss_agrees_with_torchrl(env_id: str, value_clip: float | None) -> None:
    """Each term, the sum, and the gradient of every parameter, on the same minibatch."""
    env = counter() if env_id == "lit_rl/Counter-v0" else EnvConfig(env_id, num_envs=2)
    discrete = env_id == "lit_rl/Counter-v0"
    model = ppo(env, value_trunk="separate", value_coef=0.7, value_clip=value_clip)
    model.agent = agent = make_agent(env, value_trunk="separate", log_std=-0.5)
    steps = minibatch(agent, 2 * torch.randn(32, 1, 2 if discrete else 1))
    steps[keys.ADVANTAGE] = normalized(steps[keys.ADVANTAGE])
    ours, measured, log_ratio = model._loss(steps, agent.initial_state(32), clip=0.2, entropy_coef=0.03)
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in agent.named_parameters()}
    agent.zero_grad()

    actor = ProbabilisticActor(
        TensorDictModule(Parameters(agent), ["observation"], ["logits"] if discrete else ["loc", "scale"]),
        in_keys=["logits"] if discrete else ["loc", "scale"],
        distribution_class=Categories if discrete else lambda loc, scale: Independent(Normal(loc, scale), 1),
    )
    critic = ValueOperator(
        torch.nn.Sequential(Features(agent.value_trunk), agent.value_head), ["observation"]
    )
    oracle = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=0.2,
        entropy_coeff=0.03,
        critic_coeff=0.7 * 0.5,  # ours is half the squared error
        loss_critic_type="l2",
        clip_value=value_clip,
        functional=False,
    )
    batch = TensorDict(
        {
            "observation": steps[keys.OBSERVATION],
            "action": steps[keys.ACTION],
            "action_log_prob": steps[keys.LOG_PROB],
            "state_value": steps[keys.VALUE][..., None],
            "value_target": steps[keys.VALUE_TARGET][..., None],
            "advantage": steps[keys.ADVANTAGE][..., None],
        },
        [32, 1],
    )
    theirs = oracle(batch)
    total = theirs["loss_objective"] + theirs["loss_entropy"] + theirs["loss_critic"]
    total.backward()
    assert measured["policy_loss"].item() == pytest.approx(theirs["loss_objective"].item(), abs=1e-5)
    assert measured["entropy"].item() == pytest.approx(theirs["entropy"].item(), abs=1e-5)
    assert 0.7 * measured["value_loss"].item() == pytest.approx(theirs["loss_critic"].item(), abs=1e-5)
    clipped = clip_fraction(log_ratio.exp(), 0.2).item()
    assert clipped == pytest.approx(theirs["clip_fraction"].item())
    assert 0.1 < clipped < 0.9
    assert ours.item() == pytest.approx(total.item(), abs=1e-5)
    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)

"""Compiled losses of PPO and DQN against the tensor operations that they stand for, and by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from lit_rl.compiled.losses import compiled_categorical, compiled_ppo_loss, compiled_td_loss
from lit_rl.losses import clipped_surrogate, ppo_loss, value_loss
from lit_rl.models import heads
from lit_rl.models.q_heads import ExpectedQ

SHAPES = [(1,), (7,), (3, 50), (2, 3, 4)]


@pytest.mark.parametrize("P", [1, 2, 5, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_categorical_terms_and_gradients(shape: tuple[int, ...], P: int) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(*shape, P, dtype=torch.float64)).requires_grad_()
    action = torch.randint(P, shape)
    oracle = Categorical(logits=logits)
    expected = oracle.log_prob(action), oracle.entropy()
    found = compiled_categorical(logits, action)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.randn(2, *shape, dtype=torch.float64)
    for of in ((0, 1), (0,), (1,)):  # both together, and each alone
        grads = [
            torch.autograd.grad(sum((terms[k] * weights[k]).sum() for k in of), logits, retain_graph=True)
            for terms in (found, expected)
        ]
        torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_categorical_in_float32_far_from_uniform() -> None:
    """Logits of hundreds, where e^x alone has no number."""
    logits = torch.tensor([[300.0, 299.0, -300.0], [-1000.0, -1001.0, -1000.0]])
    action = torch.tensor([1, 2])
    oracle = Categorical(logits=logits.double())
    found = [term.double() for term in compiled_categorical(logits, action)]
    torch.testing.assert_close(found, [oracle.log_prob(action), oracle.entropy()], atol=1e-6, rtol=1e-6)


def test_rows_that_lie_apart() -> None:
    wide = torch.randn(4, 3, 6).requires_grad_()
    logits, action = wide[..., ::2].transpose(0, 1), torch.randint(3, (4, 3)).t()
    found, expected = compiled_categorical(logits, action), heads._CategoricalTerms.apply(logits, action)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(terms[0].sum(), wide, retain_graph=True) for terms in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("action", [-1, 3])
def test_no_action_is_no_number(action: int) -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    log_prob, entropy = compiled_categorical(logits, torch.tensor([action, 1]))
    assert log_prob[0].isnan()
    assert log_prob[1].item() == pytest.approx(-math.log(3))
    log_prob.sum().backward()
    assert logits.grad[1].tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
    assert entropy.tolist() == pytest.approx([math.log(3)] * 2)


def test_what_is_not_a_number_stays_so() -> None:
    logits = torch.tensor([[torch.nan, 0.0], [0.0, torch.nan], [0.0, 0.0]])
    log_prob, entropy = compiled_categorical(logits, torch.zeros(3, dtype=torch.long))
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [True, True, False]


def samples(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    log_prob, value, entropy, moved, drift, advantage, target = torch.randn(7, n, dtype=dtype)
    return [log_prob, value, entropy, log_prob + 0.3 * moved, value + 0.5 * drift, advantage, target]


@pytest.mark.parametrize("value_clip", [None, 0.0, 0.3])
@pytest.mark.parametrize("n", [1, 6, 400])
def test_ppo_loss_and_gradients(n: int, value_clip: float | None) -> None:
    log_prob, value, entropy, old_log_prob, old_value, advantage, target = given = samples(n)
    learnt = [part.requires_grad_() for part in given[:3]]
    found = compiled_ppo_loss(*given, 0.2, value_clip, 0.7, 0.03)
    policy_loss = clipped_surrogate((log_prob - old_log_prob).exp(), advantage, 0.2)
    critic_loss = value_loss(value, target, old_value, value_clip)
    loss = policy_loss + 0.7 * critic_loss - 0.03 * entropy.mean()
    terms = (loss, policy_loss, critic_loss, entropy.mean(), log_prob - old_log_prob)
    torch.testing.assert_close(found, terms, atol=1e-13, rtol=1e-13)
    grads = [torch.autograd.grad(3 * total, learnt) for total in (found[0], loss)]
    torch.testing.assert_close(*grads, atol=1e-13, rtol=1e-13)


def test_many_samples_in_float32() -> None:
    """Totals are added up in float64: a million terms lose no digits."""
    given = samples(10**6, torch.float32)
    found = compiled_ppo_loss(*given, 0.2, None, 0.5, 0.01)
    expected = compiled_ppo_loss(*(part.double() for part in given), 0.2, None, 0.5, 0.01)
    torch.testing.assert_close(
        torch.stack(found[:4]).double(), torch.stack(expected[:4]), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("of", range(7))
def test_a_loss_of_what_is_not_a_number_is_none(of: int) -> None:
    given = samples(5)
    given[of][2] = torch.nan
    learnt = [part.requires_grad_() for part in given[:3]]
    loss = compiled_ppo_loss(*given, 0.2, 0.3, 0.7, 0.03)[0]
    assert loss.isnan()
    grads = [grad[2].isnan().item() for grad in torch.autograd.grad(loss, learnt)]
    # As by the tensor operations: an old value reaches the loss alone, the entropy's gradient is constant.
    assert grads == [of in (0, 3, 5), of in (1, 6), False]


def test_terms_may_be_changed_in_place() -> None:
    terms = compiled_ppo_loss(*samples(5), 0.2, None, 0.7, 0.03)
    was = terms[0].item(), terms[1].item()
    terms[0].add_(1)
    assert (terms[0].item(), terms[1].item()) == (was[0] + 1, was[1])


@pytest.mark.parametrize("of", [2, 5])
def test_shapes_that_differ_are_left_to_torch(of: int) -> None:
    """One number for all rows is spread over them, as ever."""
    given = samples(6)
    given[of] = given[of][:1]
    names = ("old_log_prob", "old_value", "advantage", "target")
    named = dict(zip(names, given[3:], strict=True))
    terms = ppo_loss(*given[:3], **named, clip=0.2, value_clip=None, value_coef=0.7, entropy_coef=0.03)
    given[of] = given[of].expand(6)
    expected = compiled_ppo_loss(*given, 0.2, None, 0.7, 0.03)
    torch.testing.assert_close(terms.loss, expected[0])


def test_a_ratio_beyond_all_numbers_is_infinite() -> None:
    given = samples(3, torch.float32)
    given[0][1], given[3][1], given[5][1] = 0.0, -200.0, -1.0
    assert compiled_ppo_loss(*given, 0.2, None, 0.5, 0.01)[0] == torch.inf


@pytest.mark.parametrize("loss", ["huber", "mse"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (5, 8)], ids=str)
def test_td_loss_and_gradient(shape: tuple[int, int], loss: str) -> None:
    torch.manual_seed(0)
    A, head = 3, ExpectedQ(2, 3, loss=loss)
    out = (2 * torch.randn(*shape, A, 1, dtype=torch.float64)).requires_grad_()
    action, counts = torch.randint(A, shape), torch.rand(shape) < 0.7
    counts[0, 0] = True
    reward, discount, weight = torch.rand(3, *shape, dtype=torch.float64)
    weight, bootstrap = weight * counts, torch.randn(*shape, 1, dtype=torch.float64)
    found, predicted = compiled_td_loss(
        out, action, reward, discount, bootstrap, weight, counts, is_clipped=loss == "huber"
    )
    taken = out.gather(2, action[..., None, None]).squeeze(2)
    expected = (head.loss(taken, reward, discount, bootstrap) * weight).sum() / counts.sum()
    torch.testing.assert_close((found, predicted), (expected, taken.detach()), atol=1e-14, rtol=1e-14)
    grads = [torch.autograd.grad(3 * total, out) for total in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-14, rtol=1e-14)
    assert not predicted.requires_grad


def test_td_loss_by_hand() -> None:
    """Values 1 and 4 of targets 1.5 + 0.5 * 1 and 0: errors -1 and 4, costs 0.5 and 3.5; one counts half."""
    out = torch.tensor([[[1.0], [9.0]], [[9.0], [4.0]], [[9.0], [9.0]]])[:, None].requires_grad_()
    loss, predicted = compiled_td_loss(
        out,
        torch.tensor([[0], [1], [0]]),
        torch.tensor([[1.5], [0.0], [0.0]]),
        torch.tensor([[0.5], [0.0], [0.0]]),
        torch.tensor([[[1.0]], [[7.0]], [[0.0]]]),
        torch.tensor([[1.0], [0.5], [0.0]]),
        torch.tensor([[True], [True], [False]]),
        is_clipped=True,
    )
    assert loss.item() == (0.5 + 0.5 * 3.5) / 2
    assert predicted.flatten().tolist() == [1, 4, 9]
    loss.backward()
    assert out.grad.flatten().tolist() == [-0.5, 0, 0, 0.25, 0, 0]


def test_td_loss_of_no_action_or_number_is_none() -> None:
    def loss(action: int, value: float) -> Tensor:
        out = torch.tensor([[[[value], [0.0]]]])
        one = torch.ones(1, 1)
        return compiled_td_loss(
            out, torch.tensor([[action]]), one, one, one[..., None], one, one > 0, is_clipped=True
        )[0]

    assert loss(0, 1.0).item() == 0.5
    assert loss(2, 1.0).isnan()
    assert loss(-1, 1.0).isnan()
    assert loss(0, math.nan).isnan()
    assert loss(0, math.inf) == math.inf

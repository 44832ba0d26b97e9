"""Action-value heads: numbers worked by hand, TorchRL and sb3-contrib as oracles, a known problem."""

from functools import partial
from math import floor, log

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import DistributionalQValueActor
from torchrl.modules.models.models import DuelingMlpDQNet
from torchrl.objectives import DistributionalDQNLoss

from lit_rl.errors import UserError
from lit_rl.models.q_heads import CategoricalQ, ExpectedQ, QHead, QuantileQ, half_squared, huber, project

FEATURES = 5
HEADS = {
    "huber": ExpectedQ,
    "mse": partial(ExpectedQ, loss="mse"),
    "categorical": partial(CategoricalQ, v_min=0.0, v_max=2.0, atoms=5),
    "quantile": partial(QuantileQ, quantiles=4, kappa=0.1),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
every_form = pytest.mark.parametrize(
    "form", [{}, {"hidden": 8}, {"dueling": True}, {"dueling": True, "hidden": 8}], ids=str
)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def set_linear(layer: nn.Linear, *biases: float) -> None:
    """A layer that says these numbers, whatever it is given."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor(biases))


# ------------------------------------------------------------------ forms


@every_head
@every_form
def test_shapes(make, form: dict) -> None:
    head: QHead = make(FEATURES, 3, **form)
    out = head(torch.randn(2, 7, FEATURES))
    Z = out.shape[-1]
    assert out.shape == (2, 7, 3, Z)
    values = head.values(out)
    assert values.shape == (2, 7, 3)
    assert head.num_actions == 3
    torch.testing.assert_close(head.values(out[..., 1, :]), values[..., 1])
    loss = head.loss(out[..., 1, :], torch.randn(2, 7), torch.rand(2, 7), torch.randn(2, 7, Z))
    assert loss.shape == (2, 7)
    single = [head.loss(out[0, i, 1, :], *(torch.zeros(()),) * 2, torch.zeros(Z)) for i in range(7)]
    whole = head.loss(out[0, :, 1, :], *(torch.zeros(7),) * 2, torch.zeros(7, Z))
    torch.testing.assert_close(torch.stack(single), whole)  # entries do not mix


def test_the_plain_head_is_a_linear_layer() -> None:
    head = ExpectedQ(FEATURES, 3)
    assert [name for name, _ in head.named_parameters()] == ["last.weight", "last.bias"]
    x = torch.randn(4, FEATURES)
    assert torch.equal(head.values(head(x)), head.last(x))
    assert head.last.weight.abs().max() <= FEATURES**-0.5  # torch's own start


@every_head
def test_the_numbers_of_an_action_are_its_own(make) -> None:
    head = make(FEATURES, 3)
    Z = head.atoms
    set_linear(head.last, *range(3 * Z))
    assert head(torch.randn(2, FEATURES))[1].tolist() == torch.arange(3.0 * Z).view(3, Z).tolist()


def test_dueling_by_hand() -> None:
    head = ExpectedQ(FEATURES, 3, dueling=True)
    set_linear(head.last, 1, 2, 6)  # mean 3
    set_linear(head.state_value[-1], 10)
    assert head.values(head(torch.randn(1, FEATURES))).tolist() == [[8.0, 9.0, 13.0]]
    set_linear(head.last, 101, 102, 106)  # what all advantages share is not seen
    assert head.values(head(torch.randn(1, FEATURES))).tolist() == [[8.0, 9.0, 13.0]]


def test_dueling_of_each_quantile_by_hand() -> None:
    head = QuantileQ(FEATURES, 2, quantiles=2, dueling=True)
    set_linear(head.last, 1, 20, 3, 60)  # action 0: 1, 20; action 1: 3, 60; means 2, 40
    set_linear(head.state_value[-1], 5, 100)
    assert head(torch.randn(1, FEATURES)).tolist() == [[[4.0, 80.0], [6.0, 120.0]]]


@pytest.mark.parametrize("hidden", [None, 8])
def test_dueling_agrees_with_torchrl(hidden: int | None) -> None:
    head = ExpectedQ(FEATURES, 3, dueling=True, hidden=hidden)
    cells = {
        "num_cells": [hidden] if hidden else [],
        "depth": int(hidden is not None),
        "activation_class": nn.ReLU,
    }
    theirs = DuelingMlpDQNet(
        out_features=3, mlp_kwargs_feature={"out_features": FEATURES}, mlp_kwargs_output=cells
    )
    theirs.features = nn.Identity()
    x = torch.randn(4, FEATURES)
    theirs(x)  # its layers find their widths
    advantage = [*(head.hidden.parameters() if head.hidden else ()), *head.last.parameters()]
    with torch.no_grad():
        for ours, their in zip(advantage, theirs.advantage.parameters(), strict=True):
            their.copy_(ours)
        for ours, their in zip(head.state_value.parameters(), theirs.value.parameters(), strict=True):
            their.copy_(ours)
    torch.testing.assert_close(head.values(head(x)), theirs(x))
    assert not torch.allclose(head.values(head(x)), theirs.advantage(x), atol=1e-3)


# ------------------------------------------------------------------ expected


def test_huber_and_half_squared_by_hand() -> None:
    value = torch.zeros(4, requires_grad=True)
    target = torch.tensor([0.5, -1.0, 3.0, -3.0])
    assert huber(value, target).tolist() == [0.125, 0.5, 2.5, 2.5]  # |error| - 1/2 beyond 1
    assert half_squared(value, target).tolist() == [0.125, 0.5, 4.5, 4.5]
    (gradient,) = torch.autograd.grad(huber(value, target).sum(), value)
    assert gradient.tolist() == [-0.5, 1.0, -1.0, 1.0]
    (gradient,) = torch.autograd.grad(half_squared(value, target).sum(), value)
    assert gradient.tolist() == [-0.5, 1.0, -3.0, 3.0]


def test_expected_target_by_hand() -> None:
    # targets 1 + 0.5 * 4 = 3 and, terminated, 1; predicted 1 and 1.5: errors 2 and -0.5
    given = (numbers(1.0, 1.5)[:, None], numbers(1, 1), numbers(0.5, 0), numbers(4, 4)[:, None])
    assert ExpectedQ(FEATURES, 2).loss(*given).tolist() == [1.5, 0.125]
    assert ExpectedQ(FEATURES, 2, loss="mse").loss(*given).tolist() == [2.0, 0.125]


# ------------------------------------------------------------------ C51

BELL = numbers(0.1, 0.2, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        # atoms 0 1 2 3 4 move to 0.5 1 1.5 2 2.5; halves of 0.1, 0.4 and 0.1 go to either side
        (0.5, 0.5, [0.05, 0.05 + 0.2 + 0.2, 0.2 + 0.2 + 0.05, 0.05, 0]),
        (0.0, 1.0, [0.1, 0.2, 0.4, 0.2, 0.1]),  # each exactly on its own atom
        (1.0, 1.0, [0, 0.1, 0.2, 0.4, 0.3]),  # one atom up: the last two meet at the top
        (-1.5, 1.0, [0.1 + 0.2 + 0.2, 0.2 + 0.1, 0.1 + 0.05, 0.05, 0]),  # 0.5 1.5 2.5 remain above the bottom
        (10.0, 1.0, [0, 0, 0, 0, 1]),
        (-10.0, 1.0, [1, 0, 0, 0, 0]),
        (1.25, 0.0, [0, 0.75, 0.25, 0, 0]),  # terminated: a single point
        (2.0, 0.0, [0, 0, 1, 0, 0]),
        (4.0, 0.0, [0, 0, 0, 0, 1]),
        (0.0, 0.0, [1, 0, 0, 0, 0]),
    ],
)
def test_categorical_loss_by_hand(reward: float, discount: float, expected: list[float]) -> None:
    support = torch.arange(5, dtype=torch.float64)
    projected = project(BELL, reward + discount * support)
    assert projected.tolist() == pytest.approx(expected)
    # predicted 1/2 1/4 1/8 1/16 1/16: their logarithms are -1 -2 -3 -4 -4 times log 2
    head = CategoricalQ(FEATURES, 2, v_min=0, v_max=4, atoms=5).double()
    predicted = numbers(-1, -2, -3, -4, -4) * log(2) + 7
    loss = head.loss(predicted, *numbers(reward, discount), BELL.log() - 3)
    steps = zip(expected, [1, 2, 3, 4, 4], strict=True)
    assert loss.item() == pytest.approx(log(2) * sum(p * by for p, by in steps))


def test_categorical_values_by_hand() -> None:
    head = CategoricalQ(FEATURES, 2, v_min=-1, v_max=3, atoms=3)  # atoms -1 1 3
    # (1/2, 1/4, 1/4) -> -1/2 + 1/4 + 3/4
    assert head.values(torch.tensor([0.5, 0.25, 0.25]).log()).item() == pytest.approx(0.5)


def algorithm_1(p: list[float], reward: float, discount: float, v_min: float, v_max: float) -> list[float]:
    """As Bellemare et al. write it, with a case of its own for what lies on an atom."""
    Z = len(p)
    spacing = (v_max - v_min) / (Z - 1)
    m = [0.0] * Z
    for j in range(Z):
        moved = min(max(reward + discount * (v_min + j * spacing), v_min), v_max)
        b = (moved - v_min) / spacing
        lower = min(floor(b), Z - 1)
        if b == lower:
            m[lower] += p[j]
        else:
            m[lower] += p[j] * (lower + 1 - b)
            m[lower + 1] += p[j] * (b - lower)
    return m


def test_projection_agrees_with_a_loop() -> None:
    torch.manual_seed(0)
    head = CategoricalQ(FEATURES, 2, v_min=-3.0, v_max=5.0, atoms=17).double()
    p = torch.randn(40, 17, dtype=torch.float64).softmax(-1)
    reward, discount = 3 * torch.randn(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    discount[:5] = 0
    # an arbitrary prediction, so that a loss tells the projected distributions apart
    predicted = torch.randn(40, 17, dtype=torch.float64)
    rows = zip(p.tolist(), reward.tolist(), discount.tolist(), strict=True)
    target = torch.tensor([algorithm_1(*row, -3.0, 5.0) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(target.sum(-1), torch.ones(40, dtype=torch.float64))
    expected = -(target * predicted.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(
        head.loss(predicted, reward, discount, p.log()), expected, rtol=1e-12, atol=1e-12
    )


def test_projection_keeps_the_mean_inside_the_support() -> None:
    torch.manual_seed(0)
    p = torch.randn(20, 11, dtype=torch.float64).softmax(-1)
    position = 10 * torch.rand(20, 11, dtype=torch.float64)
    projected = project(p, position)
    assert (projected >= 0).all()
    atoms = torch.arange(11, dtype=torch.float64)
    torch.testing.assert_close(projected @ atoms, (p * position).sum(-1))


def test_categorical_loss_agrees_with_torchrl() -> None:
    """TorchRL's C51 loss, of a network that reads its logits off the observation."""
    torch.manual_seed(0)
    N, A, Z = 30, 3, 11
    head = CategoricalQ(FEATURES, A, v_min=-2.0, v_max=3.0, atoms=Z)
    logits, next_logits = 2 * torch.randn(2, N, A, Z)
    action = torch.randint(A, (N,))
    reward, terminated = 2 * torch.randn(N), torch.rand(N) < 0.3

    class LogProbabilities(nn.Module):
        def forward(self, logits_NAZ: Tensor) -> Tensor:
            return logits_NAZ.log_softmax(-1).transpose(-2, -1)

    network = TensorDictModule(LogProbabilities(), in_keys=["observation"], out_keys=["action_value"])
    actor = DistributionalQValueActor(network, support=head.support, action_space="categorical")
    oracle = DistributionalDQNLoss(actor, gamma=0.9, delay_value=False, reduction="none")
    steps = TensorDict(
        {
            "observation": logits,
            "action": action,
            "next": {
                "observation": next_logits,
                "reward": reward[:, None],
                "done": terminated[:, None],
                "terminated": terminated[:, None],
            },
        },
        batch_size=[N],
    )
    theirs = oracle(steps)["loss"]

    entry = torch.arange(N)
    greedy = head.values(next_logits).argmax(-1)
    given = (reward, 0.9 * ~terminated, next_logits[entry, greedy])
    torch.testing.assert_close(head.loss(logits[entry, action], *given), theirs, rtol=1e-5, atol=1e-5)
    undiscounted = head.loss(logits[entry, action], reward, 1.0 * ~terminated, given[2])
    assert not torch.allclose(undiscounted, theirs, atol=1e-2)


# ------------------------------------------------------------------ QR-DQN


def test_quantile_loss_by_hand() -> None:
    head = QuantileQ(FEATURES, 2, quantiles=2).double()
    predicted = numbers(0, 1).requires_grad_()
    loss = head.loss(predicted, *numbers(0.5, 0.5), numbers(0, 5))  # targets 0.5 and 3
    # midpoint 1/4, errors  0.5, 3: Huber 1/8, 5/2, both weigh 1/4:      (1/32 + 5/8) / 2 = 21/64
    # midpoint 3/4, errors -0.5, 2: Huber 1/8, 3/2, weights 1/4, 3/4:    (1/32 + 9/8) / 2 = 37/64
    assert loss.item() == pytest.approx(58 / 64)
    loss.backward()
    # -(1/4 * 1/2 + 1/4 * 1) / 2 and -(-1/4 * 1/2 + 3/4 * 1) / 2
    assert predicted.grad.tolist() == pytest.approx([-3 / 16, -5 / 16])


def test_kappa_by_hand() -> None:
    head = QuantileQ(FEATURES, 2, quantiles=1, kappa=0.5).double()
    # midpoint 1/2; error 2: 1/2 * 1/2 * (2 - 1/4); error -0.25: 1/2 * 1/2 * 1/16
    loss = head.loss(torch.zeros(2, 1).double(), numbers(2, -0.25), numbers(0, 0), torch.zeros(2, 1).double())
    assert loss.tolist() == pytest.approx([0.4375, 1 / 64])


def test_quantile_loss_agrees_with_sb3_contrib() -> None:
    from sb3_contrib.common.utils import quantile_huber_loss

    torch.manual_seed(0)
    head = QuantileQ(FEATURES, 2, quantiles=32)
    predicted, bootstrap = 2 * torch.randn(2, 10, 32)
    reward, discount = torch.randn(10), torch.rand(10)
    ours = head.loss(predicted, reward, discount, bootstrap)
    for i in range(10):
        theirs = quantile_huber_loss(predicted[i, None], (reward[i] + discount[i] * bootstrap[i])[None])
        torch.testing.assert_close(ours[i], theirs)


def test_quantile_values_are_the_mean() -> None:
    assert QuantileQ(FEATURES, 2, quantiles=4).values(torch.tensor([[1.0, 2.0, 3.0, 6.0]])).tolist() == [3.0]


# ------------------------------------------------------------------ all heads


@every_head
def test_gradients(make) -> None:
    torch.manual_seed(0)
    head = make(FEATURES, 2).double()
    predicted = torch.randn(6, head.atoms, dtype=torch.float64, requires_grad=True)
    reward, discount = torch.randn(2, 6, dtype=torch.float64)
    bootstrap = torch.randn(6, head.atoms, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: head.loss(p, reward, discount, bootstrap), (predicted,))
    assert torch.autograd.gradcheck(head.values, (predicted,))


@every_head
def test_the_bootstrap_gets_no_gradient_and_nothing_is_changed(make) -> None:
    head = make(FEATURES, 2)
    given = [torch.randn(6, head.atoms), torch.randn(6), torch.rand(6), torch.randn(6, head.atoms)]
    copies = [tensor.clone() for tensor in given]
    predicted, _, _, bootstrap = given
    predicted.requires_grad_()
    bootstrap.requires_grad_()
    head.loss(*given).sum().backward()
    assert predicted.grad.abs().sum() > 0
    assert bootstrap.grad is None
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy)


STATE = torch.ones(1, FEATURES)


def fit(head: QHead, *, gamma: float = 0.5, steps: int = 500) -> Tensor:
    """The numbers ``[A, Z]`` learnt of one state: action 0 pays 0 or 2 and ends, 1 pays 0 and leads to 0."""
    action, reward = torch.tensor([0, 0, 1]), torch.tensor([0.0, 2.0, 0.0])
    discount = torch.tensor([0.0, 0.0, gamma])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    calming = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        out = head(STATE)[0]
        optimizer.zero_grad()
        head.loss(out[action], reward, discount, out[0].expand(3, -1)).mean().backward()
        optimizer.step()
        calming.step()
    with torch.no_grad():
        return head(STATE)[0]


@every_head
@every_form
def test_a_known_problem_is_learnt(make, form: dict) -> None:
    torch.manual_seed(0)
    head = make(FEATURES, 2, **form)
    truth = torch.tensor([1.0, 0.5])  # mean of 0 and 2, and half of it
    with torch.no_grad():
        untrained = head.values(head(STATE)[0])
    torch.testing.assert_close(head.values(fit(head)), truth, rtol=0, atol=0.05)
    assert not torch.allclose(untrained, truth, rtol=0, atol=0.05)


@every_head
def test_a_wrong_discount_is_seen(make) -> None:
    torch.manual_seed(0)
    head = make(FEATURES, 2)
    torch.testing.assert_close(head.values(fit(head, gamma=0.9)), torch.tensor([1.0, 0.9]), rtol=0, atol=0.06)


def test_known_distributions_are_learnt() -> None:
    torch.manual_seed(0)
    # atoms 0, 0.5, 1, 1.5, 2
    probability = fit(HEADS["categorical"](FEATURES, 2)).softmax(-1)
    torch.testing.assert_close(
        probability, torch.tensor([[0.5, 0, 0, 0, 0.5], [0.5, 0, 0.5, 0, 0]]), rtol=0, atol=0.05
    )
    # Quantiles at 1/8, 3/8, 5/8, 7/8; the quadratic part draws the inner ones inwards by up to 0.6 kappa.
    quantiles = fit(HEADS["quantile"](FEATURES, 2))
    torch.testing.assert_close(quantiles, torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]]), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ExpectedQ, {"loss": "mae"}, "there is no loss 'mae' of action values: use huber or mse"),
        (ExpectedQ, {"hidden": 0}, "hidden is 0: it must be at least 1"),
        (CategoricalQ, {"v_min": 1, "v_max": 1}, "v_min is 1 and v_max is 1: give two finite returns"),
        (CategoricalQ, {"v_min": 0, "v_max": float("inf")}, "v_min is 0 and v_max is inf"),
        (CategoricalQ, {"v_min": float("nan"), "v_max": 1}, "v_min is nan and v_max is 1"),
        (CategoricalQ, {"v_min": 0, "v_max": 1, "atoms": 1}, "atoms is 1: it must be at least 2"),
        (QuantileQ, {"quantiles": 0}, "quantiles is 0: it must be at least 1"),
        (QuantileQ, {"kappa": 0.0}, "kappa is 0.0: it must be above 0"),
    ],
)
def test_bad_options_are_one_line(make, options: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        make(FEATURES, 2, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)

"""From gradients to new weights, held to torch's own clipping and Adam."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lit_rl.algorithms.gradients import average_and_clip, backward, optimizer_step

torch.set_num_threads(1)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def adam(module: nn.Sequential, algorithm: type[torch.optim.Adam]) -> torch.optim.Adam:
    first, _, last = module
    groups = [
        {"params": list(first.parameters()), "lr": 1e-2},
        {"params": list(last.parameters()), "lr": 3e-2},
    ]
    return algorithm(groups, eps=1e-5, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("algorithm", [torch.optim.Adam, torch.optim.AdamW])
def test_the_kernel_alone_takes_adams_steps(
    algorithm: type[torch.optim.Adam], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = net(0), net(0)
    optimizers = adam(ours, algorithm), adam(theirs, algorithm)
    for step in range(6):
        if step == 3:  # from here on there is a state for each weight
            monkeypatch.setattr(optimizers[0], "step", None)
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step))
        for module in (ours, theirs):
            module.zero_grad()
            # At first the first layer, then the last one has no gradient.
            features = module[0](x).detach() if step < 2 else module[0](x)
            (features if step == 4 else module[2](features.tanh())).square().sum().backward()
        optimizer_step(optimizers[0])
        optimizers[1].step()
        for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=0)
    torch.testing.assert_close(optimizers[0].state_dict(), optimizers[1].state_dict())


def test_gradients_are_as_exact_as_the_pass_was() -> None:
    """Of what ran outside autocast, though backward is called within it, as Lightning has it."""
    exact, rounded = net(1), net(1)
    x = torch.randn(7, 3)
    exact(x).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = rounded(x).square().sum()
        backward(loss)
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_is_torchs(max_norm: float) -> None:
    ours = net(1)
    ours(torch.randn(7, 3)).square().sum().backward()
    theirs = copy.deepcopy(ours)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        reference.grad = mine.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert average_and_clip(ours.parameters(), max_norm) == pytest.approx(norm.item())
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_a_gradient_that_is_not_finite_is_left_alone() -> None:
    module = net(2)
    module(torch.full((1, 3), torch.inf)).sum().backward()
    before = [parameter.grad.clone() for parameter in module.parameters()]
    assert not torch.isfinite(torch.tensor(average_and_clip(module.parameters(), 0.5)))
    for parameter, was in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, was, equal_nan=True)


class Shrinking(torch.optim.AdamW):
    """Adam's step, then half of every weight."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        torch._foreach_mul_(self.param_groups[0]["params"], 0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: Shrinking(parameters, fused=True),
        lambda parameters: torch.optim.Adam(parameters, amsgrad=True, fused=True),
        lambda parameters: torch.optim.Adam(parameters, maximize=True, fused=True),
        lambda parameters: torch.optim.Adam(parameters),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    ],
    ids=["subclass", "amsgrad", "maximize", "Adam", "SGD"],
)
def test_any_optimizer_takes_its_own_step(make: Callable[..., torch.optim.Optimizer]) -> None:
    ours, theirs = net(0), net(0)
    optimizers = make(ours.parameters()), make(theirs.parameters())
    for _ in range(4):
        for module in (ours, theirs):
            module.zero_grad()
            module(torch.ones(2, 3)).square().sum().backward()
        optimizer_step(optimizers[0])
        optimizers[1].step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0)

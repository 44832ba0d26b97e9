"""Action-value heads of discrete actions: features -> Z numbers an action, their mean value and their loss.

Every head learns the target ``reward + discount * bootstrap``, where `bootstrap` is what the target network
says of the action that it or the online network prefers:

- `ExpectedQ` (Z = 1): the number is the expected return (Mnih et al. 2015, Nature 518).
- `CategoricalQ` (C51, Bellemare et al. 2017, arXiv 1707.06887): logits of a distribution of the return over Z
  fixed atoms.
- `QuantileQ` (QR-DQN, Dabney et al. 2018, arXiv 1710.10044): the return's quantiles at the midpoints
  ``(2i - 1) / 2Z``, i = 1..Z.

Shapes: ``...`` any leading dimensions, D features, A actions, Z numbers an action. Layers start as torch
starts them, the usual start of DQN networks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import isfinite
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rl.errors import UserError, check_range
from lit_rl.trunks import Linear, linear


class QHead(nn.Module, ABC):
    """Features to values of A actions, each described by Z numbers.

    Args:
        features: D.
        num_actions: A.
        atoms: Z.
        dueling: adds a stream for the state's value to the one for the actions' advantages: ``Q = V + Adv -
            mean Adv`` (Wang et al. 2016, arXiv 1511.06581, eq. 9), for each of the Z numbers.
        hidden: width of a linear layer + ReLU at the beginning of each stream; none if absent.
    """

    hidden: nn.Sequential | None
    state_value: nn.Sequential | None

    def __init__(
        self,
        features: int,
        num_actions: int,
        *,
        atoms: int = 1,
        dueling: bool = False,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        check_range({"hidden": hidden}, 1)
        self.num_actions = num_actions
        self.atoms = atoms
        width = hidden or features
        self.hidden = _hidden_layer(features, hidden) if hidden else None
        self.last = Linear(width, num_actions * atoms)
        before = _hidden_layer(features, hidden) if hidden else ()
        self.state_value = nn.Sequential(*before, Linear(width, atoms)) if dueling else None

    def forward(self, features: Tensor) -> Tensor:
        """The numbers ``[..., A, Z]`` of features ``[..., D]``."""
        inner = features if self.hidden is None else self.hidden(features)
        flat = linear(inner, self.last.weight, self.last.bias)  # half a module's call
        out = flat.unsqueeze(-1) if self.atoms == 1 else flat.unflatten(-1, (self.num_actions, self.atoms))
        if self.state_value is None:
            return out
        return out + (self.state_value(features).unsqueeze(-2) - out.mean(-2, keepdim=True))

    @property
    def description(self) -> str:
        """What tells the meaning of the numbers: a checkpoint of another one is refused."""
        return f"{type(self).__name__}({self.extra_repr()})"

    @abstractmethod
    def values(self, out: Tensor) -> Tensor:
        """Expected returns: ``[..., A]`` of ``[..., A, Z]``, or ``[...]`` of one action's ``[..., Z]``."""

    @abstractmethod
    def loss(self, predicted: Tensor, reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
        """What is to be descended, ``[...]``, one number an entry.

        Args:
            predicted: ``[..., Z]`` of the action taken; with gradient.
            reward: ``[...]``, summed up to where the target bootstraps.
            discount: ``[...]`` of the value there; 0 where nothing bootstraps.
            bootstrap: ``[..., Z]`` of the action that the target rests on; gets no gradient.
        """


def _hidden_layer(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(Linear(features, width), nn.ReLU())


# ------------------------------------------------------------------ expected


def huber(value: Tensor, target: Tensor) -> Tensor:
    """Half the squared error up to an error of 1, from there linear; ``[...]`` like both."""
    return F.smooth_l1_loss(value, target, reduction="none")


def half_squared(value: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, whose gradient is the error, as `huber`'s is near 0; ``[...]`` like both."""
    return 0.5 * F.mse_loss(value, target, reduction="none")


ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"huber": huber, "mse": half_squared}


class ExpectedQ(QHead):
    """The expected return of each action, by one number.

    Args:
        features: D.
        num_actions: A.
        dueling: see `QHead`.
        hidden: see `QHead`.
        loss: of the error; `mse` is half the squared error, `huber` (DQN's clipped error) the same up to 1.
    """

    def __init__(
        self,
        features: int,
        num_actions: int,
        *,
        dueling: bool = False,
        hidden: int | None = None,
        loss: Literal["huber", "mse"] = "huber",
    ) -> None:
        super().__init__(features, num_actions, dueling=dueling, hidden=hidden)
        if loss not in ERRORS:
            raise UserError(f"there is no loss {loss!r} of action values: use {' or '.join(ERRORS)}")
        self.error = ERRORS[loss]

    def values(self, out: Tensor) -> Tensor:
        return out.squeeze(-1)

    def loss(self, predicted: Tensor, reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
        td_target = reward + discount * bootstrap.detach().squeeze(-1)
        return self.error(predicted.squeeze(-1), td_target)


# ------------------------------------------------------------------ C51


def project(probability: Tensor, position: Tensor) -> Tensor:
    """Moves probability onto atoms: algorithm 1 of Bellemare et al. 2017 behind its first two lines.

    What lies between two atoms is shared by both, the nearer one getting the more; what lies beyond the
    outer ones goes to them.

    Args:
        probability: ``[..., Z]``.
        position: ``[..., Z]``, where each probability lies, counted in atoms from the lowest (0) to the
            highest (Z - 1).

    Returns:
        the probability ``[..., Z]`` of each atom.
    """
    highest = position.shape[-1] - 1
    position = position.clamp(0, highest)
    # The lower neighbour of the highest atom is the one below it, so that there is an upper one.
    lower = position.floor().clamp(max=highest - 1)
    to_upper = probability * (position - lower)
    index = lower.long()
    projected = torch.zeros_like(position).scatter_add_(-1, index, probability - to_upper)
    return projected.scatter_add_(-1, index + 1, to_upper)


class CategoricalQ(QHead):
    """The distribution of each action's return over atoms spread evenly from `v_min` to `v_max`, by logits.

    Its loss is the cross-entropy to the target's distribution, projected onto the atoms.

    Args:
        features: D.
        num_actions: A.
        dueling: see `QHead`.
        hidden: see `QHead`.
        v_min: the lowest return that can be told.
        v_max: the highest return that can be told.
        atoms: Z.
    """

    support: Tensor

    def __init__(
        self,
        features: int,
        num_actions: int,
        *,
        dueling: bool = False,
        hidden: int | None = None,
        v_min: float,
        v_max: float,
        atoms: int = 51,
    ) -> None:
        check_range({"atoms": atoms}, 2)
        if not (isfinite(v_min) and isfinite(v_max) and v_min < v_max):
            raise UserError(
                f"v_min is {v_min} and v_max is {v_max}: give two finite returns, the lower one first"
            )
        super().__init__(features, num_actions, atoms=atoms, dueling=dueling, hidden=hidden)
        self.v_min = v_min
        self.v_max = v_max
        self.spacing = (v_max - v_min) / (atoms - 1)
        self.register_buffer("support", torch.linspace(v_min, v_max, atoms), persistent=False)

    def extra_repr(self) -> str:
        return f"v_min={self.v_min:g}, v_max={self.v_max:g}"

    def values(self, out: Tensor) -> Tensor:
        return (out.softmax(-1) * self.support).sum(-1)  # a product that mixed precision leaves alone

    def loss(self, predicted: Tensor, reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
        with torch.no_grad():
            moved = reward.unsqueeze(-1) + discount.unsqueeze(-1) * self.support
            target = project(bootstrap.softmax(-1), (moved - self.v_min) / self.spacing)
        return -(target * predicted.log_softmax(-1)).sum(-1)


# ------------------------------------------------------------------ QR-DQN


class QuantileQ(QHead):
    """The quantiles of each action's return.

    Its loss is the quantile Huber loss (Dabney et al. 2018, eq. 10): summed over the predicted quantiles,
    the mean over those of the target. It visits Z * Z pairs an entry.

    Args:
        features: D.
        num_actions: A.
        dueling: see `QHead`.
        hidden: see `QHead`.
        quantiles: Z.
        kappa: the error up to which the loss is quadratic. The smaller, the closer to true quantiles.
    """

    midpoints: Tensor

    def __init__(
        self,
        features: int,
        num_actions: int,
        *,
        dueling: bool = False,
        hidden: int | None = None,
        quantiles: int = 200,
        kappa: float = 1.0,
    ) -> None:
        check_range({"quantiles": quantiles}, 1)
        check_range({"kappa": kappa}, 0, above=True)
        super().__init__(features, num_actions, atoms=quantiles, dueling=dueling, hidden=hidden)
        self.kappa = kappa
        self.register_buffer("midpoints", (torch.arange(quantiles) + 0.5) / quantiles, persistent=False)

    def values(self, out: Tensor) -> Tensor:
        return out.mean(-1)

    def loss(self, predicted: Tensor, reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
        td_target = reward.unsqueeze(-1) + discount.unsqueeze(-1) * bootstrap.detach()
        # Pairs [..., target, predicted]: what belongs to a predicted quantile lies along the last dimension.
        error = td_target.unsqueeze(-1) - predicted.unsqueeze(-2)
        zero = error.new_zeros(()).expand_as(error)
        pairs = F.huber_loss(error, zero, reduction="none", delta=self.kappa)
        weight = torch.where(error < 0, 1 - self.midpoints, self.midpoints)
        return (weight * pairs).mean(-2).sum(-1)

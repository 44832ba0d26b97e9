"""Policy heads: features -> a distribution over actions, in plain tensor operations.

torch.distributions validates and allocates at every call, which costs more than the network itself
when acting one step at a time; the tests hold these heads to it as an oracle.

Shapes: ``...`` any leading dimensions, D features, A action dimensions. An `action` is what was sampled;
`to_env` makes of it what the environment takes (squashed or clipped to the bounds).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log, pi
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Generator, Tensor, nn

from lit_rl.autograd import first_order
from lit_rl.compiled import can_be_compiled
from lit_rl.errors import UserError
from lit_rl.models.encoder import one_line, orthogonal


class PolicyHead(nn.Module, ABC):
    """A distribution over actions, described by one tensor of parameters ``[..., P]``."""

    num_params: int
    action_shape: tuple[int, ...]
    action_dtype: torch.dtype

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Parameters ``[..., P]`` of features ``[..., D]``."""

    @abstractmethod
    def noise(self, *shape: int, generator: Generator | None = None) -> Tensor:
        """Random numbers ``[*shape, P]`` that `choose` turns into actions: many steps' worth in one call."""

    @abstractmethod
    def choose(self, params: Tensor, noise: Tensor) -> Tensor:
        """The action ``[..., *action_shape]`` that these random numbers ``[..., P]`` draw."""

    def sample(self, params: Tensor, generator: Generator | None = None) -> Tensor:
        """An action ``[..., *action_shape]`` drawn with the given random state."""
        return self.choose(params, self.noise(*params.shape[:-1], generator=generator))

    @abstractmethod
    def mode(self, params: Tensor) -> Tensor:
        """The greedy action ``[..., *action_shape]``."""

    @abstractmethod
    def log_prob_and_entropy(self, params: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (density) of an action and entropy in nats, each ``[...]``."""

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Log-probability (density) ``[...]`` of an action."""
        return self.log_prob_and_entropy(params, action)[0]

    def to_env(self, action: Tensor) -> Tensor:
        """The action in the environment's own units."""
        return action


class Categorical(PolicyHead):
    """Independent categorical variables, one for Discrete. Parameters: the logits."""

    start: Tensor | None

    def __init__(self, features: int, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        super().__init__()
        self.is_multi = isinstance(space, spaces.MultiDiscrete)
        nvec = space.nvec.tolist() if isinstance(space, spaces.MultiDiscrete) else [int(space.n)]
        self.sizes: list[int] = nvec
        self.logits = orthogonal(nn.Linear(features, sum(nvec)), gain=0.01)
        start = torch.as_tensor(space.start) if np.any(space.start) else None
        self.register_buffer("start", start, persistent=False)
        self.num_params = sum(nvec)
        self.action_shape = (len(nvec),) if self.is_multi else ()
        self.action_dtype = torch.int64

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.logits.weight, self.logits.bias)  # half a module's call

    def _pick(self, scores: Tensor) -> Tensor:
        if not self.is_multi:
            return scores.argmax(-1)
        return torch.stack([part.argmax(-1) for part in scores.split(self.sizes, -1)], -1)

    def noise(self, *shape: int, generator: Generator | None = None) -> Tensor:
        # p / E with E ~ Exp(1) is largest at i with probability p_i (the race that torch.multinomial runs).
        race = torch.empty(*shape, self.num_params, device=next(self.parameters()).device)
        return race.exponential_(generator=generator).log_().neg_()

    def choose(self, params: Tensor, noise: Tensor) -> Tensor:
        return self._pick(params + noise)

    def mode(self, params: Tensor) -> Tensor:
        return self._pick(params)

    def log_prob_and_entropy(self, params: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_multi:
            return _categorical_terms(params, action)
        parts = zip(params.split(self.sizes, -1), action.unbind(-1), strict=True)
        log_probs, entropies = zip(*(_categorical_terms(part, a) for part, a in parts), strict=True)
        return torch.stack(log_probs).sum(0), torch.stack(entropies).sum(0)

    def to_env(self, action: Tensor) -> Tensor:
        return action if self.start is None else action + self.start


def _categorical_terms(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of logits ``[..., P]`` and actions ``[...]``."""
    is_plain = action.is_cpu and action.dtype == torch.int64 and logits.shape[:-1] == action.shape
    if is_plain and logits.numel() and can_be_compiled(logits):
        from lit_rl.compiled.losses import compiled_categorical

        return compiled_categorical(logits, action)
    return _CategoricalTerms.apply(logits, action)


class _CategoricalTerms(torch.autograd.Function):
    """Log-probability and entropy of logits ``[..., P]`` and actions ``[...]`` as one step of autograd.

    ``d log p_a / d logit_i = [i = a] - p_i`` and ``d H / d logit_i = -p_i (log p_i + H)``.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits, -1)
        index = action.unsqueeze(-1)
        p = log_p.exp()
        entropy = (p * log_p).sum(-1, keepdim=True).neg_()
        ctx.save_for_backward(log_p, p, entropy, index)
        return log_p.gather(-1, index).squeeze(-1), entropy.squeeze(-1)

    @staticmethod
    @first_order
    def backward(ctx: Any, dlog_prob: Tensor, dentropy: Tensor) -> tuple[Tensor, None]:
        log_p, p, entropy, index = ctx.saved_tensors
        dlog_prob = dlog_prob.unsqueeze(-1)
        dlogits = torch.addcmul(dlog_prob, log_p + entropy, dentropy.unsqueeze(-1)).mul_(p).neg_()
        return dlogits.scatter_add_(-1, index, dlog_prob), None


class Gaussian(PolicyHead):
    """A diagonal Gaussian with a learnable log std that does not depend on the state. Parameters: the mean.

    With `squash`, actions are ``tanh`` of the Gaussian stretched to the bounds, the density corrected
    (Haarnoja et al. 2018, arXiv 1801.01290, appendix C); without, they are clipped to the bounds on
    their way into the environment.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, features: int, space: spaces.Box, *, squash: bool = False, log_std: float = 0.0
    ) -> None:
        super().__init__()
        if squash and not np.isfinite([space.low, space.high]).all():
            raise UserError(f"action space {one_line(space)} has no bounds to squash to: set squash to false")
        self.squash = squash
        self.mean = orthogonal(nn.Linear(features, space.shape[0]), gain=0.01)
        self.log_std = nn.Parameter(torch.full((space.shape[0],), log_std))
        self.register_buffer("low", torch.as_tensor(space.low, dtype=torch.float32), persistent=False)
        self.register_buffer("high", torch.as_tensor(space.high, dtype=torch.float32), persistent=False)
        self.num_params = space.shape[0]
        self.action_shape = space.shape
        self.action_dtype = torch.float32

    def forward(self, features: Tensor) -> Tensor:
        return self.mean(features)

    def noise(self, *shape: int, generator: Generator | None = None) -> Tensor:
        return torch.empty(*shape, self.num_params, device=self.log_std.device).normal_(generator=generator)

    def choose(self, params: Tensor, noise: Tensor) -> Tensor:
        return torch.addcmul(params, self.log_std.exp(), noise)

    def mode(self, params: Tensor) -> Tensor:
        return params

    def log_prob_and_entropy(self, params: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """As promised; of the squashed Gaussian the entropy is a one-sample estimate, differentiable.

        `lit_rl.compiled.losses` has the same without `squash`.
        """
        z = (action - params) * (-self.log_std).exp()
        log_scale = (self.log_std + 0.5 * log(2 * pi)).sum()
        log_prob = -0.5 * z.square().sum(-1) - log_scale
        entropy = (log_scale + 0.5 * self.num_params).expand(params.shape[:-1])
        if self.squash:
            log_prob = log_prob - self._log_stretch(action).sum(-1)
            entropy = entropy + self._log_stretch(self.sample(params)).sum(-1)
        return log_prob, entropy

    def _log_stretch(self, action: Tensor) -> Tensor:
        """``log |d env_action / d action|``, with ``log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))``."""
        return 2 * (log(2) - action - F.softplus(-2 * action)) + (0.5 * (self.high - self.low)).log()

    def to_env(self, action: Tensor) -> Tensor:
        if self.squash:
            return self.low + 0.5 * (action.tanh() + 1) * (self.high - self.low)
        return action.clamp(self.low, self.high)


def policy_head(
    features: int, space: spaces.Space, *, squash: bool = False, log_std: float = 0.0
) -> PolicyHead:
    """The head that fits an action space; raises `UserError` for one that none fits."""
    shown = one_line(space)
    if len(space.shape or ()) > 1 or (isinstance(space, spaces.Box) and not space.shape):
        raise UserError(f"action space {shown} is not supported: bring it to one dimension with a wrapper")
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return Categorical(features, space)
    if isinstance(space, spaces.MultiBinary):
        return Categorical(features, spaces.MultiDiscrete([2] * space.shape[0]))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return Gaussian(features, space, squash=squash, log_std=log_std)
    raise UserError(
        f"action space {shown} is not supported: use Discrete, MultiDiscrete, MultiBinary or a floating Box"
    )

"""The feed-forward half of a layer: a SwiGLU, or a mixture of SwiGLU experts.

    SwiGLU(x) = (silu(x W_gate) * (x W_up)) W_down                     (Shazeer 2020, arXiv:2002.05202)
    y(x)      = sum over e in top-k of w_e(x) SwiGLU_e(x)              (Shazeer et al. 2017, arXiv:1701.06538)

with logits x W_router; `w` is the softmax over the k chosen logits. With k = 1 that would be the constant 1,
from which the router learns nothing, so there `w` is the chosen expert's probability among all, as in Switch
(Fedus, Zoph & Shazeer 2021, arXiv:2101.03961). No expert has a capacity and no token is dropped: what a token
gets depends on itself alone, so a sequence may be cut anywhere.

The load-balance loss is that of Switch, eq. 4 to 6, times E, without its coefficient:

    balance = E sum_e f_e P_e,    f_e: share of the assignments that go to expert e,
                                  P_e: mean over tokens of expert e's probability among all E.

Switch has one assignment a token; with k a token, f is divided by k N, so that it sums to 1 for every k. Even
routing gives 1. All on one expert gives E with k = 1; all on the same k experts gives E / k.

Shapes: B rows, T time steps, N = B T tokens, D = d_model, H = d_ff, G = 2 H, E experts, k = top_k,
S = k N assignments.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rl.trunks import Linear, linear


class Load(NamedTuple):
    """How evenly the tokens of one pass were spread over experts."""

    balance: Tensor  # the load-balance loss, with gradient to the router
    usage_E: Tensor  # share of assignments, sums to 1; no gradient


class SwiGLU(nn.Module):
    """One gated MLP of width `d_ff`, without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ff, bias=False)
        self.down = Linear(d_ff, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Load | None]:
        """``y [B, T, D]``, and no load: one expert has them all."""
        return self.down(gated(self.gate_up(x_BTD))), None


class Experts(nn.Module):
    """`n_experts` gated MLPs of width `d_ff`, of which a router gives each token `top_k`."""

    def __init__(self, d_model: int, d_ff: int, *, n_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k must be from 1 to the number of experts, {n_experts}, not {top_k}")
        self.top_k = top_k
        self.router = nn.Parameter(torch.empty(n_experts, d_model))
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        for weight in (self.router, self.gate_up, self.down):  # as nn.Linear starts
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Load | None]:
        """``y [B, T, D]``; the load where it can be learned from, in training with gradients."""
        x_ND = x_BTD.flatten(0, 1)
        # In float32 under autocast too (Switch, section 2.4): rounded logits choose other experts.
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(self.router.dtype), self.router)
        weight_Nk, expert_Nk = route(logits_NE, self.top_k)
        y_ND = mixture(x_ND, weight_Nk, expert_Nk, self.gate_up, self.down)
        load = measure_load(logits_NE, expert_Nk) if self.training and torch.is_grad_enabled() else None
        return y_ND.view_as(x_BTD), load


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights ``[N, k]`` and numbers ``[N, k]`` of each token's experts."""
    if top_k == 1:
        return logits_NE.softmax(dim=-1).max(dim=-1, keepdim=True)
    chosen_Nk, expert_Nk = logits_NE.topk(top_k, dim=-1)
    return chosen_Nk.softmax(dim=-1), expert_Nk


@torch.compiler.disable  # the sizes of its groups are numbers known only when it runs
def mixture(
    x_ND: Tensor, weight_Nk: Tensor, expert_Nk: Tensor, gate_up_EGD: Tensor, down_EDH: Tensor
) -> Tensor:
    """``y [N, D]``: the weighted sum of each token's experts.

    Assignments are sorted by expert, so that each expert is one product over its own tokens. Running all E on
    every token costs E / k times the arithmetic; `torch.nn.functional.grouped_mm` knows no float64.
    """
    n_experts, top_k = gate_up_EGD.shape[0], expert_Nk.shape[1]
    expert_S = expert_Nk.flatten()
    order_S = expert_S.argsort(stable=True)
    counts = torch.bincount(expert_S, minlength=n_experts).tolist()

    groups = x_ND.index_select(0, order_S // top_k).split(counts)
    gate_up_SG = torch.cat([linear(x, w) for x, w in zip(groups, gate_up_EGD.unbind(), strict=True)])
    groups = gated(gate_up_SG).split(counts)
    y_SD = torch.cat([linear(h, w) for h, w in zip(groups, down_EDH.unbind(), strict=True)])
    y_SD = y_SD.index_select(0, order_S.argsort())  # in the order of tokens again
    return (y_SD.view(*weight_Nk.shape, -1) * weight_Nk[:, :, None]).sum(dim=1)


def measure_load(logits_NE: Tensor, expert_Nk: Tensor) -> Load:
    """The load-balance loss, a scalar, and each expert's share of the assignments ``[E]``."""
    n_experts = logits_NE.shape[1]
    usage_E = torch.bincount(expert_Nk.flatten(), minlength=n_experts).to(logits_NE.dtype) / expert_Nk.numel()
    mean_probability_E = logits_NE.softmax(dim=-1).mean(dim=0)
    return Load(n_experts * (usage_E * mean_probability_E).sum(), usage_E)

"""The selective scan with tensor operations alone: on any device, in any dtype.

A loop over time, one operation a step forward and three backward; everything else runs over whole chunks. The
gradient is written by hand. With g_t the gradient that reaches h_t from y_t and from all later steps, and x'
for the gradient of x,

    g_t   = C_t y'_t + a_{t+1} g_{t+1}                  a_t = exp(dt_t A), 0 at a reset
    u'_t  = dt_t sum_n g_t B_t
    dt'_t = u_t sum_n g_t B_t + sum_n w_t A             w_t = a_t g_t h_{t-1}
    A'    = sum_{b,t} w_t dt_t,     B'_t = sum_e g_t dt_t u_t,     C'_t = sum_e h_t y'_t

Of the states only those at chunk borders are kept for it; the others are computed again.

Shapes: B rows, T time steps, E channels, N = d_state, K steps of a chunk, J = K + 1. Inside, time comes first
and channels last, so that what a step reads and writes is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_rl.autograd import first_order

CHUNK = 16


def torch_scan(
    u_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BEN: Tensor,
    is_init_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan.selective_scan`."""
    scan = _step if u_BTE.shape[1] == 1 else _TorchScan.apply
    with torch.autocast(u_BTE.device.type, enabled=False):  # it would round the products
        return scan(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, h_BEN, is_init_BT)


def _step(
    u_B1E: Tensor,
    dt_B1E: Tensor,
    A_EN: Tensor,
    B_B1N: Tensor,
    C_B1N: Tensor,
    h_BEN: Tensor,
    is_init_B1: Tensor,
) -> tuple[Tensor, Tensor]:
    """T = 1, as in acting."""
    kept_BEN = h_BEN.masked_fill(is_init_B1[:, :, None], 0)
    decay_BEN = torch.exp(dt_B1E.transpose(1, 2) * A_EN)
    h_BEN = torch.addcmul(decay_BEN * kept_BEN, (dt_B1E * u_B1E).transpose(1, 2), B_B1N)
    return (h_BEN @ C_B1N.transpose(1, 2)).transpose(1, 2), h_BEN


class _TorchScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_BTE: Tensor,
        dt_BTE: Tensor,
        A_EN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        h_BEN: Tensor,
        is_init_BT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h_BNE = h_BEN.transpose(1, 2)
        y_BTE, marks = torch.empty_like(u_BTE), []
        for now in _chunks(u_BTE.shape[1]):
            marks.append(h_BNE)
            decay_KBNE = _decay(dt_BTE[:, now], A_EN, is_init_BT[:, now])
            h_JBNE = _states(h_BNE, decay_KBNE, dt_BTE[:, now] * u_BTE[:, now], B_BTN[:, now])
            h_BNE = h_JBNE[-1].clone()  # a view would keep the whole chunk
            C_K1BN = C_BTN[:, now].transpose(0, 1)[:, :, None]
            y_BTE[:, now] = (C_K1BN @ h_JBNE[1:])[:, :, 0].transpose(0, 1)
        ctx.save_for_backward(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, is_init_BT, *marks)
        return y_BTE, h_BNE.transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y_BTE: Tensor, grad_h_BEN: Tensor) -> tuple[Tensor | None, ...]:
        u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, is_init_BT, *marks = ctx.saved_tensors
        grad_u_BTE, grad_dt_BTE = torch.empty_like(u_BTE), torch.empty_like(dt_BTE)
        grad_B_BTN, grad_C_BTN = torch.empty_like(B_BTN), torch.empty_like(C_BTN)
        grad_A_NE = torch.zeros_like(A_EN.t())
        arriving_BNE = grad_h_BEN.transpose(1, 2)
        with torch.autocast(u_BTE.device.type, enabled=False):
            for now, mark_BNE in reversed([*zip(_chunks(u_BTE.shape[1]), marks, strict=True)]):
                decay_KBNE = _decay(dt_BTE[:, now], A_EN, is_init_BT[:, now])
                x_BKE = dt_BTE[:, now] * u_BTE[:, now]
                h_JBNE = _states(mark_BNE, decay_KBNE, x_BKE, B_BTN[:, now])
                B_KBN, C_KBN = B_BTN[:, now].transpose(0, 1), C_BTN[:, now].transpose(0, 1)
                x_KBE, dt_KBE = x_BKE.transpose(0, 1), dt_BTE[:, now].transpose(0, 1)
                grad_y_KBE = grad_y_BTE[:, now].transpose(0, 1)

                g_KBNE = C_KBN[..., None] * grad_y_KBE[:, :, None]
                w_KBNE = decay_KBNE  # its memory becomes a_t g_t, then w_t
                for g_BNE, w_BNE in reversed([*zip(g_KBNE, w_KBNE, strict=True)]):
                    g_BNE += arriving_BNE
                    arriving_BNE = w_BNE.mul_(g_BNE)
                arriving_BNE = arriving_BNE.clone()
                w_KBNE *= h_JBNE[:-1]

                g_B_KBE = (B_KBN[:, :, None] @ g_KBNE)[:, :, 0]
                grad_u_BTE[:, now] = (dt_KBE * g_B_KBE).transpose(0, 1)
                grad_dt_BTE[:, now] = u_BTE[:, now] * g_B_KBE.transpose(0, 1)
                grad_dt_BTE[:, now] += (w_KBNE * A_EN.t()).sum(dim=2).transpose(0, 1)
                grad_A_NE += torch.einsum("kbne,kbe->ne", w_KBNE, dt_KBE)
                grad_B_BTN[:, now] = (g_KBNE @ x_KBE[..., None])[..., 0].transpose(0, 1)
                grad_C_BTN[:, now] = (h_JBNE[1:] @ grad_y_KBE[..., None])[..., 0].transpose(0, 1)
        grad_h_BEN = arriving_BNE.transpose(1, 2)
        return grad_u_BTE, grad_dt_BTE, grad_A_NE.t(), grad_B_BTN, grad_C_BTN, grad_h_BEN, None


def _chunks(steps: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, steps)) for start in range(0, steps, CHUNK))


def _decay(dt_BKE: Tensor, A_EN: Tensor, is_init_BK: Tensor) -> Tensor:
    """a_t ``[K, B, N, E]``."""
    decay_KBNE = torch.exp_(dt_BKE.transpose(0, 1)[:, :, None] * A_EN.t())
    return decay_KBNE.masked_fill_(is_init_BK.t()[:, :, None, None], 0)


def _states(h_BNE: Tensor, decay_KBNE: Tensor, x_BKE: Tensor, B_BKN: Tensor) -> Tensor:
    """h before the chunk and after each of its steps, ``[J, B, N, E]``."""
    h_JBNE = decay_KBNE.new_empty(decay_KBNE.shape[0] + 1, *h_BNE.shape)
    h_JBNE[0] = h_BNE
    torch.mul(B_BKN.transpose(0, 1)[..., None], x_BKE.transpose(0, 1)[:, :, None], out=h_JBNE[1:])
    for t, decay_BNE in enumerate(decay_KBNE):
        h_JBNE[t + 1].addcmul_(decay_BNE, h_JBNE[t])
    return h_JBNE

"""The state-space recurrence of Mamba-2 by chunks, with resets anywhere: Dao & Gu 2024, arXiv:2405.21060.

The recurrence, for each head, with a_t = dt_t * A < 0 and a state h of shape [P, N]:

    h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T,        h_{t-1} = 0 where a reset stands at t
    y_t = h_t C_t + D x_t

State-space duality: unrolled, y = W x with W[t, s] = (C_t . B_s) exp(a_{s+1} + .. + a_t) dt_s, a masked
attention matrix. So T steps are cut into chunks of L. Inside a chunk W is formed and multiplied, which is
matrix products; between chunks a state is passed on, which is T / L steps of the recurrence:

    y_t     = sum_s W[t, s] x_s + exp(a_1 + .. + a_t) H C_t                    H: the state entering the chunk
    H_next  = exp(a_1 + .. + a_L) H + sum_s exp(a_{s+1} + .. + a_L) dt_s x_s B_s^T

A reset cuts every path across it. Three masks of zeros and ones do that: on W's factor C_t . B_s, which heads
share, and on the decays from the chunk's start and to its end. Exponents are sums of the terms in between,
never differences of longer sums, so they are at most 0, exact also for fast decays, and never infinite.

Gradients are written out by hand (`_SSD`): autograd would keep and visit many more tensors.

Shapes: B rows, T time steps, H heads, P = headdim, N = d_state, L steps of a chunk, K = B * (T / L) chunks,
Q = H * P. The matrices B and C of the paper, which all heads share, are `B_BTN` and `C_BTN`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rl.autograd import first_order
from lit_rl_ssm.episodes import episode_numbers

# Sums over segments of a chunk are a product with L^3 zeros and ones (`_spans`), small while chunks are.
LARGEST_CHUNK = 64


@torch.compiler.disable  # compiling would unroll the loop over chunks, minutes for what is fused by hand
def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    is_init_BT: Tensor,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """All steps of the recurrence above.

    Args:
        x_BTHP: input of each head.
        dt_BTH: step sizes, at least 0.
        A_H: decay rates, below 0.
        B_BTN: how the input is written.
        C_BTN: how the state is read.
        D_H: the skip of each head.
        state_BHPN: h before the first step.
        is_init_BT: bool, true where h is zeroed before step t.
        chunk_size: the largest L, up to `LARGEST_CHUNK`; it changes speed and memory, not the result.

    Returns:
        ``y [B, T, H, P]`` and h after the last step.
    """
    rows, steps, heads, headdim = x_BTHP.shape
    chunks = -(-steps // chunk_size)
    length = -(-steps // chunks)  # chunks of one length pad the least
    missing = chunks * length - steps
    if missing:  # steps of no size at the end change nothing
        x_BTHP = pad(x_BTHP, (0, 0, 0, 0, 0, missing))
        dt_BTH, B_BTN, C_BTN = (pad(u, (0, 0, 0, missing)) for u in (dt_BTH, B_BTN, C_BTN))
        is_init_BT = pad(is_init_BT, (0, missing))

    def chunked(u: Tensor) -> Tensor:
        return u.unflatten(1, (chunks, length)).flatten(0, 1)

    dt_KHL = chunked(dt_BTH).transpose(1, 2).contiguous()
    y_KLHP, state_BQN = _SSD.apply(
        chunked(x_BTHP),
        dt_KHL,
        dt_KHL * A_H[:, None],
        chunked(B_BTN),
        chunked(C_BTN),
        D_H,
        state_BHPN.flatten(1, 2),
        *_masks(is_init_BT, chunks, x_BTHP.dtype),
    )
    y_BTHP = y_KLHP.reshape(rows, chunks * length, heads, headdim)[:, :steps]
    return y_BTHP, state_BQN.unflatten(1, (heads, headdim))


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    is_init_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: ``y [B, H, P]`` and h after it."""
    decay_BH = (dt_BH * A_H).exp().masked_fill(is_init_B[:, None], 0)
    write_BHP = x_BHP * dt_BH[:, :, None]
    state_BHPN = state_BHPN * decay_BH[:, :, None, None]  # a new tensor, which may be added to in place
    state_BHPN.addcmul_(write_BHP[..., None], B_BN[:, None, None])
    # A product of every row's state with its vector is slower as a batch of small matrix products.
    read_BHP = (state_BHPN * C_BN[:, None, None]).sum(3)
    return torch.addcmul(read_BHP, x_BHP, D_H[:, None]), state_BHPN


def attention(dt_BTH: Tensor, A_H: Tensor, B_BTN: Tensor, C_BTN: Tensor, is_init_BT: Tensor) -> Tensor:
    """W of the module's docstring over all T steps, ``[B, H, T, T]``: row t, column s.

    The hidden attention of Ali et al. 2024 (arXiv:2403.01590). Memory grows with T squared.
    """
    dt_BHT = dt_BTH.transpose(1, 2)
    steps = dt_BHT.shape[2]
    a_BHTT = (dt_BHT * A_H[:, None])[..., None].expand(-1, -1, -1, steps)  # [r, s]: a_r
    exponent_BHTT = a_BHTT.tril(-1).cumsum(2)  # [t, s]: a_{s+1} + .. + a_t
    same_BTT, _, _ = _masks(is_init_BT, 1, dt_BTH.dtype)
    CB_BTT = (C_BTN @ B_BTN.transpose(1, 2)) * same_BTT
    return exponent_BHTT.exp() * CB_BTT[:, None] * dt_BHT[:, :, None]


def _masks(is_init_BT: Tensor, chunks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ones where no reset stands between, else zeros.

    ``same [K, L, L]``: from step s (column) to a step t >= s (row). ``start [K, L]``: from before the chunk
    to t. ``end [K, L]``: from s to the chunk's last step.
    """
    episode_BcL = episode_numbers(is_init_BT).unflatten(1, (chunks, -1))
    before_Bc1 = pad(episode_BcL[:, :-1, -1], (1, 0))[:, :, None]
    same_BcLL = (episode_BcL[..., None] == episode_BcL[..., None, :]).tril()
    masks = (same_BcLL, episode_BcL == before_Bc1, episode_BcL == episode_BcL[..., -1:])
    same_KLL, start_KL, end_KL = (mask.flatten(0, 1).to(dtype) for mask in masks)
    return same_KLL, start_KL, end_KL


def _spans(a_KHL: Tensor) -> Tensor:
    """``[L, L * L]``: 1 at [r, (t, s)] where s < r <= t, so that ``a @ spans`` is ``a_{s+1} + .. + a_t``."""
    ones = a_KHL.new_ones(a_KHL.shape[2], a_KHL.shape[2])
    return (ones.triu()[:, :, None] * ones.tril(-1)[:, None]).flatten(1)


class _SSD(torch.autograd.Function):
    """The module's equations over K chunks at once, and their gradients.

    Takes the tensors of `ssd` cut into chunks, a = dt * A and the masks; gives ``y [K, L, H, P]`` and the
    last state.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_KLHP: Tensor,
        dt_KHL: Tensor,
        a_KHL: Tensor,
        B_KLN: Tensor,
        C_KLN: Tensor,
        D_H: Tensor,
        state_BQN: Tensor,
        same_KLL: Tensor,
        start_KL: Tensor,
        end_KL: Tensor,
    ) -> tuple[Tensor, Tensor]:
        length = a_KHL.shape[2]
        decay_KHLL = (a_KHL @ _spans(a_KHL)).exp_().unflatten(2, (length, length))
        CB_KLL = (C_KLN @ B_KLN.transpose(1, 2)) * same_KLL
        W_KHLL = decay_KHLL * CB_KLL[:, None] * dt_KHL[:, :, None]
        W_KHLL.diagonal(dim1=2, dim2=3).add_(D_H[:, None])
        x_KHLP = x_KLHP.transpose(1, 2).contiguous()
        inner_KHLP = W_KHLL @ x_KHLP

        to_end_KHL = decay_KHLL[:, :, -1] * dt_KHL * end_KL[:, None]
        from_start_KHL = a_KHL.cumsum(2).exp_() * start_KL[:, None]
        written_KLHP = x_KLHP * _by_head(to_end_KHL)
        entering, read = [], []
        for kept_BQ1, written_BLQ, B_BLN, C_BLN in _chunks_in_turn(
            state_BQN, _kept(from_start_KHL, state_BQN), written_KLHP.flatten(2), B_KLN, C_KLN
        ):
            entering.append(state_BQN)
            read.append(torch.bmm(C_BLN, state_BQN.transpose(1, 2)))
            state_BQN = (state_BQN * kept_BQ1).baddbmm_(written_BLQ.transpose(1, 2), B_BLN)
        outer_KLHP = torch.stack(read, dim=1).view(x_KLHP.shape).mul_(_by_head(from_start_KHL))

        ctx.save_for_backward(
            x_KLHP, x_KHLP, dt_KHL, B_KLN, C_KLN, same_KLL, end_KL, decay_KHLL, CB_KLL, W_KHLL, to_end_KHL,
            from_start_KHL, written_KLHP, outer_KLHP, *entering,
        )  # fmt: skip
        return outer_KLHP + inner_KHLP.transpose(1, 2), state_BQN

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_KLHP: Tensor, dstate_BQN: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_KLHP, x_KHLP, dt_KHL, B_KLN, C_KLN, same_KLL, end_KL, decay_KHLL, CB_KLL, W_KHLL, to_end_KHL,
            from_start_KHL, written_KLHP, outer_KLHP, *entering,
        ) = ctx.saved_tensors  # fmt: skip

        # y = W x inside the chunks.
        dy_KHLP = dy_KLHP.transpose(1, 2).contiguous()
        dW_KHLL = dy_KHLP @ x_KHLP.transpose(2, 3)
        dD_H = dW_KHLL.diagonal(dim1=2, dim2=3).sum((0, 2))
        dinner_KHLP = W_KHLL.transpose(2, 3) @ dy_KHLP

        # The states between them, from the last to the first.
        dread_KLHP = dy_KLHP * _by_head(from_start_KHL)
        dkept, dwritten, dB, dC = [], [], [], []
        for (kept_BQ1, written_BLQ, dread_BLQ, B_BLN, C_BLN), state_BQN in zip(
            _chunks_in_turn(
                dstate_BQN,
                _kept(from_start_KHL, dstate_BQN),
                written_KLHP.flatten(2),
                dread_KLHP.flatten(2),
                B_KLN,
                C_KLN,
            )[::-1],
            entering[::-1],
            strict=True,
        ):
            dkept.append((state_BQN * dstate_BQN).unflatten(1, x_KLHP.shape[2:]).sum((2, 3)))
            dwritten.append(torch.bmm(B_BLN, dstate_BQN.transpose(1, 2)))
            dB.append(torch.bmm(written_BLQ, dstate_BQN))
            dC.append(torch.bmm(dread_BLQ, state_BQN))
            dstate_BQN = (dstate_BQN * kept_BQ1).baddbmm_(dread_BLQ.transpose(1, 2), C_BLN)
        dkept_KH, dwritten_KLQ, dB_KLN, dC_KLN = (
            torch.stack(u[::-1], dim=1).flatten(0, 1) for u in (dkept, dwritten, dB, dC)
        )
        dwritten_KLHP = dwritten_KLQ.view(x_KLHP.shape)
        dto_end_KHL = (dwritten_KLHP * x_KLHP).sum(3).transpose(1, 2)
        dx_KLHP = dwritten_KLHP.mul_(_by_head(to_end_KHL)).add_(dinner_KHLP.transpose(1, 2))

        # W = exp(exponent) * (C . B) * dt, whose last row, cut at resets, is `to_end`.
        dexponent_KHLL = dW_KHLL.mul_(decay_KHLL)  # complete after two more factors
        dCB_KLL = (dexponent_KHLL * dt_KHL[:, :, None]).sum(1) * same_KLL
        dC_KLN += dCB_KLL @ B_KLN
        dB_KLN += dCB_KLL.transpose(1, 2) @ C_KLN
        dexponent_KHLL *= CB_KLL[:, None]
        ddt_at_end_KHL = dto_end_KHL * decay_KHLL[:, :, -1] * end_KL[:, None]
        ddt_KHL = dexponent_KHLL.sum(2) + ddt_at_end_KHL
        dexponent_KHLL *= dt_KHL[:, :, None]
        dexponent_KHLL[:, :, -1] += ddt_at_end_KHL * dt_KHL
        da_KHL = dexponent_KHLL.flatten(2) @ _spans(dt_KHL).t()

        # from_start = exp(cumulative a).
        dcumulative_KHL = (dy_KLHP * outer_KLHP).sum(3).transpose(1, 2)
        dcumulative_KHL[:, :, -1] += dkept_KH * from_start_KHL[:, :, -1]
        da_KHL += dcumulative_KHL.flip(2).cumsum(2).flip(2)
        return dx_KLHP, ddt_KHL, da_KHL, dB_KLN, dC_KLN, dD_H, dstate_BQN, None, None, None


def _by_head(u_KHL: Tensor) -> Tensor:
    """``[K, L, H, 1]``, to scale what stands in ``[K, L, H, P]``."""
    return u_KHL.transpose(1, 2)[..., None]


def _kept(from_start_KHL: Tensor, state_BQN: Tensor) -> Tensor:
    """``[K, Q, 1]``: what a chunk leaves of each row of the state that entered it."""
    headdim = state_BQN.shape[1] // from_start_KHL.shape[1]
    return from_start_KHL[:, :, -1].repeat_interleave(headdim, dim=1)[:, :, None]


def _chunks_in_turn(state_BQN: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """For each chunk the part ``[B, ...]`` of every tensor ``[K, ...]``."""
    by_chunk = [u.unflatten(0, (state_BQN.shape[0], -1)).unbind(1) for u in tensors]
    return list(zip(*by_chunk, strict=True))

"""From backward to new weights: gradients averaged over processes, measured, clipped, and Adam's step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lit_rl.models.normalization import reduce_sum, world_size


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """``loss.backward(gradient)`` outside autocast.

    Within, products would be rounded whose forward pass kept out of it: those of heads and memories.
    """
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward(gradient)


def average_and_clip(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Averages gradients over all processes and scales them down to a norm of at most `max_norm`.

    All gradients together make one flat tensor, so that there is one reduction and one norm.

    Returns:
        the norm before clipping; where it is not finite, gradients are left as they are.
    """
    if world_size() > 1:  # processes may differ in which parameters they used
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    if world_size() > 1:
        flat = reduce_sum(flat) / world_size()
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
    norm = flat.norm().item()
    if max_norm < norm < float("inf"):
        torch._foreach_mul_(grads, flat.new_tensor(max_norm / (norm + 1e-6)))  # a number is wrapped for each
    return norm


@torch.no_grad()
def optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``; of torch's plain fused Adam and AdamW the kernel without what surrounds it.

    That costs more than the kernel where networks are small. Hooks on such a step are not called.
    """
    if not is_plain_fused_adam(optimizer):
        optimizer.step()
        return
    groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in optimizer.param_groups]
    if not all(parameter in optimizer.state for _, parameters in groups for parameter in parameters):
        optimizer.step()  # makes the state
        return
    for group, parameters in groups:
        if not parameters:
            continue
        states = [optimizer.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def is_plain_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's own with the kernel that is called here, which changes weights in place."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(
        group["fused"] and not (group["amsgrad"] or group["maximize"]) for group in optimizer.param_groups
    )

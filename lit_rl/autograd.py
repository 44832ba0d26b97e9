"""What our own autograd functions share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def first_order(backward: Backward) -> Backward:
    """For the `backward` of a function without second derivative: an error where one is asked for.

    torch's `once_differentiable` raises only if the gradient that comes in has a graph itself. Where it is a
    constant, say in ``grad(y.sum(), x, create_graph=True)``, the second derivative would be lost in silence.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            name = type(ctx).__name__.strip("_").removesuffix("Backward")
            raise RuntimeError(
                f"{name} has no second derivative, for which create_graph=True asks: differentiate once, or "
                "take another trunk or loss"
            )
        with torch.no_grad():
            return backward(ctx, *grads)

    return checked

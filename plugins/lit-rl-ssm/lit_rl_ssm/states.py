"""What trunks ask of the state they are given."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor, nn


def entry(state: TensorDict, key: str, shape: tuple[int, ...], trunk: nn.Module) -> Tensor:
    """``state[key]``, or ValueError if it is missing or not of `shape`."""
    leaf = state.get(key, None)
    if leaf is None or leaf.shape != shape:
        found = f"no {key!r}" if leaf is None else f"{key!r} {list(leaf.shape)}"
        raise ValueError(
            f"the state given has {found}, {type(trunk).__name__} keeps {key!r} {list(shape)}: "
            "pass what initial_state or a former pass of this trunk returned"
        )
    return leaf

"""The trunk contract: what every sequence architecture in lit_rl promises.

A trunk maps features to features over time. It knows nothing of reinforcement learning,
Lightning or TorchRL; torch and tensordict are enough to write one.

Shapes: B rows (environments or windows), T time steps, F input features, D output features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tensordict import TensorDict
from torch import Tensor, nn


class Trunk(nn.Module, ABC):
    """Features in, features out, with a memory that resets where it is told to.

    A subclass calls ``super().__init__(in_features, out_features)``. Its constructor is its
    configuration schema: typed keyword arguments with defaults, `in_features` first and
    positional, the shared words `d_model` and `n_layers` where they apply.

    Three optional members are found by attribute. The last forward pass may set `auxiliary_loss`, a
    scalar tensor (for example a load-balance loss) that the algorithm adds to its own loss, and `metrics`,
    scalar tensors by name that it logs. `attention_maps(x, state, is_init)` gives a list of ``[B, T, T]``
    maps for pictures.
    """

    auxiliary_loss: Tensor | None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not the last pass's loss, whose graph neither can take along."""
        return {name: value for name, value in self.__dict__.items() if name != "auxiliary_loss"}

    @abstractmethod
    def initial_state(self, batch_size: int) -> TensorDict:
        """Memory at the start of an episode: batch size ``[B]``, empty if the trunk is memoryless.

        It stands on the device and in the dtype of the trunk's parameters.
        """

    @abstractmethod
    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        """One pass over T steps; acting is T = 1 through this same method.

        Args:
            x: features ``[B, T, F]``.
            state: memory before the first step, ``[B]``, as `initial_state` or a former pass gave it.
            is_init: bool ``[B, T]``; true where row b's memory is reset before it consumes ``x[b, t]``:
                recurrent state, convolution window, attention cache and positions alike.

        Returns:
            ``y [B, T, D]`` and the memory after the last step, with the keys, shapes and dtypes of
            `state`. Nothing received is changed in place. One pass over T steps equals T passes of
            one step and any chunks in between, values and gradients, whatever `is_init` and `state`
            (of finite numbers), in training mode as in evaluation mode.
        """

    def last_steps(self, x: Tensor, state: TensorDict, is_init: Tensor, steps: int) -> Tensor:
        """The outputs of the last `steps` steps of a pass, ``[B, steps, D]``, for 1 <= steps <= T.

        A window whose loss is on its last steps needs no other outputs. Optional: a trunk whose last layer
        can leave the others out may do so; values and gradients must be those of `forward`. It sets
        `auxiliary_loss` and `metrics` as a pass does, of what it has computed.
        """
        y, _ = self(x, state, is_init)
        return y[:, -steps:]

    def entries(
        self, x: Tensor, state: TensorDict, is_init: Tensor, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The state's entries by key, if they and `is_init` fit: for a trunk to begin its pass with.

        Compiled loops look at no shape, and operations that broadcast take a wrong one for another.

        Args:
            x: features ``[B, T, F]``, as the pass was given them.
            state: memory before the first step.
            is_init: resets.
            shapes: of each entry of a state, without B.

        Raises:
            ValueError: `is_init` is not ``[B, T]``, or the state has other entries.
        """
        if is_init.shape != x.shape[:2]:
            raise ValueError(f"is_init is {list(is_init.shape)}, not {list(x.shape[:2])} like x (B, T)")
        entries: dict[str, Tensor] = dict(state.items())
        found = {key: tuple(entry.shape) for key, entry in entries.items()}
        kept = {key: (x.shape[0], *shape) for key, shape in shapes.items()}
        if found != kept:
            key = next(key for key in [*kept, *found] if found.get(key) != kept.get(key))
            raise ValueError(
                f"the state given has {_named(key, found)}, {type(self).__name__} keeps {_named(key, kept)}: "
                "pass what initial_state or a former pass of this trunk returned"
            )
        return entries


def _named(key: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{key!r} {list(shapes[key])}" if key in shapes else f"no {key!r}"

"""What the conformance checks run a trunk on, and what they measure.

Shapes: B rows, T time steps, F input features, D output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.trunks.base import Trunk

B, T = 3, 17
ONE_PASS = [T]

# Sizes of the passes that one sequence of T steps is cut into.
CHUNKINGS: dict[str, list[int]] = {
    "T passes of one step": [1] * T,
    "chunks of 3": [3, 3, 3, 3, 3, 2],
    "chunks of 5": [5, 5, 5, 2],
    "chunks of 7": [7, 7, 3],
    "uneven chunks": [1, 6, 2, 8],
}

# Steps with a reset, a row each: every kind of place, different from row to row.
_RESETS: dict[str, list[list[int]]] = {
    "no reset": [[], [], []],
    "resets at t=0": [[0], [], [0]],
    "resets at t=T-1": [[], [T - 1], [T - 1]],
    "consecutive resets": [[4, 5, 6], [0, 1], [T - 2, T - 1]],
    "resets on chunk borders": [[5, 10, 15], [3, 7, 14], [2, 4, 6]],
    "resets everywhere": [list(range(T))] * B,
    "random resets": [[1, 2, 9, 11], [0, 8], [3, 5, 12, 13, 16]],
}


@dataclass(frozen=True)
class Subject:
    """A trunk class with the options it is tested under, and the device."""

    trunk: type[Trunk]
    options: Mapping[str, Any] = field(default_factory=dict)
    in_features: int = 5
    device: str = "cpu"

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Trunk:
        """A fresh trunk in evaluation mode, with the same weights on every device.

        Its own initialisation is disturbed a little: initial zeros (biases, gates) would hide mistakes that
        training uncovers.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            trunk = self.trunk(self.in_features, **self.options)
            for parameter in trunk.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return trunk.to(self.device, dtype).eval()


@dataclass(frozen=True)
class Inputs:
    """Everything that one forward pass receives."""

    x: Tensor  # [B, T, F]
    state: TensorDict  # [B]
    is_init: Tensor  # [B, T]

    def clone(self) -> Inputs:
        return Inputs(self.x.clone(), self.state.clone(), self.is_init.clone())

    def like(self, trunk: Trunk) -> Inputs:
        """The same numbers on the device and in the dtype of a trunk."""
        to = parameter_of(trunk)
        state = {k: v.to(to if v.is_floating_point() else to.device) for k, v in leaves(self.state).items()}
        return Inputs(self.x.to(to), TensorDict(state, self.state.batch_size), self.is_init.to(to.device))

    def steps(self, start: int, stop: int) -> Inputs:
        return replace(self, x=self.x[:, start:stop], is_init=self.is_init[:, start:stop])

    def with_gradients(self) -> Inputs:
        """Copies that are leaves of a new graph."""
        fresh = self.clone()
        for tensor in [fresh.x, *leaves(fresh.state).values()]:
            if tensor.is_floating_point():
                tensor.requires_grad_()
        return fresh


def leaves(state: TensorDict) -> dict[Any, Tensor]:
    """The tensors of a state by key; keys of nested entries are tuples."""
    return dict(state.items(include_nested=True, leaves_only=True))


def reset_patterns() -> dict[str, Tensor]:
    """`is_init` ``[B, T]`` by name: resets at every kind of place."""
    return {name: _is_init(rows) for name, rows in _RESETS.items()}


def _is_init(rows: list[list[int]]) -> Tensor:
    is_init_BT = torch.zeros(B, T, dtype=torch.bool)
    for row, steps in enumerate(rows):
        is_init_BT[row, steps] = True
    return is_init_BT


def random_like_trunk(trunk: Trunk, *shape: int, seed: int) -> Tensor:
    """Normal noise like the trunk's parameters, the same numbers whatever their dtype and device."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(parameter_of(trunk))


def parameter_of(trunk: Trunk) -> Tensor:
    """Any parameter, for its dtype and device; float32 on the CPU if there is none."""
    return next(trunk.parameters(), torch.empty(0))


def inputs_from_start(trunk: Trunk, is_init_BT: Tensor, seed: int = 1) -> Inputs:
    """Random features from the initial state."""
    rows, steps = is_init_BT.shape
    x_BTF = random_like_trunk(trunk, rows, steps, trunk.in_features, seed=seed)
    return Inputs(x_BTF, trunk.initial_state(rows), is_init_BT.to(x_BTF.device))


def inputs_in_flight(trunk: Trunk, is_init_BT: Tensor, seed: int = 2) -> Inputs:
    """Random features from a state in the midst of episodes of different ages.

    The state comes from a former pass, each number moved by about a tenth of itself: any state, yet one that
    keeps what a trunk may rely on (counters are whole, normalisers positive).
    """
    former = inputs_from_start(trunk, _is_init(_RESETS["random resets"])[:, :14], seed=seed)
    with torch.no_grad():
        _, state = trunk(former.x, former.state, former.is_init)
    state = state.clone()
    for number, leaf in enumerate(leaves(state).values()):
        if leaf.is_floating_point():
            leaf *= 1 + 0.1 * random_like_trunk(trunk, *leaf.shape, seed=seed + number).to(leaf.dtype)
    return replace(inputs_from_start(trunk, is_init_BT, seed=seed + 1), state=state)


def situations(trunk: Trunk) -> Iterator[tuple[str, Inputs]]:
    """Every pattern of resets, from the initial state and from one in the midst of episodes."""
    for name, is_init_BT in reset_patterns().items():
        yield f"{name}, from the initial state", inputs_from_start(trunk, is_init_BT)
        yield f"{name}, from a state in flight", inputs_in_flight(trunk, is_init_BT)


def run(trunk: Trunk, inputs: Inputs, chunks: Sequence[int]) -> tuple[Tensor, TensorDict]:
    """Pass by pass over chunks of the sequence; returns ``y [B, T, D]`` and the last state."""
    state, outputs, start = inputs.state, [], 0
    for size in chunks:
        part = inputs.steps(start, start + size)
        y, state = trunk(part.x, state, part.is_init)
        outputs.append(y)
        start += size
    return torch.cat(outputs, dim=1), state


def values(trunk: Trunk, inputs: Inputs, chunks: Sequence[int]) -> dict[str, Tensor]:
    """Output and last state, by name."""
    with torch.no_grad():
        y, state = run(trunk, inputs, chunks)
    return {"y": y} | {f"state {key!r}": leaf for key, leaf in leaves(state).items()}


def differentiable(trunk: Trunk, inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor that `gradients` may speak of, by name."""
    state = {f"initial state {key!r}": leaf for key, leaf in leaves(inputs.state).items()}
    return {f"parameter {name!r}": p for name, p in trunk.named_parameters()} | {"x": inputs.x} | state


def objective(y: Tensor, state: TensorDict) -> Tensor:
    """A scalar in which every number of output and last state has its own weight."""
    total = y.new_zeros(())
    for number, tensor in enumerate([y, *leaves(state).values()]):
        if tensor.is_floating_point():
            generator = torch.Generator().manual_seed(100 + number)
            weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            total = total + (tensor * weight.to(tensor)).sum()
    return total


def gradients(trunk: Trunk, inputs: Inputs, chunks: Sequence[int]) -> dict[str, Tensor]:
    """Gradient of `objective` in parameters, features and initial state, by name; zero if there is none."""
    inputs = inputs.with_gradients()
    return gradients_of(trunk, inputs, objective(*run(trunk, inputs, chunks)))


def gradients_of(trunk: Trunk, inputs: Inputs, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of `loss` in parameters, features and initial state, by name; zero if there is none."""
    wanted = {name: tensor for name, tensor in differentiable(trunk, inputs).items() if tensor.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))

"""How the conformance checks compare: every failure names tensor, place and worst deviation.

All of them raise AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.testing.trunk_checks.runs import CHUNKINGS, ONE_PASS, Inputs, leaves
from lit_rl.trunks.base import Trunk

FLOAT32, FLOAT64 = 1e-5, 1e-10  # tolerances; of gradients: relative to their largest number
ON_CUDA = 10  # times as much there: other kernels, another order of summation
NO_GRADIENT = 1e-6  # a gradient that must vanish, relative to the largest of one that need not


def assert_values_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, context: str
) -> None:
    """Each tensor equal within `tolerance` times its largest number, or times 1 where that is smaller."""
    for name, reference in expected.items():
        scale = max(1.0, reference.double().abs().max().item()) if reference.numel() else 1.0
        assert_close(actual[name], reference, tolerance * scale, f"{context}: {name}")


def assert_gradients_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, context: str
) -> None:
    """Each gradient equal within `tolerance` times its largest number.

    A gradient far below the largest of all counts as a hundredth of that one: it is what remains of larger
    numbers that cancel, with their rounding.
    """
    largest = max(reference.abs().max().item() for reference in expected.values() if reference.numel())
    for name, reference in expected.items():
        scale = max(reference.abs().max().item() if reference.numel() else 0.0, 0.01 * largest)
        assert_close(actual[name], reference, tolerance * scale, f"{context}: gradient of {name}")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Same shape, and no number further off than `tolerance`; NaN is infinitely far off."""
    if actual.is_cuda:
        tolerance *= ON_CUDA
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {list(actual.shape)}, not {list(expected.shape)}")
    if not expected.numel():
        return
    deviation = (actual.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    worst = deviation.max().item()
    if worst > tolerance:
        place = [int(i) for i in torch.unravel_index(deviation.argmax(), deviation.shape)]
        # Features and outputs are [B, T, ...]: say which row and which step.
        labels = ["row ", "t="] if what.endswith((": y", "of x")) else []
        labels += [""] * (len(place) - len(labels))
        where = ", ".join(f"{label}{i}" for label, i in zip(labels, place, strict=True))
        raise AssertionError(f"{what} is off by {worst:.1e} at [{where}] (tolerance {tolerance:.1e})")


def assert_modes_agree(
    trunk: Trunk,
    inputs: Inputs,
    measure: Callable[..., dict[str, Tensor]],
    assert_agree: Callable[..., None],
    tolerance: float,
    context: str,
) -> None:
    """Chunks of every kind agree with one pass in what `measure` finds: `values` or `gradients`."""
    whole = measure(trunk, inputs, ONE_PASS)
    for mode, chunks in CHUNKINGS.items():
        assert_agree(measure(trunk, inputs, chunks), whole, tolerance, f"{context}, {mode} against one pass")


def assert_same_spec(state: TensorDict, given: TensorDict, context: str) -> None:
    """Keys, shapes and dtypes of a returned state are those of the one given."""
    found = {key: describe(leaf) for key, leaf in leaves(state).items()}
    expected = {key: describe(leaf) for key, leaf in leaves(given).items()}
    if found != expected:
        raise AssertionError(f"{context}: the returned state is {found}, the one given was {expected}")


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def assert_vanishes(found: Iterable[Tensor], largest_of: Tensor, context: str) -> None:
    """Each gradient is nothing beside the largest number of another."""
    for gradient in found:
        limit = NO_GRADIENT * largest_of.abs().max().item()
        assert_close(gradient, torch.zeros_like(gradient), limit, f"{context}: a gradient that must vanish")

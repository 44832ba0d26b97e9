"""The checks of what surrounds a trunk: saving, seeds, precision, compilation, CUDA.

Like those of the contract, each takes a `Subject` and raises AssertionError where it fails; one that cannot
run here raises `unittest.SkipTest` with the reason.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from lit_rl.testing.trunk_checks.compare import (
    FLOAT32,
    FLOAT64,
    ON_CUDA,
    assert_close,
    assert_gradients_close,
    assert_modes_agree,
    assert_same_spec,
    assert_values_close,
)
from lit_rl.testing.trunk_checks.runs import (
    CHUNKINGS,
    ONE_PASS,
    Inputs,
    Subject,
    gradients,
    inputs_in_flight,
    reset_patterns,
    run,
    situations,
    values,
)

BFLOAT16 = 0.1  # loose: bfloat16 has 8 bits of mantissa, and a recurrence adds up its roundings
CUDA = ON_CUDA * FLOAT32


def check_state_dict(subject: Subject) -> None:
    """A state_dict saved and loaded as weights only brings another instance to the same output."""
    trunk, other = subject.build(seed=0), subject.build(seed=1)
    file = io.BytesIO()
    torch.save(trunk.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    inputs = inputs_in_flight(trunk, reset_patterns()["random resets"])
    restored = values(other, inputs, ONE_PASS)
    assert_values_close(restored, values(trunk, inputs, ONE_PASS), FLOAT32, "after a state_dict round trip")


def check_deterministic(subject: Subject) -> None:
    """One seed gives the same weights, and the same pass twice gives the same bits."""
    first, second = subject.build(), subject.build()
    inputs = inputs_in_flight(first, reset_patterns()["random resets"])
    once = values(first, inputs, ONE_PASS)
    for other, context in ((first, "a second pass"), (second, "a second instance of the same seed")):
        for name, tensor in values(other, inputs, ONE_PASS).items():
            assert_close(tensor, once[name], 0.0, f"{context}: {name}")


def check_float64(subject: Subject) -> None:
    """In float64 the modes agree to 1e-10, and output and state are float64."""
    trunk = subject.build(dtype=torch.float64)
    inputs = inputs_in_flight(trunk, reset_patterns()["random resets"])
    for name, tensor in values(trunk, inputs, ONE_PASS).items():
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            raise AssertionError(f"{name} is {tensor.dtype} though parameters and inputs are float64")
    assert_modes_agree(trunk, inputs, values, assert_values_close, FLOAT64, "float64")
    assert_modes_agree(trunk, inputs, gradients, assert_gradients_close, FLOAT64, "float64")


def check_bfloat16_autocast(subject: Subject) -> None:
    """Under bfloat16 autocast it runs, keeps the dtypes of its state, and stays near float32."""
    trunk = subject.build()
    inputs = inputs_in_flight(trunk, reset_patterns()["random resets"])
    exact = values(trunk, inputs, ONE_PASS)
    # What comes before a trunk runs under autocast too, so its features may come in bfloat16.
    for x, dtype in ((inputs.x, torch.float32), (inputs.x.bfloat16(), torch.bfloat16)):
        rounded = Inputs(x, inputs.state, inputs.is_init)
        for chunks in (ONE_PASS, CHUNKINGS["T passes of one step"]):
            context = f"bfloat16 autocast, x in {dtype}, passes of {chunks}"
            with torch.autocast(subject.device, dtype=torch.bfloat16):
                y, state = run(trunk, rounded, chunks)
                found = gradients(trunk, rounded, chunks)
            assert_same_spec(state, inputs.state, context)
            scale = exact["y"].abs().max().item()
            assert_close(y.detach(), exact["y"], BFLOAT16 * scale, f"{context}: y")
            for name, gradient in found.items():
                if not gradient.isfinite().all():
                    raise AssertionError(f"{context}: the gradient of {name} is not finite")


def check_compile(subject: Subject) -> None:
    """`torch.compile` changes neither values nor gradients."""
    trunk = subject.build()
    torch.compiler.reset()
    compiled: Any = torch.compile(trunk, backend="aot_eager")
    inputs = inputs_in_flight(trunk, reset_patterns()["random resets"])
    for part, chunks in ((inputs, ONE_PASS), (inputs.steps(0, 1), [1])):
        context = f"compiled, T={sum(chunks)}"
        expected = gradients(trunk, part, chunks)
        found = {name.replace("_orig_mod.", ""): g for name, g in gradients(compiled, part, chunks).items()}
        assert_values_close(values(compiled, part, chunks), values(trunk, part, chunks), FLOAT32, context)
        assert_gradients_close(found, expected, FLOAT32, context)


def check_cuda(subject: Subject) -> None:
    """On CUDA it gives what it gives on the CPU, and the modes agree."""
    if not torch.cuda.is_available():
        raise SkipTest("no CUDA device here")
    with exact_products():
        agrees_with_cpu(subject, "cuda")


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 is float32 on CUDA: TF32 products, cuDNN's default, have 10 bits of mantissa."""
    products = torch.backends.cuda.matmul
    allowed, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        products.allow_tf32 = allowed


def agrees_with_cpu(subject: Subject, device: str) -> None:
    """Values and gradients on `device` in float32 are those of the CPU in float64, and the modes agree."""
    here = replace(subject, device="cpu").build(dtype=torch.float64)
    there = replace(subject, device=device).build()
    for context, inputs in situations(here):
        away = inputs.like(there)
        found, expected = values(there, away, ONE_PASS), values(here, inputs, ONE_PASS)
        assert_values_close(_on_cpu(found), expected, CUDA, f"{device} against CPU, {context}")
        found, expected = gradients(there, away, ONE_PASS), gradients(here, inputs, ONE_PASS)
        assert_gradients_close(_on_cpu(found), expected, CUDA, f"{device} against CPU, {context}")
        assert_modes_agree(there, away, values, assert_values_close, FLOAT32, f"{device}, {context}")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}

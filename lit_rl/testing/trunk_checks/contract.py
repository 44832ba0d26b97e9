"""The checks of the contract itself: each takes a `Subject` and raises AssertionError where it fails.

The contract stands in `lit_rl.trunks.base`.

Shapes: B rows, T time steps, F input features, D output features.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import pairwise

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.testing.trunk_checks.compare import (
    FLOAT32,
    FLOAT64,
    assert_close,
    assert_gradients_close,
    assert_modes_agree,
    assert_same_spec,
    assert_values_close,
    assert_vanishes,
    describe,
)
from lit_rl.testing.trunk_checks.runs import (
    CHUNKINGS,
    ONE_PASS,
    B,
    Inputs,
    Subject,
    T,
    differentiable,
    gradients,
    gradients_of,
    inputs_from_start,
    inputs_in_flight,
    leaves,
    objective,
    parameter_of,
    random_like_trunk,
    reset_patterns,
    run,
    situations,
    values,
)
from lit_rl.trunks.base import Trunk


def check_constructor(subject: Subject) -> None:
    """`in_features` first and positional, then keyword arguments with annotation and default."""
    first, *options = inspect.signature(subject.trunk).parameters.values()
    if first.name != "in_features" or first.kind is not first.POSITIONAL_OR_KEYWORD:
        raise AssertionError(f"the first argument is {str(first)!r}, not a positional 'in_features: int'")
    for option in options:
        if option.kind is not option.KEYWORD_ONLY:
            raise AssertionError(f"argument {str(option)!r} is not keyword-only: put it after a bare '*'")
        if option.default is option.empty or option.annotation is option.empty:
            raise AssertionError(f"argument {str(option)!r} lacks a default or an annotation")
    trunk = replace(subject, options={}).build()
    if trunk.in_features != subject.in_features or not isinstance(trunk.out_features, int):
        raise AssertionError(
            f"in_features is {trunk.in_features!r} and out_features {trunk.out_features!r}; "
            f"expected {subject.in_features} and an int"
        )


def check_spec(subject: Subject) -> None:
    """Output and state have the promised shapes, keys and dtypes, before and after a pass."""
    trunk = subject.build()
    for rows, steps in ((1, 1), (B, 1), (1, 4), (B, 4)):
        is_init_BT = torch.zeros(rows, steps, dtype=torch.bool)
        inputs = inputs_from_start(trunk, is_init_BT)
        y, state = trunk(inputs.x, inputs.state, inputs.is_init)
        if list(y.shape) != [rows, steps, trunk.out_features] or y.dtype != inputs.x.dtype:
            raise AssertionError(
                f"y is {describe(y)}, not {[rows, steps, trunk.out_features]} {inputs.x.dtype} (B, T, D)"
            )
        for name, given in (("initial_state", inputs.state), ("the returned state", state)):
            if not isinstance(given, TensorDict) or given.batch_size != torch.Size([rows]):
                raise AssertionError(f"{name} is not a TensorDict of batch size [{rows}]")
        assert_same_spec(state, inputs.state, f"T={steps}")
    for key, leaf in leaves(trunk.initial_state(B)).items():
        if leaf.is_floating_point() and leaf.dtype != parameter_of(trunk).dtype:
            raise AssertionError(
                f"initial_state {key!r} is {leaf.dtype}, its parameters {parameter_of(trunk).dtype}"
            )


def check_inputs_unchanged(subject: Subject) -> None:
    """Nothing received is changed in place, be it what an earlier pass returned."""
    trunk = subject.build()
    for name, is_init_BT in reset_patterns().items():
        for chunk in (1, T):
            inputs = inputs_in_flight(trunk, is_init_BT).steps(0, chunk)
            with torch.no_grad():
                state = _unchanged_by_a_pass(trunk, inputs, f"{name}, T={chunk}, after a pass")
                again = replace(inputs, state=state)
                _unchanged_by_a_pass(trunk, again, f"{name}, T={chunk}, after a pass from a returned state")


def check_values_agree(subject: Subject) -> None:
    """One pass, T passes of one step and chunks of any sizes give the same output and state."""
    trunk = subject.build()
    for context, inputs in situations(trunk):
        assert_modes_agree(trunk, inputs, values, assert_values_close, FLOAT32, context)


def check_gradients_agree(subject: Subject) -> None:
    """They give the same gradients too, in parameters, features and initial state."""
    trunk = subject.build()
    for context, inputs in situations(trunk):
        assert_modes_agree(trunk, inputs, gradients, assert_gradients_close, FLOAT32, context)


def check_last_steps(subject: Subject) -> None:
    """`last_steps` gives the last outputs of a pass, with their gradients."""
    trunk = subject.build()
    for context, inputs in situations(trunk):
        for steps in (1, 3, T):
            given = inputs.with_gradients()
            alone = trunk.last_steps(given.x, given.state, given.is_init, steps)
            whole = trunk(given.x, given.state, given.is_init)[0][:, -steps:]
            where = f"the last {steps} of {T} steps, {context}"
            assert_values_close({"y": alone}, {"y": whole}, FLOAT32, where)
            found, expected = (gradients_of(trunk, given, objective(y, TensorDict())) for y in (alone, whole))
            assert_gradients_close(found, expected, FLOAT32, where)
    trunk.train()  # only then may there be an auxiliary loss
    given = inputs_from_start(trunk, torch.zeros(B, T, dtype=torch.bool))
    trunk(given.x, given.state, given.is_init)
    has_loss, trunk.auxiliary_loss = trunk.auxiliary_loss is not None, None
    trunk.last_steps(given.x, given.state, given.is_init, 1)
    if has_loss and trunk.auxiliary_loss is None:
        raise AssertionError("a pass sets auxiliary_loss, last_steps does not")


def check_gradients_are_slopes(subject: Subject) -> None:
    """Gradients equal central differences in float64, in parameters, features and initial state."""
    trunk = subject.build(dtype=torch.float64)
    epsilon = 1e-6
    for context, inputs in situations(trunk):
        for number, (name, gradient) in enumerate(gradients(trunk, inputs, ONE_PASS).items()):
            direction = random_like_trunk(trunk, *gradient.shape, seed=number)
            ahead = _objective_moved(trunk, inputs, name, epsilon * direction)
            behind = _objective_moved(trunk, inputs, name, -epsilon * direction)
            slope = (ahead - behind) / (2 * epsilon)
            # The objective is some tens, so float64 leaves the slope about 1e-8 of noise.
            tolerance = 1e-6 * max(1.0, gradient.norm().item())
            assert_close((gradient * direction).sum(), slope, tolerance, f"{context}: slope along {name}")


def check_reset_starts_afresh(subject: Subject) -> None:
    """From a reset on, a row gives what it gives alone from `initial_state`, in this pass and the next."""
    trunk = subject.build()
    cut = 12
    for name, is_init_BT in reset_patterns().items():
        inputs = inputs_in_flight(trunk, is_init_BT)
        with torch.no_grad():
            y_BTD, _ = run(trunk, inputs, [cut, T - cut])
            for row in range(B):
                starts = is_init_BT[row].nonzero().flatten().tolist()
                for start, stop in pairwise([*starts, T]):
                    episode = inputs.x[row : row + 1, start:stop]
                    never = inputs.is_init.new_zeros(1, stop - start)
                    alone, _ = trunk(episode, trunk.initial_state(1), never)
                    part = y_BTD[row : row + 1, start:stop]
                    context = f"{name}, row {row}, episode from t={start}"
                    assert_values_close({"y": part}, {"y": alone}, FLOAT32, context)


def check_no_leak_between_episodes(subject: Subject) -> None:
    """What came before a reset, or in the state, touches nothing after it, in value or gradient."""
    trunk = subject.build()
    for reset in (0, 1, 6, T - 1):
        is_init_BT = torch.zeros(B, T, dtype=torch.bool)
        is_init_BT[:, reset] = True
        for chunks in (ONE_PASS, [9, 8], CHUNKINGS["T passes of one step"]):
            inputs = inputs_in_flight(trunk, is_init_BT)
            other = inputs_in_flight(trunk, is_init_BT, seed=50).clone()
            other.x[:, :reset] *= 100
            other.x[:, reset:] = inputs.x[:, reset:]
            context = f"reset at t={reset}, passes of {chunks}, from the reset on"
            kept = values(trunk, inputs, chunks)["y"][:, reset:]
            moved = values(trunk, other, chunks)["y"][:, reset:]
            assert_values_close({"y": moved}, {"y": kept}, FLOAT32, context)

            inputs = inputs.with_gradients()
            y_BTD, _ = run(trunk, inputs, chunks)
            x_gradient, *state_gradients = _gradients_of(y_BTD[:, reset:], inputs)
            assert_vanishes([x_gradient[:, :reset], *state_gradients], x_gradient, context)


def check_no_leak_between_rows(subject: Subject) -> None:
    """Other rows touch nothing of a row, in value or gradient."""
    trunk = subject.build()
    for name, is_init_BT in reset_patterns().items():
        inputs = inputs_in_flight(trunk, is_init_BT)
        other = inputs_in_flight(trunk, ~is_init_BT, seed=60).clone()
        other.x[1:] *= 100
        for tensor, kept in zip(_tensors(other), _tensors(inputs), strict=True):
            tensor[0] = kept[0]
        kept_y = values(trunk, inputs, ONE_PASS)["y"][:1]
        moved_y = values(trunk, other, ONE_PASS)["y"][:1]
        assert_values_close({"y": moved_y}, {"y": kept_y}, FLOAT32, f"{name}, other rows changed")

        inputs = inputs.with_gradients()
        y_BTD, _ = run(trunk, inputs, ONE_PASS)
        x_gradient, *state_gradients = _gradients_of(y_BTD[:1], inputs)
        must_vanish = [g[1:] for g in (x_gradient, *state_gradients)]
        assert_vanishes(must_vanish, x_gradient, f"{name}, row 0 in the other rows")


def check_causal(subject: Subject) -> None:
    """Later features and resets touch no earlier output, in value or gradient."""
    trunk = subject.build()
    for name, is_init_BT in reset_patterns().items():
        for now in (1, 8, T - 1):
            inputs = inputs_in_flight(trunk, is_init_BT)
            other = inputs.clone()
            other.x[:, now:] = -100 * other.x[:, now:]
            other.is_init[:, now:] = ~other.is_init[:, now:]
            context = f"{name}, steps from t={now} changed"
            before = values(trunk, inputs, ONE_PASS)["y"][:, :now]
            after = values(trunk, other, ONE_PASS)["y"][:, :now]
            assert_values_close({"y": after}, {"y": before}, FLOAT32, context)

            inputs = inputs.with_gradients()
            y_BTD, _ = run(trunk, inputs, ONE_PASS)
            x_gradient, *_ = _gradients_of(y_BTD[:, :now], inputs)
            assert_vanishes([x_gradient[:, now:]], x_gradient, context)


def check_every_parameter_learns(subject: Subject) -> None:
    """The gradient reaches every parameter."""
    trunk = subject.build()
    inputs = inputs_in_flight(trunk, reset_patterns()["random resets"])
    for name, gradient in gradients(trunk, inputs, ONE_PASS).items():
        if name.startswith("parameter") and not gradient.any():
            raise AssertionError(f"the gradient of {name} is zero: it is not used")


def check_lengths(subject: Subject) -> None:
    """One step alone, and a long sequence in one pass, in chunks and finite; gradients in float64."""
    trunk = subject.build()
    steps = 600
    is_init_BT = torch.zeros(2, steps, dtype=torch.bool)
    is_init_BT[1, 333] = True
    inputs = inputs_from_start(trunk, is_init_BT)
    whole = values(trunk, inputs, [steps])
    if not all(tensor.isfinite().all() for tensor in whole.values()):
        raise AssertionError(f"not finite after {steps} steps")
    assert_values_close(values(trunk, inputs, [150] * 4), whole, FLOAT32, f"T={steps} in chunks of 150")
    first = values(trunk, inputs.steps(0, 1), [1])["y"]
    assert_values_close({"y": first}, {"y": whole["y"][:, :1]}, FLOAT32, f"T=1 against T={steps}")

    # Resets stand where a trunk's own chunks are likely to begin; chunks of 37 steps begin elsewhere.
    trunk, steps, chunk = subject.build(dtype=torch.float64), 259, 37
    is_init_BT = torch.zeros(2, steps, dtype=torch.bool)
    is_init_BT[1, [10, 16, 20, 32, 50, 64, 100, 128, 256]] = True
    inputs, chunks = inputs_from_start(trunk, is_init_BT), [chunk] * (steps // chunk)
    for measure, assert_agree in ((values, assert_values_close), (gradients, assert_gradients_close)):
        found, expected = measure(trunk, inputs, chunks), measure(trunk, inputs, [steps])
        assert_agree(found, expected, FLOAT64, f"T={steps} in chunks of {chunk}")


def check_training_mode(subject: Subject) -> None:
    """Acting, in evaluation mode, and learning, in training mode, are the same function."""
    acting, learning = subject.build(), subject.build().train()
    before = {name: buffer.clone() for name, buffer in learning.named_buffers()}
    for context, inputs in situations(acting):
        expected = values(acting, inputs, CHUNKINGS["T passes of one step"])
        y, state = run(learning, inputs, ONE_PASS)
        found = {"y": y.detach()} | {f"state {key!r}": leaf.detach() for key, leaf in leaves(state).items()}
        where = f"{context}, one pass in training mode against T of one step in evaluation mode"
        assert_values_close(found, expected, FLOAT32, where)
    for name, buffer in learning.named_buffers():
        assert_close(buffer, before[name], 0.0, f"after passes in training mode: buffer {name!r}")


def _unchanged_by_a_pass(trunk: Trunk, inputs: Inputs, context: str) -> TensorDict:
    """The state that a pass returns, which changes none of its inputs."""
    before = inputs.clone()
    _, state = trunk(inputs.x, inputs.state, inputs.is_init)
    now = {"x": inputs.x, "is_init": inputs.is_init, **leaves(inputs.state)}
    then = {"x": before.x, "is_init": before.is_init, **leaves(before.state)}
    if now.keys() != then.keys():
        raise AssertionError(f"{context}: the state given has keys {list(now)}, had {list(then)}")
    for key, tensor in then.items():
        assert_close(now[key], tensor, 0.0, f"{context}: the {key!r} given")
    return state


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [inputs.x, inputs.is_init, *leaves(inputs.state).values()]


def _gradients_of(y: Tensor, inputs: Inputs) -> list[Tensor]:
    """Gradient of the weighted sum of `y` in the features, then in each entry of the state."""
    wanted = [tensor for tensor in _tensors(inputs) if tensor.requires_grad]
    total = objective(y, TensorDict())
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


def _objective_moved(trunk: Trunk, inputs: Inputs, name: str, step: Tensor) -> Tensor:
    """The objective of one pass after the tensor that `gradients` calls `name` has moved by `step`."""
    inputs = inputs.clone()
    tensor = differentiable(trunk, inputs)[name]
    with torch.no_grad():
        kept = tensor.clone()
        tensor += step
        total = objective(*run(trunk, inputs, ONE_PASS))
        tensor.copy_(kept)
    return total

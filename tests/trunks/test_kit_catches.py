"""Negative controls: trunks with one fault each, and the check of the conformance kit that must find it."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from lit_rl.testing import Subject, run_checks
from lit_rl.testing.trunk_checks import CHECKS, contract, platforms
from lit_rl.trunks import Trunk


class Good(Trunk):
    """No fault: a recurrence with a window of two steps, one hook for each fault to come."""

    def __init__(self, in_features: int, *, d_model: int = 4) -> None:
        super().__init__(in_features, out_features=d_model)
        self.now = nn.Linear(in_features, d_model)
        self.before = nn.Linear(in_features, d_model, bias=False)
        self.memory = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size):
        zeros = self.now.weight.new_zeros
        state = {"h": zeros(batch_size, self.out_features), "window": zeros(batch_size, self.in_features)}
        return TensorDict(state, batch_size=[batch_size])

    def forward(self, x, state, is_init):
        h, window = state["h"], state["window"]
        outputs = []
        for t in range(x.shape[1]):
            h, window = self.reset(h, window, is_init[:, t, None])
            h = self.step(x[:, t], h, window).to(state["h"].dtype)
            window = x[:, t].to(state["window"].dtype)
            outputs.append(h)
        return torch.stack(outputs, dim=1), TensorDict(
            {"h": h, "window": window}, batch_size=state.batch_size
        )

    def reset(self, h, window, now):
        return h.masked_fill(now, 0), window.masked_fill(now, 0)

    def step(self, x, h, window):
        return torch.tanh(self.now(x) + self.before(window) + self.memory(h))


class IgnoresResets(Good):
    def reset(self, h, window, now):
        return h, window


class LeaksWindow(Good):
    def reset(self, h, window, now):
        return h.masked_fill(now, 0), window


class ResetsAfterTheStep(Good):
    def reset(self, h, window, now):
        return h, window

    def forward(self, x, state, is_init):
        outputs = []
        for t in range(x.shape[1]):
            y, state = super().forward(x[:, t : t + 1], state, is_init[:, t : t + 1])
            state = state.apply(lambda leaf, now=is_init[:, t, None]: leaf.masked_fill(now, 0))
            outputs.append(y)
        return torch.cat(outputs, dim=1), state


class ForgetsResetAtFirstStep(Good):
    def forward(self, x, state, is_init):
        is_init = torch.cat([torch.zeros_like(is_init[:, :1]), is_init[:, 1:]], dim=1)
        return super().forward(x, state, is_init)


class StartsEachPassAnew(Good):
    def forward(self, x, state, is_init):
        return super().forward(x, self.initial_state(len(x)), is_init)


class WritesIntoState(Good):
    def forward(self, x, state, is_init):
        y, after = super().forward(x, state, is_init)
        state["h"].copy_(after["h"].detach())
        return y, after


class WritesIntoFeatures(Good):
    def forward(self, x, state, is_init):
        with torch.no_grad():
            x.clamp_(-1, 1)
        return super().forward(x, state, is_init)


class MixesRows(Good):
    def step(self, x, h, window):
        return super().step(x, h + 0.1 * h.mean(0), window)


class SeesTheFuture(Good):
    def forward(self, x, state, is_init):
        return super().forward(x - x.mean(1, keepdim=True), state, is_init)


class ResetsInTheFuture(Good):
    def forward(self, x, state, is_init):
        return super().forward(x * (1 - 0.1 * is_init.float().mean(1))[:, None, None], state, is_init)


class WidensState(Good):
    def forward(self, x, state, is_init):
        y, state = super().forward(x, state, is_init)
        return y, state.double()


class DropsKey(Good):
    def forward(self, x, state, is_init):
        y, state = super().forward(x, state, is_init)
        return y, state.exclude("window")


class FlattensOutput(Good):
    def forward(self, x, state, is_init):
        y, state = super().forward(x, state, is_init)
        return y.flatten(0, 1), state


class HasUnusedParameter(Good):
    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.unused = nn.Parameter(torch.zeros(3))


class DetachesEachPass(Good):
    def forward(self, x, state, is_init):
        return super().forward(x, state.detach(), is_init)


class DetachesEachStep(Good):
    def step(self, x, h, window):
        return super().step(x, h.detach(), window)


class HidesMemory(Good):
    hidden = 0.0

    def step(self, x, h, window):
        self.hidden += 1.0
        return super().step(x, h + self.hidden, window)


class RollsDice(Good):
    def step(self, x, h, window):
        return super().step(x, h + 0.01 * torch.randn_like(h), window)


class HasUnsavedWeight(Good):
    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.scale = torch.randn(()).item()

    def step(self, x, h, window):
        return super().step(x, h * self.scale, window)


class ReturnsFloat32(Good):
    def forward(self, x, state, is_init):
        y, state = super().forward(x, state, is_init)
        return y.float(), state


class Explodes(Good):
    def step(self, x, h, window):
        return super().step(x, h, window) + 2 * h


class RoundsStateUnderAutocast(Good):
    def forward(self, x, state, is_init):
        y, after = super().forward(x, state, is_init)
        return y, after.bfloat16() if torch.is_autocast_enabled("cpu") else after


class DivergesUnderAutocast(Good):
    def step(self, x, h, window):
        return super().step(x, h, window) + torch.is_autocast_enabled("cpu")


class DiffersWhenCompiled(Good):
    def step(self, x, h, window):
        return super().step(x, h, window) + (0.1 if torch.compiler.is_compiling() else 0.0)


class DropsOut(Good):
    def step(self, x, h, window):
        return super().step(x, torch.dropout(h, 0.5, self.training), window)


class CountsWhileLearning(Good):
    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x, state, is_init):
        if self.training:
            self.passes += 1
        return super().forward(x, state, is_init)


class TruncatesEveryTwentySteps(Good):
    def forward(self, x, state, is_init):
        outputs = []
        for x_part, is_init_part in zip(x.split(20, 1), is_init.split(20, 1), strict=True):
            y, state = super().forward(x_part, state, is_init_part)
            state = state.detach() if x_part.shape[1] == 20 else state
            outputs.append(y)
        return torch.cat(outputs, 1), state


class LosesResetsAtItsOwnBorders(Good):
    def forward(self, x, state, is_init):
        is_init = is_init.clone()
        is_init[:, 32::32] = False
        return super().forward(x, state, is_init)


class ReusesWhatItReturned(Good):
    def forward(self, x, state, is_init):
        y, after = super().forward(x, state, is_init)
        if not torch.is_grad_enabled():
            if state is getattr(self, "returned", None):
                state["h"].copy_(after["h"])
            self.returned = after
        return y, after


class HasPositionalOption(Good):
    def __init__(self, in_features: int, d_model: int = 4) -> None:
        super().__init__(in_features, d_model=d_model)


class HasOptionWithoutDefault(Good):
    def __init__(self, in_features: int, *, d_model: int) -> None:
        super().__init__(in_features, d_model=d_model)


class HasOptionWithoutAnnotation(Good):
    def __init__(self, in_features: int, *, d_model=4) -> None:
        super().__init__(in_features, d_model=d_model)


class LeavesOutWhatLeadsUp(Good):
    def last_steps(self, x, state, is_init, steps):
        return self(x[:, -steps:], state, is_init[:, -steps:])[0]


class DetachesWhatLeadsUp(Good):
    def last_steps(self, x, state, is_init, steps):
        early = x.shape[1] - steps
        if early:
            with torch.no_grad():
                _, state = self(x[:, :early], state, is_init[:, :early])
        return self(x[:, early:], state, is_init[:, early:])[0]


class BalancesWholePassesOnly(Good):
    def forward(self, x, state, is_init):
        y, state = super().forward(x, state, is_init)
        self.auxiliary_loss = y.square().mean()
        return y, state

    def last_steps(self, x, state, is_init, steps):
        return super().forward(x, state, is_init)[0][:, -steps:]


class NamesFeaturesOtherwise(Good):
    def __init__(self, n_inputs: int) -> None:
        super().__init__(n_inputs)


class MisstatesWidth(Good):
    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.in_features = str(in_features)


CAUGHT = [
    (HasPositionalOption, contract.check_constructor, "not keyword-only"),
    (HasOptionWithoutDefault, contract.check_constructor, "lacks a default"),
    (HasOptionWithoutAnnotation, contract.check_constructor, "lacks a default or an annotation"),
    (NamesFeaturesOtherwise, contract.check_constructor, "n_inputs"),
    (MisstatesWidth, contract.check_constructor, "in_features is '5'"),
    (WidensState, contract.check_spec, "float64"),
    (DropsKey, contract.check_spec, "the returned state is"),
    (FlattensOutput, contract.check_spec, "y is"),
    (WritesIntoState, contract.check_inputs_unchanged, "'h' given is off"),
    (ReusesWhatItReturned, contract.check_inputs_unchanged, "from a returned state: the 'h' given is off"),
    (WritesIntoFeatures, contract.check_inputs_unchanged, "'x' given is off"),
    (StartsEachPassAnew, contract.check_values_agree, r"T passes of one step against one pass: y .*t="),
    (SeesTheFuture, contract.check_values_agree, "T passes of one step"),
    (HidesMemory, contract.check_values_agree, "T passes of one step"),
    (DetachesEachPass, contract.check_gradients_agree, "gradient of parameter"),
    (LeavesOutWhatLeadsUp, contract.check_last_steps, r"the last 1 of 17 steps, .*: y is off"),
    (DetachesWhatLeadsUp, contract.check_last_steps, r"the last 1 of 17 steps, .*gradient of"),
    (BalancesWholePassesOnly, contract.check_last_steps, "last_steps does not"),
    (DetachesEachStep, contract.check_gradients_are_slopes, "slope along parameter"),
    (IgnoresResets, contract.check_reset_starts_afresh, "row 0, episode from t=0: y"),
    (IgnoresResets, contract.check_no_leak_between_episodes, "reset at t=0"),
    (LeaksWindow, contract.check_reset_starts_afresh, "episode from"),
    (LeaksWindow, contract.check_no_leak_between_episodes, "reset at t=0"),
    (ResetsAfterTheStep, contract.check_reset_starts_afresh, "episode from"),
    (ResetsAfterTheStep, contract.check_no_leak_between_episodes, "from the reset on"),
    (ForgetsResetAtFirstStep, contract.check_reset_starts_afresh, "resets at t=0"),
    (ForgetsResetAtFirstStep, contract.check_values_agree, "T passes of one step"),
    (MixesRows, contract.check_no_leak_between_rows, "other rows changed: y"),
    (SeesTheFuture, contract.check_causal, r"steps from t=1 changed: y"),
    (ResetsInTheFuture, contract.check_causal, "changed: y"),
    (HasUnusedParameter, contract.check_every_parameter_learns, "'unused' is zero"),
    (Explodes, contract.check_lengths, "not finite after 600 steps"),
    (TruncatesEveryTwentySteps, contract.check_lengths, "T=259 in chunks of 37: gradient of"),
    (LosesResetsAtItsOwnBorders, contract.check_lengths, "T=259 in chunks of 37: y is off"),
    (DropsOut, contract.check_training_mode, "in evaluation mode: y is off"),
    (CountsWhileLearning, contract.check_training_mode, "buffer 'passes' is off"),
    (HasUnsavedWeight, platforms.check_state_dict, "round trip"),
    (RollsDice, platforms.check_deterministic, "a second pass"),
    (ReturnsFloat32, platforms.check_float64, "y is torch.float32"),
    (RoundsStateUnderAutocast, platforms.check_bfloat16_autocast, "bfloat16"),
    (DivergesUnderAutocast, platforms.check_bfloat16_autocast, "y is off"),
    (DiffersWhenCompiled, platforms.check_compile, "compiled, T=17: y is off"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_trunk_without_fault_passes(check):
    check(Subject(Good))


@pytest.mark.parametrize(
    ("trunk", "check", "message"), CAUGHT, ids=[f"{t.__name__}-{c.__name__}" for t, c, _ in CAUGHT]
)
def test_fault_is_caught(trunk, check, message):
    options = {"d_model": 4} if trunk is HasOptionWithoutDefault else {}
    with pytest.raises(AssertionError, match=message):
        check(Subject(trunk, options))


def test_every_check_but_cuda_has_a_fault_that_it_catches():
    assert {check for _, check, _ in CAUGHT} == set(CHECKS) - {platforms.check_cuda}


def test_comparison_between_devices_runs_and_catches():
    platforms.agrees_with_cpu(Subject(Good), "cpu")
    with pytest.raises(AssertionError, match="cpu against CPU"):
        platforms.agrees_with_cpu(Subject(RollsDice), "cpu")


def test_a_check_that_raises_does_not_stop_the_others():
    class Raises(Good):
        def step(self, x, h, window):
            raise IndexError("out\nof range")

    verdicts = {v.check: v for v in run_checks(Subject(Raises))}
    assert len(verdicts) == len(CHECKS)
    assert verdicts["constructor"].outcome == "passed"
    assert verdicts["spec"].outcome == "failed"
    assert verdicts["spec"].detail == "IndexError: out of range"

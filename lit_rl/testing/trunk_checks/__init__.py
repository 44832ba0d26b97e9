"""The checks that `lit_rl.testing.conformance` runs on a trunk, in order."""

from __future__ import annotations

from collections.abc import Callable

from lit_rl.testing.trunk_checks import contract, platforms
from lit_rl.testing.trunk_checks.runs import Subject

Check = Callable[[Subject], None]

CHECKS: tuple[Check, ...] = (
    contract.check_constructor,
    contract.check_spec,
    contract.check_inputs_unchanged,
    contract.check_values_agree,
    contract.check_gradients_agree,
    contract.check_last_steps,
    contract.check_gradients_are_slopes,
    contract.check_reset_starts_afresh,
    contract.check_no_leak_between_episodes,
    contract.check_no_leak_between_rows,
    contract.check_causal,
    contract.check_every_parameter_learns,
    contract.check_lengths,
    contract.check_training_mode,
    platforms.check_state_dict,
    platforms.check_deterministic,
    platforms.check_float64,
    platforms.check_bfloat16_autocast,
    platforms.check_compile,
    platforms.check_cuda,
)

__all__ = ["CHECKS", "Check", "Subject"]

"""The one error a user can cause: printed as one line, exit code 2."""

import math
import sys
from collections.abc import Mapping


class UserError(Exception):
    """Bad input. The message is one line that says what, why, and what to do."""


def refused(program: str, error: UserError) -> int:
    """Tells on stderr, in one line, what was wrong; returns the exit code of bad input, 2."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def check_range(
    values: Mapping[str, float | None], least: float, most: float = math.inf, *, above: bool = False
) -> None:
    """Raises `UserError` for a value that is not finite or not from `least` to `most`; None passes.

    Args:
        values: by the names that the message calls them.
        least: the smallest that is allowed; not allowed itself if `above`.
        most: the largest that is allowed.
        above: see `least`.
    """
    for name, value in values.items():
        if value is None or (
            math.isfinite(value) and least <= value <= most and (value > least or not above)
        ):
            continue
        bounds = f"above {least}" if above else f"at least {least}"
        if most < math.inf:
            bounds = f"{bounds} and at most {most}"
        raise UserError(
            f"{name} is {value}: it must be {bounds}{'' if math.isfinite(value) else ' and finite'}"
        )

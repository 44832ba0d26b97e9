"""The one error a user can cause: printed as one line, exit code 2."""


class UserError(Exception):
    """Bad input. The message is one line that says what, why, and what to do."""

"""The command `lit-rl`, also `python -m lit_rl`. Imports torch only for what needs it."""

from __future__ import annotations

import os
import sys

from lit_rl.errors import UserError, refused

USAGE = """\
usage: lit-rl COMMAND ...

  fit        train           lit-rl fit --config configs/ppo_cartpole.yaml [--model.trunk gru] ...
  validate   evaluate        the same, under the names that training logs
  test       evaluate        lit-rl test --ckpt_path P [--episodes N] [--greedy false] [--env.id ID]
  predict    write episodes  lit-rl predict --ckpt_path P --output DIR [--episodes N]
  trunks     architectures   lit-rl trunks list | check NAME [--learn] | new NAME
  bench      speed           lit-rl bench throughput CONFIG ... [--peer sb3]

'lit-rl COMMAND --help' tells a command's options, 'lit-rl fit --model.trunk.help gru' those of a trunk.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: 2 for bad input, after one line that says what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        match argv:
            case [] | ["--help"] | ["-h"]:
                print(USAGE, end="")
                return 0
            case ["--version"]:
                from importlib.metadata import version

                print(f"lit-rl {version('lit-rl')}")
                return 0
            case ["trunks", *rest]:
                from lit_rl import trunk_commands

                return trunk_commands.main(rest)
            case ["bench", *rest]:
                from lit_rl.benchmarks.throughput import command as bench

                return bench.main(rest)
            case ["fit" | "validate" | "test" | "predict", *_]:
                from lit_rl import cli

                return cli.main(argv)
            case [command, *_]:
                raise UserError(f"no command {command!r}: use fit, validate, test, predict, trunks or bench")
    except UserError as error:
        if "LIT_RL_TRACEBACK" in os.environ:
            raise
        return refused("lit-rl", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

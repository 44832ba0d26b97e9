"""The command itself: what it imports, how it is called, how it fails."""

import os
import subprocess
import sys

import pytest

NO_TORCH = """
import sys
from lit_rl.__main__ import main
code = main(sys.argv[1:])
assert not {"torch", "lightning", "tensordict", "numpy"} & set(sys.modules)
sys.exit(code)
"""


def python(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], [], ["trunks", "list"], ["--version"]])
def test_what_needs_no_torch_imports_none(arguments):
    done = python("-c", NO_TORCH, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_module_and_script_are_one_command():
    script = os.path.join(os.path.dirname(sys.executable), "lit-rl")
    by_script = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert python("-m", "lit_rl", "--help").stdout == by_script
    assert "usage: lit-rl COMMAND" in by_script


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = python("-m", "lit_rl", "fit", "--model.trunk=grru", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("lit-rl: error: unknown trunk 'grru'; did you mean gru")
    assert not list(tmp_path.iterdir())


def test_one_line_even_where_lightning_and_torch_would_talk(tmp_path):
    done = python("-m", "lit_rl", "fit", "--model.num_minibatches=7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "do not divide into 7 minibatches" in line
    assert not list(tmp_path.iterdir())


def test_the_whole_traceback_on_request(tmp_path):
    done = python("-m", "lit_rl", "fit", "--model.gamma=x", cwd=tmp_path, LIT_RL_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ArgumentError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "no command 'fitt': use fit, validate, test, predict, trunks or bench"),
        (["trunks"], "the following arguments are required: COMMAND"),
        (["trunks", "lst"], "invalid choice: 'lst'"),
        (["trunks", "check"], "the following arguments are required: NAME"),
        (["trunks", "new", "a", "--pa=b"], "unrecognized arguments: --pa=b"),
    ],
)
def test_commands_that_there_are_not(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_each_command_tells_its_options(lit_rl, command):
    done = lit_rl(command, "--help")
    assert done.code == 0
    for option in ("--model", "--data", "--env.id", "--trainer.precision", "--episodes", "--ckpt_path"):
        assert option in done.out

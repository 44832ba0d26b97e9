"""The benchmark of drawing from a replay runs."""

import re

import pytest

from lit_rl.benchmarks import replay_speed


def test_a_line_for_each_storage(capsys: pytest.CaptureFixture[str]) -> None:
    replay_speed.main(["--windows", "300", "--rounds", "3"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "median" in line]
    assert [line.partition(":")[0] for line in lines] == ["memory", "disk"]
    assert all(
        re.search(r": 300 windows of 10 steps, draw 64 .* median \d+\.\d\d ms", line) for line in lines
    )

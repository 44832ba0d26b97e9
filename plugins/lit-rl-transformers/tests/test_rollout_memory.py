"""A cache is large, so a rollout keeps it only at the start of sequences."""

import sys

import pytest

from lit_rl.benchmarks.rollout_memory import in_a_process


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux")
def test_a_rollout_takes_little_more_than_an_mlps():
    assert in_a_process("transformer_xl") - in_a_process("mlp") < 150e6

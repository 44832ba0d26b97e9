"""The memory ladder: the trunks learn to remember (`make test-slow`)."""

import pytest
import torch

from lit_rl.benchmarks import ladder
from lit_rl.benchmarks.measure import Contender

torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["transformer_xl", "gtrxl"])
@pytest.mark.parametrize("rung", ladder.RUNGS[:2], ids=lambda rung: f"k={rung.delay}")
def test_memory_climbs(trunk, rung):
    climbed = ladder.climb(Contender.named(trunk).with_usual(d_model=ladder.D_MODEL), rung, seed=1)
    print(f"\n{climbed}")
    assert climbed.success >= 0.95

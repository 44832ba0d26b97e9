"""One thread for every test, denormal numbers, and `import helpers` from any folder of tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """The command takes them for zero in its process, which here is that of the tests to come."""
    yield
    torch.set_flush_denormal(False)

"""`import probes` from here, from configurations (`probes.SignalAt`) and in other processes."""

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.append(HERE)


@pytest.fixture(autouse=True)
def _importable_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", HERE if not path else os.pathsep.join([path, HERE]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

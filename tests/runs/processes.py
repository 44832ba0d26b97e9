"""Runs of two processes on the CPU, and what each of them wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

LIT_RL = [sys.executable, "-m", "lit_rl"]
DDP = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]


def launch(folder: Path, command: list[Any]) -> subprocess.CompletedProcess:
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def found(folder: Path) -> list[dict[str, Any]]:
    """What callbacks of `probes` and `dqn_probes` noted, by rank."""
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[key] - other[key]).abs().max().item() for key in one)

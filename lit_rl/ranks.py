"""The processes of one run (ranks): what they gather, and errors that end all of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lit_rl.errors import UserError

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process speaks for all, as launchers tell it before any of them is connected."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    return rank == "0" and os.environ.get("NODE_RANK", "0") == "0"


def gather_list(mine: list[Any]) -> list[Any]:
    """The lists of all ranks, in order of rank, as one."""
    if not (dist.is_available() and dist.is_initialized()):
        return mine
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, mine)
    return [item for part in lists for item in part]


def together(act: Callable[[], T]) -> T:
    """What `act` returns; a `UserError` in one rank ends all of them, and rank 0 reports it.

    All ranks must come here. Without it the others would wait, in their next collective operation, for
    one that is gone.
    """
    error: UserError | None = None
    try:
        result = act()
    except UserError as mine:
        error = mine
    reasons = [reason for reason in gather_list([error and str(error)]) if reason is not None]
    if not reasons:
        return result
    if dist.is_initialized() and dist.get_rank() > 0:
        raise SystemExit(2)
    raise error or UserError(reasons[0])


def end_with_rank_0() -> None:
    """A process that rank 0 has started ends with it, wherever it waits (a killed rank 0 cannot end it)."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["LIT_RL_RANK_0"] = str(os.getpid())
        return
    starter = int(os.environ.get("LIT_RL_RANK_0", os.getppid()))

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave() -> None:
    """Ends the threads that talk to the other ranks; an interpreter that ends before them may abort."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def peer_is_gone(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank has ended."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "onnection closed by peer" in text or "onnection reset" in text
    )

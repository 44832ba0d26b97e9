"""Starts a run again and again and kills it (SIGKILL) at random moments; prints what each kill left.

    python kill_and_go_on.py KILLS SEED OPTION...

Each run is a fork of this process, which has imported everything but started nothing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from lit_rl import checkpoints, cli

RUN = Path("logs/it/version_0/checkpoints")


def start(options: list[str]) -> int:
    process = os.fork()
    if process == 0:
        os.dup2(os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os._exit(cli.main(options))
    return process


def saved_at() -> float:
    return max((path.stat().st_mtime for path in RUN.glob("*.ckpt")), default=0.0)


def main(kills: int, seed: int, options: list[str]) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        before = saved_at()
        process = start(options)
        while saved_at() == before:  # at least one checkpoint a run, or nothing would ever move
            time.sleep(0.001)
            if os.waitpid(process, os.WNOHANG)[0]:
                raise SystemExit("the run ended by itself")
        time.sleep(rng.uniform(0.0, 0.4))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = checkpoints.newest_whole(Path("logs/it"))
        left = {
            "frames": None if found is None else checkpoints.load(found)["frames"],
            "partial": len(list(RUN.glob("*.partial"))),
            "whole": all(checkpoints.is_whole(path) for path in RUN.glob("*.ckpt")),
        }
        print(json.dumps(left), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

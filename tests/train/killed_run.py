"""A training run in a process of its own that kills itself at a step, or while it writes a checkpoint."""

import json
import os
import signal
import sys
from pathlib import Path

from fewbits.train.run import train
from fewbits.train.settings import Settings


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(settings: dict, out: str, resume: bool, step: int, while_writing: bool) -> None:
    flush = os.fsync

    def half_written(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "state.pt" and f"step-{step:08d}" in path.parent.name:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        flush(descriptor)

    if while_writing:
        os.fsync = half_written
    train(
        Settings(**settings), Path(out), resume=resume,
        on_step=lambda report: die() if report.step == step and not while_writing else None,
    )  # fmt: skip


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))

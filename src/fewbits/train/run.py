"""A training run from beginning to end: go on or begin, step, save, write the model.

OUT                the trained model: written whole at the end
OUT.checkpoints    where the run stands, until OUT is written; held by one process
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.models.filling import Progress
from fewbits.models.staging import locked, parents_made, refuse_to_replace, staged_folder
from fewbits.train.checkpoint import Checkpoints
from fewbits.train.loop import Loop, StepReport
from fewbits.train.settings import Settings
from fewbits.train.writing import output_bytes, write_trained


def train(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_trained: Callable[[Loop], None] | None = None,
) -> list[StepReport]:
    """Train a model on a text and write it.

    A run that was killed and resumed gives the same bits as one that was not, on the same machine with as many threads.

    Args:
        settings: The model, the text, and how it is trained.
        out: The folder to write; checkpoints are beside it.
        resume: Go on from the newest checkpoint.
        overwrite: Replace a model in ``out``, and without ``resume`` the checkpoints of an earlier run.
        progress: Called while the model is loaded, with bytes read and bytes in all.
        on_step: Called after each step, before its checkpoint.
        should_stop: Asked after each step; if it says so, a checkpoint is written and ``KeyboardInterrupt`` raised.
        on_trained: Called after the last step, before the model is written.

    Returns:
        What each step did, those before a ``resume`` included.

    Raises:
        FewbitsError: Bad input, or a run that cannot go on.
        KeyboardInterrupt: With a note that says how to go on.
        OSError: A file cannot be written.
    """
    refuse_to_replace(out, overwrite)
    checkpoints = Checkpoints(out)
    with _held(checkpoints, out):
        start = _where_to_start(checkpoints, resume, overwrite)
        loop = Loop(settings, progress)
        if start is not None:
            loop.load_state_dict(checkpoints.read(start))
        with _told_how_to_resume(checkpoints):
            _run(loop, checkpoints, on_step, should_stop)
            if on_trained is not None:
                on_trained(loop)
            with staged_folder(out, overwrite=overwrite, nbytes=output_bytes(loop)) as folder:
                write_trained(loop, folder)
        shutil.rmtree(checkpoints.folder)
    return loop.reports


def _run(
    loop: Loop,
    checkpoints: Checkpoints,
    on_step: Callable[[StepReport], None] | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    while loop.steps_done < loop.settings.steps:
        report = loop.step()
        if on_step is not None:
            on_step(report)
        stop = should_stop is not None and should_stop()
        if stop or loop.steps_done % loop.settings.saves == 0 or loop.steps_done == loop.settings.steps:
            checkpoints.write(loop.steps_done, loop.state_dict())
        if stop:
            raise KeyboardInterrupt


def _where_to_start(checkpoints: Checkpoints, resume: bool, overwrite: bool) -> int | None:
    """The checkpoint to go on from; None: from the beginning."""
    newest = checkpoints.newest()
    if resume and newest is None:
        raise FewbitsError(
            f"--resume: there is no checkpoint in {checkpoints.folder}; leave --resume out to begin anew"
        )
    if newest is not None and not resume:
        if not overwrite:
            raise FewbitsError(
                f"{checkpoints.folder} holds a checkpoint of step {newest}; give --resume to go on there, or "
                "--overwrite to begin anew"
            )
        checkpoints.remove()
    checkpoints.clear_leftovers()
    return newest if resume else None


@contextmanager
def _held(checkpoints: Checkpoints, out: Path) -> Iterator[None]:
    """Keep other processes away; leave no empty folder behind."""
    with parents_made(out), locked(checkpoints.folder, out):
        try:
            yield
        finally:
            if checkpoints.folder.is_dir() and not any(checkpoints.folder.iterdir()):
                checkpoints.folder.rmdir()


@contextmanager
def _told_how_to_resume(checkpoints: Checkpoints) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        newest = checkpoints.newest()
        kept = (
            f"the checkpoint of step {newest} is in {checkpoints.folder}; the same command with --resume goes on there"
        )
        stop.add_note("there is no checkpoint yet, so the run begins anew" if newest is None else kept)
        raise

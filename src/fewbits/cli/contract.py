"""What `fewbits convert` does under a contract on loss: measure what was written, and report it beside the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.cli.app import to_stderr

if TYPE_CHECKING:
    from fewbits.quantize.found import Found

REPORT = "report.html"


class Measured:
    """Measures written models on the built-in evaluation text, as `fewbits compare` does."""

    def __init__(self, model: str, revision: str | None, progress: Callable[[str, int, int], None]) -> None:
        self._model, self._revision, self.progress = model, revision, progress
        self._last: dict[str, Any] = {}
        self._found: Found | None = None

    def kl(self, folder: Path) -> float:
        """The KL of a folder to the model in fp32, nats per token."""
        from fewbits.measure.compare import compare
        from fewbits.measure.text import WINDOW_TOKENS
        from fewbits.models.source import open_source

        source = open_source(self._model, revision=self._revision)
        context = getattr(source.config, "max_position_embeddings", None) or WINDOW_TOKENS
        result = compare(
            source.path, [folder], with_speed=False, window_tokens=min(WINDOW_TOKENS, context),
            progress=lambda what, done, total: self.progress(f"evaluating, {what}", done, total),
        )  # fmt: skip
        self._last = result.to_json()
        return result.rows[-1].kl

    def report(self, folder: Path, found: Found) -> None:
        """Write the figures of the model that was chosen as a page beside it."""
        from fewbits.report.comparison import write_report

        self._found = found
        write_report(self._last | {"search": found.to_json()}, folder / REPORT)

    @property
    def found(self) -> Found:
        """What the search found, once it is done."""
        assert self._found is not None
        return self._found

    def say(self) -> str:
        """What was found, in a line."""
        trial = self.found.trial
        for name, why in self.found.left_out.items():
            to_stderr(f"{name} was left out: {why}")
        loss = trial.kl if trial.evaluated is None else trial.evaluated
        return f"{trial.bits:.2f} bits per weight, KL {loss:.4f} to fp32 ({self.found.contract})"

"""How much each group of layers matters: what the predictions lose when it alone is quantized, in each precision.

What was measured is kept in a file, which is written anew, whole, after each block: another search on the same model
and text begins with it, and an interrupted one goes on there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewbits.models.precision import Precision
from fewbits.quantize.probe import Probe, Quantize

WINDOWS, WINDOW_TOKENS = 3, 128

Progress = Callable[[str, int, int], None]
"""Called with what is done, steps done, and steps in all."""


@dataclass
class Sensitivity:
    """What was measured.

    Attributes:
        file: Where it is kept.
        groups: The layers of each group, by the group's name.
        uniform: The loss of all groups in one precision, by its name.
        kl: The loss of each group alone, by precision: nats per token.
        measured: How many of these losses were measured here, and not read.
    """

    file: Path
    groups: dict[str, list[str]] = field(default_factory=dict)
    uniform: dict[str, float] = field(default_factory=dict)
    kl: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: int = 0

    @classmethod
    def kept(cls, file: Path) -> Sensitivity:
        """What an earlier search left, or nothing."""
        try:
            data = json.loads(file.read_text())
            return cls(file, data["groups"], data["uniform"], data["kl"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(file)

    def save(self) -> None:
        """Write the file, whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"groups": self.groups, "uniform": self.uniform, "kl": self.kl}) + "\n")
        part.replace(self.file)

    def screen(
        self, probe: Probe, precisions: Mapping[str, Precision], can: Callable[[str, str], bool], quantize: Quantize
    ) -> None:
        """Measure each precision with all groups in it.

        Args:
            probe: The model.
            precisions: By name.
            can: Whether a layer can have a precision.
            quantize: How.
        """
        if not self.groups:
            self.groups = {_name(layers): layers for layers in probe.groups()}
            self.kl = {name: {} for name in self.groups}
        for name, precision in precisions.items():
            if name not in self.uniform:
                layers = [each for group in self.groups.values() for each in group if can(each, name)]
                self.uniform[name] = probe.kl(layers, precision, quantize) if layers else float("inf")
                self.measured += 1
                self.save()

    def measure(
        self,
        probe: Probe,
        precisions: Mapping[str, Precision],
        can: Callable[[str, str], bool],
        quantize: Quantize,
        progress: Progress,
    ) -> None:
        """Measure each group in each precision that it can have and that was not measured yet.

        Args:
            probe: The model.
            precisions: By name.
            can: Whether a layer can have a precision.
            quantize: How.
            progress: Called after each group.
        """
        last: int | None = None
        try:
            for done, (group, layers) in enumerate(self.groups.items(), start=1):
                block = probe.block_of(layers[0])
                if last not in (None, block):
                    self.save()
                last = block
                for name, precision in precisions.items():
                    if name not in self.kl[group] and all(can(layer, name) for layer in layers):
                        self.kl[group][name] = probe.kl(layers, precision, quantize)
                        self.measured += 1
                progress("sensitivity", done, len(self.groups))
        finally:
            self.save()


def worth_trying(
    uniform: Mapping[str, float], nbytes: Mapping[str, int], max_kl: float | None
) -> tuple[list[str], dict[str, str]]:
    """Which precisions can be of use, and why the others are not.

    Left out is what takes no fewer bytes than another that loses less; and, where a loss is allowed, what takes more
    bytes than one with which all layers together lose less than half of it.

    Args:
        uniform: The loss of all layers in each precision.
        nbytes: The bytes of that.
        max_kl: The loss that is allowed; None: any.
    """
    kept: list[str] = []
    why: dict[str, str] = {}
    for name in sorted(uniform, key=lambda each: (nbytes[each], uniform[each])):
        better = next((other for other in kept if uniform[other] <= uniform[name]), None)
        enough = next((other for other in kept if max_kl is not None and uniform[other] < max_kl / 2), None)
        if better is not None:
            why[name] = f"{better} loses less in no more bytes"
        elif enough is not None:
            why[name] = f"{enough} loses little enough in fewer bytes"
        else:
            kept.append(name)
    return kept, why


def _name(layers: Sequence[str]) -> str:
    """``model.layers.0.self_attn.q_proj+k_proj+v_proj``."""
    owner = layers[0].rpartition(".")[0]
    return "+".join([layers[0], *(layer.removeprefix(f"{owner}.") for layer in layers[1:])])

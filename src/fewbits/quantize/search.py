"""Search the precisions of a model's layers for the fewest bytes that meet a contract on loss.

    1  screen        all layers in each precision: what cannot be of use is left out
    2  candidates    by GPTQ, if that is asked for: each layer in each precision that is left, quantized once
    3  sensitivity   each group of layers alone in each precision: what the predictions lose
    4  choose        the fewest bytes whose losses add up to what is allowed, or the least loss for the bytes allowed
    5  check         the model is written beside its place, loaded, and held against fp32 on text that was held out;
                     what it loses over what was predicted corrects the sum allowed; 4 again, until little is left over
    6  evaluate      the caller measures it; if it misses there, 4 again with less

What 1 to 3 find is kept in the cache folder, so that another search, or an interrupted one, goes on with it.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fewbits.errors import FewbitsError
from fewbits.models.load import AutoModelForCausalLM
from fewbits.models.manifest import ManifestRow
from fewbits.models.precision import Precision
from fewbits.models.quantized_source import FOLDER_LAYOUTS, QuantizedSource
from fewbits.models.resumable import fingerprint
from fewbits.models.source import Source
from fewbits.models.staging import parents_made, refuse_to_replace, swap
from fewbits.quantize.assignment import (
    Assignment,
    Options,
    best,
    bytes_of,
    fewest_bytes,
    least_loss,
    loss_of,
)
from fewbits.quantize.candidates import Candidates
from fewbits.quantize.contract import Contract
from fewbits.quantize.conversion import Conversion
from fewbits.quantize.found import Assigned, Found, Trial
from fewbits.quantize.held_out import HeldOut, split_text
from fewbits.quantize.least_error import least_error
from fewbits.quantize.probe import Probe
from fewbits.quantize.recipe import Recipe
from fewbits.quantize.search_cache import cache_folder, forget_others, hold
from fewbits.quantize.search_space import SearchSpace
from fewbits.quantize.sensitivity import WINDOW_TOKENS, WINDOWS, Progress, Sensitivity, worth_trying
from fewbits.quantize.to_folder import FolderConversion, context_of, has_tokenizer
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

_TRIALS = 6  # models that are written and checked, at most
_MARGIN = 0.01  # of the loss, that a choice after one that missed stays below
_CLOSE = 0.95  # of the loss allowed: then no better model is looked for

Evaluate = Callable[[Path], float]
"""Called with a written folder; gives its KL to the model in fp32 on the text that counts, nats per token."""


def search(
    source: Source,
    out: Path,
    contract: Contract,
    allowed: Sequence[Precision],
    job: FolderConversion,
    *,
    overwrite: bool,
    finish: Callable[[Path, Found], None],
    evaluate: Evaluate | None = None,
    on_manifest: Callable[[Sequence[ManifestRow]], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Conversion, Found]:
    """Write the cheapest model that meets a contract; see ``convert``.

    Args:
        source: The model, with everything folded into it.
        out: The folder.
        contract: What it has to meet.
        allowed: The precisions to choose from, groups not fitted.
        job: How it is converted.
        overwrite: Replace ``out`` if it holds a model.
        finish: Called with the folder and what was found, before the folder takes its place.
        evaluate: What measures a written model; None: the text that was held out has to do.
        on_manifest: Called with the manifest of the model that was chosen.
        progress: Called as the work goes on.

    Raises:
        FewbitsError: If no choice of these precisions meets the contract (it says what the best was), or the model
            cannot be searched. Nothing is written then.
        KeyboardInterrupt: What was measured is kept: the same search, run again, goes on there.
    """
    refuse_to_replace(out, overwrite)
    told = progress or _silent
    if isinstance(source, QuantizedSource):
        raise FewbitsError(f"{source.path} is {source.precision_name} already; search from the model it was made from")
    if not has_tokenizer(source):
        raise FewbitsError(f"{source.path} has no tokenizer to read text with, so its loss cannot be measured")
    space = SearchSpace.of(source, allowed, job)
    space.refuse_small(contract)
    with _Search(space, contract, job, told) as found, _beside(out) as (trial, kept):
        found.measure()
        conversion, result = found.write(trial, kept, evaluate)
        if on_manifest is not None:
            on_manifest(conversion.manifest)
        finish(kept, result)
        swap(kept, out)
    return replace(conversion, path=out), result


class _Search:
    """The steps of one search; a context manager that gives the held-out predictions back."""

    def __init__(self, space: SearchSpace, contract: Contract, job: FolderConversion, told: Progress) -> None:
        self._space, self._contract, self._job, self._told = space, contract, job, told
        source = space.prepared.source
        calibrated, self._held = split_text(source.tokenizer(), job.calibrate, context_of(source))
        self._scales = FOLDER_LAYOUTS[job.layout].SCALES or space.prepared.dtype
        work = fingerprint(source, **job.settings(), windows=(WINDOWS, WINDOW_TOKENS))
        folder = cache_folder() / work[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self._held_lock = hold(folder)
        forget_others(folder)
        self._calibrated = calibrated
        self._sensitivity = Sensitivity.kept(folder / "sensitivity.json")
        self._candidates: Candidates | None = None
        self._folder = folder
        self._precisions = dict(space.precisions)
        self._left_out: dict[str, str] = {}
        self._reference: HeldOut | None = None
        self._tried: list[Trial] = []
        self._conversion: Conversion | None = None

    def __enter__(self) -> _Search:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reference is not None:
            self._reference.close()
        if self._held_lock is not None:
            os.close(self._held_lock)

    def measure(self) -> None:
        """Steps 1 to 3."""
        space, found, told = self._space, self._sensitivity, self._told
        each = max(1, len(self._calibrated) // WINDOWS)
        windows = self._calibrated[::each][:WINDOWS, :WINDOW_TOKENS]
        probe = Probe(space.prepared, windows, lambda done, total: told("loading", done, total))
        self._reference = HeldOut(probe.model, self._held, lambda done, total: told("reference", done, total))
        found.screen(probe, self._precisions, space.can, self._nearest)
        sizes = {
            name: sum(sizes.get(name, max(sizes.values())) for sizes in space.nbytes.values())
            for name in self._precisions
        }
        uniform = {name: found.uniform[name] for name in self._precisions}
        kept, self._left_out = worth_trying(uniform, sizes, self._contract.max_kl)
        self._precisions = {name: self._precisions[name] for name in self._precisions if name in kept}
        quantize = self._nearest
        if self._job.method.codes == "gptq":
            self._candidates = Candidates(
                self._folder, space.prepared, self._precisions, self._scales, self._calibrated
            )
            self._candidates.make(lambda done, total: told("gptq", done, total))
            stored = {weight.module: name for name, weight in space.prepared.weights.items()}
            made = self._candidates
            quantize = lambda layer, weight, precision: made.read(stored[layer], precision)  # noqa: E731
        found.measure(probe, self._precisions, space.can, quantize, told)
        del probe
        gc.collect()

    def write(self, trial: Path, kept: Path, evaluate: Evaluate | None) -> tuple[Conversion, Found]:
        """Steps 4 to 6; the model that is to be had lies in ``kept`` then."""
        groups = self._groups()
        contract = self._contract
        target = math.inf if contract.max_kl is None else contract.max_kl
        goal, correction = target, 1.0
        met: tuple[Trial, Assignment, Conversion] | None = None
        seen: set[tuple[str, ...]] = set()
        for _ in range(_TRIALS):
            chosen = self._choose(groups, goal / correction)
            key = tuple(chosen[name] for name in groups)
            if key in seen:
                break
            seen.add(key)
            made, conversion = self._check(groups, chosen, trial)
            if made.predicted > 0 and made.kl > 0:
                correction = made.kl / made.predicted * (1 if made.kl <= goal else 1 + _MARGIN)
            if made.kl <= goal and (met is None or made.nbytes < met[0].nbytes):
                if evaluate is not None:
                    made = replace(made, evaluated=evaluate(trial))
                    self._tried[-1] = made
                if made.evaluated is None or made.evaluated <= target:
                    met = (made, chosen, conversion)
                    shutil.rmtree(kept, ignore_errors=True)
                    trial.rename(kept)
                else:
                    goal = made.kl * (1 - 2 * _MARGIN) * target / made.evaluated
            if contract.max_kl is None or (met is not None and met[0].kl >= _CLOSE * goal):
                break
        if met is None:
            raise self._missed()
        assigned = tuple(self._assigned(groups, met[1]))
        found = Found(
            contract, assigned, met[0], tuple(self._tried), self._left_out, self._sensitivity.measured
        )  # fmt: skip
        return met[2], found

    def _groups(self) -> dict[str, Options]:
        """Bytes and loss of each group in each precision that it can have."""
        space, found = self._space, self._sensitivity
        groups: dict[str, Options] = {}
        for name, layers in found.groups.items():
            can = [each for each in self._precisions if all(space.can(layer, each) for layer in layers)]
            if can:
                groups[name] = {each: (space.size(layers, each), found.kl[name][each]) for each in can}
        inside = {layer for layers in found.groups.values() for layer in layers}
        for layer, sizes in space.nbytes.items():
            if layer not in inside:  # beside the blocks, and not measured: it gets the most bits
                finest = max((each for each in self._precisions if each in sizes), key=lambda each: sizes[each])
                groups[layer] = {finest: (sizes[finest], 0.0)}
        return groups

    def _choose(self, groups: Mapping[str, Options], most_loss: float) -> Assignment:
        most_bytes = self._contract.max_bytes
        if self._contract.max_kl is None:
            assert most_bytes is not None
            chosen = least_loss(groups, most_bytes - self._space.fixed)
            assert chosen is not None, "refuse_small has seen to it"
            return chosen
        chosen = fewest_bytes(groups, most_loss)
        if chosen is not None and (most_bytes is None or bytes_of(groups, chosen) + self._space.fixed <= most_bytes):
            return chosen
        fits = None if most_bytes is None else least_loss(groups, most_bytes - self._space.fixed)
        return fits or best(groups)

    def _check(self, groups: Mapping[str, Options], chosen: Assignment, trial: Path) -> tuple[Trial, Conversion]:
        """Write a model and hold it against fp32."""
        told, number = self._told, len(self._tried) + 1
        layers = self._sensitivity.groups
        rules = {layer: precision for name, precision in chosen.items() for layer in layers.get(name, [name])}
        job = replace(self._job, calibrate=None)  # what there was to calibrate is done
        conversion = job.write(
            self._space.prepared.source, trial, Recipe.of(rules), overwrite=True, candidates=self._candidates,
            progress=lambda done, total: told(f"trial {number}: writing", done, total),
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(trial)
        assert self._reference is not None
        kl = self._reference.kl(model, lambda done, total: told(f"trial {number}: checking", done, total))
        del model
        gc.collect()
        weights = sum(self._space.weights[layer] for layer in rules)
        bits = 8 * bytes_of(groups, chosen) / weights
        made = Trial(bits, conversion.nbytes, loss_of(groups, chosen), kl)
        self._tried.append(made)
        return made, conversion

    def _missed(self) -> FewbitsError:
        """What is said when nothing meets the contract."""
        least = min(self._tried, key=lambda each: each.kl if each.evaluated is None else each.evaluated)
        loss = least.kl if least.evaluated is None else least.evaluated
        where = "on the text that was held out" if least.evaluated is None else "on the text that counts"
        size = "" if self._contract.max_bytes is None else f" within {self._contract.max_bytes:,} bytes"
        return FewbitsError(
            f"no choice of {', '.join(self._precisions)} meets {self._contract}: the best{size} loses {loss:.4g} nats "
            f"per token {where}, at {least.bits:.2f} bits per weight and {least.nbytes:,} bytes; allow more, keep "
            "layers with --keep, or try --method gptq and --rotate"
        )

    def _assigned(self, groups: Mapping[str, Options], chosen: Assignment) -> Iterator[Assigned]:
        for name, precision in chosen.items():
            layers = self._sensitivity.groups.get(name)
            for layer in layers or [name]:
                yield Assigned(layer, precision, groups[name][precision][1] if layers else None)

    def _nearest(self, layer: str, weight: torch.Tensor, precision: Precision) -> QuantizedTensor:
        find = least_error if self._job.method.codes == "mse" else quantize_weight
        return find(
            weight, precision.weights.name,
            group_size=precision.group_size, scale_dtype=self._scales, rotation=precision.rotation(weight.shape[1]),
        )  # fmt: skip


@contextmanager
def _beside(out: Path) -> Iterator[tuple[Path, Path]]:
    """Two folders beside the one that is to be written; what is left of them goes."""
    trial, kept = (out.parent / f".{out.name}.{part}" for part in ("trial", "chosen"))
    with parents_made(out):
        try:
            yield trial, kept
        finally:
            for folder in (trial, kept, trial.parent / f".{trial.name}.incomplete"):
                shutil.rmtree(folder, ignore_errors=True)


def _silent(what: str, done: int, total: int) -> None:
    pass

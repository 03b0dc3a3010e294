"""Calibration: run text through a model block by block, and quantize each block on what it is given.

    text -> embedding -> block 0 -> block 1 -> …
                         |  1  its float32 weights are read, and the second moments of each layer's inputs summed up
                         |  2  its layers are quantized by GPTQ
                         |  3  its quantized self gives the next block's inputs

One block and its inputs are in memory at a time, and what has been quantized and not been taken yet. The inputs of the
next block are kept in the folder that is being written, so that a calibration that was interrupted goes on there.

Letters: W windows, T tokens in each, H hidden features, K input features of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.models.naming import Place
from fewbits.models.precision import Precision
from fewbits.models.quantizable import Weight
from fewbits.models.source import Source
from fewbits.models.text import built_in_text, read_text
from fewbits.quantize.blocks import Blocks, check_stored_as_held
from fewbits.quantize.gptq import quantize_layer
from fewbits.quantize.moments import run_block
from fewbits.tensors.quantized import QuantizedTensor

WINDOWS, WINDOW_TOKENS = 32, 512
_BUILT_IN_START = 30_000  # the built-in text is measured on from token 20,000 to 24,096: none of that is used here


def calibration_windows(
    tokenizer: transformers.PreTrainedTokenizerBase, text: Path | None = None, most_tokens: int = WINDOW_TOKENS
) -> Tensor:
    """Token ids ``[W, T]`` to calibrate on.

    Args:
        tokenizer: The model's.
        text: A UTF-8 file; None: a part of the built-in text that quality is not measured on.
        most_tokens: The model's context; windows are no longer.

    Raises:
        FewbitsError: If the text cannot be read, or does not fill one window.
    """
    content = built_in_text() if text is None else read_text(text)
    start = _BUILT_IN_START if text is None else 0
    length = min(WINDOW_TOKENS, most_tokens)
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][start:]
    count = min(WINDOWS, len(ids) // length)
    if count < 1:
        raise FewbitsError(
            f"calibrate: {text or 'the built-in text'} has {len(ids)} tokens, and one window has {length}; "
            "give a longer text"
        )
    return torch.tensor(ids[: count * length]).view(count, length)


class Calibration:
    """Gives the quantized weights of a model by name; blocks are calibrated when one of theirs is first wanted."""

    def __init__(
        self,
        source: Source,
        model: transformers.PreTrainedModel,
        places: Mapping[str, Place],
        weights: Mapping[str, Weight],
        precisions: Mapping[str, Precision],
        scale_dtype: torch.dtype,
        windows: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            source: Where tensors are read from.
            model: The model, on the meta device; it is copied.
            places: Where each stored tensor goes.
            weights: The weights to quantize, by stored name.
            precisions: To what, by stored name.
            scale_dtype: Of their scales.
            windows: Token ids ``[W, T]``.
            progress: Called with blocks done and blocks in all.

        Raises:
            FewbitsError: If the model is not one stack of blocks, or its checkpoint holds weights in other pieces.
        """
        self._precisions, self._scale_dtype = precisions, scale_dtype
        self._progress = progress
        self._blocks = Blocks(source, model, places, windows)
        self._block_of = self._blocks.indices()
        self._quantized_here = {weight.parameter: name for name, weight in weights.items()}
        check_stored_as_held(model, places, weights)
        self._made: dict[str, QuantizedTensor] = {}
        self._folder: Path | None = None
        self._next = 0

    def resume(self, folder: Path, done: Callable[[str], bool]) -> None:
        """Keep what the next block is given in a folder, and go on with what an earlier run kept there.

        Args:
            folder: The folder that is being written.
            done: Whether a step was recorded in it; see ``kept_for``.
        """
        self._folder = folder
        for index in reversed(range(1, len(self._blocks))):
            if not done(self.kept_for(index)):
                continue
            try:
                inputs = load_file(folder / self.kept_for(index))["inputs"]
            except (OSError, SafetensorError):  # then all blocks are calibrated again
                return
            self._blocks.catch()  # for the arguments beside the inputs
            self._next, self._blocks.inputs = index, [x[None] for x in inputs]
            return

    def kept_for(self, index: int) -> str:
        """The file, and the recorded step, of what a block is given: all blocks before it are written then."""
        return f".calibration-{index}"

    def forget(self, until: int | None = None) -> None:
        """Remove what blocks before this one were given; None: what all were."""
        if self._folder is not None:
            for index in range(1, len(self._blocks) if until is None else until):
                (self._folder / self.kept_for(index)).unlink(missing_ok=True)

    def block_of(self, name: str) -> int | None:
        """The block that a stored tensor is in; None: in none."""
        return self._block_of.get(name)

    def holds(self, name: str) -> bool:
        """Whether a stored weight lies in a block."""
        return name in self._block_of and name in self._quantized_here.values()

    @torch.no_grad()
    def take(self, name: str) -> QuantizedTensor:
        """A quantized weight, once."""
        while name not in self._made:
            self._run_block()
        return self._made.pop(name)

    def _run_block(self) -> None:
        blocks = self._blocks
        if not blocks.inputs:
            blocks.catch()
        path, block = blocks.path(self._next), blocks.filled(self._next)
        layers = {
            parameter.removeprefix(path).removesuffix(".weight"): name
            for parameter, name in self._quantized_here.items()
            if parameter.startswith(path)
        }
        moments, _ = run_block(blocks, block, layers)
        for each, name in layers.items():
            layer: Any = block.get_submodule(each)
            made = quantize_layer(name, layer.weight, moments[each], self._precisions[name], self._scale_dtype)
            self._made[name] = made
            layer.weight = nn.Parameter(made.dequantize(), requires_grad=False)
        blocks.inputs = [blocks.through(block, x) for x in blocks.inputs]
        self._next += 1
        if self._folder is not None and self._next < len(self._blocks):
            kept = self._folder / self.kept_for(self._next)
            save_file({"inputs": torch.cat(blocks.inputs)}, kept)
            with kept.open("rb") as file:
                os.fsync(file.fileno())
        if self._progress is not None:
            self._progress(self._next, len(self._blocks))

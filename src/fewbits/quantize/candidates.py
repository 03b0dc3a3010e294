"""Every layer in every precision that a search may choose, quantized once by GPTQ and kept in files.

    inputs of a block -> 1  the second moments of what its layers are given, and what the block makes of them
                         2  each layer in each precision
                         3  a file; then the next block

Blocks are given what the model in float32 gives them, so a layer's codes do not depend on what others become.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewbits.models.precision import Precision
from fewbits.quantize.blocks import Blocks, check_stored_as_held
from fewbits.quantize.gptq import quantize_layer
from fewbits.quantize.moments import run_block
from fewbits.quantize.prepared import Prepared
from fewbits.tensors.quantized import QuantizedTensor


class Candidates:
    """The quantized weights of a model by stored name and precision."""

    def __init__(
        self,
        folder: Path,
        prepared: Prepared,
        precisions: Mapping[str, Precision],
        scale_dtype: torch.dtype,
        windows: Tensor,
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            folder: Where the files are kept.
            prepared: The model.
            precisions: What layers can become, by name; groups fitted.
            scale_dtype: Of the scales.
            windows: Token ids ``[W, T]`` to calibrate on.

        Raises:
            FewbitsError: If the model is not one stack of blocks, or its checkpoint holds weights in other pieces.
        """
        self._folder, self._prepared, self._precisions = folder, prepared, precisions
        self._scale_dtype = scale_dtype
        self._blocks = Blocks(prepared.source, prepared.model, prepared.places, windows)
        self._block_of = {name: block for name, block in self._blocks.indices().items() if name in prepared.weights}
        inside = {name: prepared.weights[name] for name in self._block_of}
        check_stored_as_held(prepared.model, prepared.places, inside)

    @torch.no_grad()
    def make(self, progress: Callable[[int, int], None]) -> None:
        """Quantize what is not there yet, block by block; an interrupted run goes on where it was."""
        wanted = {index: self._missing(index) for index in range(len(self._blocks))}
        last = max((index for index, missing in wanted.items() if missing), default=-1)
        if last < 0:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._blocks.catch()
        for index in range(last + 1):
            block, path = self._blocks.filled(index), self._blocks.path(index)
            layers = {
                self._prepared.weights[name].module.removeprefix(path): name
                for name, inside in self._block_of.items()
                if inside == index and wanted[index]
            }
            moments, outputs = run_block(self._blocks, block, layers)
            for key in wanted[index]:
                made = {
                    name: quantize_layer(
                        name,
                        block.get_parameter(f"{layer}.weight"),
                        moments[layer],
                        self._precisions[key],
                        self._scale_dtype,
                    )
                    for layer, name in layers.items()
                    if self._prepared.weights[name].K % (self._precisions[key].group_size or 1) == 0  # else it is kept
                }
                self._save(index, key, made)
            self._blocks.inputs = outputs
            progress(index + 1, last + 1)

    def holds(self, name: str) -> bool:
        """Whether a stored weight lies in a block."""
        return name in self._block_of

    def read(self, name: str, precision: Precision) -> QuantizedTensor:
        """A quantized weight, once it is made."""
        with safe_open(self._file(self._block_of[name], precision.name), "pt") as file:
            codes, scales = (file.get_tensor(f"{part}.{name}") for part in ("codes", "scales"))
        rotation = precision.rotation(self._prepared.weights[name].K)
        return QuantizedTensor(codes, scales, precision.weights.name, rotation)

    def _missing(self, index: int) -> list[str]:
        return [key for key in self._precisions if not _is_whole(self._file(index, key))]

    def _file(self, index: int, key: str) -> Path:
        return self._folder / f"block-{index}-{key}.safetensors"

    def _save(self, index: int, key: str, made: Mapping[str, QuantizedTensor]) -> None:
        tensors = {f"codes.{name}": each.codes for name, each in made.items()}
        tensors |= {f"scales.{name}": each.scales for name, each in made.items()}
        file = self._file(index, key)
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, part)
        part.replace(file)


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False

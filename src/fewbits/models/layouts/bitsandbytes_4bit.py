"""Weights of bitsandbytes in 4 bits, which are read and not written.

Of a quantized layer X with n = N · K weights in blocks of ``blocksize``, row after row, it stores

    X.weight                                  uint8 [n/2, 1]: two codes in a byte, the first one in the high half
    X.weight.quant_map                        float32 [16]: what the codes stand for
    X.weight.absmax                           float32 [n/blocksize]; or codes, uint8, of which
    X.weight.nested_absmax, .nested_quant_map   are the scales and the 256 values, and an offset is added
    X.weight.quant_state.bitsandbytes__nf4    uint8: JSON with shape, blocksize, dtype, …; or ``__fp4``

Source: bitsandbytes, ``bitsandbytes/functional.py``, ``QuantState``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.layouts.stored_weight import SCALE_DTYPES, StoredWeight, check_dtype, check_shape, part_of
from fewbits.models.precision import PRECISIONS
from fewbits.models.source import Source
from fewbits.tensors.quantized import QuantizedTensor

STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
"""What is added to a weight's name for the tensor that describes it."""

_STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def stored_4bit_weight(source: Source, name: str, state_name: str) -> StoredWeight:
    """Check the tensors that a weight is stored in.

    Args:
        source: The checkpoint.
        name: The weight's name.
        state_name: The tensor that describes it.

    Raises:
        FewbitsError: If one is missing, has another shape or dtype, or cannot be understood.
    """
    path, tensors = source.path, source.tensors
    state = _state(source, state_name)
    N, K = state["shape"]
    count, blocks = N * K, math.ceil(N * K / state["blocksize"])
    parts = [name, f"{name}.absmax", f"{name}.quant_map", state_name]
    if name not in tensors:
        raise FewbitsError(f"{path}: {state_name} is there, but {name} is missing; download it again")
    check_dtype(tensors[name], {"U8": torch.uint8}, path)
    check_shape(tensors[name], ((count + 1) // 2, 1), path=path)
    absmax, values = (part_of(name, part, tensors, path) for part in parts[1:3])
    check_shape(absmax, (blocks,), path=path)
    check_dtype(values, {"F32": torch.float32}, path)
    check_shape(values, (16,), path=path)
    check_dtype(absmax, {"F32": torch.float32, "U8": torch.uint8}, path)
    if absmax.stored_as == "U8":
        nested, nested_values = (
            part_of(name, f"{name}.nested_{part}", tensors, path) for part in ("absmax", "quant_map")
        )
        check_shape(nested, (math.ceil(blocks / state["nested_blocksize"]),), path=path)
        check_shape(nested_values, (256,), path=path)
        parts += [nested.name, nested_values.name]
    codebook = torch.tensor(PRECISIONS["nf4"].weights.codebook, dtype=torch.float32)
    is_nf4 = K % state["blocksize"] == 0 and torch.equal(source.read(values.name), codebook)
    precision = replace(PRECISIONS["nf4"], group_size=state["blocksize"]) if is_nf4 else None
    reader = _Reader(name, N, K, state)
    load = reader.values if precision is None else reader.codes_and_scales
    dtype = _STORED_AS[state["dtype"]] if precision is None else "F32"
    return StoredWeight(name, (N, K), tuple(parts), precision, dtype, load)


def _state(source: Source, name: str) -> dict[str, Any]:
    """What the tensor of JSON says, as far as it is needed, checked."""
    check_dtype(source.tensors[name], {"U8": torch.uint8}, source.path)
    try:
        state = json.loads(bytes(source.read(name).flatten().tolist()))
        shape, blocksize, dtype = state["shape"], state["blocksize"], state["dtype"]
        nested = state.get("nested_blocksize", 256), float(state.get("nested_offset", 0.0))
        whole = [*shape, blocksize, nested[0]]
        valid = len(shape) == 2 and all(isinstance(each, int) and each > 0 for each in whole) and dtype in _STORED_AS
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise FewbitsError(
            f"{source.path}: {name} is no JSON with a shape [N, K], a blocksize and a 16- or 32-bit dtype; "
            "download it again"
        )
    return {
        "shape": shape,
        "blocksize": blocksize,
        "dtype": dtype,
        "nested_blocksize": nested[0],
        "nested_offset": nested[1],
    }


@dataclass(frozen=True)
class _Reader:
    """Reads one weight whose tensors have been checked."""

    name: str
    N: int
    K: int
    state: dict[str, Any]

    def codes_and_scales(self, source: Source) -> QuantizedTensor:
        """The weight as it is stored; of two codes in a byte the first one comes into the low half."""
        stored = source.read(self.name).view(self.N, -1)
        return QuantizedTensor(stored >> 4 | stored << 4, self._absmax(source).view(self.N, -1), "nf4")

    def values(self, source: Source) -> Tensor:
        """The numbers that the weight stands for, in the dtype that it had."""
        stored = source.read(self.name).flatten()
        codes = torch.stack([stored >> 4, stored & 15], dim=-1).flatten()[: self.N * self.K]
        scales = self._absmax(source).repeat_interleave(self.state["blocksize"])[: self.N * self.K]
        values = source.read(f"{self.name}.quant_map")[codes.int()] * scales
        return values.view(self.N, self.K).to(SCALE_DTYPES[_STORED_AS[self.state["dtype"]]])

    def _absmax(self, source: Source) -> Tensor:
        """float32, one for each block."""
        absmax = source.read(f"{self.name}.absmax")
        if absmax.dtype != torch.uint8:
            return absmax
        values, scales = (source.read(f"{self.name}.nested_{part}").float() for part in ("quant_map", "absmax"))
        spread = scales.repeat_interleave(self.state["nested_blocksize"])[: absmax.numel()]
        offset: float = self.state["nested_offset"]
        return values[absmax.int()] * spread + offset

"""The compiled optimizer sweep, and the statistics of gradients; their meaning is ``fewbits.train``'s, bit for bit.

Each function says that it has no kernel for these tensors; the caller then runs the plain-PyTorch meaning.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbits.formats import Format, Overflow, Rounding
from fewbits.kernels import native
from fewbits.kernels.cast import rounder_of

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum FloatKind in csrc/adamw_job.hpp
_STATES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # enum StateKind
_MASTERS = {"fp32": 0, "split": 1, "kahan": 2, "stochastic": 3}  # enum MasterKind
_ROW = struct.Struct("=13q3Q")  # struct AdamwTensor
_COEFFICIENTS = struct.Struct("=9f")  # struct AdamwCoefficients


@dataclass(frozen=True)
class Row:
    """One parameter of the sweep; see ``fewbits.train.storage.Storage`` for the tensors."""

    gradient: Tensor
    param: Tensor
    low: Tensor | None
    m: Tensor
    v: Tensor
    m_scales: Tensor | None
    v_scales: Tensor | None
    copy: Tensor | None
    master: str
    keys: tuple[int, int, int]
    """Of the random words of the weight, m and v: 64 bits each."""
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class StateCodes:
    """The format of 8-bit moments, and when a block is kept as zeros."""

    fmt: Format
    no_scale_below: float


def adamw(rows: list[Row], codes: StateCodes) -> bool:
    """Update all parameters in place; False, and nothing done, if any tensor has no kernel."""
    if not all(_runs(row) for row in rows):
        return False
    table = bytearray()
    numbers = bytearray()
    gradients = [row.gradient.contiguous() for row in rows]  # alive until the kernel is done
    for row, gradient in zip(rows, gradients, strict=True):
        table += _ROW.pack(
            row.param.numel(), gradient.data_ptr(), _KINDS[gradient.dtype], row.param.data_ptr(), _MASTERS[row.master],
            _address(row.low), row.m.data_ptr(), row.v.data_ptr(), _STATES[row.m.dtype], _address(row.m_scales),
            _address(row.v_scales), _address(row.copy), 0 if row.copy is None else _KINDS[row.copy.dtype], *row.keys,
        )  # fmt: skip
        numbers += _COEFFICIENTS.pack(*row.coefficients)
    if rows:
        places, coefficients = (
            torch.frombuffer(table, dtype=torch.int64),
            torch.frombuffer(numbers, dtype=torch.float32),
        )
        native.module().adamw(
            places.data_ptr(), coefficients.data_ptr(), len(rows), _formats(codes), torch.get_num_threads()
        )
    return True


def gradient_stats(gradients: list[Tensor], codes: StateCodes) -> Tensor | None:
    """Count Inf and NaN, the largest finite magnitude and the sum of squares of each; None where no kernel runs.

    Returns:
        float64 ``[len(gradients), 4]``.
    """
    if not native.status().loaded or not all(_is_plain(g) and g.dtype in _KINDS for g in gradients):
        return None
    gradients = [g.contiguous() for g in gradients]
    out = torch.zeros(len(gradients), 4, dtype=torch.float64)
    table = torch.tensor([(g.numel(), g.data_ptr(), _KINDS[g.dtype]) for g in gradients], dtype=torch.int64)
    if gradients:
        native.module().gradient_stats(
            table.data_ptr(), len(gradients), _formats(codes), out.data_ptr(), torch.get_num_threads()
        )
    return out


def _runs(row: Row) -> bool:
    if not native.status().loaded or not _is_plain(row.gradient) or row.gradient.dtype not in _KINDS:
        return False
    held = (row.param, row.low, row.m, row.v, row.copy)
    if not all(tensor is None or (_is_plain(tensor) and tensor.is_contiguous()) for tensor in held):
        return False
    return row.param.dtype == (torch.float32 if row.master == "fp32" else torch.bfloat16)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@cache
def _formats(codes: StateCodes) -> Any:
    fmt = codes.fmt
    bf16, fp16 = Format.named("bf16"), Format.named("fp16")
    return native.module().AdamwFormats(
        rounder_of(bf16, Rounding.NEAREST_EVEN, Overflow.IEEE, 0),
        rounder_of(fp16, Rounding.NEAREST_EVEN, Overflow.IEEE, 0),
        rounder_of(bf16, Rounding.STOCHASTIC, Overflow.IEEE, 0),
        rounder_of(fmt, Rounding.STOCHASTIC, Overflow.SATURATE, 0),
        float(fmt.max), float(fmt.smallest_subnormal), codes.no_scale_below,
    )  # fmt: skip

"""The compiled kernels: load them, say which instruction set is live, hand them addresses and sizes.

Without them every op runs its reference: right, but slow. A warning says so, once.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels.panels import table

_native: Any
try:
    _native = import_module("fewbits.kernels._native")
except ImportError as error:  # not built for this Python or platform
    _native, _why_not = None, str(error)


@dataclass(frozen=True)
class Status:
    """What runs the ops on the CPU."""

    loaded: bool
    isa: str
    """``avx512``, ``avx2``, ``scalar``, or ``none`` where plain PyTorch runs."""
    reason: str
    shares_pool: bool
    """Whether the kernels run on PyTorch's threads; if not, on one thread."""


@cache
def status() -> Status:
    """Return which instruction set is live and why. Warns once if there is none.

    Raises:
        FewbitsError: If ``FEWBITS_ISA`` names an instruction set that this machine does not have.
    """
    if os.environ.get("FEWBITS_ISA") == "none":
        return Status(False, "none", "forced by FEWBITS_ISA", False)
    if _native is None:
        warnings.warn(
            f"fewbits runs without its compiled kernels, far slower ({_why_not}); reinstall it with a C++ compiler",
            RuntimeWarning,
            stacklevel=2,
        )
        return Status(False, "none", _why_not, False)
    try:
        return Status(True, _native.isa(), _native.reason(), _native.has_pool())
    except RuntimeError as error:
        raise FewbitsError(str(error)) from None


def module() -> Any:
    """The compiled module; only where ``status().loaded``."""
    return _native


def quantize_per_token(out: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``out`` (codes, scales), contiguous, of the right shapes; see ``ops.quantize_per_token``."""
    codes, scales = out
    x = x.contiguous()
    K = x.shape[-1]
    _native.quantize_per_token(
        x.data_ptr(), x.numel() // K, K, codes.data_ptr(), scales.data_ptr(), torch.get_num_threads()
    )
    return out


def rotate(out: Tensor, x: Tensor, block: int) -> Tensor:
    """Fill ``out``, contiguous, of x's shape; see ``rotation.rotate``."""
    x, K = x.contiguous(), x.shape[-1]
    _native.rotate(x.data_ptr(), x.numel() // K, K, block, out.data_ptr(), torch.get_num_threads())
    return out


def pack_int8(out: Tensor, weight: Tensor) -> Tensor:
    """Fill the panels ``out`` with the weight ``[N, K]``; see ``packing.pack_int8``."""
    weight = weight.contiguous()
    _native.pack_int8(weight.data_ptr(), *weight.shape, out.data_ptr(), torch.get_num_threads())
    return out


def int8_linear(out: Tensor, x: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None) -> Tensor:
    """Fill ``out``, contiguous, of the right shape; see ``ops.int8_linear``."""
    x, channel_scales = x.contiguous(), channel_scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    N, K = out.shape[-1], x.shape[-1]
    _native.int8_linear(
        x.data_ptr(), packed.data_ptr(), channel_scales.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), x.numel() // K, N, K, torch.get_num_threads(),
    )  # fmt: skip
    return out


def int8_matmul(
    out: Tensor, codes: Tensor, token_scales: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """Fill ``out``, contiguous, of the right shape; see ``ops.int8_matmul``."""
    codes, token_scales, channel_scales = codes.contiguous(), token_scales.contiguous(), channel_scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    _native.int8_matmul(
        codes.data_ptr(), token_scales.data_ptr(), packed.data_ptr(), channel_scales.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(),
        token_scales.numel(), channel_scales.numel(), codes.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    return out


def int8_linear_two_digits(
    out: Tensor, x: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """Fill ``out``, contiguous, of the right shape; see ``ops.int8_linear_two_digits``."""
    x, channel_scales = x.contiguous(), channel_scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    N, K = out.shape[-1], x.shape[-1]
    _native.int8_linear_two_digits(
        x.data_ptr(), packed.data_ptr(), channel_scales.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), x.numel() // K, N, K, torch.get_num_threads(),
    )  # fmt: skip
    return out


def int4_linear(out: Tensor, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    """Fill ``out``, contiguous, of the right shape; see ``panel_ops.int4_linear``."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    G, N, K = scales.shape[1], out.shape[-1], x.shape[-1]
    _native.int4_linear(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), scales.dtype == torch.bfloat16,
        0 if bias is None else bias.data_ptr(), out.data_ptr(),
        x.numel() // K, N, G, packed.shape[1] // G, torch.get_num_threads(),
    )  # fmt: skip
    return out


def weight_only_linear(
    out: Tensor,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    format_name: str,
    e4m3_tokens: bool,
) -> Tensor:
    """Fill ``out``, contiguous, of the right shape; see ``panel_ops.weight_only_linear``."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    G, K = scales.shape[1], x.shape[-1]
    values = _table(format_name)
    _native.weight_only_linear(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), scales.dtype == torch.bfloat16,
        {"int8": 1, "e4m3fn": 2}.get(format_name, 0), 0 if values is None else values.data_ptr(), e4m3_tokens,
        0 if bias is None else bias.data_ptr(), out.data_ptr(),
        x.numel() // K, out_features, K, G, packed.shape[1] // G, torch.get_num_threads(),
    )  # fmt: skip
    return out


@cache
def _table(format_name: str) -> Tensor | None:
    values = table(format_name)
    return None if values is None else torch.tensor(values)

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


_PANELS_OF_INT8 = 0
_TOKENS = {"int8": 1, None: 2, "e4m3fn": 3}
"""The kinds of tokens that weights in panels take, by the format of activations, as decoder.hpp numbers them."""

_CODES = {"int8": 1, "e4m3fn": 2}
"""How codes become numbers, as panel_weight.hpp numbers it; 0: by a table."""

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Dtypes of keys and values, as attention_job.hpp numbers them."""


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
    return _panel_linear(out, x, packed, scales, bias, "int4", "int8")


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
    return _panel_linear(out, x, packed, scales, bias, format_name, "e4m3fn" if e4m3_tokens else None)


def _panel_linear(
    out: Tensor,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format_name: str,
    activations: str | None,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    N, K = out.shape[-1], x.shape[-1]
    weight = weight_fields(packed, scales, bias, N, K, format_name, activations)
    _native.panel_linear(x.data_ptr(), weight, out.data_ptr(), x.numel() // K, torch.get_num_threads())
    return out


def weight_fields(
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    format_name: str,
    activations: str | None,
    rotation: int = 0,
) -> tuple[int, ...]:
    """A packed weight ``[N, K]`` as bindings.hpp takes it. The tensors must outlive what is made of it.

    Args:
        packed: What ``packing.pack_int8`` gives, with scales of one dimension, or ``panels.pack_panels``.
        scales: float32 ``[N]``, or what ``panels.pack_scales`` gives.
        bias: float32 ``[N]``, contiguous, or None.
        N: Output channels.
        K: Input features.
        format_name: The format of the codes.
        activations: The format that activations are quantized to, a scale per token; None: they are not.
        rotation: The block of features that the activations are rotated by before; 0: none.
    """
    G = 1 if scales.ndim == 1 else scales.shape[1]
    tokens = _PANELS_OF_INT8 if scales.ndim == 1 else _TOKENS[activations]
    values = _table(format_name)
    return (
        tokens, _CODES.get(format_name, 0), packed.data_ptr(), scales.data_ptr(),
        0 if values is None else values.data_ptr(), 0 if bias is None else bias.data_ptr(),
        scales.dtype == torch.bfloat16, N, K, G, packed.shape[1] // G, rotation,
    )  # fmt: skip


@cache
def _table(format_name: str) -> Tensor | None:
    values = table(format_name)
    return None if values is None else torch.tensor(values)


def attention(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Fill ``out``, contiguous, of query's dtype; see ``attention.attention``."""
    B, Q, T, D = query.shape
    G, S = key.shape[1:3]
    queries = query.float() if query.stride(-1) == 1 else query.float().contiguous()
    key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (key, value))
    strides = queries.stride(0), queries.stride(2), queries.stride(1)
    mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
    seen = (0, 0, 0) if mask is None else (mask.data_ptr(), *(_stride(mask, each) for each in (0, 2)))
    heads = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    _native.attention(
        queries.data_ptr(), strides, heads.data_ptr(), CACHE_TYPES[key.dtype],
        (key.data_ptr(), 0, *key.stride()[:3]), (value.data_ptr(), 0, *value.stride()[:3]),
        B, T, S, Q, G, D, *seen, causal, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out if heads is out else out.copy_(heads)


def _stride(tensor: Tensor, dim: int) -> int:
    """0 where a dimension of 1 is seen as longer."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0

"""Compiled casts between floats and codes of up to 16 bits, bit-equal to their meaning in ``fewbits.tensors.codes``.

Each function says with ``None`` that it has no kernel for these tensors or this format; the caller then runs the
plain-PyTorch meaning.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewbits.formats import Format, Kind, Overflow, Rounding, Specials
from fewbits.formats.overflow import overflow_codes
from fewbits.kernels import native

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_DTYPES = (torch.float32, *_NAMES)


def encode(
    x: Tensor,
    fmt: Format,
    rounding: Rounding,
    overflow: Overflow,
    key: int,
    codes: Tensor,
    packed: bool = False,
    fresh: bool = False,
) -> Tensor | None:
    """Round to codes.

    Args:
        x: float32, bfloat16 or float16, any shape, on the CPU.
        fmt: The format of the codes.
        rounding: Which neighbour.
        overflow: What becomes of values beyond the range.
        key: Of the random words of stochastic rounding; the word of an element depends on it and the position alone.
        codes: Filled and returned; contiguous, the shape of x, uint8 to 8 bits and uint16 to 16.
        fresh: ``codes`` was never written: its pages come from the system as they are touched, so past the caches is no
            shorter way for them.
        packed: Two 4-bit codes share a byte of ``codes``, the first one low; x has an even number of elements.
    """
    if not _runs(x) or not _encodes(fmt):
        return None
    x = x.contiguous()
    native.module().encode(
        x.data_ptr(), _source(x.dtype), x.numel(), rounder_of(fmt, rounding, overflow, key), packed, fresh,
        codes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes


def decode(codes: Tensor, fmt: Format, out: Tensor, packed: bool = False, fresh: bool = False) -> Tensor | None:
    """Fill ``out``, contiguous, float32, bfloat16 or float16, with what the codes mean, as many as it has elements.

    Codes are uint8 to 8 bits and uint16 to 16, on the CPU; a value that ``out`` cannot hold is rounded to nearest even.
    With a code out of range the answer is None too, and what ``out`` holds then has no meaning.
    """
    stored = torch.uint8 if fmt.bits <= 8 else torch.uint16
    if not (_runs(codes) and _decodes(fmt)) or codes.dtype != stored or out.dtype not in _DTYPES:
        return None
    codes = codes.contiguous()
    seen: int = native.module().decode(
        codes.data_ptr(), _codec(fmt), out.numel(), packed, _narrow(out.dtype), fresh, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out if seen < 1 << fmt.bits else None


def round_to(
    x: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, key: int, out: Tensor, fresh: bool = False
) -> Tensor | None:
    """Fill ``out``, contiguous, of the shape and dtype of x, with x rounded to the format; arguments as ``encode``."""
    if not _runs(x) or not _encodes(fmt) or not _decodes(fmt):
        return None
    x = x.contiguous()
    native.module().round(
        x.data_ptr(), _source(x.dtype), x.numel(), rounder_of(fmt, rounding, overflow, key), _narrow(x.dtype), fresh,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def mx_encode(
    x: Tensor, fmt: Format, rounding: Rounding, emax: int, round_up_above: int, codes: Tensor, scales: Tensor
) -> bool:
    """Round float32 ``[M, K]`` to an MX format; False where no kernel does.

    Args:
        x: On the CPU.
        fmt: The block format.
        rounding: Nearest or toward zero. The others would see that ``x / scale`` can underflow.
        emax: Exponent of the largest element value.
        round_up_above: The scale is doubled where amax is 2ᵉ · (1 + fraction · 2⁻⁵²) with a larger fraction.
        codes: uint8 ``[M, K]``, contiguous; filled.
        scales: uint8 ``[M, ceil(K / block)]``, contiguous; filled.
    """
    exact = (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY, Rounding.TOWARD_ZERO)
    if not _runs(x) or x.dtype != torch.float32 or rounding not in exact or fmt.block is None:
        return False
    x = x.contiguous()
    native.module().mx_encode(
        x.data_ptr(), *x.shape, rounder_of(fmt.element, rounding, Overflow.SATURATE, 0), fmt.block.size, emax,
        round_up_above, Format.named(fmt.block.scale).nan_code, codes.data_ptr(), scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return True


def nvfp4_encode(
    x: Tensor, fmt: Format, rounding: Rounding, tensor_scale: float, codes: Tensor, scales: Tensor
) -> bool:
    """Round float32 ``[M, K]`` to NVFP4, to nearest even; False where no kernel does. See ``mx_encode``."""
    nearest = rounding is Rounding.NEAREST_EVEN
    if not _runs(x) or x.dtype != torch.float32 or not nearest or fmt.block is None or fmt.bits != 4:
        return False
    x = x.contiguous()
    levels = [float(fmt.magnitude(code)) for code in range(fmt.max_code + 1)]
    native.module().nvfp4_encode(
        x.data_ptr(), *x.shape, rounder_of(fmt.element, rounding, Overflow.SATURATE, 0),
        _codec(Format.named(fmt.block.scale)), fmt.block.size, levels[-1], tensor_scale,
        tuple((low + high) / 2 for low, high in pairwise(levels)), codes.data_ptr(), scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return True


def finite_amax(x: Tensor) -> float | None:
    """The largest finite magnitude in a float32 tensor, 0 if there is none; None where no kernel runs."""
    if not _runs(x) or x.dtype != torch.float32:
        return None
    x = x.contiguous()
    largest: float = native.module().finite_amax(x.data_ptr(), x.numel(), torch.get_num_threads())
    return largest


def _runs(x: Tensor) -> bool:
    return native.status().loaded and x.device.type == "cpu" and (x.dtype in _DTYPES or not x.is_floating_point())


def _encodes(fmt: Format) -> bool:
    """Whether the kernel can round to the format: its smallest normal value must be a normal float32."""
    return fmt.kind is not Kind.CODEBOOK and fmt.block is None and 2 <= fmt.bits <= 16 and fmt.emin >= -126


def _decodes(fmt: Format) -> bool:
    """Whether every value is a float32, and the kernel can assemble it."""
    if not _encodes(fmt) or not fmt.has_subnormals or fmt.max >= 2.0**128:
        return False
    return fmt.emin == -126 or fmt.emin - fmt.mantissa_bits >= -126


@lru_cache(maxsize=256)
def _codec(fmt: Format) -> Any:
    sign = 1 if fmt.twos_complement else 0 if fmt.signed else 2
    ends_in_nan = fmt.specials is Specials.FN
    nan_at_sign = fmt.specials in (Specials.FNUZ, Specials.P3109)
    nans_above_inf = fmt.specials is Specials.IEEE and fmt.inf_code is not None
    return native.module().Codec(
        sign=sign,
        bits=fmt.bits,
        mantissa_bits=fmt.mantissa_bits,
        emin=fmt.emin,
        has_subnormals=int(fmt.has_subnormals),
        max_code=fmt.max_code,
        max_negative=fmt.max_code + (fmt.twos_complement and not fmt.narrow),
        inf_code=-1 if fmt.inf_code is None else fmt.inf_code,
        nan_code=fmt.nan_code,
        nan_above=fmt.inf_code if nans_above_inf else fmt.max_code if ends_in_nan else 1 << 16,
        nan_exactly=fmt.sign_bit if nan_at_sign else -1,
        signed_from=int(fmt.has_subnormals if sign == 2 else not fmt.has_negative_zero),
        never_signed=fmt.nan_code if ends_in_nan or nan_at_sign else -1,
        negative_code=fmt.nan_code if fmt.has_nan else 0,
    )


_ORDER = tuple(Rounding)  # the order of enum Rounding in csrc/cast_job.hpp


@lru_cache(maxsize=256)
def rounder_of(fmt: Format, rounding: Rounding, overflow: Overflow, key: int) -> Any:
    """The compiled description of a rounding."""
    beyond, infinite = overflow_codes(fmt, rounding, overflow)
    return native.module().Rounder(_codec(fmt), _ORDER.index(rounding), beyond, infinite, key)


def _source(dtype: torch.dtype) -> Any:
    """The codec that reads a 16-bit dtype; None for float32."""
    return _codec(Format.named(_NAMES[dtype])) if dtype in _NAMES else None


def _narrow(dtype: torch.dtype) -> Any:
    """The rounder that writes a 16-bit dtype; None for float32."""
    if dtype not in _NAMES:
        return None
    return rounder_of(Format.named(_NAMES[dtype]), Rounding.NEAREST_EVEN, Overflow.IEEE, 0)

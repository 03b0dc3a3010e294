"""Products of 8-bit operands by a GPU's own FP8 units, ``torch._scaled_mm``; elsewhere bfloat16 holds the same numbers.

Operands come as ``scaled_round`` gives them, values of the format times 2^-k in bfloat16. Their largest magnitude tells
a k with which all of them are numbers of the format again, so no bit is lost on the way to their codes:

    a [M, K] · 2^ka  ->  codes ┐
                               ├ sums in float32 · 2^-(ka + kb) + bias  ->  one rounding  ->  [M, N]
    b [K, N] · 2^kb  ->  codes ┘

Hopper's units add up some 14 bits exactly before they promote to float32 (arXiv 2412.19437, section 3.3.2): results
differ by that from those of other devices. Not measured here for speed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.train.scaling import amax_of, exponents_of

_DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_STEP = 16  # cuBLASLt takes K and N in multiples of this
_ONE_SCALE, _ROW_SCALES = (8, 9), (9, 0)  # compute capabilities from which there are products with these


def has_fp8(device: torch.device, by_row: bool) -> bool:
    """Whether a device multiplies FP8 numbers, with one scale or with one for each row and column."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and _capability(device) >= (_ROW_SCALES if by_row else _ONE_SCALE)
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def takes(a: Tensor, a_fmt: Format, b: Tensor, b_fmt: Format, scaling: str | None, dtype: torch.dtype) -> bool:
    """Whether ``fp8_product`` can multiply these; scales of blocks it cannot, nor e5m2 by e5m2, which no unit has."""
    names = {a_fmt.name, b_fmt.name}
    by_row = scaling == "row"
    return (
        scaling in ("tensor", "delayed", "row")
        and names <= set(_DTYPES)
        and names != {"e5m2"}
        and dtype in ((torch.bfloat16,) if by_row else (torch.bfloat16, torch.float32))
        and a.shape[1] % _STEP == b.shape[1] % _STEP == 0
        and min(*a.shape, b.shape[1]) > 0
        and has_fp8(a.device, by_row)
    )


def fp8_product(
    a: Tensor, a_fmt: Format, b: Tensor, b_fmt: Format, scaling: str | None, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """Multiply operands that ``takes`` has taken.

    Args:
        a: bfloat16 ``[M, K]``, rounded to ``a_fmt`` with one scale, or one for each row.
        a_fmt: e4m3fn or e5m2.
        b: bfloat16 ``[K, N]``, rounded to ``b_fmt`` with one scale, or one for each column.
        b_fmt: Alike.
        scaling: Of the recipe.
        dtype: Of the result.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]``. An operand with NaN gives NaN.
    """
    kind = "row" if scaling == "row" else "tensor"
    a_codes, a_scale = _codes(a, a_fmt, kind)
    columns, b_scale = _codes(b.t(), b_fmt, kind)  # [N, K]: its transpose is column-major, as it must be
    inside = bias.to(dtype) if bias is not None and dtype == torch.bfloat16 else None
    result = torch._scaled_mm(a_codes, columns.t(), a_scale, b_scale.t(), inside, out_dtype=dtype, use_fast_accum=False)
    return result if bias is None or inside is not None else result + bias


def _codes(x: Tensor, fmt: Format, kind: str) -> tuple[Tensor, Tensor]:
    """The codes of rounded values, row-major, and what they are multiplied by: float32 ``[]`` or ``[R, 1]``."""
    exponents = exponents_of(amax_of(x, kind, square=False), fmt)
    codes = (x.float() * torch.exp2(exponents)).to(_DTYPES[fmt.name])
    return codes.contiguous(), torch.exp2(-exponents)

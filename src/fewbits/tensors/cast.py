"""Casts: `round_to`, `encode` and `decode` for every format.

Their meaning is `fewbits.tensors.codes`, in plain PyTorch. Compiled kernels run where there are some, bit-equal.

All of them round once, whatever the input dtype. What every cast does with the special numbers:

| number             | becomes                                                                                       |
|--------------------|-----------------------------------------------------------------------------------------------|
| NaN                | `Format.nan_code`: one code per format, sign and payload dropped; a float format without NaN: |
|                    | its largest value; an integer or a codebook: 0                                                |
| ±Inf               | overflow="ieee": Inf, or NaN where there is none; "saturate": the largest finite value        |
| beyond the range   | the same, but roundings toward zero stop at the largest finite value                          |
| -0                 | -0 where the format has it, else 0                                                            |
| negative, unsigned | NaN if the format has one (e8m0fnu), else 0                                                   |
| NaN, Inf in a block| scale NaN: the whole block decodes to NaN                                                     |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, ScaleRule
from fewbits.kernels import cast as kernels
from fewbits.tensors.block import BlockCodes, block_codes, from_blocks, to_blocks
from fewbits.tensors.cast_arguments import (
    FLOATS,
    SIGNED,
    check_blocks,
    check_codes,
    choices,
    code_dtype,
    place,
    unpacked_shape,
)
from fewbits.tensors.codes import CHUNK, How, to_codes, to_values
from fewbits.tensors.packing import pack_codes, packed_shape, unpack_codes
from fewbits.tensors.random import key_of, positions_of, random_words


def round_to(
    x: Tensor,
    fmt: str | Format,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    seed: int | None = None,
    scale_rule: str | None = None,
    clip_gradient: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Replace each value by the one that the format has for it; `decode(encode(x))` in the dtype of `x`.

    Differentiable, straight through: the gradient passes as if nothing was rounded.

    Args:
        x: float64, float32, bfloat16 or float16; any shape and strides. A block format shares scales along the last
            dimension; its last block may be shorter than the others.
        fmt: a format or its name.
        rounding: nearest_even, nearest_away, toward_zero, up, down or stochastic; in a block, of the elements.
        overflow: saturate, ieee, or a dialect (`fewbits.formats.dialects`); None is ieee if the format has Inf, else
            saturate. Blocks always saturate.
        seed: 0 to 2^64 - 1, for stochastic rounding and required there. The result depends on the seed, the value and
            its row-major position alone.
        scale_rule: of a block format, a name in `fewbits.formats.ScaleRule`; None is floor for MX, two_level for NVFP4.
        clip_gradient: whether the gradient is zero where the value overflowed or saturated, Inf included.
        out: filled and returned; contiguous, the shape and dtype of `x`, which must need no gradient.

    Returns:
        The shape and dtype of `x`. A value that the format holds and the dtype does not (bf16 from a float16 tensor,
        say) is rounded once more, to nearest even.

    Raises:
        FewbitsError: `x` is not a dense tensor of these dtypes with data; unknown names; a missing or unused seed; a
            rule that the format cannot follow; a block format on a tensor without dimensions or with a last one of 0.
    """
    fmt, how, rule = choices(x, fmt, rounding, overflow, seed, scale_rule)
    if x.requires_grad and torch.is_grad_enabled():
        if out is not None:
            raise FewbitsError("out: x needs a gradient, which out cannot carry; leave out=None or pass x.detach()")
        return cast(Tensor, _StraightThrough.apply(x, fmt, how, rule, clip_gradient))  # type: ignore[no-untyped-call]
    fresh, out = out is None, place(out, x, x.dtype, x.shape)
    if rule:
        return out.copy_(from_blocks(block_codes(x, fmt, how, rule), fmt, x.dtype))
    if kernels.round_to(x, fmt, how.rounding, how.overflow, _key(how), out, fresh) is not None:
        return out
    return out.copy_(_rounded_and_over(x, fmt, how, rule)[0])


def encode(
    x: Tensor,
    fmt: str | Format,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    *,
    seed: int | None = None,
    scale_rule: str | None = None,
    packed: bool = False,
    out: Tensor | BlockCodes | None = None,
) -> Tensor | BlockCodes:
    """The code of each value. Arguments and errors are those of `round_to`; there is no gradient.

    `packed` puts two codes of at most 4 bits into a byte, the first one low; the last dimension, even, is halved.
    `out`, if given, is filled and returned: contiguous, the shape and dtype of the codes. Of a block format it is a
    `BlockCodes` as this function returns it; its tensor scale is not read.

    Returns:
        The shape of `x`, one code per element in the smallest unsigned dtype: uint8 to 8 bits, uint16 to 16, uint32
        to 32 (tf32's codes are its 19 bits), else uint64. Of a block format, `BlockCodes`.
    """
    fmt, how, rule = choices(x, fmt, rounding, overflow, seed, scale_rule)
    x = x.detach()
    if rule:
        return _encode_blocks(x, fmt, how, rule, packed, out)
    if isinstance(out, BlockCodes):
        raise FewbitsError(f"out: {fmt.name} has no blocks; give one tensor of {code_dtype(fmt)}")
    shape = packed_shape(x.shape, fmt) if packed else x.shape
    fresh, out = out is None, place(out, x, code_dtype(fmt), shape)
    if kernels.encode(x, fmt, how.rounding, how.overflow, _key(how), out, packed, fresh) is None:
        codes = torch.empty(x.shape, dtype=out.dtype, device=x.device) if packed else out
        _encode_into(codes, x, fmt, how)
        return out.copy_(pack_codes(codes)) if packed else out
    return out


def _encode_blocks(
    x: Tensor, fmt: Format, how: How, rule: ScaleRule, packed: bool, out: Tensor | BlockCodes | None
) -> BlockCodes:
    if packed or isinstance(out, Tensor):
        raise FewbitsError(
            f"{fmt.name} has codes and scales, two tensors; leave packed=False and out=None or BlockCodes"
        )
    if out is None:
        return block_codes(x, fmt, how, rule)
    scales_shape = (*x.shape[:-1], -(-x.shape[-1] // fmt.block.size)) if fmt.block else ()
    codes, scales = place(out.codes, x, torch.uint8, x.shape), place(out.scales, x, torch.uint8, scales_shape)
    return block_codes(x, fmt, how, rule, (codes, scales))


def decode(
    codes: Tensor | BlockCodes,
    fmt: str | Format,
    dtype: torch.dtype = torch.float32,
    *,
    packed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The number that each code means.

    Args:
        codes: integers of any dtype; of a block format, what `encode` returned.
        fmt: a format or its name.
        dtype: float64, float32, bfloat16 or float16; values that it does not hold are rounded to nearest even, once.
        packed: whether two codes share a byte, as `encode` with packed=True makes them; the last dimension doubles.
        out: filled and returned; contiguous, the shape of the values, of `dtype`.

    Returns:
        The shape of `codes`, of `dtype`. NaN codes become NaN, Inf codes Inf, -0 codes -0.

    Raises:
        FewbitsError: a code is out of the format's range, the dtype is not one of the four, unknown format, or
            plain codes for a block format (or the reverse), scales that do not fit the codes.
    """
    fmt = Format.named(fmt)
    if dtype not in FLOATS:
        raise FewbitsError(f"decode to {dtype}: choose float64, float32, bfloat16 or float16")
    if isinstance(codes, BlockCodes) != (fmt.block is not None):
        needed = "the BlockCodes that encode returns" if fmt.block else "a tensor of codes"
        raise FewbitsError(f"decode from {fmt.name} takes {needed}, not {type(codes).__name__}")
    if isinstance(codes, BlockCodes):
        check_blocks(codes, fmt)
        values = from_blocks(codes, fmt, dtype)
        return values if out is None else place(out, values, dtype, values.shape).copy_(values)
    fresh = out is None
    if packed:
        shape = unpacked_shape(codes, fmt)
        out = place(out, codes, dtype, shape)
        if kernels.decode(codes, fmt, out, packed=True, fresh=fresh) is not None:
            return out
        codes = unpack_codes(codes)
    check_codes(codes, fmt, in_range=False)
    out = place(out, codes, dtype, codes.shape)
    if kernels.decode(codes, fmt, out, fresh=fresh) is None:
        check_codes(codes, fmt)
        flat, values = codes.reshape(-1), out.view(-1)
        for part in _chunks(flat):
            values[part] = to_values(flat[part], fmt, dtype)
    return out


class _StraightThrough(torch.autograd.Function):
    """Round forward; backward, the gradient of the identity, or of a clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format, how: How, rule: ScaleRule | None, clip_gradient: bool) -> Tensor:
        if not clip_gradient:
            return round_to(x, fmt, how.rounding, how.overflow, seed=how.seed, scale_rule=rule)
        rounded, over = _rounded_and_over(x, fmt, how, rule)
        ctx.save_for_backward(over)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        for over in ctx.saved_tensors:
            gradient = gradient.masked_fill(over, 0)
        return gradient, None, None, None, None


def _rounded_and_over(x: Tensor, fmt: Format, how: How, rule: ScaleRule | None) -> tuple[Tensor, Tensor]:
    """The rounded values and which of them overflowed."""
    if rule:
        blocks, over = to_blocks(x, fmt, how, rule)
        return from_blocks(blocks, fmt, x.dtype), over
    rounded = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    over = torch.empty(x.numel(), dtype=torch.bool, device=x.device)
    for part, codes, overflowed in _in_chunks(x, fmt, how):
        rounded[part], over[part] = to_values(codes, fmt, x.dtype), overflowed
    return rounded.reshape(x.shape), over.reshape(x.shape)


def _encode_into(codes: Tensor, x: Tensor, fmt: Format, how: How) -> None:
    signed = codes.view(-1).view(SIGNED[codes.dtype])  # torch computes little in unsigned dtypes; the bits are equal
    for part, chunk, _ in _in_chunks(x, fmt, how):
        signed[part] = chunk.to(signed.dtype)


def _key(how: How) -> int:
    return 0 if how.seed is None else key_of(how.seed)


def _in_chunks(x: Tensor, fmt: Format, how: How) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Round a tensor chunk by chunk: where each is in row-major order, its codes (int64), and what overflowed."""
    flat = x.reshape(-1)
    for part in _chunks(flat):
        values = flat[part].to(torch.float64)
        words = None
        if how.seed is not None:
            words = random_words(how.seed, positions_of(part.start, values.numel(), x.device))
        yield part, *to_codes(values, fmt, how, words)


def _chunks(flat: Tensor) -> Iterator[slice]:
    size = CHUNK if flat.device.type == "cpu" else max(flat.numel(), 1)
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))

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
from fewbits.formats import Format, Overflow, Rounding, ScaleRule
from fewbits.kernels import cast as kernels
from fewbits.tensors.block import BlockCodes, from_blocks, to_blocks
from fewbits.tensors.codes import CHUNK, How, to_codes, to_values
from fewbits.tensors.random import check_seed, key_of, positions_of, random_words

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    fmt, how, rule = _choices(x, fmt, rounding, overflow, seed, scale_rule)
    if x.requires_grad and torch.is_grad_enabled():
        if out is not None:
            raise FewbitsError("out: x needs a gradient, which out cannot carry; leave out=None or pass x.detach()")
        return cast(Tensor, _StraightThrough.apply(x, fmt, how, rule, clip_gradient))  # type: ignore[no-untyped-call]
    out = _place(out, x, x.dtype)
    if rule is None and kernels.round_to(x, fmt, how.rounding, how.overflow, _key(how), out) is not None:
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
    out: Tensor | None = None,
) -> Tensor | BlockCodes:
    """The code of each value. Arguments and errors are those of `round_to`; there is no gradient.

    `out`, if given, is filled and returned: contiguous, the shape of `x`, the dtype of the codes; not for blocks.

    Returns:
        The shape of `x`, one code per element in the smallest unsigned dtype: uint8 to 8 bits, uint16 to 16, uint32
        to 32 (tf32's codes are its 19 bits), else uint64. Of a block format, `BlockCodes`.
    """
    fmt, how, rule = _choices(x, fmt, rounding, overflow, seed, scale_rule)
    x = x.detach()
    if rule:
        if out is not None:
            raise FewbitsError(f"out: {fmt.name} has codes and scales, which one tensor cannot hold; leave out=None")
        return to_blocks(x, fmt, how, rule)[0]
    out = _place(out, x, _code_dtype(fmt))
    if kernels.encode(x, fmt, how.rounding, how.overflow, _key(how), out) is None:
        _encode_into(out, x, fmt, how)
    return out


def decode(
    codes: Tensor | BlockCodes,
    fmt: str | Format,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The number that each code means.

    Args:
        codes: integers of any dtype; of a block format, what `encode` returned.
        fmt: a format or its name.
        dtype: float64, float32, bfloat16 or float16; values that it does not hold are rounded to nearest even, once.
        out: filled and returned; contiguous, the shape of `codes`, of `dtype`.

    Returns:
        The shape of `codes`, of `dtype`. NaN codes become NaN, Inf codes Inf, -0 codes -0.

    Raises:
        FewbitsError: a code is out of the format's range, the dtype is not one of the four, unknown format, or
            plain codes for a block format (or the reverse), scales that do not fit the codes.
    """
    fmt = Format.named(fmt)
    if dtype not in _FLOATS:
        raise FewbitsError(f"decode to {dtype}: choose float64, float32, bfloat16 or float16")
    if isinstance(codes, BlockCodes) != (fmt.block is not None):
        needed = "the BlockCodes that encode returns" if fmt.block else "a tensor of codes"
        raise FewbitsError(f"decode from {fmt.name} takes {needed}, not {type(codes).__name__}")
    if isinstance(codes, BlockCodes):
        _check_blocks(codes, fmt)
        values = from_blocks(codes, fmt, dtype)
        return values if out is None else _place(out, values, dtype).copy_(values)
    _check_codes(codes, fmt)
    out = _place(out, codes, dtype)
    if kernels.decode(codes, fmt, out) is None:
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
    signed = codes.view(-1).view(_SIGNED[codes.dtype])  # torch computes little in unsigned dtypes; the bits are equal
    for part, chunk, _ in _in_chunks(x, fmt, how):
        signed[part] = chunk.to(signed.dtype)


def _place(out: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the result goes: ``out``, checked, or a new tensor."""
    if out is None:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    if out.shape != like.shape or out.dtype != dtype or out.device != like.device or not out.is_contiguous():
        raise FewbitsError(
            f"out: a contiguous {dtype} tensor of shape {tuple(like.shape)} on {like.device} is needed, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}; make it with torch.empty"
        )
    return out


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


_SIGNED = {
    torch.uint8: torch.uint8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def _code_dtype(fmt: Format) -> torch.dtype:
    return next(dtype for dtype in _SIGNED if fmt.bits <= dtype.itemsize * 8)


def _choices(
    x: Tensor, fmt: str | Format, rounding: str, overflow: str | None, seed: int | None, scale_rule: str | None
) -> tuple[Format, How, ScaleRule | None]:
    """Check the arguments of a cast and look their names up."""
    fmt = Format.named(fmt)
    _check_values(x, fmt)
    mode, over = Rounding.named(rounding), fmt.overflow_rule(overflow)
    if mode is Rounding.STOCHASTIC and seed is None:
        raise FewbitsError("rounding 'stochastic' needs a seed: pass seed=0, or another for other bits")
    if mode is not Rounding.STOCHASTIC and seed is not None:
        raise FewbitsError(f"seed={seed} has no use with rounding {str(mode)!r}: leave it out, or round 'stochastic'")
    rule = None if fmt.block is None and scale_rule is None else fmt.scale_rule(scale_rule)
    return fmt, How(mode, Overflow.SATURATE if rule else over, None if seed is None else check_seed(seed)), rule


def _check_values(x: Tensor, fmt: Format) -> None:
    if not isinstance(x, Tensor):
        raise FewbitsError(f"cast to {fmt.name} takes a torch tensor, not {type(x).__name__}: use torch.as_tensor")
    if x.layout is not torch.strided:
        raise FewbitsError(
            f"cast to {fmt.name} takes a dense tensor, not {x.layout}: cast its .values(), or .to_dense()"
        )
    if x.device.type == "meta":
        raise FewbitsError(f"cast to {fmt.name} of a meta tensor, which has no data: load it first")
    if x.dtype not in _FLOATS:
        raise FewbitsError(
            f"cast to {fmt.name} takes float64, float32, bfloat16 or float16, not {x.dtype}: convert with .float()"
        )
    if fmt.block is not None and (x.ndim == 0 or x.shape[-1] == 0):
        raise FewbitsError(
            f"cast to {fmt.name} of shape {tuple(x.shape)}: a block needs a last dimension of 1 or more; reshape it"
        )


def _check_blocks(blocks: BlockCodes, fmt: Format) -> None:
    assert fmt.block is not None
    _check_codes(blocks.codes, fmt.element)
    _check_codes(blocks.scales, Format.named(fmt.block.scale))
    shape = tuple(blocks.codes.shape)
    if not shape or shape[-1] == 0:
        raise FewbitsError(f"decode from {fmt.name} of shape {shape}: a block needs a last dimension of 1 or more")
    expected = (*shape[:-1], -(-shape[-1] // fmt.block.size))
    if tuple(blocks.scales.shape) != expected:
        raise FewbitsError(
            f"decode from {fmt.name}: scales of shape {tuple(blocks.scales.shape)} do not fit codes of shape {shape}; "
            f"they need {expected}, one for each {fmt.block.size} codes"
        )
    if (blocks.tensor_scale is None) != (fmt.block.tensor_scale is None):
        needs = "needs" if fmt.block.tensor_scale else "has no"
        raise FewbitsError(f"decode from {fmt.name}: the format {needs} tensor_scale; take what encode returned")


def _check_codes(codes: Tensor, fmt: Format) -> None:
    if not isinstance(codes, Tensor) or codes.dtype.is_floating_point or codes.dtype.is_complex:
        what = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise FewbitsError(f"decode from {fmt.name} takes codes of an integer dtype, not {what}")
    unsigned = codes.dtype in _SIGNED
    if not codes.numel() or (unsigned and codes.dtype.itemsize * 8 <= fmt.bits):
        return
    low, high = (int(bound) for bound in codes.to(torch.int64).aminmax())
    if low < 0 or high >= 1 << fmt.bits:
        wrong = low if low < 0 else high
        raise FewbitsError(f"code {wrong} is out of range: {fmt.name} has codes 0 to {(1 << fmt.bits) - 1}")

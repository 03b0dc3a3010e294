"""Block formats: the scale that neighbours along the last dimension share, and the codes of the elements.

MX (OCP MX 1.0) has a power-of-two scale to 32 values; NVFP4 an e4m3fn scale to 16, and an fp32 scale to the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.formats import Format, Kind, Overflow, Rounding, ScaleRule
from fewbits.kernels import cast as kernels
from fewbits.tensors.codes import CHUNK, How, to_codes, to_dtype, to_values
from fewbits.tensors.random import positions_of, random_words

_MANTISSA = 52
_SCALE = How(Rounding.NEAREST_EVEN, Overflow.SATURATE)


class BlockCodes(NamedTuple):
    """A tensor in a block format; K is the size of the last dimension, B the block size.

    Attributes:
        codes: (..., K) uint8, one element code each, not packed.
        scales: (..., ceil(K / B)) uint8, one scale code for each block.
        tensor_scale: () float32, the scale of the whole tensor (NVFP4), else None.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None


def block_codes(
    x: Tensor, fmt: Format, how: How, rule: ScaleRule, out: tuple[Tensor, Tensor] | None = None
) -> BlockCodes:
    """Round a tensor to a block format, by a kernel where there is one; what it means is `to_blocks`, bit for bit.

    `out` are codes and scales to fill, uint8, contiguous, of the right shapes.
    """
    assert fmt.block is not None
    K = x.shape[-1]
    flat = x.reshape(x.numel() // K, K)
    codes, scales = out or (
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        torch.empty((*x.shape[:-1], -(-K // fmt.block.size)), dtype=torch.uint8, device=x.device),
    )
    tensor_scale = _tensor_scale(flat, fmt, rule)
    if tensor_scale is None:
        done = kernels.mx_encode(flat, fmt, how.rounding, *_scale_limits(fmt, rule), codes, scales)
    else:
        done = kernels.nvfp4_encode(flat, fmt, how.rounding, float(tensor_scale), codes, scales)
    if not done:
        made = to_blocks(x, fmt, how, rule)[0]
        codes.copy_(made.codes), scales.copy_(made.scales)
    return BlockCodes(codes, scales, tensor_scale)


def to_blocks(x: Tensor, fmt: Format, how: How, rule: ScaleRule) -> tuple[BlockCodes, Tensor]:
    """Round a tensor to a block format.

    The last block of a row may be shorter than the others. A NaN or an Inf makes the scale of its block NaN and the
    block's element codes 0, so that the whole block decodes to NaN: nothing finite stands in for it. Values beyond
    the range of a block saturate. A block of zeros has the scale code 0. -0 stays -0 where the element has it.

    Args:
        x: (..., K) float64, float32, bfloat16 or float16, at least one dimension.
        fmt: a block format.
        how: the rounding of the elements; `overflow` is always saturate.
        rule: how the scale follows from the largest magnitude.

    Returns:
        The codes, and a bool mask of the shape of `x`: which values saturated. MX elements are rounded once. NVFP4
        elements are divided by their scale in float64 first; for inputs up to float32 that division cannot move a
        quotient across a rounding boundary.
    """
    assert fmt.block is not None
    K, size = x.shape[-1], fmt.block.size
    M, count = x.numel() // K, -(-K // size)
    flat = x.reshape(M, K)
    tensor_scale = _tensor_scale(flat, fmt, rule)
    codes = torch.empty((M, K), dtype=torch.uint8, device=x.device)
    scales = torch.empty((M, count), dtype=torch.uint8, device=x.device)
    over = torch.empty((M, K), dtype=torch.bool, device=x.device)
    encoded = _mx if tensor_scale is None else _nvfp4
    for part in _row_chunks(flat):
        blocks = _in_blocks(flat[part].to(torch.float64), size)  # (rows, count, B)
        words = None
        if how.seed is not None:
            words = random_words(how.seed, positions_of(part.start * K, (part.stop - part.start) * K, x.device))
            words = _in_blocks(words.reshape(-1, K), size)
        code, overflowed, scales[part] = encoded(blocks, fmt, how, rule, tensor_scale, words)
        code = code.masked_fill(scales[part][..., None] == _scale_format(fmt).nan_code, 0)
        codes[part], over[part] = (each.flatten(1)[:, :K] for each in (code, overflowed))
    found = BlockCodes(codes.reshape(x.shape), scales.reshape(*x.shape[:-1], count), tensor_scale)
    return found, over.reshape(x.shape)


def _scale_format(fmt: Format) -> Format:
    assert fmt.block is not None
    return Format.named(fmt.block.scale)


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """Cut rows (M, K) into blocks (M, ceil(K / size), size), the last one filled up with zeros."""
    K = flat.shape[1]
    return torch.nn.functional.pad(flat, (0, -K % size)).reshape(flat.shape[0], -(-K // size), size)


def from_blocks(blocks: BlockCodes, fmt: Format, dtype: torch.dtype) -> Tensor:
    """The numbers that block codes mean: element times scale (times tensor scale), rounded to `dtype` once.

    Args:
        blocks: codes (..., K), scales (..., ceil(K / B)), both of integers in range.
        fmt: a block format.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        (..., K) of `dtype`.
    """
    assert fmt.block is not None
    K = blocks.codes.shape[-1]
    codes, scales = blocks.codes.reshape(-1, K), blocks.scales.reshape(-1, blocks.scales.shape[-1])
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part in _row_chunks(codes):
        element = to_values(codes[part], fmt.element, torch.float64)
        scale = to_values(scales[part], _scale_format(fmt), torch.float64)
        scaled = element * scale.repeat_interleave(fmt.block.size, dim=-1)[:, :K]
        if blocks.tensor_scale is not None:
            scaled *= blocks.tensor_scale.to(torch.float64)
        values[part] = to_dtype(scaled, dtype)
    return values.reshape(blocks.codes.shape)


def _row_chunks(flat: Tensor) -> Iterator[slice]:
    """Slices of whole rows of (M, K) that together make about a chunk."""
    M, K = flat.shape
    rows = max(CHUNK // K, 1) if flat.device.type == "cpu" else max(M, 1)
    for start in range(0, M, rows):
        yield slice(start, min(start + rows, M))


_Encoded = tuple[Tensor, Tensor, Tensor]  # codes, which saturated, scale codes


def _mx(
    blocks: Tensor, fmt: Format, how: How, rule: ScaleRule, tensor_scale: Tensor | None, words: Tensor | None
) -> _Encoded:
    amax = blocks.abs().amax(dim=-1)  # (rows, count); NaN and Inf come through
    scale = _scale_format(fmt)
    exponent = _scale_exponent(amax, fmt, rule).clamp(-scale.bias, scale.max_code - scale.bias)
    codes, over = to_codes(blocks, fmt.element, how, words, scale_exponent=exponent[..., None])
    return codes, over, torch.where(amax.isfinite(), exponent + scale.bias, scale.nan_code)


def _scale_exponent(amax: Tensor, fmt: Format, rule: ScaleRule) -> Tensor:
    """The exponent of the scale before it is clamped, read off the bits of amax; see `ScaleRule`."""
    bits = amax.view(torch.int64)
    exponent, fraction = (bits >> _MANTISSA) - 1023, bits & ((1 << _MANTISSA) - 1)
    emax, round_up_above = _scale_limits(fmt, rule)
    return exponent + (fraction > round_up_above) - emax


def _scale_limits(fmt: Format, rule: ScaleRule) -> tuple[int, int]:
    """The exponent of the largest element value, and the fraction of amax above which its scale is doubled.

    amax is 2^e (1 + fraction / 2^52), as a double has it.
    """
    largest = int(torch.tensor(float(fmt.element.max), dtype=torch.float64).view(torch.int64))
    emax, largest_fraction = (largest >> _MANTISSA) - 1023, largest & ((1 << _MANTISSA) - 1)
    precision = fmt.mantissa_bits - (fmt.kind is Kind.INTEGER)
    return emax, {
        ScaleRule.FLOOR: 1 << _MANTISSA,  # never
        ScaleRule.CEIL: 0,
        ScaleRule.EVEN: (1 << _MANTISSA) - (1 << (_MANTISSA - 1 - precision)) - 1,
        ScaleRule.RCEIL: largest_fraction,
    }[rule]


def _tensor_scale(x: Tensor, fmt: Format, rule: ScaleRule) -> Tensor | None:
    """NVFP4's fp32 scale of the whole tensor, from the largest finite magnitude; see `ScaleRule.TWO_LEVEL`."""
    if fmt.block is None or fmt.block.tensor_scale is None:
        return None
    one = torch.ones((), dtype=torch.float32, device=x.device)
    if rule is ScaleRule.ONE_LEVEL or not x.numel():
        return one
    found = kernels.finite_amax(x)
    if found is None:
        magnitude = x.abs()
        found = float(torch.where(magnitude.isfinite(), magnitude, 0).amax())
    amax = torch.tensor(found, dtype=torch.float64, device=x.device)
    fp32 = torch.finfo(torch.float32)
    whole = amax / (_scale_format(fmt).max * fmt.element.max)
    rounded = whole.clamp(max=fp32.max).to(torch.float32).clamp(min=fp32.smallest_normal * fp32.eps)
    return torch.where(amax > 0, rounded, one)


def _nvfp4(
    blocks: Tensor, fmt: Format, how: How, rule: ScaleRule, tensor_scale: Tensor | None, words: Tensor | None
) -> _Encoded:
    assert tensor_scale is not None
    scale = _scale_format(fmt)
    tensor_scale = tensor_scale.to(torch.float64)
    amax = blocks.abs().amax(dim=-1)  # (rows, count)
    code, _ = to_codes(amax / (fmt.element.max * tensor_scale), scale, _SCALE)
    code = torch.where(amax > 0, code.clamp(min=1), code)  # a small block keeps a scale: 0 would erase it
    scales = torch.where(amax.isfinite(), code, scale.nan_code)
    divisor = to_values(scales, scale, torch.float64) * tensor_scale
    divisor = torch.where(divisor > 0, divisor, 1)  # a block of zeros stays zeros; a NaN block is erased by the caller
    codes, over = to_codes(blocks / divisor[..., None], fmt.element, how, words)
    return codes, over, scales

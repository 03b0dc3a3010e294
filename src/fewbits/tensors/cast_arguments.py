"""The arguments of a cast: names looked up, tensors checked, the place of the result."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, Overflow, Rounding, ScaleRule
from fewbits.tensors.block import BlockCodes
from fewbits.tensors.codes import How
from fewbits.tensors.packing import packed_shape
from fewbits.tensors.random import check_seed

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


SIGNED = {
    torch.uint8: torch.uint8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def code_dtype(fmt: Format) -> torch.dtype:
    """The smallest unsigned dtype that holds a code."""
    return next(dtype for dtype in SIGNED if fmt.bits <= dtype.itemsize * 8)


def choices(
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
    if x.dtype not in FLOATS:
        raise FewbitsError(
            f"cast to {fmt.name} takes float64, float32, bfloat16 or float16, not {x.dtype}: convert with .float()"
        )
    if fmt.block is not None and (x.ndim == 0 or x.shape[-1] == 0):
        raise FewbitsError(
            f"cast to {fmt.name} of shape {tuple(x.shape)}: a block needs a last dimension of 1 or more; reshape it"
        )


def check_blocks(blocks: BlockCodes, fmt: Format) -> None:
    """Refuse codes and scales that are out of range or do not fit each other."""
    assert fmt.block is not None
    check_codes(blocks.codes, fmt.element)
    check_codes(blocks.scales, Format.named(fmt.block.scale))
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


def check_codes(codes: Tensor, fmt: Format, *, in_range: bool = True) -> None:
    """Refuse codes that are no integers, or (with ``in_range``) that the format does not have."""
    if not isinstance(codes, Tensor) or codes.dtype.is_floating_point or codes.dtype.is_complex:
        what = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise FewbitsError(f"decode from {fmt.name} takes codes of an integer dtype, not {what}")
    unsigned = codes.dtype in SIGNED
    if not in_range or not codes.numel() or (unsigned and codes.dtype.itemsize * 8 <= fmt.bits):
        return
    low, high = (int(bound) for bound in codes.to(torch.int64).aminmax())
    if low < 0 or high >= 1 << fmt.bits:
        wrong = low if low < 0 else high
        raise FewbitsError(f"code {wrong} is out of range: {fmt.name} has codes 0 to {(1 << fmt.bits) - 1}")


def unpacked_shape(codes: Tensor, fmt: Format) -> tuple[int, ...]:
    """The shape of the values that packed codes `[..., K/2]` stand for."""
    if codes.dtype != torch.uint8 or codes.ndim == 0:
        raise FewbitsError(
            f"packed: uint8 [..., K/2] is needed, got {codes.dtype} {tuple(codes.shape)}; encode makes it"
        )
    shape = torch.Size((*codes.shape[:-1], 2 * codes.shape[-1]))
    packed_shape(shape, fmt)
    return shape


def place(out: Tensor | None, like: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Where the result goes: ``out``, checked, or a new tensor on the device of ``like``."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    if out.shape != shape or out.dtype != dtype or out.device != like.device or not out.is_contiguous():
        raise FewbitsError(
            f"out: a contiguous {dtype} tensor of shape {tuple(shape)} on {like.device} is needed, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}; make it with torch.empty"
        )
    return out

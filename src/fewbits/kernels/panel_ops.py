"""The ops on weights of 4 or 8 bits in panels: schema, checks and shape rule of each.

Letters: M tokens, K input features, N output channels, G scales per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import panel_reference
from fewbits.kernels.ops import check_activations, check_scale, define, library
from fewbits.kernels.panels import CHANNELS, WORD, table

FORMATS = ("int8", "e4m3fn", "int4", "nf4", "e2m1fn")
"""The formats that ``weight_only_linear`` decodes."""


def _int4_linear_shape(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    _check(x, packed, scales, bias, out_features, "int4")
    return x.new_empty((*x.shape[:-1], out_features))


def _weight_only_linear_shape(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    format_name: str,
    e4m3_tokens: bool,
) -> Tensor:
    if format_name not in FORMATS:
        raise FewbitsError(f"format_name: {format_name!r} has no such kernel; one of {', '.join(FORMATS)} has")
    _check(x, packed, scales, bias, out_features, format_name)
    return x.new_empty((*x.shape[:-1], out_features))


def _check(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, N: int, format_name: str) -> None:
    check_activations(x)
    K, panels = x.shape[-1], -(-N // CHANNELS)
    bits = 8 if table(format_name) is None else 4
    words = -(-K * bits // (8 * WORD))
    if packed.dtype != torch.int8 or packed.shape != (panels, words, CHANNELS * WORD) or not packed.is_contiguous():
        raise FewbitsError(
            f"packed: contiguous int8 {[panels, words, CHANNELS * WORD]} is needed for N = {N}, K = {K} in "
            f"{format_name}, got {packed.dtype} {list(packed.shape)}; pack_panels makes it"
        )
    G = scales.shape[1] if scales.ndim == 3 else 0
    if scales.shape != (panels, G, CHANNELS) or scales.dtype not in (torch.float32, torch.bfloat16):
        raise FewbitsError(
            f"scales: float32 or bfloat16 [{panels}, G, {CHANNELS}] is needed for N = {N}, "
            f"got {scales.dtype} {list(scales.shape)}; pack_scales makes it"
        )
    if G == 0 or not scales.is_contiguous() or ((G > 1 or bits == 4) and K * bits % (8 * WORD * G)):
        raise FewbitsError(
            f"scales: {G} groups do not divide K = {K} input features into whole words of {WORD} bytes; "
            "dequantize the weight and use torch"
        )
    if bias is not None:
        check_scale("bias", bias, (N,))


define("int4_linear", "(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int out_features) -> Tensor",
       _int4_linear_shape, panel_reference.int4_linear)  # fmt: skip
define("weight_only_linear",
       "(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int out_features, str format_name, bool e4m3_tokens)"
       " -> Tensor",
       _weight_only_linear_shape, panel_reference.weight_only_linear)  # fmt: skip


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, _, ctx.out_features, *rest = inputs
    ctx.save_for_backward(packed, scales)
    ctx.in_features, ctx.format = x.shape[-1], rest[0] if rest else "int4"
    ctx.others = len(rest)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x as if it had not been quantized; the weight takes none."""
    packed, scales = ctx.saved_tensors
    weight = panel_reference.dequantize(packed, scales, ctx.out_features, ctx.in_features, ctx.format)
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return gradient @ weight, None, None, of_bias, None, *([None] * ctx.others)


for _name in ("int4_linear", "weight_only_linear"):
    torch.library.register_autograd(
        f"fewbits::{_name}", _straight_through, setup_context=_keep_for_backward, lib=library
    )


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, *, out_features: int) -> Tensor:
    """Quantize activations to int8 per token and multiply them by int4 weights with a scale per group.

    ``out = (Σ_g (Σ_{k in g} codes · w) · scale_g) · token_scale + bias``. The inner sum is exact in int32. Products
    with a scale are added in float32 over ascending groups, from 0; each operation rounds once. The codes and token
    scales are ``quantize_per_token``'s: a token with NaN or Inf gives NaN for itself alone. The gradient of x is that
    of the float layer (straight-through); the weight takes none.

    Args:
        x: Activations, float32 ``[..., K]``, any strides.
        packed: Codes as ``pack_panels`` lays them out.
        scales: float32 or bfloat16, as ``pack_scales`` lays them out.
        bias: float32 ``[N]`` or None.
        out_features: N.

    Returns:
        float32 ``[..., N]``.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.int4_linear(x, packed, scales, bias, out_features)
    return result


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    format_name: str,
    e4m3_tokens: bool = False,
) -> Tensor:
    """Multiply float32 activations by a weight in few bits, whose codes become numbers in registers.

    ``out = Σ_g (Σ_{k in g} x · value(w)) · scale_g + bias``, in float32; the order of additions is not fixed. What it
    gives differs from the exact sum by at most ``(K/G + G + 3) · eps / 2 · Σ |x · value(w) · scale|``. NaN and Inf in x
    spread to that token alone. The gradient of x is that of the float layer; the weight takes none.

    Args:
        x: Activations, float32 ``[..., K]``, any strides.
        packed: Codes as ``pack_panels`` lays them out, without NaN.
        scales: float32 or bfloat16, as ``pack_scales`` lays them out.
        bias: float32 ``[N]`` or None.
        out_features: N.
        format_name: The codes' format, one of ``FORMATS``.
        e4m3_tokens: Round each token to e4m3fn first, with the scale max|x| / 448.

    Returns:
        float32 ``[..., N]``.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.weight_only_linear(
        x, packed, scales, bias, out_features, format_name, e4m3_tokens
    )
    return result

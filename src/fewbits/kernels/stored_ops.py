"""The ops on weights as they are stored, where they do not lie in panels: schema, checks and shape rule of each.

On CUDA they are the kernels of ``kernels.cuda``, if Triton is installed. Letters: M tokens, K input features, N output
channels, B bytes and G scales of a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import stored_reference
from fewbits.kernels.ops import check_scale, library
from fewbits.kernels.panels import table


def _check_stored_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format_name: str, activations: str | None
) -> None:
    per_byte = 1 if table(format_name) is None else 2
    if x.ndim == 0 or not x.is_floating_point():
        raise FewbitsError(f"x: float [..., K] is needed, got {x.dtype} {list(x.shape)}; convert or reshape it")
    if activations not in (None, "int8", "e4m3fn"):
        raise FewbitsError(
            f"activations: {activations!r} is none that tokens are quantized to; int8, e4m3fn or None is"
        )
    K = x.shape[-1]
    if codes.dtype != torch.int8 or codes.ndim != 2 or codes.shape[1] * per_byte != K or K == 0:
        raise FewbitsError(
            f"codes: int8 [N, {K // per_byte}] is needed for K = {K} in {format_name}, got {codes.dtype} "
            f"{list(codes.shape)}; view the codes as int8"
        )
    N = codes.shape[0]
    if scales.ndim != 2 or scales.shape[0] != N or scales.shape[1] == 0 or codes.shape[1] % scales.shape[1]:
        raise FewbitsError(
            f"scales: [{N}, G] is needed, with a G that divides {codes.shape[1]} bytes of a channel, got "
            f"{list(scales.shape)}; reshape them"
        )
    if bias is not None:
        check_scale("bias", bias, (N,))


def _check_stored_linear_two_digits(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    _check_stored_linear(x, codes, scales, bias, "int8", "int8")
    if scales.shape[1] != 1:
        raise FewbitsError(
            f"scales: [{codes.shape[0]}, 1] is needed, got {list(scales.shape)}; two digits know no groups"
        )


def _define(name: str, arguments: str, check: Callable[..., None]) -> None:
    """Register one op: every call is checked; Triton's kernels take CUDA's."""

    def shape(*args: Any) -> Tensor:
        check(*args)
        x, codes, *_ = args
        out: Tensor = x.new_empty((*x.shape[:-1], codes.shape[0]))
        return out

    def by_torch(*args: Any) -> Tensor:
        check(*args)
        result: Tensor = getattr(stored_reference, name)(*args)
        return result

    def by_triton(*args: Any) -> Tensor:
        from fewbits.kernels.cuda import linear  # brings Triton, which takes a second to import

        check(*args)
        result: Tensor = getattr(linear, name)(*args)
        return result

    library.define(f"{name}{arguments}")
    library.impl(name, by_torch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewbits::{name}", shape, lib=library)
    if find_spec("triton") is not None:
        library.impl(name, by_triton, "CUDA")
    torch.library.register_autograd(
        f"fewbits::{name}", _straight_through, setup_context=_keep_for_backward, lib=library
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, _, *rest = inputs
    ctx.save_for_backward(codes, scales)
    ctx.format, ctx.others = rest[0] if rest else "int8", len(rest)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x as if it had not been quantized; the weight takes none."""
    codes, scales = ctx.saved_tensors
    weight = stored_reference.dequantize(codes, scales, ctx.format).to(gradient.dtype)
    of_bias = gradient.flatten(0, -2).float().sum(0) if ctx.needs_input_grad[3] else None
    return gradient @ weight, None, None, of_bias, *([None] * ctx.others)


_define("stored_linear",
        "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, str format_name, str? activations) -> Tensor",
        _check_stored_linear)  # fmt: skip
_define("stored_linear_two_digits", "(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
        _check_stored_linear_two_digits)  # fmt: skip


def stored_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *, format_name: str, activations: str | None
) -> Tensor:
    """Multiply activations by a weight as it is stored.

    With activations quantized: ``(Σ digits · value(w) · scale) · token_scale + bias`` in float32, with the codes of
    ``quantize_per_token`` or e4m3fn numbers, rounded once to the dtype of x. Otherwise in the dtype of x. NaN and Inf
    in x spread to that token alone. The gradient of x is that of the float layer (straight-through); the weight takes
    none.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, any strides.
        codes: int8, 8 bits of codes of whatever format, ``[N, B]``: two codes in a byte for formats of 4 bits.
        scales: ``[N, G]``.
        bias: float32 ``[N]`` or None.
        format_name: Of the codes.
        activations: ``int8`` or ``e4m3fn``, with a scale per token, or None.

    Returns:
        ``[..., N]`` in the dtype of x.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.stored_linear(x, codes, scales, bias, format_name, activations)
    return result


def stored_linear_two_digits(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``int8_linear_two_digits`` of x in any float dtype and a weight as it is stored, with scales ``[N, 1]``.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.stored_linear_two_digits(x, codes, scales, bias)
    return result


def prepare(format_name: str, device: torch.device) -> None:
    """Bring to a GPU what kernels need beside the weight, so that no call does, which may be within a CUDA graph."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from fewbits.kernels.cuda.decode import codebook

        codebook(format_name, device)

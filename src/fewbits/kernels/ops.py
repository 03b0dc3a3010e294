"""The ops: schema, checks and shape rule of each, its plain-PyTorch meaning, and the native version where one is.

Letters: M tokens, K input features, N output channels. Call an op as ``torch.ops.fewbits.NAME`` or through the
functions here, which are the same.

The ops exist for every device through ``reference``; ``native`` overrides them on the CPU with bit-equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import native, reference
from fewbits.kernels.packing import CHANNELS, GROUP, unpack_int8

library: Any = torch.library.Library("fewbits", "DEF")  # type: ignore[no-untyped-call]


def _quantize_per_token_shape(x: Tensor) -> tuple[Tensor, Tensor]:
    check_activations(x)
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), x.new_empty((*x.shape[:-1], 1))


def _int8_matmul_shape(
    codes: Tensor, token_scales: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None
) -> Tensor:
    if codes.dtype != torch.int8 or codes.ndim == 0:
        raise FewbitsError(f"codes: int8 [..., K] is needed, got {codes.dtype} {list(codes.shape)}; quantize x first")
    *tokens, K = codes.shape
    N = _channels(packed, channel_scales, bias, K)
    check_scale("token_scales", token_scales, (*tokens, 1))
    return token_scales.new_empty((*tokens, N))


def _int8_linear_shape(x: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None) -> Tensor:
    check_activations(x)
    *tokens, K = x.shape
    return x.new_empty((*tokens, _channels(packed, channel_scales, bias, K)))


def check_activations(x: Tensor) -> None:
    """Refuse what is not float32 ``[..., K]``."""
    if x.dtype != torch.float32:
        raise FewbitsError(f"x: float32 is needed, got {x.dtype}; convert it with x.float()")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise FewbitsError(f"x: [..., K] with K > 0 is needed, got {list(x.shape)}")


def _channels(packed: Tensor, channel_scales: Tensor, bias: Tensor | None, K: int) -> int:
    """Check a packed weight and what goes with it; return N."""
    N = channel_scales.shape[0] if channel_scales.ndim else 1
    panels = (-(-N // CHANNELS), 1 + -(-K // GROUP), CHANNELS * GROUP)
    if packed.dtype != torch.int8 or packed.shape != panels or not packed.is_contiguous():
        raise FewbitsError(
            f"packed: contiguous int8 {list(panels)} is needed for N = {N}, K = {K}, "
            f"got {packed.dtype} {list(packed.shape)}; pack_int8 makes it"
        )
    check_scale("channel_scales", channel_scales, (N,))
    if bias is not None:
        check_scale("bias", bias, (N,))
    return N


def check_scale(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is not float32 of that shape."""
    if tensor.dtype != torch.float32 or tensor.shape != shape:
        raise FewbitsError(
            f"{name}: float32 {list(shape)} is needed, got {tensor.dtype} {list(tensor.shape)}; convert or reshape it"
        )


def define(name: str, arguments: str, shape: Callable[..., Any], meaning: Callable[..., Any]) -> None:
    """Register one op: the shape rule checks every call; the native version, if loaded, takes the CPU's."""

    def checked(*args: Any) -> Any:
        shape(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
        return meaning(*args)

    library.define(f"{name}{arguments}")
    library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewbits::{name}", shape, lib=library)
    fast = getattr(native, name)
    if native.status().loaded:
        library.impl(name, lambda *args: fast(shape(*args), *args), "CPU")


define("quantize_per_token", "(Tensor x) -> (Tensor codes, Tensor scales)",
        _quantize_per_token_shape, reference.quantize_per_token)  # fmt: skip
define("int8_matmul",
        "(Tensor codes, Tensor token_scales, Tensor packed, Tensor channel_scales, Tensor? bias) -> Tensor",
        _int8_matmul_shape, reference.int8_matmul)  # fmt: skip


define("int8_linear", "(Tensor x, Tensor packed, Tensor channel_scales, Tensor? bias) -> Tensor",
        _int8_linear_shape, reference.int8_linear)  # fmt: skip
define("int8_linear_two_digits", "(Tensor x, Tensor packed, Tensor channel_scales, Tensor? bias) -> Tensor",
        _int8_linear_shape, reference.int8_linear_two_digits)  # fmt: skip


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, channel_scales, _ = inputs
    ctx.save_for_backward(packed, channel_scales)
    ctx.in_features = x.shape[-1]


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x as if it had not been quantized; the weight takes none."""
    packed, channel_scales = ctx.saved_tensors
    weight = unpack_int8(packed, channel_scales.shape[0], ctx.in_features).float()
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return (gradient * channel_scales) @ weight, None, None, of_bias


for _name in ("int8_linear", "int8_linear_two_digits"):
    torch.library.register_autograd(
        f"fewbits::{_name}", _straight_through, setup_context=_keep_for_backward, lib=library
    )


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations to int8 with one scale per token: ``x ≈ codes · scales``.

    ``scale = max(max|x| / 127, 2⁻¹²⁶)`` and ``code = round(x · (1 / scale))``, halves to even; −128 is never used.
    A token of zeros (or −0) gets codes 0. A token with NaN or Inf gets codes 0 and the scale NaN, so its results are
    NaN and no other token's are.

    Args:
        x: Activations, float32 ``[..., K]``, any strides.

    Returns:
        Codes, int8 ``[..., K]``, and scales, float32 ``[..., 1]``.

    Raises:
        FewbitsError: If x is not float32 or K is 0.
    """
    result: tuple[Tensor, Tensor] = torch.ops.fewbits.quantize_per_token(x)
    return result


def int8_matmul(
    codes: Tensor, token_scales: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply int8 activations by int8 weights: ``(Σₖ codes · w) · token_scale · channel_scale + bias``.

    The sum is exact in int32. It is rounded to float32 once, then each multiplication and the addition round once more.

    Args:
        codes: int8 ``[..., K]``.
        token_scales: float32 ``[..., 1]``.
        packed: Weights as ``pack_int8`` lays them out.
        channel_scales: float32 ``[N]``.
        bias: float32 ``[N]`` or None.

    Returns:
        float32 ``[..., N]``. A NaN scale makes that token's or channel's results NaN.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.int8_matmul(codes, token_scales, packed, channel_scales, bias)
    return result


def int8_linear(x: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``quantize_per_token`` and ``int8_matmul`` in one call: the same bits, less to wait for in a decode step.

    The gradient of x is that of the float layer (straight-through); the weight takes none.

    Args:
        x: Activations, float32 ``[..., K]``, any strides.
        packed: Weights as ``pack_int8`` lays them out.
        channel_scales: float32 ``[N]``.
        bias: float32 ``[N]`` or None.

    Returns:
        float32 ``[..., N]``.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.int8_linear(x, packed, channel_scales, bias)
    return result


def int8_linear_two_digits(x: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``int8_linear`` with activations as two 8-bit digits, ``x ≈ high · scale + low · smaller scale``.

    What ``quantize_per_token`` leaves of x is quantized once more; both products are made in one pass over the weight.
    Their sum, and then the bias, is rounded to float32 once each. Arguments, result and gradient are ``int8_linear``'s.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.int8_linear_two_digits(x, packed, channel_scales, bias)
    return result

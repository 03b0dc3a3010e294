"""A quantized linear layer as the kernel of decoder layers takes it: addresses and sizes."""

from __future__ import annotations

from torch import nn

from fewbits.kernels import native
from fewbits.kernels.packing import CHANNELS
from fewbits.models.linear import QuantLinear


def has_kernel(module: nn.Module) -> bool:
    """Whether a linear layer is what the kernel multiplies by; not so where an adapter is around it."""
    return type(module) is QuantLinear and module.packed


def can_be_halved(linear: QuantLinear) -> bool:
    """Whether each half of the output channels is whole panels."""
    return linear.out_features // 2 % CHANNELS == 0


def fields(linear: QuantLinear) -> tuple[int, ...]:
    """The weight with its bias; see ``native.weight_fields``."""
    return _fields(linear, 0, linear.out_features)


def halves(linear: QuantLinear) -> list[tuple[int, ...]]:
    """Two weights that lie in one, whole panels each."""
    half = linear.out_features // 2
    return [_fields(linear, 0, half), _fields(linear, half, 2 * half)]


def _fields(linear: QuantLinear, start: int, stop: int) -> tuple[int, ...]:
    """Output channels ``[start, stop)`` of a weight; ``start`` is the first of a panel."""
    panel = start // CHANNELS
    scales = linear.weight_scale
    return native.weight_fields(
        linear.weight[panel:],
        scales[start:] if scales.ndim == 1 else scales[panel:],
        None if linear.bias is None else linear.bias[start:],
        stop - start,
        linear.in_features,
        linear.format,
        linear.activations,
        linear.rotation,
    )

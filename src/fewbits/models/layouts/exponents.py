"""Scales that are powers of two as checkpoints store them: exponents in a byte, with a bias of 127 (E8M0).

Source: OCP MX 1.0, section 5.4.1. In bfloat16 such a number is its exponent and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANTISSA_BITS = 7  # of bfloat16


def exponents_of(scales: Tensor) -> Tensor:
    """The bytes, uint8, of scales that are powers of two, 2⁻¹²⁷ to 2¹²⁷; NaN is 255."""
    return (scales.bfloat16().view(torch.int16) >> _MANTISSA_BITS).to(torch.uint8)


def powers_of_two(exponents: Tensor) -> Tensor:
    """The inverse of ``exponents_of``: bfloat16."""
    bits = exponents.to(torch.int16) << _MANTISSA_BITS
    bits[exponents == 0] = 1 << _MANTISSA_BITS - 1  # 2⁻¹²⁷ is subnormal
    bits[exponents == 255] |= 1 << _MANTISSA_BITS - 1  # NaN, not infinity
    return bits.view(torch.bfloat16)

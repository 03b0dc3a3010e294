"""Two codes of at most 4 bits in a byte, the first one in the low half.

    | code 1 | code 0 |   | code 3 | code 2 |   …          one row, K/2 bytes

Source: the layout of ``torch.float4_e2m1fn_x2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format

BITS = 4


def packed_shape(shape: torch.Size, fmt: Format) -> tuple[int, ...]:
    """The shape ``[..., K/2]`` that codes ``[..., K]`` have when packed.

    Raises:
        FewbitsError: The codes have more than 4 bits, or K is odd.
    """
    if fmt.bits > BITS or fmt.block is not None:
        raise FewbitsError(f"packed: two codes of {fmt.name} do not fit a byte; leave packed=False")
    if len(shape) == 0 or shape[-1] % 2:
        raise FewbitsError(f"packed: the last dimension of {tuple(shape)} is not even; pad it by one")
    return (*shape[:-1], shape[-1] // 2)


def pack_codes(codes: Tensor) -> Tensor:
    """Pack uint8 codes ``[..., K]`` below 16, K even, into ``[..., K/2]`` bytes."""
    return codes[..., ::2] | codes[..., 1::2] << BITS


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of ``pack_codes``: ``[..., K/2]`` bytes to ``[..., K]`` codes."""
    return torch.stack([packed & (1 << BITS) - 1, packed >> BITS], dim=-1).flatten(-2)

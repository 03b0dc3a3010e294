"""How weights of 4 or 8 bits with scales per group lie in memory for their matmuls: panels of 32 output channels.

    panel, [words, 128] bytes:

    | word 0 of channel 0 | word 0 of channel 1 | … | word 0 of channel 31 |
    | word 1 of channel 0 | word 1 of channel 1 | … | word 1 of channel 31 |

A word is 4 bytes of a row of codes, unchanged: 4 features of 8 bits, or 8 of 4 bits. The scales of a panel are
``[G, 32]``. Channels beyond N and bytes beyond a row are zeros. Packing moves bytes and computes nothing, so it serves
every format and loses nothing. int8 with a scale per channel has panels of its own: ``kernels.packing``.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.formats import Format
from fewbits.formats.exact import decode

CHANNELS = 32
WORD = 4


@cache
def table(format_name: str) -> tuple[float, ...] | None:
    """The 16 values of a format of 4 bits by code; None for formats of 8 bits."""
    if format_name == "int4":
        return (*map(float, range(8)), *map(float, range(-8, 0)))  # two's complement
    fmt = Format.named(format_name)
    if fmt.bits > 4:
        return None
    return fmt.codebook or tuple(float(decode(code, fmt)) for code in range(16))


def fits_panels(codes: Tensor, scales: Tensor, format_name: str) -> bool:
    """Whether a weight can lie in panels: its groups are whole words; or it has 8 bits, and a channel is one group."""
    G = scales.shape[-1]
    whole = codes.shape[-1] % (G * WORD) == 0
    return codes.numel() > 0 and (whole or (G == 1 and table(format_name) is None))


def pack_panels(codes: Tensor) -> Tensor:
    """Bring codes into panels.

    Args:
        codes: ``[N, B]``, 8 bits of any dtype; B bytes a channel.

    Returns:
        int8 ``[ceil(N/32), ceil(B/4), 128]``, contiguous.
    """
    N, B = codes.shape
    rows = pad(codes.view(torch.uint8), (0, -B % WORD, 0, -N % CHANNELS)).contiguous()
    words = rows.view(torch.int32).view(-1, CHANNELS, rows.shape[1] // WORD)
    return words.transpose(1, 2).contiguous().view(torch.int8)


def unpack_panels(packed: Tensor, N: int, B: int) -> Tensor:
    """The inverse of ``pack_panels``: codes, uint8 ``[N, B]``."""
    rows = packed.view(torch.int32).transpose(1, 2).contiguous().view(torch.uint8)
    return rows.flatten(0, 1)[:N, :B].contiguous()


def pack_scales(scales: Tensor) -> Tensor:
    """Bring scales ``[N, G]`` into the order of the panels: ``[ceil(N/32), G, 32]``; float16 becomes float32."""
    kept = scales if scales.dtype in (torch.bfloat16, torch.float32) else scales.float()
    N, G = scales.shape
    return pad(kept, (0, 0, 0, -N % CHANNELS)).view(-1, CHANNELS, G).transpose(1, 2).contiguous()


def unpack_scales(packed: Tensor, N: int) -> Tensor:
    """The inverse of ``pack_scales``: ``[N, G]``."""
    return packed.transpose(1, 2).flatten(0, 1)[:N].contiguous()

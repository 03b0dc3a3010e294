"""How int8 weights lie in memory for the matmul: panels of 32 output channels.

    panel, [1 + ceil(K/4), 128] bytes:

    | 128·Σw of channel 0, int32 | … | 128·Σw of channel 31 |      row 0
    | w[0][0:4] | w[1][0:4] | …                | w[31][0:4] |      row 1: input features 0–3
    | w[0][4:8] | w[1][4:8] | …                | w[31][4:8] |      row 2: input features 4–7

A decode step reads every panel once, as one contiguous stream. Channels and features beyond N and K are zeros.
The sums correct for activations that the instruction takes as unsigned bytes (see ``csrc/int8_matmul.hpp``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import native

CHANNELS = 32
GROUP = 4
MAX_FEATURES = 2**31 // 128**2 - 1
"""Most input features K for which a sum of K products of two signed bytes, each at most 128², fits an int32."""


def pack_int8(weight: Tensor) -> Tensor:
    """Pack int8 weights for ``int8_matmul``.

    Args:
        weight: Codes, int8 ``[N, K]``.

    Returns:
        Panels, int8 ``[ceil(N/32), 1 + ceil(K/4), 128]``, contiguous.

    Raises:
        FewbitsError: If the weight is not int8, not 2-D, empty, or K is too large for an int32 sum.
    """
    if weight.dtype != torch.int8 or weight.ndim != 2 or weight.numel() == 0:
        raise FewbitsError(
            f"weight: int8 [N, K] with N, K > 0 is needed, got {weight.dtype} {list(weight.shape)}; quantize it first"
        )
    N, K = weight.shape
    if K > MAX_FEATURES:
        raise FewbitsError(f"weight: K = {K} input features, at most {MAX_FEATURES} fit an int32 sum; split the layer")
    shape = (-(-N // CHANNELS), 1 + -(-K // GROUP), CHANNELS * GROUP)
    packed = weight.new_empty(shape)
    if native.status().loaded and weight.device.type == "cpu":
        return native.pack_int8(packed, weight)
    return reference_pack_int8(packed, weight)


def reference_pack_int8(packed: Tensor, weight: Tensor) -> Tensor:
    """Fill the panels in plain PyTorch: what ``pack_int8`` means."""
    panels, rows_of_panel, _ = packed.shape
    K, steps = weight.shape[1], rows_of_panel - 1
    for panel in range(panels):  # one panel at a time: no padded copy of the whole weight
        rows = weight[panel * CHANNELS : (panel + 1) * CHANNELS]
        padded = rows.new_zeros(CHANNELS, steps * GROUP)
        padded[: rows.shape[0], :K] = rows
        packed[panel, 1:] = padded.view(CHANNELS, steps, GROUP).transpose(0, 1).reshape(steps, CHANNELS * GROUP)
        packed[panel, 0] = (padded.sum(1, dtype=torch.int32) * 128).view(torch.int8)
    return packed


def unpack_int8(packed: Tensor, N: int, K: int) -> Tensor:
    """The inverse of ``pack_int8``: panels back to int8 codes ``[N, K]``."""
    panels, rows, _ = packed.shape
    steps = packed[:, 1:].reshape(panels, rows - 1, CHANNELS, GROUP)
    return steps.transpose(1, 2).reshape(panels * CHANNELS, (rows - 1) * GROUP)[:N, :K].contiguous()

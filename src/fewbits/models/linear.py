"""Linear layers that stay in 8 bits: the weights are never decompressed.

Letters: M tokens, K input features, N output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.kernels import ops
from fewbits.kernels.packing import pack_int8, unpack_int8
from fewbits.tensors.quantized import QuantizedTensor


class QuantLinear(nn.Module):
    """``y = x Wᵀ + b`` with int8 weights (a scale per channel) and int8 activations (a scale per token).

    Takes float32, bfloat16 or float16 ``[..., K]`` and returns the same dtype, ``[..., N]``. A token with NaN or Inf
    gives NaN for that token alone. Inference only: no gradient flows.
    """

    packed: Tensor
    channel_scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self._scale_bits = 8 * weight.scales.itemsize
        self.register_buffer("packed", pack_int8(weight.codes))
        self.register_buffer("channel_scales", weight.scales.flatten().float())
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Quantize each token, multiply in int8, scale."""
        return ops.int8_linear(x.float(), self.packed, self.channel_scales, self.bias).to(x.dtype)

    def quantized_weight(self) -> QuantizedTensor:
        """The weight as codes ``[N, K]`` and scales ``[N, 1]``."""
        codes = unpack_int8(self.packed, self.out_features, self.in_features)
        return QuantizedTensor(codes, self.channel_scales[:, None])

    def quantized_bits(self) -> tuple[int, int]:
        """Bits of codes and stored scales, and the number of weights they stand for."""
        weights = self.out_features * self.in_features
        return 8 * weights + self._scale_bits * self.out_features, weights

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the parentheses."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantHead(QuantLinear):
    """The output head: int8 weights, activations as two 8-bit digits, ``x ≈ high · scale + low · smaller scale``.

    Logits take the whole error of their layer, with no later layer to average it out. The second digit is free in a
    decode step, which waits for the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Quantize each token, then what is left of it; multiply both in one pass over the weights."""
        tokens = x.reshape(-1, self.in_features).float()  # [M, K]
        high, high_scales = ops.quantize_per_token(tokens)
        low, low_scales = ops.quantize_per_token(tokens - high * high_scales)
        digits, scales = torch.cat([high, low]), torch.cat([high_scales, low_scales])
        of_high, of_low = ops.int8_matmul(digits, scales, self.packed, self.channel_scales).chunk(2)  # [M, N] each
        out = of_high + of_low if self.bias is None else of_high + of_low + self.bias
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)


def keep_compute_dtype(embedding: nn.Module, dtype: torch.dtype) -> None:
    """Let an embedding stay in 16 bits in memory while what it looks up enters the model in ``dtype``."""
    embedding.register_forward_hook(_Cast(dtype))


class _Cast:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(self.dtype)

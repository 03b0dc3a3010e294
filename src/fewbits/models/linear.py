"""Linear layers whose weights stay in few bits: they are never decompressed in memory.

Letters: M tokens, K input features, N output channels, G scales per channel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbits.kernels import ops, stored_ops
from fewbits.kernels.packing import pack_int8
from fewbits.kernels.rotation import rotate
from fewbits.models.precision import Precision
from fewbits.models.quantized_matmul import pack_weight, quantized_linear, unpack_weight
from fewbits.tensors.quantized import CODE_DTYPES, QuantizedTensor, is_packed, scale_dtype_of


class CodesModule(nn.Module):
    """A module that holds codes and scales: ``to``, ``half`` and the like move them and leave their dtypes alone.

    Their dtypes are part of what they mean; what is computed in between layers has the dtype of the layer's input.
    """

    @abstractmethod
    def pack(self) -> None:
        """Bring the codes into the layout that the kernels of their device read."""

    @abstractmethod
    def unpack(self) -> None:
        """Bring the codes into the layout of ``state_dict``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = (*self.named_buffers(recurse=False), *self.named_parameters(recurse=False))
        before = {name: tensor.detach() for name, tensor in own}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:
                now.data = tensor.to(now.device)
        if next(self.buffers(recurse=False)).device.type == "cpu":
            self.pack()
        else:
            self.unpack()
        return self


class QuantLinear(CodesModule, nn.Linear):
    """``y = x Wᵀ + b`` with a quantized weight.

    What happens to x depends on the precision: int8, int4 and fp8 quantize it too, with a scale per token; the
    others compute with x as it is. Takes float32, bfloat16 or float16 ``[..., K]`` and returns the same dtype,
    ``[..., N]``. A token with NaN or Inf gives NaN for that token alone. The weight takes no gradient; x does, as if it
    had not been quantized (straight-through).

    ``weight`` is always int8, 8 bits of codes of whatever format, so that no one takes them for numbers.
    ``state_dict`` holds ``weight`` (codes, ``[N, K]`` or packed in pairs) and ``weight_scale`` ``[N, G]``, whatever the
    layout in memory is. On the CPU codes lie in panels (``quantized_matmul``) once ``pack`` has been called.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self, weight: QuantizedTensor, bias: Tensor | None = None, *, activations: str | None = "int8"
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.out_features, self.in_features = weight.shape
        self.format, self.activations = weight.format, activations
        self.rotation = weight.rotation
        self._scale_dtype = weight.scales.dtype
        self.register_buffer("weight", weight.codes.view(torch.int8))
        self.register_buffer("weight_scale", weight.scales)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.pack()

    @classmethod
    def empty(cls, N: int, K: int, bias: bool, precision: Precision, scale_dtype: torch.dtype) -> Self:
        """A layer on the meta device, to be filled by ``load``."""
        quantized = empty_codes((N, K), precision, scale_dtype)
        activations = None if precision.activations is None else precision.activations.name
        return cls(quantized, torch.empty(N, device="meta") if bias else None, activations=activations)

    @property
    def packed(self) -> bool:
        """Whether the codes lie in panels for the compiled matmul."""
        return self.weight.ndim == 3

    def pack(self) -> None:
        """Bring the codes, which may have just been loaded, into the layout that the CPU's kernels read."""
        self.weight = self.weight.view(torch.int8)
        stored_ops.prepare(self.format, self.weight.device)
        if not self.packed and self.weight.device.type == "cpu":
            self.weight, self.weight_scale = pack_weight(self.quantized_weight(), self.activations)

    def unpack(self) -> None:
        """Bring the codes into the layout of ``state_dict``, which other devices compute with too."""
        if self.packed:
            stored = self.quantized_weight()
            self.weight, self.weight_scale = stored.codes.view(torch.int8), stored.scales
        stored_ops.prepare(self.format, self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate and quantize each token if the precision says so, multiply, scale."""
        rows = rotate(x.float(), self.rotation) if self.rotation else x
        return quantized_linear(
            rows, self.weight, self.weight_scale, self.bias, self.out_features, self.format, self.activations
        ).to(x.dtype)

    def quantized_weight(self) -> QuantizedTensor:
        """The weight as codes and scales ``[N, G]``, as they are stored."""
        shape = (self.out_features, self.in_features)
        weight = unpack_weight(self.weight, self.weight_scale, shape, self.format, self._scale_dtype)
        return replace(weight, rotation=self.rotation)

    def quantized_bits(self) -> tuple[int, int]:
        """Bits of codes and stored scales, and the number of weights they stand for."""
        weights = self.out_features * self.in_features
        code_bits = 4 if is_packed(self.format) else 8
        groups = self.weight_scale.shape[1] if self.weight_scale.ndim > 1 else 1
        return code_bits * weights + 8 * self._scale_dtype.itemsize * self.out_features * groups, weights

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.format}, activations={self.activations or 'as they are'}"
            f"{f', rotated by {self.rotation}' if self.rotation else ''}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = self.quantized_weight()
        destination[f"{prefix}weight"] = stored.codes.view(torch.int8)
        destination[f"{prefix}weight_scale"] = stored.scales

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.unpack()  # as what comes
        if (codes := state_dict.get(f"{prefix}weight")) is not None:
            state_dict = {**state_dict, f"{prefix}weight": codes.view(torch.int8)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pack()


class QuantHead(QuantLinear):
    """The output head: int8 weights, activations as two 8-bit digits, ``x ≈ high · scale + low · smaller scale``.

    Logits take the whole error of their layer, with no later layer to average it out. The second digit is free in a
    decode step, which waits for the weights.

    Attributes:
        tied: Whether it was made of the input embedding, so that it is not stored.
    """

    tied: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Rotate and quantize each token, then what is left of it; multiply both in one pass over the weights."""
        rows = rotate(x.float(), self.rotation) if self.rotation else x
        if not self.packed and rows.device.type != "cpu":
            return stored_ops.stored_linear_two_digits(rows, self.weight, self.weight_scale, self.bias).to(x.dtype)
        packed = self.weight if self.packed else pack_int8(self.weight)
        scales = self.weight_scale.flatten().float()
        return ops.int8_linear_two_digits(rows.float(), packed, scales, self.bias).to(x.dtype)


def empty_codes(shape: tuple[int, ...], precision: Precision, scale_dtype: torch.dtype) -> QuantizedTensor:
    """A weight ``[..., K]`` on the meta device: what a layer has before its codes come."""
    *rows, K = shape
    columns = K // 2 if is_packed(precision.weights.name) else K
    codes = torch.empty((*rows, columns), dtype=CODE_DTYPES[precision.weights.name], device="meta")
    scale_dtype = scale_dtype_of(precision.weights.name, scale_dtype)
    scales = torch.empty((*rows, precision.scales_per_channel(K)), dtype=scale_dtype, device="meta")
    return QuantizedTensor(codes, scales, precision.weights.name, precision.rotation(K))


def cast_to_weight(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    """A hook before a layer's forward: its input in the dtype of its weight."""
    weight: Tensor = module.get_parameter("weight")
    return args[0].to(weight.dtype)


def keep_compute_dtype(embedding: nn.Module, dtype: torch.dtype) -> None:
    """Let an embedding stay in 16 bits in memory while what it looks up enters the model in ``dtype``.

    Where the model is brought to another dtype (``model.half()``), what is looked up goes with it.
    """
    embedding.register_buffer("_computed_in", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)
    embedding.register_forward_hook(_cast_looked_up)


def _cast_looked_up(embedding: nn.Module, args: tuple[Tensor, ...], looked_up: Tensor) -> Tensor:
    return looked_up.to(embedding.get_buffer("_computed_in").dtype)

"""Mixture-of-experts layers in few bits: the fused 3-D weights of transformers, quantized expert by expert.

Letters: T tokens, E experts, N output channels, K input features, G scales per channel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels.rotation import rotate
from fewbits.models.linear import CodesModule, empty_codes
from fewbits.models.precision import Precision
from fewbits.models.quantized_matmul import pack_weight, quantized_linear, unpack_weight
from fewbits.tensors.quantized import CODE_DTYPES, QuantizedTensor, is_packed, scale_dtype_of


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The fused weights ``[E, N, K]`` of a module with experts, by name; empty if it is none, or not such a one.

    transformers' experts modules say how their weights lie; only the plain kind is taken: not transposed, without
    biases, gate and up projection one after the other.
    """
    plain = {"is_transposed": False, "has_bias": False, "is_concatenated": True, "has_post_expert_norm": False}
    if any(getattr(module, name, None) is not value for name, value in plain.items()):
        return {}
    named = dict(module.named_parameters(recurse=False))
    return named if "down_proj" in named and all(parameter.ndim == 3 for parameter in named.values()) else {}


class QuantExperts(CodesModule):
    """Experts with quantized weights.

    ``state_dict`` holds for each fused weight its codes ``[E, N, K]`` (packed in pairs for 4 bits), and under
    ``NAME_scale`` its scales ``[E, N, G]``, whatever the layout in memory is.
    """

    def __init__(self, experts: Any, precision: Precision, scale_dtype: torch.dtype) -> None:
        super().__init__()
        for name, value in vars(experts).items():  # sizes, limits and switches that the family's gate may use
            if isinstance(value, (bool, int, float)) and name != "training":
                setattr(self, name, value)
        weights = expert_weights(experts)
        self.act_fn, self._family = experts.act_fn, type(experts)
        self.num_experts = next(iter(weights.values())).shape[0]
        self.format = precision.weights.name
        self._scale_dtype = scale_dtype_of(self.format, scale_dtype)
        self.activations = None if precision.activations is None else precision.activations.name
        self._widths = {name: (weight.shape[1], weight.shape[2]) for name, weight in weights.items()}
        self._rotations = {name: precision.rotation(weight.shape[2]) for name, weight in weights.items()}
        for name, weight in weights.items():
            quantized = empty_codes(tuple(weight.shape), precision, scale_dtype)
            self.register_buffer(name, quantized.codes.view(torch.int8))
            self.register_buffer(f"{name}_scale", quantized.scales)

    def pack(self) -> None:
        """Bring the codes, which may have just been loaded, into the layout that the CPU's kernels read."""
        for name in self._widths:
            codes = getattr(self, name).view(torch.int8)
            setattr(self, name, codes)
            if codes.ndim == 3 and codes.device.type == "cpu":
                weights = (self.quantized_weight(name, expert) for expert in range(self.num_experts))
                packed = [pack_weight(weight, self.activations) for weight in weights]
                if all(codes.ndim == 3 for codes, _ in packed):
                    setattr(self, name, torch.stack([codes for codes, _ in packed]))
                    setattr(self, f"{name}_scale", torch.stack([scales for _, scales in packed]))

    def unpack(self) -> None:
        """Bring the codes into the layout of ``state_dict``, which other devices compute with too."""
        for name in self._widths:
            if getattr(self, name).ndim == 4:
                stored = self._stored(name)
                setattr(self, name, stored.codes.view(torch.int8))
                setattr(self, f"{name}_scale", stored.scales)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Let each token's experts work on it, and add up what they say.

        Args:
            hidden_states: ``[T, K]``.
            top_k_index: The experts of each token, ``[T, k]``; E stands for none.
            top_k_weights: What each of them counts, ``[T, k]``.
        """
        result = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert == self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            said = self._expert(expert, hidden_states[token]) * top_k_weights[token, place, None]
            result.index_add_(0, token, said.to(result.dtype))
        return result

    def quantized_weight(self, name: str, expert: int) -> QuantizedTensor:
        """One expert's weight as codes and scales ``[N, G]``, as they are stored."""
        codes, scales = getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert]
        weight = unpack_weight(codes, scales, self._widths[name], self.format, self._scale_dtype)
        return replace(weight, rotation=self._rotations[name])

    def quantized_bits(self) -> tuple[int, int]:
        """Bits of codes and stored scales, and the number of weights they stand for."""
        weights = sum(self.num_experts * N * K for N, K in self._widths.values())
        scales = sum(self.num_experts * N * self._groups(name) for name, (N, _) in self._widths.items())
        return (4 if is_packed(self.format) else 8) * weights + 8 * self._scale_dtype.itemsize * scales, weights

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        wide = self._linear("gate_up_proj" if self.has_gate else "up_proj", expert, x)
        gated = self._family._apply_gate(self, wide) if self.has_gate else self.act_fn(wide)
        return self._linear("down_proj", expert, gated)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        codes, scales = getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert]
        block, N = self._rotations[name], self._widths[name][0]
        rows = rotate(x.float(), block) if block else x
        return quantized_linear(rows, codes, scales, None, N, self.format, self.activations).to(x.dtype)

    def _groups(self, name: str) -> int:
        """The scales of an output channel."""
        scales: Tensor = getattr(self, f"{name}_scale")
        return scales.shape[2] if scales.ndim > 2 else 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._widths:
            stored = self._stored(name)
            destination[f"{prefix}{name}"] = stored.codes.view(torch.int8)
            destination[f"{prefix}{name}_scale"] = stored.scales

    def _stored(self, name: str) -> QuantizedTensor:
        """All experts' weights as they are stored: codes ``[E, N, K]`` and scales ``[E, N, G]``."""
        codes, scales = getattr(self, name), getattr(self, f"{name}_scale")
        if codes.ndim == 3:
            return QuantizedTensor(codes.view(CODE_DTYPES[self.format]), scales, self.format, self._rotations[name])
        each = [self.quantized_weight(name, expert) for expert in range(self.num_experts)]
        codes, scales = torch.stack([one.codes for one in each]), torch.stack([one.scales for one in each])
        return QuantizedTensor(codes, scales, self.format, self._rotations[name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.unpack()  # as what comes
        for name in self._widths:
            if (codes := state_dict.get(f"{prefix}{name}")) is not None:
                state_dict = {**state_dict, f"{prefix}{name}": codes.view(torch.int8)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pack()

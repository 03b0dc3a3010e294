"""One decoder layer as the kernel takes it: addresses and sizes, and how to see that they still hold.

Letters: B texts, T new tokens of each, S positions, Q query heads, G key and value heads, D channels of a head, R
rotated ones, H hidden features, F features of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from fewbits.kernels import native
from fewbits.models.fused_weight import can_be_halved, fields, halves, has_kernel
from fewbits.models.kv_cache import GrowingLayer, Held
from fewbits.models.linear import QuantLinear

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MIXED = "_attn_implementation_internal"  # the configuration's own property takes 3 µs to ask


class FusedLayer:
    """What the kernel needs of a decoder layer. It is not copied or pickled with the layer, but made again.

    Attributes:
        index: Of the layer in the cache.
    """

    def __init__(self, layer: Any, linears: dict[str, QuantLinear]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self._head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        norms += self._head_norms
        self.index: int = attention.layer_idx
        self._settings: dict[str, Any] = attention.config.__dict__
        self._modules = [
            attention,
            mlp,
            *norms,
            *linears.values(),
            mlp.act_fn if "gate" in linears else mlp.activation_fn,
        ]
        self._norms = [cast(nn.Parameter, norm.weight) for norm in norms]
        biases = [linear.bias for linear in linears.values() if linear.bias is not None]
        self._fixed = [(tensor, tensor.data_ptr()) for tensor in (*self._norms, *biases)]
        self._places = list(_places(layer, (attention, mlp, *norms, *linears.values())))
        self.G = linears["k_proj"].out_features // attention.head_dim
        self.D: int = attention.head_dim
        self._native = _native_layer(layer, linears, self._norms, self.G)

    @classmethod
    def of(cls, layer: Any) -> FusedLayer | None:
        """The layer for the kernel, or None if one of its parts is not what the kernel knows."""
        attention, mlp = layer.self_attn, layer.mlp
        linears: dict[str, Any] = {name: getattr(attention, name) for name in _PROJECTIONS} | dict(mlp.named_children())
        activation = linears.pop("act_fn", None) or linears.pop("activation_fn", None)
        parts: list[nn.Module] = [attention, mlp, layer.input_layernorm, layer.post_attention_layernorm]
        parts += [*linears.values()]
        if not isinstance(activation, (SiLUActivation, nn.SiLU)) or any(map(_is_watched, parts)):
            return None
        if not all(map(has_kernel, linears.values())):
            return None
        if "gate_up_proj" in linears and not can_be_halved(linears["gate_up_proj"]):
            return None  # a panel would hold channels of both halves
        names = {"gate_up_proj": "gate_up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
        tensors = [*layer.parameters(), *layer.buffers()]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in layer.parameters()):
            return None
        return cls(layer, {names.get(name, name): linear for name, linear in linears.items()})

    def is_current(self) -> bool:
        """Whether the layer still consists of the same modules and tensors, and nobody watches its parts."""
        for holder, name, held in self._places:
            if holder.get(name) is not held:
                return False
        for tensor, address in self._fixed:
            if tensor.data_ptr() != address:
                return False
        return not any(map(_is_watched, self._modules))

    def can_run(self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]) -> bool:
        """Whether the kernel takes these tensors, and no gradient is asked for."""
        if torch.is_grad_enabled() and (x.requires_grad or any(norm.requires_grad for norm in self._norms)):
            return False
        if x.dtype != torch.float32 or x.device.type != "cpu" or self._settings.get(_MIXED) not in ("sdpa", "fewbits"):
            return False
        if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1):
            return False
        cos, sin = rotary
        return cos.dtype == sin.dtype == torch.float32 and cos.shape[-1] <= self.D

    def run(self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor], held: GrowingLayer | None) -> Tensor:
        """The layer of ``x [B, T, H]``; keys and values go into the cache's layer, if there is one."""
        B, T, _ = x.shape
        x, cos, sin = x.contiguous(), rotary[0].contiguous(), rotary[1].contiguous()
        R = cos.shape[-1]
        rotary_batch = T * R if cos.shape[0] > 1 else 0
        if held is None:
            keys, values = (Held(x.new_empty(B, self.G, T, self.D), 0, 0) for _ in range(2))
        else:
            keys, values = held.make_room(B, self.G, T, self.D, torch.float32, x.device)
        address, mask_batch, mask_row = 0, 0, 0
        if mask is not None:
            mask = mask if mask.stride(-1) == 1 else mask.contiguous()
            address = mask.data_ptr()
            mask_batch = mask.stride(0) if mask.shape[0] > 1 else 0
            mask_row = mask.stride(2) if mask.shape[2] > 1 else 0
        out = torch.empty_like(x)
        self._native.run(
            x.data_ptr(), out.data_ptr(), B, T, keys.end - keys.start, cos.data_ptr(), sin.data_ptr(), R, rotary_batch,
            native.CACHE_TYPES[keys.buffer.dtype], keys.place(), values.place(),
            address, mask_batch, mask_row, torch.get_num_threads(),
        )  # fmt: skip
        if held is not None:
            held.grow(T)
        return out

    def __reduce__(self) -> Any:
        return type(None), ()  # addresses are of no use in a copy


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see, or has taken over, what goes through a module."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _places(layer: nn.Module, modules: tuple[nn.Module, ...]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where modules and tensors are held, to see whether they are exchanged."""
    for owner in (layer, *modules):
        for holder in (owner._modules, owner._buffers, owner._parameters):
            for name, held in holder.items():
                yield holder, name, held


def _native_layer(layer: Any, linears: dict[str, QuantLinear], norms: list[nn.Parameter], G: int) -> Any:
    attention = layer.self_attn
    weights = {name: fields(linear) for name, linear in linears.items()}
    if "gate_up" in weights:
        weights["gate"], weights["up"] = halves(linears["gate_up"])
        del weights["gate_up"]
    q_norm, k_norm = norms[2:] if len(norms) > 2 else (None, None)
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    return native.module().DecoderLayer(
        **{names.get(name, name): weight for name, weight in weights.items()},
        input_norm=norms[0].data_ptr(),
        post_norm=norms[1].data_ptr(),
        q_norm=0 if q_norm is None else q_norm.data_ptr(),
        k_norm=0 if k_norm is None else k_norm.data_ptr(),
        eps=layer.input_layernorm.variance_epsilon,
        post_eps=layer.post_attention_layernorm.variance_epsilon,
        head_eps=0.0 if q_norm is None else attention.q_norm.variance_epsilon,
        H=linears["q_proj"].in_features,
        Q=linears["q_proj"].out_features // attention.head_dim,
        G=G,
        D=attention.head_dim,
        interleaved=layer.rotates_neighbours,
        scale=attention.scaling,
    )

"""Decoder layers of the Llama kind in one native call each, under the models that transformers builds.

A layer keeps its modules, hooks, state and name; only its class becomes a subclass that looks, at every call, whether
the call is one that the kernel computes just as its modules would. If not, the modules do.

Letters: B texts, T new tokens of each, D channels of a head, R rotated ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.models.glm import modeling_glm as glm
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fewbits.kernels import native
from fewbits.models.fused_layer import FusedLayer
from fewbits.models.kv_cache import growing_layer

_HARMLESS = {"use_cache", "cache_position", "logits_to_keep", "output_hidden_states", "return_dict"}


class _Fused(nn.Module):
    """What the fused layers have in common: the choice of the path."""

    _fewbits_layer: FusedLayer | None = None
    rotates_neighbours = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's own forward; see the class of transformers."""
        if (
            type(hidden_states) is Tensor
            and position_embeddings is not None
            and not self.training
            and not torch.compiler.is_compiling()
            and (layer := self._layer()) is not None
            and layer.can_run(hidden_states, attention_mask, position_embeddings)
            and not any(value for name, value in kwargs.items() if name not in _HARMLESS)
        ):
            held = growing_layer(past_key_values, layer.index)
            past = 0 if held is None else held.get_seq_length()
            simple = attention_mask is not None or past == 0 or hidden_states.shape[1] == 1
            if simple and (past_key_values is None if held is None else held.takes(torch.float32)):
                return layer.run(hidden_states, attention_mask, position_embeddings, held)
        result: Tensor = super().forward(  # of the class of transformers beside this one
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return result

    def _layer(self) -> FusedLayer | None:
        """What the kernel needs, made again where a module or a tensor has been exchanged."""
        layer = self._fewbits_layer
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        if layer is None or not layer.is_current():
            self._fewbits_layer = layer = FusedLayer.of(self)
        return layer


class LlamaDecoderLayer(_Fused, llama.LlamaDecoderLayer):  # type: ignore[misc]  # transformers is not typed
    """Llama, and what is of its kind, such as SmolLM2."""


class MistralDecoderLayer(_Fused, mistral.MistralDecoderLayer):  # type: ignore[misc]  # transformers is not typed
    """Mistral, with its sliding window."""


class Qwen2DecoderLayer(_Fused, qwen2.Qwen2DecoderLayer):  # type: ignore[misc]  # transformers is not typed
    """Qwen2, with biases in its projections."""


class Qwen3DecoderLayer(_Fused, qwen3.Qwen3DecoderLayer):  # type: ignore[misc]  # transformers is not typed
    """Qwen3, with norms of its heads."""


class GlmDecoderLayer(_Fused, glm.GlmDecoderLayer):  # type: ignore[misc]  # transformers is not typed
    """GLM and ChatGLM, which rotate neighbouring channels, and half of them."""

    rotates_neighbours = True


_FUSED: dict[type[nn.Module], type[_Fused]] = {
    llama.LlamaDecoderLayer: LlamaDecoderLayer,
    mistral.MistralDecoderLayer: MistralDecoderLayer,
    qwen2.Qwen2DecoderLayer: Qwen2DecoderLayer,
    qwen3.Qwen3DecoderLayer: Qwen3DecoderLayer,
    glm.GlmDecoderLayer: GlmDecoderLayer,
}


def fuse(model: nn.Module) -> int:
    """Let the decoder layers of a model run in one native call where they can.

    Returns:
        How many layers there are of the kinds that can; 0 without the compiled kernels.
    """
    if not native.status().loaded:
        return 0
    layers = [module for module in model.modules() if type(module) in _FUSED]
    for layer in layers:
        layer.__class__ = _FUSED[type(layer)]
    return len(layers)


def unfuse(model: nn.Module) -> int:
    """The opposite of ``fuse``: the layers are transformers' own again.

    Returns:
        How many were not.
    """
    theirs = {ours: kind for kind, ours in _FUSED.items()}
    layers = [module for module in model.modules() if type(module) in theirs]
    for layer in layers:
        layer.__dict__.pop("_fewbits_layer", None)
        layer.__class__ = theirs[type(layer)]  # type: ignore[index]
    return len(layers)

"""How fewbits takes part in transformers' loading and saving: quantized layers in, a known layout out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits.errors import FewbitsError
from fewbits.models.experts import QuantExperts
from fewbits.models.layouts import compressed_tensors
from fewbits.models.linear import QuantHead, QuantLinear, cast_to_weight, keep_compute_dtype
from fewbits.models.offload import placed_like, weight_of
from fewbits.models.precision import Precision
from fewbits.models.quantizable import output_head, quantizable_weights
from fewbits.tensors.quantized import CODE_DTYPES, QuantizedTensor, quantize_weight
from fewbits.tensors.requantizable import requantizable

_METHOD = "fewbits"  # lives in memory only: what is saved names a layout that others read too


@dataclass(frozen=True)
class Plan:
    """What of a model is quantized, decided before it is built.

    Attributes:
        precision: What its layers are quantized to, groups fitted; where they differ, what most of them are.
        parameters: Names of the weights that are; the output head's may be among them, always in int8.
        kept: 16- or 32-bit dtype of what is stored beside quantized weights.
        dtype: What is computed in between quantized layers.
        scales: Dtype of the scales.
        head: Whether an output head that is tied to the embedding gets weights of its own.
        mixed: What each weight is quantized to, where they differ; else empty.
    """

    precision: Precision
    parameters: frozenset[str]
    kept: torch.dtype
    dtype: torch.dtype
    scales: torch.dtype
    head: bool = True
    mixed: Mapping[str, Precision] = field(default_factory=dict)

    def of(self, parameter: str) -> Precision:
        """What a weight is quantized to."""
        return self.mixed.get(parameter, self.precision)

    @property
    def is_writable(self) -> bool:
        """Whether there is a layout that can say it."""
        return all(each.name in compressed_tensors.WRITES for each in (self.precision, *self.mixed.values()))

    def layers(self) -> dict[Precision, list[str]]:
        """The names of the layers of each precision, where they differ."""
        found: dict[Precision, list[str]] = {}
        for parameter, precision in self.mixed.items():
            found.setdefault(precision, []).append(parameter.removesuffix(".weight"))
        return found


@register_quantization_config(_METHOD)
class FewbitsConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """Carries a plan through ``from_pretrained``; written down, it is the configuration of the layout."""

    def __init__(self, plan: Plan) -> None:
        self.quant_method = _METHOD
        self.plan = plan
        self.ignore: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds under ``quantization_config``."""
        if not self.plan.is_writable:
            return {"quant_method": _METHOD, "precision": self.plan.precision.name}
        if self.plan.mixed:
            return compressed_tensors.mixed_config(self.plan.layers(), self.ignore)
        return compressed_tensors.quantization_config(self.plan.precision, self.ignore)

    def __deepcopy__(self, memo: dict[int, Any]) -> FewbitsConfig:
        return self  # of frozen data; transformers copies configurations often


@register_quantizer(_METHOD)
class FewbitsQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Puts empty quantized layers into an empty model; the tensors then come as codes and scales."""

    @property
    def plan(self) -> Plan:
        """What is quantized."""
        plan: Plan = self.quantization_config.plan
        return plan

    def _process_model_before_weight_loading(self, model: transformers.PreTrainedModel, **_: Any) -> None:
        plan, head = self.plan, output_head(model)
        for weight in quantizable_weights(model).values():
            if weight.parameter not in plan.parameters:
                continue
            module = model.get_submodule(weight.module)
            if isinstance(module, QuantExperts):  # for another of its weights
                continue
            if weight.kind == "experts":
                replaced: nn.Module = QuantExperts(module, plan.of(weight.parameter), plan.scales)
            else:
                kind = QuantHead if weight.parameter == head else QuantLinear
                precision = plan.precision.of_head if weight.parameter == head else plan.of(weight.parameter)
                replaced = kind.empty(weight.N, weight.K, module.bias is not None, precision, plan.scales)
            _mark_filled(replaced)
            model.set_submodule(weight.module, replaced)
        for embedding in _tables(model):
            embedding.to(plan.kept)
            keep_compute_dtype(embedding, plan.dtype)

    def _process_model_after_weight_loading(self, model: transformers.PreTrainedModel, **_: Any) -> None:
        if self.plan.head:
            _quantize_tied_head(model, self.plan)
        else:
            _let_tied_head_compute(model, self.plan.dtype)
        for module in model.modules():
            if isinstance(module, (QuantLinear, QuantExperts)):
                module.pack()
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        head = output_head(model)
        if head is not None and (_is_tied(model) or self._is_written_as_values(model.get_output_embeddings())):
            linears.append(head.removesuffix(".weight"))
        self.quantization_config.ignore = linears
        model.requires_grad_(False)
        from fewbits.models.fused import fuse  # imported here: it brings the code of every family that it knows

        fuse(model)

    def get_state_dict_and_metadata(
        self, model: transformers.PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: codes and scales in the layout's terms, the rest as it was stored."""
        plan, state = self.plan, model.state_dict()
        made_again = output_head(model) if _is_tied(model) else None  # of the embedding, when the model is loaded
        if away := next((name for name, tensor in state.items() if tensor.is_meta), None):
            raise FewbitsError(f"{away} is not in memory, so the model cannot be saved; load it without offloading")
        written: dict[str, Tensor] = {}
        for name, tensor in state.items():
            owner = name.rpartition(".")[0]
            if made_again is not None and owner == made_again.rpartition(".")[0]:
                continue
            module, scales = model.get_submodule(owner), state.get(f"{name}_scale")
            if isinstance(module, (QuantLinear, QuantExperts)) and scales is not None:
                rotation = plan.of(name).rotation(tensor.shape[-1])
                weight = QuantizedTensor(tensor.view(CODE_DTYPES[module.format]), scales, module.format, rotation)
                if self._is_written_as_values(module):
                    written[name] = requantizable(weight, plan.kept)
                else:
                    written |= compressed_tensors.store(name, weight, plan.of(name))
            elif not isinstance(module, (QuantLinear, QuantExperts)) or not name.endswith("_scale"):
                written[name] = tensor.to(plan.kept) if tensor.is_floating_point() else tensor
        return written, {}

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: there is a layout that can say the precision."""
        if not self.plan.is_writable:
            warnings.warn(
                f"{self.plan.precision.name} has no layout that it could be saved in; load the original, and save "
                f"that, or load it in one of {', '.join(compressed_tensors.WRITES)}",
                stacklevel=3,
            )
        return self.plan.is_writable

    def _is_written_as_values(self, module: nn.Module) -> bool:
        """Whether a layer is a head, in int8 as always, of a model whose other layers are not."""
        return isinstance(module, QuantHead) and (self.plan.precision.name != "int8" or bool(self.plan.mixed))

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile a decode step, which it does on a GPU with a static cache."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top; the quantized weights themselves stay as they are."""
        return True


def _mark_filled(module: nn.Module) -> None:
    """Keep transformers from drawing random weights for what it has put on disk and does not find in memory."""
    for each in (module, *module.buffers(recurse=False), *module.parameters(recurse=False)):
        each._is_hf_initialized = True  # type: ignore[attr-defined]  # its own mark


def _tables(model: transformers.PreTrainedModel) -> list[nn.Module]:
    """The input embedding, and those that are tied to it: large tables of which a step reads a row."""
    embedding = model.get_input_embeddings()
    names = {name for name, module in model.named_modules() if module is embedding}
    of_weight = {f"{name}.weight" for name in names}
    for tied, to in model.all_tied_weights_keys.items():
        if to in of_weight or tied in of_weight:
            names |= {tied.removesuffix(".weight"), to.removesuffix(".weight")}
    modules = (model.get_submodule(name) for name in sorted(names))
    return [module for module in modules if isinstance(module, nn.Embedding)]


def _is_tied(model: transformers.PreTrainedModel) -> bool:
    head = output_head(model)
    return head is not None and getattr(model.get_output_embeddings(), "tied", False)


def _let_tied_head_compute(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a head that stays tied multiply in the embedding's dtype, which may be narrower than what it is given."""
    name, head = output_head(model), model.get_output_embeddings()
    if name in model.all_tied_weights_keys:
        keep_compute_dtype(head, dtype)
        head.register_forward_pre_hook(cast_to_weight)


def _quantize_tied_head(model: transformers.PreTrainedModel, plan: Plan) -> None:
    """Give a tied output head 8-bit weights of its own: the embedding is looked up, but a decode step reads all of it.

    They are in memory, also where the embedding is offloaded.
    """
    name, head = output_head(model), model.get_output_embeddings()
    if name is None or type(head) is not nn.Linear or name not in model.all_tied_weights_keys:
        return
    weight = weight_of(model, name, head.weight.detach())
    quantized = QuantHead(
        quantize_weight(
            weight, "int8", scale_dtype=plan.kept, rotation=plan.precision.of_head.rotation(weight.shape[1])
        ),
        head.bias,
    )
    quantized.tied = True
    model.set_submodule(name.removesuffix(".weight"), placed_like(quantized, head))
    model.all_tied_weights_keys = {key: to for key, to in model.all_tied_weights_keys.items() if key != name}

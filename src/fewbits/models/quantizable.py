"""Which weights of a model can be quantized, whatever modules hold them.

Letters: E experts, N output channels, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.models.experts import expert_weights
from fewbits.models.linear import QuantLinear

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of layers that choose experts, or of what holds them: a token sent to the wrong one costs more than their few
bytes."""


@dataclass(frozen=True)
class Weight:
    """A weight that can be quantized.

    Attributes:
        parameter: Its full name in the model.
        module: The module that holds it.
        kind: ``linear``: ``[N, K]``; ``conv1d``: ``[K, N]``, as in GPT-2; ``experts``: ``[E, N, K]``.
        N: Output channels.
        K: Input features.
        reason: Why it had better be kept, or None.
    """

    parameter: str
    module: str
    kind: Literal["linear", "conv1d", "experts"]
    N: int
    K: int
    reason: str | None = None

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape ``[..., K]`` in which a tensor stored as ``shape`` is quantized."""
        return shape[::-1] if self.kind == "conv1d" else shape

    def as_rows(self, tensor: Tensor) -> Tensor:
        """The stored tensor with input features last."""
        return tensor.T if self.kind == "conv1d" else tensor


def quantizable_weights(model: transformers.PreTrainedModel) -> dict[str, Weight]:
    """Every weight that a quantized layer could take, by parameter name; the output head is among them."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        if isinstance(module, Conv1D):
            K, N = module.weight.shape
            found.append(Weight(f"{name}.weight", name, "conv1d", N, K, _why_not(model, name)))
        elif isinstance(module, nn.Linear):
            N, K = module.weight.shape
            found.append(Weight(f"{name}.weight", name, "linear", N, K, _why_not(model, name)))
        for leaf, weight in expert_weights(module).items():
            found.append(Weight(f"{name}.{leaf}", name, "experts", *weight.shape[1:]))
    return {weight.parameter: weight for weight in found}


def experts_left_out(model: transformers.PreTrainedModel) -> list[str]:
    """Names of modules with fused experts that lie in a way that no quantized layer has."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        and not expert_weights(module)
        and any(True for _ in module.parameters(recurse=False))
    ]


def output_head(model: transformers.PreTrainedModel) -> str | None:
    """The name of the output head's weight, if the model has one."""
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def _why_not(model: transformers.PreTrainedModel, name: str) -> str | None:
    if any(part in _ROUTERS for part in name.split(".")[-2:]):
        return "router: it decides which experts work"
    prefix = model.base_model_prefix
    inside = not prefix or not hasattr(model, prefix) or name.startswith(f"{prefix}.")
    if not inside and f"{name}.weight" != output_head(model):
        return "task head: small, and often newly trained"
    return None

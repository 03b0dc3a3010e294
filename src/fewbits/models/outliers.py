"""Activations beyond a threshold are kept apart from the 8-bit ones and multiplied in float: LLM.int8().

    y = int8(x without outliers) Wᵀ + (outliers of x) W_dequantizedᵀ

A large activation then no longer makes the step of its token large. Which are outliers is decided for each activation
alone, so a text's result does not depend on the others in its batch.

Source: Dettmers et al., "LLM.int8()" (arXiv 2208.07339), section 3.2, where all of a feature is an outlier if one token
of the batch has one. Letters: N output channels, K input features, O features with outliers.
"""

from __future__ import annotations

import math

import transformers
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.kernels.packing import CHANNELS, GROUP
from fewbits.models.linear import QuantLinear


class OutlierLinear(QuantLinear):
    """A layer of 8-bit weights and activations that multiplies large activations in float.

    Attributes:
        threshold: The magnitude from which an activation is an outlier.
    """

    threshold: float = math.inf

    def forward(self, x: Tensor) -> Tensor:
        """Multiply what is below the threshold in 8 bits, add the rest; NaN counts as below and gives NaN."""
        large = x.abs() >= self.threshold
        features = large.flatten(0, -2).any(0).nonzero().flatten()  # [O]
        if not features.numel():
            return super().forward(x)
        values = x.float()  # rounded to the dtype of x once, when both parts are added
        apart = (values * large)[..., features] @ self._columns(features).T
        return (super().forward(values.masked_fill(large, 0)) + apart).to(x.dtype)

    def _columns(self, features: Tensor) -> Tensor:
        """The weights of some input features, float32 ``[N, O]``."""
        if self.packed:  # see kernels.packing: row 1 + k // 4 of a panel holds feature k of 32 channels
            panels = self.weight.view(*self.weight.shape[:2], CHANNELS, GROUP)
            codes = panels[:, 1 + features // GROUP, :, features % GROUP]  # [O, panels, 32]
            codes = codes.flatten(1)[:, : self.out_features].T
        else:
            codes = self.weight[:, features]
        return codes.float() * self.weight_scale.float().view(-1, 1)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the parentheses."""
        return f"{super().extra_repr()}, outliers from {self.threshold:g}"


def keep_outliers_apart(model: nn.Module | transformers.PreTrainedModel, threshold: float) -> None:
    """Let a model's layers with 8-bit weights and activations keep outliers apart; its head does better already.

    Raises:
        FewbitsError: If the threshold is not positive, or the model has no such layer that is not rotated.
    """
    if not threshold > 0:
        raise FewbitsError(f"llm_int8_threshold is {threshold}: a positive magnitude is needed; the usual is 6.0")
    layers = [
        module
        for module in model.modules()
        if type(module) is QuantLinear
        and module.format == module.activations == "int8"
        and module.weight_scale.numel() == module.out_features
        and not module.rotation
    ]
    if not layers:
        raise FewbitsError(
            f"llm_int8_threshold={threshold:g}: {type(model).__name__} has no layers of plain int8 weights and "
            "activations; load it with load_in_8bit=True, or leave the threshold out"
        )
    for layer in layers:
        layer.__class__ = OutlierLinear
        layer.threshold = threshold  # type: ignore[assignment]

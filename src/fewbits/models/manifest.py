"""The manifest: for every tensor of a model, the format it gets, its bytes, and why, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import transformers

from fewbits.errors import FewbitsError
from fewbits.models.naming import Place
from fewbits.models.precision import TORCH_DTYPES, Precision, fit_groups
from fewbits.models.quantizable import Weight, output_head, quantizable_weights


@dataclass(frozen=True)
class ManifestRow:
    """What happens to one tensor.

    Attributes:
        module: Its name without ``.weight``; the full name for a bias.
        tensor: Its full name.
        shape: Its shape.
        format: The format it gets; where layers get several precisions, the precision's name.
        nbytes: Bytes it takes: codes and scales, or values.
        reason: Why it does not get the precision that was asked for; None if it does.
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    reason: str | None


def make_manifest(
    model: transformers.PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    places: Mapping[str, Place],
    precision: Precision,
    *,
    dtype: torch.dtype,
    keep: Sequence[str] = (),
    keep_head: bool = True,
    mixed: Mapping[str, Precision] | None = None,
) -> list[ManifestRow]:
    """Decide the format of every tensor.

    Quantized are the weights of linear layers (GPT-2's ``Conv1D`` and fused experts among them), but for the output
    head, routers, task heads, and what ``keep`` names.

    Args:
        model: The model; it may be on the meta device.
        shapes: Shape of each stored tensor by name, in file order.
        places: Where each of them goes in the model.
        precision: What is asked for, its groups fitted to the model (``fitted``).
        dtype: 16- or 32-bit dtype of what is kept, and of the scales.
        keep: Patterns of module names (``*`` matches anything) that stay in ``dtype``.
        keep_head: Whether the output head stays too, as the readers of a layout expect.
        mixed: The precision of each module, where they differ; those that are not in it stay. None: all have one.

    Raises:
        FewbitsError: If a pattern matches no layer, or nothing at all would be quantized.
    """
    weights = quantizable_weights(model)
    _check_patterns(keep, [weight.module for weight in weights.values()])
    head = output_head(model) if keep_head else None
    rows = []
    for tensor, shape in shapes.items():
        owner, _, leaf = tensor.rpartition(".")
        module = owner if leaf == "weight" else tensor
        parameter = places[tensor].parameter if tensor in places else None
        weight = weights.get(parameter or "")
        others = [weights[each].module for each in places[tensor].parameters() if each in weights] if weight else []
        names = (tensor.removesuffix(".weight"), *others)
        given = precision if mixed is None or weight is None else mixed.get(weight.module)
        reason = None if precision.cast else _why_kept(model, names, parameter, weight, head, given, keep)
        if precision.cast or reason or weight is None or given is None:
            nbytes = math.prod(shape) * dtype.itemsize
            rows.append(ManifestRow(module, tensor, shape, _format_of(dtype), nbytes, reason))
        else:
            *channels, K = weight.rows(shape)
            nbytes = given.weight_bytes(math.prod(channels), K, dtype.itemsize)
            name = given.weights.name if mixed is None else given.name
            rows.append(ManifestRow(module, tensor, shape, name, nbytes, None))
    if not precision.cast and all(row.reason for row in rows):
        narrow = next((row for row in rows if row.reason and "the group size" in row.reason), None)
        raise FewbitsError(
            f"{type(model).__name__} has no linear layer to quantize to {precision.name}"
            f"{' beside what is kept' if keep else ''}{f': {narrow.module}, {narrow.reason}' if narrow else ''}; "
            f"convert it to {'int8, which has no groups,' if narrow else 'bf16'} instead"
        )
    return rows


def fitted(model: transformers.PreTrainedModel, precision: Precision) -> Precision:
    """The precision with the group size that this model's layers allow."""
    return fit_groups(precision, (weight.K for weight in quantizable_weights(model).values() if not weight.reason))


def _check_patterns(keep: Iterable[str], layers: Sequence[str]) -> None:
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in layers):
            some = ", ".join(layers[:3])
            raise FewbitsError(f"keep: the pattern {pattern!r} matches no linear layer; names look like {some}")


def _why_kept(
    model: transformers.PreTrainedModel,
    names: Sequence[str],
    parameter: str | None,
    weight: Weight | None,
    head: str | None,
    precision: Precision | None,
    keep: Sequence[str],
) -> str | None:
    if parameter is None:
        return "not part of the model's structure"
    if weight is None:
        owner, _, leaf = parameter.rpartition(".")
        return "bias" if leaf == "bias" else f"{type(model.get_submodule(owner)).__name__}, not a linear layer"
    if parameter == head:
        return "output head: readers of this layout expect 16 bits"
    pattern = next((pattern for pattern in keep if any(fnmatchcase(name, pattern) for name in names)), None)
    if pattern:
        return f"kept by {pattern!r}"
    if precision is None:
        return "no rule of the recipe names it"
    if precision.group_size is not None and weight.K % precision.group_size:
        return f"{weight.K} input features are no multiple of the group size {precision.group_size}"
    return weight.reason


def _format_of(dtype: torch.dtype) -> str:
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)

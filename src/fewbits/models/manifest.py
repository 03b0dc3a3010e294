"""The manifest: for every tensor of a model, the format it gets, its bytes, and why, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import transformers
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.models.precision import TORCH_DTYPES, Precision


@dataclass(frozen=True)
class ManifestRow:
    """What happens to one tensor.

    Attributes:
        module: Its name without ``.weight``; the full name for a bias.
        tensor: Its full name.
        shape: Its shape.
        format: The format it gets.
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
    shapes: dict[str, tuple[int, ...]],
    precision: Precision,
    *,
    dtype: torch.dtype,
    keep: Sequence[str] = (),
) -> list[ManifestRow]:
    """Decide the format of every tensor.

    Quantized are the weights of ``nn.Linear``, but for the output head and what ``keep`` names.

    Args:
        model: The model; it may be on the meta device.
        shapes: Shape of each stored tensor by name, in file order.
        precision: What is asked for.
        dtype: 16- or 32-bit dtype of what is kept, and of the scales.
        keep: Patterns of module names (``*`` matches anything) that stay in ``dtype``.

    Raises:
        FewbitsError: If a pattern matches no linear layer, or nothing at all would be quantized.
    """
    modules = dict(model.named_modules())
    _check_patterns(keep, [name for name, module in modules.items() if isinstance(module, nn.Linear)])
    head = model.get_output_embeddings()
    rows = []
    for tensor, shape in shapes.items():
        owner, _, leaf = tensor.rpartition(".")
        module = owner if leaf == "weight" else tensor
        elements = torch.Size(shape).numel()
        reason = None if precision.cast else _why_kept(owner, leaf, modules.get(owner), head, keep)
        if precision.cast or reason:
            rows.append(ManifestRow(module, tensor, shape, _format_of(dtype), elements * dtype.itemsize, reason))
        else:
            nbytes = elements * precision.weights.bits // 8 + shape[0] * dtype.itemsize
            rows.append(ManifestRow(module, tensor, shape, precision.weights.name, nbytes, None))
    if not precision.cast and all(row.reason for row in rows):
        raise FewbitsError(
            f"{type(model).__name__} has no linear layer to quantize to {precision.name}"
            f"{' beside what is kept' if keep else ''}; convert it to bf16 instead"
        )
    return rows


def _check_patterns(keep: Iterable[str], linears: Sequence[str]) -> None:
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in linears):
            some = ", ".join(linears[:3])
            raise FewbitsError(f"keep: the pattern {pattern!r} matches no linear layer; names look like {some}")


def _why_kept(owner: str, leaf: str, module: nn.Module | None, head: object, keep: Sequence[str]) -> str | None:
    if module is None:
        return "not part of the model's structure"
    if leaf != "weight" or not isinstance(module, nn.Linear):
        return "bias" if leaf == "bias" else f"{type(module).__name__}, not a linear layer"
    if module is head:
        return "output head: readers of this layout expect 16 bits"
    pattern = next((pattern for pattern in keep if fnmatchcase(owner, pattern)), None)
    return f"kept by {pattern!r}" if pattern else None


def _format_of(dtype: torch.dtype) -> str:
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)

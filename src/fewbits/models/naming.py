"""Where the tensors of a checkpoint go in a model: transformers' own renamings and conversions, looked up, not run.

A checkpoint may name a tensor in another way than the model does (with or without a prefix, by an older name), and
may hold in several tensors what the model keeps in one (each expert by itself).
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fewbits.errors import FewbitsError
from fewbits.models.quantizable import quantizable_weights


@dataclass(frozen=True)
class Place:
    """Where one stored tensor goes.

    Attributes:
        parameter: The parameter or buffer of the model, the first one if a conversion makes several of it.
        converter: The conversion that it goes through with others, or None: it is taken as it is.
        pattern: Which of the conversion's inputs it is.
    """

    parameter: str
    converter: WeightConverter | None
    pattern: str | None

    def parameters(self) -> list[str]:
        """All parameters that the stored tensor has a part in."""
        if self.converter is None:
            return [self.parameter]
        first, *others = self.converter.target_patterns
        return [self.parameter, *(self.parameter.replace(first, other) for other in others)]


def places(
    model: transformers.PreTrainedModel, names: Iterable[str], key_mapping: Mapping[str, str] | None = None
) -> dict[str, Place]:
    """The place of every stored tensor that has one in the model; the others are left out.

    Args:
        model: The model; it may be on the meta device.
        names: Names of the stored tensors.
        key_mapping: The caller's own renamings, as ``from_pretrained`` takes them.
    """
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model, key_mapping)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found = {}
    for name in names:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if parameter not in wanted and name in wanted:
            parameter, pattern = name, None
        if parameter in wanted:
            found[name] = Place(parameter, by_pattern[pattern] if pattern else None, pattern)
    return found


def check_tensors(
    model: transformers.PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    path: object,
    *,
    strict: bool = True,
    as_rows: Collection[str] = (),
    key_mapping: Mapping[str, str] | None = None,
) -> dict[str, Place]:
    """Check that a checkpoint has every tensor of a model, in the model's shape; return where each goes.

    Args:
        model: The model; it may be on the meta device. A tensor that its configuration ties to another may be absent.
        shapes: Shape of each stored tensor by name; those that the model does not have are not looked at.
        path: The checkpoint, for the message.
        strict: False lets tensors be missing outside the base model, and poolers: a task's own head is trained anew.
        as_rows: Names of those whose shapes have input features last, whatever the module's own way is.
        key_mapping: The caller's own renamings, as ``from_pretrained`` takes them.

    Raises:
        FewbitsError: If one is missing or has another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = places(model, shapes, key_mapping)
    present = {parameter for place in found.values() for parameter in place.parameters()}
    optional = _new_in_a_task(model) if not strict else lambda name: False
    missing = [
        name
        for name in wanted
        if name not in present and name not in model.all_tied_weights_keys and not optional(name)
    ]
    if not found:
        raise FewbitsError(
            f"{path}: none of its tensors is of a model of type {model.config.model_type!r}; config.json and the "
            "weights are not of the same model"
        )
    if missing:
        raise FewbitsError(
            f"{path}: {len(missing)} tensors of the model are not in the checkpoint, such as {missing[0]}; "
            "download it again"
        )
    weights = quantizable_weights(model)
    together: dict[str, dict[str, Place]] = defaultdict(dict)
    order = {name: position for position, name in enumerate(wanted)}
    for name, place in sorted(found.items(), key=lambda item: order[item[1].parameter]):
        weight = weights.get(place.parameter)
        shape = wanted[place.parameter]
        if weight is not None and name in as_rows:
            shape = weight.rows(shape)
        if place.converter is not None:
            together[place.parameter][name] = place
        elif shapes[name] != shape:
            raise _wrong_shape(path, name, shapes[name], f"the configuration wants {list(shape)}")
    for stored in together.values():
        _check_conversion(stored, shapes, wanted, path, model)
    return found


def converted(
    stored: Mapping[str, Place], read: Callable[[str], Tensor], model: transformers.PreTrainedModel
) -> dict[str, Tensor]:
    """Run the conversion that these stored tensors go through together; return what it makes, by parameter.

    Args:
        stored: All stored tensors of one conversion, by name, with their places.
        read: Gives a stored tensor.
        model: The model; it may be on the meta device.
    """
    first = next(iter(stored.values()))
    assert first.converter is not None, first
    converter = copy.deepcopy(first.converter)
    for name in sorted(stored, key=dot_natural_key):  # expert 10 comes after expert 9, wherever the file has it
        place = stored[name]
        converter.add_tensor(place.parameter, name, place.pattern, lambda name=name: read(name))
    made = converter.convert(first.parameter, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def conversion_keeps_rows(converter: WeightConverter) -> bool:
    """Whether a conversion of 2-D tensors only stacks, joins or splits rows, so that codes can go through it too."""
    stacked = 0
    for operation in converter.operations:
        if isinstance(operation, MergeModulelist) and operation.dim == 0:
            stacked = 1
        elif not (isinstance(operation, (Chunk, Concatenate)) and operation.dim in (0, stacked)):
            return False
    return True


def _check_conversion(
    stored: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    path: object,
    model: transformers.PreTrainedModel,
) -> None:
    """Check what a conversion would make, by running it on tensors that have shapes only."""
    alike: dict[str | None, list[str]] = defaultdict(list)
    for name, place in stored.items():
        alike[place.pattern].append(name)
    for names in alike.values():
        usual, _ = Counter(shapes[name] for name in names).most_common(1)[0]
        for name in names:
            if shapes[name] != usual:
                raise _wrong_shape(path, name, shapes[name], f"those beside it have {list(usual)}")
    first = next(iter(stored.values())).parameter
    parts = " and ".join(f"{len(names)} {pattern}" for pattern, names in alike.items())
    try:
        made = converted(stored, lambda name: torch.empty(shapes[name], device="meta"), model)
    except Exception as error:  # whatever the conversion stumbles over
        raise FewbitsError(f"{path}: {first} cannot be made of {parts}; download the checkpoint again") from error
    for parameter, tensor in made.items():
        if parameter in wanted and tuple(tensor.shape) != wanted[parameter]:
            raise FewbitsError(
                f"{path}: {parameter}, made of {parts}, has shape {list(tensor.shape)}, the configuration wants "
                f"{list(wanted[parameter])}; config.json and the weights are not of the same model"
            )


def _wrong_shape(path: object, name: str, shape: tuple[int, ...], wanted: str) -> FewbitsError:
    return FewbitsError(
        f"{path}: {name} has shape {list(shape)}, {wanted}; config.json and the weights are not of the same model"
    )


def _new_in_a_task(model: transformers.PreTrainedModel) -> Callable[[str], bool]:
    prefix = model.base_model_prefix
    is_base = not prefix or not hasattr(model, prefix)

    def optional(name: str) -> bool:
        return ".pooler." in f".{name}" or (not is_base and not name.startswith(f"{prefix}."))

    return optional

"""What a compressed-tensors ``quantization_config`` says about the layers of a model.

It has groups; each names its layers (``targets``: a class, a module's full name, or ``re:`` and a regular expression)
and the scheme of their weights and activations. Source: the compressed-tensors package,
``compressed_tensors/quantization/quant_config.py``, ``quant_scheme.py`` and ``quant_args.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.kernels.rotation import MOST_BLOCK
from fewbits.models.precision import PRECISIONS, Precision

FORMATS = (
    "int-quantized", "pack-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
"""The formats that are read; in all of them the names of the stored tensors tell how a weight lies."""

ROTATION = {"matrix": "hadamard", "largest_block": MOST_BLOCK}
"""What a configuration says of rotated weights: layers of K input features rotate blocks of ``block_of(K)``."""

FOLDED = "folded"
"""The key under ``rotation`` for the targets that are given rotated activations, by the weights before them. Their own
weights are plain, so that readers that do not know the key compute the same."""

_STRATEGIES = ("channel", "group", "tensor", "block")
_REGEX = "re:"
_MX_GROUP = 32


@dataclass(frozen=True)
class Scheme:
    """How the weights of some layers are quantized.

    Attributes:
        bits: Bits of a code, 8 or 4.
        type: ``int``, or ``float`` for E4M3 and, in 4 bits, for MXFP4.
        strategy: What shares a scale: ``channel``, ``group``, ``tensor`` or ``block``.
        group_size: Input features of a group.
        block: Output channels and input features of a block.
        symmetric: Whether there are no zero points.
        activations: The format that activations are quantized to, a scale per token; None: they are not, or otherwise.
        rotated: Whether the weights are rotated, if they are of a precision that gains by it.
        given_rotated: Whether activations come rotated, by the weights before.
    """

    bits: int
    type: str
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    activations: str | None
    rotated: bool = False
    given_rotated: bool = False

    @property
    def is_mxfp4(self) -> bool:
        """Whether codes are E2M1, two in a byte, and scales exponents."""
        return (self.type, self.bits) == ("float", 4)

    @property
    def precision(self) -> Precision | None:
        """The precision that codes and scales are of; None: there is none, and only the values can be taken."""
        if not self.symmetric or self.strategy == "block":
            return None
        if self.is_mxfp4:
            known = PRECISIONS["mxfp4"]
        elif self.type == "float":
            if self.strategy == "group" or self.activations != "e4m3fn":
                return None
            known = PRECISIONS["fp8"]
        elif self.bits == 8 and self.strategy != "group" and self.activations == "int8":
            known = PRECISIONS["int8"]
        else:
            known = replace(PRECISIONS["int8-weight" if self.bits == 8 else "int4"], group_size=self.group_size)
        known = replace(known, given_rotated=True) if self.given_rotated else known
        return replace(known, rotated=True) if self.rotated and known.gains_by_rotation else known


class Schemes:
    """The schemes of a checkpoint, and which layers they are for."""

    def __init__(
        self, groups: Sequence[tuple[Sequence[str], Scheme]], path: object, folded: Sequence[str] = ()
    ) -> None:
        self._groups, self._path, self._folded = groups, path, folded

    def of(self, module: str) -> Scheme:
        """The scheme of a layer whose stored tensors say that it is quantized.

        Raises:
            FewbitsError: If no target is for it, and the schemes differ.
        """
        scheme = self._of_group(module)
        return replace(scheme, given_rotated=True) if any(_names(each, module) for each in self._folded) else scheme

    def _of_group(self, module: str) -> Scheme:
        if len({scheme for _, scheme in self._groups}) == 1:
            return self._groups[0][1]
        for targets, scheme in self._groups:  # names go before classes, as in the package
            if any(_names(target, module) for target in targets):
                return scheme
        for targets, scheme in self._groups:
            if "Linear" in targets:
                return scheme
        raise FewbitsError(f"{self._path}: no group of quantization_config is for {module}; download config.json again")


def schemes_of(config: dict[str, Any], path: object) -> Schemes:
    """Read a ``quantization_config``.

    Raises:
        FewbitsError: If it says something that fewbits cannot read; the message names it.
    """
    named = repr(config.get("format"))
    if config.get("format") not in FORMATS:
        raise _refused(path, named, f"of its formats, {', '.join(FORMATS)} can")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused(path, named, "it has no config_groups")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refused(path, named, "its sparsity_config is not dense")
    if config.get("kv_cache_scheme"):
        raise _refused(path, named, "kv_cache_scheme: a quantized cache is not read")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise _refused(path, named, "transform_config: transformed weights are not read")
    rotation = config.get("rotation") or {}
    known = {key: value for key, value in rotation.items() if key != FOLDED} if isinstance(rotation, dict) else rotation
    if known not in ({}, ROTATION):
        raise _refused(path, named, f"rotation: {rotation!r} is not {ROTATION!r}")
    schemes = [_group(key, group, named, path) for key, group in groups.items()]
    rotated = [(targets, replace(scheme, rotated=bool(known))) for targets, scheme in schemes]
    return Schemes(rotated, path, _strings(rotation.get(FOLDED)))


def _group(key: str, group: Any, named: str, path: object) -> tuple[list[str], Scheme]:
    group = group if isinstance(group, dict) else {}
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise _refused(path, named, f"{key} has no weights")
    if group.get("output_activations"):
        raise _refused(path, named, f"{key}.output_activations: quantized outputs are not read")
    if isinstance(inputs, dict) and inputs.get("dynamic", False) is not True:
        raise _refused(path, named, f"{key}.input_activations: static scales of activations are not read, dynamic are")
    scheme = _scheme(weights, inputs if isinstance(inputs, dict) else None)
    kind, strategy = (scheme.type, scheme.bits), scheme.strategy
    if kind not in (("int", 8), ("int", 4), ("float", 8), ("float", 4)):
        raise _refused(path, named, f"{key}.weights: {scheme.bits}-bit {scheme.type}; int and float of 8 and 4 can")
    if strategy not in _STRATEGIES or weights.get("dynamic", False) is not False:
        raise _refused(path, named, f"{key}.weights: strategy {strategy!r}; {', '.join(_STRATEGIES)} can")
    if scheme.is_mxfp4 and ((strategy, scheme.group_size) != ("group", _MX_GROUP) or not scheme.symmetric):
        raise _refused(path, named, f"{key}.weights: 4-bit floats are read in symmetric groups of {_MX_GROUP} (MXFP4)")
    if strategy == "group" and not _is_positive(scheme.group_size):
        raise _refused(path, named, f"{key}.weights: group_size {scheme.group_size!r} is no number of input features")
    if strategy == "block" and (scheme.block is None or not all(map(_is_positive, scheme.block))):
        raise _refused(path, named, f"{key}.weights: block_structure {weights.get('block_structure')!r} is no size")
    if weights.get("actorder") in ("group", True):
        raise _refused(path, named, f"{key}.weights: actorder 'group' reorders input features")
    return _strings(group.get("targets")), scheme


def _scheme(weights: dict[str, Any], inputs: dict[str, Any] | None) -> Scheme:
    kind = str(weights.get("type", "int"))
    group_size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    activations = None
    if inputs is not None and (inputs.get("num_bits", 8), inputs.get("strategy")) == (8, "token"):
        as_weights = inputs.get("type", "int") == kind and inputs.get("symmetric", True)
        activations = {"int": "int8", "float": "e4m3fn"}.get(kind) if as_weights else None
    return Scheme(
        bits=weights.get("num_bits", 8),
        type=kind,
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
        block=tuple(block) if strategy == "block" and isinstance(block, list) and len(block) == 2 else None,
        symmetric=weights.get("symmetric", True) is True,
        activations=activations,
    )


def _strings(values: object) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _names(target: str, module: str) -> bool:
    """Whether a target is this module's name, or an expression that matches it."""
    if not target.startswith(_REGEX):
        return target == module
    try:
        return re.match(target.removeprefix(_REGEX), module) is not None
    except re.error:
        return False


def _refused(path: object, named: str, why: str) -> FewbitsError:
    return FewbitsError(
        f"{path}: this compressed-tensors scheme ({named}) cannot be read: {why}; load it with transformers, or "
        "convert the model that it was made from"
    )

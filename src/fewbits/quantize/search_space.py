"""What the layers of a model can become, and the bytes of that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from fewbits.errors import FewbitsError
from fewbits.models.manifest import fitted
from fewbits.models.precision import Precision
from fewbits.models.source import Source
from fewbits.models.stored_dtype import nominal_dtype
from fewbits.quantize.contract import Contract
from fewbits.quantize.prepared import Prepared
from fewbits.quantize.to_folder import FolderConversion

_HEADER_BYTES = 400  # of one tensor in the file's header, at most three entries


@dataclass(frozen=True)
class SearchSpace:
    """What layers can become, and the bytes of that.

    Attributes:
        prepared: The model.
        precisions: By name, groups fitted.
        nbytes: The bytes of each layer in each precision that it can have, by the layer's name.
        weights: How many weights each of these layers has.
        fixed: The bytes of all else.
    """

    prepared: Prepared
    precisions: Mapping[str, Precision]
    nbytes: Mapping[str, Mapping[str, int]]
    weights: Mapping[str, int]
    fixed: int

    @classmethod
    def of(cls, source: Source, allowed: Sequence[Precision], job: FolderConversion) -> Self:
        """Look at a model.

        Raises:
            FewbitsError: If it has fused experts, or no layer to quantize.
        """
        prepared = Prepared.of(source, nominal_dtype(source))
        if any(weight.kind == "experts" for weight in prepared.weights.values()):
            raise FewbitsError(
                f"{type(prepared.model).__name__} has fused experts, which are not searched; give a recipe, as "
                "{'*.experts*': 'int4', '*': 'int8'}"
            )
        rotated = [replace(each, rotated=job.rotate and each.gains_by_rotation) for each in allowed]
        precisions = {each.name: fitted(prepared.model, each) for each in rotated}
        nbytes: dict[str, dict[str, int]] = {}
        weights: dict[str, int] = {}
        fixed: dict[str, int] = {}
        for name, precision in precisions.items():
            for row in prepared.manifest(precision, job.keep):
                if row.reason is None:
                    layer = prepared.weights[row.tensor].module
                    sizes = nbytes.setdefault(layer, {})
                    sizes[name] = sizes.get(name, 0) + row.nbytes
                    weights[row.tensor] = math.prod(row.shape)
                else:
                    fixed[row.tensor] = row.nbytes
        of_layer: dict[str, int] = {}
        for tensor, count in weights.items():
            layer = prepared.weights[tensor].module
            of_layer[layer] = of_layer.get(layer, 0) + count
        rest = sum(size for tensor, size in fixed.items() if tensor not in weights)
        return cls(prepared, precisions, nbytes, of_layer, rest + _HEADER_BYTES * len(prepared.shapes))

    def can(self, layer: str, precision: str) -> bool:
        """Whether a layer can have a precision."""
        return precision in self.nbytes.get(layer, {})

    def size(self, layers: Sequence[str], precision: str) -> int:
        """The bytes of layers in a precision that all of them can have."""
        return sum(self.nbytes[layer][precision] for layer in layers)

    def refuse_small(self, contract: Contract) -> None:
        """Refuse a size that no choice fits into, before any work."""
        least = self.fixed + sum(min(sizes.values()) for sizes in self.nbytes.values())
        if contract.max_bytes is not None and least > contract.max_bytes:
            raise FewbitsError(
                f"max_size is {contract.max_bytes:,} bytes, and the least that {', '.join(self.precisions)} allow is "
                f"{least:,}, of which {self.fixed:,} are not quantized; allow more, or other precisions with --to"
            )

"""What the layers of a block are given on some text: the second moments of their inputs, summed up.

Letters: T tokens, H hidden features, K input features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fewbits.quantize.blocks import Blocks


def run_block(blocks: Blocks, block: nn.Module, layers: Iterable[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run all windows through a block.

    Args:
        blocks: The stack; its ``inputs`` are what the block is given.
        block: The block, filled.
        layers: Names of its layers within it.

    Returns:
        Σ x xᵀ ``[K, K]`` of each layer by name, one tensor for those with one input; and what the block makes of each
        window, ``[1, T, H]``.
    """
    sums: dict[str, Tensor] = {}
    last: list[tuple[Tensor, Tensor]] = []

    def add(name: str, x: Tensor) -> None:
        if not last or last[0][0] is not x:
            rows = x.reshape(-1, x.shape[-1]).float()
            last[:] = [(x, rows.T @ rows)]
        product = last[0][1]
        sums[name] = sums[name] + product if name in sums else product

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name in layers
    ]
    outputs = []
    try:
        for x in blocks.inputs:
            outputs.append(blocks.through(block, x))
            last.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return sums, outputs

"""Several processes that train one model: what they agree on before a step, so that all skip it or none does.

    one process   nothing to agree on
    DDP           after the backward pass all have the same gradients: the worst of each is taken, should they differ
    FSDP2         each has a shard of every gradient: counts and squares are added; along the dimensions of a mesh that
                  hold copies (HSDP) the worst is taken

Two small all-reduces a step and dimension, of four numbers a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fewbits.errors import FewbitsError
from fewbits.train.gradients import Culprit, Reading, reading_of
from fewbits.train.recipe import Recipe
from fewbits.train.shards import is_sharded, shard_dimensions

LOSS = "loss"


class Ranks:
    """The processes of a run.

    Args:
        model: As it is trained: the DDP module, or one that ``fully_shard`` was called on.
        parameters: Of the optimizer, by name; the same on all processes.
        recipe: Only one with float32 masters works on several processes.
        linear: Names of the linear layers: delayed scaling has a history for each.

    Raises:
        FewbitsError: Another kind of wrapper, masters that are not float32, parameters on different meshes.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], recipe: Recipe, linear: Iterable[str]
    ) -> None:
        self._names = [*parameters, LOSS]
        delayed = linear if recipe.scaling == "delayed" else ()
        self._amaxes = [f"{name} {kind}" for name in delayed for kind in ("weight", "activation", "gradient")]
        self._device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        self._groups: list[tuple[Any, Tensor]] = []  # process group; bool [P + 1]: whose counts are added over it
        self.sharded = any(is_sharded(param) for param in parameters.values())
        _refuse_other_wrappers(model)
        if self.sharded:
            self._groups = _mesh_groups(parameters)
        elif is_ddp(model):
            only_the_loss = torch.tensor([*[False] * len(parameters), True])
            self._groups = [(model.process_group, only_the_loss)]
        if self._groups and recipe.master != "fp32":
            raise FewbitsError(
                f"recipe {recipe.name}: master={recipe.master!r} keeps weights in bf16, and PyTorch's "
                f"{'FSDP2' if self.sharded else 'DDP'} would add up their gradients in bf16 too; on several processes "
                "take master='fp32', which is sharded by fully_shard"
            )

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return not self._groups

    def agree(self, names: list[str], stats: Tensor, losses: list[Culprit]) -> tuple[Reading, tuple[Culprit, ...]]:
        """What all processes together have: equal on all of them.

        Args:
            names: Of the parameters with gradients here.
            stats: Float64 ``[len(names), 4]``: Inf, NaN, largest finite magnitude, sum of squares.
            losses: Those here that are not finite.

        Returns:
            Of the gradients; and one culprit for all losses, if any was not finite.
        """
        places = {name: place for place, name in enumerate(self._names)}
        table = torch.zeros(len(self._names), 4, dtype=torch.float64)
        table[[places[name] for name in names]] = stats.cpu()
        for loss in losses:
            table[-1, :2] += torch.tensor([loss.infinite, loss.nan])
        table[:, 3].masked_fill_(table[:, :2].sum(1) > 0, 0)  # all-reduce may lose a NaN; the counts tell
        for group, added in self._groups:
            sums = self._reduced(table, distributed.ReduceOp.SUM, group)
            table = self._reduced(table, distributed.ReduceOp.MAX, group)
            for column in (0, 1, 3):
                table[added, column] = sums[added, column]
        table[:-1, 3].masked_fill_(table[:-1, 0] > 0, torch.inf).masked_fill_(table[:-1, 1] > 0, torch.nan)
        infinite, nan = int(table[-1, 0]), int(table[-1, 1])
        bad = (Culprit(LOSS, infinite, nan),) if infinite or nan else ()
        return reading_of(self._names[:-1], table[:-1]), bad

    def largest(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The largest of each finite number over all processes; one that is missing here is another process's."""
        if not self._amaxes:
            return values
        low = torch.tensor(-torch.inf, device=self._device)
        table = torch.stack([values.get(name, low).reshape(()) for name in self._amaxes])
        for group, _ in self._groups:
            table = self._reduced(table, distributed.ReduceOp.MAX, group)
        return {name: value for name, value in zip(self._amaxes, table, strict=True) if value > -torch.inf}

    def _reduced(self, values: Tensor, how: Any, group: Any) -> Tensor:
        there = values.to(self._device, copy=True)  # NCCL reduces what is on its GPU
        distributed.all_reduce(there, how, group)
        return there.to(values.device)


def is_ddp(model: nn.Module) -> bool:
    """Whether a model is wrapped by DistributedDataParallel."""
    return distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: its names are the same on one process and on many."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _refuse_other_wrappers(model: nn.Module) -> None:
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise FewbitsError(
            "model: FullyShardedDataParallel keeps parameters flattened, so that recipes cannot tell layers apart; "
            "take torch.distributed.fsdp.fully_shard"
        )
    if "DataParallel" in kinds:
        raise FewbitsError(
            "model: nn.DataParallel runs copies in threads that the recipe does not reach; start a process for each "
            "device with torchrun, and take DistributedDataParallel"
        )


def _mesh_groups(parameters: dict[str, nn.Parameter]) -> list[tuple[Any, Tensor]]:
    """The groups along each dimension of the mesh, and which parameters are cut along it."""
    sharded = {name: param for name, param in parameters.items() if is_sharded(param)}
    first = next(iter(sharded))
    mesh: Any = sharded[first].device_mesh  # type: ignore[attr-defined]
    for name, param in sharded.items():
        if param.device_mesh != mesh:  # type: ignore[attr-defined]
            raise FewbitsError(
                f"{name} is sharded over {param.device_mesh}, but {first} over {mesh}: norms cannot be added up "  # type: ignore[attr-defined]
                "across meshes; call fully_shard with one mesh for the whole model"
            )
    return [
        (
            mesh.get_group(dimension),
            torch.tensor([*[dimension in shard_dimensions(param) for param in parameters.values()], True]),
        )
        for dimension in range(mesh.ndim)
    ]

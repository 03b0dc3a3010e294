"""A recipe: which layers of a model take which precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from fewbits.errors import FewbitsError
from fewbits.models.precision import Precision, precision_named


@dataclass(frozen=True)
class Recipe:
    """Rules, of which the first that names a layer counts; a layer that none names is kept in 16 or 32 bits.

    Attributes:
        rules: Patterns of module names (``*`` matches anything), and names of precisions.
    """

    rules: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, rules: Recipe | Mapping[str, str]) -> Recipe:
        """The recipe of a mapping from patterns to precisions, in its order.

        Raises:
            FewbitsError: If there is no rule, or one names a precision that is unknown or a cast.
        """
        made = rules if isinstance(rules, Recipe) else cls(tuple(rules.items()))
        if not made.rules:
            raise FewbitsError("to: a recipe without rules quantizes nothing; give it one, such as {'*': 'int8'}")
        for pattern, name in made.rules:
            if precision_named(name).cast:
                raise FewbitsError(
                    f"to: {name} for {pattern!r} is a cast, of a whole model; leave the rule out, and the layers stay "
                    "as they are"
                )
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """The precisions in the order of the rules, each once."""
        return tuple(dict.fromkeys(name for _, name in self.rules))

    def __str__(self) -> str:
        """What listings say of a model of this recipe."""
        return "+".join(self.names)

    def precisions(self, *, rotated: bool) -> dict[str, Precision]:
        """The precisions by name; those that gain by rotation have it if it is asked for."""
        named = {name: precision_named(name) for name in self.names}
        return {name: replace(each, rotated=rotated and each.gains_by_rotation) for name, each in named.items()}

    def resolved(self, modules: Iterable[str], precisions: Mapping[str, Precision]) -> dict[str, Precision]:
        """The precision of every module that a rule names.

        Args:
            modules: Names of the layers that can be quantized.
            precisions: The precisions by name, groups fitted.

        Raises:
            FewbitsError: If a rule names no layer, or only such as an earlier one has.
        """
        modules = list(modules)
        found: dict[str, str] = {}
        for pattern, name in self.rules:
            named = [module for module in modules if fnmatchcase(module, pattern)]
            if not named:
                raise FewbitsError(
                    f"to: the pattern {pattern!r} matches no linear layer; names look like {', '.join(modules[:3])}"
                )
            new = [module for module in named if module not in found]
            if not new:
                raise FewbitsError(
                    f"to: all {len(named)} layers of the pattern {pattern!r} have a precision from rules before it; "
                    "put it in front of them, or leave it out"
                )
            found |= dict.fromkeys(new, name)
        return {module: precisions[name] for module, name in found.items()}

"""From histograms to predictions: what a format makes of the values, which loss scales work, which layers to keep.

    0        s/2                n - s/2                 max + ulp/2
    |  zero  ]     subnormal    [        normal         [  saturated        s, n: smallest subnormal, normal

Normal numbers are rounded by at most eps/2 of themselves. Below them the error is the value itself where it becomes
zero, and s/4 on average where it becomes subnormal. A layer is kept in a wider format if these errors add up to more
than eps/2 of the sum of its magnitudes, or if a value is beyond the range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from fewbits.formats import Format, exact
from fewbits.train.exponents import Histogram
from fewbits.train.preflight_names import Key
from fewbits.train.preflight_observers import Record
from fewbits.train.recipe import LossScaling, is_eight_bit

OPERANDS = ("weight", "activation", "gradient")
SCALED = ("gradient", "weight_gradient", "input_gradient")
"""The kinds that the loss scale multiplies."""


@dataclass(frozen=True)
class Zones:
    """Where a format's rounding to nearest even changes its ways: magnitudes.

    Attributes:
        zero_to: Up to this, and at it, values become zero.
        normal_from: From this on they become normal numbers.
        over_from: From this on they are Inf; where the format saturates, only beyond it.
    """

    zero_to: float
    normal_from: float
    over_from: float

    @classmethod
    @cache
    def of(cls, fmt: Format) -> Zones:
        """Those of a float format."""
        half = fmt.smallest_subnormal / 2
        return cls(half, float(fmt.smallest_normal - half), float(fmt.max + exact.ulp(fmt.max, fmt) / 2))


@dataclass(frozen=True)
class Fractions:
    """Shares of all values, 0 to 1, that a format changes; and what is lost.

    Attributes:
        zeroed: Those that become zero and are not.
        subnormal: Those that become subnormal numbers.
        saturated: Finite ones that are beyond the range.
        lost: The errors of those two, zeroed and subnormal, as a part of the sum of all magnitudes.
    """

    zeroed: float
    subnormal: float
    saturated: float
    lost: float


def fractions(seen: Histogram, fmt: Format, scale: float) -> Fractions:
    """What a format makes of values times a scale, a power of two."""
    zones, total = Zones.of(fmt), max(seen.values, 1)
    zeroed, small = seen.below(zones.zero_to / scale, inclusive=True), seen.below(zones.normal_from / scale)
    over = (
        0.0
        if seen.counts.largest * scale < zones.over_from
        else seen.finite - seen.below(zones.over_from / scale, inclusive=is_eight_bit(fmt))
    )
    return Fractions(zeroed / total, (small - zeroed) / total, over / total, _lost(seen, zones, scale))


def _lost(seen: Histogram, zones: Zones, scale: float) -> float:
    if not seen.magnitude:
        return 0.0
    zero_to, normal_from = zones.zero_to / scale, zones.normal_from / scale
    subnormal = seen.below(normal_from) - seen.below(zero_to, inclusive=True)
    return (seen.magnitude_below(zero_to, inclusive=True) + subnormal * zero_to / 2) / seen.magnitude


def tolerance(fmt: Format) -> float:
    """The largest ``lost`` that is no trouble: what rounding may change of any normal number."""
    return fmt.eps / 2


@dataclass(frozen=True)
class ScaleWindow:
    """The loss scales that work, powers of two.

    Attributes:
        smallest: The smallest at which no layer loses too much below the normal numbers.
        largest: The largest at which no gradient overflows; at most the cap of the recipe.
        recommended: The largest that leaves the recipe's headroom, or ``smallest``.
        fitting: How many layers it fits, of all that have gradients.
        layers: How many layers have gradients.
    """

    smallest: float
    largest: float
    recommended: float
    fitting: int
    layers: int


def scale_window(records: dict[Key, Record], rules: LossScaling) -> ScaleWindow:
    """The scales that fit the most layers; where they are not in one piece, the piece of the largest ones.

    Scales that are not dynamic are taken as they are: the window says then whether they fit.
    """
    limits = layer_limits(records)
    powers = [2.0**k for k in range(int(math.log2(rules.floor)), int(math.log2(rules.cap)) + 1)]
    fitting = [sum(low <= scale <= high for low, high in limits.values()) for scale in powers]
    last = max(place for place, count in enumerate(fitting) if count == max(fitting))
    first = last
    while first and fitting[first - 1] == fitting[last]:
        first -= 1
    highest = min((high for low, high in limits.values() if low <= powers[last] <= high), default=powers[last])
    safe = _power_of_two_at_most(highest / rules.headroom)
    recommended = min(max(safe, powers[first]), powers[last]) if rules.dynamic else rules.initial
    return ScaleWindow(powers[first], powers[last], recommended, max(fitting), len(limits))


def layer_limits(records: dict[Key, Record]) -> dict[str, tuple[float, float]]:
    """Of each layer with gradients the smallest and the largest scale that suit it, not yet within floor and cap."""
    limits: dict[str, tuple[float, float]] = {}
    for (module, kind), record in records.items():
        if kind in SCALED:
            low, high = limits.get(module, (0.0, math.inf))
            limits[module] = (max(low, _lowest(kind, record)), min(high, _highest(record)))
    return limits


def _highest(record: Record) -> float:
    """The largest power of two that leaves every value in range."""
    largest = record.raw.counts.largest
    if is_eight_bit(record.fmt) or not largest:  # 8-bit operands have scales of their own
        return math.inf
    return _power_of_two_at_most(record.fmt.max / largest)


def _lowest(kind: str, record: Record) -> float:
    """The smallest power of two at which little enough is lost; of operands and weight gradients."""
    if kind == "input_gradient" or record.scaled is not None or not record.raw.magnitude:
        return 0.0
    allowed, zones = tolerance(record.fmt), Zones.of(record.fmt)
    scale = _WIDEST
    while scale > 1 / _WIDEST and _lost(record.raw, zones, scale / 2) <= allowed:
        scale /= 2
    return scale


_WIDEST = 2.0**40  # beyond any scale that a recipe has


def _power_of_two_at_most(value: float) -> float:
    if math.isinf(value):
        return math.inf
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


@dataclass(frozen=True)
class Kept:
    """Layers that should not take the format.

    Attributes:
        pattern: For ``Recipe.keep``; None where the matmul is no linear layer, which keep cannot name.
        modules: Their names.
        reason: In words, of the worst of them.
    """

    pattern: str | None
    modules: tuple[str, ...]
    reason: str


def trouble(kind: str, record: Record, scale: float) -> tuple[float, str] | None:
    """How bad a format is for one tensor of a layer, and why in words; None if it is not."""
    fmt, largest = record.fmt, record.raw.counts.largest
    scale = scale if kind in SCALED else 1.0
    what = kind.replace("_", " ") + "s"
    if record.scaled is None and largest * scale >= Zones.of(fmt).over_from:
        times = f" times the loss scale {scale:g}" if scale != 1 else ""
        return math.inf, f"{what} reach {largest:.3g}{times}; the largest {fmt.name} is {fmt.max:g}"
    if kind not in (*OPERANDS, "weight_gradient"):
        return None
    found = fractions(record.seen, fmt, scale)
    if found.lost <= tolerance(fmt):
        return None
    share, lost = _percent(found.zeroed), _percent(found.lost)
    return found.lost, f"{share} of its {what} become zero in {fmt.name}, and {lost} of their sum is lost"


def keep(records: dict[Key, Record], linears: set[str], scale: float) -> tuple[Kept, ...]:
    """The layers to keep in a wider format, the worst first; ``*.down`` where all layers of a name are in trouble."""
    worst: dict[str, tuple[float, str]] = {}
    for (module, kind), record in records.items():
        found = trouble(kind, record, scale)
        if found is not None and found[0] > worst.get(module, (0.0, ""))[0]:
            worst[module] = found
    patterns: dict[str, list[str]] = {}
    for module in worst:
        leaf = module.rpartition(".")[2]
        alike = [name for name in linears if name.rpartition(".")[2] == leaf]
        whole = module in linears and len(alike) > 1 and all(name in worst for name in alike)
        patterns.setdefault(f"*.{leaf}" if whole else module, []).append(module)
    rows = []
    for pattern, modules in patterns.items():
        badness, reason = max((worst[module] for module in modules), key=lambda found: found[0])
        shown = pattern if modules[0] in linears else None
        rows.append((badness, Kept(shown, tuple(modules), reason)))
    return tuple(row for _, row in sorted(rows, key=lambda item: -item[0]))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"

"""Heat maps of exponents as a PNG, drawn by matplotlib, which is the extra ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError
from fewbits.report.heat_map import Panel, intensity, module_names, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"zero": (0.78, 0.16, 0.16), "subnormal": (0.85, 0.55, 0.05), "normal": (0.13, 0.40, 0.68),
           "overflow": (0.55, 0.10, 0.55)}  # fmt: skip
_MOST_LABELS = 60


def check_png() -> None:
    """See that a PNG can be drawn, before minutes of work.

    Raises:
        FewbitsError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise FewbitsError(
            "a PNG report needs matplotlib, which is not installed: pip install 'fewbits[plot]', or name an .html file"
        ) from None


def write_png(data: dict[str, Any], path: Path) -> None:
    """Draw a preflight's JSON.

    Raises:
        FewbitsError: matplotlib is not installed.
    """
    check_png()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names, maps = module_names(data), panels(data)
    height = min(max(4.0, 0.16 * min(len(names), 2 * _MOST_LABELS) + 2.0), 24.0)
    figure = Figure(figsize=(4.2 * len(maps) + 2.5, height), layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, maps, strict=True):
        _draw(axis, panel, len(names))
    step = -(-len(names) // _MOST_LABELS)
    axes[0].set_yticks(range(0, len(names), step), names[::step], fontsize=6)
    figure.legend(
        handles=[Patch(color=colour, label=zone) for zone, colour in COLOURS.items()], loc="outside lower center",
        ncols=len(COLOURS), frameon=False, fontsize=8,
    )  # fmt: skip
    figure.suptitle(data["verdict"] if len(data["verdict"]) < 100 else data["verdict"][:97] + "…", fontsize=9)
    figure.savefig(path, format="png", dpi=130)


def _draw(axis: Axes, panel: Panel, count: int) -> None:
    cells = [[_colour(zone, share) for zone, share in zip(panel.zones, shares, strict=True)]
             if shares is not None else [_colour(zone, 0.0) for zone in panel.zones]
             for shares in panel.shares]  # fmt: skip
    first, last = panel.exponents[0], panel.exponents[-1]
    axis.imshow(cells, aspect="auto", interpolation="nearest", extent=(first, last + 1, count - 0.5, -0.5))
    for place in range(1, len(panel.zones)):
        if panel.zones[place] != panel.zones[place - 1]:
            axis.axvline(panel.exponents[place], color="0.25", linewidth=0.8)
    axis.set_title(f"{panel.title} in {panel.format}", fontsize=9)
    axis.set_xlabel("binary exponent, after scaling", fontsize=7)
    axis.tick_params(labelsize=6)


def _colour(zone: str, share: float) -> tuple[float, float, float]:
    """The zone's colour on white: a tint where there is nothing, strong where the values are."""
    strength = 0.06 + 0.94 * intensity(share)
    red, green, blue = (1 - strength * (1 - part) for part in COLOURS[zone])
    return red, green, blue

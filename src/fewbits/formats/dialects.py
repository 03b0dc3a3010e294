"""Dialects: what other software does with a number beyond a format's range, as data, and by name as a setting.

The same cast has several meanings in use: 1000 as e4m3fn is 448 on CUDA and NaN in ml_dtypes. Each row below names one
of them; `round_to(x, "e4m3fn", overflow="ml_dtypes")` follows it. `seen` says whether it was run or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fewbits.formats.rounding import Overflow

_SATURATE, _IEEE = Overflow.SATURATE, Overflow.IEEE


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What one piece of software does at the end of the range.

    Attributes:
        name: the name to pass as `overflow`.
        what: the software or specification, with its version or setting.
        overflow: the rule for all formats that `formats` does not list; a format with neither Inf nor NaN saturates.
        formats: the rule of single formats, by name.
        notes: by name of the format, what differs in another way than overflow and has no setting.
        seen: how this is known.
    """

    name: str
    what: str
    overflow: Overflow
    formats: Mapping[str, Overflow] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    seen: str

    def rule(self, name: str) -> Overflow:
        """The overflow rule for the format of this name."""
        return self.formats.get(name, self.overflow)


DIALECTS = (
    Dialect(
        name="ocp_saturate",
        what="OCP OFP8 1.0, saturation mode",
        overflow=_SATURATE,
        notes={"e8m0fnu": "rounding is left to the implementer"},
        seen="specification, as restated in ONNX and MX code",
    ),
    Dialect(
        name="ocp",
        what="OCP OFP8 1.0, non-saturation mode",
        overflow=_IEEE,
        notes={"e8m0fnu": "rounding is left to the implementer"},
        seen="specification, as restated in ONNX and MX code",
    ),
    Dialect(
        name="torch",
        what="torch 2.12 and later, CPU",
        overflow=_IEEE,
        formats={"e4m3fn": _SATURATE},
        notes={
            "e8m0fnu": "the sign is ignored: -3 becomes 4",
            "e5m2": "NaN is 0x7F",
            "bf16": "NaN depends on the path",
        },
        seen="run, torch 2.13.0",
    ),
    Dialect(
        name="torch_2_11",
        what="torch up to 2.11, CPU",
        overflow=_IEEE,
        notes=dict.fromkeys(("e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu"), "not verified"),
        seen="pytorch/pytorch#178817",
    ),
    Dialect(
        name="ml_dtypes",
        what="ml_dtypes 0.6, and with it JAX and numpy",
        overflow=_IEEE,
        notes={
            "e8m0fnu": "0 and negative numbers become NaN",
            **dict.fromkeys(("e2m1fn", "e2m3fn", "e3m2fn"), "NaN becomes -0"),
        },
        seen="run, ml_dtypes 0.6.0",
    ),
    Dialect(
        name="onnx_saturate",
        what="ONNX Cast, saturate=1 (the default)",
        overflow=_SATURATE,
        notes=dict.fromkeys(("e4m3fnuz", "e5m2fnuz"), "the documentation says that Inf becomes NaN")
        | {"e8m0fnu": "round_mode chooses up, down or nearest"},
        seen="reference implementation, onnx 1.23, read",
    ),
    Dialect(
        name="onnx",
        what="ONNX Cast, saturate=0",
        overflow=_IEEE,
        notes={"e8m0fnu": "round_mode chooses up, down or nearest"},
        seen="reference implementation, onnx 1.23, read",
    ),
    Dialect(
        name="cuda",
        what="CUDA __nv_fp8 constructors, PTX cvt.satfinite, Triton",
        overflow=_SATURATE,
        formats={"fp16": _IEEE, "bf16": _IEEE, "tf32": _IEEE},
        notes={"e8m0fnu": "rounds toward zero or up only", "tf32": "cvt.rna: ties away from zero"},
        seen="headers and documentation, read",
    ),
)

BY_NAME: Mapping[str, Dialect] = {dialect.name: dialect for dialect in DIALECTS}

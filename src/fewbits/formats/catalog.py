"""The formats that have a name of their own: one row each, with the section of its specification."""

from __future__ import annotations

from difflib import get_close_matches

from fewbits.errors import FewbitsError
from fewbits.formats.format import Format, Kind, Specials

_IEEE_754 = "IEEE 754-2019, section 3.6, table 3.5"
_OFP8 = "OCP OFP8 1.0, section 5; arXiv 2209.05433, table 1"

_ROWS = (
    Format(
        name="fp64",
        exponent_bits=11,
        mantissa_bits=52,
        bias=1023,
        specials=Specials.IEEE,
        use="reference results; no tensor-core speed",
        section=_IEEE_754,
        aliases=("float64", "double", "f64", "binary64"),
    ),
    Format(
        name="fp32",
        exponent_bits=8,
        mantissa_bits=23,
        bias=127,
        specials=Specials.IEEE,
        use="master weights, losses, sums, optimizer state",
        section=_IEEE_754,
        aliases=("float32", "single", "float", "f32", "binary32"),
    ),
    Format(
        name="tf32",
        exponent_bits=8,
        mantissa_bits=10,
        bias=127,
        specials=Specials.IEEE,
        storage_bits=32,
        use="how NVIDIA tensor cores read fp32: its range, fp16's precision",
        section="NVIDIA PTX ISA, section cvt (.tf32)",
        aliases=("tensorfloat32", "e8m10"),
    ),
    Format(
        name="fp16",
        exponent_bits=5,
        mantissa_bits=10,
        bias=15,
        specials=Specials.IEEE,
        use="weights and activations; training with loss scaling",
        section=_IEEE_754,
        aliases=("float16", "half", "f16", "binary16", "e5m10"),
    ),
    Format(
        name="bf16",
        exponent_bits=8,
        mantissa_bits=7,
        bias=127,
        specials=Specials.IEEE,
        use="weights and activations; training without loss scaling",
        section="Intel bfloat16 hardware numerics definition (338302), section 2",
        aliases=("bfloat16", "bfloat", "e8m7"),
    ),
    Format(
        name="e4m3fn",
        exponent_bits=4,
        mantissa_bits=3,
        bias=7,
        specials=Specials.FN,
        use="8-bit weights and activations; FP8 training, forward",
        section=_OFP8,
        aliases=("fp8", "fp8_e4m3", "fp8_e4m3fn", "float8_e4m3fn"),
    ),
    Format(
        name="e5m2",
        exponent_bits=5,
        mantissa_bits=2,
        bias=15,
        specials=Specials.IEEE,
        use="8-bit gradients: fp16's range, a quarter of its bits of precision",
        section=_OFP8,
        aliases=("fp8_e5m2", "float8_e5m2"),
    ),
    Format(
        name="int8",
        kind=Kind.INTEGER,
        mantissa_bits=7,
        use="weights and activations of 8-bit inference, with a scale",
        section="two's complement; ISO C23, section 6.2.6.2",
        aliases=("i8", "s8"),
    ),
)

_BY_NAME = {row.name: row for row in _ROWS}
_BY_ALIAS = {alias: row for row in _ROWS for alias in (row.name, *row.aliases)}


def names() -> tuple[str, ...]:
    """The name of every format of the catalog, in its order; aliases are left out."""
    return tuple(_BY_NAME)


def find(name: str) -> Format:
    """The format of this name or alias, in any case; a leading `torch.` is ignored.

    Raises:
        FewbitsError: no such format; the message suggests the nearest name.
    """
    wanted = str(name).strip().lower().removeprefix("torch.")
    if wanted in _BY_ALIAS:
        return _BY_ALIAS[wanted]
    near = get_close_matches(wanted, _BY_ALIAS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FewbitsError(f"unknown format {str(name)!r}: {hint}`fewbits formats` lists them")

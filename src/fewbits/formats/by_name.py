"""Formats that need no row: `e5m3`, `e3m3fn`, `e4m3b11fnuz`, read from the name alone."""

from __future__ import annotations

import re
from functools import cache

from fewbits.errors import FewbitsError
from fewbits.formats.format import Format, Specials

_NAME = re.compile(r"e(\d{1,2})m(\d{1,2})(?:b(\d{1,4}))?(fnuz|fn)?")
_MOST_BITS = 16


@cache
def parse(name: str) -> Format | None:
    """The format that an `eXmY` name spells out; None if the name is not of that shape.

    `e` and `m` give the exponent and mantissa bits; a sign bit comes in addition. The rest has defaults:

    | name        | bias         | Inf and NaN                                                                   |
    |-------------|--------------|-------------------------------------------------------------------------------|
    | `eXmY`      | 2^(X-1) - 1  | as IEEE 754: exponent all ones                                                |
    | `eXmYfn`    | 2^(X-1) - 1  | no Inf; NaN is the code of all ones, but up to 6 bits no NaN either, as in MX |
    | `eXmYfnuz`  | 2^(X-1)      | no Inf, no -0; NaN in the place of -0                                         |
    | `eXmYbN...` | N            | as without bN                                                                 |

    Raises:
        FewbitsError: more than 16 bits, an exponent or a range that a double cannot hold, or an IEEE-like name with
            too few bits for normal numbers and NaN.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    exponent_bits, mantissa_bits, suffix = int(match[1]), int(match[2]), match[4] or ""
    bits = 1 + exponent_bits + mantissa_bits
    if bits > _MOST_BITS:
        raise FewbitsError(f"format {name!r} has {bits} bits: eXmY names reach to {_MOST_BITS}, sign included")
    if exponent_bits < 1:
        raise FewbitsError(f"format {name!r} has no exponent: use an integer format such as int8")
    if not suffix and (exponent_bits < 2 or mantissa_bits < 1):
        raise FewbitsError(f"format {name!r} is too narrow for Inf and NaN: use {name}fn, which is finite")
    default_bias = (1 << (exponent_bits - 1)) - (suffix != "fnuz")
    bias = default_bias if match[3] is None else int(match[3])
    specials = {"": Specials.IEEE, "fnuz": Specials.FNUZ}.get(suffix, Specials.FN if bits > 6 else Specials.FINITE)
    top = (1 << exponent_bits) - 1 - (specials is Specials.IEEE) - bias
    if bias > 1023 or top > 1023:
        raise FewbitsError(f"format {name!r} exceeds the range of a double: take fewer exponent bits or another bias")
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        specials=specials,
        use="read from its name",
        section="fewbits.formats.by_name",
    )

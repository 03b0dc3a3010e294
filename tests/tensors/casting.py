"""Inputs that break casts, and the exact judge applied to a whole tensor."""

import math
from functools import cache
from itertools import pairwise

import torch

from fewbits.formats import Format, Kind, Rounding, exact, names

DIRECTED = [r for r in Rounding if r is not Rounding.STOCHASTIC]
ELEMENTS = [n for n in names() if Format.named(n).block is None]
UP_TO_8_BITS = [n for n in ELEMENTS if Format.named(n).bits <= 8]
SPECIALS = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324, 1.7e308, -1.7e308, 2.0**-1022, 1e-310]


@cache
def finite_values(name):
    """The finite values of a format, ascending; of a wide one, those about its edges and a sample of the rest."""
    fmt = Format.named(name).element
    if fmt.kind is Kind.CODEBOOK:
        return list(fmt.codebook)
    top = fmt.max_code + (fmt.twos_complement and not fmt.narrow)
    codes = range(top + 1)
    if fmt.bits > 10:
        step, m = max(top // 40, 1), 1 << fmt.mantissa_bits
        edges = [base + d for base in (0, m, 2 * m, top // 2, top - m, top) for d in range(-3, 4)]
        samples = [code + d for code in range(0, top, step) for d in (0, 1)]
        codes = sorted({code for code in (*edges, *samples) if 0 <= code <= top})
    magnitudes = [float(fmt.magnitude(code)) for code in codes]
    return sorted({*magnitudes, *(-value for value in magnitudes)})


@cache
def adversarial(name, dtype=torch.float64):
    """Every value, every tie, a hair to either side of both, and beyond the range; all exact in `dtype`."""
    values = finite_values(name)
    beyond = [edge * f for edge in (values[0], values[-1]) for f in (1.01, 1.06, 1.07, 1.125, 1.25, 1.5, 2, 3, 2.0**9)]
    ties = [(a + b) / 2 for a, b in pairwise([2 * values[0] - values[1], *values, 2 * values[-1] - values[-2]])]
    points = torch.tensor([*values, *ties, *beyond, *SPECIALS], dtype=torch.float64).to(dtype)
    up, down = (torch.nextafter(points, torch.tensor(t * math.inf, dtype=dtype)) for t in (1.0, -1.0))
    return torch.cat([points, up, down, points + points.abs() * 0.01]).unique()


def judged(x, name, rounding="nearest_even", overflow=None, random=None):
    """The codes that exact arithmetic gives to each element of `x`."""
    fmt = Format.named(name)
    words = [None] * x.numel() if random is None else random.flatten().tolist()
    pairs = zip(x.double().flatten().tolist(), words, strict=True)
    return torch.tensor([exact.encode(v, fmt, rounding, overflow, w) for v, w in pairs]).reshape(x.shape)


def bits_of(x):
    """The bits of a float tensor, so that -0 and 0 differ and NaNs compare."""
    return torch.where(x.isnan(), torch.nan, x).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.dtype.itemsize])

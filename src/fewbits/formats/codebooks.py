"""Codebooks, computed: the values of NF4 from the normal distribution that they are the quantiles of."""

from __future__ import annotations

import struct
from statistics import NormalDist


def normal_float(bits: int) -> tuple[float, ...]:
    """NormalFloat: values that split a normal distribution into parts of equal probability, scaled to [-1, 1].

    Half of the codes are negative; of the others one is 0 and the rest positive. The outermost quantile is the mean
    of the two that would leave half a part beyond the end of either side:

        NF4: negative side 1 - 1/(2·15), positive side 1 - 1/(2·16), mean 0.96770833

    QLoRA, arXiv 2305.14314, section 3 and appendix E. Its published values are float32 and were computed from that
    probability typed with 7 digits, 0.9677083, in float32 steps; the same rounding here gives the same 16 values.

    Args:
        bits: width of a code; 4 for NF4.

    Returns:
        2^bits values in float32 precision, ascending, -1 first, 1 last, 0 among them.
    """
    codes = 1 << bits
    outermost = round((2 - 1 / (2 * (codes - 1)) - 1 / (2 * codes)) / 2, 7)
    half = codes // 2
    positive = [_quantile(p) for p in _linspace(outermost, 0.5, half + 1)[:-1]]
    negative = [-_quantile(p) for p in _linspace(outermost, 0.5, half)[:-1]]
    largest = positive[0]
    return tuple(sorted(_float32(value / largest) for value in (*negative, 0.0, *positive)))


def _quantile(probability: float) -> float:
    return _float32(NormalDist().inv_cdf(probability))


def _linspace(start: float, stop: float, count: int) -> list[float]:
    """`torch.linspace` in float32: counted up from the start in the first half, down from the stop in the second."""
    start, stop = _float32(start), _float32(stop)
    step = _float32(_float32(stop - start) / (count - 1))
    low = [_float32(start + step * i) for i in range(count // 2)]
    high = [_float32(stop - step * i) for i in reversed(range(count - count // 2))]
    return low + high


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])

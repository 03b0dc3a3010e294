"""A weight in few bits: codes, and scales that each serve an output channel or a group of its input features.

Letters: N output channels, K input features, G scales per channel (1, or K / group size).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels import weight as kernel
from fewbits.kernels.panels import table
from fewbits.kernels.rotation import rotate
from fewbits.tensors.packing import pack_codes, unpack_codes

LARGEST_CODE = 127
"""int8 codes are symmetric: −128 is left out, so that a weight and its negative have the same magnitude of code."""

_DIVISOR = {"int8": float(LARGEST_CODE), "int4": 7.5, "e4m3fn": 448.0, "nf4": 1.0, "e2m1fn": 4.0}
"""What the largest magnitude of a channel or group is divided by, which gives the scale.

int4 has the codes −8…7: with 7.5 the largest weight, of either sign, is half a step from the nearest code, and no
other weight is farther; with 7 every step would be larger. e2m1fn has its quotient rounded down to a power of two: the
largest weight becomes 4 or more, and what is beyond 6 saturates (OCP MX 1.0, section 6.3)."""

_POWERS_OF_TWO = frozenset({"e2m1fn"})
_LEAST_EXPONENT = -126  # of a normal bfloat16: a scale that is flushed to zero would make NaN
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23  # of float32

_CODE_RANGE = {"int8": (-LARGEST_CODE, LARGEST_CODE), "int4": (-8, 7)}

CODE_DTYPES = {
    "int8": torch.int8, "int4": torch.uint8, "e4m3fn": torch.float8_e4m3fn, "nf4": torch.uint8, "e2m1fn": torch.uint8,
}  # fmt: skip
"""How the codes of a format lie in memory. Formats of 4 bits have two codes in a byte, see ``tensors.packing``."""

_ROWS_AT_A_TIME = 2**22  # elements: a large weight is quantized in pieces, so that scratch memory stays small


@dataclass(frozen=True)
class QuantizedTensor:
    """``weight ≈ value(codes) · scales``; if it is rotated, that is the weight times an orthogonal matrix.

    Attributes:
        codes: ``[N, K]``: int8 −127…127, or float8_e4m3fn; for 4 bits uint8 ``[N, K/2]``.
        scales: float ``[N, G]``, positive. A stack of weights has more leading dimensions in both.
        format: ``int8``, ``int4``, ``e4m3fn``, ``nf4`` or ``e2m1fn``.
        rotation: Block of input features that were rotated before (``kernels.rotation``); 0: none.
    """

    codes: Tensor
    scales: Tensor
    format: str = "int8"
    rotation: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, K)``, or ``(E, N, K)`` for a stack of E weights."""
        *rows, bytes_or_codes = self.codes.shape
        return *rows, bytes_or_codes * (2 if is_packed(self.format) else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 ``[N, K]``."""
        *rows, K = self.shape
        G = self.scales.shape[-1]
        grouped = values_of(self.codes, self.format).view(*rows, G, K // G)
        values = (grouped * self.scales.float()[..., None]).view(*rows, K)
        return rotate(values, self.rotation) if self.rotation else values

    def view(self, *rows: int) -> QuantizedTensor:
        """The same codes and scales with other leading dimensions, ``[*rows, K]``."""
        codes, scales = (tensor.reshape(*rows, tensor.shape[-1]) for tensor in (self.codes, self.scales))
        return QuantizedTensor(codes, scales, self.format, self.rotation)


def is_packed(format_name: str) -> bool:
    """Whether two codes of a format lie in a byte."""
    return Format.named(format_name).bits <= 4


def has_power_scales(format_name: str) -> bool:
    """Whether the scales of a format are powers of two. They are kept in bfloat16, which has them all."""
    return format_name in _POWERS_OF_TWO


def scale_dtype_of(format_name: str, wanted: torch.dtype) -> torch.dtype:
    """The dtype that scales have where ``wanted`` is asked for."""
    return torch.bfloat16 if has_power_scales(format_name) else wanted


def values_of(codes: Tensor, format_name: str) -> Tensor:
    """What codes stand for before scaling, float32; of packed codes, two for each byte."""
    if not is_packed(format_name):
        return codes.float()
    unpacked = unpack_codes(codes)
    if format_name == "int4":
        return ((unpacked ^ 8).to(torch.int8) - 8).float()  # two's complement of 4 bits
    return _numbers(format_name, codes.device)[unpacked.int()]


def _numbers(format_name: str, device: torch.device) -> Tensor:
    """The 16 values of a format of 4 bits by code, float32: of a codebook they ascend."""
    values = table(format_name)
    assert values is not None, format_name
    return torch.tensor(values, dtype=torch.float32, device=device)


def quantize_per_channel(weight: Tensor, *, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """Quantize a weight to int8, one scale per output channel: ``quantize_weight`` with its defaults."""
    return quantize_weight(weight, "int8", scale_dtype=scale_dtype)


def quantize_weight(
    weight: Tensor,
    format_name: str,
    *,
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
    rotation: int = 0,
    threads: int | None = None,
) -> QuantizedTensor:
    """Quantize a weight, each value to the nearest code (halves to even).

    ``scale = max|w| / divisor`` over an output channel or a group, rounded *up* to ``scale_dtype``, and the codes are
    made with that rounded scale: no weight is clipped by more than half a step, and what a reader dequantizes with is
    what the codes were made for. The divisor is 127 for int8, 7.5 for int4, 448 for e4m3fn and 1 for nf4. A channel of
    zeros gets the smallest normal scale and codes 0. e2m1fn has the scales of MX: max|w| / 4 rounded *down* to a power
    of two, at least 2⁻¹²⁶; with groups of 32 it is ``mxfp4``.

    Args:
        weight: float ``[N, K]``.
        format_name: ``int8``, ``int4``, ``e4m3fn``, ``nf4`` or ``e2m1fn``.
        group_size: Input features that share a scale; it divides K. None: all of a channel.
        scale_dtype: float32, bfloat16 or float16; powers of two are bfloat16 whatever is asked.
        rotation: Block of input features to rotate first; it divides K. 0: none.
        threads: How many work on it where there is a kernel; None: as many as torch uses.

    Raises:
        FewbitsError: If the weight holds NaN or Inf, a scale is beyond ``scale_dtype``, it is not a matrix, or K is
            not a multiple of the group size.
    """
    _check(weight, format_name, group_size)
    N, K = weight.shape
    G = 1 if group_size is None else K // group_size
    columns = K // 2 if is_packed(format_name) else K
    codes = torch.empty((N, columns), dtype=CODE_DTYPES[format_name], device=weight.device)
    scales = torch.empty((N, G), dtype=scale_dtype_of(format_name, scale_dtype), device=weight.device)
    if format_name in _CODE_RANGE and kernel.quantize_weight(
        weight, codes, scales, group_size=K // G, rotation=rotation, divisor=_DIVISOR[format_name],
        lowest=_CODE_RANGE[format_name][0], largest=_CODE_RANGE[format_name][1], packed=is_packed(format_name),
        threads=threads,
    ):  # fmt: skip
        return QuantizedTensor(codes, scales, format_name, rotation)
    for start, rows in _pieces(weight):
        stop = start + len(rows)
        rows = rotate(rows, rotation) if rotation else rows
        scales[start:stop] = _scales(rows.view(len(rows), G, -1), format_name, scale_dtype, start)
        steps = scales[start:stop].float().repeat_interleave(K // G, 1) if G > 1 else scales[start:stop].float()
        codes[start:stop] = encode_scaled(rows / steps, format_name)
    return QuantizedTensor(codes, scales, format_name, rotation)


def _check(weight: Tensor, format_name: str, group_size: int | None) -> None:
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise FewbitsError(
            f"weight: float [N, K] with K > 0 is needed, got {weight.dtype} {list(weight.shape)}; reshape or "
            "dequantize it"
        )
    step = group_size or (2 if is_packed(format_name) else 1)
    if weight.shape[1] % step:
        raise FewbitsError(
            f"weight: K = {weight.shape[1]} input features are no multiple of {step}, the group size; keep the layer"
        )


def _pieces(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows in float32, a few at a time, and the number of the first."""
    step = max(1, _ROWS_AT_A_TIME // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step].float()


def _scales(groups: Tensor, format_name: str, scale_dtype: torch.dtype, first_row: int) -> Tensor:
    """The scales ``[n, G]`` of rows ``[n, G, group]``."""
    amax = groups.abs().amax(2)
    if not amax.isfinite().all():
        channel = first_row + int((~amax.isfinite()).nonzero()[0, 0])
        raise FewbitsError(f"weight: NaN or Inf in output channel {channel}; repair the checkpoint or keep the layer")
    scales = step_for(amax, format_name, scale_dtype)
    if not scales.isfinite().all():
        row, group = (int(index) for index in (~scales.isfinite()).nonzero()[0])
        raise FewbitsError(
            f"weight: output channel {first_row + row} needs the scale {amax[row, group] / _DIVISOR[format_name]:.6g}, "
            f"and the largest {scale_dtype} is {torch.finfo(scale_dtype).max:.6g}; keep the layer or cast the model to "
            "bf16 first"
        )
    return scales


def encode_scaled(scaled: Tensor, format_name: str) -> Tensor:
    """The nearest codes ``[N, K]`` (packed in pairs for 4 bits) of weights that are divided by their scales already."""
    if format_name == "e4m3fn":
        return nearest_values(scaled, format_name).to(torch.float8_e4m3fn)
    if format_name == "int8":
        return nearest_values(scaled, format_name).to(torch.int8)
    if format_name == "int4":
        return pack_codes(nearest_values(scaled, format_name).to(torch.int8).view(torch.uint8) & 15)
    return pack_codes(_nearest_entries(scaled, format_name).to(torch.uint8))


def nearest_values(scaled: Tensor, format_name: str) -> Tensor:
    """The nearest values that a format has, float32; what is beyond its largest becomes that."""
    if format_name in _CODE_RANGE:
        return torch.round(scaled).clamp_(*_CODE_RANGE[format_name])
    if format_name == "e4m3fn":
        largest = _DIVISOR["e4m3fn"]
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).float()
    return _numbers(format_name, scaled.device)[_nearest_entries(scaled, format_name)]


def step_for(amax: Tensor, format_name: str, scale_dtype: torch.dtype) -> Tensor:
    """The scale of groups whose largest magnitude is ``amax``, rounded up to its dtype; or down to a power of two."""
    if has_power_scales(format_name):
        return _power_below(amax / _DIVISOR[format_name]).to(scale_dtype_of(format_name, scale_dtype))
    return _round_up(amax / _DIVISOR[format_name], scale_dtype)


def _nearest_entries(scaled: Tensor, format_name: str) -> Tensor:
    values = _numbers(format_name, scaled.device)
    if format_name == "e2m1fn":  # codes of magnitudes, and a sign
        magnitudes = torch.bucketize(scaled.abs().contiguous(), _thresholds(values[:8]))
        return magnitudes | torch.signbit(scaled).long() << 3
    return torch.bucketize(scaled.contiguous(), (values[1:] + values[:-1]) / 2)


def _thresholds(magnitudes: Tensor) -> Tensor:
    """Between neighbours; what lies on one belongs to the lower, so those whose even code is the upper are one less."""
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], middles.new_zeros(()))
    return middles


def _power_below(positive: Tensor) -> Tensor:
    """The largest power of two that is not larger, float32; at least the smallest normal one."""
    exponents = torch.frexp(positive.float())[1] - 1
    exponents = torch.where(positive > 0, exponents, _LEAST_EXPONENT).clamp_min(_LEAST_EXPONENT)
    return ((exponents + _EXPONENT_BIAS) << _MANTISSA_BITS).to(torch.int32).view(torch.float32)


def _round_up(positive: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive float32 values up to ``dtype``, at least to its smallest normal number."""
    positive = positive.clamp_min(torch.finfo(dtype).tiny)
    rounded = positive.to(dtype)
    if dtype == torch.float32:
        return rounded
    # The next larger 16-bit float is the next larger code.
    return torch.where(rounded.float() < positive, (rounded.view(torch.int16) + 1).view(dtype), rounded)

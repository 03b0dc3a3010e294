"""One number format: a frozen row of fields; everything else about it is derived here.

A code of a float format is a sign, an exponent field E and a mantissa field M, the highest bits first:

    fp16    S EEEEE MMMMMMMMMM        value = (-1)^S · 2^(E - bias) · (1 + M / 2^mantissa_bits)      E > 0, normal
            1   5       10            value = (-1)^S · 2^(1 - bias) · (    M / 2^mantissa_bits)      E = 0, subnormal

An integer is the same picture with nothing but the subnormal line, in two's complement: value = code · 2^-bias.
A codebook lists its values. A block format is the format of its elements plus a scale that a block of them shares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

from fewbits.errors import FewbitsError
from fewbits.formats.dialects import BY_NAME
from fewbits.formats.rounding import Overflow, ScaleRule


class Kind(StrEnum):
    """What the bits of a code mean."""

    FLOAT = "float"
    INTEGER = "integer"
    CODEBOOK = "codebook"


class Specials(StrEnum):
    """Which codes are Inf and NaN. The names are LLVM's suffixes where LLVM has one."""

    IEEE = "ieee"
    """Exponent all ones: Inf with mantissa 0, else NaN (IEEE 754-2019, section 3.4)."""
    FN = "fn"
    """Finite, one NaN per sign: the code of all ones; no Inf (OCP OFP8 E4M3)."""
    FNUZ = "fnuz"
    """Finite, one NaN in the place of -0; no Inf, no -0 (arXiv 2206.02915)."""
    P3109 = "p3109"
    """One NaN in the place of -0; Inf is the largest magnitude (IEEE P3109 interim report, extended domain)."""
    FINITE = "finite"
    """Every code is a finite number (OCP MX FP6 and FP4; integers; codebooks)."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The scale that a block of neighbours along the last dimension shares.

    Attributes:
        size: values that share one scale.
        scale: name of the format of the scale.
        tensor_scale: name of the format of a second scale for the whole tensor, if there is one.
    """

    size: int
    scale: str
    tensor_scale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """One number format. The fields are the row; `bits`, `max` and all other properties are derived from it.

    Attributes:
        name: the name that fewbits prints.
        kind: float, integer, or codebook.
        exponent_bits: width of the exponent field; 0 for integers and codebooks.
        mantissa_bits: width of the mantissa field without the implicit bit; of an integer, all bits but the sign;
            of a codebook, the width of the index.
        bias: what is subtracted from the exponent field; of an integer, the number of fractional bits.
        signed: whether there is a sign bit.
        specials: which codes are Inf and NaN.
        has_subnormals: False where even the exponent field 0 is an ordinary exponent: no subnormals and no zero
            (e8m0fnu).
        narrow: an integer that leaves its most negative code unused, to be symmetric (MXINT8).
        codebook: the values, ascending, of a codebook.
        storage_bits: bits in memory where that is more than `bits` (tf32: 19 bits in a 32-bit word); else 0.
        block: the shared scale of a block format; the other fields then describe one element.
        use: what it is used for, in one line.
        section: the specification and its section.
        aliases: other names, lower case.
    """

    name: str
    kind: Kind = Kind.FLOAT
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    signed: bool = True
    specials: Specials = Specials.FINITE
    has_subnormals: bool = True
    narrow: bool = False
    codebook: tuple[float, ...] = ()
    storage_bits: int = 0
    block: Block | None = None
    use: str = ""
    section: str = ""
    aliases: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str | Format) -> Format:
        """Find a format by name or alias, in any case; a `Format` is returned as it is.

        Raises:
            FewbitsError: no such format; the message suggests the nearest name.
        """
        from fewbits.formats.catalog import find  # the catalog is made of Formats, so it imports this file

        return name if isinstance(name, Format) else find(name)

    def __str__(self) -> str:
        return self.name

    # --- widths -------------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Bits of one code: sign, exponent and mantissa. The scale of a block is not counted here."""
        return int(self.signed and self.kind is not Kind.CODEBOOK) + self.exponent_bits + self.mantissa_bits

    @property
    def bits_per_value(self) -> Fraction:
        """Bits that one value takes in memory, its share of the block's scale included."""
        stored = Fraction(self.storage_bits or self.bits)
        return stored if self.block is None else stored + Fraction(self.named(self.block.scale).bits, self.block.size)

    @property
    def sign_bit(self) -> int:
        """The mask of the sign bit; codes below it are the magnitudes. 2^bits where there is no sign."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    # --- special codes ------------------------------------------------------------------------------------------

    @property
    def has_inf(self) -> bool:
        """Whether some code is Inf."""
        return self.block is None and self.inf_code is not None

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN; in a block format, whether its scale can be."""
        if self.block is not None:
            return self.named(self.block.scale).has_nan
        return self.specials in (Specials.FN, Specials.FNUZ, Specials.P3109) or (
            self.specials is Specials.IEEE and self.mantissa_bits > 0
        )

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 has a code of its own."""
        return self.kind is Kind.FLOAT and self.signed and self.specials not in (Specials.FNUZ, Specials.P3109)

    @property
    def twos_complement(self) -> bool:
        """Whether negative codes are two's complement rather than sign and magnitude."""
        return self.kind is Kind.INTEGER and self.signed

    @property
    def inf_code(self) -> int | None:
        """The code of +Inf, None where there is none; -Inf has the sign bit set in addition."""
        if self.specials is Specials.IEEE:
            return self.sign_bit - (1 << self.mantissa_bits)
        return self.sign_bit - 1 if self.specials is Specials.P3109 else None

    @property
    def nan_code(self) -> int:
        """The one code that every NaN becomes; sign and payload are dropped.

        With IEEE specials it is the positive quiet NaN (fp16 0x7E00), with FN all ones (0x7F), with FNUZ and P3109
        the sign bit alone (0x80). A float format without NaN has its largest value here (as PTX
        `cvt.satfinite` to FP6 and FP4 does), an integer or a codebook its zero.
        """
        if self.kind is Kind.INTEGER:
            return 0
        if self.kind is Kind.CODEBOOK:
            return self.codebook.index(0.0)
        if self.specials is Specials.IEEE and self.mantissa_bits:
            return (self.inf_code or 0) | 1 << (self.mantissa_bits - 1)
        if self.specials is Specials.FN:
            return self.sign_bit - 1
        return self.sign_bit if self.specials in (Specials.FNUZ, Specials.P3109) else self.max_code

    @property
    def max_code(self) -> int:
        """The code of the largest finite value."""
        if self.specials is Specials.FN:
            return self.sign_bit - 2
        return self.sign_bit - 1 if self.inf_code is None else self.inf_code - 1

    # --- range and precision, exact -----------------------------------------------------------------------------

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal value; of an integer, which is all subnormals, that of the sign bit."""
        if self.kind is Kind.INTEGER:
            return self.mantissa_bits - self.bias
        return (1 if self.has_subnormals else 0) - self.bias

    @property
    def element(self) -> Format:
        """The format of one element of a block, without the scale; any other format is its own element."""
        return self if self.block is None else replace(self, block=None)

    def magnitude(self, code: int) -> Fraction:
        """The value of a code without its sign, as if no code were Inf or NaN: the series of finite values goes on.

        Args:
            code: 0 to `sign_bit` - 1 for the magnitudes that exist; larger ones continue the series.
        """
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        if exponent == 0 and self.has_subnormals:
            return mantissa * _two_to(self.emin - self.mantissa_bits)
        first = 1 if self.has_subnormals else 0
        return ((1 << self.mantissa_bits) + mantissa) * _two_to(exponent - first + self.emin - self.mantissa_bits)

    @property
    def max(self) -> float:
        """The largest finite value; of a block format, with the largest scale."""
        if self.kind is Kind.CODEBOOK:
            return self.codebook[-1]
        return _plain(float(self.magnitude(self.max_code)) * self._scale_limits()[1], self)

    @property
    def min(self) -> float:
        """The least finite value: -max for floats, -128 for int8, 0 for uint8."""
        if self.kind is Kind.CODEBOOK:
            return self.codebook[0]
        if self.twos_complement and not self.narrow:
            return _plain(-float(self.magnitude(self.sign_bit)) * self._scale_limits()[1], self)
        return -self.max if self.signed else _plain(float(self.magnitude(0)), self)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive value of full precision; of integers and codebooks, the smallest positive value."""
        if self.kind is not Kind.FLOAT:
            return self.smallest_subnormal
        return 2.0**self.emin * self._scale_limits()[0]

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value; equal to `smallest_normal` where the format has no subnormals."""
        if self.kind is Kind.CODEBOOK:
            return next(level for level in self.codebook if level > 0)
        if not self.has_subnormals:
            return 2.0**self.emin
        return _plain(2.0 ** (self.emin - self.mantissa_bits) * self._scale_limits()[0], self)

    @property
    def eps(self) -> float:
        """The distance from 1 to the next larger value, and of a codebook that from 1 to the next smaller one."""
        if self.kind is Kind.CODEBOOK:
            return self.codebook[-1] - self.codebook[-2]
        return _plain(2.0**-self.bias, self) if self.kind is Kind.INTEGER else 2.0**-self.mantissa_bits

    def overflow_rule(self, overflow: str | None) -> Overflow:
        """The overflow rule to use: the one named; for None, `ieee` if the format has Inf, else `saturate`.

        A dialect (`torch`, `ml_dtypes`, `cuda`, …; see `fewbits.formats.dialects`) stands for its rule.

        Raises:
            FewbitsError: unknown rule, or `ieee` where the format has neither Inf nor NaN to overflow to.
        """
        if overflow is None:
            return Overflow.IEEE if self.has_inf else Overflow.SATURATE
        finite = self.block is not None or not (self.has_inf or self.has_nan)
        if (dialect := BY_NAME.get(overflow)) is not None:
            return Overflow.SATURATE if finite else dialect.rule(self.name)
        rule = Overflow.named(overflow, also=BY_NAME)
        if rule is Overflow.IEEE and finite:
            what = "blocks always saturate" if self.block else f"{self.name} has neither"
            raise FewbitsError(f"overflow 'ieee' needs an Inf or a NaN, and {what}: use 'saturate'")
        return rule

    def scale_rule(self, rule: str | None) -> ScaleRule:
        """The scale rule of a block format: the one named; for None, `floor` in MX and `two_level` in NVFP4.

        Raises:
            FewbitsError: unknown rule, one of the other kind of block, or the format has no blocks.
        """
        if self.block is None:
            raise FewbitsError(f"scale_rule={rule!r}: {self.name} has no shared scale; leave scale_rule out")
        nvfp4 = (ScaleRule.TWO_LEVEL, ScaleRule.ONE_LEVEL)
        allowed = nvfp4 if self.block.tensor_scale else tuple(r for r in ScaleRule if r not in nvfp4)
        chosen = allowed[0] if rule is None else ScaleRule.named(rule)
        if chosen not in allowed:
            raise FewbitsError(f"scale rule {str(rule)!r} is not for {self.name}: choose from {', '.join(allowed)}")
        return chosen

    def _scale_limits(self) -> tuple[float, float]:
        """The smallest and the largest scale of a block format; (1, 1) for any other."""
        low = high = 1.0
        if self.block is not None:
            for scale in filter(None, (self.block.scale, self.block.tensor_scale)):
                low *= self.named(scale).smallest_subnormal
                high *= self.named(scale).max
        return low, high


def _two_to(exponent: int) -> Fraction:
    """2^exponent, exact for negative exponents too."""
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def _plain(value: float, fmt: Format) -> float:
    """An integer format's values as int; they are small enough to be exact as float first."""
    return int(value) if fmt.kind is Kind.INTEGER and value.is_integer() else value

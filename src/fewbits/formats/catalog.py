"""The formats that have a name of their own: one row each, with the section of its specification."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from fewbits.errors import FewbitsError
from fewbits.formats.by_name import parse
from fewbits.formats.codebooks import normal_float
from fewbits.formats.format import Block, Format, Kind, Specials

_IEEE_754 = "IEEE 754-2019, section 3.6, table 3.5"
_OFP8 = "OCP OFP8 1.0; arXiv 2209.05433, table 1"
_FNUZ = "arXiv 2206.02915; LLVM APFloat"
_LLVM = "LLVM APFloat, IEEE-like: IEEE 754-2019, section 3.4, at this width"
_P3109 = "IEEE P3109 interim report 4 (a draft), signed extended formats"
_MX = "OCP MX 1.0, sections 5.3 (elements) and 6.3 (conversion)"
_TWOS = "two's complement; ISO C23, section 6.2.6.2"


def _float(
    name: str, sem: str, bias: int, specials: Specials, use: str, section: str, *aliases: str, storage_bits: int = 0
) -> Format:
    """A signed float row; `sem` is the width of sign, exponent and mantissa."""
    _, exponent_bits, mantissa_bits = map(int, sem.split("/"))
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        specials=specials,
        storage_bits=storage_bits,
        use=use,
        section=section,
        aliases=aliases,
    )


def _integer(name: str, mantissa_bits: int, signed: bool, use: str, *aliases: str) -> Format:
    section = _TWOS if signed else "unsigned binary; ISO C23, section 6.2.6.2"
    integer = Kind.INTEGER
    return Format(
        name=name, kind=integer, mantissa_bits=mantissa_bits, signed=signed, use=use, section=section, aliases=aliases
    )


def _block(name: str, element: Format, size: int, scale: str, use: str, section: str, *aliases: str) -> Format:
    tensor_scale = "fp32" if name == "nvfp4" else None
    block = Block(size=size, scale=scale, tensor_scale=tensor_scale)
    return replace(element, name=name, block=block, use=use, section=section, aliases=aliases)


_FP64 = _float("fp64", "1/11/52", 1023, Specials.IEEE, "reference results; no tensor-core speed", _IEEE_754,
               "float64", "double", "f64", "binary64", "e11m52")  # fmt: skip
_FP32 = _float("fp32", "1/8/23", 127, Specials.IEEE, "master weights, losses, sums, optimizer state", _IEEE_754,
               "float32", "single", "float", "f32", "binary32", "e8m23")  # fmt: skip
_TF32 = _float("tf32", "1/8/10", 127, Specials.IEEE, "how NVIDIA tensor cores read fp32: its range, fp16's precision",
               "NVIDIA PTX ISA, section cvt (.tf32)", "tensorfloat32", "e8m10", storage_bits=32)  # fmt: skip
_FP16 = _float("fp16", "1/5/10", 15, Specials.IEEE, "weights and activations; training with loss scaling", _IEEE_754,
               "float16", "half", "f16", "binary16", "e5m10")  # fmt: skip
_BF16 = _float("bf16", "1/8/7", 127, Specials.IEEE, "weights and activations; training without loss scaling",
               "Intel bfloat16 hardware numerics definition (338302-001)",
               "bfloat16", "bfloat", "e8m7")  # fmt: skip
_E4M3FN = _float("e4m3fn", "1/4/3", 7, Specials.FN, "8-bit weights and activations; FP8 training, forward", _OFP8,
                 "fp8", "fp8_e4m3", "fp8_e4m3fn", "float8_e4m3fn")  # fmt: skip
_E5M2 = _float("e5m2", "1/5/2", 15, Specials.IEEE, "8-bit gradients: fp16's range in 8 bits", _OFP8,
               "fp8_e5m2", "float8_e5m2")  # fmt: skip
_E4M3FNUZ = _float("e4m3fnuz", "1/4/3", 8, Specials.FNUZ, "e4m3fn's role on AMD MI300", _FNUZ,
                   "float8_e4m3fnuz")  # fmt: skip
_E5M2FNUZ = _float("e5m2fnuz", "1/5/2", 16, Specials.FNUZ, "e5m2's role on AMD MI300", _FNUZ,
                   "float8_e5m2fnuz")  # fmt: skip
_E4M3 = _float("e4m3", "1/4/3", 7, Specials.IEEE, "e4m3 with Inf, as studied before OCP; not what GPUs call E4M3",
               _LLVM, "float8_e4m3")  # fmt: skip
_E3M4 = _float("e3m4", "1/3/4", 3, Specials.IEEE, "8-bit weights of narrow range; AWS Trainium", _LLVM,
               "float8_e3m4")  # fmt: skip
_E8M0FNU = Format(
    name="e8m0fnu",
    exponent_bits=8,
    bias=127,
    signed=False,
    specials=Specials.FN,
    has_subnormals=False,
    use="scales of MX blocks: powers of two",
    section="OCP MX 1.0, section 5.4.1",
    aliases=("e8m0", "ue8m0", "float8_e8m0fnu"),
)
_E3M2FN = _float("e3m2fn", "1/3/2", 3, Specials.FINITE, "6-bit elements of MX blocks, more range", _MX,
                 "e3m2", "fp6_e3m2", "float6_e3m2fn")  # fmt: skip
_E2M3FN = _float("e2m3fn", "1/2/3", 1, Specials.FINITE, "6-bit elements of MX blocks, more precision", _MX,
                 "e2m3", "fp6_e2m3", "float6_e2m3fn")  # fmt: skip
_E2M1FN = _float("e2m1fn", "1/2/1", 1, Specials.FINITE, "4-bit elements of MX and NVFP4 blocks", _MX,
                 "e2m1", "fp4", "fp4_e2m1", "float4_e2m1fn", "float4_e2m1fn_x2")  # fmt: skip
_P3 = _float("binary8p3se", "1/5/2", 16, Specials.P3109, "the coming IEEE standard's e5m2", _P3109,
             "binary8p3", "p3109_p3")  # fmt: skip
_P4 = _float("binary8p4se", "1/4/3", 8, Specials.P3109, "the coming IEEE standard's e4m3", _P3109,
             "binary8p4", "p3109_p4")  # fmt: skip
_INT8 = _integer("int8", 7, True, "weights and activations of 8-bit inference, with a scale", "i8", "s8")
_NF4 = Format(
    name="nf4",
    kind=Kind.CODEBOOK,
    mantissa_bits=4,
    codebook=normal_float(4),
    use="4-bit weights, with a scale per block; QLoRA",
    section="arXiv 2305.14314, section 3",
    aliases=("normalfloat4",),
)
# MXINT8 counts in steps of 2^-6 and leaves -2 unused, so that every value has its negative.
_MXINT8 = replace(_INT8, bias=6, narrow=True)

_ROWS = (
    *(_FP64, _FP32, _TF32, _FP16, _BF16),
    *(_E4M3FN, _E5M2, _E4M3FNUZ, _E5M2FNUZ, _E4M3, _E3M4, _E8M0FNU, _P3, _P4),
    *(_E3M2FN, _E2M3FN, _E2M1FN),
    _INT8,
    _integer("uint8", 8, False, "asymmetric activations, with a scale and a zero point", "u8"),
    _integer("int4", 3, True, "4-bit weights, with a scale per group", "i4", "s4"),
    _integer("uint4", 4, False, "4-bit weights, with a scale and a zero point per group", "u4"),
    _integer("int2", 1, True, "2-bit weights, with a scale per group", "i2", "s2"),
    _NF4,
    _block("mxfp8", _E4M3FN, 32, "e8m0fnu", "8-bit weights and activations on Blackwell", _MX, "mxfp8_e4m3"),
    _block("mxfp8_e5m2", _E5M2, 32, "e8m0fnu", "8-bit gradients on Blackwell", _MX),
    _block("mxfp6_e2m3", _E2M3FN, 32, "e8m0fnu", "6-bit weights, more precision", _MX),
    _block("mxfp6_e3m2", _E3M2FN, 32, "e8m0fnu", "6-bit weights, more range", _MX),
    _block("mxfp4", _E2M1FN, 32, "e8m0fnu", "4-bit weights; gpt-oss", _MX, "mxfp4_e2m1"),
    _block("mxint8", _MXINT8, 32, "e8m0fnu", "8-bit weights and activations, fixed point", _MX),
    _block(
        "nvfp4",
        _E2M1FN,
        16,
        "e4m3fn",
        "4-bit weights and activations on Blackwell",
        "NVIDIA, Introducing NVFP4 (2025); arXiv 2509.25149, section 2",
    ),
)

_BY_NAME = {row.name: row for row in _ROWS}
_BY_ALIAS = {alias: row for row in _ROWS for alias in (row.name, *row.aliases)}


def names() -> tuple[str, ...]:
    """The name of every format of the catalog, in its order; aliases and `eXmY` names are left out."""
    return tuple(_BY_NAME)


def find(name: str) -> Format:
    """The format of this name or alias, in any case, or of an `eXmY` name; a leading `torch.` is ignored.

    Raises:
        FewbitsError: no such format; the message suggests the nearest name. An `eXmY` of impossible widths.
    """
    wanted = str(name).strip().lower().removeprefix("torch.")
    if wanted in _BY_ALIAS:
        return _BY_ALIAS[wanted]
    if (parametric := parse(wanted)) is not None:
        return parametric
    near = get_close_matches(wanted, _BY_ALIAS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FewbitsError(f"unknown format {str(name)!r}: {hint}`fewbits formats` lists them")

"""The compiled casts are bit-equal to their meaning. ``test_isa.py`` runs this file for every instruction set."""

import pytest
import torch

from fewbits import formats
from fewbits.formats import Format, Overflow, Rounding
from fewbits.kernels import cast, native
from fewbits.tensors.codes import How, to_codes, to_values
from fewbits.tensors.random import key_of, positions_of, random_words

pytestmark = pytest.mark.skipif(not native.status().loaded, reason="the compiled kernels are not loaded")

PARAMETRIC = ("e5m0fn", "e8m3fn", "e2m5", "e4m3fnuz", "e7m8", "e5m10b20")
ENCODED = [name for name in (*formats.names(), *PARAMETRIC) if cast._encodes(Format.named(name))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 7


def every_kind_of_float() -> torch.Tensor:
    """Random bit patterns, values of ordinary size, and the special ones."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32)
    sizes = torch.tensor(2.0) ** torch.randint(-30, 20, (10_000,), generator=generator)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
    return torch.cat([bits.view(torch.float32), torch.randn(10_000, generator=generator) * sizes, special])


def ties(fmt: Format) -> torch.Tensor:
    """Every value of a narrow format, the middles between neighbours, and the floats next to those."""
    values = to_values(torch.arange(1 << fmt.bits), fmt, torch.float64)
    values = values[values.isfinite()].unique()
    middles = ((values[1:] + values[:-1]) / 2).float()
    beside = [torch.nextafter(middles, torch.full_like(middles, side)) for side in (-torch.inf, torch.inf)]
    return torch.cat([values.float(), middles, *beside])


def expected_codes(x: torch.Tensor, fmt: Format, rounding: Rounding, overflow: Overflow) -> torch.Tensor:
    seed = SEED if rounding is Rounding.STOCHASTIC else None
    words = None if seed is None else random_words(seed, positions_of(0, x.numel(), x.device))
    return to_codes(x.double(), fmt, How(rounding, overflow, seed), words)[0]


def test_the_kernels_cover_what_they_should() -> None:
    assert {"fp16", "bf16", "e4m3fn", "e5m2", "e3m2fn", "e2m1fn", "int8"} <= set(ENCODED)
    assert not {"fp32", "nf4", "mxfp4", "e8m0fnu"} & set(ENCODED)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", ENCODED)
def test_encode(name: str, rounding: Rounding) -> None:
    fmt = Format.named(name)
    inputs = every_kind_of_float()
    inputs = torch.cat([inputs, ties(fmt)]) if fmt.bits <= 8 else inputs
    for overflow in Overflow:
        if overflow is Overflow.IEEE and not (fmt.has_inf or fmt.has_nan):
            continue
        for dtype in DTYPES:
            x = inputs.to(dtype)
            codes = torch.empty(x.shape, dtype=torch.uint8 if fmt.bits <= 8 else torch.uint16)
            found = cast.encode(x, fmt, rounding, overflow, key_of(SEED), codes)
            assert found is codes
            expected = expected_codes(x, fmt, rounding, overflow)
            assert torch.equal(found.to(torch.int64), expected), (overflow, dtype)


@pytest.mark.parametrize("name", [name for name in ENCODED if cast._decodes(Format.named(name))])
def test_decode_every_code(name: str) -> None:
    fmt = Format.named(name)
    codes = torch.arange(1 << fmt.bits).to(torch.uint8 if fmt.bits <= 8 else torch.uint16)
    for dtype in DTYPES:
        found = cast.decode(codes, fmt, torch.empty(codes.shape, dtype=dtype))
        assert found is not None
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(found.view(bits), to_values(codes, fmt, dtype).view(bits)), dtype


@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, Rounding.STOCHASTIC])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_to_is_encode_and_decode(dtype: torch.dtype, rounding: Rounding) -> None:
    fmt, x = Format.named("e4m3fn"), every_kind_of_float().to(dtype)
    found = cast.round_to(x, fmt, rounding, Overflow.SATURATE, key_of(SEED), torch.empty_like(x))
    expected = to_values(expected_codes(x, fmt, rounding, Overflow.SATURATE), fmt, dtype)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, Rounding.STOCHASTIC])
def test_large_tensors_for_any_thread_count(rounding: Rounding) -> None:
    """Long enough for two threads and for stores past the caches; an odd length for the last chunk."""
    fmt = Format.named("fp16")
    x = torch.randn((9 << 19) + 5, generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            codes = torch.empty(x.shape, dtype=torch.uint16)
            cast.encode(x, fmt, rounding, Overflow.IEEE, key_of(SEED), codes)
            found.append(codes.view(torch.int16))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    if rounding is Rounding.NEAREST_EVEN:
        assert torch.equal(found[0], x.half().view(torch.int16))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3fn", "e3m2fn", "e2m1fn", "e5m6"])
def test_decode_large_tensors(name: str, aligned: bool) -> None:
    """Long enough for stores past the caches; a length that fills no vector."""
    fmt, count = Format.named(name), (9 << 18) + 6
    values = to_values(torch.arange(1 << fmt.bits), fmt, torch.float32)
    codes = torch.randint(0, 1 << fmt.bits, (count,), generator=torch.Generator().manual_seed(2))
    stored = codes.to(torch.uint8 if fmt.bits <= 8 else torch.uint16)
    out = torch.empty(count + 16)[:count] if aligned else torch.empty(count + 16)[3 : count + 3]
    assert cast.decode(stored, fmt, out) is out
    assert torch.equal(out.view(torch.int32), values[codes].view(torch.int32))
    if fmt.bits == 4:
        assert cast.decode(stored[::2] | stored[1::2] << 4, fmt, out.zero_(), packed=True) is out
        assert torch.equal(out.view(torch.int32), values[codes].view(torch.int32))


def test_decode_into_new_memory_of_huge_pages() -> None:
    fmt = Format.named("e4m3fn")
    codes = torch.arange((1 << 24) + 3).to(torch.uint8)
    out = torch.empty(codes.shape)
    assert cast.decode(codes, fmt, out, fresh=True) is out
    expected = to_values(torch.arange(256), fmt, torch.float32).repeat((1 << 16) + 1)[: codes.numel()]
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("at", [0, 2070, 5003])
def test_one_code_out_of_range_is_seen(at: int) -> None:
    codes = torch.full((5004,), 63, dtype=torch.uint8)
    assert cast.decode(codes, Format.named("e3m2fn"), torch.empty(5004)) is not None
    codes[at] = 64
    assert cast.decode(codes, Format.named("e3m2fn"), torch.empty(5004)) is None


def test_an_output_that_is_not_aligned() -> None:
    fmt, x = Format.named("bf16"), torch.randn(5 << 20)
    codes = torch.empty(x.numel() + 1, dtype=torch.uint16)[1:]
    cast.encode(x, fmt, Rounding.NEAREST_EVEN, Overflow.IEEE, 0, codes)
    assert torch.equal(codes.view(torch.bfloat16), x.bfloat16())

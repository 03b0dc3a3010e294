"""Two 4-bit codes in a byte, through `encode` and `decode`."""

from itertools import product

import pytest
import torch

import fewbits
from fewbits.errors import FewbitsError
from fewbits.tensors.packing import pack_codes, unpack_codes

FORMATS = ("e2m1fn", "int4", "uint4", "nf4", "int2")


SHAPES = ((2,), (3, 6), (0, 4), (2, 3, 5000))
LARGE = [(name, (1 << 21, 16)) for name in ("e2m1fn", "int4")]  # past the caches; plain PyTorch would take long


@pytest.mark.parametrize(("name", "shape"), [*product(FORMATS, SHAPES), *LARGE])
def test_packed_is_the_codes_in_pairs(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes = fewbits.encode(x, name)
    packed = fewbits.encode(x, name, packed=True)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(packed, pack_codes(codes))
    assert torch.equal(unpack_codes(packed), codes)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(fewbits.decode(packed, name, dtype, packed=True), fewbits.decode(codes, name, dtype))


def test_the_first_code_is_the_low_half():
    assert fewbits.encode(torch.tensor([0.5, 6.0]), "e2m1fn", packed=True).tolist() == [0x71]


@pytest.mark.parametrize("rounding", ["nearest_even", "up"])  # with and without a kernel
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_blocks_are_filled(name, rounding):
    first, x = torch.randn(3, 70), torch.randn(3, 70)
    out = fewbits.encode(first, name, rounding)
    found = fewbits.encode(x, name, rounding, out=out)
    expected = fewbits.encode(x, name, rounding)
    assert found.codes is out.codes
    assert found.scales is out.scales
    assert torch.equal(fewbits.decode(found, name), fewbits.decode(expected, name))


def test_out_is_filled():
    x = torch.randn(3, 8)
    out = torch.empty(3, 4, dtype=torch.uint8)
    assert fewbits.encode(x, "e2m1fn", packed=True, out=out) is out
    values = torch.empty(3, 8)
    assert fewbits.decode(out, "e2m1fn", packed=True, out=values) is values
    assert torch.equal(values, fewbits.round_to(x, "e2m1fn"))
    for name in ("fp16", "nf4"):  # with and without a kernel
        codes = fewbits.encode(x, name, out=torch.empty(3, 8, dtype=fewbits.encode(x, name).dtype))
        assert torch.equal(codes, fewbits.encode(x, name))
        assert torch.equal(fewbits.round_to(x, name, out=values), fewbits.round_to(x, name))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fewbits.encode(torch.ones(2, 3), "e2m1fn", packed=True),
            r"the last dimension of \(2, 3\) is not even",
        ),
        (lambda: fewbits.encode(torch.ones(4), "e4m3fn", packed=True), "two codes of e4m3fn do not fit a byte"),
        (lambda: fewbits.encode(torch.ones(32), "mxfp4", packed=True), "mxfp4 has codes and scales, two tensors"),
        (
            lambda: fewbits.encode(torch.ones(64), "mxfp4", out=fewbits.encode(torch.ones(32), "mxfp4")),
            r"out: a contiguous torch.uint8 tensor of shape \(64,\)",
        ),
        (
            lambda: fewbits.encode(torch.ones(64), "fp16", out=fewbits.encode(torch.ones(64), "mxfp4")),
            "out: fp16 has no blocks; give one tensor of torch.uint16",
        ),
        (lambda: fewbits.decode(torch.ones(4), "e2m1fn", packed=True), r"packed: uint8 \[..., K/2\] is needed, got"),
        (
            lambda: fewbits.encode(torch.ones(4), "fp16", out=torch.empty(4)),
            r"out: a contiguous torch.uint16 tensor of shape \(4,\) on cpu is needed, got torch.float32",
        ),
        (
            lambda: fewbits.round_to(torch.ones(4, requires_grad=True), "fp16", out=torch.empty(4)),
            "out: x needs a gradient",
        ),
    ],
)
def test_what_cannot_be_packed(call, message):
    with pytest.raises(FewbitsError, match=message):
        call()

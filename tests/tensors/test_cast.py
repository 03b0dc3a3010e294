"""The public casts: shapes, dtypes, strides, gradients, special numbers, messages."""

import pytest
import torch
from casting import DIRECTED, ELEMENTS, bits_of

import fewbits
from fewbits.formats import Format, names

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", names())
def test_round_to_keeps_shape_and_dtype_and_equals_decode_of_encode(name, dtype):
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = fewbits.round_to(x, name)
    assert (rounded.shape, rounded.dtype) == (x.shape, dtype)
    assert torch.equal(bits_of(rounded), bits_of(fewbits.decode(fewbits.encode(x, name), name, dtype=dtype)))
    assert torch.equal(bits_of(fewbits.round_to(x.double(), name).to(dtype)), bits_of(rounded))


@pytest.mark.parametrize("rounding", DIRECTED)
@pytest.mark.parametrize("name", [n for n in ELEMENTS if Format.named(n).bits <= 16])
def test_every_code_round_trips(name, rounding):
    fmt = Format.named(name)
    codes = torch.arange(2**fmt.bits)
    values = fewbits.decode(codes, name, dtype=torch.float64)
    again = fewbits.encode(values, name, rounding).to(torch.int64)
    assert torch.equal(again, torch.where(values.isnan(), fmt.nan_code, codes))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e2m1fn", torch.uint8),
        ("int8", torch.uint8),
        ("e5m3", torch.uint16),
        ("fp16", torch.uint16),
        ("tf32", torch.uint32),
        ("fp32", torch.uint32),
        ("fp64", torch.uint64),
    ],
)
def test_codes_have_the_smallest_unsigned_dtype(name, dtype):
    x = torch.tensor([-1.5, 1.0, 0.0])
    codes = fewbits.encode(x, name)
    assert codes.dtype is dtype
    assert torch.equal(fewbits.decode(codes, name), fewbits.round_to(x, name))


def test_fp32_and_fp64_codes_are_the_bits():
    x = torch.randn(100, dtype=torch.float64)
    assert torch.equal(fewbits.encode(x, "fp64").view(torch.int64), x.view(torch.int64))
    assert torch.equal(fewbits.encode(x, "fp32").view(torch.int32), x.float().view(torch.int32))


@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[::2, 1::3], lambda x: x[:, :0], lambda x: x.expand(2, 6, 8)]
)
@pytest.mark.parametrize("name", ["fp16", "e4m3fn", "nf4", "mxfp4", "nvfp4"])
def test_views_and_empty_tensors_work(name, view):
    x = view(torch.linspace(-2, 2, 48).reshape(6, 8))
    if x.shape[-1] == 0:
        x = x.t()
    assert torch.equal(fewbits.round_to(x, name), fewbits.round_to(x.contiguous(), name))
    kwargs = {"rounding": "stochastic", "seed": 5}
    assert torch.equal(fewbits.round_to(x, name, **kwargs), fewbits.round_to(x.contiguous(), name, **kwargs))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("name", "overflow", "expected"),
    [
        ("fp16", None, [float("inf"), float("-inf"), float("nan"), 0.0, -0.0]),
        ("fp16", "saturate", [65504, -65504, float("nan"), 0.0, -0.0]),
        ("e4m3fn", None, [448, -448, float("nan"), 0.0, -0.0]),
        ("e4m3fn", "ieee", [float("nan"), float("nan"), float("nan"), 0.0, -0.0]),
        ("e4m3fnuz", "ieee", [float("nan"), float("nan"), float("nan"), 0.0, 0.0]),
        ("e5m2fnuz", None, [57344, -57344, float("nan"), 0.0, 0.0]),
        ("binary8p3se", None, [float("inf"), float("-inf"), float("nan"), 0.0, 0.0]),
        ("e2m1fn", None, [6, -6, 6, 0.0, -0.0]),
        ("e8m0fnu", None, [2.0**127, float("nan"), float("nan"), 2.0**-127, 2.0**-127]),
        ("int8", None, [127, -128, 0, 0.0, 0.0]),
        ("uint8", None, [255, 0, 0, 0.0, 0.0]),
        ("nf4", None, [1, -1, 0, 0.0, 0.0]),
    ],
)
def test_special_numbers(name, overflow, expected, dtype):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0], dtype=dtype)
    rounded = fewbits.round_to(x, name, overflow=overflow)
    # bfloat16 makes 65536 of 65504, and float16 makes Inf and 0 of 2^127 and 2^-127
    assert torch.equal(bits_of(rounded), bits_of(torch.tensor(expected, dtype=torch.float64).to(dtype)))


@pytest.mark.parametrize(("name", "code"), [("fp16", 0x7E00), ("bf16", 0x7FC0), ("e5m2", 0x7E), ("e4m3fn", 0x7F)])
def test_every_nan_becomes_one_documented_code(name, code):
    nans = torch.tensor([0x7F800001, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    for x in (nans, nans.double(), nans[::2], nans.expand(3, 4)):
        assert (fewbits.encode(x, name).to(torch.int64) == code).all()


def test_the_gradient_passes_straight_through_and_is_clipped():
    x = torch.tensor([0.3, 500.0, -1e6, float("inf"), float("-inf"), 449.0], requires_grad=True)
    fewbits.round_to(x, "e4m3fn").sum().backward()
    assert x.grad.tolist() == [1, 0, 0, 0, 0, 1]  # 449 rounds to 448, inside the range
    x.grad = None
    fewbits.round_to(x, "e4m3fn", clip_gradient=False).sum().backward()
    assert x.grad.tolist() == [1] * 6


def test_the_gradient_of_a_block_is_clipped_where_an_element_saturates():
    x = torch.tensor([[7.5, 1.0, -0.3]], requires_grad=True)  # floor: the scale is 1, and 7.5 becomes 6
    y = fewbits.round_to(x, "mxfp4")
    y.backward(torch.tensor([[2.0, 3.0, 4.0]]))
    assert y.tolist() == [[6.0, 1.0, -0.5]]
    assert x.grad.tolist() == [[0, 3, 4]]


def test_no_gradient_is_asked_for_under_no_grad():
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not fewbits.round_to(x, "fp16").requires_grad
    assert not fewbits.encode(x, "fp16").requires_grad


def test_a_value_that_the_dtype_does_not_hold_is_rounded_by_the_dtype():
    x = torch.tensor([65504.0], dtype=torch.float16)
    assert fewbits.round_to(x, "bf16").item() == float("inf")  # bf16 has 65536, float16 has not
    codes = fewbits.encode(torch.tensor([1 + 2.0**-8 + 2.0**-20], dtype=torch.float64), "fp32")
    assert fewbits.decode(codes, "fp32", dtype=torch.bfloat16).item() == 1 + 2.0**-7


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fewbits.round_to(torch.ones(2, dtype=torch.int32), "fp16"), "bfloat16 or float16, not torch.int32"),
        (lambda: fewbits.round_to(torch.ones(2, dtype=torch.cfloat), "fp16"), "not torch.complex64"),
        (lambda: fewbits.round_to([1.0], "fp16"), "takes a torch tensor, not list: use torch.as_tensor"),
        (lambda: fewbits.round_to(torch.ones(2, device="meta"), "fp16"), "a meta tensor, which has no data: load it"),
        (lambda: fewbits.encode(torch.eye(2).to_sparse(), "fp16"), "takes a dense tensor, not torch.sparse_coo"),
        (lambda: fewbits.round_to(ONE, "e4m3fm"), "unknown format 'e4m3fm': did you mean 'e4m3f"),
        (lambda: fewbits.round_to(ONE, "fp16", "upwards"), "unknown rounding 'upwards'"),
        (
            lambda: fewbits.round_to(ONE, "fp16", overflow="clamp"),
            "unknown overflow 'clamp': choose from saturate, ieee, ocp",
        ),
        (lambda: fewbits.round_to(ONE, "fp16", overflow="mldtypes"), "did you mean 'ml_dtypes'"),
        (lambda: fewbits.round_to(ONE, "e2m1fn", overflow="ieee"), "needs an Inf or a NaN, and e2m1fn has neither"),
        (lambda: fewbits.round_to(ONE, "mxfp8", overflow="ieee"), "needs an Inf or a NaN, and blocks always saturate"),
        (lambda: fewbits.round_to(ONE, "fp16", "stochastic"), "'stochastic' needs a seed: pass seed=0"),
        (lambda: fewbits.round_to(ONE, "fp16", seed=1), "seed=1 has no use with rounding 'nearest_even'"),
        (lambda: fewbits.round_to(ONE, "fp16", "stochastic", seed=-1), "seed -1 is out of range: take an integer"),
        (lambda: fewbits.round_to(ONE, "fp16", "stochastic", seed=1.5), "seed 1.5 is out of range"),
        (lambda: fewbits.round_to(ONE, "fp16", scale_rule="floor"), "fp16 has no shared scale; leave scale_rule out"),
        (lambda: fewbits.round_to(ONE, "mxfp4", scale_rule="flor"), "unknown scale rule 'flor': did you mean 'floor'"),
        (lambda: fewbits.round_to(ONE, "nvfp4", scale_rule="floor"), "not for nvfp4: choose from two_level, one_level"),
        (lambda: fewbits.round_to(torch.ones(3, 0), "mxfp4"), r"shape \(3, 0\): a block needs a last dimension"),
        (lambda: fewbits.round_to(torch.ones(()), "mxfp4"), r"shape \(\): a block needs a last dimension"),
        (lambda: fewbits.decode(torch.tensor([16]), "e2m1fn"), "code 16 is out of range: e2m1fn has codes 0 to 15"),
        (lambda: fewbits.decode(torch.tensor([-1]), "fp16"), "code -1 is out of range: fp16 has codes 0 to 65535"),
        (lambda: fewbits.decode(torch.tensor([1.0]), "fp16"), "codes of an integer dtype, not torch.float32"),
        (lambda: fewbits.decode(torch.tensor([1]), "fp16", dtype=torch.int8), "decode to torch.int8: choose float64"),
        (lambda: fewbits.decode(torch.tensor([1]), "mxfp4"), "takes the BlockCodes that encode returns, not Tensor"),
        (lambda: fewbits.decode(fewbits.encode(ONE, "mxfp4"), "fp16"), "takes a tensor of codes, not BlockCodes"),
    ],
)
def test_messages(call, message):
    with pytest.raises(fewbits.FewbitsError, match=message) as error:
        call()
    assert "\n" not in str(error.value)

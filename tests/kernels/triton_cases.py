"""Every Triton kernel on the CPU, interpreted: codes bit-equal to the ops', matmuls within k·eps of the exact sum.

`test_triton` runs this file in a process of its own, where TRITON_INTERPRET is set before Triton is imported. Triton
3.7's interpreter has no matmul of bfloat16, so the tests are in float32 and float16.
"""

import pytest
import torch

from fewbits.kernels import ops, rotation, stored_reference
from fewbits.kernels.cuda import linear
from fewbits.kernels.cuda import rotation as cuda_rotation
from fewbits.kernels.cuda.decode import dequantize
from fewbits.kernels.cuda.rescale import rescale
from fewbits.kernels.cuda.tokens import quantize_tokens
from fewbits.kernels.panel_reference import round_tokens
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

EPS = torch.finfo(torch.float32).eps
BAD = (float("nan"), float("inf"), -float("inf"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of many sizes, one of zeros, and three that NaN or Inf spoils."""
    sizes = torch.exp2(torch.arange(M) * 24 // M - 14.0)[:, None]
    x = random(M, K) * sizes
    x[0] = 0
    for row, bad in enumerate(BAD, 1):
        x[row, K * row // 4] = bad
    return x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 3, 64, 5000])
def test_int8_tokens(K: int, dtype: torch.dtype) -> None:
    x = spread(9, K, dtype)
    codes, scales = quantize_tokens(x, "int8", digits=2)
    high, high_scales = ops.quantize_per_token(x.float())
    assert torch.equal(codes[0], high)
    assert same(scales[0], high_scales[:, 0])
    low, low_scales = ops.quantize_per_token(x.float() - high * high_scales)
    assert torch.equal(codes[1], low)
    assert same(scales[1], low_scales[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 64, 5000])
def test_fp8_tokens(K: int, dtype: torch.dtype) -> None:
    x = spread(9, K, dtype)
    codes, scales = quantize_tokens(x, "e4m3fn")
    rounded, expected = round_tokens(x.float())
    assert torch.equal(codes[0].view(torch.uint8), rounded.to(torch.float8_e4m3fn).view(torch.uint8))
    assert same(scales[0], expected[:, 0])


def test_fp8_tokens_halfway_between_numbers() -> None:
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, halfway, -halfway, halfway * (1 + EPS), halfway * (1 - EPS)])[None]  # the scale is 1
    codes, scales = quantize_tokens(x, "e4m3fn")
    assert scales.item() == 1
    assert torch.equal(codes[0].view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_tokens_of_any_strides_and_in_halves() -> None:
    x = random(6, 64)
    codes, _ = quantize_tokens(x, "int8")
    assert torch.equal(quantize_tokens(x.T.contiguous().T, "int8")[0], codes)
    assert torch.equal(quantize_tokens(x[::2], "int8")[0], codes[:, ::2])
    halves, _ = quantize_tokens(x, "int8", halves=True)
    assert torch.equal(halves, torch.cat([codes[..., ::2], codes[..., 1::2]], -1))


def stored(N: int, K: int, format_name: str, group: int | None) -> tuple[QuantizedTensor, torch.Tensor]:
    weight = quantize_weight(random(N, K, seed=1), format_name, group_size=group, scale_dtype=torch.bfloat16)
    return weight, weight.codes.view(torch.int8)


@pytest.mark.parametrize(
    ("format_name", "group"), [("int8", None), ("int8", 32), ("int4", 64), ("nf4", 32), ("e4m3fn", None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantize(format_name: str, group: int | None, dtype: torch.dtype) -> None:
    weight, codes = stored(5, 192, format_name, group)
    assert torch.equal(dequantize(codes, weight.scales, format_name, dtype), weight.dequantize().to(dtype))


def test_every_code_of_fp8_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    got = dequantize(codes.view(torch.int8), torch.ones(1, 1), "e4m3fn", torch.float32)
    assert same(got, codes.view(torch.float8_e4m3fn).float())


EXACT = [("int8", None, "int8"), ("int4", 32, "int8"), ("int4", 64, "int8"), ("int4", None, "int8")]
ROUNDED = [
    ("int8", 64, "int8"), ("int8", 32, None), ("int8", None, None), ("int4", 32, None), ("nf4", 64, None),
    ("e4m3fn", None, "e4m3fn"), ("e4m3fn", None, None),
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for each token takes 10 ms here: let 12 of them be many."""
    monkeypatch.setattr(linear, "FEW_ROWS", 8)  # of both digits together


@pytest.mark.parametrize(("format_name", "group", "activations"), EXACT)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 40, 192), (5, 5, 64), (12, 24, 64), (12, 5, 64)])
def test_sums_of_integers_are_exact(
    format_name: str, group: int | None, activations: str, M: int, N: int, K: int
) -> None:
    weight, codes = stored(N, K, format_name, group)
    x, bias = random(M, K), None if M == 5 else random(N, seed=2)
    got = linear.stored_linear(x, codes, weight.scales, bias, format_name, activations)
    assert torch.equal(got, stored_reference.stored_linear(x, codes, weight.scales, bias, format_name, activations))


@pytest.mark.parametrize("M", [20, 70])
def test_larger_tiles(M: int) -> None:
    weight, codes = stored(20, 64, "int4", 32)
    x = random(M, 64)
    got = linear.stored_linear(x, codes, weight.scales, None, "int4", "int8")
    assert torch.equal(got, stored_reference.stored_linear(x, codes, weight.scales, None, "int4", "int8"))


@pytest.mark.parametrize(("format_name", "group", "activations"), ROUNDED)
@pytest.mark.parametrize(
    ("M", "N", "K", "dtype"),
    [(1, 40, 192, torch.float16), (3, 5, 64, torch.float32), (12, 16, 64, torch.float16), (12, 5, 64, torch.float32)],
    ids=str,
)
def test_other_sums_are_near(
    format_name: str, group: int | None, activations: str | None, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    weight, codes = stored(N, K, format_name, group)
    x, bias = random(M, K).to(dtype), random(N, seed=2)
    got = linear.stored_linear(x, codes, weight.scales, bias, format_name, activations)
    numbers = x.double()
    if activations == "int8":
        numbers = torch.mul(*ops.quantize_per_token(x.float())).double()
    elif activations == "e4m3fn":
        numbers = torch.mul(*round_tokens(x.float())).double()
    exact = numbers @ weight.dequantize().double().T + bias.double()
    sizes = numbers.abs() @ weight.dequantize().double().abs().T + bias.double().abs()
    # Sums in float32; the weight, or its 16 values, and the result are rounded to the dtype of x.
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= ((K + 5) * EPS + 2 * torch.finfo(dtype).eps) * sizes).all()


@pytest.mark.parametrize("format_name", ["int8", "e4m3fn"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_many_rows_of_bfloat16_by_torch(format_name: str, with_bias: bool) -> None:
    weight, codes = stored(16, 64, format_name, None)
    x, bias = random(12, 64).bfloat16(), random(16, seed=2) if with_bias else None
    got = linear.stored_linear(x, codes, weight.scales, bias, format_name, format_name).double()
    exact = stored_reference.stored_linear(x.float(), codes, weight.scales, bias, format_name, format_name).double()
    # The bias, the sum before it and the result are rounded.
    rounded = exact.abs() + (0 if bias is None else bias.double().abs())
    assert ((got - exact).abs() <= torch.finfo(torch.bfloat16).eps * rounded).all()


@pytest.mark.parametrize("activations", ["int8", None])
def test_a_bad_token_spoils_no_other(activations: str | None) -> None:
    weight, codes = stored(20, 64, "int8", None)
    x = random(6, 64)
    clean = linear.stored_linear(x, codes, weight.scales, None, "int8", activations)
    x[2, 7] = float("nan")
    spoiled = linear.stored_linear(x, codes, weight.scales, None, "int8", activations)
    assert spoiled[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize(("M", "N"), [(1, 40), (3, 5), (6, 24), (6, 5)])
def test_two_digits(M: int, N: int) -> None:
    weight, codes = stored(N, 64, "int8", None)
    x, bias = random(M, 64), None if M == 3 else random(N, seed=2)
    got = linear.stored_linear_two_digits(x, codes, weight.scales, bias)
    assert torch.equal(got, stored_reference.stored_linear_two_digits(x, codes, weight.scales, bias))


@pytest.mark.parametrize(
    ("shape", "block"), [((3, 64), 64), ((2, 3, 96), 32), ((5, 1024), 512), ((0, 16), 16)], ids=str
)
def test_rotate(shape: tuple[int, ...], block: int) -> None:
    x = random(*shape)
    assert torch.equal(cuda_rotation.rotate(torch.empty_like(x), x, block), rotation.rotate(x, block))


@pytest.mark.parametrize("digits", [1, 2])
def test_rescale(digits: int) -> None:
    sums = torch.randint(-(2**30), 2**30, (digits * 3, 1500), generator=torch.Generator().manual_seed(0)).int()
    tokens, channels, bias = random(digits, 3), random(1500, 1, seed=1), random(1500, seed=2)
    parts = sums.float().view(digits, 3, -1) * tokens[..., None] * channels.flatten()
    expected = (parts[0] if digits == 1 else parts[0] + parts[1]) + bias
    assert torch.equal(rescale(sums, tokens, channels, bias, torch.float32), expected)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_no_tokens(shape: tuple[int, ...]) -> None:
    weight, codes = stored(8, 64, "int8", None)
    assert linear.stored_linear(torch.empty(shape), codes, weight.scales, None, "int8", "int8").shape == (
        *shape[:-1],
        8,
    )


def test_shapes_of_more_and_fewer_dimensions() -> None:
    weight, codes = stored(8, 64, "int8", None)
    x = random(2, 3, 64)
    flat = linear.stored_linear(x.view(6, 64), codes, weight.scales, None, "int8", "int8")
    assert torch.equal(linear.stored_linear(x, codes, weight.scales, None, "int8", "int8").view(6, 8), flat)
    assert torch.equal(linear.stored_linear(x[0, 0], codes, weight.scales, None, "int8", "int8"), flat[0])

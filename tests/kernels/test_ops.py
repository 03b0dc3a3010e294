"""Every op is bit-equal to its plain-PyTorch meaning. ``test_isa.py`` runs this file for every instruction set."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.kernels import native, ops, reference
from fewbits.kernels.packing import MAX_FEATURES, pack_int8, reference_pack_int8, unpack_int8

sizes = st.integers(1, 70)
# M, K, N: odd ones, one of each, whole panels and tiles, more rows than a tile
SHAPES = [(1, 1, 1), (1, 576, 192), (2, 3, 33), (5, 4, 32), (11, 129, 31), (12, 64, 64), (13, 577, 193), (40, 1536, 65)]


def random_job(m: int, k: int, n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10 ** torch.randn(m, 1, generator=generator)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return x, weight, torch.rand(n, generator=generator), torch.randn(n, generator=generator)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.dtype == torch.float32:
        found, expected = found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_ops_are_bit_equal_to_their_references(m: int, k: int, n: int) -> None:
    x, weight, channel_scales, bias = random_job(m, k, n)
    codes, scales = ops.quantize_per_token(x)
    for found, expected in zip((codes, scales), reference.quantize_per_token(x), strict=True):
        assert_same_bits(found, expected)
    packed = pack_int8(weight)
    for some_bias in (None, bias):
        found = ops.int8_matmul(codes, scales, packed, channel_scales, some_bias)
        assert_same_bits(found, reference.int8_matmul(codes, scales, packed, channel_scales, some_bias))
        assert_same_bits(ops.int8_linear(x, packed, channel_scales, some_bias), found)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, sizes, st.integers(0, 2**30))
def test_any_shape_is_bit_equal(m: int, k: int, n: int, seed: int) -> None:
    x, weight, channel_scales, bias = random_job(m, k, n, seed)
    codes, scales = ops.quantize_per_token(x)
    assert_same_bits(codes, reference.quantize_per_token(x)[0])
    packed = pack_int8(weight)
    found = ops.int8_matmul(codes, scales, packed, channel_scales, bias)
    assert_same_bits(found, reference.int8_matmul(codes, scales, packed, channel_scales, bias))


def test_the_integer_sum_is_exact_at_its_largest() -> None:
    k = MAX_FEATURES
    codes = torch.full((1, k), -128, dtype=torch.int8)
    packed = pack_int8(torch.full((1, k), -128, dtype=torch.int8))
    one = torch.ones(1)
    out = ops.int8_matmul(codes, one[:, None], packed, one)
    assert out.item() == torch.tensor(128.0 * 128 * k).item()


def test_each_product_of_two_bytes_is_right() -> None:
    every = torch.arange(-128, 128, dtype=torch.int8)
    ones = torch.ones(256)
    out = ops.int8_matmul(every[:, None], ones[:, None], pack_int8(every[:, None]), ones)
    assert torch.equal(out, every.float()[:, None] * every.float())


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_quantization_error_is_half_a_step(values: list[float]) -> None:
    x = torch.tensor([values])
    codes, scales = ops.quantize_per_token(x)
    error = (codes.double() * scales.double() - x.double()).abs().max().item()
    # half a step, and the roundings of the scale and of x · (1 / scale): 127 codes × 3 × 2⁻²⁴ each
    assert error <= scales.item() * (0.5 + 127 * 3 * 2**-24)
    assert codes.abs().max().item() <= 127


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 3e38])
def test_extreme_tokens_stay_finite(value: float) -> None:
    codes, scales = ops.quantize_per_token(torch.full((1, 5), value))
    assert scales.isfinite().all()
    assert scales.item() >= torch.finfo(torch.float32).tiny
    assert (codes.float() * scales - value).abs().max() <= scales.item() / 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_spoils_its_own_token_only(bad: float) -> None:
    x, weight, channel_scales, _ = random_job(3, 40, 50)
    x[1, 7] = bad
    codes, scales = ops.quantize_per_token(x)
    assert codes[1].eq(0).all()
    out = ops.int8_matmul(codes, scales, pack_int8(weight), channel_scales)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_halves_round_to_even() -> None:
    codes, _ = ops.quantize_per_token(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_strided_and_3d_inputs() -> None:
    x, weight, channel_scales, _ = random_job(24, 20, 30)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    codes, scales = ops.quantize_per_token(strided)
    assert torch.equal(codes, ops.quantize_per_token(x)[0])
    packed = pack_int8(weight)
    flat = ops.int8_matmul(codes, scales, packed, channel_scales)
    deep = ops.int8_matmul(codes.view(2, 3, 4, 20), scales.view(2, 3, 4, 1), packed, channel_scales)
    assert torch.equal(deep.view(24, 30), flat)


def test_no_tokens() -> None:
    codes, scales = ops.quantize_per_token(torch.empty(0, 8))
    out = ops.int8_matmul(codes, scales, pack_int8(torch.ones(3, 8, dtype=torch.int8)), torch.ones(3))
    assert out.shape == (0, 3)


@given(sizes, sizes)
def test_packing_loses_nothing(n: int, k: int) -> None:
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    packed = pack_int8(weight)
    assert packed.is_contiguous()
    assert packed.shape == (-(-n // 32), 1 + -(-k // 4), 128)
    assert torch.equal(unpack_int8(packed, n, k), weight)
    assert torch.equal(packed, reference_pack_int8(torch.empty_like(packed), weight))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_thread_count_changes_no_bit(threads: int) -> None:
    x, weight, channel_scales, _ = random_job(50, 300, 400)
    packed = pack_int8(weight)
    codes, scales = ops.quantize_per_token(x)
    expected = ops.int8_matmul(codes, scales, packed, channel_scales)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.quantize_per_token(x)[0], codes)
        assert torch.equal(ops.int8_matmul(codes, scales, packed, channel_scales), expected)
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once() -> None:
    x, weight, channel_scales, _ = random_job(30, 200, 300)
    packed = pack_int8(weight)
    codes, scales = ops.quantize_per_token(x)
    expected = ops.int8_matmul(codes, scales, packed, channel_scales)

    def work(_: int) -> bool:
        return torch.equal(ops.int8_matmul(codes, scales, packed, channel_scales), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(100)))


def test_ops_pass_the_checks_of_torch() -> None:
    x, weight, channel_scales, bias = random_job(3, 8, 5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fewbits.quantize_per_token.default, (x,), test_utils=tests)
    codes, scales = ops.quantize_per_token(x)
    for some_bias in (None, bias):
        arguments = (codes, scales, pack_int8(weight), channel_scales, some_bias)
        torch.library.opcheck(torch.ops.fewbits.int8_matmul.default, arguments, test_utils=tests)
        arguments = (x, pack_int8(weight), channel_scales, some_bias)
        torch.library.opcheck(torch.ops.fewbits.int8_linear.default, arguments, test_utils=tests)


def test_wrong_tensors_are_named() -> None:
    x, weight, channel_scales, bias = random_job(3, 8, 5)
    codes, scales = ops.quantize_per_token(x)
    packed = pack_int8(weight)
    cases = [
        (lambda: ops.quantize_per_token(x.double()), r"x: float32 is needed, got torch.float64; convert it"),
        (lambda: ops.quantize_per_token(x[:, :0]), r"x: \[..., K\] with K > 0 is needed, got \[3, 0\]"),
        (lambda: ops.int8_matmul(x, scales, packed, channel_scales), "codes: int8 .* got torch.float32"),
        (lambda: ops.int8_matmul(codes, scales, weight, channel_scales), "packed: .* pack_int8 makes it"),
        (lambda: ops.int8_linear(x.half(), packed, channel_scales), "x: float32 is needed, got torch.float16"),
        (lambda: ops.int8_linear(x, packed[:, 1:], channel_scales), "packed: contiguous int8"),
        (lambda: ops.int8_matmul(codes, scales[:2], packed, channel_scales), r"token_scales: float32 \[3, 1\]"),
        (lambda: ops.int8_matmul(codes, scales, packed, channel_scales[None]), r"channel_scales: float32 \[1\]"),
        (lambda: ops.int8_matmul(codes, scales, packed, channel_scales, bias[:4]), r"bias: float32 \[5\]"),
        (lambda: pack_int8(weight.short()), "weight: int8 .* got torch.int16"),
        (lambda: pack_int8(weight[:0]), r"weight: int8 .* \[0, 8\]"),
        (lambda: pack_int8(torch.zeros(1, MAX_FEATURES + 1, dtype=torch.int8)), f"at most {MAX_FEATURES} fit"),
    ]
    for call, message in cases:
        with pytest.raises(FewbitsError, match=message):
            call()


def test_status_says_what_runs() -> None:
    status = native.status()
    assert status.loaded == (status.isa != "none")
    assert status.isa in {"avx512", "avx2", "scalar", "none"}
    assert status.reason

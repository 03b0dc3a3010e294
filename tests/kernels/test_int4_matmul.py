"""int4 weights in groups by int8 activations: bit-equal to the plain meaning on every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import ops, panel_reference
from fewbits.kernels.panel_ops import int4_linear
from fewbits.kernels.panels import pack_panels, pack_scales, unpack_panels, unpack_scales
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

# M, K, N, group size: one of each, odd N, whole panels and tiles, more rows than a tile
SHAPES = [(1, 8, 1, 8), (1, 576, 192, 64), (2, 32, 33, 32), (5, 256, 32, 128), (11, 128, 31, 128), (12, 64, 64, 32),
          (13, 576, 193, 192), (40, 1536, 65, 128)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def random_weight(n: int, k: int, group: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedTensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return quantize_weight(weight, "int4", group_size=group, scale_dtype=dtype)


def random_x(m: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(m * k)
    return torch.randn(m, k, generator=generator) * 10 ** torch.randn(m, 1, generator=generator)


def packed(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    return pack_panels(weight.codes), pack_scales(weight.scales)


def by_hand(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """The sums of each group in float64, where integers are exact; then float32, group after group."""
    codes, token_scales = ops.quantize_per_token(x)
    (N, K), G = weight.shape, weight.scales.shape[1]
    digits = QuantizedTensor(weight.codes, torch.ones(N, G), "int4").dequantize().double()
    total = torch.zeros(len(x), N)
    for g in range(G):
        part = slice(g * K // G, (g + 1) * K // G)
        total = total + (codes[:, part].double() @ digits[:, part].T).float() * weight.scales[:, g].float()
    total = total * token_scales
    return total if bias is None else total + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n", "group"), SHAPES)
def test_it_is_bit_equal_to_its_reference_and_to_its_words(
    m: int, k: int, n: int, group: int, dtype: torch.dtype
) -> None:
    x, weight = random_x(m, k), random_weight(n, k, group, dtype)
    for bias in (None, torch.randn(n)):
        found = int4_linear(x, *packed(weight), bias, out_features=n)
        assert torch.equal(found, panel_reference.int4_linear(x, *packed(weight), bias, n))
        assert torch.equal(found, by_hand(x, weight, bias))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 70), st.sampled_from([8, 16, 24, 32, 64, 128]))
def test_any_shape_is_bit_equal(m: int, groups: int, n: int, group: int) -> None:
    x, weight = random_x(m, groups * group), random_weight(n, groups * group, group)
    found = int4_linear(x, *packed(weight), out_features=n)
    assert torch.equal(found, panel_reference.int4_linear(x, *packed(weight), None, n))


def test_each_product_of_a_nibble_and_a_byte_is_right() -> None:
    every = torch.arange(-127, 128)
    x = torch.zeros(255, 16)
    x[:, 0], x[:, 1], x[:, 15] = every, 127, every  # the scale of each row is 1; places 0 and 15 are halves of bytes
    for value in range(-8, 8):
        nibble = value & 15
        codes = torch.zeros(1, 8, dtype=torch.uint8)
        codes[0, 0], codes[0, 7] = nibble, nibble << 4
        out = int4_linear(x, pack_panels(codes), pack_scales(torch.ones(1, 2)), out_features=1)
        assert torch.equal(out[:, 0], 2.0 * value * every.float())


def test_the_sums_are_exact_at_their_largest() -> None:
    k = 2**14
    x = torch.full((1, k), -127.0)
    codes = torch.full((3, k // 2), 0x88, dtype=torch.uint8)  # -8 everywhere
    out = int4_linear(x, pack_panels(codes), pack_scales(torch.ones(3, 1)), out_features=3)
    assert out.tolist() == [[127.0 * 8 * k] * 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("m", [3, 14])
def test_a_bad_value_spoils_its_own_token_only(bad: float, m: int) -> None:
    x, weight = random_x(m, 64), random_weight(50, 64, 32)
    expected = int4_linear(x, *packed(weight), out_features=50)
    x[1, 7] = bad
    out = int4_linear(x, *packed(weight), out_features=50)
    assert out[1].isnan().all()
    others = [row for row in range(m) if row != 1]
    assert torch.equal(out[others], expected[others])


def test_strided_deep_and_empty_inputs() -> None:
    x, weight = random_x(24, 64), random_weight(30, 64, 32)
    flat = int4_linear(x, *packed(weight), out_features=30)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(int4_linear(strided, *packed(weight), out_features=30), flat)
    deep = int4_linear(x.view(2, 3, 4, 64), *packed(weight), out_features=30)
    assert torch.equal(deep, flat.view(2, 3, 4, 30))
    assert int4_linear(x[:0], *packed(weight), out_features=30).shape == (0, 30)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_packing_loses_nothing(n: int, width: int, groups: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 256, (n, width), dtype=torch.uint8)
    panels = pack_panels(codes)
    assert panels.shape == (-(-n // 32), -(-width // 4), 128)
    assert torch.equal(unpack_panels(panels, n, width), codes)
    scales = torch.rand(n, groups).to(dtype)
    assert torch.equal(unpack_scales(pack_scales(scales), n), scales)


def test_a_word_lies_where_the_drawing_says() -> None:
    codes = torch.arange(33 * 8, dtype=torch.int16).to(torch.uint8).view(33, 8)
    panels = pack_panels(codes).view(torch.uint8)
    assert panels[0, 1, 4 * 5 : 4 * 6].tolist() == codes[5, 4:8].tolist()
    assert panels[1, 0, :4].tolist() == codes[32, :4].tolist()
    assert panels[1, :, 4:].eq(0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_thread_count_changes_no_bit(threads: int) -> None:
    x, weight = random_x(50, 256), random_weight(400, 256, 64)
    expected = int4_linear(x, *packed(weight), out_features=400)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(int4_linear(x, *packed(weight), out_features=400), expected)
    finally:
        torch.set_num_threads(before)


def test_the_gradient_is_that_of_the_float_layer() -> None:
    x, weight = random_x(3, 64).requires_grad_(), random_weight(5, 64, 32)
    bias = torch.zeros(5, requires_grad=True)
    int4_linear(x, *packed(weight), bias, out_features=5).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, 64), atol=1e-6)
    assert bias.grad.tolist() == [3.0] * 5


def test_it_passes_the_checks_of_torch() -> None:
    weight = random_weight(5, 64, 32)
    for bias in (None, torch.randn(5)):
        arguments = (random_x(3, 64), *packed(weight), bias, 5)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.fewbits.int4_linear.default, arguments, test_utils=tests)


def test_wrong_tensors_are_named() -> None:
    x, weight = random_x(3, 64), random_weight(5, 64, 32)
    codes, scales = packed(weight)
    cases = [
        (lambda: int4_linear(x.half(), codes, scales, out_features=5), "x: float32 is needed, got torch.float16"),
        (lambda: int4_linear(x[:, :48], codes, scales, out_features=5), r"packed: contiguous int8 \[1, 6, 128\]"),
        (lambda: int4_linear(x, codes, scales, out_features=33), r"packed: .* for N = 33, K = 64 in int4"),
        (lambda: int4_linear(x, weight.codes, scales, out_features=5), "packed: .* pack_panels makes it"),
        (lambda: int4_linear(x, codes, weight.scales, out_features=5), "scales: .* pack_scales makes it"),
        (lambda: int4_linear(x, codes, scales.half(), out_features=5), "scales: .* got torch.float16"),
        (lambda: int4_linear(x, codes, torch.ones(1, 16, 32), out_features=5), "16 groups do not divide K = 64"),
        (lambda: int4_linear(x, codes, scales, torch.ones(4), out_features=5), r"bias: float32 \[5\] is needed"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(FewbitsError, match=message):
            call()

"""Weights in few bits by float32 activations: every code decoded right, and sums within the stated bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels.panel_ops import FORMATS, weight_only_linear
from fewbits.kernels.panels import pack_panels, pack_scales, table
from fewbits.tensors.packing import pack_codes
from fewbits.tensors.quantized import quantize_weight

EPS = torch.finfo(torch.float32).eps
Packed = tuple[Tensor, Tensor, Tensor]  # panels, scales, and the weight that they stand for


def random_weight(
    format_name: str, n: int, k: int, group: int | None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Packed:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if format_name == "e2m1fn":  # the element of MXFP4, with scales that are powers of two
        group = group or k
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        scales = 2.0 ** torch.randint(-9, 9, (n, k // group))
        values = torch.tensor(table("e2m1fn"))[codes.int()].view(n, -1, group) * scales[..., None]
        return pack_panels(pack_codes(codes)), pack_scales(scales.to(dtype)), values.view(n, k)
    made = quantize_weight(weight, format_name, group_size=group, scale_dtype=dtype)
    return pack_panels(made.codes), pack_scales(made.scales), made.dequantize()


def random_x(m: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(m * k)
    return torch.randn(m, k, generator=generator) * 10 ** torch.randn(m, 1, generator=generator)


def assert_within_bound(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """As the docstring of ``weight_only_linear`` says."""
    exact = x.double() @ weight.double().T
    size = x.abs().double() @ weight.abs().double().T
    if bias is not None:
        exact, size = exact + bias, size + bias.abs()
    bound = (x.shape[1] / groups + groups + 3) * EPS / 2 * size
    assert ((found - exact).abs() <= bound).all()


# M, K, N, group size
SHAPES = [(1, 8, 1, 8), (1, 576, 192, 64), (2, 32, 33, 32), (5, 256, 32, 128), (12, 64, 64, 16), (13, 576, 193, 64),
          (40, 512, 65, None)]  # fmt: skip


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(("m", "k", "n", "group"), SHAPES)
def test_sums_are_within_their_bound(format_name: str, m: int, k: int, n: int, group: int | None) -> None:
    x = random_x(m, k)
    for dtype in (torch.float32, torch.bfloat16):
        codes, scales, weight = random_weight(format_name, n, k, group, dtype)
        for bias in (None, torch.randn(n)):
            found = weight_only_linear(x, codes, scales, bias, out_features=n, format_name=format_name)
            assert_within_bound(found, x, weight, bias, scales.shape[1])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["int8", "e4m3fn"]))
def test_a_channel_may_be_one_group_of_any_size(m: int, k: int, n: int, format_name: str) -> None:
    codes, scales, weight = random_weight(format_name, n, k, None)
    x = random_x(m, k)
    found = weight_only_linear(x, codes, scales, out_features=n, format_name=format_name)
    assert_within_bound(found, x, weight, None, 1)


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_code_at_every_place_is_decoded_exactly(format_name: str) -> None:
    values = table(format_name)
    if values is None:
        codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
        codes = codes[(codes & 127) != 127] if format_name == "e4m3fn" else codes
        dtype = torch.int8 if format_name == "int8" else torch.float8_e4m3fn
        expected, of_word = codes.view(dtype).float(), 4
    else:
        codes, expected, of_word = torch.arange(16, dtype=torch.uint8), torch.tensor(values), 8
    for place in range(of_word):
        rows = torch.zeros(len(codes), of_word, dtype=torch.uint8)
        rows[:, place] = codes
        x = torch.zeros(1, of_word)
        x[0, place] = 1
        panels = pack_panels(rows if values is None else pack_codes(rows))
        one = pack_scales(torch.ones(len(codes), 1))
        found = weight_only_linear(x, panels, one, out_features=len(codes), format_name=format_name)
        assert torch.equal(found[0], expected)


def test_tokens_are_rounded_to_e4m3fn_first() -> None:
    codes, scales, weight = random_weight("e4m3fn", 40, 96, None)
    for m in (1, 2, 30):
        x = torch.cat([random_x(m, 96), torch.zeros(1, 96), torch.full((1, 96), 1e-40)])
        step = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (x / step).to(torch.float8_e4m3fn).float()
        found = weight_only_linear(x, codes, scales, out_features=40, format_name="e4m3fn", e4m3_tokens=True)
        assert_within_bound(found, rounded * step, weight, None, 1)


def test_every_float_near_a_code_is_rounded_as_torch_does() -> None:
    values = torch.arange(126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middles, middles * (1 + EPS), middles * (1 - EPS)])
    x = torch.cat([near, -near, torch.tensor([448.0])])[None]  # the largest makes the scale 1
    K = x.shape[1]
    identity = torch.eye(K).to(torch.float8_e4m3fn)
    found = weight_only_linear(x, pack_panels(identity), pack_scales(torch.ones(K, 1)), out_features=K,
                               format_name="e4m3fn", e4m3_tokens=True)  # fmt: skip
    assert torch.equal(found, x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("e4m3_tokens", [False, True])
def test_a_bad_value_spoils_its_own_token_only(bad: float, e4m3_tokens: bool) -> None:
    codes, scales, _ = random_weight("e4m3fn", 50, 64, None)
    x = random_x(14, 64)

    def product() -> Tensor:
        return weight_only_linear(x, codes, scales, out_features=50, format_name="e4m3fn", e4m3_tokens=e4m3_tokens)

    expected = product()
    x[1, 7] = bad
    out = product()
    assert not out[1].isfinite().any()
    others = [row for row in range(14) if row != 1]
    assert torch.equal(out[others], expected[others])


def test_strided_deep_and_empty_inputs() -> None:
    codes, scales, _ = random_weight("nf4", 30, 64, 32)

    def product(x: Tensor) -> Tensor:
        return weight_only_linear(x, codes, scales, out_features=30, format_name="nf4")

    x = random_x(24, 64)
    flat = product(x)
    assert torch.equal(product(x.T.contiguous().T), flat)
    assert torch.equal(product(x.view(2, 3, 4, 64)), flat.view(2, 3, 4, 30))
    assert product(x[:0]).shape == (0, 30)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_thread_count_changes_no_bit(threads: int) -> None:
    codes, scales, _ = random_weight("nf4", 400, 256, 64)
    x = random_x(50, 256)
    expected = weight_only_linear(x, codes, scales, out_features=400, format_name="nf4")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(weight_only_linear(x, codes, scales, out_features=400, format_name="nf4"), expected)
    finally:
        torch.set_num_threads(before)


def test_the_gradient_is_that_of_the_float_layer() -> None:
    codes, scales, weight = random_weight("e4m3fn", 5, 64, None)
    for e4m3_tokens in (False, True):
        x, bias = random_x(3, 64).requires_grad_(), torch.zeros(5, requires_grad=True)
        weight_only_linear(x, codes, scales, bias, out_features=5, format_name="e4m3fn",
                           e4m3_tokens=e4m3_tokens).sum().backward()  # fmt: skip
        assert torch.allclose(x.grad, weight.sum(0).expand(3, 64), atol=1e-6)
        assert bias.grad.tolist() == [3.0] * 5


def test_it_passes_the_checks_of_torch() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for format_name in FORMATS:
        codes, scales, _ = random_weight(format_name, 5, 64, 32)
        arguments = (random_x(3, 64), codes, scales, None, 5, format_name, False)
        torch.library.opcheck(torch.ops.fewbits.weight_only_linear.default, arguments, test_utils=tests)


def test_wrong_arguments_are_named() -> None:
    codes, scales, _ = random_weight("int8", 5, 60, None)
    x = random_x(3, 60)
    cases = [
        (lambda: weight_only_linear(x, codes, scales, out_features=5, format_name="fp16"),
         "format_name: 'fp16' has no such kernel; one of int8, e4m3fn, int4, nf4, e2m1fn has"),
        (lambda: weight_only_linear(x, codes, scales, out_features=5, format_name="nf4"),
         r"packed: contiguous int8 \[1, 8, 128\] is needed for N = 5, K = 60 in nf4"),
        (lambda: weight_only_linear(x[:, :59], codes, scales.expand(1, 7, 32).contiguous(), out_features=5,
                                    format_name="int8"), "scales: 7 groups do not divide K = 59 input features"),
        (lambda: weight_only_linear(x, codes, scales[0], out_features=5, format_name="int8"),
         r"scales: float32 or bfloat16 \[1, G, 32\] is needed"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(FewbitsError, match=message):
            call()

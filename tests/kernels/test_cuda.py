"""Kernels on a GPU beside the ops' meaning on the CPU. Without a GPU: `test_triton`."""

from typing import Any

import pytest
import torch

from fewbits.kernels import ops, stored_ops, stored_reference
from fewbits.kernels.panel_reference import round_tokens
from fewbits.tensors.quantized import quantize_weight

pytestmark = pytest.mark.cuda
EPS = torch.finfo(torch.float32).eps
KINDS = [
    ("int8", None, "int8"), ("int8", 128, None), ("int4", 128, "int8"), ("int4", 32, "int8"), ("nf4", 64, None),
    ("e4m3fn", None, "e4m3fn"), ("e4m3fn", None, None),
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(N: int, K: int, format_name: str, group: int | None) -> tuple[Any, torch.Tensor, torch.Tensor]:
    weight = quantize_weight(random(N, K, seed=1), format_name, group_size=group, scale_dtype=torch.bfloat16)
    return weight, weight.codes.view(torch.int8), random(N, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 64, 5000])
def test_codes_of_tokens_are_those_of_the_cpu(K: int, dtype: torch.dtype) -> None:
    from fewbits.kernels.cuda.tokens import quantize_tokens

    x = (random(9, K) * torch.exp2(torch.arange(9.0) - 4)[:, None]).to(dtype)
    x[0], x[1, 0], x[2, -1] = 0, float("nan"), float("inf")
    codes, scales = quantize_tokens(x.cuda(), "int8")
    expected, expected_scales = ops.quantize_per_token(x.float())
    assert torch.equal(codes[0].cpu(), expected)
    assert torch.equal(scales[0].cpu().nan_to_num(), expected_scales[:, 0].nan_to_num())
    codes, scales = quantize_tokens(x.cuda(), "e4m3fn")
    numbers, expected_scales = round_tokens(x.float())
    assert torch.equal(codes[0].cpu().view(torch.float8_e4m3fn).float(), numbers)
    assert torch.equal(scales[0].cpu().nan_to_num(), expected_scales[:, 0].nan_to_num())


@pytest.mark.parametrize(("format_name", "group", "activations"), KINDS)
@pytest.mark.parametrize("M", [1, 17, 64, 300])
@pytest.mark.parametrize(("N", "K"), [(256, 512), (37, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_layer_beside_the_exact_sum(
    format_name: str, group: int | None, activations: str | None, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    weight, codes, bias = layer(N, K, format_name, group)
    x = random(M, K).to(dtype)
    got = stored_ops.stored_linear(
        x.cuda(), codes.cuda(), weight.scales.cuda(), bias.cuda(), format_name=format_name, activations=activations
    )
    numbers = x.double()
    if activations is not None:
        round_ = ops.quantize_per_token if activations == "int8" else round_tokens
        numbers = torch.mul(*round_(x.float())).double()
    exact = numbers @ weight.dequantize().double().T + bias.double()
    sizes = numbers.abs() @ weight.dequantize().double().abs().T + bias.double().abs()
    assert (got.dtype, got.shape) == (dtype, (M, N))
    # Sums in float32; the weight (or its 16 values), the bias and the result are rounded to the dtype of x.
    assert ((got.cpu().double() - exact).abs() <= ((K + 5) * EPS + 2 * torch.finfo(dtype).eps) * sizes).all()


@pytest.mark.parametrize(("format_name", "group"), [("int8", None), ("int4", 128)])
@pytest.mark.parametrize("M", [1, 40, 100])
def test_sums_of_integers_give_the_bits_of_the_cpu(format_name: str, group: int | None, M: int) -> None:
    weight, codes, bias = layer(64, 256, format_name, group)
    x = random(M, 256)
    got = stored_ops.stored_linear(
        x.cuda(), codes.cuda(), weight.scales.cuda(), bias.cuda(), format_name=format_name, activations="int8"
    )
    assert torch.equal(got.cpu(), stored_reference.stored_linear(x, codes, weight.scales, bias, format_name, "int8"))


@pytest.mark.parametrize("M", [1, 40, 100])
def test_two_digits_give_the_bits_of_the_cpu(M: int) -> None:
    weight, codes, bias = layer(64, 256, "int8", None)
    x = random(M, 256)
    got = stored_ops.stored_linear_two_digits(x.cuda(), codes.cuda(), weight.scales.cuda(), bias.cuda())
    assert torch.equal(got.cpu(), stored_reference.stored_linear_two_digits(x, codes, weight.scales, bias))


@pytest.mark.parametrize(("format_name", "group", "activations"), KINDS)
@pytest.mark.parametrize("M", [1, 100])
def test_a_cuda_graph_holds_it(format_name: str, group: int | None, activations: str | None, M: int) -> None:
    weight, codes, bias = layer(256, 512, format_name, group)
    codes, scales, bias = codes.cuda(), weight.scales.cuda(), bias.cuda()
    x = random(M, 512).cuda().bfloat16()

    def step() -> torch.Tensor:
        return stored_ops.stored_linear(x, codes, scales, bias, format_name=format_name, activations=activations)

    step()  # Triton compiles here
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    x.copy_(random(M, 512, seed=5))
    graph.replay()
    assert torch.equal(out, step())


@pytest.mark.parametrize("activations", ["int8", "e4m3fn"])
def test_a_bad_token_spoils_no_other(activations: str) -> None:
    format_name = activations
    weight, codes, _ = layer(64, 256, format_name, None)
    for M in (4, 100):
        x = random(M, 256).cuda()
        arguments: Any = {"bias": None, "format_name": format_name, "activations": activations}
        clean = stored_ops.stored_linear(x, codes.cuda(), weight.scales.cuda(), **arguments)
        x[2, 7] = float("inf")
        spoiled = stored_ops.stored_linear(x, codes.cuda(), weight.scales.cuda(), **arguments)
        assert spoiled[2].isnan().all()
        others = [row for row in range(M) if row != 2]
        assert torch.equal(spoiled[others], clean[others])

"""What nobody should give the kernels and everybody does. ``test_isa.py`` runs this file for every instruction set.

The files beside this one have each op's own: bad numbers, strides, empty batches, numbers of threads. Here are layers
of every precision as models call them, several Python threads at once, and processes that were forked.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_attention import heads
from torch import Tensor

from fewbits.kernels.attention import attention
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.precision import precision_named
from fewbits.tensors.quantized import quantize_weight

PRECISIONS = ("int8", "head", "int8-weight", "int4", "nf4", "mxfp4", "fp8")
EVERY = pytest.mark.parametrize("precision", PRECISIONS)
GROUPED = ("int8-weight", "int4", "nf4", "mxfp4")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def layer(precision: str, N: int, K: int) -> QuantLinear:
    generator = torch.Generator().manual_seed(N * K)
    weight, bias = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    if precision == "head":
        return QuantHead(quantize_weight(weight, "int8"), bias)
    named = precision_named(precision)
    quantized = quantize_weight(weight, named.weights.name, group_size=32 if precision in GROUPED else None)
    return QuantLinear(quantized, bias, activations=named.activations and named.activations.name)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_right(linear: QuantLinear, x: Tensor, got: Tensor) -> None:
    """As its definition in float64 says, but for what rounding of activations and of results is allowed."""
    weight = linear.quantized_weight().dequantize().double()
    bias = 0 if linear.bias is None else linear.bias.double()
    exact = x.double() @ weight.T + bias
    # int8: half a step of 1/127 of the largest; e4m3fn: 3 bits of mantissa, 2⁻⁴ of each at most; dtypes: an ULP of x
    step = {None: 0.0, "int8": 0.5 / 127, "e4m3fn": 2.0**-4}[linear.activations]
    eps = torch.finfo(x.dtype).eps
    allowed = (step + 2 * eps) * x.double().abs().amax(-1, keepdim=True) * weight.abs().sum(-1) + eps * exact.abs()
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= allowed * (1 + 1e-3) + 1e-6).all()


@EVERY
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 37), (33, 1), (5, 129), (67, 250), (1, 32), (3, 96), (33, 160)])
def test_odd_shapes(precision: str, N: int, K: int) -> None:
    if precision in GROUPED:
        K = max(K // 32 * 32, 32)  # whole groups
    linear = layer(precision, N, K)
    for M in (1, 2, 13, 40):
        x = random(M, K)
        assert_right(linear, x, linear(x))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides_of_activations(precision: str, dtype: torch.dtype) -> None:
    linear = layer(precision, 40, 64)
    for x in (random(3, 64), random(64, 3).T, random(6, 128)[::2, ::2], random(1, 64).expand(3, 64)):
        assert_right(linear, x.to(dtype), linear(x.to(dtype)))
    assert linear(random(2, 3, 64).to(dtype).transpose(0, 1)).shape == (3, 2, 40)


@EVERY
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 1, 64)])
def test_no_tokens(precision: str, shape: tuple[int, ...]) -> None:
    assert layer(precision, 40, 64)(torch.empty(*shape)).shape == (*shape[:-1], 40)


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("M", [3, 40])
def test_a_bad_number_spoils_its_token_only(precision: str, bad: float, M: int) -> None:
    linear, x = layer(precision, 40, 64), random(M, 64)
    clean = linear(x)
    x[1, 7] = bad
    got = linear(x)
    assert not got[1].isfinite().any()
    got[1] = clean[1]
    assert torch.equal(got, clean)


@EVERY
@pytest.mark.parametrize("threads", [1, 3, 2 * (os.cpu_count() or 1) + 1])
def test_any_number_of_threads(precision: str, threads: int) -> None:
    linear, x = layer(precision, 400, 320), random(50, 320)
    expected, one = linear(x), linear(x[:1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(linear(x), expected)
        assert torch.equal(linear(x[:1]), one)
    finally:
        torch.set_num_threads(before)


def _attend(x: Tensor) -> Tensor:
    query, key, value = heads(1, 1, 8, 2, 600, 64)
    return attention(query * x[0, 0], key, value, None, 0.2)


@pytest.mark.parametrize("what", [*PRECISIONS, "attention"])
def test_several_python_threads_at_once(what: str) -> None:
    call: Callable[[Tensor], Tensor] = _attend if what == "attention" else layer(what, 400, 320)
    inputs = [random(M, 320) for M in (1, 2, 40)]
    expected = [call(x) for x in inputs]

    def work(n: int) -> bool:
        with torch.no_grad():
            return torch.equal(call(inputs[n % 3]), expected[n % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(60)))


# PyTorch's own operations hang in a forked process when they want more than one thread and its parent has used them;
# what the child does with PyTorch here is too small for that.
_FORK = """
import os, sys, torch
torch.set_num_threads(2)
torch.set_grad_enabled(False)
from test_bad_input import layer, random
from test_attention import heads
from fewbits.kernels.attention import attention
linear, x, tensors = layer({precision!r}, 400, 320), random(4, 320), heads(1, 1, 8, 2, 600, 64)
if {used}:
    torch.randn(400, 400) @ torch.randn(400, 400)
    torch.randn(1 << 20).exp()
if {ours}:
    expected = linear(x), attention(*tensors, None, 0.2)
child = os.fork()
got = linear(x), attention(*tensors, None, 0.2)
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
grandchild = os.fork()
again = linear(x), attention(*tensors, None, 0.2)
assert all(one.isfinite().all() and torch.allclose(one, two) for one, two in zip(got, again))
if {ours}:
    assert all(torch.allclose(one, two) for one, two in zip(got, expected))
if grandchild:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
os._exit(0)
"""


@pytest.mark.skipif("FEWBITS_ISA" in os.environ, reason="threads are the same for every instruction set")
@pytest.mark.parametrize(("precision", "used", "ours"), [("int8", 0, 0), ("int4", 1, 0), ("nf4", 0, 1)])
def test_after_a_fork(precision: str, used: int, ours: int) -> None:
    """Whoever started the threads that the child does not have: PyTorch, or the kernels."""
    script = _FORK.format(precision=precision, used=used, ours=ours)
    place = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run([sys.executable, "-c", script], env=place, timeout=120, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.measure.memory import (
    bits_per_weight,
    checkpoint_bytes,
    peak_resident_bytes,
    resident_bytes,
    weight_bytes,
)
from fewbits.models.linear import QuantHead
from fewbits.tensors.quantized import quantize_per_channel


class Packed(nn.Module):
    """A quantized layer of `weights` weights in `bits` bits."""

    def __init__(self, bits: int, weights: int) -> None:
        super().__init__()
        self.counts = bits, weights

    def quantized_bits(self) -> tuple[int, int]:
        return self.counts


def test_tied_weights_count_once(tiny_llama: Callable[..., Any]) -> None:
    tied, untied = tiny_llama(tie=True), tiny_llama(tie=False)
    assert weight_bytes(untied) - weight_bytes(tied) == 256 * 32 * 4
    assert checkpoint_bytes(untied) - checkpoint_bytes(tied) == 256 * 32 * 4


def test_memory_has_the_buffers_that_a_checkpoint_leaves_out() -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("kept", torch.zeros(5, dtype=torch.int8))
    model.register_buffer("computed", torch.zeros(7), persistent=False)
    assert weight_bytes(model) == (4 * 3 + 3) * 4 + 5 + 7 * 4
    assert checkpoint_bytes(model) == (4 * 3 + 3) * 4 + 5


def test_a_view_holds_its_whole_storage_in_memory_but_not_on_disk() -> None:
    model = nn.Module()
    whole = torch.zeros(100)
    model.register_buffer("some", whole[:10])
    model.register_buffer("others", whole[20:40])
    assert weight_bytes(model) == 400


def test_meta_tensors_are_told_apart() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    assert weight_bytes(model) == (12 + 6) * 4


def test_a_wrapper_tensor_counts_its_parts() -> None:
    class Wrapper(torch.Tensor):
        parts = ("codes", "scales")

        @staticmethod
        def __new__(cls, codes: torch.Tensor, scales: torch.Tensor) -> "Wrapper":
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
            self.codes, self.scales = codes, scales

        def __tensor_flatten__(self) -> tuple[tuple[str, ...], None]:
            return self.parts, None

        @classmethod
        def __torch_dispatch__(cls, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if op is torch.ops.aten.detach.default:
                return cls(args[0].codes, args[0].scales)
            raise NotImplementedError(op)

    model = nn.Module()
    model.weight = nn.Parameter(Wrapper(torch.zeros(8, 4, dtype=torch.int8), torch.zeros(8)), requires_grad=False)
    assert weight_bytes(model) == 8 * 4 + 8 * 4


def test_bits_of_quantized_layers_are_weighted_by_their_size() -> None:
    model = nn.Sequential(Packed(bits=8 * 100 + 16, weights=100), Packed(bits=4 * 300, weights=300))
    assert bits_per_weight(model) == (816 + 1200) / 400


def test_layers_kept_in_float_beside_quantized_ones_are_left_out() -> None:
    assert bits_per_weight(nn.Sequential(Packed(bits=800, weights=100), nn.Linear(10, 10))) == 8.0


def test_the_output_head_is_left_out() -> None:
    head = QuantHead(quantize_per_channel(torch.randn(10, 32)))
    assert bits_per_weight(nn.Sequential(Packed(bits=400, weights=100), head)) == 4.0


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)])
def test_bits_of_a_float_model_are_its_dtypes(dtype: torch.dtype, bits: int) -> None:
    assert bits_per_weight(nn.Sequential(nn.Embedding(5, 10), nn.Linear(10, 10)).to(dtype)) == bits


def test_a_model_without_linear_layers_has_no_bits_per_weight() -> None:
    assert bits_per_weight(nn.Embedding(5, 10)) is None


def test_the_peak_is_no_less_than_what_is_held() -> None:
    assert 0 < resident_bytes() <= peak_resident_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="the pages of an allocation are counted at once on Linux")
def test_a_large_tensor_shows_in_the_resident_size() -> None:
    gc.collect()  # what goes while the tensor comes would hide it
    before = resident_bytes()
    held = torch.ones(256 << 20, dtype=torch.uint8)
    assert resident_bytes() - before > 0.9 * held.nbytes

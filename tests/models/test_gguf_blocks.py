import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from fewbits.errors import FewbitsError
from fewbits.models.gguf_blocks import encode_blocks

KINDS = [T.Q8_0, T.Q4_0, T.Q4_1]


def theirs(weight: torch.Tensor, kind: T) -> np.ndarray:
    with np.errstate(all="ignore"):  # an inverse scale that overflows
        blocks = gguf.quantize(weight.float().numpy(), kind)
    if kind is T.Q4_1:  # numpy's sign is chance where the smallest are zeros of both signs, or all are
        halves = blocks.reshape(-1, 20)[:, :4].copy().view(np.uint16)
        zero_minimum = weight.float().reshape(-1, 32).amin(dim=1).numpy() == 0
        halves[(halves == 0x8000) & np.stack([np.ones_like(zero_minimum), zero_minimum], axis=1)] = 0
        blocks.reshape(-1, 20)[:, :4] = halves.view(np.uint8)
    return blocks


def check(weight: torch.Tensor, kind: T) -> None:
    ours = encode_blocks(weight, kind)
    assert ours.dtype == torch.uint8
    np.testing.assert_array_equal(ours.numpy(), theirs(weight, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_numbers_of_every_size_are_encoded_as_gguf_does(kind: T, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # each block its own size, from what half precision cannot hold as a scale to its largest
    sizes = torch.logspace(-9, 4, 40 * 64).view(40, 64, 1)
    weight = (torch.randn(40, 64, 32, generator=generator) * sizes).view(40, 64 * 32)
    check(weight.to(dtype).clamp(-60000, 60000), kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_ties_are_rounded_as_gguf_does(kind: T) -> None:
    # the extremes fix the scale; the rest lie on, just below and just above the middle between two codes
    steps = {T.Q8_0: torch.arange(-127, 127), T.Q4_0: torch.arange(-8, 7), T.Q4_1: torch.arange(0, 15)}[kind]
    extremes = {T.Q8_0: [127.0, -127.0], T.Q4_0: [-8.0, 7.5], T.Q4_1: [0.0, 15.0]}[kind]
    ties = steps.float() + 0.5
    values = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    values = values[(values >= min(extremes)) & (values <= max(extremes))]
    values = torch.nn.functional.pad(values, (0, -len(values) % 30)).view(-1, 30)
    blocks = torch.cat([torch.tensor(extremes).expand(len(values), 2), values], dim=1)
    for scale in (1.0, 2.0**-12, 0.1, 1 / 3):
        check(blocks * scale, kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_zeros_subnormals_and_equal_magnitudes_are_encoded_as_gguf_does(kind: T) -> None:
    smallest = torch.finfo(torch.float32).smallest_normal * 2**-23
    rows = [
        torch.zeros(32),
        -torch.zeros(32),
        torch.full((32,), 0.75),
        torch.full((32,), -0.75),
        torch.tensor([1.0, -1.0] * 16),  # the first of the largest magnitudes gives Q4_0's scale its sign
        torch.tensor([-1.0, 1.0] * 16),
        torch.tensor([0.25, 2.0, -2.0, 0.5] * 8),
        torch.tensor([0.25, -2.0, 2.0, 0.5] * 8),
        torch.cat([torch.zeros(31), torch.tensor([smallest])]),
        torch.linspace(-1, 1, 32) * torch.finfo(torch.float32).smallest_normal,  # whose inverse scale overflows
        torch.linspace(-1, 1, 32) * smallest * 1000,
        torch.linspace(-1, 1, 32) * 1e-37,
        torch.linspace(-1, 1, 32) * 60000,
        torch.linspace(0, 1, 32) * 60000,
    ]
    for row in rows:
        check(row.view(1, 32), kind)
    check(torch.cat(rows).view(len(rows) // 2, 64), kind)


def test_zeros_of_both_signs_keep_gguf_s_sign_of_the_scale() -> None:
    for first in (0.0, -0.0):
        check(torch.tensor([first, *[-first] * 31]).view(1, 32), T.Q4_0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_chunks_are_joined_and_views_are_read_as_they_look(kind: T, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.models.gguf_blocks._CHUNK", 128)
    weight = torch.randn(96, 7, generator=torch.Generator().manual_seed(1)).t()
    check(weight, kind)
    assert encode_blocks(torch.empty(0, 64), kind).shape == (0, 2 * gguf.GGML_QUANT_SIZES[kind][1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_is_refused_with_its_row(kind: T, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.models.gguf_blocks._CHUNK", 128)
    weight = torch.ones(9, 64)
    weight[7, 50] = value
    with pytest.raises(FewbitsError, match=rf"row 7 holds {value}, which no {kind.name} block can hold"):
        encode_blocks(weight, kind)


@pytest.mark.parametrize(("kind", "limit"), [(T.Q8_0, 127 * 65504.0), (T.Q4_0, 8 * 65504.0), (T.Q4_1, 65504.0)])
def test_a_scale_beyond_half_precision_is_refused_with_its_row(kind: T, limit: float) -> None:
    weight = torch.zeros(5, 64)
    weight[3, 1] = -limit
    check(weight, kind)
    weight[3, 1] *= 1.001
    with pytest.raises(FewbitsError, match=rf"row 3 holds .*, for which the scale of a {kind.name} block is beyond"):
        encode_blocks(weight, kind)


def test_rows_of_broken_blocks_are_refused() -> None:
    with pytest.raises(FewbitsError, match="rows of 33 elements are not whole Q8_0 blocks of 32; store them as F16"):
        encode_blocks(torch.zeros(2, 33), T.Q8_0)

"""Rotation by blocks. ``test_isa.py`` runs this file for every instruction set."""

import math

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.kernels import rotation
from fewbits.kernels.rotation import block_of, rotate

BLOCKS = (16, 32, 64, 128, 256, 512)


def matrix(block: int) -> torch.Tensor:
    """By its definition, in float64."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_it_is_the_matrix_and_bit_equal_to_the_reference(block: int, rows: int) -> None:
    x = torch.randn(rows, 3 * block, generator=torch.Generator().manual_seed(block + rows))
    found = rotate(x, block)
    assert torch.equal(found.view(torch.int32), rotation._reference(x, block).view(torch.int32))
    expected = (x.double().view(rows, 3, block) @ matrix(block)).view(x.shape)
    # Each of log2(block) additions rounds, relative to the norm of a block, which none of them changes.
    bound = (math.log2(block) + 2) * torch.finfo(torch.float32).eps * x.view(rows, 3, block).norm(dim=-1).max()
    assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_its_own_inverse(block: int) -> None:
    x = torch.randn(2, 2, 2 * block)
    torch.testing.assert_close(rotate(rotate(x, block), block), x, rtol=1e-5, atol=1e-5)


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    found = rotate(x, 64)
    assert (found[0, :64] == 0).all()
    assert (found[0, 64:].abs() == 1).all()


def test_what_is_not_finite_stays_in_its_block_and_row() -> None:
    x = torch.ones(2, 128)
    x[0, 3], x[0, 4] = math.inf, math.nan
    found = rotate(x, 64)
    assert found[0, :64].isnan().all()
    assert found[0, 64:].isfinite().all()
    assert found[1].isfinite().all()


def test_strides_gradients_and_compilation() -> None:
    x = torch.randn(64, 5).T.requires_grad_()
    weights = torch.randn(5, 64)
    (rotate(x, 32) * weights).sum().backward()
    torch.testing.assert_close(x.grad, rotate(weights, 32))
    torch.library.opcheck(torch.ops.fewbits.rotate, (torch.randn(3, 64, requires_grad=True), 16))


@pytest.mark.parametrize(("K", "block"), [(576, 64), (1536, 512), (2048, 512), (96, 32), (48, 16), (8, 0), (100, 0)])
def test_the_block_of_a_layer(K: int, block: int) -> None:
    assert block_of(K) == block


@pytest.mark.parametrize("block", [0, 8, 24, 64, 1024])
def test_a_block_that_does_not_fit_is_refused(block: int) -> None:
    with pytest.raises(FewbitsError, match=f"block={block}: a power of two from 16 to 512 that divides K = 96"):
        rotate(torch.zeros(2, 96), block)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(FewbitsError, match="float32 is needed"):
        rotate(torch.zeros(2, 64, dtype=torch.bfloat16), 64)

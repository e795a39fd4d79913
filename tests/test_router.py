"""SoftTop-k against its definition and autograd; hard top-k; the routers."""

import pytest
import torch

from sla2.router import (
    LearnedRouter,
    MeanPoolRouter,
    OffsetRouter,
    RandomRouter,
    Shape,
    soft_top_k,
    straight_through,
)
from sla2_kernels.reference import top_k_mask


@pytest.mark.parametrize("kept", [0.5, 1, 3, 7.25])
def test_soft_top_k_rows_sum_to_kept(kept):
    mask = soft_top_k(torch.randn(2, 3, 5, 8, dtype=torch.float64) * 3, kept, 0.1)
    torch.testing.assert_close(mask.sum(-1), torch.full((2, 3, 5), float(kept), dtype=torch.float64))
    assert ((mask >= 0) & (mask <= 1)).all()


def test_soft_top_k_gradient_goes_through_lambda():
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_top_k(x, 2, 0.7), (scores,), eps=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(soft_top_k(scores, 2, 0.7)[:, 0].sum(), scores)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(3, dtype=torch.float64))  # adding a constant changes nothing


def test_soft_top_k_of_saturated_rows_has_finite_zero_gradient():
    scores = torch.tensor([[1e4, 0.0, -1e4, -2e4]], requires_grad=True)
    mask = soft_top_k(scores, 2, 0.1)
    mask.sum().backward()
    torch.testing.assert_close(mask, torch.tensor([[1.0, 1.0, 0.0, 0.0]]), atol=1e-3, rtol=0)
    assert (scores.grad == 0).all()


def test_soft_top_k_keeps_everything_or_refuses():
    scores = torch.randn(2, 4)
    assert (soft_top_k(scores, 4, 0.1) == 1).all()
    for kept in (0, 5):
        with pytest.raises(ValueError, match="at most 4 key blocks"):
            soft_top_k(scores, kept, 0.1)


def test_soft_top_k_approaches_top_k_as_tau_falls():
    scores = torch.randperm(40, generator=torch.Generator().manual_seed(1)).double().view(4, 10)
    torch.testing.assert_close(soft_top_k(scores, 3, 0.01), top_k_mask(scores, 3).double(), atol=1e-6, rtol=0)


def test_top_k_breaks_ties_by_block_index():
    assert top_k_mask(torch.zeros(1, 5), 2).tolist() == [[True, True, False, False, False]]


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    scores = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    out = straight_through(scores, 2, 0.5)
    torch.testing.assert_close(out, top_k_mask(scores, 2).double())
    weight = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * weight).sum(), scores)
    (expected,) = torch.autograd.grad((soft_top_k(scores, 2, 0.5) * weight).sum(), scores)
    torch.testing.assert_close(found, expected)


def shape(heads=3, dim=8, key_blocks=7, stride=2.0):
    return Shape(heads, dim, key_blocks, stride)


@pytest.mark.parametrize("kind", [LearnedRouter, OffsetRouter])
def test_learned_routers_start_as_the_heuristic(kind):
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8)
    torch.testing.assert_close(kind(shape())(q, k), MeanPoolRouter(shape())(q, k))


def test_offset_router_has_projections_and_a_bias_of_each_head():
    router, q, k = OffsetRouter(shape()), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8)
    for parameter in router.parameters():
        parameter.data.normal_()
    found = router(q, k)
    for head, row, column in ((0, 0, 0), (1, 3, 6), (2, 2, 0)):
        pair = (router.query[head] @ q[0, head, row]) @ (router.key[head] @ k[0, head, column])
        bias = router.bias[head, column - 2 * row + 6] * 8**0.5  # two key blocks in a query block, offset 0 at 6
        torch.testing.assert_close(found[0, head, row, column], pair + bias)


def test_offset_router_at_another_length():
    """Offsets mean the same; those beyond the trained ones take the outermost bias."""
    router = OffsetRouter(shape(key_blocks=4))
    router.bias.data = torch.arange(7.0).expand(3, 7)
    found = router(torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 8, 8))[0, 0] / 8**0.5
    assert found[0].tolist() == [3, 4, 5, 6, 6, 6, 6, 6]
    assert found[3].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


def test_random_router_is_repeatable_and_blind():
    router = RandomRouter(shape())
    a, b = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    torch.testing.assert_close(router(a, b), router(a + 1, b - 1))
    assert router(a, b)[0].unique().numel() > 100

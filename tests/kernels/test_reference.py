"""The oracle against the definitions in float64, its gradients, its limits, and the low-bit forward."""

import math

import pytest
import torch

from sla2_kernels import linear_attention, reference, sparse_attention

SHAPES = [(64, 16, 8, 16), (127, 32, 16, 12), (200, 64, 32, 32), (33, 32, 16, 8)]  # N, block_q, block_k, D


def inputs(length, block_q, block_k, dim, kept=2, dtype=torch.float64):
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, length, dim, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))
    rows, columns = reference.num_blocks(length, block_q), reference.num_blocks(length, block_k)
    order = torch.rand(2, 3, rows, columns, generator=draw).argsort(-1)[..., :kept]
    mask = torch.zeros(2, 3, rows, columns, dtype=torch.bool).scatter_(-1, order, True)
    return q, k, v, mask


def token_mask(mask, length, block_q, block_k):
    i = torch.arange(length)
    return mask[:, :, i // block_q][..., i // block_k]


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_attention_is_softmax_over_kept_blocks(shape):
    length, block_q, block_k, dim = shape
    q, k, v, mask = inputs(*shape)
    scores = (q @ k.mT / math.sqrt(dim)).masked_fill(~token_mask(mask, length, block_q, block_k), -math.inf)
    out, lse = sparse_attention(q, k, v, mask, block_q=block_q, block_k=block_k)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_attention_is_the_normalised_product_over_weighted_blocks(shape):
    length, block_q, block_k, _ = shape
    q, k, v, mask = inputs(*shape)
    weight = torch.rand(mask.shape, dtype=torch.float64)
    a = (q.softmax(-1) @ k.softmax(-1).mT) * token_mask(weight, length, block_q, block_k)
    out = linear_attention(q, k, v, weight, block_q=block_q, block_k=block_k)
    torch.testing.assert_close(out, (a / a.sum(-1, keepdim=True)) @ v)


def test_all_blocks_kept_is_full_attention_and_leaves_the_linear_branch_zero():
    q, k, v, mask = inputs(100, 32, 16, 16)
    out, _ = sparse_attention(q, k, v, torch.ones_like(mask), block_q=32, block_k=16)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    q.requires_grad_()
    linear = linear_attention(q, k, v, torch.zeros_like(mask), block_q=32, block_k=16)
    linear.sum().backward()
    assert (linear == 0).all()
    assert q.grad.isfinite().all()


def test_gradients_of_both_branches():
    q, k, v, mask = inputs(13, 4, 4, 4)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    blocks = {"block_q": 4, "block_k": 4}
    assert torch.autograd.gradcheck(lambda *x: sparse_attention(*x, mask, **blocks)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, ~mask, **blocks), (q, k, v))
    log_mask = torch.rand(mask.shape, dtype=torch.float64).log().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: reference.soft_sparse_attention(q, k, v, b, 4, 4), (log_mask,))


def test_written_out_backward_equals_autograd():
    q, k, v, mask = inputs(127, 32, 16, 12)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = reference.sparse_attention(q, k, v, mask, 32, 16)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    found = reference.sparse_attention_backward(q, k, v, out, lse, grad, mask, 32, 16)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_soft_mask_of_zeros_and_ones_is_the_hard_operator():
    q, k, v, mask = inputs(64, 16, 8, 16)
    soft = reference.soft_sparse_attention(q, k, v, mask.double().clamp_min(1e-300).log(), 16, 8)
    torch.testing.assert_close(soft, reference.sparse_attention(q, k, v, mask, 16, 8)[0])


def test_block_mass_sums_to_one_and_measures_the_kept_share():
    q, k, _, mask = inputs(127, 32, 16, 12)
    mass = reference.block_mass(q, k, 32, 16)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    dense = (q @ k.mT / math.sqrt(12)).softmax(-1)
    kept = (dense * token_mask(mask, 127, 32, 16)).sum(-1)
    torch.testing.assert_close((mass * mask).sum(-1)[..., 0], kept[..., :32].mean(-1))


@pytest.mark.parametrize(
    ("precision", "low", "high"), [("int8-bf16", 1e-3, 2e-2), ("int8", 5e-3, 4e-2), ("fp8", 1e-2, 8e-2)]
)
def test_low_bit_forward_differs_by_the_expected_amount(precision, low, high):
    q, k, v, mask = inputs(256, 64, 32, 64, kept=4)
    exact, _ = reference.sparse_attention(q, k, v, mask, 64, 32)
    out, _ = sparse_attention(q, k, v, mask, block_q=64, block_k=32, precision=precision)
    error = float((out - exact).norm() / exact.norm())
    assert low < error < high


def test_low_bit_backward_is_full_precision():
    q, k, v, mask = inputs(64, 16, 8, 16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    grad = torch.randn(2, 3, 64, 16, dtype=torch.float64)
    out, _ = sparse_attention(q, k, v, mask, block_q=16, block_k=8, precision="int8")
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = torch.autograd.grad(reference.sparse_attention(q, k, v, mask, 16, 8)[0], (q, k, v), grad)
    torch.testing.assert_close(found[2], exact[2])  # dV = P^T dO does not see the forward's output
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert 0 < (a - b).norm() / b.norm() < 0.1  # D = rowsum(dO O) takes the quantised output


def test_wrong_arguments_are_named():
    q, k, v, mask = inputs(64, 16, 8, 16)
    with pytest.raises(ValueError, match=r"mask is \(2, 3, 4, 7\), must be \(2, 3, 4, 8\)"):
        sparse_attention(q, k, v, mask[..., :7], block_q=16, block_k=8)
    with pytest.raises(ValueError, match="precision is 'int4'"):
        sparse_attention(q, k, v, mask, block_q=16, block_k=8, precision="int4")
    with pytest.raises(ValueError, match="one floating dtype"):
        sparse_attention(q, k.float(), v, mask, block_q=16, block_k=8)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        linear_attention(q, k, v, ~mask, block_q=16, block_k=8, backend="cuda")

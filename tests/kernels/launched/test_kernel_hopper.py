"""What runs on sm_90 only: the warp-specialised forward, over every shape that its pairs of key blocks and its rings meet."""

import pytest
import torch
from harness import (
    Case,
    assert_errs_like_oracle,
    compare,
    distance,
    draw,
    draw_mask,
    plain_linear,
    plain_sparse,
    seed,
    with_gradients,
)

from sla2_kernels import hopper, reference, sla2_attention, sparse_attention

# Kept blocks: one, two, odd, even, all; rows: less than a tile, ragged, more query blocks than an H200 has multiprocessors.
CASES = [
    Case(64, 128, 128, 64, 1),
    Case(130, 128, 128, 64, 1),
    Case(130, 64, 128, 64, 2),
    Case(257, 128, 128, 64, 5),
    Case(1000, 128, 128, 64, 4),
    Case(1000, 64, 128, 64, 5, B=2),
    Case(1000, 40, 128, 64, 3),
    Case(1000, 120, 128, 64, 16),
    Case(4097, 128, 128, 64, 7, B=2, H=3),
    Case(4097, 96, 128, 64, 65, H=5),
]


def inputs(case):
    q, k, v, grad = draw(case, torch.bfloat16)
    assert hopper.serves(q, k, v, case.block_q, case.block_k)
    return q, k, v, grad


def plain(q, k, v, mask, case, alpha=None):
    sparse = plain_sparse(q, k, v, mask, case)
    linear = plain_linear(q, k - k.mean(-2, keepdim=True), v, ~mask, case, "softmax")
    if alpha is None:
        return sparse + linear
    share = alpha.to(q.dtype).repeat_interleave(case.block_q, -1)[..., : case.N, None]
    return share * sparse + (1 - share) * linear


@pytest.mark.parametrize("weighted", [True, False], ids=["alpha", "sum"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, weighted, poison):
    q, k, v, grad = inputs(case)
    mask = draw_mask(case)
    alpha = torch.rand(case.grid[1:3], generator=seed()).cuda() if weighted else None
    run = lambda *x: sla2_attention(*x, alpha=alpha, mask=mask)  # noqa: E731
    compare(run, lambda *x: plain(*x, mask, case, alpha), [q, k, v], grad, "o dq dk dv")
    with torch.no_grad():
        without = run(q, k, v)
    assert without.equal(run(*(x.detach().requires_grad_() for x in (q, k, v))))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_branch(case, poison):
    q, k, v, grad = inputs(case)
    mask = draw_mask(case)
    compare(
        lambda *x: sparse_attention(*x, mask)[0], lambda *x: plain_sparse(*x, mask, case), [q, k, v], grad, "o dq dk dv"
    )
    exact = reference.sparse_attention(q.double(), k.double(), v.double(), mask, 128, 64)[1]
    assert (sparse_attention(q, k, v, mask)[1] - exact).abs().max() < 1e-4


@pytest.mark.parametrize("tail", range(1, 64))
def test_every_tail(tail, poison):
    case = Case(320 + tail, 128, 128, 64, 1 + tail % 6, H=1)
    q, k, v, grad = inputs(case)
    mask = draw_mask(case)
    run = lambda *x: sla2_attention(*x, mask=mask)  # noqa: E731
    compare(run, lambda *x: plain(*x, mask, case), [q, k, v], grad, "o dq dk dv")


def test_rows_may_keep_different_numbers_of_blocks():
    case = Case(4097, 128, 128, 64, 1, H=3)
    q, k, v, grad = inputs(case)
    chance = torch.rand(case.grid, generator=seed()).cuda()
    mask = (chance < torch.linspace(0, 1, case.grid[2]).cuda()[:, None]) | (chance == chance.amin(-1, keepdim=True))
    run = lambda *x: sla2_attention(*x, mask=mask)  # noqa: E731
    compare(run, lambda *x: plain(*x, mask, case), [q, k, v], grad, "o dq dk dv")


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_other_feature_maps(feature_map):
    case = Case(1000, 80, 128, 64, 3)
    q, k, v, _ = inputs(case)
    mask, alpha = draw_mask(case), torch.zeros(case.grid[1:3], device="cuda")
    found = sla2_attention(q, k, v, alpha=alpha, mask=mask, feature_map=feature_map, phi_keys="raw")
    exact = plain_linear(q.double(), k.double(), v.double(), ~mask, case, feature_map)
    assert distance(found, exact) < 0.01


@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("precision", ["int8-bf16", "int8", "fp8"])
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7], CASES[8]], ids=str)
def test_low_bit_errs_like_its_oracle(case, precision, save, poison):
    q, k, v, _ = inputs(case)
    v[..., 3] *= 50
    mask, alpha = draw_mask(case), torch.ones(case.grid[1:3], device="cuda")
    leaves = [x.detach().requires_grad_(save) for x in (q, k, v)]
    found = sla2_attention(*leaves, alpha=alpha, mask=mask, precision=precision).detach()
    assert_errs_like_oracle(found, q, k, v, mask, case, precision)


@pytest.mark.parametrize("kept", [1, 2, 3, 64, 65])
@pytest.mark.parametrize("precision", ["int8-bf16", "int8", "fp8"])
def test_many_blocks_add_up_without_bias(precision, kept, poison):
    """Tensor cores add products of e4m3 in 14 bits and round towards zero: 65 blocks of a constant V once lost 7%.

    A single P may err by half a step of e4m3, 1/16, and so may a sum of few; the mean over all rows may not.
    """
    case = Case(4097, 128, 128, 64, kept)
    q, k, v, _ = inputs(case)
    mask = draw_mask(case)
    v[:] = 3.0
    out, lse = sparse_attention(q, k, v, mask, precision=precision)
    wanted = reference.low_bit_sparse_attention(q.double(), k.double(), v.double(), mask, 128, 64, precision)[1]
    assert (out - 3).abs().max() < 0.03
    assert (lse - wanted).abs().max() < 1 / 16
    assert (lse - wanted).mean().abs() < 0.002


@pytest.mark.parametrize("precision", ["none", "int8", "fp8"])
def test_forward_and_backward_repeat_bit_for_bit(precision):
    case = Case(4097, 128, 128, 64, 9, H=8)
    q, k, v, grad = inputs(case)
    run = lambda: with_gradients(lambda *x: sla2_attention(*x, kept=9, precision=precision), [q, k, v], grad)  # noqa: E731
    first = run()
    for _ in range(5):
        for a, b in zip(run(), first, strict=True):
            assert a.equal(b)

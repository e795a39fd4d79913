"""Sparse, soft and linear branch: forward and every gradient against float64."""

import pytest
import torch
from harness import (
    CASES,
    DEVICE,
    GPU_CASES,
    SCORE_GRADIENT,
    Case,
    assert_sums,
    compare,
    distance,
    draw,
    draw_mask,
    plain_linear,
    plain_soft,
    plain_sparse,
    score_gradients,
    seed,
    with_gradients,
)

from sla2_kernels import linear_attention, soft_sparse_attention, sparse_attention

pytestmark = pytest.mark.usefixtures("poison")
SHAPES = CASES + (GPU_CASES if DEVICE == "cuda" else [])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TRITON = {"backend": "triton"}


@DTYPES
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sparse_attention(case, dtype):
    q, k, v, grad = draw(case, dtype)
    mask = draw_mask(case)
    compare(
        lambda *x: sparse_attention(*x, mask, **case.blocks, **TRITON)[0],
        lambda *x: plain_sparse(*x, mask, case),
        [q, k, v],
        grad,
        "o dq dk dv",
    )


@pytest.mark.parametrize("case", SHAPES[:2], ids=str)
def test_log_sum_exp(case):
    q, k, v, _ = draw(case, torch.float32)
    mask = draw_mask(case)
    _, lse = sparse_attention(q, k, v, mask, **case.blocks, **TRITON)
    _, exact = sparse_attention(q.double(), k.double(), v.double(), mask, **case.blocks, backend="reference")
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_soft_sparse_attention(case, dtype):
    q, k, v, grad = draw(case, dtype)
    log_mask = torch.rand(case.grid, generator=seed()).clamp_min(1e-3).log().to(DEVICE)
    compare(
        lambda *x: soft_sparse_attention(*x, **case.blocks, **TRITON),
        lambda *x: plain_soft(*x, case),
        [q, k, v, log_mask],
        grad,
        "o dq dk dv dlog_mask",
        case,
    )


@DTYPES
@pytest.mark.parametrize("case", [Case(100, 24, 32, 16, 2), Case(130, 128, 128, 64, 2, H=1)], ids=str)
def test_a_constant_added_to_a_row_of_log_mask_changes_nothing(case, dtype):
    """So a row of the gradient of log M sums to zero, whatever O and L lost to rounding on their way into the backward."""
    q, k, v, grad = draw(case, dtype)
    log_mask = torch.rand(case.grid, generator=seed()).clamp_min(1e-3).log().to(DEVICE)
    constants = torch.linspace(-4, 4, case.grid[2], device=DEVICE)[:, None]
    one, other = (
        with_gradients(lambda *x: soft_sparse_attention(*x, **case.blocks, **TRITON), [q, k, v, m], grad)
        for m in (log_mask, log_mask + constants)
    )
    for a, b in zip(one[:-1], other[:-1], strict=True):
        assert distance(a, b) < max(SCORE_GRADIENT, torch.finfo(dtype).eps)
    summands = score_gradients(q, k, v, log_mask, grad, case)
    assert_sums("dlog_mask", other[-1], one[-1], summands, SCORE_GRADIENT)
    for result in (one, other):
        rows = result[-1].double().sum(-1)
        assert_sums("row sums of dlog_mask", rows, torch.zeros_like(rows), summands, SCORE_GRADIENT)


@DTYPES
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_linear_attention_over_the_skipped_blocks(case, dtype):
    q, k, v, grad = draw(case, dtype)
    weight = ~draw_mask(case)
    compare(
        lambda *x: linear_attention(*x, weight, **case.blocks, **TRITON),
        lambda *x: plain_linear(*x, weight, case, "softmax"),
        [q, k, v],
        grad,
        "o dq dk dv",
    )


@DTYPES
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_soft_linear_attention(feature_map, dtype):
    case = Case(100, 24, 32, 16, 2)
    q, k, v, grad = draw(case, dtype)
    weight = torch.rand(case.grid, generator=seed()).to(DEVICE)
    compare(
        lambda *x: linear_attention(*x, **case.blocks, feature_map=feature_map, **TRITON),
        lambda *x: plain_linear(*x, case, feature_map),
        [q, k, v, weight],
        grad,
        "o dq dk dv dweight",
    )


def test_all_blocks_kept_leaves_the_linear_branch_zero_with_finite_gradients():
    case = Case(100, 24, 32, 16, 7)
    q, k, v, grad = draw(case, torch.bfloat16)
    nothing = torch.zeros(case.grid, dtype=torch.bool, device=DEVICE)
    results = with_gradients(lambda *x: linear_attention(*x, nothing, **case.blocks, **TRITON), [q, k, v], grad)
    assert all((x == 0).all() for x in results)
    out, _ = sparse_attention(q, k, v, ~nothing, **case.blocks, **TRITON)
    full = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(out.double(), full, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tail", range(1, 64) if DEVICE == "cuda" else (1, 5, 15))
def test_every_tail(tail):
    block_k = 64 if DEVICE == "cuda" else 16
    case = Case(4 * block_k + tail, 64, 2 * block_k, block_k, 2)
    q, k, v, grad = draw(case, torch.bfloat16)
    mask = draw_mask(case)
    compare(
        lambda *x: sparse_attention(*x, mask, **case.blocks, **TRITON)[0] + linear_attention(*x, ~mask, **case.blocks, **TRITON),
        lambda *x: plain_sparse(*x, mask, case) + plain_linear(*x, ~mask, case, "softmax"),
        [q, k, v],
        grad,
        "o dq dk dv",
    )  # fmt: skip


def test_large_scores_stay_finite():
    case = Case(100, 32, 32, 16, 3)
    q, k, v, grad = draw(case, torch.bfloat16, scale=20.0)
    mask = draw_mask(case)
    low = -q.abs()  # every score far below zero, in the padding of the ragged block too
    for inputs in ([q, k, v], [low, k.abs(), v]):
        results = with_gradients(lambda *x: sparse_attention(*x, mask, **case.blocks, **TRITON)[0], inputs, grad)
        assert all(result.isfinite().all() for result in results)


def test_a_constant_value_comes_out_of_both_branches():
    case = Case(100, 32, 32, 16, 3)
    q, k, v, _ = draw(case, torch.float32)
    mask = draw_mask(case)
    v = v[:, :, :1].expand_as(v)
    for out in (
        sparse_attention(q, k, v, mask, **case.blocks, **TRITON)[0],
        linear_attention(q, k, v, ~mask, **case.blocks, **TRITON),
    ):
        torch.testing.assert_close(out, v, rtol=1e-5, atol=1e-5)


def test_fewer_queries_than_keys():
    case = Case(100, 24, 32, 16, 2)
    q, k, v, _ = draw(case, torch.float32)
    log_mask = torch.rand(case.grid, generator=seed()).clamp_min(1e-3).log().to(DEVICE)
    whole = soft_sparse_attention(q, k, v, log_mask, **case.blocks, **TRITON)
    part = soft_sparse_attention(q[:, :, 32:64], k, v, log_mask[:, :, 1:2], **case.blocks, **TRITON)
    torch.testing.assert_close(part, whole[:, :, 32:64])

"""The whole operator, its routing, its low-bit forward, and what torch may do to it."""

import pytest
import torch
from harness import (
    CASES,
    DEVICE,
    GPU_CASES,
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

from sla2_kernels import reference, routing, sla2_attention, sparse_attention
from sla2_kernels.ops import attention_op, linear_op, low_bit_sparse_op, soft_sparse_op, sparse_op

pytestmark = pytest.mark.usefixtures("poison")
SHAPES = CASES + (GPU_CASES if DEVICE == "cuda" else [])
TRITON = {"backend": "triton"}
SMALL = Case(100, 24, 32, 16, 2)


def draw_alpha(case):
    return torch.rand(case.grid[1:3], generator=seed()).to(DEVICE)


def plain_sla2(q, k, v, alpha, mask, case, phi_keys="smoothed"):
    phi_k = k - k.mean(-2, keepdim=True) if phi_keys == "smoothed" else k
    share = alpha.repeat_interleave(case.block_q, -1)[:, : case.N, None].to(q.dtype) if alpha is not None else None
    o_s, o_l = plain_sparse(q, k, v, mask, case), plain_linear(q, phi_k, v, ~mask, case, "softmax")
    return o_s + o_l if share is None else share * o_s + (1 - share) * o_l


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sla2_attention(case, dtype):
    q, k, v, grad = draw(case, dtype)
    mask = draw_mask(case)
    compare(
        lambda *x: sla2_attention(*x[:3], alpha=x[3], mask=mask, **case.blocks, **TRITON),
        lambda *x: plain_sla2(*x, mask, case),
        [q, k, v, draw_alpha(case)],
        grad,
        "o dq dk dv dalpha",
    )


@pytest.mark.parametrize("phi_keys", ["smoothed", "raw"])
def test_sum_of_branches(phi_keys):
    q, k, v, grad = draw(SMALL, torch.float32)
    mask = draw_mask(SMALL)
    compare(
        lambda *x: sla2_attention(*x, mask=mask, phi_keys=phi_keys, **SMALL.blocks, **TRITON),
        lambda *x: plain_sla2(*x, None, mask, SMALL, phi_keys),
        [q, k, v],
        grad,
        "o dq dk dv",
    )


def test_alpha_of_one_and_zero_leave_one_branch():
    q, k, v, _ = draw(SMALL, torch.float32)
    mask, alpha = draw_mask(SMALL), torch.ones(SMALL.grid[1:3], device=DEVICE)
    run = lambda a: sla2_attention(q, k, v, alpha=a, mask=mask, **SMALL.blocks, **TRITON)  # noqa: E731
    torch.testing.assert_close(run(alpha), reference.sparse_attention(q, k, v, mask, 32, 16)[0])
    linear = reference.sla2_attention(q, k, v, alpha * 0, mask, 32, 16, "softmax", True)
    torch.testing.assert_close(run(alpha * 0), linear)


def test_every_block_kept_is_full_attention():
    q, k, v, grad = draw(SMALL, torch.float32)
    alpha = torch.ones(SMALL.grid[1:3], device=DEVICE)
    out = with_gradients(lambda *x: sla2_attention(*x, alpha=alpha, kept=7, **SMALL.blocks, **TRITON), [q, k, v], grad)
    full = with_gradients(torch.nn.functional.scaled_dot_product_attention, [q, k, v], grad)
    for a, b in zip(out, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_first_and_last_rows_of_a_long_sequence():
    case = Case(32760, 128, 128, 64, 15) if DEVICE == "cuda" else Case(200, 32, 32, 16, 3)
    q, k, v, _ = draw(case, torch.bfloat16)
    mask, alpha = draw_mask(case), draw_alpha(case)
    out = sla2_attention(q, k, v, alpha=alpha, mask=mask, **case.blocks, **TRITON)
    for block in (0, case.grid[2] - 1):  # the first keeps the ragged last key block
        rows = slice(block * case.block_q, (block + 1) * case.block_q)
        part = (x.double() for x in (q[:, :, rows], k, v))
        settings = mask[:, :, block : block + 1], case.block_q, case.block_k, "softmax", True
        exact = reference.sla2_attention(*part, alpha[:, block : block + 1].double(), *settings)
        assert distance(out[:, :, rows], exact) < torch.finfo(torch.bfloat16).eps


def test_order_of_keys_within_a_block_does_not_matter():
    q, k, v, _ = draw(SMALL, torch.float32)
    mask, alpha = draw_mask(SMALL), draw_alpha(SMALL)
    order = torch.arange(SMALL.N, device=DEVICE)
    order[:96] = order[:96].view(-1, 16).flip(1).flatten()
    plain, turned = (
        sla2_attention(q, x, y, alpha=alpha, mask=mask, **SMALL.blocks, **TRITON)
        for x, y in ((k, v), (k[:, :, order], v[:, :, order]))
    )
    torch.testing.assert_close(plain, turned, rtol=1e-4, atol=1e-5)


def test_routing_keeps_the_largest_scores():
    case = Case(1000, 64, 128, 64, 3) if DEVICE == "cuda" else SMALL
    q, k, _, _ = draw(case, torch.bfloat16)
    projections = tuple(torch.randn(case.D, case.D, generator=seed()).to(DEVICE) for _ in range(2))
    pooled, pooled_queries = routing.pool(k, case.block_k), routing.pool(q, case.block_q)
    mean = routing.key_mean(pooled, case.N, case.block_k)
    torch.testing.assert_close(mean, k.float().mean(-2).flatten(0, 1), rtol=1e-4, atol=1e-5)
    route = routing.empty_route(case.B * case.H, *case.grid[2:], case.kept, q.dtype, q.device)
    routing.route(pooled_queries, pooled, mean, projections, case.kept, route)
    mask, (table, count) = route.mask, route.tables
    scores = reference.router_scores(q.double(), k.double(), projections, case.block_q, case.block_k).flatten(0, 1)
    assert (mask.sum(-1) == case.kept).all()
    assert (count == case.kept).all()
    assert (table.diff(dim=-1) > 0).all()
    assert mask.gather(-1, table.long()).all()
    assert route.weight[..., : mask.shape[-1]].equal((~mask).bfloat16())
    assert (route.weight[..., mask.shape[-1] :] == 0).all()
    least = scores.masked_fill(~mask, torch.inf).amin(-1)
    most = scores.masked_fill(mask, -torch.inf).amax(-1)
    assert (least >= most - 1e-4 * scores.abs().amax()).all()


def test_ties_go_to_the_lower_block():
    scores = torch.tensor([[[0.0, -0.0, 1.0, 1.0, 1.0, -2.0, -2.0]]], device=DEVICE)
    for kept in range(1, 8):
        route = routing.empty_route(*scores.shape, kept, torch.bfloat16, scores.device)
        routing.top_k(scores, kept, route)
        assert route.mask.equal(reference.top_k_mask(scores, kept))


def hostile(case, kind):
    """Inputs on which quantisation errs: plain, heavy-tailed, with a channel of outliers, with a common part in K."""
    q, k, v, grad = draw(case, torch.float64)
    if kind == "heavy-tailed":
        q, k, v = (x.sign() * x.abs() ** 1.5 for x in (q, k, v))
    if kind == "channel outliers":
        v = v.clone()
        v[..., 3] *= 50
    if kind == "biased keys":
        k = k + 4 * torch.randn(case.D, generator=seed(), dtype=torch.float64).to(DEVICE)
    return [x.bfloat16() for x in (q, k, v, grad)]


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "channel outliers", "biased keys"])
@pytest.mark.parametrize("precision", ["int8-bf16", "int8", "fp8"])
def test_low_bit_forward_errs_like_its_oracle(precision, kind):
    """Not nothing, and at most half more than fp64 arithmetic on the same quantised numbers."""
    case = Case(130, 64, 64, 32, 3)
    q, k, v, _ = hostile(case, kind)
    mask = draw_mask(case)
    alpha = torch.ones(case.grid[1:3], device=DEVICE)
    found = sla2_attention(q, k, v, alpha=alpha, mask=mask, precision=precision, **case.blocks, **TRITON)
    assert_errs_like_oracle(found, q, k, v, mask, case, precision)


@pytest.mark.parametrize("precision", ["int8-bf16", "int8"])
def test_low_bit_sums_of_many_blocks_have_no_bias(precision):
    """Tensor cores add products of e4m3 in 14 bits and round towards zero; the sum over blocks has to be in fp32."""
    case = Case(4097 if DEVICE == "cuda" else 300, 64, 64, 64, 5)
    q, k, v, _ = draw(case, torch.bfloat16)
    v[:] = 3.0
    mask = torch.ones(case.grid, dtype=torch.bool, device=DEVICE)
    out, _ = sparse_attention(q, k, v, mask, precision=precision, **case.blocks, **TRITON)
    error = out.double() - 3
    print(f"mean {float(error.mean()):.5f}, largest {float(error.abs().max()):.4f}")
    # P is rounded to e4m3 and the sum that divides is not, so single rows err by two steps of bf16, in one run of six; four are allowed.
    assert error.abs().max() < 0.0625
    assert error.mean().abs() < 0.02


@pytest.mark.parametrize("precision", ["int8-bf16", "int8"])
def test_low_bit_backward_is_the_full_precision_one(precision):
    case = Case(130, 64, 64, 32, 3, H=1)
    q, k, v, grad = draw(case, torch.bfloat16)
    mask, alpha = draw_mask(case), draw_alpha(case)

    def run(p):
        return with_gradients(
            lambda *x: sla2_attention(*x[:3], alpha=x[3], mask=mask, precision=p, **case.blocks, **TRITON),
            [q, k, v, alpha],
            grad,
        )

    full, low = run("none"), run(precision)
    assert distance(low[3], full[3]) < 1e-6  # dV = P^T dO, and P comes from unquantised scores
    for a, b in zip(low[1:3], full[1:3], strict=True):
        assert 0 < distance(a, b) < 0.1  # D = rowsum(dO O) takes the quantised output
    with_mask = with_gradients(
        lambda *x: sparse_attention(*x, mask, precision=precision, **case.blocks, **TRITON)[0], [q, k, v], grad
    )
    assert all(x.isfinite().all() for x in with_mask)


def test_operators_pass_torchs_own_checks():
    q, k, v, _ = (x.requires_grad_() for x in draw(SMALL, torch.float32))
    mask, alpha = draw_mask(SMALL), draw_alpha(SMALL).requires_grad_()
    log_mask = torch.rand(SMALL.grid, generator=seed()).add(0.1).log().to(DEVICE).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if DEVICE == "cuda":
        checks += ("test_aot_dispatch_static",)
    torch.library.opcheck(sparse_op, (q, k, v, mask, 32, 16), test_utils=checks)
    torch.library.opcheck(soft_sparse_op, (q, k, v, log_mask, 32, 16), test_utils=checks)
    torch.library.opcheck(linear_op, (q, k, v, ~mask, 32, 16, "softmax"), test_utils=checks)
    settings = (2, 32, 16, "softmax", True, "none", True)
    torch.library.opcheck(attention_op, (q, k, v, alpha, None, None, mask, *settings), test_utils=checks)
    torch.library.opcheck(attention_op, (q, k, v, alpha, None, None, None, *settings), test_utils=checks)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(low_bit_sparse_op, (*low, torch.ones_like(mask[..., :4]), 32, 32, "int8"), test_utils=checks)


@pytest.mark.parametrize("backend", ["eager"] + (["inductor"] if DEVICE == "cuda" else []))
def test_compile_traces_through_and_checkpointing_agrees(backend):
    q, k, v, grad = draw(SMALL, torch.float32)
    alpha = draw_alpha(SMALL)

    def run(q, k, v, alpha):
        return sla2_attention(q * 2, k, v, alpha=alpha, kept=2, **SMALL.blocks, **TRITON) + 1

    expected = with_gradients(run, [q, k, v, alpha], grad)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    checkpointed = lambda *x: torch.utils.checkpoint.checkpoint(run, *x, use_reentrant=False)  # noqa: E731
    for function in (compiled, checkpointed):
        for a, b in zip(with_gradients(function, [q, k, v, alpha], grad), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_cuda_graph_replays():
    case = Case(1000, 64, 128, 64, 3)
    q, k, v, _ = draw(case, torch.bfloat16)
    run = lambda: sla2_attention(q, k, v, alpha=None, kept=3, **case.blocks)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.testing.assert_close(out, run(), rtol=0, atol=0)


def test_forward_and_backward_repeat_bit_for_bit():
    q, k, v, grad = draw(SMALL, torch.bfloat16)
    alpha = draw_alpha(SMALL)

    def run():
        return with_gradients(
            lambda *x: sla2_attention(*x[:3], alpha=x[3], kept=2, **SMALL.blocks, **TRITON), [q, k, v, alpha], grad
        )

    for a, b in zip(run(), run(), strict=True):
        assert a.equal(b)


def test_what_is_not_served_is_named():
    q, k, v, _ = draw(SMALL, torch.float32)
    with pytest.raises(ValueError, match="kept is 8, must be 1 to 7"):
        sla2_attention(q, k, v, kept=8, **SMALL.blocks, **TRITON)
    with pytest.raises(ValueError, match=r"serves bfloat16, float32, this tensor is torch\.float64"):
        sla2_attention(q.double(), k.double(), v.double(), kept=2, **SMALL.blocks, **TRITON)
    with pytest.raises(ValueError, match="serves blocks of 16, 32, 64, 128"):
        sla2_attention(q, k, v, kept=2, block_q=32, block_k=8, **TRITON)
    with pytest.raises(ValueError, match=r"precision int8 for bfloat16, .*not torch\.float32, 16 and 24"):
        sla2_attention(q, k, v, kept=2, precision="int8", **SMALL.blocks, **TRITON)

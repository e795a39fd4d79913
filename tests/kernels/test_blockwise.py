"""The block-gathering sparse branch against the oracle over all scores, in float64: output, log-sum-exp, every gradient."""

import pytest
import torch

from sla2_kernels import blockwise, reference

SHAPES = [
    (2, 3, 64, 8, 16, 16),
    (1, 2, 100, 8, 32, 16),
    (1, 2, 127, 12, 32, 8),
    (2, 1, 63, 4, 16, 64),
    (1, 1, 7, 4, 4, 2),
]


def draw(shape, kept: str):
    B, H, N, D, block_q, block_k = shape
    draws = torch.Generator().manual_seed(N)
    q, k, v, grad = torch.randn(4, B, H, N, D, dtype=torch.float64, generator=draws).unbind(0)
    rows, columns = reference.num_blocks(N, block_q), reference.num_blocks(N, block_k)
    scores = torch.rand(B, H, rows, columns, generator=draws)
    mask = {"one": scores == scores.amax(-1, keepdim=True), "all": scores >= 0, "uneven": scores > 0.5}[kept]
    mask[..., -1] |= ~mask.any(-1)  # every row keeps something; the ragged last block is among it
    return q, k, v, grad, mask, block_q, block_k


@pytest.mark.parametrize("kept", ["one", "uneven", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_attention(shape, kept):
    q, k, v, grad, *rest = draw(shape, kept)
    results = []
    for function in (reference.sparse_attention, blockwise.sparse_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = function(*inputs, *rest)
        results.append([out, lse, *torch.autograd.grad(out, inputs, grad)])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("precision", ["int8", "fp8", "int8-bf16"])
@pytest.mark.parametrize("kept", ["one", "uneven", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_bit_forward_and_full_precision_backward(shape, kept, precision):
    q, k, v, grad, mask, *blocks = draw(shape, kept)
    wanted = reference.low_bit_sparse_attention(q, k, v, mask, *blocks, precision)
    found = blockwise.low_bit_sparse_attention(q, k, v, mask, *blocks, precision)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)
    _, lse = reference.sparse_attention(q, k, v, mask, *blocks)
    wanted = reference.sparse_attention_backward(q, k, v, found[0], lse, grad, mask, *blocks)
    found = blockwise.sparse_attention_backward(q, k, v, found[0], grad, mask, *blocks)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


def test_bf16_is_computed_in_fp32():
    q, k, v, _, *rest = draw(SHAPES[1], "uneven")
    q, k, v = (x.bfloat16() for x in (q, k, v))
    out, lse = blockwise.sparse_attention(q, k, v, *rest)
    wanted, _ = reference.sparse_attention(q.double(), k.double(), v.double(), *rest)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, wanted.bfloat16()) or (out - wanted.bfloat16()).abs().max() <= 2**-7


@pytest.mark.parametrize("scores", [1, 2 * 3 * 100 * 16 * 2, 2**26], ids=["one block", "two blocks", "all"])
def test_block_mass_by_parts(monkeypatch, scores):
    monkeypatch.setattr(blockwise, "MASS_SCORES", scores)
    q, k = torch.randn(2, 2, 3, 100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = blockwise.block_mass(q, k, 16, 8)
    torch.testing.assert_close(found, reference.block_mass(q, k, 16, 8))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    sampled = torch.cat([q[:, :, 80:96], q[:, :, :16]], dim=2)  # any whole query blocks, in any order
    torch.testing.assert_close(blockwise.block_mass(sampled, k, 16, 8), found[:, :, [5, 0]])

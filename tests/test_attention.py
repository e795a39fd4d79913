"""The attention module: its limits carry the theory."""

import pytest
import torch

from sla2.attention import AttentionSettings, FullAttention, OtherKernelAttention, SparseLinearAttention, build
from sla2.mixing import AlphaMixing
from sla2.variant import Variant, read_variants
from sla2_kernels import reference

SETTINGS = AttentionSettings(block_q=16, block_k=8)
SHEET = read_variants("config/mini.tsv")
ROWS = [row for row in SHEET.values() if not row.dense and "step" not in row.variant]


def row(**changes):
    values = {"variant": "x", "attention": "sla2", "router": "learned", "mixing": "alpha", "quantization": "none"}
    return Variant(**{**values, "sparsity": 0.9, "finetune": True, **changes})


def module(variant, tokens=70, heads=2, dim=8):
    return SparseLinearAttention(variant, heads, dim, tokens, SETTINGS).double()


def qkv(tokens=70, heads=2, dim=8):
    return [torch.randn(2, heads, tokens, dim, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("variant", ROWS, ids=lambda r: r.variant)
@pytest.mark.parametrize("tokens", [64, 70, 127])
def test_every_row_runs_at_any_length_with_gradients(variant, tokens):
    attention = build(variant, 2, 12, tokens, SETTINGS)
    q, k, v = (x.float().requires_grad_() for x in qkv(tokens, dim=12))
    out = attention(q, k, v)
    out.square().sum().backward()
    assert out.shape == q.shape
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


def kernels(attention, *inputs):
    """Names of the SDPA kernels that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(*inputs)
    return {e.key for e in profile.key_averages() if e.key.startswith("aten::_scaled_dot_product")}


def test_the_other_kernel_is_another_one_and_computes_the_same():
    variant = row(attention="full_other", router="none", mixing="none", sparsity=0.0, finetune=False)
    other, full = build(variant, 2, 8, 70, SETTINGS), FullAttention()
    assert isinstance(other, OtherKernelAttention)
    q, k, v = qkv()
    torch.testing.assert_close(other(q, k, v), (q @ k.mT / 8**0.5).softmax(-1) @ v, rtol=1e-12, atol=1e-12)
    assert kernels(other, q, k, v) == {"aten::_scaled_dot_product_attention_math"}
    assert kernels(full, q, k, v) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert not torch.equal(other(q, k, v), full(q, k, v)), "rounding"


def test_sparsity_zero_with_alpha_one_is_full_attention():
    attention = module(row(sparsity=0.0))
    attention.mixing.logit.data.fill_(60.0)
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_alpha_one_is_the_sparse_branch_and_alpha_zero_the_linear_one():
    attention, (q, k, v) = module(row()), qkv()
    mask, smooth = attention.route(q, k), reference.smooth_keys(k)
    sparse, _ = reference.sparse_attention(q, k, v, mask, 16, 8)
    linear = reference.linear_attention(q.softmax(-1), smooth.softmax(-1), v, ~mask, 16, 8)
    for logit, expected in ((60.0, sparse), (-60.0, linear)):
        attention.mixing.logit.data.fill_(logit)
        torch.testing.assert_close(attention(q, k, v), expected)


def test_one_branch_alone_is_computed_alone(monkeypatch):
    q, k, v = qkv()
    whole = module(row(attention="sla_main"))
    mask, smooth = whole.route(q, k), reference.smooth_keys(k)
    sparse, _ = reference.sparse_attention(q, k, v, mask, 16, 8)
    linear = reference.linear_attention(q.softmax(-1), smooth.softmax(-1), v, torch.ones_like(mask), 16, 8)
    for mixing, expected, other in (("sparse", sparse, "linear_attention"), ("linear", linear, "sparse_attention")):
        alone = module(row(attention="sla_main", mixing=mixing))
        alone.router.load_state_dict(whole.router.state_dict())
        with monkeypatch.context() as patch:
            patch.setattr(f"sla2.attention.{other}", None)  # calling it fails
            torch.testing.assert_close(alone(q, k, v), expected)


def test_exact_alpha_and_exact_linear_branch_reassemble_full_attention():
    """Section 2.2: with alpha = P_1 1 and the complement's own softmax as second branch, equation 13 is full attention."""
    attention, (q, k, v) = module(row()), qkv()
    mask = attention.route(q, k)
    inside, lse_in = reference.sparse_attention(q, k, v, mask, 16, 8)
    outside, lse_out = reference.sparse_attention(q, k, v, ~mask, 16, 8)
    alpha = torch.sigmoid(lse_in - lse_out)[..., None]
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(alpha * inside + (1 - alpha) * outside, full)


def test_projection_starts_as_the_sparse_branch():
    attention, (q, k, v) = module(row(mixing="projection")), qkv()
    sparse, _ = reference.sparse_attention(q, k, v, attention.route(q, k), 16, 8)
    torch.testing.assert_close(attention(q, k, v), sparse)


def test_sla_main_has_every_key_in_the_linear_branch():
    mask = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    mask[..., 0] = True
    assert module(row(attention="sla_main", router="mean_pool", mixing="projection")).linear_weight(mask).all()
    assert (module(row()).linear_weight(mask) == ~mask).all()


@pytest.mark.parametrize(
    ("quantization", "training", "inference"), [("qat-int8", 1, 1), ("ptq-int8", 0, 1), ("none", 0, 0)]
)
def test_low_bit_forward_is_on_when_the_row_says_so(quantization, training, inference):
    exact, low_bit = module(row()), module(row(quantization=quantization))
    q, k, v = qkv()
    for mode, expected in ((True, training), (False, inference)):
        difference = (exact.train(mode)(q, k, v) - low_bit.train(mode)(q, k, v)).abs().max()
        assert bool(difference > 1e-4) == bool(expected)


def test_qat_training_forward_equals_inference_bit_for_bit():
    attention, (q, k, v) = module(row(quantization="qat-int8")), qkv()
    assert torch.equal(attention.train()(q, k, v), attention.eval()(q, k, v))


def test_keys_moved_by_a_constant_change_nothing():
    attention, (q, k, v) = module(row()), qkv()
    torch.testing.assert_close(attention(q, k + 3.0, v), attention(q, k, v))


def test_alpha_for_another_length_is_interpolated_over_relative_position():
    mixing = AlphaMixing(1, 8, 3)
    mixing.logit.data = torch.tensor([[-2.0, 0.0, 2.0]])
    torch.testing.assert_close(mixing.alpha(5)[0], torch.sigmoid(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])))

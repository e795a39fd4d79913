"""Our attention inside diffusers' Wan: the stock result at sparsity 0, and that only what is ours is replaced."""

import pytest
import torch

from sla2.adapter import adapter_state
from sla2.attention import AttentionSettings, FullAttention
from sla2.variant import Variant
from sla2.wan import capture_qkv, install, installed, self_attentions

SETTINGS = AttentionSettings(block_q=16, block_k=8)
ROW = Variant("x", "sla2", "learned", "alpha", "none", 0.9, True)
TOKENS = 3 * 4 * 4


@pytest.fixture(scope="module")
def wan():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
    ).eval()  # fmt: skip


@pytest.fixture
def fresh(wan):
    """The model without any attention of ours, before and after."""
    former = [attn.processor for attn in self_attentions(wan)]
    yield wan
    for attn, processor in zip(self_attentions(wan), former, strict=True):
        attn.set_processor(processor)


def run(model):
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 3, 8, 8, generator=draw), torch.randn(2, 8, 16, generator=draw)
    with torch.no_grad():
        return model(x, torch.tensor([100.0, 900.0]), text, return_dict=False)[0]


def test_full_attention_through_our_processor_is_the_stock_model(fresh):
    stock = run(fresh)
    with installed(fresh, [FullAttention(), FullAttention()]):
        torch.testing.assert_close(run(fresh), stock, atol=2e-6, rtol=1e-5)
    assert torch.equal(run(fresh), stock)


def test_processors_come_back_after_an_exception(fresh):
    former = [attn.processor for attn in self_attentions(fresh)]
    with pytest.raises(RuntimeError, match="boom"), installed(fresh, [FullAttention(), FullAttention()]):
        raise RuntimeError("boom")
    assert [attn.processor for attn in self_attentions(fresh)] == former


def test_only_self_attention_is_replaced(fresh):
    cross = [block.attn2.processor for block in fresh.blocks]
    install(fresh, ROW, SETTINGS, TOKENS)
    assert [block.attn2.processor for block in fresh.blocks] == cross
    names = set(adapter_state(fresh))
    assert len(names) == 2 * 3
    assert all(".attn1.processor.attention." in name for name in names)


def test_capture_hands_out_what_dense_attention_saw(fresh):
    stock = run(fresh)
    with capture_qkv(fresh) as layers:
        torch.testing.assert_close(run(fresh), stock, atol=2e-6, rtol=1e-5)
    assert len(layers) == 2
    for seen in layers:
        assert seen["q"].shape == (2, 2, TOKENS, 12)
        out = torch.nn.functional.scaled_dot_product_attention(seen["q"], seen["k"], seen["v"])
        torch.testing.assert_close(seen["o"], out)

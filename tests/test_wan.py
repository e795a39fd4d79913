"""Our attention inside diffusers' Wan: the stock result at sparsity 0, adapters, and what a loader must refuse."""

import json

import pytest
import torch

from sla2.attention import AttentionSettings, FullAttention
from sla2.errors import UserError
from sla2.variant import Variant
from sla2.wan import (
    BaseModel,
    adapter_state,
    capture_qkv,
    install,
    installed,
    load_adapter,
    save_adapter,
    self_attentions,
)

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


@pytest.fixture
def base():
    sizes = {
        "layers": 2,
        "heads": 2,
        "head_dim": 12,
        "frames": 3,
        "height": 64,
        "width": 64,
        "fps": 8,
        "text_length": 8,
    }
    return BaseModel(
        pipeline="p", revision=None, weights_sha256="a", parameters=1, tokens=TOKENS, grid=(3, 4, 4),
        flow_shift=3.0, latents="l", **sizes,
    )  # fmt: skip


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


def test_adapter_round_trip_is_exact(fresh, base, tmp_path):
    install(fresh, ROW, SETTINGS, TOKENS)
    for tensor in adapter_state(fresh).values():
        tensor.normal_()
    expected = run(fresh)
    save_adapter(tmp_path, adapter_state(fresh), ROW, SETTINGS, base)
    for tensor in adapter_state(fresh).values():
        tensor.zero_()
    load_adapter(tmp_path, fresh, base)
    assert torch.equal(run(fresh), expected)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "base", "version"])
def test_load_adapter_refuses_by_name(fresh, base, tmp_path, change):
    install(fresh, ROW, SETTINGS, TOKENS)
    state = dict(adapter_state(fresh))
    name = next(iter(state))
    if change == "missing":
        state.pop(name)
    if change == "unexpected":
        state["blocks.9.attn1.processor.attention.x"] = torch.zeros(1)
    if change == "shape":
        state[name] = torch.zeros(3)
    save_adapter(tmp_path, state, ROW, SETTINGS, base)
    description = json.loads((tmp_path / "adapter.json").read_text())
    if change == "base":
        description["base_sha256"] = "b"
    if change == "version":
        description["version"] = 99
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    words = {"missing": f"missing {name}", "unexpected": "unexpected blocks.9", "shape": "is \\(3,\\)"}
    with pytest.raises(UserError, match=words.get(change, "another base model" if change == "base" else "version 99")):
        load_adapter(tmp_path, fresh, base)

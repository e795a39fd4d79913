import pytest
import torch

from sla2.attention import AttentionSettings, build
from sla2.variant import Variant
from sla2_eval.attention_error import attention_errors, layer_errors

SETTINGS = {"seed": 0, "attention_clips": 2, "attention_sigmas": [0.3, 0.9]}
BLOCKS = AttentionSettings(block_q=16, block_k=8)


def row(sparsity: float, router: str = "mean_pool", mixing: str = "alpha", attention: str = "sla2") -> Variant:
    return Variant("row", attention, router, mixing, "none", sparsity, False)


def qkvo(tokens: int = 100) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, tokens, 24, dtype=torch.float64)
    return {"q": q, "k": k, "v": v, "o": torch.nn.functional.scaled_dot_product_attention(q, k, v)}


def test_nothing_skipped_is_dense_attention() -> None:
    module = build(row(0.0), 2, 24, 100, BLOCKS)
    with torch.no_grad():
        module.mixing.logit.fill_(40.0)  # alpha = 1
    found = layer_errors(module, **qkvo())
    assert found["attention.rel_l1"] < 1e-6
    assert found["attention.cosine"] == pytest.approx(1)
    assert found["attention.kept_mass"] == pytest.approx(1)
    assert found["attention.alpha_error"] == pytest.approx(0, abs=1e-6)
    assert found["attention.alpha_mean"] == pytest.approx(1)
    assert found["sparsity.realised"] == 0


def test_keeping_more_mass_lowers_the_error() -> None:
    """Blocks chosen by true mass: with more of them kept, mass rises and the error of the sparse branch falls."""
    from sla2_kernels import reference

    tensors = qkvo()
    mass = reference.block_mass(tensors["q"], tensors["k"], 16, 8)
    errors, masses = [], []
    for sparsity in (0.9, 0.7, 0.4, 0.1):
        module = build(row(sparsity, mixing="sum", attention="sla2"), 2, 24, 100, BLOCKS)
        kept = module.kept(100)
        module.route = lambda q, k, kept=kept: mass.argsort(-1, descending=True).argsort(-1) < kept
        module.mixing.forward = lambda sparse, linear, block_q: sparse
        found = layer_errors(module, **tensors)
        errors.append(found["attention.rel_l1"])
        masses.append(found["attention.kept_mass"])
    assert errors == sorted(errors, reverse=True)
    assert masses == sorted(masses)


def test_alpha_is_compared_with_the_kept_mass() -> None:
    module = build(row(0.9), 2, 24, 100, BLOCKS)
    with torch.no_grad():
        module.mixing.logit.fill_(-40.0)  # alpha = 0, so the error is the kept mass itself
    found = layer_errors(module, **qkvo())
    assert found["attention.alpha_error"] == pytest.approx(found["attention.kept_mass"])
    assert 0 < found["attention.kept_mass"] < 0.5


def test_mixing_without_alpha_has_no_alpha_metrics() -> None:
    found = layer_errors(build(row(0.9, mixing="projection"), 2, 24, 100, BLOCKS), **qkvo())
    assert not any("alpha" in name for name in found)


def test_every_layer_of_a_model(base_file) -> None:
    from sla2.wan import BaseModel, load_transformer

    base = BaseModel.read(base_file)
    transformer = load_transformer(base)
    former = [block.attn1.processor for block in transformer.blocks]
    found = attention_errors(transformer, base, row(0.9), BLOCKS, None, SETTINGS)
    assert {layer for layer, _ in found} == {0, 1}
    assert all(0 < found[layer, "attention.rel_l1"] < 2 for layer in (0, 1))
    assert found == attention_errors(transformer, base, row(0.9), BLOCKS, None, SETTINGS)
    assert [block.attn1.processor for block in transformer.blocks] == former
    assert (
        attention_errors(
            transformer, base, Variant("full", "full", "none", "none", "none", 0.0, True), BLOCKS, None, SETTINGS
        )
        == {}
    )

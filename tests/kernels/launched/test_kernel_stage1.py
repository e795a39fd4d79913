"""Stage 1 gives on Triton what it gives on the reference: loss and gradients of each estimator, the report, the router `offset`."""

import pytest
import torch
from harness import DEVICE, distance

from sla2.attention import AttentionSettings, build
from sla2.estimators import layer_loss
from sla2.stage1_report import AlphaFit, layer_report
from sla2.variant import Variant

TOKENS, HEADS, DIM = 100, 1, 16
ROW = Variant("row", "sla2", "offset", "alpha", "none", 0.7, finetune=True)


def made(backend: str, dtype: torch.dtype):
    """A layer of the router `offset`, and q, k, v, o of one layer."""
    torch.manual_seed(0)
    module = build(ROW, HEADS, DIM, TOKENS, AttentionSettings(block_q=32, block_k=16, backend=backend))
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM).to(DEVICE, dtype) for _ in range(3))
    return module.to(DEVICE), (q, k, v, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mass"])
def test_layer_loss(estimator, dtype, most):
    """In bf16 too the gradients of skipped blocks, which hang on weights of 1e-4, are those of fp32."""
    results = []
    for backend, kind in (("reference", torch.float32), ("triton", dtype)):
        module, seen = made(backend, kind)
        settings = {"estimator": estimator, "router_logits": "scaled"}
        loss = layer_loss(module, *seen, torch.tensor([2, 0], device=DEVICE), settings, tau=1.0)
        loss.backward()
        assert loss.dtype == torch.float32
        results.append([loss.detach(), *(p.grad for p in module.parameters())])
    for wanted, found in zip(*results, strict=True):
        assert distance(found, wanted) < most


def test_report():
    reports = []
    for backend in ("reference", "triton"):
        module, seen = made(backend, torch.float32)
        fit = AlphaFit(module, controls=True)
        fit.add(*seen)
        reports.append(list(layer_report(module, fit, *seen, "scaled", 0.1)))
    for wanted, found in zip(*reports, strict=True):
        assert found[:3] == wanted[:3]
        assert found[3] == pytest.approx(wanted[3], rel=1e-3, abs=1e-5)


def test_offset_router():
    pairs = [made(name, torch.float32) for name in ("reference", "triton")]
    outputs = [module(*seen[:3]).detach() for module, seen in pairs]
    assert distance(*outputs) < 1e-5

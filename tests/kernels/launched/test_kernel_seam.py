"""The attention modules of the method give on Triton what they give on the reference."""

import pytest
import torch
from harness import DEVICE, Case, distance, draw, with_gradients

from sla2.attention import AttentionSettings, build
from sla2.variant import Variant

ROWS = [("sla2", "learned", "alpha"), ("sla2", "mean_pool", "alpha"), ("sla2", "random", "sum"), ("sla2", "learned", "sum"),
        ("sla", "mean_pool", "projection"), ("sla_main", "mean_pool", "projection")]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_every_kind_of_row_agrees_with_the_reference(row):
    case = Case(70, 16, 32, 16, 2, H=1)
    attention, router, mixing = row
    variant = Variant("row", attention, router, mixing, "none", 0.7, finetune=True)
    q, k, v, grad = draw(case, torch.float32)
    modules = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        settings = AttentionSettings(block_q=32, block_k=16, backend=backend)
        modules[backend] = build(variant, case.H, case.D, case.N, settings).to(DEVICE)
        for parameter in modules[backend].parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    results = {name: with_gradients(module, [q, k, v], grad) for name, module in modules.items()}
    for a, b in zip(results["triton"], results["reference"], strict=True):
        assert distance(a, b) < 1e-5
    if mixing == "sum":  # nothing of it is trained
        return
    for module in modules.values():
        module(q, k, v).backward(grad)
    for a, b in zip(*(m.mixing.parameters() for m in modules.values()), strict=True):
        assert distance(a.grad, b.grad) < 1e-5

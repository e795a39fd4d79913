"""Every Triton kernel compiled for every GPU that is served, without one: shared memory fits, registers hardly spill.

What is launched here is what `sla2_attention` and the branches launch at the paper's sizes, with each GPU's own launch table.
"""

import pytest
import torch
from compiling import recorded, report

from sla2_kernels import fused, launch, linear, sparse
from sla2_kernels.lookup import lookup
from sla2_kernels.primitives import INTERPRETED

# Bytes that ptxas may have a thread store and load for want of registers, once a program: outside the loops it costs little.
SPILLED = 1024
WGMMA = ("forward_kernel", "hopper_kernel", "query_backward_kernel", "key_backward_kernel", "state_kernel")
pytestmark = pytest.mark.skipif(INTERPRETED.value, reason="an interpreted kernel has no code")


def launch_everything(arch: int) -> None:
    """Start the bf16 operator in each precision that the GPU has, its backward, and stage 1's soft branches."""
    q, k, v, do = (torch.zeros(1, 512, 2, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    alpha, eye = torch.ones(2, 4), torch.eye(128)
    for precision in ("none", "int8-bf16", "int8", "fp8") if arch >= 89 else ("none", "int8-bf16"):
        settings = fused.Settings(2, 128, 64, "softmax", True, precision)
        _, saved = fused.forward(q, k, v, alpha, (eye, eye), None, settings, True)
    fused.backward(do, q, k, v, alpha, saved, fused.Settings(2, 128, 64, "softmax", True, "none"))
    mask = torch.ones(1, 2, 4, 8, dtype=torch.bool)
    sparse.forward(q, k, v, lookup(mask), None, 128, 64)
    log_mask = torch.zeros(1, 2, 4, 8)
    o, lse = sparse.forward(q, k, v, None, log_mask, 128, 64)
    sparse.backward(do, q, k, v, o, lse, None, None, log_mask, 128, 64)
    linear.forward(q, k, v, log_mask.exp(), 128, 64, "softmax")


@pytest.mark.parametrize("arch", launch.SHARED_MEMORY)
def test_every_kernel_compiles_within_limits(arch):
    with recorded(arch) as launches:
        launch_everything(arch)
    seen = {}
    for one in launches:
        source = one.source()
        key = (one.name, str(source.signature), str(source.constants), str(one.options.get("num_warps")))
        if key not in seen:
            seen[key] = report(one, arch)
            r = seen[key]
            figures = (
                f"{one.name}: {r.registers} registers, {r.spilled_bytes} bytes spilled, {r.shared_bytes} bytes shared"
            )
            print(figures, flush=True)
            assert r.shared_bytes <= launch.SHARED_MEMORY[arch], figures
            assert r.spilled_bytes <= SPILLED, figures
            if arch == 90 and one.name in WGMMA:
                assert "wgmma.mma_async" in r.ptx, one.name


def test_a_view_whose_own_lines_are_aligned_and_whose_states_are_not_goes_without_tma():
    k = torch.zeros(1, 2, 512, 24, dtype=torch.bfloat16)[..., :20]  # lines of 48 bytes, 40 of them D
    with recorded(90) as launches:
        linear.block_states(k, k, 64, "softmax")
    assert [one.options["TMA"] for one in launches] == [False]

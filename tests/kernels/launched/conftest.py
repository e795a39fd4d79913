"""Fresh memory is NaN, so that an element that no kernel writes cannot pass; and Triton's interpreter rounds as a GPU does."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

NARROW = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}


def _rounding(convert):
    """The interpreter truncates where a GPU rounds to nearest: twice the error, and all of one sign."""

    def round_to_nearest(x, source, target, mode):
        if source == tl.float32 and target in NARROW:
            dtype, bits = NARROW[target]
            return torch.from_numpy(np.array(x)).to(dtype).view(bits).numpy()
        return convert(x, source, target, mode)

    return round_to_nearest


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch):
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(interpreter, "_convert_float", _rounding(interpreter._convert_float))


def _poisoned(allocate):
    def fresh(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or x.requires_grad or x.dtype == torch.bool:
            return x
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    return fresh


@pytest.fixture
def poison(monkeypatch):
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


collect_ignore = (
    [] if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else ["test_kernel_hopper.py"]
)

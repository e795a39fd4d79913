"""Which implementation serves a tensor."""

import torch
import triton
from torch import Tensor

from sla2_kernels.launch import DTYPES, architecture

INTERPRETING = triton.knobs.runtime.interpret
BACKENDS = ("auto", "reference", "triton")


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """The implementation, `reference` or `triton`, that `backend` means for a tensor.

    `reference` is plain torch on any device; `auto` is Triton for CUDA tensors and the reference for CPU ones.

    Raises:
        ValueError: for a backend that does not exist, or a device, GPU or dtype that Triton does not serve.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if tensor.is_cuda else "reference"
    if backend == "triton":
        if not tensor.is_cuda and not INTERPRETING:
            raise ValueError(f"backend triton serves CUDA tensors, this one is on {tensor.device}; choose reference")
        if tensor.dtype not in DTYPES:
            served = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"backend triton serves {served}, this tensor is {tensor.dtype}; choose reference")
        if not torch.compiler.is_compiling():  # it cannot be traced, and the launch asks again
            architecture(tensor.device)
    return backend

"""Which implementation serves a tensor."""

from torch import Tensor

BACKENDS = ("auto", "reference")


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """The implementation that `backend` means for a tensor.

    `reference` is plain torch on any device. Triton kernels are not part of this version, so `triton` is refused and `auto`
    is the reference.

    Raises:
        ValueError: for a backend that is not served.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; this version serves {', '.join(BACKENDS)} (on {tensor.device.type})")
    return "reference"

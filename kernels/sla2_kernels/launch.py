"""Launch configurations by GPU, and the limits that they respect.

sm_90 is chosen by measurement on an H200 (NOTES.md); the other architectures start from it and stay within their shared memory.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

# Shared memory that one program may use, bytes (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Config:
    """One launch.

    Args:
        tile: tokens that a program's own tile has, or that one step of its loop takes, see the kernel.
        num_warps: warps of a program.
        num_stages: tiles in flight in the loop.
        pair: key blocks that one step of the forward's loop takes.
    """

    tile: int
    num_warps: int
    num_stages: int
    pair: int = 1


CONFIGS = {
    "sparse_forward": Config(tile=128, num_warps=8, num_stages=3),
    "query_backward": Config(tile=128, num_warps=8, num_stages=2),
    "key_backward": Config(tile=64, num_warps=8, num_stages=2),
}


@cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; the interpreter counts as the oldest that is served.

    Raises:
        ValueError: for a GPU that is not served.
    """
    if device.type != "cuda":
        return min(SHARED_MEMORY)
    major, minor = torch.cuda.get_device_capability(device)
    served = [arch for arch in SHARED_MEMORY if arch // 10 == major and arch <= 10 * major + minor]
    if not served:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the Triton kernels serve "
            f"{', '.join(f'sm_{arch}' for arch in SHARED_MEMORY)}"
        )
    return max(served)


def choose(kernel: str, arch: int, element: int, BD: int, block_q: int, block_k: int) -> Config:
    """Configuration of a kernel on an architecture, for elements of that many bytes."""
    c = CONFIGS[kernel]
    own, step = (block_k, block_q) if kernel == "key_backward" else (block_q, block_k)
    tile = min(c.tile, step if kernel == "key_backward" else own)
    if element == 4:  # twice the bytes, and three products a dot
        tile, c = min(tile, 64), replace(c, pair=1)
    moving = (tile if kernel == "key_backward" else step * c.pair) * BD * element * 2  # two tensors a step
    resident = (2 * own if kernel == "key_backward" else tile) * BD * element
    stages = max(1, min(c.num_stages, (SHARED_MEMORY[arch] - resident) // moving))
    warps = 4 if tile <= 64 and kernel != "key_backward" else c.num_warps
    return replace(c, tile=tile, num_warps=warps, num_stages=stages)


def config(kernel: str, x: Tensor, BD: int, block_q: int, block_k: int) -> Config:
    """Configuration of a kernel for a tensor's device and dtype."""
    return choose(kernel, architecture(x.device), x.element_size(), BD, block_q, block_k)


def product_config(x: Tensor) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps and stages of the batched product."""
    if x.element_size() == 4:
        return 64, 64, 32, 4, 2
    return 128, 128, 64, 8, 3


def linear_config(x: Tensor, block: int) -> tuple[int, int]:
    """Tokens that a linear kernel takes at a time from its block, and warps."""
    return min(block, 32 if x.element_size() == 4 else 64), 8

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
        BM, BN: query and key tokens of a tile.
        num_warps: warps of a program.
        num_stages: tiles in flight in the loop.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int


HOPPER = {
    "sparse_forward": Config(BM=128, BN=64, num_warps=4, num_stages=2),
    "low_bit_forward": Config(BM=128, BN=128, num_warps=4, num_stages=2),
    "query_backward": Config(BM=64, BN=64, num_warps=4, num_stages=2),
    "key_backward": Config(BM=64, BN=64, num_warps=4, num_stages=3),
}
# Without wgmma the scores and the accumulator of 128 rows do not fit four warps' registers.
WARP_LEVEL = HOPPER | {
    "sparse_forward": Config(BM=128, BN=64, num_warps=8, num_stages=2),
    "low_bit_forward": Config(BM=128, BN=128, num_warps=8, num_stages=2),
    "key_backward": Config(BM=64, BN=64, num_warps=8, num_stages=2),
}
BLACKWELL = HOPPER | {"low_bit_forward": Config(BM=128, BN=128, num_warps=8, num_stages=2)}
CONFIGS = {80: WARP_LEVEL, 86: WARP_LEVEL, 89: WARP_LEVEL, 90: HOPPER, 100: BLACKWELL, 120: WARP_LEVEL}
# Three TF32 products a dot keep two copies of each operand in shared memory.
FP32 = Config(BM=32, BN=32, num_warps=4, num_stages=1)


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


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; one without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU's matrix units take e4m3; the interpreter does."""
    return device.type != "cuda" or architecture(device) >= 89


def choose(kernel: str, arch: int, element: int, BD: int, block_q: int, block_k: int) -> Config:
    """Configuration of a kernel on an architecture, for elements of that many bytes."""
    c = FP32 if element == 4 else CONFIGS[arch][kernel]
    BM, BN = min(c.BM, block_q), min(c.BN, block_k)
    own, step = (BN, BM) if kernel == "key_backward" else (BM, BN)
    resident, moving = 2 * own * BD * element, 2 * step * BD * element  # two tensors each
    room = (SHARED_MEMORY[arch] - resident) // moving
    return replace(c, BM=BM, BN=BN, num_stages=max(1, min(c.num_stages, room)))


def config(kernel: str, x: Tensor, BD: int, block_q: int, block_k: int) -> Config:
    """Configuration of a kernel for a tensor's device and dtype."""
    return choose(kernel, architecture(x.device), x.element_size(), BD, block_q, block_k)


def product_config(x: Tensor) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps and stages of the batched product."""
    if x.element_size() == 4:
        return 64, 64, 32, 4, 2
    return 128, 128, 64, 8, 3


# Tokens that a kernel of the linear branch takes at a time from its block, and warps.
LINEAR_HOPPER = {"state": (64, 4), "rows": (32, 4), "rows_backward": (64, 8), "state_backward": (64, 8)}
LINEAR_WARP_LEVEL = LINEAR_HOPPER | {"state": (64, 8), "rows_backward": (16, 8)}
LINEAR = {
    80: LINEAR_WARP_LEVEL,
    86: LINEAR_WARP_LEVEL,
    89: LINEAR_WARP_LEVEL,
    90: LINEAR_HOPPER,
    100: LINEAR_HOPPER | {"rows_backward": (32, 8)},  # Triton 3.7 cannot compile it with 64
    120: LINEAR_WARP_LEVEL,
}
STATE_GROUP = (4, 2)  # blocks that a program of the state kernel takes, and tiles in flight


def linear_config(kernel: str, x: Tensor, block: int) -> tuple[int, int]:
    """BM and warps of a kernel of the linear branch."""
    BM, num_warps = (32, 8) if x.element_size() == 4 else LINEAR[architecture(x.device)][kernel]
    return min(block, BM), num_warps

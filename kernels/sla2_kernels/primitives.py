"""Small steps that the kernels share, and the checks that every launch needs.

Legend: B batch, H heads, N tokens, D head size, BD the power of two that holds D; BM and BN tokens of a query and a key tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_kernels import launch

LOG2E = tl.constexpr(1.4426950408889634)
# Start of a running maximum: finite, so that a row whose scores are all -inf so far gives exp2(-inf) = 0 and not NaN.
LOWEST = tl.constexpr(-1.0e30)
# Triton's interpreter multiplies the bit patterns of bf16 operands; their fp32 values give what the matrix unit gives.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def head_offset(i_bh, H, stride_b, stride_h):
    """Offset of head `i_bh` of B * H in a tensor (B, H, N, D) of any strides."""
    return (i_bh // H).to(tl.int64) * stride_b + (i_bh % H).to(tl.int64) * stride_h


@triton.jit
def load_tile(base, rows, stride, N, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a head, [rows, BD]; zeros past D, and past N if MASKED."""
    columns = tl.arange(0, BD)
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if MASKED:
        return tl.load(pointers, mask=(rows[:, None] < N) & (columns[None, :] < D), other=0.0)
    if D != BD:
        return tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    return tl.load(pointers)


@triton.jit
def of_head(x, i_bh, H, stride_b, stride_h, TMA: tl.constexpr):
    """A head of a tensor: its pointer, or the descriptor itself, which is told the head at each load."""
    return x if TMA else x + head_offset(i_bh, H, stride_b, stride_h)


@triton.jit
def load_block(x, i_b, i_h, start, stride, N, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """Rows start .. start + BN of a head, [BN, BD]; zeros past D and N (by itself with TMA, if MASKED without)."""
    rows = start + tl.arange(0, BN)
    return x.load([i_b, i_h, start, 0]).reshape(BN, BD) if TMA else load_tile(x, rows, stride, N, D, BD, MASKED)


@triton.jit
def store_tile(base, value, rows, stride, N, D: tl.constexpr, BD: tl.constexpr):
    """Write rows of a head, [rows, BD], those below N and columns below D."""
    columns = tl.arange(0, BD)
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=(rows[:, None] < N) & (columns[None, :] < D))


@triton.jit
def dot(a, b, accumulator=None):
    """Matrix product with fp32 accumulation; fp32 operands as three TF32 products, which keep fp32's accuracy."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


def tma_aligned(*tensors: Tensor) -> bool:
    """Whether TMA can reach tensors (B, H, N, D): addresses and strides in multiples of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and all(step * t.element_size() % 16 == 0 for step in t.stride()[:3]) for t in tensors
    )


def blocks_of(rows: int, BD: int, *tensors: Tensor) -> tuple[bool, ...]:
    """Whether tiles [rows, BD] of tensors (B, H, N, D) can come by TMA, and descriptors if so, else the tensors.

    TMA needs sm_90 or later, and alignment.
    """
    if launch.architecture(tensors[0].device) < 90 or not tma_aligned(*tensors):
        return False, *tensors
    return True, *(TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, BD]) for t in tensors)


def power_of_two(D: int) -> int:
    """BD of a head size; 16 is the smallest matrix-unit tile."""
    return max(16, triton.next_power_of_2(D))


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, as every kernel here wants, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor):
    """Context in which a launch goes to the tensor's own GPU and not to the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.device("cpu")

"""Batched matrix product out[b] = left[b] right[b], for the sums of block states that the linear branch takes.

    H_i = sum_j W_ij h_j  is  (T_m, T_n) x (T_n, D D);  dh_j = sum_i W_ij dH_i  its transpose;  dW_ij = <dH_i, h_j>

The left side is converted to the right side's dtype tile by tile, so that a bool or fp32 weight needs no copy.

Legend: M, N, K sizes of out (M, N) and of the sum; BM, BN, BK their tiles; GROUP row tiles that share one strip of `right`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sla2_kernels.launch import product_config
from sla2_kernels.primitives import dot, on_device


@triton.jit
def _product_kernel(left, right, out, M, N, K, stride_lb, stride_lm, stride_lk, stride_rb, stride_rk, stride_rn,
                    stride_ob, stride_om, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    # Row tiles run fastest: they read the same strip of `right` while it is in the cache.
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    i_b = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, BK)
    left += i_b * stride_lb + m[:, None].to(tl.int64) * stride_lm
    right += i_b * stride_rb + n[None, :].to(tl.int64) * stride_rn
    acc = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        at = step * BK + k
        a = tl.load(left + at[None, :].to(tl.int64) * stride_lk, mask=(m[:, None] < M) & (at[None, :] < K), other=0)
        b = tl.load(right + at[:, None].to(tl.int64) * stride_rk, mask=(at[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = dot(a.to(tl.float32).to(b.dtype), b, acc)
    pointers = out + i_b * stride_ob + m[:, None].to(tl.int64) * stride_om + n[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def padded_length(blocks: int) -> int:
    """T: T_n to the next multiple of 8, 16 bytes of bf16."""
    return (blocks + 7) // 8 * 8


def padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (B, H, T_m, T_n), bool or floating, as (B * H, T_m, T) numbers, zero past T_n.

    cuBLAS takes its Hopper kernels only for lines in multiples of 16 bytes: at 14B-720p T_n is 1182, and the product took
    3.87 ms where its arithmetic takes 1.3 ms (NOTES.md).
    """
    weight = weight.flatten(0, 1).to(dtype)
    return F.pad(weight, (0, padded_length(weight.shape[-1]) - weight.shape[-1]))


def product(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Product (batch, M, N) of (batch, M, K), bool or floating, and (batch, K, N), floating, of any strides.

    Args:
        dtype: of the result; by default that of `right`.
    """
    if left.dtype == right.dtype == torch.bfloat16 and dtype is None:
        # cuBLAS: 0.088 ms for the H of Wan 1.3B at 480p on an H200, the kernel here 0.127 ms.
        return torch.bmm(left, right)
    left = left.view(torch.uint8) if left.dtype == torch.bool else left
    batch, M, K = left.shape
    N = right.shape[-1]
    out = torch.empty(batch, M, N, dtype=dtype or right.dtype, device=right.device)
    BM, BN, BK, num_warps, num_stages = product_config(right)
    with on_device(right):
        _product_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN), batch)](
            left, right, out, M, N, K, *left.stride(), *right.stride(), *out.stride()[:2],
            BM=BM, BN=BN, BK=BK, STAGES=num_stages, num_warps=num_warps, num_stages=num_stages)  # fmt: skip
    return out

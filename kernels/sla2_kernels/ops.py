"""The kernels as torch operators `sla2::*`, with shapes for tracing and gradients, so that compile and checkpointing see through.

Each forward operator has a backward operator beside it; both take and return plain tensors. Gradients of gradients are not served.
"""

import torch
from torch import Tensor

from sla2_kernels import linear, sparse
from sla2_kernels.lookup import lookup
from sla2_kernels.primitives import rows_contiguous


@torch.library.custom_op("sla2::sparse", mutates_args=())
def sparse_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    return sparse.forward(q, k, v, lookup(mask), None, block_q, block_k)


@sparse_op.register_fake
def _(q, k, v, mask, block_q, block_k):
    return torch.empty_like(rows_contiguous(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sla2::sparse_backward", mutates_args=())
def sparse_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, o: Tensor, lse: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v = (rows_contiguous(x) for x in (do, q, k, v))
    tables = lookup(mask), lookup(mask, transposed=True)
    return sparse.backward(do, q, k, v, o, lse, *tables, None, block_q, block_k)[:3]


@sparse_backward_op.register_fake
def _(do, q, k, v, mask, o, lse, block_q, block_k):
    return tuple(torch.empty_like(rows_contiguous(x)) for x in (q, k, v))


def _sparse_setup(ctx, inputs, output):
    q, k, v, mask, *ctx.blocks = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _sparse_backward(ctx, do, _):
    if do is None:
        return (None,) * 6
    return *sparse_backward_op(do, *ctx.saved_tensors, *ctx.blocks), None, None, None


sparse_op.register_autograd(_sparse_backward, setup_context=_sparse_setup)


@torch.library.custom_op("sla2::soft_sparse", mutates_args=())
def soft_sparse_op(
    q: Tensor, k: Tensor, v: Tensor, log_mask: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    return sparse.forward(q, k, v, None, log_mask.contiguous(), block_q, block_k)


@soft_sparse_op.register_fake
def _(q, k, v, log_mask, block_q, block_k):
    return torch.empty_like(rows_contiguous(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sla2::soft_sparse_backward", mutates_args=())
def soft_sparse_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_mask: Tensor, o: Tensor, lse: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, q, k, v = (rows_contiguous(x) for x in (do, q, k, v))
    *grads, grad_mask = sparse.backward(do, q, k, v, o, lse, None, None, log_mask.contiguous(), block_q, block_k)
    return *grads, grad_mask.to(log_mask.dtype)


@soft_sparse_backward_op.register_fake
def _(do, q, k, v, log_mask, o, lse, block_q, block_k):
    grads = (torch.empty_like(rows_contiguous(x)) for x in (q, k, v))
    return *grads, torch.empty_like(log_mask, memory_format=torch.contiguous_format)


def _soft_sparse_backward(ctx, do, _):
    if do is None:
        return (None,) * 6
    return *soft_sparse_backward_op(do, *ctx.saved_tensors, *ctx.blocks), None, None


soft_sparse_op.register_autograd(_soft_sparse_backward, setup_context=_sparse_setup)


@torch.library.custom_op("sla2::linear", mutates_args=())
def linear_op(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, block_q: int, block_k: int, feature_map: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    return linear.forward(q, k, v, weight, block_q, block_k, feature_map)


@linear_op.register_fake
def _(q, k, v, weight, block_q, block_k, feature_map):
    heads, (rows, blocks), D = q.shape[0] * q.shape[1], weight.shape[2:], q.shape[3]
    return (
        torch.empty_like(rows_contiguous(q)),
        k.new_empty(heads, blocks, D, D),
        k.new_empty(heads, blocks, D, dtype=torch.float32),
        k.new_empty(heads, rows, D, D),
        k.new_empty(heads, rows, D, dtype=torch.float32),
    )


@torch.library.custom_op("sla2::linear_backward", mutates_args=())
def linear_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, h: Tensor, z: Tensor, state: Tensor, total: Tensor,
    block_q: int, block_k: int, feature_map: str, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v = (rows_contiguous(x) for x in (do, q, k, v))
    *grads, dw = linear.backward(
        do, q, k, v, weight, h, z, state, total, block_q, block_k, feature_map, weight_gradient
    )
    return *grads, weight.new_empty(0, dtype=torch.float32) if dw is None else dw


@linear_backward_op.register_fake
def _(do, q, k, v, weight, h, z, state, total, block_q, block_k, feature_map, weight_gradient):
    grads = (torch.empty_like(rows_contiguous(x)) for x in (q, k, v))
    return *grads, weight.new_empty(weight.shape if weight_gradient else 0, dtype=torch.float32)


def _linear_setup(ctx, inputs, output):
    q, k, v, weight, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, do, *_):
    if do is None:
        return (None,) * 7
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, dw = linear_backward_op(do, *ctx.saved_tensors, *ctx.settings, wanted)
    return dq, dk, dv, dw.to(ctx.saved_tensors[3].dtype) if wanted else None, None, None, None


linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)

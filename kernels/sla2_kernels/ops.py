"""The kernels as torch operators `sla2::*`, with shapes for tracing and gradients, so that compile and checkpointing see through.

Each forward operator has a backward operator beside it; both take and return plain tensors. Gradients of gradients are not served.
"""

import torch
from torch import Tensor

from sla2_kernels import fused, linear, sparse
from sla2_kernels.lookup import lookup
from sla2_kernels.primitives import rows_contiguous
from sla2_kernels.product import padded, padded_length
from sla2_kernels.reference import num_blocks


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
    heads, rows, blocks, D = q.shape[0] * q.shape[1], weight.shape[2], padded_length(weight.shape[3]), q.shape[3]
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
    states = (h, z) if weight_gradient else None
    wide = padded(weight, k.dtype)
    grads = linear.backward(do, q, k, v, wide, state, total, block_q, block_k, feature_map, states=states)
    dw = grads.weight if weight_gradient else weight.new_empty(0, dtype=torch.float32)
    return grads.q, grads.k, grads.v, dw


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


@torch.library.custom_op("sla2::low_bit_sparse", mutates_args=())
def low_bit_sparse_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, precision: str
) -> tuple[Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    s = fused.Settings(0, block_q, block_k, "softmax", False, precision)
    return fused.low_bit_sparse(q, k, v, lookup(mask), s)


@low_bit_sparse_op.register_fake
def _(q, k, v, mask, block_q, block_k, precision):
    return torch.empty_like(rows_contiguous(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


def _low_bit_sparse_setup(ctx, inputs, output):
    q, k, v, mask, *ctx.blocks, _ = inputs
    ctx.save_for_backward(q, k, v, mask, output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _low_bit_sparse_backward(ctx, do, _):
    if do is None:
        return (None,) * 7
    q, k, v, mask, o = ctx.saved_tensors
    lse = sparse_op(q, k, v, mask, *ctx.blocks)[1]  # of unquantised scores, see `fused.backward`
    return *sparse_backward_op(do, q, k, v, mask, o, lse, *ctx.blocks), None, None, None, None


low_bit_sparse_op.register_autograd(_low_bit_sparse_backward, setup_context=_low_bit_sparse_setup)


@torch.library.custom_op("sla2::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, proj_q: Tensor | None, proj_k: Tensor | None,
    mask: Tensor | None, kept: int, block_q: int, block_k: int, feature_map: str, smooth_phi: bool, precision: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    s = fused.Settings(kept, block_q, block_k, feature_map, smooth_phi, precision)
    projections = None if proj_q is None else (proj_q, proj_k)
    o, saved = fused.forward(q, k, v, alpha, projections, mask, s, save)
    if not save:
        return o, *(o.new_empty(0) for _ in range(6))
    own_mask = saved.mask if mask is None else mask.clone()  # an operator must not hand back its input
    return o, saved.sparse, saved.lse, own_mask, saved.state, saved.total, saved.mean


@attention_op.register_fake
def _(q, k, v, alpha, proj_q, proj_k, mask, kept, block_q, block_k, feature_map, smooth_phi, precision, save):
    o = torch.empty_like(rows_contiguous(q))
    if not save:
        return o, *(o.new_empty(0) for _ in range(6))
    B, H, N, D = q.shape
    rows, blocks = num_blocks(N, block_q), num_blocks(N, block_k)
    return (
        o,
        torch.empty_like(o),
        q.new_empty(B, H, N, dtype=torch.float32),
        q.new_empty(B, H, rows, blocks, dtype=torch.bool),
        q.new_empty(B * H, rows, D, D),
        q.new_empty(B * H, rows, D, dtype=torch.float32),
        q.new_empty(B * H, D, dtype=torch.float32),
    )


@torch.library.custom_op("sla2::attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, o_sparse: Tensor, lse: Tensor, mask: Tensor,
    state: Tensor, total: Tensor, mean: Tensor, block_q: int, block_k: int, feature_map: str, smooth_phi: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v = (rows_contiguous(x) for x in (do, q, k, v))
    s = fused.Settings(0, block_q, block_k, feature_map, smooth_phi, precision)
    saved = fused.Saved(o_sparse, lse, mask, state, total, mean)
    *grads, grad_alpha = fused.backward(do, q, k, v, alpha, saved, s)
    return *grads, q.new_empty(0, dtype=torch.float32) if grad_alpha is None else grad_alpha


@attention_backward_op.register_fake
def _(
    do, q, k, v, alpha, o_sparse, lse, mask, state, total, mean, block_q, block_k, feature_map, smooth_phi, precision
):
    grads = (torch.empty_like(rows_contiguous(x)) for x in (q, k, v))
    return *grads, q.new_empty(0 if alpha is None else alpha.shape, dtype=torch.float32)


def _attention_setup(ctx, inputs, output):
    q, k, v, alpha, _, _, _, _, block_q, block_k, feature_map, smooth_phi, precision, ctx.saved = inputs
    ctx.settings = block_q, block_k, feature_map, smooth_phi, precision
    ctx.save_for_backward(q, k, v, alpha, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, do, *_):
    if do is None:
        return (None,) * 14
    if not ctx.saved:
        raise RuntimeError("sla2::attention ran with save=False and cannot be differentiated")
    q, k, v, alpha, *saved = ctx.saved_tensors
    *grads, grad_alpha = attention_backward_op(do, q, k, v, alpha, *saved, *ctx.settings)
    return *grads, None if alpha is None else grad_alpha, *(None,) * 10


attention_op.register_autograd(_attention_backward, setup_context=_attention_setup)

"""Time every alternative of the launch table on this GPU, each in the step that it is for: what `launch.py` is chosen from.

    PYTHONPATH=kernels python kernels/bench/sweep.py

Prints ms by alternative, at Wan2.1 1.3B's 480p shape and 97% sparsity (low bit: 90%), the table's own choice first. Differences
below 5% are noise. A configuration that does not compile or does not fit says so.
"""

import torch
from measure import SHAPES, check, draw, kept_blocks, refuse_busy_gpu, timing

from sla2_kernels import fused, launch, linear, reference, routing, sla2_attention, sparse
from sla2_kernels.lookup import lookup
from sla2_kernels.product import product

SPARSE = {
    "sparse_forward": [(128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
    "low_bit_forward": [(128, 128, 4, 2), (128, 128, 4, 3), (128, 128, 8, 3)],
    "query_backward": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3)],
    "key_backward": [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 64, 8, 2)],
}
LINEAR = {
    "state": [(64, 4), (64, 8), (32, 8)],
    "rows": [(32, 4), (64, 4), (64, 8), (128, 8)],
    "rows_backward": [(64, 8), (32, 8), (64, 16), (128, 16)],
    "state_backward": [(64, 8), (32, 8), (64, 16)],
}


def steps() -> dict[str, object]:
    """What to time for each entry of the table."""
    H, N, D = SHAPES["1.3B-480p"]
    q, k, v, grad = draw(H, N, D, 4)
    alpha, eye = torch.rand(H, reference.num_blocks(N, 128), device="cuda"), torch.eye(D, device="cuda")
    pooled, pooled_queries = routing.pool(k, 64), routing.pool(q, 128)
    mean = routing.key_mean(pooled, N, 64)
    chosen = routing.empty_route(H, pooled_queries.shape[1], pooled.shape[1], kept_blocks(N, 0.97), q.dtype, q.device)
    routing.route(pooled_queries, pooled, mean, (eye, eye), kept_blocks(N, 0.97), chosen)
    h, z = linear.block_states(k, v, 64, "softmax", mean)
    state = product(chosen.weight, h.flatten(2)).view(H, -1, D, D)
    total = torch.empty_like(pooled_queries)
    fused.remaining(z, chosen.tables, pooled.shape[1], total)
    o, lse = sparse.forward(q, k, v, chosen.tables, None, 128, 64)
    back = lookup(chosen.mask[None], transposed=True)

    def whole(sparsity, precision):
        kept = kept_blocks(N, sparsity)
        return sla2_attention(q, k, v, kept=kept, alpha=alpha, projections=(eye, eye), precision=precision)

    def linear_backward():
        mixture = linear.Mixture(o, alpha, mean)
        return linear.backward(grad, q, k, v, chosen.weight, state, total, 128, 64, "softmax", mixture).q

    def sparse_backward():
        return sparse.backward(grad, q, k, v, o, lse, chosen.tables, back, None, 128, 64)[0]

    return {
        "sparse_forward": lambda: sparse.forward(q, k, v, chosen.tables, None, 128, 64),
        "low_bit_forward": lambda: whole(0.90, "fp8"),
        "query_backward": sparse_backward,
        "key_backward": sparse_backward,
        "state": lambda: linear.block_states(k, v, 64, "softmax", mean),
        "rows": lambda: linear.rows_output(q, state, total, alpha, 128, "softmax"),
        "rows_backward": linear_backward,
        "state_backward": linear_backward,
    }


def main() -> None:
    refuse_busy_gpu()
    check()
    arch = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    calls = steps()
    for table, alternatives, make in (
        (launch.CONFIGS[arch], SPARSE, lambda x: launch.Config(*x)),
        (launch.LINEAR[arch], LINEAR, tuple),
    ):
        for kernel, options in alternatives.items():
            own = table[kernel]
            for option in [own, *(x for x in map(make, options) if x != own)]:
                table[kernel] = option
                try:
                    result = f"{timing(calls[kernel])[0]:.4f} ms"
                except Exception as error:  # compilers and drivers raise what they like
                    result = f"not possible: {str(error).splitlines()[0][:80]}"
                print(f"{kernel} {option}: {result}", flush=True)
            table[kernel] = own


if __name__ == "__main__":
    main()

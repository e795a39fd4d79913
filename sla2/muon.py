"""Muon for models of many small matrices, and for convolutions."""

import inspect
import math

import torch
from torch import Tensor


class BatchedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon`, whose settings and state it has, for matrices and convolution kernels, those of one shape orthogonalised together.

    torch takes matrices only, one by one, in bf16 everywhere: on a GPU 1,500 kernels a step of mini's base model, which take the
    processor longer to start than the GPU to run, and on a CPU without bf16 instructions forty times as long as fp32. Here a CPU computes
    in fp32. A kernel is the matrix of its output channels by all else.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.1) -> None:
        torchs = inspect.signature(torch.optim.Muon).parameters
        defaults = {name: option.default for name, option in torchs.items() if name != "params"}
        super().__init__(params, defaults | {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; the learning rate is scaled by sqrt(max(1, rows / columns)), torch's default."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                grads = [p.grad for p in parameters]
                momenta = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                moves = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
                matrices = torch.stack(moves).flatten(2)
                matrices = orthogonal(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * math.sqrt(max(1, matrices.shape[1] / matrices.shape[2]))
                moves = matrices.unflatten(2, shape[1:]).to(parameters[0].dtype)
                torch._foreach_add_(parameters, list(moves), alpha=-rate)


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (B, rows, columns) with singular values near 1 in place of theirs, by Newton-Schulz iterations (Muon, Jordan 2024)."""
    a, b, c = coefficients
    x = x.bfloat16() if x.is_cuda else x.float()
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT

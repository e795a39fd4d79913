"""Inputs, plain torch in the tensors' own dtype, and the one rule by which a kernel is close enough.

A kernel's error against float64 may be twice that of plain torch in the same dtype, plus that dtype's rounding of the result;
that of sums which may cancel (`dalpha`, `dlog_mask`) is rounding of what is summed.
Inputs are drawn in the dtype under test and promoted for float64, so all sides see the same numbers.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sla2_kernels import reference

# The kernels' chain in fp32 beside plain torch's: scale, log M, maximum, exponent, L to base e and back, D, block sum.
FP32_ROUNDINGS = 8
# Of sums of dS = P (dP - delta), over the norm of what is summed: both factors have such a chain. In bf16 too, whose products fp32 holds
# exactly: both factors are fp32, and what O lost to bf16 the backward mends.
SCORE_GRADIENT = 2 * FP32_ROUNDINGS * torch.finfo(torch.float32).eps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """B, H, N, D, block_q, block_k, kept blocks a row."""

    N: int
    D: int
    block_q: int
    block_k: int
    kept: int
    B: int = 1
    H: int = 2

    def __str__(self) -> str:
        return f"N{self.N}-D{self.D}-{self.block_q}x{self.block_k}-kept{self.kept}"

    @property
    def blocks(self) -> dict[str, int]:
        return {"block_q": self.block_q, "block_k": self.block_k}

    @property
    def grid(self) -> tuple[int, int, int, int]:
        rows, columns = reference.num_blocks(self.N, self.block_q), reference.num_blocks(self.N, self.block_k)
        return self.B, self.H, rows, columns


CASES = [
    Case(100, 24, 32, 16, 2),
    Case(63, 48, 32, 16, 1),
    Case(65, 32, 16, 32, 3),  # every block kept
    Case(127, 64, 64, 64, 1, H=1),
    Case(130, 128, 128, 64, 2, H=1),
    Case(160, 16, 128, 128, 1, H=1),
]
GPU_CASES = [
    Case(128, 64, 64, 64, 1),
    Case(1000, 128, 128, 64, 3),
    Case(1000, 64, 64, 64, 4),
    Case(1000, 128, 128, 128, 2),
    Case(4097, 128, 128, 64, 9, B=2, H=3),
    Case(4097, 80, 128, 64, 5),
]


def seed() -> torch.Generator:
    number = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(torch.seed() % 2**31)))
    print("seed", number)
    return torch.Generator().manual_seed(number)


def draw(case: Case, dtype: torch.dtype, count: int = 4, scale: float = 1.0) -> list[Tensor]:
    """q, k, v, grad_o, (B, H, N, D) as Wan hands them over: views of (B, N, H, D)."""
    generator = seed()
    shape = (case.B, case.N, case.H, case.D)
    fresh = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(count))
    return [x.to(dtype).to(DEVICE).transpose(1, 2) for x in fresh]


def draw_mask(case: Case) -> Tensor:
    """Block mask with `kept` blocks a row; the first row keeps the ragged last block."""
    chance = torch.rand(case.grid, generator=seed())
    chance[:, :, 0, -1] = -1
    order = chance.argsort(-1)[..., : case.kept]
    return torch.zeros(case.grid, dtype=torch.bool).scatter_(-1, order, True).to(DEVICE)


def tokens(blocks: Tensor, case: Case) -> Tensor:
    return reference.expand_mask(blocks, case.N, case.N, case.block_q, case.block_k)


def plain_sparse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, case: Case) -> Tensor:
    scores = (q @ k.mT / math.sqrt(case.D)).masked_fill(~tokens(mask, case), -math.inf)
    return scores.softmax(-1) @ v


def plain_soft(q: Tensor, k: Tensor, v: Tensor, log_mask: Tensor, case: Case) -> Tensor:
    return (q @ k.mT / math.sqrt(case.D) + tokens(log_mask.to(q.dtype), case)).softmax(-1) @ v


def plain_linear(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, case: Case, feature_map: str) -> Tensor:
    def phi(x):
        maps = {"softmax": lambda: x.softmax(-1), "elu": lambda: torch.nn.functional.elu(x) + 1, "relu": x.relu}
        return maps[feature_map]()

    a = (phi(q) @ phi(k).mT) * tokens(weight.to(q.dtype), case)
    total = a.sum(-1, keepdim=True)
    return (a / torch.where(total == 0, 1, total)) @ v


def score_gradients(q: Tensor, k: Tensor, v: Tensor, log_mask: Tensor, grad: Tensor, case: Case) -> Tensor:
    """dS = P (dP - delta) in float64, (B, H, N, N): the gradient of log M is its sum over each block."""
    q, k, v, bias, grad = (x.double() for x in (q, k, v, tokens(log_mask, case), grad))
    single = replace(case, block_q=1, block_k=1)
    return with_gradients(lambda bias: plain_soft(q, k, v, bias, single), [bias], grad)[1]


def with_gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def distance(a: Tensor, b: Tensor) -> float:
    norm = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / (norm if norm > 0 else 1.0)


def assert_as_good_as_plain(found, plain, exact, names, dtype, slack: float = 2.0) -> None:
    """Each tensor's error against `exact` is at most `slack` times that of `plain`, plus the rounding of the dtype."""
    floor = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    for name, a, p, e in zip(names, found, plain, exact, strict=True):
        assert a.isfinite().all(), f"{name} is not finite"
        ours, theirs = distance(a, e), distance(p, e)
        rounding = FP32_ROUNDINGS * torch.finfo(torch.float32).eps
        assert ours <= slack * theirs + floor + rounding, (
            f"{name}: error {ours:.2e}, plain torch {theirs:.2e} in {dtype}"
        )


def assert_errs_like_oracle(
    found: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, case: Case, precision: str
) -> None:
    """A low-bit sparse branch errs, not by nothing and at most half more than fp64 arithmetic on the same quantised numbers."""
    wide, smooth = [x.double() for x in (q, k, v)], reference.smooth_keys(k.double())
    exact, _ = reference.sparse_attention(*wide, mask, **case.blocks)
    oracle, _ = reference.low_bit_sparse_attention(wide[0], smooth, wide[2], mask, **case.blocks, precision=precision)
    ours, expected = distance(found, exact), distance(oracle, exact)
    print(f"{precision}: {ours:.4f}, oracle {expected:.4f}")
    assert 0.5 * expected < ours < 1.5 * expected + torch.finfo(torch.bfloat16).eps


def compare(ours, plain, inputs: list[Tensor], grad: Tensor, names: str, case: Case | None = None) -> None:
    """Check output and gradients of a kernel against float64 by plain torch's error.

    `dalpha` and `dlog_mask` (which needs the case) are sums of many numbers of both signs, and by chance near zero: in one draw of
    a hundred all six block sums of N130 are 20 times smaller than what is summed. They are measured by its norm.
    """
    wide = [x.double() for x in inputs]
    exact = with_gradients(plain, wide, grad.double())
    floating = with_gradients(plain, inputs, grad)
    found = with_gradients(ours, inputs, grad)
    *others, last = names.split()
    if last == "dalpha":
        one, other = (plain(*wide[:-1], torch.full_like(wide[-1], share)) for share in (1, 0))
        summands = grad.double() * (one - other)
        rounding = max(FP32_ROUNDINGS * torch.finfo(torch.float32).eps, torch.finfo(inputs[0].dtype).eps)
        assert_sums(last, found.pop(), exact.pop(), summands, rounding)
    elif last == "dlog_mask":
        assert_sums(last, found.pop(), exact.pop(), score_gradients(*inputs, grad, case), SCORE_GRADIENT)
    else:
        others.append(last)
    assert_as_good_as_plain(found, floating[: len(found)], exact, others, inputs[0].dtype)


def assert_sums(name: str, found: Tensor, exact: Tensor, summands: Tensor, rounding: float) -> None:
    """The error of sums of `summands` is rounding by their norm, however much of them cancels."""
    error, size = float((found.double() - exact).norm()), float(summands.norm())
    assert error <= rounding * size, f"{name}: error {error:.2e} of numbers of size {size:.2e}"

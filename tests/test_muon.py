"""Muon by shape against torch's own, which orthogonalises in bf16 one matrix at a time."""

import copy

import torch
from torch import nn

from sla2.muon import BatchedMuon

SHAPES = ((16, 16), (16, 16), (48, 16), (16, 48), (48, 16))


def run(kind, parameters, steps):
    optimizer = kind(parameters, lr=0.02, weight_decay=0.01)
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            if (step, number) == (0, 1):
                parameter.grad = None  # a parameter that took no part in a step
        optimizer.step()
    return optimizer


def test_a_run_equals_torchs_to_the_rounding_of_bf16():
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    before, others = copy.deepcopy(parameters), copy.deepcopy(parameters)
    ours, torchs = run(BatchedMuon, parameters, 4), run(torch.optim.Muon, others, 4)
    for start, a, b in zip(before, parameters, others, strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()  # bf16 has 8 bits
    a, b = ours.state_dict(), torchs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for key in b["state"]:
        torch.testing.assert_close(a["state"][key], b["state"][key])


def test_a_state_goes_on_in_another_optimizer():
    parameters = [nn.Parameter(torch.ones(8, 8) + torch.eye(8))]
    first = run(BatchedMuon, parameters, 2)
    copies = copy.deepcopy(parameters)
    second = BatchedMuon(copies, lr=0.02, weight_decay=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for parameter in (*parameters, *copies):
        parameter.grad = torch.eye(8)
    first.step()
    second.step()
    assert torch.equal(parameters[0], copies[0])


def test_a_kernel_is_taken_as_the_matrix_of_its_output_channels():
    draw = torch.Generator().manual_seed(2)
    kernels = [nn.Parameter(torch.randn(8, 4, 1, 3, 3, generator=draw)) for _ in range(2)]
    matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    optimizers = BatchedMuon(kernels, lr=0.02), BatchedMuon(matrices, lr=0.02)
    for kernel, matrix in zip(kernels, matrices, strict=True):
        kernel.grad = torch.randn(kernel.shape, generator=draw)
        matrix.grad = kernel.grad.flatten(1)
    for optimizer in optimizers:
        optimizer.step()
    for kernel, matrix in zip(kernels, matrices, strict=True):
        assert torch.equal(kernel.flatten(1), matrix)

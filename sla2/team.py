"""Processes that train together: one by default, several under `accelerate launch` (`sla2.launch`), as DDP or as FSDP2.

Each process takes an equal share of every batch, and random draws depend on a clip's place in the batch, not on who takes it. So
losses and weights are those of one process at the same batch, but for the order of sums.

DDP and FSDP2 are torch's own and not accelerate's wrappers: accelerate runs FSDP2 on GPUs only and quietly trains with DDP
elsewhere, where the tests are.
"""

import os
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sla2.device import claim_device
from sla2.errors import UserError


@dataclass(frozen=True)
class Team:
    """This process and the others.

    Args:
        device: where this process computes.
        rank, size: of this process, from 0, and how many there are.
        parallel: `ddp`, every process holds all weights; `fsdp`, weights, gradients and optimiser state are split.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    parallel: str = "ddp"

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.size > 1 and self.parallel == "fsdp"

    def share(self, count: int) -> range:
        """Places of this process's clips in a batch.

        Raises:
            UserError: when the processes cannot share it evenly.
        """
        if count % self.size:
            raise UserError(f"batch: {count} clips cannot be shared by {self.size} processes; choose a multiple")
        own = count // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def place(self, module: nn.Module) -> nn.Module:
        """The transformer on this process's device, its blocks split with FSDP2; what learns must be chosen by now."""
        if not self.sharded:
            return module.to(self.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # fp32 weights travel and autocast computes in bf16, as in one process: alpha and router stay in fp32.
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in module.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh).to(self.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """What training calls in place of a placed module: it exchanges gradients, whose mean over processes is taken."""
        if self.size == 1 or self.sharded:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def exchange(self, wrapped: nn.Module, gradients: bool) -> None:
        """Whether the coming forward and backward exchange gradients: only the last of a batch's parts needs to.

        FSDP2 exchanges every time, since keeping whole gradients until the last part would undo the splitting.
        """
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = gradients

    def sum(self, value: float) -> float:
        """Sum of a number over the processes."""
        return (
            self.total(torch.tensor(value, dtype=torch.float64, device=self.device)).item() if self.size > 1 else value
        )

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes, in its place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the CPU, put together from their shards, on the first process; empty on the others, who must call it too."""
        found = {}
        for name, tensor in state.items():
            tensor = tensor.detach()
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.first:
                found[name] = full.cpu().contiguous()
        return found

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part from the others, once all have come through the last `wait`.

        Gloo closes its connections at once, and who is late in a barrier then finds them closed. So that it never is the one that
        the work depends on, there is another here, which may fail.
        """
        if self.size > 1:
            with suppress(RuntimeError):
                dist.barrier()
            dist.destroy_process_group()


def join(settings: dict) -> Team:
    """The team that the launcher's environment describes, else a team of one; `settings` as for `claim_device`, and parallel."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team(claim_device(settings))
    torch.set_num_threads(settings.get("threads") or torch.get_num_threads())
    device = torch.device("cpu")
    if settings["device"] != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(device, int(os.environ["RANK"]), size, settings["parallel"])


def bare(module: nn.Module) -> nn.Module:
    """The module inside what `Team.wrap` gave."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the tensor itself where it is not split."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, split as another one is."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No exchange (src_data_rank): every process has read the tensor and keeps its own part.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

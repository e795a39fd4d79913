"""Work beside the current stream: small kernels in the shadow of large ones."""

from functools import cache

import torch
from torch import Tensor


@cache
def _side(device: torch.device, main: int, lane: int) -> torch.cuda.Stream:
    """Streams of their own for each stream that anybody calls from, so that two callers do not wait for each other.

    Of high priority: small kernels come in where a block of a large one ends, instead of after all of its blocks.
    """
    return torch.cuda.Stream(device, priority=-1)


class Beside:
    """Within this context kernels run beside the current stream's, after what it has started so far.

    What they write and the current stream reads has to be allocated before: the allocator gives memory back to the stream that
    took it. `done` makes the current stream wait for what was started within. Without a GPU nothing happens.

    Args:
        x: a tensor on the device.
        lane: what is to run beside other work of this kind, and not after it, takes another number.
    """

    def __init__(self, x: Tensor, lane: int = 0) -> None:
        self.on_gpu = x.is_cuda
        if self.on_gpu:
            self.main = torch.cuda.current_stream(x.device)
            self.side = _side(x.device, self.main.cuda_stream, lane)
            self.side.wait_stream(self.main)

    def __enter__(self) -> None:
        if self.on_gpu:
            self.context = torch.cuda.stream(self.side)
            self.context.__enter__()

    def __exit__(self, *error) -> None:
        if self.on_gpu:
            self.context.__exit__(*error)
            self.event = self.side.record_event()

    def done(self) -> None:
        if self.on_gpu:
            self.main.wait_event(self.event)

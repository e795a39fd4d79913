"""The device of a job: chosen from config, one job per GPU unless told to share."""

import fcntl
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sla2.errors import UserError
from sla2.progress import say

_LOCKS = []  # held until the process ends


def claim_device(settings: dict, alone: bool = False) -> torch.device:
    """The device that settings name, with its CPU threads set; on CUDA this process takes a GPU, or a share of one, for itself.

    Snakemake counts GPUs but assigns none, and a job orphaned by `kill -9` still holds its own, so each GPU has a lock file.
    A GPU that a scheduler assigned (CUDA_VISIBLE_DEVICES) is taken as it is. SLA2_JOBS_PER_GPU lets that many jobs share each GPU.

    Args:
        settings: `device` and `threads`.
        alone: shares with none, as what is timed must not.

    Raises:
        UserError: when `device: cuda` finds no GPU, or SLA2_JOBS_PER_GPU is no number.
    """
    torch.set_num_threads(settings.get("threads") or torch.get_num_threads())
    wanted = settings.get("device", "auto")
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise UserError("device: cuda: torch sees no GPU; install a driver or set `device: cpu`")
        return torch.device("cpu")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return torch.device("cuda", 0)
    jobs = jobs_per_gpu()
    index = lock_gpus(1)[0] if alone or jobs == 1 else share_gpu(jobs)
    torch.cuda.set_device(index)  # events and pinned memory belong to the current one
    return torch.device("cuda", index)


def jobs_per_gpu() -> int:
    """How many jobs share a GPU on this machine: SLA2_JOBS_PER_GPU, else 1."""
    text = os.environ.get("SLA2_JOBS_PER_GPU", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"SLA2_JOBS_PER_GPU: '{text}' is not a number of jobs; set 1 or more, or unset it")
    return int(text)


def lock_gpus(count: int) -> list[int]:
    """Indices of `count` GPUs that no other job of ours holds, held until this process ends; waits for them; [] without a GPU.

    Raises:
        UserError: when the machine has fewer.
    """
    present = torch.cuda.device_count()
    if not present:
        return []
    if count > present:
        raise UserError(f"gpus: {count} wanted, this machine has {present}; lower that key of the step")
    # Two jobs that each hold a part of what the other waits for would wait for ever, so one takes locks at a time.
    with _taking() as folder:
        held = {index: file for index in range(present) if (file := _lock(folder / str(index)))}
        for index in range(present):
            if len(held) < count and index not in held:
                say(f"every free GPU is taken by another job of ours; waiting for GPU {index}")
                held[index] = _lock(folder / str(index), wait=True)
    chosen = dict(list(held.items())[:count])
    for index, file in held.items():
        if index in chosen:
            _LOCKS.append(file)
        else:
            file.close()
    return sorted(chosen)


def share_gpu(jobs: int) -> int:
    """Index of the GPU with the fewest jobs of ours on it, of at most `jobs` each; held until this process ends; waits for a place."""
    with _taking() as folder:
        index = _place(folder, jobs)
        if index is None:
            say(f"every GPU has {jobs} jobs of ours; waiting for a place")
        while index is None:
            time.sleep(0.2)
            index = _place(folder, jobs)
        return index


def _place(folder: Path, jobs: int) -> int | None:
    """Index of the GPU on which this process has taken one of `jobs` places, first places first; None where all are taken."""
    for place, index in itertools.product(range(jobs), range(torch.cuda.device_count())):
        gpu = _lock(folder / str(index), fcntl.LOCK_SH)
        share = _lock(folder / f"{index}.{place}") if gpu else None
        if share:
            _LOCKS.extend([gpu, share])
            return index
        if gpu:
            gpu.close()
    return None


@contextmanager
def _taking() -> Iterator[Path]:
    """The folder of the locks, while this process alone takes any."""
    folder = Path(tempfile.gettempdir()) / f"sla2-gpu-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with (folder / "taking").open("w") as taking:
        fcntl.flock(taking, fcntl.LOCK_EX)
        yield folder


def _lock(path: Path, kind: int = fcntl.LOCK_EX, wait: bool = False):
    file = path.open("w")
    try:
        fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file

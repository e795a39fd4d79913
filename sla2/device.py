"""The device of a job: chosen from config, one job per GPU."""

import fcntl
import os
import tempfile
from pathlib import Path

import torch

from sla2.errors import UserError
from sla2.progress import say

_LOCKS = []  # held until the process ends


def claim_device(settings: dict) -> torch.device:
    """The device that settings name, with its CPU threads set; on CUDA this process takes a GPU for itself.

    Snakemake counts GPUs but assigns none, and a job orphaned by `kill -9` still holds its own, so each GPU has a lock file.
    A GPU that a scheduler assigned (CUDA_VISIBLE_DEVICES) is taken as it is.

    Raises:
        UserError: when `device: cuda` finds no GPU.
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
    return torch.device("cuda", _lock_gpu())


def _lock_gpu() -> int:
    folder = Path(tempfile.gettempdir()) / f"sla2-gpu-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    files = [(folder / str(index)).open("w") for index in range(torch.cuda.device_count())]
    for index, file in enumerate(files):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        _LOCKS.append(file)
        return index
    say("every GPU is taken by another job of ours; waiting for the first")
    fcntl.flock(files[0], fcntl.LOCK_EX)
    _LOCKS.append(files[0])
    return 0

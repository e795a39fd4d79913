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
    return torch.device("cuda", lock_gpus(1)[0])


def lock_gpus(count: int) -> list[int]:
    """Indices of `count` GPUs that no other job of ours holds, held until this process ends; waits for them; [] without a GPU.

    Raises:
        UserError: when the machine has fewer.
    """
    present = torch.cuda.device_count()
    if not present:
        return []
    if count > present:
        raise UserError(f"gpus: {count} wanted, this machine has {present}; lower stage2.gpus")
    folder = Path(tempfile.gettempdir()) / f"sla2-gpu-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    # Two jobs that each hold a part of what the other waits for would wait for ever, so one takes locks at a time.
    with (folder / "taking").open("w") as taking:
        fcntl.flock(taking, fcntl.LOCK_EX)
        held = {index: file for index in range(present) if (file := _lock(folder / str(index), wait=False))}
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


def _lock(path: Path, wait: bool):
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file

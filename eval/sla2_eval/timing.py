"""Timing that can be compared: one process, warm-up, interleaved repeats, CUDA events on a GPU."""

import os
import subprocess
import time
from collections.abc import Callable

import numpy as np
import torch

from sla2.errors import UserError

PERCENTILES = (20, 50, 80)
BUSY_PERCENT = 10  # utilisation above which someone else is at work on an otherwise idle GPU


def refuse_shared_gpu(device: torch.device) -> None:
    """Stop when another process uses the GPU; call it before this process touches CUDA. A CPU passes.

    Raises:
        UserError: naming the processes, or the utilisation where a container hides them.
    """
    if device.type != "cuda":
        return
    index = str(device.index or 0)
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        index = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[int(index)].strip()
    processes = _query("--query-compute-apps=pid,process_name,used_memory", index)
    if processes:
        raise UserError(f"GPU {index}: used by {'; '.join(processes)}; latency needs the whole GPU, wait or stop them")
    busy = int(_query("--query-gpu=utilization.gpu", index, "nounits")[0])
    if busy > BUSY_PERCENT:
        raise UserError(
            f"GPU {index}: {busy}% busy though this process is idle; latency needs the whole GPU, wait for it"
        )


def _query(what: str, index: str, *options: str) -> list[str]:
    command = ["nvidia-smi", "-i", index, what, "--format=" + ",".join(("csv", "noheader", *options))]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(
            f"nvidia-smi: {(answer.stdout or answer.stderr).strip()}; without it the GPU cannot be shown to be free"
        )
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def interleaved_ms(
    functions: dict[str, Callable[[], object]],
    warmup: int,
    repeats: int,
    device: torch.device,
    prepare: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Milliseconds of every call of every function.

    Each round calls every function once, so that a drift of clocks or temperature touches all of them alike.

    Args:
        functions: what to time, by name.
        warmup: rounds that are not kept.
        repeats: rounds that are kept.
        device: where the functions work; on CUDA each call is timed by events and ended by a synchronisation.
        prepare: called with the name before each call, outside the timed region.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            prepare(name)
            elapsed = _call_ms(function, device)
            if number >= warmup:
                times[name].append(elapsed)
    return times


def _call_ms(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


def percentiles(times_ms: list[float]) -> dict[str, float]:
    """`{"p20": ..., "p50": ..., "p80": ...}` of repeated times."""
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(times_ms, PERCENTILES), strict=True)}

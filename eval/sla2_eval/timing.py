"""Timing that can be compared: one process, warm-up, interleaved repeats, CUDA events on a GPU."""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from sla2.errors import UserError

PERCENTILES = (20, 50, 80)
BUSY_PERCENT = 10  # utilisation above which someone else is at work on an otherwise idle GPU


def refuse_shared_gpu(device: torch.device) -> None:
    """Stop when another process uses the GPU; call it before this process computes there. A CPU passes.

    Raises:
        UserError: naming the processes, or the utilisation where a container hides them.
    """
    if device.type != "cuda":
        return
    index = gpu_index(device)
    listed = _query("--query-compute-apps=pid,process_name,used_memory", index)
    # This process is among them once `claim_device` has made the GPU its current one.
    processes = [line for line in listed if line.split(",")[0] != str(os.getpid())]
    if processes:
        raise UserError(f"GPU {index}: used by {'; '.join(processes)}; latency needs the whole GPU, wait or stop them")
    busy = int(_query("--query-gpu=utilization.gpu", index, "nounits")[0])
    if busy > BUSY_PERCENT:
        raise UserError(
            f"GPU {index}: {busy}% busy though this process is idle; latency needs the whole GPU, wait for it"
        )


def gpu_index(device: torch.device) -> str:
    """What `nvidia-smi -i` calls this device, which CUDA_VISIBLE_DEVICES may have renumbered."""
    index = str(device.index or 0)
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        index = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[int(index)].strip()
    return index


def _query(what: str, index: str, *options: str) -> list[str]:
    command = ["nvidia-smi", "-i", index, what, "--format=" + ",".join(("csv", "noheader", *options))]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(
            f"nvidia-smi: {(answer.stdout or answer.stderr).strip()}; without it the GPU cannot be shown to be free"
        )
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


class GpuWatch:
    """Clock, power and temperature of a GPU while a block runs, read four times a second by `nvidia-smi` in a process of its own.

    `summary` is empty on a CPU, and where the driver tells nothing.
    """

    FIELDS = "clocks.sm,power.draw,temperature.gpu"

    def __init__(self, device: torch.device) -> None:
        self.device, self.samples = device, []

    def __enter__(self) -> "GpuWatch":
        self.samples = []
        if self.device.type == "cuda":
            self._output = tempfile.TemporaryFile("w+")
            command = ["nvidia-smi", "-i", gpu_index(self.device), f"--query-gpu={self.FIELDS}", "-lms", "250"]
            self._process = subprocess.Popen(
                [*command, "--format=csv,noheader,nounits"], stdout=self._output, stderr=subprocess.DEVNULL
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._process.terminate()
            self._process.wait()
            self._output.seek(0)
            self.samples = [found for line in self._output if (found := _numbers(line))]
            self._output.close()

    @property
    def summary(self) -> dict[str, float]:
        """Median and lowest clock in MHz, median power in W, highest temperature in degrees Celsius."""
        if not self.samples:
            return {}
        clocks, powers, temperatures = zip(*self.samples, strict=True)
        return {
            "clock_mhz": statistics.median(clocks),
            "clock_mhz_min": min(clocks),
            "power_w": statistics.median(powers),
            "temperature_c_max": max(temperatures),
        }


def _numbers(line: str) -> tuple[float, float, float] | None:
    """Clock, power and temperature of a line; None for one that was cut short or says `[N/A]`."""
    try:
        clock, power, temperature = map(float, line.split(","))
    except ValueError:
        return None
    return clock, power, temperature


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
            elapsed = call_ms(function, device)
            if number >= warmup:
                times[name].append(elapsed)
    return times


def call_ms(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: by CUDA events on a GPU, by the clock elsewhere."""
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

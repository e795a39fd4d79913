"""The training loop that base model, stage 1 and stage 2 share: schedule, clipping, averaging, log, checkpoints, progress."""

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.checkpoint import Checkpoint
from sla2.files import write_atomic
from sla2.flow import generator
from sla2.progress import bar

LOG_COLUMNS = ("step", "phase", "split", "metric", "value")
TIMING_COLUMNS = ("step", "phase", "seconds", "data_seconds", "gpu_peak_gib")
GIB = 2**30


class Log(list):
    """Rows of `log.csv`, and of `timing.csv` beside it: what a run computed, and what each step of it took.

    They are apart because the one is equal for equal runs and the other never is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timing: list[list] = []

    def add(self, step: int, phase: str, split: str, metric: str, value: float) -> None:
        self.append([step, phase, split, metric, float(f"{value:.6g}")])

    def time(self, step: int, phase: str, seconds: float, data_seconds: float, gpu_peak_gib: float | None) -> None:
        """Add what a step took.

        Args:
            seconds: of the whole step, waiting for data included, validation and checkpoints not.
            data_seconds: of waiting for data.
            gpu_peak_gib: most GPU memory that torch held since the process began; None on a CPU.
        """
        peak = "" if gpu_peak_gib is None else round(gpu_peak_gib, 3)
        self.timing.append([step, phase, round(seconds, 4), round(data_seconds, 4), peak])

    def write(self, path: str | Path) -> None:
        """Write `log.csv` at that path, and `timing.csv` beside it."""
        path = Path(path)
        for name, columns, rows in ((path.name, LOG_COLUMNS, self), ("timing.csv", TIMING_COLUMNS, self.timing)):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerows([columns, *rows])
            write_atomic(path.with_name(name), text.getvalue())

    def state(self) -> dict:
        """JSON-able, for a checkpoint."""
        return {"log": list(self), "timing": self.timing}

    def restore(self, state: dict) -> None:
        self[:], self.timing = state["log"], state["timing"]


class Average:
    """Exponential moving average of a module's trainable parameters; the early average is of all steps so far."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad] if decay else []
        self.names = [name for name, _ in trained]
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for _, p in trained)

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.names:
            return
        decay = min(self.decay, step / (step + 9))
        parameters = dict(self.module.named_parameters())
        torch._foreach_lerp_(list(self.values), [parameters[name] for name in self.names], 1 - decay)

    def store(self) -> None:
        """Write the average into the module."""
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in zip(self.names, self.values, strict=True):
                parameters[name].copy_(value)


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step` (from 0): linear rise, then a cosine to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


def update(parts: Iterable[Tensor], optimizers: list[torch.optim.Optimizer], clip: float) -> float:
    """One optimiser step on the sum of the parts, whose gradients are summed; returns that sum.

    Args:
        parts: losses, each formed when its turn comes, so that one part's activations are in memory at a time.
        clip: largest gradient norm.

    Raises:
        RuntimeError: when a gradient is not finite; the weights are as they were.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    number = 0.0
    for part in parts:
        part.backward()
        number += part.item()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, clip, error_if_nonfinite=True)
    for optimizer in optimizers:
        optimizer.step()
    return number


def train(
    phase: str,
    description: str,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[int], Iterator[Tensor]],
    steps: int,
    checkpoint: Checkpoint,
    log: Log,
    *,
    warmup: int = 0,
    clip: float = 1.0,
    ema: float = 0.0,
    validate: Callable[[int], None] | None = None,
    validate_every: int = 50,
    state: dict[str, nn.Module] | None = None,
    waited_s: Callable[[], float] = lambda: 0.0,
) -> None:
    """Train `module` in place, resuming from `checkpoint` when there is one; leaves the averaged weights in it.

    Args:
        optimizers: step together; each of their groups' learning rates is a peak that the schedule scales.
        loss: yields the parts that sum to the training loss of step i (from 0); its random draws depend on i only.
        validate: called at step 0, every `validate_every` steps and at the end; writes into `log`.
        state: further modules that belong to the checkpoint.
        waited_s: seconds that the run has waited for data so far.
    """
    average = Average(module, ema)
    modules = {"module": module, "average": average.values, **(state or {})}
    start, extra = checkpoint.load(modules, optimizers)
    if extra:
        log.restore(extra)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group.setdefault("peak", group["lr"]) for group in groups]
    if validate and start == 0:
        validate(0)
    progress = bar(steps, description, start)
    for step in progress:
        began, waited = time.perf_counter(), waited_s()
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, steps, warmup)
        number = update(loss(step), optimizers, clip)
        average.update(step + 1)
        log.add(step + 1, phase, "train", "loss", number)
        seconds, waited = time.perf_counter() - began, waited_s() - waited
        peak = torch.cuda.max_memory_allocated() / GIB if next(module.parameters()).is_cuda else None
        log.time(step + 1, phase, seconds, waited, peak)
        shown = {"loss": f"{number:.4f}", "data": f"{waited / seconds:.0%}"}
        progress.set_postfix(**shown, **({} if peak is None else {"gpu": f"{peak:.1f} GiB"}))
        done = step + 1
        if validate and (done % validate_every == 0 or done == steps):
            validate(done)
        if done % checkpoint.every == 0 and done < steps:
            checkpoint.save(done, modules, optimizers, log.state())
    average.store()


def batches(count: int, size: int, seed: int) -> Callable[[int], list[int]]:
    """Indices of the batch of step i: every epoch a new order by (seed, epoch), the same whether resumed or not."""
    size = min(size, count)
    per_epoch = count // size

    def batch(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=generator(seed, epoch)).tolist()
        return order[place * size : (place + 1) * size]

    return batch


def each(items: list, size: int) -> Iterator[list]:
    """Consecutive chunks."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

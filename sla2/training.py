"""The training loop that base model, stage 1 and stage 2 share: schedule, clipping, averaging, log, checkpoints, progress."""

import csv
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.checkpoint import Checkpoint
from sla2.files import write_atomic
from sla2.flow import generator
from sla2.progress import bar

LOG_COLUMNS = ("step", "phase", "split", "metric", "value")


class Log(list):
    """Rows of `log.csv`."""

    def add(self, step: int, phase: str, split: str, metric: str, value: float) -> None:
        self.append([step, phase, split, metric, float(f"{value:.6g}")])

    def write(self, path: str | Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([LOG_COLUMNS, *self])
        write_atomic(path, text.getvalue())


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
) -> None:
    """Train `module` in place, resuming from `checkpoint` when there is one; leaves the averaged weights in it.

    Args:
        optimizers: step together; each of their groups' learning rates is a peak that the schedule scales.
        loss: yields the parts that sum to the training loss of step i (from 0); its random draws depend on i only.
        validate: called at step 0, every `validate_every` steps and at the end; writes into `log`.
        state: further modules that belong to the checkpoint.
    """
    average = Average(module, ema)
    modules = {"module": module, "average": average.values, **(state or {})}
    start, extra = checkpoint.load(modules, optimizers)
    if extra:
        log[:] = extra["log"]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group.setdefault("peak", group["lr"]) for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    if validate and start == 0:
        validate(0)
    progress = bar(steps, description, start)
    for step in progress:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, steps, warmup)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        number = 0.0
        for part in loss(step):
            part.backward()
            number += part.item()
        nn.utils.clip_grad_norm_(parameters, clip, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
        average.update(step + 1)
        log.add(step + 1, phase, "train", "loss", number)
        progress.set_postfix(loss=f"{number:.4f}")
        done = step + 1
        if validate and (done % validate_every == 0 or done == steps):
            validate(done)
        if done % checkpoint.every == 0 and done < steps:
            checkpoint.save(done, modules, optimizers, {"log": list(log)})
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

"""The training loop that base model, stage 1 and stage 2 share: schedule, clipping, averaging, log, checkpoints, progress."""

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.checkpoint import Checkpoint
from sla2.errors import UserError
from sla2.files import write_atomic
from sla2.flow import generator
from sla2.progress import bar
from sla2.team import Team, local

LOG_COLUMNS = ("step", "phase", "split", "metric", "value")
TIMING_COLUMNS = ("step", "phase", "seconds", "data_seconds", "gpu_peak_gib")
GIB = 2**30


class Log(list):
    """Rows of `log.csv`, and of `timing.csv` beside it: what a run computed, and what each step of it took.

    They are apart because the one is equal for equal runs and the other never is.

    Args:
        tensorboard: folder for TensorBoard's event files, which are written as rows are added; none without it.

    Raises:
        UserError: when TensorBoard is wanted and not installed.
    """

    def __init__(self, tensorboard: str | Path | None = None) -> None:
        super().__init__()
        self.timing: list[list] = []
        self.writer = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "tensorboard: true: the package is absent; `pip install tensorboard`, or false"
                ) from None
            self.writer = SummaryWriter(str(tensorboard))

    def _show(self, name: str, value: float, step: int) -> None:
        if self.writer:
            self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def add(self, step: int, phase: str, split: str, metric: str, value: float) -> None:
        self.append([step, phase, split, metric, float(f"{value:.6g}")])
        self._show(f"{phase}/{split}/{metric}", value, step)

    def time(self, step: int, phase: str, seconds: float, data_seconds: float, gpu_peak_gib: float | None) -> None:
        """Add what a step took.

        Args:
            seconds: of the whole step, waiting for data included, validation and checkpoints not.
            data_seconds: of waiting for data.
            gpu_peak_gib: most GPU memory that torch held since the process began; None on a CPU.
        """
        peak = "" if gpu_peak_gib is None else round(gpu_peak_gib, 3)
        self.timing.append([step, phase, round(seconds, 4), round(data_seconds, 4), peak])
        self._show(f"{phase}/seconds", seconds, step)

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

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and the parameters that they are of; of a split module, this process's shards."""
        parameters = dict(self.module.named_parameters())
        return [local(value) for value in self.values], [local(parameters[name]) for name in self.names]

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.names:
            return
        averages, parameters = self._pairs()
        torch._foreach_lerp_(averages, parameters, 1 - min(self.decay, step / (step + 9)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module for a while, and then what was there."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(*self._pairs(), strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)

    @torch.no_grad()
    def store(self) -> None:
        """Write the average into the module."""
        for value, parameter in zip(*self._pairs(), strict=True):
            parameter.copy_(value)


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step` (from 0): linear rise, then a cosine to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


def update(
    parts: Iterable[Tensor], optimizers: list[torch.optim.Optimizer], clip: float, team: Team | None = None
) -> Tensor:
    """One optimiser step on the sum of the parts, whose gradients are summed.

    Nothing here waits for a GPU: the optimisers start their many small kernels while the backward pass still runs.

    Args:
        parts: losses, each formed when its turn comes, so that one part's activations are in memory at a time.
        clip: largest gradient norm.
        team: the sum is over its processes too.

    Returns:
        The sum of the parts and the norm of the gradients, fp64 (2,).
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    size = team.size if team else 1
    losses = []
    for part in parts:
        (part * size if size > 1 else part).backward()  # the exchange takes the mean over processes, a sum is wanted
        losses.append(part.detach().double())
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for optimizer in optimizers:
        optimizer.step()
    total = torch.stack(losses).sum()
    return torch.stack([team.total(total) if team else total, norm.double()])


class Later:
    """Numbers on their way from a GPU: they are read when the GPU has the next step to compute.

    Args:
        numbers: on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.there = numbers, None
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def read(self) -> list[float]:
        """Wait for them."""
        if self.there:
            self.there.synchronize()
        return self.numbers.tolist()


@contextmanager
def patient(team: Team | None) -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the step, which asks for it by the function given here; a second one does not wait.

    Processes of a team stop as before: they would not all stop at the same step. Where Ctrl-C is ignored, as under nohup, it stays so.
    """
    asked = []

    def note(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, former)

    alone = (team is None or team.size == 1) and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield lambda: False
        return
    former = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, former)


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
    validate: Callable[[int], float | None] | None = None,
    validate_every: int = 50,
    stop: Callable[[], bool] = lambda: False,
    state: dict[str, nn.Module] | None = None,
    waited_s: Callable[[], float] = lambda: 0.0,
    team: Team | None = None,
) -> None:
    """Train `module` in place, resuming from `checkpoint` when there is one; leaves the averaged weights in it.

    Ctrl-C saves the step that it finds. The end is saved too, without the optimisers' state, so that it is small enough to be carried
    elsewhere: what follows the training may fail.

    Args:
        optimizers: step together; each of their groups' learning rates is a peak that the schedule scales.
        loss: yields the parts that sum to the training loss of step i (from 0); its random draws depend on i only.
        validate: called at step 0, every `validate_every` steps and at the end, with the averaged weights in place; writes into
            `log`. The weights with the lowest number that it returns are kept beside the checkpoint.
        stop: asked after each validation; true ends the training early.
        state: further modules that belong to the checkpoint.
        waited_s: seconds that the run has waited for data so far.
        team: processes that train together; the first shows progress and writes checkpoints.

    Raises:
        UserError: when a gradient is not finite; the checkpoint is of before.
    """
    trained = {"module": module, **(state or {})}
    if checkpoint.finished:
        _, extra = checkpoint.load(trained, [])
        log.restore(extra)
        return
    average = Average(module, ema)
    modules = {**trained, "average": average.values}
    start, extra = checkpoint.load(modules, optimizers)
    if extra:
        log.restore(extra)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group.setdefault("peak", group["lr"]) for group in groups]

    def look(step: int) -> None:
        with average.applied():
            value = validate(step)
            if value is not None:
                checkpoint.save_best(step, module, value)

    if validate and start == 0:
        look(0)
    progress = bar(steps, description, start, shown=team is None or team.first)
    unread: list[tuple[int, Later]] = []

    def settle() -> None:
        """Log the loss of the step before, which a GPU has computed by now."""
        while unread:
            number, found = unread.pop()
            value, norm = found.read()
            if not math.isfinite(norm):
                raise UserError(
                    f"{description}: the norm of the gradients of step {number} is {norm}; lower the learning rate, or look at the data"
                )
            log.add(number, phase, "train", "loss", value)
            progress.set_postfix(loss=f"{value:.4f}", **told)

    told: dict[str, str] = {}
    with patient(team) as interrupted:
        for step in progress:
            began, waited = time.perf_counter(), waited_s()
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * rate(step, steps, warmup)
            numbers = Later(update(loss(step), optimizers, clip, team))
            average.update(step + 1)
            settle()
            done = step + 1
            unread.append((done, numbers))
            seconds, waited = time.perf_counter() - began, waited_s() - waited
            peak = torch.cuda.max_memory_allocated() / GIB if next(module.parameters()).is_cuda else None
            log.time(done, phase, seconds, waited, peak)
            # The bar's own seconds hold validation and checkpoints too.
            told = {"step": f"{seconds:.2f} s", "data": f"{waited / seconds:.0%}"}
            told |= {} if peak is None else {"gpu": f"{peak:.1f} GiB"}
            due = validate and (done % validate_every == 0 or done == steps)
            halt = interrupted()
            saved = halt or (done % checkpoint.every == 0 and done < steps)
            if due or saved:
                settle()
            if due:
                look(done)
                if stop():
                    break
            if saved:
                checkpoint.save(done, modules, optimizers, log.state())
            if halt:
                raise KeyboardInterrupt
        settle()
    average.store()
    checkpoint.finish(steps, trained, log.state())


def batches(count: int, size: int, seed: int, team: Team | None = None) -> Callable[[int], list[int]]:
    """Indices of the batch of step i: every epoch a new order by (seed, epoch), the same whether resumed or not.

    Args:
        team: of each batch this process's share is given.
    """
    size = min(size, count)
    per_epoch = count // size
    places = team.share(size) if team else range(size)

    @lru_cache(1)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=generator(seed, epoch)).tolist()

    def batch(step: int) -> list[int]:
        epoch, number = divmod(step, per_epoch)
        return [order(epoch)[number * size + place] for place in places]

    return batch


def each(items: list, size: int) -> Iterator[list]:
    """Consecutive chunks."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

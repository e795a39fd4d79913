"""Progress of long work: a tqdm bar on a terminal, a line every ten seconds in a log."""

import sys
import time
from collections.abc import Iterable, Iterator


class _Lines:
    """What `bar` yields through when stderr is no terminal, so that logs stay short and readable."""

    every_s = 10.0

    def __init__(self, items: Iterable, description: str, total: int, start: int) -> None:
        self.items, self.description, self.total, self.done = items, description, total, start
        self.first, self.postfix = start, ""

    def __iter__(self) -> Iterator:
        began = shown = time.monotonic()
        for item in self.items:
            yield item
            self.done += 1
            now = time.monotonic()
            if now - shown >= self.every_s or self.done == self.total:
                shown = now
                rate = (self.done - self.first) / max(now - began, 1e-9)
                remaining = (self.total - self.done) / max(rate, 1e-9)
                print(
                    f"{self.description}: {self.done}/{self.total}{self.postfix}  {1 / rate:.2f} s each, ETA {remaining:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

    def set_postfix(self, **values: object) -> None:
        self.postfix = "".join(f"  {name} {value}" for name, value in values.items())


class _Silent(list):
    """What `bar` yields through in a process whose neighbour shows the progress of both."""

    def set_postfix(self, **values: object) -> None:
        pass


def bar(items: Iterable | int, description: str, start: int = 0, shown: bool = True):
    """Iterate with progress on stderr; `set_postfix(loss="0.1234")` adds figures to the line.

    Args:
        items: a sized iterable, or a number of steps.
        description: what runs, such as `stage2 sla2-97 seed 0`.
        start: steps that an earlier run has done; a number of steps then counts on from there.
        shown: whether this process shows anything.
    """
    if isinstance(items, int):
        total, items = items, range(start, items)
    else:
        items = list(items)
        total = start + len(items)
    if not shown:
        return _Silent(items)
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(items, desc=description, total=total, initial=start, dynamic_ncols=True)
    return _Lines(items, description, total, start)


def say(message: str) -> None:
    """One line on stderr, at once."""
    print(message, file=sys.stderr, flush=True)

"""How metrics respond to damage: rows that compare clean clips with damaged ones, pair by pair.

domain, distortion, strength, unit    which clips, and what was done to them
metric, clips                         how many pairs had a value
clean, mean                           mean over clean and over damaged clips
change, se                            mean paired change, and its standard error
sees                                  yes: the change exceeds three standard errors
response                              the change as a share of the metric's largest in that domain; positive where the metric calls it
                                      worse or, for one without a direction, where it falls
reason                                why there is no number
"""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sla2.files import write_atomic
from sla2_eval.metrics.catalogue import METRICS

COLUMNS = (
    "domain",
    "distortion",
    "strength",
    "unit",
    "metric",
    "clips",
    "clean",
    "mean",
    "change",
    "se",
    "sees",
    "response",
    "reason",
)
CLEAR = 3.0  # standard errors that a change must exceed


def compare(clean: list[dict[str, float | None]], damaged: list[dict[str, float | None]]) -> Iterator[dict]:
    """One row a metric, from its values for each clip, in the same order on both sides."""
    for metric in dict.fromkeys(name for one in clean for name in one):
        pairs = [(a.get(metric), b.get(metric)) for a, b in zip(clean, damaged, strict=True)]
        known = np.array([pair for pair in pairs if None not in pair])
        row = {"metric": metric, "clips": len(known)}
        if len(known) < 2:
            yield row | {"reason": "fewer than two clips have a value, clean and damaged"}
            continue
        change = known[:, 1] - known[:, 0]
        mean, error = float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change)))
        yield row | {
            "clean": float(known[:, 0].mean()),
            "mean": float(known[:, 1].mean()),
            "change": mean,
            "se": error,
            "sees": "yes" if abs(mean) > max(CLEAR * error, 1e-12) else "no",
        }


def add_responses(rows: list[dict]) -> None:
    """Fill in `response`, in place."""
    largest: dict[tuple, float] = {}
    for row in rows:
        key = row["domain"], row["metric"]
        largest[key] = max(largest.get(key, 0.0), abs(row.get("change", 0.0)))
    for row in rows:
        scale = largest[row["domain"], row["metric"]]
        if "change" in row:
            worse = 1 if METRICS[row["metric"]].higher_is_better is False else -1
            row["response"] = worse * row["change"] / scale if scale else 0.0


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    write_atomic(path, text.getvalue())

"""The tables folder of a study, as figures, notebooks and the page read it. Standard library only."""

import csv
from functools import cached_property
from pathlib import Path

from sla2.errors import UserError
from sla2.files import read_json

SUMMARIES = ("quality", "fidelity", "attention", "efficiency")
TEXT = {
    "study",
    "variant",
    "metric",
    "unit",
    "higher_is_better",
    "reference",
    "verdict",
    "effect",
    "backend",
    "status",
    "reason",
    "attention",
    "router",
    "alpha",
    "mixing",
    "quantization",
    "finetune",
    "stage",
    "run",
    "phase",
    "split",
    "domain",
    "distortion",
    "sees",
    "claim",
}


class TableSet:
    """Reads tables on demand.

    Args:
        folder: `results/{study}/tables`.

    Raises:
        UserError: when the folder lacks a table.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.study = read_json(self.folder / "study.json")

    @cached_property
    def variants(self) -> dict[str, dict]:
        """Rows of the variants sheet by name, in its order."""
        return {row["variant"]: row for row in self.rows("variants")}

    def variants_by(self, *words: str) -> dict[tuple, list[str]]:
        """Names of the rows that say the same of all these words of the sheet, by what they say."""
        groups: dict[tuple, list[str]] = {}
        for name, row in self.variants.items():
            groups.setdefault(tuple(row[word] for word in words), []).append(name)
        return groups

    def rows(self, table: str) -> list[dict]:
        """Rows of `<table>.csv`; numbers as float, None where empty."""
        path = self.folder / f"{table}.csv"
        if not path.is_file():
            raise UserError(f"{path}: missing; run `python -m sla2_eval.tables`, or give the folder that holds it")
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: text if name in TEXT else float(text) if text else None for name, text in row.items()}
                for row in csv.DictReader(file)
            ]

    @cached_property
    def _summaries(self) -> dict[tuple, dict]:
        rows = [row for table in reversed(SUMMARIES) for row in self.rows(table)]
        return {(row["variant"], row["metric"], row["layer"]): row for row in rows}

    def metric(self, metric: str, layer: int | None = None) -> dict[str, dict]:
        """Rows of a metric by variant, in the order of the sheet, those without a value left out."""
        rows = {name: self._summaries.get((name, metric, layer)) for name in self.variants}
        return {name: row for name, row in rows.items() if row and row["mean"] is not None}

    def missing(self, metric: str) -> dict[str, str]:
        """Why variants have no value of a metric."""
        rows = {name: self._summaries.get((name, metric, None)) for name in self.variants}
        return {
            name: row["reason"] if row else "not measured"
            for name, row in rows.items()
            if row is None or row["mean"] is None
        }

    def direction(self, metric: str) -> str:
        """`true`, `false` or empty, as in the column higher_is_better."""
        return next((row["higher_is_better"] for row in self.metric(metric).values()), "")

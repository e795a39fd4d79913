"""Which generated videos people are shown: of each row's first training seed those that the tables' study names."""

import json
from dataclasses import dataclass
from pathlib import Path

from sla2.errors import UserError
from sla2_eval.table_set import TableSet


@dataclass(frozen=True)
class Clip:
    """One generated video.

    Args:
        folder: `results/{study}/generate/{row}/seed{t}`.
        entry: its line of the manifest there.
        place: of its prompt in the prompt sheet, from 0.
    """

    folder: Path
    entry: dict
    place: int

    @property
    def preview(self) -> Path:
        """The mp4 for people."""
        return self.folder / "videos" / f"{self.entry['id']}.mp4"

    @property
    def lossless(self) -> Path:
        return self.folder / self.entry["file"]


def first_clips(folder: Path) -> list[Clip]:
    """Videos of a row's first training seed, in the order of the prompt sheet.

    Args:
        folder: `results/{study}/generate/{row}`.

    Raises:
        UserError: where nothing has been generated.
    """
    path = min(folder.glob("seed*/manifest.jsonl"), default=None)
    if path is None:
        raise UserError(f"{folder}: holds no seed*/manifest.jsonl; run the generate step")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(entry["prompt_id"] for entry in entries))}
    return [Clip(path.parent, entry, places[entry["prompt_id"]]) for entry in entries]


def on_page(tables: TableSet, folder: Path) -> list[Clip]:
    """Those of `report.videos`, which the page plays."""
    choice = tables.study["videos"]
    return [c for c in first_clips(folder) if c.place < choice["prompts"] and c.entry["seed"] < choice["seeds"]]


def on_contact_sheet(tables: TableSet, folder: Path) -> list[Clip]:
    """Those of `report.contact`: one a prompt, of the first sampling seed."""
    prompts = tables.study["contact"]["prompts"]
    return [c for c in first_clips(folder) if c.place < prompts and c.entry["seed"] == 0]

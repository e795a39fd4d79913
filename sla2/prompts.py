"""The prompt sheet: prompt_id, text, and the scene attributes that the text promises. Standard library only."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sla2.errors import UserError

COLUMNS = ["prompt_id", "text", "attributes"]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        prompt_id: name of the prompt in file names and records.
        text: what the model is asked for.
        attributes: what a video must then show, such as `{"color": "red", "direction": "right"}`; empty when not known.
    """

    prompt_id: str
    text: str
    attributes: dict


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read and check a tab-separated sheet.

    Raises:
        UserError: naming file, line, value and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such prompt sheet; set `prompts` to a tab-separated file")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or rows[0] != COLUMNS:
        raise UserError(f"{path}:1: columns are {rows[0] if rows else []}, expected {COLUMNS}, separated by tabs")
    prompts: dict[str, Prompt] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        prompt = _parse(row, f"{path}:{line}")
        if prompt.prompt_id in prompts:
            raise UserError(f"{path}:{line}: prompt_id '{prompt.prompt_id}' stands twice; rename one")
        prompts[prompt.prompt_id] = prompt
    if not prompts:
        raise UserError(f"{path}: holds no prompt; add a row")
    return list(prompts.values())


def _parse(row: list[str], where: str) -> Prompt:
    if len(row) not in (2, 3):
        raise UserError(f"{where}: {len(row)} cells, expected {len(COLUMNS)}, separated by tabs")
    prompt_id, text, attributes = (*row, "")[:3]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", prompt_id):
        raise UserError(
            f"{where}: prompt_id '{prompt_id}' becomes a file name; use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    if not text.strip():
        raise UserError(f"{where}: prompt '{prompt_id}' has no text; write one")
    try:
        values = json.loads(attributes or "{}")
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f'{where}: attributes \'{attributes}\' are not a JSON object; write such as {{"color": "red"}} or nothing'
        )
    return Prompt(prompt_id, text, values)

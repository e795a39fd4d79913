"""Step report: one page with tables, figures and playing videos, which opens from disk without a network.

    python -m sla2_eval.report --tables results/S/tables --figures results/S/figures --videos results/S/generate --output results/S/report

Writes index.html with figures/, videos/ and tables/ beside it, all by relative paths, so that the folder can be moved or zipped.
"""

import argparse
import shutil
import statistics
from pathlib import Path

from sla2.errors import UserError, run_main
from sla2.files import read_json, write_folder
from sla2_eval import paper
from sla2_eval.captions import CAPTIONS
from sla2_eval.cards import add_measured, read_cards
from sla2_eval.cards import page as cards_page
from sla2_eval.efficiency import SPEEDS, efficiency, timed_on
from sla2_eval.floors import KERNEL, SEEDS, floor_of, kernel_floor, kernel_row
from sla2_eval.palette import style
from sla2_eval.shown import on_page
from sla2_eval.table_set import SUMMARIES, TableSet

PAPER_MARKS = {paper.REPRODUCED: "✓", paper.DIFFERS: "≠", paper.CANNOT: "–"}
CLAIM_MARKS = {
    "reproduced": "✓",
    "reversed": "≠",
    "no difference": "=",
    "identical": "≡",
    "not resolved": "○",
    "cannot": "–",
}
MARKS = {"resolved": "●", "equivalent": "◐", "identical": "≡", "reference": "ref", "": ""}
MOVES = {
    SEEDS: "how far other seeds alone move the mean, from the reference's spread",
    KERNEL: "how far another kernel alone moves the mean, on the same prompts and noise",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, required=True, help="tables folder of a study")
    parser.add_argument("--figures", type=Path, required=True, help="folder with the .svg files")
    parser.add_argument("--videos", type=Path, required=True, help="results/S/generate")
    parser.add_argument("--reference", type=Path, nargs="*", default=[], help="summary.csv files with measured speeds")
    parser.add_argument("--output", type=Path, required=True, help="folder; replaced")
    args = parser.parse_args()
    tables = TableSet(args.tables)
    cells = paper.compare(paper.read_numbers(), paper.read_measured(args.reference), official(tables))
    write_folder(args.output, lambda folder: write_page(tables, args.figures, args.videos, cells, folder))


def official(tables: TableSet) -> dict:
    """What a study measured of the metrics that the paper reports, for `sla2_eval.paper`."""
    rows = [row for row in tables.rows("quality") if row["metric"].startswith(paper.OF_PAPER)]
    values = {
        (row["variant"], row["metric"]): (row["mean"], row["ci_low"], row["ci_high"])
        for row in rows
        if row["mean"] is not None
    }
    return {"name": tables.study["study"], "values": values}


def write_page(tables: TableSet, figures: Path, videos: Path, cells: list[paper.Cell], folder: Path) -> None:
    """Fill `folder` with the page and everything that it shows."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    for name in CAPTIONS:
        copy(figures / f"{name}.svg", folder / "figures")
    for path in sorted(tables.folder.glob("*.csv")):
        copy(path, folder / "tables")
    paper.write_cells(folder / "tables/paper.csv", cells)
    environment = Environment(
        loader=PackageLoader("sla2_eval", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # variants keep the order of the sheet
    page = environment.get_template("page.html").render(
        study=tables.study,
        metrics=tables.study["headline"],
        directions={metric: tables.direction(metric) for metric in tables.study["headline"]},
        rows=table_rows(tables),
        floors=floor_rows(tables),
        efficiency=efficiency(tables),
        speeds=SPEEDS,
        timed_on=timed_on(tables),
        verdicts=verdicts(tables),
        limits=limits(tables),
        captions=CAPTIONS,
        csv_files=sorted(path.name for path in (folder / "tables").glob("*.csv")),
        claims=claims_by_sentence(tables),
        claim_marks=CLAIM_MARKS,
        paper=paper_tables(cells),
        paper_marks=PAPER_MARKS,
        players=copy_videos(tables, videos, folder / "videos"),
        provenance=read_json(tables.folder / "provenance.json"),
        style=style,
        number=number,
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    cards = read_cards()
    add_measured(cards, tables.rows("validity"), limits(tables)["absent"])
    (folder / "cards.html").write_text(cards_page(cards), encoding="utf-8")


def claims_by_sentence(tables: TableSet) -> dict[str, list[dict]]:
    """Rows of claims.csv by claim, each with `word`, its verdict without the reason, and the effect as a number or None."""
    found: dict[str, list[dict]] = {}
    for row in tables.rows("claims"):
        word = row["verdict"].split(":")[0].split(" at n=")[0]
        effect = float(row["effect"]) if row["effect"] else None  # in summaries the column of that name is a word
        found.setdefault(row["claim"], []).append({**row, "word": word, "effect": effect})
    return found


def paper_tables(cells: list[paper.Cell]) -> dict[tuple, dict]:
    """Cells by table and model, then by method and sparsity, then by quantity."""
    found: dict[tuple, dict] = {}
    for cell in cells:
        one = cell.number
        rows = found.setdefault((one.table, one.model), {})
        rows.setdefault((one.method, one.sparsity), {})[one.quantity] = cell
    return found


def copy(path: Path, folder: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing; run the step that writes it")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)


def copy_videos(tables: TableSet, videos: Path, folder: Path) -> dict:
    """Copy the study's choice of videos; returns what the players need: variants, prompts, seeds, fps and a path for each."""
    prompts: dict[str, str] = {}
    seeds: list[int] = []
    files: dict[str, str] = {}
    fps = 1.0
    for variant in tables.variants:
        for clip in on_page(tables, videos / variant):
            prompt, seed, fps = (clip.entry[name] for name in ("prompt_id", "seed", "fps"))
            prompts[prompt] = clip.entry["text"]
            seeds += [seed] if seed not in seeds else []
            copy(clip.preview, folder / variant)
            files[f"{variant}/{prompt}/{seed}"] = f"videos/{variant}/{clip.preview.name}"
    looks = {name: {"label": style(name).label, "color": style(name).color} for name in tables.variants}
    return {
        "reference": tables.study["reference"],
        "study": tables.study["study"],
        "variants": looks,
        "prompts": prompts,
        "seeds": seeds,
        "fps": fps,
        "files": files,
    }


def table_rows(tables: TableSet) -> list[dict]:
    """Cells of the main table: per variant and headline metric, the row of the summary with its mark, or why there is none."""
    lines = []
    for name, sheet in tables.variants.items():
        cells = []
        for metric in tables.study["headline"]:
            row = tables.metric(metric).get(name)
            if row is None:
                cells.append({"row": None, "reason": tables.missing(metric)[name]})
            else:
                cells.append({"row": row, "mark": MARKS.get(row["verdict"], "○")})
        lines.append({"variant": name, "sheet": sheet, "cells": cells})
    return lines


def floor_rows(tables: TableSet) -> list[dict]:
    """Noise floors below the main table: per kind its headline cells, each with `text` or None, and `note`, how or why not."""
    lines = []
    for what in (SEEDS, KERNEL):
        cells = [floor_cell(tables, metric, what) for metric in tables.study["headline"]]
        lines.append({"what": what, "cells": cells})
    return lines


def floor_cell(tables: TableSet, metric: str, what: str) -> dict:
    """What dense attention, run once more in this way, shows in a metric, or why it is not known."""
    floor = kernel_floor(tables, metric) if what == KERNEL else floor_of(tables, metric)
    if floor is None or floor.what != what:
        reason = "the reference has no value, no second seed, or no spread between seeds"
        if what == KERNEL:
            reason = "no videos are generated with a second dense kernel; its error is measured on attention"
            reason = tables.missing(metric).get(kernel_row(tables), reason)
        return {"text": None, "note": reason}
    if floor.measured:
        ends = None if floor.low is None else f"{number(floor.low, 3)} … {number(floor.high, 3)}"
        return {"text": number(floor.mean), "ends": ends, "note": "its distance to the dense model, measured"}
    return {"text": f"± {number((floor.high - floor.low) / 2, 3)}", "ends": None, "note": MOVES[what]}


def verdicts(tables: TableSet) -> dict:
    """Headline comparisons by verdict: those resolved as rows, the others as counts."""
    compared = [
        row
        for metric in tables.study["headline"]
        for row in tables.metric(metric).values()
        if row["verdict"] not in ("", "reference")
    ]
    resolved = [row for row in compared if row["verdict"] == "resolved"]
    count = {word: sum(row["verdict"] == word for row in compared) for word in ("equivalent", "identical")}
    return {
        "count": len(compared),
        "resolved": resolved,
        **count,
        "unresolved": len(compared) - len(resolved) - sum(count.values()),
    }


def limits(tables: TableSet) -> dict:
    """Facts behind the paragraphs on what the study can and cannot tell."""
    rows = [row for name in SUMMARIES for row in tables.rows(name) if row["layer"] is None]
    headline = [row for row in rows if row["metric"] in tables.study["headline"]]
    widths = {}
    for metric in tables.study["headline"]:
        found = [
            (row["difference_high"] - row["difference_low"]) / 2
            for row in tables.metric(metric).values()
            if row["difference_low"] is not None
        ]
        if found:
            widths[metric] = statistics.median(found)
    absent: dict[str, str] = {}
    undefined: dict[str, int] = {}
    for row in rows:
        if row["n_undefined"] and row["mean"] is not None:
            undefined[row["metric"]] = undefined.get(row["metric"], 0) + int(row["n_undefined"])
        if row["mean"] is None and not tables.metric(row["metric"]):
            absent[row["metric"]] = row["reason"]
    return {
        "prompts": int(max((row["n_prompts"] for row in headline), default=0)),
        "seeds": int(max((row["n_seeds"] for row in headline), default=0)),
        "widths": widths,
        "units": {row["metric"]: "" if row["unit"] == "1" else row["unit"] for row in headline},
        "trained_more": spreads(headline),
        "absent": absent,
        "undefined": undefined,
        "flagged": [row for row in rows if row["metric"].startswith("guard.") and row["mean"]],
    }


def spreads(headline: list[dict]) -> dict[str, list[dict]]:
    """Rows of headline metrics with several training runs, by variant."""
    found: dict[str, list[dict]] = {}
    for row in headline:
        if row["sd_train_seeds"] is not None and row["n_prompts"]:
            found.setdefault(row["variant"], []).append(row)
    return found


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits, for people."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".") if value else "0"


if __name__ == "__main__":
    run_main(main)

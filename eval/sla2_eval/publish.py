"""A finished study without weights and latents: what others need to check its numbers, draw its figures again and see a few videos.

    sla2 publish results/mini --output results/reference/mini-h200
    make figures FROM=results/reference/mini-h200

Copies records, tables, figures, logs and what stands beside them, of the rows that are in the tables; of the first training seed's
videos those that the page shows as mp4, and those of the contact sheet without loss. Adapters stay: without their weights nobody can use them.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

from sla2.errors import UserError, run_main
from sla2.files import write_folder
from sla2_eval.shown import on_contact_sheet, on_page
from sla2_eval.table_set import TableSet

# Paths in a study's folder, {row} being one of the rows in its tables. What stands beside a file as .provenance.json goes with it.
RECORDS = (
    "data/data.json",
    "base_model/base_model.json",
    "base_model/trained.json.provenance.json",
    "base_model/log.csv",
    "stage1/*/adapter.json",
    "stage1/*/adapter.safetensors.provenance.json",
    "stage1/*/log.csv",
    "stage1/*/report.csv",
    "stage1/*/timing.csv",
    "stage2/{row}/seed*/adapter.json",
    "stage2/{row}/seed*/adapter.safetensors.provenance.json",
    "stage2/{row}/seed*/log.csv",
    "stage2/{row}/seed*/timing.csv",
    "generate/{row}/seed*/manifest.jsonl",
    "score/{row}.csv",
    "score/validity.csv",
    "score/judge/gates.json",
    "latency/latency.csv",
    "tables/*",
    "figures/*",
)
MIB = 2**20
LARGEST_FILE, LARGEST_FOLDER = 5 * MIB, 30 * MIB  # what a repository carries without harm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="results/<study>, with tables")
    parser.add_argument("--output", type=Path, required=True, help="folder; replaced")
    args = parser.parse_args()
    chosen = [*records(args.study), *videos(args.study)]
    check_sizes(chosen)

    def fill(folder: Path) -> None:
        for path in chosen:
            target = folder / path.relative_to(args.study)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    write_folder(args.output, fill)


def records(study: Path) -> list[Path]:
    """Files of `RECORDS` that a study has, with their provenance.

    Raises:
        UserError: where the study has no tables.
    """
    rows = TableSet(study / "tables").variants
    patterns = {pattern.format(row=row) for pattern in RECORDS for row in rows}
    found = {path for pattern in patterns for path in study.glob(pattern)}
    beside = {path.with_name(f"{path.name}.provenance.json") for path in found}
    return sorted(found | {path for path in beside if path.is_file()})


def videos(study: Path) -> Iterator[Path]:
    """Videos that are shown of every row that is in the tables: on the page as mp4, on the contact sheet without loss."""
    tables = TableSet(study / "tables")
    for variant in tables.variants:
        folder = study / "generate" / variant
        yield from (clip.preview for clip in on_page(tables, folder))
        yield from (clip.lossless for clip in on_contact_sheet(tables, folder))


def check_sizes(paths: list[Path]) -> None:
    """Refuse what is missing, and more than a repository should carry."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: missing; run the step that makes it")
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(
                f"{path}: {path.stat().st_size / MIB:.1f} MiB, a published file has {LARGEST_FILE // MIB} at most"
            )
    total = sum(path.stat().st_size for path in paths)
    if total > LARGEST_FOLDER:
        raise UserError(
            f"{total / MIB:.1f} MiB to publish, {LARGEST_FOLDER // MIB} at most; lower report.videos or report.contact and make the tables again"
        )


if __name__ == "__main__":
    run_main(main)

"""A finished study without weights and latents: what others need to check its numbers, draw its figures again and see a few videos.

    sla2 publish results/mini --output results/reference/mini-h200
    make figures FROM=results/reference/mini-h200

Copies records, tables, figures, logs and what stands beside them, of the rows that are in the tables; of the first training seed's
videos those that the page shows as mp4, and those of the contact sheet without loss. Scores are packed, as they are one line a video and metric
(`score/<row>.csv.gz`, which the tables step reads too). Adapters stay: without their weights nobody can use them.
"""

import argparse
import gzip
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
MB = 10**6
LARGEST_FILE, LARGEST_FOLDER = 5 * MB, 30 * MB  # what a repository carries without harm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="results/<study>, with tables")
    parser.add_argument("--output", type=Path, required=True, help="folder; replaced")
    args = parser.parse_args()
    chosen = [*records(args.study), *videos(args.study)]
    check_present(chosen)
    scores = {args.study / f"score/{row}.csv" for row in TableSet(args.study / "tables").variants}

    def fill(folder: Path) -> None:
        for path in chosen:
            target = folder / path.relative_to(args.study)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in scores:  # without time and name in it, so that equal scores are equal files
                target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            else:
                shutil.copyfile(path, target)
        check_sizes(folder)

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


def check_present(paths: list[Path]) -> None:
    """Refuse to publish a study that lacks something."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: missing; run the step that makes it")


def check_sizes(folder: Path) -> None:
    """Refuse more than a repository should carry."""
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size > LARGEST_FILE:
            raise UserError(f"{path}: {size / MB:.1f} MB, a published file has {LARGEST_FILE // MB} at most")
    if sum(sizes.values()) > LARGEST_FOLDER:
        raise UserError(
            f"{sum(sizes.values()) / MB:.1f} MB to publish, {LARGEST_FOLDER // MB} at most; lower report.videos or report.contact and make the tables again"
        )


if __name__ == "__main__":
    run_main(main)

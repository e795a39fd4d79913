"""Whether a study came out as another run of it did: losses, trained weights, videos and scores, row by row.

    sla2 compare results/mini results/reference/mini-h200 --output compared.csv

Equal is equal to the last digit that was written; of weights and of lossless videos it is their SHA-256, which manifests and what stands beside
them hold. Both folders may be a study's own or one that `sla2 publish` made, so who runs a published study again sees what of it came out the
same, and by how much the rest differs.
"""

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sla2.errors import UserError, run_main
from sla2.files import read_json
from sla2.progress import say
from sla2.record import read_records
from sla2_eval.table_set import TableSet
from sla2_eval.tables import read_log, write_table


@dataclass(frozen=True)
class Agreement:
    """What two runs of one row say of one thing.

    Attributes:
        what: `stage1`, `stage2` (values of the training logs), `weights`, `videos` or `scores`.
        row: row of the variants sheet; of stage 1, its folder.
        compared: what both have.
        equal: of these, as many are equal.
        missing: what one of them lacks.
        largest_difference: of numbers, absolute; None where no two differ, or what differs is no number.
        where: the first that differs, or of numbers the one that differs most.
    """

    what: str
    row: str
    compared: int
    equal: int
    missing: int
    largest_difference: float | None
    where: str


Entries = dict[str, float | str]


def agreement(what: str, row: str, one: Entries, other: Entries) -> Agreement:
    """Compare what two runs wrote under the same keys."""
    shared = [key for key in other if key in one]
    differing = [key for key in shared if one[key] != other[key]]
    gaps = {
        key: abs(one[key] - other[key])
        for key in differing
        if isinstance(one[key], float) and isinstance(other[key], float)
    }
    where = max(gaps, key=gaps.__getitem__) if gaps else next(iter(differing), "")
    missing = len(one.keys() ^ other.keys())
    return Agreement(what, row, len(shared), len(shared) - len(differing), missing, gaps.get(where), where)


def compare(one: Path, other: Path) -> list[Agreement]:
    """Compare two runs of a study, over the rows of the second one's tables.

    Raises:
        UserError: where the second has no tables, the first is no folder, or they share nothing.
    """
    rows = list(TableSet(other / "tables").variants)
    if not one.is_dir():
        raise UserError(f"{one}: no such folder; give the folder of a study, results/<study>")
    found = [
        agreement("stage1", folder.name, logs(one, f"stage1/{folder.name}"), logs(other, f"stage1/{folder.name}"))
        for folder in sorted(other.glob("stage1/*/"))
    ]
    for what, entries in (("stage2", trained), ("weights", weights), ("videos", videos), ("scores", scores)):
        found += [agreement(what, row, entries(one, row), entries(other, row)) for row in rows]
    found = [line for line in found if line.compared or line.missing]
    if not any(line.compared for line in found):
        raise UserError(f"{one}, {other}: have no row in common that was trained, generated or scored in both")
    return found


def logs(study: Path, pattern: str) -> Entries:
    """Values of the training logs `log.csv` in folders that fit a pattern."""
    return {
        " ".join([path.parent.name, *(line[name] for name in ("step", "phase", "split", "metric"))]): float(
            line["value"]
        )
        for path in sorted(study.glob(f"{pattern}/log.csv"))
        for line in read_log(path, study.name)
    }


def trained(study: Path, row: str) -> Entries:
    """Values of stage 2's logs, of every training seed."""
    return logs(study, f"stage2/{row}/seed*")


def weights(study: Path, row: str) -> Entries:
    """SHA-256 of the weights that videos were made with, of every training seed."""
    paths = sorted(study.glob(f"generate/{row}/seed*/manifest.jsonl.provenance.json"))
    return {path.parent.name: read_json(path)["weights_sha256"] for path in paths}


def videos(study: Path, row: str) -> Entries:
    """SHA-256 of every lossless video, of every training seed."""
    entries: Entries = {}
    for path in sorted(study.glob(f"generate/{row}/seed*/manifest.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            video = json.loads(line)
            entries[f"{path.parent.name} {video['id']}"] = video["sha256"]
    return entries


def scores(study: Path, row: str) -> Entries:
    """Scores of a row, packed or not; where there is no value, the reason."""
    entries: Entries = {}
    for path in filter(Path.is_file, (study / f"score/{row}.csv", study / f"score/{row}.csv.gz")):
        for record in read_records(path):
            place = (record.metric, record.train_seed, record.prompt_id, record.seed, record.layer)
            key = " ".join("-" if part is None else str(part) for part in place)
            entries[key] = record.reason if record.value is None else record.value
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("other", type=Path, help="folder of another run of it, with tables")
    parser.add_argument("--output", type=Path, help="CSV of every row")
    args = parser.parse_args()
    lines = compare(args.study, args.other)
    if args.output:
        write_table(args.output, [field.name for field in fields(Agreement)], [asdict(line) for line in lines])
    for line in lines:
        if line.equal < line.compared or line.missing:
            gap = "" if line.largest_difference is None else f", by {line.largest_difference:.3g} at most"
            differ = f", first or most {line.where}{gap}" if line.where else ""
            missing = f"; {line.missing} in one of them only" if line.missing else ""
            say(f"{line.what} {line.row}: {line.equal} of {line.compared} equal{differ}{missing}")
    for what in dict.fromkeys(line.what for line in lines):
        of_kind = [line for line in lines if line.what == what]
        equal, compared, missing = (sum(getattr(line, n) for line in of_kind) for n in ("equal", "compared", "missing"))
        say(f"{what}: {equal} of {compared} equal, {missing} in one of them only")


if __name__ == "__main__":
    run_main(main)

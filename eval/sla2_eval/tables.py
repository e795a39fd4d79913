"""Step tables: records and training logs become the tables that figures, notebooks and the page read.

    python -m sla2_eval.tables --settings JSON --base results/S/base_model/base_model.json --scores results/S/score/*.csv \
        --latency results/S/latency/latency.csv --validity results/S/score/validity.csv --training results/S/base_model/log.csv results/S/stage*/... --output results/S/tables

    quality.csv fidelity.csv attention.csv efficiency.csv   columns of `sla2_eval.summary`; what `latency` measured is in efficiency
    ablation.csv    one row per variant: the row of the sheet, then of each headline metric its mean, `:low` and `:high` ends of
                    the interval, `:n` prompts, `:verdict` against the reference; `notes` says why a cell is empty
    claims.csv      the paper's claims as comparisons of rows, `sla2_eval.claims`
    training.csv    study, stage, run, train_seed, phase, split, metric, step, value; run: a variant, or a group of stage 1
    routers.csv     study, run, then the columns of `sla2.stage1_report`: routers and alpha beside their controls, by layer and noise level
    variants.csv    the sheet of this study
    validity.csv    what each metric sees of known damage, columns of `sla2_eval.response`
    study.json      what the figures need of the settings, and facts of the base model
    provenance.json what stands beside the records
"""

import argparse
import csv
import io
import json
from pathlib import Path

from sla2.errors import UserError, run_main
from sla2.files import read_json, write_atomic, write_json
from sla2.record import read_records
from sla2.stage1_report import COLUMNS as REPORT_COLUMNS
from sla2_eval.claims import COLUMNS as CLAIM_COLUMNS
from sla2_eval.claims import judge
from sla2_eval.response import COLUMNS as VALIDITY_COLUMNS
from sla2_eval.summary import COLUMNS, summarise
from sla2_eval.table_set import SUMMARIES

TABLE_OF = {  # by name or prefix; others are quality
    "floor.attention_rel_l1": "attention",
    "fidelity": "fidelity",
    "floor": "fidelity",
    "attention": "attention",
    "sparsity": "attention",
}
ROUTER_COLUMNS = ("study", "run", *REPORT_COLUMNS)
TRAINING_COLUMNS = ("study", "stage", "run", "train_seed", "phase", "split", "metric", "step", "value")
SHEET_COLUMNS = ("variant", "attention", "router", "mixing", "quantization", "sparsity", "finetune")
STAGES = ("base_model", "stage1", "stage2")
FACTS = (
    "weights_sha256",
    "parameters",
    "layers",
    "heads",
    "head_dim",
    "tokens",
    "grid",
    "frames",
    "height",
    "width",
    "fps",
    "text_length",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=json.loads, required=True, help="config section report, and variants")
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="records of step score")
    parser.add_argument("--latency", type=Path, required=True, help="records of step latency")
    parser.add_argument("--validity", type=Path, required=True, help="CSV of step validity")
    parser.add_argument(
        "--training", type=Path, nargs="*", default=[], help="log.csv files of base_model, stage1, stage2"
    )
    parser.add_argument("--routers", type=Path, nargs="*", default=[], help="report.csv files of stage1")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    settings = args.settings
    rows = {name: [] for name in SUMMARIES}
    scores = [record for path in args.scores for record in read_records(path)]
    for row in summarise(scores, settings):
        table = TABLE_OF.get(row["metric"]) or TABLE_OF.get(row["metric"].split(".")[0], "quality")
        rows[table].append(row)
    rows["efficiency"] = summarise(read_records(args.latency), settings)
    check_metrics({row["metric"] for table in rows.values() for row in table}, settings)
    for name, table in rows.items():
        write_table(args.output / f"{name}.csv", COLUMNS, table)
    write_table(args.output / "ablation.csv", *ablation([row for table in rows.values() for row in table], settings))
    write_table(args.output / "claims.csv", CLAIM_COLUMNS, judge(scores, settings))
    training = [row for path in args.training for row in read_log(path, settings["study"])]
    write_table(args.output / "training.csv", TRAINING_COLUMNS, training)
    routers = [row for path in args.routers for row in read_report(path, settings["study"])]
    write_table(args.output / "routers.csv", ROUTER_COLUMNS, routers)
    sheet = [{**row, "finetune": "yes" if row["finetune"] else "no"} for row in settings["variants"]]
    write_table(args.output / "variants.csv", SHEET_COLUMNS, sheet)
    write_atomic(args.output / "validity.csv", validity(args.validity))
    base = read_json(args.base)
    shown = {name: value for name, value in settings.items() if name not in ("variants", "threads", "device")}
    write_json(args.output / "study.json", {**shown, "facts": {name: base.get(name) for name in FACTS}})
    write_json(args.output / "provenance.json", provenance([*args.scores, args.latency, args.validity]))


def check_metrics(known: set[str], settings: dict) -> None:
    """Refuse a name in `headline` or `margins` that nothing measured."""
    for key in ("headline", "margins"):
        for metric in settings[key]:
            if metric not in known:
                raise UserError(f"report.{key}: '{metric}' is in no record; choose from {', '.join(sorted(known))}")


def ablation(rows: list[dict], settings: dict) -> tuple[list[str], list[dict]]:
    """Columns and rows of the ablation table, the paper's Table 2 in the headline metrics of the study."""
    parts = {"": "mean", ":low": "ci_low", ":high": "ci_high", ":n": "n_prompts", ":verdict": "verdict"}
    columns = [*SHEET_COLUMNS, *(metric + part for metric in settings["headline"] for part in parts), "notes"]
    found = {}
    for row in rows:
        if row["layer"] is None:
            found.setdefault((row["variant"], row["metric"]), row)
    table = []
    for variant in settings["variants"]:
        line = {**variant, "finetune": "yes" if variant["finetune"] else "no"}
        notes = []
        for metric in settings["headline"]:
            row = found.get((variant["variant"], metric), {"reason": "not measured"})
            line |= {metric + part: row.get(column, "") for part, column in parts.items()}
            if row["reason"]:
                notes.append(f"{metric}: {row['reason']}")
        table.append({**line, "notes": " | ".join(notes)})
    return columns, table


def read_log(path: Path, study: str) -> list[dict]:
    """Rows of a training log; stage, run and training seed come from its path, `.../stage2/{variant}/seed{t}/log.csv`."""
    parts = path.resolve().parts
    stage = next((word for word in reversed(parts) if word in STAGES), None)
    if stage is None:
        raise UserError(f"{path}: not below a folder {', '.join(STAGES)}, which names the stage of a log")
    after = parts[len(parts) - parts[::-1].index(stage) : -1]
    place = {
        "study": study,
        "stage": stage,
        "run": after[0] if after else "base",
        "train_seed": after[1].removeprefix("seed") if len(after) > 1 else "",
    }
    if not path.is_file():
        raise UserError(f"{path}: missing; run the step {stage}")
    with path.open(newline="", encoding="utf-8") as file:
        return [{**place, **row} for row in csv.DictReader(file)]


def read_report(path: Path, study: str) -> list[dict]:
    """Rows of a stage-1 report; the run's name is that of its folder."""
    if not path.is_file():
        raise UserError(f"{path}: missing; run the step stage1")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != REPORT_COLUMNS:
            raise UserError(f"{path}: has other columns than {', '.join(REPORT_COLUMNS)}; run the step stage1 again")
        return [{"study": study, "run": path.parent.name, **row} for row in reader]


def validity(path: Path) -> str:
    """Text of the table of step validity, as it is.

    Raises:
        UserError: when it is missing or of another form.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; run the step validity")
    text = path.read_text(encoding="utf-8")
    if not text.startswith(",".join(VALIDITY_COLUMNS) + "\n"):
        raise UserError(f"{path}: has other columns than {', '.join(VALIDITY_COLUMNS)}; run the step validity again")
    return text


def provenance(paths: list[Path]) -> dict:
    """What stands beside the records, by `<folder>/<file>`, without command and settings; None where nothing does."""
    found = {}
    for path in paths:
        beside = path.with_name(f"{path.name}.provenance.json")
        facts = read_json(beside) if beside.is_file() else None
        # A command names folders of the machine that ran it; the settings are in the hash.
        found[f"{path.parent.name}/{path.name}"] = facts and {
            name: value for name, value in facts.items() if name not in ("command", "settings")
        }
    return found


def write_table(path: Path, columns: list[str] | tuple[str, ...], rows: list[dict]) -> None:
    """CSV with these columns; numbers with nine digits, None as empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {name: "" if value is None else value for name, value in row.items()}
        writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in values.items()})
    write_atomic(path, text.getvalue())


if __name__ == "__main__":
    run_main(main)

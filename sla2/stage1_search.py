"""Which stage 1 finds the best router: estimators, temperatures, rates and routers beside each other, on one base model.

Every run is an ordinary stage 1 (`sla2.stage1`) with some settings of the study's changed; a run that is finished is not made again.
`search.csv` holds each run's held-out hard error by step. `search.md` is a table of these and, on clips that did not choose the
state, of the report's: with the trained alpha, and how much of the way from the heuristic to the block-mass oracle that is, both
with their least-squares alpha.

    python -m sla2.stage1_search --config config/tiny.yaml --base results/tiny/base_model/base_model.json --output results/tiny/stage1_search
"""

import argparse
import csv
import io
from pathlib import Path
from statistics import fmean

from sla2.config import load_study
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.files import write_atomic
from sla2.stage1 import fit
from sla2.variant import Variant
from sla2.wan import BaseModel

COLUMNS = (
    "run",
    "router",
    "sparsity",
    "estimator",
    "router_logits",
    "tau",
    "tau_end",
    "lr_router",
    "step",
    "hard_error",
)
PAPER = {"estimator": "soft", "router_logits": "raw"}
RUNS = {
    "mean_pool": {"router": "mean_pool"},
    "random": {"router": "random"},
    **{f"soft raw lr {lr:g}": PAPER | {"lr_router": lr} for lr in (1e-3, 1e-2)},
    **{f"soft tau {tau:g} lr {lr:g}": {"estimator": "soft", "tau": tau, "lr_router": lr} for tau in (0.1, 1.0) for lr in (1e-3, 1e-2)},
    "soft tau 1 to 0.02 lr 0.01": {"estimator": "soft", "tau": 1.0, "tau_end": 0.02, "lr_router": 1e-2},
    **{f"mass lr {lr:g}": {"estimator": "mass", "lr_router": lr} for lr in (1e-3, 1e-2)},
    **{f"straight_through tau {tau:g} lr {lr:g}": {"tau": tau, "lr_router": lr} for tau in (0.1, 0.3) for lr in (1e-3, 3e-3, 1e-2)},
    "straight_through tau 1 lr 0.01": {"tau": 1.0, "lr_router": 1e-2},
    "offset mass lr 0.01": {"router": "offset", "estimator": "mass", "lr_router": 1e-2},
    **{f"offset straight_through tau 0.3 lr {lr:g}": {"router": "offset", "tau": 0.3, "lr_router": lr} for lr in (1e-3, 3e-3, 1e-2)},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the study")
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    study, base = load_study(args.config), BaseModel.read(args.base)
    attention = study.config["attention"]
    device = claim_device(study.section("stage1"))
    curves, table = [], []
    for name, changes in RUNS.items():
        changes = {"estimator": "straight_through", "router": "learned", **changes}
        router = changes.pop("router")
        row = Variant(f"{router}-alpha-{args.sparsity * 100:g}", "sla2", router, "alpha", "none", args.sparsity, False)
        extra = {"steps": args.steps, "validate_every": max(1, args.steps // 5), "heldout_clips": 4, "patience": 0}
        settings = study.section("stage1", variant=row.row(), attention=attention) | extra | changes
        folder = args.output / f"{args.sparsity * 100:g}" / name.replace(" ", "_")
        if not (folder / "adapter.json").is_file():
            fit(settings, base, folder, device)
        errors = [(int(r["step"]), float(r["value"])) for r in _rows(folder / "log.csv") if r["metric"] == "hard_error"]
        shown = [settings[column] for column in COLUMNS[3:8]]
        curves += [(name, router, args.sparsity, *shown, step, error) for step, error in errors]
        table.append((name, errors, report_errors(folder / "report.csv")))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *curves])
    write_atomic(args.output / f"{args.sparsity * 100:g}/search.csv", text.getvalue())
    write_atomic(args.output / f"{args.sparsity * 100:g}/search.md", markdown(table))


def markdown(table: list[tuple[str, list[tuple[int, float]], dict[tuple[str, str], float]]]) -> str:
    """Runs, their (step, hard error), and the report's hard error by router and alpha, as a table."""
    steps = [f"step {step}" for step, _ in table[0][1]]
    lines = [f"| {' | '.join(['run', *steps, 'fresh clips', 'gap closed'])} |", "|---" * (len(steps) + 3) + "|"]
    for name, errors, found in table:
        (trained,) = (value for (_, alpha), value in found.items() if alpha == "trained")
        heuristic, oracle = found["mean_pool", "fitted"], found["oracle", "fitted"]
        closed = f"{(heuristic - trained) / (heuristic - oracle):.0%}" if name not in ("mean_pool", "random") else ""
        shown = [name, *(f"{error:.4f}" for _, error in errors), f"{trained:.4f}", closed]
        lines.append(f"| {' | '.join(shown)} |")
    found = table[0][2]
    controls = ", ".join(f"{word} {found[word, 'fitted']:.4f}" for word in ("mean_pool", "random", "oracle"))
    return "\n".join([*lines, "", f"On the fresh clips, with fitted alpha: {controls}."]) + "\n"


def report_errors(path: Path) -> dict[tuple[str, str], float]:
    """Hard error by router and alpha, mean over layers, noise levels and clips."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in _rows(path):
        if row["metric"] == "hard_error":
            found.setdefault((row["router"], row["alpha"]), []).append(float(row["value"]))
    return {key: fmean(values) for key, values in found.items()}


def _rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run_main(main)

"""Records become rows of a table: one row per variant, metric and, where there are layers, layer.

study, variant, metric, layer      layer empty: the mean over layers, or a metric that has none
mean, ci_low, ci_high, unit        in the metric's unit; ci_*: interval of the mean (`sla2_eval.stats`)
higher_is_better                   true, false, or empty where neither direction is better
n_prompts, n_seeds, n_train_seeds  prompts, sampling seeds per prompt, training seeds that the mean is of
n_values, n_undefined              measurements in the mean; measurements that gave no number and are not in it
sd_seeds, sd_train_seeds           spread between sampling seeds of a prompt; between means of training seeds
reference                          the row that the difference is taken to
difference, difference_low, difference_high    mean of paired differences, this row minus the reference
p_value, p_holm                    of difference = 0; corrected over the metrics of this row, headline ones and others apart
margin, verdict, effect            `sla2_eval.stats.verdict`; effect: better, worse, higher or lower, where resolved. What is of a layer
                                   or a machine, not of videos, has a difference and no verdict: there are no prompts to pair
backend                            what computed it
status, reason                     of the mean: ok, not_available or undefined (`sla2.record.status_of`); why a value or an interval is missing
"""

from dataclasses import dataclass, replace

import numpy as np

from sla2.errors import UserError
from sla2.record import NOT_AVAILABLE, OK, Record, status_of
from sla2_eval.stats import Estimate, difference, estimate, holm, verdict

COLUMNS = (
    "study", "variant", "metric", "layer",
    "mean", "ci_low", "ci_high", "unit", "higher_is_better",
    "n_prompts", "n_seeds", "n_train_seeds", "n_values", "n_undefined", "sd_seeds", "sd_train_seeds",
    "reference", "difference", "difference_low", "difference_high", "p_value", "p_holm", "margin",
    "verdict", "effect", "backend", "status", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Everything that was measured of one metric (and layer) of one variant.

    Args:
        values: by (training seed, prompt, sampling seed); None where a measurement gave no number.
        example: a record, for unit, direction and backend; reasons: why numbers are missing.
    """

    values: dict[tuple, float | None]
    example: Record
    reasons: list[str]


def summarise(records: list[Record], settings: dict) -> list[dict]:
    """Rows with the keys of `COLUMNS`, in the order of the sheet, then of first appearance, then of layers.

    Args:
        records: of any number of variants.
        settings: config section `report` with `seed` and `variants` (rows of the sheet).

    Raises:
        UserError: when a record stands twice, is of a variant that the sheet lacks, or has a training seed that its row cannot have.
    """
    sheet = {row["variant"]: row for row in settings["variants"]}
    cells = cells_of(records, sheet)
    metrics = list(dict.fromkeys(metric for _, metric, _ in cells))
    rows = []
    for variant in sheet:
        found = []
        for metric in metrics:
            layers = sorted({key[2] for key in cells if key[:2] == (variant, metric)}, key=lambda x: (x is not None, x))
            found += [_row(cells, (variant, metric, layer), sheet, settings) for layer in layers]
        for family in (True, False):
            members = [pair for pair in found if (pair[0]["metric"] in settings["headline"]) is family]
            _judge([pair for pair in members if pair[1]], settings["confidence"])
        rows += [row for row, _ in found]
    return rows


def cells_of(records: list[Record], sheet: dict[str, dict]) -> dict[tuple, Cell]:
    """Cells by variant, metric and layer; with layer None the mean over layers where there are any.

    Raises:
        UserError: when a record stands twice, is of a variant that the sheet lacks, or has a training seed that its row cannot have.
    """
    cells: dict[tuple, Cell] = {}
    for record in records:
        if record.variant not in sheet:
            raise UserError(f"records of '{record.variant}': the sheet has no such row; delete them or add the row")
        if record.train_seed is not None and not sheet[record.variant]["finetune"]:
            raise UserError(
                f"records of '{record.variant}' {record.metric}: training seed {record.train_seed}, but the sheet says that this row is "
                "not fine-tuned; run the step that wrote them again"
            )
        cell = cells.setdefault((record.variant, record.metric, record.layer), Cell({}, record, []))
        place = (record.train_seed, record.prompt_id, record.seed)
        if place in cell.values:
            where = f"'{record.variant}' {record.metric}, layer {record.layer}, training seed, prompt, seed {place}"
            raise UserError(f"records of {where} stand twice; delete one of the files that hold them")
        cell.values[place] = record.value
        if record.reason and record.reason not in cell.reasons:
            cell.reasons.append(record.reason)
    for variant, metric in dict.fromkeys(key[:2] for key in cells):
        if (variant, metric, None) not in cells:
            layers = [cell for key, cell in cells.items() if key[:2] == (variant, metric)]
            cells[variant, metric, None] = _over_layers(layers)
    return cells


def _over_layers(layers: list[Cell]) -> Cell:
    """Mean over layers at each place; a place without a number in one layer has none, or the layers would differ."""
    values: dict[tuple, float | None] = {}
    for place in dict.fromkeys(place for cell in layers for place in cell.values):
        known = [cell.values.get(place) for cell in layers]
        values[place] = None if None in known else sum(known) / len(known)
    return Cell(values, layers[0].example, list(dict.fromkeys(reason for cell in layers for reason in cell.reasons)))


def _row(cells: dict[tuple, Cell], key: tuple, sheet: dict[str, dict], settings: dict) -> tuple[dict, Estimate | None]:
    """A row, and its paired difference to the reference, None where there is nothing to compare with."""
    variant, metric, layer = key
    cell, reference = cells[key], cells.get((settings["reference"], metric, layer))
    options = {name: settings[name] for name in ("draws", "confidence", "seed")}
    found = explained(estimate(_array(cell, [cell]), **options), cell)
    undefined = sum(value is None for value in cell.values.values())
    reasons = [found.reason]
    if undefined:
        why = "; ".join(cell.reasons[:3])
        reasons = (
            [why] if found.mean is None else [f"{undefined} of {len(cell.values)} without a value: {why}", *reasons]
        )
    row = dict.fromkeys(COLUMNS, "") | {
        "study": cell.example.study,
        "variant": variant,
        "metric": metric,
        "layer": layer,
        "mean": found.mean,
        "ci_low": found.low,
        "ci_high": found.high,
        "unit": cell.example.unit,
        "higher_is_better": {True: "true", False: "false", None: ""}[cell.example.higher_is_better],
        **{name: getattr(found, name) for name in ("n_prompts", "n_seeds", "n_train_seeds", "n_values")},
        "n_undefined": undefined,
        "sd_seeds": found.sd_seeds,
        "sd_train_seeds": found.sd_train_seeds,
        "backend": cell.example.backend,
        "status": status(found, cell),
        "reason": "; ".join(filter(None, reasons)),
    }
    if variant == settings["reference"]:
        return row | {"verdict": "reference"}, None
    if reference is None or found.mean is None:
        return row, None
    paired = explained(estimate(paired_values(cell, reference, sheet, variant, settings["reference"]), **options), cell)
    row |= {
        "reference": settings["reference"],
        "difference": paired.mean,
        "difference_low": paired.low,
        "difference_high": paired.high,
        "p_value": paired.p_value,
        "margin": settings["margins"].get(metric),
    }
    return row, paired


def status(found: Estimate, cell: Cell) -> str:
    """Of a mean; without one `undefined` only where every measurement was."""
    kinds = {status_of(found.mean, reason) for reason in cell.reasons} or {OK}
    return kinds.pop() if len(kinds) == 1 else NOT_AVAILABLE


def explained(found: Estimate, cell: Cell) -> Estimate:
    """An estimate of a cell's values; one of a layer or a machine, not of videos, says that it has no prompts."""
    if any(prompt is not None for _, prompt, _ in cell.values):
        return found
    return replace(found, n_prompts=0, n_seeds=0, reason=found.reason and "no interval: not measured per prompt")


def paired_values(cell: Cell, reference: Cell, sheet: dict[str, dict], variant: str, other: str) -> np.ndarray:
    """Differences (T, P, S); a row that was never trained is the same for every training seed of the other."""
    arrays = [_array(c, [cell, reference]) for c in (cell, reference)]
    if sheet[variant]["finetune"] and sheet[other]["finetune"]:
        seeds = [list(dict.fromkeys(place[0] for place in c.values)) for c in (cell, reference)]
        common = [seed for seed in seeds[0] if seed in seeds[1]]
        arrays = [a[[order.index(seed) for seed in common]] for a, order in zip(arrays, seeds, strict=True)]
    return difference(*arrays)


def _array(cell: Cell, together: list[Cell]) -> np.ndarray:
    """Values (T, P, S) of a cell over the prompts and sampling seeds of all cells that it is compared with."""
    trainings = list(dict.fromkeys(place[0] for place in cell.values))
    prompts, seeds = (list(dict.fromkeys(place[axis] for c in together for place in c.values)) for axis in (1, 2))
    array = np.full((len(trainings), len(prompts), len(seeds)), np.nan)
    places = [{name: i for i, name in enumerate(names)} for names in (trainings, prompts, seeds)]
    for place, value in cell.values.items():
        if value is not None:
            array[tuple(index[name] for index, name in zip(places, place, strict=True))] = value
    return array


def _judge(pairs: list[tuple[dict, Estimate]], confidence: float) -> None:
    """Correct p values over the metrics of one variant and put verdicts into the rows."""
    words = {"true": ("worse", "better"), "false": ("better", "worse"), "": ("lower", "higher")}
    corrected = holm([paired.p_value for _, paired in pairs])
    for (row, paired), p_holm in zip(pairs, corrected, strict=True):
        row["p_holm"] = p_holm
        row["verdict"] = verdict(paired, p_holm, row["margin"], confidence)
        if row["verdict"] == "resolved":
            row["effect"] = words[row["higher_is_better"]][paired.mean > 0]

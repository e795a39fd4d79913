"""The paper's claims as comparisons of rows of a study, each with its effect, interval and verdict.

claim                    what the paper says, and the two rows that stand for it
metric                   a headline metric with a direction; empty where the study lacks a row
effect, ci_low, ci_high  mean paired difference, first row minus second, in the metric's unit, and its interval (`sla2_eval.stats`)
verdict                  see below

That one row is better (`BETTER`) is a claim of superiority, its p value corrected over the metrics of the claim (Holm):

    reproduced      the interval lies on the claimed side of 0, the corrected test agrees
    reversed        the same on the other side
    no difference   the whole interval lies within the metric's margin
    identical       every pair is, to the last bit: there is no interval
    not resolved at n=<prompts>

That one row is not much worse (`CLOSE`) is a claim of non-inferiority, judged by the margin alone, which is set before the run:

    reproduced      the interval leaves out a loss as large as the margin
    reversed        the whole interval is such a loss
    identical       as above
    not resolved at n=<prompts>

`cannot: <reason>` where the study has no such row, a metric has no value, interval or margin.
Source: SLA2, arXiv 2602.12675, Tables 1 and 2 and their discussion.
"""

from dataclasses import dataclass

from sla2.record import Record
from sla2_eval.stats import Estimate, estimate, holm, verdict
from sla2_eval.summary import Cell, cells_of, explained, paired_values

COLUMNS = ("claim", "metric", "effect", "ci_low", "ci_high", "verdict")
BETTER, CLOSE = "better", "close"


@dataclass(frozen=True)
class Claim:
    """A claim: row `first` against row `second`, which it is to better, or to be close to."""

    words: str
    first: str
    second: str
    kind: str

    def __str__(self) -> str:
        return f"{self.words} ({self.first} against {self.second})"


CLAIMS = (
    Claim("learned router over heuristic", "sla2-97", "sla2-97-topk", BETTER),
    Claim("alpha over sum", "sla2-97", "sla2-97-sum", BETTER),
    Claim("alpha over projection", "sla2-97", "sla2-97-proj", BETTER),
    Claim("QAT over PTQ", "sla2-97", "sla2-97-ptq", BETTER),
    Claim("SLA2 over SLA", "sla2-95", "sla-95", BETTER),
    Claim("quality falls slowly with sparsity", "sla2-97", "sla2-85", CLOSE),
    Claim("97% close to full", "sla2-97", "full", CLOSE),
)


def judge(records: list[Record], settings: dict) -> list[dict]:
    """Rows with the keys of `COLUMNS`, claim by claim, in the order of the headline.

    Args:
        records: of any number of variants.
        settings: config section `report` with `seed` and `variants` (rows of the sheet).
    """
    sheet = {row["variant"]: row for row in settings["variants"]}
    cells = cells_of(records, sheet)
    rows = []
    for claim in CLAIMS:
        absent = [name for name in (claim.first, claim.second) if name not in sheet]
        if absent:
            rows.append(_row(claim, verdict=f"cannot: the study has no row {' and '.join(absent)}"))
        else:
            rows += _judged(claim, cells, sheet, settings)
    return rows


def _judged(claim: Claim, cells: dict[tuple, Cell], sheet: dict[str, dict], settings: dict) -> list[dict]:
    rows, measured = [], []
    for metric in settings["headline"]:
        first, second = (cells.get((name, metric, None)) for name in (claim.first, claim.second))
        if first is None or second is None:
            missing = claim.first if first is None else claim.second
            rows.append(_row(claim, metric, verdict=f"cannot: not measured for {missing}"))
            continue
        if first.example.higher_is_better is None:
            continue
        values = paired_values(first, second, sheet, claim.first, claim.second)
        options = {name: settings[name] for name in ("draws", "confidence", "seed")}
        found = explained(estimate(values, **options), first)
        rows.append(_row(claim, metric, effect=found.mean, ci_low=found.low, ci_high=found.high))
        measured.append((rows[-1], found, 1 if first.example.higher_is_better else -1))
    corrected = holm([found.p_value for _, found, _ in measured])
    for (row, found, sign), p_holm in zip(measured, corrected, strict=True):
        margin = settings["margins"].get(row["metric"])
        row["verdict"] = _verdict(claim, found, sign, p_holm, margin, settings["confidence"])
    return rows


def _verdict(
    claim: Claim, found: Estimate, sign: int, p_holm: float | None, margin: float | None, confidence: float
) -> str:
    """The word for one metric; `sign` is 1 where higher is better, else -1."""
    if found.all_zero and found.n_prompts:
        return "identical"
    if found.low is None or found.high is None:
        return f"cannot: {found.reason or 'no interval'}"
    low, high = sorted((sign * found.low, sign * found.high))
    if claim.kind == CLOSE:
        if margin is None:
            return "cannot: the study sets no margin for this metric"
        if low > -margin:
            return "reproduced"
        return "reversed" if high < -margin else f"not resolved at n={found.n_prompts}"
    word = verdict(found, p_holm, margin, confidence)
    if word == "resolved":
        return "reproduced" if low > 0 else "reversed"
    return "no difference" if word == "equivalent" else word


def _row(claim: Claim, metric: str = "", **values) -> dict:
    return dict.fromkeys(COLUMNS, "") | {"claim": str(claim), "metric": metric} | values

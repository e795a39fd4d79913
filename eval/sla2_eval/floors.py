"""Noise floors: what dense attention, run once more, would show in a metric. A gap to the dense model means something only beyond it.

Dense with other seeds: the mean over prompts moves though nothing but the noise is new. Two such means, of P prompts with S seeds
each, differ by at most

    t(df) sd_seeds sqrt(2 / (P S))      df = values - prompts x training seeds; sd_seeds: of the reference (`sla2_eval.summary`)

at the study's confidence: a band about the reference. Where the metric is itself a distance to the dense video, the floor was
measured: `floor.psnr` and `floor.ssim` between two seeds, `floor.attention_rel_l1` between two dense kernels.

Dense with another kernel: the row of the sheet whose attention is `full_other`. Its fidelity is the distance that rounding alone makes
of the same noise; of other metrics the floor is how far its mean is from `base`'s, a band about that one.
"""

import math
from dataclasses import dataclass

from scipy.special import stdtrit

from sla2.variant import BASE
from sla2_eval.table_set import TableSet

SEEDS, KERNEL = "dense, other seeds", "dense, another kernel"
DISTANCES = {
    "fidelity.psnr": (SEEDS, "floor.psnr"),
    "fidelity.ssim": (SEEDS, "floor.ssim"),
    "attention.rel_l1": (KERNEL, "floor.attention_rel_l1"),
}


@dataclass(frozen=True)
class Floor:
    """Where dense attention, run once more, lies.

    Args:
        what: `SEEDS` or `KERNEL`.
        mean, low, high: in the metric's unit; ends are None where there is no interval.
        measured: a distance that was measured; else a band about the reference's mean.
    """

    what: str
    mean: float
    low: float | None
    high: float | None
    measured: bool


def floor_of(tables: TableSet, metric: str, layer: int | None = None) -> Floor | None:
    """Floor of a metric; None where the study has neither a measured one nor several seeds of the reference."""
    if metric in DISTANCES:
        what, name = DISTANCES[metric]
        row = next(iter(tables.metric(name, layer).values()), None)
        return row and Floor(what, row["mean"], row["ci_low"], row["ci_high"], measured=True)
    width, row = change(tables, metric), tables.metric(metric).get(tables.study["reference"])
    return width and Floor(SEEDS, row["mean"], row["mean"] - width, row["mean"] + width, measured=False)


def kernel_row(tables: TableSet) -> str | None:
    """Name of the row that another dense kernel generated; None in a study without one."""
    return next((name for name, row in tables.variants.items() if row["attention"] == "full_other"), None)


def kernel_floor(tables: TableSet, metric: str) -> Floor | None:
    """Floor of another kernel: measured on attention, else by `kernel_row`; None where that row or `base` has no value."""
    if DISTANCES.get(metric, (SEEDS,))[0] == KERNEL:
        return floor_of(tables, metric)
    rows = tables.metric(metric)
    row, base = rows.get(kernel_row(tables)), rows.get(BASE)
    if row and metric.startswith("fidelity."):  # itself a distance to the videos of `base`
        return Floor(KERNEL, row["mean"], row["ci_low"], row["ci_high"], measured=True)
    if row is None or base is None:
        return None
    # Both rows have the same prompts, seeds and noise, so this is the mean of the paired differences.
    width = abs(row["mean"] - base["mean"])
    return Floor(KERNEL, base["mean"], base["mean"] - width, base["mean"] + width, measured=False)


def change(tables: TableSet, metric: str) -> float | None:
    """Largest difference of means that other seeds alone would make, at the study's confidence; None without several seeds."""
    row = tables.metric(metric).get(tables.study["reference"])
    if row is None or not row["sd_seeds"]:
        return None
    freedom = row["n_values"] - row["n_prompts"] * row["n_train_seeds"]
    quantile = float(stdtrit(freedom, (1 + tables.study["confidence"]) / 2))
    return quantile * row["sd_seeds"] * math.sqrt(2 / (row["n_prompts"] * row["n_seeds"]))

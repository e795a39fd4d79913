"""The page's table of speed and work: four speed-ups under four names, and FLOPs item by item, for every row of a study."""

from dataclasses import dataclass

from sla2.variant import DENSE_ATTENTIONS
from sla2_eval.table_set import TableSet

SPEEDS = {
    "kernel": "kernel",
    "attention_op": "attention op",
    "denoising_step": "denoising step",
    "end_to_end": "end to end",
}
ITEMS = ("router", "sparse", "linear", "mixing")
PARTS = {
    "denoising": "denoising",
    "text_encoding.p50": "text",
    "vae_decoding.p50": "VAE",
    "writing.p50": "file",
}  # of a whole video; nothing is offloaded


@dataclass(frozen=True)
class SpeedUp:
    """Of one thing over dense attention: the fastest dense kernel of the device, and FlashAttention2. None has its `reason`."""

    dense: float | None
    fa2: float | None
    reason: str


@dataclass(frozen=True)
class Efficiency:
    """One row of the study.

    Args:
        speedups: by the names of `SPEEDS`.
        flops, dense_flops: of attention in one forward, executed and dense-equivalent; None where not counted.
        shares: of `ITEMS` in the executed FLOPs, adding up to 1; empty where not counted.
        peak_mib: memory of a denoising step; None where not measured.
        parts: seconds of a whole video by the labels of `PARTS`; empty where not timed.
    """

    variant: str
    speedups: dict[str, SpeedUp]
    flops: float | None
    dense_flops: float | None
    shares: dict[str, float]
    peak_mib: float | None
    parts: dict[str, float]


def efficiency(tables: TableSet) -> list[Efficiency]:
    """What was timed and counted, in the order of the sheet."""
    return [_of(tables, variant) for variant in tables.variants]


def timed_on(tables: TableSet) -> list[str]:
    """What the times hold for: operator, device, dtype and size; those of the rows that are not dense first."""
    rows = tables.metric("speedup.attention_op")
    sparse = {name: row for name, row in rows.items() if tables.variants[name]["attention"] not in DENSE_ATTENTIONS}
    return list(dict.fromkeys(row["backend"] for row in {**sparse, **rows}.values()))


def _of(tables: TableSet, variant: str) -> Efficiency:
    def mean(metric: str) -> float | None:
        row = tables.metric(metric).get(variant)
        return row["mean"] if row else None

    speedups = {
        name: SpeedUp(
            mean(f"speedup.{name}"), mean(f"speedup_fa2.{name}"), tables.missing(f"speedup.{name}").get(variant, "")
        )
        for name in SPEEDS
    }
    parts = {label: mean(f"latency.{name}") for name, label in PARTS.items()}
    flops = mean("flops.per_forward")
    items = {name: mean(f"flops.per_forward.{name}") for name in ITEMS}
    counted = flops and None not in items.values()
    return Efficiency(
        variant,
        speedups,
        flops,
        mean("flops.dense_per_forward"),
        {name: value / flops for name, value in items.items()} if counted else {},
        mean("memory.denoising_step_peak"),
        {label: value / 1000 for label, value in parts.items() if value is not None},
    )

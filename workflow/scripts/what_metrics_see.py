"""What each metric sees: its response to known damage."""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sla2.errors import run_main
from sla2_eval import plot
from sla2_eval.table_set import TableSet

DOMAINS = {"study": "clips of the study", "filmed": "filmed clips"}
COLORS = "RdBu_r"  # red: the metric calls it worse


def draw(tables: TableSet) -> Figure:
    rows = tables.rows("validity")
    domains = [name for name in DOMAINS if any(row["domain"] == name for row in rows)]
    shown = [[row for row in rows if row["domain"] == domain and row["distortion"]] for domain in domains]
    heights = [max(2, len({row["metric"] for row in part})) for part in shown]
    figure = plot.plt.figure(figsize=(9.6, 0.215 * sum(heights) + 1.15 * len(domains) + 0.6))
    axes = figure.subplots(len(domains), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, domain, part in zip(axes, domains, shown, strict=True):
        ax.set_ylabel(DOMAINS[domain], fontsize=9, weight="bold")
        ax.grid(visible=False)
        if part:
            heat_map(ax, part)
        else:
            reason = next(row["reason"] for row in rows if row["domain"] == domain)
            ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", fontsize=8, color="#666666")
            ax.set(xticks=[], yticks=[], xlabel="strength of the damage")
    bar = figure.colorbar(
        ScalarMappable(Normalize(-1, 1), COLORS), ax=list(axes), location="bottom", aspect=60, fraction=0.03, pad=0.02
    )
    bar.ax.set_title("change, as a share of the metric's largest", fontsize=8)
    bar.set_label("better (or higher) ← 0 → worse (or lower)")
    bar.outline.set_visible(False)
    return figure


def heat_map(ax, rows: list[dict]) -> None:
    """One row a metric, one column a strength of a distortion; white with a dot where nothing is seen."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    columns = list(dict.fromkeys((row["distortion"], row["strength"]) for row in rows))
    values = np.full((len(metrics), len(columns)), np.nan)
    for row in rows:
        place = metrics.index(row["metric"]), columns.index((row["distortion"], row["strength"]))
        if row["response"] is None:
            ax.text(place[1], place[0], "–", ha="center", va="center", fontsize=7, color="#777777")
        elif row["sees"] == "yes":
            values[place] = row["response"]
            dark = abs(row["response"]) > 0.6
            text = f"{row['response']:+.2f}".replace("0.", ".").replace("-", "−")
            ax.text(
                place[1], place[0], text, ha="center", va="center", fontsize=5.8, color="white" if dark else "#333333"
            )
        else:
            ax.text(place[1], place[0], "·", ha="center", va="center", fontsize=8, color="#999999")
    ax.imshow(values, cmap=COLORS, vmin=-1, vmax=1, aspect="auto")
    ax.set_yticks(range(len(metrics)), metrics, fontsize=7)
    ax.set_xticks(range(len(columns)), [f"{strength:g}" for _, strength in columns], fontsize=7)
    units = {row["distortion"]: row["unit"] for row in rows}
    names = [distortion for distortion, _ in columns]
    for name in dict.fromkeys(names):
        first, count = names.index(name), names.count(name)
        ax.text(
            first + (count - 1) / 2,
            -0.65,
            name.replace(" ", "\n") + f"\n({units[name]})",
            ha="center",
            va="bottom",
            fontsize=7,
        )
        if first:
            ax.axvline(first - 0.5, color="#888888", linewidth=0.8)
    ax.set_xlabel("strength of the damage, in the unit above", fontsize=7.5)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))

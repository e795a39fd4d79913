"""Quality against sparsity: each headline metric with its interval, dense rows as bands."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sla2.errors import run_main
from sla2.variant import DENSE_ATTENTIONS
from sla2_eval import plot
from sla2_eval.palette import style
from sla2_eval.table_set import TableSet

TICKS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99)


def series(tables: TableSet) -> list[list[str]]:
    """Rows that differ in sparsity only, and whole attentions of one sparsity; single-part ablations have their own figure."""
    groups = tables.variants_by("attention", "router", "mixing", "quantization", "finetune")
    return [
        sorted(names, key=lambda n: tables.variants[n]["sparsity"])
        for (attention, *_), names in groups.items()
        if attention not in DENSE_ATTENTIONS and (len(names) > 1 or attention != "sla2")
    ]


def draw(tables: TableSet) -> Figure:
    groups = series(tables)
    # Of another kernel there is no band: it would lie on that of the untouched model.
    dense = [name for name, row in tables.variants.items() if row["attention"] == "full"]
    realised = {name: row["mean"] for name, row in tables.metric("sparsity.realised").items()}
    figure, filled = plot.headline_panels(tables)
    for ax, metric, rows in filled:
        plot.noise_floor(ax, tables, metric)
        for name in dense:
            if name in rows:
                look, row = style(name), rows[name]
                if row["ci_low"] is not None:
                    ax.axhspan(row["ci_low"], row["ci_high"], color=look.color, alpha=0.1, linewidth=0)
                ax.axhline(row["mean"], color=look.color, linestyle=line(name, tables), linewidth=1)
        for number, names in enumerate(groups):
            shift = 1.05 ** (number - (len(groups) - 1) / 2)  # rows of one sparsity stand beside each other
            points = [
                (shift * (1 - realised.get(n, tables.variants[n]["sparsity"])), rows[n]) for n in names if n in rows
            ]
            ax.plot(
                [x for x, _ in points], [row["mean"] for _, row in points], color=style(names[-1]).color, linewidth=1
            )
            for x, row in points:
                plot.point(ax, row, x, fillstyle=plot.fill(row))
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator([1 - tick for tick in TICKS]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f"{100 * (1 - kept):.0f}"))
        kept = [1 - realised.get(n, tables.variants[n]["sparsity"]) for names in groups for n in names]
        ax.set_xlim(max(kept, default=0.5) * 1.2, min(kept, default=0.01) / 1.2)
        ax.set_xlabel("realised sparsity (%)")
    bands = [Line2D([], [], color=style(n).color, linestyle=line(n, tables), label=style(n).label) for n in dense]
    shown = [name for names in groups for name in names]
    floors = plot.floor_legend(tables, [metric for _, metric, _ in filled])
    plot.legend(figure, [*plot.variant_handles(shown), *bands, *plot.fill_legend(tables.study["reference"]), *floors])
    return figure


def line(name: str, tables: TableSet) -> str:
    """The reference is drawn through, other dense rows dashed."""
    return "-" if name == tables.study["reference"] else "--"


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))

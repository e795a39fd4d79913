"""Quality against speed: the first headline metric over fewer FLOPs, a faster attention and a faster denoising step."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sla2.errors import run_main
from sla2_eval import plot
from sla2_eval.table_set import TableSet

SPEEDS = {
    "flops.reduction": "dense FLOPs / FLOPs of attention (counted)",
    "speedup.attention_op": "speed-up of the attention operation",
    "speedup.denoising_step": "speed-up of a denoising step",
}


def front(points: list[tuple[float, float]], sign: int) -> list[tuple[float, float]]:
    """Points that no other beats in both speed and quality, from slow to fast; sign -1 where lower quality values are better."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (-p[0], -sign * p[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return best[::-1]


def conditions(rows: list[dict]) -> str:
    """What timed or counted the rows: that of the first row that is not dense."""
    backends = [row["backend"] for row in rows]
    found = next((b for b in backends if not b.startswith("sdpa")), backends[0])
    return {"formula": "counted, not timed"}.get(found, found)


def draw(tables: TableSet) -> Figure:
    metric = tables.study["headline"][0]
    # Another dense kernel is a check on quality, not a choice of speed.
    quality = {v: row for v, row in tables.metric(metric).items() if tables.variants[v]["attention"] != "full_other"}
    speeds = [name for name in SPEEDS if tables.metric(name)] or list(SPEEDS)[:1]
    figure, axes = plot.panels(len(speeds), 3, 3.6, 3.8, sharey=True)
    sign = -1 if tables.direction(metric) == "false" else 1
    for ax, name in zip(axes, speeds, strict=True):
        rows = {v: row for v, row in tables.metric(name).items() if v in quality}
        if not rows:
            plot.say_missing(ax, tables, metric if not quality else name)
            continue
        plot.noise_floor(ax, tables, metric)
        points = [(row["mean"], quality[v]["mean"]) for v, row in rows.items()]
        ax.step(*zip(*front(points, sign), strict=True), where="pre", color="#bbbbbb", linewidth=1, zorder=1)
        ax.axvline(1, color="#888888", linewidth=0.8, linestyle=":")
        for v, row in rows.items():
            plot.point(ax, quality[v], row["mean"], fillstyle=plot.fill(quality[v]), alpha=0.8)
        speeds_here = [row["mean"] for row in rows.values()]
        if max(speeds_here) > 5 * min(speeds_here):
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
        ax.margins(x=0.08)
        ax.set_xlabel(SPEEDS[name])
        ax.set_title(conditions(list(rows.values())), fontsize=8, color="#555555")
    axes[0].set_ylabel(plot.metric_name(tables, metric))
    handles = [*plot.variant_handles(list(quality)), *plot.fill_legend(tables.study["reference"])]
    plot.legend(figure, [*handles, *plot.floor_legend(tables, [metric])])
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))

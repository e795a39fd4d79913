"""Quality against fine-tuning: rows of one method, trained longer or otherwise."""

from matplotlib.figure import Figure

from sla2.errors import run_main
from sla2_eval import plot
from sla2_eval.palette import style, without_steps
from sla2_eval.table_set import TableSet

WORDS = ("attention", "router", "mixing", "quantization", "sparsity")


def families(tables: TableSet) -> list[tuple[list[str], list[str]]]:
    """Per method with more than one such row: its curve over steps, and its rows of another loss or trainable set.

    The rows of a curve are named `<row>` and `<row>-step<number>`, or, where the dense model is concerned, `base` and `full`.
    """
    found = []
    for names in tables.variants_by(*WORDS).values():
        head = min((name for name in names if trained(name, tables)), key=len, default=None)
        if head and len(names) > 1:
            curve = [n for n in names if not trained(n, tables) or without_steps(n)[0] == head]
            found.append((curve, [n for n in names if n not in curve]))
    return found


def trained(name: str, tables: TableSet) -> bool:
    return tables.variants[name]["finetune"] == "yes"


def steps(tables: TableSet) -> dict[str, float]:
    """Steps of fine-tuning of every row, from the training logs; 0 for rows that were not fine-tuned."""
    last = dict.fromkeys((name for name in tables.variants if not trained(name, tables)), 0.0)
    for row in tables.rows("training"):
        if row["stage"] == "stage2":
            last[row["run"]] = max(last.get(row["run"], 0.0), row["step"])
    return last


def draw(tables: TableSet) -> Figure:
    groups, length = families(tables), steps(tables)
    gap = max(length.values(), default=0) / 60  # so that intervals of equal steps stand side by side
    figure, filled = plot.headline_panels(tables)
    for ax, metric, rows in filled:
        plot.noise_floor(ax, tables, metric)
        for number, (curve, others) in enumerate(groups):
            shift = gap * (number - (len(groups) - 1) / 2)
            known = sorted((n for n in curve if n in rows and n in length), key=lambda n: length[n])
            places = [length[n] + shift for n in known]
            ax.plot(places, [rows[n]["mean"] for n in known], color=style(curve[0]).color, linewidth=1)
            for x, name in zip(places, known, strict=True):
                plot.point(ax, rows[name], x, fillstyle=plot.fill(rows[name]))
            for place, name in enumerate((n for n in others if n in rows and n in length), start=1):
                x = length[name] + gap * (place + len(groups) / 2)
                plot.point(ax, rows[name], x, fillstyle=plot.fill(rows[name]))
        ax.set_xlabel("steps of fine-tuning")
    drawn = {name for curve, others in groups for name in (*curve, *others)}
    shown = [name for name in tables.variants if name in drawn and not without_steps(name)[1]]
    floors = plot.floor_legend(tables, [metric for _, metric, _ in filled])
    plot.legend(figure, [*plot.variant_handles(shown), *plot.fill_legend(tables.study["reference"]), *floors])
    return figure


if __name__ == "__main__":
    run_main(lambda: plot.run(draw, __doc__))

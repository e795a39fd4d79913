"""How every figure looks and is written: fonts, axis names, intervals, missing values, one .svg and one .png.

    python workflow/scripts/<figure>.py --tables results/S/tables --output results/S/figures/<figure>

The files depend on the tables only: no date, no random ids, so equal tables and equal library versions give equal bytes.
"""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from sla2.files import atomic_path
from sla2_eval.floors import KERNEL, SEEDS, change, floor_of, kernel_row
from sla2_eval.palette import style
from sla2_eval.table_set import TableSet

PIXELS_PER_INCH = 160
LONG_NAME = 24  # letters of a metric's name that fit above a panel
CHARACTERS_PER_INCH = 12  # of a bold title; a legend has a few more
LEGEND_ROW = 0.19  # inches
RULES = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "sla2",
    "svg.fonttype": "path",  # the same picture on a machine without the font
}
plt.rcParams.update(RULES)

# How a marker is filled says how its difference to the reference stands; "" where there is none to stand.
FILLS = {"resolved": "full", "reference": "full", "": "full", "equivalent": "left", "identical": "bottom"}


def run(draw: Callable[[TableSet], Figure], about: str) -> None:
    """Main function of a figure script that needs tables only."""
    args = parser(about).parse_args()
    tables = TableSet(args.tables)
    save(draw(tables), args.output, title(about, tables))


def parser(about: str) -> argparse.ArgumentParser:
    """Options that all figure scripts share."""
    options = argparse.ArgumentParser(description=about.splitlines()[0])
    options.add_argument("--tables", type=Path, required=True, help="tables folder of a study")
    options.add_argument("--output", type=Path, required=True, help="path without suffix; .svg and .png are written")
    return options


def title(about: str, tables: TableSet) -> str:
    """Title of a figure: the first line of its script's docstring, and the study."""
    return f"{about.splitlines()[0].rstrip('.')} (study {tables.study['study']})"


def save(figure: Figure, output: Path, title: str) -> None:
    """Put the title above, write `<output>.svg` and `<output>.png`, and close the figure."""
    figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * CHARACTERS_PER_INCH)), fontsize=9.5, weight="bold")
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    for kind, facts in metadata.items():
        with atomic_path(output.with_name(f"{output.name}.{kind}")) as path:
            figure.savefig(path, dpi=PIXELS_PER_INCH, metadata=facts)
    plt.close(figure)


def panels(count: int, columns: int, width: float, height: float, **options: object) -> tuple[Figure, list[Axes]]:
    """A grid of `count` axes of about `width` x `height` inches each, `columns` wide, or one fewer where that leaves less empty."""
    choices = (columns, columns - 1) if columns > 2 else (columns,)
    columns = min(count, min(choices, key=lambda c: -count % c))
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False, **options)
    axes = list(grid.flat)
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def headline_panels(tables: TableSet) -> tuple[Figure, list[tuple[Axes, str, dict[str, dict]]]]:
    """A titled panel per headline metric; those that have values, each with its metric and the rows of that by variant."""
    metrics = [metric for metric in tables.study["headline"] if not metric.startswith("sparsity")]
    figure, axes = panels(len(metrics), 4, 2.9, 2.6)
    filled = []
    for ax, metric in zip(axes, metrics, strict=True):
        entitle(ax, tables, metric)
        if rows := tables.metric(metric):
            filled.append((ax, metric, rows))
        else:
            say_missing(ax, tables, metric)
    return figure, filled


def logarithmic(ax: Axes) -> None:
    """Logarithmic y axis with plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())


def with_unit(tables: TableSet, metric: str, text: str) -> str:
    """`text (unit)`, or `text` alone for a pure number."""
    unit = next((row["unit"] for row in tables.metric(metric).values()), "1")
    return text if unit == "1" else f"{text} ({unit})"


def metric_name(tables: TableSet, metric: str) -> str:
    """Name of a metric with its unit and an arrow towards better; a long one in two lines, as panels stand side by side."""
    name = metric if len(metric) <= LONG_NAME else metric.replace(".", ".\n", 1)
    return with_unit(tables, metric, name) + {"true": " ↑", "false": " ↓", "": ""}[tables.direction(metric)]


def entitle(ax: Axes, tables: TableSet, metric: str) -> None:
    """The metric as the panel's title; says so where the reference has no value to compare with."""
    compared = any(row["verdict"] for row in tables.metric(metric).values())
    ax.set_title(metric_name(tables, metric) + ("" if compared else "\n(the reference has no value)"))


def point(
    ax: Axes, row: dict, x: float, *, along: str = "y", names: tuple = ("mean", "ci_low", "ci_high"), **options
) -> None:
    """A marker with its interval along axis `along`; without an interval, the marker alone."""
    look = style(row["variant"])
    value, low, high = (row[name] for name in names)
    error = None if low is None else [[max(0.0, value - low)], [max(0.0, high - value)]]
    place = {"x": x, "y": value, "yerr": error} if along == "y" else {"x": value, "y": x, "xerr": error}
    # White inside, unless filled, so that what lies behind does not look like a fill.
    fill = {
        "fillstyle": "full",
        "markerfacecoloralt": "white",
        "markersize": 7 if look.marker in "*PX" else 5.5,
    } | options
    if fill["fillstyle"] == "none":
        fill |= {"fillstyle": "full", "markerfacecolor": "white"}
    ax.errorbar(**place, color=look.color, marker=look.marker, linestyle="none", capsize=2, elinewidth=1.2, **fill)


def fill(row: dict) -> str:
    """Marker fill of a row by its verdict."""
    return FILLS.get(row["verdict"], "none")


def fill_legend(reference: str) -> list[Line2D]:
    """Legend entries that explain `fill`."""
    texts = {"full": "resolved", "left": "equivalent", "bottom": "identical", "none": "not resolved"}
    look = {"color": "#444444", "marker": "o", "linestyle": "none", "markersize": 6, "markerfacecoloralt": "white"}
    heading = Line2D([], [], linestyle="none", label=f"vs {style(reference).label}:")
    return [heading, *(Line2D([], [], fillstyle=name, label=text, **look) for name, text in texts.items())]


# Noise floors: a band that is hatched, as plain ones are intervals and margins; a line for a distance that was measured.
FLOOR_BAND = {"facecolor": "none", "edgecolor": "#b0b0b0", "hatch": "////", "linewidth": 0, "zorder": 0}
FLOOR_LINES = {SEEDS: {"color": "#555555", "linestyle": ":"}, KERNEL: {"color": "#555555", "linestyle": "-."}}


def noise_floor(ax: Axes, tables: TableSet, metric: str, *, along: str = "y") -> None:
    """Draw where dense attention, run once more, lies on the metric's axis `along`."""
    floor = floor_of(tables, metric)
    if floor is None:
        return
    if floor.measured:
        (ax.axhline if along == "y" else ax.axvline)(floor.mean, linewidth=1.1, **FLOOR_LINES[floor.what])
    else:
        (ax.axhspan if along == "y" else ax.axvspan)(floor.low, floor.high, **FLOOR_BAND)


def noise_change(ax: Axes, tables: TableSet, metric: str) -> None:
    """Draw how far other seeds alone move a mean difference, to both sides of 0 on the x axis."""
    if width := change(tables, metric):
        ax.axvspan(-width, width, **FLOOR_BAND)


def floor_legend(tables: TableSet, metrics: list[str]) -> list[Artist]:
    """Legend entries of the noise floors of these metrics."""
    floors = [floor for metric in metrics if (floor := floor_of(tables, metric))]
    lines = dict.fromkeys(floor.what for floor in floors if floor.measured)
    handles: list[Artist] = [Line2D([], [], label=f"floor: {what} (distance)", **FLOOR_LINES[what]) for what in lines]
    if any(not floor.measured for floor in floors):
        handles.append(change_legend())
    return handles


def change_legend() -> Artist:
    """Legend entry of the hatched band."""
    return Patch(label=f"floor: {SEEDS}", **FLOOR_BAND)


def variant_handles(variants: list[str]) -> list[Line2D]:
    """Legend entries of variants."""
    look = {"linestyle": "none", "markersize": 6.5}
    return [
        Line2D([], [], color=style(v).color, marker=style(v).marker, label=style(v).label, **look) for v in variants
    ]


def legend(figure: Figure, handles: list[Artist]) -> None:
    """One legend below all panels, in as many columns as fit; the figure grows by its height."""
    inches = max(len(handle.get_label()) for handle in handles) / (1.3 * CHARACTERS_PER_INCH) + 0.5
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.4)


def row_axes(axes: list[Axes], names: list[str]) -> None:
    """Axes that share one row a variant, the first at the top."""
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    axes[0].set_yticks(range(len(names)), [style(name).label for name in names])
    for ax in axes:
        ax.grid(axis="y", visible=False)


def mark_missing(ax: Axes, place: int) -> None:
    """Say in the row of a variant that it has no value here; the tables have the reason."""
    ax.text(0.03, place, "no value", transform=ax.get_yaxis_transform(), va="center", fontsize=7, color="#8a8a8a")


def beyond_others(tables: TableSet, rows: dict[str, dict], column: str = "mean") -> str | None:
    """The row of another dense kernel, where it lies farther from all others than they lie apart: to scale it would press them together."""
    name = kernel_row(tables)
    others = [row[column] for other, row in rows.items() if other != name and row[column] is not None]
    if name not in rows or rows[name][column] is None or len(others) < 2:
        return None
    distance = max(rows[name][column] - max(others), min(others) - rows[name][column])
    return name if distance > max(others) - min(others) else None


def mark_beyond(ax: Axes, row: dict, place: int, column: str = "mean") -> None:
    """Write a value that lies beyond the axis at its right end."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    look = {"va": "center", "ha": "right", "fontsize": 8, "color": "#444444", "bbox": box}
    ax.text(0.98, place, f"{row[column]:.3g} →", transform=ax.get_yaxis_transform(), **look)


def say_missing(ax: Axes, tables: TableSet, metric: str) -> None:
    """Write into an empty panel why nothing is there."""
    reasons = list(dict.fromkeys(tables.missing(metric).values()))
    text = textwrap.fill(reasons[0] if reasons else "not measured", 36)
    ax.text(
        0.5, 0.5, f"no value\n{text}", transform=ax.transAxes, ha="center", va="center", fontsize=8, color="#666666"
    )
    ax.set(xticks=[], yticks=[])

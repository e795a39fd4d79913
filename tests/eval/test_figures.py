"""Every figure of the invented study: written as svg and png, equal twice, honest where values are missing."""

import csv
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import FIGURES, draw_figure
from PIL import Image

from sla2_eval import plot
from sla2_eval.palette import WORDS, style
from sla2_eval.report import CAPTIONS
from sla2_eval.table_set import TableSet

SCRIPTS = {path.stem: path for path in sorted(FIGURES.glob("*.py"))}
OF_TABLES = [name for name in SCRIPTS if name != "contact_sheet"]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as the scripts hand them over, by script."""
    seen = {}
    write = plot.save

    def keep(figure, output, title):
        write(figure, output, title)
        seen[output.name] = figure

    monkeypatch.setattr(plot, "save", keep)
    return seen


def keep_rows(study, folder, wanted):
    """Copy of the tables with only the rows that `wanted` accepts."""
    shutil.copytree(study / "tables", folder)
    for path in folder.glob("*.csv"):
        with path.open() as file:
            reader = csv.DictReader(file)
            rows, columns = [row for row in reader if wanted(path.stem, row)], reader.fieldnames
        with path.open("w") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return folder


def test_page_has_a_caption_for_every_figure():
    assert set(CAPTIONS) == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_same_bytes_again_named_axes_and_nothing_cut_off(name, study, figures, tmp_path, drawn):
    draw_figure(SCRIPTS[name], study, tmp_path / name)
    for kind in ("svg", "png"):
        first = (figures / f"{name}.{kind}").read_bytes()
        assert first == (tmp_path / f"{name}.{kind}").read_bytes()
    image = Image.open(figures / f"{name}.png").convert("L")
    assert 700 < image.width < 2000
    assert image.getextrema()[0] < 60, "nothing was drawn"
    assert not list(tmp_path.glob(".*")), "a temporary file is left"
    check_texts(drawn[name])


def check_texts(figure):
    """Title with the study, axes with names, and no text beyond the edge."""
    assert "study small" in figure.get_suptitle()
    width, height = figure.get_size_inches() * figure.dpi
    figure.draw_without_rendering()
    for ax in figure.axes:
        if ax.axison:
            assert ax.get_xlabel()
            assert ax.get_title() or ax.get_ylabel()
    texts = [text for legend in figure.legends for text in legend.get_texts()] + [figure._suptitle]
    texts += [text for ax in figure.axes if ax.axison for text in (ax.title, *tick_labels(ax))]
    for text in texts:
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= -1, text.get_text()
        assert box.x1 <= width + 1, text.get_text()
        assert box.y1 <= height + 1, text.get_text()


def tick_labels(ax):
    """Labels that are drawn: of ticks inside the view."""
    for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
        yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)


def test_units_stand_in_the_axes(study, tmp_path, drawn):
    for name in ("ablation_bars", "paired_differences"):
        draw_figure(SCRIPTS[name], study, tmp_path / name)
        labels = {ax.get_title(): ax.get_xlabel() for ax in drawn[name].axes}
        assert labels["fidelity.psnr (dB) ↑"].endswith("(dB)")
        assert not labels["oracle.color ↑"].endswith(")")


def test_bars_show_the_tables_numbers(study, tmp_path, drawn):
    draw_figure(SCRIPTS["ablation_bars"], study, tmp_path / "ablation_bars")
    tables = TableSet(study / "tables")
    (ax,) = [ax for ax in drawn["ablation_bars"].axes if ax.get_title().startswith("fidelity.psnr")]
    labels = [text.get_text() for text in drawn["ablation_bars"].axes[0].get_yticklabels()]
    row = tables.metric("fidelity.psnr")["sla2-97-ptq"]
    container = next(c for c in ax.containers if c.lines[0].get_ydata()[0] == labels.index(style("sla2-97-ptq").label))
    assert container.lines[0].get_xdata()[0] == pytest.approx(row["mean"])
    (segment,) = container.lines[2][0].get_segments()
    assert [x for x, _ in segment] == pytest.approx([row["ci_low"], row["ci_high"]])
    assert "no value" in [text.get_text() for text in ax.texts], "the reference of fidelity has none"


@pytest.mark.parametrize("name", OF_TABLES)
def test_missing_metrics_and_layers(name, study, tmp_path):
    """Without headline values, attention errors or training, a figure says so."""
    gone = ("oracle.color", "fidelity.psnr", "attention.rel_l1", "speedup.attention_op")
    wanted = lambda table, row: table != "training" and not (row.get("metric") in gone or row.get("layer"))  # noqa: E731
    folder = keep_rows(study, tmp_path / "tables", wanted)
    draw_figure(SCRIPTS[name], study, tmp_path / name, folder)
    assert (tmp_path / f"{name}.svg").stat().st_size > 3000


@pytest.mark.parametrize(
    ("name", "variant"), [(name, "sla2-97") for name in SCRIPTS] + [(n, "full") for n in OF_TABLES]
)
def test_a_single_variant(name, variant, study, tmp_path):
    folder = keep_rows(study, tmp_path / "tables", lambda _, row: row.get("variant", variant) == variant)
    draw_figure(SCRIPTS[name], study, tmp_path / name, folder)
    assert (tmp_path / f"{name}.png").is_file()


@pytest.mark.parametrize("name", ["quality_sparsity", "pareto", "training_curves", "finetuning"])
def test_another_dense_kernel_is_no_choice_to_draw(name, study, tmp_path, drawn):
    draw_figure(SCRIPTS[name], study, tmp_path / name)
    texts = {text.get_text() for text in drawn[name].legends[0].get_texts()}
    assert style("base-kernel").label not in texts


@pytest.mark.parametrize(("name", "column"), [("ablation_bars", "mean"), ("paired_differences", "difference")])
def test_a_far_floor_is_written_at_the_edge(name, column, study, tmp_path, drawn):
    """To scale, dense attention by another kernel would press all rows together."""
    table = shutil.copytree(study / "tables", tmp_path / "tables") / "fidelity.csv"
    rows = list(csv.DictReader(table.open()))
    for row in rows:
        if (row["variant"], row["metric"]) == ("base-kernel", "fidelity.psnr"):
            row |= {"mean": "157", "difference": "123", "difference_low": "122", "difference_high": "124"}
    with table.open("w") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for folder, texts in ((study / "tables", set()), (table.parent, {"157 →" if column == "mean" else "123 →"})):
        draw_figure(SCRIPTS[name], study, tmp_path / name, folder)
        (ax,) = [ax for ax in drawn[name].axes if ax.get_title().startswith("fidelity.psnr")]
        assert {text.get_text() for text in ax.texts if "→" in text.get_text()} == texts
        assert ax.get_xlim()[1] < 100


def test_every_variant_has_a_look_of_its_own(study):
    looks = [style(name) for name in TableSet(study / "tables").variants]
    assert len({(look.color, look.marker) for look in looks}) == len(looks)
    assert len({look.label for look in looks}) == len(looks)
    assert len({color for color, _, _ in WORDS.values()}) == len(WORDS)


def test_a_new_row_gets_a_look_too():
    assert style("sla2-97-mine") == style("sla2-97-mine")
    assert style("sla2-97-mine").label == "SLA2 97%, mine"
    assert style("sla2-85").color != style("sla2-97").color


def test_a_row_of_a_curve_looks_like_its_method_and_says_its_steps():
    row, method = style("sla2-97-topk-step50"), style("sla2-97-topk")
    assert (row.color, row.marker) == (method.color, method.marker)
    assert row.label == "SLA2 97%, heuristic router, 50 steps"


def test_rows_of_one_method_make_a_curve_over_steps(monkeypatch):
    script = runpy.run_path(str(SCRIPTS["finetuning"]))
    words = {"attention": "sla2", "router": "learned", "mixing": "alpha", "quantization": "none", "sparsity": 0.97}
    heuristic = words | {"router": "mean_pool"}
    sheet = {
        "sla2-97": words | {"finetune": "yes"},
        "sla2-97-topk": heuristic | {"finetune": "yes"},
        "sla2-97-step0": words | {"finetune": "no"},
        "sla2-97-step50": words | {"finetune": "yes"},
        "sla2-97-adapter": words | {"finetune": "yes"},
    }
    logs = [("stage2", "sla2-97", 250.0), ("stage2", "sla2-97-step50", 50.0), ("stage1", "sla2-97", 999.0)]
    rows = [dict(zip(("stage", "run", "step"), log, strict=True)) for log in logs]
    monkeypatch.setattr(TableSet, "__init__", lambda self: None)
    monkeypatch.setattr(TableSet, "variants", sheet)
    monkeypatch.setattr(TableSet, "rows", lambda self, table: rows)
    tables = TableSet()
    assert script["families"](tables) == [(["sla2-97", "sla2-97-step0", "sla2-97-step50"], ["sla2-97-adapter"])]
    assert script["steps"](tables) == {"sla2-97-step0": 0.0, "sla2-97": 250.0, "sla2-97-step50": 50.0}


def test_a_video_that_was_left_behind_is_named(study, tmp_path):
    shutil.copytree(study / "generate", tmp_path / "generate", ignore=shutil.ignore_patterns("*.mkv"))
    arguments = ["--tables", study / "tables", "--videos", tmp_path / "generate", "--output", tmp_path / "sheet"]
    done = subprocess.run(
        [sys.executable, SCRIPTS["contact_sheet"], *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*p01-s0\.mkv: missing; .*\n", done.stderr)

"""Noise floors: known answers, and what is drawn and printed of them."""

import json
import shutil

import numpy as np
import pytest
from conftest import FIGURES, draw_figure
from scipy import stats as scipy_stats

from sla2_eval import plot, report
from sla2_eval.floors import KERNEL, SEEDS, change, floor_of
from sla2_eval.stats import estimate
from sla2_eval.table_set import TableSet


@pytest.fixture
def tables(study) -> TableSet:
    return TableSet(study / "tables")


class Reference:
    """As much of a `TableSet` as a floor needs: one dense row with the spread of these values (T, P, S)."""

    def __init__(self, values: np.ndarray) -> None:
        self.study = {"reference": "full", "confidence": 0.95}
        found = estimate(values, draws=0)
        names = ("mean", "sd_seeds", "n_prompts", "n_seeds", "n_train_seeds", "n_values")
        self.row = {name: getattr(found, name) for name in names}

    def metric(self, metric, layer=None):
        return {"full": self.row}


def test_change_holds_what_other_seeds_do():
    """Two runs of one dense model with other seeds differ by less in 95 % of cases, however much prompts differ."""
    rng = np.random.default_rng(4)
    within = []
    for _ in range(2000):
        prompts = 5 * rng.normal(size=(1, 8, 1))
        once, again = (prompts + rng.normal(size=(1, 8, 2)) for _ in range(2))
        within.append(abs(once.mean() - again.mean()) < change(Reference(once), "m"))
    assert 0.935 < np.mean(within) < 0.965


def test_change_against_scipy():
    values = np.random.default_rng(1).normal(size=(1, 6, 3))
    spread = np.sqrt(values[0].var(axis=1, ddof=1).mean())
    expected = scipy_stats.t.ppf(0.975, 6 * 2) * spread * np.sqrt(2 / 18)
    assert change(Reference(values), "m") == pytest.approx(expected)
    floor = floor_of(Reference(values), "m")
    assert (floor.what, floor.measured) == (SEEDS, False)
    assert (floor.high - floor.low) / 2 == pytest.approx(expected)
    assert floor_of(Reference(values[..., :1]), "m") is None, "one seed says nothing of others"


def test_distances_to_the_dense_video_have_measured_floors(tables):
    psnr = floor_of(tables, "fidelity.psnr")
    row = tables.metric("floor.psnr")["base"]
    assert (psnr.what, psnr.mean, psnr.measured) == (SEEDS, row["mean"], True)
    error = floor_of(tables, "attention.rel_l1")
    assert (error.what, error.low) == (KERNEL, None)
    assert error.mean == pytest.approx(2.5e-3)
    assert floor_of(tables, "attention.rel_l1", 3).mean == pytest.approx(4e-3)
    assert floor_of(tables, "attention.cosine") is None


def test_page_has_a_row_for_each_floor(tables):
    seeds, kernel = report.floor_rows(tables)
    cells = dict(zip(tables.study["headline"], seeds["cells"], strict=True))
    assert cells["temporal_flickering"]["text"] == f"± {report.number(change(tables, 'temporal_flickering'), 3)}"
    assert cells["fidelity.psnr"]["text"] == report.number(tables.metric("floor.psnr")["base"]["mean"])
    assert cells["attention.rel_l1"]["text"] is None
    cells = dict(zip(tables.study["headline"], kernel["cells"], strict=True))
    assert cells["attention.rel_l1"]["text"] == "0.002500"
    assert cells["fidelity.psnr"]["text"] == report.number(tables.metric("fidelity.psnr")["base-kernel"]["mean"])
    flicker = tables.metric("temporal_flickering")
    moved = abs(flicker["base-kernel"]["mean"] - flicker["base"]["mean"])
    assert cells["temporal_flickering"]["text"] == f"± {report.number(moved, 3)}"
    assert all(cell["note"] for line in (seeds, kernel) for cell in line["cells"])


def test_a_study_without_a_row_of_another_kernel_says_so(tables):
    tables.variants = {name: row for name, row in tables.variants.items() if name != "base-kernel"}
    _, kernel = report.floor_rows(tables)
    cells = dict(zip(tables.study["headline"], kernel["cells"], strict=True))
    assert {name for name, cell in cells.items() if cell["text"] is None} == {*cells} - {"attention.rel_l1"}
    assert "no videos are generated" in cells["fidelity.psnr"]["note"]


def test_another_kernel_without_a_value_gives_the_reason(tables):
    assert report.floor_cell(tables, "vbench.subject_consistency", KERNEL) == {
        "text": None,
        "note": "not available: needs the weights <dino>.pth",
    }


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("quality_sparsity", ("other seeds", "other seeds (distance)", "another kernel (distance)")),
        ("ablation_bars", ("other seeds", "other seeds (distance)", "another kernel (distance)")),
        ("paired_differences", ("other seeds",)),
        ("pareto", ("other seeds",)),
        ("attention_error_by_layer", ("another kernel (distance)",)),
    ],
)
def test_figures_show_the_floors(name, labels, study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, output, title: drawn.append(figure))
    shutil.copytree(study / "tables", tmp_path / "tables")
    settings = json.loads((tmp_path / "tables/study.json").read_text())
    settings["headline"].sort(key=lambda metric: metric != "temporal_flickering")  # the one that is drawn against speed
    (tmp_path / "tables/study.json").write_text(json.dumps(settings))
    draw_figure(FIGURES / f"{name}.py", study, tmp_path / name, tmp_path / "tables")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    floors = [text.removeprefix("floor: dense, ") for text in texts if text.startswith("floor: ")]
    assert sorted(floors) == sorted(labels)

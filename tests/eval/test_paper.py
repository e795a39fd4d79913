"""The paper's numbers against ours: which are reproduced, which differ, which cannot be said, and why."""

import csv
import sys

import pytest

from sla2.errors import UserError
from sla2.variant import read_variants
from sla2_eval import paper
from sla2_eval.metrics.catalogue import METRICS

SMALL, LARGE = paper.MODELS


@pytest.fixture(scope="module")
def numbers():
    return paper.read_numbers()


def cell(
    cells, quantity: str, method: str = "SLA2", sparsity: float = 0.97, model: str = SMALL, table: str = "Table 1"
):
    wanted = (table, model, method, sparsity, quantity)
    (one,) = [c for c in cells if (c.number.table, c.number.model, c.number.method, c.number.sparsity, c.number.quantity) == wanted]  # fmt: skip
    return one


def test_numbers_of_the_paper(numbers) -> None:
    assert len({(n.table, n.model, n.method, n.sparsity, n.quantity) for n in numbers}) == len(numbers) == 188
    assert {n.quantity for n in numbers if n.unit == "x100"} | {"vision_reward"} <= {
        m.removeprefix("vbench.") for m in METRICS
    }
    tables = [{(n.method, n.sparsity, n.quantity): n.value for n in numbers if n.table == t and n.model == SMALL} for t in ("Table 1", "Table 2")]  # fmt: skip
    shared = tables[0].keys() & tables[1].keys()
    assert len(shared) == 24
    assert all(tables[0][key] == tables[1][key] for key in shared)


def test_flops_are_compared_as_ratios(numbers) -> None:
    cells = paper.compare(numbers, [])
    assert cell(cells, "flops").status == paper.REPRODUCED
    assert cell(cells, "flops").ours == pytest.approx(52.75 * 0.0334, rel=0.01)
    odd = cell(cells, "flops", sparsity=0.9, model=LARGE)
    assert odd.status == paper.DIFFERS
    assert "probably a slip" in odd.note
    full = cell(cells, "flops", "Full", 0.0)
    assert full.status == paper.DIFFERS
    assert full.ours == pytest.approx(197.8, rel=1e-3)
    assert "96 heads' worth" in full.note
    assert "100 heads' worth" in cell(cells, "flops", "Full", 0.0, LARGE).note
    assert cell(cells, "flops", "VSA", 0.9).status == paper.CANNOT


def test_speeds_come_from_measured_files(numbers, tmp_path) -> None:
    def status(ratio: float, quantity: str, **row) -> str:
        rows = [{"device": "some-gpu", "shape": "1.3B-480p", "speedup_fa2": str(ratio), **row}]
        return cell(paper.compare(numbers, rows), quantity, table="Speed, RTX 5090").status

    op = {"pass": "forward", "sparsity": "0.97", "precision": "bf16"}
    assert status(18.9, "attention_speedup_fa2", **op) == paper.REPRODUCED
    assert status(16.0, "attention_speedup_fa2", **op) == paper.DIFFERS
    assert status(18.9, "attention_speedup_fa2", **{**op, "sparsity": "0.95"}) == paper.CANNOT
    video = {"part": "end_to_end", "row": "sla2-97", "mode": "eager"}
    assert status(2.4, "end_to_end_speedup", **video) == paper.REPRODUCED
    assert status(2.4, "end_to_end_speedup", **{**video, "row": "sla2-90"}) == paper.CANNOT
    assert status(2.4, "attention_time_ratio", **op) == paper.CANNOT
    with pytest.raises(UserError, match="no such file"):
        paper.read_measured([tmp_path / "summary.csv"])


def test_attention_in_a_video_is_what_it_adds_to_a_step(numbers) -> None:
    step = {"device": "step-x", "shape": "1.3B-480p", "part": "denoising_step", "mode": "eager", "speedup_fa2": ""}
    rows = [
        step | {"row": row, "ms": ms} for row, ms in (("dense-fa2", "80"), ("sla2-97", "24"), ("no-attention", "20"))
    ]
    (number,) = (n for n in numbers if n.quantity == "attention_time_ratio")
    (cell,) = paper.compare([number], rows)
    assert (cell.ours, cell.status) == (15.0, paper.REPRODUCED)  # 13.9 printed
    assert paper.compare([number], rows[:2])[0].status == paper.CANNOT


def test_quality_needs_a_study_of_the_paper_s_model(numbers) -> None:
    values = {("sla2-97", "vbench.imaging_quality"): (0.66, 0.65, 0.68), ("base", "vision_reward"): (0.2, 0.15, 0.25)}
    for name in ("tiny", "wan2.1-14b-720p"):
        one = cell(paper.compare(numbers, [], {"name": name, "values": values}), "imaging_quality")
        assert (one.status, one.note) == (paper.CANNOT, paper.QUALITY)
    cells = paper.compare(numbers, [], {"name": "wan2.1-1.3b-480p", "values": values})
    assert cell(cells, "imaging_quality").status == paper.REPRODUCED
    assert cell(cells, "imaging_quality").ours == pytest.approx(66)
    assert cell(cells, "vision_reward", "Full", 0.0).status == paper.DIFFERS
    missing = "has no vbench_official.motion_smoothness or vbench.motion_smoothness of sla2-97"
    assert missing in cell(cells, "motion_smoothness").note
    assert "by the port of VBench here" in cell(cells, "imaging_quality").note
    values["sla2-97", "vbench_official.imaging_quality"] = (0.5, 0.4, 0.6)
    cells = paper.compare(numbers, [], {"name": "wan2.1-1.3b-480p", "values": values})
    assert cell(cells, "imaging_quality").ours == pytest.approx(50), "VBench's own goes first"
    assert "by VBench itself" in cell(cells, "imaging_quality").note


def test_methods_are_rows_of_the_sheet(numbers) -> None:
    sheet = read_variants(paper.Path(__file__).resolve().parents[2] / "config/variants.tsv")
    named = {paper.variant_of(n) for n in numbers if n.method.startswith("SLA2") or n.method == "Full"}
    assert named <= set(sheet)


def test_command_writes_every_cell(numbers, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["paper", "--output", str(tmp_path / "paper.csv")])
    paper.main()
    with (tmp_path / "paper.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(numbers)
    assert all(row["note"] and row["status"] in ("reproduced", "differs", "cannot") for row in rows)

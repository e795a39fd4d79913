"""VBench's normalisation: its constants by their published check value, and no total of a subset."""

import json
import sys

import pytest

from sla2.errors import UserError
from sla2_eval import vbench_total
from sla2_eval.vbench_total import QUALITY, SEMANTIC, normalised, totals

ONES = dict.fromkeys((*QUALITY, *SEMANTIC), 1.0)


def test_all_raws_of_one() -> None:
    assert totals(ONES) == pytest.approx({"Quality": 1.00132, "Semantic": 1.69126, "Total": 1.13931}, abs=5e-6)


def test_a_static_clip_exceeds_one() -> None:
    assert normalised("motion_smoothness", 1.0) == pytest.approx(1.0086, abs=5e-5)


@pytest.mark.parametrize(
    ("dimension", "effect"),
    [
        ("subject_consistency", 0.00144),
        ("background_consistency", 0.00167),
        ("temporal_flickering", 0.00332),
        ("motion_smoothness", 0.00422),
        ("aesthetic_quality", 0.00123),
        ("imaging_quality", 0.00123),
        ("dynamic_degree", 0.00062),
        ("human_action", 0.00022),
        ("scene", 0.00027),
        ("appearance_style", 0.00078),
        ("temporal_style", 0.00061),
        ("overall_consistency", 0.00061),
    ],
)
def test_what_a_hundredth_of_a_dimension_adds_to_the_total(dimension, effect) -> None:
    more = totals(ONES | {dimension: 1.01})["Total"] - totals(ONES)["Total"]
    assert more == pytest.approx(effect, abs=6e-6)


def test_there_is_no_total_of_a_subset() -> None:
    for gone in ("scene", "subject_consistency"):
        with pytest.raises(UserError, match=f"no total without {gone}: VBench would take"):
            totals({name: value for name, value in ONES.items() if name != gone})


def run(*paths) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vbench-total", *map(str, paths)])
        vbench_total.total_main()


def test_command_reads_one_file_or_more(tmp_path, capsys) -> None:
    for name, group in (("q", QUALITY), ("s", SEMANTIC)):
        (tmp_path / name).write_text(json.dumps({dimension: [1.0, []] for dimension in group}))
    run(tmp_path / "q", tmp_path / "s")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["Total", "1.13931"]
    assert lines[3].split() == ["motion_smoothness", "1.0000", "normalised", "1.0086"]
    with pytest.raises(UserError, match="no total without object_class, multiple_objects"):
        run(tmp_path / "q")
    with pytest.raises(UserError, match="subject_consistency stands in an earlier file"):
        run(tmp_path / "q", tmp_path / "q")
    (tmp_path / "odd").write_text(json.dumps({"scene": 1.0}))
    with pytest.raises(UserError, match="scene: is not"):
        run(tmp_path / "odd")

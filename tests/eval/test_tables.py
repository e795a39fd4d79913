"""Records to tables: means, intervals, counts and paired differences against numpy, and nothing averaged over in silence."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import small_study
from scipy import stats as scipy_stats

from sla2.errors import UserError
from sla2.record import Record, read_records, write_records
from sla2_eval import tables, vbench_files
from sla2_eval.summary import COLUMNS, summarise
from sla2_eval.table_set import TableSet

SHEET = [
    {"variant": "full", "attention": "full", "finetune": True},
    {"variant": "sla2-90", "attention": "sla2", "finetune": True},
]
SETTINGS = {"reference": "full", "draws": 0, "confidence": 0.95, "seed": 0, "headline": ["m"], "margins": {}}


def records(values: np.ndarray, variant: str, metric: str = "m", **about) -> list[Record]:
    """One record a cell of (T, P, S); NaN becomes a record without a value."""
    made = []
    for (t, p, s), value in np.ndenumerate(values):
        known = {"value": float(value)} if np.isfinite(value) else {"value": None, "reason": "frames are flat"}
        place = {"train_seed": t, "prompt_id": f"p{p}", "seed": s}
        made.append(Record(study="hand", variant=variant, metric=metric, **known, **place, **about))
    return made


def summary(*groups: list[Record], **settings) -> dict[tuple, dict]:
    rows = summarise([record for group in groups for record in group], SETTINGS | {"variants": SHEET} | settings)
    return {(row["variant"], row["metric"], row["layer"]): row for row in rows}


@pytest.fixture
def values():
    rng = np.random.default_rng(5)
    dense = rng.normal(10, 2, (1, 6, 3))
    return dense, dense - 1 + rng.normal(0, 0.3, (1, 6, 3))


def test_mean_count_and_spread_against_numpy(values):
    dense, sparse = values
    row = summary(records(dense, "full"), records(sparse, "sla2-90"))["sla2-90", "m", None]
    assert row["mean"] == pytest.approx(sparse.mean())
    assert (row["n_prompts"], row["n_seeds"], row["n_train_seeds"], row["n_values"]) == (6, 3, 1, 18)
    assert row["n_undefined"] == 0
    assert row["sd_seeds"] == pytest.approx(np.sqrt(sparse[0].var(axis=1, ddof=1).mean()))


def test_paired_difference_against_scipy(values):
    dense, sparse = values
    row = summary(records(dense, "full"), records(sparse, "sla2-90"))["sla2-90", "m", None]
    per_prompt = (sparse - dense)[0].mean(axis=1)
    assert row["difference"] == pytest.approx(per_prompt.mean())
    assert row["p_value"] == pytest.approx(scipy_stats.ttest_1samp(per_prompt, 0).pvalue)


def test_interval_of_symmetric_prompts_is_the_t_interval_of_their_means(values):
    dense, _ = values
    sparse = dense - 1 + np.array([-0.5, -0.3, -0.1, 0.1, 0.3, 0.5])[None, :, None]
    row = summary(records(dense, "full"), records(sparse, "sla2-90"), draws=20000)["sla2-90", "m", None]
    per_prompt = (sparse - dense)[0].mean(axis=1)
    interval = scipy_stats.t.interval(0.95, 5, per_prompt.mean(), scipy_stats.sem(per_prompt))
    width = interval[1] - interval[0]
    assert row["difference_low"] == pytest.approx(interval[0], abs=0.1 * width)
    assert row["difference_high"] == pytest.approx(interval[1], abs=0.1 * width)
    assert row["verdict"] == "resolved"


@pytest.mark.parametrize(("higher", "effect"), [(True, "worse"), (False, "better"), (None, "lower")])
def test_effect_follows_the_metric_s_direction(values, higher, effect):
    groups = [records(v, n, higher_is_better=higher) for v, n in zip(values, ("full", "sla2-90"), strict=True)]
    assert summary(*groups, draws=2000)["sla2-90", "m", None]["effect"] == effect


def test_margin_decides_equivalence(values):
    groups = [records(v, n) for v, n in zip(values, ("full", "sla2-90"), strict=True)]
    assert summary(*groups, draws=2000, margins={"m": 5.0})["sla2-90", "m", None]["verdict"] == "equivalent"


def test_pairs_only_what_both_sides_have(values):
    dense, sparse = values
    dense[0, 0, 0] = sparse[0, 1, 1] = np.nan
    row = summary(records(dense, "full"), records(sparse, "sla2-90"))["sla2-90", "m", None]
    assert row["difference"] == pytest.approx(np.nanmean(np.nanmean((sparse - dense)[0], axis=1)))


def test_pairs_that_are_identical_are_called_so(values):
    dense, _ = values
    for margins in ({}, {"m": 5.0}):
        row = summary(records(dense, "full"), records(dense, "sla2-90"), draws=2000, margins=margins)[
            "sla2-90", "m", None
        ]
        assert (row["verdict"], row["difference"], row["effect"]) == ("identical", 0.0, "")


def test_what_is_measured_of_layers_has_a_difference_and_no_verdict():
    made = [
        Record(study="hand", variant=name, metric="m", value=value + layer, layer=layer)
        for name, value in (("full", 1.0), ("sla2-90", 3.0))
        for layer in range(2)
    ]
    row = summary(made, draws=2000)["sla2-90", "m", None]
    assert (row["difference"], row["n_prompts"], row["verdict"]) == (2.0, 0, "")
    assert row["reason"] == "no interval: not measured per prompt"


def test_missing_values_are_counted_and_named(values):
    dense, sparse = values
    sparse[0, 2, 1] = np.nan
    row = summary(records(dense, "full"), records(sparse, "sla2-90"))["sla2-90", "m", None]
    assert (row["n_values"], row["n_undefined"]) == (17, 1)
    assert row["reason"].startswith("1 of 18 without a value: frames are flat")
    assert row["status"] == "ok"
    nothing = summary(records(np.full((1, 2, 2), np.nan), "full"))["full", "m", None]
    assert nothing["status"] == "not_available"
    assert nothing["mean"] is None
    assert nothing["reason"] == "frames are flat"


@pytest.mark.parametrize(
    ("reasons", "status"),
    [
        (("undefined: too short", "undefined: the frame is flat"), "undefined"),
        (("undefined: too short", "needs the weights"), "not_available"),
    ],
)
def test_a_mean_is_undefined_where_every_measurement_is(reasons, status):
    place = {"study": "hand", "variant": "full", "metric": "m", "value": None}
    made = [Record(reason=reason, prompt_id=f"p{i}", seed=0, **place) for i, reason in enumerate(reasons)]
    assert summary(made)["full", "m", None]["status"] == status


def test_layer_means_refuse_a_missing_layer():
    """A mean over the layers that happen to be there would compare different layers."""
    layers = [Record(study="hand", variant="full", metric="m", value=v, layer=i) for i, v in enumerate((1.0, 3.0))]
    assert summary(layers)["full", "m", None]["mean"] == 2.0
    layers[1] = replace(layers[1], value=None, reason="no such layer")
    assert summary(layers)["full", "m", None]["mean"] is None
    assert summary(layers)["full", "m", 0]["mean"] == 1.0


def test_training_seeds_are_paired_by_seed():
    dense = np.arange(12.0).reshape(2, 3, 2)
    once = [record for record in records(dense + 1, "sla2-90") if record.train_seed == 1]
    row = summary(records(dense, "full"), once)["sla2-90", "m", None]
    assert row["difference"] == pytest.approx(1.0)


def test_doubled_and_unknown_records_are_refused():
    one = records(np.ones((1, 1, 1)), "full")
    with pytest.raises(UserError, match="stand twice"):
        summary(one, one)
    with pytest.raises(UserError, match="the sheet has no such row"):
        summary(records(np.ones((1, 1, 1)), "gone"))


def test_small_study_has_every_table(study):
    for name in ("quality", "fidelity", "attention", "efficiency"):
        with (study / f"tables/{name}.csv").open() as file:
            assert tuple(next(csv.reader(file))) == COLUMNS
    found = TableSet(study / "tables")
    assert list(found.variants) == [row["variant"] for row in small_study.settings()["variants"]]
    expected = [r.value for r in read_records(study / "score/full.csv") if r.metric == "temporal_flickering"]
    assert found.metric("temporal_flickering")["full"]["mean"] == pytest.approx(np.mean(expected), rel=1e-8)
    assert found.missing("fidelity.psnr") == {"base": "not measured"}
    absent = found.missing("vbench.subject_consistency")
    assert set(absent.values()) == {"not available: needs the weights <dino>.pth"}


def test_ablation_table_holds_counts_verdicts_and_notes(study):
    with (study / "tables/ablation.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    for metric in small_study.HEADLINE:
        assert {metric, f"{metric}:low", f"{metric}:high", f"{metric}:n", f"{metric}:verdict"} <= set(rows["full"])
    assert rows["sla2-97"]["fidelity.psnr:n"] == "6"
    assert rows["full"]["fidelity.psnr:verdict"] == "reference"
    assert rows["base"]["fidelity.psnr"] == ""
    assert "fidelity.psnr: not measured" in rows["base"]["notes"]


def test_training_log_keeps_run_and_seed(study):
    rows = TableSet(study / "tables").rows("training")
    assert {row["train_seed"] for row in rows if row["run"] == "sla2-97"} == {0.0, 1.0}
    assert {row["run"] for row in rows if row["stage"] == "base_model"} == {"base"}


@pytest.mark.parametrize("key", ["headline", "margins"])
def test_unknown_metric_is_refused(study, tmp_path, monkeypatch, key):
    settings = small_study.settings() | {"headline": ["oracle.color"], "margins": {}}
    settings[key] = ["oracle.colour"] if key == "headline" else {"oracle.colour": 1.0}
    arguments = ["--settings", json.dumps(settings), "--base", str(study / "base_model/base_model.json")]
    arguments += ["--scores", str(study / "score/full.csv"), "--latency", str(study / "latency/latency.csv")]
    arguments += ["--validity", str(study / "score/validity.csv")]
    monkeypatch.setattr("sys.argv", ["tables", *arguments, "--output", str(tmp_path)])
    with pytest.raises(UserError, match=rf"report.{key}: 'oracle.colour' is in no record; choose from .*oracle.color"):
        tables.main()
    assert not list(tmp_path.iterdir())


def test_record_without_value_needs_a_reason(tmp_path):
    with pytest.raises(ValueError, match="needs a reason"):
        Record(study="s", variant="v", metric="m", value=None)
    kept = records(np.array([[[1.0, np.nan]]]), "full")
    write_records(tmp_path / "r.csv", kept)
    assert read_records(tmp_path / "r.csv") == kept


def test_what_vbench_measured_stands_beside_our_port():
    """An import and our own record of one video are two metrics, each with its own mean."""
    about = {"study": "s", "variant": "base", "prompt_id": "p1", "seed": 0}
    ours = Record(metric="vbench.temporal_flickering", value=0.9, **about)
    exact = Record(metric="temporal_flickering", value=0.8, **about)
    theirs = vbench_files.record({**about, "train_seed": None}, "temporal_flickering", 0.6)
    rows = summary([ours, exact, theirs], variants=[{"variant": "base", "finetune": False}])
    means = {metric: (row["mean"], row["n_train_seeds"]) for (_, metric, _), row in rows.items()}
    assert means == {
        "vbench.temporal_flickering": (0.9, 1),
        "temporal_flickering": (0.8, 1),
        "vbench_official.temporal_flickering": (0.6, 1),
    }


def test_a_row_that_was_not_trained_has_no_training_seed():
    """Else records of one video with seed 0 and with none would be averaged as two training runs."""
    one = records(np.ones((1, 2, 1)), "full")
    with pytest.raises(
        UserError, match="'full' m: training seed 0, but the sheet says that this row is not fine-tuned"
    ):
        summary(one, variants=[{"variant": "full", "finetune": False}])

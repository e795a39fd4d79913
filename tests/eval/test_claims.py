"""The paper's claims: each verdict from data made for it."""

import numpy as np
import pytest

from sla2.record import Record
from sla2_eval import claims

ROWS = ["full", "sla2-85", "sla2-97", "sla2-97-topk"]
SETTINGS = {
    "variants": [{"variant": name, "finetune": True} for name in ROWS],
    "headline": ["m"],
    "margins": {"m": 0.5},
    "draws": 2000,
    "confidence": 0.95,
    "seed": 0,
}


def records(shift: dict[str, float], noise: float = 0.1, **about) -> list[Record]:
    """Twelve prompts and two seeds of metric m for every row, moved by `shift`."""
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 3, (12, 2))
    made = []
    for name in ROWS:
        values = shared + shift.get(name, 0) + rng.normal(0, noise, shared.shape)
        made += [
            Record(
                study="hand", variant=name, metric="m", value=float(v), train_seed=0, prompt_id=f"p{p}", seed=s, **about
            )
            for (p, s), v in np.ndenumerate(values)
        ]
    return made


def verdicts(made: list[Record], **settings) -> dict[str, dict]:
    rows = claims.judge(made, SETTINGS | settings)
    assert all(tuple(row) == claims.COLUMNS for row in rows)
    return {row["claim"].split(" (")[0]: row for row in rows}


@pytest.mark.parametrize("higher", [True, False])
def test_superiority(higher):
    sign = 1 if higher else -1
    router = lambda shift, **more: verdicts(records({"sla2-97": sign * shift}, higher_is_better=higher, **more))  # noqa: E731
    better = router(2.0)["learned router over heuristic"]
    assert better["verdict"] == "reproduced"
    assert better["effect"] == pytest.approx(sign * 2, abs=0.2)
    assert better["ci_low"] < better["effect"] < better["ci_high"]
    assert router(-2.0)["learned router over heuristic"]["verdict"] == "reversed"
    assert router(0.0)["learned router over heuristic"]["verdict"] == "no difference"
    assert router(0.0, noise=5.0)["learned router over heuristic"]["verdict"] == "not resolved at n=12"


@pytest.mark.parametrize(
    ("loss", "noise", "verdict"),
    [(0.2, 0.1, "reproduced"), (-2.0, 0.1, "reproduced"), (2.0, 0.1, "reversed"), (0.5, 1.0, "not resolved at n=12")],
)
def test_closeness_is_non_inferiority_within_the_margin(loss, noise, verdict):
    found = verdicts(records({"sla2-97": -loss}, noise, higher_is_better=True))
    assert found["97% close to full"]["verdict"] == verdict


def test_what_cannot_be_said_says_why():
    made = records({}, higher_is_better=True)
    found = verdicts(made, margins={})
    assert found["97% close to full"]["verdict"] == "cannot: the study sets no margin for this metric"
    assert found["QAT over PTQ"]["verdict"] == "cannot: the study has no row sla2-97-ptq"
    assert found["QAT over PTQ"]["metric"] == ""
    assert found["SLA2 over SLA"]["verdict"] == "cannot: the study has no row sla2-95 and sla-95"
    without = [record for record in made if record.variant != "full"]
    assert verdicts(without)["97% close to full"]["verdict"] == "cannot: not measured for full"
    one = [record for record in made if record.prompt_id == "p0"]
    assert verdicts(one)["97% close to full"]["verdict"].startswith("cannot: no interval: fewer than two prompts")


def test_what_is_measured_of_layers_has_an_effect_and_no_interval():
    errors = {"sla2-97": 0.3, "full": 0.1}
    made = [
        Record(study="hand", variant=name, metric="m", value=value, layer=layer, higher_is_better=False)
        for name, value in errors.items()
        for layer in range(2)
    ]
    row = verdicts(made)["97% close to full"]
    assert row["effect"] == pytest.approx(0.2)
    assert row["verdict"] == "cannot: no interval: not measured per prompt"


def test_rows_that_are_identical_are_called_so():
    made = records({}, noise=0.0, higher_is_better=True)
    found = verdicts(made)
    assert found["97% close to full"]["verdict"] == "identical"
    assert found["learned router over heuristic"]["verdict"] == "identical"


def test_a_metric_without_direction_has_no_claims():
    assert all(row["metric"] == "" for row in claims.judge(records({}), SETTINGS))

"""Times of scoring: every metric is a row, what is computed together is timed together, and a spent budget is a reason."""

import time

import pytest
import torch

from sla2_eval import speed
from sla2_eval.metrics.catalogue import METRICS

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Networks that answer at once."""

    class Stand(torch.nn.Module):
        def encode_image(self, frames):
            return frames.mean((2, 3))

        def encode_text(self, tokens):
            return torch.ones(1, 3)

        def similarity(self, video, tokens):
            return torch.tensor([0.2])

        def forward(self, frames, *others):
            if others:
                return frames
            return frames.mean((2, 3)) if frames.ndim == 4 else frames

    monkeypatch.setattr(speed, "random_network", lambda key: Stand())


def test_clip_has_the_size_and_moves() -> None:
    video = speed.clip((3, 48, 64))
    assert video.shape == (3, 48, 64, 3)
    assert (video[0] != video[1]).mean() > 0.5


def test_every_metric_is_timed_once(small) -> None:
    rows = list(speed.measure(CPU, (5, 48, 64), None, time.monotonic() + 60, {}))
    names = [name for row in rows for name in row["metric"].split() if "(" not in row["metric"]]
    assert len(set(names)) == len(names)
    for name in ("temporal_flickering", "guard.blank", "oracle.all", "fidelity.ssim", "vbench.aesthetic_quality"):
        assert name in names
    assert set(names) <= set(METRICS)
    for row in rows:
        assert not row["seconds"] or row["videos_per_minute"] == pytest.approx(60 / row["seconds"])


def test_a_spent_budget_is_a_reason(small) -> None:
    rows = list(speed.measure(CPU, (5, 48, 64), None, time.monotonic() - 1, {}))
    assert rows[0]["metric"] == "(reading the file)"
    assert all("is spent" in row["reason"] and row["seconds"] is None for row in rows[1:])


def test_what_an_earlier_run_measured_is_kept(small, tmp_path) -> None:
    (tmp_path / "s.csv").write_text(
        "device,metric,seconds,videos_per_minute,reason\ncpu,temporal_flickering,7.5,8,\ncpu,vbench.imaging_quality,,,spent\n"
    )
    known = speed.measured_before(tmp_path / "s.csv")
    assert set(known) == {"temporal_flickering"}
    rows = {row["metric"]: row for row in speed.measure(CPU, (5, 48, 64), None, time.monotonic() - 1, known)}
    assert rows["temporal_flickering"]["seconds"] == 7.5

"""Distance of sets: nothing between equal sets, more the further apart, the same as torchmetrics where that applies."""

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.metrics.kid import kid


def draw(count: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


def test_equals_torchmetrics_for_sets_of_one_size() -> None:
    x, y = draw(20), draw(20, 0.5, 1)
    assert kid(x, y) == pytest.approx(float(poly_mmd(y, x)), rel=1e-4)


def test_has_no_bias_and_grows_with_the_distance() -> None:
    same = [kid(draw(6, seed=2 * run), draw(40, seed=2 * run + 1)) for run in range(200)]
    mean, error = torch.tensor(same).mean(), torch.tensor(same).std() / 200**0.5
    assert abs(mean) < 3 * error
    far = [kid(draw(40, shift), draw(40, seed=1)) for shift in (0.0, 0.3, 0.6, 1.2)]
    assert far == sorted(far)


def test_needs_two_videos_on_each_side() -> None:
    with pytest.raises(UndefinedError, match="got 1 and 40"):
        kid(draw(1), draw(40))

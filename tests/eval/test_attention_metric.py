import pytest
import torch

from sla2_eval.metrics.attention import attention_error


def test_equal_tensors() -> None:
    o = torch.randn(1, 2, 7, 3)
    assert attention_error(o, o) == pytest.approx({"attention.rel_l1": 0, "attention.rmse": 0, "attention.cosine": 1})


def test_values_by_hand() -> None:
    scores = attention_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0]))
    assert scores == pytest.approx({"attention.rel_l1": 0.5, "attention.rmse": 0.5**0.5, "attention.cosine": 0.5**0.5})


def test_scale_matters_to_rmse_only() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 4, dtype=torch.float64)
    once, tenfold = attention_error(a, b), attention_error(10 * a, 10 * b)
    assert tenfold["attention.rel_l1"] == pytest.approx(once["attention.rel_l1"])
    assert tenfold["attention.cosine"] == pytest.approx(once["attention.cosine"])
    assert tenfold["attention.rmse"] == pytest.approx(10 * once["attention.rmse"])


def test_refuses_other_shapes_and_a_zero_target() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        attention_error(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="zero everywhere"):
        attention_error(torch.ones(2), torch.zeros(2))

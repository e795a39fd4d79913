"""Fresh memory is NaN, so that an element that no kernel writes cannot pass."""

import pytest
import torch


def _poisoned(allocate):
    def fresh(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(77) if x.dtype != torch.bool else x

    return fresh


@pytest.fixture
def poison(monkeypatch):
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))

import os
import time

import numpy as np
import pytest
import torch

from sla2.errors import UserError
from sla2_eval import timing


def test_rounds_are_interleaved_and_warm_up_is_dropped() -> None:
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.interleaved_ms(functions, warmup=2, repeats=3, device=torch.device("cpu"))
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in times.values()] == [3, 3]


def test_measures_milliseconds() -> None:
    times = timing.interleaved_ms({"nap": lambda: time.sleep(0.02)}, warmup=0, repeats=5, device=torch.device("cpu"))
    assert 20 <= np.median(times["nap"]) < 60


def test_percentiles() -> None:
    assert timing.percentiles([float(k) for k in range(1, 12)]) == {"p20": 3.0, "p50": 6.0, "p80": 9.0}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"--query-compute-apps": ["4711, python, 9000 MiB"]}, "4711, python"),
        ({"--query-compute-apps": [], "--query-gpu": ["97"]}, "97% busy"),
    ],
)
def test_refuses_a_gpu_in_use(monkeypatch, answers, message) -> None:
    monkeypatch.setattr(timing, "_query", lambda what, index, *options: answers[what.split("=")[0]])
    with pytest.raises(UserError, match=message):
        timing.refuse_shared_gpu(torch.device("cuda", 0))


@pytest.mark.parametrize("listed", [[], [f"{os.getpid()}, python3, 520 MiB"]])
def test_accepts_a_gpu_that_is_free_but_for_this_process(monkeypatch, listed) -> None:
    answers = {"--query-compute-apps": listed, "--query-gpu": ["0"]}
    monkeypatch.setattr(timing, "_query", lambda what, index, *options: answers[what.split("=")[0]])
    timing.refuse_shared_gpu(torch.device("cuda", 0))


def test_visible_devices_name_the_gpu_that_is_asked(monkeypatch) -> None:
    asked = []

    def query(what, index, *options):
        asked.append(index)
        return ["0"] if "gpu=" in what else []

    monkeypatch.setattr(timing, "_query", query)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    timing.refuse_shared_gpu(torch.device("cuda", 1))
    assert set(asked) == {"5"}
    timing.refuse_shared_gpu(torch.device("cpu"))
    assert len(asked) == 2

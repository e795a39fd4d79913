"""The training loop: a run that is killed half-way and resumed equals an uninterrupted one, bit for bit."""

import pytest
import torch
from torch import nn

from sla2.checkpoint import Checkpoint
from sla2.errors import UserError
from sla2.flow import generator
from sla2.training import Log, batches, rate, train


class KilledError(Exception):
    """Stands for kill -9: nothing after it runs."""


def run(folder, steps=12, kill_at=None, identity=None):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    optimizers = [torch.optim.Muon([module[0].weight]), torch.optim.AdamW(module[2].parameters(), lr=1e-2)]
    order, log = batches(10, 3, seed=1), Log()

    def loss(step):
        if step == kill_at:
            raise KilledError
        draw = generator(1, step)
        x = torch.randn(3, 4, generator=draw) + torch.tensor(order(step))[:, None]
        yield module(x).square().mean()

    checkpoint = Checkpoint(folder, "run", identity or {"lr": 1e-2}, every=4)
    train("test", "test", module, optimizers, loss, steps, checkpoint, log, warmup=2, ema=0.9,
          validate=lambda step: log.add(step, "test", "heldout", "loss", 0.0), validate_every=5)  # fmt: skip
    return module.state_dict(), list(log)


@pytest.mark.parametrize("kill_at", [3, 4, 9, 11])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, kill_at):
    expected, expected_log = run(tmp_path / "a")
    with pytest.raises(KilledError):
        run(tmp_path / "b", kill_at=kill_at)
    found, log = run(tmp_path / "b")
    assert log == expected_log
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, kill_at=9)
    with pytest.raises(UserError, match="made with other settings; delete it"):
        run(tmp_path, identity={"lr": 2e-2})


def test_batches_visit_every_clip_once_an_epoch():
    order = batches(12, 4, seed=3)
    for epoch in range(3):
        seen = [index for step in range(3) for index in order(3 * epoch + step)]
        assert sorted(seen) == list(range(12))
    assert order(0) != order(3)


def test_rate_rises_then_falls():
    rates = [rate(step, 100, 10) for step in range(100)]
    assert rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.06

"""The training loop: a run that is killed half-way and resumed equals an uninterrupted one, bit for bit."""

import signal

import pytest
import torch
from torch import nn

from sla2.checkpoint import Checkpoint
from sla2.errors import UserError
from sla2.flow import generator
from sla2.training import Log, batches, rate, train


class KilledError(Exception):
    """Stands for kill -9: nothing after it runs."""


def run(folder, steps=12, kill_at=None, identity=None, at=lambda step: 0.0):
    """The run's weights and log; `at` is called in every step and adds to its loss."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    optimizers = [torch.optim.Muon([module[0].weight]), torch.optim.AdamW(module[2].parameters(), lr=1e-2)]
    order, log = batches(10, 3, seed=1), Log()

    def loss(step):
        if step == kill_at:
            raise KilledError
        draw = generator(1, step)
        x = torch.randn(3, 4, generator=draw) + torch.tensor(order(step))[:, None]
        yield module(x).square().mean() * (1 + at(step))

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


@pytest.fixture
def keyboard():
    """Ctrl-C as at a terminal; where tests run in the background it is ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def press_ctrl_c(step, when):
    if step == when:
        signal.raise_signal(signal.SIGINT)  # to this thread, so that two of them do not become one
    return 0.0


@pytest.mark.usefixtures("keyboard")
def test_ctrl_c_keeps_the_step_that_it_finds(tmp_path):
    expected, expected_log = run(tmp_path / "a")
    begun, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", at=lambda step: press_ctrl_c(step, 6))
    assert signal.getsignal(signal.SIGINT) is before
    found, log = run(tmp_path / "b", at=lambda step: begun.append(step) or 0.0)
    assert begun[0] == 7
    assert log == expected_log
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_an_ignored_ctrl_c_stays_ignored(tmp_path):
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        expected, _ = run(tmp_path / "a")
        found, _ = run(tmp_path / "b", at=lambda step: press_ctrl_c(step, 6))
    finally:
        signal.signal(signal.SIGINT, former)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("keyboard")
def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def at(step):
        press_ctrl_c(step, 6)
        return press_ctrl_c(step, 6)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, at=at)
    begun = []
    run(tmp_path, at=lambda step: begun.append(step) or 0.0)
    assert begun[0] == 4  # of the checkpoint before


def test_gradients_that_are_not_finite_end_the_run_and_not_its_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"test: the norm of the gradients of step 8 is nan; lower the learning rate"):
        run(tmp_path, at=lambda step: float("nan") if step == 7 else 0.0)
    begun = []
    run(tmp_path, at=lambda step: begun.append(step) or 0.0)
    assert begun[0] == 4


def test_a_finished_run_is_not_begun_again(tmp_path):
    expected, _ = run(tmp_path)
    begun = []
    found, _ = run(tmp_path, at=lambda step: begun.append(step) or 0.0)
    assert not begun
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


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

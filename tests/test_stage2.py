"""Stage 2: several processes train as one does, a resumed run as an uninterrupted one, and settings do what they say."""

import csv
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from training_run import ROW, fine_tune, make_base

from sla2 import checkpoint, training
from sla2.attention import AttentionSettings
from sla2.errors import UserError
from sla2.flow import noise_levels
from sla2.random_wan import random_transformer
from sla2.team import Team
from sla2.variant import Variant
from sla2.wan import install


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fine_tune(base, folder)
    return folder


def read_log(folder):
    with (folder / "log.csv").open(newline="") as file:
        return [(int(row["step"]), row["split"], float(row["value"])) for row in csv.DictReader(file)]


def read_weights(folder):
    model = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    return model | load_file(folder / "adapter.safetensors")


def start(base):
    return load_file(base.parent / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def assert_close(folder, alone):
    """Equal but for the order of sums."""
    log, expected_log = read_log(folder), read_log(alone)
    assert [row[:2] for row in log] == [row[:2] for row in expected_log]
    for (*_, value), (*_, wanted) in zip(log, expected_log, strict=True):
        assert value == pytest.approx(wanted, rel=1e-5)
    weights, expected = read_weights(folder), read_weights(alone)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # AdamW divides by the gradient's size, so a gradient of rounding size moves its weight by a share of the learning rate.
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_training_moves_the_weights(base, alone):
    trained = read_weights(alone)
    assert max(float((tensor - trained[name]).abs().max()) for name, tensor in start(base).items()) > 5e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(base, alone, tmp_path, parallel):
    fine_tune(base, tmp_path, processes=2, parallel=parallel)
    assert_close(tmp_path, alone)


def test_micro_batches_equal_one_batch(base, alone, tmp_path):
    fine_tune(base, tmp_path, micro_batch=0)
    assert_close(tmp_path, alone)


def killed(base, folder, monkeypatch, **changes):
    """Stage 2 that ends in its fourth step, after the checkpoint of the second."""
    steps = []

    def update(*arguments):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch:
        whole = training.update
        patch.setattr(training, "update", update)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(base, folder, **changes)
    assert not (folder / "adapter.safetensors").exists()


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base, alone, tmp_path, monkeypatch):
    killed(base, tmp_path, monkeypatch)
    fine_tune(base, tmp_path)
    assert (tmp_path / "log.csv").read_text() == (alone / "log.csv").read_text()
    expected = read_weights(alone)
    for name, tensor in read_weights(tmp_path).items():
        assert torch.equal(tensor, expected[name]), name
    assert not (tmp_path / ".checkpoint").exists()


def test_resumed_run_on_this_machines_device(base, tmp_path, monkeypatch):
    """On a GPU sums may come in another order: losses agree to a thousandth, weights to one step of the learning rate."""
    changes = {"device": "auto", "attention": {"block_q": 16, "block_k": 16}}
    fine_tune(base, tmp_path / "whole", **changes)
    killed(base, tmp_path / "killed", monkeypatch, **changes)
    fine_tune(base, tmp_path / "killed", **changes)
    for (*_, value), (*_, wanted) in zip(read_log(tmp_path / "killed"), read_log(tmp_path / "whole"), strict=True):
        assert value == pytest.approx(wanted, rel=1e-3)
    expected = read_weights(tmp_path / "whole")
    for name, tensor in read_weights(tmp_path / "killed").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=0)


def test_a_run_may_go_on_in_another_number_of_processes(base, alone, tmp_path, monkeypatch):
    killed(base, tmp_path, monkeypatch)
    fine_tune(base, tmp_path, processes=2, parallel="fsdp")
    assert_close(tmp_path, alone)


def test_checkpoint_without_room_is_one_line_and_keeps_the_former(base, tmp_path, monkeypatch):
    killed(base, tmp_path, monkeypatch)
    former = (tmp_path / ".checkpoint/stage2.safetensors").read_bytes()
    run = checkpoint.Checkpoint(tmp_path / ".checkpoint", "stage2", {}, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match=r"stage2.safetensors: needs .* GB, the disk has 0.0 GB free; free some space"):
        run.save(3, {"module": torch.nn.Linear(64, 64)}, [], {})
    assert (tmp_path / ".checkpoint/stage2.safetensors").read_bytes() == former


def test_best_weights_are_those_with_the_lowest_heldout_loss(base, tmp_path):
    """With a learning rate that spoils the model, the best weights are the ones that it began with."""
    fine_tune(base, tmp_path, lr=0.3, select="best")
    values = [value for _, split, value in read_log(tmp_path) if split == "heldout"]
    assert min(values) == values[0]
    trained = read_weights(tmp_path)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in start(base).items())


def test_every_block_is_compiled_in_place(base, tmp_path, monkeypatch):
    """In place: names of parameters stay. Compiled kernels themselves need a GPU (`sla2.training_cost --compile`)."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, dynamic: compiled.append(block))
    fine_tune(base, tmp_path, compile=True, steps=1, checkpoint_every=9, validate_every=9)
    assert [type(block).__name__ for block in compiled] == ["WanTransformerBlock"] * 2


@pytest.mark.parametrize(("trainable", "part"), [("adapter", None), ("attention", ".attn1.")])
def test_only_what_is_trainable_moves(base, tmp_path, trainable, part):
    fine_tune(base, tmp_path, trainable=trainable, ema=0.0)
    trained = read_weights(tmp_path)
    moved = {name for name, tensor in start(base).items() if not torch.equal(tensor, trained[name])}
    assert all(part and part in name for name in moved)
    assert bool(moved) == bool(part)
    assert not torch.equal(trained["blocks.0.attn1.processor.attention.mixing.logit"], torch.full((2, 4), 2.0))


def test_alpha_can_begin_elsewhere(base, tmp_path):
    fine_tune(base, tmp_path, alpha=0.8, lr_mixing=1e-6)
    logits = [x for name, x in read_weights(tmp_path).items() if name.endswith("mixing.logit")]
    assert len(logits) == 2
    for logit in logits:
        torch.testing.assert_close(torch.sigmoid(logit), torch.full_like(logit, 0.8), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("select", "processes"), [("last", 1), ("best", 1), ("last", 2)])
def test_a_row_in_which_nothing_learns_keeps_its_weights(base, tmp_path, capfd, select, processes):
    row = {"variant": "full", "attention": "full", "router": "none", "mixing": "none", "quantization": "none"}
    row = ROW | row | {"sparsity": 0.0}
    fine_tune(base, tmp_path, processes, variant=row, trainable="adapter", select=select)
    if processes == 1:  # others may write where an earlier test's stderr went
        assert "stage2 full: stage2.trainable adapter: nothing of this row learns" in capfd.readouterr().err
    assert [(step, split) for step, split, _ in read_log(tmp_path)] == [(0, "heldout")]
    kept = load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in start(base).items())


def test_distillation_of_the_dense_model_itself_is_nearly_free_of_loss(base, alone, tmp_path):
    """Random weights attend nearly evenly, so the dense velocity is almost the sparse one, and far from the data's."""
    fine_tune(base, tmp_path, loss="distill", steps=1, checkpoint_every=9)
    assert read_log(tmp_path)[1][2] < 0.05 * read_log(alone)[1][2]


def wan_with(quantization):
    variant = Variant.from_row(ROW | {"quantization": quantization})
    torch.manual_seed(0)
    transformer = random_transformer("tiny", torch.device("cpu"))
    install(transformer, variant, AttentionSettings(block_q=8, block_k=4), 32)
    transformer.enable_gradient_checkpointing()
    return transformer


def velocity(transformer, training):
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 2, 8, 8, generator=draw), torch.randn(1, 8, 16, generator=draw)
    with torch.set_grad_enabled(training):
        return transformer.train(training)(x, torch.tensor([700.0]), text, return_dict=False)[0].detach()


def test_quantisation_aware_training_runs_what_inference_runs_bit_for_bit():
    """In the whole model, with activations formed again in the backward; post-training quantisation meets it at inference only."""
    exact, aware, post = (wan_with(word) for word in ("none", "qat-int8", "ptq-int8"))
    assert torch.equal(velocity(aware, training=True), velocity(aware, training=False))
    assert not torch.equal(velocity(aware, training=True), velocity(exact, training=True))
    assert torch.equal(velocity(post, training=True), velocity(exact, training=True))
    assert torch.equal(velocity(post, training=False), velocity(aware, training=False))


def test_a_kernel_that_is_missing_stops_training(base, tmp_path):
    """No other precision, and no other backend, in its place."""
    row, attention = ROW | {"quantization": "qat-int8"}, {"block_q": 32, "block_k": 32, "backend": "triton"}
    with pytest.raises(ValueError, match=r"backend triton serves CUDA tensors, this one is on cpu"):
        fine_tune(base, tmp_path, variant=row, attention=attention)


def test_tensorboard_gets_every_row_of_the_log_or_names_the_package(tmp_path, monkeypatch):
    class Writer(list):
        def __init__(self, folder):
            self.append(folder)

        def add_scalar(self, *scalar):
            self.append(scalar)

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = training.Log(tmp_path)
    log.add(3, "stage2", "heldout", "loss", 0.5)
    log.time(3, "stage2", 1.5, 0.1, None)
    assert log.writer == [str(tmp_path), ("stage2/heldout/loss", 0.5, 3), ("stage2/seconds", 1.5, 3)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard: true: the package is absent; `pip install tensorboard`"):
        training.Log(tmp_path)


def test_a_batch_that_cannot_be_shared_is_refused():
    team = Team(torch.device("cpu"), rank=0, size=3)
    with pytest.raises(UserError, match="4 clips cannot be shared by 3 processes"):
        team.share(4)


@pytest.mark.parametrize(("law", "middle"), [("uniform", 0.75), ("logit_normal", 0.75), ("edm", 0.8176)])
def test_noise_levels_rise_with_their_uniform_number(law, middle):
    levels = noise_levels(torch.linspace(0.001, 0.999, 999), law, 3.0)
    assert levels[499].item() == pytest.approx(middle, abs=1e-4)
    assert (levels.diff() > 0).all()
    assert 0 < levels[0] < 0.15
    assert 0.95 < levels[-1] < 1

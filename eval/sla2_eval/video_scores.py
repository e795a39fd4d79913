"""All metrics of one video, and for each that has no value the reason."""

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sla2 import grammar, render
from sla2.prompts import Prompt
from sla2_eval.metrics.fidelity import fidelity
from sla2_eval.metrics.flicker import temporal_flickering
from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.metrics.guards import guards
from sla2_eval.metrics.kid import kid
from sla2_eval.metrics.motion import dynamic_degree, motion_smoothness
from sla2_eval.metrics.oracle import Oracle
from sla2_eval.official import Official
from sla2_eval.promises import is_sentence, promised
from sla2_eval.trained_judge import (
    ATTRIBUTES,
    gate_failure,
    load_features,
    load_judge,
    load_naturalness,
    swapped,
)

FLICKER, STATIC = "temporal_flickering", "temporal_flickering_static"
GUARDS = ("guard.static", "guard.blank", "guard.saturated", "guard.not_finite", "guard.size")
SMOOTHNESS = ("proxy.motion_smoothness_dis", "proxy.interp_gain")
DYNAMIC = ("proxy.dynamic_degree_dis", "proxy.flow_top5")
NATURALNESS = "proxy.naturalness_niqe_indomain"
FIDELITY = ("fidelity.psnr", "fidelity.psnr_pooled", "fidelity.ssim")
ALIGNMENT, CONSISTENCY = "proxy.text_alignment_clip_indomain", "proxy.frame_consistency_clip_indomain"
RETRIEVAL = "proxy.retrieval_r1_clip_indomain"
KID = "proxy.kid_indomain"
NO_JUDGE = "needs a judge that was trained in the domain of these videos; name its folder"
NO_PROMPTS = "no prompts were given"
NO_SPEEDS = (
    "needs a judge of procedural scenes, in whose folder stands how fast each word is; an older one is made again"
)
ONE_TEXT = "fewer than two of the prompts are texts that the judge can read"
# What a prompt must promise for a metric beside those of one attribute, and how that is called.
PROMISES = {
    "oracle.speed": ("speed",),
    "oracle.velocity_error": ("direction", "speed"),
    "oracle.count": ("count",),
    "oracle.count_error": ("count",),
    STATIC: ("static",),
}
CALLED = {"count": "number of things", "static": "static scene"}
MASK_SIDE = 128  # of the canonical shapes; the oracle scales them down


class Measured(NamedTuple):
    """One metric of one video; `value` is None where `reason` says why."""

    metric: str
    value: float | None
    backend: str
    reason: str = ""


class VideoScores:
    """The metrics of a set of videos.

    Args:
        video: frames, height, width and fps that were asked for; None where nothing was, as for a folder of any videos.
        judge: folder of the judge step; None leaves out what is trained in the study's own domain.
        prompts: what the videos were made from; what none of them promises is not measured.
        device: of networks and of fidelity; all else works on the CPU.
        official: metrics that need published weights.
        wanted: names to measure; None for all.
    """

    def __init__(
        self,
        video: dict | None,
        judge: Path | None,
        prompts: list[Prompt],
        device: torch.device,
        official: Official | None = None,
        wanted: set[str] | None = None,
    ) -> None:
        self.size = (video["frames"], video["height"], video["width"]) if video else None
        # Which words: few sets, however many prompts there are.
        self.promises = {frozenset(promised(prompt)) for prompt in prompts}
        self.promised = [name for name in ATTRIBUTES if any(name in promise for promise in self.promises)]
        self.texts = sorted({prompt.text for prompt in prompts})
        self.official = official or Official({}, device)
        self.wanted, self.has_prompts, self.device = wanted, bool(prompts), device
        torch.backends.cudnn.allow_tf32 = False  # SSIM is made of convolutions
        self.naturalness = load_naturalness(judge) if judge else None
        self.of_judge = judge
        self.judge, self.gates = load_judge(judge, device) if judge else (None, {"reason": NO_JUDGE})
        self.oracle = Oracle(grammar.COLORS, canonical_masks(), grammar.DIRECTIONS, speeds=self.gates.get("speeds", {}))

    def absent(self) -> dict[str, str]:
        """Reason by metric, for metrics that none of these videos can have."""
        reasons = self.official.absent()
        if not self.has_prompts:
            reasons |= dict.fromkeys(self.official.of_text, NO_PROMPTS)
        if self.size is None:
            reasons["guard.size"] = "no size was asked for"
        if not self.promised:
            reasons |= dict.fromkeys(("oracle.presence", "oracle.all"), "no prompt says what its video must show")
        for name in ATTRIBUTES:
            if name not in self.promised:
                reasons |= dict.fromkeys((f"oracle.{name}", f"judge.{name}"), f"no prompt promises a {name}")
            elif failure := gate_failure(self.gates, name):
                reasons[f"judge.{name}"] = failure
        for name, needed in PROMISES.items():
            if not any(promise >= set(needed) for promise in self.promises):
                called = " and a ".join(CALLED.get(word, word) for word in needed)
                reasons[name] = f"no prompt promises a {called}"
            elif "speed" in needed and not self.oracle.speeds:
                reasons[name] = NO_SPEEDS
        if failure := gate_failure(self.gates):
            reasons |= dict.fromkeys((ALIGNMENT, RETRIEVAL, CONSISTENCY, KID), failure)
        elif not self.has_prompts:
            reasons |= dict.fromkeys((ALIGNMENT, RETRIEVAL), NO_PROMPTS)
        elif self._wants(RETRIEVAL) and len(self._texts[0]) < 2:
            reasons[RETRIEVAL] = ONE_TEXT
        if self.naturalness is None:
            reasons[NATURALNESS] = NO_JUDGE
        return {name: reason for name, reason in reasons.items() if self._wants(name)}

    def of(
        self, frames: Tensor, prompt: Prompt | None, reference: Tensor | None, fps: float, path: Path
    ) -> Iterator[Measured]:
        """Measure one video.

        Args:
            frames: (T, H, W, 3) uint8.
            prompt: its prompt; None where there is none.
            reference: the dense model's video of the same noise; None leaves fidelity out.
            fps: frames per second.
            path: the file, for a judge that is another program.
        """
        absent = self.absent()
        for names, backend, compute in self._families(frames.numpy(), prompt, reference, fps, path):
            names = [name for name in names if self._wants(name) and name not in absent]
            if names:
                yield from measure(names, backend, compute)

    def of_set(self, videos: Iterable[Tensor]) -> Iterator[Measured]:
        """Measure videos (T, H, W, 3), uint8, together."""
        if self.takes_part:
            yield from of_features([self.feature(frames) for frames in videos], self.of_judge, self.device)

    @property
    def takes_part(self) -> bool:
        """Whether what is measured of videos together is wanted, and can be had."""
        return self._wants(KID) and KID not in self.absent()

    def feature(self, frames: Tensor) -> Tensor:
        """What a video (T, H, W, 3), uint8, is among others: its embedding (E,) by the judge."""
        return self.judge.embed_video(frames.numpy()).cpu()

    def _wants(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def _families(self, frames: np.ndarray, prompt: Prompt | None, reference: Tensor | None, fps: float, path: Path):
        """Metrics that are computed together: their names, what computes them, and the call."""
        numpy, opencv = "numpy/cpu", f"opencv-{importlib.metadata.version('opencv-python-headless')}/cpu"
        promise = promised(prompt) if prompt else {}
        keeps = [name for name, needed in PROMISES.items() if promise.keys() >= set(needed)]
        flickering = [FLICKER, *(name for name in keeps if name == STATIC)]
        yield flickering, numpy, lambda: dict.fromkeys(flickering, temporal_flickering(frames))
        yield GUARDS, numpy, lambda: guards(frames, self.size)
        yield SMOOTHNESS, opencv, lambda: motion_smoothness(frames)
        yield DYNAMIC, opencv, lambda: dynamic_degree(frames, fps)
        yield [NATURALNESS], numpy, lambda: {NATURALNESS: self.naturalness(frames)}
        if reference is not None:
            torchmetrics = f"torchmetrics-{importlib.metadata.version('torchmetrics')}/{self.device.type}"
            yield FIDELITY, torchmetrics, lambda: fidelity(frames, reference.numpy(), self.device)
        words = [name for name in ATTRIBUTES if name in promise]
        names = ["oracle.presence", "oracle.all", *(f"oracle.{name}" for name in words)] if words else []
        names += [name for name in keeps if name.startswith("oracle.")]
        if names:
            yield names, opencv, lambda: self.oracle(frames, promise, fps)
        yield from self._judged(frames, prompt, words)
        yield from self.official.families(frames, prompt.text if prompt else None, fps, path)

    def _judged(self, frames: np.ndarray, prompt: Prompt | None, words: list[str]):
        if self.judge is None:
            return
        backend = judge_backend(self.device)
        if prompt is not None:
            yield [ALIGNMENT], backend, lambda: {ALIGNMENT: self.judge.text_alignment(frames, prompt.text)}
            yield [RETRIEVAL], backend, lambda: {RETRIEVAL: self._retrieved(frames, prompt.text)}
        yield [CONSISTENCY], backend, lambda: {CONSISTENCY: self.judge.frame_consistency(frames)}
        for name in words:
            yield [f"judge.{name}"], backend, partial(self._choice, frames, prompt, name)

    @cached_property
    def _texts(self) -> tuple[list[str], Tensor]:
        """Distinct texts of all prompts that the judge can read, and their embeddings: in one batch, whatever is scored first."""
        texts = [text for text in self.texts if self.judge.vocabulary.reads(text)]
        return texts, self.judge.embed_texts(texts) if texts else torch.empty(0)

    def _retrieved(self, frames: np.ndarray, text: str) -> float:
        texts, embeddings = self._texts
        return self.judge.retrieval(frames, text, embeddings[[other != text for other in texts]])

    def _choice(self, frames: np.ndarray, prompt: Prompt, name: str) -> dict[str, float]:
        if not is_sentence(prompt):
            raise UndefinedError(
                f"the prompt is not the grammar's sentence for its attributes, so no {name} can be swapped"
            )
        others = swapped(prompt.attributes, name, self.gates["choices"][name])
        return {f"judge.{name}": self.judge.forced_choice(frames, prompt.text, others)}


def canonical_masks() -> dict[str, np.ndarray]:
    """Upright mask (MASK_SIDE, MASK_SIDE) of every shape that the renderer can draw."""
    axis = torch.linspace(-1.3, 1.3, MASK_SIDE)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    return {name: (distance(u, v) < 0).numpy() for name, distance in render.DISTANCES.items()}


def judge_backend(device: torch.device) -> str:
    return f"open_clip-{importlib.metadata.version('open-clip-torch')}/{device.type}"


def of_features(features: list[Tensor], judge: Path, device: torch.device) -> Iterator[Measured]:
    """What is measured of videos together, from the feature of each; `device` is where these were computed."""

    def distance() -> dict[str, float]:
        if len(features) < 2:
            raise UndefinedError(f"a distance of sets needs two videos, got {len(features)}")
        return {KID: kid(torch.stack(features), load_features(judge))}

    yield from measure([KID], judge_backend(device), distance)


def measure(names, backend: str, compute: Callable[[], dict]) -> Iterator[Measured]:
    """Values of these metrics; the reason of one that has none, or one reason for all of them."""
    try:
        values = compute()
    except UndefinedError as undefined:
        values = dict.fromkeys(names, undefined)
    for name in names:
        value = values[name]
        if isinstance(value, UndefinedError):
            yield Measured(name, None, backend, f"undefined: {value}")
        else:
            yield Measured(name, value, backend)

"""All metrics of one video: families that share a computation, what they need, and why one may have no value."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
from torch import Tensor

from sla2 import scenes
from sla2.prompts import Prompt
from sla2_eval.judge import gate_failure, load_judge, load_naturalness
from sla2_eval.metrics.fidelity import fidelity
from sla2_eval.metrics.flicker import temporal_flickering
from sla2_eval.metrics.frames import Undefined
from sla2_eval.metrics.guards import guards
from sla2_eval.metrics.motion import dynamic_degree, motion_smoothness
from sla2_eval.metrics.oracle import Oracle

ATTRIBUTES = ("color", "shape", "direction")


@dataclass(frozen=True)
class Video:
    """What the metrics of one video may look at.

    Args:
        frames: (T, H, W, 3) uint8.
        prompt: text and promised attributes.
        reference: the dense model's video of the same noise; None where there is none.
    """

    frames: Tensor
    prompt: Prompt
    reference: Tensor | None


@dataclass(frozen=True)
class Family:
    """Metrics that come out of one computation.

    Args:
        names: the metrics, as far as the video's prompt asks for them.
        backend: what computes them.
        compute: values by name; a name that is missing from the answer is undefined for this video.
    """

    names: Callable[[Video], list[str]]
    backend: str
    compute: Callable[[Video], dict[str, float]]


class VideoScores:
    """The metrics of a study.

    Args:
        settings: config section `score`, and video.
        judge: folder of the judge step.
        promised: attributes that any prompt of the study promises.
        is_reference: whether the scored videos are the reference of fidelity themselves.
        device: of the judge; all else works on the CPU.
    """

    def __init__(self, settings: dict, judge: Path, promised: set[str], is_reference: bool, device: torch.device) -> None:
        video = settings["video"]
        self.size = (video["frames"], video["height"], video["width"])
        self.fps = video["fps"]
        self.is_reference = is_reference
        self.promised = [name for name in ATTRIBUTES if name in promised]
        self.naturalness = load_naturalness(judge)
        self.judge, self.gates = load_judge(judge, device)
        self.oracle = Oracle(scenes.COLORS, {name: scenes.shape_mask(name, 96) for name in scenes.SHAPES}, scenes.DIRECTIONS)
        self.device = device.type

    def missing(self) -> dict[str, str]:
        """Metrics that no video of this variant can have, with the reason: one row each."""
        reasons = {}
        if self.is_reference:
            reasons |= dict.fromkeys(FIDELITY, "these videos are the reference of fidelity")
        if not self.promised:
            reasons |= dict.fromkeys(("oracle.presence", "oracle.all"), "no prompt says what its video must show")
        for name in ATTRIBUTES:
            if name not in self.promised:
                reasons |= dict.fromkeys((f"oracle.{name}", f"judge.{name}"), f"no prompt promises a {name}")
            elif failure := gate_failure(self.gates, name):
                reasons[f"judge.{name}"] = failure
        if failure := gate_failure(self.gates):
            reasons |= dict.fromkeys((TEXT_ALIGNMENT, FRAME_CONSISTENCY), failure)
        return reasons

    def families(self) -> list[Family]:
        """What is computed on every video."""
        absent = self.missing()
        found = [
            Family(lambda v: ["temporal_flickering"], "numpy/cpu", lambda v: {"temporal_flickering": temporal_flickering(v.frames)}),
            Family(lambda v: [f"guard.{name}" for name in GUARDS], "numpy/cpu", lambda v: guards(v.frames, self.size)),
            Family(lambda v: SMOOTHNESS, OPENCV, lambda v: motion_smoothness(v.frames)),
            Family(lambda v: DYNAMIC, OPENCV, lambda v: dynamic_degree(v.frames, self.fps)),
            Family(lambda v: [NATURALNESS], "numpy/cpu", lambda v: {NATURALNESS: self.naturalness(v.frames)}),
        ]
        if not self.is_reference:
            backend = f"torchmetrics-{importlib.metadata.version('torchmetrics')}/cpu"
            found.append(Family(lambda v: FIDELITY, backend, _fidelity))
        if self.promised:
            found.append(Family(_oracle_names, OPENCV, lambda v: self.oracle(v.frames, v.prompt.attributes)))
        backend = f"open_clip-{importlib.metadata.version('open-clip-torch')}/{self.device}"
        if TEXT_ALIGNMENT not in absent:
            found.append(Family(lambda v: [TEXT_ALIGNMENT, FRAME_CONSISTENCY], backend, self._judge_scores))
        gated = [name for name in self.promised if f"judge.{name}" not in absent]
        if gated:
            asked = lambda v: [name for name in gated if name in v.prompt.attributes]  # noqa: E731
            found.append(
                Family(
                    lambda v: [f"judge.{name}" for name in asked(v)],
                    backend,
                    lambda v: {f"judge.{name}": self._forced_choice(v, name) for name in asked(v)},
                )
            )
        return found

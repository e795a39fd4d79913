"""All metrics of one video, and for each that has no value the reason."""

import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
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
from sla2_eval.metrics.motion import dynamic_degree, motion_smoothness
from sla2_eval.metrics.oracle import Oracle
from sla2_eval.official import unavailable
from sla2_eval.trained_judge import ATTRIBUTES, gate_failure, load_judge, load_naturalness, swapped

FLICKER = "temporal_flickering"
GUARDS = ("guard.static", "guard.blank", "guard.saturated", "guard.not_finite", "guard.size")
SMOOTHNESS = ("proxy.motion_smoothness_dis", "proxy.interp_gain")
DYNAMIC = ("proxy.dynamic_degree_dis", "proxy.flow_top5")
NATURALNESS = "proxy.naturalness_niqe_indomain"
FIDELITY = ("fidelity.psnr", "fidelity.psnr_pooled", "fidelity.ssim")
ALIGNMENT, CONSISTENCY = "proxy.text_alignment_clip_indomain", "proxy.frame_consistency_clip_indomain"
MASK_SIDE = 128  # of the canonical shapes; the oracle scales them down


class Measured(NamedTuple):
    """One metric of one video; `value` is None where `reason` says why."""

    metric: str
    value: float | None
    backend: str
    reason: str = ""


class VideoScores:
    """The metrics of a study.

    Args:
        settings: `video` is read: frames, height, width, fps.
        judge: folder of the judge step.
        prompts: the study's prompts; what none of them promises is not measured.
        device: of the judge; all else works on the CPU.
    """

    def __init__(self, settings: dict, judge: Path, prompts: list[Prompt], device: torch.device) -> None:
        video = settings["video"]
        self.size, self.fps = (video["frames"], video["height"], video["width"]), video["fps"]
        self.promised = [name for name in ATTRIBUTES if any(name in prompt.attributes for prompt in prompts)]
        self.oracle = Oracle(grammar.COLORS, canonical_masks(), grammar.DIRECTIONS)
        self.naturalness = load_naturalness(judge)
        self.judge, self.gates = load_judge(judge, device)
        self.judge_backend = f"open_clip-{importlib.metadata.version('open-clip-torch')}/{device.type}"

    def absent(self) -> dict[str, str]:
        """Reason by metric, for metrics that no video of this study can have."""
        reasons = unavailable()
        if not self.promised:
            reasons |= dict.fromkeys(("oracle.presence", "oracle.all"), "no prompt says what its video must show")
        for name in ATTRIBUTES:
            if name not in self.promised:
                reasons |= dict.fromkeys((f"oracle.{name}", f"judge.{name}"), f"no prompt promises a {name}")
            elif failure := gate_failure(self.gates, name):
                reasons[f"judge.{name}"] = failure
        if failure := gate_failure(self.gates):
            reasons |= dict.fromkeys((ALIGNMENT, CONSISTENCY), failure)
        return reasons

    def of(self, frames: Tensor, prompt: Prompt, reference: Tensor | None) -> Iterator[Measured]:
        """Measure one video.

        Args:
            frames: (T, H, W, 3) uint8.
            prompt: its prompt.
            reference: the dense model's video of the same noise; None leaves fidelity out.
        """
        frames = frames.numpy()
        numpy, opencv = "numpy/cpu", f"opencv-{importlib.metadata.version('opencv-python-headless')}/cpu"
        torchmetrics = f"torchmetrics-{importlib.metadata.version('torchmetrics')}/cpu"
        yield from _measure([FLICKER], numpy, lambda: {FLICKER: temporal_flickering(frames)})
        yield from _measure(GUARDS, numpy, lambda: guards(frames, self.size))
        yield from _measure(SMOOTHNESS, opencv, lambda: motion_smoothness(frames))
        yield from _measure(DYNAMIC, opencv, lambda: dynamic_degree(frames, self.fps))
        yield from _measure([NATURALNESS], numpy, lambda: {NATURALNESS: self.naturalness(frames)})
        if reference is not None:
            yield from _measure(FIDELITY, torchmetrics, lambda: fidelity(frames, reference.numpy()))
        promised = {name: prompt.attributes[name] for name in self.promised if name in prompt.attributes}
        if promised:
            names = ("oracle.presence", "oracle.all", *(f"oracle.{name}" for name in promised))
            yield from _measure(names, opencv, lambda: self.oracle(frames, promised))
        yield from self._judged(frames, prompt, promised)

    def _judged(self, frames: np.ndarray, prompt: Prompt, promised: dict[str, str]) -> Iterator[Measured]:
        if gate_failure(self.gates) is None:
            scores = {
                ALIGNMENT: lambda: self.judge.text_alignment(frames, prompt.text),
                CONSISTENCY: lambda: self.judge.frame_consistency(frames),
            }
            for name, score in scores.items():
                yield from _measure([name], self.judge_backend, lambda name=name, score=score: {name: score()})
        for name in promised:
            if gate_failure(self.gates, name) is None:
                choice = partial(self._choice, frames, prompt, name)
                yield from _measure([f"judge.{name}"], self.judge_backend, choice)

    def _choice(self, frames: np.ndarray, prompt: Prompt, name: str) -> dict[str, float]:
        if grammar.caption(prompt.attributes) != prompt.text:
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


def _measure(names, backend: str, compute: Callable[[], dict[str, float]]) -> Iterator[Measured]:
    """Values of these metrics, or one reason for all of them."""
    try:
        values, reason = compute(), "undefined for this video: see the metric's card"
    except UndefinedError as undefined:
        values, reason = {}, f"undefined: {undefined}"
    for name in names:
        value = values.get(name)
        yield Measured(name, value, backend, "" if value is not None else reason)

"""Official metrics, by the weight files that they were published with: found by path, checked by SHA-256, loaded from safetensors.

A metric whose files are not named is not available, with the file to fetch; a file with another hash stops the run. Nothing is
fetched, and nothing is unpickled: `eval/README.md` has the one-line conversion of a published checkpoint.
"""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sla2.errors import UserError
from sla2.files import sha256_file
from sla2_eval.metrics import vbench
from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.networks.amt import load_amt
from sla2_eval.networks.clip import NAMES as CLIPS
from sla2_eval.networks.clip import load_aesthetic_head, load_clip
from sla2_eval.networks.dino import load_dino
from sla2_eval.networks.musiq import load_musiq
from sla2_eval.networks.raft import load_raft, speeds
from sla2_eval.networks.viclip import load_viclip, tokenise

FILES = {
    "clip_vit_b32": "ViT-B-32.pt",
    "clip_vit_l14": "ViT-L-14.pt",
    "laion_aesthetic": "sa_0_4_vit_l_14_linear.pth",
    "dino_vitb16": "dino_vitbase16_pretrain.pth",
    "raft_things": "raft-things.pth",
    "musiq_spaq": "musiq_spaq_ckpt-358bb6af.pth",
    "viclip": "ViClip-InternVid-10M-FLT.pth",
    "amt_s": "amt-s.pth",
}
NEEDS = {
    "vbench.imaging_quality": ("musiq_spaq",),
    "vbench.aesthetic_quality": ("clip_vit_l14", "laion_aesthetic"),
    "vbench.overall_consistency": ("viclip",),
    "vbench.motion_smoothness": ("amt_s",),
    "vbench.subject_consistency": ("dino_vitb16",),
    "vbench.background_consistency": ("clip_vit_b32",),
    "vbench.dynamic_degree": ("raft_things",),
    "vbench.temporal_flickering": ("raft_things",),
    "clip_score.vit_b32": ("clip_vit_b32",),
    "clip_score.vit_l14": ("clip_vit_l14",),
}
LOADERS = {
    "laion_aesthetic": load_aesthetic_head,
    "dino_vitb16": load_dino,
    "raft_things": load_raft,
    "musiq_spaq": load_musiq,
    "viclip": load_viclip,
    "amt_s": load_amt,
}
VISION_REWARD = "vision_reward"  # a metric and a key of its own: a command of the user's
NO_COMMAND = "not available: needs a command that runs THUDM/VisionReward-Video (as `vision_reward`)"


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file and the SHA-256 that it must have."""

    path: Path
    sha256: str

    @property
    def identity(self) -> str:
        """What a result that used this depends on."""
        return self.sha256


@dataclass(frozen=True)
class Command:
    """A program that judges videos; `eval/README.md` has the contract."""

    words: tuple[str, ...]

    @property
    def identity(self) -> str:
        """What a result that used this depends on, as far as it can be known."""
        return " ".join(self.words)


def weight_files(section: Mapping[str, Mapping[str, str]], where: str) -> dict[str, WeightFile | Command]:
    """Weight files of a config section `{key: {path, sha256}}`, checked.

    Args:
        section: as written by the user.
        where: file and section, for messages.

    Raises:
        UserError: for an unknown key, a missing file, another format, or another hash, by name.
    """
    found: dict[str, WeightFile | Command] = {}
    for key, entry in section.items():
        if key == VISION_REWARD:
            found[key] = _command(entry, where)
            continue
        if key not in FILES:
            raise UserError(f"{where}: no weights are called '{key}'; choose from {', '.join((*FILES, VISION_REWARD))}")
        if not isinstance(entry, Mapping) or set(entry) != {"path", "sha256"}:
            raise UserError(f"{where}: {key}: give `path` and `sha256`")
        path = Path(entry["path"])
        if path.suffix != ".safetensors":
            raise UserError(f"{where}: {key}: {path} is not a .safetensors file; eval/README.md says how to convert it")
        if not path.is_file():
            raise UserError(f"{where}: {key}: {path}: no such file; convert {FILES[key]} to it")
        digest = sha256_file(path)
        if digest != str(entry["sha256"]).lower():
            raise UserError(f"{where}: {key}: {path} has SHA-256 {digest}, not {entry['sha256']}; fetch it again")
        found[key] = WeightFile(path, digest)
    return found


def _command(entry: object, where: str) -> Command:
    words = shlex.split(entry["command"]) if isinstance(entry, Mapping) and set(entry) == {"command"} else []
    if not words:
        raise UserError(f"{where}: {VISION_REWARD}: give `command`, a program and its options")
    if shutil.which(words[0]) is None:
        raise UserError(f"{where}: {VISION_REWARD}: '{words[0]}' is no program on PATH; give its path")
    return Command(tuple(words))


class Judge:
    """Card: `vision_reward`, external.

    Definition: weighted answers of a language model to 29 questions about the video, as a program of the user's gives them.
    Formula: mean_i(w_i a_i), a_i = 1 for yes and else -1, w_i the published weights.
    Range: [-0.21645, 0.21645]. Direction: higher is better.
    Source: THUDM/VisionReward-Video; the contract is one JSON line `{"video", "prompt"}` in and one JSON line `{"score"}` or `{"error"}` out,
        in order.
    Weights: the program's own.
    UndefinedError: when the program says so, ends, or answers something else.
    Blind spots: sees one frame a second, 6 of 81 at 16 fps; one flipped answer moves it by up to 0.079; frames and rate depend on the
        file's frame rate.
    """

    def __init__(self, command: Command) -> None:
        self.process = subprocess.Popen(command.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, path: Path, prompt: str) -> float:
        """Score of one video.

        Raises:
            UndefinedError: when the program says so, ends, or answers something else.
        """
        try:
            print(json.dumps({"video": str(path.resolve()), "prompt": prompt}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise UndefinedError("the command of vision_reward has ended") from None
        line = self.process.stdout.readline()
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise UndefinedError(f"the command of vision_reward says: {answer['error']}")
            return float(answer["score"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UndefinedError):
                raise
            raise UndefinedError(f"the command of vision_reward answered {line.strip()[:80]!r}") from None


class Official:
    """The official metrics of a set of videos; networks are loaded when the first video needs them.

    Args:
        files: weight files by their key of `FILES`, and a command by `vision_reward`.
        device: of the networks.
    """

    of_text = ("vbench.overall_consistency", "clip_score.vit_b32", "clip_score.vit_l14", VISION_REWARD)

    def __init__(self, files: Mapping[str, WeightFile | Command], device: torch.device) -> None:
        self.files, self.device = dict(files), device
        self._loaded: dict[str, object] = {}

    def absent(self) -> dict[str, str]:
        """Reason by metric, for those whose weights are not there."""
        reasons = {}
        for metric, keys in NEEDS.items():
            missing = [key for key in keys if key not in self.files]
            if missing:
                names = " and ".join(f"{FILES[key]} (as `{key}`)" for key in missing)
                reasons[metric] = f"not available: needs the weights {names}"
        if VISION_REWARD not in self.files:
            reasons[VISION_REWARD] = NO_COMMAND
        return reasons

    def network(self, key: str) -> nn.Module:
        """The network of a weight file, on the device."""
        if key not in self._loaded:
            load = partial(load_clip, key) if key in CLIPS else LOADERS[key]
            self._loaded[key] = load(self.files[key].path).to(self.device)
        return self._loaded[key]

    def families(
        self, frames: np.ndarray, text: str | None, fps: float, path: Path
    ) -> Iterator[tuple[tuple[str, ...], str, Callable[[], dict[str, float]]]]:
        """Metrics that are computed together: names, backend, call."""
        calls = {
            "vbench.imaging_quality": lambda: vbench.imaging_quality(frames, self.network("musiq_spaq"), self.device),
            "vbench.aesthetic_quality": lambda: vbench.aesthetic_quality(
                frames, self.network("clip_vit_l14").encode_image, self.network("laion_aesthetic"), self.device
            ),
            "vbench.motion_smoothness": lambda: vbench.motion_smoothness(frames, self.network("amt_s"), self.device),
            "vbench.subject_consistency": lambda: vbench.subject_consistency(
                frames, self.network("dino_vitb16"), self.device
            ),
            "vbench.background_consistency": lambda: vbench.background_consistency(
                frames, self.network("clip_vit_b32").encode_image, self.device
            ),
            "vbench.dynamic_degree": lambda: vbench.dynamic_degree(frames, fps, self._speeds, self.device),
            "vbench.temporal_flickering": lambda: vbench.static_flickering(frames, self._speeds, self.device),
        }
        if text is not None:
            calls["vbench.overall_consistency"] = lambda: vbench.overall_consistency(
                frames, partial(self._fits, text), self.device
            )
            for key in CLIPS:
                calls[f"clip_score.{key.removeprefix('clip_')}"] = partial(self._clip_score, key, frames, text)
        for metric, call in calls.items():
            yield (metric,), f"torch/{self.device.type}", lambda metric=metric, call=call: {metric: call()}
        if text is not None and VISION_REWARD in self.files:
            yield (VISION_REWARD,), "external", lambda: {VISION_REWARD: self._judge(path, text)}

    def _speeds(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return speeds(self.network("raft_things"), before, after)

    def _fits(self, text: str, video: torch.Tensor) -> torch.Tensor:
        return self.network("viclip").similarity(video, tokenise([text]).to(self.device))

    def _clip_score(self, key: str, frames: np.ndarray, text: str) -> float:
        import open_clip

        model = self.network(key)
        with torch.inference_mode():
            feature = model.encode_text(open_clip.get_tokenizer(CLIPS[key])([text]).to(self.device))
        return vbench.clip_score(frames, model.encode_image, feature, self.device)

    def _judge(self, path: Path, text: str) -> float:
        if VISION_REWARD not in self._loaded:
            self._loaded[VISION_REWARD] = Judge(self.files[VISION_REWARD])
        return self._loaded[VISION_REWARD](path, text)

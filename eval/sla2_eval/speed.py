"""How many videos a minute each metric scores: clips of 81 x 480 x 832, networks of full size with random weights.

    python -m sla2_eval.speed --output results/reference/eval-speed-cpu/summary.csv
    python -m sla2_eval.speed --device cuda --output results/reference/eval-speed-h200/summary.csv

One process with one CPU thread, as `sla2-eval` runs it: two workers score twice as many. On a CPU the seconds are those of the core, so that
other work on the machine does not count; on a GPU they are of the clock. Reading the file is a row of its own, as it is
done once for all metrics. A row that found no time says so; the same command goes on with it.
"""

import argparse
import csv
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from sla2 import grammar
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.files import write_atomic
from sla2.progress import say
from sla2.prompts import Prompt
from sla2.record import write_provenance
from sla2.video import read_video, write_mp4
from sla2_eval.folder import OF_STUDIES
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.official import CLIPS, NEEDS, Official, WeightFile
from sla2_eval.video_scores import VideoScores

SIZE = (81, 480, 832)
FPS = 16
WORDS = {"color": "red", "shape": "circle", "direction": "right"}
PROMPT = Prompt("p", grammar.caption(WORDS), WORDS)
OTHER = Prompt("q", grammar.caption(WORDS | {"direction": "left"}), WORDS | {"direction": "left"})  # to retrieve among
# What one call computes together, cheap ones first.
TOGETHER = ("guard.", "fidelity.", "oracle.")
SMALL = (9, 64, 64)  # frames, height and width of a first call on a CPU
ALSO = {
    "proxy.interp_gain": "proxy.motion_smoothness_dis",
    "proxy.flow_top5": "proxy.dynamic_degree_dis",
}  # one call gives both
DEAR = ("dino_vitb16", "clip_vit_b32", "viclip", "musiq_spaq", "clip_vit_l14", "amt_s", "raft_things")
COLUMNS = ("device", "metric", "seconds", "videos_per_minute", "reason")


def clip(size: tuple[int, int, int]) -> np.ndarray:
    """A smooth texture with grain that moves by two pixels a frame: uint8 (T, H, W, 3)."""
    frames, height, width = size
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (height // 16 + 1, (width + 2 * frames) // 16 + 1, 3)).astype(np.uint8)
    wide = cv2.resize(coarse, (width + 2 * frames, height), interpolation=cv2.INTER_CUBIC)
    grain = draw.normal(0, 2, (height, width, 3))
    video = np.stack([wide[:, 2 * t : 2 * t + width] for t in range(frames)])
    return np.clip(video + grain, 0, 255).astype(np.uint8)


def random_network(key: str) -> nn.Module:
    """The architecture of published weights, at random."""
    import open_clip
    from torchvision.models.optical_flow import raft_large

    from sla2_eval.networks.amt import AmtS
    from sla2_eval.networks.dino import Dino
    from sla2_eval.networks.musiq import Musiq
    from sla2_eval.networks.viclip import ViClip

    if key in CLIPS:
        return open_clip.create_model(CLIPS[key], load_weights=False)
    return {
        "amt_s": AmtS,
        "laion_aesthetic": lambda: nn.Linear(768, 1),
        "dino_vitb16": Dino,
        "musiq_spaq": Musiq,
        "raft_things": lambda: raft_large(weights=None),
        "viclip": ViClip,
    }[key]()


class RandomOfficial(Official):
    """Official metrics whose networks have random weights; their values mean nothing, their times do."""

    def __init__(self, device: torch.device) -> None:
        super().__init__({key: WeightFile(Path(), "") for keys in NEEDS.values() for key in keys}, device)

    def network(self, key: str) -> nn.Module:
        """A network, made when it is first asked for."""
        if key not in self._loaded:
            torch.manual_seed(0)
            self._loaded[key] = random_network(key).eval().requires_grad_(False).to(self.device)
        return self._loaded[key]


def cost(group: list[str]) -> int:
    """Place in the order of measuring: what takes minutes a clip on a CPU comes last."""
    keys = NEEDS.get(group[0], ())
    return next((place for place, key in enumerate(DEAR, start=1) if key in keys), 0)


def measure(
    device: torch.device, size: tuple[int, int, int], judge: Path | None, deadline: float, known: dict[str, dict]
) -> Iterator[dict]:
    """Rows of every metric, as they are measured; the second call of each, as the first imports, loads and compiles.

    The first call is of the same clip on a GPU and of a small one on a CPU, where nothing depends on the size but time.

    Args:
        size: frames, height, width; judge: folder of a trained judge.
        deadline: `time.monotonic()` after which nothing new is begun.
        known: rows of an earlier run by metric, which are not measured again.
    """
    frames = torch.from_numpy(clip(size))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, FPS)
        began = clock()
        frames, fps = read_video(path)
        yield row(device, "(reading the file)", clock() - began)
    small = frames[: SMALL[0], : SMALL[1], : SMALL[2]]
    wanted = [name for name in METRICS if not name.startswith((*OF_STUDIES, "proxy.kid", "vision_reward"))]
    scores = VideoScores(None, judge, [PROMPT, OTHER], device, RandomOfficial(device))
    absent = scores.absent()
    names = [name for name in wanted if name not in absent]
    groups = [[n for n in names if n.startswith(start)] for start in TOGETHER]
    groups += [[name] for name in names if not name.startswith(TOGETHER) and name not in ALSO]
    for group in sorted(filter(None, groups), key=cost):
        label = " ".join(group)
        if label in known:
            yield known[label]
            continue
        if time.monotonic() > deadline:
            yield row(device, label, None, "not measured: the time that the command was given is spent")
            continue
        scores.wanted, keys = set(group), NEEDS.get(group[0], ())
        try:
            for key in keys:
                scores.official.network(key)
            for shown in (frames if device.type == "cuda" else small, frames):
                began = clock()
                for _ in scores.of(shown, PROMPT, shown, fps, Path()):
                    pass
                seconds = clock() - began
        except ImportError as error:  # of a library that one metric needs and this machine lacks
            yield row(device, label, None, f"not measured: {error}")
            continue
        yield row(device, label, seconds)


def row(device: torch.device, metric: str, seconds: float | None, reason: str = "") -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rate = None if not seconds else 60 / seconds
    return {"device": name, "metric": metric, "seconds": seconds, "videos_per_minute": rate, "reason": reason}


def measured_before(path: Path) -> dict[str, dict]:
    """Rows with a time of a file that an earlier run wrote, by metric."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["seconds"]]
    return {row["metric"]: row | {name: float(row[name]) for name in ("seconds", "videos_per_minute")} for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--judge", type=Path, help="folder of a trained judge, for the metrics of a domain")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds after which nothing new is begun")
    parser.add_argument("--output", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget_s
    device = claim_device({"device": args.device, "threads": 1}, alone=True)
    cv2.setNumThreads(1)
    rows = []
    write_provenance(args.output, {"size": SIZE, "fps": FPS, "device": args.device})
    for entry in measure(device, SIZE, args.judge, deadline, measured_before(args.output)):
        found = f"{entry['seconds']:.2f} s" if entry["seconds"] else entry["reason"]
        say(f"speed: {entry['metric']}: {found}")
        rows.append(entry)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for one in rows:
            writer.writerow({k: "" if v is None else f"{v:.4g}" if isinstance(v, float) else v for k, v in one.items()})
        write_atomic(args.output, text.getvalue())


if __name__ == "__main__":
    run_main(main)

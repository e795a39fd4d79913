"""Step data: which clips there are. Procedural scenes by (seed, split, index), or a folder of captioned videos.

The index files hold scene parameters or paths, never pixels: `Clips` renders or decodes on demand, the same way for both.

    python -m sla2.data --settings JSON --output results/S/data
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sla2 import grammar, scenes
from sla2.errors import UserError, run_main
from sla2.files import write_atomic, write_json
from sla2.progress import bar, say
from sla2.render import render
from sla2.video import fit, read_video, resample, write_mp4

SPLITS = ("train", "heldout", "judge", "judge_heldout")
MOST_LEFT_OUT = 20  # scenes passed over for one that is kept


@dataclass(frozen=True)
class Clip:
    """One clip: uint8 frames (T, H, W, 3), its caption, its scene parameters where they are known, and its id."""

    frames: Tensor
    caption: str
    scene: dict | None
    id: str


class Clips:
    """A split's clips, rendered or decoded on demand.

    Args:
        path: index file of the data step.
        video: config `data.video`: frames, height, width, fps.
        device: where procedural clips are rendered.

    Raises:
        UserError: when the index is missing.
    """

    def __init__(self, path: str | Path, video: dict, device: str | torch.device = "cpu") -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: missing; run the data step")
        self.entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.video, self.device = video, device

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def captions(self) -> list[str]:
        return [entry["caption"] for entry in self.entries]

    @property
    def scenes(self) -> list[dict | None]:
        """Scene parameters, None for a clip that was filmed."""
        return [entry["scene"] for entry in self.entries]

    def __getitem__(self, index: int) -> Clip:
        entry = self.entries[index]
        return Clip(self.batch([index])[0], entry["caption"], entry["scene"], entry["id"])

    def batch(self, indices: list[int]) -> Tensor:
        """uint8 frames (B, T, H, W, 3) of these clips."""
        chosen = [self.entries[index] for index in indices]
        if all(entry["scene"] for entry in chosen):
            return render([entry["scene"] for entry in chosen], **self.video, device=self.device)
        return torch.stack([read_clip(Path(entry["path"]), self.video) for entry in chosen])


def read_clip(path: Path, video: dict) -> Tensor:
    """The first frames of a file at the study's rate and size, uint8 (T, H, W, 3).

    Raises:
        UserError: when it is unreadable, too short or too small.
    """
    seconds = video["frames"] / video["fps"]
    frames, fps = read_video(path, seconds)
    if min(frames.shape[1:3]) < 16:
        raise UserError(f"{path}: is {frames.shape[2]}x{frames.shape[1]} px, too small; remove it")
    cut = resample(frames, fps, video["fps"], video["frames"])
    if cut is None:
        raise UserError(
            f"{path}: lasts {len(frames) / fps:.2f} s, {seconds:.2f} s are needed; remove it or lower data.video.frames"
        )
    return fit(cut, video["height"], video["width"])


def procedural(settings: dict) -> dict[str, list[dict]]:
    """Index entries of every split; no two splits share a scene, and `train` has none of the captions in `withheld`.

    Raises:
        UserError: when nearly every caption is withheld.
    """
    choices, video = scenes.SIMPLE | settings["scene"], settings["video"]
    withheld = set(settings.get("withheld", ()))

    def entries(split: str) -> Iterator[dict]:
        left_out = 0
        for number in range(settings["clips"][split]):
            while True:
                scene = scenes.sample(choices, video, settings["seed"], split, number + left_out)
                caption = grammar.caption(grammar.attributes(scene))
                if split != "train" or caption not in withheld:
                    break
                left_out += 1
                if left_out > MOST_LEFT_OUT * settings["clips"][split]:
                    raise UserError(
                        "data.hold_out_prompts: the prompt sheet has nearly every caption there is; widen data.scene, or shorten the sheet"
                    )
            yield {"id": f"{split}-{number:05d}", "caption": caption, "scene": scene, "path": None}

    return {split: list(entries(split)) for split in SPLITS}


def read_captions(folder: Path) -> dict[str, str]:
    """Captions by file name from captions.csv or captions.tsv, columns `file` and `caption`.

    Raises:
        UserError: when there is no such file, or its columns differ.
    """
    for name, delimiter in (("captions.csv", ","), ("captions.tsv", "\t")):
        path = folder / name
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, delimiter=delimiter)
                if not reader.fieldnames or not {"file", "caption"} <= set(reader.fieldnames):
                    raise UserError(f"{path}: columns are {reader.fieldnames}, expected file and caption")
                return {row["file"]: (row["caption"] or "").strip() for row in reader}
    raise UserError(f"data.folder: {folder} has no captions.csv or captions.tsv; write one with columns file, caption")


def from_folder(settings: dict) -> tuple[dict[str, list[dict]], list[str]]:
    """Index entries of a user's folder, and one line for each clip that was skipped.

    The split of a clip follows from the hash of its name, so adding a video moves no other.

    Raises:
        UserError: for the first unusable clip with `on_error: stop`, or when too few are left.
    """
    folder, skipped, usable = Path(settings["folder"]), [], []
    if not folder.is_dir():
        raise UserError(f"data.folder: {folder} is no folder; set it to your videos and their captions.csv")
    captions = read_captions(folder)

    def fault(name: str) -> str | None:
        try:
            if not captions[name]:
                raise UserError(f"{folder / name}: has no caption; write one or remove the row")
            read_clip(folder / name, settings["video"])
        except UserError as error:
            return str(error)
        return None

    names = sorted(captions)
    with ThreadPoolExecutor(settings["threads"]) as pool:  # decoding lets go of Python's lock
        faults = pool.map(fault, names)
        for name in bar(names, "data: checking videos"):
            problem = next(faults)
            if problem is None:
                usable.append({"id": name, "caption": captions[name], "scene": None, "path": str(folder / name)})
            elif settings["on_error"] == "stop":
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(problem)
            else:
                skipped.append(problem)
    usable.sort(key=lambda entry: hashlib.sha256(entry["id"].encode()).digest())
    counts = settings["clips"]
    needed = counts["heldout"] + 1
    if len(usable) < needed:
        raise UserError(
            f"data.folder: {folder} has {len(usable)} usable clips, at least {needed} are needed; add videos"
        )
    heldout, train = usable[: counts["heldout"]], usable[counts["heldout"] :][: counts["train"]]
    return {"train": train, "heldout": heldout, "judge": [], "judge_heldout": []}, skipped


def write_preview(splits: dict[str, list[dict]], settings: dict, output: Path) -> None:
    """A grid of the first training clips, as `preview.mp4`."""
    write_index(output / "preview.jsonl", splits["train"][:12])
    clips = Clips(output / "preview.jsonl", settings["video"])
    (output / "preview.jsonl").unlink()
    frames = clips.batch(list(range(len(clips))))  # (B, T, H, W, 3)
    columns = 4 if len(clips) % 4 == 0 else 1
    grid = frames.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
    write_mp4(output / "preview.mp4", grid.contiguous(), settings["video"]["fps"])


def write_index(path: Path, entries: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(entry, sort_keys=True, ensure_ascii=False) + "\n" for entry in entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section data, study and seed, as JSON"
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    settings, skipped = args.settings, []
    if settings["folder"]:
        splits, skipped = from_folder(settings)
    else:
        splits = procedural(settings)
    for line in skipped:
        say(f"skipped {line}")
    for split, entries in splits.items():
        write_index(args.output / f"{split}.jsonl", entries)
    write_preview(splits, settings, args.output)
    counts = {split: len(entries) for split, entries in splits.items()}
    write_json(args.output / "data.json", {"clips": counts, "skipped": skipped})
    say(f"data: {counts}, {len(skipped)} skipped")


if __name__ == "__main__":
    run_main(main)

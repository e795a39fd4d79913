"""Step score: every metric of every video of one variant, and its attention errors layer by layer.

    python -m sla2_eval.score --settings JSON --base results/S/base_model/base_model.json \
        --videos results/S/generate/V/seed0 [seed1 ...] --reference results/S/generate/base/seed0 \
        [--trained results/S/stage2/V/seed0 ...] --judge results/S/score/judge --prompts TSV --output results/S/score/V.csv

All training seeds are scored in one process, as many videos at a time as it has threads: importing the metric libraries costs
more than using them, which mostly runs outside of Python. Metrics are computed on the lossless frames. What has no value is a
row with the reason, so that no table can average over it in silence.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import torch

from sla2.attention import AttentionSettings
from sla2.device import claim_device
from sla2.errors import UserError, run_main
from sla2.files import sha256_file
from sla2.progress import bar
from sla2.prompts import Prompt, read_prompts
from sla2.record import Record, write_provenance, write_records
from sla2.variant import Variant
from sla2.video import read_video
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.metrics.fidelity import FLOOR, floor
from sla2_eval.official import Official, weight_files
from sla2_eval.video_scores import FIDELITY, Measured, VideoScores, measure

KERNEL_FLOOR = "floor.attention_rel_l1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section score, variant, attention, video"
    )
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument("--videos", type=Path, nargs="+", required=True, help="one folder a training seed")
    parser.add_argument("--reference", type=Path, required=True, help="videos of the untouched base model")
    parser.add_argument(
        "--trained", type=Path, nargs="*", default=[], help="adapters, one for all videos or one a folder"
    )
    parser.add_argument("--judge", type=Path, required=True, help="folder of the judge step")
    parser.add_argument("--prompts", type=Path, required=True, help="tab-separated prompts")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if len(args.trained) not in (0, 1, len(args.videos)):
        raise UserError(
            f"--trained: {len(args.trained)} folders for {len(args.videos)} of --videos; give none, one, or one each"
        )
    settings, variant = args.settings, Variant.from_row(args.settings["variant"])
    device = claim_device(settings)
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(args.prompts)}
    official = Official(weight_files(settings["official"], "score.official"), device)
    scores = VideoScores(settings["video"], args.judge, list(prompts.values()), device, official)
    rows = Rows(settings["study"], variant)
    absent = scores.absent()
    if is_reference(args):
        absent |= dict.fromkeys(FIDELITY, "these videos are the reference of fidelity")
    else:
        absent |= dict.fromkeys((*FLOOR, KERNEL_FLOOR), "measured on the untouched dense model only")
    records = [rows.record(Measured(metric, None, "", reason)) for metric, reason in absent.items()]
    reference = {} if is_reference(args) else manifest(args.reference)
    # One thread a video, so that numbers do not depend on how many there are.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for folder in args.videos:
        seed = training_seed(folder, variant)
        entries = list(manifest(folder).values())
        measure_one = partial(of_video, folder, args.reference, reference, prompts, scores)
        with ThreadPoolExecutor(settings["threads"]) as pool:
            found = pool.map(measure_one, entries)
            for number in bar(len(entries), f"score {variant.variant} {folder.name}"):
                where = {name: entries[number][name] for name in ("prompt_id", "seed")}
                records += [rows.record(measured, train_seed=seed, **where) for measured in next(found)]
        clips = (read_video(folder / entry["file"])[0] for entry in entries)
        records += [rows.record(measured, train_seed=seed) for measured in scores.of_set(clips)]
    torch.set_num_threads(settings["threads"])
    records += list(attention_records(args, rows, device))
    write_provenance(
        args.output,
        settings,
        judge_sha256=scores.gates["weights_sha256"],
        official_sha256={key: file.identity for key, file in official.files.items()},
        manifests=[sha256_file(f / "manifest.jsonl") for f in args.videos],
    )
    write_records(args.output, records)


def is_reference(args: argparse.Namespace) -> bool:
    """Whether the videos are those that fidelity is measured against."""
    return args.reference.resolve() in [folder.resolve() for folder in args.videos]


class Rows:
    """Records of one variant, with unit and direction from the catalogue."""

    def __init__(self, study: str, variant: Variant) -> None:
        self.study, self.variant = study, variant.variant

    def record(self, measured: Measured, **where: object) -> Record:
        about = METRICS[measured.metric]
        return Record(
            study=self.study,
            variant=self.variant,
            metric=measured.metric,
            value=measured.value,
            unit=about.unit,
            higher_is_better=about.higher_is_better,
            backend=measured.backend,
            reason=measured.reason,
            **where,
        )


def manifest(folder: Path) -> dict[tuple[str, int], dict]:
    """Entries of a generated folder by prompt and sampling seed.

    Raises:
        UserError: when the manifest is missing.
    """
    path = folder / "manifest.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing; run the generate step")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(entry["prompt_id"], entry["seed"]): entry for entry in entries}


def training_seed(folder: Path, variant: Variant) -> int | None:
    """Training seed of a folder named `seed{t}`; None for rows that are not fine-tuned."""
    number = folder.name.removeprefix("seed")
    if not number.isdigit():
        raise UserError(f"{folder}: a folder of videos is named seed and a number, such as seed0")
    return int(number) if variant.finetune else None


def of_video(
    folder: Path, reference_folder: Path, reference: dict, prompts: dict[str, Prompt], scores: VideoScores, entry: dict
) -> list[Measured]:
    """All metrics of one manifest entry; without `reference` fidelity is left out."""
    prompt = prompts.get(entry["prompt_id"])
    if prompt is None:
        raise UserError(
            f"{folder}/manifest.jsonl: prompt '{entry['prompt_id']}' is not in the prompt sheet; generate again"
        )
    frames, fps = read_video(folder / entry["file"])
    found: list[Measured] = []
    dense = None
    if reference:
        other = reference.get((entry["prompt_id"], entry["seed"]))
        if other is None or other["noise_sha256"] != entry["noise_sha256"]:
            reason = f"{reference_folder} has no video of this prompt, seed and noise"
            found += [Measured(name, None, "", reason) for name in FIDELITY]
        else:
            dense, _ = read_video(reference_folder / other["file"])
    found += scores.of(frames, prompt, dense, fps, folder / entry["file"])
    if not reference:
        found += noise_floor(folder, entry, frames)
    return found


def noise_floor(folder: Path, entry: dict, frames: torch.Tensor) -> Iterator[Measured]:
    """Fidelity of a dense video to the dense one of the next sampling seed, the first one after the last."""
    seeds = sorted(seed for prompt, seed in manifest(folder) if prompt == entry["prompt_id"])
    if len(seeds) < 2:
        yield from (Measured(name, None, "", "undefined: the study has one sampling seed") for name in FLOOR)
        return
    after = seeds[(seeds.index(entry["seed"]) + 1) % len(seeds)]
    other, _ = read_video(folder / manifest(folder)[entry["prompt_id"], after]["file"])
    yield from measure(FLOOR, "torchmetrics/cpu", lambda: floor(frames.numpy(), other.numpy()))


def attention_records(args: argparse.Namespace, rows: Rows, device: torch.device) -> Iterator[Record]:
    """Attention errors of every training seed, layer by layer; dense attention only has its sparsity, which is none."""
    variant = Variant.from_row(args.settings["variant"])
    names = [name for name in METRICS if name.startswith("attention.")]
    if variant.dense:
        yield rows.record(Measured("sparsity.realised", 0.0, "formula"))
        yield from (
            rows.record(Measured(n, None, "", "dense attention is what errors are measured against")) for n in names
        )
        if not is_reference(args):
            return
    # Imported here: diffusers costs eight seconds of a core, which the other dense rows save.
    from sla2.wan import BaseModel, load_transformer
    from sla2_eval.attention_error import attention_errors, kernel_floor

    base, settings = BaseModel.read(args.base), args.settings
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = load_transformer(base, dtype=dtype).to(device).eval()
    if variant.dense:
        for (layer, metric), value in sorted(kernel_floor(transformer, base, settings).items()):
            yield rows.record(Measured(metric, value, f"torch/{device.type}"), layer=layer)
        return
    attention = AttentionSettings(**settings["attention"])
    adapters = args.trained * len(args.videos) if len(args.trained) == 1 else args.trained or [None] * len(args.videos)
    for folder, trained in zip(args.videos, adapters, strict=True):
        found = attention_errors(transformer, base, variant, attention, trained, settings)
        for name in sorted(set(names) - {metric for _, metric in found}):
            reason = f"undefined: mixing '{variant.mixing}' has no alpha"
            yield rows.record(Measured(name, None, "", reason), train_seed=training_seed(folder, variant))
        for (layer, metric), value in sorted(found.items()):
            measured = Measured(metric, value, f"torch/{device.type}")
            yield rows.record(measured, train_seed=training_seed(folder, variant), layer=layer)


if __name__ == "__main__":
    run_main(main)

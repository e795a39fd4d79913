"""Hand videos to VBench itself, which needs an environment of its own, and read its results back into our records.

    sla2-eval vbench-export results/tiny/generate/full/seed0 --out export/full
    sh export/full/run_vbench.sh                                  # where VBench is installed
    sla2-eval vbench-import export/full --results export/full/results/results_..._eval_results.json --out results/tiny/vbench/full.csv

The exported folder holds `videos/` with nothing but mp4 files, `prompts.json`, `manifest.jsonl` and the command. Importing joins by
file name and refuses what does not fit: other videos, values that are no numbers, totals that are not those of their videos. Imported
records are `vbench_official.*`: VBench reads the mp4 and, in this mode, does not filter static clips for its flickering; `vbench.*` are
this package's ports on the lossless frames. The two stand beside each other, and agree where the port is right.
"""

import argparse
import json
import math
import shlex
import shutil
from pathlib import Path

from sla2.errors import UserError
from sla2.files import read_json, sha256_file, write_atomic, write_folder, write_json
from sla2.progress import say
from sla2.record import Record, write_provenance, write_records
from sla2.video import CRF, read_video, write_mp4

COMMIT = "45e79ec"  # of VBench, whose options and file formats these are
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
)
PER_HUNDRED = ("imaging_quality",)  # stored per video as 0 to 100, in total as 0 to 1
BY_FRAME = ("subject_consistency", "background_consistency")  # totals may be means over frames, not over videos
TOLERANCE = 1e-4  # of a total: VBench computes in float32


def export_main() -> None:
    """Write the folder that VBench reads."""
    parser = argparse.ArgumentParser(prog="sla2-eval vbench-export", description=export_main.__doc__)
    parser.add_argument("videos", type=Path, help="folder of a generate step, or any folder with --prompts")
    parser.add_argument("--prompts", type=Path, help="CSV with the columns video,prompt")
    parser.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
    parser.add_argument("--study", default="", help="name of the study in the records (default: the folder's)")
    parser.add_argument("--variant", default="", help="name of the variant in the records (default: the folder's)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced")
    args = parser.parse_args()
    entries = of_study(args.videos) if (args.videos / "manifest.jsonl").is_file() else of_folder(args)
    for entry in entries:
        entry["study"] = args.study or entry["study"]
        entry["variant"] = args.variant or entry["variant"]
    write_folder(args.out, lambda folder: export(entries, args.dimensions, folder))


def of_study(folder: Path) -> list[dict]:
    """Entries of a generated folder `results/S/generate/V/seedT`, mp4 files first choice.

    Raises:
        UserError: where nothing says which row of the sheet the videos are of.
    """
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    beside = folder / "manifest.jsonl.provenance.json"
    if not beside.is_file():
        raise UserError(f"{beside}: missing; it says whether this row is fine-tuned. Run the generate step")
    settings = read_json(beside)["settings"]
    whole = folder.resolve()
    entries = []
    for entry in map(json.loads, lines):
        entries.append(
            {
                "source": folder / "videos" / f"{entry['id']}.mp4",
                "prompt_id": entry["prompt_id"],
                "seed": entry["seed"],
                # As step score counts: a row that was never trained has no training seed, whatever its folder is called.
                "train_seed": settings["train_seed"] if settings["variant"]["finetune"] else None,
                "prompt": entry["text"],
                "noise_sha256": entry["noise_sha256"],
                "variant": whole.parent.name,
                "row": settings["variant"],
                "study": whole.parents[2].name if len(whole.parents) > 2 else "",
            }
        )
    return entries


def of_folder(args: argparse.Namespace) -> list[dict]:
    """Entries of any folder; a name becomes the prompt's id, and there is one seed."""
    from sla2_eval.folder import find_videos, read_prompts

    names = find_videos(args.videos)
    if args.prompts is None:
        raise UserError(f"{args.videos}: is no folder of a generate step; give --prompts with a CSV of video,prompt")
    prompts = read_prompts(args.prompts, names)
    without = [name for name in names if name not in prompts]
    if without:
        raise UserError(f"{args.prompts}: has no prompt for '{without[0]}' ({len(without)} in all); VBench needs each")
    return [
        {
            "source": args.videos / name,
            "prompt_id": name,
            "seed": 0,
            "train_seed": None,
            "prompt": prompts[name].text,
            "noise_sha256": None,
            "variant": args.videos.resolve().name,
            "row": None,  # of a sheet of variants
            "study": args.videos.resolve().name,
        }
        for name in names
    ]


def export(entries: list[dict], dimensions: list[str], folder: Path) -> None:
    """Fill a folder with videos `p0007-s2.mp4`, prompts, manifest and command."""
    places = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(e["prompt_id"] for e in entries))}
    (folder / "videos").mkdir(parents=True)
    lines, prompts = [], {}
    for entry in entries:
        source = entry.pop("source")
        name = f"p{places[entry['prompt_id']]:04d}-s{entry['seed']}.mp4"
        if name in prompts:
            raise UserError(f"{source}: prompt '{entry['prompt_id']}' and seed {entry['seed']} stand twice")
        frames, fps = read_video(source)
        if source.suffix == ".mp4":
            shutil.copyfile(source, folder / "videos" / name)
        else:  # of other files VBench's motion dimensions read nothing
            write_mp4(folder / "videos" / name, frames, fps)
        facts = {
            "file": name,
            "source": source.name,
            "sha256": sha256_file(folder / "videos" / name),
            "frames": len(frames),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "fps": fps,
            "encoded": "as it was" if source.suffix == ".mp4" else f"H.264 yuv420p, CRF {CRF}",
        }
        lines.append(json.dumps(entry | facts, sort_keys=True))
        prompts[name] = entry["prompt"]
    write_json(folder / "prompts.json", prompts)
    write_atomic(folder / "manifest.jsonl", "\n".join(lines) + "\n")
    write_atomic(folder / "run_vbench.sh", command(dimensions))


def command(dimensions: list[str]) -> str:
    """The script that runs VBench on the folder that it lies in."""
    return f"""#!/bin/sh
# VBench at commit {COMMIT}, in its own environment (it pins transformers 4.33.2 and numpy below 2): set VBENCH to that checkout.
# VBench-Long is meant for clips of 5 s and more; this is plain VBench, as most papers use it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${{VBENCH:?set VBENCH to a checkout of VBench at commit {COMMIT}}}"
case $(git -C "$VBENCH" rev-parse HEAD) in
    {COMMIT}*) ;;
    *) echo "error: $VBENCH is not at commit {COMMIT}" >&2; exit 2 ;;
esac
cd "$VBENCH"
python evaluate.py --mode custom_input --videos_path "$here/videos" --prompt_file "$here/prompts.json" \\
    --output_path "$here/results" --dimension {shlex.join(dimensions)}
"""


def import_main() -> None:
    """Read VBench's results into records."""
    parser = argparse.ArgumentParser(prog="sla2-eval vbench-import", description=import_main.__doc__)
    parser.add_argument("export", type=Path, help="folder that vbench-export wrote")
    parser.add_argument("--results", type=Path, required=True, help="VBench's ..._eval_results.json")
    parser.add_argument("--out", type=Path, required=True, help="CSV of records to write")
    args = parser.parse_args()
    manifest = read_manifest(args.export)
    records = read_results(args.results, manifest)
    for dimension in BY_FRAME:
        # In the manifest's order, which `read_results` keeps.
        values = [one.value for one in records if one.metric == f"vbench_official.{dimension}"]
        if values:
            by_video, by_frame = aggregates(dict(zip(manifest, values, strict=True)), manifest)
            say(f"vbench-import: {dimension}: {by_video:.6f} over videos, {by_frame:.6f} over frames")
    write_provenance(args.out, {"vbench_commit": COMMIT}, results_sha256=sha256_file(args.results))
    write_records(args.out, records)


def read_manifest(folder: Path) -> dict[str, dict]:
    """Entries of an exported folder by file, each file still the one that was exported.

    Raises:
        UserError: for a folder that is no export, or a video that was changed.
    """
    path = folder / "manifest.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing; write the folder by sla2-eval vbench-export")
    entries = {entry["file"]: entry for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    for name, entry in entries.items():
        video = folder / "videos" / name
        if not video.is_file() or sha256_file(video) != entry["sha256"]:
            raise UserError(f"{video}: is not the file that was exported; export again and run VBench on it")
    return entries


def read_results(path: Path, manifest: dict[str, dict]) -> list[Record]:
    """Records of a results file, one for each dimension and video.

    Raises:
        UserError: naming the dimension, and the video or total, that does not fit.
    """
    results = read_json(path)
    unknown = sorted(set(results) - set(DIMENSIONS))
    if unknown or not results:
        raise UserError(f"{path}: dimension '{unknown[0] if unknown else ''}' is not one of {', '.join(DIMENSIONS)}")
    records = []
    for dimension in sorted(results):
        where = f"{path}: {dimension}"
        try:
            total, videos = results[dimension]
            values = {Path(video["video_path"]).name: video["video_results"] for video in videos}
        except (TypeError, ValueError, KeyError):
            raise UserError(f"{where}: is not [total, [{{video_path, video_results}}, ...]]") from None
        if len(values) < len(videos):
            raise UserError(f"{where}: a video stands twice")
        if set(values) != set(manifest):
            odd = sorted(set(values) ^ set(manifest))
            raise UserError(f"{where}: {len(values)} videos, exported were {len(manifest)}; such as '{odd[0]}'")
        values = {name: number(value, f"{where}: {name}") for name, value in values.items()}
        if dimension in PER_HUNDRED:
            values = {name: value / 100 for name, value in values.items()}
        check_total(number(total, f"{where}: total"), dimension, values, manifest, where)
        records += [record(manifest[name], dimension, values[name]) for name in manifest]
    return records


def number(value: object, where: str) -> float:
    """A finite number, or a bool as 0 or 1."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise UserError(f"{where} is {value!r}, not a number; run that dimension again")


def check_total(total: float, dimension: str, values: dict[str, float], manifest: dict[str, dict], where: str) -> None:
    """Refuse a total that is not the mean of its videos, or of their frames where VBench weighs by them."""
    means = aggregates(values, manifest) if dimension in BY_FRAME else (sum(values.values()) / len(values),)
    if all(abs(total - mean) > TOLERANCE for mean in means):
        raise UserError(
            f"{where}: total {total:.6f}, its videos have {means[0]:.6f}; the file was put together wrongly"
        )


def aggregates(values: dict[str, float], manifest: dict[str, dict]) -> tuple[float, float]:
    """Mean over videos, as VBench on several GPUs and as our tables, and mean over pairs of frames, as VBench on one GPU.

    Equal where all videos have one length.
    """
    pairs = {name: manifest[name]["frames"] - 1 for name in values}
    by_frame = sum(values[name] * pairs[name] for name in values) / sum(pairs.values())
    return sum(values.values()) / len(values), by_frame


def record(entry: dict, dimension: str, value: float) -> Record:
    """Record of one video.

    Card: `vbench_official.imaging_quality`, `vbench_official.aesthetic_quality`, `vbench_official.overall_consistency`,
        `vbench_official.motion_smoothness`, `vbench_official.subject_consistency`, `vbench_official.background_consistency`,
        `vbench_official.dynamic_degree`, `vbench_official.temporal_flickering`, external.

    Definition: VBench's dimension of that name as VBench itself measured it, in its mode custom_input, on the exported mp4 files.
    Formula: that of `vbench.*` of the same name; temporal_flickering is 1 - mean |I_t - I_t+1| / 255 of every clip, as this mode has no
        static filter.
    Range: [0, 1]; overall_consistency [-1, 1]; imaging quality is divided by 100. Direction: higher is better, dynamic_degree none.
    Source: Vchitect/VBench at commit 45e79ec, run by `run_vbench.sh` and read by `sla2-eval vbench-import`.
    Weights: those that VBench fetches.
    UndefinedError: a value that is no number is refused at import.
    Blind spots: those of `vbench.*`, and what H.264 at CRF 12 changes; differs from `vbench.*` by the decoder and the device.
    """
    from sla2_eval.metrics.catalogue import METRICS

    about = METRICS[f"vbench_official.{dimension}"]
    return Record(
        study=entry["study"],
        variant=entry["variant"],
        metric=f"vbench_official.{dimension}",
        value=value,
        unit=about.unit,
        higher_is_better=about.higher_is_better,
        backend=f"vbench-{COMMIT}/custom_input",
        train_seed=entry["train_seed"],
        prompt_id=entry["prompt_id"],
        seed=entry["seed"],
    )

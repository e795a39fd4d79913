"""`sla2-eval`: score any folder of videos.

    sla2-eval videos/ --prompts prompts.csv --metrics all --out scores.csv

One row for each video and metric; what cannot be measured is a row with the reason. A stopped run goes on where it was, and a
video that changed is scored again. Nothing is fetched from a network. Other commands: `sla2-eval vbench-export` and
`sla2-eval vbench-import` hand videos to VBench itself and read its results; `sla2-eval vbench-total` makes its totals of them.
"""

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from sla2.errors import UserError, run_main
from sla2.progress import bar, say

COMMANDS = {
    "vbench-export": "sla2_eval.vbench_files:export_main",
    "vbench-import": "sla2_eval.vbench_files:import_main",
    "vbench-total": "sla2_eval.vbench_total:total_main",
}
_SCORER = None  # of a worker process


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="sla2-eval", description=__doc__.split(":", 1)[1].strip(), formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("videos", type=Path, help="folder of videos, searched with its sub-folders")
    options.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options.add_argument("--prompts", type=Path, help="CSV with the columns video,prompt[,attributes]")
    options.add_argument("--metrics", nargs="+", default=["all"], help="all, families or names (default: all)")
    options.add_argument("--reference", type=Path, help="folder with videos of the same names: PSNR and SSIM to them")
    options.add_argument("--judge", type=Path, help="folder of a judge trained in the domain of these videos")
    options.add_argument("--weights", type=Path, help="YAML that names published weights, see eval/README.md")
    options.add_argument("--workers", type=int, default=1, help="processes; one for each GPU at most (default: 1)")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of networks")
    return options


def main() -> None:
    """Run the command of the command line."""
    from pkgutil import resolve_name

    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        command = resolve_name(COMMANDS[sys.argv.pop(1)])
        run_main(command)
    else:
        run_main(lambda: score_folder(parser().parse_args()))


def score_folder(args: argparse.Namespace) -> None:
    """Score every video of a folder and write the CSV."""
    say("sla2-eval: loading")  # the libraries take ten seconds of a core
    from sla2.record import write_provenance
    from sla2_eval import folder

    names = folder.find_videos(args.videos)
    prompts = folder.read_prompts(args.prompts, names) if args.prompts else {}
    wanted = folder.choose_metrics(args.metrics)
    for option, path in (("--reference", args.reference), ("--judge", args.judge)):
        if path and not path.is_dir():
            raise UserError(f"{option}: {path}: no such folder")
    weights = read_weights(args.weights) if args.weights else {}
    device = choose_device(args.device, args.workers)
    job = folder.Job(args.videos, wanted, prompts, args.reference, args.judge, weights, device)
    notes = args.out.with_name(f".{args.out.stem}.parts")
    rows = {name: folder.finished(job, notes, name) for name in names}
    missing = [name for name in names if rows[name] is None]
    if len(missing) < len(names):
        say(f"sla2-eval: {len(names) - len(missing)} of {len(names)} videos were scored before")
    for name, of_video in score_all(job, notes, missing, args.workers):
        rows[name] = of_video
    found = [entry for name in names for entry in rows[name]] + folder.of_set(job, notes, names)
    folder.write_scores(args.out, found)
    write_provenance(args.out, job.described())
    summarise(found)
    say(f"sla2-eval: {args.out}")


def score_all(job, notes: Path, names: list[str], workers: int):
    """Names with their rows, as they are finished."""
    from sla2_eval.folder import Scorer

    if not names:
        return
    if workers == 1:
        scorer = Scorer(job, notes)
        for name in bar(names, "sla2-eval"):
            yield name, scorer(name)
        return
    # A forked child of a process with threads can hang. On the CPU one process imports the libraries and forks the workers.
    context = get_context("forkserver" if job.device == "cpu" else "spawn")
    if job.device == "cpu":
        context.set_forkserver_preload(["sla2_eval.folder"])
    with ProcessPoolExecutor(
        min(workers, len(names)), mp_context=context, initializer=_start, initargs=(job, notes)
    ) as pool:
        pending = {pool.submit(_work, name): name for name in names}
        for _, future in zip(bar(names, "sla2-eval"), as_completed(pending), strict=True):
            yield pending[future], future.result()


def _start(job, notes: Path) -> None:
    global _SCORER
    from sla2_eval.folder import Scorer

    _SCORER = Scorer(job, notes)


def _work(name: str) -> list[dict]:
    return _SCORER(name)


def choose_device(word: str, workers: int) -> str:
    """`cpu` or `cuda`.

    Raises:
        UserError: for fewer than one worker, or more workers than GPUs, as each takes one for itself.
    """
    import torch

    if workers < 1:
        raise UserError(f"--workers: {workers}; give 1 or more")
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    if word == "cuda" and workers > torch.cuda.device_count():
        raise UserError(
            f"--workers: {workers} processes for {torch.cuda.device_count()} GPUs; give fewer, or --device cpu"
        )
    return word


def read_weights(path: Path) -> dict:
    """The weight files that a YAML file names, checked."""
    import yaml

    from sla2_eval.official import weight_files

    if not path.is_file():
        raise UserError(f"--weights: {path}: no such file")
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(section, dict):
        raise UserError(f"{path}: holds no weights; write lines such as `clip_vit_b32: {{path: ..., sha256: ...}}`")
    return weight_files(section, str(path))


def summarise(rows: list[dict]) -> None:
    """Print mean and count of every metric, then why the others have none, a line a reason."""
    metrics: dict[str, list[dict]] = {}
    for entry in rows:
        metrics.setdefault(entry["metric"], []).append(entry)
    width = max(map(len, metrics))
    absent: dict[str, list[str]] = {}
    for metric, entries in metrics.items():
        values = [entry["value"] for entry in entries if entry["value"] is not None]
        without = f", {len(entries) - len(values)} without" if len(values) < len(entries) else ""
        if values:
            print(f"{metric:<{width}}  {statistics.fmean(values):>10.4f}  mean of {len(values)}{without}")
            continue
        reasons = [entry["reason"] for entry in entries if not entry["reason"].startswith("unreadable")]
        absent.setdefault(statistics.mode(reasons) if reasons else "no video could be read", []).append(metric)
    for reason, names in absent.items():
        print(f"not measured, {reason}: {', '.join(names)}")
    unreadable = dict.fromkeys(entry["video"] for entry in rows if entry["reason"].startswith("unreadable"))
    for name in unreadable:
        print(f"unreadable: {name}")


if __name__ == "__main__":
    main()

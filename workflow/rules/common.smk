"""The checked study, and the files of each variant. What an `include`d rule names, it finds here."""

import fcntl
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sla2.config import as_argument, check_study
from sla2.config_checks import check_paths
from sla2.errors import UserError
from sla2.preload import start
from sla2.variant import BASE, Variant
from sla2_eval.captions import CAPTIONS

# Jobs call `python`: the one that runs Snakemake, also where its environment is not activated.
os.environ.update(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def hold_folder():
    """Let a run that was killed be followed by another without `snakemake --unlock`.

    Snakemake's lock files outlive `kill -9`; a lock of the kernel's goes with its process. Every run holds one, shared; who can
    have it alone knows that no other run lives, and that lock files which are there are left over.
    """
    folder = Path(".snakemake")
    folder.mkdir(exist_ok=True)
    held = (folder / "alive").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left_over in (folder / "locks").glob("*.lock"):
            left_over.unlink()
    except BlockingIOError:
        pass
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


preloaded = []  # the server of `sla2.preload` of this run, if it has one


def end_preloaded():
    for server in preloaded:
        server.terminate()


ALIVE = hold_folder() if workflow.is_main_process else None

try:
    study = check_study(config, workflow.overwrite_configfiles or workflow.configfiles)
except UserError as error:
    raise SystemExit(f"error: {error}")
config.update(study.config)


onstart:
    # Not on a dry run, which needs neither weights nor videos.
    try:
        check_paths(study)
    except UserError as error:
        raise SystemExit(f"error: {error}")
    # Snakemake would quietly hand such a job what there is.
    limit = workflow.global_resources.get("gpu").value
    for step in ("base_model", "stage2"):
        if limit is not None and gpus(step) > limit:
            raise SystemExit(
                f"error: {step}.gpus: a run takes {gpus(step)} GPUs, gpu={limit} is allowed; add --resources gpu={gpus(step)}"
            )
    # Importing for all jobs costs what importing for two does, so a few jobs import for themselves.
    if workflow.local_exec and sum(1 for _ in workflow.dag.needrun_jobs()) > 5:
        preloaded.append(start(Path(tempfile.mkdtemp(prefix="sla2-"))))


onsuccess:
    end_preloaded()


onerror:
    end_preloaded()
    print(
        f"\nfailed: the log of each job is under results/{study.config['study']}/logs; finished work is kept, the same command resumes",
        file=sys.stderr,
    )


pathvars:
    results=f"results/{study.config['study']}",
    logs=f"results/{study.config['study']}/logs",


VIDEO = study.config["data"]["video"]
ATTENTION = study.config["attention"]
NATURALNESS = {name: study.config["score"][name] for name in ("naturalness_clips", "naturalness_patch")}
ROWS = {name: row.row() for name, row in study.variants.items()}
RUNS = [(name, seed) for name in study.variants for seed in study.training_seeds(name)]
GROUPS = {row.stage1_group: row for row in study.variants.values() if row.stage1_group}
TABLES = expand(
    "<results>/tables/{table}",
    table=[
        f"{name}.csv"
        for name in (
            "quality",
            "fidelity",
            "attention",
            "efficiency",
            "training",
            "routers",
            "ablation",
            "claims",
            "variants",
            "validity",
        )
    ]
    + ["study.json", "provenance.json"],
)
PLOTS = [name for name in CAPTIONS if name != "contact_sheet"]  # that one needs videos, the others tables only
FIGURES = expand("<results>/figures/{figure}.{kind}", figure=list(CAPTIONS), kind=["svg", "png"])
NOTEBOOKS = expand("<results>/notebooks/{notebook}.ipynb", notebook=["quality", "efficiency"])
EVERY = {
    "stage1": [f"<results>/stage1/{group}/adapter.safetensors" for group in GROUPS],
    "stage2": [
        f"<results>/stage2/{name}/seed{seed}/adapter.safetensors"
        for name, seed in RUNS
        if study.variants[name].finetune
    ],
    "generate": [f"<results>/generate/{name}/seed{seed}/manifest.jsonl" for name, seed in RUNS],
    "score": [f"<results>/score/{name}.csv" for name in ROWS],
}
EVERY_CORE = workflow.resource_settings.cores or 1  # none is set where a cluster counts jobs


wildcard_constraints:
    variant="|".join(map(re.escape, ROWS)),
    group="|".join(map(re.escape, GROUPS)) or "none",
    seed="[0-9]+",
    figure="|".join(PLOTS),


def settings(step, **extra):
    """Settings of a job as JSON: a changed value reruns the job, a changed comment does not."""
    return as_argument(study.section(step, **extra))


def gpus(step):
    """GPUs that a job of a step takes, on all its nodes: one, or as many as its section says, and none on the CPU."""
    section, device = study.config[step], study.section(step)["device"]
    on_gpu = device == "cuda" or (device == "auto" and shutil.which("nvidia-smi") is not None)
    return section.get("gpus", 1) * section.get("nodes", 1) if on_gpu else 0


def captions():
    """Captions of a user's folder, so that a changed one reruns the data; none for procedural clips, or before the folder is there."""
    folder = study.config["data"]["folder"]
    return sorted(map(str, Path(folder).glob("captions.[ct]sv"))) if folder else []


def group_row(group):
    """The row that a stage-1 run trains: what the rows that share it have in common, so that renaming one reruns nothing."""
    row = GROUPS[group]
    return Variant(group, row.attention, row.router, row.mixing, "none", row.sparsity, False).row()


def stage1_adapter(wildcards):
    group = study.variants[wildcards.variant].stage1_group
    return [f"<results>/stage1/{group}/adapter.safetensors"] if group else []


def trained_adapters(variant, seeds):
    """Adapters that a row runs with: of stage 2, of stage 1 where it is not fine-tuned, or none."""
    row = study.variants[variant]
    if row.finetune:
        return [f"<results>/stage2/{variant}/seed{seed}/adapter.safetensors" for seed in seeds]
    return [f"<results>/stage1/{row.stage1_group}/adapter.safetensors"] if row.stage1_group else []


def manifests(variant):
    return [f"<results>/generate/{variant}/seed{seed}/manifest.jsonl" for name, seed in RUNS if name == variant]


def folders(files):
    return " ".join(str(Path(file).parent) for file in files)


def folder_option(option, files):
    """`--option folder ...` for the folders of some files, or nothing without any."""
    return f"{option} {folders(files)}" if files else ""

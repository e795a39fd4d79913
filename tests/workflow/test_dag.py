"""What runs again after a change, and what does not: Snakemake's own plan for a study that has run."""

import fcntl
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("dag")

CONFIGS = ["tiny", "mini", "wan2.1-1.3b-480p", "wan2.1-14b-720p"]
TABLES = {
    f"tables/{name}.csv"
    for name in [
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
    ]
}
TABLES |= {"tables/study.json", "tables/provenance.json"}
FIGURES = {
    f"figures/{name}.{kind}"
    for name in [
        "quality_sparsity",
        "ablation_bars",
        "paired_differences",
        "pareto",
        "attention_error_by_layer",
        "finetuning",
        "training_curves",
        "routers",
        "what_metrics_see",
    ]
    for kind in ("svg", "png")
}
CONTACT = {"figures/contact_sheet.svg", "figures/contact_sheet.png"}
AFTER_TABLES = FIGURES | CONTACT | {"notebooks/quality.ipynb", "notebooks/efficiency.ipynb", "report"}
SUM = "sla2-97-sum\tsla2\tlearned\tsum\tqat-int8\t0.97\tyes"


def stage1(group: str) -> set[str]:
    return {f"stage1/{group}/{name}" for name in ("adapter.safetensors", "adapter.json", "log.csv", "report.csv")}


def stage2(name: str, seed: int = 0) -> set[str]:
    return {f"stage2/{name}/seed{seed}/{file}" for file in ("adapter.safetensors", "adapter.json", "log.csv")}


def videos(name: str, seed: int = 0) -> set[str]:
    return {f"generate/{name}/seed{seed}/manifest.jsonl"}


def score(name: str) -> set[str]:
    return {f"score/{name}.csv"}


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run(checkout, name):
    """Without weights and without videos."""
    done = checkout.snakemake("--dry-run", "--quiet", "rules", "--configfile", f"config/{name}.yaml")
    assert "This was a dry-run" in done.stdout


def test_nothing_after_a_run(finished):
    assert finished.pending() == set()


def test_comment_reruns_nothing(finished):
    for file in ("config/tiny.yaml", "config/variants.tsv"):
        path = finished.folder / file
        path.write_text(f"# another comment\n{path.read_text()}")
    assert finished.pending() == set()


def test_change_of_one_row(finished):
    finished.edit("config/variants.tsv", SUM, SUM.replace("0.97", "0.96"))
    own = stage1("learned-sum-96") | stage2("sla2-97-sum") | videos("sla2-97-sum") | score("sla2-97-sum")
    assert finished.pending() == own | {"latency/latency.csv"} | TABLES | AFTER_TABLES


def test_change_of_a_row_that_shares_stage1(finished):
    row = "sla2-97-noquant\tsla2\tlearned\talpha\tnone"
    finished.edit("config/variants.tsv", row, row.replace("none", "ptq-fp8"))
    own = stage2("sla2-97-noquant") | videos("sla2-97-noquant") | score("sla2-97-noquant")
    assert finished.pending() == own | {"latency/latency.csv"} | TABLES | AFTER_TABLES


def test_rows_that_agree_in_router_mixing_and_sparsity_share_one_stage1(finished):
    """Five trainings start from one stage-1 run, three of them of rows that differ in the quantiser only."""
    remade = "results/tiny/stage1/learned-alpha-97/adapter.safetensors"
    runs = [("sla2-97", 0), ("sla2-97", 1), ("sla2-97-noquant", 0), ("sla2-97-ptq", 0), ("sla2-97-fp8", 0)]
    pending = finished.pending("all_stage2", "--forcerun", remade)
    assert pending == stage1("learned-alpha-97").union(*(stage2(*run) for run in runs))


def test_new_row(finished):
    finished.edit("config/variants.tsv", SUM, f"{SUM}\nmine\tsla2\tmean_pool\talpha\tnone\t0.97\tno")
    assert finished.pending() == videos("mine") | score("mine") | {"latency/latency.csv"} | TABLES | AFTER_TABLES


def test_more_training_seeds(finished):
    finished.edit("config/tiny.yaml", "rows: [full, sla2-97]", "rows: [full, sla2-97, sla2-85]")
    own = stage2("sla2-85", 1) | videos("sla2-85", 1) | score("sla2-85")
    assert finished.pending() == own | TABLES | AFTER_TABLES


def test_changed_report_setting(finished):
    finished.edit("config/tiny.yaml", "draws: 10000", "draws: 3000")
    assert finished.pending() == TABLES | AFTER_TABLES


def test_changed_stage2_setting(finished):
    finished.edit("config/tiny.yaml", "lr: 1e-3", "lr: 2e-3")
    pending = finished.pending()
    assert stage2("full") | stage2("full", 1) | stage2("sla2-85") | score("sla2-85") <= pending
    assert not {"data/data.json", "base_model/base_model.json", "latency/latency.csv"} & pending
    assert not [name for name in pending if name.startswith("stage1/")]
    assert not videos("base") & pending


def test_deleted_figure(finished):
    (finished.folder / "results/tiny/figures/pareto.svg").unlink()
    # The page holds the figure, so it follows; no other figure does.
    assert finished.pending() == {"figures/pareto.svg", "figures/pareto.png", "report"}


def test_changed_figure_script(finished):
    script = finished.folder / "workflow/scripts/pareto.py"
    script.write_text(f"{script.read_text()}\n")
    assert finished.pending() == {"figures/pareto.svg", "figures/pareto.png", "report"}


def test_rows_of_a_study(checkout):
    checkout.edit("config/tiny.yaml", "rows: all", "rows: [base, full, sla-95]")
    checkout.edit("config/tiny.yaml", "rows: [full, sla2-97]", "rows: [full]")
    pending = checkout.pending()
    assert {name.split("/")[1] for name in pending if name.startswith("generate/")} == {"base", "full", "sla-95"}
    assert not [name for name in pending if name.startswith("stage1/")]
    assert not [name for name in pending if name.startswith("stage2/base/")]


@pytest.mark.parametrize(
    ("target", "made"),
    [
        ("all_stage1", stage1("learned-sum-97")),
        ("all_generate", videos("base")),
        ("figures", FIGURES),
        ("latency", set()),
    ],
)
def test_target(checkout, target, made):
    pending = checkout.pending(target)
    assert made <= pending
    if target in ("all_stage1", "latency"):
        assert not [name for name in pending if name.startswith(("stage2/", "generate/", "score/"))]


def test_wrong_config_stops_with_one_line(checkout):
    checkout.edit("config/tiny.yaml", "block_q: 16", "block_q: 3200")
    done = checkout.snakemake(check=False)
    assert done.returncode
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("error: config/tiny.yaml:")
    assert "attention.block_q: 3200 is larger than the 576 tokens" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (checkout.folder / "results").exists()


def test_missing_videos_stop_before_the_first_job(checkout):
    done = checkout.snakemake("--configfile", "config/wan2.1-1.3b-480p.yaml", check=False)
    assert done.returncode
    assert done.stderr.splitlines()[-1].startswith("error: config/wan2.1-1.3b-480p.yaml:")
    assert "data.folder: 'data/wan' is no folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(checkout.folder.glob("results/**/*.log"))
    # The lock is released: the next command is not refused.
    assert "This was a dry-run" in checkout.snakemake("--dry-run", "--quiet", "rules").stdout


def test_a_run_on_more_gpus_than_are_allowed_stops_before_the_first_job(checkout):
    """Snakemake itself would start it on those that there are."""
    checkout.edit("config/tiny.yaml", "device: cpu", "device: cuda")
    checkout.edit("config/tiny.yaml", "block_q: 16\n  block_k: 8", "block_q: 16\n  block_k: 16")  # as triton needs
    checkout.edit("config/tiny.yaml", "lr_mixing: 1e-2\n  warmup: 5", "lr_mixing: 1e-2\n  gpus: 4\n  warmup: 5")
    done = checkout.snakemake("ablations", check=False)
    assert done.returncode
    assert "error: stage2.gpus: a run takes 4 GPUs, gpu=1 is allowed; add --resources gpu=4" in done.stderr
    assert not list(checkout.folder.glob("results/**/*.log"))


def test_gpus_and_nodes_of_the_config_reach_the_launcher(checkout):
    checkout.edit("config/tiny.yaml", "device: cpu", "device: cuda")
    checkout.edit("config/tiny.yaml", "block_q: 16\n  block_k: 8", "block_q: 16\n  block_k: 16")  # as triton needs
    checkout.edit(
        "config/tiny.yaml", "lr_mixing: 1e-2\n  warmup: 5", "lr_mixing: 1e-2\n  gpus: 2\n  nodes: 2\n  warmup: 5"
    )
    checkout.edit("config/tiny.yaml", "  pretrained: null", "  pretrained: null\n  gpus: 2")
    options = ("--dry-run", "--printshellcmds", "--quiet", "host", "--resources", "gpu=4")
    shown = checkout.snakemake("ablations", *options).stdout
    assert "sla2 --gpus 2 base_model" in shown
    assert "sla2 --gpus 4 --nodes 2 stage2" in shown


def test_parse_time(checkout, tmp_path):
    """The workflow costs Snakemake under 3 s of processor time more than an empty one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/Snakefile").write_text('rule all:\n    output: "x"\n    shell: "touch x"\n')
    times = []
    for folder in (tmp_path / "empty", checkout.folder):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "snakemake", "-n", "-c1"], cwd=folder, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert times[1] - times[0] < 3.0


def test_linked_profile_is_found():
    """Snakemake looks for profiles/default beside the Snakefile; without it there is no GPU limit and no resume."""
    assert (Path(__file__).resolve().parents[2] / "profiles/default/profile.v9+.yaml").is_file()


def test_run_after_a_kill(finished):
    """`kill -9` leaves Snakemake's lock files; the next run takes them for what they are, unless another run lives."""
    locks = finished.folder / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    for name in ("0.input.lock", "0.output.lock"):
        (locks / name).write_text("results/tiny/data/data.json\n")
    (finished.folder / "results/tiny/figures/pareto.svg").unlink()
    with (finished.folder / ".snakemake/alive").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert "cannot be locked" in finished.snakemake("--touch", check=False).stderr
    finished.snakemake("--touch")
    assert not list(locks.glob("*"))

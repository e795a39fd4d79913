"""`sla2 --gpus N --nodes M`: the launcher's command line, and that it starts processes which know of each other."""

import itertools
import subprocess
import sys

import pytest

from sla2 import device, launch
from sla2.errors import UserError


def test_two_processes_start(tmp_path):
    (tmp_path / "step.py").write_text(
        "import os, sys\nprint(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')), *sys.argv[1:])\n"
    )
    code = "import sys; from sla2.launch import launch; sys.exit(launch('step', sys.argv[1:], 2, 1))"
    started = subprocess.run([sys.executable, "-c", code, "--a", "b c"], cwd=tmp_path, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    assert sorted(started.stdout.splitlines()) == ["0 0 2 --a b c", "1 1 2 --a b c"]


def test_nodes_of_a_slurm_job_each_start_a_launcher(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    *srun, inner = launch.command("sla2.stage2", ["--settings", '{"a": "it\'s"}'], 8, 2)
    assert srun == ["srun", "--overlap", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "sh", "-c"]
    # What the shell of the second node makes of it.
    shell = ["sh", "-c", f"SLURM_NODEID=1; set -- {inner}; printf '%s\\n' \"$@\""]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    options = dict(itertools.pairwise(words))
    assert options["--num_processes"] == "16"
    assert options["--num_machines"] == "2"
    assert options["--machine_rank"] == "1"
    assert options["--main_process_ip"] == "node7"
    assert words[-4:] == ["--module", "sla2.stage2", "--settings", '{"a": "it\'s"}']


def test_a_gpu_is_held_by_one_job_and_what_is_not_needed_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(device.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(device, "_LOCKS", [])
    assert device.lock_gpus(1) == [0]
    assert device.lock_gpus(2) == [1, 2]
    device._LOCKS.pop(0).close()  # the first job ends
    assert device.lock_gpus(1) == [0]
    with pytest.raises(UserError, match="4 wanted, this machine has 3"):
        device.lock_gpus(4)


def test_jobs_that_share_fill_the_emptiest_gpu_and_none_that_is_held_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(device, "_LOCKS", [])
    assert device.lock_gpus(1) == [0]
    assert [device.share_gpu(2) for _ in range(3)] == [1, 2, 1]
    # The last place goes; then a job waits until the second, on GPU 2, ends: its two locks are the fourth and fifth that were taken.
    assert device.share_gpu(2) == 2
    monkeypatch.setattr(device.time, "sleep", lambda _: [device._LOCKS.pop(3).close() for _ in range(2)])
    assert device.share_gpu(2) == 2
    assert "every GPU has 2 jobs of ours" in capsys.readouterr().err


def test_a_number_of_jobs_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("SLA2_JOBS_PER_GPU", "many")
    with pytest.raises(UserError, match="SLA2_JOBS_PER_GPU: 'many' is not a number of jobs"):
        device.jobs_per_gpu()


def test_nodes_without_slurm_are_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="several nodes need a Slurm job"):
        launch.command("sla2.stage2", [], 8, 2)

"""`sla2 --gpus 8 --nodes 2 stage2 ...`: a step in several processes, one a GPU, started by accelerate. Standard library only.

On several nodes this command runs on the first of a Slurm job, and `srun` starts one launcher on each. Without `device: cuda` the
processes compute on the CPU, which is how the tests run them.
"""

import os
import subprocess
import sys

from sla2.errors import UserError

PORT = 29_500


def launch(module: str, arguments: list[str], gpus: int, nodes: int) -> int:
    """Run `python -m module arguments` in `gpus` processes on each of `nodes` nodes; returns the exit status."""
    environment = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    if nodes == 1 and "CUDA_VISIBLE_DEVICES" not in environment:
        from sla2.device import lock_gpus  # imports torch

        held = lock_gpus(gpus)
        if held:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, held))
    return subprocess.run(command(module, arguments, gpus, nodes), env=environment, check=False).returncode


def command(module: str, arguments: list[str], gpus: int, nodes: int) -> list[str]:
    """The launcher's command line.

    Raises:
        UserError: for several nodes outside a Slurm job.
    """
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(gpus * nodes)]
    words += ["--num_machines", str(nodes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    step = ["--module", module, *arguments]
    if gpus * nodes > 1 and nodes == 1:
        # Port 0: the processes of one node find each other through a port that is free.
        return [*words, "--multi_gpu", "--main_process_port", "0", *step]
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(f"--nodes {nodes}: several nodes need a Slurm job, whose srun starts the others; use 1 here")
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    )
    # The shell of each node puts in its own number.
    inner = " ".join(map(_quoted, [*words, "--multi_gpu", "--main_process_ip", hosts.stdout.split()[0]]))
    inner += f" --main_process_port {PORT} --machine_rank $SLURM_NODEID " + " ".join(map(_quoted, step))
    # Snakemake's plugin runs a job inside a step of its own, whose resources this one must share.
    srun = ["srun", "--overlap", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"]
    return [*srun, "sh", "-c", inner]


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"

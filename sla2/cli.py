"""`sla2 <step> ...`: the same as `python -m sla2.<step> ...`, at once where a workflow has the libraries loaded.

`sla2 --gpus 16 --nodes 2 stage2 ...` runs it in sixteen processes, eight on each of two nodes.
"""

import runpy
import sys

from sla2.errors import run_main
from sla2.preload import hand_over

STEPS = {
    "config": "sla2.config",
    "data": "sla2.data",
    "base_model": "sla2.base_model",
    "stage1": "sla2.stage1",
    "stage2": "sla2.stage2",
    "generate": "sla2.generate",
    "score": "sla2_eval.score",
    "judge": "sla2_eval.judge",
    "validity": "sla2_eval.validity",
    "latency": "sla2_eval.latency",
    "tables": "sla2_eval.tables",
    "report": "sla2_eval.report",
    "publish": "sla2_eval.publish",
    "compare": "sla2_eval.compare",
    "publish_base": "sla2.publish_base",
    "rehearsal": "sla2.rehearsal",
}


def main() -> None:
    """Run a step, in several processes with `--gpus` or `--nodes`; without a step, or with `--help`, list them."""
    processes, arguments = {"--gpus": 1, "--nodes": 1}, sys.argv[1:]
    while len(arguments) > 1 and arguments[0] in processes and arguments[1].isdigit():
        processes[arguments[0]] = int(arguments[1])
        arguments = arguments[2:]
    if not arguments or arguments[0] not in STEPS:
        wanted_help = arguments and arguments[0] in ("-h", "--help")
        usage = f"usage: sla2 [--gpus N] [--nodes N] STEP [--help]\nsteps: {', '.join(STEPS)}"
        print(usage, file=sys.stdout if wanted_help else sys.stderr)
        raise SystemExit(0 if wanted_help else 2)
    module = STEPS[arguments[0]]
    sys.argv = [f"sla2 {arguments[0]}", *arguments[1:]]
    if processes["--gpus"] > processes["--nodes"] or processes["--nodes"] > 1:
        from sla2.launch import launch

        per_node = processes["--gpus"] // processes["--nodes"]
        run_main(lambda: sys.exit(launch(module, arguments[1:], per_node, processes["--nodes"])))
    code = hand_over(module, sys.argv)
    if code is not None:
        raise SystemExit(code)
    runpy.run_module(module, run_name="__main__")

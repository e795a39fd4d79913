"""`sla2 <step> ...`: the same as `python -m sla2.<step> ...`, at once where a workflow has the libraries loaded."""

import runpy
import sys

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
    "latency": "sla2_eval.latency",
    "tables": "sla2_eval.tables",
    "report": "sla2_eval.report",
    "rehearsal": "sla2.rehearsal",
}


def main() -> None:
    """Run a step; without one, or with `--help`, list them."""
    if len(sys.argv) < 2 or sys.argv[1] not in STEPS:
        wanted_help = len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help")
        print(f"usage: sla2 STEP [--help]\nsteps: {', '.join(STEPS)}", file=sys.stdout if wanted_help else sys.stderr)
        raise SystemExit(0 if wanted_help else 2)
    module = STEPS[sys.argv[1]]
    sys.argv = [f"sla2 {sys.argv[1]}", *sys.argv[2:]]
    code = hand_over(module, sys.argv)
    if code is not None:
        raise SystemExit(code)
    runpy.run_module(module, run_name="__main__")

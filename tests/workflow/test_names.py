"""One word per step: config section, rule file, rule, module and results folder carry the same one."""

import re
from pathlib import Path

import pytest
import yaml

from sla2.cli import STEPS as COMMANDS

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["data", "base_model", "stage1", "stage2", "generate", "score", "latency", "report"]
RULES = {path.stem: path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk")}


def test_rule_files_in_the_order_of_the_method():
    included = re.findall(r'include: "workflow/rules/(\w+)\.smk"', (ROOT / "Snakefile").read_text())
    assert included == ["common", *STEPS]
    assert set(RULES) == set(included)


def test_snakefile_is_a_page():
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 60


@pytest.mark.parametrize("step", STEPS)
def test_step(step):
    sections = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())["properties"]
    package = "eval/sla2_eval" if step in ("score", "latency", "report") else "sla2"
    assert step in sections
    assert re.search(rf"^rule {step}:", RULES[step], re.MULTILINE)
    assert (ROOT / package / f"{step}.py").is_file()
    assert f"<results>/{step}" in RULES[step]


@pytest.mark.parametrize("step", STEPS)
def test_rule_file_reads_like_a_method_section(step):
    rules = re.split(r"(?m)^rule ", RULES[step])[1:]
    for rule in rules:
        name = rule.split(":")[0]
        assert re.match(r'\w+:\n    """[A-Z].*\."""\n', rule), f"rule {name} needs one sentence that says what it does"
        for directive in ("input", "output", "log", "conda", "params", "shell"):
            assert re.search(rf"(?m)^    {directive}:", rule), f"rule {name} has no {directive}"
        assert rule.rstrip().endswith('2>&1 | tee {log}"'), f"rule {name} does not keep its log"


@pytest.mark.parametrize("text", RULES.values(), ids=RULES)
def test_steps_that_rules_call_exist(text):
    for step in re.findall(r"\( sla2 (\w+)", text):
        package, name = COMMANDS[step].split(".")
        folder = {"sla2": "sla2", "sla2_eval": "eval/sla2_eval"}[package]
        assert (ROOT / folder / f"{name}.py").is_file(), step


def test_command_line_tool_knows_every_step():
    assert {*STEPS, "judge", "tables", "config"} <= set(COMMANDS)

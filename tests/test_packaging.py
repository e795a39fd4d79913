"""What keeps the checkout, the wheel and the three ways to set up an environment in step."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = {
    re.sub(r"[-_.]+", "-", name.lower()): version
    for name, version in re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text())
}
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for name in ("wan", "eval", "workflow", "notebooks", "dev") for text in EXTRAS[name]]
REQUIREMENTS += [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]


def tracked_files() -> list[Path]:
    """Files that git has or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("folder", ["kernels", "eval"])
def test_folder_is_no_package(folder):
    """PyPI's `kernels`, which diffusers and transformers look for, would be shadowed from the root of the checkout."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_lock_satisfies_pyproject(requirement):
    assert requirement.specifier.contains(LOCK[re.sub(r"[-_.]+", "-", requirement.name.lower())])


def test_all_extra_is_all_extras():
    wanted = {name for name in EXTRAS if name != "all"}
    assert {extra for text in EXTRAS["all"] for extra in Requirement(text).extras} == wanted


def test_conda_environments_install_the_lock():
    """Two environments, one for people and one for Snakemake, with the same Python and nothing pinned but by the lock."""
    people = yaml.safe_load((ROOT / "environment.yml").read_text())
    snakemake = yaml.safe_load((ROOT / "workflow/envs/sla2.yaml").read_text())
    conda = [entry for entry in people["dependencies"] if isinstance(entry, str)]
    pip = [entry["pip"] for entry in people["dependencies"] if isinstance(entry, dict)]
    assert conda == snakemake["dependencies"]
    assert people["channels"] == snakemake["channels"]
    assert pip == [["--requirement requirements.lock"]]
    script = (ROOT / "workflow/envs/sla2.post-deploy.sh").read_text()
    assert "--require-hashes --requirement requirements.lock" in script
    python = next(entry.partition("=")[2] for entry in conda if entry.startswith("python="))
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(f"{python}.0")


def test_makefile_agrees_with_pyproject_on_python():
    makefile = (ROOT / "Makefile").read_text()
    low, high = re.search(r"\((\d, \d+)\) <= sys.version_info\[:2\] <= \((\d, \d+)\)", makefile).groups()
    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    for minor in range(8, 20):
        in_makefile = int(low.split(", ")[1]) <= minor <= int(high.split(", ")[1])
        assert supported.contains(f"3.{minor}.0") == in_makefile


def test_lock_is_hashed_and_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", text)[1:]
    assert len(entries) > 100
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"(?m)^--|https?://|file://", text)


def test_no_path_of_this_machine_is_committed():
    private = re.compile(
        "|".join([r"/home/\w+", "/" + "root/", r"(?<![\w.])" + re.escape(f"{ROOT}/"), "file:" + "///"])
    )
    for path in tracked_files():
        if path.suffix in {
            ".py",
            ".smk",
            ".yaml",
            ".yml",
            ".toml",
            ".md",
            ".tsv",
            ".rst",
            ".ipynb",
            ".sh",
            ".lock",
            "",
        }:
            found = private.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_what_the_snakefile_imports_is_light():
    """Snakemake reads the workflow at every start and again for every job on a cluster."""
    code = (
        "import sys; import sla2.config, sla2.config_checks, sla2.prompts, sla2.study, sla2.variant; "
        "sla2.config.load_study('config/tiny.yaml'); "
        "heavy = {'torch', 'numpy', 'pandas', 'diffusers', 'rfc3987_syntax'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_pickle():
    """Weights are safetensors, tables are text: nothing that is read can run code."""
    banned = re.compile(r"\b(torch\.(save|load)\(|import (pickle|joblib)|allow_pickle=True|weights_only=False)")
    for folder in ("sla2", "kernels", "eval", "workflow"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not banned.search(path.read_text()), path

"""A checkout of the workflow in a fresh folder, and what Snakemake would do there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("Snakefile", "profiles", "workflow", "config", "notebooks")


class Checkout:
    """A copy of the workflow without the code, which is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def pending(self, *arguments: str) -> set[str]:
        """Outputs that a run would make, below results/tiny."""
        plan = self.snakemake(*arguments, "--dry-run", "--quiet", "host").stdout
        outputs = re.findall(r"(?m)^    output: (.*)$", plan)
        return {file.removeprefix("results/tiny/") for line in outputs for file in line.split(", ")}

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        path.write_text(text.replace(old, new))

    def finish(self) -> None:
        """Leave every output there, empty, and recorded as made from the present settings."""
        for name in self.pending():
            path = self.folder / "results/tiny" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.touch()
            else:
                path.mkdir(exist_ok=True)
        self.snakemake("--touch", "--forceall")


def copy_checkout(source: Path, target: Path, names) -> Path:
    """Copy these files and folders of a checkout, links as links."""
    target.mkdir()
    for name in names:
        if (source / name).is_dir() and not (source / name).is_symlink():
            shutil.copytree(source / name, target / name, symlinks=True)
        else:
            shutil.copy2(source / name, target / name, follow_symlinks=False)
    return target

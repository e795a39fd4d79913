"""A measurement is one row; where it comes from stands beside it.

`Record` fixes the columns of every score and latency file. An empty value needs a reason: tables count such rows and never
average over them in silence. Its `status` says which kind of reason that is.
"""

import csv
import datetime
import gzip
import importlib.metadata
import io
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sla2.errors import UserError
from sla2.files import settings_hash, write_atomic, write_json

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "open-clip-torch",
    "torchmetrics",
    "numpy",
    "av",
    "opencv-python-headless",
)


OK, NOT_AVAILABLE, UNDEFINED = "ok", "not_available", "undefined"


def status_of(value: float | None, reason: str) -> str:
    """`ok`; `undefined` where the metric's definition has no number for this input, whose reasons begin with that word; else
    `not_available`: something that it needs is missing, such as weights, a prompt or a readable file."""
    if value is not None:
        return OK
    return UNDEFINED if reason.startswith(UNDEFINED) else NOT_AVAILABLE


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement.

    Args:
        train_seed: seed of the fine-tuning run, None where nothing was trained.
        prompt_id, seed: prompt and sampling seed of a video, None for what is not about a video.
        layer: self-attention layer, None for what is not about a layer.
        value: the number, None when it could not be had; then `reason` says why.
        unit: `1` for a pure number, else such as `ms`, `dB`, `px/frame`.
        higher_is_better: None where neither direction is better.
        backend: what computed it, such as `torchmetrics-1.9.0/cpu`.
    """

    study: str
    variant: str
    metric: str
    value: float | None
    unit: str = "1"
    higher_is_better: bool | None = None
    backend: str = ""
    reason: str = ""
    train_seed: int | None = None
    prompt_id: str | None = None
    seed: int | None = None
    layer: int | None = None

    @property
    def status(self) -> str:
        """See `status_of`."""
        return status_of(self.value, self.reason)

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError(f"{self.variant} {self.metric}: a record without a value needs a reason")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(
                f"{self.variant} {self.metric}: value {self.value} is not finite; record None and the reason"
            )


COLUMNS = [
    "study",
    "variant",
    "train_seed",
    "prompt_id",
    "seed",
    "layer",
    "metric",
    "value",
    "unit",
    "higher_is_better",
    "backend",
    "status",
    "reason",
]
# Of studies published before there was a status, which follows from the rest.
WITHOUT_STATUS = [name for name in COLUMNS if name != "status"]
_INTEGERS = ("train_seed", "seed", "layer")


def write_records(path: str | Path, records: list[Record]) -> None:
    """Write records as CSV with the fixed column order, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = asdict(record) | {"status": record.status}
        row["higher_is_better"] = {True: "true", False: "false", None: ""}[record.higher_is_better]
        row["value"] = "" if record.value is None else repr(float(record.value))
        writer.writerow({name: "" if row[name] is None else row[name] for name in COLUMNS})
    write_atomic(path, text.getvalue())


def read_records(path: str | Path) -> list[Record]:
    """Read what `write_records` wrote, packed by gzip where the name ends so.

    Raises:
        UserError: when the file is missing, its columns differ, or a status does not fit its value and reason.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such record file; run the step that writes it")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames not in (COLUMNS, WITHOUT_STATUS):
            raise UserError(f"{path}: columns are {reader.fieldnames}, expected {COLUMNS}")
        records = []
        for row in reader:
            record = _parse(row)
            if row.get("status", record.status) != record.status:
                raise UserError(
                    f"{path}:{reader.line_num}: status '{row['status']}' with value '{row['value']}' and reason '{row['reason']}'; "
                    f"that is '{record.status}': run the step that writes this file"
                )
            records.append(record)
        return records


def _parse(row: dict[str, str]) -> Record:
    values: dict = {field.name: row[field.name] for field in fields(Record)}
    values["value"] = float(row["value"]) if row["value"] else None
    values["higher_is_better"] = {"true": True, "false": False, "": None}[row["higher_is_better"]]
    values["prompt_id"] = row["prompt_id"] or None
    for name in _INTEGERS:
        values[name] = int(row[name]) if row[name] else None
    return Record(**values)


def write_provenance(path: str | Path, settings: dict, **extra: object) -> None:
    """Write `<path>.provenance.json`: commit, settings and their hash, versions, machine and UTC time of a result.

    Args:
        path: the result that this describes.
        settings: the step's settings as it received them.
        extra: further facts, such as a weights hash.
    """
    write_json(
        f"{path}.provenance.json",
        {
            "command": [Path(sys.argv[0]).name, *map(_without_folders, sys.argv[1:])],
            "git": _git_state(),
            "settings": settings,
            "settings_hash": settings_hash(settings),
            "python": platform.python_version(),
            "packages": _versions(),
            "machine": machine(),
            "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **extra,
        },
    )


def _without_folders(argument: str) -> str:
    """The last part of an absolute path: results are published, and where they lay on a machine tells nobody anything."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def machine() -> dict:
    """Processor, GPU and driver that numbers of this process come from."""
    import torch

    facts: dict = {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpu": None, "driver": None}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = answer.stdout.split("\n")[0].strip() or None
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_state() -> dict:
    """Commit and dirty flag of the checkout that this package runs from, unless SLA2_COMMIT says of which commit these files are a copy."""
    if os.environ.get("SLA2_COMMIT"):
        return {"commit": os.environ["SLA2_COMMIT"], "dirty": None}
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if commit.returncode:
            return {}
        status = subprocess.run(
            ["git", "-C", here, "status", "--porcelain"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}

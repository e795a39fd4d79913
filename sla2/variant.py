"""The variants sheet: one row is one attention variant, and every allowed word stands here.

Standard library only, so that the Snakefile can read the sheet without importing torch. Each axis is a plain dict from the
word in the sheet to the class that implements it, as `module:name` for `pkgutil.resolve_name`.
"""

import csv
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sla2.errors import UserError

ATTENTIONS = {
    "full": "sla2.attention:FullAttention",  # dense softmax attention
    "full_other": "sla2.attention:OtherKernelAttention",  # the same by another kernel: the noise floor of rounding
    "sla": "sla2.attention:SparseLinearAttention",  # SLA as published: linear branch over the skipped blocks
    "sla_main": "sla2.attention:SparseLinearAttention",  # SLA as TurboDiffusion runs it: linear branch over all keys
    "sla2": "sla2.attention:SparseLinearAttention",  # SLA2, equations 13 and 14
}
DENSE_ATTENTIONS = ("full", "full_other")
ROUTERS = {
    "none": None,
    "learned": "sla2.router:LearnedRouter",
    "offset": "sla2.router:OffsetRouter",
    "mean_pool": "sla2.router:MeanPoolRouter",
    "random": "sla2.router:RandomRouter",
}
LEARNED_ROUTERS = ("learned", "offset")
MIXINGS = {
    "none": None,
    "alpha": "sla2.mixing:AlphaMixing",
    "sum": "sla2.mixing:SumMixing",
    "projection": "sla2.mixing:ProjectionMixing",
    "sparse": "sla2.mixing:SparseOnly",  # no linear branch
    "linear": "sla2.mixing:LinearOnly",  # no sparse branch; with sla_main, linear attention over all keys
}
QUANTIZERS = {
    "none": "sla2.quantization:NO_QUANTIZATION",
    "ptq-int8": "sla2.quantization:PTQ_INT8",
    "qat-int8": "sla2.quantization:QAT_INT8",
    "ptq-fp8": "sla2.quantization:PTQ_FP8",
    "qat-fp8": "sla2.quantization:QAT_FP8",
}
AXES = {"attention": ATTENTIONS, "router": ROUTERS, "mixing": MIXINGS, "quantization": QUANTIZERS}
BASE, FULL = "base", "full"  # the two dense rows that every comparison needs


@dataclass(frozen=True)
class Variant:
    """One row of the sheet.

    Args:
        variant: name of the row; letters, digits, `-`, `_` and `.`, as it becomes a folder name.
        attention, router, mixing, quantization: words of `AXES`.
        sparsity: fraction of key blocks that the sparse branch skips, in [0, 1).
        finetune: whether stage 2 trains this row; without it the untouched base weights are used.
    """

    variant: str
    attention: str
    router: str
    mixing: str
    quantization: str
    sparsity: float
    finetune: bool

    @property
    def dense(self) -> bool:
        """Whether every query sees every key exactly."""
        return self.attention in DENSE_ATTENTIONS

    @property
    def stage1_group(self) -> str | None:
        """The stage-1 run that initialises this row; rows with equal router, mixing and sparsity share it."""
        if self.attention != "sla2":
            return None
        return f"{self.router}-{self.mixing}-{self.sparsity * 100:g}"

    def row(self) -> dict:
        """The row as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict) -> "Variant":
        return cls(**{field.name: row[field.name] for field in fields(cls)})


def kept_blocks(sparsity: float, key_blocks: int) -> int:
    """Key blocks that each query block keeps: at least one, else the nearest whole number to (1 - sparsity) T_n."""
    return min(key_blocks, max(1, round((1 - sparsity) * key_blocks)))


def read_variants(path: str | Path) -> dict[str, Variant]:
    """Read and check a tab-separated sheet.

    Returns:
        Rows by name, in the order of the sheet.

    Raises:
        UserError: naming file, row, word and the choices, for whatever the method cannot run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such variants sheet; set `variants.sheet` to a tab-separated file")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t")
        names = [field.name for field in fields(Variant)]
        if reader.fieldnames != names:
            raise UserError(f"{path}: columns are {reader.fieldnames}, expected {names}, separated by tabs")
        rows = [_parse(row, path) for row in reader]
    sheet: dict[str, Variant] = {}
    for row in rows:
        if row.variant in sheet:
            raise UserError(f"{path}: row '{row.variant}' stands twice; rename one")
        sheet[row.variant] = row
    for name in (BASE, FULL):
        if name not in sheet:
            raise UserError(f"{path}: row '{name}' is missing; every comparison stands on it")
    return sheet


def _parse(row: dict, path: Path) -> Variant:
    name = row["variant"] or ""
    where = f"{path}: row '{name}'"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"{where}: a name may hold letters, digits, '.', '_' and '-', and starts with a letter or digit"
        )
    for axis, words in AXES.items():
        if row[axis] not in words:
            raise UserError(f"{where}: {axis} '{row[axis]}' is not one of {', '.join(words)}")
    try:
        sparsity = float(row["sparsity"])
    except (TypeError, ValueError):
        sparsity = -1.0
    if not 0 <= sparsity < 1:
        raise UserError(f"{where}: sparsity '{row['sparsity']}' is not a fraction in [0, 1), such as 0.97")
    if row["finetune"] not in ("yes", "no"):
        raise UserError(f"{where}: finetune '{row['finetune']}' is not one of yes, no")
    values = {axis: row[axis] for axis in AXES}
    variant = Variant(variant=name, **values, sparsity=sparsity, finetune=row["finetune"] == "yes")
    _check_combination(variant, where)
    return variant


def _check_combination(variant: Variant, where: str) -> None:
    if variant.dense:
        extras = [axis for axis in ("router", "mixing", "quantization") if getattr(variant, axis) != "none"]
        if extras or variant.sparsity:
            found = ", ".join([*extras, *(["sparsity"] if variant.sparsity else [])])
            raise UserError(f"{where}: {variant.attention} attention has no {found}; use none, none, none and 0")
        if variant.attention == "full_other" and variant.finetune:
            raise UserError(
                f"{where}: finetune 'yes', but attention 'full_other' shows what a kernel changes in the untouched model; use no"
            )
        return
    for axis in ("router", "mixing"):
        if getattr(variant, axis) == "none":
            raise UserError(
                f"{where}: attention '{variant.attention}' needs a {axis}; choose one of {', '.join(list(AXES[axis])[1:])}"
            )
    if variant.attention != "sla2" and variant.router in LEARNED_ROUTERS:
        raise UserError(f"{where}: only attention 'sla2' has a stage 1 that trains a router; use mean_pool or sla2")

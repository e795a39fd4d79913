"""VBench's normalised scores and its totals, by its own constants (`scripts/constant.py`, commit 45e79ec). Standard library only.

    sla2-eval vbench-total .../results_..._eval_results.json

VBench takes a dimension that is missing for 0, which the normalisation can make negative; here a total without all of its
dimensions is refused. Its own totals are of its own prompts: the eight dimensions of any folder never make one.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sla2.errors import UserError
from sla2.files import read_json


class Scale(NamedTuple):
    """Raw scores that become 0 and 1, without a cut beyond them, and the weight in the mean."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Scale(low=0.1462),
    "background_consistency": Scale(low=0.2615),
    "temporal_flickering": Scale(low=0.6293),
    "motion_smoothness": Scale(low=0.706, high=0.9975),
    "dynamic_degree": Scale(weight=0.5),
    "aesthetic_quality": Scale(),
    "imaging_quality": Scale(),
}
SEMANTIC = {
    "object_class": Scale(),
    "multiple_objects": Scale(),
    "human_action": Scale(),
    "color": Scale(),
    "spatial_relationship": Scale(),
    "scene": Scale(high=0.8222),
    "appearance_style": Scale(low=0.0009, high=0.2855),
    "temporal_style": Scale(high=0.364),
    "overall_consistency": Scale(high=0.364),
}
SHARES = {"Quality": 4, "Semantic": 1}  # in Total


def normalised(dimension: str, raw: float) -> float:
    """(raw - low) / (high - low): a frozen video's motion smoothness of 1 becomes 1.0086."""
    scale = (QUALITY | SEMANTIC)[dimension]
    return (raw - scale.low) / (scale.high - scale.low)


def totals(raw: Mapping[str, float]) -> dict[str, float]:
    """Quality, Semantic and Total of raw scores in [0, 1] by dimension.

    Raises:
        UserError: naming the dimensions that are missing.
    """
    if missing := [name for name in (*QUALITY, *SEMANTIC) if name not in raw]:
        raise UserError(
            f"no total without {', '.join(missing)}: VBench would take them for 0; run those dimensions too"
        )
    found = {
        name: sum(scale.weight * normalised(dimension, raw[dimension]) for dimension, scale in group.items())
        / sum(scale.weight for scale in group.values())
        for name, group in (("Quality", QUALITY), ("Semantic", SEMANTIC))
    }
    return found | {"Total": sum(SHARES[name] * value for name, value in found.items()) / sum(SHARES.values())}


def total_main() -> None:
    """Print normalised dimensions, Quality, Semantic and Total of VBench's own results on its own prompts."""
    parser = argparse.ArgumentParser(prog="sla2-eval vbench-total", description=total_main.__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="VBench's ..._eval_results.json, all dimensions in one or more"
    )
    raw: dict[str, float] = {}
    for path in parser.parse_args().results:
        for dimension, found in read_json(path).items():
            if dimension in raw:
                raise UserError(f"{path}: {dimension} stands in an earlier file too; give one of them")
            if not isinstance(found, list) or not found or not isinstance(found[0], bool | int | float):
                raise UserError(f"{path}: {dimension}: is not [total, [{{video_path, video_results}}, ...]]")
            raw[dimension] = float(found[0])
    found = totals(raw)
    for dimension in (*QUALITY, *SEMANTIC):
        print(f"{dimension:<22}  {raw[dimension]:.4f}  normalised {normalised(dimension, raw[dimension]):.4f}")
    for name, value in found.items():
        print(f"{name:<22}  {value:.5f}")

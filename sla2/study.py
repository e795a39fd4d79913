"""A checked config with what it names: the rows of the sheet, the prompts, and the lengths that follow from the video's size.

A Wan VAE turns F x H x W frames into ((F - 1) / temporal + 1) x (H / spatial) x (W / spatial) latents, and the transformer's
patch of 1 x 2 x 2 turns these into the tokens that attention sees.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sla2.errors import UserError
from sla2.prompts import Prompt, read_prompts
from sla2.variant import Variant, read_variants

WAN_SPATIAL, WAN_TEMPORAL, PATCH = 8, 4, 2
PROCESSES = ("gpus", "nodes")  # of sections base_model and stage2
NOT_OF_A_RUN = ("seeds", "headline", "of_rows")  # of section stage2


@dataclass(frozen=True)
class Geometry:
    """Lengths of a study.

    Args:
        spatial, temporal: factors by which the VAE shortens space and time.
        grid: tokens in time, height and width.
        tokens: their product, the N of attention.
        query_blocks, key_blocks: T_m and T_n, the last block of each perhaps short.
    """

    spatial: int
    temporal: int
    grid: tuple[int, int, int]
    tokens: int
    query_blocks: int
    key_blocks: int

    @classmethod
    def of(cls, config: dict) -> "Geometry":
        spatial, temporal = _compression(config["base_model"])
        video, attention = config["data"]["video"], config["attention"]
        side = spatial * PATCH
        grid = ((video["frames"] - 1) // temporal + 1, video["height"] // side, video["width"] // side)
        tokens = grid[0] * grid[1] * grid[2]
        blocks = (-(-tokens // attention[name]) for name in ("block_q", "block_k"))
        return cls(spatial, temporal, grid, tokens, *blocks)


@dataclass(frozen=True)
class Study:
    """One study.

    Args:
        config: every key, defaults filled in.
        variants: the rows that this study runs, in the order of the sheet.
        prompts: the rows of the prompt sheet.
        geometry: lengths.
        place: where a dotted key stands, as `file:line`.
    """

    config: dict
    variants: dict[str, Variant]
    prompts: list[Prompt]
    geometry: Geometry
    place: Callable[[str], str]

    @classmethod
    def of(cls, config: dict, place: Callable[[str], str]) -> "Study":
        """Read what a config names.

        Raises:
            UserError: for a sheet that is missing or wrong, or a row that it does not have.
        """
        rows, path = config["variants"]["rows"], config["variants"]["sheet"]
        sheet = read_variants(path)
        for index, name in enumerate([] if rows == "all" else rows):
            if name not in sheet:
                where, choices = place(f"variants.rows.{index}"), ", ".join(sheet)
                raise UserError(
                    f"{where}: variants.rows: '{name}' is not a row of {path}; use all, or some of {choices}"
                )
        variants = {name: row for name, row in sheet.items() if rows == "all" or name in rows}
        return cls(config, variants, read_prompts(config["prompts"]), Geometry.of(config), place)

    def training_seeds(self, name: str) -> list[int]:
        """Training seeds of a row; a row that is not fine-tuned stands once, as seed 0."""
        stage2 = self.config["stage2"]
        counts = stage2["headline"] if name in stage2["headline"]["rows"] else stage2
        return list(range(counts["seeds"] if self.variants[name].finetune else 1))

    @property
    def withheld(self) -> list[str]:
        """Captions that no clip to train on may have."""
        return [prompt.text for prompt in self.prompts] if self.config["data"]["hold_out_prompts"] else []

    def section(self, name: str, **extra: object) -> dict:
        """Settings of one step: its config section, study, seed, device and threads, and what else it needs.

        The counts of training runs, GPUs and nodes are left out: they say how many there are, not what a job computes. What
        `stage2.of_rows` changes for a row is put in its place.

        Args:
            name: a section, such as `stage2`, or a part of one, such as `score.judge`.
            extra: what the job needs beyond its section; of stage2, `variant` is the row.
        """
        values = self.config
        for part in name.split("."):
            values = values[part]
        if name == "stage2":
            own = values["of_rows"].get(extra.get("variant", {}).get("variant"), {})
            values = {key: value for key, value in values.items() if key not in NOT_OF_A_RUN} | own
        values = {key: value for key, value in values.items() if key not in PROCESSES}
        values["threads"] = values.get("threads") or self.config["threads"]
        return {key: self.config[key] for key in ("study", "seed", "device")} | values | extra


def is_path(pretrained: str) -> bool:
    """Whether `base_model.pretrained` names a folder and not a hub id such as `owner/name`."""
    return pretrained.startswith((".", "/", "~")) or Path(pretrained).is_dir()


def _compression(base_model: dict) -> tuple[int, int]:
    """Spatial and temporal factor of the VAE: of the one to train, of the folder given, else Wan2.1's."""
    if base_model.get("vae"):
        vae = base_model["vae"]
        return vae["patch_size"] * 2 ** (len(vae["dim_mult"]) - 1), 2 ** sum(vae["temporal_downsample"])
    settings = Path(base_model["pretrained"] or "") / "vae/config.json"
    if base_model["pretrained"] and settings.is_file():
        vae = json.loads(settings.read_text(encoding="utf-8"))
        return vae.get("scale_factor_spatial", WAN_SPATIAL), vae.get("scale_factor_temporal", WAN_TEMPORAL)
    return WAN_SPATIAL, WAN_TEMPORAL

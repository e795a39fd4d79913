"""A trained base model small enough for a repository: others run its study without training it, and from the same weights.

    sla2 publish_base results/mini/base_model --output results/reference/mini-base
    cp -r results/reference/mini-base results/mini/base_model     # where the study is not there yet; `make ablations` takes it up

Transformer and text encoder in bf16, as videos are generated with them, but for what Wan keeps in fp32; the VAE in fp32. Fine-tuning
goes on from the rounded weights in fp32. Latents are encoded again.
"""

import argparse
import shutil
from pathlib import Path

import torch

from sla2.errors import UserError, run_main
from sla2.files import read_json, write_folder, write_json
from sla2.wan import load_pipeline

SHARD = "4MB"  # a repository's file has 5 MiB at most
# What `sla2.base_model` leaves beside the pipeline that it has trained.
LEFT = "trained.json", "trained.json.provenance.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_model", type=Path, help="results/<study>/base_model, trained")
    parser.add_argument("--output", type=Path, required=True, help="folder; replaced")
    args = parser.parse_args()
    for name in LEFT:
        if not (args.base_model / name).is_file():
            raise UserError(
                f"{args.base_model / name}: missing; only a base model that the workflow has trained is published"
            )
    pipeline = load_pipeline(str(args.base_model / "pipeline"), None, torch.bfloat16)

    def fill(folder: Path) -> None:
        pipeline.save_pretrained(folder / "pipeline", max_shard_size=SHARD)
        for path in folder.glob("pipeline/**/*.json"):
            settings = read_json(path)
            if settings.pop("_name_or_path", None):  # of this machine
                write_json(path, settings)
        note, provenance = LEFT
        shutil.copyfile(args.base_model / note, folder / note)
        write_json(folder / provenance, read_json(args.base_model / provenance) | {"weights_rounded_to": "bfloat16"})

    write_folder(args.output, fill)


if __name__ == "__main__":
    run_main(main)

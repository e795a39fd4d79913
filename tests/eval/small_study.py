"""Records, logs and videos of a small invented study, written as the steps write them, for tests of tables, figures and page."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sla2.files import sha256_file, write_json
from sla2.record import Record, write_records
from sla2.variant import Variant, read_variants
from sla2_eval.response import add_responses, write_rows

SHEET = Path(__file__).resolve().parents[2] / "config/variants.tsv"
PROMPTS = {f"p{i:02d}": f"a red circle moves right, take {i}" for i in range(1, 7)}
HEADLINE = ["oracle.color", "oracle.direction", "temporal_flickering", "fidelity.psnr", "attention.rel_l1"]
LAYERS, SEEDS = 4, 2
TWICE = ("full", "sla2-97")  # rows with two training seeds


def settings() -> dict:
    """Settings of step tables, as the workflow passes them."""
    return {
        "study": "small",
        "seed": 0,
        "reference": "full",
        "draws": 400,
        "confidence": 0.95,
        "headline": HEADLINE,
        "margins": {"temporal_flickering": 0.02, "oracle.color": 0.1},
        "contact": {"prompts": 2, "frames": 4},
        "videos": {"prompts": 2, "seeds": 1},
        "variants": [row.row() for row in read_variants(SHEET).values()],
    }


def write_study(folder: Path) -> list[str]:
    """Write base_model.json, logs, scores and latency below `folder`; returns the arguments of step tables."""
    rows = [Variant.from_row(row) for row in settings()["variants"]]
    (folder / "base_model").mkdir(parents=True)
    facts = {"parameters": 1_500_000, "layers": LAYERS, "heads": 4, "head_dim": 32, "tokens": 576, "grid": [9, 8, 8]}
    clip = {"frames": 17, "height": 64, "width": 64, "fps": 8, "text_length": 32, "weights_sha256": "ab" * 32}
    (folder / "base_model/base_model.json").write_text(json.dumps({**facts, **clip}))
    for row in rows:
        write_records(folder / f"score/{row.variant}.csv", [*_videos(row), *_layers(row), *_absent(row)])
    write_records(folder / "latency/latency.csv", [record for row in rows for record in _latency(row)])
    (folder / "latency/latency.csv.provenance.json").write_text(
        json.dumps({"git": {"commit": "0123abc"}, "utc": "now"})
    )
    write_rows(folder / "score/validity.csv", list(_responses()))
    logs = list(_logs(folder, rows))
    scores = [str(folder / f"score/{row.variant}.csv") for row in rows]
    base, latency = folder / "base_model/base_model.json", folder / "latency/latency.csv"
    return [
        *("--settings", json.dumps(settings()), "--base", str(base), "--scores", *scores),
        *(
            "--latency",
            str(latency),
            "--validity",
            str(folder / "score/validity.csv"),
            "--training",
            *logs,
            "--routers",
            *_reports(folder, rows),
            "--output",
            str(folder / "tables"),
        ),
    ]


def _responses() -> Iterator[dict]:
    """A metric that sees noise and freezing, one that sees nothing, one that is undefined when frozen; nothing was filmed."""
    rows = []
    for distortion, strength, unit in (("noise", 5, "levels"), ("noise", 40, "levels"), ("freeze", 1, "share")):
        place = {"domain": "study", "distortion": distortion, "strength": strength, "unit": unit, "clips": 6}
        changes = {"temporal_flickering": -0.01 * strength, "guard.blank": 0.0}
        for metric, change in changes.items():
            sees = "yes" if change else "no"
            rows.append(
                place
                | {"metric": metric, "clean": 0.9, "mean": 0.9 + change, "change": change, "se": 0.001, "sees": sees}
            )
        rows.append(place | {"metric": "proxy.interp_gain", "clips": 0, "reason": "undefined for the damaged clips"})
    rows.append({"domain": "filmed", "metric": "temporal_flickering", "clips": 0, "reason": "no films are installed"})
    add_responses(rows)
    yield from rows


def _harm(row: Variant) -> float:
    """How much a row is made to lose, in [0, 1]."""
    lost = {"random": 0.6, "topk": 0.35, "sum": 0.3, "ptq": 0.15}
    return row.sparsity * 0.1 + lost.get(row.variant.rpartition("-")[2], 0.0) + (0.2 if row.attention == "sla" else 0.0)


def _rng(*words: object) -> np.random.Generator:
    return np.random.default_rng(list(" ".join(map(str, words)).encode()))


def _training_seeds(row: Variant) -> list[int | None]:
    return [None] if not row.finetune else [0, 1] if row.variant in TWICE else [0]


def _videos(row: Variant) -> list[Record]:
    records = []
    for train_seed in _training_seeds(row):
        for number, prompt in enumerate(PROMPTS):
            for seed in range(SEEDS):
                shared, own = _rng(prompt, seed), _rng(prompt, seed, row.variant, train_seed)
                luck, noise = shared.random(), own.normal()
                place = {
                    "study": "small",
                    "variant": row.variant,
                    "train_seed": train_seed,
                    "prompt_id": prompt,
                    "seed": seed,
                }
                up, about = {"higher_is_better": True}, {"backend": "torch/cpu"}
                values = {
                    "oracle.color": float(luck * 0.8 + 0.2 > _harm(row)),
                    "oracle.direction": float(luck > _harm(row) + 0.05 * noise),
                    "temporal_flickering": 0.97 - 0.02 * _harm(row) - 0.004 * luck + 0.001 * noise,
                    "guard.static": float(number == 0 and row.router == "random"),
                }
                records += [Record(metric=m, value=v, **place, **up, **about) for m, v in values.items()]
                niqe = {"metric": "proxy.naturalness_niqe_indomain", "higher_is_better": False, **about}
                if number == 1 and seed == 0:
                    records.append(Record(value=None, reason="the frames are flat", **niqe, **place))
                else:
                    records.append(Record(value=5 + 4 * _harm(row) + luck + 0.3 * noise, **niqe, **place))
                if row.variant == "base":
                    records.append(Record(metric="floor.psnr", value=14 + luck + noise, unit="dB", **about, **place))
                else:
                    psnr = {"metric": "fidelity.psnr", "unit": "dB", **up, "backend": "torchmetrics-1.9.0/cpu"}
                    records.append(Record(value=30 - 12 * _harm(row) + 2 * luck + noise, **psnr, **place))
    return records


def _layers(row: Variant) -> list[Record]:
    if row.dense:
        floor = {"study": "small", "variant": row.variant, "metric": "floor.attention_rel_l1"}
        if row.variant == "base":
            return [Record(value=1e-3 * (1 + layer), layer=layer, **floor) for layer in range(LAYERS)]
        return [Record(value=None, reason="measured on the untouched dense model only", **floor)]
    records = []
    for train_seed in _training_seeds(row):
        for layer in range(LAYERS):
            place = {"study": "small", "variant": row.variant, "train_seed": train_seed, "layer": layer}
            error = 0.1 + 0.5 * _harm(row) + 0.05 * layer + 0.01 * _rng(row.variant, layer).random()
            values = {"attention.rel_l1": (error, False), "attention.cosine": (1 - error**2, True)}
            values["attention.kept_mass"] = (0.9 - 0.4 * row.sparsity, True)
            values["sparsity.realised"] = (row.sparsity, None)
            if row.mixing == "alpha":
                values["attention.alpha_error"] = (0.1 + 0.03 * layer, False)
            records += [Record(metric=m, value=v, higher_is_better=up, **place) for m, (v, up) in values.items()]
    return records


def _absent(row: Variant) -> list[Record]:
    reason = "not available: needs the weights <dino>.pth"
    return [Record(study="small", variant=row.variant, metric="vbench.subject_consistency", value=None, reason=reason)]


def _latency(row: Variant) -> list[Record]:
    share = 1 - row.sparsity
    dense = row.dense
    parts = {
        "router": 0 if dense else 2e6,
        "sparse": 4e8 * share,
        "linear": 0 if dense else 1e7,
        "mixing": 0 if dense else 1e6,
    }
    op_ms = 4.0 * share + (0 if dense else 0.8)
    values = {
        "latency.attention_op.p20": (op_ms * 0.95, "ms", False),
        "latency.attention_op.p50": (op_ms, "ms", False),
        "latency.attention_op.p80": (op_ms * 1.1, "ms", False),
        "latency.dense_attention.p50": (4.0, "ms", False),
        "latency.denoising_step.p20": (op_ms + 5.8, "ms", False),
        "latency.denoising_step.p50": (op_ms + 6, "ms", False),
        "latency.denoising_step.p80": (op_ms + 6.5, "ms", False),
        "latency.dense_denoising_step.p50": (10.0, "ms", False),
        "latency.denoising": (20 * (op_ms + 6), "ms", False),
        "latency.text_encoding.p50": (15.0, "ms", False),
        "speedup.end_to_end": (215 / (20 * (op_ms + 6) + 15), "1", True),
        "speedup.attention_op": (4 / op_ms, "1", True),
        "speedup.denoising_step": (10 / (op_ms + 6), "1", True),
        "flops.per_forward": (sum(parts.values()), "FLOP", False),
        **{f"flops.per_forward.{name}": (value, "FLOP", False) for name, value in parts.items()},
        "flops.dense_per_forward": (4e8, "FLOP", False),
        "flops.reduction": (4e8 / sum(parts.values()), "1", True),
        "sparsity.realised": (row.sparsity, "1", None),
    }
    backend = "reference/cpu float32 N=576 batch=1 threads=1"
    return [
        Record(
            study="small",
            variant=row.variant,
            metric=m,
            value=v,
            unit=u,
            higher_is_better=up,
            backend="formula" if "flops" in m else backend,
        )
        for m, (v, u, up) in values.items()
    ]


def _logs(folder: Path, rows: list[Variant]):
    def log(path: Path, phase: str, steps: int, every: int, heldout: str) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["step,phase,split,metric,value"]
        for step in range(1, steps + 1):
            loss = 1 / (1 + step / 20) + 0.1 * _rng(path.parent.name, step).random()
            lines.append(f"{step},{phase},train,loss,{loss:.6g}")
            if step % every == 0:
                gap = 0.05 + 0.2 * _rng(*path.parts[-3:]).random()
                lines.append(f"{step},{phase},heldout,{heldout},{1 / (1 + step / 20) + gap:.6g}")
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    yield log(folder / "base_model/log.csv", "transformer", 80, 20, "loss")
    for group in dict.fromkeys(row.stage1_group for row in rows if row.stage1_group):
        yield log(folder / f"stage1/{group}/log.csv", "stage1", 40, 10, "hard_error")
    for row in rows:
        for seed in _training_seeds(row) if row.finetune else []:
            yield log(folder / f"stage2/{row.variant}/seed{seed}/log.csv", "stage2", 40, 10, "loss")


def _reports(folder: Path, rows: list[Variant]) -> Iterator[str]:
    """A learned router that errs less than the heuristic and a random one that errs most, alpha fitted and, for its own, trained."""
    errors = {"learned": 0.8, "mean_pool": 1.0, "random": 2.0, "oracle": 0.7}
    for row in {row.stage1_group: row for row in rows if row.stage1_group}.values():
        lines = ["layer,sigma,router,alpha,metric,value"]
        for layer in range(LAYERS):
            for word in dict.fromkeys((row.router, "mean_pool", "random", "oracle")):
                error = errors[word] * (0.02 + 0.1 * row.sparsity**8) * (1 + 0.1 * layer)
                lines += [
                    f"{layer},0.7,{word},fitted,hard_error,{error:.6g}",
                    f"{layer},0.7,{word},,kept_mass,{0.2 / error:.6g}",
                ]
            lines.append(f"{layer},0.7,{row.router},trained,hard_error,{errors[row.router] * 0.1:.6g}")
        path = folder / f"stage1/{row.stage1_group}/report.csv"
        path.write_text("\n".join(lines) + "\n")
        yield str(path)


def write_videos(folder: Path) -> None:
    """Videos of all rows below `folder`/generate: a square that moves, brighter from row to row."""
    import torch

    from sla2.video import write_lossless, write_mp4

    rows = [Variant.from_row(row) for row in settings()["variants"]]
    for number, row in enumerate(rows):
        for seed in _training_seeds(row):
            place = folder / f"generate/{row.variant}/seed{seed or 0}"
            lines = []
            for prompt_number, (prompt, text) in enumerate(list(PROMPTS.items())[:2]):
                name = f"{prompt}-s0"
                frames = torch.full((9, 32, 32, 3), 30, dtype=torch.uint8)
                for t in range(9):
                    frames[t, 8 + 8 * prompt_number : 20 + 8 * prompt_number, 2 * t : 2 * t + 10, 0] = 80 + 10 * number
                write_mp4(place / f"videos/{name}.mp4", frames, 8)
                write_lossless(place / f"lossless/{name}.mkv", frames, 8)
                entry = {
                    "id": name,
                    "prompt_id": prompt,
                    "text": text,
                    "seed": 0,
                    "frames": 9,
                    "height": 32,
                    "width": 32,
                }
                file = f"lossless/{name}.mkv"
                lines.append(json.dumps({**entry, "fps": 8, "file": file, "sha256": sha256_file(place / file)}))
            (place / "manifest.jsonl").write_text("\n".join(lines) + "\n")
            write_json(place / "manifest.jsonl.provenance.json", {"weights_sha256": f"{row.variant} {seed}"})

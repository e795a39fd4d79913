"""What a schema cannot say: settings that do not go together, and paths that are missing."""

from collections.abc import Iterator
from pathlib import Path

from sla2 import scenes
from sla2.errors import UserError
from sla2.study import PATCH, Study, is_path
from sla2.variant import BASE, FULL, kept_blocks

PIPELINE_MULTIPLE = 16  # WanPipeline refuses other heights and widths
TRITON_SMALLEST_BLOCK = 16  # tl.dot takes no shorter side
SMALL_MODEL = ("vae", "text_encoder", "transformer", "train")

Failures = Iterator[tuple[str, str]]


def check_combinations(study: Study) -> Failures:
    """Yield `(dotted key, "value and problem; remedy")` for everything that cannot be run."""
    for check in (_model, _video, _scene, _blocks, _sparsities, _rows, _training, _score, _judge, _report):
        yield from check(study)


def check_paths(study: Study) -> None:
    """Refuse weights and videos that are not there; apart from the rest, so that a dry run needs neither.

    Raises:
        UserError: one line per missing path.
    """
    pretrained, folder = study.config["base_model"]["pretrained"], study.config["data"]["folder"]
    missing = []
    if pretrained and is_path(pretrained) and not (Path(pretrained) / "model_index.json").is_file():
        missing.append(("base_model.pretrained", f"'{pretrained}' has no model_index.json; give a diffusers folder"))
    if folder and not Path(folder).is_dir():
        remedy = "put or link your videos and their captions there, or name another"
        missing.append(("data.folder", f"'{folder}' is no folder; {remedy}"))
    if missing:
        raise UserError("\n".join(f"{study.place(key)}: {key}: {message}" for key, message in missing))


def _model(study: Study) -> Failures:
    model = study.config["base_model"]
    for name in SMALL_MODEL:
        if model["pretrained"] and name in model:
            yield f"base_model.{name}", f"is of a model to train, but pretrained is '{model['pretrained']}'; remove one"
        if not model["pretrained"] and name not in model:
            yield "base_model", f"pretrained is null, but {name} is missing; add it, or set pretrained"
    if "vae" in model:
        entries, halvings = len(model["vae"]["temporal_downsample"]), len(model["vae"]["dim_mult"]) - 1
        if entries != halvings:
            key = "base_model.vae.temporal_downsample"
            yield key, f"{entries} entries, but dim_mult halves {halvings} times; give one entry per halving"
        crop, factor = model["vae"]["crop"], study.geometry.spatial
        if crop % factor:
            yield "base_model.vae.crop", f"{crop} px is not a multiple of {factor}, as the VAE needs; choose a multiple"
    if "text_encoder" in model:
        heads, width = model["text_encoder"]["heads"], model["text_encoder"]["d_model"]
        if width % heads:
            yield "base_model.text_encoder.heads", f"{heads} does not divide d_model {width}; choose a divisor"


def _video(study: Study) -> Failures:
    video, geometry = study.config["data"]["video"], study.geometry
    multiple = max(PIPELINE_MULTIPLE, geometry.spatial * PATCH)
    for side in ("height", "width"):
        if video[side] % multiple:
            near = max(1, round(video[side] / multiple)) * multiple
            yield f"data.video.{side}", f"{video[side]} px is not a multiple of {multiple}; choose such as {near}"
    frames, factor = video["frames"], geometry.temporal
    if (frames - 1) % factor:
        near = max(1, round((frames - 1) / factor)) * factor + 1
        yield "data.video.frames", f"{frames} is not {factor} k + 1, as the VAE needs; choose such as {near}"


def _scene(study: Study) -> Failures:
    for key, message in scenes.check(scenes.SIMPLE | study.config["data"]["scene"]):
        yield f"data.scene.{key}", message


def _blocks(study: Study) -> Failures:
    attention, tokens, device = study.config["attention"], study.geometry.tokens, study.config["device"]
    backend = attention["backend"]
    for name in ("block_q", "block_k"):
        block = attention[name]
        if block > tokens:
            yield f"attention.{name}", f"{block} is larger than the {tokens} tokens of a video; choose a smaller block"
        elif (backend == "triton" or (backend == "auto" and device == "cuda")) and (
            block < TRITON_SMALLEST_BLOCK or block & (block - 1)
        ):
            least = TRITON_SMALLEST_BLOCK
            yield f"attention.{name}", f"{block} does not suit triton; choose a power of two, {least} or more"
    if backend == "triton" and device == "cpu":
        yield "attention.backend", "triton needs a GPU, but device is cpu; choose reference or auto"


def _sparsities(study: Study) -> Failures:
    block, blocks, sheet = (
        study.config["attention"]["block_k"],
        study.geometry.key_blocks,
        study.config["variants"]["sheet"],
    )
    if block > study.geometry.tokens:
        return
    for row in study.variants.values():
        of = f"{block} gives {blocks} key blocks, of which row '{row.variant}' (sparsity {row.sparsity:g})"
        if row.sparsity and round((1 - row.sparsity) * blocks) == 0:
            yield "attention.block_k", f"{of} keeps zero; choose a smaller block, or a lower sparsity in {sheet}"
        elif row.sparsity and kept_blocks(row.sparsity, blocks) == blocks:
            yield "attention.block_k", f"{of} skips none; choose a smaller block, or a higher sparsity in {sheet}"


def _rows(study: Study) -> Failures:
    variants, choices = study.variants, ", ".join(study.variants)
    for name in (BASE, FULL):
        if name not in variants:
            yield "variants.rows", f"'{name}' is missing, and every comparison stands on it; add it"
    stage2 = study.config["stage2"]
    named = {f"stage2.headline.rows.{index}": name for index, name in enumerate(stage2["headline"]["rows"])}
    for key, name in {**named, **{f"stage2.of_rows.{name}": name for name in stage2["of_rows"]}}.items():
        if name not in variants:
            yield key, f"'{name}' is not a row of this study; choose some of {choices}"
        elif not variants[name].finetune:
            yield key, f"'{name}' is not fine-tuned; remove it here, or let the sheet say finetune yes"
    for name, changes in stage2["of_rows"].items():
        if "alpha" in changes and name in variants and variants[name].mixing != "alpha":
            yield f"stage2.of_rows.{name}.alpha", f"mixing {variants[name].mixing} has no alpha; remove it"
    if study.config["report"]["reference"] not in variants:
        name = study.config["report"]["reference"]
        yield "report.reference", f"'{name}' is not a row of this study; choose one of {choices}"


def _training(study: Study) -> Failures:
    stage1, stage2, model = (study.config[name] for name in ("stage1", "stage2", "base_model"))
    drawn, blocks = stage1["query_blocks"], study.geometry.query_blocks
    if drawn > blocks:
        yield "stage1.query_blocks", f"{drawn} is more than the {blocks} of a video; choose at most {blocks}"
    gpus, train = model["gpus"], model.get("train")
    if train:
        batches = {"vae": model["vae"]["batch"], "train": train["batch"], "train.images": train["images"]["batch"]}
        for part, batch in batches.items():
            if batch % gpus:
                yield f"base_model.{part}.batch", f"{batch} clips cannot be shared by {gpus} GPUs; choose a multiple"
    processes = stage2["gpus"] * stage2["nodes"]
    share = stage2["batch"] // processes
    if stage2["batch"] % processes:
        yield "stage2.batch", f"{stage2['batch']} clips cannot be shared by {processes} GPUs; choose a multiple"
    elif stage2["micro_batch"] and share % stage2["micro_batch"]:
        yield (
            "stage2.micro_batch",
            f"{stage2['micro_batch']} does not divide the {share} clips of a GPU; choose a divisor",
        )
    if stage2["compile"] and stage2["parallel"] == "fsdp":
        yield "stage2.compile", "true, but blocks that are split are not compiled; set false, or parallel: ddp"
    seeds, least = stage2["headline"]["seeds"], stage2["seeds"]
    if stage2["headline"]["rows"] and seeds < least:
        yield "stage2.headline.seeds", f"{seeds} is fewer than stage2.seeds {least}; give at least {least}"
    own = {f"stage2.of_rows.{name}": stage2 | changes for name, changes in stage2["of_rows"].items()}
    for key, schedule in {"stage2": stage2, "base_model.train": model.get("train"), **own}.items():
        if schedule and schedule["warmup"] > schedule["steps"]:
            yield f"{key}.warmup", f"{schedule['warmup']} is longer than the {schedule['steps']} steps; choose fewer"
    if train and 0 < train["images"]["steps"] < train["warmup"]:
        steps, warmup = train["images"]["steps"], train["warmup"]
        yield (
            "base_model.train.images.steps",
            f"{steps} is fewer than the warm-up of {warmup}; give more, or 0 for none",
        )


def _score(study: Study) -> Failures:
    score, data = study.config["score"], study.config["data"]
    half = min(data["video"]["height"], data["video"]["width"]) // 2
    if score["naturalness_patch"] > half:
        patch = score["naturalness_patch"]
        yield "score.naturalness_patch", f"{patch} px is more than half of the smaller side; choose at most {half}"
    for name in ("attention_clips", "naturalness_clips"):
        if score[name] > data["clips"]["heldout"]:
            yield (
                f"score.{name}",
                f"{score[name]} is more than data.clips.heldout {data['clips']['heldout']}; choose fewer",
            )


def _judge(study: Study) -> Failures:
    judge, data = study.config["score"]["judge"], study.config["data"]
    for name, divisor in (("frames", "columns"), ("frame_size", "patch"), ("width", "heads")):
        if judge[name] % judge[divisor]:
            problem = f"{judge[name]} is not a multiple of {divisor} {judge[divisor]}"
            yield f"score.judge.{name}", f"{problem}; choose a multiple"
    if judge["frames"] > data["video"]["frames"]:
        frames, most = judge["frames"], data["video"]["frames"]
        yield "score.judge.frames", f"{frames} is more than the {most} of a video; choose at most {most}"
    if data["folder"]:
        return  # a folder of videos has no scene parameters, so the judge is not trained
    for name, split in (("batch", "judge"), ("gate_clips", "judge_heldout")):
        if judge[name] > data["clips"][split]:
            yield (
                f"score.judge.{name}",
                f"{judge[name]} is more than data.clips.{split} {data['clips'][split]}; choose fewer",
            )


def _report(study: Study) -> Failures:
    contact, prompts, frames = (
        study.config["report"]["contact"],
        len(study.prompts),
        study.config["data"]["video"]["frames"],
    )
    if contact["prompts"] > prompts:
        yield "report.contact.prompts", f"{contact['prompts']} is more than the {prompts} of the sheet; choose fewer"
    if contact["frames"] > frames:
        yield "report.contact.frames", f"{contact['frames']} is more than the {frames} of a video; choose fewer"

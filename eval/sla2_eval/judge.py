"""The in-domain judge: an open_clip that learns this study's captions from clips that nothing else sees.

    python -m sla2_eval.judge --settings '<JSON>' --data results/tiny/data --output results/tiny/score/judge

The image tower sees storyboards, so order and direction are visible. Every batch holds, beside its captions, each caption with one
attribute exchanged: such a hard negative can only be told from the truth by that attribute. Equal captions share the target. Half of the
clips are played backwards, with the caption of that, so that what a clip shows beside its motion tells nothing of the direction.
The trained judge is frozen; forced-choice accuracy per attribute on held-out clips is its gate, and a metric whose gate fails is
reported as not available.
"""

import argparse
import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from sla2 import grammar
from sla2.data import Clips
from sla2.device import claim_device
from sla2.errors import UserError, run_main
from sla2.files import sha256_file, write_atomic, write_folder, write_json
from sla2.progress import bar, say
from sla2.record import write_provenance
from sla2_eval.metrics.frames import middle_frames
from sla2_eval.metrics.naturalness import Naturalness
from sla2_eval.metrics.text_alignment import StoryboardClip, Vocabulary, storyboard
from sla2_eval.trained_judge import NAME, choices_of, create_clip, forced_choice_accuracy, model_config, swapped

FULL_RATE_PIXELS = 3 * 8 * 8  # of a patch, channels included, up to which its embedding learns at the full rate
RENDER_BATCH = 64  # clips rendered at once; only their storyboards stay in memory


def train(
    judge: StoryboardClip, boards: np.ndarray, words: list[dict], settings: dict, choices: dict[str, list[str]]
) -> list[dict]:
    """Train the judge's model in place.

    Returns:
        Rows `{"step", "loss"}` of the log.

    Args:
        judge: model and vocabulary.
        boards: (n, h, w, 3) uint8 storyboards.
        words: their attributes; the caption is made of them.
        settings: the step's settings; `steps`, `batch`, `learning_rate`, `frame_size` and `seed` are read.
        choices: values by attribute, for the hard negatives.
    """
    draw = random.Random(settings["seed"])
    model, device = judge.model, next(judge.model.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings["learning_rate"]), weight_decay=0.01, betas=(0.9, 0.98)
    )
    steps, warmup = settings["steps"], max(1, settings["steps"] // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * step / steps)) + 0.01)
    )
    boards = torch.as_tensor(boards, device=device)
    log = []
    progress = bar(steps, "judge")
    for step in progress:
        chosen = draw.sample(range(len(words)), min(settings["batch"], len(words)))
        backwards = [grammar.played_backwards(words[i]) if draw.random() < 0.5 else None for i in chosen]
        said = [turned or words[i] for i, turned in zip(chosen, backwards, strict=True)]
        own = [grammar.caption(of_clip) for of_clip in said]
        texts = own + [draw.choice(swapped(of_clip, *choice)) for of_clip in said for choice in choices.items()]
        number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        of_text = torch.tensor([number[text] for text in texts], device=device)
        target = (of_text[: len(own), None] == of_text).float()
        reversed_order = [turned is not None for turned in backwards]
        seen = vary(judge.pixels(boards[chosen]), settings["frame_size"], reversed_order, draw)
        image = functional.normalize(model.encode_image(seen), dim=-1)
        text = functional.normalize(model.encode_text(judge.vocabulary.encode(texts).to(device)), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        back, back_target = logits[:, : len(own)].T, target[:, : len(own)].T
        loss = (_soft_cross_entropy(logits, target) + _soft_cross_entropy(back, back_target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        if step % 20 == 0 or step == steps - 1:
            log.append({"step": step, "loss": loss.item()})
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return log


def parameter_groups(model: torch.nn.Module, rate: float) -> list[dict]:
    """Groups for AdamW in which the patch embedding learns the slower the more pixels a patch has.

    AdamW moves each weight by the rate, so a patch's sum moves by rate times pixels: with patches of 32 x 32 that drowned
    what patches show, and mini's judge never told a motion from its opposite.
    """
    slow = [p for name, p in model.named_parameters() if name.startswith("visual.conv1.")]
    ids = set(map(id, slow))
    groups = [{"params": [p for p in model.parameters() if id(p) not in ids], "lr": rate}]
    return groups + [{"params": [p], "lr": rate * min(1.0, FULL_RATE_PIXELS / p[0].numel())} for p in slow]


def vary(pixels: torch.Tensor, side: int, backwards: list[bool], draw: random.Random) -> torch.Tensor:
    """Storyboards (B, 3, h, w), some in reverse order, with the frames of each moved by the same few pixels: a clip is not learnt by heart."""
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    reach = side // 16
    frames = (
        pixels.unflatten(2, (rows, side)).unflatten(4, (columns, side)).permute(0, 2, 4, 1, 3, 5)
    )  # (B, r, c, 3, s, s)
    padded = functional.pad(frames.flatten(0, 3), (reach,) * 4, mode="replicate").unflatten(0, frames.shape[:4])
    moved = torch.empty_like(frames)
    for index, turned in enumerate(backwards):
        y, x = draw.randint(0, 2 * reach), draw.randint(0, 2 * reach)
        of_clip = padded[index, ..., y : y + side, x : x + side]
        moved[index] = of_clip.flip(0, 1) if turned else of_clip
    return moved.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where several columns may be right and share the mass."""
    return -(functional.log_softmax(logits, -1) * target / target.sum(-1, keepdim=True)).sum(-1).mean()


def storyboards(clips: Clips, settings: dict, description: str) -> np.ndarray:
    """Storyboards (n, h, w, 3) of a split; frames are rendered or decoded in batches and dropped."""
    layout = (settings["frames"], settings["columns"], settings["frame_size"])
    shown = middle_frames(settings["video"]["frames"], settings["frames"])
    boards = []
    for start in bar(list(range(0, len(clips), RENDER_BATCH)), description):
        frames = clips.batch(list(range(start, min(start + RENDER_BATCH, len(clips)))))
        boards += [storyboard(clip, *layout) for clip in frames[:, shown].cpu()]
    return np.stack(boards)


def fit_naturalness(clips: Clips, settings: dict) -> Naturalness:
    """The NIQE-type model of the study's own pristine clips."""
    count = min(settings["naturalness_clips"], len(clips))
    try:
        return Naturalness(settings["naturalness_patch"]).fit(clips[index].frames for index in range(count))
    except ValueError as error:
        raise UserError(f"score.naturalness_clips, score.naturalness_patch: {error}") from None


def speeds_of(scenes: list[dict | None]) -> dict[str, float]:
    """How fast each word of speed is in these scenes, in short sides a second; nothing where no scene is known."""
    found: dict[str, list[float]] = {}
    for shape in (shape for scene in scenes if scene for shape in scene["shapes"]):
        if any(shape["velocity"]):
            found.setdefault(shape["speed"], []).append(math.hypot(*shape["velocity"]))
    return {word: statistics.median(found[word]) for word in grammar.SPEEDS if word in found}


def learn(settings: dict, data: Path, device: torch.device, folder: Path) -> None:
    """Train, gate and write everything of the judge into a folder."""
    splits = {name: Clips(data / f"{name}.jsonl", settings["video"], device) for name in ("judge", "judge_heldout")}
    pristine = Clips(data / "heldout.jsonl", settings["video"])
    gates = {"reason": None, "gate": settings["gate"], "attributes": {}, "weights_sha256": None}
    gates["storyboard"] = {"frames": settings["frames"], "columns": settings["columns"], "side": settings["frame_size"]}
    gates["speeds"] = speeds_of(pristine.scenes)
    save_file(fit_naturalness(pristine, settings).state(), folder / "naturalness.safetensors")
    if not all(len(splits[name]) and all(splits[name].scenes) for name in splits):
        gates["reason"] = "the judge splits hold no clips of known scenes: nothing to train the judge on"
        write_json(folder / "gates.json", gates)
        return
    words, heldout = ([grammar.attributes(scene) for scene in splits[name].scenes] for name in splits)
    choices = choices_of(words)
    torch.manual_seed(settings["seed"])
    captions = [grammar.caption(of_clip) for of_clip in words]
    swaps = (text for of_clip in words for name, values in choices.items() for text in swapped(of_clip, name, values))
    vocabulary = Vocabulary.of([*captions, *swaps])
    config_file = folder / f"{NAME}.json"
    write_json(config_file, model_config(settings, vocabulary))
    write_json(folder / "vocabulary.json", {"words": vocabulary.words, "context_length": vocabulary.context_length})
    layout = gates["storyboard"]
    judge = StoryboardClip(create_clip(config_file, None, device).train(), vocabulary, **layout)
    log = train(judge, storyboards(splits["judge"], settings, "judge: storyboards"), words, settings, choices)
    weights = folder / "judge.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in judge.model.state_dict().items()}, weights)
    gates["weights_sha256"] = sha256_file(weights)
    # The gate is measured on the model as scoring loads it, from the files.
    frozen = StoryboardClip(create_clip(config_file, weights, device), vocabulary, **layout)
    count = min(settings["gate_clips"], len(splits["judge_heldout"]))
    boards = storyboards(splits["judge_heldout"], settings, "judge: held-out storyboards")[:count]
    gates["attributes"] = forced_choice_accuracy(frozen, boards, heldout[:count], choices)
    gates["choices"] = choices
    save_file({"features": frozen.embed_boards(boards).cpu().contiguous()}, folder / "features.safetensors")
    write_json(folder / "gates.json", gates)
    rows = ["step,phase,split,metric,value", *(f"{row['step']},judge,train,loss,{row['loss']:.6g}" for row in log)]
    write_atomic(folder / "log.csv", "\n".join(rows) + "\n")
    for name, gate in gates["attributes"].items():
        failed = gate["accuracy"] < settings["gate"]
        advice = ": not passed, so what needs it is not available; raise score.judge.batch or steps" if failed else ""
        say(
            f"judge: {name} {gate['accuracy']:.3f} on {gate['clips']} held-out clips, gate {settings['gate']:g}{advice}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section score.judge, naturalness, video"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data step")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = claim_device(args.settings)

    def fill(folder: Path) -> None:
        learn(args.settings, args.data, device, folder)
        write_provenance(folder / "gates.json", args.settings)

    write_folder(args.output, fill)


if __name__ == "__main__":
    run_main(main)

"""The in-domain judge: an open_clip that learns this study's captions from clips that nothing else sees.

    python -m sla2_eval.judge --settings '<JSON>' --data results/tiny/data --output results/tiny/score/judge

The image tower sees storyboards, so order and direction are visible. Every batch holds, beside its captions, each caption with one
attribute exchanged: such a hard negative can only be told from the truth by that attribute. Equal captions share the target.
The trained judge is frozen; forced-choice accuracy per attribute on held-out clips is its gate, and a metric whose gate fails is
reported as not available.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from sla2 import grammar
from sla2.data import Clips
from sla2.device import claim_device
from sla2.errors import UserError, run_main
from sla2.files import read_json, sha256_file, write_atomic, write_folder, write_json
from sla2.progress import bar, say
from sla2.record import write_provenance
from sla2_eval.metrics.naturalness import Naturalness
from sla2_eval.metrics.text_alignment import StoryboardClip, Vocabulary, storyboard

NAME = "sla2_judge"  # stem of the model config's file, which is open_clip's name for it
ATTRIBUTES = ("color", "shape", "direction")  # what forced choices ask for
RENDER_BATCH = 64  # clips rendered at once; only their storyboards stay in memory


def model_config(settings: dict, vocabulary: Vocabulary) -> dict:
    """open_clip's configuration of a small CLIP for storyboards."""
    side, columns, width = settings["frame_size"], settings["columns"], settings["width"]
    rows = settings["frames"] // columns
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": [rows * side, columns * side],
            "patch_size": settings["patch"],
            "width": width,
            "head_width": width // settings["heads"],
            "layers": settings["layers"],
        },
        "text_cfg": {
            "context_length": vocabulary.context_length,
            "vocab_size": vocabulary.size,
            "width": width,
            "heads": settings["heads"],
            "layers": settings["layers"],
        },
    }


def create_clip(config_file: Path, weights: Path | None, device: torch.device) -> nn.Module:
    """Build the model from its config file, with weights from a file or at random, and never over the network."""
    # Imported here: open_clip costs ten seconds of a core.
    import open_clip

    open_clip.add_model_config(config_file)
    if weights is None:
        return open_clip.create_model(config_file.stem, load_weights=False, device=device)
    return open_clip.create_model(
        config_file.stem, pretrained=str(weights), require_pretrained=True, device=device
    ).eval()


def load_naturalness(folder: Path) -> Naturalness:
    """The NIQE-type model of a folder that `main` wrote."""
    return Naturalness.from_state(load_file(folder / "naturalness.safetensors"))


def load_judge(folder: Path, device: torch.device) -> tuple[StoryboardClip | None, dict]:
    """Judge and gates of a folder that `main` wrote; the judge is None where there was nothing to learn from."""
    gates = read_json(folder / "gates.json")
    if gates["reason"]:
        return None, gates
    weights = folder / "judge.safetensors"
    if sha256_file(weights) != gates["weights_sha256"]:
        raise UserError(f"{weights}: differs from the hash in gates.json; delete {folder} and run the judge step again")
    words = read_json(folder / "vocabulary.json")
    model = create_clip(folder / f"{NAME}.json", weights, device)
    return StoryboardClip(model, Vocabulary(**words), **gates["storyboard"]), gates


def choices_of(words: list[dict]) -> dict[str, list[str]]:
    """Values of each judged attribute that occur in these clips; an attribute with a single value cannot be judged."""
    used = {
        name: [value for value in grammar.CHOICES[name] if any(w[name] == value for w in words)] for name in ATTRIBUTES
    }
    return {name: values for name, values in used.items() if len(values) > 1}


def swapped(words: dict, name: str, values: list[str]) -> list[str]:
    """Captions of the same scene with each other value of one attribute."""
    return [grammar.caption({**words, name: value}) for value in values if value != words[name]]


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
        model.parameters(), lr=settings["learning_rate"], weight_decay=0.01, betas=(0.9, 0.98)
    )
    steps, warmup = settings["steps"], max(1, settings["steps"] // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * step / steps)) + 0.01)
    )
    pixels = judge.pixels(boards)
    log = []
    progress = bar(steps, "judge")
    for step in progress:
        chosen = draw.sample(range(len(words)), min(settings["batch"], len(words)))
        own = [grammar.caption(words[index]) for index in chosen]
        texts = own + [draw.choice(swapped(words[i], name, values)) for i in chosen for name, values in choices.items()]
        target = torch.tensor([[float(a == b) for b in texts] for a in own], device=device)
        seen = jitter(pixels[chosen], settings["frame_size"], draw).to(device)
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


def jitter(pixels: torch.Tensor, side: int, draw: random.Random) -> torch.Tensor:
    """Storyboards (B, 3, h, w) with the frames of each moved by the same few pixels: a caption stays true, a clip is not learnt by heart."""
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    reach = side // 16
    frames = (
        pixels.unflatten(2, (rows, side)).unflatten(4, (columns, side)).permute(0, 2, 4, 1, 3, 5)
    )  # (B, r, c, 3, s, s)
    padded = functional.pad(frames.flatten(0, 3), (reach,) * 4, mode="replicate").unflatten(0, frames.shape[:4])
    moved = torch.empty_like(frames)
    for index in range(len(pixels)):
        y, x = draw.randint(0, 2 * reach), draw.randint(0, 2 * reach)
        moved[index] = padded[index, ..., y : y + side, x : x + side]
    return moved.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where several columns may be right and share the mass."""
    return -(functional.log_softmax(logits, -1) * target / target.sum(-1, keepdim=True)).sum(-1).mean()


def forced_choice_accuracy(
    judge: StoryboardClip, boards: np.ndarray, words: list[dict], choices: dict[str, list[str]]
) -> dict[str, dict]:
    """Share of clips whose true caption beats each caption with that attribute exchanged.

    Returns:
        `{"color": {"accuracy": ..., "clips": ..., "chance": ...}, ...}`.
    """
    embeddings = judge.embed_boards(boards)
    gates = {}
    for name, values in choices.items():
        right = []
        for embedding, of_clip in zip(embeddings, words, strict=True):
            scores = judge.embed_texts([grammar.caption(of_clip), *swapped(of_clip, name, values)]) @ embedding
            right.append(bool(scores[0] > scores[1:].max()))
        gates[name] = {"accuracy": float(np.mean(right)), "clips": len(right), "chance": 1 / len(values)}
    return gates


def gate_failure(gates: dict, name: str | None = None) -> str | None:
    """Why a judge's metric may not be reported, or None.

    Args:
        gates: contents of gates.json.
        name: one attribute; None asks for all of them, as text alignment needs.
    """
    if gates["reason"]:
        return gates["reason"]
    for attribute in [name] if name else gates["attributes"]:
        if attribute not in gates["attributes"]:
            return f"the study's clips show a single {attribute}: nothing to choose from"
        measured = gates["attributes"][attribute]["accuracy"]
        if measured < gates["gate"]:
            return f"gate: forced-choice accuracy of {attribute} is {measured:.3f}, below {gates['gate']:g}"
    return None


def storyboards(clips: Clips, settings: dict, description: str) -> np.ndarray:
    """Storyboards (n, h, w, 3) of a split; frames are rendered or decoded in batches and dropped."""
    layout = (settings["frames"], settings["columns"], settings["frame_size"])
    boards = []
    for start in bar(list(range(0, len(clips), RENDER_BATCH)), description):
        frames = clips.batch(list(range(start, min(start + RENDER_BATCH, len(clips)))))
        boards += [storyboard(clip, *layout) for clip in frames]
    return np.stack(boards)


def fit_naturalness(clips: Clips, settings: dict) -> Naturalness:
    """The NIQE-type model of the study's own pristine clips."""
    count = min(settings["naturalness_clips"], len(clips))
    return Naturalness(settings["naturalness_patch"]).fit(clips[index].frames for index in range(count))


def learn(settings: dict, data: Path, device: torch.device, folder: Path) -> None:
    """Train, gate and write everything of the judge into a folder."""
    splits = {name: Clips(data / f"{name}.jsonl", settings["video"]) for name in ("judge", "judge_heldout", "heldout")}
    gates = {"reason": None, "gate": settings["gate"], "attributes": {}, "weights_sha256": None}
    gates["storyboard"] = {"frames": settings["frames"], "columns": settings["columns"], "side": settings["frame_size"]}
    save_file(fit_naturalness(splits["heldout"], settings).state(), folder / "naturalness.safetensors")
    if not all(len(splits[name]) and all(splits[name].scenes) for name in ("judge", "judge_heldout")):
        gates["reason"] = "the judge splits hold no clips of known scenes: nothing to train the judge on"
        write_json(folder / "gates.json", gates)
        return
    words, heldout = (
        [grammar.attributes(scene) for scene in splits[name].scenes] for name in ("judge", "judge_heldout")
    )
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
    write_json(folder / "gates.json", gates)
    rows = ["step,phase,split,metric,value", *(f"{row['step']},judge,train,loss,{row['loss']:.6g}" for row in log)]
    write_atomic(folder / "log.csv", "\n".join(rows) + "\n")
    for name, gate in gates["attributes"].items():
        say(f"judge: {name} {gate['accuracy']:.3f} on {gate['clips']} held-out clips, gate {settings['gate']:g}")


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

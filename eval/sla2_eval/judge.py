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

from sla2 import scenes
from sla2.data import Clips
from sla2.device import claim_device
from sla2.errors import UserError, run_main
from sla2.files import read_json, sha256_file, write_atomic, write_folder, write_json
from sla2.progress import bar, say
from sla2.record import write_provenance
from sla2_eval.metrics.naturalness import Naturalness
from sla2_eval.metrics.text_alignment import StoryboardClip, Vocabulary, storyboard, swapped

NAME = "sla2_judge"  # stem of the model config's file, which is open_clip's name for it
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


def attribute_values(caption: str, attributes: dict[str, list[str]]) -> dict[str, str]:
    """The one value of each attribute that stands in the caption exactly once; attributes without such a value are left out."""
    found = {name: [value for value in values if swapped(caption, value, value)] for name, values in attributes.items()}
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def hard_negatives(caption: str, attributes: dict[str, list[str]], draw: random.Random) -> list[str]:
    """One changed caption per attribute that the caption names."""
    return [
        swapped(caption, value, draw.choice([other for other in attributes[name] if other != value]))
        for name, value in attribute_values(caption, attributes).items()
    ]


def train(
    judge: StoryboardClip, boards: np.ndarray, captions: list[str], settings: dict, attributes: dict[str, list[str]]
) -> list[dict]:
    """Train the judge's model in place.

    Returns:
        Rows `{"step", "loss"}` of the log.

    Args:
        judge: model and vocabulary.
        boards: (n, h, w, 3) uint8 storyboards.
        captions: their captions.
        settings: the step's settings; `steps`, `batch`, `learning_rate` and `seed` are read.
        attributes: allowed values by attribute.
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
        chosen = draw.sample(range(len(captions)), min(settings["batch"], len(captions)))
        own = [captions[index] for index in chosen]
        texts = own + [text for caption in own for text in hard_negatives(caption, attributes, draw)]
        target = torch.tensor([[float(a == b) for b in texts] for a in own], device=device)
        image = functional.normalize(model.encode_image(pixels[chosen].to(device)), dim=-1)
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


def _soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where several columns may be right and share the mass."""
    return -(functional.log_softmax(logits, -1) * target / target.sum(-1, keepdim=True)).sum(-1).mean()


def forced_choice_accuracy(
    judge: StoryboardClip, boards: np.ndarray, captions: list[str], attributes: dict[str, list[str]]
) -> dict[str, dict]:
    """Share of clips whose true caption beats each caption with that attribute exchanged.

    Returns:
        `{"color": {"accuracy": ..., "clips": ..., "chance": ...}, ...}`; `accuracy` is None where no caption names the attribute.
    """
    embeddings = judge.embed_boards(boards)
    right: dict[str, list[bool]] = {name: [] for name in attributes}
    for embedding, caption in zip(embeddings, captions, strict=True):
        for name, value in attribute_values(caption, attributes).items():
            choices = attributes[name]
            scores = judge.embed_texts([swapped(caption, value, choice) for choice in choices]) @ embedding
            right[name].append(choices[int(scores.argmax())] == value)
    return {
        name: {
            "accuracy": float(np.mean(hits)) if hits else None,
            "clips": len(hits),
            "chance": 1 / len(attributes[name]),
        }
        for name, hits in right.items()
    }


def gate_failure(gates: dict, name: str | None = None) -> str | None:
    """Why a judge's metric may not be reported, or None.

    Args:
        gates: contents of gates.json.
        name: one attribute; None asks for all of them, as text alignment needs.
    """
    if gates["reason"]:
        return gates["reason"]
    for attribute in [name] if name else gates["attributes"]:
        measured = gates["attributes"].get(attribute, {"accuracy": None})["accuracy"]
        if measured is None:
            return f"gate: no held-out caption names the attribute {attribute}"
        if measured < gates["gate"]:
            return f"gate: forced-choice accuracy of {attribute} is {measured:.3f}, below {gates['gate']:g}"
    return None


def attributes_of(captions: list[str]) -> dict[str, list[str]]:
    """Values of colour, shape and direction that these captions name; an attribute with a single value cannot be judged."""
    words = {"color": list(scenes.COLORS), "shape": list(scenes.SHAPES), "direction": list(scenes.DIRECTIONS)}
    found = {
        name: {attribute_values(text, {name: values}).get(name) for text in captions} for name, values in words.items()
    }
    used = {name: [value for value in values if value in found[name]] for name, values in words.items()}
    return {name: values for name, values in used.items() if len(values) > 1}


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
    captions = splits["judge"].captions
    attributes = attributes_of(captions)
    if not attributes or not len(splits["judge_heldout"]):
        gates["reason"] = "the judge split holds no captions of known scenes: nothing to train the judge on"
        write_json(folder / "gates.json", gates)
        return
    torch.manual_seed(settings["seed"])
    vocabulary = Vocabulary.of(captions)
    config_file = folder / f"{NAME}.json"
    write_json(config_file, model_config(settings, vocabulary))
    write_json(folder / "vocabulary.json", {"words": vocabulary.words, "context_length": vocabulary.context_length})
    layout = gates["storyboard"]
    judge = StoryboardClip(create_clip(config_file, None, device).train(), vocabulary, **layout)
    log = train(judge, storyboards(splits["judge"], settings, "judge: storyboards"), captions, settings, attributes)
    weights = folder / "judge.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in judge.model.state_dict().items()}, weights)
    gates["weights_sha256"] = sha256_file(weights)
    # The gate is measured on the model as scoring loads it, from the files.
    frozen = StoryboardClip(create_clip(config_file, weights, device), vocabulary, **layout)
    count = min(settings["gate_clips"], len(splits["judge_heldout"]))
    boards = storyboards(splits["judge_heldout"], settings, "judge: held-out storyboards")[:count]
    gates["attributes"] = forced_choice_accuracy(frozen, boards, splits["judge_heldout"].captions[:count], attributes)
    gates["choices"] = attributes
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

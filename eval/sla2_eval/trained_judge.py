"""The in-domain judge as its files hold it: the model, what it may be asked, and whether its gate lets its answers count."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from sla2 import grammar
from sla2.errors import UserError
from sla2.files import read_json, sha256_file
from sla2_eval.metrics.naturalness import Naturalness
from sla2_eval.metrics.text_alignment import StoryboardClip, Vocabulary

NAME = "sla2_judge"  # stem of the model config's file, which is open_clip's name for it
ATTRIBUTES = ("color", "shape", "direction")  # what forced choices ask for


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


def load_features(folder: Path) -> torch.Tensor:
    """Embeddings (n, D) of the held-out clips that the gate was measured on."""
    path = folder / "features.safetensors"
    if not path.is_file():
        raise UserError(
            f"{path}: missing, as the judge is of an older version; delete {folder} and run the judge step again"
        )
    return load_file(path)["features"]


def choices_of(words: list[dict]) -> dict[str, list[str]]:
    """Values of each judged attribute that occur in these clips; an attribute with a single value cannot be judged."""
    used = {
        name: [value for value in grammar.CHOICES[name] if any(w[name] == value for w in words)] for name in ATTRIBUTES
    }
    return {name: values for name, values in used.items() if len(values) > 1}


def swapped(words: dict, name: str, values: list[str]) -> list[str]:
    """Captions of the same scene with each other value of one attribute."""
    own = (grammar.USUAL | words)[name]
    return [grammar.caption({**words, name: value}) for value in values if value != own]


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
    if not gates["attributes"]:
        return f"the study's clips vary in none of {', '.join(ATTRIBUTES)}: nothing to measure the judge by"
    for attribute in [name] if name else gates["attributes"]:
        if attribute not in gates["attributes"]:
            return f"the study's clips show a single {attribute}: nothing to choose from"
        measured = gates["attributes"][attribute]["accuracy"]
        if measured < gates["gate"]:
            return f"gate: forced-choice accuracy of {attribute} is {measured:.3f}, below {gates['gate']:g}"
    return None

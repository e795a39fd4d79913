"""Adapters: what a variant adds to a Wan transformer (router, alpha, projection), in one safetensors file.

    from diffusers import WanPipeline
    from sla2.adapter import apply_adapter

    pipeline = WanPipeline.from_pretrained(folder)
    apply_adapter(pipeline.transformer, "adapter.safetensors")
    frames = pipeline("A red circle moves to the right.").frames[0]

The file's metadata holds its version, the row, the attention settings, the base model's hash, and a fingerprint of the transformer
that the adapter was made for. `adapter.json` beside it is a copy of these for people to read.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sla2.attention import AttentionSettings
from sla2.errors import UserError
from sla2.files import atomic_path, write_json
from sla2.variant import Variant
from sla2.wan import BaseModel, install, load_transformer

VERSION = 2
FINGERPRINT_VALUES = 256  # of each parameter


def adapter_state(transformer: nn.Module) -> dict[str, Tensor]:
    """Parameters that a variant adds, by their name in the model's state dict."""
    return {name: tensor for name, tensor in transformer.state_dict().items() if ".processor." in name}


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, shapes and first values in bf16 of a transformer's parameters: the same in fp32 as in bf16, and with LoRA.

    Args:
        tensors: names and parameters, whole; those that a variant or LoRA adds are passed over.
    """
    found = {}
    for name, tensor in tensors:
        if ".processor." in name or ".lora_" in name:
            continue
        values = tensor.detach().flatten()[:FINGERPRINT_VALUES].to("cpu", torch.bfloat16).view(torch.int16)
        found[name.replace(".base_layer.", ".")] = f"{tuple(tensor.shape)} {values.tolist()}"
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def fingerprint_files(folder: str | Path) -> str:
    """`fingerprint` of the safetensors files of a transformer's folder."""

    def tensors() -> Iterable[tuple[str, Tensor]]:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - not a dict

    return fingerprint(tensors())


def save_adapter(
    folder: str | Path,
    state: dict[str, Tensor],
    variant: Variant,
    settings: AttentionSettings,
    base: BaseModel,
    made_for: str | None = None,
) -> None:
    """Write `adapter.safetensors` and `adapter.json`.

    Args:
        state: as `adapter_state`.
        made_for: fingerprint of the transformer where training has changed it; that of the base model by default.
    """
    folder = Path(folder)
    description = {
        "version": VERSION,
        "variant": variant.row(),
        "attention": asdict(settings),
        "base_sha256": base.weights_sha256,
        "fingerprint": made_for or base.fingerprint,
        "tokens": base.tokens,
    }
    with atomic_path(folder / "adapter.safetensors") as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary, metadata={"sla2": json.dumps(description)})
    write_json(folder / "adapter.json", description)


def read_adapter(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Description and tensors of a file.

    Raises:
        UserError: for a file that is missing, not an adapter, or of another version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = (file.metadata() or {}).get("sla2")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors has a type of its own for each fault
        raise UserError(f"{path}: cannot be read as safetensors ({error}); give an adapter.safetensors") from None
    if meta is None:
        raise UserError(f"{path}: holds no description of an SLA2 adapter; give one that stage1 or stage2 has written")
    description = json.loads(meta)
    if description.get("version") != VERSION:
        raise UserError(f"{path}: version {description.get('version')}, this code reads {VERSION}; train it again")
    return description, state


def load_adapter(folder: str | Path, transformer: nn.Module, base: BaseModel) -> None:
    """Load the adapter of a run's folder into a model whose attention is installed.

    Raises:
        UserError: for another base model, another version, and missing, unexpected or mis-shaped keys, by name.
    """
    path = Path(folder) / "adapter.safetensors"
    description, state = read_adapter(path)
    if description["base_sha256"] != base.weights_sha256:
        raise UserError(f"{folder}: made for another base model; train it again on {base.pipeline}")
    _fill(transformer, state, path)


def apply_adapter(transformer: nn.Module, path: str | Path, any_base: bool = False) -> nn.Module:
    """Install an adapter's attention in a `WanTransformer3DModel` and load its parameters; returns the transformer.

    Weights may be in fp32 or bf16, with LoRA loaded before or after, compiled or not.

    Args:
        path: an `adapter.safetensors`.
        any_base: take a transformer that the adapter was not made for, such as one with fused LoRA weights.

    Raises:
        UserError: for another transformer, another version, and missing, unexpected or mis-shaped keys, by name.
    """
    description, state = read_adapter(path)
    model = getattr(transformer, "_orig_mod", transformer)  # of torch.compile
    if not any_base and fingerprint(model.named_parameters()) != description["fingerprint"]:
        raise UserError(
            f"{path}: made for a transformer with other weights than this one; load that one, such as the folder "
            "`transformer` beside the adapter, or pass any_base=True"
        )
    settings = AttentionSettings(**description["attention"])
    install(model, Variant.from_row(description["variant"]), settings, description["tokens"])
    _fill(model, state, path)
    return transformer


def _fill(transformer: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    expected = adapter_state(transformer)
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{path}: {'; '.join(sorted(problems)[:4])} ({len(problems)} in all)")
    transformer.load_state_dict(state, strict=False)


def load_variant(
    base: BaseModel,
    variant: Variant,
    settings: AttentionSettings,
    trained: str | Path | None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The transformer of a row: weights of `trained` (else the base's), attention installed, adapter loaded, eval mode."""
    transformer = load_transformer(base, trained, dtype)
    install(transformer, variant, settings, base.tokens)
    if trained is not None and not variant.dense:
        load_adapter(trained, transformer, base)
    return transformer.eval()

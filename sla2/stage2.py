"""Step stage2: the whole model and alpha are fine-tuned end to end, router frozen, hard choice, QAT where the row says so.

The low-bit forward in training is what inference runs; its backward is full precision. Weights, gradients, AdamW's state and the
average are fp32; on a GPU the forward and backward compute in bf16 by autocast, router, alpha and softmax in fp32.

    python -m sla2.stage2 --settings JSON --base .../base_model.json [--adapter .../stage1/GROUP] --output .../stage2/VARIANT/seed0
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.adapter import fingerprint, load_adapter, save_adapter
from sla2.attention import AttentionSettings
from sla2.checkpoint import Checkpoint
from sla2.errors import run_main
from sla2.files import write_folder
from sla2.flow import flow_losses, generator, heldout_loss
from sla2.latents import Latents, Stream
from sla2.mixing import AlphaMixing
from sla2.progress import say
from sla2.record import write_provenance
from sla2.team import Team, join
from sla2.training import Log, batches, train
from sla2.variant import Variant
from sla2.wan import BaseModel, compile_blocks, install, load_transformer, stock


def start_alpha(transformer: nn.Module, alpha: float) -> None:
    """Set every alpha of the transformer's mixings, where it has such, to a number in [0.02, 0.98]."""
    for mixing in transformer.modules():
        if isinstance(mixing, AlphaMixing):
            mixing.start(torch.full_like(mixing.logit, alpha))


def choose_trainable(transformer: nn.Module, trainable: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Freeze what does not learn; returns the model's and the mixing's parameters that do.

    Args:
        trainable: `all`, `attention` (self-attention projections) or `adapter` (alpha or projection only).
    """
    model, mixing = [], []
    for name, parameter in transformer.named_parameters():
        if ".processor." in name:
            learns = ".mixing." in name
            mixing += [parameter] if learns else []
        else:
            learns = trainable == "all" or (trainable == "attention" and ".attn1." in name)
            model += [parameter] if learns else []
        parameter.requires_grad_(learns)
    return model, mixing


def choose_optimizer(transformer: nn.Module, settings: dict) -> torch.optim.AdamW | None:
    """AdamW over what learns, the mixing in a group of its own: its logits have far to go and are not decayed.

    None where nothing learns, as with `trainable: adapter` in a row without alpha or projection.
    """
    model, mixing = choose_trainable(transformer, settings["trainable"])
    groups = [
        {"params": model, "lr": settings["lr"], "weight_decay": settings["weight_decay"]},
        {"params": mixing, "lr": settings["lr_mixing"], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    on_gpu = next(transformer.parameters()).is_cuda
    return torch.optim.AdamW(groups, betas=settings["betas"], fused=on_gpu or None) if groups else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings",
        type=json.loads,
        required=True,
        help="config section stage2, variant, train_seed, attention, as JSON",
    )
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument("--adapter", type=Path, help="folder of the row's stage-1 run")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    settings, base, variant = args.settings, BaseModel.read(args.base), Variant.from_row(args.settings["variant"])
    attention = AttentionSettings(**settings["attention"])
    team = join(settings)
    seeds = (settings["seed"], settings["train_seed"])

    transformer = load_transformer(base)
    install(transformer, variant, attention, base.tokens)
    if args.adapter:
        load_adapter(args.adapter, transformer, base)
    if settings["alpha"] is not None:
        start_alpha(transformer, settings["alpha"])
    transformer.train()
    if settings["gradient_checkpointing"]:
        transformer.enable_gradient_checkpointing()
    learns = any(choose_trainable(transformer, settings["trainable"]))
    transformer = team.place(transformer)
    if settings["compile"]:
        compile_blocks(transformer)
    wrapped = team.wrap(transformer) if learns else transformer  # DDP takes no module without gradients
    optimizer = choose_optimizer(transformer, settings)
    steps = settings["steps"] if learns else 0
    if not learns and team.first:
        say(
            f"stage2 {variant.variant}: stage2.trainable {settings['trainable']}: nothing of this row learns; its weights stay"
        )
    data, heldout = Latents(Path(base.latents) / "train"), Latents(Path(base.latents) / "heldout")
    order = batches(len(data), settings["batch"], sum(seed * 7919**i for i, seed in enumerate(seeds)), team)
    stream = Stream(data, order, steps, team.device)
    empty = data.empty_text.to(team.device)
    teacher = None
    if settings["loss"] == "distill":
        teacher = team.place(load_transformer(base).eval().requires_grad_(False))
    log = Log(args.output / "tensorboard" if settings["tensorboard"] and team.first else None)

    def loss(step: int) -> Iterator[Tensor]:
        latents, text = stream(step)
        options = {name: settings[name] for name in ("caption_dropout", "micro_batch")}
        options |= {"teacher": teacher, "law": settings["timesteps"]}
        draw = generator(*seeds, 6, step)
        yield from flow_losses(wrapped, latents, text, empty, base.flow_shift, draw, team=team, **options)

    def validate(step: int) -> float:
        value = heldout_loss(transformer, heldout, base.flow_shift, team.device, settings["micro_batch"], team)
        log.add(step, "stage2", "heldout", "loss", value)
        return value

    # How the work is shared and shown is left out: the result is the same but for the order of sums.
    computed = {key: value for key, value in settings.items() if key not in ("parallel", "threads", "tensorboard")}
    identity = {"settings": computed, "base": base.weights_sha256, "adapter": str(args.adapter)}
    checkpoint = Checkpoint(args.output / ".checkpoint", "stage2", identity, settings["checkpoint_every"], team)
    train(
        "stage2",
        f"stage2 {variant.variant} seed {settings['train_seed']}",
        transformer,
        [optimizer] if optimizer else [],
        loss,
        steps,
        checkpoint,
        log,
        warmup=settings["warmup"],
        clip=settings["clip"],
        ema=settings["ema"],
        validate=validate,
        validate_every=settings["validate_every"],
        waited_s=stream.waited_s,
        team=team,
    )
    if settings["select"] == "best":
        checkpoint.load_best(transformer)
    state = team.whole(transformer.state_dict())
    if team.first:
        write_folder(
            args.output / "transformer", lambda folder: save_transformer(state, transformer, base, team, folder)
        )
        log.write(args.output / "log.csv")
        write_provenance(args.output / "adapter.safetensors", settings, base_sha256=base.weights_sha256)
        added = {name: tensor for name, tensor in state.items() if ".processor." in name}
        save_adapter(args.output, added, variant, attention, base, made_for=fingerprint(state.items()))
        checkpoint.remove()
    team.wait()
    team.leave()


def save_transformer(
    state: dict[str, Tensor], transformer: nn.Module, base: BaseModel, team: Team, folder: Path
) -> None:
    """An ordinary diffusers folder: the variant's own parameters are left out, they are the adapter.

    Args:
        state: whole tensors of the transformer.
    """
    if not team.sharded:
        with stock(transformer):
            transformer.save_pretrained(folder)
        return
    plain = load_transformer(base)  # one that is not split
    plain.load_state_dict({name: tensor for name, tensor in state.items() if ".processor." not in name})
    plain.save_pretrained(folder)


if __name__ == "__main__":
    run_main(main)

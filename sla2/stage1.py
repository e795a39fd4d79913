"""Step stage1: router and mixing are fitted to the dense attention's output, the base model frozen (section 6, Algorithm 1).

Online: the dense model runs on noisy latents over all noise levels; while it does, each self-attention shows its q, k, v and dense
output to the layer's own router and mixing, which take their gradient on a sample of query blocks at once. All layers learn in
one pass, and what a layer showed is gone when the next one runs. What is kept is the state with the lowest **hard** error on
held-out clips, because a router's own loss can fall while its hard choice gets worse (`sla2.estimators`).

    python -m sla2.stage1 --settings JSON --base results/S/base_model/base_model.json --output results/S/stage1/GROUP
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla2.adapter import save_adapter
from sla2.attention import AttentionSettings, build
from sla2.checkpoint import Checkpoint
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.estimators import layer_loss, relative_error
from sla2.flow import generator, noisy, predict, shifted
from sla2.latents import Latents, Stream
from sla2.progress import say
from sla2.record import write_provenance
from sla2.stage1_report import AlphaFit, layer_report, write_report
from sla2.training import Log, batches, each, train
from sla2.variant import Variant
from sla2.wan import BaseModel, installed, load_transformer

Look = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]  # layer, and its q, k, v, o (B, H, N, D)


class Shown(nn.Module):
    """Dense attention that shows what it sees and gives to `look`, and keeps nothing."""

    def __init__(self, look: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.look = look

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        self.look(q, k, v, out)
        return out


class Stage1:
    """The frozen model, its data, and one attention module per layer.

    Args:
        settings: config section `stage1`, and variant, attention, seed.
    """

    def __init__(self, settings: dict, base: BaseModel, device: torch.device) -> None:
        self.settings, self.base, self.device = settings, base, device
        self.variant = Variant.from_row(settings["variant"])
        self.attention = AttentionSettings(**settings["attention"])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.transformer = load_transformer(base, dtype=dtype).to(device).eval().requires_grad_(False)
        self.layers = nn.ModuleList(
            build(self.variant, base.heads, base.head_dim, base.tokens, self.attention) for _ in range(base.layers)
        ).to(device)
        self.data, self.heldout = Latents(Path(base.latents) / "train"), Latents(Path(base.latents) / "heldout")
        order = batches(len(self.data), settings["batch"], settings["seed"])
        self.stream = Stream(self.data, order, settings["steps"], device)
        self.last_tau = settings["tau_end"] or settings["tau"]
        self.whole_blocks = base.tokens // self.attention.block_q  # the ragged last block is left to the hard error

    @torch.no_grad()
    def dense(self, latents: Tensor, text: Tensor, sigma: Tensor, draw: torch.Generator, look: Look) -> None:
        """Run the dense model on noisy latents; each layer is shown to `look` when its turn comes."""
        latents, text, sigma = (tensor.to(self.device) for tensor in (latents, text, sigma))
        noise = torch.randn(latents.shape, generator=draw)  # on the CPU, so that devices agree
        x, _ = noisy(latents, noise.to(self.device), sigma)
        shown = [Shown(partial(look, layer)) for layer in range(self.base.layers)]
        with installed(self.transformer, shown):
            predict(self.transformer, x, sigma, text)

    def tau(self, step: int) -> float:
        """Temperature of SoftTop-k at `step`: from `tau` to `tau_end` in equal ratios."""
        first, last = self.settings["tau"], self.last_tau
        return first * (last / first) ** (step / max(1, self.settings["steps"] - 1))

    def loss(self, step: int) -> Iterator[Tensor]:
        """Mean loss over layers for a random sample of query blocks each; the gradients are taken layer by layer on the way."""
        draw = generator(self.settings["seed"], 4, step)
        latents, text = self.stream(step)
        sigma = shifted(torch.rand(len(latents), generator=draw).clamp(1e-3, 1 - 1e-3), self.base.flow_shift)
        losses = []

        @torch.enable_grad()
        def learn(layer: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
            rows = torch.randperm(self.whole_blocks, generator=draw)[: self.settings["query_blocks"]].to(self.device)
            loss = layer_loss(self.layers[layer], q, k, v, o, rows, self.settings, self.tau(step)) / self.base.layers
            loss.backward()
            losses.append(loss.detach())

        self.dense(latents, text, sigma, draw, learn)
        yield torch.stack(losses).sum().requires_grad_()  # a leaf: the loop's backward has nothing left to do

    def on_heldout(self, look: Callable[[float, int, Tensor, Tensor, Tensor, Tensor], None], fresh: bool) -> None:
        """Show every layer at every held-out noise level, on held-out clips and noise that are the same in every call.

        Args:
            fresh: whether on other clips than those by which the best state is chosen; there may be too few for that.
        """
        levels, clips = self.settings["sigmas"], self.settings["heldout_clips"]
        places = [(level, number * clips + clip) for number, level in enumerate(levels) for clip in range(clips)]
        for level, place in places:
            place += len(places) if fresh else 0
            clip = self.heldout.batch([place % len(self.heldout)])
            self.dense(*clip, torch.tensor([level]), generator(0, 5, place), partial(look, level))

    @torch.no_grad()
    def hard_error(self) -> float:
        """Mean over layers, noise levels and held-out clips of the hard operator's relative error, as inference runs it."""
        errors = []

        def measure(level: float, layer: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
            errors.append(relative_error(self.layers[layer](q, k, v), o))

        self.layers.eval()
        self.on_heldout(measure, fresh=False)
        self.layers.train()
        return torch.stack(errors).mean().item()

    def fit_alpha(self, controls: bool) -> list[AlphaFit]:
        """Least-squares alpha of each layer on a few training clips, whose noise levels lie as those of training."""
        fits = [AlphaFit(layer, controls) for layer in self.layers]
        clips = list(range(min(self.settings["fit_clips"], len(self.data))))
        for part in each(clips, self.settings["batch"]):
            sigma = shifted((torch.tensor(part) + 0.5) / len(clips), self.base.flow_shift)
            self.dense(
                *self.data.batch(part), sigma, generator(0, 7, part[0]), lambda layer, *seen: fits[layer].add(*seen)
            )
        return fits

    def start_alpha(self) -> None:
        """Alpha starts where it is best for the untrained router: logits have far to go from a constant, and all that they need is here."""
        if self.variant.mixing == "alpha":
            for layer, fit in zip(self.layers, self.fit_alpha(controls=False), strict=True):
                layer.mixing.start(fit.alpha(self.variant.router))

    @torch.no_grad()
    def report(self) -> list[tuple]:
        """Rows of `report.csv`: the layers' routers and alpha, and their controls, on fresh held-out clips."""
        fits, rows = self.fit_alpha(controls=True), []

        def measure(level: float, layer: int, *seen: Tensor) -> None:
            found = layer_report(self.layers[layer], fits[layer], *seen, self.settings["router_logits"], self.last_tau)
            rows.extend((layer, level, *row) for row in found)

        self.layers.eval()
        self.on_heldout(measure, fresh=True)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section stage1, variant, attention, as JSON"
    )
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    fit(args.settings, BaseModel.read(args.base), args.output, claim_device(args.settings))


def fit(settings: dict, base: BaseModel, output: Path, device: torch.device) -> None:
    """Train, keep the best, and write adapter, report, log and provenance into `output`."""
    run, log, name = Stage1(settings, base, device), Log(), settings["variant"]["variant"]
    run.start_alpha()

    def validate(step: int) -> float:
        error = run.hard_error()
        log.add(step, "stage1", "heldout", "hard_error", error)
        return error

    def stop() -> bool:
        """Whether the last `patience` measurements found nothing better."""
        errors = [value for _, _, _, metric, value in log if metric == "hard_error"]
        return bool(settings["patience"]) and len(errors) - 1 - errors.index(min(errors)) >= settings["patience"]

    groups = [
        {"params": part, "lr": lr}
        for part, lr in (
            ([p for layer in run.layers for p in layer.router.parameters()], settings["lr_router"]),
            ([p for layer in run.layers for p in layer.mixing.parameters()], settings["lr_mixing"]),
        )
        if part
    ]
    if groups:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        identity = {"settings": settings, "base": base.weights_sha256}
        checkpoint = Checkpoint(output / ".checkpoint", "stage1", identity, settings["checkpoint_every"])
        train(
            "stage1",
            f"stage1 {name}",
            run.layers,
            [optimizer],
            run.loss,
            settings["steps"],
            checkpoint,
            log,
            validate=validate,
            validate_every=settings["validate_every"],
            stop=stop,
            waited_s=run.stream.waited_s,
        )
        checkpoint.load_best(run.layers)
        checkpoint.remove()
    else:
        validate(0)
        say(f"stage1 {name}: nothing to train; its hard error is measured")
    write_report(output / "report.csv", run.report())
    log.write(output / "log.csv")
    say(summary(name, log))
    state = {
        f"blocks.{index}.attn1.processor.attention.{key}": tensor
        for index, layer in enumerate(run.layers)
        for key, tensor in layer.state_dict().items()
    }
    write_provenance(output / "adapter.safetensors", settings, base_sha256=base.weights_sha256)
    save_adapter(output, state, run.variant, run.attention, base)


def summary(name: str, log: Log) -> str:
    """The run in one line: hard error before and at its best, and what a step took."""
    errors = [value for _, _, _, metric, value in log if metric == "hard_error"]
    line = f"stage1 {name}: held-out hard error {errors[0]:.4f} at the start, {min(errors):.4f} at best"
    if log.timing:
        line += f"; {median(row[2] for row in log.timing):.2f} s a step"
        peaks = [row[4] for row in log.timing if row[4] != ""]
        line += f", peak {max(peaks):.1f} GiB of GPU memory" if peaks else ""
    return line


if __name__ == "__main__":
    run_main(main)

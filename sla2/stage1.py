"""Step stage1: router and mixing are fitted to the dense attention's output, the base model frozen (section 6, Algorithm 1).

Online: the dense model runs on noisy latents over all noise levels; each self-attention hands its Q, K, V and dense output to
the layer's own router and mixing, all layers learn at once on a sample of query blocks, and nothing is stored. What is kept is
the state with the lowest **hard** error on held-out clips, because the soft loss can fall while the hard choice gets worse: a
uniform soft mask cancels in the softmax's normaliser.

    python -m sla2.stage1 --settings JSON --base results/S/base_model/base_model.json --output results/S/stage1/GROUP
"""

import argparse
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.attention import AttentionSettings, SparseLinearAttention, build
from sla2.checkpoint import Checkpoint
from sla2.device import claim_device
from sla2.errors import run_main
from sla2.files import write_atomic
from sla2.flow import generator, noisy, predict, shifted
from sla2.latents import Latents
from sla2.progress import say
from sla2.record import write_provenance
from sla2.router import soft_top_k, straight_through
from sla2.training import Log, batches, train
from sla2.variant import Variant
from sla2.wan import BaseModel, capture_qkv, load_transformer, save_adapter
from sla2_kernels import reference

ERROR_COLUMNS = ("layer", "sigma", "split", "metric", "value")
HELDOUT_SIGMAS = (0.3, 0.7, 0.95)


def masked_output(module: SparseLinearAttention, seen: dict[str, Tensor], rows: Tensor, settings: dict) -> Tensor:
    """SLA2's output (B, H, R * b_q, D) for some query blocks, differentiable in router and mixing.

    With a soft mask M the sparse branch is P proportional to M exp(S) and the linear branch is weighted by 1 - M; both are
    the hard operator where M is 0 or 1.

    Args:
        seen: q, k, v (B, H, N, D) of one layer; rows: (R,) indices of whole query blocks.
    """
    s, q, v = module.settings, seen["q"].float(), seen["v"].float()
    keys = reference.smooth_keys(seen["k"].float())
    scores = module.scores(q, keys)[:, :, rows]
    scale = q.shape[-1] ** -0.5
    logits = {"raw": lambda: scores, "scaled": lambda: scores * scale, "softmax": lambda: (scores * scale).softmax(-1)}
    logits = logits[settings["router_logits"]]()
    kept = module.kept(keys.shape[-2])
    choose = {"soft": soft_top_k, "straight_through": straight_through}[settings["estimator"]]
    mask = choose(logits, kept, settings["tau"])
    positions = (rows[:, None] * s.block_q + torch.arange(s.block_q, device=q.device)).flatten()
    q = q[:, :, positions]
    sparse = reference.soft_sparse_attention(
        q, keys, v, mask.clamp_min(torch.finfo(mask.dtype).tiny).log(), s.block_q, s.block_k
    )
    phi_keys = keys if s.phi_keys == "smoothed" else seen["k"].float()
    linear = reference.linear_attention(
        reference.feature_map(q, s.feature_map),
        reference.feature_map(phi_keys, s.feature_map),
        v,
        1 - mask,
        s.block_q,
        s.block_k,
    )
    return mix_rows(module, sparse, linear, rows)


def mix_rows(module: SparseLinearAttention, sparse: Tensor, linear: Tensor, rows: Tensor) -> Tensor:
    """Mix outputs (B, H, R * b_q, D) of some query blocks with the mixing of those blocks."""
    if not hasattr(module.mixing, "alpha"):
        return module.mixing(sparse, linear, module.settings.block_q)
    alpha = module.mixing.alpha(module.mixing.logit.shape[1])[:, rows]
    alpha = alpha.repeat_interleave(module.settings.block_q, dim=1)[..., None]
    return alpha * sparse + (1 - alpha) * linear


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """Squared error over the target's power: equal weight for layers of unequal size."""
    return (out.float() - target.float()).square().mean() / target.float().square().mean()


class Stage1:
    """The frozen model, its data, and one attention module per layer.

    Args:
        settings: config section `stage1`, and variant, attention, seed.
    """

    def __init__(self, settings: dict, base: BaseModel, device: torch.device) -> None:
        self.settings, self.base, self.device = settings, base, device
        variant = Variant.from_row(settings["variant"])
        self.attention = AttentionSettings(**settings["attention"])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.transformer = load_transformer(base, dtype=dtype).to(device).eval().requires_grad_(False)
        self.layers = nn.ModuleList(
            build(variant, base.heads, base.head_dim, base.tokens, self.attention) for _ in range(base.layers)
        ).to(device)
        self.data, self.heldout = Latents(Path(base.latents) / "train"), Latents(Path(base.latents) / "heldout")
        self.order = batches(len(self.data), settings["batch"], settings["seed"])
        self.whole_blocks = base.tokens // self.attention.block_q  # the ragged last block is left to the hard error

    def dense(self, latents: Tensor, text: Tensor, sigma: Tensor, draw: torch.Generator) -> list[dict[str, Tensor]]:
        """Q, K, V and dense output of every layer on noisy latents."""
        noise = torch.randn(latents.shape, generator=draw)
        x, _ = noisy(latents.to(self.device), noise.to(self.device), sigma.to(self.device))
        with torch.no_grad(), capture_qkv(self.transformer) as layers:
            predict(self.transformer, x, sigma.to(self.device), text.to(self.device))
        return layers

    def loss(self, step: int) -> Iterator[Tensor]:
        """Mean relative error over layers of the masked output, for a random sample of query blocks each."""
        draw = generator(self.settings["seed"], 4, step)
        latents, text = self.data.batch(self.order(step))
        sigma = shifted(torch.rand(len(latents), generator=draw).clamp(1e-3, 1 - 1e-3), self.base.flow_shift)
        losses = []
        for module, seen in zip(self.layers, self.dense(latents, text, sigma, draw), strict=True):
            rows = torch.randperm(self.whole_blocks, generator=draw)[: self.settings["query_blocks"]].to(self.device)
            out = masked_output(module, seen, rows, self.settings)
            shape = (*seen["o"].shape[:2], self.whole_blocks, self.attention.block_q, self.base.head_dim)
            target = seen["o"][:, :, : self.whole_blocks * self.attention.block_q].reshape(shape)[:, :, rows]
            losses.append(relative_error(out, target.flatten(2, 3)))
        yield torch.stack(losses).mean()

    @torch.no_grad()
    def hard_errors(self) -> list[tuple[int, float, float]]:
        """(layer, sigma, relative error) of the hard operator, as inference runs it, on held-out clips."""
        self.layers.eval()
        found = []
        for number, level in enumerate(HELDOUT_SIGMAS):
            latents, text = self.heldout.batch([number % len(self.heldout)])
            for layer, seen in enumerate(self.dense(latents, text, torch.tensor([level]), generator(0, 5, number))):
                out = self.layers[layer](seen["q"], seen["k"], seen["v"])
                found.append((layer, level, float(relative_error(out, seen["o"]))))
        self.layers.train()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section stage1, variant, attention, as JSON"
    )
    parser.add_argument("--base", type=Path, required=True, help="base_model.json")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    settings, base = args.settings, BaseModel.read(args.base)
    device = claim_device(settings)
    run, log = Stage1(settings, base, device), Log()
    name = settings["variant"]["variant"]
    best = nn.ModuleList(
        build(Variant.from_row(settings["variant"]), base.heads, base.head_dim, base.tokens, run.attention)
        for _ in range(base.layers)
    ).to(device)

    def validate(step: int) -> None:
        error = sum(value for _, _, value in run.hard_errors()) / (base.layers * len(HELDOUT_SIGMAS))
        earlier = [row[4] for row in log if row[3] == "hard_error"]
        log.add(step, "stage1", "heldout", "hard_error", error)
        if not earlier or error < min(earlier):
            best.load_state_dict(run.layers.state_dict())

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
        checkpoint = Checkpoint(args.output / ".checkpoint", "stage1", identity, settings["checkpoint_every"])
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
            state={"best": best},
        )
        run.layers.load_state_dict(best.state_dict())
        checkpoint.remove()
    else:
        validate(0)
        say(f"stage1 {name}: nothing to train; its hard error is measured")
    state = {
        f"blocks.{index}.attn1.processor.attention.{key}": tensor
        for index, layer in enumerate(run.layers)
        for key, tensor in layer.state_dict().items()
    }
    write_errors(args.output / "errors.csv", run.hard_errors())
    log.write(args.output / "log.csv")
    write_provenance(args.output / "adapter.safetensors", settings, base_sha256=base.weights_sha256)
    save_adapter(args.output, state, Variant.from_row(settings["variant"]), run.attention, base)


def write_errors(path: Path, errors: list[tuple[int, float, float]]) -> None:
    """Hard relative error by layer and noise level on held-out clips."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ERROR_COLUMNS)
    writer.writerows([layer, sigma, "heldout", "hard_error", f"{value:.6g}"] for layer, sigma, value in errors)
    write_atomic(path, text.getvalue())


if __name__ == "__main__":
    run_main(main)

"""A small Wan2.1 of the real diffusers classes, trained from scratch: VAE, tokenizer, text encoder, transformer.

The text encoder keeps its random weights: a pre-norm T5 passes token identity on through its residual stream, which is all
that captions of a small grammar need, and the transformer's cross-attention learns to read it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.checkpoint import Checkpoint
from sla2.flow import flow_losses, generator, heldout_loss
from sla2.latents import Images, Latents, Stream
from sla2.muon import BatchedMuon
from sla2.progress import say
from sla2.team import Team
from sla2.training import Log, batches, train
from sla2.wan import compile_blocks


def build_tokenizer(captions: list[str]):
    """Word tokenizer over the captions' words, padded right with id 0, closed by `</s>`, as UMT5's is."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions for word in pre_split(caption)})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def pre_split(caption: str) -> list[str]:
    """Words as the tokenizer's pre-tokenizer splits them."""
    from tokenizers import pre_tokenizers

    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(caption.lower())]


def build_pipeline(settings: dict, captions: list[str]):
    """A `WanPipeline` with fresh weights drawn from `settings["seed"]`; settings as config section `base_model`."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(settings["seed"])
    v, t, w = settings["vae"], settings["text_encoder"], settings["transformer"]
    patch = v["patch_size"]
    tokenizer = build_tokenizer(captions)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=t["d_model"],
            d_kv=t["d_model"] // t["heads"],
            d_ff=t["d_ff"],
            num_layers=t["layers"],
            num_heads=t["heads"],
            dropout_rate=0.0,
        )
    )
    vae = AutoencoderKLWan(
        base_dim=v["base_dim"],
        z_dim=v["z_dim"],
        dim_mult=v["dim_mult"],
        num_res_blocks=v["num_res_blocks"],
        temperal_downsample=v["temporal_downsample"],
        patch_size=patch if patch > 1 else None,
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        latents_mean=[0.0] * v["z_dim"],
        latents_std=[1.0] * v["z_dim"],
        # diffusers takes these two as metadata and does not derive them.
        scale_factor_spatial=patch * 2 ** (len(v["dim_mult"]) - 1),
        scale_factor_temporal=2 ** sum(v["temporal_downsample"]),
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=w["heads"],
        attention_head_dim=w["head_dim"],
        in_channels=v["z_dim"],
        out_channels=v["z_dim"],
        text_dim=t["d_model"],
        freq_dim=64,
        ffn_dim=w["ffn_dim"],
        num_layers=w["layers"],
    )
    start_at_identity(transformer)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=settings["flow_shift"]
    )
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=vae, transformer=transformer, scheduler=scheduler
    )


@torch.no_grad()
def start_at_identity(transformer: nn.Module) -> None:
    """Zero what every branch adds and what the model predicts, so that the first steps are spent on the data (as DiT does)."""
    outputs = [
        layer
        for block in transformer.blocks
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2])
    ]
    for layer in [*outputs, transformer.proj_out]:
        layer.weight.zero_()
        layer.bias.zero_()


class Reconstruction(nn.Module):
    """A VAE as one forward pass, which is what processes that train together need: clip to latents to clip.

    Args:
        vae: `AutoencoderKLWan`.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, noise: Callable[[torch.Size], Tensor]) -> tuple[Tensor, Tensor]:
        """Latents of videos (B, 3, T, H, W) in [-1, 1], and what is decoded from them with noise of their shape added."""
        latents = self.vae.encode(video).latent_dist.mode()
        return latents, self.vae.decode(latents + noise(latents.shape)).sample


def train_vae(vae: nn.Module, clips, heldout, settings: dict, team: Team, folder: Path, log: Log) -> None:
    """Train the VAE to reconstruct crops in space and time (`busy_crops`), then set its latents' mean and standard deviation.

    L1 plus squared error in [-1, 1], and a light pull of the latents to unit size. Crops have at least two temporal chunks
    beyond the first frame, since the causal convolutions' cache is first filled by the second chunk.
    """
    v, seed = settings["vae"], settings["seed"]
    for block in vae.modules():
        # Residual blocks start as the identity, which a few hundred steps need.
        if type(block).__name__ == "WanResidualBlock":
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    vae.to(team.device).train()
    reconstruct = team.wrap(Reconstruction(vae))
    kernels = [p for p in vae.parameters() if p.ndim > 3 and p[0].numel() > 1]  # and not the gains of norms
    order = batches(len(clips), v["batch"], seed)
    crop_frames = min(9, settings["video"]["frames"])
    places = team.share(len(order(0)))
    checkpoint = Checkpoint(folder, "vae", settings, settings["train"]["checkpoint_every"], team)

    def windows(frames: Tensor, draw: torch.Generator, places: range, count: int) -> Tensor:
        """Videos (B, 3, T, side, side) in [-1, 1]."""
        frames = busy_crops(frames.to(team.device), crop_frames, v["crop"], draw, places, count)
        return (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)

    def loss(step: int) -> Iterator[Tensor]:
        draw, chosen = generator(seed, 1, step), order(step)
        video = windows(clips.batch([chosen[place] for place in places]), draw, places, len(chosen))

        def noise(shape: torch.Size) -> Tensor:
            # It keeps the decoder smooth around the latents that diffusion will hand it.
            return 0.2 * torch.randn(len(chosen), *shape[1:], generator=draw)[places].to(team.device)

        latents, decoded = reconstruct(video, noise)
        error = decoded - video
        yield (error.abs().mean() + error.square().mean() + 1e-4 * latents.square().mean()) / team.size

    @torch.no_grad()
    def validate(step: int) -> None:
        shown = range(min(16, len(heldout)))
        video = windows(heldout.batch(list(shown)), generator(seed, 5), shown, len(shown))
        error = vae.decode(vae.encode(video).latent_dist.mode()).sample.clamp(-1, 1) - video
        log.add(step, "vae", "heldout", "loss", float(error.abs().mean() + error.square().mean()))
        if team.first:
            say(f"base_model vae: held-out windows at {-10 * float((error / 2).square().mean().log10()):.1f} dB")

    train(
        "vae",
        "base_model vae",
        vae,
        muon_and_adamw(vae, kernels, v["lr_kernels"], v["lr"], weight_decay=0.0),
        loss,
        v["steps"],
        checkpoint,
        log,
        warmup=10,
        clip=10.0,
        validate=validate,
        validate_every=max(1, v["steps"] // 5),
        team=team,
    )
    set_latent_statistics(vae.eval(), clips, team.device)


def busy_crops(frames: Tensor, length: int, side: int, draw: torch.Generator, places: range, count: int) -> Tensor:
    """A window of each clip: of four drawn at random, the one that differs most from the clip's mean colour.

    Ground fills most of a frame. A VAE that saw windows as they came drew everything that was not orange or yellow in grey.

    Args:
        frames: uint8 (B, T, H, W, 3).
        length, side: of the window, in frames and pixels; a clip that is smaller gives all it has.
        places, count: of these clips in their batch, and how many it has; a clip's window depends on its place.

    Returns:
        uint8 (B, length, side, side, 3).
    """
    limits = frames.shape[1:4]
    sizes = [min(size, limit) for size, limit in zip((length, side, side), limits, strict=True)]
    clip = torch.arange(len(frames), device=frames.device)
    choices = [
        torch.randint(0, limit - size + 1, (count, 4), generator=draw)[places].to(frames.device)
        for limit, size in zip(limits, sizes, strict=True)
    ]
    pixels = frames.float()
    contrast = (pixels - pixels.mean((1, 2, 3), keepdim=True)).abs().mean((1, 4))
    contrast = nn.functional.avg_pool2d(contrast[:, None], sizes[1:], stride=1)[:, 0]
    best = contrast[clip[:, None], choices[1], choices[2]].argmax(1)
    t, y, x = (
        start[clip, best][:, None] + torch.arange(size, device=frames.device)
        for start, size in zip(choices, sizes, strict=True)
    )
    return frames[clip[:, None, None, None], t[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]


@torch.no_grad()
def set_latent_statistics(vae: nn.Module, clips, device: torch.device) -> None:
    """Per-channel mean and standard deviation of the latents of some clips, into the VAE's config, as Wan's VAE has them."""
    frames = clips.batch(list(range(min(32, len(clips))))).to(device)
    video = (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    latents = vae.encode(video).latent_dist.mode()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.clamp_min(1e-3).tolist())


def train_transformer(
    pipeline, data: Latents, heldout: Latents, settings: dict, team: Team, folder: Path, log: Log
) -> None:
    """Flow matching with Wan's shift on cached latents, of images and then of videos; the averaged weights stay in the pipeline.

    Images are first frames. Wan2.1 is trained in this order too: what a thing looks like is learned where a clip costs a tenth of the time.
    """
    t, seed = settings["train"], settings["seed"]
    transformer, device = team.place(pipeline.transformer).train(), team.device
    if t["compile"]:
        compile_blocks(transformer)
    wrapped = team.wrap(transformer)
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    empty = data.empty_text.to(device)

    def phase(
        name: str, number: int, steps: int, batch: Callable, held: Latents | Images, waited_s: Callable[[], float]
    ) -> None:
        """Train on `batch(step)`, latents and text embeddings, and validate on `held`."""

        def loss(step: int) -> Iterator[Tensor]:
            draw = generator(seed, number, step)
            yield from flow_losses(
                wrapped, *batch(step), empty, settings["flow_shift"], draw, t["caption_dropout"], team=team
            )

        def validate(step: int) -> None:
            value = heldout_loss(transformer, held, settings["flow_shift"], device, team=team)
            log.add(step, name, "heldout", "loss", value)

        train(
            name,
            f"base_model {name}",
            transformer,
            muon_and_adamw(transformer, matrices, t["lr_matrices"], t["lr"], t["weight_decay"]),
            loss,
            steps,
            Checkpoint(folder, name, settings, t["checkpoint_every"], team),
            log,
            warmup=t["warmup"],
            ema=t["ema"],
            validate=validate,
            validate_every=max(1, steps // 5),
            waited_s=waited_s,
            team=team,
        )

    if steps := t["images"]["steps"]:
        images, order = Images(data, device), batches(len(data), t["images"]["batch"], seed + 1, team)
        phase("images", 8, steps, lambda step: images.batch(order(step)), Images(heldout, device), lambda: 0.0)
    stream = Stream(data, batches(len(data), t["batch"], seed, team), t["steps"], device)
    phase("transformer", 2, t["steps"], stream, heldout, stream.waited_s)
    transformer.eval()


def muon_and_adamw(
    module: nn.Module, matrices: list[nn.Parameter], lr_matrices: float, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for some matrices or kernels of a module, AdamW for all else that it has.

    From scratch, and with as few steps as a small study has, AdamW alone took about twice as many for the same loss: of the
    transformer's matrices, and of the VAE's kernels.
    """
    chosen = set(map(id, matrices))
    others = [p for p in module.parameters() if id(p) not in chosen]
    return [
        BatchedMuon(matrices, lr=lr_matrices, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=others[0].is_cuda or None),
    ]

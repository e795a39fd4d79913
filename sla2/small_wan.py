"""A small Wan2.1 of the real diffusers classes, trained from scratch: VAE, tokenizer, text encoder, transformer.

The text encoder keeps its random weights: a pre-norm T5 passes token identity on through its residual stream, which is all
that captions of a small grammar need, and the transformer's cross-attention learns to read it.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from sla2.checkpoint import Checkpoint
from sla2.flow import generator, noisy, shifted, timesteps
from sla2.latents import Latents
from sla2.training import Log, batches, train


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
        latents_mean=[0.0] * v["z_dim"],
        latents_std=[1.0] * v["z_dim"],
        # diffusers takes these two as metadata and does not derive them.
        scale_factor_spatial=2 ** (len(v["dim_mult"]) - 1),
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
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=settings["flow_shift"]
    )
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=vae, transformer=transformer, scheduler=scheduler
    )


def train_vae(vae: nn.Module, clips, settings: dict, device: torch.device, folder: Path, log: Log) -> None:
    """Train the VAE to reconstruct random crops in space and time, then set its latents' mean and standard deviation.

    L1 plus squared error in [-1, 1], and a light pull of the latents to unit size. Crops have at least two temporal chunks
    beyond the first frame, since the causal convolutions' cache is first filled by the second chunk.
    """
    v, seed = settings["vae"], settings["seed"]
    for block in vae.modules():
        # Residual blocks start as the identity, which a few hundred steps need.
        if type(block).__name__ == "WanResidualBlock":
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    vae.to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=v["lr"], betas=(0.9, 0.99), weight_decay=0.0)
    order = batches(len(clips), v["batch"], seed)
    crop_frames = min(9, settings["video"]["frames"])
    checkpoint = Checkpoint(folder, "vae", settings, settings["train"]["checkpoint_every"])

    def crop(frames: Tensor, draw: torch.Generator) -> Tensor:
        side, (_, length, height, width, _) = v["crop"], frames.shape
        t, y, x = (
            int(torch.randint(0, limit + 1, (), generator=draw))
            for limit in (length - crop_frames, max(0, height - side), max(0, width - side))
        )
        return frames[:, t : t + crop_frames, y : y + side, x : x + side]

    def loss(step: int) -> Tensor:
        draw = generator(seed, 1, step)
        frames = crop(clips.batch(order(step)).to(device), draw)
        video = (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
        latents = vae.encode(video).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=draw).to(device)
        # A little noise keeps the decoder smooth around the latents that diffusion will hand it.
        error = vae.decode(latents + 0.05 * noise).sample - video
        return error.abs().mean() + error.square().mean() + 1e-4 * latents.square().mean()

    train("vae", "base_model vae", vae, optimizer, loss, v["steps"], checkpoint, log, warmup=10, clip=10.0)
    set_latent_statistics(vae.eval(), clips, device)


@torch.no_grad()
def set_latent_statistics(vae: nn.Module, clips, device: torch.device) -> None:
    """Per-channel mean and standard deviation of the latents of some clips, into the VAE's config, as Wan's VAE has them."""
    frames = clips.batch(list(range(min(32, len(clips))))).to(device)
    video = (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    latents = vae.encode(video).latent_dist.mode()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.clamp_min(1e-3).tolist())


def train_transformer(
    pipeline, data: Latents, heldout: Latents, settings: dict, device: torch.device, folder: Path, log: Log
) -> None:
    """Flow matching with Wan's shift on cached latents; the averaged weights stay in the pipeline."""
    t, seed = settings["train"], settings["seed"]
    transformer = pipeline.transformer.to(device).train()
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=t["lr"], betas=(0.9, 0.99), weight_decay=t["weight_decay"]
    )
    order = batches(len(data), t["batch"], seed)
    empty = data.empty_text.to(device)

    def loss(step: int) -> Tensor:
        draw = generator(seed, 2, step)
        return flow_loss(
            transformer, *to(device, data.batch(order(step))), empty, settings["flow_shift"], draw, t["caption_dropout"]
        )

    def validate(step: int) -> None:
        log.add(
            step, "transformer", "heldout", "loss", heldout_loss(transformer, heldout, settings["flow_shift"], device)
        )

    train(
        "transformer",
        "base_model transformer",
        transformer,
        optimizer,
        loss,
        t["steps"],
        Checkpoint(folder, "transformer", settings, t["checkpoint_every"]),
        log,
        warmup=t["warmup"],
        ema=t["ema"],
        validate=validate,
        validate_every=max(1, t["steps"] // 5),
    )
    transformer.eval()


def to(device: torch.device, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def flow_loss(
    transformer: nn.Module,
    latents: Tensor,
    text: Tensor,
    empty: Tensor,
    shift: float,
    draw: torch.Generator,
    caption_dropout: float = 0.0,
    teacher: nn.Module | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity, in fp32, at shifted uniform noise levels.

    Args:
        latents: (B, C, T', h, w), normalised; text: (B, L, D); empty: (1, L, D) embedding of the empty caption.
        draw: CPU generator of noise levels (stratified over the batch), noise and dropped captions.
        teacher: predicts the target velocity in place of the data's.
    """
    count, device = latents.shape[0], latents.device
    uniform = (torch.rand(count, generator=draw) + torch.arange(count)) / count
    sigma = shifted(uniform.clamp(1e-3, 1 - 1e-3), shift).to(device)
    noise = torch.randn(latents.shape, generator=draw).to(device)
    dropped = (torch.rand(count, generator=draw) < caption_dropout).to(device)
    text = torch.where(dropped[:, None, None], empty, text)
    x, target = noisy(latents, noise, sigma)
    if teacher is not None:
        with torch.no_grad():
            target = predict(teacher, x, sigma, text)
    return (predict(transformer, x, sigma, text) - target).square().mean()


def predict(transformer: nn.Module, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Velocity (B, C, T', h, w) in fp32 of noisy latents at sigma (B,)."""
    dtype = transformer.dtype
    return transformer(x.to(dtype), timesteps(sigma), text.to(dtype), return_dict=False)[0].float()


@torch.no_grad()
def heldout_loss(
    transformer: nn.Module, heldout: Latents, shift: float, device: torch.device, clips: int = 16
) -> float:
    """Flow-matching loss on held-out clips at fixed noise, in eval mode; comparable between steps and variants."""
    was_training = transformer.training
    transformer.eval()
    total, count = 0.0, min(clips, len(heldout))
    for start in range(0, count, 4):
        indices = list(range(start, min(start + 4, count)))
        latents, text = to(device, heldout.batch(indices))
        draw = generator(0, 3, start)
        total += len(indices) * float(flow_loss(transformer, latents, text, heldout.empty_text.to(device), shift, draw))
    transformer.train(was_training)
    return total / count

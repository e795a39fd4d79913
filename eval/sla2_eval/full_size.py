"""Wan2.1 at the paper's two sizes with random weights: what the timing of a step needs, built on the device itself.

Weights do not matter to time, and no file is read. Dense rows keep diffusers' own processor, as a user has it, with the named
attention backend; sparse rows go through `sla2.wan.install`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sla2.attention import AttentionSettings
from sla2.variant import Variant
from sla2.wan import AttentionProcessor, install, self_attentions

DENSE_FA2, DENSE_CUDNN, FLOOR = "dense-fa2", "dense-cudnn", "no-attention"


@dataclass(frozen=True)
class Shape:
    """A model and the video it denoises, height and width in pixels; text encoder and VAE as Wan2.1 has them."""

    heads: int
    layers: int
    ffn_dim: int
    frames: int
    height: int
    width: int
    head_dim: int = 128
    text: tuple[int, int] = (512, 4096)  # tokens and width of the text embedding, UMT5-XXL's
    text_layers: int = 24
    vocabulary: int = 256384
    channels: int = 16
    vae_width: int = 96

    @property
    def latents(self) -> tuple[int, int, int, int, int]:
        """Shape of the latents: the VAE compresses 4x in time, first frame apart, and 8x in space."""
        return (1, self.channels, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8)

    @property
    def tokens(self) -> int:
        return self.latents[2] * self.latents[3] * self.latents[4] // 4


SHAPES = {
    "1.3B-480p": Shape(heads=12, layers=30, ffn_dim=8960, frames=81, height=480, width=832),
    "14B-720p": Shape(heads=40, layers=40, ffn_dim=13824, frames=81, height=720, width=1280),
}


def _sla2(sparsity: float, quantization: str) -> Variant:
    return Variant("timed", "sla2", "learned", "alpha", quantization, sparsity, False)


# The most telling first: a budget that runs out takes the last ones. None stands for a row that needs no attention of ours.
ROWS: dict[str, Variant | None] = {
    DENSE_FA2: None,
    "sla2-97": _sla2(0.97, "none"),
    FLOOR: None,
    DENSE_CUDNN: None,
    "sla2-97-int8": _sla2(0.97, "ptq-int8"),
    "sla2-95": _sla2(0.95, "none"),
    "sla2-90": _sla2(0.90, "none"),
    "sla2-90-int8": _sla2(0.90, "ptq-int8"),
    "sla2-95-int8": _sla2(0.95, "ptq-int8"),
}
DIFFUSERS_BACKENDS = {DENSE_FA2: "_native_flash", DENSE_CUDNN: "_native_cudnn"}


@torch.library.custom_op("sla2_eval::leave_out", mutates_args=())
def _leave_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.clone()


@_leave_out.register_fake
def _(q, k, v):
    return torch.empty_like(v)


class LeftOut(nn.Module):
    """No attention at all, the floor of a step: an operator that a compiler cannot see through, so that Q and K are still made."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the values; all (B, H, N, D)."""
        return torch.ops.sla2_eval.leave_out(q, k, v)


class Own(nn.Module):
    """A processor of diffusers' own as a module, so that all rows sit in one place and compiled code of one stays valid.

    Args:
        processor: of diffusers; takes what the attention layer passes on.
    """

    def __init__(self, processor: object) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, *arguments: object, **named: object) -> Tensor:
        """Answer of the processor."""
        return self.processor(*arguments, **named)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of that dtype."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def build_transformer(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A `WanTransformer3DModel` with random weights in eval mode, in the mix of dtypes that `from_pretrained` would give it."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with device, default_dtype(dtype):
        transformer = WanTransformer3DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            in_channels=shape.channels,
            out_channels=shape.channels,
            text_dim=shape.text[1],
            ffn_dim=shape.ffn_dim,
            num_layers=shape.layers,
        )
    kept = transformer._keep_in_fp32_modules
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if any(part in kept for part in name.split(".")):
            tensor.data = tensor.data.float()
    return transformer.eval().requires_grad_(False)


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, sigma (1,) and text embeddings of one video: random, the same in every run."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(shape.latents, generator=draw).to(device, dtype)
    text = torch.randn(1, *shape.text, generator=draw).to(device, dtype)
    return latents, torch.tensor([0.7], device=device), text


class Switch:
    """Puts a row's self-attention into a transformer; every row's processors are made once."""

    def __init__(self, transformer: nn.Module, shape: Shape, settings: AttentionSettings) -> None:
        self.layers = self_attentions(transformer)
        self.processors: dict[str, list] = {}
        from diffusers.models.attention_dispatch import AttentionBackendName

        kind = type(self.layers[0].processor)
        for name, backend in DIFFUSERS_BACKENDS.items():
            self.processors[name] = []
            for _ in self.layers:
                processor = kind()
                processor._attention_backend = AttentionBackendName(backend)
                self.processors[name].append(Own(processor))
        self.processors[FLOOR] = [AttentionProcessor(LeftOut()) for _ in self.layers]
        for name, variant in ROWS.items():
            if variant is not None:
                install(transformer, variant, settings, shape.tokens)
                self.processors[name] = [layer.processor.eval().requires_grad_(False) for layer in self.layers]

    def __call__(self, name: str) -> None:
        """Make `name` the transformer's attention."""
        for layer, processor in zip(self.layers, self.processors[name], strict=True):
            layer.set_processor(processor)

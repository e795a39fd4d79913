"""MUSIQ: a transformer over patches of an image at three scales (Ke et al. 2021), under the names of IQA-PyTorch's checkpoints.

Patches of 32 pixels go through a small ResNet stem with standardised convolutions; each gets the embedding of its place on a
10 x 10 grid, whatever the image's size, and of its scale; the class token's answer is the score. The published model pads
each scale to a fixed number of patches and masks the padding; what is masked has no weight, so it is left out here.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sla2_eval.networks.loading import fill, read

PATCH, GRID, LONGER_SIDES = 32, 10, (224, 384)


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around (B, C, H, W), so that a window gives ceil(side / stride) places; an odd one goes to the right and below."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max(0, (math.ceil(side / stride) - 1) * stride + kernel - side)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads)


class StandardisedConv(nn.Conv2d):
    """Convolution without bias whose filters have mean 0 and deviation 1, padded to keep the size up to its stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return functional.conv2d(same_padding(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class Bottleneck(nn.Module):
    """Three convolutions with group norms around a projected shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.gn1 = StandardisedConv(width, width, 1), nn.GroupNorm(32, width, eps=1e-4)
        self.conv2, self.gn2 = StandardisedConv(width, width, 3), nn.GroupNorm(32, width, eps=1e-4)
        self.conv3, self.gn3 = StandardisedConv(width, 4 * width, 1), nn.GroupNorm(32, 4 * width, eps=1e-4)
        self.conv_proj, self.gn_proj = StandardisedConv(width, 4 * width, 1), nn.GroupNorm(32, 4 * width, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 4 C, H, W)."""
        y = self.gn1(self.conv1(x)).relu()
        y = self.gn2(self.conv2(y)).relu()
        return (self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x))).relu()


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Musiq(nn.Module):
    """Score of an image; sizes other than the published ones are for stand-ins.

    Args:
        width, layers, heads, hidden: of the transformer.
    """

    def __init__(self, width: int = 384, layers: int = 14, heads: int = 6, hidden: int = 1152) -> None:
        super().__init__()
        stem = 64
        self.conv_root, self.gn_root = StandardisedConv(3, stem, 7, 2), nn.GroupNorm(32, stem, eps=1e-6)
        self.block1 = Bottleneck(stem)
        self.embedding = nn.Linear(4 * stem * (PATCH // 4) ** 2, width)
        encoder = nn.Module()
        encoder.posembed_input, encoder.scaleembed_input = nn.Module(), nn.Module()
        encoder.posembed_input.position_emb = nn.Parameter(torch.randn(1, GRID * GRID, width) * 0.02)
        encoder.scaleembed_input.scale_emb = nn.Parameter(torch.randn(len(LONGER_SIDES) + 1, width) * 0.02)
        encoder.cls = nn.Parameter(torch.zeros(1, 1, width))
        encoder.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        encoder.transformer = nn.ModuleDict({f"encoderblock_{i}": Block(width, heads, hidden) for i in range(layers)})
        self.transformer_encoder = encoder
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B,), 0 to 100 with the published weights, of images (B, 3, H, W) in [0, 1]."""
        images = 2 * images - 1
        encoder = self.transformer_encoder
        tokens = [encoder.cls.expand(len(images), -1, -1)]
        for scale, image in enumerate(scales(images)):
            patches, places = to_patches(image)
            embedded = self.embed(patches) + encoder.posembed_input.position_emb[0, places.to(images.device)]
            tokens.append(embedded + encoder.scaleembed_input.scale_emb[scale])
        x = torch.cat(tokens, dim=1)
        for block in encoder.transformer.values():
            x = block(x)
        return self.head(encoder.encoder_norm(x)[:, 0])[:, 0]

    def embed(self, patches: Tensor) -> Tensor:
        """Patches (B, P, 3, 32, 32) to (B, P, D)."""
        count = patches.shape[:2]
        x = self.gn_root(self.conv_root(patches.flatten(0, 1))).relu()
        x = self.block1(functional.max_pool2d(same_padding(x, 3, 2), 3, 2))
        return self.embedding(x.permute(0, 2, 3, 1).flatten(1)).unflatten(0, count)  # channels last, as it was trained


def scales(images: Tensor) -> list[Tensor]:
    """The images with longer sides of 224 and 384 pixels, then as they are."""
    height, width = images.shape[2:]
    resized = []
    for longer in LONGER_SIDES:
        ratio = longer / max(height, width)
        resized.append(functional.interpolate(images, (round(height * ratio), round(width * ratio)), mode="bicubic"))
    return [*resized, images]


def to_patches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (B, P, 3, 32, 32) of images (B, 3, H, W), zeros at the border, and the place (P,) of each on the grid."""
    rows, columns = (math.ceil(side / PATCH) for side in images.shape[2:])
    patches = functional.unfold(same_padding(images, PATCH, PATCH), PATCH, stride=PATCH).transpose(1, 2)
    grid = torch.arange(GRID).float()[None, None]
    down, along = (functional.interpolate(grid, count, mode="nearest")[0, 0].long() for count in (rows, columns))
    return patches.unflatten(2, (3, PATCH, PATCH)), (GRID * down[:, None] + along).flatten()


def load_musiq(path: Path) -> Musiq:
    """MUSIQ from converted `musiq_spaq_ckpt-358bb6af.pth`."""
    return fill(Musiq(), read(path), path)

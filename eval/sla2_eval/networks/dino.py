"""DINO ViT-B/16 by timm's blocks, with DINO's own way of stretching position embeddings to frames that are not square."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sla2_eval.networks.loading import fill, read


class Dino(nn.Module):
    """A vision transformer whose answer is the class token after the last norm.

    Args:
        sizes: of timm's VisionTransformer, for stand-ins; DINO's ViT-B/16 by default.
    """

    def __init__(self, **sizes: int) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        self.vit = VisionTransformer(**{"img_size": 224, "patch_size": 16, "num_classes": 0, **sizes})

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, 1 + rows * columns, D); a tenth of a patch is added to each side before scaling, as DINO does."""
        embed = self.vit.pos_embed
        side = math.isqrt(embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return embed
        grid = embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = functional.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Class features (B, D) of normalised images (B, 3, H, W)."""
        patches = self.vit.patch_embed.proj(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.vit.blocks(tokens + self.positions(*patches.shape[2:]))
        return self.vit.norm(tokens)[:, 0]


def load_dino(path: Path) -> Dino:
    """DINO ViT-B/16 from converted `dino_vitbase16_pretrain.pth`."""
    model = Dino()
    fill(model.vit, read(path), path)
    return model.eval()

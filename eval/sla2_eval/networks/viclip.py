"""ViCLIP-L/14 (InternVid): CLIP's two towers, the visual one over the patches of eight frames together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2_eval.networks.loading import fill, read

FRAMES, CONTEXT = 8, 32  # frames that it reads, and tokens of text, start and end included
UNUSED = ("temp",)  # temperature of its training loss


class Vision(nn.Module):
    """Video tower: one class token and the patches of all frames in one sequence.

    Args:
        image, patch: sides in pixels.
        width, layers, heads, out: of the transformer and its answer.
    """

    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int, out: int) -> None:
        from open_clip.transformer import QuickGELU, Transformer

        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn((image // patch) ** 2 + 1, width) * width**-0.5)
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, FRAMES, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU)
        self.proj = nn.Parameter(torch.randn(width, out) * width**-0.5)

    def forward(self, video: Tensor) -> Tensor:
        """Features (B, out) of normalised videos (B, 8, 3, S, S)."""
        patches = self.conv1(video.transpose(1, 2)).flatten(3).permute(0, 3, 2, 1)  # (B, P, T, D): time runs fastest
        patches = patches + self.positional_embedding[1:, None] + self.temporal_positional_embedding[:, None]
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(video), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, patches.flatten(1, 2)], dim=1)))
        return self.ln_post(x[:, 0]) @ self.proj


class ViClip(nn.Module):
    """Both towers; sizes other than the published ones are for stand-ins."""

    def __init__(
        self, image: int = 224, patch: int = 14, width: int = 1024, layers: int = 24, heads: int = 16, out: int = 768,
        text_width: int = 768, text_layers: int = 12, text_heads: int = 12, vocabulary: int = 49408,
    ) -> None:  # fmt: skip
        from open_clip.transformer import QuickGELU, TextTransformer

        super().__init__()
        self.vision_encoder = Vision(image, patch, width, layers, heads, out)
        self.text_encoder = TextTransformer(
            CONTEXT, vocabulary, text_width, text_heads, text_layers, output_dim=out, act_layer=QuickGELU
        )

    def similarity(self, video: Tensor, tokens: Tensor) -> Tensor:
        """Cosines (B,) of normalised videos (B, 8, 3, S, S) and token ids (B, 32)."""
        return torch.cosine_similarity(self.vision_encoder(video), self.text_encoder(tokens))


def tokenise(texts: Sequence[str]) -> Tensor:
    """Token ids (B, 32) by CLIP's vocabulary; a longer text is cut and its last token becomes the end, as upstream does."""
    import open_clip

    return open_clip.get_tokenizer("ViT-L-14", context_length=CONTEXT)(list(texts))


def load_viclip(path: Path) -> ViClip:
    """ViCLIP from converted `ViClip-InternVid-10M-FLT.pth`."""
    return fill(ViClip(), read(path), path, UNUSED)

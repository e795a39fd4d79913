"""OpenAI's CLIP by open_clip, filled from tensors under OpenAI's own names, and LAION's linear aesthetic head."""

import logging
from pathlib import Path

from torch import nn

from sla2_eval.networks.loading import fill, read

# Facts that OpenAI's archives hold as tensors.
UNUSED = ("input_resolution", "context_length", "vocab_size")
NAMES = {"clip_vit_b32": "ViT-B-32-quickgelu", "clip_vit_l14": "ViT-L-14-quickgelu"}


def load_clip(key: str, path: Path) -> nn.Module:
    """CLIP from a converted `ViT-B-32.pt` or `ViT-L-14.pt`."""
    import open_clip

    logging.disable(logging.WARNING)  # it warns of random weights, which the next line replaces
    try:
        model = open_clip.create_model(NAMES[key], load_weights=False)
    finally:
        logging.disable(logging.NOTSET)
    return fill(model, read(path), path, UNUSED)


def load_aesthetic_head(path: Path) -> nn.Module:
    """Linear 768 to 1 from a converted `sa_0_4_vit_l_14_linear.pth`."""
    return fill(nn.Linear(768, 1), read(path), path)

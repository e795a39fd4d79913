"""RAFT by torchvision, with the names of the original checkpoint translated."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.networks.loading import fill, read

ITERATIONS = 20
SMALLEST = 16  # side of its features, an eighth of a frame's
# Original name to torchvision's, tried in this order; norms of the feature encoder have no parameters.
NAMES = (
    (r"^(f|c)net\.norm1\.", r"\1net.convnormrelu.1."),
    (r"^(f|c)net\.conv1\.", r"\1net.convnormrelu.0."),
    (r"^(f|c)net\.conv2\.", r"\1net.conv."),
    (r"\.(layer\d\.\d)\.conv(\d)\.", r".\1.convnormrelu\2.0."),
    (r"\.(layer\d\.\d)\.norm([12])\.", r".\1.convnormrelu\2.1."),
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
    (r"\.encoder\.convc(\d)\.", r".motion_encoder.convcorr\1.0."),
    (r"\.encoder\.convf(\d)\.", r".motion_encoder.convflow\1.0."),
    (r"\.encoder\.conv\.", ".motion_encoder.conv.0."),
    (r"\.gru\.conv([zrq])(\d)\.", r".recurrent_block.convgru\2.conv\1."),
)
# The original registers the norm of a shortcut twice, as `norm3` and within `downsample`.
TWICE = re.compile(r"\.layer\d\.\d\.norm3\.")


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by torchvision's names."""
    answer = {}
    for name, tensor in state.items():
        if TWICE.search(name):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        answer[name] = tensor
    return answer


def load_raft(path: Path) -> nn.Module:
    """RAFT from converted `raft-things.pth`."""
    from torchvision.models.optical_flow import raft_large

    return fill(raft_large(weights=None), translate(read(path)), path)


def padded(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) with sides of multiples of 8, the border repeated alike on both sides."""
    height, width = images.shape[2:]
    rows, columns = -height % 8, -width % 8
    return functional.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode="replicate")


@torch.inference_mode()
def speeds(model: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """Length of the flow (B, H', W') in pixels, padding included, between frames (B, 3, H, W) of 0 to 255.

    Raises:
        UndefinedError: for frames too small for its correlation pyramid.
    """
    if min(before.shape[2:]) <= 8 * (SMALLEST - 1):
        raise UndefinedError(f"RAFT needs frames of {8 * SMALLEST} pixels a side, got {tuple(before.shape[2:])}")
    before, after = (padded(frames.float()) / 127.5 - 1 for frames in (before, after))
    return model(before, after, num_flow_updates=ITERATIONS)[-1].square().sum(1).sqrt()

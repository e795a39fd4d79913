"""VBench's dimensions and CLIP score as their authors compute them, with the network as an argument.

Frames are prepared as upstream does (commit 45e79ec of VBench): without antialiasing, floats that overshoot left as they are, and
uint8 rounded where upstream stays with bytes.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sla2_eval.metrics.flicker import temporal_flickering
from sla2_eval.metrics.frames import UndefinedError, as_uint8, middle_frames

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224  # of what CLIP and DINO read, in pixels
MUSIQ_SIDE = 512  # longer side above which frames are made smaller
BATCH = 32  # frames at once
# That the correlation volumes of the pairs in a batch may take on a GPU: eight pairs of 480 x 832. On an H100 RAFT took 41 ms a pair with
# them (90 alone, 38 in batches of 16) and 4 GiB in all, AMT-S 8 ms (44 alone, 8 in batches of 16) and 8 GiB.
PAIR_BYTES = 5 * 2**28
STRIDE = 8  # of the features of a frame that flow networks correlate, in pixels


def images(video) -> Tensor:
    """Frames (T, 3, H, W), uint8."""
    return torch.from_numpy(np.ascontiguousarray(as_uint8(video))).permute(0, 3, 1, 2)


def _normalised(frames: Tensor, mean: tuple, std: tuple) -> Tensor:
    mean, std = (torch.tensor(values, device=frames.device).view(-1, 1, 1) for values in (mean, std))
    return (frames.float() / 255 - mean) / std


def for_clip(frames: Tensor) -> Tensor:
    """Shorter side to 224 by bicubic, centre crop, CLIP's mean and deviation: (T, 3, 224, 224) from bytes or floats of 0 to 255."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    frames = resize(frames, [SIDE], InterpolationMode.BICUBIC, antialias=False)
    return _normalised(center_crop(frames, [SIDE, SIDE]), CLIP_MEAN, CLIP_STD)


def for_dino(frames: Tensor) -> Tensor:
    """Shorter side to 224 by bilinear, no crop, ImageNet's mean and deviation: (T, 3, 224, W') from floats of 0 to 255."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    return _normalised(resize(frames.float(), [SIDE], InterpolationMode.BILINEAR, antialias=False), DINO_MEAN, DINO_STD)


def for_musiq(frames: Tensor) -> Tensor:
    """Longer side down to 512 where it exceeds that, by bilinear, cut to whole pixels; floats in [0, 1]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    height, width = frames.shape[2:]
    frames = frames.float()
    if max(height, width) > MUSIQ_SIDE:
        scale = MUSIQ_SIDE / max(height, width)
        frames = resize(frames, [int(scale * height), int(scale * width)], InterpolationMode.BILINEAR, antialias=False)
    return frames / 255


def in_batches(
    network: Callable[[Tensor], Tensor], frames: Tensor, prepare: Callable[[Tensor], Tensor], device
) -> Tensor:
    """Answers of a network for all frames, prepared and computed on the device some at a time."""
    with torch.inference_mode():
        return torch.cat([network(prepare(part.to(device))).float() for part in frames.split(BATCH)])


def pairs_at_once(height: int, width: int, device: torch.device) -> int:
    """Pairs of frames in a batch of a flow network, whose correlation volume is the square of a frame's features.

    One on a CPU, where a second pair only takes the cache from the first.
    """
    if device.type == "cpu":
        return 1
    volume = 4 * ((height // STRIDE) * (width // STRIDE)) ** 2
    return max(1, min(BATCH, PAIR_BYTES // volume))


def in_pairs(network: Callable[[Tensor, Tensor], Tensor], before: Tensor, after: Tensor, device) -> Iterator[Tensor]:
    """Answers (B, ...) of a network for frames (N, 3, H, W) and those after them, some pairs at a time."""
    count = pairs_at_once(*before.shape[2:], device)
    with torch.inference_mode():
        for one, other in zip(before.split(count), after.split(count), strict=True):
            yield network(one.to(device), other.to(device))


def consistency(features: Tensor) -> float:
    """Mean over t >= 1 of (max(0, cos(f_t, f_t-1)) + max(0, cos(f_t, f_0))) / 2 of features (T, D).

    Raises:
        UndefinedError: for a single frame, where VBench divides by zero.
    """
    if len(features) < 2:
        raise UndefinedError("consistency needs two frames")
    features = functional.normalize(features, dim=-1)
    previous = (features[1:] * features[:-1]).sum(-1).clamp_min(0)
    first = (features[1:] @ features[0]).clamp_min(0)
    return float((previous + first).mean() / 2)


def subject_consistency(video, dino: Callable[[Tensor], Tensor], device) -> float:
    """Card: `vbench.subject_consistency`, official.

    Definition: how alike the frames are to the one before and to the first one, by DINO.
    Formula: mean over t >= 1 of (max(0, cos(f_t, f_t-1)) + max(0, cos(f_t, f_0))) / 2, f the class feature of the whole frame.
    Range: [0, 1]. Direction: higher is steadier.
    Source: VBench `subject_consistency` (commit 45e79ec), its resize without crop. A video's own value; VBench's total weighs by frames
        on one GPU and by videos on several, ours always by videos.
    Weights: `dino_vitb16`, DINO ViT-B/16.
    UndefinedError: a single frame.
    Blind spots: a frozen or blank video scores 1: read the guards; it sees the whole frame, not the subject; motion lowers it.
    """
    return consistency(in_batches(dino, images(video), for_dino, device))


def background_consistency(video, clip_image: Callable[[Tensor], Tensor], device) -> float:
    """Card: `vbench.background_consistency`, official.

    Definition: how alike the frames are to the one before and to the first one, by CLIP.
    Formula: as for subject consistency, f the image feature of CLIP ViT-B/32.
    Range: [0, 1]. Direction: higher is steadier.
    Source: VBench `background_consistency` (commit 45e79ec); in fp32 on every device.
    Weights: `clip_vit_b32`, OpenAI's CLIP ViT-B/32.
    UndefinedError: a single frame.
    Blind spots: no background is cut out: it sees the whole frame; a frozen or blank video scores 1.
    """
    return consistency(in_batches(clip_image, images(video).float(), for_clip, device))


def aesthetic_quality(video, clip_image: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], device) -> float:
    """Card: `vbench.aesthetic_quality`, official.

    Definition: how much people would like the frames, by a linear head on CLIP features.
    Formula: mean over frames of head(f / |f|) / 10, f the image feature of CLIP ViT-L/14.
    Range: about [0, 1], not clipped. Direction: higher is better.
    Source: VBench `aesthetic_quality` (commit 45e79ec), LAION's linear head of version 0.4; in fp32 on every device, where VBench takes fp16
        on a GPU.
    Weights: `clip_vit_l14`, OpenAI's CLIP ViT-L/14, and `laion_aesthetic`.
    Blind spots: frame by frame, so every temporal fault is unseen; learnt from pictures on the web, so renders lie outside what it knows.
    """
    features = in_batches(clip_image, images(video).float(), for_clip, device)
    with torch.inference_mode():
        return float(head(functional.normalize(features, dim=-1)).mean() / 10)


def imaging_quality(video, musiq: Callable[[Tensor], Tensor], device) -> float:
    """Card: `vbench.imaging_quality`, official.

    Definition: technical quality of the frames (blur, noise, exposure) as people rate photographs of phones.
    Formula: mean over frames of MUSIQ's score, / 100.
    Range: about [0, 1]. Direction: higher is better.
    Source: VBench `imaging_quality` (commit 45e79ec) with its default preprocessing `longer`; VBench stores 0 to 100 for a video and 0 to 1
        in total, here it is 0 to 1 throughout.
    Weights: `musiq_spaq`, MUSIQ trained on SPAQ.
    Blind spots: frame by frame; detail above a longer side of 512 pixels is resized away; smaller frames are not made larger, so sets of
        different sizes do not compare.
    """
    return float(in_batches(musiq, images(video), for_musiq, device).mean() / 100)


def overall_consistency(video, similarity: Callable[[Tensor], Tensor], device) -> float:
    """Card: `vbench.overall_consistency`, official.

    Definition: how well eight frames together fit the prompt, by ViCLIP.
    Formula: cosine of the video's and the text's feature, over the middle frames of eight equal pieces.
    Range: [-1, 1]; good models reach 0.2 to 0.3. Direction: higher is closer.
    Source: VBench `overall_consistency` (commit 45e79ec): raw cosine, never times 100. A shorter video repeats its last frame.
    Weights: `viclip`, ViCLIP-L/14 trained on InternVid-10M-FLT.
    Blind spots: reads 32 tokens of the prompt and drops the rest in silence, so long prompts lose most of their content.

    Args:
        similarity: cosines (1,) of a prepared video (1, 8, 3, 224, 224) and the prompt.
    """
    frames = images(video)[middle_frames(len(video), 8)]
    with torch.inference_mode():
        return float(similarity(for_clip(frames.to(device))[None])[0])


def clip_score(video, clip_image: Callable[[Tensor], Tensor], text: Tensor, device) -> float:
    """Card: `clip_score.vit_b32`, `clip_score.vit_l14`, official.

    Definition: how well single frames fit the prompt, by CLIP.
    Formula: mean cosine of the text's feature and those of the middle frames of eight equal pieces.
    Range: [-1, 1]; about 0.2 to 0.35. Direction: higher is closer.
    Source: the CLIP score of VBench's competition; raw cosine, not times 100 and not clipped at 0 as in torchmetrics.
    Weights: `clip_vit_b32` or `clip_vit_l14`, OpenAI's.
    Blind spots: a bag of frames: order, direction and speed are unseen; reads 77 tokens.

    Args:
        text: feature (1, D) of the prompt.
    """
    frames = images(video)[middle_frames(len(video), 8)]
    features = in_batches(clip_image, frames, for_clip, device)
    return float(torch.cosine_similarity(features, text).mean())


def motion_smoothness(video, interpolate: Callable[[Tensor, Tensor], Tensor], device) -> float:
    """Card: `vbench.motion_smoothness`, official.

    Definition: how well each odd frame is predicted from its two neighbours by a network that interpolates.
    Formula: 1 - mean_k(mean|odd_k - predicted_k|) / 255, predictions times 255, clipped and cut to whole numbers; with an even number of
        frames the last one is not judged.
    Range: [0, 1], saturated: 0.96 to 0.995 for real systems. Direction: higher is smoother.
    Source: VBench `motion_smoothness` (commit 45e79ec) at full size.
    Weights: `amt_s`, AMT-S.
    UndefinedError: fewer than three frames, where VBench stops.
    Blind spots: a frozen video scores 1; held frames and grain are taken for motion that cannot be predicted.

    Args:
        interpolate: the frames half-way between pairs (B, 3, H, W) in [0, 1].
    """
    frames = images(video)
    if len(frames) < 3:
        raise UndefinedError("motion smoothness needs three frames")
    even = frames[::2].float() / 255
    found = in_pairs(interpolate, even[:-1], even[1:], device)
    between = torch.cat([(part.clamp(0, 1) * 255).to(torch.uint8).cpu() for part in found])
    errors = (frames[1::2][: len(between)].int() - between.int()).abs().double().mean((1, 2, 3))
    return float(1 - errors.mean() / 255)


def dynamic_degree(video, fps: float, speeds: Callable[[Tensor, Tensor], Tensor], device) -> float:
    """Card: `vbench.dynamic_degree`, official.

    Definition: whether enough of the clip moves fast enough.
    Formula: frames every max(1, round(fps / 8)), n of them; s = mean of the 5 % largest |flow| of each neighbouring pair; 1 when at least
        round(4 n / 16) pairs have s > 6 min(H, W) / 256.
    Range: {0, 1}. Direction: none; a motion amount.
    Source: VBench `dynamic_degree` (commit 45e79ec), RAFT with 20 iterations.
    Weights: `raft_things`, RAFT trained on FlyingThings.
    UndefinedError: fewer than three frames after the stride, where VBench calls any pair dynamic.
    Blind spots: the file's frame rate decides the stride; camera and object are not told apart.

    Args:
        speeds: length of the flow (B, H, W) from frames to frames (B, 3, H, W), bytes.
    """
    frames = images(video)[:: max(1, round(fps / 8))]
    if len(frames) < 3:
        raise UndefinedError(f"dynamic degree needs three frames at 8 per second, got {len(frames)}")
    fast = _top(frames[:-1], frames[1:], 0.05, speeds, device) > 6 * min(frames.shape[2:]) / 256
    return float(int(fast.sum()) >= round(4 * len(frames) / 16))


def static_flickering(video, speeds: Callable[[Tensor, Tensor], Tensor], device) -> float:
    """Card: `vbench.temporal_flickering`, official.

    Definition: `temporal_flickering` of a clip that VBench's filter calls static.
    Formula: 1 - mean_t(mean|I_t - I_t+1|) / 255. Static: s is the mean of the 2 % largest |flow| of a pair; of the neighbouring pairs at
        most c = round(2 n / 16) have s > h = 3 min(H, W) / 256, and both ways from first to last frame s <= 2 c h.
    Range: [0, 1]. Direction: higher is steadier.
    Source: VBench `temporal_flickering` and `static_filter` (commit 45e79ec).
    Weights: `raft_things`, for the filter.
    UndefinedError: fewer than two frames; a clip that is not static.
    Blind spots: what moves is not measured; a frozen video scores 1.
    """
    frames = images(video)
    if len(frames) < 2:
        raise UndefinedError("temporal flickering needs two frames")
    threshold, allowed = 3 * min(frames.shape[2:]) / 256, round(2 * len(frames) / 16)
    near = _top(frames[:-1], frames[1:], 0.02, speeds, device)
    far = _top(frames[[0, -1]], frames[[-1, 0]], 0.02, speeds, device)
    if int((near > threshold).sum()) > allowed or bool((far > threshold * allowed * 2).any()):
        raise UndefinedError("the clip moves: VBench's filter keeps near-static clips only")
    return temporal_flickering(video)


def _top(before: Tensor, after: Tensor, share: float, speeds: Callable, device) -> Tensor:
    """Mean of that share of the largest speeds of each pair, (N,)."""
    found = []
    for part in in_pairs(speeds, before, after, device):
        values = part.flatten(1)
        found.append(values.topk(max(1, int(share * values.shape[1])), dim=1).values.mean(1).cpu())
    return torch.cat(found)

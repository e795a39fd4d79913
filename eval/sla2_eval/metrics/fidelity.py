"""Fidelity: how close a video is to the dense model's video from the same prompt, seed and noise."""

import torch

from sla2_eval.metrics.frames import UndefinedError, as_array, as_float

PSNR_CAP_DB = 100.0  # a mean squared error of 1e-10 on the scale [0, 1]
FLOOR = ("floor.psnr", "floor.ssim")
PIXELS = 2**21  # compared at once: more than fit a processor's cache take twice as long
SSIM_WINDOW = 11  # side of the Gaussian window (sigma 1.5) in pixels


def fidelity(video, reference, device: torch.device | str = "cpu") -> dict[str, float]:
    """Card: `fidelity.psnr`, `fidelity.psnr_pooled`, `fidelity.ssim`, exact.

    Definition: peak signal-to-noise ratio and structural similarity between two videos of one shape.
    Formula: psnr = mean_t min(10 log10(1 / MSE_t), 100); psnr_pooled = min(10 log10(1 / MSE of all frames), 100);
        ssim = mean_t SSIM_t with a Gaussian 11 x 11 window, sigma 1.5, data range 1.
    Range: psnr [0, 100] dB, ssim [-1, 1]; identical videos give 100 and 1. Direction: higher is closer.
    Source: torchmetrics; the cap per frame is ours, as one identical frame would make the mean infinite.
    UndefinedError: ssim for frames smaller than the window.
    Blind spots: distance to one sample of the dense model, not quality: a good video of another scene layout scores low.
        Symmetric, so it cannot tell which of the two is the better one. Read it against the floor, dense with another seed.

    Args:
        video, reference: (T, H, W, 3), uint8 or floats in [0, 1].
        device: where it is computed; on a GPU with TF32 convolutions off, which round SSIM in the third digit.

    Raises:
        ValueError: when T, H or W differ; nothing is cropped in silence.
        UndefinedError: as above.
    """
    shapes = as_array(video).shape, as_array(reference).shape
    if shapes[0] != shapes[1]:
        raise ValueError(f"fidelity compares videos of one shape, got {shapes[0]} and {shapes[1]}")
    if min(shapes[0][1:3]) < SSIM_WINDOW:
        raise UndefinedError(
            f"SSIM needs frames of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {shapes[0][1:3]}"
        )
    # Imported here: torchmetrics costs nine seconds of a core.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    video, reference = as_array(video), as_array(reference)
    psnr, ssim, squares = [], [], []
    count = max(1, PIXELS // (shapes[0][1] * shapes[0][2]))
    for start in range(0, len(video), count):
        x, y = (
            torch.from_numpy(as_float(v[start : start + count]) / 255.0).to(device).permute(0, 3, 1, 2)
            for v in (video, reference)
        )
        psnr.append(peak_signal_noise_ratio(x, y, data_range=1.0, dim=(1, 2, 3), reduction="none"))
        ssim.append(structural_similarity_index_measure(x, y, data_range=1.0, reduction="none"))
        squares.append((x - y).square().double().mean(dim=(1, 2, 3)))
    pooled = -10 * torch.cat(squares).mean().log10()
    return {
        "fidelity.psnr": float(torch.cat(psnr).clamp(max=PSNR_CAP_DB).mean()),
        "fidelity.psnr_pooled": float(pooled.clamp(max=PSNR_CAP_DB)),
        "fidelity.ssim": float(torch.cat(ssim).mean()),
    }


def floor(video, other) -> dict[str, float]:
    """Card: `floor.psnr`, `floor.ssim`, exact.

    Definition: fidelity between two videos of the dense model, of one prompt and two sampling seeds: the noise floor of fidelity.
    Formula: `fidelity.psnr` and `fidelity.ssim` of the two.
    Range: psnr [0, 100] dB, ssim [-1, 1]. Direction: none; a variant's fidelity above it is due to the shared noise.
    Source: ours; measured on the untouched dense model only, each seed against the next one.
    UndefinedError: ssim's; a study with one seed has no floor.
    Blind spots: on plain backgrounds two videos agree wherever nothing is, so the floor is high.

    Args:
        video, other: (T, H, W, 3), uint8 or floats in [0, 1].
    """
    found = fidelity(video, other)
    return {name: found[name.replace("floor.", "fidelity.")] for name in FLOOR}

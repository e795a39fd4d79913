"""Naturalness: distance of a video's local statistics from those of pristine frames of the same domain."""

import math

import cv2
import numpy as np
import torch

from sla2_eval.metrics.frames import UndefinedError, luma

_SHAPES = np.arange(0.2, 10.0, 0.001)  # candidate shape parameters of the generalised Gaussian
_GAMMA = np.vectorize(math.gamma)
_RATIOS = _GAMMA(2 / _SHAPES) ** 2 / (
    _GAMMA(1 / _SHAPES) * _GAMMA(3 / _SHAPES)
)  # (E|x|)^2 / E x^2, increasing in the shape


class Naturalness:
    """Card: `proxy.naturalness_niqe_indomain`.

    Definition: Mahalanobis-like distance between two multivariate normals of 36 local features, one fitted to the sharp patches
        of pristine in-domain frames, the other to all patches of the video.
    Formula: sqrt((m1 - m2)^T ((S1 + S2) / 2)^+ (m1 - m2)). Features: at full and half scale, of the locally normalised luma
        (mean and deviation by a 7 x 7 Gaussian, sigma 7/6): shape and variance of a generalised Gaussian, and shape, mean, left
        and right variance of an asymmetric one for the products of horizontal, vertical and two diagonal neighbours.
    Range: [0, inf), unbounded; never mapped to another scale. Direction: lower is closer to the domain.
    Source: the construction of NIQE (Mittal et al. 2013), fitted here on the study's own held-out clips; patch size as configured
        (96 in NIQE); patches of all frames are pooled. No weights.
    UndefinedError: a frame without texture (all patches flat).
    Blind spots: every temporal edit (freeze, reversal, shuffle) leaves it unchanged, though with 16 patches a frame instead of 64
        freezing adds a tenth, and noise of 5 levels goes unseen; colour is not seen; with flat backgrounds it is
        not monotone in blur, so scenes need texture; strong blur saturates.

    Args:
        patch: side of a patch at full scale, even, in pixels.
    """

    sharp_share = 0.75  # a pristine patch is used when its mean deviation exceeds this share of the frame's largest

    def __init__(self, patch: int) -> None:
        if patch < 8 or patch % 2:
            raise ValueError(f"patch is an even number of pixels of at least 8, got {patch}")
        self.patch = patch
        self.mean: np.ndarray | None = None
        self.covariance: np.ndarray | None = None

    def fit(self, videos) -> "Naturalness":
        """Fit on pristine videos, each (T, H, W, 3).

        Raises:
            ValueError: when they hold fewer sharp patches than there are features.
        """
        chosen = []
        for video in videos:
            features, sharpness = self.features(video)
            chosen.append(features[sharpness > self.sharp_share * sharpness.max(axis=1, keepdims=True)])
        rows = np.concatenate(chosen)
        rows = rows[np.isfinite(rows).all(axis=1)]
        if len(rows) <= rows.shape[1]:
            raise ValueError(
                f"{len(rows)} sharp patches cannot fit {rows.shape[1]} features; give more clips or smaller patches"
            )
        self.mean, self.covariance = rows.mean(axis=0), np.cov(rows, rowvar=False)
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """The fitted model as tensors, for a file."""
        return {
            "patch": torch.tensor(self.patch),
            "mean": torch.tensor(self.mean),
            "covariance": torch.tensor(self.covariance),
        }

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> "Naturalness":
        """What `state` gave."""
        model = cls(int(state["patch"]))
        model.mean, model.covariance = state["mean"].numpy(), state["covariance"].numpy()
        return model

    def __call__(self, video) -> float:
        """Distance of one video (T, H, W, 3).

        Raises:
            UndefinedError: as on the card.
        """
        if self.mean is None or self.covariance is None:
            raise ValueError("fit the model on pristine videos first")
        features, _ = self.features(video)
        rows = features.reshape(-1, features.shape[-1])
        rows = rows[np.isfinite(rows).all(axis=1)]
        if len(rows) < 2:
            raise UndefinedError("no patch of the video has texture")
        covariance = np.cov(rows, rowvar=False)
        difference = rows.mean(axis=0) - self.mean
        return float(np.sqrt(max(0.0, difference @ np.linalg.pinv((self.covariance + covariance) / 2) @ difference)))

    def features(self, video) -> tuple[np.ndarray, np.ndarray]:
        """Features (T, P, 36) and mean local deviation (T, P) of the P whole patches of every frame; flat patches give NaN."""
        grey = luma(video)
        rows, columns = grey.shape[1] // self.patch, grey.shape[2] // self.patch
        if not rows * columns:
            raise UndefinedError(f"frames of {grey.shape[1]} x {grey.shape[2]} hold no patch of {self.patch} pixels")
        grey = grey[:, : rows * self.patch, : columns * self.patch]
        halves = np.stack([cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for frame in grey])
        full, sharpness = self._one_scale(grey, self.patch)
        half, _ = self._one_scale(halves, self.patch // 2)
        return np.concatenate([full, half], axis=-1), sharpness

    @staticmethod
    def _one_scale(grey: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
        """18 features and the mean local deviation of each patch of frames (T, H, W)."""

        def blur(frame: np.ndarray) -> np.ndarray:
            return cv2.GaussianBlur(frame, (7, 7), 7 / 6, borderType=cv2.BORDER_REPLICATE)

        mean = np.stack([blur(frame) for frame in grey])
        deviation = np.sqrt(np.abs(np.stack([blur(frame) for frame in grey * grey]) - mean * mean))
        normal = (grey - mean) / (deviation + 1.0)
        shifted = [np.roll(normal, shift, axis=(1, 2)) for shift in ((0, 1), (1, 0), (1, 1), (1, -1))]
        patches = [_split(values, patch) for values in (normal, *(normal * other for other in shifted))]
        features = [np.stack([*_generalised_gaussian(patches[0])], axis=-1)]
        features += [np.stack([*_asymmetric_gaussian(products)], axis=-1) for products in patches[1:]]
        return np.concatenate(features, axis=-1), _split(deviation, patch).mean(axis=-1)


def _split(values: np.ndarray, patch: int) -> np.ndarray:
    """(T, H, W) to (T, patches, pixels of a patch)."""
    frames, height, width = values.shape
    blocks = values.reshape(frames, height // patch, patch, width // patch, patch).swapaxes(2, 3)
    return blocks.reshape(frames, -1, patch * patch).astype(np.float64)


def _shape_of(ratio: np.ndarray) -> np.ndarray:
    """Shape parameter whose moment ratio is nearest; NaN where the ratio is not a number (a flat patch)."""
    index = np.clip(np.searchsorted(_RATIOS, ratio), 0, len(_SHAPES) - 1)
    return np.where(np.isfinite(ratio), _SHAPES[index], np.nan)


def _generalised_gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    variance = np.mean(x * x, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _shape_of(np.mean(np.abs(x), axis=-1) ** 2 / variance), variance


def _asymmetric_gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Shape, mean, left and right variance by moment matching (Lasmar et al. 2009)."""
    square = x * x
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt(np.sum(square * (x < 0), axis=-1) / np.sum(x < 0, axis=-1))
        right = np.sqrt(np.sum(square * (x > 0), axis=-1) / np.sum(x > 0, axis=-1))
        skew = left / right
        ratio = np.mean(np.abs(x), axis=-1) ** 2 / np.mean(square, axis=-1)
        shape = _shape_of(ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2)
        known = np.where(np.isfinite(shape), shape, 1.0)
        spread = np.sqrt(_GAMMA(1 / known) / _GAMMA(3 / known))
        mean = (right - left) * spread * _GAMMA(2 / known) / _GAMMA(1 / known)
    return shape, np.where(np.isfinite(shape), mean, np.nan), left**2, right**2

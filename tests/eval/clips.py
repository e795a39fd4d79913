"""Hand-made clips and edits that the tests of video metrics share; they need no renderer of the package."""

import itertools

import cv2
import numpy as np


def texture(side: int, rng: np.random.Generator) -> np.ndarray:
    """Torus texture (side, side, 3) of mean 0 and deviation 1 with a 1/f spectrum."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1.0
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.standard_normal((side, side))) / frequency**1.2
        spectrum[0, 0] = 0
        values = np.fft.ifft2(spectrum).real
        channels.append(values / values.std())
    return np.stack(channels, axis=-1)


def moving_disc(seed: int, frames: int = 17, side: int = 64, speed: tuple[float, float] = (1.5, 0.7)) -> np.ndarray:
    """A textured red disc that moves over a textured, grain-free background: uint8 (frames, side, side, 3)."""
    rng = np.random.default_rng(seed)
    background = texture(side, rng) * 30 + 128
    surface = (texture(side, rng) * 15 + np.array([220, 40, 40])).astype(np.float32)
    rows, columns = np.mgrid[:side, :side]
    video = []
    for t in range(frames):
        dx, dy = speed[0] * t, speed[1] * t
        centre = side / 4 + dx, side / 3 + dy
        inside = np.clip(side / 7 - np.hypot(columns - centre[0], rows - centre[1]) + 0.5, 0, 1)[..., None]
        moved = cv2.warpAffine(surface, np.float32([[1, 0, dx], [0, 1, dy]]), (side, side), borderMode=cv2.BORDER_WRAP)
        video.append(background * (1 - inside) + moved * inside)
    return to_uint8(np.stack(video))


def to_uint8(video: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def noisy(video: np.ndarray, deviation: float) -> np.ndarray:
    return to_uint8(video + np.random.default_rng(1).standard_normal(video.shape) * deviation)


def blurred(video: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in video])


def jpeg(video: np.ndarray, quality: int) -> np.ndarray:
    encode = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in video]
    return np.stack([cv2.imdecode(data, cv2.IMREAD_COLOR) for data in encode])


def frozen(video: np.ndarray) -> np.ndarray:
    return np.repeat(video[:1], len(video), axis=0)


def reversed_in_time(video: np.ndarray) -> np.ndarray:
    return video[::-1].copy()


def shuffled(video: np.ndarray) -> np.ndarray:
    return video[np.random.default_rng(3).permutation(len(video))]


def held(video: np.ndarray) -> np.ndarray:
    """Every frame shown twice at half the rate."""
    return video[np.arange(len(video)) // 2 * 2]


def flickering(video: np.ndarray, deviation: float) -> np.ndarray:
    """Brightness of whole frames drawn at random."""
    return to_uint8(video + np.random.default_rng(4).standard_normal((len(video), 1, 1, 1)) * deviation)


def jittering(video: np.ndarray, deviation: float) -> np.ndarray:
    """Every frame moved by a few pixels of its own, as a hand-held camera does."""
    rng = np.random.default_rng(5)
    moves = [np.float32([[1, 0, x], [0, 1, y]]) for x, y in rng.standard_normal((len(video), 2)) * deviation]
    size = video.shape[2], video.shape[1]
    pairs = zip(video, moves, strict=True)
    return np.stack([cv2.warpAffine(frame, move, size, borderMode=cv2.BORDER_REPLICATE) for frame, move in pairs])


def assert_order(*scores) -> None:
    """Scores of the same scenes, lowest first: each mean exceeds the one before by three standard errors of the paired difference."""
    for lower, higher in itertools.pairwise(scores):
        change = np.asarray(higher, float) - np.asarray(lower, float)
        assert len(change) >= 6
        error = change.std(ddof=1) / np.sqrt(len(change))
        assert change.mean() > 3 * error, f"{change.mean():.3g} is not above three times {error:.3g}"

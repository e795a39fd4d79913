"""Cutting a thing out of a frame, and masks that are compared whatever their place, size and turn."""

import cv2
import numpy as np

GRID = 32  # side of the grid on which masks are compared
TURNS = 24  # rotations of each canonical shape, 15 degrees apart
AREA = 0.5  # a normalised mask fills this share of the grid's inscribed disc
SMALLEST, LARGEST = 0.01, 0.6  # area of a thing as a share of the frame
HOLE = 0.12  # a hole is the shape's own, as a ring's, when it exceeds this share of the thing and is round; others are filled
ROUND = 0.5  # share of its enclosing circle that a round hole fills; the stripe of a surface fills a quarter
RIM = 0.25  # inscribed by enclosed radius below which a region is the blurred rim of another; that of a ring is 0.33


def diameter(mask: np.ndarray) -> float:
    return 2 * float(np.sqrt(mask.sum() / np.pi))


def ground_color(frames: np.ndarray) -> np.ndarray:
    """Colour of the ground (3,): the median of all border pixels."""
    return np.median(np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)]), axis=0)


def nearest_segment(pixels: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Index (...) of the segment, from starts to ends (n, 3), that is nearest to each RGB pixel (..., 3).

    With q = p - start, a = end - start and t = q.a / a.a cut to [0, 1], the squared distance is q.q - 2 t q.a + t^2 a.a; its p.p is the
    same for all segments and left out, so that pixels enter by two products of matrices.
    """
    starts, along = starts.astype(np.float32), (ends - starts).astype(np.float32)
    flat = np.ascontiguousarray(pixels.reshape(-1, 3).T)
    length = np.maximum(np.square(along).sum(1), 1e-6)[:, None]
    reach = along @ flat - (starts * along).sum(1)[:, None]
    place = np.clip(reach / length, 0, 1)
    squares = np.square(starts).sum(1)[:, None] - 2 * (starts @ flat) + place * (place * length - 2 * reach)
    return np.argmin(squares, axis=0).reshape(pixels.shape[:-1])


def largest_region(foreground: np.ndarray) -> np.ndarray | None:
    """Largest connected region, holes of pattern and noise filled; None when it is too small or too large to be a thing."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(foreground.astype(np.uint8), connectivity=4)
    if count < 2:
        return None
    region = labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~region).astype(np.uint8), connectivity=8)
    outside = np.zeros(count, bool)
    outside[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    large = stats[:, cv2.CC_STAT_AREA] > HOLE * region.sum()
    for hole in np.flatnonzero(large & ~outside & (np.arange(count) > 0)):
        _, radius = cv2.minEnclosingCircle(np.argwhere(labels == hole).astype(np.float32))
        outside[hole] = stats[hole, cv2.CC_STAT_AREA] >= ROUND * np.pi * radius**2
    filled = region | ~outside[labels]
    return filled if SMALLEST <= filled.mean() <= LARGEST else None


def count_regions(labels: np.ndarray) -> int:
    """Connected regions of one label each that can be a thing: (H, W) int, negative for the ground.

    Not counted are those below the smallest size of a thing, and those that are all edge: where a thing is blurred into the ground
    the mixture has the hue of a third colour.
    """
    found = 0
    for label in np.flatnonzero(np.bincount(labels[labels >= 0], minlength=1) >= SMALLEST * labels.size):
        _, regions, stats, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=4)
        for number in 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= SMALLEST * labels.size):
            x, y, width, height, _ = stats[number]
            region = np.pad(regions[y : y + height, x : x + width] == number, 1)
            inside = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 5).max()
            found += bool(2 * inside >= RIM * diameter(region))
    return found


def centre(mask: np.ndarray) -> np.ndarray:
    """Centroid (x, y) in pixels."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def normalised(mask: np.ndarray, degrees: float = 0.0) -> np.ndarray:
    """Mask as float32 (GRID, GRID): centroid in the middle, one area, turned by some degrees."""
    scale = np.sqrt(AREA * np.pi / 4 * GRID**2 / mask.sum())
    x, y = centre(mask)
    place = cv2.getRotationMatrix2D((float(x), float(y)), degrees, float(scale))
    place[:, 2] += (GRID - 1) / 2 - np.array([x, y])
    return cv2.warpAffine(mask.astype(np.float32), place, (GRID, GRID), flags=cv2.INTER_AREA)


def rotations(mask: np.ndarray) -> np.ndarray:
    """(TURNS, GRID, GRID) of a canonical mask."""
    return np.stack([normalised(mask, 360 * turn / TURNS) for turn in range(TURNS)]) > 0.5

"""Oracle scores of synthetic studies: colour, shape and direction read off the frames in closed form, compared with the prompt."""

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from sla2_eval.metrics.frames import as_float

GRID = 32  # side of the grid on which masks are compared
TURNS = 24  # rotations of each canonical shape, 15 degrees apart
AREA = 0.5  # a normalised mask fills this share of the grid's inscribed disc
SHADE = (0.35, 1.1)  # brightness of a surface, as factors of its palette colour
GREY_SHADE = (0.85, 1.1)  # the same for colours without hue, whose dark shades would be the ground's
LEAST_HUE = 25.0  # length of a colour's hue part, in grey levels, below which it counts as grey
GROUND_SPREAD = 60.0  # brightness of the ground around its median, in grey levels
SMALLEST, LARGEST = 0.01, 0.6  # area of a thing as a share of the frame
MOVED = 0.1  # displacement, as a share of the smaller side, from which on a thing has moved
HOLE = 0.12  # holes up to this share of a thing are pattern or noise and are filled; a ring's is larger


@dataclass(frozen=True)
class Recovered:
    """What a video shows; the words are None where nothing was found, or where it did not move."""

    present: bool
    color: str | None = None
    shape: str | None = None
    direction: str | None = None
    displacement: float = 0.0  # largest distance of the centre from its start, as a share of the smaller side


class Oracle:
    """Card: `oracle.presence`, `oracle.color`, `oracle.shape`, `oracle.direction`, `oracle.all`.

    Definition: the largest thing of a palette colour is cut out of every frame; its colour is the palette entry that fits it in
        most frames, its shape the canonical mask that overlaps best, its direction that of its centre's path. Each score is
        1 when the recovered word is the promised one; `all` when every promised word is.
    Formula: a pixel belongs to the nearest of these segments in RGB: each palette colour times a shade in [0.35, 1.1], and the
        ground, the median of the border pixels plus or minus 60 grey levels. Thing: the largest connected region that is not
        ground, small holes filled. Colour: the nearest hue to its median pixel less the ground; greys by brightness. Shape: argmax of the mean over frames of max over rotations of intersection over union, masks
        centred and scaled to one area. Direction: nearest of the given ones to the displacement when the centre is first a
        tenth of the smaller side away from its start; a thing that never is, stands still.
    Range: {0, 1}; presence is 1 when a thing of 1 to 60 % of the frame is there in at least half of the frames; without it
        every other score is 0. Direction: higher is better.
    Source: ours; right on at least 95 % of rendered scenes (tests/eval/test_oracle.py), no weights.
    Blind spots: made for things of one colour on a ground without strong hue; unless two are promised it reads the
        larger one;
        says nothing about texture, sharpness or flicker; a thing that leaves the frame is judged by what is seen of it.

    Args:
        palette: RGB, 0 to 255, by name.
        shapes: square boolean masks by name, any side, upright.
        directions: vectors (x, y) by name, y downwards; (0, 0) stands for no motion.
    """

    def __init__(
        self,
        palette: Mapping[str, tuple[float, float, float]],
        shapes: Mapping[str, np.ndarray],
        directions: Mapping[str, tuple[float, float]],
    ) -> None:
        self.colors, self.directions = list(palette), dict(directions)
        self.values = np.array([palette[name] for name in self.colors], np.float32)
        self.hued = np.ptp(self.values, axis=1) > 50  # colours with a hue; the others are greys, black and white
        self.shapes = list(shapes)
        turned = [_rotations(np.asarray(shapes[name], bool)) for name in self.shapes]
        self.masks = np.stack(turned).reshape(len(self.shapes) * TURNS, -1).astype(np.float32)

    def recover(self, video, among: str | None = None) -> Recovered:
        """Read one video (T, H, W, 3); `among` looks only at what has that palette colour."""
        frames = as_float(video)
        ground = _ground(frames)
        labels = self._labels(frames, ground)
        foreground = labels >= 0 if among is None else labels == self.colors.index(among)
        things = {t: mask for t, mask in enumerate(map(_largest_region, foreground)) if mask is not None}
        if 2 * len(things) < len(frames):
            return Recovered(present=False)
        names = [self._color(np.median(frames[t][mask], axis=0) - ground) for t, mask in things.items()]
        color = self.colors[int(np.bincount(names).argmax())]
        overlap = np.mean([self._overlap(mask) for mask in things.values()], axis=0)
        direction, displacement = self._direction(
            np.stack([_centre(mask) for mask in things.values()]), min(frames.shape[1:3])
        )
        return Recovered(True, color, self.shapes[int(overlap.argmax())], direction, displacement)

    def __call__(self, video, promised: Mapping[str, str]) -> dict[str, float]:
        """Scores of one video.

        Args:
            video: (T, H, W, 3), uint8 or floats in [0, 1].
            promised: what the prompt says, with any of the keys color, shape, direction, and with `second_color` when it asks
                for a second thing: then the first is looked for by its colour.

        Raises:
            ValueError: for a word that was not given at construction.
        """
        known = {"color": self.colors, "shape": self.shapes, "direction": list(self.directions)}
        for name in promised.keys() & known.keys():
            if promised[name] not in known[name]:
                raise ValueError(f"{name} '{promised[name]}' is not one of {', '.join(known[name])}")
        found = self.recover(video, promised.get("color") if "second_color" in promised else None)
        right = {name: float(getattr(found, name) == promised[name]) for name in known if name in promised}
        scores = {"oracle.presence": float(found.present), **{f"oracle.{name}": value for name, value in right.items()}}
        if right:
            scores["oracle.all"] = min(right.values())
        return scores

    def _labels(self, frames: np.ndarray, ground: np.ndarray) -> np.ndarray:
        """Index of the nearest palette colour of every pixel, -1 for the ground: (T, H, W)."""
        distances = [_segment_distance(frames, ground - GROUND_SPREAD, ground + GROUND_SPREAD)]
        for value, hued in zip(self.values, self.hued, strict=True):
            dark, bright = SHADE if hued else GREY_SHADE
            distances.append(_segment_distance(frames, value * dark, value * bright))
        return np.argmin(distances, axis=0) - 1

    def _color(self, offset: np.ndarray) -> int:
        """Palette index for the difference (3,) of a thing's colour from the ground: by hue, or by brightness without one.

        Hue, because it names a washed-out red as people do; the distance in RGB would call it orange or purple.
        """
        hue = offset - offset.mean()
        if self.hued.any() and (np.linalg.norm(hue) > LEAST_HUE or self.hued.all()):
            palette = self.values - self.values.mean(axis=1, keepdims=True)
            cosines = palette @ hue / np.maximum(np.linalg.norm(palette, axis=1), 1e-6)
            return int(np.where(self.hued, cosines, -np.inf).argmax())
        brightness = np.abs(self.values.mean(axis=1) - (127.5 + np.sign(offset.mean()) * 127.5))
        return int(np.where(self.hued, np.inf, brightness).argmin())

    def _overlap(self, mask: np.ndarray) -> np.ndarray:
        """Best intersection over union with each shape over its rotations."""
        thing = _normalised(mask).ravel()
        both = self.masks @ thing
        union = self.masks.sum(1) + thing.sum() - both
        return (both / union).reshape(len(self.shapes), TURNS).max(axis=1)

    def _direction(self, centres: np.ndarray, side: int) -> tuple[str | None, float]:
        moved = centres - centres[0]
        distance = np.linalg.norm(moved, axis=1) / side
        step = moved[int(np.argmax(distance >= MOVED))]
        vectors = {
            name: np.array(vector) / max(np.linalg.norm(vector), 1e-9) for name, vector in self.directions.items()
        }
        if distance.max() < MOVED:
            resting = [name for name, vector in vectors.items() if not vector.any()]
            return (resting[0] if resting else None), float(distance.max())
        cosines = {name: step @ vector for name, vector in vectors.items() if vector.any()}
        return max(cosines, key=cosines.get), float(distance.max())


def _ground(frames: np.ndarray) -> np.ndarray:
    """Colour of the ground (3,): the median of all border pixels."""
    return np.median(np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)]), axis=0)


def _segment_distance(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of RGB pixels (..., 3) to the segment from start to end."""
    along = (end - start).astype(np.float32)
    place = np.clip(((pixels - start) @ along) / max(float(along @ along), 1e-6), 0, 1)
    return np.linalg.norm(pixels - start - place[..., None] * along, axis=-1)


def _largest_region(foreground: np.ndarray) -> np.ndarray | None:
    """Largest connected region with its small holes filled; None when it is too small or too large to be a thing."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(foreground.astype(np.uint8), connectivity=4)
    if count < 2:
        return None
    region = labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    if not SMALLEST <= region.mean() <= LARGEST:
        return None
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~region).astype(np.uint8), connectivity=8)
    touching = set(np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])).tolist())
    for hole in range(1, count):
        if hole not in touching and stats[hole, cv2.CC_STAT_AREA] <= HOLE * region.sum():
            region |= labels == hole
    return region


def _centre(mask: np.ndarray) -> np.ndarray:
    """Centroid (x, y) in pixels."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def _normalised(mask: np.ndarray, degrees: float = 0.0) -> np.ndarray:
    """Mask as float32 (GRID, GRID): centroid in the middle, one area, turned by some degrees."""
    scale = np.sqrt(AREA * np.pi / 4 * GRID**2 / mask.sum())
    x, y = _centre(mask)
    place = cv2.getRotationMatrix2D((float(x), float(y)), degrees, float(scale))
    place[:, 2] += (GRID - 1) / 2 - np.array([x, y])
    return cv2.warpAffine(mask.astype(np.float32), place, (GRID, GRID), flags=cv2.INTER_AREA)


def _rotations(mask: np.ndarray) -> np.ndarray:
    """(TURNS, GRID, GRID) of a canonical mask."""
    return np.stack([_normalised(mask, 360 * turn / TURNS) for turn in range(TURNS)]) > 0.5

"""Oracle scores of synthetic studies: colour, shape, motion and number of things read off the frames in closed form, compared with the prompt."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sla2_eval.metrics.cutout import (
    TURNS,
    centre,
    count_regions,
    diameter,
    ground_color,
    largest_region,
    nearest_segment,
    normalised,
    rotations,
)
from sla2_eval.metrics.frames import UndefinedError, as_float

SHADE = (0.35, 1.1)  # brightness of a surface, as factors of its palette colour
GREY_SHADE = (0.85, 1.1)  # the same for colours without hue, whose dark shades would be the ground's
LEAST_HUE = 25.0  # length of a colour's hue part, in grey levels, below which it counts as grey
GROUND_SHADE = (0.4, 1.6)  # brightness of the ground, as factors of its median colour
GROUND_NOISE = 10.0  # and beyond these, in grey levels, which matters where it is dark
MOVED = 0.1  # displacement, as a share of the smaller side, from which on a thing has moved
JUMP = 0.5  # step from frame to frame, in diameters of the thing, that is no motion
PIECES = 4  # of a clip over which a velocity is measured: over single steps the noise of centres adds to slow motion
OFF = 1.5  # factor to the nearest speed from which on a speed has no word
STILL = "none"  # the speed of what stands still


@dataclass(frozen=True)
class Recovered:
    """What a video shows; the words are None where nothing was found, direction also where the thing jumps."""

    present: bool
    count: int  # things of the palette's colours
    color: str | None = None
    shape: str | None = None
    direction: str | None = None
    displacement: float = 0.0  # largest distance of the centre from its start, as a share of the smaller side
    velocity: tuple[float, float] = (0.0, 0.0)  # x and y, in smaller sides a frame
    pace: float = 0.0  # length of the way, in smaller sides a frame, whatever its direction


class Oracle:
    """Card: `oracle.presence`, `oracle.color`, `oracle.shape`, `oracle.direction`, `oracle.all`.

    Definition: the largest thing of a palette colour is cut out of every frame; its colour is the palette entry that fits it in
        most frames, its shape the canonical mask that overlaps best, its direction that of its centre's path. Each score is
        1 when the recovered word is the promised one; `all` when colour, shape and direction are, those that are promised.
    Formula: a pixel belongs to the nearest of these segments in RGB: each palette colour times a shade in [0.35, 1.1], and the
        ground, the median of the border pixels times [0.4, 1.6] and 10 grey levels more. Thing: the largest connected region that
        is not ground, holes filled unless large and round. Colour: the nearest hue to its median pixel; greys by brightness.
        Shape: argmax of the mean over frames of max over rotations of intersection over union, masks centred and scaled to one
        area. Direction: nearest of the given ones to the displacement when the centre is first a tenth of the smaller side away
        from its start; a thing that never is, stands still; one that gets there by a jump (a step of more than half its
        diameter) has none.
    Range: {0, 1}; presence is 1 when a thing of 1 to 60 % of the frame is there in at least half of the frames and does not
        jump in most steps; without it every other score is 0. Direction: higher is better.
    Source: ours; right on at least 95 % of rendered scenes, plain or striped, on any ground (tests/eval/test_oracle.py); no weights.
    Blind spots: made for things of one colour; washed out by half they count as ground; unless two are promised the larger one
        is read; says nothing about texture, sharpness or flicker; a thing that leaves the frame is judged by what is seen of it.

    Card: `oracle.speed`, `oracle.velocity_error`.

    Definition: whether the thing is as fast as its prompt says, and how far its velocity is from the promised one.
    Formula: pace = median over pairs of frames a quarter of the clip apart of |c_s - c_t| / |s - t|, c the centre of the thing in
        smaller sides; speed is 1 when the nearest speed in ratio is the promised word's, and not off by more than a factor of 1.5;
        a thing that stands still has the speed `none`. velocity_error = |v - v'| / |v'|, v the median of (c_s - c_t) / (s - t) by
        coordinates, v' the promised direction times the promised word's speed.
    Range: speed {0, 1}, 0 without presence; velocity_error [0, inf), 0 when exact, 1 for what stands still, 2 for the opposite
        direction. Direction: speed higher, velocity_error lower is better.
    Source: ours; how fast each word is, is read off the scenes of the study's own clips; no weights.
    UndefinedError: speed where those clips have no such word; velocity_error also for a prompt of rest or of bouncing, and without
        presence.
    Blind spots: words are far apart (mini's by a factor of 2), so speed does not see a change of 10 %, velocity_error does; clips
        vary around their word by the study's `jitter`, so velocity_error of perfect videos is about half of that; with a single
        speed in a study only a factor of 1.5 is wrong; frames in reverse order keep the speed; what bounces often is read too slow.

    Card: `oracle.count`, `oracle.count_error`.

    Definition: whether the video shows as many things as its prompt names, and by how many it is off.
    Formula: n = the most frequent number, over frames, of connected regions of one palette colour that fill at least 1 % of the
        frame and whose inscribed circle is at least a quarter as wide as a disc of their area (others are blurred rims);
        count = [n = n'], count_error = |n - n'|.
    Range: count {0, 1}, 0 without presence; count_error {0, 1, ...}. Direction: count higher, count_error lower is better.
    Source: ours; shares the regions that the other scores are read from; no weights.
    Blind spots: two touching things of one colour are one; one that is covered in most frames is not counted, one that another cuts
        in two counts twice; things of no palette colour, or smaller than 1 % of the frame, are not seen.

    Args:
        palette: RGB, 0 to 255, by name.
        shapes: square boolean masks by name, any side, upright.
        directions: vectors (x, y) by name, y downwards; (0, 0) stands for no motion.
        speeds: smaller sides per second by name; without any, speed and velocity error are undefined.
    """

    def __init__(
        self,
        palette: Mapping[str, tuple[float, float, float]],
        shapes: Mapping[str, np.ndarray],
        directions: Mapping[str, tuple[float, float]],
        speeds: Mapping[str, float],
    ) -> None:
        self.colors, self.directions, self.speeds = list(palette), dict(directions), dict(speeds)
        self.values = np.array([palette[name] for name in self.colors], np.float32)
        self.hued = np.ptp(self.values, axis=1) > 50  # colours with a hue; the others are greys, black and white
        self.shapes = list(shapes)
        turned = [rotations(np.asarray(shapes[name], bool)) for name in self.shapes]
        self.masks = np.stack(turned).reshape(len(self.shapes) * TURNS, -1).astype(np.float32)

    def recover(self, video, among: str | None = None) -> Recovered:
        """Read one video (T, H, W, 3); `among` looks only at what has that palette colour."""
        frames = as_float(video)
        ground = ground_color(frames)
        things, counts = {}, []
        for t, frame in enumerate(frames):
            labels = self._labels(frame, ground)
            counts.append(count_regions(labels))
            thing = largest_region(labels >= 0 if among is None else labels == self.colors.index(among))
            if thing is not None:
                things[t] = thing
        count = int(np.bincount(counts).argmax())
        centres = {t: centre(mask) for t, mask in things.items()}
        steps = _steps(things, centres)
        if 2 * len(things) < len(frames) or (len(steps) and np.median(steps) > JUMP):
            return Recovered(present=False, count=count)
        names = [self._color(np.median(frames[t][mask], axis=0)) for t, mask in things.items()]
        color = self.colors[int(np.bincount(names).argmax())]
        overlap = np.mean([self._overlap(mask) for mask in things.values()], axis=0)
        path = np.stack(list(centres.values())) / min(frames.shape[1:3])
        direction, displacement = self._direction(path, steps)
        velocity, pace = _velocity(path, np.array(list(centres)))
        return Recovered(
            True, count, color, self.shapes[int(overlap.argmax())], direction, displacement, velocity, pace
        )

    def __call__(
        self, video, promised: Mapping[str, str | int | bool], fps: float
    ) -> dict[str, float | UndefinedError]:
        """Scores of one video.

        Args:
            video: (T, H, W, 3), uint8 or floats in [0, 1].
            promised: what the prompt says, with any of the keys color, shape, direction, speed, count; with `second_color` when it
                asks for a second thing: then the first is looked for by its colour; with `bounces` where the thing does.
            fps: frames per second.

        Raises:
            ValueError: for a colour, shape or direction that was not given at construction.
        """
        known = {"color": self.colors, "shape": self.shapes, "direction": list(self.directions)}
        for name in promised.keys() & known.keys():
            if promised[name] not in known[name]:
                raise ValueError(f"{name} '{promised[name]}' is not one of {', '.join(known[name])}")
        found = self.recover(video, promised.get("color") if "second_color" in promised else None)
        right = {name: float(getattr(found, name) == promised[name]) for name in known if name in promised}
        scores: dict[str, float | UndefinedError] = {"oracle.presence": float(found.present)}
        scores |= {f"oracle.{name}": value for name, value in right.items()}
        if right:
            scores["oracle.all"] = min(right.values())
        if "count" in promised:
            scores["oracle.count"] = float(found.present and found.count == promised["count"])
            scores["oracle.count_error"] = float(abs(found.count - promised["count"]))
        if "speed" in promised:
            word = promised["speed"]
            if word != STILL and word not in self.speeds:
                scores["oracle.speed"] = UndefinedError(f"the study's clips do not say how fast '{word}' is")
            else:
                scores["oracle.speed"] = float(found.present and self._speed(found, fps) == word)
            if "direction" in promised:
                scores["oracle.velocity_error"] = self._velocity_error(found, promised, fps)
        return scores

    def _speed(self, found: Recovered, fps: float) -> str | None:
        """Word of the nearest speed, None where it is too far off all of them."""
        if found.displacement < MOVED:
            return STILL
        if not found.pace:  # it moved, but not in most of the clip
            return None
        off = {name: abs(np.log(found.pace * fps / speed)) for name, speed in self.speeds.items()}
        nearest = min(off, key=off.get, default=None)
        return nearest if nearest and off[nearest] <= np.log(OFF) else None

    def _velocity_error(self, found: Recovered, promised: Mapping, fps: float) -> float | UndefinedError:
        """Distance of the measured to the promised velocity, as a share of the latter."""
        vector = np.array(self.directions[promised["direction"]])
        if not vector.any():
            return UndefinedError("the prompt promises no motion")
        if promised.get("bounces"):
            return UndefinedError("what bounces has two velocities")
        if promised["speed"] not in self.speeds:
            return UndefinedError(f"the study's clips do not say how fast '{promised['speed']}' is")
        if not found.present:
            return UndefinedError("no thing was found")
        wanted = vector / np.linalg.norm(vector) * self.speeds[promised["speed"]]
        return float(np.linalg.norm(np.array(found.velocity) * fps - wanted) / np.linalg.norm(wanted))

    def _labels(self, frame: np.ndarray, ground: np.ndarray) -> np.ndarray:
        """Index of the nearest palette colour of every pixel, -1 for the ground: (H, W)."""
        dark, bright = ground * GROUND_SHADE[0] - GROUND_NOISE, ground * GROUND_SHADE[1] + GROUND_NOISE
        shades = np.where(self.hued[:, None], SHADE, GREY_SHADE)
        starts, ends = self.values * shades[:, :1], self.values * shades[:, 1:]
        return nearest_segment(frame, np.vstack([dark, starts]), np.vstack([bright, ends])) - 1

    def _color(self, rgb: np.ndarray) -> int:
        """Palette index of a thing's colour (3,): by hue, or without one by brightness.

        Hue, because it names a washed-out red as people do; the distance in RGB would call it orange or purple.
        """
        hue = rgb - rgb.mean()
        if self.hued.any() and (np.linalg.norm(hue) > LEAST_HUE or self.hued.all()):
            palette = self.values - self.values.mean(axis=1, keepdims=True)
            cosines = palette @ hue / np.maximum(np.linalg.norm(palette, axis=1), 1e-6)
            return int(np.where(self.hued, cosines, -np.inf).argmax())
        brightness = np.abs(self.values.mean(axis=1) - rgb.mean())
        return int(np.where(self.hued, np.inf, brightness).argmin())

    def _overlap(self, mask: np.ndarray) -> np.ndarray:
        """Best intersection over union with each shape over its rotations."""
        thing = normalised(mask).ravel()
        both = self.masks @ thing
        union = self.masks.sum(1) + thing.sum() - both
        return (both / union).reshape(len(self.shapes), TURNS).max(axis=1)

    def _direction(self, centres: np.ndarray, steps: np.ndarray) -> tuple[str | None, float]:
        """Word for the path of centres (x, y) in smaller sides, None where it jumps, and its largest distance from the start."""
        moved = centres - centres[0]
        distance = np.linalg.norm(moved, axis=1)
        far = float(distance.max())
        if far < MOVED:
            return next((name for name, vector in self.directions.items() if not np.any(vector)), None), far
        arrival = int(np.argmax(distance >= MOVED))
        if steps[:arrival].max() > JUMP:
            return None, far
        vectors = {name: np.array(v) / np.linalg.norm(v) for name, v in self.directions.items() if np.any(v)}
        return max(vectors, key=lambda name: moved[arrival] @ vectors[name]), far


def _steps(things: dict[int, np.ndarray], centres: dict[int, np.ndarray]) -> np.ndarray:
    """Way of the centre from each frame of a thing to its next one, per frame, in diameters of a disc of its area."""
    pairs = itertools.pairwise(things)
    return np.array([np.linalg.norm(centres[t] - centres[s]) / ((t - s) * diameter(things[s])) for s, t in pairs])


def _velocity(path: np.ndarray, times: np.ndarray) -> tuple[tuple[float, float], float]:
    """Median velocity (x, y) and median pace a frame of centres (n, 2) at frames (n,); a bounce counts in what spans it only."""
    lag = max(1, len(path) // PIECES)
    if len(path) < 2:
        return (0.0, 0.0), 0.0
    steps = (path[lag:] - path[:-lag]) / (times[lag:] - times[:-lag])[:, None]
    x, y = np.median(steps, axis=0)
    return (float(x), float(y)), float(np.median(np.linalg.norm(steps, axis=1)))

"""Text alignment and frame consistency by an open_clip model trained in the study's own domain.

The image tower sees a storyboard: frames of the video, in order, tiled into one image. Position embeddings make it aware of
order, so a stock image model can tell directions of motion.
"""

import re
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sla2_eval.metrics.frames import UndefinedError, as_uint8, middle_frames


class Vocabulary:
    """Word-level tokenizer. End-of-text is the largest id, as CLIP's text pooling looks for the largest one.

    Args:
        words: known words; their order gives the ids.
        context_length: ids of an encoded text; longer texts lose their last words.
    """

    PAD, UNKNOWN, START = 0, 1, 2

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.words, self.context_length = list(words), context_length
        self._ids = {word: 3 + index for index, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Vocabulary":
        """Vocabulary of all words in `texts`, long enough for the longest of them."""
        split = [cls.split(text) for text in texts]
        return cls(sorted({word for words in split for word in words}), max(map(len, split)) + 2)

    @staticmethod
    def split(text: str) -> list[str]:
        """Lower-case words; `an` counts as `a`, so that exchanging a noun leaves the rest of a caption alone."""
        return ["a" if word == "an" else word for word in re.findall(r"[a-z0-9]+", text.lower())]

    @property
    def size(self) -> int:
        return len(self.words) + 4

    def reads(self, text: str) -> bool:
        """Whether `check` lets the text pass."""
        try:
            self.check(text)
        except UndefinedError:
            return False
        return True

    def check(self, text: str) -> None:
        """Raise UndefinedError for a text that the model was not trained to read: its score would be about another text."""
        words = self.split(text)
        if unknown := [word for word in words if word not in self._ids]:
            raise UndefinedError(f"the judge never read {', '.join(map(repr, dict.fromkeys(unknown)))}")
        if len(words) > self.context_length - 2:
            raise UndefinedError(f"the text has {len(words)} words, the judge reads {self.context_length - 2}")

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, context_length), int64."""
        ids = torch.full((len(texts), self.context_length), self.PAD, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            words = [self._ids.get(word, self.UNKNOWN) for word in self.split(text)][: self.context_length - 2]
            row[: len(words) + 2] = torch.tensor([self.START, *words, self.size - 1])
        return ids


def storyboard(video, frames: int, columns: int, side: int) -> np.ndarray:
    """Middle-sampled frames, resized to `side` x `side` and tiled row by row: uint8 (rows side, columns side, 3)."""
    return _tile(_shrink(as_uint8(video)[middle_frames(len(video), frames)], side), columns)


def _shrink(frames: np.ndarray, side: int) -> np.ndarray:
    return np.stack([cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in frames])


def _tile(frames: np.ndarray, columns: int) -> np.ndarray:
    count, side = frames.shape[:2]
    return frames.reshape(count // columns, columns, side, side, 3).swapaxes(1, 2).reshape(-1, columns * side, 3)


class StoryboardClip:
    """An open_clip model with its vocabulary and storyboard layout.

    Args:
        model: open_clip `CLIP`, in eval mode; image size (rows side, columns side).
        vocabulary: the tokenizer that it was trained with.
        frames, columns, side: storyboard layout, as it was trained.
    """

    def __init__(self, model: nn.Module, vocabulary: Vocabulary, frames: int, columns: int, side: int) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.frames, self.columns, self.side = frames, columns, side

    @staticmethod
    def pixels(boards: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, h, w, 3) to float (B, 3, h, w) in [-1, 1]."""
        return torch.as_tensor(boards).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.inference_mode()
    def embed_boards(self, boards: np.ndarray) -> Tensor:
        """Unit embeddings (B, E) of uint8 storyboards (B, h, w, 3)."""
        device = next(self.model.parameters()).device
        return functional.normalize(self.model.encode_image(self.pixels(boards).to(device)).float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (B, E)."""
        device = next(self.model.parameters()).device
        return functional.normalize(self.model.encode_text(self.vocabulary.encode(texts).to(device)).float(), dim=-1)

    def embed_video(self, video) -> Tensor:
        """Unit embedding (E,) of a video (T, H, W, 3)."""
        return self.embed_boards(storyboard(video, self.frames, self.columns, self.side)[None])[0]

    def text_alignment(self, video, text: str) -> float:
        """Card: `proxy.text_alignment_clip_indomain`.

        Definition: cosine between the embeddings of the video's storyboard and of its prompt.
        Formula: <e_video, e_text> of unit vectors.
        Range: [-1, 1]. Direction: higher is closer.
        Source: the idea of VBench `overall_consistency`, with an open_clip trained by this study on a split of its own; frozen
            before any variant is scored. Emitted only when colour, shape and direction pass the gate on held-out clips;
            speed, number and second colour are not gated.
        UndefinedError: a word that no caption of the training had, or more words than they had.
        Blind spots: knows only this domain's words and looks; a high cosine can hide an attribute that it does not see, hence the
            gates and the forced choices beside it; barely sees the order of frames within a direction.
        """
        self.vocabulary.check(text)
        return float(self.embed_video(video) @ self.embed_texts([text])[0])

    def forced_choice(self, video, text: str, others: Sequence[str]) -> float:
        """Card: `judge.color`, `judge.shape`, `judge.direction`.

        Definition: 1 when the prompt fits the video better than the same prompt with one attribute exchanged, for every other
            value of that attribute, else 0.
        Formula: [<e_video, e_text> > max over other texts c of <e_video, e_c>].
        Range: {0, 1}; chance is 1 / (1 + number of other texts). Direction: higher is better.
        Source: in-domain open_clip, as for text alignment; each attribute has a gate of its own.
        UndefinedError: as for text alignment.
        Blind spots: a video that shows two values gets either answer; a video that shows nothing gets some answer.

        Args:
            video: (T, H, W, 3).
            text: the prompt.
            others: the prompt with each other value in place of the true one.
        """
        self.vocabulary.check(text)
        scores = self.embed_texts([text, *others]) @ self.embed_video(video)
        return float(scores[0] > scores[1:].max())

    def retrieval(self, video, text: str, others: Tensor) -> float:
        """Card: `proxy.retrieval_r1_clip_indomain`.

        Definition: 1 when the video's own prompt fits it better than every other prompt of the study, else 0: recall at one.
        Formula: [<e_video, e_text> > max over the other prompts' e of <e_video, e>]; prompts of one text count as one.
        Range: {0, 1}; chance is 1 / number of texts. Direction: higher is better.
        Source: in-domain open_clip, as for text alignment; retrieval of texts by videos, as it is usual for CLIP.
        UndefinedError: as for text alignment; fewer than two texts that the judge can read.
        Blind spots: depends on which prompts a study has: easy where they differ in much; compare rows of one sheet only.

        Args:
            video: (T, H, W, 3).
            text: its prompt.
            others: unit embeddings (n, E) of the other texts, n >= 1.
        """
        self.vocabulary.check(text)
        embedding = self.embed_video(video)
        return float(self.embed_texts([text])[0] @ embedding > (others @ embedding).max())

    def frame_consistency(self, video) -> float:
        """Card: `proxy.frame_consistency_clip_indomain`.

        Definition: how alike the frames are to the one before and to the first one.
        Formula: mean over t >= 1 of (max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0))) / 2, with f_t the embedding of a
            storyboard that repeats frame t.
        Range: [0, 1]. Direction: higher is steadier.
        Source: the formula of VBench `subject_consistency` with in-domain features instead of DINO.
        UndefinedError: a single frame.
        Blind spots: a frozen or blank video scores 1: read the guards; the embedding follows the object's place, so moving clips
            stay well below 1.
        """
        if len(video) < 2:
            raise UndefinedError("frame consistency needs two frames")
        features = self.frame_features(video)
        previous = (features[1:] * features[:-1]).sum(-1).clamp_min(0)
        first = (features[1:] @ features[0]).clamp_min(0)
        return float((previous + first).mean() / 2)

    def frame_features(self, video) -> Tensor:
        """Unit embeddings (T, E) of storyboards that repeat one frame each."""
        frames = _shrink(as_uint8(video), self.side)
        return self.embed_boards(np.stack([_tile(np.stack([frame] * self.frames), self.columns) for frame in frames]))

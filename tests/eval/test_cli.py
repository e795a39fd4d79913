"""`sla2-eval` on a folder that no study made."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from clips import moving_disc

from sla2.errors import UserError
from sla2.video import read_video, write_mp4
from sla2_eval import cli, folder
from sla2_eval.metrics.catalogue import METRICS
from sla2_eval.metrics.kid import kid
from sla2_eval.trained_judge import load_features, load_judge
from sla2_eval.video_scores import KID, NO_JUDGE, RETRIEVAL

CHEAP = "temporal_flickering,guard,proxy.flow_top5,clip_score"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three clips, one of them in a sub-folder, a file that is no video, and one that is none of ours."""
    place = tmp_path_factory.mktemp("any") / "videos"
    for number, name in enumerate(("a.mp4", "b.mp4", "more/c.mp4")):
        write_mp4(place / name, torch.from_numpy(moving_disc(number)), 8)
    (place / "broken.mp4").write_bytes(b"not a video")
    (place / "notes.txt").write_text("x")
    return place


def run(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sla2-eval", *map(str, arguments)])
        cli.main()


def rows(path) -> dict:
    with path.open(newline="") as file:
        return {(row["video"], row["metric"]): row for row in csv.DictReader(file)}


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_all_metrics_without_a_network(videos, tmp_path, monkeypatch, capsys):
    def no_network(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    (tmp_path / "prompts.csv").write_text("video,prompt\na,a cat\nmore/c.mp4,a dog\n")
    run(videos, "--prompts", tmp_path / "prompts.csv", "--metrics", "all", "--out", tmp_path / "scores.csv")
    found = rows(tmp_path / "scores.csv")
    wanted = {
        name for name in METRICS if not name.startswith(("attention.", "sparsity.", "floor.", "vbench_official."))
    }
    assert {metric for _, metric in found} == wanted
    assert found.pop((folder.TOGETHER, KID))["reason"] == NO_JUDGE
    assert {name for name, _ in found} == {"a.mp4", "b.mp4", "broken.mp4", "more/c.mp4"}
    told = json.loads((tmp_path / "scores.csv.provenance.json").read_text())
    assert set(told["settings"]["metrics"]) == wanted
    assert str(tmp_path) not in json.dumps(told)
    for row in found.values():
        assert bool(row["value"]) != bool(row["reason"]), row
    assert found["a.mp4", "clip_score.vit_b32"]["prompt"] == "a cat"
    assert {row["status"] for row in found.values() if row["value"]} == {"ok"}
    assert {row["status"] for row in found.values() if not row["value"]} == {"not_available"}
    assert "ViT-B-32.pt" in found["a.mp4", "clip_score.vit_b32"]["reason"]
    assert found["a.mp4", "fidelity.psnr"]["reason"] == "no reference folder was given"
    assert {found["broken.mp4", metric]["reason"].split(":")[0] for metric in wanted - {KID}} == {"unreadable"}
    assert 0.5 < float(found["b.mp4", "temporal_flickering"]["value"]) < 1
    answer = capsys.readouterr().out
    assert "mean of 3, 1 without" in answer
    assert "unreadable: broken.mp4" in answer


def test_writes_nothing_but_its_results(videos, tmp_path):
    """In a process of its own, from import to end: no socket, and no file in the home or the working folder."""
    home, place, out = (tmp_path / name for name in ("home", "place", "out"))
    for empty in (home, place, out):
        empty.mkdir()
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('a connection was asked for')\n"
        "socket.socket.connect = refuse\n"
        "from sla2_eval import cli\n"
        f"sys.argv = ['sla2-eval', {str(videos)!r}, '--out', {str(out / 'scores.csv')!r}]\n"
        "cli.main()\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "TORCH_"))}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=place, env=kept | {"HOME": str(home)}, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert [path for empty in (home, place) for path in empty.rglob("*") if path.is_file()] == []
    assert {path.name for path in out.iterdir()} == {"scores.csv", "scores.csv.provenance.json", ".scores.parts"}


@pytest.fixture
def passing(judge_folder, tmp_path):
    """The same judge with a gate that it passes."""
    place = tmp_path / "judge"
    shutil.copytree(judge_folder, place)
    gates = json.loads((place / "gates.json").read_text())
    (place / "gates.json").write_text(json.dumps(gates | {"gate": 0.0}))
    return place


def test_four_workers_give_the_same_file(videos, passing, tmp_path):
    (tmp_path / "prompts.csv").write_text(
        "video,prompt\na,a red circle moves left\nb,a blue square moves up\nmore/c.mp4,a red circle\n"
    )
    wanted = (videos, "--metrics", "all", "--prompts", tmp_path / "prompts.csv", "--judge", passing)
    run(*wanted, "--out", tmp_path / "one.csv")
    run(*wanted, "--out", tmp_path / "four.csv", "--workers", 4)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "four.csv").read_bytes()
    assert rows(tmp_path / "one.csv")["a.mp4", "proxy.text_alignment_clip_indomain"]["status"] == "ok"


def test_distance_of_the_folder_to_the_judge_s_clips(videos, passing, judge_folder, tmp_path):
    """One row of all readable videos, the same for any number of workers and when a run goes on; a failed gate is its reason."""
    wanted = ("--metrics", KID, "--judge", passing)
    run(videos, *wanted, "--out", tmp_path / "one.csv")
    run(videos, *wanted, "--out", tmp_path / "two.csv", "--workers", 2)
    run(videos, *wanted, "--out", tmp_path / "one.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    (found,) = rows(tmp_path / "one.csv").values()
    judge, _ = load_judge(passing, torch.device("cpu"))
    names = ("a.mp4", "b.mp4", "more/c.mp4")
    features = torch.stack([judge.embed_video(read_video(videos / name)[0].numpy()) for name in names])
    assert float(found["value"]) == pytest.approx(kid(features, load_features(passing)), rel=1e-6)
    run(videos, "--metrics", KID, "--judge", judge_folder, "--out", tmp_path / "failed.csv")
    assert rows(tmp_path / "failed.csv")[folder.TOGETHER, KID]["reason"].startswith("gate: forced-choice accuracy of ")
    single = tmp_path / "videos"
    single.mkdir()
    shutil.copy(videos / "a.mp4", single)
    run(single, *wanted, "--out", tmp_path / "single.csv")
    reason = rows(tmp_path / "single.csv")[folder.TOGETHER, KID]["reason"]
    assert reason == "undefined: a distance of sets needs two videos, got 1"


def test_resumes_by_video(videos, tmp_path, monkeypatch):
    scored = []
    real = folder.Scorer.__call__

    def counted(self, name):
        if len(scored) == 2 and not resumed:
            raise KeyboardInterrupt
        scored.append(name)
        return real(self, name)

    monkeypatch.setattr(folder.Scorer, "__call__", counted)
    out, resumed = tmp_path / "scores.csv", False
    with pytest.raises(SystemExit) as stop:
        run(videos, "--metrics", CHEAP, "--out", out)
    assert stop.value.code == 130
    assert not out.exists()
    resumed = True
    run(videos, "--metrics", CHEAP, "--out", out)
    assert scored == ["a.mp4", "b.mp4", "broken.mp4", "more/c.mp4"]
    run(videos, "--metrics", "temporal_flickering", "--out", out)
    assert len(scored) == 8, "other metrics are another question"


def test_a_changed_video_or_prompt_is_scored_again(videos, tmp_path):
    place = tmp_path / "videos"
    for number in range(2):
        write_mp4(place / f"{number}.mp4", torch.from_numpy(moving_disc(number)), 8)
    job = folder.Job(place, ("temporal_flickering",), {}, None, None, {}, "cpu")
    before = [job.identity(f"{number}.mp4") for number in range(2)]
    write_mp4(place / "1.mp4", torch.from_numpy(moving_disc(5)), 8)
    assert job.identity("0.mp4") == before[0]
    assert job.identity("1.mp4") != before[1]
    (tmp_path / "p.csv").write_text("video,prompt\n0,a cat\n")
    prompts = folder.read_prompts(tmp_path / "p.csv", ["0.mp4", "1.mp4"])
    asked = folder.Job(place, ("temporal_flickering",), prompts, None, None, {}, "cpu")
    assert asked.identity("0.mp4") != before[0]
    (tmp_path / "p.csv").write_text("video,prompt\n0,a cat\n1,a dog\n")
    more = folder.read_prompts(tmp_path / "p.csv", ["0.mp4", "1.mp4"])
    for metric, depends in (("temporal_flickering", False), (RETRIEVAL, True)):
        one, both = (folder.Job(place, (metric,), found, None, None, {}, "cpu") for found in (prompts, more))
        assert (one.identity("0.mp4") != both.identity("0.mp4")) == depends, metric


def test_reference_gives_fidelity(videos, tmp_path):
    run(videos, "--metrics", "fidelity", "--reference", videos, "--out", tmp_path / "same.csv")
    assert float(rows(tmp_path / "same.csv")["a.mp4", "fidelity.psnr"]["value"]) == 100
    other = tmp_path / "other"
    write_mp4(other / "a.mp4", torch.from_numpy(moving_disc(0))[:5], 8)
    (other / "b.mp4").write_bytes(b"x")
    run(videos, "--metrics", "fidelity", "--reference", other, "--out", tmp_path / "other.csv")
    found = rows(tmp_path / "other.csv")
    assert found["a.mp4", "fidelity.psnr"]["reason"].startswith("the reference has frames of (5, ")
    assert found["b.mp4", "fidelity.ssim"]["reason"].startswith("the reference is unreadable")
    assert found["more/c.mp4", "fidelity.ssim"]["reason"] == f"{other} holds no video of this name"


def test_mistakes_are_one_line(videos, tmp_path, capsys):
    out = ("--out", tmp_path / "scores.csv")
    assert (
        refused(capsys, tmp_path / "none", *out) == f"error: {tmp_path}/none: no such folder; give a folder of videos"
    )
    (tmp_path / "empty").mkdir()
    assert "holds no video" in refused(capsys, tmp_path / "empty", *out)
    assert "'fvd' is no metric; choose all, a family (" in refused(capsys, videos, *out, "--metrics", "fvd")
    assert "--workers: 0; give 1 or more" in refused(capsys, videos, *out, "--workers", "0")
    assert "--judge: nowhere: no such folder" in refused(capsys, videos, *out, "--judge", "nowhere")
    for text, message in (
        ("file,text\n", ":1: columns are ['file', 'text'], expected video,prompt"),
        ("video,prompt\nz,a cat\n", ":2: the folder has no video 'z'"),
        ("video,prompt\na,a cat\na.mp4,a dog\n", ":3: 'a.mp4' stands twice"),
        ("video,prompt\na,\n", ":2: 'a.mp4' has no prompt"),
        ("video,prompt,attributes\na,a cat,red\n", ":2: attributes are not a JSON object"),
    ):
        (tmp_path / "p.csv").write_text(text)
        assert message in refused(capsys, videos, *out, "--prompts", tmp_path / "p.csv")
    assert not (tmp_path / "scores.csv").exists()


def test_weights_are_checked_by_name(videos, tmp_path, capsys):
    def message(text: str) -> str:
        (tmp_path / "w.yaml").write_text(text)
        return refused(capsys, videos, "--out", tmp_path / "scores.csv", "--weights", tmp_path / "w.yaml")

    file = tmp_path / "dino.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "dino.pth").write_bytes(b"weights")
    assert "no weights are called 'dino'" in message("dino: {path: x, sha256: y}")
    assert "dino_vitb16: give `path` and `sha256`" in message("dino_vitb16: {path: x}")
    assert "is not a .safetensors file" in message(f"dino_vitb16: {{path: {tmp_path}/dino.pth, sha256: y}}")
    assert "convert dino_vitbase16_pretrain.pth to it" in message("dino_vitb16: {path: none.safetensors, sha256: y}")
    assert f"dino_vitb16: {file} has SHA-256" in message(f"dino_vitb16: {{path: {file}, sha256: {'0' * 64}}}")
    assert "'no-such-program' is no program on PATH" in message("vision_reward: {command: no-such-program --fast}")


def test_vision_reward_is_another_program(videos, tmp_path):
    program = tmp_path / "judge.py"
    program.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    answer = {'score': len(asked['prompt']) / 100} if 'cat' in asked['prompt'] else {'error': 'no cat'}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    (tmp_path / "w.yaml").write_text(f"vision_reward: {{command: '{sys.executable} {program}'}}\n")
    (tmp_path / "p.csv").write_text("video,prompt\na,a cat\nb,a dog\n")
    out = tmp_path / "scores.csv"
    run(videos, "--metrics", "vision_reward", "--weights", tmp_path / "w.yaml", "--prompts", tmp_path / "p.csv", "--out", out)  # fmt: skip
    found = rows(out)
    assert float(found["a.mp4", "vision_reward"]["value"]) == 0.05
    assert found["b.mp4", "vision_reward"]["reason"] == "undefined: the command of vision_reward says: no cat"
    assert found["b.mp4", "vision_reward"]["status"] == "undefined"
    assert found["more/c.mp4", "vision_reward"]["reason"] == "this video has no prompt"


def test_a_judge_that_ends_is_a_reason(tmp_path):
    from sla2_eval.metrics.frames import UndefinedError
    from sla2_eval.official import Command, Judge

    judge = Judge(Command((sys.executable, "-c", "print('hello')")))
    with pytest.raises(UndefinedError, match="answered 'hello'"):
        judge(tmp_path / "a.mp4", "a cat")
    judge.process.wait()
    with pytest.raises(UndefinedError, match=r"has ended|answered ''"):
        judge(tmp_path / "a.mp4", "a cat")


def test_attributes_bring_the_oracle(videos, tmp_path):
    words = json.dumps({"color": "red"}).replace('"', '""')
    (tmp_path / "p.csv").write_text(f'video,prompt,attributes\na,a red thing,"{words}"\nb,a cat,\n')
    run(videos, "--metrics", "oracle", "--prompts", tmp_path / "p.csv", "--out", tmp_path / "scores.csv")
    found = rows(tmp_path / "scores.csv")
    assert found["a.mp4", "oracle.color"]["value"] in ("0.0", "1.0")
    assert found["b.mp4", "oracle.color"]["reason"] == "its prompt does not promise this"
    assert found["a.mp4", "oracle.shape"]["reason"] == "no prompt promises a shape"


def test_all_but_unreadable_is_an_error_of_nobody():
    with pytest.raises(UserError, match="names nothing"):
        folder.choose_metrics([","])

"""The page: opens from disk wherever its folder goes, shows what the tables hold, and escapes what others wrote."""

import html
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import small_study

from sla2.errors import UserError
from sla2_eval import report
from sla2_eval.claims import CLAIMS
from sla2_eval.efficiency import efficiency
from sla2_eval.palette import style
from sla2_eval.table_set import TableSet


class Links(HTMLParser):
    """Every address that the page names, every id, and the data of its players."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses, self.ids, self.data, self._inside = [], set(), "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("href", "src") if name in found]
        self.ids |= {found["id"]} if "id" in found else set()
        self._inside = tag == "script" and found.get("id") == "data"

    def handle_data(self, data):
        self.data += data if self._inside else ""


def make(study: Path, figures: Path, output: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--tables", study / "tables", "--figures", figures, "--videos", study / "generate"]
        patch.setattr(sys, "argv", ["report", *map(str, arguments), "--output", str(output)])
        report.main()
    return (output / "index.html").read_text()


@pytest.fixture(scope="module")
def page(study, figures, tmp_path_factory) -> Path:
    """The folder, moved after it was made."""
    folder = tmp_path_factory.mktemp("page")
    make(study, figures, folder / "made")
    return (folder / "made").rename(folder / "moved")


def test_every_address_is_relative_and_there(page):
    text = (page / "index.html").read_text()
    links = Links(text)
    files = json.loads(links.data)["files"].values()
    assert "http" not in re.sub(r"http-equiv", "", text), "an address on the network"
    assert str(page.parent) not in text
    assert len(links.addresses) > 15
    for address in (*links.addresses, *files):
        if address.startswith("#"):
            assert address[1:] in links.ids
        else:
            assert not address.startswith(("/", "file:"))
            assert (page / address).is_file(), address


def test_nothing_is_carried_that_the_page_does_not_show(page):
    links = Links((page / "index.html").read_text())
    shown = {*links.addresses, *json.loads(links.data)["files"].values(), "index.html"}
    assert {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()} <= shown


def test_players_have_every_variant_and_prompt(page):
    players = json.loads(Links((page / "index.html").read_text()).data)
    variants = [row["variant"] for row in small_study.settings()["variants"]]
    assert list(players["variants"]) == variants, "the order of the sheet"
    assert list(players["prompts"]) == ["p01", "p02"]
    for variant in variants:
        assert f"{variant}/p01/0" in players["files"]
    assert players["reference"] == "full"


def test_the_main_table_shows_the_tables(study, page):
    text = re.sub(r"\s+", " ", (page / "index.html").read_text())
    row = TableSet(study / "tables").metric("fidelity.psnr")["sla2-97"]
    assert f'<span class="mean">{report.number(row["mean"])}</span> <span class="mark">●</span>' in text
    assert f"{report.number(row['ci_low'], 3)} … {report.number(row['ci_high'], 3)}" in text
    assert '<td class="absent" title="not measured">–</td>' in text, "the reference of fidelity has no fidelity"


def test_speed_and_work_have_a_row_for_every_variant(study, page):
    text = re.sub(r"\s+", " ", (page / "index.html").read_text(encoding="utf-8"))
    section = text[text.index('<section id="efficiency">') : text.index('<section id="claims">')]
    tables = TableSet(study / "tables")
    found = {line.variant: line for line in efficiency(tables)}
    assert list(found) == list(tables.variants)
    line = found["sla2-97"]
    assert line.speedups["attention_op"].dense == tables.metric("speedup.attention_op")["sla2-97"]["mean"]
    assert (line.speedups["kernel"].dense, line.speedups["kernel"].reason) == (None, "not measured")
    assert sum(line.shares.values()) == pytest.approx(1)
    assert line.shares["router"] == pytest.approx(2e6 / (2e6 + 4e8 * 0.03 + 1e7 + 1e6))
    assert line.shares["router"] > line.shares["mixing"] > found["full"].shares["mixing"] == 0
    assert section.count('<td class="absent" title="not measured">–</td>') == len(found), "kernel"
    assert line.parts == pytest.approx({"denoising": 20 * (4.0 * 0.03 + 0.8 + 6) / 1000, "text": 0.015})
    assert "<small>denoising 0.14 s, text 0.015 s</small>" in section
    assert f'<span class="mean">{report.number(line.speedups["attention_op"].dense, 3)}×</span>' in section
    assert "Timed: reference/cpu float32 N=576 batch=1 threads=1." in section


def test_every_claim_of_the_paper_has_its_verdict_on_the_page(study, page):
    text = html.unescape((page / "index.html").read_text(encoding="utf-8"))
    section = text[text.index('<section id="claims">') : text.index('<section id="paper">')]
    rows = TableSet(study / "tables").rows("claims")
    assert {row["claim"].split(" (")[0] for row in rows} == {claim.words for claim in CLAIMS}
    for row in rows:
        assert row["claim"] in section
        assert row["verdict"] in section


def test_the_limits_are_named(page):
    text = (page / "index.html").read_text()
    assert "not available: needs the weights &lt;dino&gt;.pth" in text
    assert "Degenerate videos, still in every mean: SLA2 97%, random router" in text
    assert '<span class="metric">proxy.naturalness_niqe_indomain</span> 18.' in text, "one of each of 18 runs"


def test_what_others_wrote_is_escaped(study, figures, tmp_path):
    """A prompt may hold anything; inside the page it stays text."""
    evil = '</script><img src=x onerror=alert(1)> "it\'s" & more'
    shutil.copytree(study / "generate", tmp_path / "generate")
    shutil.copytree(study / "tables", tmp_path / "tables")
    for path in (tmp_path / "generate").rglob("manifest.jsonl"):
        entries = [json.loads(line) | {"text": evil} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    text = make(tmp_path, figures, tmp_path / "page")
    assert "<img src=x" not in text
    assert json.loads(Links(text).data)["prompts"]["p01"] == evil


def test_a_missing_figure_or_video_stops(study, figures, tmp_path):
    with pytest.raises(UserError, match=r"quality_sparsity.svg: missing"):
        make(study, tmp_path, tmp_path / "page")
    shutil.copytree(study / "generate", tmp_path / "generate")
    shutil.copytree(study / "tables", tmp_path / "tables")
    shutil.rmtree(tmp_path / "generate/sla2-97")
    with pytest.raises(UserError, match=r"sla2-97: holds no seed\*/manifest.jsonl"):
        make(tmp_path, figures, tmp_path / "page")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (1.0, "1.000"), (-0.01234567, "-0.01235"), (12345.6, "12346"), (0.04, "0.04000")],
)
def test_number(value, text):
    assert report.number(value) == text


def test_number_ends_with_a_digit():
    assert report.number(440.3, 3) == "440"


def test_flagged_videos_stay_in_means_and_their_rate_is_told(page, study):
    """The random router's videos of one prompt in every few are static: their share is on the page, and no mean leaves them out."""
    tables = TableSet(study / "tables")
    flagged = {variant: row for variant, row in tables.metric("guard.static").items() if row["mean"]}
    assert flagged
    text = re.sub(r"<[^>]+>", "", html.unescape((page / "index.html").read_text()))
    for variant, row in flagged.items():
        assert row["mean"] == pytest.approx(1 / len(small_study.PROMPTS))
        assert tables.metric("temporal_flickering")[variant]["n_values"] == row["n_values"]
        assert f"{style(variant).label}, guard.static {100 * row['mean']:.0f}%" in text

"""A wrong row of the variants or prompt sheet is refused with its name, the word and the choices."""

from pathlib import Path

import pytest

from sla2.errors import UserError
from sla2.prompts import Prompt, read_prompts
from sla2.variant import ATTENTIONS, MIXINGS, QUANTIZERS, ROUTERS, Variant, kept_blocks, read_variants

ROOT = Path(__file__).resolve().parents[2]
HEADER = "variant\tattention\trouter\tmixing\tquantization\tsparsity\tfinetune"
DENSE = "base\tfull\tnone\tnone\tnone\t0\tno\nfull\tfull\tnone\tnone\tnone\t0\tyes"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("mine\tsla3\tlearned\talpha\tnone\t0.9\tyes", ["row 'mine'", "attention 'sla3'", *ATTENTIONS]),
        ("mine\tsla2\tlearnd\talpha\tnone\t0.9\tyes", ["router 'learnd'", *ROUTERS]),
        ("mine\tsla2\tlearned\tbeta\tnone\t0.9\tyes", ["mixing 'beta'", *MIXINGS]),
        ("mine\tsla2\tlearned\talpha\tint8\t0.9\tyes", ["quantization 'int8'", *QUANTIZERS]),
        ("mine\tsla2\tlearned\talpha\tnone\t97\tyes", ["sparsity '97'", "fraction"]),
        ("mine\tsla2\tlearned\talpha\tnone\tmost\tyes", ["sparsity 'most'"]),
        ("mine\tsla2\tlearned\talpha\tnone\t0.9\tmaybe", ["finetune 'maybe'", "yes, no"]),
        ("my row\tsla2\tlearned\talpha\tnone\t0.9\tyes", ["row 'my row'", "letters"]),
        ("mine\tfull\tlearned\tnone\tnone\t0\tyes", ["full attention has no router"]),
        ("mine\tfull_other\tnone\tnone\tnone\t0.9\tno", ["full_other attention has no sparsity", "use none"]),
        ("mine\tfull_other\tnone\tnone\tqat-int8\t0\tno", ["full_other attention has no quantization", "use none"]),
        ("mine\tfull_other\tnone\tnone\tnone\t0\tyes", ["row 'mine'", "finetune 'yes'", "'full_other'", "use no"]),
        ("mine\tsla2\tnone\talpha\tnone\t0.9\tyes", ["needs a router"]),
        ("mine\tsla\tlearned\talpha\tnone\t0.9\tyes", ["only attention 'sla2'"]),
        ("full\tsla2\tlearned\talpha\tnone\t0.9\tyes", ["row 'full' stands twice"]),
    ],
)
def test_wrong_variant(tmp_path, row, words):
    sheet = tmp_path / "variants.tsv"
    sheet.write_text(f"{HEADER}\n{DENSE}\n{row}\n")
    with pytest.raises(UserError) as caught:
        read_variants(sheet)
    assert "\n" not in str(caught.value)
    for word in [str(sheet), *words]:
        assert word in str(caught.value)


def test_sheet_without_a_dense_row(tmp_path):
    sheet = tmp_path / "variants.tsv"
    sheet.write_text(f"{HEADER}\n{DENSE.splitlines()[0]}\n")
    with pytest.raises(UserError, match="row 'full' is missing"):
        read_variants(sheet)


def test_shipped_variants():
    rows = read_variants(ROOT / "config/variants.tsv")
    assert len(rows) >= 12
    assert all(Variant.from_row(row.row()) == row for row in rows.values())
    assert [name for name, row in rows.items() if row.dense] == ["base", "base-kernel", "full"]
    # Three rows differ in the quantiser only: they start from one stage 1.
    assert len({rows[name].stage1_group for name in ("sla2-97", "sla2-97-ptq", "sla2-97-fp8")}) == 1


def test_mini_has_the_rows_of_every_study_and_more():
    rows, mini = read_variants(ROOT / "config/variants.tsv"), read_variants(ROOT / "config/mini.tsv")
    assert [mini[name] for name in rows] == list(rows.values())
    # What is fine-tuned otherwise starts from the same stage 1.
    assert len({row.stage1_group for name, row in mini.items() if name.startswith("sla2-97-topk")}) == 1


@pytest.mark.parametrize(
    ("sparsity", "blocks", "kept"), [(0.97, 36, 1), (0.97, 512, 15), (0.95, 512, 26), (0.0, 36, 36), (0.97, 3, 1)]
)
def test_kept_blocks(sparsity, blocks, kept):
    assert kept_blocks(sparsity, blocks) == kept


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id\ttext\n", [":1:", "columns", "prompt_id"]),
        ("prompt_id\ttext\tattributes\n", ["holds no prompt"]),
        ("prompt_id\ttext\tattributes\na\tone\t\na\ttwo\t\n", [":3:", "'a' stands twice"]),
        ("prompt_id\ttext\tattributes\na b\tone\t\n", [":2:", "'a b'", "file name"]),
        ("prompt_id\ttext\tattributes\na\t \t\n", [":2:", "no text"]),
        ("prompt_id\ttext\tattributes\na\tone\tred\n", [":2:", "'red'", "JSON"]),
        ("prompt_id\ttext\tattributes\na\n", [":2:", "1 cells"]),
    ],
)
def test_wrong_prompts(tmp_path, text, words):
    sheet = tmp_path / "prompts.tsv"
    sheet.write_text(text)
    with pytest.raises(UserError) as caught:
        read_prompts(sheet)
    for word in [str(sheet), *words]:
        assert word in str(caught.value)


def test_read_prompts(tmp_path):
    sheet = tmp_path / "prompts.tsv"
    sheet.write_text('prompt_id\ttext\tattributes\na\ta "red" circle\t{"color": "red"}\nb\ta lake\t\n\n')
    assert read_prompts(sheet) == [Prompt("a", 'a "red" circle', {"color": "red"}), Prompt("b", "a lake", {})]


@pytest.mark.parametrize("path", sorted((ROOT / "config/prompts").glob("*.tsv")), ids=lambda path: path.stem)
def test_shipped_prompts(path):
    assert len(read_prompts(path)) >= 6

import json
import sys

import pytest

from sla2.record import read_records
from sla2.variant import Variant
from sla2_eval import latency

HEADER = "variant\tattention\trouter\tmixing\tquantization\tsparsity\tfinetune\n"
ROWS = (
    "base\tfull\tnone\tnone\tnone\t0\tno\n"
    "full\tfull\tnone\tnone\tnone\t0\tyes\n"
    "a\tsla2\tlearned\talpha\tqat-int8\t0.9\tyes\n"
    "b\tsla2\tlearned\talpha\tptq-int8\t0.9\tyes\n"
    "c\tsla\tmean_pool\tprojection\tnone\t0.5\tyes\n"
    "unused\tsla2\trandom\tsum\tnone\t0.5\tyes\n"
)


@pytest.fixture(scope="module")
def records(base_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency")
    (folder / "variants.tsv").write_text(HEADER + ROWS)
    settings = {
        "study": "s",
        "seed": 0,
        "device": "cpu",
        "threads": 1,
        "warmup": 1,
        "repeats": 5,
        "batch": 1,
        "attention": {"block_q": 16, "block_k": 8},
        "variants": [{"variant": name} for name in ("base", "full", "a", "b", "c")],
    }
    # In this process: a new one would import torch and diffusers again, ten seconds of a core.
    command = ["latency", "--settings", json.dumps(settings), "--base", base_file]
    command += ["--variants", folder / "variants.tsv", "--output", folder / "latency.csv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in command])
        latency.main()
    assert (folder / "latency.csv.provenance.json").is_file()
    return read_records(folder / "latency.csv")


def value(records, variant: str, metric: str) -> float:
    (record,) = [r for r in records if (r.variant, r.metric) == (variant, metric)]
    return record.value


def test_chosen_rows_have_one_record_a_metric(records) -> None:
    assert {r.variant for r in records} == {"base", "full", "a", "b", "c"}
    assert len({(r.variant, r.metric) for r in records}) == len(records)
    assert all(r.value is not None and r.study == "s" and r.backend for r in records)


def test_ratios_are_of_the_medians(records) -> None:
    for name, dense in (("attention_op", "dense_attention"), ("denoising_step", "dense_denoising_step")):
        ratio = value(records, "a", f"latency.{dense}.p50") / value(records, "a", f"latency.{name}.p50")
        assert value(records, "a", f"speedup.{name}") == pytest.approx(ratio)
        assert value(records, "full", f"speedup.{name}") == 1


def test_rows_with_one_forward_share_its_time(records) -> None:
    assert value(records, "a", "latency.attention_op.p50") == value(records, "b", "latency.attention_op.p50")
    assert value(records, "a", "latency.attention_op.p50") != value(records, "c", "latency.attention_op.p50")


def test_flops(records) -> None:
    dense = 2 * 2 * 4 * 100**2 * 24  # layers, heads, 4 N^2 d
    assert value(records, "full", "flops.per_forward") == value(records, "a", "flops.dense_per_forward") == dense
    assert value(records, "full", "flops.reduction") == 1
    parts = [value(records, "a", f"flops.per_forward.{part}") for part in ("router", "sparse", "linear", "mixing")]
    assert sum(parts) == value(records, "a", "flops.per_forward")
    assert value(records, "a", "flops.per_layer") == value(records, "a", "flops.per_head") * 2


def test_realised_sparsity_is_that_of_the_mask(records) -> None:
    # 13 key blocks of 8, the last of 4: one kept, so a row skips 92 or 96 of 100 keys.
    assert 0.92 <= value(records, "a", "sparsity.realised") <= 0.96
    assert value(records, "full", "sparsity.realised") == 0


def test_timing_key_sees_what_changes_the_forward() -> None:
    one = Variant("x", "sla2", "learned", "alpha", "qat-int8", 0.9, True)
    same = Variant("y", "sla2", "learned", "alpha", "ptq-int8", 0.9, False)
    other = Variant("z", "sla2", "learned", "alpha", "qat-fp8", 0.9, True)
    assert latency.timing_key(one) == latency.timing_key(same) != latency.timing_key(other)

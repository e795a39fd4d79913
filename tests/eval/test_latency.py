import json
import sys

import pytest

from sla2.record import read_records
from sla2.variant import Variant
from sla2_eval import latency

HEADER = "variant\tattention\trouter\tmixing\tquantization\tsparsity\tfinetune\n"
CHOSEN = ("base", "full", "base-kernel", "a", "b", "c")
ROWS = (
    "base\tfull\tnone\tnone\tnone\t0\tno\n"
    "full\tfull\tnone\tnone\tnone\t0\tyes\n"
    "base-kernel\tfull_other\tnone\tnone\tnone\t0\tno\n"
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
        "variants": [{"variant": name} for name in CHOSEN],
        "steps": 10,
        "guidance": 3,
    }
    # In this process: a new one would import torch and diffusers again, ten seconds of a core.
    command = ["latency", "--settings", json.dumps(settings), "--base", base_file]
    command += ["--variants", folder / "variants.tsv", "--output", folder / "latency.csv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in command])
        # This base model has neither text encoder nor VAE; the workflow's own test times real ones.
        patch.setattr(latency, "time_around", lambda *_: {"text_encoding": 2.0, "vae_decoding": 30.0, "writing": 5.0})
        latency.main()
    assert (folder / "latency.csv.provenance.json").is_file()
    return read_records(folder / "latency.csv")


def value(records, variant: str, metric: str) -> float:
    (record,) = [r for r in records if (r.variant, r.metric) == (variant, metric)]
    return record.value


def test_chosen_rows_have_one_record_a_metric(records) -> None:
    assert {r.variant for r in records} == set(CHOSEN)
    assert len({(r.variant, r.metric) for r in records}) == len(records)
    assert all(r.study == "s" and r.backend and (r.value is None) == bool(r.reason) for r in records)
    lacking = {r.metric for r in records if r.value is None and r.variant == "a"}
    assert lacking == {"latency.offload", "memory.denoising_step_peak"} | {
        f"speedup_fa2.{name}" for name in ("kernel", "attention_op", "denoising_step", "end_to_end")
    }
    assert {r.metric for r in records if r.value is None and r.variant == "full"} - lacking == {
        "latency.kernel.p20", "latency.kernel.p50", "latency.kernel.p80", "speedup.kernel"
    }  # fmt: skip


def test_ratios_are_of_the_medians(records) -> None:
    for name, dense in (
        ("kernel", "dense_attention"),
        ("attention_op", "dense_attention"),
        ("denoising_step", "dense_denoising_step"),
    ):
        ratio = value(records, "a", f"latency.{dense}.p50") / value(records, "a", f"latency.{name}.p50")
        assert value(records, "a", f"speedup.{name}") == pytest.approx(ratio)
        assert name == "kernel" or value(records, "full", f"speedup.{name}") == 1


def test_a_video_is_put_together_from_its_parts(records) -> None:
    def whole(step):
        return 10 * 2 * step + 2 * 2.0 + 30.0 + 5.0  # steps and guidance, two texts, VAE, file

    own, dense = (value(records, "a", f"latency.{n}denoising_step.p50") for n in ("", "dense_"))
    assert value(records, "a", "latency.denoising") == pytest.approx(10 * 2 * own)
    assert value(records, "a", "latency.end_to_end") == pytest.approx(whole(own))
    assert value(records, "a", "speedup.end_to_end") == pytest.approx(whole(dense) / whole(own))


def test_the_fastest_dense_kernel_is_the_bar() -> None:
    times = {"dense fa2": [18.0, 18.0, 19.0], "dense cudnn": [12.0, 30.0, 12.0], "x": [1.0, 1.0, 1.0]}
    found = latency.with_fastest(times)
    assert found["dense"] == times["dense cudnn"]
    rows = latency.timings("attention_op", "dense_attention", found, "x")
    assert rows["speedup.attention_op"][0] == 12
    assert rows["speedup_fa2.attention_op"][0] == 18


def test_rows_with_one_forward_share_its_time(records) -> None:
    assert value(records, "a", "latency.attention_op.p50") == value(records, "b", "latency.attention_op.p50")
    assert value(records, "a", "latency.attention_op.p50") != value(records, "c", "latency.attention_op.p50")


def test_another_dense_kernel_has_a_time_of_its_own(records) -> None:
    assert value(records, "base-kernel", "latency.attention_op.p50") != value(
        records, "full", "latency.attention_op.p50"
    )
    assert value(records, "base-kernel", "latency.kernel.p50") is None
    assert value(records, "base-kernel", "flops.reduction") == 1


def test_flops(records) -> None:
    dense = 2 * 2 * 4 * 100**2 * 24  # layers, heads, 4 N^2 d
    assert value(records, "full", "flops.per_forward") == value(records, "a", "flops.dense_per_forward") == dense
    assert value(records, "full", "flops.reduction") == 1
    assert value(records, "a", "flops.dense_per_layer") == 2 * value(records, "a", "flops.dense_per_head") == dense / 2
    parts = [value(records, "a", f"flops.per_forward.{part}") for part in ("router", "sparse", "linear", "mixing")]
    assert sum(parts) == value(records, "a", "flops.per_forward")
    for unit in ("head", "layer"):
        items = [value(records, "a", f"flops.per_{unit}.{part}") for part in ("router", "sparse", "linear", "mixing")]
        assert sum(items) == pytest.approx(value(records, "a", f"flops.per_{unit}"))
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

import csv
import dataclasses
import sys
import time

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode

from sla2.attention import AttentionSettings
from sla2.errors import UserError
from sla2.flow import predict
from sla2_eval import full_size, step_latency, timing
from sla2_eval.full_size import DENSE_CUDNN, DENSE_FA2, FLOOR, ROWS, SHAPES, Shape
from sla2_eval.step_latency import Measurement

SMALL = Shape(
    heads=2, layers=2, ffn_dim=32, frames=5, height=96, width=128,
    head_dim=24, text=(6, 64), text_layers=1, vocabulary=8, vae_width=4,
)  # fmt: skip
TIMED = (DENSE_FA2, "sla2-97", FLOOR, DENSE_CUDNN)  # the others cost a trace each and show nothing new
SETTINGS = AttentionSettings(block_q=32, block_k=4)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Everything at a small size on the CPU; compiled means traced here, code generation would cost a minute."""
    table = step_latency.Table(tmp_path_factory.mktemp("step"))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for name in set(ROWS) - set(TIMED):
            patch.delitem(ROWS, name)
        step_latency.measure({"small": SMALL}, table, torch.device("cpu"), SETTINGS, budget_s=300, compiler="eager")
    return table


def ms(measured, part: str, mode: str, row: str) -> float:
    (one,) = [r for r in measured.rows if (r.part, r.mode, r.row) == (part, mode, row)]
    assert one.ms is not None, one.reason
    return one.ms


def test_sizes_of_the_paper() -> None:
    assert SHAPES["1.3B-480p"].latents == (1, 16, 21, 60, 104)
    assert SHAPES["14B-720p"].latents == (1, 16, 21, 90, 160)
    assert [shape.tokens for shape in SHAPES.values()] == [32760, 75600]


def test_every_row_is_timed_or_says_why_not(measured) -> None:
    keys = [(r.part, r.mode, r.row) for r in measured.rows]
    assert len(set(keys)) == len(keys)
    for mode in ("eager", "compiled"):
        assert {r.row for r in measured.rows if (r.part, r.mode) == ("denoising_step", mode)} == set(TIMED)
    for r in measured.rows:
        if r.row in (DENSE_CUDNN, "offload"):
            assert r.ms is None
            assert r.reason
        else:
            assert r.ms > 0, r
            assert r.repeats == step_latency.REPEATS[r.part]
            assert r.ms_p20 <= r.ms <= r.ms_p80


def test_ratios_stand_against_dense_of_the_same_part_and_mode(measured) -> None:
    with (measured.folder / "summary.csv").open() as file:
        found = {(r["part"], r["mode"], r["row"]): r for r in csv.DictReader(file)}
    for part, mode in (
        ("attention_op", "eager"),
        ("kernel", "eager"),
        ("denoising_step", "eager"),
        ("denoising_step", "compiled"),
    ):
        ratio = ms(measured, part, mode, DENSE_FA2) / ms(measured, part, mode, "sla2-97")
        assert float(found[part, mode, "sla2-97"]["speedup_fa2"]) == pytest.approx(ratio, rel=1e-4)
    share = ms(measured, "denoising_step", "eager", FLOOR) / ms(measured, "denoising_step", "eager", "sla2-97")
    assert float(found["denoising_step", "eager", "sla2-97"]["floor_share"]) == pytest.approx(share, rel=1e-4)
    whole = 100 * ms(measured, "denoising_step", "eager", "sla2-97")
    whole += 2 * ms(measured, "around", "eager", "text_encoding")
    whole += ms(measured, "around", "eager", "vae_decoding") + ms(measured, "around", "eager", "writing")
    assert float(found["end_to_end", "eager", "sla2-97"]["ms"]) == pytest.approx(whole, rel=1e-4)


def test_fastest_dense_kernel_is_the_second_bar() -> None:
    rows = [
        Measurement("s", "attention_op", "eager", name, ms=ms)
        for name, ms in ((DENSE_FA2, 18.0), (DENSE_CUDNN, 12.0), ("sla2-97", 1.0))
    ]
    found = {row["row"]: row for row in step_latency.summary(rows)}
    assert (found["sla2-97"]["speedup_fa2"], found["sla2-97"]["speedup_fastest_dense"]) == (18.0, 12.0)


def test_a_spent_budget_is_a_reason() -> None:
    timer = step_latency.Timer(torch.device("cpu"), deadline=time.monotonic() - 1)
    (one,) = timer.run("s", "kernel", "eager", {"sla2-97": lambda: pytest.fail("must not run")})
    assert one.ms is None
    assert "is spent" in one.reason


def test_a_slow_step_is_repeated_twice(monkeypatch) -> None:
    monkeypatch.setattr(step_latency, "SLOW_MS", 5.0)
    timer = step_latency.Timer(torch.device("cpu"), deadline=time.monotonic() + 60)
    (one,) = timer.run("s", "denoising_step", "eager", {"sla2-97": lambda: time.sleep(0.01)})
    assert one.repeats == 2


def test_weights_have_the_dtypes_of_a_loaded_model() -> None:
    model = full_size.build_transformer(SMALL, torch.device("cpu"), torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == dtypes["blocks.0.attn1.norm_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.norm2.weight"] == dtypes["scale_shift_table"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert model.rope.freqs_cos.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_floor_keeps_the_projections_and_leaves_attention_out() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    torch.testing.assert_close(full_size.LeftOut()(q, k, v), v)


def test_sparse_rows_compile_whole_and_once(monkeypatch) -> None:
    """Traced as a GPU would, on tensors without contents: one graph a row, no break, none again when rows take turns."""
    shape = dataclasses.replace(SHAPES["1.3B-480p"], layers=2)
    rows = ["sla2-97", "sla2-90", "sla2-97-int8", FLOOR]
    for name in set(ROWS) - set(rows):
        monkeypatch.delitem(ROWS, name)
    device = torch.device("cuda")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        with device, monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "to", lambda module, *_: module)  # fake parameters cannot be moved
            transformer = full_size.build_transformer(shape, device, torch.bfloat16)
            switch = full_size.Switch(transformer, shape, AttentionSettings(backend="triton"))
        arguments = full_size.inputs(shape, device, torch.bfloat16)
        step_latency.compile_blocks(transformer.blocks, "eager")
        for name in rows * 2:
            switch(name)
            assert predict(transformer, *arguments).shape == shape.latents
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(rows)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_watch_reads_what_the_driver_says(tmp_path, monkeypatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1980, 610.5, 55'\necho '1500, 700.0, 61'\necho '1755, 650.0'\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with timing.GpuWatch(torch.device("cuda", 0)) as watch:
        time.sleep(0.3)
    assert watch.summary == {"clock_mhz": 1740.0, "clock_mhz_min": 1500.0, "power_w": 655.25, "temperature_c_max": 61.0}
    with timing.GpuWatch(torch.device("cpu")) as watch:
        pass
    assert watch.summary == {}


def test_command_refuses_a_busy_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(timing, "_query", lambda what, index, *options: ["4711, python, 9000 MiB"])
    monkeypatch.setattr(sys, "argv", ["step_latency", "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="4711, python"):
        step_latency.main()
    assert not (tmp_path / "out").exists()

"""Stage 1: the estimators, gradients taken layer by layer, memory, the closed-form alpha, and the report beside the adapter."""

import csv
import json
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_run import ROW, SETTINGS, make_base

from sla2 import stage1
from sla2.attention import AttentionSettings, SparseLinearAttention
from sla2.estimators import divergence, hard_branches, layer_loss, relative_error, soft_branches
from sla2.flow import noisy, predict
from sla2.stage1_report import COLUMNS, AlphaFit, layer_report
from sla2.training import Log
from sla2.variant import LEARNED_ROUTERS, Variant
from sla2.wan import BaseModel, capture_qkv
from sla2_kernels import reference

ATTENTION = AttentionSettings(block_q=16, block_k=8)
ESTIMATORS = ("soft", "straight_through", "mass")
STAGE1 = {
    **{name: SETTINGS[name] for name in ("study", "seed", "device", "threads", "attention")}, "steps": 6, "batch": 2,
    "query_blocks": 3, "estimator": "straight_through", "tau": 0.1, "tau_end": None, "router_logits": "scaled",
    "lr_router": 1e-2, "lr_mixing": 1e-2, "sigmas": [0.3, 0.8], "heldout_clips": 2, "fit_clips": 4, "validate_every": 2, "patience": 0,
    "checkpoint_every": 100, "variant": ROW | {"variant": "learned-alpha-50"},
}  # fmt: skip


def layer(tokens=100, router="learned", mixing="alpha", sparsity=0.8):
    torch.manual_seed(0)
    variant = Variant("x", "sla2", router, mixing, "none", sparsity, False)
    module = SparseLinearAttention(variant, 2, 8, tokens, ATTENTION).double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    q, k, v = torch.randn(3, 2, 2, tokens, 8, dtype=torch.float64).mul(1.5).unbind(0)
    return module, (q, k, v, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("phi_keys", ["smoothed", "raw"])
def test_soft_branches_of_a_hard_mask_are_the_hard_operator(phi_keys):
    module, (q, k, v, _) = layer()
    module.settings = AttentionSettings(block_q=16, block_k=8, phi_keys=phi_keys)
    mask = module.route(q, k)
    soft = soft_branches(module, q, k, v, mask.double())
    for found, wanted in zip(soft, hard_branches(module, q, k, v, mask), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(module.mixing(*soft, 16), module(q, k, v))


@pytest.mark.parametrize("router", LEARNED_ROUTERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layer_loss_is_of_the_sampled_rows_and_reaches_every_parameter(estimator, router):
    module, seen = layer(router=router)
    rows = torch.tensor([4, 1])
    loss = layer_loss(module, *seen, rows, STAGE1 | {"estimator": estimator}, tau=0.5)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not module.mixing.logit.grad[:, [0, 2, 3, 5, 6]].any()
    # What the hard operator leaves on those rows; the soft mask sees more, the mass estimator adds its divergence.
    tokens = torch.cat([torch.arange(64, 80), torch.arange(16, 32)])
    hard = relative_error(module(*seen[:3])[:, :, tokens], seen[3][:, :, tokens])
    if estimator == "straight_through":
        torch.testing.assert_close(loss, hard, rtol=0.01, atol=0)
    if estimator == "mass":
        added = divergence(module.scores(*seen[:2])[:, :, rows], seen[0][:, :, tokens], seen[1], module)
        torch.testing.assert_close(loss, hard + added)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mixing_of_a_fixed_router_learns_on_the_hard_output(estimator):
    module, seen = layer(tokens=96, router="random")
    loss = layer_loss(module, *seen, torch.arange(6), STAGE1 | {"estimator": estimator}, tau=1.0)
    torch.testing.assert_close(loss, relative_error(module(*seen[:3]), seen[3]))


def test_straight_through_tells_a_skipped_block_that_it_is_missed():
    """A query block looks at one key block only, and the router skips it: only a gradient of skipped blocks can bring it back."""
    module, (q, k, v, _) = layer(tokens=64, router="offset", sparsity=0.85)
    module.mixing.logit.data.fill_(60.0)  # the sparse branch alone: the linear one has a gradient of its own
    module.router.bias.data.zero_()
    q[:, :, :16] = 2.0
    k[:, :, 40:48] = 2.0
    module.router.bias.data[:, 5 + 7] = -30.0  # offset 5: query block 0 never chooses the block
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert not module.route(q, k)[:, :, 0, 5].any()
    tau = 20.0  # so wide that SoftTop-k's Jacobian reaches the block
    layer_loss(module, q, k, v, o, torch.tensor([0]), STAGE1, tau).backward()
    assert (
        module.router.bias.grad[:, 5 + 7] < -0.1
    ).all()  # descent raises it; rows sum to zero, so some always comes back


def test_divergence_is_zero_for_the_exact_mass_and_positive_otherwise():
    module, (q, k, _, _) = layer(tokens=96)
    exact = reference.block_mass(q, k, 16, 8).log() * 8**0.5
    torch.testing.assert_close(divergence(exact, q, k, module), torch.tensor(0.0, dtype=torch.float64))
    assert divergence(module.scores(q, k), q, k, module) > 0.01


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any operation returned in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_of_tokens_squared(estimator):
    tokens = 4096
    module = SparseLinearAttention(
        Variant("x", "sla2", "offset", "alpha", "none", 0.97, False), 1, 8, tokens, ATTENTION
    )
    q, k, v, o = torch.randn(4, 1, 1, tokens, 8).unbind(0)
    with Largest() as largest:
        layer_loss(module, q, k, v, o, torch.tensor([3, 200]), STAGE1 | {"estimator": estimator}, 0.1).backward()
        if estimator == "mass":
            module(q, k, v)
    assert tokens * 32 <= largest.numbers < tokens**2 / 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def fitting(base, **changes):
    return stage1.Stage1(STAGE1 | changes, BaseModel.read(base), torch.device("cpu"))


def test_gradients_taken_on_the_way_are_those_of_all_layers_at_once(base, monkeypatch):
    run, shown = fitting(base), []

    def recorded(*seen):
        shown.append(seen)
        return layer_loss(*seen)

    monkeypatch.setattr(stage1, "layer_loss", recorded)
    (loss,) = run.loss(0)
    loss.backward()
    found = [parameter.grad.clone() for parameter in run.layers.parameters()]
    run.layers.zero_grad()
    total = sum(layer_loss(*seen) for seen in shown) / 2
    total.backward()
    torch.testing.assert_close(loss, total)
    assert len(shown) == 2
    for wanted, parameter in zip(found, run.layers.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_layers_are_shown_what_a_dense_forward_sees(base):
    run, shown = fitting(base), []
    latents, text = run.data.batch([0, 1])
    sigma, draw = torch.tensor([0.4, 0.9]), torch.Generator()
    run.dense(latents, text, sigma, draw.manual_seed(3), lambda index, *seen: shown.append((index, *seen)))
    x, _ = noisy(latents, torch.randn(latents.shape, generator=draw.manual_seed(3)), sigma)
    with torch.no_grad(), capture_qkv(run.transformer) as captured:
        predict(run.transformer, x, sigma, text)
    for index, (seen, wanted) in enumerate(zip(shown, captured, strict=True)):
        assert seen[0] == index
        for name, tensor in zip("qkvo", seen[1:], strict=True):
            assert torch.equal(tensor, wanted[name])


def test_a_layers_tensors_are_gone_when_the_next_layer_runs(base, monkeypatch):
    run, alive = fitting(base), []

    def watched(module, q, *rest):
        assert not any(shown() is not None for shown in alive)
        alive.append(weakref.ref(q))
        return layer_loss(module, q, *rest)

    monkeypatch.setattr(stage1, "layer_loss", watched)
    list(run.loss(0))
    assert len(alive) == 2


def test_alpha_fit_finds_the_alpha_that_made_the_output():
    module, (q, k, v, _) = layer(tokens=100)
    wanted = torch.rand(2, 7, dtype=torch.float64)
    outputs = hard_branches(module, q, k, v, module.route(q, k))
    fit = AlphaFit(module, controls=False)
    fit.add(q, k, v, reference.mix(*outputs, wanted, 16))
    torch.testing.assert_close(fit.alpha("learned").double(), wanted, atol=1e-5, rtol=1e-4)
    module.mixing.start(fit.alpha("learned"))
    torch.testing.assert_close(module.mixing.alpha(7), wanted.clamp(0.02, 0.98), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixing", ["alpha", "sum", "projection", "sparse"])
@pytest.mark.parametrize("router", ["learned", "mean_pool"])
def test_layer_report(router, mixing):
    module, (q, k, v, o) = layer(router=router, mixing=mixing)
    fit = AlphaFit(module, controls=True)
    fit.add(q, k, v, o)
    found = {key: value for *key, value in layer_report(module, fit, q, k, v, o, "scaled", 0.1) for key in [tuple(key)]}
    words = list(dict.fromkeys(word for word, _, _ in found))
    assert words == list(dict.fromkeys([router, "mean_pool", "random", "oracle"]))
    assert found["oracle", "", "oracle_overlap"] == 1.0
    assert found["oracle", "exact", "alpha_error"] == 0.0
    torch.testing.assert_close(found[router, "trained", "hard_error"], relative_error(module(q, k, v), o).item())
    mass = reference.block_mass(q, k, 16, 8)
    held = (mass * module.route(q, k)).sum(-1)
    assert found[router, "", "kept_mass"] == pytest.approx(held.mean().item())
    assert ((router, "trained", "alpha_error") in found) == (mixing == "alpha")
    if mixing == "alpha":
        error = (module.mixing.alpha(7) - held).abs().mean().item()
        assert found[router, "trained", "alpha_error"] == pytest.approx(error, rel=1e-5)
    for word in words:
        assert found["oracle", "", "kept_mass"] >= found[word, "", "kept_mass"]
        # Fitted on these very samples, so nothing positional is better.
        assert found[word, "fitted", "hard_error"] <= found.get((word, "trained", "hard_error"), 9.0) + 1e-6
        assert 0 < found[word, "", "mask_concentration"] <= 1


def run_main(base, output, **changes):
    arguments = ["--settings", json.dumps(STAGE1 | changes), "--base", str(base), "--output", str(output)]
    former, sys.argv = sys.argv, ["stage1", *arguments]
    try:
        stage1.main()
    finally:
        sys.argv = former


def test_step_keeps_the_lowest_hard_error_and_reports_it(base, tmp_path, capsys):
    run_main(base, tmp_path)
    errors = [float(row["value"]) for row in rows_of(tmp_path / "log.csv") if row["metric"] == "hard_error"]
    report = rows_of(tmp_path / "report.csv")
    assert len(errors) == 4
    assert tuple(report[0]) == COLUMNS
    assert {(row["layer"], row["sigma"]) for row in report} == {(a, b) for a in "01" for b in ("0.3", "0.8")}
    assert f"{min(errors):.4f} at best" in capsys.readouterr().err
    again = fitting(base)
    state = load_file(tmp_path / "adapter.safetensors")
    for index, module in enumerate(again.layers):
        start = f"blocks.{index}.attn1.processor.attention."
        module.load_state_dict({name.removeprefix(start): t for name, t in state.items() if name.startswith(start)})
    assert again.hard_error() == pytest.approx(min(errors), rel=1e-5)
    assert not (tmp_path / ".checkpoint").exists()


def test_resumed_run_equals_an_uninterrupted_one(base, tmp_path, monkeypatch):
    run_main(base, tmp_path / "whole", checkpoint_every=2)

    def killed(self, step, loss=stage1.Stage1.loss):
        if step == 5:
            raise KeyboardInterrupt
        yield from loss(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(stage1.Stage1, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run_main(base, tmp_path / "killed", checkpoint_every=2)
    assert not (tmp_path / "killed/adapter.safetensors").exists()
    run_main(base, tmp_path / "killed", checkpoint_every=2)
    for name in ("adapter.safetensors", "log.csv", "report.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("patience", "measured"), [(1, 2), (0, 4)])
def test_early_stop(base, tmp_path, monkeypatch, patience, measured):
    numbers = iter([0.5, 0.6, 0.7, 0.4])
    monkeypatch.setattr(stage1.Stage1, "hard_error", lambda self: next(numbers))
    run_main(base, tmp_path, patience=patience)
    assert sum(row["metric"] == "hard_error" for row in rows_of(tmp_path / "log.csv")) == measured


@pytest.mark.parametrize("mixing", ["sum", "alpha"])
def test_router_without_parameters(base, tmp_path, mixing):
    """With `sum` there is nothing to train, with `alpha` the mixing alone."""
    row = {**STAGE1["variant"], "router": "mean_pool", "mixing": mixing}
    run_main(base, tmp_path, variant=row)
    assert (len(rows_of(tmp_path / "log.csv")) == 1) == (mixing == "sum")
    assert {row["router"] for row in rows_of(tmp_path / "report.csv")} == {"mean_pool", "random", "oracle"}


def test_report_is_on_other_clips_than_the_selection(base):
    run, seen = fitting(base, heldout_clips=1), {True: [], False: []}
    run.heldout.batch = lambda indices: seen[fresh].append(indices) or run.data.batch(indices)
    for fresh in (True, False):
        run.on_heldout(lambda *shown: None, fresh)
    assert seen == {True: [[2], [3]], False: [[0], [1]]}


def test_tau_goes_to_its_end_in_equal_ratios(base):
    run = fitting(base, tau=1.0, tau_end=0.01, steps=5)
    assert [run.tau(step) for step in range(5)] == pytest.approx([1, 10**-0.5, 0.1, 10**-1.5, 0.01])
    assert fitting(base).tau(3) == 0.1


def test_summary_names_memory_where_there_is_a_gpu():
    log = Log()
    log.add(0, "stage1", "heldout", "hard_error", 0.5)
    log.time(1, "stage1", 2.0, 0.0, 12.34)
    assert stage1.summary("x", log).endswith("2.00 s a step, peak 12.3 GiB of GPU memory")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))

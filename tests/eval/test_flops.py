import pytest
import torch

from sla2_eval.flops import Flops, dense_flops, head_flops, layer_flops, realised_sparsity

SLA2 = {"attention": "sla2", "router": "learned", "mixing": "alpha"}
FULL = {"attention": "full", "router": "none", "mixing": "none"}


def top_mask(heads: int, t_m: int, t_n: int, kept: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(heads, t_m, t_n).argsort(-1) < kept


@pytest.mark.parametrize("words", [SLA2, FULL])
def test_nothing_skipped_costs_dense_attention_exactly(words) -> None:
    tokens, dim, heads = 1000, 24, 3
    mask = torch.ones(heads, 8, 16, dtype=torch.bool)
    flops = layer_flops(mask, tokens, dim, 128, 64, **words)
    assert flops.total == heads * dense_flops(tokens, dim) == 4 * tokens**2 * dim * heads
    assert realised_sparsity(mask, tokens, 128, 64) == 0


def test_ragged_last_block_counts_its_true_length() -> None:
    # 10 tokens in query blocks 4, 4, 2 and key blocks 3, 3, 3, 1.
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = mask[2, 3] = True
    pairs = 4 * 3 + 4 * 1 + 2 * 1
    assert head_flops(mask, 10, 5, 4, 3, **SLA2).sparse == 4 * 5 * pairs
    assert realised_sparsity(mask[None], 10, 4, 3) == pytest.approx(1 - pairs / 100)


def test_items_by_hand() -> None:
    mask = top_mask(1, 2, 4, 1)[0]  # 8 tokens, query blocks of 4, key blocks of 2, one kept
    n, d = 8, 3
    flops = head_flops(mask, n, d, 4, 2, **SLA2)
    assert flops == Flops(
        router=4 * n * d + 2 * (2 + 4) * d * d + 2 * 2 * 4 * d,
        sparse=4 * d * n * 2,
        linear=n * (2 * d * d + d) + 2 * 2 * 4 * (d * d + d) + n * (2 * d * d + 2 * d),
        mixing=3 * n * d,
    )
    assert (
        head_flops(mask, n, d, 4, 2, attention="sla2", router="mean_pool", mixing="sum").router
        == 4 * n * d + 2 * 2 * 4 * d
    )
    assert head_flops(mask, n, d, 4, 2, attention="sla2", router="random", mixing="projection").mixing == n * d * (
        2 * d + 1
    )


def test_one_branch_alone_costs_that_branch() -> None:
    mask = top_mask(1, 2, 4, 1)[0]
    n, d = 8, 3
    both = head_flops(mask, n, d, 4, 2, **SLA2)
    sparse = head_flops(mask, n, d, 4, 2, attention="sla2", router="learned", mixing="sparse")
    assert sparse == Flops(router=both.router, sparse=both.sparse)
    linear = head_flops(mask, n, d, 4, 2, attention="sla_main", router="mean_pool", mixing="linear")
    assert linear == Flops(linear=n * (2 * d * d + d) + 4 * (d * d + d) + n * (2 * d * d + 2 * d))


def test_skipping_more_costs_less() -> None:
    totals = [layer_flops(top_mask(4, 18, 36, kept), 576, 32, 32, 16, **SLA2).total for kept in (36, 20, 8, 4, 2, 1)]
    assert totals == sorted(totals, reverse=True)


def test_sums_over_heads_and_layers() -> None:
    mask = top_mask(3, 18, 36, 2)
    layer = layer_flops(mask, 576, 32, 32, 16, **SLA2)
    assert layer.total == sum(head_flops(head, 576, 32, 32, 16, **SLA2).total for head in mask)
    assert (layer + layer).total == 2 * layer.total


def test_paper_size_ratio() -> None:
    """At 1.3B, 480p and 97% the overhead over the sparse part is a percent or so of dense attention, as in the paper's column."""
    n, d = 32760, 128
    mask = torch.zeros(1, 256, 512, dtype=torch.bool)
    mask[..., :15] = True
    flops = layer_flops(mask, n, d, 128, 64, **SLA2)
    assert flops.sparse / dense_flops(n, d) == pytest.approx(15 * 64 / n, rel=1e-6)
    assert flops.total / dense_flops(n, d) < 1.82 / 52.75 + 0.02


def test_refuses_a_mask_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(18, 36\), got \(2, 2\)"):
        head_flops(torch.ones(2, 2), 576, 32, 32, 16, **SLA2)

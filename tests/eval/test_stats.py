import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sla2_eval.bootstrap import bca_levels, bootstrap_means
from sla2_eval.stats import Estimate, Part, difference, estimate, half_width, holm, tail_of, verdict


def draw(kind, rng, trainings=1, prompts=12, seeds=2, training_sd=0.0):
    """Values (T, P, S) with prompts, seeds within prompts and training seeds as random effects; their true mean is 1 or 0.8."""
    shape = (trainings, prompts, seeds)
    run = training_sd * rng.normal(size=(trainings, 1, 1))
    if kind == "normal":
        return 1 + run + rng.normal(size=(1, prompts, 1)) + rng.normal(size=shape)
    if kind == "noise only":  # prompts do not differ: the case that resampling at both levels overstates most
        return 1 + run + rng.normal(size=shape)
    if kind == "skewed":
        return 1 + run + rng.exponential(size=(1, prompts, 1)) - 1 + rng.exponential(size=shape) - 1
    return (rng.random(shape) < rng.beta(4, 1, size=(1, prompts, 1))).astype(float)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("normal", {"prompts": 6}),
        ("normal", {"prompts": 24, "seeds": 4}),
        ("noise only", {"prompts": 24, "seeds": 4}),
        ("skewed", {"prompts": 6}),
        ("skewed", {"prompts": 12}),
        ("skewed", {"prompts": 32, "seeds": 4}),
        ("share", {"prompts": 24, "seeds": 4}),
        ("normal", {"prompts": 24, "seeds": 4, "trainings": 3, "training_sd": 0.3}),
        ("normal", {"prompts": 6, "trainings": 2, "training_sd": 0.3}),
        ("normal", {"prompts": 24, "seeds": 4, "trainings": 2, "training_sd": 1.0}),
        ("normal", {"prompts": 24, "seeds": 4, "trainings": 3, "training_sd": 1.0}),
        ("normal", {"prompts": 8, "trainings": 2, "training_sd": 3.0}),
    ],
)
def test_interval_covers_the_truth_as_often_as_it_says(kind, sizes):
    rng = np.random.default_rng(5)
    truth = 0.8 if kind == "share" else 1.0
    found = [estimate(draw(kind, rng, **sizes), draws=2000) for _ in range(8000)]
    covered = np.mean([e.low <= truth <= e.high for e in found])
    assert 0.93 <= covered <= 0.97


def test_estimate_with_one_training_seed_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    ours, other = draw("normal", rng, seeds=3), draw("normal", rng, seeds=3)
    found = estimate(difference(ours, other))
    expected = scipy_stats.ttest_rel(ours.mean((0, 2)), other.mean((0, 2)))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx((ours - other).mean())
    assert (found.n_prompts, found.n_seeds, found.n_train_seeds, found.n_values) == (12, 3, 1, 36)
    assert [found.low, found.high] == pytest.approx(expected.confidence_interval(), abs=0.1 * (found.high - found.low))


def test_bootstrap_means_agree_with_scipy_where_one_level_is_left():
    values = np.random.default_rng(1).exponential(size=(1, 20, 1))
    ours = bootstrap_means(values, 20_000, seed=0)
    theirs = scipy_stats.bootstrap(
        (values.ravel(),), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1)
    ).bootstrap_distribution
    assert np.quantile(ours, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(theirs, [0.025, 0.5, 0.975]), rel=0.02)


def test_interval_has_the_levels_of_scipy_s_bca():
    values = np.random.default_rng(1).exponential(size=(1, 20, 1))
    means = bootstrap_means(values, 20_000, seed=0)
    ours = np.quantile(means, bca_levels(values, values.mean(), means, 0.025))
    theirs = scipy_stats.bootstrap(
        (values.ravel(),), np.mean, n_resamples=20_000, random_state=np.random.default_rng(1)
    )
    assert ours == pytest.approx(theirs.confidence_interval, rel=0.02)
    plain = np.quantile(means, [0.025, 0.975])
    assert (ours > plain * 1.02).all(), "without the correction this test could not fail"


def test_bootstrap_means_of_what_misses_a_cell():
    """Such values take another way through the resamples; without the gap both ways agree."""
    values = np.random.default_rng(3).normal(size=(1, 10, 3))
    gap = values.copy()
    gap[0, 0, 0] = np.nan
    values[0, 0, 0] = np.nanmean(gap[0, 0])
    ours, with_gap = bootstrap_means(values, 4000, seed=0), bootstrap_means(gap, 4000, seed=0)
    assert with_gap.mean() == pytest.approx(ours.mean(), abs=3 * ours.std() / 60)
    assert not np.allclose(with_gap, ours)
    assert np.corrcoef(with_gap, ours)[0, 1] > 0.95


def test_bootstrap_means_resample_seeds_within_prompts_too():
    values = np.zeros((1, 8, 4))
    values[..., ::2] = 1  # prompts are equal, so only the second level varies
    spread = bootstrap_means(values, 4000, seed=0).std()
    assert spread == pytest.approx(np.sqrt(0.25 / 32), rel=0.05)


def test_estimate_is_deterministic_and_the_seed_matters():
    values = draw("skewed", np.random.default_rng(2))
    assert estimate(values, draws=200, seed=3) == estimate(values, draws=200, seed=3)
    assert estimate(values, draws=200, seed=3).low != estimate(values, draws=200, seed=4).low


def test_estimate_counts_what_is_missing_and_weighs_prompts_equally():
    values = np.array([[[1.0, 3.0], [5.0, np.nan], [np.nan, np.nan]]])
    found = estimate(values, draws=200)
    assert found.mean == pytest.approx((2 + 5) / 2)
    assert (found.n_prompts, found.n_values) == (2, 3)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((1, 3, 2), np.nan), "nothing was measured"),
        (np.ones((1, 1, 4)), "no interval: fewer than two prompts"),
        (np.ones((1, 6, 2)), "no interval: no variation among 6 prompts"),
    ],
)
def test_estimate_says_why_there_is_no_interval(values, reason):
    found = estimate(values)
    assert found.reason == reason
    assert found.low is None
    assert found.high is None
    assert found.p_value is None


def test_interval_of_a_share_stays_a_share():
    values = np.ones((1, 8, 2))
    values[0, 0, 0] = 0
    found = estimate(values)
    assert found.high == 1.0
    assert 0 < found.low < found.mean
    assert estimate(values - 1).high <= 1.0


def test_spreads_are_told_apart():
    rng = np.random.default_rng(6)
    values = (
        10 * rng.normal(size=(1, 200, 1))
        + 0.5 * rng.normal(size=(3, 200, 4))
        + np.array([0.0, 2.0, 4.0])[:, None, None]
    )
    found = estimate(values, draws=0)
    assert found.sd_seeds == pytest.approx(0.5, rel=0.1)
    assert found.sd_train_seeds == pytest.approx(2.0, rel=0.1)


def test_training_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(7)
    values = draw("normal", rng, trainings=3, prompts=24, seeds=4)
    apart = values + np.array([-1.0, 0.0, 1.0])[:, None, None]
    width = [e.high - e.low for e in (estimate(values), estimate(apart))]
    assert width[1] > 2 * width[0]


def test_p_value_of_several_training_seeds_is_that_of_the_interval():
    """The test rejects at 5 % exactly where the interval, were it symmetric, leaves out 0."""
    rng = np.random.default_rng(9)
    values = draw("normal", rng, trainings=3, prompts=24, seeds=4) + np.array([-0.5, 0.0, 0.5])[:, None, None]
    found = estimate(values)
    half = (found.high - found.low) / 2
    for distance in (0.9, 1.1):
        moved = estimate(values - found.mean + distance * half)
        assert (moved.p_value < 0.05) == (distance > 1)
    assert estimate(values - found.mean + 1e9).p_value < 1e-9


def test_parts_that_add_up_against_samples():
    parts = [Part(0.5, 7), Part(2.0, 2)]
    rng = np.random.default_rng(0)
    added = sum(math.sqrt(part.variance) * rng.standard_t(part.freedom, 1_000_000) for part in parts)
    for tail in (0.1, 0.025, 0.005):
        width = half_width(parts, tail)
        assert tail_of(parts)(width) == pytest.approx(tail)
        assert (added > width).mean() == pytest.approx(tail, rel=0.04)
    one = [Part(0.5, 7), Part(0.0, 2)]
    assert half_width(one, 0.025) == pytest.approx(math.sqrt(0.5) * scipy_stats.t.ppf(0.975, 7))
    assert tail_of(one)(2.0) == pytest.approx(scipy_stats.t.sf(2.0 / math.sqrt(0.5), 7))
    tiny = [Part(0.5, 30), Part(1e-12, 2)]
    assert tail_of(tiny)(5.0) == pytest.approx(scipy_stats.t.sf(5.0 / math.sqrt(0.5), 30), rel=1e-3), "far out, too"


def test_difference_pairs_and_refuses_what_is_not_paired():
    ours, untrained = np.arange(12.0).reshape(2, 3, 2), np.ones((1, 3, 2))
    assert np.array_equal(difference(ours, untrained), ours - 1)
    with pytest.raises(ValueError, match=r"\(2, 3, 2\) and \(1, 4, 2\)"):
        difference(ours, np.ones((1, 4, 2)))


@pytest.mark.parametrize(("worse", "better", "same"), [(6, 0, 2), (4, 1, 3), (9, 2, 20), (1, 0, 7)])
def test_difference_of_shares_is_tested_by_mcnemar(worse, better, same):
    values = np.repeat([-1.0, 1.0, 0.0], (worse, better, same))[None, :, None]
    exact = scipy_stats.binomtest(worse, worse + better).pvalue
    found = estimate(values).p_value
    assert found == pytest.approx(exact, abs=0 if worse + better + same <= 13 else 0.01)
    assert found > scipy_stats.ttest_1samp(values.ravel(), 0).pvalue, (
        "where t would be as careful this test could not fail"
    )


def test_permutation_test_keeps_its_level():
    """Two variants that are as good as each other, of eight prompts: at 5 % no more than 5 % are called different, where t calls more."""
    rng = np.random.default_rng(8)
    shape = (1, 8, 1)
    differing = [np.sign(rng.normal(size=shape)) * (rng.random(shape) < 0.9) for _ in range(2000)]
    found = np.array([estimate(v, draws=300).p_value or 1 for v in differing])
    assert 0.005 < np.mean(found < 0.05) <= 0.05


def test_holm():
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "margin", "word"),
    [
        (0.1, 0.3, 0.01, None, "resolved"),
        (0.1, 0.3, 0.2, None, "not resolved at n=6"),
        (-0.1, 0.3, 0.01, None, "not resolved at n=6"),
        (-0.1, 0.3, 0.4, 0.5, "equivalent"),
        (0.1, 0.3, 0.01, 0.5, "equivalent"),
        (0.1, 0.6, 0.01, 0.5, "resolved"),
        (-0.6, 0.1, 0.4, 0.5, "not resolved at n=6"),
        (None, None, None, 0.5, "not resolved at n=6"),
    ],
)
def test_verdict(low, high, p_holm, margin, word):
    assert verdict(Estimate(mean=0.2, low=low, high=high, n_prompts=6), p_holm, margin) == word


@pytest.mark.parametrize("margin", [None, 0.5])
def test_verdict_of_pairs_that_do_not_differ(margin):
    assert verdict(estimate(np.zeros((1, 6, 2))), None, margin) == "identical"
    seeds_cancel = np.tile([1.0, -1.0], (1, 6, 1))
    assert verdict(estimate(seeds_cancel), None, margin) == "not resolved at n=6"
    assert verdict(estimate(np.full((1, 6, 2), 0.1)), None, margin) == "not resolved at n=6"


def test_nothing_that_was_not_paired_by_prompt_has_a_verdict():
    assert verdict(Estimate(mean=0.2, n_prompts=0), None, 0.5) == ""

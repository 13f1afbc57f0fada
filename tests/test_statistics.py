"Two methods over several seeds: intervals and p values against scipy, statsmodels, scikit-learn and closed forms."
import numpy as np, pytest
from scipy import stats
from sklearn.metrics import f1_score
from fer_core.artifacts import FerError
from fer_core.evaluate.metrics import macro_f1
from fer_core.evaluate.paired import bootstrap_macro_f1, bootstrap_p, comparisons_note, holm, interval_of_difference, mean_over, paired_bootstrap, seeds_table, t_interval, welch_p

COUNTS = (80, 30, 80, 120, 80, 70, 90)
Y = np.repeat(np.arange(7), COUNTS)


def decisions(*right, seed=0):
    "One row a network, right on so many faces and else anything."
    rng = np.random.default_rng(seed)
    return np.stack([np.where(rng.random(len(Y)) < r, Y, rng.integers(0, 7, len(Y))) for r in right])


def sk_f1(y, p): return f1_score(y, p, labels=range(7), average='macro', zero_division=0)


# ---- against other implementations ----

def test_the_paired_interval_is_that_of_scipy():
    a, b = decisions(.62, .55)
    ours = paired_bootstrap(Y, a, b, 3000, seed=1)
    theirs = stats.bootstrap((Y, a, b), lambda y, p, q: macro_f1(p, y) - macro_f1(q, y), paired=True, vectorized=False, n_resamples=1500, method='percentile', rng=2).confidence_interval
    width = theirs.high - theirs.low
    assert ours['difference'] == pytest.approx(sk_f1(Y, a) - sk_f1(Y, b), abs=1e-12)
    assert abs(ours['faces_low'] - theirs.low) < .12*width and abs(ours['faces_high'] - theirs.high) < .12*width
    apart = np.hypot(*(np.ptp(np.quantile(d, (.025, .975))) for d in bootstrap_macro_f1(Y, [a, b], 1500)))
    assert paired_bootstrap(Y, a, np.where(np.arange(len(Y)) % 10 == 0, b, a), 1500)['faces_high'] < .5*apart  # what two networks share cancels


def test_the_multi_bootstrap_is_the_loop_it_stands_for():
    "Faces and seeds drawn in plain loops with scikit-learn's F1 give the same distribution."
    a, b = decisions(.60, .66, .63, seed=3), decisions(.55, .58, .50, seed=4)
    told, rng, d = paired_bootstrap(Y, a, b, 3000, seed=5), np.random.default_rng(6), []
    for _ in range(300):
        i = rng.integers(0, len(Y), len(Y))
        f = [[sk_f1(Y[i], of[s][i]) for s in range(3)] for of in (a, b)]
        d.append(np.mean([f[0][s] for s in rng.integers(0, 3, 3)]) - np.mean([f[1][s] for s in rng.integers(0, 3, 3)]))
    low, high = np.quantile(d, (.025, .975))
    assert abs(told['both_low'] - low) < .2*(high - low) and abs(told['both_high'] - high) < .2*(high - low)
    assert told['both_low'] < told['faces_low'] and told['faces_high'] < told['both_high'] and told['seeds'] == [3, 3] and told['n'] == len(Y)


def test_seeds_alone_have_the_variance_of_a_bootstrap_mean():
    "Where every draw of faces gives the same figure, what is left is the bootstrap of the seeds: its variance is s²(k − 1)/k²."
    a, b = np.array([.60, .66, .63, .61]), np.array([.5, .54, .55])
    n = 40_000
    told = interval_of_difference(np.repeat(a[:, None], n, 1), np.repeat(b[:, None], n, 1))
    assert told['faces_low'] == told['faces_high'] == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, 4, (4, n))
    assert mean_over(np.repeat(a[:, None], n, 1), picks).var() == pytest.approx(a.var()/4, rel=.03)
    exact = [np.mean(p) - np.mean(q) for p in np.array(np.meshgrid(*[a]*4)).reshape(4, -1).T for q in np.array(np.meshgrid(*[b]*3)).reshape(3, -1).T]  # all 256 x 27 resamples
    assert (told['both_low'], told['both_high']) == pytest.approx(tuple(np.quantile(exact, (.025, .975))), abs=1.5e-3)


def test_paired_seeds_cancel_what_they_share():
    luck = np.array([-.04, 0, .04])[:, None]
    rng = np.random.default_rng(1)
    a, b = .63 + luck + rng.normal(0, .002, (3, 4000)), .60 + luck + rng.normal(0, .002, (3, 4000))
    apart, together = interval_of_difference(a, b), interval_of_difference(a, b, same_seeds=True)
    assert together['both_low'] > .02 and apart['both_low'] < 0  # the claim stands only because row s of both is one seed
    assert {k: v for k, v in apart.items() if 'faces' in k} == {k: v for k, v in together.items() if 'faces' in k}


def test_seed_statistics_agree_with_statsmodels():
    from statsmodels.stats.weightstats import DescrStatsW, ttest_ind
    a, b = [.61, .63, .60], [.64, .66, .65, .62]
    assert t_interval(a, .9)[1:] == pytest.approx(DescrStatsW(a).tconfint_mean(alpha=.1), abs=1e-12)
    assert welch_p(a, b) == pytest.approx(ttest_ind(a, b, usevar='unequal')[1], abs=1e-12)


def test_holm_controls_the_family():
    "Under no real difference, the corrected values fall below .05 in about one table of twenty; the plain ones in far more."
    p = np.random.default_rng(0).random((2000, 6))
    for row in p[:20]: assert min(holm(list(row))) == pytest.approx(min(1, 6*row.min()), abs=1e-12)
    plain, corrected = (p.min(1) < .05).mean(), (6*p.min(1) < .05).mean()
    assert plain == pytest.approx(1 - .95**6, abs=.03) and corrected < .07
    assert f'{1 - .95**6:.2f}' in comparisons_note(6) and comparisons_note(1) == comparisons_note(0) == ''


# ---- the claim of a method against another ----

def test_a_method_that_is_better_is_found_and_one_that_is_not_is_not():
    base, better, same = decisions(.55, .56, .54, seed=1), decisions(.68, .66, .67, seed=2), decisions(.55, .54, .56, seed=3)
    won, lost, none = (paired_bootstrap(Y, x, base, 1500) for x in (better, base - 0, same))
    assert won['both_low'] > 0 and won['p_both'] == won['p_faces'] == 2/1501
    assert lost['difference'] == lost['faces_low'] == lost['faces_high'] == 0 and lost['p_faces'] == 1.
    assert none['both_low'] < 0 < none['both_high'] and none['p_both'] > .05


def test_one_seed_makes_no_claim_about_a_method():
    told = paired_bootstrap(Y, decisions(.6), decisions(.5, .5), 200)
    assert told['both_low'] is told['both_high'] is told['p_both'] is None and told['faces_low'] > 0 and told['seeds'] == [1, 2]
    assert paired_bootstrap(Y, decisions(.6)[0], decisions(.5)[0], 200)['seeds'] == [1, 1]  # a vector is one network


def test_the_same_seed_gives_the_same_interval():
    a, b = decisions(.6, .6), decisions(.5, .5, seed=9)
    assert paired_bootstrap(Y, a, b, 300, seed=4) == paired_bootstrap(Y, a, b, 300, seed=4) != paired_bootstrap(Y, a, b, 300, seed=5)


def test_the_table_of_seeds_holds_each_and_the_mean():
    a = decisions(.6, .64, seed=2)
    draws = bootstrap_macro_f1(Y, a, 800)
    scores = {s: macro_f1(p, Y) for s, p in zip('01', a)}
    table = seeds_table({'one': {'7': scores['0']}, 'two': scores}, {'one': draws[0], 'two': draws})
    assert list(table.index) == [('one', '7'), ('one', 'mean'), ('two', '0'), ('two', '1'), ('two', 'mean')]
    alone, mean = table.loc[('one', 'mean')], table.loc[('two', 'mean')]
    assert alone[['seeds low', 'both low']].isna().all() and table.loc[('one', '7'), 'faces low'] == alone['faces low'] == np.quantile(draws[0], .025)
    assert mean['macro-F1'] == pytest.approx(np.mean(list(scores.values()))) and (mean['seeds low'], mean['seeds high']) == t_interval(list(scores.values()))[1:]
    assert mean['both low'] < mean['faces low'] < mean['macro-F1'] < mean['faces high'] < mean['both high']


@pytest.mark.parametrize('ask, said', [
    (lambda: bootstrap_macro_f1(Y, Y, 5), 'one row a model'),
    (lambda: bootstrap_macro_f1(Y, decisions(.5)[:, :-1], 5), 'on the same faces'),
    (lambda: interval_of_difference(np.ones((2, 5)), np.ones((2, 6))), 'same draws'),
    (lambda: interval_of_difference(np.ones((2, 5)), np.ones((3, 5)), same_seeds=True), 'cannot be paired'),
    (lambda: seeds_table({'a': {0: .5}}, {'a': np.ones((2, 5))}), 'draws of 2 seeds for 1')])
def test_what_does_not_belong_together_is_refused(ask, said):
    with pytest.raises(FerError, match=said) as e: ask()
    assert e.value.code == 'bad_parameter'


def test_p_is_never_zero():
    assert bootstrap_p(np.ones(99)) == 2/100 and bootstrap_p(np.zeros(5)) == 1.

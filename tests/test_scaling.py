"Scaling by class and by the answer, other calibration methods, conformal sets and selective answers against independent references."
import numpy as np, pytest, torch
from scipy.optimize import check_grad
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from fer_core.artifacts import FerError
from fer_core.evaluate import answer, scaling
from fer_core.evaluate.answer import AnswerScaling, answer_gap, fit_answers
from fer_core.evaluate.calibrate import fit_temperature
from fer_core.evaluate.conformal import SCORES, error_bound, prediction_sets, risk_table, set_figures, sets_table, threshold_for_risk
from fer_core.evaluate.metrics import softmax
from fer_core.evaluate.scaling import Scaling, against_rest, choose_scaling, compare_methods, fit_scaling

PRIOR = np.array([.14, .04, .14, .25, .16, .1, .17])


def posterior(n, seed=0):
    "Logits that are the exact posterior of unit noise around a signal of 1.5, and what was drawn."
    rng = np.random.default_rng(seed)
    y = rng.choice(7, n, p=PRIOR)
    return 1.5*(1.5*np.eye(7)[y] + rng.normal(0, 1, (n, 7))) + np.log(PRIOR), y


@pytest.fixture(scope='module')
def bent():
    z, y = posterior(6000)
    return (z - [0, .8, -.5, 0, .3, 0, 0])/[.5, .9, .4, .6, .5, .5, .5], y


def nll_of(z, y): return -log_softmax(z, axis=1)[np.arange(len(y)), y].mean()


# -- fitting -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('vector', [False, True])
def test_the_gradient_is_the_losss(bent, vector):
    z, y = bent[0][:300], bent[1][:300]
    own = np.array([1, 0, 1, 0, 0, 1, 1], bool)
    theta = np.random.default_rng(1).normal(0, .4, 1 + own.sum()*(1 + vector))
    assert check_grad(lambda t: scaling._loss(t, z, y, own, vector)[0], lambda t: scaling._loss(t, z, y, own, vector)[1], theta) < 1e-6


def test_vector_scaling_is_what_torch_finds(bent):
    z, y = (torch.from_numpy(a) for a in bent)
    w, b = torch.ones(7, dtype=torch.float64, requires_grad=True), torch.zeros(7, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([w, b], max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn='strong_wolfe')
    def step():
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(z*w + b, y)
        loss.backward()
        return loss
    opt.step(step)
    found = fit_scaling(*bent)
    assert nll_of(found(bent[0]), bent[1]) == pytest.approx(step().item(), abs=1e-8)
    assert np.array(found.scale) == pytest.approx(w.detach().numpy(), abs=1e-3)
    shift = np.array(found.shift)
    assert shift - shift.mean() == pytest.approx((b - b.mean()).detach().numpy(), abs=2e-3)


def test_methods_contain_each_other(bent):
    z, y = bent
    loss = {m: nll_of(fit_scaling(z, y, m)(z), y) for m in scaling.METHODS}
    assert loss['vector'] < loss['per_class'] < loss['temperature'] == pytest.approx(nll_of(z/fit_temperature(z, y), y))
    assert fit_scaling(z, y, 'vector', np.zeros(7)).scale == pytest.approx(fit_scaling(z, y, 'temperature').scale, rel=1e-4)


def test_classes_without_parameters_share_theirs(bent):
    own = np.array([0, 0, 1, 0, 1, 0, 0], bool)
    found = fit_scaling(*bent, 'vector', own)
    rest = np.array(found.scale)[~own]
    assert (rest == rest[0]).all() and not np.array(found.shift)[~own].any() and len(set(found.scale)) == 3


def test_a_scaling_survives_json_and_a_damaged_one_does_not():
    import json
    s = Scaling('vector', tuple(np.linspace(.5, 1, 7)), tuple(np.linspace(-1, 1, 7)))
    assert Scaling.from_dict(json.loads(json.dumps(s.to_dict()))) == s
    for d, code in (({'scale': [1]*6}, 'class_order_mismatch'), ({'scale': [1]*6 + [0]}, 'corrupt_artifact'), ({'shift': [0]*6 + [float('nan')]}, 'corrupt_artifact')):
        with pytest.raises(FerError) as e: Scaling.from_dict(s.to_dict() | d)
        assert e.value.code == code


# -- safeguards --------------------------------------------------------------------------------------------------------------

def test_a_bend_is_mended_and_an_honest_model_left_alone(bent):
    found, why = choose_scaling(*bent)
    assert found.method == 'vector' and {'fear', 'sad'} <= set(why['own'])
    z, y = posterior(6000, 1)
    calm, why = choose_scaling(3*z, y)
    assert calm.method == 'temperature' and 1/calm.scale[0] == pytest.approx(3, abs=.1) and list(why['tried']) == ['temperature', 'answer'] and 'within chance' in why['tried']['answer']['refused'] and 'no class' in why['reason']


def test_a_class_with_few_faces_gets_nothing_of_its_own():
    z, y = posterior(4000)
    z[:, 1] = z[:, 1]*3 + 3 # disgust, 4 %
    found, why = choose_scaling(z, y)
    assert (y == 1).sum() < scaling.MIN_ROWS and 'disgust' not in why['own'] and 'by class: no class has' in why['reason'] and not {'per_class', 'vector'} & set(why['tried'])


def test_what_costs_a_minority_its_f1_is_refused(bent, monkeypatch):
    real = scaling._out_of_fold
    def costly(z, labels, method, *more):
        out = real(z, labels, method, *more)
        if method == 'vector': out[labels == 1, 1] -= .6 # likelier on the whole, but disgust is found less often
        return out
    monkeypatch.setattr(scaling, '_out_of_fold', costly)
    found, why = choose_scaling(*bent)
    assert 'F1 lost: disgust' in why['tried']['vector']['refused'] and not why['tried']['per_class']['refused']
    best = min(('answer', 'per_class'), key=lambda m: why['tried'][m]['nll'])
    assert found == fit_scaling(*bent, best, [c in why['own'] for c in scaling.CLASSES])


def test_answers_out_of_fold_come_from_the_other_folds(bent):
    z, y = bent[0][:500], bent[1][:500]
    own = np.ones(7, bool)
    out = scaling._out_of_fold(z, y, 'vector', own, 5, 0)
    from sklearn.model_selection import StratifiedKFold
    fit, ask = next(StratifiedKFold(5, shuffle=True, random_state=0).split(z, y))
    assert out[ask] == pytest.approx(fit_scaling(z[fit], y[fit], 'vector', own)(z[ask])) and nll_of(out, y) > nll_of(fit_scaling(z, y)(z), y)


# -- by the answer -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def weighted(): # as class weights leave a network: too sure of disgust, not sure enough of happy
    z, y = posterior(6000, 2)
    return z + [.2, 1.2, .2, -.8, 0, .5, 0], y


def test_scaling_by_the_answer_is_a_logistic_regression_of_right_and_wrong(weighted, monkeypatch):
    from sklearn.linear_model import LogisticRegression
    monkeypatch.setattr(answer, 'SPREAD', 1e4) # no prior
    z, y = weighted
    found = fit_answers(z, y)
    p, k = softmax(z, found.temperature).max(1), z.argmax(1)
    x = np.column_stack([np.log(p/(1 - p)), np.eye(7)[k]])
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, max_iter=10_000, tol=1e-10).fit(x, k == y)
    assert [found.slope, *found.shift] == pytest.approx(theirs.coef_[0], abs=2e-3)
    monkeypatch.setattr(answer, 'SPREAD', 1e-3) # nothing but the prior: one shift for all
    assert np.ptp(fit_answers(z, y).shift) < 1e-3


def test_the_temperature_is_that_of_the_classes_not_answered(weighted):
    from scipy.optimize import minimize_scalar
    z, y = weighted[0]*[[1.7]], weighted[1]
    wrong = z.argmax(1) != y
    held = np.where(np.arange(7) == z[wrong].argmax(1)[:, None], -np.inf, z[wrong])
    best = minimize_scalar(lambda T: nll_of(held/T, y[wrong]), bounds=(.1, 10), method='bounded', options={'xatol': 1e-7}).x
    found = fit_answers(z, y)
    assert found.temperature == pytest.approx(best, rel=1e-4) != pytest.approx(fit_temperature(z, y), rel=1e-2)
    assert fit_temperature(found(z), y) == pytest.approx(1, abs=.02) # another one finds nothing to do
    few = np.sort(np.concatenate([np.flatnonzero(~wrong)[:900], np.flatnonzero(wrong)[:99]]))
    assert fit_answers(z[few], y[few]).temperature == fit_temperature(z[few], y[few])


def test_the_gradient_of_the_answers_is_the_losss(weighted):
    k, odds, _ = answer.log_odds(weighted[0][:400])
    theta = np.random.default_rng(1).normal(.5, .4, 9)
    more = odds, k, k != weighted[1][:400]
    assert check_grad(lambda t: answer._loss(t, *more)[0], lambda t: answer._loss(t, *more)[1], theta) < 1e-4


def test_answers_stay_and_the_others_keep_their_shares(weighted):
    z = weighted[0]
    found = fit_answers(*weighted)
    p, q, k, rows = softmax(z/found.temperature), softmax(found(z)), z.argmax(1), np.arange(len(z))
    assert (q.argmax(1) == k).all() and q.sum(1) == pytest.approx(np.ones(len(z)))
    odds = found.slope*np.log(p[rows, k]/(1 - p[rows, k])) + np.array(found.shift)[k]
    held = found.holds(z) # those that the rule keeps in front
    assert held == pytest.approx(odds < np.log(np.sort(p, 1)[:, -2]/(1 - p[rows, k])) + answer.EDGE) and .5 < (~held).mean() < 1 and q[rows, k][~held] == pytest.approx(1/(1 + np.exp(-odds[~held])), abs=1e-9)
    p[rows, k] = q[rows, k] = 0
    assert q/q.sum(1, keepdims=True) == pytest.approx(p/p.sum(1, keepdims=True), abs=1e-9)
    hard = AnswerScaling(1., 1., (-30.,)*7)(z) # every answer pushed behind all others
    assert (hard.argmax(1) == k).all()


def test_answers_too_sure_are_mended_where_no_class_may_have_parameters(weighted, monkeypatch):
    monkeypatch.setattr(scaling, 'RATIO', np.inf)
    found, why = choose_scaling(*weighted)
    told = why['tried']
    assert found.method == 'answer' and not told['answer']['refused'] and told['answer']['gain_low'] > 0 and told['answer']['answer_gap'] < .6*told['temperature']['answer_gap']
    z, y = posterior(6000, 3)
    z = z + [.2, 1.2, .2, -.8, 0, .5, 0]
    assert answer_gap(softmax(found(z)), y) < .6*answer_gap(softmax(z, fit_temperature(z, y)), y) and nll_of(found(z), y) < nll_of(z/fit_temperature(z, y), y)
    few, why = choose_scaling(z[:299], y[:299])
    assert few.method == 'temperature' and '300 are needed' in why['reason']


def test_the_gap_by_answer_counted_by_hand():
    p = np.zeros((4, 7)); p[:, 0], p[:, 3] = [.8, .6, .3, .1], [.2, .4, .7, .9]
    assert answer_gap(p, np.array([0, 1, 3, 3])) == pytest.approx((abs(.8 + .6 - 1) + abs(.7 + .9 - 2))/4)


def test_a_stored_scaling_by_the_answer_comes_back_and_a_damaged_one_does_not():
    import json
    s = AnswerScaling(1.2, .9, tuple(np.linspace(-1, 1, 7).tolist()))
    assert Scaling.from_dict(json.loads(json.dumps(s.to_dict()))) == s
    for d, code in (({'shift': [0]*6}, 'class_order_mismatch'), ({'slope': 0}, 'corrupt_artifact'), ({'temperature': float('inf')}, 'corrupt_artifact')):
        with pytest.raises(FerError) as e: Scaling.from_dict(s.to_dict() | d)
        assert e.value.code == code


# -- other methods -----------------------------------------------------------------------------------------------------------

class Given(ClassifierMixin, BaseEstimator):
    classes_ = np.arange(7)
    def __sklearn_is_fitted__(self): return True
    def fit(self, X, y): return self
    def predict_proba(self, X): return X
    def predict(self, X): return X.argmax(1)


def test_isotonic_is_scikit_learns(bent):
    p, y = softmax(bent[0]), bent[1]
    reference = CalibratedClassifierCV(FrozenEstimator(Given()), method='isotonic').fit(p[:3000], y[:3000]).predict_proba(p[3000:])
    assert np.abs(against_rest('isotonic', p[:3000], y[:3000], p[3000:]) - reference).max() < 1e-4 # ours has a floor of 1e-6


def test_beta_is_the_logistic_form():
    rng = np.random.default_rng(0)
    p = rng.random(40_000)
    a, b, c = .7, 1.4, -.3
    q = 1/(1 + np.exp(-(a*np.log(p) - b*np.log1p(-p) + c)))
    told = scaling._beta(p, rng.random(len(p)) < q)
    at = np.linspace(.02, .98, 25)
    assert told(at) == pytest.approx(1/(1 + np.exp(-(a*np.log(at) - b*np.log1p(-at) + c))), abs=.015)


def test_a_histogram_says_what_its_bin_saw():
    p, hit = np.arange(1, 16)/16, np.array([0, 1]*7 + [1])
    assert scaling._histogram(p, hit)(p).tolist() == hit.tolist() # fifteen values, fifteen bins


def test_the_table_ranks_a_bent_model(bent):
    z, y = bent
    t = compare_methods(z[:3000], y[:3000], z[3000:], y[3000:])
    assert list(t.index) == ['none', 'temperature', 'answer', 'per_class', 'vector', 'isotonic', 'beta', 'histogram'] and np.isfinite(t.to_numpy()).all()
    assert t.loc['vector', 'NLL'] < t.loc['temperature', 'NLL'] < t.loc['none', 'NLL'] and t.loc['none', 'accuracy'] == t.loc['temperature', 'accuracy'] == t.loc['answer', 'accuracy']


# -- sets --------------------------------------------------------------------------------------------------------------------

def test_lac_sets_are_the_quantiles(bent):
    p, y = softmax(bent[0]), bent[1]
    n, level = 1000, .9
    rank = int(np.ceil((n + 1)*level))
    q = np.sort(1 - p[np.arange(n), y[:n]])[rank - 1]
    mine = prediction_sets(p[:n], y[:n], p[n:], level, 'lac')
    differs = (mine != (1 - p[n:] <= q))
    assert differs.sum() == 0


@pytest.mark.parametrize('score', SCORES)
def test_the_promise_is_kept(score):
    held = []
    for seed in range(12):
        z, y = posterior(1400, seed)
        p = softmax(z, .5) # far too sure: the promise holds all the same
        sets = prediction_sets(p[:700], y[:700], p[700:], .8, score, seed)
        held.append(set_figures(sets, y[700:])['coverage'])
    assert np.mean(held) > .8 - 3*np.std(held)/len(held)**.5


def test_figures_of_sets():
    sets, y = np.zeros((4, 7), bool), [0, 0, 1, 3]
    sets[0, 0] = sets[1, 2] = sets[2, [1, 2]] = True
    f = set_figures(sets, y)
    assert (f['coverage'], f['size'], f['singletons'], f['empty']) == (.5, 1., .5, .25) and f['per_class']['angry'] == {'n': 2, 'coverage': .5, 'size': 1.}


@pytest.mark.parametrize('given, text', [({'coverage': 1.}, 'no share'), ({'score': 'best'}, 'none of'), ({'coverage': .999}, 'cannot promise')])
def test_sets_that_cannot_be_had(given, text):
    z, y = posterior(200)
    with pytest.raises(FerError, match=text): prediction_sets(softmax(z), y, softmax(z), **given)


# -- when to speak -----------------------------------------------------------------------------------------------------------

def test_the_bound_is_the_binomials():
    from statsmodels.stats.proportion import proportion_confint
    for wrong, n, delta in ((0, 30, .05), (7, 100, .01), (30, 30, .05)): assert error_bound(wrong, n, delta) == pytest.approx(proportion_confint(wrong, n, 2*delta, 'beta')[1])


def test_the_error_stays_below_its_target():
    risk, broken, spoke = .3, 0, 0
    far = posterior(60_000, 99)
    p_far, wrong_far = softmax(far[0]), softmax(far[0]).argmax(1) != far[1]
    for seed in range(40):
        z, y = posterior(800, seed)
        t = threshold_for_risk(softmax(z), y, risk, .1)
        if t['threshold'] is None: continue
        kept = p_far.max(1) >= t['threshold']
        spoke, broken = spoke + 1, broken + (wrong_far[kept].mean() > risk)
    assert spoke >= 35 and broken <= 4


def test_a_target_out_of_reach_is_said():
    z, y = posterior(200)
    assert threshold_for_risk(softmax(z), y, .001)['threshold'] is None
    with pytest.raises(FerError): threshold_for_risk(softmax(z), y, 0.)


def test_tables_say_what_was_promised_and_kept():
    (z, y), (z2, y2) = posterior(900), posterior(2000, 1)
    table, figures = sets_table(softmax(z), y, softmax(z2), y2)
    assert table.shape[0] == 9 and table.loc[('lac', .9), 'held'] == figures['lac 0.9']['coverage'] > .86
    rare = np.concatenate([np.flatnonzero(y != 1)[:89], np.flatnonzero(y == 1)[:1]])
    few, _ = sets_table(softmax(z[rare]), y[rare], softmax(z2), y2)
    assert {*few.index} == {(s, c) for s in ('lac', 'aps') for c in (.8, .9)} # raps parts every class
    sixty = np.concatenate([np.flatnonzero(y == k)[:9] for k in range(7)])[:60]
    assert {*sets_table(softmax(z[sixty]), y[sixty], softmax(z2), y2)[0].index} == {(s, c) for s in ('lac', 'aps') for c in (.8, .9)} # and each must have a face in a tenth of them
    with pytest.raises(FerError, match='only 1'): prediction_sets(softmax(z[rare]), y[rare], softmax(z2), .8, 'raps')
    none = np.flatnonzero(y != 1)[:100]
    assert set_figures(prediction_sets(softmax(z[none]), y[none], softmax(z2), .8, 'aps'), y2)['per_class']['disgust']['n'] > 20 # a class that validation never showed
    told = risk_table(softmax(z), y, softmax(z2), y2, (.001, .4))
    assert told.loc[.001, 'threshold'] == 'none' == told.loc[.001, 'error on test'] and 0 < told.loc[.4, 'error on test'] < .4


@pytest.mark.parametrize('score', SCORES)
@pytest.mark.parametrize('coverage', [.8, .9, .95])
def test_as_few_faces_as_a_promise_needs(score, coverage):
    from fer_core.evaluate.conformal import _least
    z, y = posterior(4000)
    y[:] = np.arange(len(y)) % 3 # every class often enough to be parted
    n = _least(score, coverage)
    assert prediction_sets(softmax(z[:n]), y[:n], softmax(z[n:]), coverage, score).shape == (4000 - n, 7)
    with pytest.raises(FerError, match='cannot promise'): prediction_sets(softmax(z[:n - 1]), y[:n - 1], softmax(z[n:]), coverage, score)

"""Metrics, calibration, statistics, gates and figures against independent references, and on hostile input."""
import io
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from fer_core.artifacts import FerError, read_json, write_json
from fer_core.evaluate import calibrate as C, figures as F, gates as G, metrics as M, statistics as S
from fer_core.evaluate.rules import read_rules
from fer_core.labels import CLASSES

COUNTS = (491, 55, 528, 879, 594, 416, 626)  # FER2013 PrivateTest


def sample(seed=0, n=600, noise=1.3, sharp=4., counts=None):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(7), counts) if counts else rng.integers(0, 7, n)
    return (sharp*(np.eye(7)[labels] + rng.normal(0, noise/2, (len(labels), 7)))).astype(np.float32), labels


@pytest.fixture(scope='module')
def torchmetrics():
    from fer_core.compat import mend_torchvision
    mend_torchvision()
    return pytest.importorskip('torchmetrics.functional.classification')


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('n_bins', [5, 15, 40])
def test_ece_agrees_with_torchmetrics(torchmetrics, seed, n_bins):
    import torch
    logits, labels = sample(seed)
    probs = M.softmax(logits)
    p, y = torch.tensor(probs), torch.tensor(labels)  # torchmetrics sums in float32
    reference = torchmetrics.multiclass_calibration_error(p, y, num_classes=7, n_bins=n_bins, norm='l1').item()
    assert M.ece(probs, labels, n_bins) == pytest.approx(reference, abs=1e-6)
    binary = [torchmetrics.binary_calibration_error(p[:, k], (y == k).long(), n_bins=n_bins, norm='l1').item() for k in range(7)]
    assert M.ece_per_class(probs, labels, n_bins) == pytest.approx(binary, abs=1e-6)
    assert M.classwise_ece(probs, labels, n_bins) == pytest.approx(np.mean(binary), abs=1e-6)


def test_decisions_agree_with_torchmetrics(torchmetrics):
    import torch
    logits, labels = sample(4)
    p, y = torch.tensor(logits), torch.tensor(labels)
    assert M.macro_f1(logits, labels) == pytest.approx(torchmetrics.multiclass_f1_score(p, y, 7, average='macro').item(), abs=1e-6)
    assert M.uar(logits, labels) == pytest.approx(torchmetrics.multiclass_recall(p, y, 7, average='macro').item(), abs=1e-6)
    assert np.array_equal(M.confusion(logits, labels), torchmetrics.multiclass_confusion_matrix(p, y, 7).numpy())


def test_confidences_on_an_edge_belong_to_the_bin_below():
    table = M.bin_table([.2, .2, .4, 1., 0.], [1, 0, 1, 1, 0], n_bins=5)
    assert table['count'].tolist() == [3, 1, 0, 0, 1]


@pytest.mark.parametrize('n', [1, 3, 14, 15, 16, 3589])
def test_equal_mass_bins_hold_what_array_split_gives(n):
    conf = np.random.default_rng(n).permutation(np.linspace(.1, .9, n))
    assert M.bin_table(conf, conf > .5, scheme='mass')['count'].tolist() == [len(part) for part in np.array_split(conf, 15)]


def test_macro_f1_counts_absent_classes_as_zero():
    labels = np.array([0, 0, 3, 3])
    assert M.macro_f1(labels, labels) == pytest.approx(2/7)
    assert M.uar(np.eye(7)[labels], labels) == pytest.approx(2/7)


scores = st.integers(1, 60).flatmap(lambda n: st.tuples(st.lists(st.lists(st.sampled_from([-60., -2., 0., .5, 1., 60.]), min_size=7, max_size=7), min_size=n, max_size=n),
                                                        st.lists(st.integers(0, 6), min_size=n, max_size=n), st.integers(0, 99)))


@settings(max_examples=30, deadline=None)
@given(scores)
def test_metrics_are_bounded_and_do_not_depend_on_row_order(case):
    logits, labels, seed = np.array(case[0]), np.array(case[1]), case[2]
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    a, b = M.evaluate(logits, labels, 'test', False), M.evaluate(logits[shuffled], labels[shuffled], 'test', False)
    for key in ('accuracy', 'macro_f1', 'uar', 'ece_width', 'ece_mass', 'classwise_ece', 'aurc', 'coverage', 'brier', 'nll'):
        assert a[key] == pytest.approx(b[key], abs=1e-9), key
        assert 0 <= a[key] <= {'brier': 2, 'nll': 122}.get(key, 1) + 1e-12, key
    assert np.array_equal(a['confusion'], b['confusion'])


@settings(max_examples=40, deadline=None)
@given(scores)
def test_aurc_is_the_mean_over_random_tie_orders(case):
    probs, labels = M.softmax(case[0]), np.array(case[1])
    conf, wrong, rng, k = probs.max(1), probs.argmax(1) != labels, np.random.default_rng(0), np.arange(1, len(labels) + 1)
    orders = [np.lexsort((rng.random(len(k)), -conf)) for _ in range(400)]
    assert M.aurc(probs, labels) == pytest.approx(np.mean([(np.cumsum(wrong[o])/k).mean() for o in orders]), abs=.08)


@pytest.mark.parametrize('logits, labels, code', [
    (np.zeros((3, 7)), [0, 1], 'bad_parameter'), (np.zeros((0, 7)), [], 'bad_parameter'), (np.zeros(7), [0], 'bad_parameter'),
    (np.full((2, 7), np.nan), [0, 1], 'nan_loss'), (np.zeros((2, 7)), [0, 7], 'unknown_label'), (np.zeros((2, 7)), [0, -1], 'unknown_label'),
    (np.zeros((2, 7)), [0, .5], 'unknown_label'), (np.zeros((2, 8)), [0, 7], 'class_order_mismatch')])
def test_misfit_arrays_are_refused(logits, labels, code):
    with pytest.raises(FerError) as e: M.evaluate(logits, labels, 'test', False)
    assert e.value.code == code


def test_logits_are_not_taken_for_probabilities():
    logits, labels = sample()
    for f in (M.ece, M.nll, M.brier, M.aurc, C.reliability):
        with pytest.raises(FerError): f(logits, labels)


@pytest.mark.parametrize('seed, sharp', [(0, 1.), (1, 4.), (2, 12.), (3, 30.)])
def test_temperature_agrees_with_lbfgs(seed, sharp):
    import torch
    logits, labels = sample(seed, sharp=sharp)
    z, y, log_T = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_T], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn='strong_wolfe')

    def closure():
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(z*torch.exp(-log_T), y)
        loss.backward()
        return loss
    optimiser.step(closure)
    assert C.fit_temperature(logits, labels) == pytest.approx(log_T.exp().item(), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(scores)
def test_temperature_never_makes_nll_worse_and_never_changes_a_decision(case):
    logits, labels = np.array(case[0]), np.array(case[1])
    T = C.fit_temperature(logits, labels)
    assert C.T_BOUNDS[0] <= T <= C.T_BOUNDS[1]
    nll = [M.evaluate(logits, labels, 'val', True, T=t)['nll'] for t in (T, 1.)]
    assert nll[0] <= nll[1] + 1e-12
    assert np.array_equal((logits/T).argmax(1), logits.argmax(1))


def test_calibration_and_reliability_survive_json(tmp_path):
    val, test = sample(1), sample(2)
    report = C.calibrate(*val, *test)
    tables = C.reliability(M.softmax(test[0]), test[1], n_bins=40)
    write_json(tmp_path/'calibration.json', report); write_json(tmp_path/'reliability.json', tables)
    assert read_json(tmp_path/'calibration.json') == report
    again = read_json(tmp_path/'reliability.json')
    assert any(b['accuracy'] is None for b in again['bins']) and sum(b['count'] for b in again['bins']) == again['n'] == 600
    assert len(F.reliability_diagram(again).axes) == 2
    assert report['splits']['test']['in_sample'] is False and report['splits']['val']['in_sample'] is True


def test_bootstrap_of_counts_has_the_distribution_of_resampled_rows():
    from sklearn.metrics import f1_score
    logits, labels = sample(5, n=400)
    fast = S.bootstrap_ci(labels, logits, 'macro_f1', n_boot=4000)
    slow = S.bootstrap_ci(labels, logits.argmax(1), lambda y, p: f1_score(y, p, average='macro', labels=range(7), zero_division=0), n_boot=200)
    assert fast.estimate == pytest.approx(slow.estimate)
    assert fast[1:] == pytest.approx(slow[1:], abs=.25*(slow.high - slow.low))


def test_bootstrap_covers_the_truth_about_as_often_as_it_claims():
    truth = S.bootstrap_ci(*sample(0, n=200_000)[::-1], 'uar', n_boot=2).estimate
    hits = [low <= truth <= high for _, low, high in (S.bootstrap_ci(*sample(s + 1, n=500)[::-1], 'uar', n_boot=300) for s in range(120))]
    assert .87 <= np.mean(hits) <= 1


def test_bootstrap_repeats_itself_and_widens_with_its_level():
    logits, labels = sample(counts=COUNTS)
    first = S.bootstrap_ci(labels, logits, n_boot=1000, seed=3)
    assert first == S.bootstrap_ci(labels, logits, n_boot=1000, seed=3) != S.bootstrap_ci(labels, logits, n_boot=1000, seed=4)
    wide = S.bootstrap_ci(labels, logits, n_boot=1000, seed=3, level=.99)
    assert wide.low < first.low < first.high < wide.high


def test_intervals_need_only_the_stored_confusion(tmp_path):
    metrics = M.evaluate(*sample(counts=COUNTS), 'test', False)
    write_json(tmp_path/'metrics.json', metrics)
    stored = read_json(tmp_path/'metrics.json')
    assert S.with_intervals(stored)['ci'] == S.with_intervals(metrics)['ci']
    no_disgust = M.evaluate(*sample(counts=(9, 0, 9, 9, 9, 9, 9)), 'test', False)
    assert S.with_intervals(no_disgust)['ci']['recall']['disgust'] is None


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_inside_the_unit_interval(case):
    k, n = case
    low, high = S.wilson(k, n)
    assert 0 <= low <= k/n + 1e-12 and k/n - 1e-12 <= high <= 1
    assert S.wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_is_symmetric_and_names_the_better(a_only, b_only):
    a = np.repeat([1, 0, 1], [a_only, b_only, 5]); b = np.repeat([0, 1, 1], [a_only, b_only, 5])
    x, y = S.mcnemar(a, b), S.mcnemar(b, a)
    assert x['p'] == pytest.approx(y['p']) and x['n_discordant'] == a_only + b_only
    assert x['decisive'] == (a_only + b_only >= 30)
    if x['significant']: assert x['verdict'].startswith('A' if a_only > b_only else 'B')


def fit(rule, value): return {'value': value, 'from': 'a test', 'split': rule['split'], 'n': rule['least_n']}


def test_a_gate_without_evidence_fails_every_rule():
    verdicts = G.evaluate_gates({})
    assert len(verdicts) == len(G.GATES) and not any(v['passed'] for v in verdicts) and {v['reason'] for v in verdicts} == {'missing'}
    assert {v['gate'] for v in verdicts} == {'G-ensemble', 'G-student', 'G-prune', 'G-int8', 'G-latency', 'G-parity', 'G-repro', 'G-reliability', 'G-replay'}
    assert {v['gate'] for v in G.evaluate_gates({}, rules=G.MILESTONES)} == {f'M{k}' for k in range(1, 17)}


@pytest.mark.parametrize('rule', G.GATES + G.MILESTONES, ids=lambda r: f'{r["gate"]}-{r["metric"]}')
def test_every_rule_passes_on_its_threshold_and_fails_beyond_it(rule):
    worse = -1 if rule['comparison'] == '>=' else 1
    for step, expected in ((0, True), (1e-4*worse, False), (-1e-4*worse, True)):
        verdict = [v for v in G.evaluate_gates({rule['metric']: fit(rule, rule['threshold'] + step)}, rule['gate'], G.GATES + G.MILESTONES) if v['rule'] == rule['metric']]
        assert [v['passed'] for v in verdict] == [expected]


def test_an_exact_gain_of_two_points_passes_in_floating_point():
    assert .58 - .56 < .02  # what a naive comparison would reject
    rule = G.GATES[0]
    assert G.evaluate_gates({rule['metric']: fit(rule, .58 - .56)}, 'G-ensemble')[0]['passed']


@pytest.mark.parametrize('change, sentence', [({'split': 'val'}, 'measured on val, the rule asks for test'), ({'split': ''}, 'measured on a split that is not stated, the rule asks for test'),
                                              ({'n': 37}, 'n = 37, at least 300 asked'), ({'n': None}, 'n is not stated, at least 300 asked'), ({'value': None}, 'missing'), ({'value': float('inf')}, 'not a finite number')])
def test_evidence_that_a_rule_cannot_use_fails_with_a_sentence(change, sentence):
    rule = G.GATES[0]
    verdict = G.evaluate_gates({rule['metric']: fit(rule, .5) | change}, 'G-ensemble')[0]
    assert not verdict['passed'] and verdict['reason'] == sentence and sentence in G.gate_table([verdict]).to_string()


@pytest.mark.parametrize('text, what', [
    ('rules:\n- {gate: G, metric: student.macro_f1_gab, at_most: 1}', "rule 1: nothing measures 'student.macro_f1_gab': do you mean student.macro_f1_gap?"),
    ('rules:\n- {gate: G, metric: student.ece, at_most: 1}\n- {gate: G, metric: student.ece, at_most: 2}', 'two rules on student.ece'),
    ('rules:\n- {gate: G, metric: student.ece}', 'rule 1: student.ece needs one bound: write at_least or at_most'),
    ('rules:\n- {gate: G, metric: student.ece, at_most: 1, at_least: 0}', 'needs one bound'),
    ('rules:\n- {gate: G, metric: student.ece, at_most: low}', 'rule 1: at_most: input should be a valid number'),
    ('rules:\n- {gate: G, metric: student.ece, atmost: 1}', 'rule 1: atmost: extra inputs are not permitted'),
    ('rules:\n- {gate: G, metric: student.ece, at_most: 1, split: train}', "split 'train'"),
    ('rules:\n- {gate: G, includes: [H]}', "there is no gate 'H' to include"),
    ('rules: 3', 'has no list of rules'), ('rules:\n- 3', 'rule 1: 3 is no rule'), ('rules: [', 'is no YAML')])
def test_a_faulty_file_of_rules_is_told_with_its_mend(tmp_path, text, what):
    (tmp_path/'r.yaml').write_text(text)
    with pytest.raises(FerError) as e: read_rules(tmp_path/'r.yaml')
    assert what in str(e.value) and 'r.yaml' in str(e.value)


def test_rules_that_are_not_there(tmp_path):
    with pytest.raises(FerError, match='gates, milestones'): read_rules(tmp_path/'no.yaml')


def test_an_unknown_gate_is_an_error():
    with pytest.raises(FerError, match='G-studnet'): G.evaluate_gates({}, ['G-studnet'])


@pytest.mark.parametrize('change', [dict(split='val'), dict(n=10), dict(in_sample=True), dict(dataset='other')])
def test_metrics_of_other_rows_are_not_compared(change):
    metrics = M.evaluate(*sample(counts=COUNTS), 'test', False, dataset='fer2013')
    priors = dict.fromkeys(CLASSES, 1/7)
    for f in (lambda b: G.phase_adopted(metrics, b, ['disgust']), lambda b: G.student_evidence(metrics, b, 1, 4, priors),
              lambda b: G.ensemble_evidence(metrics, {'t': b}, priors), lambda b: G.int8_evidence(metrics, b)):
        f(metrics)
        with pytest.raises(FerError, match='same rows'): f({**metrics, **change})


def test_rarest_classes_come_from_the_training_prior():
    priors = dict(zip(CLASSES, (5, 1, 4, 9, 6, 2, 7)))
    assert G.rarest(priors) == ['disgust', 'surprise']
    with pytest.raises(FerError, match='neutral'): G.rarest({c: 1 for c in CLASSES[:-1]})


def test_verdicts_and_evidence_survive_json(tmp_path):
    metrics = M.evaluate(*sample(counts=COUNTS), 'test', False)
    evidence = G.int8_evidence(metrics, metrics) | G.parity_evidence(*[sample()[0]]*2)
    verdicts = G.evaluate_gates(evidence, ['G-int8', 'G-parity'])
    write_json(tmp_path/'gates.json', verdicts)
    assert read_json(tmp_path/'gates.json') == verdicts
    assert [v['reason'] for v in verdicts] == ['measured on test, the rule asks for val']*2 + ['missing', '', '']  # quantisation is decided on validation; latency was not measured
    assert G.evaluate_gates(G.evidence_of(verdicts), ['G-int8', 'G-parity']) == verdicts
    assert len(G.gate_table(read_json(tmp_path/'gates.json'))) == 5


def drawn():
    a, b = (S.with_intervals(M.evaluate(*sample(s, counts=COUNTS), 'test', False), n_boot=50) for s in (0, 1))
    logits, labels = sample(counts=COUNTS)
    history = [dict(epoch=e, train_loss=2/e, val_loss=2.1/e, val_accuracy=1 - 1/e, val_macro_f1=.9 - 1/e) for e in range(1, 6)]  # without lr
    tables = {'a': a['per_class'], 'b': b['per_class']}
    return {'curves': lambda: F.curves(history), 'one epoch': lambda: F.curves(history[:1]), 'compare': lambda: F.compare_curves({'a': history, 'b': history[:2]}, 'val_loss'),
            'confusion': lambda: F.confusion(a['confusion']), 'delta': lambda: F.confusion_delta(a['confusion'], b['confusion']),
            'no delta': lambda: F.confusion_delta(a['confusion'], a['confusion']), 'bars': lambda: F.per_class_bars(tables, 'recall', {'a': a['ci']['recall']}),
            'reliability': lambda: F.reliability_diagram(C.reliability(M.softmax(logits), labels), C.reliability(M.softmax(logits, 2), labels, scheme='mass')),
            'classwise': lambda: F.classwise_ece_bars({'a': a['classwise_ece_per_class']}), 'distribution': lambda: F.class_distribution({'train': {'happy': 3}}, log=False),
            'latency': lambda: F.latency_cdf({'fp32': [1., 2., 9.]}), 'size': lambda: F.size_vs_f1([dict(name='x', params=4e6, macro_f1=.5)]),
            'risk': lambda: F.risk_coverage({'a': M.risk_coverage(M.softmax(logits), labels)}), 'montage': lambda: F.montage([np.zeros((8, 8)), np.zeros((3, 8, 8), np.uint8)], ['x', 'y'])}


@pytest.mark.parametrize('name', ['curves', 'one epoch', 'compare', 'confusion', 'delta', 'no delta', 'bars', 'reliability', 'classwise', 'distribution', 'latency', 'size', 'risk', 'montage'])
def test_every_figure_draws_with_its_stamp_and_leaves_nothing_in_pyplot(name, recwarn):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    fig = F.stamp(drawn()[name](), n=3589, split='test', seed=0, run_id='r1', dataset_sha256='ab'*32)
    buffer = io.BytesIO()
    fig.savefig(buffer, format='png')
    assert buffer.getbuffer().nbytes > 3000 and plt.get_fignums() == before
    assert ' '.join(fig.get_supxlabel().split()) == 'test, n = 3,589 · held-out · seed 0 · run r1 · data abababababab' # wrapped to the figure's width
    assert not [w for w in recwarn if 'layout' in str(w.message) or 'glyph' in str(w.message).lower()]


def test_a_figure_draws_into_given_axes():
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2)
    counts = np.diag(COUNTS)
    assert F.confusion(counts, ax=axes[0]) is fig and F.confusion_delta(counts, counts, ax=axes[1]) is fig
    plt.close(fig)


def test_a_stamp_says_in_sample():
    assert 'IN-SAMPLE' in F.stamp(F.latency_cdf({'a': [1.]}), n=None, split='val', in_sample=True).get_supxlabel()

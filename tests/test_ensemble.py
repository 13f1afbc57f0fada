"Ensembles and soft labels: fusion and search against independent arithmetic, the search on new rows, refusals, other data, alignment, kills."
import json, os, shutil, signal, subprocess, sys
import numpy as np, pytest
from scipy import optimize, special, stats
from fer_core.artifacts import FerError, Run, read_json, write_json
from fer_core.labels import CLASSES
from fer_core.teach import ensemble as E

PRIORS = (.14, .02, .14, .25, .17, .11, .17)


def simulated(n, strengths, rng, leans=None):
    "Logits of members that share half of their noise and lean each its own way, labels, the leanings."
    y, shared = rng.choice(7, n, p=PRIORS), rng.normal(size=(n, 7))
    leans = rng.normal(0, .3, (len(strengths), 7)) if leans is None else leans
    signal_ = rng.uniform(.4, 1.6, (n, 1))*np.eye(7)[y]
    return [(s*signal_ + np.sqrt(.5)*(shared + rng.normal(size=(n, 7))) + b).astype(np.float32) for s, b in zip(strengths, leans)], y, leans


@pytest.fixture(scope='module')
def three(): return simulated(900, (2.4, 2.1, 1.4), np.random.default_rng(5))


# --- fusion

def test_all_pools_are_the_closed_forms(three):
    z, _, _ = three
    T, w = [.7, 1.6, 2.], [.5, .2, .3]
    p = [special.softmax(np.asarray(a, np.float64)/t, 1) for a, t in zip(z, T)]
    linear = sum(k*q for k, q in zip(w, p))
    geometric = np.prod([q**k for k, q in zip(w, p)], 0)
    shares = [k*(1 - stats.entropy(q, axis=1)/np.log(7)) for k, q in zip(w, p)]
    by_face = sum(k[:, None]*q for k, q in zip(shares, p))/sum(shares)[:, None]
    for how, want in (('probs', linear), ('logits', geometric/geometric.sum(1, keepdims=True)), ('sure', by_face)):
        fused = E.fuse(z, T, w, how)
        assert fused.dtype == np.float32 and np.abs(special.softmax(fused.astype(np.float64), 1) - want).max() < 1e-6
    assert np.abs(np.exp(E.fuse(z, T, w, 'probs').astype(np.float64)) - linear).max() < 1e-6  # they are log-probabilities as they stand


def test_a_member_without_a_say_is_not_heard_and_certainty_stays_finite(three):
    z, _, _ = three
    broken = np.full_like(z[0], np.nan)
    for how in E.FUSIONS: np.testing.assert_array_equal(E.fuse([z[0], broken], [1, 1], [1., 0.], how), E.fuse(z[:1], [1], [1.], how))
    assert np.isfinite(E.fuse([1e4*z[0], z[1]], [.05, 1], [.5, .5], 'probs')).all()


def test_an_unknown_fusion_is_refused(three):
    for call in (lambda: E.fuse(three[0], [1]*3, [1/3]*3, 'median'), lambda: E.fuse_teachers(['nowhere'], 'median')):
        with pytest.raises(FerError) as e: call()
        assert e.value.code == 'bad_parameter' and "'median'" in str(e.value)


# --- the search's arithmetic

def slow_ece(p, y):
    "Naomi Pakdaman Naeini's ECE, 15 equal widths, in a loop."
    sure, right = p.max(1), p.argmax(1) == y
    cells = [(sure > i/15) & (sure <= (i + 1)/15) for i in range(15)]
    return sum(abs(right[c].mean() - sure[c].mean())*c.mean() for c in cells if c.any())


@pytest.mark.parametrize('how', E.FUSIONS)
def test_scores_of_vectors_are_those_of_slow_arithmetic(three, how):
    from sklearn.metrics import f1_score
    z, y, _ = three
    T, w, draws = [1.3, .8, 2.], np.array([[.2, .3, .5], [1., 0, 0], [.4, .6, 0]]), E.draw_rows(len(y), 5, 3)
    f1, ece, own = E.score_vectors(w, E._members(z, T, how), y, how, draws)
    for i in range(len(w)):
        fused = E.fuse(z, T, w[i], how).astype(np.float64)
        loss = lambda t: -special.log_softmax(fused*np.exp(-t), 1)[np.arange(len(y)), y].mean()
        best = np.exp(optimize.minimize_scalar(loss, bounds=(-3, 3), method='bounded', options={'xatol': 1e-9}).x)
        assert abs(own[i]/best - 1) < 2e-4
        for j, times in enumerate(draws):
            rows = np.repeat(np.arange(len(y)), times)
            assert abs(f1[i, j] - f1_score(y[rows], fused[rows].argmax(1), average='macro', labels=range(7), zero_division=0)) < 1e-6
            assert abs(ece[i, j] - slow_ece(special.softmax(fused[rows]/best, 1), y[rows])) < 2e-4


def test_temperatures_are_found_for_the_loudest_and_the_faintest(three):
    z, y, _ = three
    for scale in (.02, 30.):
        own = E.score_vectors(np.array([[1.]]), E._members([z[0]*scale], [1.], 'logits'), y, 'logits', E.draw_rows(len(y), 1, 0))[2][0]
        at_one = E.score_vectors(np.array([[1.]]), E._members(z[:1], [1.], 'logits'), y, 'logits', E.draw_rows(len(y), 1, 0))[2][0]
        assert abs(own/(at_one*scale) - 1) < 2e-3 or own in (np.float32(.05), np.float32(20.))


def test_the_front_is_what_brute_force_finds():
    rng = np.random.default_rng(0)
    for n in (1, 2, 60):
        f1, ece = rng.integers(0, 9, n)/9, rng.integers(0, 9, n)/9
        beaten = [any((f1[j] >= f1[i]) and (ece[j] <= ece[i]) and (f1[j] > f1[i] or ece[j] < ece[i]) for j in range(n)) for i in range(n)]
        front = E.pareto(f1, ece)
        assert {(f1[i], ece[i]) for i in front} == {(f1[i], ece[i]) for i in range(n) if not beaten[i]} and (np.diff(f1[front]) < 0).all()


# --- the search's promise

KINDS = {'alike': ((2.0, 2.1, 2.2), 800), 'one weak': ((2.4, 2.2, 1.2), 800), 'a pair': ((2.4, 1.9), 800), 'four': ((2.2, 2.1, 1.6, 1.2), 600)}


@pytest.fixture(scope='module')
def on_new_rows():
    "Macro-F1 in points on new rows: kind -> (sets, [plain search, bagged, chosen, uniform])."
    from fer_core.evaluate.metrics import macro_f1
    out = {}
    for kind, (strengths, n) in KINDS.items():
        rows = []
        for seed in range(24):
            rng, ones = np.random.default_rng([seed, n]), [1]*len(strengths)
            z, y, leans = simulated(n, strengths, rng)
            new, y_new, _ = simulated(8000, strengths, rng, leans)
            found = E.search_weights(z, ones, y, resamples=100, seed=seed)
            p = found['search']['points']
            rows.append([100*macro_f1(E.fuse(new, ones, w), y_new) for w in (p['plain search']['weights'], p['bagged']['weights'], found['weights'], p['uniform']['weights'])])
        out[kind] = np.array(rows)
    return out


def test_bagged_weights_hold_on_new_rows_where_the_plain_search_does_not(on_new_rows):
    "Means over simulated validation and test sets, each kind for itself and all together."
    gain = {kind: rows[:, 1] - rows[:, 0] for kind, rows in on_new_rows.items()}
    assert all(g.mean() > 0 for g in gain.values()), {k: g.mean() for k, g in gain.items()}
    assert stats.ttest_1samp(np.concatenate(list(gain.values())), 0, alternative='greater').pvalue < 1e-4


def test_with_its_fallback_the_search_still_beats_the_plain_one_and_uniform(on_new_rows):
    rows = np.concatenate(list(on_new_rows.values()))
    for other in (0, 3): assert stats.ttest_1samp(rows[:, 2] - rows[:, other], 0, alternative='greater').pvalue < .05, (rows[:, 2] - rows[:, other]).mean()


def test_members_of_one_kind_are_weighted_evenly_with_the_reason():
    rng = np.random.default_rng(2)
    z, y, _ = simulated(800, (2.1, 2.1, 2.1), rng, leans=np.zeros((3, 7)))
    found = E.search_weights(z, [1, 1, 1], y, seed=1)
    low = found['search']['gain'][1]
    assert (found['method'] == 'uniform') == (low <= 0) and ('includes zero' in found['reason']) == (low <= 0)
    same = E.search_weights([z[0]]*3, [1, 1, 1], y)
    assert same['method'] == 'uniform' and 'includes zero' in same['reason'] and same['weights'] == [1/3]*3


def test_what_the_search_records(three):
    z, y, _ = three
    found = E.search_weights(z, [1, 1, 1], y)
    s = found['search']
    assert found['method'] == 'bagged' and abs(sum(found['weights']) - 1) < 1e-9 and s['gain'][1] > 0 and s['vectors'] == 66 and s['n'] == 900
    assert found['best_macro_f1'] == s['points']['plain search']['macro_f1'] >= max(p['macro_f1'] for p in s['front']) and found['uniform_macro_f1'] == s['points']['uniform']['macro_f1']
    assert all(a['macro_f1'] > b['macro_f1'] and a['ece'] > b['ece'] for a, b in zip(s['front'], s['front'][1:]))
    assert [p['weights'] for p in s['alone']] == np.eye(3).tolist()
    again = E.search_weights(z, [1, 1, 1], y)
    assert json.dumps(again) == json.dumps(found) and E.search_weights(z[:1], [1], y)['weights'] == [1.]


def test_auto_keeps_logits_unless_probabilities_clearly_gain(three):
    z, y, _ = three
    found = E.search_weights(z, [1, 1, 1], y, how='auto')
    assert found['fusion'] == ('probs' if found['fusion_gain'][1] > 0 else 'logits') and found['other_fusion']['fusion'] != found['fusion'] and 'on validation' in found['fusion_reason']
    rng = np.random.default_rng(0)  # a member that now and then vetoes the truth: its logit wrecks the mean of logits, its probability does not
    veto = [a.copy() for a in z]
    for k in range(3):
        hit = rng.random(len(y)) < .25
        veto[k][hit, y[hit]] -= 60
    found = E.search_weights(veto, [1, 1, 1], y, how='auto')
    assert found['fusion'] == 'probs' and found['fusion_gain'][1] > 0
    p = {how: E.search_weights(veto, [1, 1, 1], y, how=how)['search']['points']['bagged']['criterion'] for how in ('probs', 'logits')}
    assert abs(found['fusion_gain'][0] - (p['probs'] - p['logits'])) < 1e-6  # like with like, whatever fell back to uniform


# --- diversity

def test_diversity_is_that_of_other_libraries(three):
    from sklearn.metrics import cohen_kappa_score, matthews_corrcoef
    from statsmodels.stats.contingency_tables import Table2x2
    (a, b, _), y, _ = three
    d, wrong = E.diversity(a, b, y), [a.argmax(1) != y, b.argmax(1) != y]
    odds = Table2x2(np.array([[(~wrong[0] & ~wrong[1]).sum(), (~wrong[0] & wrong[1]).sum()], [(wrong[0] & ~wrong[1]).sum(), (wrong[0] & wrong[1]).sum()]])).oddsratio
    want = {'kappa': cohen_kappa_score(a.argmax(1), b.argmax(1)), 'error_correlation': matthews_corrcoef(*wrong), 'q': (odds - 1)/(odds + 1),
            'double_fault': (wrong[0] & wrong[1]).mean(), 'disagreement': (a.argmax(1) != b.argmax(1)).mean()}
    assert d.keys() == want.keys() and all(abs(d[k] - want[k]) < 1e-9 for k in want)


def test_a_member_that_never_errs_has_no_error_correlation():
    y = np.arange(70) % 7
    d = E.diversity(np.eye(7)[y], np.eye(7)[(y + 1) % 7], y)
    assert np.isnan(d['error_correlation']) and d['disagreement'] == 1 and d['double_fault'] == 0


# --- runs: two small networks of random weights, told apart by their inputs

def discs(folder, seed, **counts):
    from fer_core.data.curate import curate
    from fer_core.data.synthetic import write_discs
    raw = write_discs(folder/'raw', seed=seed, **counts)
    run = Run.create(folder/'curate', 'curate', fingerprint=f'discs-{seed}')
    facts = curate(raw, run.folder, source='folder', near=None)
    run.record(dataset={'sha256': facts['dataset_sha256']})
    return run.folder


def network(folder, seed, size=32, loud=2000.):
    "A network of random weights whose logits depend on the picture."
    import torch
    from fer_core.data.preprocess import Preprocess
    from fer_core.models.backbones import Classifier, ModelConfig, save_model
    torch.manual_seed(seed)
    net, spec = Classifier(ModelConfig('mobilenetv3_small_050', head='linear')).eval(), Preprocess(size=size)
    with torch.no_grad(): net.head.weight.mul_(loud)
    save_model(folder, net, spec)
    return net, spec


def teacher(folder, data, seed, size=32, flip=True):
    from fer_core.data.loader import Feeder
    from fer_core.teach.teacher import open_data
    from fer_core.train.judge import judge_model
    run = Run.create(folder, 'teacher', {'seed': seed}, fingerprint=folder.name)
    net, spec = network(folder, seed, size)
    pack = open_data(run, data, spec)
    run.record(seeds={'train': seed}, reliability={'flip_averaged': flip})
    judge_model(run, net, Feeder(pack), 'teacher', flip)
    run.finish()
    return run.folder


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A curated folder and two teachers of it: another size, one not mirror averaged."
    at = tmp_path_factory.mktemp('home')
    data = discs(at, 0, train=8, val=5, test=6)
    return data, [teacher(at/'runs'/'teacher-one', data, 1), teacher(at/'runs'/'teacher-two', data, 2, 48, False)]


@pytest.fixture(scope='module')
def away(tmp_path_factory): return discs(tmp_path_factory.mktemp('away'), 7, train=3, val=3, test=4)


def refused(call, code, *words):
    with pytest.raises(FerError) as e: call()
    assert e.value.code == code and all(w in str(e.value) for w in words), str(e.value)
    assert '\n' not in str(e.value)


def test_members_of_different_datasets_are_refused(home, away, tmp_path):
    other = teacher(tmp_path/'teacher-away', away, 3)
    refused(lambda: E.fuse_teachers([*home[1], other]), 'softlabel_misaligned', 'different datasets', 'teacher-one', 'teacher-away')


def test_members_given_twice_are_refused(home, tmp_path):
    one, two = home[1]
    refused(lambda: E.fuse_teachers([one, two, one]), 'bad_parameter', 'teacher-one is given twice')
    refused(lambda: E.fuse_teachers([one, one.parent/'..'/one.parent.name/one.name]), 'bad_parameter', 'is given twice')
    copy = shutil.copytree(one, tmp_path/'under-another-name')
    refused(lambda: E.fuse_teachers([one, two, copy]), 'bad_parameter', 'under-another-name', 'same weights')


def test_members_with_rows_in_another_order_are_refused(home, tmp_path):
    one, two = home[1]
    turned = shutil.copytree(two, tmp_path/two.name)
    z = dict(np.load(two/'logits.npz'))
    for k in ('test', 'test_labels', 'test_ids'): z[k] = z[k][::-1]
    np.savez_compressed(turned/'logits.npz', **z)
    refused(lambda: E.fuse_teachers([one, turned]), 'softlabel_misaligned', 'another order')


def test_no_members_are_refused(): refused(lambda: E.fuse_teachers([]), 'bad_parameter', 'at least one teacher')


def fused(teachers, how='probs', **more):
    return E.fuse_teachers(teachers, how, resamples=20)[1] | {'weights': [.3, .7], 'temperature': 1.4} | more


# --- elsewhere

def test_other_data_is_judged_as_its_members_judge_it(home, away, tmp_path):
    "Every figure of another dataset, made again by hand; a test picture known from home is counted apart."
    from sklearn.metrics import accuracy_score, f1_score
    from fer_core.data.loader import Feeder, open_pack
    from fer_core.data.manifest import read_manifest, write_manifest
    from fer_core.models.backbones import load_model
    from fer_core.train.loop import predict_logits
    data, teachers = home
    known = shutil.copytree(data, tmp_path/'home')
    table, theirs = read_manifest(data/'classification_manifest.csv'), read_manifest(away/'classification_manifest.csv')
    test = theirs[theirs['split'] == 'test']
    table.loc[np.flatnonzero(table['split'] == 'train')[:5], 'sha256'] = test['sha256'].to_numpy()[:5]
    table.loc[np.flatnonzero(table['split'] == 'val')[:1], 'sha256'] = test['sha256'].to_numpy()[9]
    write_manifest(table, known/'classification_manifest.csv')
    run, fusion = Run.create(tmp_path/'ensemble', 'ensemble'), fused(teachers)
    shown = E.evaluate_elsewhere(run, known, teachers, fusion, [away])
    z, y = [], test['label'].map({c: i for i, c in enumerate(CLASSES)}).to_numpy()
    for t, flip in zip(teachers, (True, False)):
        model, spec, _ = load_model(t)
        pack = open_pack(away, spec)
        z.append(predict_logits(model, Feeder(pack), pack.rows('test'), flip=flip))
    p = sum(w*special.softmax(a.astype(np.float64)/T, 1) for w, a, T in zip((.3, .7), z, fusion['temperatures']))
    p = special.softmax(np.log(p)/1.4, 1)
    row, rest = shown.loc[('curate', 'ensemble')], np.setdiff1d(np.arange(len(y)), [0, 1, 2, 3, 4, 9])
    assert row['n'] == 28 and row['in_home_training'] == 5 and row['in_home_validation'] == 1 and row['n_rest'] == 22
    for tail, rows in (('', np.arange(len(y))), ('_rest', rest)):
        assert abs(row['accuracy' + tail] - accuracy_score(y[rows], p[rows].argmax(1))) < 1e-9
        assert abs(row['macro_f1' + tail] - f1_score(y[rows], p[rows].argmax(1), average='macro', labels=range(7), zero_division=0)) < 1e-9
        assert abs(row['ece' + tail] - slow_ece(p[rows], y[rows])) < 1e-5 and row['macro_f1_low' + tail] <= row['macro_f1' + tail] <= row['macro_f1_high' + tail]
    one = shown.loc[('curate', 'teacher-one')]
    assert abs(one['ece'] - slow_ece(special.softmax(z[0].astype(np.float64)/fusion['temperatures'][0], 1), y)) < 1e-5
    told = read_json(run.path('cross_dataset.json'))
    assert len({(r['dataset_sha256'], r['model']) for r in told}) == len(told) == 6 and {r['dataset'] for r in told} == {'home test', 'curate'}
    at_home = read_json(teachers[0]/'metrics.json')['test']
    mine = next(r for r in told if r['dataset'] == 'home test' and r['model'] == 'teacher-one')
    assert mine['macro_f1'] == at_home['macro_f1'] and mine['ece'] == at_home['ece_width'] and mine['gap'] == 0
    assert Run(run.folder).manifest.metrics['ensemble, curate'].n == 22


def test_a_home_of_several_sources_has_its_balanced_test(home, tmp_path):
    from fer_core.data.manifest import content_hash, read_manifest, write_manifest
    from fer_core.data.splits import mixed_test
    data, teachers = home
    several = shutil.copytree(data, tmp_path/'home')
    table = read_manifest(data/'classification_manifest.csv')
    table['source'] = np.where(np.arange(len(table)) % 3 == 0, 'a', 'b')
    write_manifest(table, several/'classification_manifest.csv')
    part = mixed_test(table)
    write_manifest(part, several/'test_all_sources.csv')
    shown = E.evaluate_elsewhere(Run.create(tmp_path/'ensemble', 'ensemble'), several, teachers, fused(teachers))
    row = shown.loc[('home test, balanced over sources', 'teacher-two')]
    assert 0 < row['n'] == len(part) < (table['split'] == 'test').sum() and row['sources'] == 'a+b' and row['dataset_sha256'] == content_hash(part)
    z = dict(np.load(teachers[1]/'logits.npz'))
    right = dict(zip(z['test_ids'], z['test'].argmax(1) == z['test_labels']))
    assert abs(row['accuracy'] - np.mean([right[i] for i in part['id']])) < 1e-9


def test_home_as_another_dataset_is_refused(home, away, tmp_path):
    run = Run.create(tmp_path/'ensemble', 'ensemble')
    for others in ([home[0]], [away, away]): refused(lambda: E.evaluate_elsewhere(run, home[0], home[1], fused(home[1]), others), 'bad_parameter', 'is the dataset of')


# --- soft labels

def export(run, home, fusion=None, data=None, **more):
    from fer_core.teach.softlabels import export_softlabels
    return export_softlabels(run, data or home[0], home[1], fusion or fused(home[1]), **({'views': 2, 'seed': 5} | more))


@pytest.fixture(scope='module')
def stored(home, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp('soft')/'ensemble', 'ensemble')
    return run.folder, export(run, home, average=2)


def pack_of(data, size=32):
    from fer_core.data.loader import open_pack
    from fer_core.data.preprocess import Preprocess
    return open_pack(data, Preprocess(size=size))


FILES = ('softlabels.npz', 'softlabels_index.jsonl', 'classorder.json', 'alignmentreport.json')


def test_plain_soft_labels_are_the_fused_test_logits(home, stored):
    "Exported and judged logits are two ways to the same numbers: rows, mirror averaging, fusion and temperature agree."
    from fer_core.teach.softlabels import read_softlabels
    fusion, pack = fused(home[1]), pack_of(home[0])
    want = E.fuse(E.read_members(home[1])[1], fusion['temperatures'], fusion['weights'], 'probs')/1.4
    got = read_softlabels(stored[0], pack).plain[pack.rows('test')].numpy()
    assert np.abs(got - want).max() < 2e-2 < np.abs(got - want[::-1]).max() and np.load(stored[0]/'softlabels.npz')['logits'].dtype == np.float16


def test_views_and_averages_are_what_the_members_say_of_the_very_crops(home, stored):
    from dataclasses import replace
    from fer_core.data.loader import Augment, Feeder
    from fer_core.models.backbones import load_model
    from fer_core.teach.softlabels import read_softlabels
    from fer_core.train.loop import predict_logits
    pack, fusion = pack_of(home[0]), fused(home[1])
    soft, train, every = read_softlabels(stored[0], pack), pack.rows('train'), np.arange(len(pack))
    def said(rows, view, augment):
        z = [predict_logits(load_model(t)[0], Feeder(pack_of(home[0], s), seed=5, augment=augment), rows, view=view) for t, s in zip(home[1], (32, 48))]
        return E.fuse(z, fusion['temperatures'], fusion['weights'], 'probs')/1.4
    assert np.abs(soft.views[1, train].numpy() - said(train, 1, Augment())).max() < 2e-2 and np.isnan(soft.views[:, pack.rows('test')].numpy()).all()
    mean = (soft.plain.numpy() + said(every, 2, replace(Augment(), erase=0.)) + said(every, 3, replace(Augment(), erase=0.)))/3
    assert np.abs(soft.averaged.numpy() - mean).max() < 2e-2 < np.abs(soft.averaged.numpy() - soft.plain.numpy()).max()
    worth = stored[1]['averaged']['worth']
    assert worth['test']['plain']['n'] == 42 and worth['test']['averaged']['macro_f1'] >= 0 and worth['val']['plain']['in_sample']


def test_soft_labels_of_other_rows_classes_or_files_are_refused(home, stored, away, tmp_path):
    from fer_core.teach.softlabels import read_softlabels
    pack = pack_of(home[0])
    read = lambda folder, p=pack: read_softlabels(folder, p)
    def harmed(name, change):
        folder = shutil.copytree(stored[0], tmp_path/name)
        change(folder)
        return folder
    refused(lambda: read(stored[0], pack_of(away)), 'softlabel_misaligned', 'dataset')
    turned = pack_of(home[0])
    turned.table = turned.table.iloc[::-1].reset_index(drop=True)
    refused(lambda: read(stored[0], turned), 'softlabel_misaligned', 'another order')
    def other_order(folder, name, key):
        told = read_json(folder/name)
        order = told[key] if key else told
        order[0], order[1] = order[1], order[0]
        write_json(folder/name, told)
    refused(lambda: read(harmed('report', lambda f: other_order(f, 'alignmentreport.json', 'class_order'))), 'class_order_mismatch', 'alignmentreport.json')
    refused(lambda: read(harmed('order', lambda f: other_order(f, 'classorder.json', None))), 'class_order_mismatch', 'classorder.json')
    cut = lambda f, name, n: (f/name).write_bytes((f/name).read_bytes()[:-n])
    refused(lambda: read(harmed('cut', lambda f: cut(f, 'softlabels.npz', 200))), 'hash_mismatch', 'softlabels.npz')
    refused(lambda: read(harmed('index', lambda f: cut(f, 'softlabels_index.jsonl', 9))), 'hash_mismatch', 'softlabels_index.jsonl')
    refused(lambda: read(harmed('gone', lambda f: (f/'softlabels.npz').unlink())), 'missing_checkpoint', 'softlabels.npz')
    def permuted(folder):
        z = dict(np.load(folder/'softlabels.npz'))
        np.savez_compressed(folder/'softlabels.npz', **z | {'logits': z['logits'][::-1]})
    refused(lambda: read(harmed('permuted', permuted)), 'hash_mismatch', 'softlabels.npz')


def test_soft_labels_of_the_first_version_are_read_and_their_faults_named(home, stored, tmp_path):
    "Reports of version 0.1 have no hashes of the files, nor what was averaged."
    from fer_core.teach.softlabels import read_softlabels
    old, pack = shutil.copytree(stored[0], tmp_path/'old'), pack_of(home[0])
    told = read_json(old/'alignmentreport.json')
    write_json(old/'alignmentreport.json', {k: told[k] for k in ('dataset_sha256', 'rows', 'rows_sha256', 'class_order', 'aligned', 'views', 'seed', 'augment', 'teachers', 'temperature')})
    assert read_softlabels(old, pack).plain.shape == (len(pack), 7)
    z = dict(np.load(old/'softlabels.npz'))
    np.savez_compressed(old/'softlabels.npz', **z | {'views': z['views'][:1]})
    refused(lambda: read_softlabels(old, pack), 'corrupt_artifact', 'views is of shape')
    np.savez_compressed(old/'softlabels.npz', **z | {'train_rows': z['train_rows'] + len(pack)})
    refused(lambda: read_softlabels(old, pack), 'corrupt_artifact', 'training rows')
    (old/'softlabels.npz').write_bytes((old/'softlabels.npz').read_bytes()[:400])
    refused(lambda: read_softlabels(old, pack), 'corrupt_artifact', 'unreadable')


KILLED = '''
import os, signal, sys, json
from fer_core.artifacts import Run
from fer_core.teach.softlabels import export_softlabels
folder, data, teachers, fusion = json.loads(sys.argv[1])
run = Run(folder)
def progress(done, total, text=''):
    if done >= 2.2: os.kill(os.getpid(), signal.SIGKILL)
run.progress = progress
export_softlabels(run, data, teachers, fusion, views=2, seed=5, average=2)
'''


def test_a_killed_export_continues_to_the_same_bytes(home, stored, tmp_path, monkeypatch):
    from fer_core.teach import softlabels
    run = Run.create(tmp_path/'ensemble', 'ensemble')
    done = subprocess.run([sys.executable, '-c', KILLED, json.dumps([str(run.folder), str(home[0]), [str(t) for t in home[1]], fused(home[1])])], timeout=200, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == -signal.SIGKILL and len(list(run.folder.glob('.view-*'))) == 2 and not run.path('softlabels.npz').exists()
    asked, real = [], softlabels.predict_logits
    monkeypatch.setattr(softlabels, 'predict_logits', lambda *args, **kw: asked.append(kw.get('view')) or real(*args, **kw))
    export(run, home, average=2)
    assert asked == [1, 1, 2, 2, 3, 3]  # the plain view and view 0 were there
    for name in FILES: assert (run.folder/name).read_bytes() == (stored[0]/name).read_bytes(), name
    assert not list(run.folder.glob('.view-*'))
    (run.folder/'alignmentreport.json').write_text('{}')  # as when the stage starts again and judges first
    export(run, home, average=2)
    assert len(asked) == 6 and (run.folder/'alignmentreport.json').read_bytes() == (stored[0]/'alignmentreport.json').read_bytes()


class Stop(Exception): pass


def test_answers_to_another_question_are_never_used(home, stored, tmp_path):
    "A fusion or a teacher that changed since the export was stopped is asked anew, every view."
    def stopped(folder, members, fusion):
        run = Run.create(folder, 'ensemble')
        def progress(done, total, text=''):
            if done >= 2.2: raise Stop
        run.progress = progress
        with pytest.raises(Stop): export(run, (home[0], members), fusion, average=2)
        assert len(list(run.folder.glob('.view-*'))) == 2
        return Run(folder)
    for i, other in enumerate(({'weights': [.5, .5]}, {'temperature': 2.}, {'fusion': 'logits'})):
        run = stopped(tmp_path/f'ensemble-{i}', home[1], fused(home[1], **other))
        export(run, home, average=2)
        assert (run.folder/'softlabels.npz').read_bytes() == (stored[0]/'softlabels.npz').read_bytes(), other
    moved = [shutil.copytree(t, tmp_path/'runs'/t.name) for t in home[1]]
    network(moved[0], 99)
    run = stopped(tmp_path/'ensemble-x', moved, fused(home[1]))
    shutil.rmtree(moved[0]); shutil.copytree(home[1][0], moved[0])  # the same folder, other weights
    export(run, (home[0], moved), average=2)
    assert (run.folder/'softlabels.npz').read_bytes() == (stored[0]/'softlabels.npz').read_bytes()


def test_soft_labels_over_another_manifest(home, away, tmp_path):
    from fer_core.teach.softlabels import read_softlabels
    run = Run.create(tmp_path/'ensemble', 'ensemble')
    export(run, home)
    export(run, home, data=away, into='softlabels-away')
    theirs, ours = read_softlabels(run.folder/'softlabels-away', pack_of(away)), read_softlabels(run.folder, pack_of(home[0]))
    assert len(theirs.plain) == len(pack_of(away)) and theirs.views.shape[0] == 2 and len(ours.plain) == len(pack_of(home[0]))
    refused(lambda: read_softlabels(run.folder, pack_of(away)), 'softlabel_misaligned')
    refused(lambda: read_softlabels(run.folder/'softlabels-away', pack_of(home[0])), 'softlabel_misaligned')


def test_a_manifest_that_is_all_test_has_plain_soft_labels(home, away, tmp_path):
    from fer_core.data.manifest import read_manifest, write_manifest
    from fer_core.teach.softlabels import read_softlabels
    only = shutil.copytree(away, tmp_path/'only')
    write_manifest(read_manifest(away/'classification_manifest.csv').assign(split='test'), only/'classification_manifest.csv')
    run = Run.create(tmp_path/'ensemble', 'ensemble')
    report = export(run, home, data=only, average=1, hints=4)
    soft = read_softlabels(run.folder, pack_of(only))
    assert report['views'] == 0 and len(soft.views) == 0 and np.isfinite(soft.averaged.numpy()).all() and set(report['averaged']['worth']) == {'test'}


def test_a_teacher_that_says_nothing_is_named(home, tmp_path):
    import torch
    from fer_core.models.backbones import save_model
    net, spec = network(tmp_path/'silent', 3)
    with torch.no_grad(): net.head.weight.fill_(float('nan'))
    save_model(tmp_path/'silent', net, spec)
    refused(lambda: export(Run.create(tmp_path/'ensemble', 'ensemble'), (home[0], [home[1][0], tmp_path/'silent']), fused(home[1])), 'nan_loss', 'silent')


# --- the stage

def test_the_stage_runs_with_everything_asked_for(home, away, tmp_path):
    from fer_core.runs.stage import run_stage
    from fer_core.teach.softlabels import read_softlabels
    given = {'data': str(home[0]), 'teachers': [str(t) for t in home[1]], 'fusion': 'auto', 'resamples': 20, 'others': [str(away)], 'views': 1, 'average': 1, 'export': str(away)}
    run = run_stage('ensemble', given, tmp_path)
    told = read_json(run.path('ensemble_metrics.json'))['fusion']
    assert {'weights', 'method', 'reason', 'temperatures', 'teachers', 'temperature', 'fusion', 'search', 'fusion_reason'} <= set(told) and told['teachers'] == ['teacher-one', 'teacher-two']
    assert {r['dataset'] for r in read_json(run.path('cross_dataset.json'))} == {'home test', 'curate'} and {v['gate'] for v in run.manifest.gates} == {'G-ensemble'}
    assert len(read_softlabels(run.path('softlabels-curate'), pack_of(away)).plain) == len(pack_of(away)) and read_softlabels(run.folder, pack_of(home[0])).averaged is not None
    assert {'teacher_0', 'teacher_1', 'data', 'elsewhere_0', 'softlabels_of'} == set(run.manifest.parents)
    hashed = read_json(run.path('hash_manifest.json'))
    assert {'cross_dataset.json', 'softlabels-curate/softlabels.npz', 'softlabels.npz'} <= set(hashed) and not any('.view' in f or '.finished' in f for f in hashed)
    cells = read_json(run.path('ensemble.ipynb'))['cells']
    assert sum('image/png' in o.get('data', {}) for c in cells for o in c.get('outputs', ())) == 3


# --- what the student's crop is taught by

@pytest.fixture(scope='module')
def lesson(home, stored, tmp_path_factory):
    "An ensemble run with everything a student may ask for."
    from fer_core.artifacts import parent
    folder = tmp_path_factory.mktemp('lesson')/'ensemble'
    run = Run.create(folder, 'ensemble')
    run.record(parents={f'teacher_{k}': parent(t, 'best.safetensors') for k, t in enumerate(home[1])})
    for name in FILES: shutil.copy(stored[0]/name, folder/name)
    write_json(folder/'ensemble_metrics.json', {'fusion': fused(home[1]) | {'teachers': [t.name for t in home[1]], 'dataset_sha256': pack_of(home[0]).dataset_sha256}})
    return folder


def test_live_teachers_say_what_was_stored_of_the_same_views(home, lesson):
    from fer_core.data.loader import Augment
    from fer_core.teach.softlabels import LiveTeachers, read_softlabels
    pack = pack_of(home[0])
    soft, live, rows = read_softlabels(lesson, pack), LiveTeachers(lesson, home[0], 5, Augment()), pack.rows('train')[::3]
    for view in (0, 1, 0):
        said = live[view, rows]
        assert (said - soft.views[view, rows]).abs().max() < 2e-2 < (said - soft.views[1 - view, rows]).abs().max()
    assert (live[7, rows] - live[0, rows]).abs().max() > 2e-2 # a view that nobody stored


@pytest.mark.parametrize('teaching', ['view', 'average', 'plain', 'live'])
def test_a_student_is_taught_by_what_it_asks_for(home, lesson, tmp_path, monkeypatch, teaching):
    from fer_core.data.loader import Augment
    from fer_core.distill import objective as O
    from fer_core.distill import student as S
    from fer_core.models.backbones import ModelConfig
    from fer_core.teach.softlabels import LiveTeachers, read_softlabels
    from fer_core.train.loop import TrainConfig
    heard, real = [], O.kd_loss
    monkeypatch.setattr(O, 'kd_loss', lambda z, t, *more: heard.append(t) or real(z, t, *more))
    asked, taught = [], O._taught
    monkeypatch.setattr(O, '_taught', lambda y, soft, view, rows, *more: asked.append((view, rows)) or taught(y, soft, view, rows, *more))
    pack, mine = pack_of(home[0]), Augment(rotate=40., erase=0.)
    run = Run.create(tmp_path/'student', 'student')
    S.train_student(run, home[0], 'kd', ModelConfig('resnet10t'), pack.spec, TrainConfig(epochs=3, batch_size=16, precision='32-true', seed=9), softlabels=lesson, augment=mine, teaching=teaching)
    soft, live = read_softlabels(lesson, pack), LiveTeachers(lesson, home[0], 9, mine)
    want = {'view': lambda v, r: soft.views[v, r], 'average': lambda v, r: soft.averaged[r], 'plain': lambda v, r: soft.plain[r], 'live': lambda v, r: live[v, r]}[teaching]
    assert {v for v, _ in asked} == ({0, 1} if teaching == 'view' else {0, 1, 2}) # two stored views, or a new one every epoch
    for (v, r), t in zip(asked, heard): assert (want(v, r) - t).abs().max() < 1e-5
    entry = run.manifest.parents['softlabels']
    assert (entry if isinstance(entry, dict) else entry.model_dump())['path'].endswith('ensemble_metrics.json' if teaching == 'live' else 'softlabels.npz')


def test_teaching_that_cannot_be(home, away, lesson, tmp_path):
    from fer_core.distill.student import train_student
    from fer_core.models.backbones import ModelConfig
    from fer_core.train.loop import TrainConfig
    n = iter(range(9))
    def train(data=home[0], **more): train_student(Run.create(tmp_path/f's{next(n)}', 'student'), data, 'kd', ModelConfig('resnet10t'), pack_of(home[0]).spec, TrainConfig(epochs=1), softlabels=lesson, **more)
    refused(lambda: train(teaching='all'), 'bad_parameter', "teaching 'all'")
    refused(lambda: train(teaching='live', loss={'hint': 1.}), 'bad_parameter', 'hint beside teaching=live')
    refused(lambda: train(away, teaching='live'), 'softlabel_misaligned', 'was made on dataset')

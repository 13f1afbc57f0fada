"Grids in plans, and the stage that puts their runs side by side."
import itertools, json
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from fer_core.artifacts import FerError, Run, parent, read_json, verify_hashes, write_json
from fer_core.labels import CLASSES
from fer_core.runs.plan import read_plan

COUNTS = (60, 20, 60, 90, 60, 50, 60)  # faces of each class, on validation and on test


# ---- plans ----

@pytest.fixture
def plan(tmp_path): # -> f(text, change) -> {step name: step}
    def read(text, change=None):
        (tmp_path/'plan.yaml').write_text(text)
        return {s.name: s for s in read_plan(tmp_path/'plan.yaml', change)}
    return read


GRID = '''
data: {stage: curate}
a: {stage: teacher, data: '@data', each: {seed: [0, 1, 2], gamma: [0, 2]}}
b: {stage: teacher, data: '@data', each: {seed: [0, 1, 2]}}
c: {stage: teacher, data: '@data'}
'''


def test_a_grid_is_every_combination_the_first_key_slowest(plan):
    steps = plan(GRID)
    wanted = [f'a[seed={s},gamma={g}]' for s, g in itertools.product((0, 1, 2), (0, 2))]
    assert [n for n in steps if n.startswith('a')] == wanted and len(steps) == 1 + 6 + 3 + 1
    one = steps['a[seed=1,gamma=2]']
    assert one.given == {'data': '@data', 'seed': 1, 'gamma': 2} and one.entry == 'a' and one.at == {'seed': 1, 'gamma': 2}
    assert steps['c'].name == steps['c'].entry == 'c' and steps['c'].at == {}


@pytest.mark.parametrize('teachers, expected', [
    ("['@b', '@c']", ['@b[seed=0]', '@b[seed=1]', '@b[seed=2]', '@c']),
    ("['@b[seed=1]', '@c']", ['@b[seed=1]', '@c']),
    ("['@a[gamma=2]']", ['@a[seed=0,gamma=2]', '@a[seed=1,gamma=2]', '@a[seed=2,gamma=2]']),
    ("['@a[gamma=2, seed=0]']", ['@a[seed=0,gamma=2]']),
    ("'@a[seed=0,gamma=2],@c'", ['@a[seed=0,gamma=2]', '@c'])])  # as a command line gives it
def test_a_list_takes_all_runs_of_a_reference(plan, teachers, expected):
    assert plan(GRID + f'e: {{stage: ensemble, data: "@data", teachers: {teachers}}}')['e'].given['teachers'] == expected


def test_a_step_takes_the_runs_of_its_own_value(plan):
    steps = plan(GRID + 'e: {stage: ensemble, data: "@data", each: {seed: [0, 2]}, teachers: ["@a", "@b", "@c"]}')
    assert steps['e[seed=2]'].given['teachers'] == ['@a[seed=2,gamma=0]', '@a[seed=2,gamma=2]', '@b[seed=2]', '@c']
    assert [n for n in steps if n.startswith('e')] == ['e[seed=0]', 'e[seed=2]']


def test_a_star_lifts_the_own_value(plan):
    steps = plan(GRID + 'e: {stage: ensemble, data: "@data", each: {seed: [0]}, teachers: ["@b[seed=*]"]}')
    assert steps['e[seed=0]'].given['teachers'] == ['@b[seed=0]', '@b[seed=1]', '@b[seed=2]']


def test_a_single_parameter_matches_over_the_same_key_and_chains(plan):
    text = GRID + '''
e: {stage: ensemble, data: '@data', each: {seed: [0, 1]}, teachers: ['@b']}
ce: {stage: student, data: '@data', phase: ce, each: {seed: [0, 1]}}
kd: {stage: student, data: '@data', phase: kd, each: {seed: [0, 1], alpha: [0.5, 0.9]}, before: '@ce', softlabels: '@e'}
one: {stage: student, data: '@data', phase: kd, before: '@ce[seed=1]', softlabels: '@e[seed=0]'}
'''
    steps = plan(text)
    assert steps['kd[seed=1,alpha=0.9]'].given == {'data': '@data', 'phase': 'kd', 'before': '@ce[seed=1]', 'softlabels': '@e[seed=1]', 'seed': 1, 'alpha': .9}
    assert (steps['one'].given['before'], steps['one'].given['softlabels']) == ('@ce[seed=1]', '@e[seed=0]')


@pytest.mark.parametrize('line, said', [
    ('s: {stage: student, data: "@data", phase: kd, before: "@b"}', ("stands for 3", "'@b[seed=0]'", 'expand s over seed')),
    ('s: {stage: student, data: "@data", phase: kd, before: "@a[seed=0]"}', ('stands for 2', 'over gamma too')),
    ('s: {stage: student, data: "@data", phase: kd, before: "@a", each: {seed: [0]}}', ('stands for 2', 'over gamma too')),
    ('s: {stage: student, data: "@data", phase: kd, before: "@b", each: {seed: [7]}}', ('no run with seed=7', "'@b[seed=2]'")),
    ('s: {stage: ensemble, data: "@data", teachers: ["@b[seed=9]"]}', ('no run with seed=9',)),
    ('s: {stage: ensemble, data: "@data", teachers: ["@b[lr=1]"]}', ("not expanded over 'lr'", 'its axes: seed')),
    ('s: {stage: ensemble, data: "@data", teachers: ["@c[seed=1]"]}', ("not expanded over 'seed'", 'its axes: none')),
    ('s: {stage: ensemble, data: "@data", teachers: ["@b[seed]"]}', ("not expanded over 'seed'",)),
    ('s: {stage: ensemble, data: "@data", teachers: ["@later"]}', ('no earlier step', 'data, a, b, c')),
    ('s: {stage: ensemble, data: "@data", teachers: ["@b[seed=1"]}', ('no earlier step',)),
    ('s: {stage: teacher, seed: 0, each: {seed: [0, 1]}}', ('both as a parameter and in each',)),
    ('s: {stage: teacher, each: [0, 1]}', ('write each: {seed: [0, 1]}',)),
    ('s: {stage: teacher, each: {seed: []}}', ('give it a list',)),
    ('s: {stage: teacher, each: {seed: 3}}', ('give it a list',)),
    ('s: {stage: teacher, each: {seed: [0, 0]}}', ('twice',)),
    ('s: {stage: teacher, each: {lr: [1, 1.0]}}', ('twice',)),
    ('s: {stage: teacher, each: {options: [[1, 2], [3, 4]]}}', ('an axis takes numbers',)),
    ('s: {stage: teacher, each: {backbone: ["a,b"]}}', ('an axis takes numbers',)),
    ('s: {stage: teacher, each: {seeds: [0, 1]}}', ("no parameter 'seeds'", "'seed'")),
    ('s: {stage: teacher, each: {seed: [0, x]}}', ("seed='x' is not an int",)),
    ('s: {stage: teacher, each: []}', ()), ('s: {stage: teacher, each: [{lr: 0.1}, {gamma: 2}]}', ('same parameters', 'or points as')), ('s: {stage: teacher, each: [{lr: 0.1}, {lr: 0.1}]}', ('a point twice',)),
    ('s: {stage: teacher, lr: 1.0, each: [{lr: 0.1}]}', ('both as a parameter and in each',)), ('s: {stage: teacher, each: [{options: [1]}]}', ('an axis takes numbers',)), ('s: {stage: teacher, each: [{seeds: 1}]}', ("no parameter 'seeds'",)),
    ('"s[0]": {stage: teacher}', ('plain word',))])
def test_what_a_plan_leaves_open_is_refused_before_it_runs(plan, line, said):
    with pytest.raises(FerError) as e: plan(GRID + line)
    assert e.value.code == 'bad_parameter' and all(s in str(e.value) for s in said), str(e.value)


def test_changes_from_outside_reach_all_runs_of_a_grid(plan):
    steps = plan(GRID, {'b': {'epochs': '1'}})
    assert [s.given.get('epochs') for s in steps.values() if s.entry == 'b'] == ['1']*3 and 'epochs' not in steps['c'].given
    steps = plan(GRID, {'b': {'epochs': '1'}, '*': {'epochs': '2'}})  # a step's own name has the last word, in any order
    assert {s.given['epochs'] for s in steps.values() if s.entry in 'ac'} == {'2'} and steps['b[seed=0]'].given['epochs'] == '1' and 'epochs' not in steps['data'].given
    steps = plan(GRID, {'*': {'each.seed': '0'}})
    assert list(steps) == ['data', 'a[seed=0,gamma=0]', 'a[seed=0,gamma=2]', 'b[seed=0]', 'c']
    assert [s for s in plan(GRID, {'c': {'each.lr': '0.1,0.2'}}) if s.startswith('c')] == ['c[lr=0.1]', 'c[lr=0.2]']


def test_a_list_of_points_is_what_it_says(plan):
    text = GRID + "p: {stage: teacher, data: '@data', each: [{lr: 0.1, batch_size: 64}, {lr: 0.2, batch_size: 128}]}\n"
    steps = plan(text + "e: {stage: ensemble, data: '@data', teachers: ['@p']}\nf: {stage: ensemble, data: '@data', teachers: ['@p[lr=0.2]']}")
    assert [s for s in steps if s.startswith('p')] == ['p[lr=0.1,batch_size=64]', 'p[lr=0.2,batch_size=128]'] and steps['p[lr=0.2,batch_size=128]'].given['batch_size'] == 128
    assert steps['e'].given['teachers'] == ['@p[lr=0.1,batch_size=64]', '@p[lr=0.2,batch_size=128]'] and steps['f'].given['teachers'] == ['@p[lr=0.2,batch_size=128]']
    assert [s for s in plan(text, {'p': {'each.seed': '0,1'}}) if s.startswith('p')] == [f'p[lr={lr},batch_size={b},seed={s}]' for lr, b in ((.1, 64), (.2, 128)) for s in (0, 1)]
    for change in ({'lr': '0.3'}, {'each.lr': '0.3'}):
        with pytest.raises(FerError, match='given by the points of p.each'): plan(text, {'p': change})


@pytest.mark.parametrize('change, said', [
    ({'b': {'seed': '5'}}, 'write --set b.each.seed=5'), ({'d': {'epochs': '1'}}, 'no step'), ({'x*': {'epochs': '1'}}, 'no step'),
    ({'b[seed=0]': {'epochs': '1'}}, 'no step'), ({'*': {'nonsense': '1'}}, 'has nonsense'), ({'b': {'each.seed': '0,0'}}, 'twice'), ({'b': {'each.seed': ''}}, 'give it a list')])
def test_changes_that_fit_nothing_are_refused(plan, change, said):
    with pytest.raises(FerError) as e: plan(GRID, change)
    assert e.value.code == 'bad_parameter' and said in str(e.value), str(e.value)


def test_a_grid_runs_resumes_and_hands_each_run_its_own_parents(plan, tmp_path, monkeypatch):
    "The order of a sweep, its references as folders, and the stop at a failing run."
    from fer_core.runs import plan as module
    asked, broken = [], {'b[seed=1]'}
    def run_stage(stage, given, root, reuse, fresh, show, timeout):
        name = f'{stage}-{len(asked)}'
        asked.append((stage, given))
        if stage == 'teacher' and given.get('seed') == 1 and broken: raise FerError('nan_loss', 'it went wrong')
        return Run.create(tmp_path/name, stage, given)
    monkeypatch.setattr(module, 'run_stage', run_stage)
    text = "data: {stage: curate}\nb: {stage: teacher, data: '@data', each: {seed: [0, 1]}}\ne: {stage: ensemble, data: '@data', each: {seed: [0, 1]}, teachers: ['@b']}"
    with pytest.raises(FerError): module.run_plan(list(plan(text).values()), tmp_path)
    assert len(asked) == 3
    asked.clear(); broken.clear()
    runs = module.run_plan(list(plan(text).values()), tmp_path)
    assert list(runs) == ['data', 'b[seed=0]', 'b[seed=1]', 'e[seed=0]', 'e[seed=1]']
    assert [runs[f'e[seed={s}]'].manifest.parameters['teachers'] for s in (0, 1)] == [[str(runs[f'b[seed={s}]'].folder)] for s in (0, 1)]


def test_missing_weights_of_a_grid_name_its_entry(plan, tmp_path):
    from fer_core.runs.plan import run_plan
    with pytest.raises(FerError) as e: run_plan(list(plan("data: {stage: curate}\nb: {stage: teacher, data: '@data', pretrained: nowhere.pth, each: {seed: [0, 1]}}").values()), tmp_path)
    assert '--set b.pretrained=FILE' in str(e.value)


def test_the_committed_plans_hold_together(root):
    for path in sorted((root/'papermill_runs').glob('*.yaml')): assert read_plan(path), path
    steps = read_plan(root/'papermill_runs'/'baselines_cpu.yaml')
    asked = {s.name: s for s in steps if s.stage == 'compare'}
    assert {n: (len(s.given['runs']), len(s.given['names'])) for n, s in asked.items()} == {'compare': (21, 7), 'others': (18, 6)}
    seeds = {s.name: s for s in steps if s.entry == 'ensemble'}
    assert all(f'[seed={n[-2]}]' in t for n, s in seeds.items() for t in s.given['teachers']) and len(seeds) == 3
    assert len(read_plan(root/'papermill_runs'/'baselines_cpu.yaml', {'*': {'each.seed': '0', 'epochs': '1'}})) == 13


# ---- runs to compare ----

def make_data(root, sha='d'*64, usage='PublicTest'):
    from fer_core.data.manifest import COLUMNS, write_manifest
    from fer_core.data.preprocess import Preprocess
    run, y = Run.create(root/'curate', 'curate'), np.tile(np.repeat(np.arange(7), COUNTS), 2)
    split = np.repeat(['val', 'test'], sum(COUNTS))
    table = pd.DataFrame({'id': [f'r{i}' for i in range(len(y))], 'label': [CLASSES[k] for k in y], 'source': 'fer2013', 'split': split, 'usage': np.where(split == 'test', usage, 'Training')})
    write_manifest(table.assign(**{c: 0 if c in ('width', 'height', 'quality') else '' for c in COLUMNS if c not in table}), run.path('classification_manifest.csv'))
    run.record(status='accepted', dataset={'sha256': sha, 'sources': ['fer2013'], 'splits': {'val': sum(COUNTS), 'test': sum(COUNTS)}})
    return SimpleNamespace(folder=run.folder, table=table, labels=y, rows=lambda s: np.flatnonzero(split == s), dataset_sha256=sha, spec=Preprocess(size=16), seen_in_training=lambda: np.zeros((split == 'test').sum(), bool))


def make_run(root, data, name, stage, noise, draw, parents=None, model=True, **given):
    "A run folder as its stage would leave it, with logits as right as `noise` lets them be."
    from fer_core.models.backbones import Classifier, ModelConfig, model_size, save_model
    from fer_core.runs.stage import fingerprint, resolve
    from fer_core.train.judge import write_verdict
    given = resolve(stage, {'data': str(data.folder), **given})
    run, rng = Run.create(root/name, stage, given, fingerprint=fingerprint(stage, given)), np.random.default_rng(draw)
    run.record(dataset={'sha256': data.dataset_sha256, 'sources': ['fer2013'], 'splits': {'test': sum(COUNTS)}}, parents=parents or {}, class_order=list(CLASSES), seeds={'train': given['seed']})
    write_verdict(run, data, {s: (3*(np.eye(7)[data.labels[data.rows(s)]] + rng.normal(0, noise, (len(data.rows(s)), 7)))).astype(np.float32) for s in ('val', 'test')}, stage)
    if stage == 'teacher' and model:
        net = Classifier(ModelConfig(given['backbone'], given['head']))
        save_model(run.folder, net, data.spec)
        run.record(compression=model_size(net, data.spec), reliability={'flip_averaged': given['gamma'] > 0})
    write_json(run.path('history.json'), [{'epoch': 1, 'seconds': 10. + draw}, {'epoch': 2, 'seconds': 5.}])
    run.finish()
    return run.folder


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    "Two teachers, plain and focal, and their ensemble, at two seeds each."
    root = tmp_path_factory.mktemp('sweep')
    data = make_data(root)
    plain = [make_run(root, data, f'teacher-plain{s}', 'teacher', .7, s, backbone='mobilenetv3_small_050', head='linear', seed=s, gamma=0) for s in (0, 1)]
    focal = [make_run(root, data, f'teacher-focal{s}', 'teacher', .55, 10 + s, backbone='mobilenetv3_small_050', head='linear', seed=s, gamma=2, class_power=1) for s in (0, 1)]
    both = [make_run(root, data, f'ensemble-{s}', 'ensemble', .45, 20 + s, {f'teacher_{i}': parent(t, 'logits.npz') for i, t in enumerate(pair)}, teachers=[str(t) for t in pair], seed=s) for s, pair in enumerate(zip(plain, focal))]
    return SimpleNamespace(root=root, data=data, plain=plain, focal=focal, both=both, all=[*plain, *focal, *both])


def compared(sweep, tmp_path, **more):
    from fer_core.runs.compare import Comparison
    return Comparison(Run.create(tmp_path/'compare', 'compare'), **({'data': sweep.data.folder, 'runs': sweep.all, 'n_boot': 200} | more))


# ---- statistics, against closed forms ----

def test_t_interval_is_students():
    from scipy import stats
    from fer_core.evaluate.paired import t_interval
    for x in ([.61, .63], [.5, .55, .52], np.random.default_rng(0).normal(size=9)):
        x = np.asarray(x, float)
        assert np.allclose(t_interval(x), (x.mean(), *stats.t.interval(.95, len(x) - 1, x.mean(), stats.sem(x))), rtol=0, atol=1e-12)
    assert t_interval([.61, .63])[2] - .62 == pytest.approx(12.706204736*.01, abs=1e-9)  # t.975 with one degree of freedom
    assert t_interval([.4]) == (.4, None, None)


def test_holm_is_the_step_down_rule():
    from fer_core.evaluate.paired import holm
    p = [.04, None, .001, .03, .5]
    order, worst, by_hand = [2, 3, 0, 4], 0., {}
    for rank, i in enumerate(order): worst = max(worst, min(1., (4 - rank)*p[i])); by_hand[i] = worst
    assert [v is None for v in holm(p)] == [False, True, False, False, False]
    assert all(holm(p)[i] == pytest.approx(v, abs=1e-15) for i, v in by_hand.items()) and by_hand[0] == by_hand[3] == .09
    assert holm([]) == [] and holm([None]) == [None]


def test_draws_of_faces_are_shared_and_right():
    from sklearn.metrics import f1_score
    from fer_core.evaluate.paired import bootstrap_macro_f1, bootstrap_p
    rng, y = np.random.default_rng(1), np.repeat(np.arange(7), COUNTS)
    decided = np.stack([np.where(rng.random(len(y)) < r, y, rng.integers(0, 7, len(y))) for r in (.5, .7)])
    draws, again = bootstrap_macro_f1(y, decided, 30, seed=3), np.random.default_rng(3)
    for b in range(30):
        i = again.integers(0, len(y), len(y))
        for k in (0, 1): assert draws[k, b] == pytest.approx(f1_score(y[i], decided[k, i], labels=range(7), average='macro', zero_division=0), abs=1e-12)
    assert (bootstrap_macro_f1(y, decided[[1]], 30, seed=3)[0] == draws[1]).all()  # a model's draws do not depend on its company
    assert bootstrap_p(draws[1] - draws[0]) == 2/31 and bootstrap_p(np.r_[-np.ones(50), np.ones(50)]) == 1. and bootstrap_p(np.zeros(9)) == 1.
    assert bootstrap_p(np.r_[-np.ones(3), np.ones(96)]) == 2*4/100


def test_the_interval_over_faces_agrees_with_the_bootstrap_of_statistics():
    from fer_core.evaluate.metrics import macro_f1
    from fer_core.evaluate.statistics import bootstrap_ci
    from fer_core.evaluate.paired import bootstrap_macro_f1
    rng, y = np.random.default_rng(2), np.repeat(np.arange(7), 5*np.array(COUNTS))
    decided = np.stack([np.where(rng.random(len(y)) < .6, y, rng.integers(0, 7, len(y))) for _ in range(3)])
    low, high = np.quantile(bootstrap_macro_f1(y, decided, 2000).mean(0), (.025, .975))
    other = bootstrap_ci(y, decided.T, lambda t, p: np.mean([macro_f1(p[:, k], t) for k in range(3)]), n_boot=1000, seed=5)
    assert abs(low - other.low) < .003 and abs(high - other.high) < .003 and low < other.estimate < high
    pooled = bootstrap_ci(np.tile(y, 3), decided.ravel(), 'macro_f1', n_boot=1000)
    single = np.ptp(np.quantile(bootstrap_macro_f1(y, decided[:1], 2000)[0], (.025, .975)))
    assert pooled.high - pooled.low < .75*single  # what three times as many faces would give: narrower than one network's own


def test_welch_is_welchs():
    from fer_core.evaluate.paired import welch_p
    from scipy import stats
    a, b = np.array([.61, .63, .60]), np.array([.64, .66, .65])
    va, vb = a.var(ddof=1)/3, b.var(ddof=1)/3
    t, df = (a.mean() - b.mean())/np.sqrt(va + vb), (va + vb)**2/(va**2/2 + vb**2/2)
    assert welch_p(a, b) == pytest.approx(2*stats.t.sf(abs(t), df), abs=1e-12)
    assert welch_p([.6], [.7, .8]) is None and welch_p([.6, .6], [.7, .7]) is None


# ---- grouping and refusals ----

def test_runs_that_differ_only_in_seeds_are_one_row(sweep, tmp_path):
    told = compared(sweep, tmp_path)
    assert {n: [j.folder.name for j in g] for n, g in told.groups.items()} == {
        'mobilenetv3_small_050 linear': ['teacher-plain0', 'teacher-plain1'],
        'mobilenetv3_small_050 linear, class power 1, gamma 2': ['teacher-focal0', 'teacher-focal1'],
        'ensemble of 2': ['ensemble-0', 'ensemble-1']}


def test_a_parameter_that_an_older_run_does_not_know_has_its_default(sweep, tmp_path):
    import shutil
    from fer_core.runs.compare import read_judged
    old = shutil.copytree(sweep.plain[1], tmp_path/'old')
    told = json.loads((old/'run.json').read_text())
    del told['parameters']['contrast'], told['parameters']['tau']
    (old/'run.json').write_text(json.dumps(told))
    assert read_judged(old)[0].settings == read_judged(sweep.plain[0])[0].settings


def test_a_students_backbone_counts_unless_it_continues_another_phase(sweep, tmp_path):
    from fer_core.runs.compare import group_runs, read_judged
    soft = parent(sweep.both[0], 'logits.npz')
    def student(name, phase, **more): return make_run(sweep.root, sweep.data, name, 'student', .5, 1, {'softlabels': soft} | ({'before': parent(more['before'], 'logits.npz')} if 'before' in more else {}), phase=phase, softlabels=str(sweep.both[0]), **more)
    scratch = [student(f'student-{b}-{tmp_path.name}', 'kd', backbone=b) for b in ('resemotenet_a', 'resemotenet_b')]
    assert [len(g) for g in group_runs([read_judged(f)[0] for f in scratch])] == [1, 1]
    later = [student(f'student-later{i}-{tmp_path.name}', 'dkd', before=str(scratch[0]), backbone=b, seed=i) for i, b in enumerate(('resnet18', 'resnet34'))]
    assert [len(g) for g in group_runs([read_judged(f)[0] for f in later])] == [2]
    other = student(f'student-other-{tmp_path.name}', 'dkd', before=str(scratch[1]), backbone='resnet18', seed=5)
    assert [len(g) for g in group_runs([read_judged(f)[0] for f in (later[0], other)])] == [1, 1]  # the phase before decides


def test_the_table_holds_the_means_of_its_runs(sweep, tmp_path):
    from scipy import stats
    told = compared(sweep, tmp_path)
    row = {r['model']: r for r in told.rows()}['mobilenetv3_small_050 linear']
    of = [read_json(f/'metrics.json') for f in sweep.plain]
    f1 = np.array([m['test']['macro_f1'] for m in of])
    assert row['macro_f1'] == pytest.approx(f1.mean()) and row['macro_f1_low'] == pytest.approx(stats.t.interval(.95, 1, f1.mean(), stats.sem(f1))[0])
    assert row['f1_disgust'] == pytest.approx(np.mean([m['test']['per_class']['disgust']['f1'] for m in of]))
    assert row['ece_raw'] == pytest.approx(np.mean([m['test_raw']['ece_width'] for m in of])) and row['nll'] == pytest.approx(np.mean([m['test']['nll'] for m in of]))
    assert row['train_seconds'] == pytest.approx(np.mean([15., 16.])) and row['params'] == Run(sweep.plain[0]).manifest.compression['params']
    both = {r['model']: r for r in told.rows()}['ensemble of 2']
    assert [r['mirror_averaged'] for r in told.rows()] == [False, True, True]  # an ensemble looks as its teachers do
    assert both['params'] == 2*row['params'] and both['mmacs'] == pytest.approx(2*row['mmacs']) and both['train_seconds'] == pytest.approx(np.mean([15 + 25, 16 + 26]))
    gains = [read_json(e/'metrics.json')['test']['macro_f1'] - max(read_json(t/'metrics.json')['test']['macro_f1'] for t in pair) for e, *pair in zip(sweep.both, sweep.plain, sweep.focal)]
    assert both['macro_f1_gain'] == pytest.approx(np.mean(gains))


def test_differences_are_paired_and_corrected(sweep, tmp_path):
    told = compared(sweep, tmp_path, n_boot=500)
    rows = told.against_first()
    first = told.rows()[0]
    assert [r['model'] for r in rows] == list(told.groups)[1:]
    for r in rows:
        d = told.draws[r['model']].mean(0) - told.draws[first['model']].mean(0)
        assert r['low'] <= r['difference'] <= r['high'] and r['p_faces'] == min(1, 2*(1 + min((d <= 0).sum(), (d >= 0).sum()))/501) <= r['p_faces_holm'] <= 1
    assert all(r['p_faces'] < .05 and r['difference'] > .05 for r in rows) and len(compared(sweep, tmp_path, runs=sweep.plain).differences()) == 0


def test_one_seed_has_no_interval(sweep, tmp_path):
    told = compared(sweep, tmp_path, runs=[sweep.plain[0], sweep.focal[0]])
    assert all(r['seeds'] == 1 and r['accuracy_low'] is None and r['macro_f1_faces_low'] < r['macro_f1'] < r['macro_f1_faces_high'] for r in told.rows())
    assert '±' not in told.results().to_string().split('\n', 1)[1].replace('± seeds', '') and told.against_first()[0]['p_seeds'] is None


def refusal(sweep, tmp_path, **more):
    with pytest.raises(FerError) as e: compared(sweep, tmp_path, **more)
    return e.value.code, str(e.value)


def test_runs_of_other_data_are_refused_by_name(sweep, tmp_path):
    strange = make_data(tmp_path/'strange', 'e'*64)
    alien = make_run(tmp_path, strange, 'teacher-alien', 'teacher', .5, 1, model=False)
    code, said = refusal(sweep, tmp_path, runs=[sweep.plain[0], alien])
    assert code == 'softlabel_misaligned' and 'teacher-alien' in said and 'eeeeeeeeeeee' in said and 'dddddddddddd' in said
    from fer_core.runs.compare import check_comparable, read_judged
    with pytest.raises(FerError) as e: check_comparable(read_judged(sweep.plain[0]) + read_judged(alien))
    assert 'teacher-alien' in str(e.value) and 'teacher-plain0' in str(e.value)


def test_runs_judged_on_other_faces_are_refused(sweep, tmp_path):
    from fer_core.data.preprocess import Preprocess
    few = SimpleNamespace(**vars(sweep.data))
    few.rows, few.spec = lambda s: sweep.data.rows(s)[:-7], Preprocess(size=16)
    short = make_run(tmp_path, few, 'teacher-short', 'teacher', .5, 1, model=False)
    code, said = refusal(sweep, tmp_path, runs=[sweep.plain[0], short])
    assert code == 'softlabel_misaligned' and 'teacher-short was judged on 393 test faces, teacher-plain0 on 400' in said
    other = SimpleNamespace(**vars(sweep.data))
    other.labels = other.labels[::-1].copy()
    mixed = make_run(tmp_path, other, 'teacher-mixed', 'teacher', .5, 1, model=False)
    assert 'disagree about the test labels' in refusal(sweep, tmp_path, runs=[sweep.plain[0], mixed])[1]


def test_what_is_no_comparison_is_refused(sweep, tmp_path):
    import shutil
    assert refusal(sweep, tmp_path, runs=[])[0] == 'bad_parameter'
    assert 'same settings with the same seeds' in refusal(sweep, tmp_path, runs=[sweep.plain[0], sweep.plain[0]])[1]
    assert 'is a curate run' in refusal(sweep, tmp_path, runs=[sweep.data.folder])[1]
    assert 'mini_resemotenet' in refusal(sweep, tmp_path, reference='chronologie')[1]
    code, said = refusal(sweep, tmp_path, names=['one', 'two'])
    assert code == 'bad_parameter' and 'ensemble of 2' in said
    assert refusal(sweep, tmp_path, names=['a', 'a', 'b'])[0] == 'bad_parameter'
    broken = shutil.copytree(sweep.plain[0], tmp_path/'broken')
    Run(broken).fail(code='nan_loss', what='loss is nan')
    assert 'has not ended: it is failed' in refusal(sweep, tmp_path, runs=[broken])[1]
    lonely = shutil.copytree(sweep.both[0], tmp_path/'lonely')
    told = json.loads((lonely/'run.json').read_text())
    told['parameters']['teachers'] = ['/nowhere/teacher-plain0', '/nowhere/teacher-focal0']
    (lonely/'run.json').write_text(json.dumps(told))
    code, said = refusal(sweep, tmp_path, runs=[lonely])
    assert code == 'missing_checkpoint' and 'teacher-plain0' in said


# ---- published figures ----

def test_published_rows_find_their_runs(sweep, tmp_path):
    told = compared(sweep, tmp_path, reference='chronology')
    t = told.published()
    assert t.groupby(level=0)['published as'].first().to_dict() == {'mobilenetv3_small_050 linear': 'plain CNN + CE', 'mobilenetv3_small_050 linear, class power 1, gamma 2': 'weighted focal', 'ensemble of 2': 'ensemble'}
    plain = t.loc[['mobilenetv3_small_050 linear']].iloc[0]
    assert plain['published'] == .512 and plain['difference'] == pytest.approx(told.rows()[0]['accuracy'] - .512)
    assert all(s in plain['why'] for s in ('another plain CNN', '224 px', '48 px grey', 'PublicTest', 'n = 400'))
    assert {p['name']: p['published'] for p in told.points()}['mobilenetv3_small_050 linear, class power 1, gamma 2'] == .432


@pytest.mark.parametrize('backbone, row', [('resemotenet', 'ResEmoteNet'), ('resemotenet_teacher', 'ResEmoteNet'), ('resemotenet_a', 'student A'), ('ResEmoteNet-B', 'student B'), ('resemotenet_c', 'student C'), ('resnet18', None)])
def test_resemotenets_find_their_rows(backbone, row):
    from fer_core.models.resemotenet import PARAMS
    from fer_core.runs.compare import REFERENCES, beside, figures_of
    from pathlib import Path
    found = beside(REFERENCES['mini_resemotenet'], SimpleNamespace(settings={'stage': 'student', 'backbone': backbone, 'phase': 'kd'}, folder=Path('nowhere')))
    assert (found and found.name) == row
    if row:
        figures, on = figures_of(found, ['rafdb_basic'])
        assert on == ('fer2013' if row == 'student C' else 'rafdb')
        assert figures['params'] == PARAMS[{'ResEmoteNet': 'teacher'}.get(row, row[-1])]


def test_published_students_of_resemotenet_differ_by_architecture_not_by_taste():
    from fer_core.runs.compare import REFERENCES
    table = {r.name: r.figures for r in REFERENCES['mini_resemotenet'].rows}
    assert [table[n]['fer2013']['accuracy'] for n in ('ResEmoteNet', 'student A', 'student B', 'student C')] == [.7979, .7642, .7020, .5858]
    assert [table[n]['rafdb']['accuracy'] for n in ('ResEmoteNet', 'student A', 'student B')] == [.9476, .8500, .8245] and 'rafdb' not in table['student C']


# ---- the stage ----

def test_the_stage_from_runs_to_files(sweep, tmp_path):
    "Papermill executes it on two variants and their ensemble at two seeds, timing included."
    from fer_core.runs.report import ancestors
    from fer_core.runs.stage import run_stage
    run = run_stage('compare', {'data': str(sweep.data.folder), 'runs': [str(f) for f in sweep.all], 'names': ['CE', 'weighted focal', 'both'], 'reference': 'chronology', 'timing': True, 'threads': 1, 'timed': 5}, tmp_path)
    assert run.manifest.status == 'accepted' and set(verify_hashes(run.folder).values()) == {'ok'}
    saved, flat = read_json(run.path('compare.json')), pd.read_csv(run.path('compare.csv')).set_index('model')
    assert [r['model'] for r in saved['rows']] == list(flat.index) == ['CE', 'weighted focal', 'both'] and saved['test'] == 'fer2013 PublicTest'
    assert flat.loc['CE', 'p50_ms'] > 0 and flat.loc['CE', 'peak_rss_mb'] > 10 and np.isnan(flat.loc['both', 'p50_ms'])
    assert flat.loc['CE', 'p50_ms'] == flat.loc['weighted focal', 'p50_ms'] and flat.loc['weighted focal', 'measured_on'] == 'CE'  # one architecture, one measurement
    assert flat.loc['weighted focal', 'published_macro_f1'] == .432 and flat.loc['both', 'published_macro_f1_gain'] == .034
    assert all(v['p_faces'] <= v['p_faces_holm'] for v in saved['against_first'])
    assert run.manifest.metrics['CE'].n == 400 and run.manifest.dataset['sha256'] == 'd'*64 and not run.manifest.metrics['CE'].in_sample
    assert {r.folder.name for r in ancestors(Run(run.folder))} >= {f.name for f in sweep.plain if f.parent == run.folder.parent} | {run.folder.name}
    assert {p.id for p in run.manifest.parents.values()} == {'curate', *(f.name for f in sweep.all)}
    page = json.loads(run.path('compare.ipynb').read_text())
    pictures = [o for c in page['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    shown = '\n'.join(''.join(o.get('data', {}).get('text/html', '')) + ''.join(o.get('data', {}).get('text/plain', '')) for c in page['cells'] for o in c.get('outputs', []))
    assert len(pictures) == 3 and 'weighted focal' in shown and 'another plain CNN' in shown and 'Holm seeds' in shown


def test_a_compress_run_is_two_rows_with_its_own_files(sweep, tmp_path):
    "The float and the INT8 file of one student, whose network is that of its config."
    from fer_core.models.backbones import Classifier, ModelConfig, save_model
    from fer_core.train.judge import judge_logits, save_logits
    student = make_run(tmp_path, sweep.data, 'student-ce', 'student', .5, 1, backbone='mobilenetv3_small_050', phase='ce')
    run = Run.create(tmp_path/'compress', 'compress', {'data': str(sweep.data.folder), 'student': str(student), 'calibration': 'gone', 'seed': 0})
    run.record(dataset=Run(student).manifest.dataset, parents={'student': parent(student, 'logits.npz')})
    save_model(run.folder, Classifier(ModelConfig('mobilenetv3_small_050')), sweep.data.spec, 'student')
    metrics, labels = {}, {s: sweep.data.labels[sweep.data.rows(s)] for s in ('val', 'test')}
    for k, v in enumerate(('fp32', 'int8')):
        logits = {s: (3*np.eye(7)[y] + np.random.default_rng(k).normal(0, 1.5, (len(y), 7))).astype(np.float32) for s, y in labels.items()}
        save_logits(run.path(f'logits_{v}.npz'), sweep.data, logits)
        metrics |= {f'{v}/{s}': m for s, m in judge_logits(logits, labels)[0].items()}
    write_json(run.path('metrics.json'), metrics)
    run.record(status='accepted', compression={'params': 600_000, 'mmacs': 1.5, 'variants': {'fp32': {'megabytes': 2.4, 'file': 'student.onnx'}, 'int8': {'megabytes': .7, 'file': 'student_int8.onnx'}}})
    told = compared(sweep, tmp_path, runs=[student, run.folder])
    assert list(told.groups) == ['mobilenetv3_small_050 student CE', 'mobilenetv3_small_050 FP32 ONNX', 'mobilenetv3_small_050 INT8 ONNX']
    rows = {r['model'].split()[-2]: r for r in told.rows()}
    assert rows['INT8']['megabytes'] == .7 and rows['FP32']['megabytes'] == 2.4 and rows['INT8']['accuracy'] == metrics['int8/test']['accuracy'] and rows['INT8']['train_seconds'] is None

"Plans in several processes, sweeps as figures, studies. Toy stages run as real kernels in real processes; runs to sweep have imagined logits."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import nbformat.v4 as v4, numpy as np, pandas as pd, pytest
from fer_core.artifacts import FAILURES, FerError, Run, parent, read_json, verify_hashes, write_json
from fer_core.runs.plan import needed, read_plan
from test_compare import make_data, make_run

FER = str(Path(sys.executable).parent/'fer')
CORES = len(os.sched_getaffinity(0))


# ---- toy stages ----

def toy_stage(folder, stage, given, body):
    "A notebook that notes when it ran, with how many threads, and does `body`."
    code = ("import json, os, time\nfrom pathlib import Path\nfrom fer_core.artifacts import FerError, write_json\nfrom fer_core.runs.stage import begin\n"
            f"run = begin('{stage}', globals())\nbegan, common = time.time(), Path(os.environ['TOY'])\n"
            "def note(): write_json(run.path('told.json'), {'began': began, 'ended': time.time(), 'threads': int(os.environ['OMP_NUM_THREADS']), 'pids': [os.getpid(), os.getppid()]})\nnote()\n"
            f"{body}\nnote()\nrun.finish()")
    cells = [v4.new_code_cell(f"{given}\nrun_dir: str = ''", metadata={'tags': ['parameters']}), v4.new_code_cell(code)]
    (folder/f'{stage}.ipynb').write_text(json.dumps(v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})))


MEET = '''
if meet: # goes on when so many are here: they must run at the same time
    (common/f'here-{lr}').touch()
    end = time.time() + 120
    while len(list(common.glob('here-*'))) < meet:
        if time.time() > end: raise FerError('timeout', 'nobody came')
        time.sleep(.05)
if lr > 1 and not (common/'mended').exists(): raise FerError('nan_loss', 'the loss is not finite')
if seed == 13 and not (common/'mended').exists(): os.kill(os.getppid(), 9); time.sleep(60) # as the system does when memory runs out
if hold and not (common/'mended').exists(): time.sleep(hold)
write_json(run.path('metrics.json'), {'val': {'macro_f1': .6 - abs(lr - .3)}, 'test': {'macro_f1': .5 + abs(lr - .3)}})
'''


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    "Toy stages, and the environment that names them."
    root = tmp_path_factory.mktemp('toys')
    (root/'stages').mkdir(); (root/'common').mkdir()
    toy_stage(root/'stages', 'curate', "faces: int = 0\ndata: str = ''", '')
    toy_stage(root/'stages', 'teacher', "data: str = ''\nseed: int = 0\nlr: float = 0.1\nmeet: int = 0\nhold: float = 0.0", MEET)
    toy_stage(root/'stages', 'ensemble', 'teachers: list = []', '')
    toy_stage(root/'stages', 'benchmark', "data: str = ''\ncompressed: str = ''", '')
    toy_stage(root/'stages', 'compare', 'runs: list = []\naborted: list = []', '')
    return SimpleNamespace(root=root, env=os.environ | {'FER_CORE_STAGES': str(root/'stages')})


def toy_plan(toys, name, text):
    "A plan of its own, a folder where its runs meet, and the command that runs it."
    home = toys.root/name
    (home/'common').mkdir(parents=True)
    (home/'plan.yaml').write_text(text)
    (home/'fer_core').mkdir()
    (home/'fer_core/__init__.py').write_text('raise SystemExit("the fer_core of the working directory, not that of the command")')
    env = toys.env | {'TOY': str(home/'common')}
    command = [FER, 'quickstart', '--plan', str(home/'plan.yaml'), '--out', str(home/'runs'), '--reports', str(home/'reports')]
    return SimpleNamespace(home=home, env=env, command=command, go=lambda *more: subprocess.run([*command, *more], env=env, cwd=home, capture_output=True, text=True, timeout=300))


def ended(done): return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()[1:2] and line.split()[1] in ('accepted', 'failed')}


def told(words): return read_json(Path(words[-1])/'told.json')


PLAN = '''
data: {stage: curate}
a: {stage: teacher, data: '@data', meet: 2, each: {lr: [0.1, 5.0]}}
twin: {stage: teacher, data: '@data', meet: 2, lr: 0.1}
dies: {stage: teacher, data: '@data', seed: 13}
time: {stage: benchmark, data: '@data'}
lost: {stage: ensemble, teachers: ['@dies']}
later: {stage: ensemble, teachers: ['@a[lr=0.1]', '@lost']}
page: {stage: compare, runs: ['@a']}
'''


@pytest.fixture(scope='module')
def apart(toys):
    "A plan with a run that fails and one whose process is killed, two at a time; and once more when both are mended."
    plan = toy_plan(toys, 'apart', PLAN)
    first = plan.go('--jobs', '2')
    (plan.home/'common'/'mended').touch()
    return SimpleNamespace(first=first, second=plan.go('--jobs', '2'), home=plan.home)


def test_independent_steps_run_at_the_same_time_and_in_order(apart):
    steps = ended(apart.first)
    data, one, page = (told(steps[n]) for n in ('data', 'a[lr=0.1]', 'page'))
    other = told(read_json(Path(steps['page'][-1])/'run.json')['parameters']['aborted'])
    assert data['ended'] <= min(one['began'], other['began']) and one['ended'] <= page['began']
    assert len(list((apart.home/'common').glob('here-*'))) == 2  # they met
    share = max(1, min(CORES//2, int(os.environ.get('OMP_NUM_THREADS') or CORES)))
    assert one['threads'] == other['threads'] == share


def test_what_measures_time_runs_alone(apart):
    steps = ended(apart.first)
    timed = told(steps['time'])
    others = [told(steps[n]) for n in ('data', 'a[lr=0.1]', 'page')]
    assert all(o['ended'] <= timed['began'] or timed['ended'] <= o['began'] for o in others)
    assert timed['threads'] == min(CORES, int(os.environ.get('OMP_NUM_THREADS') or CORES))


def test_a_failure_and_a_death_leave_the_others_alone(apart):
    steps = ended(apart.first)
    assert {n: w[0] for n, w in steps.items()} == {'data': 'accepted', 'a[lr=0.1]': 'accepted', 'a[lr=5.0]': 'failed', 'twin': 'accepted', 'dies': 'failed', 'time': 'accepted', 'page': 'accepted'}
    assert apart.first.returncode in (FAILURES['nan_loss'].exit_code, FAILURES['kernel_died'].exit_code)
    assert 'SIGKILL' in apart.first.stdout and 'Traceback' not in apart.first.stderr
    said = apart.first.stderr.strip().splitlines()[-1]
    assert '2 of 9 steps failed' in said and 'a[lr=5.0] (nan_loss)' in said and 'dies (kernel_died)' in said and 'not started for want of them: lost, later' in said


def test_two_steps_that_are_the_same_run_are_run_once(apart):
    steps = ended(apart.first)
    assert steps['twin'][-1] == steps['a[lr=0.1]'][-1] and steps['twin'][1] == 'reused'


def test_a_stage_that_can_do_without_is_told_what_failed(apart):
    one, two = (ended(d)['page'][-1] for d in (apart.first, apart.second))
    had, has = (read_json(Path(p)/'run.json')['parameters'] for p in (one, two))
    assert len(had['runs']) == 1 and len(had['aborted']) == 1 and read_json(Path(had['aborted'][0])/'run.json')['parameters']['lr'] == 5.
    assert one != two and has['aborted'] == [] and has['runs'] == [had['runs'][0], had['aborted'][0]]  # taken up again in its folder


def test_the_same_command_does_what_is_left(apart):
    one, two = ended(apart.first), ended(apart.second)
    assert apart.second.returncode == 0, apart.second.stderr
    assert {n for n, w in two.items() if w[1] == 'reused'} == {'data', 'a[lr=0.1]', 'twin', 'time'} and len(two) == 9
    assert all(two[n][-1] == one[n][-1] for n in ('data', 'a[lr=0.1]', 'time'))
    assert any('nan_loss' in n for n in read_json(Path(two['a[lr=5.0]'][-1])/'run.json')['notes'])


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError: return False


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks into /proc')
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_takes_its_processes_along(toys, how):
    plan = toy_plan(toys, f'stopped{how}', "data: {stage: curate}\na: {stage: teacher, data: '@data', hold: 300, each: {seed: [0, 1]}}")
    process = subprocess.Popen([*plan.command, '--jobs', '2'], env=plan.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end, under_way = time.monotonic() + 200, []
    while len(under_way) < 2 and time.monotonic() < end and process.poll() is None:
        time.sleep(.1)
        under_way = list((plan.home/'runs').glob('*-teacher-*/told.json'))
    assert len(under_way) == 2
    pids = [p for f in under_way for p in read_json(f)['pids']]
    process.send_signal(how)
    code, end = process.wait(100), time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < end: time.sleep(.1)
    assert not any(map(alive, pids))
    assert code == (-9 if how == signal.SIGKILL else FAILURES['interrupted'].exit_code)
    assert {read_json(f.parent/'run.json')['failure']['code'] for f in under_way} == {'interrupted'}
    curated = next((plan.home/'runs').glob('*-curate-*'))
    (plan.home/'common'/'mended').touch()
    again = plan.go('--jobs', '2')
    assert again.returncode == 0 and ended(again)['data'][1:] == ['reused', str(curated)] and {ended(again)[f'a[seed={s}]'][-1] for s in (0, 1)} == {str(f.parent) for f in under_way}


def test_a_part_of_a_plan_brings_what_it_stands_on(root, tmp_path):
    steps = read_plan(root/'papermill_runs'/'baselines_cpu.yaml')
    part = needed(steps, ['ensemble'])
    assert {s.entry for s in part} == {'data', 'plain', 'contrastive', 'cbam', 'arcface', 'ensemble'} and len(part) == 1 + 4*3 + 3
    assert [s.name for s in needed(steps, ['focal[seed=1]'])] == ['data', 'focal[seed=1]']
    with pytest.raises(FerError, match="no step 'fokal'"): needed(steps, ['fokal'])


@pytest.mark.parametrize('line, what, mend', [
    ('student: {stage: student, data: x, phase: dk}', "step student: parameter phase='dk' is none of", "did you mean 'dkd'"),
    ('two: {stage: teacher, data: x, each: {sampler: [none, balance]}}', "sampler='balance' is none of", "'balanced'"),
    ('wide: {stage: teacher, data: x, backbone: resnet1888}', "step wide: timm knows no backbone 'resnet1888'", 'list_models'),
    ('number: {stage: teacher, data: x, backbone: 18}', 'step number: timm knows no backbone 18', 'list_models'),
    ('two: {stage: student, data: x, phase: dml, peer: resnet1888}', "step two: timm knows no peer 'resnet1888'", 'list_models')])
def test_a_value_that_there_is_not_is_refused_before_the_first_step_runs(tmp_path, line, what, mend):
    from fer_core.runs.plan import run_plan
    plan, runs = tmp_path/'plan.yaml', tmp_path/'runs'
    plan.write_text(f'data: {{stage: curate}}\n{line}\n')
    with pytest.raises(FerError) as e: run_plan(read_plan(plan), runs)
    assert e.value.code == 'bad_parameter' and what in str(e.value) and mend in str(e.value) and not runs.exists()


def test_a_run_that_is_stopped_when_it_has_ended_stays_as_it_is(toys, tmp_path, monkeypatch):
    from fer_core.runs import stage
    def last_moment(name, run, given, timeout):
        run = Run(run.folder); run.finish()
        run.path('curate.ipynb').write_text('{}')
        raise KeyboardInterrupt
    monkeypatch.setenv('FER_CORE_STAGES', str(toys.root/'stages'))
    monkeypatch.setattr(stage, '_execute', last_moment)
    with pytest.raises(FerError, match='it stays accepted') as e: stage.run_stage('curate', {}, tmp_path)
    run = next(tmp_path.iterdir())
    assert e.value.code == 'interrupted' and set(verify_hashes(run).values()) == {'ok'}
    monkeypatch.setattr(stage, '_execute', None)
    assert stage.run_stage('curate', {}, tmp_path, reuse=True).folder == run


def test_a_hung_step_is_stopped_and_started_again(toys):
    plan = toy_plan(toys, 'hung', "data: {stage: curate}\na: {stage: teacher, data: '@data', hold: 300, each: {seed: [0]}}")
    done = plan.go('--jobs', '1', '--timeout', '6', '--retries', '1')
    assert done.returncode == FAILURES['timeout'].exit_code and done.stdout.count('timeout:') == 2 and done.stdout.count('it is started again') == 1, done.stderr
    assert len(list((plan.home/'runs').glob('*-teacher-*'))) == 1
    (plan.home/'common'/'mended').touch()
    assert plan.go('--jobs', '1', '--timeout', '60').returncode == 0


# ---- sweeps ----

A, B, SEEDS = (.5, 1., 2.), (2., 8.), (0, 1)


@pytest.fixture(scope='module')
def dkd(tmp_path_factory):
    "Students of two ensembles over α, β and seed; folders are named by nonsense."
    root = tmp_path_factory.mktemp('dkd')
    data = make_data(root)
    soft = make_run(root, data, 'ensemble-x', 'ensemble', .4, 99, seed=0)
    def student(name, noise, draw, **given): return make_run(root, data, name, 'student', noise, draw, {'softlabels': parent(soft, 'logits.npz')}, phase='dkd', softlabels=str(soft), **given)
    runs = {(a, b, s): student(f'student-{i:02x}beta9', .45 + .05*abs(a - 1) + .02*abs(b - 2), i, dkd_alpha=a, dkd_beta=b, seed=s) for i, (a, b, s) in enumerate((a, b, s) for a in A for b in B for s in SEEDS)}
    return SimpleNamespace(root=root, data=data, soft=soft, student=student, runs=runs)


def swept(dkd, tmp_path, runs=None, **more):
    from fer_core.runs.sweep import Sweeps
    folder = tmp_path/f'sweep-{len(list(tmp_path.iterdir()))}'
    return Sweeps(Run.create(folder, 'sweep'), dkd.data.folder, list(dkd.runs.values()) if runs is None else runs, **more)


@pytest.mark.parametrize('metric', ['macro_f1', 'nll', 'ece_width'])
def test_the_heat_map_holds_the_runs_own_figures(dkd, tmp_path, metric):
    from fer_core.runs.sweep import draw, surface
    grid = swept(dkd, tmp_path, metric=metric).grids[0]
    assert grid['axes'] == ['dkd_alpha', 'dkd_beta']
    own = {s: np.array([[np.mean([read_json(dkd.runs[a, b, k]/'metrics.json')[s][metric] for k in SEEDS]) for b in B] for a in A]) for s in ('val', 'test')}
    for s in own: assert np.allclose(surface(grid, s, 'dkd_alpha', 'dkd_beta'), own[s], rtol=0, atol=1e-12)
    at = np.unravel_index((np.argmax if metric == 'macro_f1' else np.argmin)(own['val']), own['val'].shape)
    assert grid['best'] == {'dkd_alpha': A[at[0]], 'dkd_beta': B[at[1]]}
    left, right = draw(grid).axes[:2]
    for ax, s in ((left, 'val'), (right, 'test')):
        assert [t.get_text() for t in ax.texts] == [f'{v:.3f}' for v in own[s].ravel()]
        frame = ax.patches[-1]
        assert (frame.get_y() + .48, frame.get_x() + .48) == pytest.approx(at)


def test_no_test_figure_takes_part_in_the_choice(dkd, tmp_path):
    before = swept(dkd, tmp_path).grids[0]
    home = tmp_path/'turned'
    shutil.copytree(dkd.root, home)
    turned = [home/f.name for f in dkd.runs.values()]
    for f in turned: write_json(f/'metrics.json', (m := read_json(f/'metrics.json')) | {s: m[s] | {'macro_f1': 1 - m[s]['macro_f1']} for s in ('test', 'test_raw')})
    after = swept(dkd, tmp_path, turned).grids[0]
    value = lambda g, s: [p[s]['mean'] for p in g['points']]
    assert np.allclose(np.add(value(before, 'test'), value(after, 'test')), 1) and np.argmax(value(after, 'test')) != np.argmax(value(after, 'val'))
    assert before['best'] == after['best'] and before['rivals'] == after['rivals']
    for f in turned: write_json(f/'metrics.json', (m := read_json(f/'metrics.json')) | {'val': m['val'] | {'macro_f1': 1 - m['val']['macro_f1']}})
    assert swept(dkd, tmp_path, turned).grids[0]['best'] != before['best']


def test_the_choice_is_the_best_mean_of_all_seeds():
    from fer_core.runs.sweep import choose, rivals
    values = [[.60, .62, .61], [.63, .65, .64], [.64, .66, .62], [.70, .70]]
    assert choose(values, 'macro_f1') == 1 and choose(values, 'nll') == 0 and choose([[.1], [.3]], 'accuracy') == 1
    se = np.sqrt(np.var(values[1], ddof=1)/3)
    assert rivals(values, 1) == [2] and abs(.64 - np.mean(values[0])) > se and rivals([[.1], [.3]], 1) is None


def test_axes_are_read_from_the_manifests_and_through_references(dkd, tmp_path):
    other = make_run(dkd.root, dkd.data, f'ensemble-{tmp_path.name}', 'ensemble', .4, 98, seed=0, views=7)
    runs = [dkd.runs[1., 2., 0], make_run(dkd.root, dkd.data, f'student-{tmp_path.name}', 'student', .5, 5, {'softlabels': parent(other, 'logits.npz')}, phase='dkd', softlabels=str(other), dkd_alpha=1., dkd_beta=2., seed=0)]
    assert swept(dkd, tmp_path, runs).grids[0]['axes'] == ['softlabels.views']


def refusal(dkd, tmp_path, **more):
    with pytest.raises(FerError) as e: swept(dkd, tmp_path, **more)
    return str(e.value)


def test_what_is_no_sweep_is_refused(dkd, tmp_path):
    assert 'two settings at dkd_alpha 0.5' in refusal(dkd, tmp_path, axes=['dkd_alpha']) and 'dkd_beta' in refusal(dkd, tmp_path, axes=['dkd_alpha'])
    assert 'do you mean dkd_alpha' in refusal(dkd, tmp_path, axes=['dkd_alfa']) and "no metric 'f1'" in refusal(dkd, tmp_path, metric='f1')
    assert 'nothing but their seeds' in refusal(dkd, tmp_path, runs=[dkd.runs[1., 2., s] for s in SEEDS])
    assert 'runs of one stage' in refusal(dkd, tmp_path, runs=[dkd.runs[1., 2., 0], dkd.soft])
    assert 'same settings with the same seeds' in refusal(dkd, tmp_path, runs=[*dkd.runs.values(), dkd.runs[1., 2., 0]])
    assert 'no sweep to show' in refusal(dkd, tmp_path, runs=[])
    more = [dkd.student(f'student-{i}{tmp_path.name}', .5, i, dkd_alpha=1., dkd_beta=2., seed=0, **{k: v}) for i, (k, v) in enumerate({'lr': .1, 'ema': .5, 'clip': 1., 'hint': 1.}.items())]
    assert '4 axes' in refusal(dkd, tmp_path, runs=[dkd.runs[1., 2., 0], *more])


def test_one_axis_is_a_line_and_three_are_pairs_of_maps(dkd, tmp_path):
    from fer_core.runs.sweep import draw
    one = swept(dkd, tmp_path, [dkd.runs[a, 2., s] for a in A for s in SEEDS]).grids[0]
    ax = draw(one).axes[0]
    means = [np.mean([read_json(dkd.runs[a, 2., s]/'metrics.json')['val']['macro_f1'] for s in SEEDS]) for a in A]
    first = ax.containers[0]
    assert first.get_label().startswith('validation') and np.allclose(first[0].get_ydata(), means) and list(first[0].get_xdata()) == list(A)
    cube = [dkd.runs[a, b, 0] for a in A for b in B] + [dkd.student(f'student-T{a}{b}{tmp_path.name}', .5, 3, dkd_alpha=a, dkd_beta=b, T=4., seed=0) for a in A for b in B]
    grid = swept(dkd, tmp_path, cube).grids[0]
    assert set(grid['axes']) == {'T', 'dkd_alpha', 'dkd_beta'} and grid['rivals'] is None and len([a for a in draw(grid).axes if a.texts]) == 4


# ---- reliability ----

def test_runs_count_by_how_they_ended(tmp_path):
    from fer_core.runs.sweep import outcome, reliability
    def run(name, notes=(), failed=''):
        r = Run.create(tmp_path/name, 'teacher')
        r.record(notes=list(notes))
        r.fail(code=failed, what='x') if failed else r.finish()
        return r.folder
    at = '2026-11-22T10:00:00+00:00 resumed'
    ends = {'fine': outcome(run('fine')), 'failed': outcome(run('failed', failed='nan_loss')), 'mended': outcome(run('mended', [f'{at} at commit abc after divergence'])),
            'stopped': outcome(run('stopped', [f'{at} after interrupted', f'{at} after running'])), 'going': outcome(Run.create(tmp_path/'going', 'teacher').folder)}
    assert ends == {'fine': '', 'failed': 'nan_loss', 'mended': 'divergence', 'stopped': '', 'going': 'interrupted'}
    grid = lambda **o: {'outcomes': o}
    new, old = grid(a='', b='nan_loss', c=''), [grid(d='', e=''), grid(f='', g='timeout'), grid(z='nan_loss')]
    found = reliability([new, dict(new), *old])  # a page made twice is one sweep, and the fourth is too old
    assert found['n'] == 3 and found['value'] == pytest.approx(5/7) and 'nan_loss, timeout' in found['from']
    assert reliability([grid(a=''), grid(a='nan_loss', b='')])['value'] == 1.  # what is known of a run last


# ---- the stage ----

def test_the_stage_from_runs_to_files(dkd, tmp_path):
    "Papermill executes it on a grid with a failed run, then on a page of two sweeps."
    from fer_core.runs.stage import run_stage
    failed = Run.create(tmp_path/'student-failed', 'student')
    failed.fail(code='nan_loss', what='the loss is not finite')
    stopped = Run.create(tmp_path/'stopped', 'student')
    run = run_stage('sweep', {'data': str(dkd.data.folder), 'runs': [str(f) for f in (*dkd.runs.values(), stopped.folder)], 'aborted': [str(failed.folder), 'kd[seed=3]']}, tmp_path)
    saved, flat = read_json(run.path('sweep.json')), pd.read_csv(run.path('sweep.csv'))
    assert run.manifest.status == 'accepted' and set(verify_hashes(run.folder).values()) == {'ok'}
    grid, = saved['grids']
    assert len(grid['points']) == 6 and len(flat) == 6 and grid['outcomes'] == {f.name: '' for f in dkd.runs.values()} | {'student-failed': 'nan_loss'} and grid['unfinished'] == ['stopped', 'kd[seed=3]']
    chosen = flat[flat['chosen']].iloc[0]
    own = [read_json(dkd.runs[chosen['dkd_alpha'], chosen['dkd_beta'], s]/'metrics.json') for s in SEEDS]
    assert chosen['test'] == pytest.approx(np.mean([m['test']['macro_f1'] for m in own])) and set(chosen['runs'].split()) == {dkd.runs[chosen['dkd_alpha'], chosen['dkd_beta'], s].name for s in SEEDS}
    recorded = {k.rpartition('/')[2]: m for k, m in run.manifest.metrics.items()}
    assert recorded['val'].in_sample and not recorded['test'].in_sample and recorded['test'].accuracy == pytest.approx(np.mean([m['test']['accuracy'] for m in own]))
    gate, = run.manifest.gates
    assert gate['rule'] == 'reliability.success' and gate['value'] == pytest.approx(12/13) and not gate['passed']
    page = json.loads(run.path('sweep.ipynb').read_text())
    pictures = [o for c in page['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    shown = '\n'.join(''.join(o.get('data', {}).get('text/html', '')) for c in page['cells'] for o in c.get('outputs', []))
    assert len(pictures) == 1 and 'student-failed' in shown and 'not started' in shown and 'chosen on validation' in shown
    both = swept(dkd, tmp_path, [dkd.runs[a, 2., s] for a in A for s in SEEDS], others=[run.folder])
    assert [g['axes'] for g in both.grids] == [['dkd_alpha'], ['dkd_alpha', 'dkd_beta']] and both.grids[1]['run'] == run.folder.name and len(both.best()) == 2


def test_the_committed_sweeps_share_runs_with_the_other_plans(root):
    from fer_core.runs.stage import resolve
    steps = {s.name: s for s in read_plan(root/'papermill_runs'/'sweeps_cpu.yaml')}
    twin = {s.name: s for s in read_plan(root/'papermill_runs'/'fer2013_cpu.yaml')} | {s.name: s for s in read_plan(root/'papermill_runs'/'baselines_cpu.yaml') if s.entry in ('plain', 'adjusted')}
    same = lambda a, b: resolve(steps[a].stage, steps[a].given) == resolve(twin[b].stage, twin[b].given)
    for mine, theirs in {'data': 'data', 'face': 'face', 'imagenet': 'imagenet', 'ensemble': 'ensemble', 'tau[tau=0.0,seed=1]': 'plain[seed=1]', 'tau[tau=1.0,seed=0]': 'adjusted[seed=0]'}.items(): assert same(mine, theirs), mine
    assert steps['ce[seed=0]'].given['options'] == steps['tau[tau=0.0,seed=1]'].given['options'] # the students are of the width of the τ sweep's network
    assert steps['dkd[dkd_alpha=1.0,dkd_beta=8.0,seed=1]'].given['before'] == '@kd[T=2.0,seed=1]' and len(steps) == 1 + 10 + 2 + 1 + 2 + 8 + 24 + 4
    assert {s.entry for s in needed(list(steps.values()), ['sweep_tau'])} == {'data', 'tau', 'sweep_tau'}


# ---- studies ----

STUDY = "data: {stage: curate}\nteacher: {stage: teacher, data: '@data', each: {seed: [0, 1]}}\n"
SPACE = ['lr=log:1e-4:1e-1', 'head=linear,cosine']


@pytest.fixture
def trial_runs(tmp_path, monkeypatch):
    "A plan whose runs are there at once: validation likes lr 0.01, test does not; `broken` maps the number of a trial to what it raises."
    from fer_core.runs import sweep as module
    pytest.importorskip('optuna')
    (tmp_path/'plan.yaml').write_text(STUDY)
    told, broken = [], {}
    def run_plan(steps, root, show=None, jobs=0):
        told.append({k: v for k, v in steps[-1].given.items() if k in ('lr', 'head')})
        if e := broken.pop(len(told), None): raise e
        out = {}
        for s in steps:
            r = Run.create(Path(root)/f'run-{len(told)}-{len(out)}', s.stage)
            good = 1/(1 + abs(np.log10(s.given.get('lr', 1)) + 2)) + .01*(s.given.get('head') == 'cosine') + .001*s.at.get('seed', 0)
            write_json(r.path('metrics.json'), {'val': {'macro_f1': good, 'nll': 1 - good}, 'test': {'macro_f1': 1 - good, 'nll': good}})
            out[s.name] = r
        return out
    monkeypatch.setattr(module, 'run_plan', run_plan)
    make = lambda name='runs', **more: module.Study(tmp_path/'plan.yaml', 'teacher', SPACE, root=tmp_path/name, **more)
    return SimpleNamespace(make=make, told=told, broken=broken)


def test_a_study_decides_on_validation_alone(trial_runs):
    study = trial_runs.make()
    found = study.run(14)
    good = {t['trial']: 1/(1 + abs(np.log10(t['teacher.lr']) + 2)) + .01*(t['teacher.head'] == 'cosine') + .0005 for t in found['trials']}
    assert len(found['trials']) == 14 and all(t['val macro_f1'] == pytest.approx(good[t['trial']]) for t in found['trials'])
    assert found['best']['trial'] == max(good, key=good.get) and found['best']['val'] == pytest.approx(max(good.values())) and found['best']['test'] == pytest.approx(1 - max(good.values()))
    assert not any('test' in k for t in found['trials'] for k in t) and read_json(study.folder/'study.json') == found
    assert len(found['best']['runs']) == 2 and all((study.root/r).is_dir() for r in found['best']['runs'])
    least = trial_runs.make('other', metric='nll').run(6)
    assert least['best']['val'] == min(t['val nll'] for t in least['trials'])


def test_a_study_that_was_stopped_goes_on_as_if_it_had_not_been(trial_runs):
    whole = trial_runs.make('whole').run(13)
    trial_runs.told.clear()
    trial_runs.broken |= {5: KeyboardInterrupt(), 9: FerError('interrupted', 'stopped at epoch 2')}
    with pytest.raises(KeyboardInterrupt): trial_runs.make('parts').run(13)
    with pytest.raises(FerError): trial_runs.make('parts').run(13)
    parts = trial_runs.make('parts').run(13)
    assert trial_runs.told[4] == trial_runs.told[5] and trial_runs.told[8] == trial_runs.told[9] and len(trial_runs.told) == 15  # taken up again with the same values
    of = lambda r: [(t['teacher.lr'], t['teacher.head'], t['val macro_f1']) for t in r['trials']]
    assert of(parts) == of(whole)
    assert len(trial_runs.make('parts').run(13)['trials']) == 13 and len(trial_runs.told) == 15  # nothing left to do
    assert trial_runs.make('parts', seed=1).folder != trial_runs.make('parts').folder


def test_a_random_study_draws_without_looking_back(trial_runs):
    drawn = lambda found: [(t['teacher.lr'], t['teacher.head']) for t in found['trials']]
    study = trial_runs.make('random', sampler='random')
    first = drawn(study.run(5)) + drawn(trial_runs.make('random', sampler='random').run(14))[5:]
    trial_runs.broken |= {n: FerError('nan_loss', 'not finite') for n in (16, 20)} # whatever came of earlier trials
    assert drawn(trial_runs.make('again', sampler='random').run(14)) == first and len(set(first)) == 14
    assert drawn(trial_runs.make('tpe').run(14)) != first and trial_runs.make('same').folder.name != study.folder.name
    with pytest.raises(FerError, match='tpe, random'): trial_runs.make(sampler='grid')


def test_two_processes_do_not_write_one_study(trial_runs):
    study, said = trial_runs.make(), []
    def meanwhile(*_):
        with pytest.raises(FerError, match='another process'): trial_runs.make().run(2)
        said.append(True)
    assert len(study.run(1, tell=meanwhile)['trials']) == 1 and said and len(trial_runs.make().run(2)['trials']) == 2


def test_failed_and_refused_trials_are_recorded_and_others_end_the_study(trial_runs):
    trial_runs.broken |= {2: FerError('nan_loss', 'not finite'), 3: FerError('bad_parameter', 'not together'), 5: FerError('disk_full', 'no space')}
    study = trial_runs.make()
    with pytest.raises(FerError, match='no space'): study.run(6)
    found = trial_runs.make().run(6)
    assert [(t['state'], t['code']) for t in found['trials']] == [('complete', ''), ('fail', 'nan_loss'), ('pruned', 'bad_parameter'), ('complete', ''), ('complete', ''), ('complete', '')]
    assert trial_runs.told[4] == trial_runs.told[5] and found['best']['trial'] in {t['trial'] for t in found['trials'] if t['state'] == 'complete'}


def test_without_optuna_the_error_says_what_to_install(tmp_path, monkeypatch):
    from fer_core.runs.sweep import Study
    monkeypatch.setitem(sys.modules, 'optuna', None)
    (tmp_path/'plan.yaml').write_text(STUDY)
    with pytest.raises(FerError) as e: Study(tmp_path/'plan.yaml', 'teacher', SPACE, root=tmp_path)
    assert e.value.code == 'bad_parameter' and "pip install 'fer_core[study]'" in str(e.value)


def test_a_study_from_the_command_line(toys):
    "A trial as a real run, then one more."
    pytest.importorskip('optuna')
    plan = toy_plan(toys, 'study', "data: {stage: curate}\nteacher: {stage: teacher, data: '@data'}\n")
    def go(trials, *more): return subprocess.run([FER, 'study', '--plan', str(plan.home/'plan.yaml'), '--step', 'teacher', '--trials', str(trials), '--space', 'lr=0.1:0.9', '--out', str(plan.home/'runs'), *more], env=plan.env | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    first = go(1)
    assert first.returncode == 0 and first.stdout.count('complete') == 1 and 'on validation' in first.stdout, first.stderr
    found = json.loads(go(2, '--json').stdout)
    assert len(found['trials']) == 2 and found['best']['val'] == pytest.approx(max(.6 - abs(t['teacher.lr'] - .3) for t in found['trials'])) and found['best']['test'] == pytest.approx(.5 + abs(found['best']['values']['teacher.lr'] - .3))
    assert len(list((plan.home/'runs').glob('2*-curate-*'))) == 1 and len(list((plan.home/'runs').glob('2*-teacher-*'))) == 2

"Runs executed again: toy stages in real kernels, a small model that is really trained, and everything that must be refused."
import hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import nbformat.v4 as v4, numpy as np, pytest
from fer_core.artifacts import FAILURES, FerError, Run, read_json, verify_hashes, write_hashes, write_json
from fer_core.evaluate.gates import evaluate_gates, gates_passed
from fer_core.evaluate.rules import read_rules
from fer_core.runs.reproduce import check_run, checklist, compare_environment, compare_files, compare_runs, find_rerun, made_from, path_evidence, recipe, reproduce
from fer_core.runs.stage import run_stage

FER = str(Path(sys.executable).parent/'fer')

DRAW = '''
rng = np.random.default_rng(seed)
y = rng.integers(0, 7, faces)
np.savez(run.path('faces.npz'), x=rng.normal(size=(7, 12))[y] + 1.2*rng.normal(size=(faces, 12)), y=y)
run.path('classification_manifest.csv').write_text('id,label\\n' + ''.join(f'{i},{k}\\n' for i, k in enumerate(y)))
run.record(dataset={'sha256': sha256_file(run.path('faces.npz')), 'splits': {'train': faces//2, 'test': faces - faces//2}}, seeds={'split': seed})
'''
TRAIN = '''
softmax = lambda z: np.exp(z - z.max(1, keepdims=True))/np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)
while os.environ.get('TOY_HOLD') and Path(os.environ['TOY_HOLD']).exists(): run.progress(1, 2, 'epoch 1/2'); time.sleep(.05)
z = np.load(Path(data)/'faces.npz')
x, y = z['x'], z['y']
half, rng, w = len(y)//2, np.random.default_rng(seed), np.zeros((12, 7))
if os.environ.get('TOY_DRIFT'): y = np.where(rng.random(len(y)) < .2, 0, y)
for _ in range(400):
    rows = rng.integers(0, half, 32)
    p = softmax(x[rows] @ w); p[np.arange(32), y[rows]] -= 1
    w -= lr * x[rows].T @ p / 32
p, t = softmax(x[half:] @ w), z['y'][half:]
got, sure, bins = p.argmax(1), p.max(1), np.linspace(0, 1, 16)
f1 = [2*((got == k) & (t == k)).sum()/((got == k).sum() + (t == k).sum()) for k in range(7)]
ece = sum(abs((sure[i] - (got == t)[i]).sum()) for i in (np.digitize(sure, bins[1:-1]) == b for b in range(15)))/len(t)
m = {'n': len(t), 'split': 'test', 'in_sample': False, 'accuracy': (got == t).mean(), 'macro_f1': np.mean(f1), 'ece_width': ece, 'nll': -np.log(p[np.arange(len(t)), t]).mean()}
np.savez(run.path('weights.npz'), w=w)
write_json(run.path('metrics.json'), {'test': m})
write_json(run.path('history.json'), [{'epoch': 1, 'seconds': time.perf_counter()}])
run.record(metrics={'teacher/test': m}, parents={'data': parent(data, 'classification_manifest.csv')}, dataset=Run(data).manifest.dataset, seeds={'train': seed})
'''


def stage(folder, name, given, body):
    "A stage notebook of its own."
    code = f"import os, time\nfrom pathlib import Path\nimport numpy as np\nfrom fer_core.artifacts import Run, parent, sha256_file, write_json\nfrom fer_core.runs.stage import begin\nrun = begin('{name}', globals())\n{body}\nrun.finish()"
    cells = [v4.new_code_cell(f"{given}\nrun_dir: str = ''", metadata={'tags': ['parameters']}), v4.new_code_cell(code)]
    (folder/f'{name}.ipynb').write_text(json.dumps(v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})))


def state_of(folder):
    "Hash of everything in a folder, hidden files too, but for reproductions."
    files = sorted(p for p in Path(folder).rglob('*') if p.is_file() and 'reproduced' not in p.relative_to(folder).parts)
    return hashlib.sha256(b''.join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    "A curate run, a teacher run made from it, and the teacher's rerun; states of the folders before."
    home, patch = tmp_path_factory.mktemp('again'), pytest.MonkeyPatch()
    (home/'stages').mkdir()
    stage(home/'stages', 'curate', "data: str = ''\nfaces: int = 840\nseed: int = 0", DRAW)
    stage(home/'stages', 'teacher', "data: str = ''\nlr: float = 0.1\nseed: int = 0", TRAIN)
    for k, v in {'FER_CORE_STAGES': str(home/'stages'), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}.items(): patch.setenv(k, v)
    (home/'raw').mkdir()
    curated = run_stage('curate', {'data': str(home/'raw'), 'seed': 3}, home/'runs')
    teacher = run_stage('teacher', {'data': str(curated.folder), 'lr': .2, 'seed': 1}, home/'runs')
    before = state_of(home/'runs')
    report = reproduce(teacher.folder)
    yield SimpleNamespace(home=home, runs=home/'runs', curated=curated.folder, teacher=teacher.folder, before=before, report=report, again=Path(report['rerun_folder']))
    patch.undo()


@pytest.fixture
def copy(toys, tmp_path):
    "The two runs in another place, to be spoilt."
    for f in (toys.curated, toys.teacher): shutil.copytree(f, tmp_path/'runs'/f.name)
    return SimpleNamespace(runs=tmp_path/'runs', curated=tmp_path/'runs'/toys.curated.name, teacher=tmp_path/'runs'/toys.teacher.name)


@pytest.fixture
def fer(capsys, monkeypatch):
    "The command line in this process: f(words) -> exit code, stdout, stderr."
    from fer_core.cli import main
    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['fer', *map(str, words)])
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try: main(); code = 0
        except SystemExit as e: code = e.code
        finally: signal.signal(signal.SIGTERM, before)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return call


def refused(code, folder, *words):
    "Refused with a code and one sentence, and nothing was executed."
    with pytest.raises(FerError) as e: reproduce(folder)
    assert e.value.code == code and all(w in str(e.value) for w in words) and '\n' not in str(e.value), str(e.value)
    assert not (Path(folder).parent/'reproduced').exists()


# ---- what is the same ----

def test_a_rerun_is_a_new_run_with_the_same_bytes(toys):
    assert toys.again != toys.teacher and toys.report['verdict'] == 'reproduced' and toys.report['decided_by'] == 'G-repro'
    assert (toys.again/'weights.npz').read_bytes() == (toys.teacher/'weights.npz').read_bytes()
    assert (toys.again/'run.json').stat().st_mtime > (toys.teacher/'run.json').stat().st_mtime # executed, not copied
    states = {f['file']: (f['state'], f['how']) for f in toys.report['files']}
    assert states['weights.npz'] == ('identical', '') and states['history.json'] == ('differs', 'seconds') and states['teacher.ipynb'][0] == 'differs'
    assert toys.report['environment'] == [] and toys.report['code']['same_notebook'] and toys.report['parameters'] == []


def test_the_old_runs_are_only_read(toys): assert state_of(toys.runs) == toys.before


def test_the_gate_is_decided_from_the_rerun(toys, fer):
    m = Run(toys.again).manifest
    rules = {r['metric']: r for r in read_rules('gates') if r['gate'] == 'G-repro'}
    assert {v['rule']: v['threshold'] for v in m.gates} == {k: r['threshold'] for k, r in rules.items()} and all(v['passed'] and v['value'] == 0 and v['n'] == 420 for v in m.gates)
    assert set(verify_hashes(toys.again).values()) == {'ok'} and read_json(toys.again/'reproduce.json')['run'] == toys.teacher.name
    done = fer('report', 'gates', toys.again)
    assert done.code == 0 and done.out.count('G-repro') == 2 and '2 of 2 rules passed' in done.out


def test_the_chain_is_executed_in_order_and_stands_on_itself(toys):
    seen = []
    report = reproduce(toys.teacher, toys.home/'elsewhere', parents=True, tell=lambda r: seen.append(r['stage']))
    again = Run(report['rerun_folder'])
    assert seen == ['curate', 'teacher'] and report['verdict'] == 'reproduced' and [p['verdict'] for p in report['parents']] == ['reproduced']
    entry = again.manifest.parents['data']
    assert entry.id == report['parents'][0]['rerun'] != toys.curated.name and Path(entry.path).parent.parent == again.folder.parent
    assert again.manifest.dataset['sha256'] == Run(toys.teacher).manifest.dataset['sha256'] and state_of(toys.runs) == toys.before


def test_runs_that_were_moved_are_found_beside_each_other(toys, copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = check_run(Path('runs')/copy.teacher.name)
    assert [r.folder.name for r in made_from(run)] == [toys.curated.name, toys.teacher.name]
    assert recipe(run)[0] == {'data': str(Path('runs')/copy.curated.name), 'lr': .2, 'seed': 1}


def test_paths_are_read_from_where_the_run_was_started(toys, copy, monkeypatch, tmp_path):
    m = read_json(copy.curated/'run.json')
    m['parameters'] |= {'data': 'raw', 'run_dir': f'runs/{copy.curated.name}'}
    write_json(copy.curated/'run.json', m)
    (tmp_path/'raw').mkdir(); (tmp_path/'other').mkdir()
    monkeypatch.chdir(tmp_path/'other')
    assert recipe(Run(copy.curated))[0]['data'] == str(tmp_path/'raw')


# ---- what is not ----

def test_other_figures_fail_the_gate(copy, fer, monkeypatch):
    monkeypatch.setenv('TOY_DRIFT', '1')
    done = fer('reproduce', copy.teacher, '--json')
    report = json.loads(done.out)
    assert done.code == FAILURES['gate_rejected'].exit_code and len([l for l in done.err.splitlines() if l.startswith('fer: ')]) == 1
    a, b = (read_json(f/'metrics.json')['test'] for f in (copy.teacher, Path(report['rerun_folder'])))
    moved = next(v for v in report['gates'] if v['rule'] == 'repro.macro_f1_change')
    assert moved['value'] == pytest.approx(abs(a['macro_f1'] - b['macro_f1'])) and moved['value'] > .005 and report['verdict'] == 'not reproduced'
    assert 'largest difference' in {f['file']: f['how'] for f in report['files']}['weights.npz']
    assert not gates_passed(evaluate_gates(path_evidence(copy.teacher), 'G-repro')) and checklist([copy.teacher]).answer['rerun'] == 'no'


@pytest.mark.parametrize('key, change, fails', [('macro_f1', .0051, True), ('macro_f1', -.0051, True), ('macro_f1', .0049, False), ('ece_width', .0051, True), ('ece_width', -.0049, False), ('n', -1, True), ('nll', .5, False)])
def test_a_tampered_metric(toys, copy, key, change, fails):
    m = read_json(copy.teacher/'run.json')
    m['metrics']['teacher/test'][key] += change
    write_json(copy.teacher/'run.json', m)
    report = compare_runs(Run(copy.teacher), Run(toys.again))
    assert (report['verdict'] == 'not reproduced') == fails == bool(report['reasons'])


def test_a_set_that_is_no_longer_judged(toys, copy):
    m = read_json(copy.teacher/'run.json')
    m['metrics']['teacher/elsewhere'] = m['metrics']['teacher/test']
    write_json(copy.teacher/'run.json', m)
    report = compare_runs(Run(copy.teacher), Run(toys.again))
    assert report['verdict'] == 'not reproduced' and 'not at all in the rerun' in report['reasons'][0]


def test_a_run_without_figures_is_decided_by_its_files(toys, tmp_path):
    a, b = (Run.create(tmp_path/n, 'curate') for n in 'ab')
    for r, rows in ((a, 'id\n1\n'), (b, 'id\n1\n')): r.path('rows.csv').write_text(rows); r.finish()
    assert compare_runs(a, b)['verdict'] == 'reproduced' and compare_runs(a, b)['decided_by'] == 'files'
    b.path('rows.csv').write_text('id\n2\n'); b.finish()
    assert compare_runs(a, b)['reasons'] == ['rows.csv differs: id']
    b.path('rows.csv').unlink(); b.finish()
    assert [(f['file'], f['state']) for f in compare_files(a.folder, b.folder)] == [('rows.csv', 'only then')]


def test_every_other_package_is_named():
    then = {'python': '3.11.7', 'cores': 2, 'packages': {'torch': '2.1', 'numpy': '2.0', 'gone': '1'}}
    now = {'python': '3.12.0', 'cores': 2, 'packages': {'torch': '2.2', 'numpy': '2.0'}}
    assert {(e['what'], e['then'], e['now']) for e in compare_environment(then, now)} == {('python', '3.11.7', '3.12.0'), ('torch', '2.1', '2.2'), ('gone', '1', None)}


# ---- what is refused ----

def test_a_changed_file_is_refused(copy):
    write_json(copy.teacher/'metrics.json', {'test': {'macro_f1': .99}})
    refused('hash_mismatch', copy.teacher, 'metrics.json')


def test_a_changed_or_missing_parent_is_refused(copy, toys, monkeypatch):
    with open(copy.curated/'faces.npz', 'ab') as f: f.write(b'x') # a file that the parent entry does not even name
    refused('hash_mismatch', copy.teacher, 'faces.npz', toys.curated.name)
    (copy.curated/'classification_manifest.csv').write_text('id,label\n')
    write_hashes(copy.curated) # consistent in itself, and still not what was read
    refused('hash_mismatch', copy.teacher, 'classification_manifest.csv')
    shutil.rmtree(copy.curated)
    m = read_json(copy.teacher/'run.json')
    m['parents']['data']['path'] = f'gone/{toys.curated.name}/classification_manifest.csv'
    write_json(copy.teacher/'run.json', m)
    refused('missing_checkpoint', copy.teacher, toys.curated.name)


@pytest.mark.parametrize('change, code, words', [
    ({'status': 'failed', 'failure': {'code': 'nan_loss', 'what': 'x', 'mend': 'y'}}, 'missing_checkpoint', 'failed (nan_loss)'), ({'status': 'running'}, 'missing_checkpoint', 'has not ended'),
    ({'stage': 'train'}, 'bad_parameter', "stage 'train'"), ({'metrics': {'x': {'n': 'many'}}}, 'corrupt_artifact', 'does not fit the schema')])
def test_a_run_that_cannot_be_repeated(copy, change, code, words):
    write_json(copy.curated/'run.json', read_json(copy.curated/'run.json') | change)
    refused(code, copy.curated, words)


def test_data_that_are_gone_and_folders_that_are_no_runs(copy, tmp_path):
    m = read_json(copy.curated/'run.json')
    m['parameters']['data'] = str(tmp_path/'deleted')
    write_json(copy.curated/'run.json', m)
    refused('missing_file', copy.curated, 'deleted', 'no longer there')
    refused('missing_file', tmp_path, 'no run folder')


def test_a_stage_that_has_gained_or_lost_a_parameter(copy, toys, monkeypatch, tmp_path):
    monkeypatch.setenv('FER_CORE_STAGES', str(tmp_path))
    stage(tmp_path, 'teacher', "data: str = ''\nlr: float = 0.1\nseed: int = 0\nmixup: float = 0.0", '')
    given, notes = recipe(Run(copy.teacher))
    assert 'mixup' not in given and notes == ['the stage has gained mixup=0.0 since']
    stage(tmp_path, 'teacher', "data: str = ''\nseed: int = 0", '')
    refused('bad_parameter', copy.teacher, 'lr', 'no longer has')


# ---- stopped and continued, and again ----

def test_interrupted_it_goes_on_in_the_same_folder(copy, tmp_path, fer):
    (hold := tmp_path/'hold').touch()
    process = subprocess.Popen([FER, 'reproduce', str(copy.teacher)], env=os.environ | {'TOY_HOLD': str(hold)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list((copy.runs/'reproduced').glob('*/*/*/progress.json')) and time.monotonic() < end and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == FAILURES['interrupted'].exit_code and 'run the same command again' in said
    done = fer('reproduce', copy.teacher)
    assert done.code == 0 and 'reproduced (by G-repro)' in done.out, done.err
    folders = [p.parent for p in (copy.runs/'reproduced').glob('*/*/*/run.json')]
    assert len(folders) == 1 and any('resumed' in n for n in Run(folders[0]).manifest.notes)
    assert find_rerun(copy.teacher)['rerun'] == folders[0].name


def test_a_rerun_speaks_only_of_the_run_that_it_repeated(toys, copy):
    shutil.copytree(toys.runs/'reproduced', copy.runs/'reproduced')
    assert find_rerun(copy.teacher)['verdict'] == 'reproduced' and gates_passed(evaluate_gates(path_evidence(copy.teacher, [copy.curated]), 'G-repro'))
    assert path_evidence(copy.curated, [copy.teacher]) == {} # the model that stands was not repeated
    m = read_json(copy.teacher/'run.json')
    for spoil in (lambda m: m['metrics']['teacher/test'].update(macro_f1=.99), lambda m: m.update(experiment_id='other')):
        changed = json.loads(json.dumps(m)); spoil(changed)
        write_json(copy.teacher/'run.json', changed)
        assert (find_rerun(copy.teacher) is None) == (changed['metrics'] != m['metrics'])
    write_json(copy.teacher/'run.json', m)
    told = next((copy.runs/'reproduced').glob('*/*/*/reproduce.json'))
    write_json(told, read_json(told) | {'verdict': 'perfect'})
    assert find_rerun(copy.teacher) is None # a report that was edited
    write_json(told, read_json(told) | {'verdict': 'reproduced'}); assert find_rerun(copy.teacher)
    np.savez(copy.teacher/'weights.npz', w=np.zeros(3)); write_hashes(copy.teacher)
    assert find_rerun(copy.teacher) is None and path_evidence(copy.teacher) == {}


def test_the_checklist(toys, copy, fer):
    table = checklist([copy.curated, copy.teacher])
    assert list(table.index) == ['seeds', 'commit', 'hashes', 'environment', 'calibration', 'compression', 'latency', 'reliability', 'rerun']
    assert {i: table.answer[i] for i in ('seeds', 'hashes', 'environment', 'calibration', 'latency', 'rerun')} == {'seeds': 'yes', 'hashes': 'yes', 'environment': 'yes', 'calibration': 'not measured', 'latency': 'not measured', 'rerun': 'not measured'}
    for dirty, answer in ((False, 'yes'), (True, 'no')):
        for f in (copy.curated, copy.teacher): Run(f).record(git={'commit': 'a'*40, 'dirty': dirty})
        assert checklist([copy.curated, copy.teacher]).answer['commit'] == answer
    named = checklist([copy.curated, copy.teacher, toys.again]) # a rerun that lies elsewhere is named
    assert named.answer['rerun'] == 'yes' and toys.again.name in named.runs['rerun'] and toys.again.name not in named.runs['seeds']
    (copy.teacher/'weights.npz').unlink()
    assert checklist([copy.teacher]).answer['hashes'] == 'no' and 'weights.npz' in checklist([copy.teacher]).evidence['hashes']
    done = fer('report', 'checklist', toys.curated, toys.teacher)
    assert done.code == 0 and '1 of 1 reruns within the gate' in done.out and len(done.out.splitlines()) >= 9

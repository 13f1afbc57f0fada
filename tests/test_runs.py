"Stages as a user runs them: the `fer` command, papermill, interruptions, bad input. Tiny models, real runs."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest
from fer_core.artifacts import FAILURES

FER = str(Path(sys.executable).parent/'fer')
TINY = ['-p', 'backbone=mobilenetv3_small_050', '-p', 'size=32', '-p', 'batch_size=16', '-p', 'output_stride=16', '-p', 'lr=0.003']


def fer(*words, out, check=0, **kw):
    "Run `fer`; the exit code must be as expected."
    done = subprocess.run([FER, *map(str, words), '--out', str(out)], capture_output=True, text=True, timeout=400, **kw)
    assert done.returncode == check, done.stderr[-2000:]
    return done


def only_run(out, stage): 
    found = sorted(Path(out).glob(f'*-{stage}-*'))
    assert len(found) == 1, found
    return found[0]


def manifest(run): return json.loads((run/'run.json').read_text())


@pytest.fixture(scope='module')
def curated(tmp_path_factory):
    out = tmp_path_factory.mktemp('curated')
    fer('run', 'curate', '-p', 'faces=560', '-p', 'face_size=32', out=out)
    return only_run(out, 'curate')


@pytest.fixture(scope='module')
def whole(curated, tmp_path_factory):
    "An uninterrupted teacher run."
    out = tmp_path_factory.mktemp('whole')
    fer('run', 'teacher', '-p', f'data={curated}', '-p', 'epochs=4', *TINY, out=out)
    return only_run(out, 'teacher')


def test_curate_run_is_complete_and_verifies(curated):
    for name in ('classification_manifest.csv', 'classification_manifest_hq_train.csv', 'test_all_sources.csv', 'manifest_validation.json', 'clean_report.json', 'hash_manifest.json', 'curate.ipynb'):
        assert (curated/name).is_file(), name
    assert manifest(curated)['status'] == 'accepted'
    done = subprocess.run([FER, 'verify', str(curated)], capture_output=True, text=True)
    assert done.returncode == 0 and 'all as recorded' in done.stdout


def test_teacher_run_holds_the_contract(whole):
    for name in ('run.json', 'best.safetensors', 'config.json', 'last.ckpt', 'history.json', 'train_log.csv', 'metrics.json', 'reliabilitymetrics.json', 'calibration.json', 'alignmentreport.json', 'hash_manifest.json', 'teacher.ipynb'):
        assert (whole/name).is_file(), name
    m = manifest(whole)
    assert m['dataset']['sha256'] and m['preprocessing']['size'] == 32 and m['parents']['data']['sha256'] and m['seeds'] == {'train': 0}
    assert all({'n', 'split', 'in_sample'} <= set(v) for v in m['metrics'].values())
    assert not m['metrics']['teacher/test']['in_sample'] and m['metrics']['teacher/val']['in_sample']


def test_verify_names_a_changed_file(whole, tmp_path):
    import shutil
    copy = tmp_path/whole.name
    shutil.copytree(whole, copy)
    with open(copy/'metrics.json', 'a') as f: f.write(' ')
    done = subprocess.run([FER, 'verify', str(copy)], capture_output=True, text=True)
    assert done.returncode == FAILURES['hash_mismatch'].exit_code and 'metrics.json' in done.stderr


@pytest.mark.parametrize('given, words', [('epoch=3', "did you mean 'epochs'"), ('epochs=many', 'is not an int'), ('epochs=2.5', 'is not an int')])
def test_bad_parameter_stops_before_anything_runs(given, words, tmp_path):
    done = fer('run', 'teacher', '-p', given, out=tmp_path, check=FAILURES['bad_parameter'].exit_code)
    assert words in done.stderr and not list(tmp_path.iterdir()) and len(done.stderr.strip().splitlines()) == 1


def test_missing_data_folder_is_one_line_and_a_code(tmp_path):
    done = fer('run', 'curate', '-p', 'data=/no/such/folder', out=tmp_path, check=FAILURES['missing_file'].exit_code)
    said = [line for line in done.stderr.strip().splitlines() if not line.startswith('[1/1] ')]  # on a busy machine its progress may come first
    assert len(said) == 1 and '/no/such/folder' in said[0]
    assert manifest(only_run(tmp_path, 'curate'))['failure']['code'] == 'missing_file'


def test_label_nine_names_the_row(tmp_path):
    pixels = ' '.join(['7']*2304)
    (tmp_path/'raw').mkdir()
    (tmp_path/'raw'/'fer2013.csv').write_text('emotion,pixels,Usage\n' + f'3,{pixels},Training\n9,{pixels},Training\n')
    done = fer('run', 'curate', '-p', f'data={tmp_path/"raw"}', out=tmp_path/'runs', check=FAILURES['unknown_label'].exit_code)
    assert 'fer2013.csv' in done.stderr and '9' in done.stderr


def test_resume_that_would_train_nothing(curated, whole, tmp_path):
    done = fer('run', 'teacher', '-p', f'data={curated}', '-p', 'epochs=4', '-p', f'resume_from={whole/"last.ckpt"}', *TINY, out=tmp_path, check=FAILURES['no_op_resume'].exit_code)
    assert '4 epochs' in done.stderr and manifest(only_run(tmp_path, 'teacher'))['failure']['code'] == 'no_op_resume'


def test_a_continued_run_names_the_one_it_continues(curated, whole, tmp_path):
    fer('run', 'teacher', '-p', f'data={curated}', '-p', 'epochs=5', '-p', f'resume_from={whole/"last.ckpt"}', *TINY, out=tmp_path)
    run = only_run(tmp_path, 'teacher')
    assert manifest(run)['parents']['resumed_from']['id'] == whole.name and len(json.loads((run/'history.json').read_text())) == 5


def test_resume_from_a_truncated_checkpoint(curated, whole, tmp_path):
    cut = tmp_path/'cut.ckpt'
    cut.write_bytes((whole/'last.ckpt').read_bytes()[:50_000])
    done = fer('run', 'teacher', '-p', f'data={curated}', '-p', 'epochs=6', '-p', f'resume_from={cut}', *TINY, out=tmp_path/'runs', check=FAILURES['corrupt_artifact'].exit_code)
    assert 'cut.ckpt' in done.stderr


def start(curated, out):
    return subprocess.Popen([FER, 'run', 'teacher', '-p', f'data={curated}', '-p', 'epochs=4', *TINY, '--out', str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_epoch(out, fraction, process):
    "Wait until the run's progress passes a number of epochs."
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        for p in Path(out).glob('*/progress.json'):
            try: state = json.loads(p.read_text())
            except ValueError: continue
            if state['text'].startswith('epoch') and state['done'] >= fraction: return
        time.sleep(.02)


def test_killed_three_times_the_run_ends_as_if_it_had_not_been(curated, whole, tmp_path):
    for moment in sorted(random.Random(os.getpid()).uniform(.1, 3.5) for _ in range(3)):
        process = start(curated, tmp_path)
        wait_for_epoch(tmp_path, moment, process)
        process.send_signal(signal.SIGKILL); process.wait()
    assert start(curated, tmp_path).wait() == 0
    run = only_run(tmp_path, 'teacher')
    for name in ('metrics.json', 'best.safetensors'): assert (run/name).read_bytes() == (whole/name).read_bytes(), name
    mine, theirs = (json.loads((r/'history.json').read_text()) for r in (run, whole))
    assert [{k: v for k, v in e.items() if k != 'seconds'} for e in mine] == [{k: v for k, v in e.items() if k != 'seconds'} for e in theirs]
    assert any('resumed' in note for note in manifest(run)['notes'])


def test_ctrl_c_keeps_what_was_done(curated, tmp_path):
    process = start(curated, tmp_path)
    wait_for_epoch(tmp_path, 1.2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == FAILURES['interrupted'].exit_code
    run = only_run(tmp_path, 'teacher')
    assert manifest(run)['failure']['code'] == 'interrupted' and len(json.loads((run/'history.json').read_text())) >= 1
    said = process.stderr.read()
    assert 'Traceback' not in said and [line for line in said.splitlines() if not line.startswith('[')] == [said.splitlines()[-1]] and 'stopped at epoch' in said


def test_softlabels_of_another_manifest_are_refused(curated, whole, tmp_path):
    from fer_core.artifacts import FerError, Run
    from fer_core.data.loader import open_pack
    from fer_core.data.preprocess import Preprocess
    from fer_core.teach.softlabels import export_softlabels, read_softlabels
    run = Run.create(tmp_path/'ensemble', 'ensemble')
    export_softlabels(run, curated, [whole], {'weights': [1.], 'temperatures': [1.], 'temperature': 1.}, views=1)
    other = tmp_path/'other'
    other.mkdir()
    fer('run', 'curate', '-p', 'faces=560', '-p', 'face_size=32', '-p', 'seed=1', out=other)
    with pytest.raises(FerError) as e: read_softlabels(run.folder, open_pack(only_run(other, 'curate'), Preprocess(size=32)))
    assert e.value.code == 'softlabel_misaligned'


def test_a_student_inherits_a_larger_network(curated, tmp_path):
    import torch
    from fer_core.models.backbones import ModelConfig, make_backbone
    from fer_core.runs.stage import same_weights
    weights = tmp_path/'donor.pth'
    torch.save(make_backbone(ModelConfig('mobilenetv3_small_100', channels=3)).state_dict(), weights)
    student = ['run', 'student', '-p', f'data={curated}', '-p', 'epochs=1', *TINY, '-p', 'donor=mobilenetv3_small_100']
    fer(*student, '-p', f'pretrained={weights}', out=tmp_path/'runs')
    run = only_run(tmp_path/'runs', 'student')
    start = manifest(run)['reliability']['start']
    tensors = [k for k in make_backbone(ModelConfig('mobilenetv3_small_050')).state_dict() if not k.endswith('num_batches_tracked')]
    assert start['inherited_from'] == 'mobilenetv3_small_100' and len(start['sha256']) == 64
    assert start['loaded'] + len(start['missing']) == len(tensors) and start['loaded'] > .8*len(tensors)
    assert same_weights(run, {'pretrained': str(weights)})
    torch.save(make_backbone(ModelConfig('mobilenetv3_small_100', channels=3)).state_dict(), weights) # other weights under the same name
    assert not same_weights(run, {'pretrained': str(weights)})
    done = fer(*student, out=tmp_path/'none', check=FAILURES['bad_parameter'].exit_code)
    assert 'pretrained=FILE' in done.stderr
    weights.write_bytes(weights.read_bytes()[:200_000])
    fer(*student, '-p', f'pretrained={weights}', out=tmp_path/'cut', check=FAILURES['corrupt_artifact'].exit_code)


def test_a_sampler_changes_the_order_and_a_wrong_one_is_named(curated, tmp_path):
    done = fer('run', 'teacher', '-p', f'data={curated}', '-p', 'epochs=1', '-p', 'sampler=rare', *TINY, out=tmp_path/'bad', check=FAILURES['bad_parameter'].exit_code)
    assert "'rare'" in done.stderr and 'balanced' in done.stderr
    for how in ('none', 'balanced'): fer('run', 'teacher', '-p', f'data={curated}', '-p', 'epochs=1', '-p', f'sampler={how}', *TINY, out=tmp_path/how)
    losses = [json.loads((only_run(tmp_path/how, 'teacher')/'history.json').read_text())[0]['train_loss'] for how in ('none', 'balanced')]
    assert losses[0] != losses[1] and manifest(only_run(tmp_path/'balanced', 'teacher'))['parameters']['sampler'] == 'balanced'


# -- gates over runs ----------------------------------------------------------------------------------------------------------

def judged(folder, **evidence):
    from fer_core.artifacts import Run
    from fer_core.evaluate.gates import GATES, evaluate_gates
    run = Run.create(folder, 'ensemble')
    run.record(gates=evaluate_gates({k.replace('__', '.'): {'value': v, 'from': 'a test', 'split': 'test', 'n': 500} for k, v in evidence.items()}, [r['gate'] for r in GATES if r['metric'] in {k.replace('__', '.') for k in evidence}]))
    run.finish()
    return folder


def test_runs_are_judged_together_by_a_file_of_rules(tmp_path):
    from typer.testing import CliRunner
    from fer_core.cli import app
    a, b = judged(tmp_path/'a', ensemble__macro_f1_gain=.03), judged(tmp_path/'b', student__ece=.05)
    rules = tmp_path/'mine.yaml'
    rules.write_text('rules:\n- {gate: G-mine, metric: ensemble.macro_f1_gain, at_least: 0.025, split: test, least_n: 500}\n- {gate: G-mine, metric: student.ece, at_most: 0.06}\n')
    ask = lambda *given: CliRunner().invoke(app, ['report', 'gates', *map(str, given)])
    done = ask(a, b, '--rules', rules)
    assert done.exit_code == 0 and done.output.count('✓') == 2
    alone = ask(a, '--rules', rules)
    assert alone.exit_code and alone.exception.code == 'gate_rejected' and 'student.ece' in str(alone.exception) and 'missing' in alone.output
    rules.write_text('rules:\n- {gate: G-mine, metric: ensemble.gain, at_least: 0.025}\n')
    assert 'ensemble.gain' in str(ask(a, '--rules', rules).exception)
    assert 'no run folder' in str(ask(tmp_path/'none').exception)


def test_two_runs_that_measured_the_same_thing_are_not_mixed(tmp_path):
    from fer_core.artifacts import FerError
    from fer_core.runs.report import evidence_of_runs
    a, b = judged(tmp_path/'a', ensemble__ece=.03), judged(tmp_path/'b', ensemble__ece=.05)
    with pytest.raises(FerError, match='a and b both measured ensemble.ece'): evidence_of_runs([a, b])
    assert evidence_of_runs([a, a])['ensemble.ece']['value'] == .03


def test_the_status_page_says_why_a_gate_failed(tmp_path):
    from typer.testing import CliRunner
    from fer_core.cli import app
    judged(tmp_path/'one', ensemble__ece=.5)
    (tmp_path/'two').mkdir(); (tmp_path/'two'/'run.json').write_text('{"half')
    done = CliRunner().invoke(app, ['report', 'status', '--out', str(tmp_path)])
    page = (tmp_path/'status.html').read_text()
    assert done.exit_code == 0 and '2 runs' in page and 'unreadable' in page
    assert 'G-ensemble: calibration error 0.5, at most 0.06 asked' in page and 'macro-F1 over the best single teacher: missing' in page


@pytest.mark.parametrize('text', ['a, b', 'a,b', '[a, b]', '["a", "b"]', "['a', 'b']"])
def test_lists_as_people_type_them(text):
    from fer_core.artifacts import FerError
    from fer_core.runs.stage import resolve
    assert resolve('ensemble', {'teachers': text})['teachers'] == ['a', 'b']
    assert resolve('teacher', {'options': '[[pad_type, same]]'})['options'] == [['pad_type', 'same']]
    with pytest.raises(FerError, match='is not a list'): resolve('ensemble', {'teachers': '[a, b'})


def test_runs_are_picked_sorted_exported_and_told_apart(curated, whole, tmp_path):
    import shutil
    import pandas as pd
    runs = tmp_path/'runs'
    for r in (curated, whole): shutil.copytree(r, runs/r.name)
    other = runs/whole.name.replace('teacher-', 'teacher-f')
    shutil.copytree(whole, other)
    m = manifest(other)
    m['experiment_id'], m['parameters']['lr'], m['metrics']['teacher/test']['macro_f1'] = other.name, .5, .99
    (other/'run.json').write_text(json.dumps(m))
    rows = json.loads(fer('runs', '--where', 'stage=teacher', '--sort', '-macro_f1', '--show', 'lr,macro_f1', '--json', out=runs).stdout)
    assert [r['run'] for r in rows] == [other.name, whole.name] and rows[0]['parameters.lr'] == .5 and rows[0]['macro_f1'] == .99
    assert [r['run'] for r in json.loads(fer('runs', '--where', 'lr<0.1', '--json', out=runs).stdout)] == [whole.name]
    fer('runs', '--csv', tmp_path/'all.csv', out=runs)
    table = pd.read_csv(tmp_path/'all.csv')
    assert len(table) == 3 and table.set_index('run').loc[other.name, 'parameters.lr'] == .5 and 'environment.packages.torch' in table
    bad = fer('runs', '--where', 'learning_rate=1', out=runs, check=FAILURES['bad_parameter'].exit_code)
    assert 'learning_rate' in bad.stderr
    told = json.loads(subprocess.run([FER, 'diff', str(runs/whole.name), str(other), '--json'], capture_output=True, text=True, check=True).stdout)
    assert {r['what'] for r in told} == {'parameters.lr', 'metrics.teacher/test.macro_f1'}
    assert abs(next(r['change'] for r in told if r['what'].endswith('macro_f1')) - (.99 - manifest(whole)['metrics']['teacher/test']['macro_f1'])) < 1e-9

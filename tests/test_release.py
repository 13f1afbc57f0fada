"""From a compress run to a folder that strangers can check: what is refused, what a kill leaves, what tampering shows."""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, onnx, pytest
from safetensors.numpy import save_file
from fer_core.artifacts import HASHES, PUBLIC_KEY, SIGNATURE, FerError, Run, atomic_folder, fingerprint, is_release, make_key, parent, read_json, seal, sha256_bytes, sha256_file, verify_folder, write_hashes, write_json, write_text
from fer_core.compress.portable import RUNTIMES, portability
from fer_core.compress.publish import objections, publish
from fer_core.evaluate.gates import evaluate_gates, gates_passed, int8_evidence, parity_evidence
from fer_core.evaluate.metrics import evaluate
from fer_core.live.recognise import Recognizer, release_model, toy_model

ROOT = Path(__file__).parents[1]
FER = str(Path(sys.executable).parent/'fer')


def student_gate(f1=.6):
    found = {'student.macro_f1_gap': .01, 'student.ece': .02, 'student.min_class_f1': f1, 'student.rare2_f1': .7}
    return evaluate_gates({k: {'value': v, 'from': '', 'split': 'test', 'n': 400} for k, v in found.items()} | {'student.size_ratio': 8.}, ('G-student',))


def compress_run(home, name='a', int8_ms=1., student=None, parity=True): # a compress run beside its calibrate run, without a training
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 400)
    logits = 4*np.eye(7)[labels] + rng.normal(size=(400, 7))
    before = Run.create(home/f'{name}-calibrate', 'calibrate')
    write_json(before.path('calibration.json'), {'temperature': 1}); before.record(gates=student_gate() if student is None else student); before.finish()
    data = {'sha256': sha256_bytes(b'data'), 'sources': ['fer2013', 'mine'], 'splits': {'train': 800, 'val': 400, 'test': 400}}
    run = Run.create(home/f'{name}-compress', 'compress', seeds={'train': 7}, dataset=data, parents={'calibration': parent(before.folder, 'calibration.json')})
    save_file({'w': rng.normal(size=99).astype(np.float32)}, run.path('student.safetensors')); write_json(run.path('config.json'), {'weights': 'student.safetensors'})
    for i, f in enumerate(('student.onnx', 'student_int8.onnx')): toy_model(run.path(f), seed=i, run_id=run.folder.name, weights_sha256=sha256_file(run.path('student.safetensors')), licence='for research')
    metrics = {f'{v}/{s}': evaluate(logits, labels, s, s != 'test', dataset=data['sha256']) for v in ('fp32', 'int8') for s in ('val', 'test')}
    verdicts = evaluate_gates(int8_evidence(metrics['int8/val'], metrics['fp32/val'], int8_ms, 2.) | parity_evidence(logits, logits if parity else logits[::-1]), ('G-int8', 'G-parity'))
    released = 'int8' if gates_passed([v for v in verdicts if v['gate'] == 'G-int8']) else 'fp32'
    write_json(run.path('metrics.json'), metrics); write_text(run.path('MODEL_CARD.md'), f'# Student of run {run.folder.name}\n')
    write_json(run.path('release.json'), {'file': {'int8': 'student_int8.onnx', 'fp32': 'student.onnx'}[released], 'variant': released, 'reason': 'as its gate says', 'run': run.folder.name})
    run.record(gates=verdicts); run.finish()
    return run.folder


@pytest.fixture(scope='module')
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp('key')/'mine'
    make_key(path)
    return path


@pytest.fixture(scope='module')
def run(tmp_path_factory): return compress_run(tmp_path_factory.mktemp('runs'))


@pytest.fixture
def signed(run, key, tmp_path): return publish(run, tmp_path/'given', key=key)


def fer(*args): return subprocess.run([FER, *map(str, args)], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'}, timeout=120)


def bad(folder, key=None): return {n for n, s in verify_folder(folder, key).items() if s != 'ok'}


# ---- what is in it

def test_the_folder_holds_what_the_contract_says(run, signed, key):
    assert sorted(p.name for p in signed.iterdir()) == sorted(['student.onnx', 'student_int8.onnx', 'student.safetensors', 'config.json', 'MODEL_CARD.md', 'release.json', HASHES, SIGNATURE, PUBLIC_KEY])
    assert all((signed/n).read_bytes() == (run/n).read_bytes() for n in ('student.onnx', 'student_int8.onnx', 'student.safetensors', 'config.json'))
    assert release_model(signed).name == 'student_int8.onnx' and Recognizer(release_model(signed)).classify([np.zeros((9, 9), np.uint8)]).shape == (1, 7)
    assert bad(signed, Path(f'{key}.pub')) == set() and oct((signed).stat().st_mode)[-3:] == '755' and all(p.stat().st_mode & 0o777 == 0o644 for p in signed.iterdir() if p.suffix in ('.json', '.md'))


def test_the_card_says_what_a_stranger_must_know(run, signed):
    card, m = (signed/'MODEL_CARD.md').read_text(), read_json(run/'metrics.json')
    for part in ('in sample', 'no, held out', sha256_bytes(b'data'), 'seed 7', 'no licence granted: pictures from a web search', 'not known here: ask whoever made the data', '## Limits', '## Ethics', 'for research', 'Do not decide about people'): assert part in card, part
    rows = {line.split('|')[1].strip(): line for line in card.splitlines() if line.startswith(('| int8/', '| fp32/'))}
    assert set(rows) == {'fp32/val', 'fp32/test', 'int8/val', 'int8/test'}
    assert '| yes | 400 |' in rows['int8/val'] and '| no, held out | 400 |' in rows['int8/test'] and f'{m["int8/test"]["macro_f1"]:.4f}' in rows['int8/test'] and f'{m["int8/test"]["ece_width"]:.4f}' in rows['int8/test']


def test_a_slow_int8_file_stays_behind(tmp_path):
    given = publish(compress_run(tmp_path, int8_ms=1.9), tmp_path/'given')
    assert not (given/'student_int8.onnx').exists() and release_model(given).name == 'student.onnx' and 'not signed' in (given/'MODEL_CARD.md').read_text()


# ---- what is refused

@pytest.mark.parametrize('change, gate', [(dict(student=student_gate(.4)), 'G-student'), (dict(student=[]), 'G-student'), (dict(parity=False), 'G-parity')])
def test_what_the_gates_refuse_needs_acceptance_by_name(tmp_path, change, gate):
    run = compress_run(tmp_path, **change)
    other = {'G-student': 'G-parity', 'G-parity': 'G-student'}[gate]
    for accept, code in (((), 'gate_rejected'), ((other,), 'gate_rejected'), ((gate, other), 'bad_parameter')):
        with pytest.raises(FerError) as e: publish(run, tmp_path/'given', accept)
        assert e.value.code == code and (gate in str(e.value) or other in str(e.value))
    assert not (tmp_path/'given').exists()
    given = publish(run, tmp_path/'given', [gate])
    assert {o['gate'] for o in read_json(given/'release.json')['accepted']} == {gate} and f'**{gate}**' in (given/'MODEL_CARD.md').read_text()


def test_a_missing_calibrate_run_counts_as_a_no(tmp_path):
    run = compress_run(tmp_path)
    assert objections(Run(run)) == []
    shutil.rmtree(tmp_path/'a-calibrate')
    assert [o['gate'] for o in objections(Run(run))] == ['G-student'] and 'not at hand' in objections(Run(run))[0]['says']


@pytest.mark.parametrize('harm, code', [
    (lambda r: (r/'student.onnx').write_bytes((r/'student.onnx').read_bytes() + b'x'), 'hash_mismatch'), (lambda r: (r/'student.safetensors').unlink(), 'hash_mismatch'),
    (lambda r: (toy_model(r/'student.onnx', seed=5), write_hashes(r)), 'corrupt_artifact'), # of another run, by its own words
    (lambda r: (save_file({'w': np.zeros(2, np.float32)}, r/'student.safetensors'), write_hashes(r)), 'corrupt_artifact'), # other weights than the ONNX files were made from
    (lambda r: Run(r).record(status='failed', failure={'code': 'gate_rejected', 'what': 'no parity', 'mend': ''}), 'gate_rejected'), (lambda r: Run(r).record(stage='teacher'), 'bad_parameter'),
    (lambda r: (r.parent/'given').mkdir() or (r.parent/'given'/'mine.txt').write_text('x'), 'bad_parameter')])
def test_runs_that_are_no_longer_what_they_were(tmp_path, harm, code):
    run = compress_run(tmp_path)
    harm(run)
    with pytest.raises(FerError) as e: publish(run, tmp_path/'given')
    assert e.value.code == code
    assert not [p for p in tmp_path.iterdir() if p.name.endswith('.tmp')] and (not (tmp_path/'given').exists() or [p.name for p in (tmp_path/'given').iterdir()] == ['mine.txt'])


# ---- whole or absent

KILLED = '''
import os, signal, sys
from pathlib import Path
from fer_core.artifacts import atomic_folder
from fer_core import artifacts
stop, to = int(sys.argv[1]), Path(sys.argv[2])
class Counting:
    n = 0
def count(f):
    def g(*a, **k):
        Counting.n += 1
        if Counting.n == stop: os.kill(os.getpid(), signal.SIGKILL)
        return f(*a, **k)
    return g
for name in ('fsync', 'replace', 'open'): setattr(os, name, count(getattr(os, name)))
with atomic_folder(to) as tmp:
    for i in range(3): artifacts.write_bytes(tmp/f'{i}.bin', bytes([i])*50_000)
    artifacts.seal(tmp)
os._exit(7)
'''


def test_killed_at_any_step_a_folder_is_whole_or_absent(tmp_path):
    seen = set()
    for stop in range(1, 60, 3):
        to = tmp_path/f'{stop}'/'given'
        done = subprocess.run([sys.executable, '-c', KILLED, str(stop), str(to)], cwd=ROOT)
        assert done.returncode in (-signal.SIGKILL, 7)
        seen.add((done.returncode, to.exists()))
        if to.exists(): assert bad(to) == set() and len(list(to.iterdir())) == 4
        if done.returncode == 7: break
    assert (-signal.SIGKILL, False) in seen and (7, True) in seen


def test_a_release_that_is_killed_leaves_a_whole_folder_or_none(run, tmp_path):
    code = f'import fer_core.compress.publish as p, itertools\nprint("ready", flush=True)\nfor i in itertools.count(): p.publish({str(run)!r}, {str(tmp_path)!r} + f"/given{{i}}")'
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'})
    child.stdout.readline(); time.sleep(.7); child.kill(); child.wait(); child.stdout.close()
    made = list(tmp_path.glob('given*'))
    assert made and all(bad(to) == set() and len(list(to.iterdir())) == 7 for to in made)


def test_two_writers_one_folder(tmp_path):
    with atomic_folder(tmp_path/'x') as a:
        write_text(a/'a', 'a')
        with atomic_folder(tmp_path/'x') as b: write_text(b/'b', 'b')
        with pytest.raises(FerError) as e:
            with atomic_folder(tmp_path/'x') as c: write_text(c/'c', 'c')
        shutil.rmtree(tmp_path/'x')
    assert e.value.code == 'bad_parameter' and [p.name for p in tmp_path.iterdir()] == ['x'] and [p.name for p in (tmp_path/'x').iterdir()] == ['a']
    with pytest.raises(FerError):
        with atomic_folder(tmp_path/'y') as a, atomic_folder(tmp_path/'y') as b: write_text(a/'a', 'a'); write_text(b/'b', 'b') # the slower one loses, with its name
    assert [p.name for p in (tmp_path/'y').iterdir()] == ['b']


# ---- tampering

def changes(data, rng): # a bit, a byte more, a byte less, nothing left
    i = rng.randrange(len(data))
    return [data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:], data + b'\n', data + b'\0', data[:-1], data[:i] + data[i + 1:], b'']


@pytest.mark.parametrize('with_key', [False, True])
def test_every_changed_missing_or_added_byte_shows(run, key, tmp_path, with_key):
    rng, trusted = random.Random(0), Path(f'{key}.pub') if with_key else None
    given = publish(run, tmp_path/'given', key=key if with_key else None)
    for path in sorted(given.iterdir()):
        whole = path.read_bytes()
        for data in [c for _ in range(6) for c in changes(whole, rng)]:
            path.write_bytes(data)
            for known in {None, trusted}:
                try: assert path.name in bad(given, known) or path.name == HASHES and bad(given, known), path.name
                except FerError as e: assert path.name in (HASHES, PUBLIC_KEY) and e.code in ('corrupt_artifact', 'hash_mismatch'), (path.name, e)
        path.unlink()
        try: assert path.name in bad(given, trusted)
        except FerError as e: assert path.name == HASHES and e.code == 'missing_file'
        path.write_bytes(whole)
    assert bad(given, trusted) == set()


def test_every_single_bit_of_the_manifest_and_the_signature_counts(signed, key):
    for name in (HASHES, SIGNATURE):
        whole = (signed/name).read_bytes()
        for i in range(0, len(whole), 1 if name == SIGNATURE else 7):
            (signed/name).write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:])
            try: assert bad(signed), (name, i)
            except FerError as e: assert e.code in ('corrupt_artifact',) and name == HASHES
        (signed/name).write_bytes(whole)


def test_additions_and_links_show(signed, tmp_path):
    for add in ('notes.txt', '.hidden', 'sub/file', 'run.json', 'run.lock', 'progress.json', '.a.tmp', 'sub/.b/c'):
        (signed/add).parent.mkdir(parents=True, exist_ok=True); (signed/add).write_text('x')
        assert bad(signed) == {add} and is_release(signed)
        (signed/add).unlink(); shutil.rmtree(signed/'sub', ignore_errors=True)
    (signed/'empty').mkdir(); assert bad(signed) == {'empty'}; (signed/'empty').rmdir()
    shutil.copy(signed/'config.json', tmp_path/'config.json'); (signed/'config.json').unlink(); (signed/'config.json').symlink_to(tmp_path/'config.json')
    assert bad(signed) == {'config.json'} # the same bytes, but somebody else's file
    (signed/'elsewhere').symlink_to(tmp_path); assert bad(signed) == {'config.json', 'elsewhere'}


def test_a_forger_is_found_by_whoever_knows_the_key_and_by_nobody_else(signed, key, tmp_path):
    known, theirs = Path(f'{key}.pub'), tmp_path/'theirs'
    toy_model(signed/'student_int8.onnx', seed=9)
    table = read_json(signed/HASHES)
    write_json(signed/HASHES, table | {'student_int8.onnx': sha256_file(signed/'student_int8.onnx')})
    assert bad(signed) == bad(signed, known) == {SIGNATURE} # the list fits the files, the signature does not fit the list
    make_key(theirs); seal(signed, theirs)
    assert bad(signed) == set() and bad(signed, known) == {SIGNATURE} and bad(signed, Path(f'{theirs}.pub')) == set() # a folder proves nothing about itself
    for name in (SIGNATURE, PUBLIC_KEY): (signed/name).unlink()
    seal(signed)
    assert bad(signed) == set()
    with pytest.raises(FerError) as e: verify_folder(signed, known)
    assert e.value.code == 'hash_mismatch' and 'not signed' in str(e.value)


def test_names_outside_the_folder_are_never_read(signed, tmp_path):
    (tmp_path/'secret').write_text('x')
    write_json(signed/HASHES, read_json(signed/HASHES) | {'../secret': sha256_file(tmp_path/'secret')})
    assert {'../secret', SIGNATURE} <= bad(signed)
    write_json(signed/HASHES, ['no table'])
    with pytest.raises(FerError) as e: verify_folder(signed)
    assert e.value.code == 'corrupt_artifact'


def test_the_signature_is_openssl_s_too(signed, key):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    theirs = load_pem_public_key(Path(f'{key}.pub').read_bytes())
    assert isinstance(theirs, Ed25519PublicKey) and len((signed/SIGNATURE).read_bytes()) == 64
    theirs.verify((signed/SIGNATURE).read_bytes(), (signed/HASHES).read_bytes())
    if shutil.which('openssl'):
        done = subprocess.run(['openssl', 'pkeyutl', '-verify', '-pubin', '-inkey', f'{key}.pub', '-rawin', '-in', signed/HASHES, '-sigfile', signed/SIGNATURE], capture_output=True, text=True)
        assert done.returncode == 0 or 'unknown option' in done.stderr.lower() or 'rawin' in done.stderr, done.stderr


def test_keys(key, tmp_path):
    assert key.stat().st_mode & 0o777 == 0o600 and b'PRIVATE' in key.read_bytes() and b'PRIVATE' not in Path(f'{key}.pub').read_bytes() and len(fingerprint(f'{key}.pub')) == 64
    with pytest.raises(FerError) as e: make_key(key)
    assert e.value.code == 'bad_parameter'
    (tmp_path/'no').write_text('no key'); (tmp_path/'d').mkdir(); write_text(tmp_path/'d'/'x', 'x')
    for file, code in ((tmp_path/'no', 'corrupt_artifact'), (tmp_path/'gone', 'missing_file'), (f'{key}.pub', 'corrupt_artifact')):
        with pytest.raises(FerError) as e: seal(tmp_path/'d', file)
        assert e.value.code == code
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec
    (tmp_path/'ec').write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    with pytest.raises(FerError) as e: seal(tmp_path/'d', tmp_path/'ec')
    assert e.value.code == 'bad_parameter' and 'Ed25519' in str(e.value)
    assert not (tmp_path/'d'/HASHES).exists() # nothing was begun with a bad key


def test_without_cryptography_only_signatures_are_missed(run, tmp_path):
    code = f'''
import sys; sys.modules['cryptography'] = None
from fer_core.compress.publish import publish
from fer_core.artifacts import FerError, verify_folder
given = publish({str(run)!r}, {str(tmp_path/"given")!r})
assert set(verify_folder(given).values()) == {{'ok'}}
try: publish({str(run)!r}, {str(tmp_path/"other")!r}, key='k')
except FerError as e: print(e)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "fer_core[sign]" in done.stdout and not (tmp_path/'other').exists(), done.stderr


# ---- the command

def test_the_commands(run, tmp_path):
    done = fer('release', run, '--to', tmp_path/'given', '--key', tmp_path/'k', '--make-key')
    assert done.returncode == 0 and 'student_int8.onnx' in done.stdout and 'private key' in done.stderr, done.stderr
    done = fer('verify', tmp_path/'given')
    assert done.returncode == 0 and 'cannot prove' in done.stdout and fingerprint(tmp_path/'k.pub') in done.stdout, done.stderr
    done = fer('verify', tmp_path/'given', '--public-key', tmp_path/'k.pub')
    assert done.returncode == 0 and 'signed by the holder' in done.stdout
    (tmp_path/'given'/'run.json').write_text('{}')
    done = fer('verify', tmp_path/'given', '--json')
    assert done.returncode == 12 and {'what': 'run.json', 'state': 'unlisted'} in json.loads(done.stdout)
    assert fer('release', run, '--to', tmp_path/'given').returncode != 0 and fer('verify', run).returncode == 0


# ---- the package

def test_the_wheel_carries_the_released_student(monkeypatch):
    monkeypatch.chdir(ROOT); monkeypatch.setattr(sys, 'argv', ['setup.py'])
    import setuptools  # noqa: F401  brings distutils where Python no longer has it
    from distutils.core import run_setup
    command = run_setup('setup.py', stop_after='init').get_command_obj('build_py')
    command.ensure_finalized()
    packed = {Path(folder, name).relative_to(ROOT if Path(folder).is_absolute() else '.').as_posix() for _, folder, _, names in command.data_files for name in names}
    needed = {p.relative_to(ROOT).as_posix() for sub in ('release', 'rules') for p in (ROOT/'fer_core'/sub).iterdir() if p.is_file() and not p.name.startswith('.')}
    assert release_model().relative_to(ROOT).as_posix() in needed and needed <= packed, needed - packed
    assert bad(ROOT/'fer_core'/'release') == set() # and it is what its list says


def test_predict_works_with_nothing_trained(tmp_path):
    import cv2
    from test_embedding import drawn
    cv2.imwrite(str(tmp_path/'photo.jpg'), drawn())
    done = subprocess.run([FER, 'predict', 'photo.jpg', '--detector', 'retinaface', '--json'], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {'OMP_NUM_THREADS': '1', 'XDG_CACHE_HOME': str(tmp_path)})
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and len(rows) == 1 and abs(sum(rows[0]['probs'].values()) - 1) < 1e-3, done.stderr


# ---- other runtimes

def test_the_released_student_in_other_runtimes():
    x = np.random.default_rng(0).normal(size=(40, 1, 48, 48)).astype(np.float32)
    rows = {r['runtime']: r for r in portability({'released': release_model()}, x)}
    assert list(rows) == list(RUNTIMES) and all(r['n'] == 40 and (r['agrees'] or r['why']) for r in rows.values())
    import onnxruntime as ort
    session = ort.InferenceSession(str(release_model()), providers=['CPUExecutionProvider']) # by hand
    z = np.concatenate([session.run(None, {'input': x[i:i + 1]})[0] for i in range(40)])
    from fer_core.compress.export import onnx_logits
    assert rows['ONNX Runtime']['agrees'] and rows['ONNX Runtime, plain']['loads'] and rows['ONNX Runtime']['max_abs_logit'] < 1e-3 and (onnx_logits(release_model(), x).argmax(1) == z.argmax(1)).mean() > .95
    if rows['OpenVINO']['loads'] is None: assert rows['OpenVINO']['why'] == 'not installed'


def test_a_runtime_that_answers_otherwise_is_found(tmp_path, monkeypatch):
    x, path = np.random.default_rng(0).normal(size=(30, 1, 48, 48)).astype(np.float32), toy_model(tmp_path/'m.onnx')
    from fer_core.compress import portable
    from fer_core.compress.export import onnx_logits
    def one_by_one(path, threads):
        def run(x):
            if len(x) > 1: raise RuntimeError('error: no batches here')
            return onnx_logits(path, x)
        return run
    fakes = {'turned': lambda path, threads: lambda x: onnx_logits(path, x[..., ::-1]), 'bold': lambda path, threads: lambda x: 3*onnx_logits(path, x), 'nan': lambda path, threads: lambda x: onnx_logits(path, x)*np.nan,
             'shape': lambda path, threads: lambda x: onnx_logits(path, x)[:, :6], 'single': one_by_one, 'no': lambda path, threads: (_ for _ in ()).throw(RuntimeError('x/y/z error: bad node'))}
    monkeypatch.setattr(portable, 'RUNTIMES', {k: ('numpy', f) for k, f in fakes.items()} | {'gone': ('no_such_module', None)})
    rows = {r['runtime']: r for r in portability({'m': path}, x, tuple(portable.RUNTIMES))}
    assert [rows[k]['agrees'] for k in fakes] == [False, False, False, False, True, False] and rows['single']['batch'] == 1 and rows['bold']['top1_agreement'] == 1 and rows['bold']['max_abs_prob'] > .05
    assert rows['no']['loads'] is False and rows['no']['why'] == 'bad node' and rows['gone']['loads'] is None and rows['turned']['top1_agreement'] < .99 and 'not (30, 7)' in rows['shape']['why']


def test_float_models_answer_alike_in_opencv(tmp_path):
    rows = portability({'toy': toy_model(tmp_path/'m.onnx')}, np.random.default_rng(0).normal(size=(20, 1, 48, 48)).astype(np.float32), ('OpenCV DNN',))
    assert rows[0]['agrees'] and rows[0]['max_abs_logit'] < 1e-3, rows


def test_the_profile_adds_up_and_names_what_the_file_holds():
    from fer_core.compress.latency import profile
    rows = profile(release_model(), n_warmup=2, n_calls=10)
    weights = sum(n.op_type == 'Conv' for n in onnx.load(release_model()).graph.node)
    assert abs(sum(r['share'] for r in rows) - 1) < 1e-9 and sum(r['nodes'] for r in rows if 'Conv' in r['op']) == weights and rows[-1]['op'] == 'outside kernels'
    with pytest.raises(FerError): profile(release_model(), n_calls=0)

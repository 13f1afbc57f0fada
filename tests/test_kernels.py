"""Kernels that are forked from a process with the libraries: like any other in all they see, and gone with whoever asked for them."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from fer_core.artifacts import FerError
from fer_core.runs.kernels import LIBRARIES, start_warm, warm
from fer_core.runs.stage import run_stage

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux forks kernels')

STAGE = '''
import json, os, sys
loaded = [m for m in sys.modules if m.startswith('fer_core')]
from fer_core.artifacts import write_json
from fer_core.runs.stage import begin
run = begin('curate', globals())
import numpy
write_json(run.path('seen.json'), {'parent': os.getppid(), 'pid': os.getpid(), 'torch': 'torch' in sys.modules, 'loaded': loaded, 'env': dict(os.environ), 'cwd': os.getcwd(), 'session': os.getsid(0),
           'argv': sys.argv[0], 'random': numpy.random.rand(), 'path': sys.path})
'''


def notebook(folder, body):
    cells = [('faces: int = 0\nrun_dir: str = \'\'', ['parameters']), (STAGE, []), (body, []), ('run.finish()', [])]
    nb = {'cells': [{'cell_type': 'code', 'id': f'c{i}', 'metadata': {'tags': tags}, 'source': text, 'outputs': [], 'execution_count': None} for i, (text, tags) in enumerate(cells)],
          'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}, 'nbformat': 4, 'nbformat_minor': 5}
    folder.mkdir(exist_ok=True)
    (folder/'curate.ipynb').write_text(json.dumps(nb))


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it did not come to pass'
        time.sleep(.05)


@pytest.fixture(scope='module')
def block(): # a warm process of this module's, loaded
    outer = os.environ.pop('FER_CORE_KERNELS', None)
    with warm():
        start_warm()
        until(lambda: Path(os.environ['FER_CORE_KERNELS']).exists())
        yield
    if outer: os.environ['FER_CORE_KERNELS'] = outer


@pytest.fixture
def stages(block, tmp_path, monkeypatch): # a stage that writes down what it sees
    monkeypatch.setenv('FER_CORE_STAGES', str(tmp_path/'stages'))
    notebook(tmp_path/'stages', '')
    return tmp_path


def seen(folder, **given): return json.loads(run_stage('curate', given, folder/'runs').path('seen.json').read_text())


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False


def test_a_forked_kernel_sees_what_a_fresh_one_sees(stages, monkeypatch):
    monkeypatch.setenv('FER_CORE_SOMETHING', 'as set now')
    a, b = seen(stages, faces=2), seen(stages, faces=3)
    monkeypatch.delenv('FER_CORE_KERNELS')
    fresh = seen(stages, faces=1)
    assert fresh['parent'] == os.getpid() and not fresh['torch'] and a['parent'] == b['parent'] != os.getpid()
    plain = lambda env: {n: v for n, v in env.items() if not n.startswith(('FER_CORE_KERNELS', 'PYTEST_'))}
    for k in (a, b):
        assert k['torch'] and not k['loaded'] and k['pid'] == k['session'] and k['env']['FER_CORE_SOMETHING'] == 'as set now' and plain(k['env']) == plain(fresh['env'])
        assert k['cwd'] == os.getcwd() and k['path'] == fresh['path'] and k['argv'].endswith(('ipykernel_launcher', 'ipykernel_launcher.py'))
    assert a['random'] != b['random'] and a['pid'] != b['pid']


def test_the_code_is_that_of_the_moment(stages):
    with_module = "import module_of_the_moment as m; write_json(run.path('m.json'), {'x': m.x})"
    notebook(stages/'stages', f'sys.path.insert(0, {str(stages)!r}); ' + with_module)
    for x in (5, 6):
        (stages/'module_of_the_moment.py').write_text(f'x = {x}  # {"." * x}\n')
        run = run_stage('curate', {'faces': x}, stages/'runs')
        assert json.loads(run.path('m.json').read_text()) == {'x': x} and json.loads(run.path('seen.json').read_text())['torch']


@pytest.mark.parametrize('name,value', [('OMP_NUM_THREADS', '3'), ('CUDA_VISIBLE_DEVICES', '7'), ('PYTHONPATH', '/elsewhere'), ('SOMETHING_NEW', 'x')])
def test_what_a_library_may_have_read_makes_another_kernel(stages, monkeypatch, name, value):
    held = lambda parent=seen(stages, faces=2)['parent']: sorted(os.readlink(f'/proc/{parent}/fd/{n}') for n in os.listdir(f'/proc/{parent}/fd'))
    before = held()
    monkeypatch.setenv(name, value)
    kernel = seen(stages, faces=1)
    assert held() == before  # a pipe of who asked, kept open, would never end for who reads it
    assert kernel['parent'] == os.getpid() and value in kernel['env'][name].split(':')


@pytest.mark.parametrize('cmd', [['/usr/bin/python3', '-m', 'ipykernel_launcher'], ['python3', '-m', 'ipykernel_launcher'], [sys.executable, '-m', 'xeus'], [sys.executable, '-O', '-m', 'ipykernel_launcher'], ['R', '--slave']])
def test_another_interpreter_is_another_kernel(block, cmd):
    from fer_core.runs.kernels import _fork
    assert _fork([*cmd, '-f', 'connection.json'], os.environ, None) is None


def test_a_killed_kernel_is_one_failed_run(stages):
    notebook(stages/'stages', 'os.kill(os.getpid(), 9)')
    with pytest.raises(FerError) as e: run_stage('curate', {'faces': 1}, stages/'runs')
    notebook(stages/'stages', '')
    assert e.value.code == 'kernel_died' and seen(stages, faces=2)['torch']


def test_a_training_is_the_same_to_the_last_bit(block, data, tmp_path, monkeypatch):
    given = {'data': str(data), 'backbone': 'resnet10t', 'size': 32, 'epochs': 1, 'head': 'linear'}
    forked = run_stage('teacher', given, tmp_path/'forked')
    monkeypatch.delenv('FER_CORE_KERNELS')
    fresh = run_stage('teacher', given, tmp_path/'fresh')
    arrays = sorted(p.relative_to(forked.folder) for p in forked.folder.rglob('*.np[yz]'))
    assert arrays and all((forked.folder/p).read_bytes() == (fresh.folder/p).read_bytes() for p in arrays)
    cells = lambda run: json.loads(run.path('teacher.ipynb').read_text())['cells']
    figures = lambda run: sum('image/png' in o.get('data', {}) for c in cells(run) for o in c.get('outputs', []))
    assert figures(forked) == figures(fresh) > 2


NESTED = """
import os, pathlib
from fer_core.runs.kernels import warm
with warm():
    where = os.environ['FER_CORE_KERNELS']
    with warm(): assert os.environ['FER_CORE_KERNELS'] == where
    assert os.environ['FER_CORE_KERNELS'] == where and pathlib.Path(where).parent.is_dir() and not os.path.exists(where)
assert 'FER_CORE_KERNELS' not in os.environ and not pathlib.Path(where).parent.exists()
"""


def test_nothing_is_started_before_it_is_asked_for_and_a_block_within_a_block_is_the_outer_one(monkeypatch):
    monkeypatch.delenv('FER_CORE_KERNELS', raising=False)
    subprocess.run([sys.executable, '-c', NESTED], check=True)


ASK = """
import os, pathlib, sys, time
from fer_core.runs.kernels import start_warm, warm
from fer_core.runs.stage import run_stage
with warm():
    start_warm()
    while not pathlib.Path(os.environ['FER_CORE_KERNELS']).exists(): time.sleep(.05)
    run_stage('curate', {'faces': 1}, sys.argv[1])
"""


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_a_kernel_ends_with_who_asked_for_it(stages, monkeypatch, how):
    if how == signal.SIGKILL: monkeypatch.delenv('FER_CORE_KERNELS') # killed, it also takes along the warm process of its own
    notebook(stages/'stages', 'import time\ntime.sleep(600)')
    asks = subprocess.Popen([sys.executable, '-c', ASK, str(stages/'runs')], start_new_session=True, stderr=subprocess.PIPE, text=True)
    found = lambda: list((stages/'runs').glob('*/seen.json'))
    try:
        until(found)
        kernel = json.loads(found()[0].read_text())
        assert alive(kernel['pid']) and kernel['torch'] and kernel['parent'] != asks.pid
        asks.send_signal(how)
        asks.communicate(timeout=30)
        until(lambda: not alive(kernel['pid']) and alive(kernel['parent']) == (how == signal.SIGINT), 20)
    finally: asks.kill()
    assert asks.returncode
    if how == signal.SIGINT: assert json.loads((found()[0].parent/'run.json').read_text())['failure']['code'] == 'interrupted'


def test_what_is_loaded_starts_no_thread_that_a_fork_would_miss():
    assert 'onnxruntime' not in LIBRARIES and not any('inline' in n for n in LIBRARIES)
    code = "from fer_core.runs.kernels import _load; _load()\nimport os, sys; print(len(os.listdir('/proc/self/task')), 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}).stdout.split() == ['1', 'False']


def test_where_cuda_has_been_touched_there_are_no_forks(tmp_path):
    code = "import sys, torch\nfrom fer_core.runs import kernels\nkernels._load = lambda: None\n{}\nkernels._serve()"
    serve = lambda more: subprocess.run([sys.executable, '-c', code.format(more), str(tmp_path/str(len(more)))], stdin=subprocess.DEVNULL, timeout=60).returncode == 0 and (tmp_path/str(len(more))).exists()
    assert serve('') and not serve('torch.cuda._is_in_bad_fork = lambda: True')


def test_when_it_is_killed_kernels_start_as_ever(stages):
    parent = seen(stages, faces=1)['parent']
    os.kill(parent, signal.SIGKILL)
    until(lambda: not alive(parent))
    assert seen(stages, faces=2)['parent'] == os.getpid()

"""The repository itself: one source for every fact, layers, a light import, and tools that find what they look for."""
import importlib.metadata, json, re, shutil, subprocess, sys, tomllib
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import check_layers, check_notebooks, install  # noqa: E402
from environment import environment  # noqa: E402
from settings import SPDX, read_settings, requirements  # noqa: E402


@pytest.fixture(scope='module')
def settings(): return read_settings(ROOT)


def tool(name, *args): return subprocess.run([sys.executable, ROOT/'tools'/name, *args], cwd=ROOT, capture_output=True, text=True)


def python(code): return subprocess.run([sys.executable, '-c', code], cwd='/', capture_output=True, text=True)


def test_pyproject_agrees_with_settings(settings):
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert project['name'] == settings['lib_name']
    assert project['requires-python'] == f">={settings['min_python']}"
    assert not {'version', 'dependencies', 'optional-dependencies', 'scripts'} & set(project)
    assert {'version', 'dependencies', 'optional-dependencies', 'scripts'} <= set(project['dynamic'])


def test_environment_file_agrees_with_settings(settings):
    text = (ROOT/'environment.yml').read_text()
    assert text == environment(settings)
    for r in requirements(settings, dev=True): assert f'      - {r}\n' in text


def test_the_installed_package_is_what_settings_say(settings):
    def plain(r): return re.sub(r'[\s()]', '', r.split(';')[0]).lower()
    def parts(r): name, spec = re.match(r'([\w.-]+)(.*)', plain(r)).groups(); return name, frozenset(filter(None, spec.split(',')))
    dist = importlib.metadata.distribution(settings['lib_name'])
    assert dist.version == settings['version']
    assert dist.metadata['Requires-Python'] == f">={settings['min_python']}"
    assert SPDX[settings['license']] in (dist.metadata.get('License'), dist.metadata.get('License-Expression'))  # where importlib_metadata is loaded, a field that is not there is an error
    assert {parts(r) for r in dist.requires} == {parts(r) for r in requirements(settings, dev=True)}
    scripts = {f'{e.name}={e.value}' for e in dist.entry_points if e.group == 'console_scripts'}
    assert scripts == set(settings['console_scripts'].split()) == {'fer=fer_core.cli:main'}


def test_the_version_is_the_packages(settings):
    done = python('import fer_core; print(fer_core.__version__)')
    assert done.stdout.strip() == settings['version'], done.stderr


def test_licence():
    text = (ROOT/'LICENSE').read_text()
    assert 'Apache License' in text and 'Version 2.0, January 2004' in text and 'END OF TERMS AND CONDITIONS' in text


def test_readme_is_in_step():
    done = tool('readme.py', '--check')
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('module', ['fer_core', 'fer_core.labels', 'fer_core.artifacts', 'fer_core.data.preprocess', 'fer_core.faces.detect', 'fer_core.faces.align', 'fer_core.live.recognise'])
def test_light_import(module):
    done = python(f"import sys, {module}; print(*[m for m in ('torch', 'torchvision', 'timm', 'pandas', 'lightning_fabric') if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ''


def test_modules_import_downwards():
    trees = check_layers.parse(ROOT)
    assert len(trees) > 20
    assert [*check_layers.upward(trees), *check_layers.heavy(trees)] == []


def package(folder, **sources): # sources: module name with __ for dots -> its text
    for name, text in sources.items():
        path = folder/'fer_core'/(name.replace('__', '/') + '.py')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for sub in (folder/'fer_core').rglob('*'):
        if sub.is_dir() and not (sub/'__init__.py').exists(): (sub/'__init__.py').write_text('')
    (folder/'fer_core'/'__init__.py').touch()
    return check_layers.parse(folder)


def test_the_layer_check_sees_upward_imports(tmp_path):
    trees = package(tmp_path, faces__detect='def f():\n    from ..train.loop import fit\n', train__loop='from fer_core.faces import detect\n', stranger='x = 1\n')
    found = '\n'.join(check_layers.upward(trees))
    assert 'fer_core.faces.detect line 2: imports fer_core.train.loop' in found
    assert 'fer_core.stranger: not in LAYERS' in found
    assert 'fer_core.train.loop line' not in found


def test_the_layer_check_sees_circles_and_weight(tmp_path):
    trees = package(tmp_path, live__a='from .b import g\n', live__b='from . import c\n', live__c='import numpy\nfrom .a import f\n', live__d='def f():\n    import torch\n', models__m='import torch\n', live__e='from ..models import m\n')
    assert any('a circle with fer_core.live' in f for f in check_layers.upward(trees))
    assert list(check_layers.heavy(trees)) == ['fer_core.live.e -> fer_core.models.m -> torch: heavy on the live path']


def notebook(source='1', tags=(), **output):
    outputs = [{'output_type': 'stream', 'name': 'stdout', **output}] if output else []
    return {'cell_type': 'code', 'execution_count': None, 'id': 'a', 'metadata': {'tags': list(tags)} if tags else {}, 'outputs': outputs, 'source': [source]}


@pytest.mark.parametrize('text, bad', [('saved to /home/someone/fer/x.png\n', True), ('/tmp/ab12/run.json', True), ('https://host/home/page', False), ('runs/2026/report.html', False)])
def test_the_notebook_check_sees_paths_of_a_machine(text, bad):
    assert any('path of this machine' in f for f in check_notebooks.cell_findings(notebook(text=text))) is bad


def test_cleaning_keeps_the_parameters_tag_and_is_noticed(tmp_path):
    from nbdev.clean import clean_nb
    from execnb.nbio import dict2nb, nb2str
    dirty = {'cells': [notebook('seed:int = 0', ['parameters'])], 'metadata': {'kernelspec': {'display_name': 'x', 'language': 'python', 'name': 'python3'}, 'language_info': {'name': 'python'}}, 'nbformat': 4, 'nbformat_minor': 5}
    assert not check_notebooks.is_clean(json.dumps(dirty, indent=1))
    nb = dict2nb(dirty)
    clean_nb(nb, allowed_cell_metadata_keys=read_settings(ROOT)['allowed_cell_metadata_keys'].split())
    assert check_notebooks.is_clean(nb2str(nb))
    assert json.loads(nb2str(nb))['cells'][0]['metadata'] == {'tags': ['parameters']}


def test_the_notebook_check_sees_logic_in_a_stage():
    assert list(check_notebooks.stage_findings([notebook('seed:int = 0', ['parameters']), notebook('metrics')])) == []
    found = list(check_notebooks.stage_findings([notebook('def f(): pass')]))
    assert len(found) == 2


@pytest.mark.parametrize('wish, error, calls', [
    ('auto', '', []),
    ('auto', 'ImportError: libGL.so.1: cannot open shared object file', ['uninstall', 'install']),
    ('headless', '', ['uninstall', 'install']),
    ('gui', 'ImportError: libGL.so.1: cannot open shared object file', SystemExit),
    ('auto', "ModuleNotFoundError: No module named 'numpy'", SystemExit),
    ('neither', '', SystemExit)])
def test_opencv_on_a_machine_without_libgl(monkeypatch, capsys, wish, error, calls):
    done, errors = [], [error]
    monkeypatch.setenv('FER_CORE_OPENCV', wish)
    monkeypatch.setattr(install, 'pip', lambda python, *args: (done.append(args), errors.__setitem__(0, '')))
    monkeypatch.setattr(install, 'import_error', lambda python, module: errors[0])
    if calls is SystemExit:
        with pytest.raises(SystemExit) as e: install.settle_opencv('python', 'opencv-python>=4.10,<6')
        assert wish == 'neither' or 'opencv-python-headless' in str(e.value)
        return
    install.settle_opencv('python', 'opencv-python>=4.10,<6')
    assert [c[0] for c in done] == calls
    if calls: assert done[-1] == ('install', 'opencv-python-headless>=4.10,<6')


def test_where_torch_comes_from(monkeypatch):
    monkeypatch.delenv('TORCH_INDEX', raising=False)
    monkeypatch.setattr(sys, 'platform', 'linux')
    for gpu, up, want in [(True, True, []), (False, True, ['--extra-index-url', install.CPU_INDEX]), (False, False, [])]:
        monkeypatch.setattr(install, 'has_gpu', lambda: gpu)
        monkeypatch.setattr(install, 'answers', lambda url: up)
        assert install.torch_source() == want
    monkeypatch.setenv('TORCH_INDEX', 'https://mirror/whl')
    assert install.torch_source() == ['--extra-index-url', 'https://mirror/whl']
    monkeypatch.setenv('TORCH_INDEX', 'none')
    assert install.torch_source() == []


def test_an_old_python_is_refused_with_the_mend(tmp_path):
    with pytest.raises(SystemExit) as e: install.make_venv(tmp_path/'v', '99.0')
    assert 'is too old' in str(e.value) and 'make PYTHON=' in str(e.value)


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_lists_its_targets():
    done = subprocess.run(['make', 'help'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for target in 'quickstart test check lab docs readme'.split(): assert re.search(rf'^  make {target} ', done.stdout, re.M), target


def test_ci_runs_what_the_readme_says():
    script = (ROOT/'.ci'/'run').read_text()
    commands = [line for line in script.splitlines() if line and not line.startswith(('#', 'set ', 'cd '))]
    assert commands == ['make test']
    assert '\nmake test ' in (ROOT/'README.md').read_text()


def test_lessons_that_fail_hang_or_die_are_told(tmp_path):
    "The runner itself: a good notebook passes, and the others do not take it with them."
    cells = {'good': 'x = 1', 'wrong': 'assert 1 == 2, "planted"', 'hangs': 'import time; time.sleep(600)', 'dies': 'import os; os.kill(os.getpid(), 9)'}
    for name, code in cells.items():
        (tmp_path/f'{name}.ipynb').write_text(json.dumps({'cells': [{'cell_type': 'code', 'id': 'a', 'metadata': {}, 'source': code, 'execution_count': None, 'outputs': []}],
            'metadata': {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}, 'nbformat': 4, 'nbformat_minor': 5}))
    done = python(f"""import json, os, sys
os.chdir({str(ROOT)!r}); sys.path.insert(0, 'tools')
import lessons
from pathlib import Path
lessons.ROOT = Path({str(tmp_path)!r})
rows = lessons.run_all([lessons.ROOT/f'{{n}}.ipynb' for n in {list(cells)!r}], '', 2, 12)
code = lessons.verdict(rows, 60)
print(json.dumps([code, [(r['ok'], r['output']) for r in rows]]))""")
    code, rows = json.loads(done.stdout.splitlines()[-1])
    assert code == 1 and [ok for ok, _ in rows] == [True, False, False, False]
    assert rows[0][1] == '' and 'planted' in rows[1][1] and 'given up after 12 s' in rows[2][1]

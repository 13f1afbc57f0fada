"The whole path with tiny models: every stage notebook by papermill, the report, the released student, resumption."
import json, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest

FER = str(Path(sys.executable).parent/'fer')
PLAN = '''
data:       {stage: curate, faces: 700, face_size: 32}
one:        {stage: teacher, data: '@data', backbone: resnet18, size: 32, epochs: 1}
two:        {stage: teacher, data: '@data', backbone: mobilenetv3_small_050, size: 32, epochs: 1, output_stride: 16}
ensemble:   {stage: ensemble, data: '@data', teachers: ['@one', '@two'], views: 2, hints: 16}
ce:         {stage: student, data: '@data', phase: ce, backbone: mobilenetv3_small_050, size: 32, epochs: 1}
kd:         {stage: student, data: '@data', phase: kd, before: '@ce', softlabels: '@ensemble', size: 32, epochs: 1, hint: 1.0}
dkd:        {stage: student, data: '@data', phase: dkd, before: '@kd', softlabels: '@ensemble', size: 32, epochs: 1, hint: 1.0}
calibrate:  {stage: calibrate, student: '@dkd', ensemble: '@ensemble', teachers: ['@one', '@two']}
small:      {stage: compress, data: '@data', student: '@dkd', calibration: '@calibrate', faces: 100, mirror: true, places: 1}
benchmark:  {stage: benchmark, data: '@data', compressed: '@small', seconds: 1.0, warmup: 5, timed: 20}
slim:       {stage: prune, data: '@data', student: '@dkd', ratio: 0.3, faces: 64, scan: [0.5], scan_faces: 64, epochs: 1}
looks:      {stage: errors, student: '@dkd', teacher: '@ensemble', n_map: 60, n_hard: 4}
end:        {stage: thesis, data: '@data', teachers: ['@one', '@two'], ensemble: '@ensemble', students: ['@ce', '@kd', '@dkd'], calibration: '@calibrate', compressed: '@small', benchmark: '@benchmark', others: ['@slim', '@looks']}
'''


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    home = tmp_path_factory.mktemp('path')
    (home/'plan.yaml').write_text(PLAN)
    command = [FER, 'quickstart', '--plan', str(home/'plan.yaml'), '--out', str(home/'runs'), '--reports', str(home/'reports')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return home, command, done.stdout


def run_of(home, stage): return sorted((home/'runs').glob(f'*-{stage}-*'))


def test_it_ends_with_verdicts_report_and_demo(path):
    _, _, said = path
    assert 'Gates: ' in said and 'G-student' in said and 'Report: ' in said and 'fer demo' in said


def test_the_report_is_self_contained_and_carries_its_figures(path):
    home, _, _ = path
    page = next((home/'reports').glob('*/thesis.html')).read_text()
    for part in ('Results', 'Gates', 'Per class', 'Confidence', 'latency', 'data:image/png', 'held-out'): assert part in page, part
    assert 'src="http' not in page and page.count('data:image/png') >= 8


def test_the_report_comes_as_files(path):
    folder = run_of(path[0], 'thesis')[0]
    tex = (folder/'appendix.tex').read_text()
    drawn, tabled = re.findall(r'\\label\{fig:thesis-\w{6}-(.+?)\}', tex), re.findall(r'\\label\{tab:thesis-\w{6}-(.+?)\}', tex)
    assert len(drawn) >= 8 and len(tabled) >= 12
    assert {p.name for p in (folder/'figures').iterdir()} == {f'{n}.{k}' for n in drawn for k in ('pdf', 'svg')} and {p.name for p in (folder/'tables').iterdir()} == {f'{n}.{k}' for n in tabled for k in ('csv', 'tex')}
    rows = json.loads((folder/'results.json').read_text())
    assert len((folder/'tables'/'results.csv').read_text().splitlines()) > len(run_of(path[0], 'student')) and rows


def test_the_report_takes_in_other_reports_and_says_what_is_missing(path):
    import pandas as pd
    folder, slim, looks = (run_of(path[0], s)[0] for s in ('thesis', 'prune', 'errors'))
    short = {f: f.name.split('-', 3)[-1] for f in (slim, looks)}
    for f, name in ((slim, 'widths'), (looks, 'hardest')): assert (folder/'figures'/f'{short[f]}-{name}.pdf').read_bytes() == (f/'figures'/f'{name}.pdf').read_bytes()
    assert json.loads((folder/'run.json').read_text())['parents'][f'part_{short[slim]}']['id'] == slim.name
    plan = pd.read_csv(folder/'tables'/'planned.csv', index_col=0, keep_default_na=False)
    lost = {w for w, m in plan['missing'].items() if m}
    assert lost == {'ablation: τ of logit adjustment', 'ablation: KD temperature', 'ablation: DKD α and β', 'ablation: pruning ratio', 'embeddings, teacher and student'}
    assert json.loads((folder/'evidence.json').read_text())['thesis.figures_missing']['value'] == 5


@pytest.mark.skipif(not shutil.which('pdflatex'), reason='pdflatex is not installed')
def test_a_thesis_reads_the_files_in(path, tmp_path):
    folder = run_of(path[0], 'thesis')[0]
    (tmp_path/'t.tex').write_text('\\documentclass{article}\\usepackage{graphicx,booktabs,array}\\newcommand{\\ferrun}{' + str(folder.resolve()) + '}\\begin{document}\\input{\\ferrun/appendix}\\end{document}')
    done = subprocess.run(['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 't.tex'], cwd=tmp_path, capture_output=True, text=True, errors='replace', timeout=120)
    assert done.returncode == 0 and 'too large' not in done.stdout, done.stdout[-3000:]


def test_every_run_verifies(path):
    home, _, _ = path
    for run in (home/'runs').iterdir():
        done = subprocess.run([FER, 'verify', str(run)], capture_output=True, text=True)
        assert done.returncode == 0, (run.name, done.stderr)


def test_softlabel_and_release_contracts(path):
    home, _, _ = path
    ensemble, compress = run_of(home, 'ensemble')[0], run_of(home, 'compress')[0]
    for name in ('softlabels.npz', 'softlabels_index.jsonl', 'classorder.json', 'ensemble_metrics.json', 'alignmentreport.json', 'hash_manifest.json'): assert (ensemble/name).is_file(), name
    for name in ('student.onnx', 'student_int8.onnx', 'student.safetensors', 'config.json', 'MODEL_CARD.md', 'hash_manifest.json'): assert (compress/name).is_file(), name
    from fer_core.compress.export import read_metadata
    tries, told = json.loads((compress/'float_places.json').read_text()), read_metadata(compress/'student_int8.onnx')
    assert 1 <= len(tries) <= 2 and told['float_nodes'].split() in [t['nodes'] for t in tries] and json.loads(told['reference'])['n'] == json.loads((compress/'metrics.json').read_text())['int8/val']['n']


def test_parity_of_the_exported_student(path):
    home, _, _ = path
    verdicts = {v['rule']: v for v in json.loads((run_of(home, 'compress')[0]/'run.json').read_text())['gates']}
    assert verdicts['parity.top1_agreement']['passed'] and verdicts['parity.max_abs_logit']['passed']


def test_the_recogniser_agrees_with_the_trained_student(path):
    "The live path (OpenCV, numpy, onnxruntime) gives what torch gives on the same picture files."
    import torch
    from fer_core import Recognizer
    from fer_core.data.manifest import read_manifest
    from fer_core.data.preprocess import normalise, standardise
    from fer_core.data.images import read_image
    from fer_core.distill.student import adopted_run
    from fer_core.models.backbones import load_model
    home, _, _ = path
    compress, data = run_of(home, 'compress')[0], run_of(home, 'curate')[0]
    table = read_manifest(data/'classification_manifest.csv').query("split == 'test'").head(60)
    root = json.loads((data/'source.json').read_text())['root']
    crops = [read_image(root, p) for p in table['path']]
    recogniser = Recognizer(compress/'student.onnx')
    model, spec, _ = load_model(adopted_run(Path(json.loads((compress/'run.json').read_text())['parameters']['student'])))
    x = np.stack([normalise(standardise(c, spec), spec) for c in crops])
    x = torch.from_numpy(x)
    with torch.no_grad(): expected = ((model(x) + model(x.flip(-1)))/2/recogniser.temperature).softmax(1).numpy() # the plan exports with mirror
    assert spec == recogniser.spec and np.abs(recogniser.classify(crops) - expected).max() < 1e-4


def test_hints_are_learnt_and_left_behind(path):
    from safetensors import safe_open
    home, _, _ = path
    def names(folder, file): return set(safe_open(folder/file, 'pt').keys())
    kd = next(r for r in run_of(home, 'student') if json.loads((r/'run.json').read_text())['parameters']['phase'] == 'kd')
    ensemble, compress = run_of(home, 'ensemble')[0], run_of(home, 'compress')[0]
    assert json.loads((ensemble/'alignmentreport.json').read_text())['hints']['width'] == 16 and 'hints.npz' in json.loads((ensemble/'hash_manifest.json').read_text())
    assert json.loads((kd/'config.json').read_text())['model']['hint'] == 16 and 'projector.weight' in names(kd, 'best.safetensors')
    assert json.loads((compress/'config.json').read_text())['model']['hint'] == 0 and not any(n.startswith('projector') for n in names(compress, 'student.safetensors'))


def test_hints_that_are_missing_or_changed_are_refused(path, tmp_path):
    import shutil
    from fer_core.artifacts import FerError
    from fer_core.data.loader import open_pack
    from fer_core.data.preprocess import Preprocess
    from fer_core.teach.softlabels import read_softlabels
    home, _, _ = path
    pack, copy = open_pack(run_of(home, 'curate')[0], Preprocess(size=32)), tmp_path/'ensemble'
    shutil.copytree(run_of(home, 'ensemble')[0], copy)
    assert read_softlabels(copy, pack, hints=True).hints.shape == (2, len(pack), 16)
    (copy/'hints.npz').write_bytes((copy/'hints.npz').read_bytes()[:-100])
    with pytest.raises(FerError) as e: read_softlabels(copy, pack, hints=True)
    assert e.value.code == 'hash_mismatch' and 'hints.npz' in str(e.value)
    (copy/'hints.npz').unlink()
    with pytest.raises(FerError) as e: read_softlabels(copy, pack, hints=True)
    assert e.value.code == 'missing_checkpoint'
    report = json.loads((copy/'alignmentreport.json').read_text())
    del report['hints']; (copy/'alignmentreport.json').write_text(json.dumps(report))
    with pytest.raises(FerError) as e: read_softlabels(copy, pack, hints=True)
    assert e.value.code == 'bad_parameter' and 'hints=' in str(e.value)


def test_a_published_report_carries_every_run_behind_it(path):
    home, _, _ = path
    behind = {p.stem for p in (home/'reports').glob('*/runs/*.json')}
    assert behind == {p.name for p in (home/'runs').iterdir()}


def test_started_again_it_only_looks(path):
    home, command, _ = path
    before = sorted(p.name for p in (home/'runs').iterdir())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count('reused') == 13 and sorted(p.name for p in (home/'runs').iterdir()) == before


def test_a_parent_is_found_beside_its_run_or_where_it_was(path, tmp_path):
    import shutil
    from fer_core.artifacts import FerError, parent_folder
    from fer_core.distill.student import started_from
    home, _, _ = path
    kd = next(r for r in run_of(home, 'student') if json.loads((r/'run.json').read_text())['parameters']['phase'] == 'kd')
    before = parent_folder(kd, 'before')
    moved = shutil.copytree(kd, tmp_path/'runs'/kd.name)
    assert parent_folder(moved, 'before').name == before.name and started_from(moved) == started_from(kd) == 'random weights'
    told = json.loads((moved/'run.json').read_text())
    told['parents']['before']['path'] = '/nowhere/best.safetensors'
    (moved/'run.json').write_text(json.dumps(told))
    with pytest.raises(FerError) as e: parent_folder(moved, 'before')
    assert e.value.code == 'missing_checkpoint' and before.name in str(e.value)
    shutil.copytree(before, tmp_path/'runs'/before.name)
    assert parent_folder(moved, 'before') == tmp_path/'runs'/before.name


def test_runs_of_one_backbone_keep_names_apart(path):
    from fer_core.runs.pipeline import _unique
    home, _, _ = path
    one, two = run_of(home, 'teacher')
    assert len(set(_unique([one, two]).values())) == 2
    kd = run_of(home, 'student')[:1]
    names = _unique([one, *kd])
    assert names[one.name] in ('resnet18', 'mobilenetv3_small_050')
    import shutil
    twin = shutil.copytree(one, home/'twin')
    names = _unique([one, twin])
    shutil.rmtree(twin)
    assert len(set(names.values())) == 2 and all(v.startswith(('resnet18 (', 'mobilenetv3_small_050 (')) for v in names.values())


def test_a_report_asks_for_the_teachers_of_its_ensemble(path, tmp_path):
    from fer_core.artifacts import FerError, Run
    from fer_core.runs.pipeline import Pipeline
    home, _, _ = path
    first = lambda stage: run_of(home, stage)[0]
    with pytest.raises(FerError) as e: Pipeline(Run.create(tmp_path/'t', 'thesis'), first('curate'), [first('teacher')], first('ensemble'), run_of(home, 'student'), first('calibrate'), first('compress'), first('benchmark'))
    assert e.value.code == 'bad_parameter' and run_of(home, 'teacher')[1].name in str(e.value)


def test_a_report_asks_for_the_calibration_of_the_student_that_stands(path, tmp_path):
    import shutil
    from fer_core.artifacts import FerError, Run, parent_folder
    from fer_core.runs.pipeline import Pipeline
    home, _, _ = path
    first = lambda stage: run_of(home, stage)[0]
    stands = parent_folder(first('calibrate'), 'student')
    def report(name, calibration): return Pipeline(Run.create(tmp_path/name, 'thesis'), first('curate'), run_of(home, 'teacher'), first('ensemble'), [stands], calibration, first('compress'), first('benchmark'))
    assert report('a', first('calibrate')).student.name == stands.name
    shutil.copytree(first('calibrate'), tmp_path/'other')
    other, manifest = next(s for s in run_of(home, 'student') if s.name != stands.name), json.loads((tmp_path/'other/run.json').read_text())
    manifest['parents']['student'] |= {'id': other.name, 'path': str(other/'logits.npz')}
    (tmp_path/'other/run.json').write_text(json.dumps(manifest))
    with pytest.raises(FerError) as e: report('b', tmp_path/'other')
    assert e.value.code == 'bad_parameter' and f'is of {other.name}' in e.value.what


def test_shipping_replaces_the_release_before(path, tmp_path):
    from fer_core.compress.release import ship
    home, _, _ = path
    (tmp_path/'student_old.onnx').write_bytes(b'old')
    ship(run_of(home, 'compress')[0], tmp_path)
    chosen = json.loads((tmp_path/'release.json').read_text())['file']
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([chosen, 'MODEL_CARD.md', 'release.json', 'hash_manifest.json'])
    assert set(json.loads((tmp_path/'hash_manifest.json').read_text())) == {chosen, 'MODEL_CARD.md', 'release.json'}


def test_a_file_that_answers_otherwise_is_not_released(path, tmp_path):
    from fer_core.artifacts import FerError, Run
    from fer_core.compress import release
    from fer_core.evaluate.gates import evaluate_gates
    home, _, _ = path
    compress = run_of(home, 'compress')[0]
    files = {'fp32': compress/'student.onnx', 'int8': compress/'student_int8.onnx'}
    metrics = json.loads((compress/'metrics.json').read_text())
    run, times = Run.create(tmp_path/'compress', 'compress'), {v: {'p50_ms': 1., 'p95_ms': 1.} for v in files}
    verdicts = evaluate_gates({'parity.top1_agreement': .5, 'parity.max_abs_logit': 3.}, ('G-parity',))
    with pytest.raises(FerError) as e: release._decide(run, None, compress, files, metrics, times, verdicts, {})
    assert e.value.code == 'gate_rejected' and not (tmp_path/'compress'/'release.json').exists()
    assert [v['passed'] for v in Run(run.folder).manifest.gates] == [False, False]

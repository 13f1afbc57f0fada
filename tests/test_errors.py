"Error analysis: its statistics against independent ones, and the stage on two small runs, faces hidden."
import base64, json, sys
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from scipy import stats
from fer_core.artifacts import FerError, Run, read_json, verify_hashes
from fer_core.evaluate.embeddings import class_distances, distance_table, drawn, project, silhouettes, trust
from fer_core.evaluate.errors import cell_differences, faces_shown, finished_run, sure_errors
from fer_core.labels import CLASSES

COUNTS = (60, 12, 60, 90, 60, 50, 60)


def decisions(seed, *rates, counts=COUNTS):
    "Class ids, and models that are right as often as asked."
    rng, y = np.random.default_rng(seed), np.repeat(np.arange(7), counts)
    return y, *(np.where(rng.random(len(y)) < r, y, rng.integers(0, 7, len(y))) for r in rates)


# ---- cells ----

def test_cells_are_mcnemars_test_with_holms_correction():
    from sklearn.metrics import confusion_matrix
    y, a, b = decisions(0, .8, .45, counts=tuple(3*c for c in COUNTS))
    cells = cell_differences(a, b, y)
    moved = 100*(confusion_matrix(y, a, normalize='true') - confusion_matrix(y, b, normalize='true'))
    assert np.allclose(cells['points'].to_numpy().reshape(7, 7), moved, atol=1e-12)
    p = []
    for i in range(7):
        for j in range(7):
            of = y == i
            only_a, only_b = int((of & (a == j) & (b != j)).sum()), int((of & (a != j) & (b == j)).sum())
            n = only_a + only_b
            p.append(1. if n == 0 else stats.binomtest(only_a, n).pvalue if n < 30 else stats.chi2.sf((abs(only_a - only_b) - 1)**2/n, 1))
            row = cells.iloc[7*i + j]
            assert (row['true'], row['decided'], row['only_student'], row['only_teacher']) == (CLASSES[i], CLASSES[j], only_a, only_b)
    assert np.allclose(cells['p'], p, rtol=1e-9, atol=0)
    discordant = cells['only_student'] + cells['only_teacher']
    assert (discordant >= 30).any() and ((discordant > 0) & (discordant < 30)).any()  # both forms of the test were met
    holm, worst = np.empty(49), 0.
    for rank, k in enumerate(np.argsort(p)):
        worst = max(worst, min(1., (49 - rank)*p[k]))
        holm[k] = worst
    assert np.allclose(cells['p_holm'], holm, rtol=1e-9) and (cells['differs'] == (holm <= .05)).all() and 0 < cells['differs'].sum() < 49


def test_cells_take_scores_and_leave_out_empty_classes():
    y, a, b = decisions(1, .8, .5)
    some = y != 1
    cells = cell_differences(np.eye(7)[a[some]], np.eye(7)[b[some]], y[some])
    assert len(cells) == 42 and 'disgust' not in set(cells['true']) and 'disgust' in set(cells['decided'])
    assert cells.equals(cell_differences(a[some], b[some], y[some]))
    same = cell_differences(a, a, y)
    assert (same['p'] == 1).all() and not same['differs'].any() and (same['points'] == 0).all()


@pytest.mark.parametrize('change', [lambda y, a, b: (a[:-1], b, y), lambda y, a, b: (a, b[:-1], y), lambda y, a, b: (a, b, y + 1), lambda y, a, b: (a + 1, b, y), lambda y, a, b: (a, b, y, 1.)])
def test_cells_of_other_faces_are_refused(change):
    with pytest.raises(FerError): cell_differences(*change(*decisions(2, .8, .5)))


# ---- sure and wrong ----

def test_sure_errors_are_counted_and_have_wilsons_interval():
    from fer_core.data.hard import hard_samples
    y, a = decisions(3, .6)
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(7, .1), len(y))
    p = np.stack([np.roll(q, k - q.argmax()) for q, k in zip(p, a)])  # the decision is a
    rows = pd.DataFrame({'id': np.arange(len(y)).astype(str), 'path': '', 'label': np.array(CLASSES)[y], 'split': 'test'})
    table = sure_errors(hard_samples(rows, p, sure=.8, test=True), rows['label'], ['disgust', 'fear'])
    z = stats.norm.ppf(.975)
    for name, of in [*((c, y == k) for k, c in enumerate(CLASSES)), ('rare', np.isin(y, [1, 2])), ('all', y >= 0)]:
        k, n = int((of & (a != y) & (p.max(1) >= .8)).sum()), int(of.sum())
        centre, half = (k/n + z*z/2/n)/(1 + z*z/n), z*np.sqrt(k/n*(1 - k/n)/n + z*z/4/n/n)/(1 + z*z/n)
        assert table.loc[name, ['faces', 'wrong', 'sure_and_wrong']].tolist() == [n, int((of & (a != y)).sum()), k]
        assert table.loc[name, ['share', 'low', 'high']].tolist() == pytest.approx([k/n, centre - half, centre + half], abs=1e-12)
    none = sure_errors(hard_samples(rows[y != 1], p[y != 1], sure=.8, test=True), rows['label'][y != 1])
    assert none.loc['disgust', 'faces'] == 0 and np.isnan(none.loc['disgust', ['share', 'low', 'high']].astype(float)).all() and 'rare' not in none.index


# ---- embeddings ----

@pytest.fixture(scope='module')
def space(): # -> embeddings of any length, class ids; one class has a single face, one none
    rng, y = np.random.default_rng(4), np.repeat([0, 1, 2, 3, 5, 6], (30, 1, 25, 40, 20, 30))
    return rng.uniform(.1, 9, (len(y), 1))*(1.5*rng.normal(size=(7, 12))[y] + rng.normal(size=(len(y), 12))), y


def test_distances_are_means_over_pairs(space):
    from sklearn.metrics.pairwise import cosine_distances
    e, y = space
    found, pairs = class_distances(e, y), cosine_distances(e)
    for i in range(7):
        for j in range(7):
            of = np.outer(y == i, y == j) & ~np.eye(len(y), dtype=bool)
            assert found[i, j] == pytest.approx(pairs[of].mean(), abs=1e-12) if of.any() else np.isnan(found[i, j])
    assert np.isnan(found[4]).all() and np.isnan(found[1, 1]) and not np.isnan(found[1, 0])


def test_silhouettes_have_their_closed_form(space):
    "With cosine distance the mean distance of a face to a class is one minus its product with the class's mean."
    e, y = space
    u = e/np.linalg.norm(e, axis=1, keepdims=True)
    n, sums = np.bincount(y, minlength=7), np.stack([u[y == k].sum(0) for k in range(7)])
    expected = []
    for row, k in zip(u, y):
        if n[k] == 1: expected.append(0.); continue  # by definition
        a = 1 - (row @ sums[k] - 1)/(n[k] - 1)
        b = min(1 - row @ sums[j]/n[j] for j in range(7) if j != k and n[j])
        expected.append((b - a)/max(a, b))
    assert np.allclose(silhouettes(e, y), expected, atol=1e-12)
    table = distance_table(e, y)
    between, expected = class_distances(e, y), np.array(expected)
    for k in (0, 2, 3, 5, 6):
        nearest = min((between[k, j], j) for j in range(7) if j != k and n[j])
        assert (table.loc[CLASSES[k], 'nearest'], table.loc[CLASSES[k], 'to_nearest']) == (CLASSES[nearest[1]], nearest[0])
        assert table.loc[CLASSES[k], 'silhouette'] == pytest.approx(expected[y == k].mean()) and table.loc[CLASSES[k], 'below_zero'] == pytest.approx((expected[y == k] < 0).mean())
    assert table.loc['sad', 'n'] == 0 and np.isnan(table.loc['sad', 'silhouette']) and table.loc['sad', 'nearest'] == ''


def test_trust_is_venna_and_kaskis_and_the_map_earns_it(space):
    e, y = space
    points = project(e, seed=1)
    def by_hand(x, p, k):
        cos = 1 - (x @ x.T)/np.outer(*(np.linalg.norm(x, axis=1),)*2)
        rank = np.argsort(np.argsort(cos + 9*np.eye(len(x)), 1), 1) + 1  # 1 = nearest; unit vectors order alike by angle and distance
        near = np.argsort(((p[:, None] - p)**2).sum(-1) + 1e9*np.eye(len(p)), 1)[:, :k]
        n = len(x)
        return 1 - 2/(n*k*(2*n - 3*k - 1))*sum(max(0, rank[i, j] - k) for i in range(n) for j in near[i])
    assert trust(e, points, 7) == pytest.approx(by_hand(e, points, 7), abs=1e-12) and trust(e, points, 7) > .85
    chance = np.random.default_rng(0).normal(size=points.shape)
    assert trust(e, chance, 7) == pytest.approx(by_hand(e, chance, 7), abs=1e-12) and trust(e, chance, 7) < .65
    assert points.shape == (len(y), 2) and np.isfinite(points).all()


def test_what_makes_no_map_is_refused(space, monkeypatch):
    e, y = space
    monkeypatch.setitem(sys.modules, 'umap', None)
    for given in ((e, 'umap'), (e, 'tsen'), (e[:4],), (np.zeros((9, 3)),), (e[0],), (np.full((9, 3), np.nan),)):
        with pytest.raises(FerError): project(*given)
    with pytest.raises(FerError, match='pip install umap-learn'): project(e, 'umap')
    with pytest.raises(FerError): silhouettes(e[y == 0], y[y == 0])
    with pytest.raises(FerError): silhouettes(e[:7], np.arange(7))
    with pytest.raises(FerError): drawn(100, 4)


def test_umap_where_it_is_installed(space):
    pytest.importorskip('umap', reason='umap-learn is optional and not installed')
    e, _ = space
    points = project(e, 'umap', perplexity=15, seed=1)
    assert points.shape == (len(e), 2) and trust(e, points, 7) > .8


def test_a_map_shows_each_face_once():
    assert drawn(7, 10).tolist() == list(range(7))
    some = drawn(500, 60, 3)
    assert len(set(some)) == 60 and (np.diff(some) > 0).all() and some.max() < 500 and (some == drawn(500, 60, 3)).all() and (some != drawn(500, 60, 4)).any()


# ---- faces and runs ----

SPEC = dict(size=32, clahe=0)

def judged(home, data, name, stage, noise, draw, net=True):
    "A finished run on curated data: an untrained network, and logits as right as `noise` lets them be."
    import torch
    from fer_core.artifacts import parent
    from fer_core.data.loader import open_pack
    from fer_core.data.preprocess import Preprocess
    from fer_core.models.backbones import Classifier, ModelConfig, save_model
    from fer_core.train.judge import write_verdict
    pack, run, rng = open_pack(data, Preprocess(**SPEC)), Run.create(home/name, stage, {'seed': draw}), np.random.default_rng(draw)
    run.record(dataset={'sha256': pack.dataset_sha256, 'sources': ['synthetic'], 'splits': pack.table['split'].value_counts().to_dict(), 'priors': dict(zip(CLASSES, pack.priors()))},
               preprocessing=pack.spec.to_dict(), class_order=list(CLASSES), seeds={'train': draw}, reliability={'flip_averaged': False}, parents={'data': parent(data, 'classification_manifest.csv')})
    write_verdict(run, pack, {s: (3*(np.eye(7)[pack.labels[pack.rows(s)]] + rng.normal(0, noise, (len(pack.rows(s)), 7)))).astype(np.float32) for s in ('val', 'test')}, stage)
    torch.manual_seed(draw)
    if net: save_model(run.folder, Classifier(ModelConfig('mobilenetv3_small_050')), pack.spec)
    run.finish()
    return run.folder


@pytest.fixture(scope='module')
def world(tmp_path_factory): # -> home and other data, a student and a teacher
    from fer_core.data.curate import curate
    from fer_core.data.synthetic import write_dataset
    home, data = tmp_path_factory.mktemp('errors'), {}
    for name, seed, n in (('data', 0, 84), ('abroad', 9, 35)):
        data[name] = Run.create(home/name, 'curate').folder
        curate(write_dataset(home/f'{name}-raw', n_train=42, n_val=70, n_test=n, seed=seed, size=32), data[name], source='synthetic', near=None)
    return SimpleNamespace(home=home, **data, student=judged(home, data['data'], 'student-0', 'student', .75, 0), teacher=judged(home, data['data'], 'teacher-0', 'teacher', .4, 1))


def pack_of(world):
    from fer_core.data.loader import open_pack
    from fer_core.data.preprocess import Preprocess
    return open_pack(world.data, Preprocess(**SPEC))


def test_hidden_faces_are_all_the_same_and_shown_ones_are_the_manifests(world):
    pack = pack_of(world)
    ids = pack.table['id'].iloc[[5, 0, 60]].tolist()
    hidden, shown = faces_shown(ids), faces_shown(ids, pack)
    assert all((h == hidden[0]).all() for h in hidden) and len(hidden) == 3 and not any(np.corrcoef(hidden[0][::2, ::2][:16, :16].ravel(), p[0, ::2, ::2].ravel())[0, 1] > .95 for p in pack.pixels)
    assert all((s == pack.pixels[i]).all() for s, i in zip(shown, (5, 0, 60)))
    with pytest.raises(FerError, match='nobody is not in the pack'): faces_shown([ids[0], 'nobody'], pack)


def test_runs_that_cannot_be_looked_at_are_refused(world, tmp_path):
    assert finished_run(world.student).stage == 'student' and finished_run(world.teacher, ('teacher',)).stage == 'teacher'
    for stage, status, code, said in (('student', 'running', 'missing_checkpoint', 'has not ended'), ('student', 'failed', 'missing_checkpoint', 'has not ended'), ('compress', 'accepted', 'bad_parameter', 'is a compress run'), ('ensemble', 'accepted', 'bad_parameter', 'name a teacher or student or prune or qat run')):
        Run.create(tmp_path/'r', stage).record(status=status)
        with pytest.raises(FerError) as e: finished_run(tmp_path/'r')
        assert e.value.code == code and said in str(e.value)
    with pytest.raises(FerError) as e: finished_run(tmp_path/'nowhere')
    assert e.value.code == 'missing_file'


# ---- the stage ----

def pictures(page): # executed notebook -> its pictures, grey
    import cv2
    out = [o for c in page['cells'] for o in c.get('outputs', [])]
    assert {k for o in out for k in o.get('data', {})} <= {'image/png', 'text/plain', 'text/html', 'text/markdown'}
    assert not any('data:image' in json.dumps(o.get('data', {}).get('text/html', '')) or '<img' in json.dumps(o.get('data', {}).get('text/html', '')) for o in out)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(o['data']['image/png']), np.uint8), cv2.IMREAD_GRAYSCALE) for o in out if 'image/png' in o.get('data', {})]


def likeness(picture, face, side): # the best correlation of a face with any place of a picture, drawn about so large
    import cv2
    sizes = [s for s in range(side - 2, side + 3) if s <= min(picture.shape)]
    return max((float(cv2.matchTemplate(picture, cv2.resize(face, (s, s)), cv2.TM_CCOEFF_NORMED).max()) for s in sizes), default=0.)


def montage_of(faces, hard): # -> the page's montage as it would be with these pictures, and how large it draws one
    import cv2, io
    from fer_core.evaluate import figures
    from fer_core.evaluate.errors import captions
    fig, file = figures.montage(faces, captions(hard), colours=[figures.COLOURS[c] for c in hard['predicted']]), io.BytesIO()
    for kind in ('pdf', 'svg'): fig.savefig(io.BytesIO(), format=kind, bbox_inches='tight') # kept as files before it is shown, which sets its layout
    fig.savefig(file, bbox_inches='tight', dpi=100)
    return cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_GRAYSCALE), round(fig.axes[0].get_window_extent().width)


def test_the_stage_from_two_runs_to_a_page_without_faces(world):
    from fer_core.data.hard import hard_samples
    from fer_core.evaluate.metrics import softmax
    from fer_core.models.backbones import load_model
    from fer_core.data.loader import Feeder, open_pack
    from fer_core.runs.report import verify_run
    from fer_core.runs.stage import run_stage
    from fer_core.train.judge import read_logits
    from fer_core.train.loop import predict_logits
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
    run = run_stage('errors', {'data': str(world.data), 'student': str(world.student), 'teacher': str(world.teacher), 'elsewhere': [str(world.abroad)], 'sure': .7, 'n_map': 60, 'n_hard': 10}, world.home)
    assert run.manifest.status == 'accepted' and set(verify_hashes(run.folder).values()) == {'ok'} and {r['state'] for r in verify_run(run.folder)} == {'ok'}
    assert {k: p.id for k, p in run.manifest.parents.items()} == {'data': 'data', 'student': 'student-0', 'teacher': 'teacher-0', 'elsewhere_0': 'abroad'} and run.manifest.dataset['sha256'] == Run(world.student).manifest.dataset['sha256']
    told, pack = read_json(run.path('errors.json')), pack_of(world)
    rows, y = pack.rows('test'), pack.labels[pack.rows('test')]
    z = {k: read_logits(f/'logits.npz')[0]['test'] for k, f in (('student', world.student), ('teacher', world.teacher))}
    for k in z: assert (confusion_matrix(y, z[k].argmax(1)) == told['confusion'][k]).all()
    assert len(told['cells']['rows']) == 49 and all(c['p'] <= c['p_holm'] for c in told['cells']['rows'])
    p = softmax(z['student'], read_json(world.student/'calibration.json')['temperature'])
    certain = np.flatnonzero((p.argmax(1) != y) & (p.max(1) >= .7))
    ids = pack.table['id'].to_numpy()[rows]
    assert len(certain) and [f['id'] for f in told['sure_and_wrong']['faces']] == list(ids[certain][np.argsort(-p.max(1)[certain], kind='stable')])
    assert told['sure_and_wrong']['by_class']['all']['sure_and_wrong'] == len(certain)
    loss = -np.log(p[np.arange(len(y)), y])
    assert [h['id'] for h in told['hard']] == list(ids[np.argsort(-loss)[:10]]) and told['faces_shown'] is False
    model, spec, _ = load_model(world.student)
    model.forward = model.embed
    e = predict_logits(model, Feeder(pack), rows)
    assert np.allclose([[told['embeddings']['between'][a][b] for b in CLASSES] for a in CLASSES], class_distances(e, y), atol=1e-5) and told['embeddings']['map']['faces'] == 60
    assert all(run.path(f'figures/{n}.{k}').is_file() for n in ('confusion', 'confusion-delta', 'embeddings') for k in ('pdf', 'svg')) and '-embeddings}' in run.path('appendix.tex').read_text() and not list(run.folder.glob('*.npy'))
    where = {(r['dataset'], r['model']): r for r in told['elsewhere']}
    assert set(where) == {(d, m) for d in ('home test', 'abroad') for m in ('student-0', 'teacher-0')}
    for folder in (world.student, world.teacher):
        other = open_pack(world.abroad, spec)
        said, truth = predict_logits(load_model(folder)[0], Feeder(other), other.rows('test')).argmax(1), other.labels[other.rows('test')]
        there, here = where['abroad', folder.name], where['home test', folder.name]
        assert there['accuracy'] == pytest.approx(accuracy_score(truth, said)) and there['macro_f1'] == pytest.approx(f1_score(truth, said, labels=range(7), average='macro', zero_division=0))
        assert there['gap'] == pytest.approx(here['macro_f1'] - there['macro_f1']) and here['accuracy'] == pytest.approx((z['student' if 'student' in folder.name else 'teacher'].argmax(1) == y).mean())
    hard = hard_samples(pack.table.iloc[rows].reset_index(drop=True), p, test=True).head(10)
    drawn_on, side = montage_of(faces_shown(hard['id'], pack), hard)
    shown, faces = pictures(json.loads(run.path('errors.ipynb').read_text())), [pack.pixels[i][0] for i in pd.Index(pack.table['id']).get_indexer(hard['id'])]
    assert len(shown) == 4 and min(likeness(drawn_on, f, side) for f in faces) > .85  # shown, they would be found
    assert max(likeness(picture, f, side) for picture in shown for f in faces) < .7
    assert any(picture.shape == drawn_on.shape and (picture == montage_of(faces_shown(hard['id']), hard)[0]).all() for picture in shown)  # the page's montage is made of silhouettes alone


def test_a_teacher_of_other_data_ends_the_stage_with_one_sentence(world, tmp_path):
    from fer_core.runs.stage import run_stage
    alien = judged(tmp_path, world.abroad, 'teacher-alien', 'teacher', .4, 2)
    with pytest.raises(FerError) as e: run_stage('errors', {'student': str(world.student), 'teacher': str(alien)}, tmp_path)
    assert e.value.code == 'softlabel_misaligned' and 'teacher-alien' in str(e.value) and read_json(next(tmp_path.glob('*-errors-*/run.json')))['status'] == 'failed'

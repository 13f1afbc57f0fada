"Corrupted pictures, what calibration is worth on them, and a finished run asked about them."
import io, json
from types import SimpleNamespace
import cv2, numpy as np, pytest
from PIL import Image
from sklearn.metrics import f1_score, log_loss
from fer_core.artifacts import FerError, Run, parent, read_json, write_json
from fer_core.data.corruptions import CORRUPTIONS, corrupt, disc_kernel, line_kernel
from fer_core.evaluate.calibrate import fit_temperature
from fer_core.evaluate.metrics import ece, softmax
from fer_core.evaluate.scaling import choose_scaling
from fer_core.evaluate.shift import corruption_means, fit_clean, shift_curves, shift_figures, shift_table
from fer_core.labels import CLASSES

GREY = np.full((96, 96), 128, np.uint8)


def picture(seed=0, side=48, colour=False):
    shape = (side, side, 3) if colour else (side, side)
    x = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, shape), (0, 0), 2)
    return np.clip(128 + 50*x/x.std(), 0, 255).astype(np.uint8)


# ---- corruptions, against closed forms and other implementations ----

def test_noise_has_the_spread_that_it_says():
    for s, c in enumerate(CORRUPTIONS['gaussian_noise'][1], 1):
        x = corrupt(GREY, 'gaussian_noise', s).astype(float) - 128
        assert x.std() == pytest.approx(255*c, rel=.03) and abs(x.mean()) < 3*255*c/96


def test_low_light_is_photons_by_stops():
    "Counted photons have mean and variance 1000·2^-s of the linear light; the eye's grey falls by 2^(-s/2.2)."
    for s in (1, 3, 5):
        light = 2.**-s*(128/255)**2.2
        linear = (corrupt(np.full((256, 256), 128, np.uint8), 'low_light', s)/255.)**2.2
        assert linear.mean() == pytest.approx(light, rel=.03) and linear.var() == pytest.approx(light/1000, rel=.12)


def test_contrast_keeps_the_mean_and_a_share_of_the_rest():
    x = picture(1, colour=True)
    for s, c in enumerate(CORRUPTIONS['contrast'][1], 1):
        y = corrupt(x, 'contrast', s).astype(float)
        assert np.abs(y - ((x - x.mean((0, 1)))*c + x.mean((0, 1)))).max() <= .5 + 1e-6
        assert y.mean((0, 1)) == pytest.approx(x.mean((0, 1)), abs=.1)


def test_jpeg_is_pillows_at_the_same_quality():
    x = picture(2)
    for s, q in enumerate(CORRUPTIONS['jpeg_compression'][1], 1):
        file = io.BytesIO()
        Image.fromarray(x).save(file, 'JPEG', quality=q)
        theirs = np.asarray(Image.open(file)).astype(int)
        ours = corrupt(x, 'jpeg_compression', s).astype(int)
        assert np.abs(ours - theirs).max() <= 3 and np.abs(ours - x).mean() > 1


def test_downscaled_pixels_are_means_over_their_area():
    x = picture(3)
    for s, c in enumerate(CORRUPTIONS['downscale'][1], 1):
        side, j = round(48*c), np.arange(48)
        edges = np.arange(side + 1)*48/side
        share = np.clip(np.minimum(edges[1:, None], j + 1) - np.maximum(edges[:-1, None], j), 0, 1)*side/48  # of old pixel j in new pixel i
        assert corrupt(x, 'downscale', s) == pytest.approx(share @ x @ share.T, abs=.6)


def test_blur_kernels_have_the_moments_of_line_and_disc():
    "Variance of a uniform line: L²/12; of a disc: r²/4 along each axis. Sharing among pixels adds at most a quarter of a pixel²."
    def moments(k):
        y, x = np.mgrid[:len(k), :len(k)] - len(k)//2
        return k.sum(), (k*x).sum(), (k*y).sum(), (k*x*x).sum(), (k*y*y).sum(), (k*x*y).sum()
    for length, angle in ((6, 0), (9, 30), (12, -45), (2.1, 17)):
        total, mx, my, vx, vy, xy = moments(line_kernel(length, angle))
        a, v = np.deg2rad(angle), length**2/12*(101 + 1)/(101 - 1)
        assert (total, mx, my) == pytest.approx((1, 0, 0), abs=1e-9)
        assert -1e-9 <= vx - v*np.cos(a)**2 <= .26 and -1e-9 <= vy - v*np.sin(a)**2 <= .26 and xy == pytest.approx(v*np.sin(a)*np.cos(a), abs=1e-6)
    for r in (.5, 1.5, 3, 8):
        total, mx, my, vx, vy, xy = moments(disc_kernel(r))
        assert (total, mx, my, xy) == pytest.approx((1, 0, 0, 0), abs=1e-9) and vx == pytest.approx(vy) and -.03*r*r <= vx - r*r/4 <= .26
    spot = np.zeros((64, 64), np.uint8); spot[32, 32] = 255
    assert np.abs(corrupt(spot, 'defocus_blur', 5)[28:37, 28:37] - 255*disc_kernel(3.)).max() <= .51  # 64 px: lengths as they are
    assert corrupt(picture(0, 128), 'defocus_blur', 5).astype(float).std() < corrupt(picture(0, 64), 'defocus_blur', 5).astype(float).std()  # and in proportion


def test_an_occluder_covers_its_share_and_nothing_else():
    x = picture(4, colour=True)
    for s, c in enumerate(CORRUPTIONS['occlusion'][1], 1):
        for key in 'abc':
            y = corrupt(x, 'occlusion', s, key=key)
            rows, cols = np.nonzero((y != x).any(2))
            box = y[rows.min():rows.max() + 1, cols.min():cols.max() + 1]
            assert len(np.unique(box)) == 1 and box.shape[0]*box.shape[1]/48**2 == pytest.approx(c, abs=.035)


@pytest.mark.parametrize('name', CORRUPTIONS)
@pytest.mark.parametrize('colour', [False, True])
def test_a_corruption_is_decided_by_seed_and_picture_and_leaves_its_input(name, colour):
    x = picture(5, colour=colour)
    before, y = x.copy(), corrupt(x, name, 3, 1, 'a')
    assert (x == before).all() and y.dtype == np.uint8 and y.ndim == x.ndim and (name == 'downscale' or y.shape == x.shape)
    assert (y == corrupt(x, name, 3, 1, 'a')).all()
    drawn = name in ('gaussian_noise', 'motion_blur', 'low_light', 'occlusion')
    assert (y != corrupt(x, name, 3, 2, 'a')).any() == (y != corrupt(x, name, 3, 1, 'b')).any() == drawn


# ---- figures on logits ----

def drawn(n, fade=1., seed=0):
    rng = np.random.default_rng(seed)
    y = rng.choice(7, n)
    return 2*1.9*(1.9*fade*np.eye(7)[y] + rng.normal(0, 1, (n, 7))), y


def test_the_figures_are_those_of_other_implementations():
    fit, (z, y) = fit_clean(*drawn(3000), coverage=.9, risk=.2), drawn(2500, .6, 1)
    f = shift_figures(fit, z, y)
    T, p = fit_temperature(*drawn(3000)), None
    assert fit.temperature == T == pytest.approx(2, rel=.06)  # the posterior, doubled
    for key, t in (('_raw', 1.), ('', T), ('_oracle', fit_temperature(z, y))):
        p = softmax(z, t)
        assert f[f'nll{key}'] == pytest.approx(log_loss(y, p, labels=range(7)), abs=1e-9) and f[f'ece{key}'] == ece(p, y)
    assert f['macro_f1'] == pytest.approx(f1_score(y, z.argmax(1), average='macro')) and f['accuracy'] == (z.argmax(1) == y).mean()
    assert all(f['nll_oracle'] <= log_loss(y, softmax(z, t), labels=range(7)) + 1e-9 for t in np.linspace(.5, 9, 60))  # a bound for any one temperature


def test_conformal_sets_and_threshold_are_those_of_clean_validation():
    "LAC by hand: the label is in the set where its probability is at least 1 - q, q the ⌈(n + 1)(1 - α)⌉-th smallest validation score."
    (vz, vy), (z, y) = drawn(2000), drawn(1500, .6, 1)
    fit = fit_clean(vz, vy, .9, .2)
    f, p, v = shift_figures(fit, z, y), softmax(z, fit.temperature), softmax(vz, fit.temperature)
    scores = np.sort(1 - v[np.arange(2000), vy])
    q = scores[int(np.ceil(2001*.9)) - 1]
    assert f['set_coverage'] == pytest.approx((1 - p[np.arange(1500), y] <= q).mean(), abs=.002) and f['set_size'] == pytest.approx((1 - p <= q).sum(1).mean(), abs=.01)
    kept = p.max(1) >= fit.threshold
    assert f['answered'] == kept.mean() and f['risk'] == (p[kept].argmax(1) != y[kept]).mean()
    clean = shift_figures(fit, *drawn(3000, 1, 2))
    assert abs(clean['set_coverage'] - .9) < .02 and clean['risk'] < .2 < f['risk'] and f['set_coverage'] < .85 and clean['ece'] < .03 < f['ece']


def test_a_promise_that_cannot_be_made_leaves_no_answers():
    f = shift_figures(fit_clean(*drawn(300, .1), risk=.05), *drawn(200, .1, 1))
    assert f['answered'] == 0 and f['risk'] is None


def test_a_scaling_beyond_one_temperature_is_judged_where_validation_asks_for_it():
    def skewed(n, fade=1., seed=0):  # one class said far too surely, as class weights make a student do
        z, y = drawn(n, fade, seed)
        z[np.arange(n), 0] += 3*(z.argmax(1) == 0)
        return z, y
    (vz, vy), (z, y) = skewed(3000), skewed(2500, .6, 1)
    fit, f = fit_clean(vz, vy), shift_figures(fit_clean(vz, vy), z, y)
    assert fit.scaling == choose_scaling(vz, vy)[0] and fit.scaling.method == 'answer'
    p = softmax(fit.scaling(z))
    assert f['nll_scaled'] == pytest.approx(log_loss(y, p, labels=range(7)), abs=1e-9) and f['ece_scaled'] == ece(p, y)
    clean = shift_figures(fit, *skewed(3000, 1, 2))
    assert clean['ece_scaled'] < .7*clean['ece'] and clean['accuracy'] == (softmax(fit.scaling(skewed(3000, 1, 2)[0])).argmax(1) == skewed(3000, 1, 2)[1]).mean()
    rows = [{'shift': s, 'severity': v} | d for s, v, d in (('clean', 0, clean), ('fog', 1, f))]
    assert shift_table(rows)['ECE scaled'].tolist() == [clean['ece_scaled'], f['ece_scaled']] and corruption_means(rows)['ece_scaled'] == f['ece_scaled']
    assert 'mean, scaling of clean validation' in [t.get_text() for t in shift_curves(rows).axes[1].get_legend().get_texts()]
    plain = fit_clean(*drawn(3000))
    assert plain.scaling is None and 'ECE scaled' not in shift_table([{'shift': 'clean', 'severity': 0} | shift_figures(plain, *drawn(900, 1, 1))])


def row(shift, severity, v, risk=.1): return {'shift': shift, 'severity': severity, 'n': 9, 'risk': risk} | dict.fromkeys(('accuracy', 'macro_f1', 'nll_raw', 'nll', 'nll_oracle', 'ece_raw', 'ece', 'ece_oracle', 'oracle_temperature', 'set_coverage', 'set_size', 'answered'), v)


def test_corruptions_weigh_the_same_whatever_their_severities():
    rows = [row('clean', 0, .9), row('a', 1, .8), row('a', 2, .4), row('b', 5, .2, None), row('there', None, .5)]
    table = shift_table(rows)
    assert list(table.index) == ['clean', 'a', 'b', 'mean of 2 corruptions', 'there']
    assert table['ECE'].tolist() == pytest.approx([.9, .6, .2, .4, .5]) and np.isnan(table.loc['b', 'error among answers'])
    assert corruption_means(rows)['ece'] == pytest.approx(.4) and corruption_means(rows)['risk'] == pytest.approx(.1) and corruption_means(rows[:1]) == {}


# ---- finished runs ----

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Two curated folders, two teachers and their ensemble; the networks are untrained, which their calibration does not mind."
    import torch
    from fer_core.data.curate import curate
    from fer_core.data.loader import Feeder, open_pack
    from fer_core.data.preprocess import Preprocess
    from fer_core.data.synthetic import write_dataset
    from fer_core.models.backbones import Classifier, ModelConfig, save_model
    from fer_core.teach.ensemble import fuse
    from fer_core.train.judge import judge_model, read_logits, write_verdict
    home, data = tmp_path_factory.mktemp('shift'), {}
    for name, seed, n in (('data', 0, 84), ('abroad', 9, 35)):
        data[name] = Run.create(home/name, 'curate').folder
        curate(write_dataset(home/f'{name}-raw', n_train=42, n_val=70, n_test=n, seed=seed, size=32), data[name], source='synthetic', near=None)
    teachers = []
    for k, (spec, flip) in enumerate(((Preprocess(size=32), True), (Preprocess(size=24, clahe=0, colour='rgb'), False))):
        pack, run = open_pack(data['data'], spec, cache=home/'packs'), Run.create(home/f'teacher-{k}', 'teacher')
        torch.manual_seed(k)
        model = Classifier(ModelConfig('mobilenetv3_small_050', channels=spec.channels))
        save_model(run.folder, model, spec)
        run.record(dataset={'sha256': pack.dataset_sha256, 'sources': ['synthetic'], 'splits': {'test': 84}}, preprocessing=spec.to_dict(), seeds={'train': k}, reliability={'flip_averaged': flip})
        judge_model(run, model, Feeder(pack), 'teacher', flip=flip)
        run.finish(); teachers.append(run.folder)
    both = Run.create(home/'ensemble-0', 'ensemble')
    fusion = {'weights': [.7, .3], 'temperatures': [2., .5], 'fusion': 'logits', 'temperature': 1.}
    z = [read_logits(t/'logits.npz')[0] for t in teachers]
    both.record(dataset={'sha256': pack.dataset_sha256}, parents={f'teacher_{k}': parent(t, 'best.safetensors') for k, t in enumerate(teachers)})
    write_verdict(both, pack, {s: fuse([m[s] for m in z], fusion['temperatures'], fusion['weights']) for s in ('val', 'test')}, 'ensemble')
    write_json(both.path('ensemble_metrics.json'), {'fusion': fusion})
    both.finish()
    return SimpleNamespace(home=home, **data, teachers=teachers, ensemble=both.folder)


def shifted(world, tmp_path, **more):
    from fer_core.runs.shift import Shifted
    return Shifted(Run.create(tmp_path/'shift', 'shift'), **({'model': world.teachers[0], 'data': world.data, 'corruptions': ['gaussian_noise', 'occlusion'], 'severities': [1, 5], 'risk': .9} | more))


@pytest.mark.parametrize('which', ['mirrored', 'colour without CLAHE', 'ensemble'])
def test_clean_faces_give_the_stored_logits(world, tmp_path, which):
    "Without a pack: other preprocessing, the mirror rule and the fusion are each the run's own."
    from fer_core.runs.shift import ask_blocks, shifts
    folder = {'mirrored': world.teachers[0], 'colour without CLAHE': world.teachers[1], 'ensemble': world.ensemble}[which]
    told = shifted(world, tmp_path, model=folder)
    test = told.home[told.home['split'] == 'test']
    z = ask_blocks(told.asked, told.roots, test, shifts([], []))
    assert list(z) == [('clean', 0)] and np.abs(z['clean', 0] - told.logits['test']).max() < 1e-3*np.abs(told.logits['test']).max()


def test_corrupted_faces_are_made_before_preprocessing_and_block_by_block(world, tmp_path, monkeypatch):
    from fer_core.data.images import read_image
    from fer_core.data.preprocess import normalise, standardise
    from fer_core.runs import shift
    import torch
    told = shifted(world, tmp_path)
    test = told.home[told.home['split'] == 'test'].iloc[:20]
    monkeypatch.setattr(shift, 'BLOCK', 7)
    seen = []
    z = shift.ask_blocks(told.asked, told.roots, test, told.conditions, 3, lambda i, n: seen.append((i, n)))
    model, spec, _ = told.asked.members[0]
    x = np.stack([normalise(standardise(corrupt(read_image(world.home/'data-raw', p), 'occlusion', 5, 3, i), spec), spec) for p, i in zip(test['path'], test['id'])])
    with torch.no_grad(): expected = (model(torch.from_numpy(x)) + model(torch.from_numpy(x[..., ::-1].copy())))/2
    assert np.abs(z['occlusion', 5] - expected.numpy()).max() < 1e-3*np.abs(expected.numpy()).max()
    assert seen[-1] == (100, 100) and [i for i, _ in seen] == sorted(i for i, _ in seen) and len(seen) == 15


def test_a_part_of_the_faces_is_told_as_one_and_the_artifact_holds_every_row(world, tmp_path):
    told = shifted(world, tmp_path, limit=40, others=[world.abroad], model=world.ensemble).ask()
    saved, m = read_json(told.run.path('shift.json')), Run(told.run.folder).manifest
    assert saved['n'] == 40 and saved['limit'] == 40 and saved['same_as_stored'] == 1 and saved['values']['occlusion'] == [.05, .1, .2, .3, .4]
    assert [(r['shift'], r['severity'], r['n']) for r in saved['rows']] == [('clean', 0, 40), *((c, s, 40) for c in ('gaussian_noise', 'occlusion') for s in (1, 5)), ('abroad', None, 35)]
    assert set(m.metrics) == {'clean', 'abroad', 'mean of corruptions'} and m.metrics['abroad'].n == 35 and m.metrics['abroad'].dataset != m.metrics['clean'].dataset == told.sha and not m.metrics['clean'].in_sample
    assert m.metrics['mean of corruptions'].accuracy == pytest.approx(np.mean([r['accuracy'] for r in saved['rows'][1:5]]))
    assert set(m.parents) == {'model', 'data', 'elsewhere_0'} and list(told.table().index) == ['clean', 'gaussian_noise', 'occlusion', 'mean of 2 corruptions', 'abroad']
    again = shifted(world, tmp_path/'again', limit=40, others=[world.abroad], model=world.ensemble).ask()
    assert read_json(again.run.path('shift.json')) == saved
    assert read_json(shifted(world, tmp_path/'other', limit=40, model=world.ensemble, seed=1).ask().run.path('shift.json'))['rows'][0] != saved['rows'][0]


def test_pictures_that_changed_since_are_noticed(world, tmp_path):
    told = shifted(world, tmp_path)
    told.logits['test'] = -told.logits['test']
    with pytest.raises(FerError, match='clean test faces decides') as e: told.ask()
    assert e.value.code == 'corrupt_artifact' and not told.run.path('shift.json').exists()


@pytest.mark.parametrize('more, code, said', [
    ({'data': 'abroad'}, 'softlabel_misaligned', 'stands on dataset'), ({'others': ['data']}, 'bad_parameter', 'is the data of teacher-0 itself'),
    ({'model': 'data'}, 'bad_parameter', 'is a curate run'), ({'data': 'teachers'}, 'missing_file', 'classification_manifest.csv'),
    ({'corruptions': ['fog']}, 'bad_parameter', "'fog' is none of"), ({'severities': [0]}, 'bad_parameter', 'severity 0'), ({'severities': ['1']}, 'bad_parameter', "severity '1'"),
    ({'severities': [2, 2]}, 'bad_parameter', 'named twice'), ({'limit': -1}, 'bad_parameter', 'limit -1'), ({'coverage': 1.5}, 'bad_parameter', 'coverage 1.5')])
def test_what_does_not_fit_is_refused(world, tmp_path, more, code, said):
    named = {k: ([str(getattr(world, o)) for o in v] if k == 'others' else (world.teachers[0] if v == 'teachers' else getattr(world, v)) if k in ('data', 'model') else v) for k, v in more.items()}
    with pytest.raises(FerError) as e: shifted(world, tmp_path, **named).ask()
    assert e.value.code == code and said in str(e.value), str(e.value)


def test_the_stage_runs_and_shows_it(world, tmp_path):
    from fer_core.runs.stage import run_stage
    run = run_stage('shift', {'data': str(world.data), 'model': str(world.ensemble), 'corruptions': '[contrast, jpeg_compression]', 'severities': '[2, 4]', 'limit': '30', 'others': str(world.abroad), 'risk': '0.9'}, tmp_path)
    page = json.loads(run.path('shift.ipynb').read_text())
    shown = '\n'.join(''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/html', '')) for c in page['cells'] for o in c.get('outputs', []))
    assert run.manifest.status == 'accepted' and 'jpeg_compression' in shown and 'mean of 2 corruptions' in shown and 'Fitted on 70 clean validation faces' in shown
    assert sum('image/png' in o.get('data', {}) for c in page['cells'] for o in c.get('outputs', [])) == 1 and len(read_json(run.path('shift.json'))['rows']) == 6
    assert all(c in CLASSES for c in run.manifest.class_order)

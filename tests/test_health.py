"""Drift and health from outside: formulas against SciPy's, warnings that neither flicker nor stay, references that travel in files."""
import json
from types import SimpleNamespace
import cv2, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy.special import softmax
from scipy.stats import chi2, entropy
from fer_core.artifacts import FerError
from fer_core.evaluate import drift
from fer_core.labels import CLASSES
from fer_core.live.health import LIMITS, Health, Latch, draw_notices, flaws, health_table, quality
from fer_core.live.recognise import Face, Recognizer, toy_model

counts = st.lists(st.integers(0, 500), min_size=2, max_size=20)
GOOD, T = 200, 1.5


def scores(n, sharp=6., seed=0, mix=(1,)*7):
    rng = np.random.default_rng(seed)
    y = rng.choice(7, n, p=np.array(mix)/sum(mix))
    return softmax((sharp*np.eye(7)[y] + rng.normal(0, 1, (n, 7)))/T, 1)


@pytest.fixture(scope='module')
def reference(): return drift.make_reference(scores(3000, seed=9), T, [700]*7)


@pytest.fixture(scope='module')
def model(reference): return SimpleNamespace(temperature=T, metadata={'reference': json.dumps(reference)})


@pytest.fixture(scope='module')
def picture():
    from fer_core.data.synthetic import make_face
    return cv2.resize(make_face('happy', 3, 240), (GOOD, GOOD), interpolation=cv2.INTER_AREA)


def scene(picture, side=GOOD, light=1., blur=0):
    image = np.full((300, 400, 3), 128, np.uint8)
    image[40:40 + side, 100:100 + side] = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    return (light*(cv2.GaussianBlur(image, (0, 0), blur) if blur else image)).astype(np.uint8)


def a_face(p, side=GOOD, track=1): return Face((100., 40., float(side), float(side)), np.zeros((5, 2)), CLASSES[int(p.argmax())], p, float(p.max()), False, track)


def run(health, image, probs, t0=0., step=40., side=GOOD, track=1):
    "Feed one face frame by frame; the codes that stood after each frame."
    return [{n.code for n in health.update(image, [a_face(p, side, track)], p[None], t0 + step*i)} for i, p in enumerate(probs)]


# ---- formulas ----

@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_psi_and_kl_are_the_entropies_of_scipy(data):
    a = data.draw(counts)
    b = data.draw(st.lists(st.integers(0, 500), min_size=len(a), max_size=len(a)))
    p, q = ((np.array(c) + 1)/(sum(c) + len(c)) for c in (a, b))  # Laplace's rule, written out
    assert np.isclose(drift.kl(a, b), entropy(p, q)) and np.isclose(drift.psi(a, b), entropy(p, q) + entropy(q, p)) and drift.psi(a, b) >= 0 and abs(drift.psi(a, a)) < 1e-12
    assert np.isclose(drift.psi(a, b), drift.psi(b, a))


@pytest.mark.parametrize('bins', [3, 7, 10, 20])
def test_the_noise_of_psi_is_chi_squared(bins):
    assert np.isclose(drift.psi_noise(300, 5000, bins), (1/300 + 1/5000)*chi2.ppf(.95, bins - 1), rtol=.01)
    rng, share = np.random.default_rng(bins), np.full(bins, 1/bins)
    psis = [drift.psi(rng.multinomial(300, share), rng.multinomial(5000, share)) for _ in range(2000)]
    assert .02 < np.mean(np.array(psis) > drift.psi_noise(300, 5000, bins)) < .07


def test_levels_are_the_fields():
    assert [drift.psi_level(v) for v in (0, .09, .1, .24, .25, 2)] == ['stable']*2 + ['shifted']*2 + ['drifted']*2
    assert [drift.psi_level(v, .3) for v in (.26, .29, .31)] == ['stable', 'stable', 'drifted']


def test_what_is_no_histogram_is_an_error():
    for a, b in (([1], [1]), ([1, 2], [1, 2, 3]), ([1, -1], [1, 1]), ([[1, 2]], [1, 2])):
        with pytest.raises(FerError): drift.psi(a, b)


def test_contrasts_are_the_logits_without_their_mean():
    z = np.random.default_rng(0).normal(0, 4, (50, 7))
    x = drift.contrasts(softmax(z/T, 1), T)
    c = z - z.mean(1, keepdims=True)
    assert np.allclose(x@x.T, c@c.T) and np.allclose(x, drift.contrasts(softmax((z + 5)/T, 1), T))
    assert np.isfinite(drift.contrasts(np.eye(7)[:3], T)).all()  # a probability of 0


def test_distances_are_scipys():
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import mahalanobis
    rng = np.random.default_rng(1)
    (m, n), (A, B) = rng.normal(size=(2, 6)), (np.cov(rng.normal(size=(40, 6))@rng.normal(size=(6, 6)), rowvar=False) for _ in range(2))
    assert np.isclose(drift.frechet((m, A), (n, B)), ((m - n)**2).sum() + np.trace(A + B - 2*sqrtm(A@B).real)) and drift.frechet((m, A), (m, A)) < 1e-8
    x = rng.normal(size=(5, 6))
    assert np.allclose(drift.unusual(x, m, A), [mahalanobis(r, m, np.linalg.inv(A))**2 for r in x], rtol=5e-3)  # a little regularised


# ---- the reference in a file ----

def test_a_reference_travels_in_the_file_and_changes_nothing_else(tmp_path):
    from fer_core.compress.export import read_metadata, write_metadata
    from fer_core.compress.release import carry_reference
    path, rng = toy_model(tmp_path/'m.onnx'), np.random.default_rng(0)
    crops = [rng.integers(0, 256, (48, 48), dtype=np.uint8) for _ in range(300)]
    before = Recognizer(path)
    z = before.logits(crops)
    assert drift.read_reference(before.metadata) == (None, 'the model file carries no reference')
    assert carry_reference(path, z, [1, 2, 3, 4, 5, 6, 7]) and not carry_reference(path, z[:19])
    r = Recognizer(path)
    told, why = drift.read_reference(r.metadata)
    assert why == '' and told['n'] == 300 and told['train'] == [1, 2, 3, 4, 5, 6, 7] and np.array_equal(r.logits(crops), z) and r.temperature == before.temperature
    assert len(r.metadata['reference']) < 2000
    p = r.classify(crops)
    assert np.abs(np.array(told['confidence']['counts']) - 30).max() <= 1 and np.allclose(told['confidence']['edges'], np.quantile(p.max(1), np.arange(1, 10)/10), rtol=1e-4)
    write_metadata(path, temperature='3.0')  # what is not asked for stays
    assert drift.read_reference(read_metadata(path))[0] == told
    with pytest.raises(FerError, match='unknown metadata'): write_metadata(path, referense='x')


def test_an_int8_copy_of_a_model_carries_its_own(tmp_path):
    from fer_core.compress.release import carry_reference
    a, b = toy_model(tmp_path/'a.onnx'), toy_model(tmp_path/'b.onnx')
    rng = np.random.default_rng(0)
    for path, k in ((a, 1.), (b, .5)): carry_reference(path, k*rng.normal(0, 3, (200, 7)))
    ra, rb = (drift.read_reference(Recognizer(p).metadata)[0] for p in (a, b))
    assert ra['confidence']['edges'][4] > rb['confidence']['edges'][4] + .1 and ra['train'] is None


@pytest.mark.parametrize('change', [{'mean': [0]}, {'cov': 'x'}, {'predicted': [1, 2]}, {'predicted': [-1]*7}, {'train': [1]}, {'n': 0}, {'n': None}, {'confidence': {'edges': [.5], 'counts': [1]}}, {'logits': None}, {'confidence': {'edges': [.6, .5], 'counts': [1, 1, 1]}}])
def test_a_broken_reference_is_none(reference, change):
    found, why = drift.read_reference({'reference': json.dumps(reference | change)})
    assert found is None and 'cannot be used' in why


@pytest.mark.parametrize('text', ['', '{', 'null', '[]', '3', '"x"'])
def test_a_reference_that_is_none(text): assert drift.read_reference({'reference': text})[0] is None


def test_a_model_with_a_broken_reference_still_works(tmp_path, reference):
    r = Recognizer(toy_model(tmp_path/'m.onnx', reference='{"n": 3'))
    h = Health(r)
    assert h.own and 'cannot be used' in h.summary()['reference']['says'] and r.classify([np.zeros((9, 9), np.uint8)]).shape == (1, 7)


# ---- quality ----

def test_quality_by_hand(picture):
    q = quality(picture, (0, 0, GOOD, GOOD))
    g = cv2.resize(np.ascontiguousarray(picture[::2, ::2, 1]), (48, 48), interpolation=cv2.INTER_AREA)
    from scipy.ndimage import laplace
    assert np.isclose(q.sharpness, laplace(g.astype(float), mode='mirror').var()/g.var(), rtol=1e-6) and np.isclose(q.mean, g.mean()) and np.isclose(q.contrast, g.std()) and q.size == GOOD
    assert np.isclose(q.clipped, ((g <= 2) | (g >= 253)).mean())


@settings(max_examples=100, deadline=None)
@given(box=st.tuples(st.integers(-60, 60), st.integers(-60, 60), st.integers(0, 90), st.integers(0, 90)), grey=st.booleans())
def test_any_box_has_a_quality_or_none(box, grey):
    image = np.arange(50*40*3).astype(np.uint8).reshape(50, 40, 3)
    q = quality(image[..., 0] if grey else image, box)
    x, y, w, h = box
    inside = min(min(x + w, 40) - max(x, 0), min(y + h, 50) - max(y, 0))
    assert (q is None) == (inside < 2) and (q is None or np.isfinite(q).all() and 0 <= q.clipped <= 1 and q.sharpness >= 0)


@pytest.mark.parametrize('how, want', [({}, set()), (dict(side=30), {'small'}), (dict(blur=12), {'blurred'}), (dict(light=.2), {'dark'})])
def test_flaws(picture, how, want):
    side = how.get('side', GOOD)
    assert flaws(quality(scene(picture, **how), (100, 40, side, side))) == want


def test_blur_is_judged_at_the_size_the_model_sees(picture):
    big = cv2.resize(picture, (800, 800), interpolation=cv2.INTER_CUBIC)
    soft = cv2.GaussianBlur(big, (0, 0), 5)  # much in pixels, little in a face of 800
    assert not flaws(quality(soft, (0, 0, 800, 800))) and 'blurred' in flaws(quality(cv2.GaussianBlur(big, (0, 0), 48), (0, 0, 800, 800)))


# ---- warnings ----

@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(0, 1), max_size=60))
def test_a_latch_comes_above_one_value_and_goes_below_the_other(values):
    latch, on = Latch(.6, .3), False
    for t, v in enumerate(values):
        turned = latch.update(v, t)
        assert turned == (1 if not on and v >= .6 else -1 if on and v < .3 else 0)
        on = on + turned > 0
        assert (latch.since is not None) == on


def test_a_small_face_is_told_about_after_a_while_with_what_since_when_and_the_mend(model, picture):
    h, p = Health(model), scores(200)
    assert run(h, scene(picture), p[:50]) == [set()]*50
    seen = run(h, scene(picture, side=30), p[:50], t0=2000., side=30)
    first = next(i for i, s in enumerate(seen) if 'small' in s)
    assert 5 < first < 25 and all('small' in s for s in seen[first:])  # neither at once nor late, and it stays
    n = h.notices['small']
    assert n.level == 'warning' and n.since == 2000 + 40*first and n.what == 'faces are under 40 px' and n.mend.startswith('step closer') and n.text(n.since + 3000) == f'faces are under 40 px for 3 s: {n.mend}'
    seen = run(h, scene(picture), p[:50], t0=4000.)
    assert 'small' not in seen[-1] and h.notices == {}
    assert [(e['code'], e['event']) for e in h.events] == [('small', 'on'), ('small', 'off')] and h.summary()['warnings']['small']['times'] == 1


def test_single_bad_frames_and_faces_at_the_limit_do_not_flicker(model, picture):
    h, good, dark = Health(model), scene(picture), scene(picture, light=.2)
    for i, p in enumerate(scores(300)): h.update(dark if i % 10 == 0 else good, [a_face(p)], p[None], 40.*i)
    assert not h.events
    for i, p in enumerate(scores(600, seed=1)): h.update(dark if i % 2 else good, [a_face(p)], p[None], 40.*(300 + i))  # every other frame
    assert len(h.events) <= 1
    first = Health(model)
    first.update(dark, [a_face(p)], p[None], 0.)
    first.update(good, [a_face(p)], p[None], 60_000.)
    assert not first.events  # nor does one frame after a long pause


def test_one_poor_face_of_three_is_no_warning_and_two_are(model, picture):
    p = scores(1)[0]
    for sides, want in (((200, 200, 30), set()), ((200, 30, 30), {'small'})):
        h = Health(model)
        for i in range(60): found = h.update(scene(picture), [a_face(p, s, k) for k, s in enumerate(sides)], np.stack([p]*3), 40.*i)
        assert {n.code for n in found} & {'small'} == want


def test_frames_without_faces_change_nothing(model, picture):
    h = Health(model)
    for i in range(50): assert h.update(scene(picture), [], np.empty((0, 7)), 40.*i) == []
    s = h.summary()
    assert s['faces'] == 0 and s['quality'] == {} and s['confidence'] is None and json.dumps(s) and health_table(s)
    assert json.dumps(Health(model).summary()) and json.dumps(Health(SimpleNamespace(temperature=1., metadata={})).summary())


# ---- drift ----

def test_drift_is_psi_of_the_last_observations(model, reference, picture):
    h, p = Health(model, window=300, apart=0.), np.concatenate([scores(400, seed=1), scores(250, sharp=2., seed=2)])
    run(h, scene(picture), p)
    last, s = p[-300:], h.summary()
    def hist(v, edges): return np.histogram(v, [-np.inf, *edges, np.inf])[0]
    x = drift.contrasts(last, T)
    now = {'confidence': hist(last.max(1), reference['confidence']['edges']), 'logits': hist(drift.unusual(x, reference['mean'], reference['cov']), reference['logits']['edges']), 'classes': np.bincount(last.argmax(1), minlength=7)}
    for k, a in now.items():
        b = reference['train'] if k == 'classes' else reference[k]['counts']
        u, v = ((np.array(c) + 1)/(sum(c) + len(c)) for c in (a, b))
        assert np.isclose(s['drift'][k]['psi'], entropy(u, v) + entropy(v, u)) and np.isclose(s['drift'][k]['kl'], entropy(u, v)), k
    assert np.isclose(s['drift']['logits']['frechet'], drift.frechet((x.mean(0), np.cov(x, rowvar=False)), (reference['mean'], reference['cov'])))
    assert s['drift']['confidence']['level'] == s['drift']['logits']['level'] == 'drifted' and s['drift']['classes']['level'] == 'stable' and s['window'] == 300 and s['observations'] == 650
    assert np.isclose(s['classes']['happy'], (p.argmax(1) == 3).mean()) and np.isclose(s['prior']['happy'], 1/7)


def test_no_drift_no_warning_and_too_few_faces_no_verdict(model, picture):
    h = Health(model, apart=0.)
    assert set().union(*run(h, scene(picture), scores(150, seed=3))) == set()
    assert {d['level'] for d in h.summary()['drift'].values()} == {'too few faces'}
    assert set().union(*run(h, scene(picture), scores(1500, seed=4), t0=6000.)) == set() and {d['level'] for d in h.summary()['drift'].values()} == {'stable'}


def test_drift_comes_and_goes(model, picture):
    h = Health(model, window=300, apart=0.)
    run(h, scene(picture), scores(300, seed=5))
    seen = run(h, scene(picture), scores(300, sharp=2., seed=6), t0=12_000.)
    assert {'confidence', 'logits'} <= seen[-1] and 'less sure' in h.notices['confidence'].what and 'validation' in h.notices['confidence'].what
    seen = run(h, scene(picture), scores(400, seed=7), t0=24_000.)
    assert seen[-1] == set() and {(e['code'], e['event']) for e in h.events} == {(c, e) for c in ('confidence', 'logits') for e in ('on', 'off')}


def test_another_mix_of_labels_is_a_note(model, picture):
    h = Health(model, apart=0.)
    run(h, scene(picture), scores(600, seed=8, mix=(1, 1, 1, 1, 20, 1, 1)))
    assert set(h.notices) == {'classes'} and h.notices['classes'].level == 'note' and '% sad' in h.notices['classes'].what and 'training' in h.notices['classes'].what


def test_neighbouring_frames_of_a_face_count_once(model, picture):
    h = Health(model)  # five observations a second
    run(h, scene(picture), scores(250))
    assert h.observed == 50 and h.faces == 250
    for i, p in enumerate(scores(10)): h.update(scene(picture), [a_face(p, track=k) for k in (8, 9)], np.stack([p, p]), 20_000 + 40.*i)
    assert h.observed == 50 + 2*2


def test_without_a_reference_the_session_is_its_own(picture):
    h = Health(SimpleNamespace(temperature=T, metadata={}), apart=0., least=200, window=300)
    run(h, scene(picture), scores(120))
    s = h.summary()
    assert s['drift'] == {} and s['reference'] == {'from': 'session', 'n': 0, 'says': "drift is measured against this session's first 200 observations, for the model file carries no reference; 120 so far"}
    run(h, scene(picture), scores(400, seed=2), t0=5000.)
    s = h.summary()
    assert s['reference']['n'] == 200 and s['drift']['confidence']['level'] == 'stable' and not h.notices
    run(h, scene(picture), scores(300, sharp=2., seed=3), t0=30_000.)
    assert {'confidence', 'logits'} <= set(h.notices) and 'first faces' in h.notices['confidence'].what and "session's first 200" in health_table(h.summary())


def test_one_face_that_never_changes(picture):
    p = scores(1)[0]
    h = Health(SimpleNamespace(temperature=T, metadata={}), apart=0.)
    run(h, scene(picture), [p]*500)  # a reference of one value: no edges between bins that differ
    assert json.dumps(h.summary()) and not h.notices


def test_nothing_of_a_picture_is_kept(model, picture):
    h = Health(model, apart=0.)
    run(h, scene(picture), scores(700))
    sizes, todo, seen = [], [h], set()
    while todo:
        o = todo.pop()
        if id(o) in seen: continue
        seen.add(id(o))
        if isinstance(o, np.ndarray): sizes.append(o.size)
        todo += list(o.values()) if isinstance(o, dict) else list(o) if isinstance(o, (list, tuple)) or type(o).__name__ == 'deque' else list(vars(o).values()) if hasattr(o, '__dict__') else []
    assert sizes and max(sizes) <= 49


def test_wrong_options_are_errors(model):
    for options in (dict(limits={'sise': 3}), dict(least=5), dict(least=300, window=200)):
        with pytest.raises(FerError): Health(model, **options)
    with pytest.raises(FerError): Latch(.3, .6)
    assert Health(model, limits={'size': 60}).limits == LIMITS | {'size': 60}


def test_warnings_are_written_on_the_picture(model, picture):
    h = Health(model)
    run(h, scene(picture, light=.2), scores(60))
    image = scene(picture)
    out = draw_notices(image.copy(), h.notices.values(), 2400.)
    changed = np.flatnonzero((out != image).any((1, 2)))
    assert len(changed) and changed.min() > 200 and np.array_equal(draw_notices(image.copy(), []), image)


def test_a_session_of_the_live_path(tmp_path, picture):
    from fer_core.faces.detect import Detections
    from fer_core.live.session import Live
    class Box:
        name = 'box'
        def detect(self, image): return Detections.make([(100, 40, GOOD, GOOD)], np.zeros((1, 5, 2)), np.ones(1))
    r = Recognizer(toy_model(tmp_path/'m.onnx'), Box(), threads=1)
    live, h = Live(r), Health(r)
    for i in range(60):
        frame = scene(picture, light=.2)
        step = live.step(frame, 40.*i)
        found = h.update(frame, step.faces, step.raw, 40.*i)
    assert 'dark' in {n.code for n in found} and h.faces == 60 and h.summary()['active']


def test_real_faces_are_well_and_blurred_ones_are_not(shared):
    from fer_core.faces.detect import detector
    d, well, ill = detector('retinaface'), [], []
    for path in sorted((shared/'data'/'faces'/'photos').glob('*')):
        image = cv2.imread(str(path))
        for box in d.detect(image).boxes:
            well.append(flaws(quality(image, box)) - {'small'})
            x, y, w, h = (int(v) for v in box)
            face = cv2.GaussianBlur(image[max(y, 0):y + h, max(x, 0):x + w], (0, 0), .08*min(w, h))
            ill.append('blurred' in flaws(quality(face, (0, 0, face.shape[1], face.shape[0]))))
    assert len(well) >= 10 and not any(well) and np.mean(ill) > .8

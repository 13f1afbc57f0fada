"Faces aligned by five landmarks: one picture in the pack, live and on film, old files that know nothing of it, and what happens where there is no face."
import json, os
from dataclasses import replace

import cv2, numpy as np, pandas as pd, pytest

from fer_core.artifacts import FerError, read_json
from fer_core.data import pack as pack_module
from fer_core.data.adapter import COLUMNS
from fer_core.data.manifest import read_manifest, write_manifest
from fer_core.data.pack import open_pack, row_faces
from fer_core.data.preprocess import Preprocess, face_of, standardise
from fer_core.faces.align import TEMPLATE, align_similarity, crop, find_landmarks
from fer_core.faces.detect import detector
from fer_core.labels import CLASSES
from fer_core.live.recognise import Recognizer, face_crops, read_spec, release_model, toy_model
from fer_core.live.session import Live
from fer_core.live.track import follow

ALIGNED, BOXED = Preprocess(size=64, clahe=0, align=1.25), Preprocess(size=64, clahe=0)
PHOTOS = 'astronaut.png', 'biden.jpg', 'obama.jpg', 'single_face.jpg'


@pytest.fixture(scope='module')
def retina(): return detector('retinaface')


@pytest.fixture(scope='module')
def photos(shared): # -> name -> BGR picture
    folder = shared/'data'/'faces'/'photos'
    found = {n: cv2.imread(str(folder/n)) for n in PHOTOS if (folder/n).is_file()}
    if len(found) < len(PHOTOS): pytest.skip(f'{folder} lacks photos')
    return found


def curated(folder, root, files, boxes=()):
    "A curated folder as far as a pack looks at it."
    folder.mkdir()
    rows = pd.DataFrame([{'id': f'r{i}', 'path': f, 'label': CLASSES[i % 7], 'source': 'folder', 'split': ('train', 'test')[i % 2], 'sha256': f'{i:064x}'} for i, f in enumerate(files)])
    for c in COLUMNS:
        if c not in rows: rows[c] = 0 if c in ('width', 'height', 'quality') else ''
    if len(boxes): rows['box'] = boxes
    write_manifest(rows, folder/'classification_manifest.csv')
    (folder/'source.json').write_text(json.dumps({'source': 'folder', 'root': str(root)}))
    return folder


def head(shape=(240, 320), centre=(160, 120), roll=0., side=1.):
    "A drawn head, and its five landmarks."
    k, at = side, np.array(centre)
    p = lambda x, y: tuple(int(round(v)) for v in at + k*np.array([x, y]))
    image, a = np.full((*shape, 3), (150, 140, 120), np.uint8), lambda *v: tuple(max(1, round(k*x)) for x in v)
    for c, axes, colour in (((0, -14), (57, 75), (30, 40, 60)), ((0, 1), (48, 66), (150, 180, 225))): cv2.ellipse(image, p(*c), a(*axes), 0, 0, 360, colour, -1)
    for x in (-20, 20):
        cv2.ellipse(image, p(x, -11), a(10, 5), 0, 0, 360, (245, 245, 245), -1); cv2.circle(image, p(x, -11), *a(4), (50, 40, 30), -1); cv2.ellipse(image, p(x, -23), a(13, 4), 0, 180, 360, (30, 40, 60), *a(3))
    cv2.ellipse(image, p(0, 7), a(7, 12), 0, 30, 150, (110, 140, 190), *a(2)); cv2.ellipse(image, p(0, 25), a(18, 9), 0, 10, 170, (80, 80, 190), *a(5))
    M = cv2.getRotationMatrix2D(centre, roll, 1)
    return cv2.warpAffine(cv2.GaussianBlur(image, (0, 0), 1.8*k), M, shape[::-1], borderMode=cv2.BORDER_REPLICATE)


def rolled(image, degrees, at): return cv2.warpAffine(image, cv2.getRotationMatrix2D(at, degrees, 1), image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


def live_input(recognizer, image):
    "What the model's session receives for the first face."
    got, inner = [], recognizer._session
    class Spy:
        def run(self, names, feed): got.append(feed['input'].copy()); return inner.run(names, feed)
    recognizer._session = Spy()
    try: recognizer.faces(image)
    finally: recognizer._session = inner
    s = recognizer.spec
    return ((got[0][0]*s.std + s.mean)*255).round().astype(int)


# -- the spec ----------------------------------------------------------------------------------------------------------------

def test_a_spec_without_alignment_is_stored_as_it_always_was():
    old = {'size': 64, 'colour': 'grey', 'clahe': 2.0, 'tiles': 4, 'mean': 0.5, 'std': 0.25, 'margin': 0.0}
    assert Preprocess(64).to_dict() == old and Preprocess.from_dict(old) == Preprocess(64) and Preprocess.from_dict(old).align == 0
    for align in (.5, 1, 1.25, 3.): assert Preprocess.from_dict(json.loads(json.dumps(Preprocess(64, align=align).to_dict()))) == Preprocess(64, align=align)
    for wrong in (-1, .1, 4, float('nan')):
        with pytest.raises(FerError, match='align'): Preprocess(align=wrong)


def test_model_files_carry_it_and_old_ones_lack_it(tmp_path):
    assert Recognizer(toy_model(tmp_path/'a.onnx', ALIGNED)).spec == ALIGNED and 'aligned' in repr(Recognizer(tmp_path/'a.onnx'))
    old = Recognizer(toy_model(tmp_path/'b.onnx', BOXED))
    assert 'align' not in old.metadata['preprocess'] and old.spec == BOXED
    bad = {**old.metadata, 'preprocess': json.dumps({**BOXED.to_dict(), 'align': 9})}
    with pytest.raises(FerError, match='align 9') as e: read_spec(bad, 'x.onnx')
    assert e.value.code == 'corrupt_artifact'
    assert Recognizer(release_model()).spec.align == 0


def test_fingerprints_of_runs_without_alignment_are_those_of_before():
    from fer_core.artifacts import sha256_bytes
    from fer_core.runs.stage import fingerprint, resolve
    for stage in ('teacher', 'student', 'pretrain'):
        given = resolve(stage, {})
        before = {k: v for k, v in given.items() if k not in ('run_dir', 'align')}
        assert fingerprint(stage, given) == sha256_bytes(json.dumps([stage, before], sort_keys=True).encode())[:16] != fingerprint(stage, given | {'align': 1.25})


def test_finished_runs_are_found_again(root):
    "Fingerprints of recorded runs, taken from their own parameters."
    from fer_core.runs.stage import fingerprint, parameters
    seen = 0
    for path in (root/'papermill_runs').glob('*/run.json'):
        m = read_json(path)
        if m['stage'] not in ('teacher', 'student') or 'align' in m['parameters'] or set(parameters(m['stage'])) - {'align'} != set(m['parameters']): continue
        given = {**m['parameters'], 'align': 0.}
        if any(isinstance(v, str) and '/' in v and not os.path.exists(v) for v in given.values()): continue  # its parents are elsewhere
        assert fingerprint(m['stage'], given) == m['fingerprint']
        seen += 1
    if not seen: pytest.skip('no recorded training run with its parents lies in papermill_runs')


# -- the transform -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('show, size', [(1., 112), (1.25, 48), (2., 224)])
def test_landmarks_fall_where_the_template_says(show, size):
    "A bright dot per landmark, found again by its centroid."
    rng = np.random.default_rng(0)
    for roll in (-35, 0, 20, 170):
        c, s = 2.1*np.cos(np.deg2rad(roll)), 2.1*np.sin(np.deg2rad(roll))
        marks = (TEMPLATE - .5)*112@np.array([[c, s], [-s, c]]) + [250, 240] + rng.uniform(-3, 3, 2)
        for k in range(5):
            yy, xx = np.mgrid[:480, :500] + .5
            picture = (255*np.exp(-((xx - marks[k, 0])**2 + (yy - marks[k, 1])**2)/(2*6**2))).astype(np.uint8)
            out = align_similarity(picture, marks, size, show).astype(float)
            yy, xx = np.mgrid[:size, :size] + .5
            at = np.array([(out*xx).sum(), (out*yy).sum()])/out.sum()
            assert np.abs(at/size - ((TEMPLATE[k] - .5)/show + .5)).max() < .004


def test_a_large_face_is_averaged_not_sampled():
    "Fine stripes over a large face become grey, as the resize of a box crop makes them."
    picture = np.zeros((900, 900), np.uint8); picture[:, ::2] = 255
    marks = (TEMPLATE - .5)*700 + 450
    out = standardise(face_of(picture, None, marks, replace(ALIGNED, size=48)), replace(ALIGNED, size=48))[0][4:-4, 4:-4]
    assert abs(out.mean() - 127) < 3 and out.std() < 12


@pytest.mark.parametrize('scale, at', [(900, (0, 0)), (900, (640, 480)), (300, (-400, 100)), (40, (639, 100)), (20000, (50, 50)), (900, (5000, -3000))])
def test_faces_over_the_edge_are_filled_up(scale, at):
    "As the border is repeated, what is cut has the size asked for and no colour that the picture lacks."
    image = np.random.default_rng(0).integers(60, 90, (480, 640, 3), dtype=np.uint8)
    out = face_of(image, None, (TEMPLATE - .5)*scale + at, ALIGNED)
    assert out.shape == (np.clip(round(1.25*scale), 64, 128),)*2 + (3,) and 60 <= out.min() <= out.max() < 90


@pytest.mark.parametrize('side', [150, 260, 400, 900])
def test_large_faces_agree_with_a_dense_reference(side):
    "Aligned at full size and averaged by area in one step, against the quick way through a shrunk picture."
    rng = np.random.default_rng(side)
    image = cv2.GaussianBlur(rng.integers(0, 256, (1000, 1200), dtype=np.uint8), (0, 0), side/60)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    c, s = np.cos(.4), np.sin(.4)
    marks = (TEMPLATE - .5)@np.array([[c, s], [-s, c]])*side + [600, 500]
    full = align_similarity(image, marks, 64*round(side*1.25/64), 1.25)
    want = cv2.resize(full, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
    off = np.abs(standardise(face_of(image, None, marks, ALIGNED), ALIGNED)[0] - want)
    assert off.mean() < .015*want.std() + 2 and np.corrcoef(want.ravel(), standardise(face_of(image, None, marks, ALIGNED), ALIGNED).ravel())[0, 1] > .997


@pytest.mark.parametrize('marks', [None, np.zeros((5, 2)), np.full((5, 2), np.nan), TEMPLATE[[1, 0, 2, 4, 3]]*90 + 20, np.full((5, 2), np.inf)])
def test_landmarks_of_no_use_leave_the_box(marks):
    image, box = head(), (110, 50, 90, 130)
    assert np.array_equal(face_of(image, box, marks, ALIGNED), crop(image, box))


# -- the pack and live -------------------------------------------------------------------------------------------------------

def test_the_pack_stores_what_the_recognizer_is_fed(photos, shared, tmp_path, retina):
    "Photos without and with boxes: equal to within one grey level, since the live input goes through float32."
    folder = shared/'data'/'faces'/'photos'
    boxes = [retina.detect(p).boxes[0]*[1, 1, 1.1, 1.1] for p in photos.values()]
    for name, given in (('whole', ()), ('boxed', [' '.join(f'{v:.1f}' for v in b) for b in boxes])):
        pack = open_pack(curated(tmp_path/name, folder, list(photos), given), ALIGNED)
        r = Recognizer(toy_model(tmp_path/'m.onnx', ALIGNED), retina)
        for k, image in enumerate(photos.values()):
            live = live_input(r, image)
            assert np.abs(live - pack.pixels[k]).max() <= 1
            assert np.abs(live - live_input(Recognizer(toy_model(tmp_path/'b.onnx', BOXED), retina), image)).mean() > 5  # and it is another picture than the box's
        assert pack.alignment()['by_box'] == 0 and pack.alignment()['aligned'] == 4


def test_a_rolled_head_gives_nearly_the_same_input(photos, retina, tmp_path):
    "Turned by 20 degrees about the face: aligned, the input changes by well under half of what it does by the box."
    models = {n: Recognizer(toy_model(tmp_path/f'{n}.onnx', s), retina) for n, s in (('aligned', ALIGNED), ('boxed', BOXED))}
    change = {n: [] for n in models}
    for image in photos.values():
        x, y, w, h = retina.detect(image).boxes[0]
        for degrees in (-20, 20):
            other = rolled(image, degrees, (float(x + w/2), float(y + h/2)))
            for n, r in models.items(): change[n].append(np.abs(live_input(r, image) - live_input(r, other)).mean())
    aligned, boxed = (np.array(change[n]) for n in ('aligned', 'boxed'))
    print('\nmean change of a pixel, aligned', aligned.round(1), 'by the box', boxed.round(1))
    assert np.median(aligned/boxed) < .45 and aligned.max() < boxed.max() and (aligned < boxed).all()


def test_small_crops_are_enlarged_to_find_the_face(photos, retina):
    "Landmarks of a face of 48 px, FER2013's size, lie within 6 % of the side of those found in the photo."
    for image in photos.values():
        found = retina.detect(image)
        box = found.boxes[0]
        large = crop(image, box, .1)
        x0, y0 = np.round(box[:2] + box[2:]/2 - len(large)/2)
        small = cv2.resize(large, (48, 48), interpolation=cv2.INTER_AREA)
        seen = find_landmarks(small, None, retina)
        assert seen is not None and np.abs(seen/48 - (found.landmarks[0] - [x0, y0])/len(large)).max() < .06


def test_the_face_of_the_box_is_taken(shared, retina):
    path = shared/'data'/'faces'/'photos'/'two_people.jpg'
    if not path.is_file(): pytest.skip(f'{path} is not there')
    image = cv2.imread(str(path))
    found = retina.detect(image)
    assert len(found) >= 2
    for box, marks in zip(found.boxes[:2], found.landmarks[:2]): assert np.abs(find_landmarks(image, box, retina) - marks).max() < 1e-3


def test_rows_without_a_face_keep_their_box_and_are_counted(tmp_path, retina):
    "Two drawn heads, a wall, and a head of which the box shows nothing."
    for name, image in (('a.png', head()), ('b.png', head(roll=15)), ('wall.png', np.full((200, 200, 3), 90, np.uint8)), ('c.png', head((240, 640)))): cv2.imwrite(str(tmp_path/name), image)
    data = curated(tmp_path/'data', tmp_path, ['a.png', 'b.png', 'wall.png', 'c.png'], ['', '', '', '400 20 150 180'])
    pack = open_pack(data, ALIGNED)
    told = pack.alignment()
    assert (told['aligned'], told['by_box'], told['by_box_of']) == (2, 2, {'test': 1, 'train': 1}) and told['detector']['name'] == 'retinaface' and len(told['detector']['weights_sha256']) == 64
    assert np.isnan(pack.landmarks[2:]).all() and np.array_equal(pack.pixels[3], standardise(crop(cv2.imread(str(tmp_path/'c.png')), (400, 20, 150, 180)), ALIGNED))
    for k, name in enumerate(('a.png', 'b.png')):
        image = cv2.imread(str(tmp_path/name))
        assert np.array_equal(pack.pixels[k], standardise(face_of(image, None, retina.detect(image).landmarks[0], ALIGNED), ALIGNED))
    note = read_json(next((data/'.packs').glob('pack-*.json')))
    assert note['landmarks']['by_box'] == 2 and note['landmarks']['detector'] == told['detector'] and note['spec']['align'] == 1.25
    rows = read_manifest(data/'classification_manifest.csv').reset_index(drop=True)
    for p, f in zip(pack.pixels, row_faces([cv2.imread(str(tmp_path/n)) for n in rows['path']], rows, ALIGNED)): assert np.array_equal(p, standardise(f, ALIGNED))
    assert open_pack(data, BOXED).alignment() is None


def test_landmarks_are_sought_once_and_survive_a_kill(tmp_path, monkeypatch):
    for k in range(5): cv2.imwrite(str(tmp_path/f'{k}.png'), head(roll=6*k))
    data, sought = curated(tmp_path/'data', tmp_path, [f'{k}.png' for k in range(5)]), []
    inner, n = pack_module.find_landmarks, []
    monkeypatch.setattr(pack_module, 'CHUNK_ROWS', 2)
    def find(*args):
        if len(sought) == 3 and not n: n.append(1); raise KeyboardInterrupt
        sought.append(1); return inner(*args)
    monkeypatch.setattr(pack_module, 'find_landmarks', find)
    with pytest.raises(KeyboardInterrupt): open_pack(data, ALIGNED)
    first = open_pack(data, ALIGNED)
    assert len(sought) == 3 + 3  # the finished chunk of two is not searched again, the row of the broken one is
    again, other = open_pack(data, ALIGNED), open_pack(data, replace(ALIGNED, size=48, align=1.5))
    assert len(sought) == 6 and np.array_equal(again.pixels, first.pixels) and np.array_equal(other.landmarks, first.landmarks)
    assert open_pack(data, BOXED).under(replace(BOXED, clahe=2.)).alignment() is None and first.under(replace(ALIGNED, clahe=2.)).alignment() == first.alignment()
    with pytest.raises(FerError, match='align'): open_pack(data, BOXED).under(ALIGNED)
    whole = open_pack(data, ALIGNED, tmp_path/'elsewhere')
    assert np.array_equal(whole.landmarks, first.landmarks) and sorted(p.name for p in (tmp_path/'elsewhere').iterdir()) == sorted(p.name for p in (data/'.packs').iterdir() if p.stem in {q.stem for q in (tmp_path/'elsewhere').iterdir()})


def test_another_detector_makes_another_pack(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path/'0.png'), head())
    data = curated(tmp_path/'data', tmp_path, ['0.png'])
    open_pack(data, ALIGNED)
    inner = pack_module.make_detector
    monkeypatch.setattr(pack_module, 'make_detector', lambda name, threads=None: inner('retinaface', threads=threads, score=.6) if name == 'other' else inner(name, threads=threads))
    open_pack(data, ALIGNED, detector='other')
    assert len(list((data/'.packs').glob('landmarks-*.npy'))) == 2


def test_pictures_without_any_face_cannot_be_aligned(tmp_path):
    cv2.imwrite(str(tmp_path/'0.png'), np.full((60, 60, 3), 90, np.uint8))
    data = curated(tmp_path/'data', tmp_path, ['0.png'])
    with pytest.raises(FerError, match='no face in any of 1 pictures'): open_pack(data, ALIGNED)
    assert len(open_pack(data, BOXED)) == 1


# -- streams -----------------------------------------------------------------------------------------------------------------

def test_an_aligned_model_will_not_take_boxes_alone():
    with pytest.raises(FerError, match='landmarks'): face_crops(head(), [(110, 50, 90, 130)], ALIGNED)
    assert face_crops(head(), np.empty((0, 4)), ALIGNED, np.empty((0, 5, 2))) == []


def test_a_stream_is_followed_and_aligned(tmp_path, retina):
    "A head that rolls: searched in every fourth frame, its input stays near that of a search in every frame; by the box alone it would not."
    r, frames = Recognizer(toy_model(tmp_path/'m.onnx', ALIGNED), retina), [head(roll=2.5*t) for t in range(12)]
    seen = {}
    for every in (1, 4):
        live, got, inner = Live(r, every=every), [], r._session
        class Spy:
            def run(self, names, feed): got.append(feed['input'].copy()); return inner.run(names, feed)
        r._session = Spy()
        try: steps = [live.step(f) for f in frames]
        finally: r._session = inner
        assert [f.track_id for s in steps for f in s.faces] == [1]*12
        seen[every] = np.concatenate(got)[:, 0]*ALIGNED.std*255
    off = np.abs(seen[4] - seen[1]).mean((1, 2))
    assert off[::4].max() == 0 and off.max() < 10
    assert [len(f) for f in r.stream(frames[:4], track=True, every=2)] == [1]*4
    assert np.abs(seen[1][0] - seen[1][-1]).mean() < .5*np.abs(standardise(crop(frames[0], (110, 50, 100, 130)), BOXED).astype(int) - standardise(crop(frames[-1], (110, 50, 100, 130)), BOXED)).mean()


def test_followed_landmarks_turn_with_the_head():
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (240, 320), dtype=np.uint8), (0, 0), 2)
    texture, five = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX), np.float32([[140, 105], [180, 105], [160, 122], [145, 140], [175, 140]])
    for degrees, scale, shift in ((4, 1, (0, 0)), (-5, 1.05, (3, -2)), (0, .96, (-4, 1))):
        M = cv2.getRotationMatrix2D((160, 120), degrees, scale); M[:, 2] += shift
        box, marks = follow(texture, cv2.warpAffine(texture, M, (320, 240), borderMode=cv2.BORDER_REFLECT), [[120, 80, 80, 80]], five[None])
        assert np.abs(marks[0] - five@M[:, :2].T - M[:, 2]).max() < .7 and abs(box[0, 2]/80 - scale) < .01


def test_replay_gives_each_model_its_own_cut(tmp_path, retina):
    from fer_core.live.replay import replay
    path = tmp_path/'clip.mp4'
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), 10, (320, 240))
    for t in range(4): out.write(head(roll=5*t))
    out.release()
    models = {'a': Recognizer(toy_model(tmp_path/'a.onnx', BOXED), retina), 'b': Recognizer(toy_model(tmp_path/'b.onnx', ALIGNED), retina)}
    seen, frames = replay(path, models, every=1), []
    film = cv2.VideoCapture(str(path))
    while (got := film.read())[0]: frames.append(got[1])
    for name, r in models.items():
        want = np.concatenate([r.classify(face_crops(f, (d := retina.detect(f)).boxes, r.spec, d.landmarks)) for f in frames])
        assert np.allclose(seen.traces[name].raw, want, atol=1e-4)


# -- training to evaluation --------------------------------------------------------------------------------------------------

def test_runs_checkpoints_and_exports_follow_the_spec(tmp_path):
    "What a run records of its data, what its checkpoint says, what is asked of it again, and what its ONNX file will say."
    from fer_core.artifacts import Run
    from fer_core.compress.export import make_metadata
    from fer_core.data.loader import Feeder
    from fer_core.models.backbones import Classifier, ModelConfig, load_model, save_model
    from fer_core.runs.shift import Asked, ask_blocks, shifts
    from fer_core.teach.teacher import open_data
    from fer_core.train.loop import predict_logits
    for k in range(4): cv2.imwrite(str(tmp_path/f'{k}.png'), head(roll=10*k))
    cv2.imwrite(str(tmp_path/'4.png'), np.full((60, 60, 3), 90, np.uint8))
    data, run, spec = curated(tmp_path/'data', tmp_path, [f'{k}.png' for k in range(5)]), Run.create(tmp_path/'teacher', 'teacher'), replace(ALIGNED, size=48)
    pack = open_data(run, data, spec)
    told = run.manifest.dataset['alignment']
    assert (told['aligned'], told['by_box'], told['by_box_of']) == (4, 1, {'test': 0, 'train': 1}) and Preprocess.from_dict(run.manifest.preprocessing) == spec
    assert 'alignment' not in (open_data(other := Run.create(tmp_path/'other', 'teacher'), data, replace(spec, align=0)), other.manifest.dataset)[1]
    model = Classifier(ModelConfig('mobilenetv3_small_050')).eval()
    save_model(run.folder, model, spec)
    run.record(status='accepted')
    assert load_model(run.folder)[1] == spec
    rows = np.arange(5)
    z, asked = predict_logits(model, Feeder(pack), rows), Asked(run.folder)
    again = ask_blocks(asked, tmp_path, pack.table, shifts([], [1]))['clean', 0]
    assert np.allclose(again, z, atol=1e-4)
    assert Preprocess.from_dict(json.loads(make_metadata(spec)['preprocess'])) == spec and 'align' not in make_metadata(replace(spec, align=0))['preprocess']

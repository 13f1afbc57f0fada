"""The embedded data: reproducible to the byte, completed after a kill, and faces to detectors that never saw one drawn."""
import csv, hashlib, subprocess, sys, time
import cv2, numpy as np, pytest
from fer_core.artifacts import FerError, read_json
from fer_core.data.synthetic import MARKER, SPLITS, draw_expression, draw_identity, draw_pose, draw_scene, group_of, make_face, quotas, render, write_dataset, write_video
from fer_core.labels import CLASSES


def digest(root): # every file of a folder, in one hash
    files = sorted(p for p in root.rglob('*') if p.is_file())
    return hashlib.sha256(b''.join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


def other_process(*args, **kw): # write a data set in another interpreter
    call = f'from fer_core.data.synthetic import write_dataset; write_dataset({args[0]!r}, *{args[1:]!r}, **{kw!r})'
    return subprocess.Popen([sys.executable, '-c', call])


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path):
    here = write_dataset(tmp_path/'a', 30, 8, 9, seed=5, size=32)
    assert other_process(str(tmp_path/'b'), 30, 8, 9, seed=5, size=32).wait() == 0
    assert digest(here) == digest(tmp_path/'b')
    assert digest(write_dataset(tmp_path/'c', 30, 8, 9, seed=6, size=32)) != digest(here)


def test_a_killed_writer_is_completed(tmp_path):
    whole = write_dataset(tmp_path/'whole', 60, 8, 9, size=32)
    cut = tmp_path/'cut'
    child = other_process(str(cut), 60, 8, 9, size=32)
    while sum(1 for _ in cut.rglob('p*.png')) < 10: time.sleep(.01); assert child.poll() in (None, 0)
    child.kill(); child.wait()
    next(cut.rglob('p*.png')).write_bytes(b'')  # what a power cut leaves of a file
    write_dataset(cut, 60, 8, 9, size=32)
    for p in cut.rglob('.*.tmp*'): p.unlink()  # the killed writer's last, unfinished file
    assert digest(cut) == digest(whole)


def test_a_finished_set_is_left_alone(tmp_path):
    root, calls = write_dataset(tmp_path, 20, 7, 7, size=32), []
    before = {p: p.stat().st_mtime_ns for p in root.rglob('*.png')}
    write_dataset(tmp_path, 20, 7, 7, size=32, progress=lambda *a: calls.append(a))
    assert {p: p.stat().st_mtime_ns for p in root.rglob('*.png')} == before and calls == [(34, 34)]


@pytest.mark.parametrize('change', [{'seed': 1}, {'size': 48}, {'n_test': 8}])
def test_other_parameters_are_refused(tmp_path, change):
    write_dataset(tmp_path, n_train=7, n_val=7, n_test=7, size=32)
    with pytest.raises(FerError, match='bad_parameter'): write_dataset(tmp_path, **({'n_train': 7, 'n_val': 7, 'n_test': 7, 'size': 32} | change))


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    with pytest.raises(FerError, match='bad_parameter'): write_dataset(tmp_path, 7, 7, 7)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_people_stay_in_their_split_and_the_marker_tells_the_truth(tmp_path):
    root = write_dataset(tmp_path, 90, 20, 30, size=32)
    marker = read_json(root/MARKER)
    people = {s: {group_of(p) for p in (root/s).rglob('*.png')} for s in SPLITS}
    assert people == {s: set(g) for s, g in marker['groups'].items()}
    assert len(set.union(*people.values())) == sum(map(len, people.values()))
    assert marker['counts'] == {s: {c: len(list((root/s/c).glob('*.png'))) for c in CLASSES} for s in SPLITS}


@pytest.mark.parametrize('n', [0, 1, 6, 7, 8, 20, 100, 999, 5600])
def test_quotas_add_up(n):
    counts = quotas(n)
    assert sum(counts.values()) == n and set(counts) == set(CLASSES)
    assert n < 7 or min(counts.values()) >= 1


@pytest.mark.parametrize('size', [24, 48, 65, 96])
def test_any_size_and_seed_draws(size):
    for i, c in enumerate(CLASSES): assert make_face(c, (size, i), size).shape == (size, size, 3)


def still(i): # a face in a wider picture, with whatever occludes and blurs it
    rng = np.random.default_rng((5, i))
    who, e = draw_identity(rng), draw_expression(CLASSES[i % 7], rng)
    return cv2.copyMakeBorder(render(who, e, rng, draw_pose(rng), draw_scene(rng), 192), 64, 64, 64, 64, cv2.BORDER_CONSTANT, value=(128,)*3)


def overlap(a, b): # intersection over union of two boxes
    w, h = (max(0, min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    return w*h/(a[2]*a[3] + b[2]*b[3] - w*h)


@pytest.fixture(scope='module')
def yunet(shared):
    detector = cv2.FaceDetectorYN.create(str(shared/'weights'/'face_detection_yunet_2023mar.onnx'), '', (320, 320), .6)
    def detect(image):
        detector.setInputSize(image.shape[1::-1])
        found = detector.detect(image)[1]
        return [] if found is None else found[:, :4].tolist()
    return detect


def test_a_detector_of_real_faces_finds_drawn_ones(yunet):
    assert np.mean([len(yunet(still(i))) == 1 for i in range(28)]) >= .9


def test_the_ground_truth_of_a_video_is_where_a_detector_sees_faces(tmp_path, yunet):
    truth = list(csv.DictReader(open(write_video(tmp_path/'v.mp4', 4, 4, 3, seed=2))))
    film, hits = cv2.VideoCapture(str(tmp_path/'v.mp4')), []
    for i in range(16):
        found = yunet(film.read()[1])
        boxes = [[float(r[k]) for k in 'xywh'] for r in truth if int(r['frame']) == i]
        hits += [max([overlap(b, f) for f in found], default=0) > .5 for b in boxes]
    assert len(hits) == 48 and np.mean(hits) >= .9
    assert {r['label'] for r in truth} <= set(CLASSES) and len({r['label'] for r in truth}) >= 3


@pytest.mark.parametrize('bad', [{'n_faces': 0}, {'n_faces': 4}, {'n_faces': 3, 'size': (320, 240)}])
def test_faces_too_many_or_too_small_are_refused(tmp_path, bad):
    with pytest.raises(FerError, match='bad_parameter'): write_video(tmp_path/'v.mp4', 1, **bad)
    assert not list(tmp_path.iterdir())

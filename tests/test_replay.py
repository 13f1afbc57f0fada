"""Replay from outside: figures against independent ones, the gate's verdict, label files, the command."""
import csv, json, os, shutil, subprocess, sys
from pathlib import Path
import cv2, numpy as np, onnx, pytest
from fer_core.artifacts import FAILURES, FerError
from fer_core.data.preprocess import Preprocess
from fer_core.faces.align import crop
from fer_core.faces.detect import Detections
from fer_core.labels import CLASSES, CLASS_ID
from fer_core.live import demo, replay as rp
from fer_core.live.recognise import Recognizer, toy_model
from fer_core.live.source import Source

ROOT = Path(__file__).parents[1]
FPS, HOLD, N = 15, 30, 150  # frames/s, frames an expression lasts, frames


def disc_model(path, noise=0., order=range(7), **metadata):
    "A linear model that reads the height of a disc as a class, through noisy weights, or with classes exchanged."
    proto, W = onnx.load(toy_model(path, Preprocess(clahe=0), **metadata)), np.zeros((8, 8, 7), np.float32)
    for c, told in enumerate(order): W[c:c + 2, :, told] = 12/16
    W += np.random.default_rng(1).normal(0, noise, W.shape).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(W.reshape(64, 7), 'W'))
    onnx.save(proto, str(path))
    return path


class Script:
    "A detector that knows where the faces of each frame are, and counts its calls."
    name = 'script'
    def __init__(self, boxes): self.boxes, self.calls = boxes, 0
    def detect(self, image):
        self.calls += 1
        boxes = self.boxes[self.calls - 1]
        return Detections.make(boxes, np.zeros((len(boxes), 5, 2)), np.ones(len(boxes)))


@pytest.fixture(scope='module')
def session(tmp_path_factory):
    "A session of two disc faces: folder, boxes by frame, classes (frames, 2)."
    folder, rng = tmp_path_factory.mktemp('session'), np.random.default_rng(0)
    shown = np.repeat(rng.integers(0, 7, (N//HOLD, 2)), HOLD, 0)
    boxes = [[(16 + i//20, 16, 48, 48), (96 - i//20, 16, 48, 48)] if not 60 <= i < 64 else [] for i in range(N)]  # nobody is found for four frames
    out = cv2.VideoWriter(str(folder/'session.avi'), cv2.VideoWriter_fourcc(*'MJPG'), FPS, (160, 80))
    for i in range(N):
        image = rng.normal(70, 25, (80, 160))
        for (x, y, *_), c in zip(boxes[i], shown[i]): cv2.circle(image, (x + int(rng.integers(12, 36)), y + 6*(int(c) + 1)), 6, 255., -1)
        out.write(cv2.cvtColor(image.clip(0, 255).astype(np.uint8), cv2.COLOR_GRAY2BGR))
    out.release()
    rows = [(i, k + 1, CLASSES[shown[i, k]], 16 + i//20 if k == 0 else 96 - i//20, 16, 48, 48) for i in range(N) for k in range(2)]
    for name, columns in (('box', (0, 2, 3, 4, 5, 6)), ('track_id', (0, 1, 2)), ('all', range(7))):
        with open(folder/f'{name}.csv', 'w', newline='') as f: csv.writer(f).writerows([[('frame', 'track_id', 'label', 'x', 'y', 'w', 'h')[c] for c in columns], *[[r[c] for c in columns] for r in rows]])
    disc_model(folder/'good.onnx'); disc_model(folder/'noisy.onnx', noise=1.2); disc_model(folder/'swapped.onnx', order=(1, 0, 3, 2, 4, 5, 6)); disc_model(folder/'silent.onnx', abstention_threshold='1')
    return folder, boxes, shown


def play(session, *names, labels='box', **options):
    folder, boxes, _ = session
    return rp.replay(folder/'session.avi', {n: folder/f'{n}.onnx' for n in names}, folder/f'{labels}.csv' if labels else None, Script(boxes), threads=1, **options)


@pytest.fixture(scope='module')
def played(session): return play(session, 'noisy', 'good', 'swapped')


def visible(trace): return np.where(trace.withheld, -1, trace.shown)


# ---- figures ----

def test_models_see_the_same_faces_and_the_detector_is_asked_once(session):
    folder, boxes, shown = session
    detector, never = Script(boxes), '/nowhere/yunet.onnx'
    rp.replay(folder/'session.avi', {'a': Recognizer(folder/'good.onnx', detector), 'b': Recognizer(folder/'noisy.onnx', never), 'c': Recognizer(folder/'swapped.onnx', never)}, threads=1)
    assert detector.calls == N


def test_rows_are_the_faces_of_the_session(session, played):
    _, boxes, shown = session
    assert len(played.frame) == 2*(N - 4) and played.frame.tolist() == [i for i in range(N) for _ in boxes[i]]
    assert np.allclose(played.boxes, np.concatenate([b for b in boxes if b])) and set(played.track) == {1, 2}
    assert played.truth.tolist() == [int(shown[i, k]) for i in range(N) if boxes[i] for k in range(2)]
    assert played.session['labels']['without_a_face'] == 8 and played.session['labels']['used'] == 2*(N - 4)
    assert np.allclose(played.t, played.frame*1000/FPS, atol=1)


def test_each_model_reads_the_crops_by_its_own_preprocessing(session, tmp_path):
    folder, boxes, _ = session
    other = toy_model(tmp_path/'rgb.onnx', Preprocess(size=64, colour='rgb', margin=.2), seed=3)
    found = rp.replay(folder/'session.avi', {'good': folder/'good.onnx', 'rgb': other}, None, Script(boxes), threads=1, max_frames=12)
    frames = [image for _, image in Source(folder/'session.avi')][:12]
    r = Recognizer(other, threads=1)
    want = np.concatenate([r.classify([crop(image, b, margin=.2) for b in at]) for image, at in zip(frames, boxes)])
    assert np.allclose(found.traces['rgb'].raw, want, atol=1e-6)


def test_f1_is_scikit_learns_and_what_is_withheld_is_missed(session, played):
    from sklearn.metrics import f1_score
    found, present = rp.figures(played), np.unique(played.truth)
    for name, t in played.traces.items():
        m = found['models'][name]
        for kind, said in (('raw', t.raw.argmax(1)), ('smoothed', visible(t)), ('forced', t.shown)):
            assert np.isclose(m['macro_f1'][kind], f1_score(played.truth, said, labels=present, average='macro', zero_division=0)), (name, kind)
    assert found['models']['good']['macro_f1']['raw'] == 1 and found['models']['good']['f1']['raw'] == {CLASSES[c]: 1. for c in present}
    right = np.array([1, 0, 3, 2, 4, 5, 6])[played.truth]  # what the model with exchanged classes must have said
    assert played.traces['swapped'].raw.argmax(1).tolist() == right.tolist()
    silent = rp.figures(play(session, 'noisy', 'silent'))['models']['silent']
    assert silent['abstention_rate'] == 1 and silent['macro_f1']['smoothed'] == 0 < silent['macro_f1']['forced'] and silent['flips']['smoothed'] == 0


def test_flips_counted_by_hand_and_by_the_demo(session, played):
    folder, boxes, _ = session
    found = rp.figures(played)['models']['noisy']
    t, count = played.traces['noisy'], {'raw': 0, 'smoothed': 0}
    for k in (1, 2):
        at = played.track == k
        for kind, seq in (('raw', t.raw.argmax(1)[at]), ('smoothed', visible(t)[at])):
            seq = [s for s in seq if s >= 0]
            count[kind] += sum(a != b for a, b in zip(seq, seq[1:]))
    assert found['flips'] == count and count['raw'] > 50 > count['smoothed'] > 0
    minutes = 2*(N - 4)/FPS/60
    assert np.isclose(found['flips_per_minute']['raw'], count['raw']/minutes, rtol=.01)
    alone = demo.run(folder/'session.avi', Recognizer(folder/'noisy.onnx', Script(boxes), threads=1), window=False)
    assert all(np.isclose(alone['flips_per_minute'][k], found['flips_per_minute'][k], rtol=1e-6) for k in count) and np.isclose(alone['abstention_rate'], found['abstention_rate'])


def test_agreement(played):
    found = rp.figures(played)['agreement']
    assert [(a['a'], a['b']) for a in found] == [('noisy', 'good'), ('noisy', 'swapped'), ('good', 'swapped')]
    a, b = played.traces['good'], played.traces['swapped']
    same = sum(x.argmax() == y.argmax() for x, y in zip(a.raw, b.raw))/len(a.raw)
    assert np.isclose(found[2]['raw'], same) and np.isclose(found[2]['shown'], np.mean([x == y for x, y in zip(visible(a), visible(b))])) and 0 < found[2]['distance'] < 1


def timeless(f): return json.dumps({**f, 'models': {n: {k: v for k, v in m.items() if k != 'latency_ms'} for n, m in f['models'].items()}}, sort_keys=True)


def test_two_replays_differ_in_nothing_but_times(session, played):
    again = play(session, 'noisy', 'good', 'swapped')
    assert timeless(rp.figures(again)) == timeless(rp.figures(played))
    for a, b in zip(played.traces.values(), again.traces.values()): assert np.array_equal(a.raw, b.raw) and np.array_equal(a.probs, b.probs) and len(a.ms) == len(b.ms) == N - 4
    alone = play(session, 'good', 'swapped')  # neither does the company a model is in matter
    assert np.array_equal(alone.traces['swapped'].probs, played.traces['swapped'].probs)


def test_smoothing_is_the_same_for_all_and_can_be_chosen(session):
    found = play(session, 'noisy', 'good', alpha=0., delta=0., need=1, of=1, threshold=0.)
    for t in found.traces.values(): assert not t.withheld.any() and (t.shown == t.raw.argmax(1)).all()
    m = rp.figures(found)['models']['noisy']
    assert m['macro_f1']['raw'] == m['macro_f1']['smoothed'] == m['macro_f1']['forced'] and m['flips']['raw'] == m['flips']['smoothed']


def test_the_interval_resamples_faces_in_blocks(played, session):
    c = rp.change_interval(played, 'good')
    assert c['blocks'] == 2*5 and c['low'] <= c['change'] <= c['high'] and c['low'] > 0
    found = rp.figures(played)['models']
    assert np.isclose(c['change'], found['good']['macro_f1']['smoothed'] - found['noisy']['macro_f1']['smoothed'])
    shutil.copy(session[0]/'good.onnx', session[0]/'copy.onnx')
    same = rp.change_interval(play(session, 'good', 'copy'), 'copy')
    assert same['change'] == same['low'] == same['high'] == 0


# ---- the gate ----

def test_the_better_candidate_is_promoted_with_its_evidence(played):
    found = rp.figures(played)
    d = rp.judge(found)
    assert d['promoted'] == 'good' and not all(v['passed'] for v in d['verdicts']['swapped']) and [v['rule'] for v in d['verdicts']['good']] == ['replay.macro_f1_change', 'replay.flips_change']
    f1, flips = d['verdicts']['good']
    assert np.isclose(f1['value'], found['models']['good']['macro_f1']['smoothed'] - found['models']['noisy']['macro_f1']['smoothed']) and f1['n'] == flips['n'] == 2*(N - 4)
    assert 'session.avi' in f1['evidence'] and 'blocks' in f1['evidence'] and 'good is promoted' in d['says'][0] and 'swapped is not promoted' in d['says'][1]
    table = rp.replay_table(found, d)
    assert f"{found['models']['good']['macro_f1']['smoothed']:.4f}" in table and f'{2*(N - 4)} of {2*N} labels' in table and d['says'][0] in table


def test_a_model_may_replace_its_equal_and_not_its_better(session):
    shutil.copy(session[0]/'good.onnx', session[0]/'copy.onnx')
    assert rp.judge(rp.figures(play(session, 'good', 'copy')))['promoted'] == 'copy'
    worse = rp.judge(rp.figures(play(session, 'good', 'noisy')))
    assert worse['promoted'] is None and [v['reason'] for v in worse['verdicts']['noisy']] == ['threshold not met']*2
    silent = rp.judge(rp.figures(play(session, 'good', 'silent')))['verdicts']['silent']
    assert [v['passed'] for v in silent] == [False, True]  # no flips, no labels: silence does not win


def test_without_labels_the_gate_says_what_is_missing(session):
    found = rp.figures(play(session, 'noisy', 'good', labels=None))
    d = rp.judge(found)
    f1, flips = d['verdicts']['good']
    assert d['promoted'] is None and f1['reason'] == 'missing' and not f1['passed'] and flips['passed'] and found['models']['good']['macro_f1'] is None
    assert d['says'][0].startswith('good is not promoted: its smoothed macro-F1 cannot be judged, for there is no label file') and 'no labels' in rp.replay_table(found, d)


def test_a_short_session_proves_nothing(session):
    d = rp.judge(rp.figures(play(session, 'noisy', 'good', max_frames=40)))
    assert d['promoted'] is None and all('at least 100' in v['reason'] for v in d['verdicts']['good'])


def test_a_session_without_faces(session):
    folder = session[0]
    found = rp.figures(rp.replay(folder/'session.avi', {'a': folder/'good.onnx', 'b': folder/'noisy.onnx'}, folder/'box.csv', Script([[]]*N), threads=1))
    d = rp.judge(found)
    assert d['promoted'] is None and found['models']['a']['flips_per_minute']['raw'] is None and found['session']['labels']['without_a_face'] == 2*N
    assert 'no face was found' in d['says'][0] and rp.replay_table(found, d) and json.dumps(found)


# ---- labels ----

def test_boxes_and_track_ids_name_the_same_faces(session, played):
    by_track = play(session, 'noisy', 'good', labels='track_id')
    assert by_track.truth.tolist() == played.truth.tolist() and by_track.session['labels']['by'] == 'track_id' and play(session, 'noisy', 'good', labels='all', max_frames=3).session['labels']['by'] == 'box'


def test_a_label_of_a_frame_counts_where_one_face_is(session, tmp_path):
    folder, boxes, _ = session
    (tmp_path/'l.csv').write_text('frame,label\n' + ''.join(f'{i},happy\n' for i in range(0, 200)))
    one = [b[:1] if i % 2 else b for i, b in enumerate(boxes)]
    found = rp.replay(folder/'session.avi', {'a': folder/'good.onnx', 'b': folder/'noisy.onnx'}, tmp_path/'l.csv', Script(one), threads=1)
    used = {int(f) for f, c in zip(found.frame, found.truth) if c >= 0}
    assert used == {i for i, b in enumerate(one) if len(b) == 1} and set(found.truth[found.truth >= 0]) == {CLASS_ID['happy']}
    assert found.session['labels']['after_the_end'] == 50


@pytest.mark.parametrize('text, code', [('frame,emotion\n0,happy\n', 'bad_parameter'), ('frame,label\n0,hapy\n', 'unknown_label'), ('frame,label\n1.5,happy\n', 'bad_parameter'), ('frame,label\n-1,happy\n', 'bad_parameter'),
                                        ('frame,track_id,label\n0,,happy\n', 'bad_parameter'), ('frame,label,x,y,w,h\n0,sad,1,1,0,9\n', 'bad_parameter'), ('frame,label,x,y,w,h\n0,sad,nan,1,5,9\n', 'bad_parameter'),
                                        ('frame,track_id,label\n0,1,happy\n0,1,sad\n', 'duplicate_id'), ('', 'bad_parameter'), ('frame,label\n0\n1,\n2,contempt\n', None), ('\ufeffframe,label\n0,Happiness\n', None)])
def test_label_files(tmp_path, text, code):
    (tmp_path/'l.csv').write_text(text)
    if code is None: assert rp.read_labels(tmp_path/'l.csv').n == text.count('Happiness'); return
    with pytest.raises(FerError) as e: rp.read_labels(tmp_path/'l.csv')
    assert e.value.code == code and 'l.csv' in str(e.value)


def test_a_replay_that_cannot_start_says_why(session, tmp_path):
    folder, boxes, _ = session
    two = {'a': folder/'good.onnx', 'b': folder/'noisy.onnx'}
    (tmp_path/'noise.avi').write_bytes(b'no video')
    for call, code in ((lambda: rp.replay('gone.mp4', two), 'missing_file'), (lambda: rp.replay(tmp_path/'noise.avi', two), 'undecodable_image'), (lambda: rp.replay('0', two), 'bad_parameter'), (lambda: rp.replay(folder/'session.avi', {'a': two['a']}), 'bad_parameter'),
                       (lambda: rp.replay(folder/'session.avi', two | {'c': tmp_path/'gone.onnx'}), 'missing_checkpoint'), (lambda: rp.replay(folder/'session.avi', two, tmp_path/'gone.csv'), 'missing_file'), (lambda: rp.replay(folder/'session.avi', two, max_frames=0), 'bad_parameter'),
                       (lambda: rp.replay(folder/'session.avi', two, detector=Script(boxes), need=9, of=3), 'bad_parameter')):
        with pytest.raises(FerError) as e: call()
        assert e.value.code == code


def test_models_are_told_apart_by_name(tmp_path):
    assert list(rp.name_models(['a/x.onnx', 'b/y.onnx'])) == ['x', 'y'] and list(rp.name_models([tmp_path/'a'/'m.onnx', tmp_path/'b'/'m.onnx'])) == ['a/m', 'b/m']
    assert len(rp.name_models(['a/x.onnx', 'a/x.onnx'])) == 2


# ---- what is kept, and the command ----

def test_the_timeline_shows_what_was_shown(played):
    fig = rp.timeline(played)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['labels', 'noisy', 'good', 'swapped'] and len(fig.axes) == 2
    spans = [p for c in fig.axes[0].collections for p in c.get_paths()]
    runs = 0
    for seq in (played.truth, *(visible(t) for t in played.traces.values())):
        s, f = seq[played.track == 1], played.frame[played.track == 1]
        runs += 1 + int(((np.diff(s) != 0) | (np.diff(f) > 2)).sum())
    assert len(spans) == runs


def test_what_is_saved(played, tmp_path):
    found = rp.figures(played)
    rp.save_replay(played, found, rp.judge(found), tmp_path/'out')
    rows = list(csv.DictReader(open(tmp_path/'out'/'faces.csv')))
    assert [r['good raw'] for r in rows] == [CLASSES[i] for i in played.traces['good'].raw.argmax(1)] and sum(r['noisy shown'] == 'abstain' for r in rows) == played.traces['noisy'].withheld.sum()
    told = json.loads((tmp_path/'out'/'replay.json').read_text())
    assert told['decision']['promoted'] == 'good' and told['models']['good']['sha256'] and cv2.imread(str(tmp_path/'out'/'timeline.png')).shape[1] > 500


def fer(*words):
    code = 'import sys\nfrom fer_core.cli import main\nsys.argv = ["fer", *sys.argv[1:]]\nmain()'
    return subprocess.run([sys.executable, '-c', code, 'replay', *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'}, check=False)


def test_the_command_on_drawn_people(tmp_path):
    from fer_core.data.synthetic import write_video
    truth = write_video(tmp_path/'people.mp4', seconds=5, fps=12, n_faces=2, seed=3, size=(420, 240))
    a, b = toy_model(tmp_path/'a.onnx', seed=1), toy_model(tmp_path/'b.onnx', seed=1)
    fast = ('--detector', 'retinaface', '--every', 6, '--threads', 1)
    done = fer(tmp_path/'people.mp4', '--baseline', a, '--candidate', b, '--labels', truth, '--out', tmp_path/'out', *fast)
    assert done.returncode == 0 and 'b is promoted over a' in done.stdout and '120 of 120 labels' in done.stdout, done.stdout + done.stderr
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['faces.csv', 'replay.json', 'timeline.png']
    done = fer(tmp_path/'people.mp4', '--baseline', a, '--candidate', b, '--json', '--max-frames', 6, *fast)
    told = json.loads(done.stdout)
    assert done.returncode == FAILURES['gate_rejected'].exit_code and told['decision']['promoted'] is None and 'no label file' in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = fer(tmp_path/'gone.mp4', '--baseline', a, '--candidate', b)
    assert done.returncode == FAILURES['missing_file'].exit_code and 'gone.mp4' in done.stderr


def test_importing_it_loads_nothing_heavy():
    code = 'import sys, fer_core.live.replay, fer_core.live.health\nprint(sorted({"torch", "timm", "pandas", "scipy", "matplotlib", "pydantic"} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == '[]', done.stderr


def test_a_real_clip(shared, tmp_path):
    clip = shared/'data'/'faces'/'videos'/'single_face.mp4'
    if not clip.is_file(): pytest.skip(f'{clip} is not there')
    from fer_core.live.recognise import release_model
    found = rp.figures(rp.replay(clip, {'student': release_model(), 'toy': toy_model(tmp_path/'toy.onnx')}, None, 'retinaface', every=8, threads=1))
    assert found['session']['frames'] == 72 and found['session']['tracks'] == 1 and found['models']['student']['faces'] == 72 and found['models']['student']['latency_ms']['n'] == 72
    assert rp.judge(found)['promoted'] is None and 0 <= found['agreement'][0]['raw'] <= 1

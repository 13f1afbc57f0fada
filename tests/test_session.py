"""Sessions under bad conditions: slow stages, lost cameras, odd videos, keys, logs of every kind."""
import csv, json, os, shutil, subprocess, sys, threading, time
from pathlib import Path
import cv2, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from fer_core.artifacts import FerError
from fer_core.data.preprocess import Preprocess
from fer_core.faces.detect import Detections
from fer_core.labels import CLASSES
from fer_core.live import demo
from fer_core.live.demo import Controls, Live, Recorder, Slot, Source, Stage, Tape
from fer_core.live.recognise import Recognizer, toy_model
from fer_core.live.stabilise import STEP, OneEuro, Stabiliser, Stabilisers, stabilise
from fer_core.live.track import Tracker

ROOT = Path(__file__).parents[1]
rng = np.random.default_rng(0)


@pytest.fixture(scope='module')
def model(tmp_path_factory): return toy_model(tmp_path_factory.mktemp('model')/'toy.onnx', Preprocess(size=48, margin=.1))


class Box:
    "A detector that always finds the same faces, slowly if asked."
    name = 'box'
    def __init__(self, *boxes, seconds=0.): self.boxes, self.seconds = boxes, seconds
    def detect(self, image):
        time.sleep(self.seconds)
        return Detections.make(self.boxes, np.zeros((len(self.boxes), 5, 2)), np.ones(len(self.boxes)))


def camera(*plugged, fps=100, shape=(120, 160, 3)): # frames until the plug is pulled, for each time it is opened
    "A made-up capture: numbered pictures, then nothing."
    class Camera:
        opened = 0
        def __init__(self, *_): self.left = plugged[Camera.opened] if Camera.opened < len(plugged) else 0; Camera.opened += 1
        def isOpened(self): return self.left > 0
        def get(self, _): return 0.
        def release(self): self.left = 0
        def read(self):
            time.sleep(1/fps)
            self.left -= 1
            return (True, np.full(shape, self.left % 256, np.uint8)) if self.left >= 0 else (False, None)
    return Camera


def video(path, frames, fps=25):
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), fps, frames[0].shape[1::-1])
    for f in frames: out.write(f)
    out.release()
    return path


def lines_of(path): return [json.loads(line) for line in open(path)]


# ---- decoupled stages ----

def test_delay_does_not_grow_and_every_frame_is_accounted_for(model, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, 'VideoCapture', camera(150))
    s = demo.run(0, Recognizer(model, detector=Box((20, 20, 40, 40), seconds=.05)), log=tmp_path/'s.jsonl', csv=tmp_path/'s.csv', window=False, patience=.1)
    lines = lines_of(tmp_path/'s.jsonl')
    assert s['frames'] == len(lines) and s['frames'] + s['dropped'] == 150 and s['dropped'] > 50
    assert lines[-1]['frame'] == 149 and sum(d['dropped'] for d in lines) == s['dropped']
    assert [d['frame'] for d in lines] == (np.cumsum([d['dropped'] + 1 for d in lines]) - 1).tolist()
    assert [int(r['dropped']) for r in csv.DictReader(open(tmp_path/'s.csv'))] == [d['dropped'] for d in lines]
    delay = np.array([d['ms']['delay'] for d in lines])
    a, b = delay[:len(delay)//2], delay[len(delay)//2:]
    assert np.median(b) < np.median(a) + 60  # a queue would have added half a second
    assert 'dropped to stay in time' in demo.summary_table(s) and s['latency_ms']['delay']['n'] == s['frames']


def test_a_slow_screen_does_not_slow_the_analysis(model, monkeypatch):
    class SlowWindow:
        def __init__(self): self.controls, self.shown = Controls(), 0
        def show(self, image, wait=1.): self.shown += image is not None; time.sleep(.1); return True
        def close(self): pass
    window = SlowWindow()
    monkeypatch.setattr(cv2, 'VideoCapture', camera(100, fps=60)); monkeypatch.setattr(demo, 'open_window', lambda notes: window)
    s = demo.run(0, Recognizer(model, detector=Box()), patience=.1)
    assert s['unshown'] > 20 and s['frames'] == window.shown + s['unshown'] > 2*window.shown


def test_files_are_frame_exact_however_slow(model, tmp_path):
    path = video(tmp_path/'v.avi', [np.full((60, 80, 3), n, np.uint8) for n in range(20)])
    logs = []
    for k, seconds in enumerate((0, .01)):
        s = demo.run(path, Recognizer(model, detector=Box((5, 5, 30, 30), seconds=seconds)), log=tmp_path/f'{k}.csv', window=False)
        assert (s['frames'], s['dropped'], s['unshown']) == (20, 0, 0)
        logs.append([{c: v for c, v in r.items() if not c.endswith('_ms') or c == 't_ms'} for r in csv.DictReader(open(tmp_path/f'{k}.csv'))])
    assert logs[0] == logs[1] and [int(r['frame']) for r in logs[0]] == list(range(20))


def test_a_camera_that_never_comes_back_ends_the_session(model, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, 'VideoCapture', camera(5, 0, 5))
    s = demo.run(0, Recognizer(model, detector=Box()), log=tmp_path/'s.jsonl', window=False, patience=.5)
    assert s['frames'] + s['dropped'] == 10 and [n.split(' was lost')[0] for n in s['notes']] == ['the camera']*2 and 'did not come back' in s['notes'][1]
    monkeypatch.setattr(cv2, 'VideoCapture', camera(0))
    with pytest.raises(FerError) as e: demo.run(0, Recognizer(model, detector=Box()), window=False)
    assert e.value.code == 'missing_file' and 'plugged in' in str(e.value)


def test_max_frames_and_ctrl_c_end_a_camera_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, 'VideoCapture', camera(10**6))
    r = Recognizer(model, detector=Box((5, 5, 30, 30)))
    s = demo.run(0, r, log=tmp_path/'s.csv', window=False, max_frames=7)
    assert s['frames'] == 7 == len(list(csv.DictReader(open(tmp_path/'s.csv')))) and s['ended'] == '7 frames were asked for'
    monkeypatch.setattr(cv2, 'VideoCapture', camera(10**6))
    def stop(done, total):
        if done >= 5: raise KeyboardInterrupt
    s = demo.run(0, r, log=tmp_path/'c.csv', window=False, progress=stop)
    assert s['ended'] == 'interrupted' and s['notes'] == ['ended by Ctrl-C'] and s['frames'] == len(list(csv.DictReader(open(tmp_path/'c.csv')))) >= 5
    assert not [t for t in threading.enumerate() if t.name.startswith('fer_core-')]  # nobody is left reading the camera


def test_an_error_in_the_analysis_ends_the_session_with_it(model, monkeypatch):
    class Broken(Box):
        def detect(self, image): raise FerError('corrupt_artifact', 'the detector broke')
    monkeypatch.setattr(cv2, 'VideoCapture', camera(10**6))
    with pytest.raises(FerError, match='the detector broke'): demo.run(0, Recognizer(model, detector=Broken()), window=False)
    assert not [t for t in threading.enumerate() if t.name.startswith('fer_core-')]


def test_a_camera_that_returns_with_another_size(model, tmp_path, monkeypatch):
    sizes = iter([(120, 160, 3), (90, 160, 3), (240, 320, 3)])
    def changing(*_): return camera(6, fps=30, shape=next(sizes))()
    monkeypatch.setattr(cv2, 'VideoCapture', changing)
    s = demo.run(0, Recognizer(model, detector=Box((10, 10, 30, 30))), video=tmp_path/'v.avi', window=False, every=3, patience=.3, max_frames=12)
    assert s['frames'] == 12 and s['tracks'] == 1 and len({f.shape for _, f in Source(tmp_path/'v.avi')}) == 1


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 50), takes=st.integers(0, 60))
def test_a_slot_keeps_the_newest_and_counts_the_rest(n, takes):
    slot, got = Slot(), []
    for k in range(n):
        slot.put(k)
        if takes and k % takes == 0: got.append(slot.take(0))
    slot.close()
    if (last := slot.take()) is not None: got.append(last)
    assert slot.ended and slot.take() is None and len(got) + slot.dropped == n and got == sorted(set(got)) and (not n or got[-1] == n - 1)


def test_an_error_of_a_stage_reaches_who_takes_from_it():
    def work(slot): slot.put(1); raise ValueError('broken')
    stage = Stage('test', work); stage.join()
    assert stage.slot.take() == 1
    with pytest.raises(ValueError, match='broken'): stage.slot.take()


# ---- odd pictures ----

@pytest.mark.parametrize('shape, boxes', [((2160, 3840, 3), [(1000, 500, 300, 400)]), ((640, 360, 3), [(100, 100, 90, 120)]), ((120, 160, 3), [(0, 0, 1, 1), (159, 119, 1, 1), (80.5, 60.2, .4, .6)]),
                                          ((480, 640, 3), [(50*k, 20*k, 40, 50) for k in range(12)]), ((1, 1, 3), [(0, 0, 1, 1)]), ((48, 64), [(1, 1, 20, 20)]), ((48, 64, 4), [(-30, -30, 200, 200)])])
@pytest.mark.parametrize('every', [1, 2])
def test_odd_sizes_and_many_faces(model, shape, boxes, every):
    live = Live(Recognizer(model, detector=Box(*boxes)), every, side=320 if max(shape) <= 320 else None)
    for n in range(4):
        step = live.step(rng.integers(0, 255, shape, dtype=np.uint8), 40.*n)
        assert [f.track_id for f in step.faces] == list(range(1, len(boxes) + 1)) and step.raw.shape == (len(boxes), 7)
        assert demo.draw(rng.integers(0, 255, shape, dtype=np.uint8), step.faces, bars=True).shape == (*shape[:2], 3)


def test_boxes_that_are_none_are_no_faces(model):
    live = Live(Recognizer(model, detector=Box((5, 5, 0, 10), (np.nan, 0, 5, 5), (5, 5, 20, 20), (5, 5, -3, 10))))
    assert [f.box for f in live.step(np.zeros((60, 80, 3), np.uint8)).faces] == [(5., 5., 20., 20.)]


def test_a_detector_sees_the_side_that_was_asked_for(model):
    class Sees(Box):
        sizes = []
        def detect(self, image): self.sizes.append(image.shape); return Detections.make([[10, 20, 30, 40]], np.ones((1, 5, 2)), [1])
    live = Live(Recognizer(model, detector=Sees()), side=320, steady=False)
    f = live.step(np.zeros((720, 1280, 3), np.uint8)).faces[0]
    assert Sees.sizes == [(180, 320, 3)] and f.box == (40., 80., 120., 160.) and (f.landmarks == 4).all()
    with pytest.raises(FerError): Live(Recognizer(model, detector=Box()), side=3)


@pytest.mark.parametrize('damage', ['cut', 'zeros', 'noise'])
def test_a_corrupt_video_is_played_as_far_as_it_goes(model, tmp_path, damage):
    path = video(tmp_path/'v.avi', [rng.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(30)])
    data = bytearray(path.read_bytes()); half = len(data)//2
    data[half:] = {'cut': b'', 'zeros': bytes(len(data) - half), 'noise': rng.bytes(len(data) - half)}[damage]
    path.write_bytes(data)
    s = demo.run(path, Recognizer(model, detector=Box((10, 10, 40, 40))), log=tmp_path/'s.jsonl', window=False)
    assert 5 <= s['frames'] == len(lines_of(tmp_path/'s.jsonl')) <= 30
    assert s['frames'] == 30 or any('of the' in n and 'announces' in n for n in s['notes']), s['notes']


@pytest.mark.parametrize('file, faces', [('no_face.mp4', False), ('single_face.mp4', True), ('face_noface.mov', True), ('facenet_street.mp4', True)])
def test_real_clips_give_an_honest_log(model, shared, tmp_path, file, faces):
    yunet = shared/'weights'/'face_detection_yunet_2023mar.onnx'
    if not yunet.is_file(): pytest.skip('needs the YuNet file of FER_CORE_SHARED')
    s = demo.run(shared/'data'/'faces'/'videos'/file, model, detector=str(yunet), side=320, every=2, log=tmp_path/'s.jsonl', window=False, max_frames=60)
    lines = lines_of(tmp_path/'s.jsonl')
    assert [d['frame'] for d in lines] == list(range(s['frames'])) and sum(len(d['faces']) for d in lines) == s['faces'] and (s['faces'] > 0) == faces


# ---- frame rate, smoothing, ids ----

@pytest.mark.parametrize('average', ['ema', 'one_euro'])
def test_a_change_takes_the_same_time_at_any_frame_rate(average):
    sure = {c: np.where(np.array(CLASSES) == c, .9, .1/6) for c in CLASSES}
    took = []
    for fps in (8, 12, 25, 30, 50):
        t = np.arange(0, 4, 1/fps)
        shown = stabilise([sure['happy'] if x < 2 else sure['sad'] for x in t], t*1000, average=average)
        took.append(t[[s.label for s in shown].index('sad')] - 2)
        assert np.allclose([s.probs.sum() for s in shown], 1)
    assert max(took) - min(took) <= 1/8 + .03, took


def test_one_odd_frame_changes_nothing_at_a_low_rate():
    s, sure = Stabiliser(), {c: np.where(np.array(CLASSES) == c, .9, .1/6) for c in CLASSES}
    for _ in range(5): s.update(sure['happy'], .5)
    assert s.update(sure['sad'], .5).label == 'happy' and s.update(sure['sad'], .5).label == 'sad'


@settings(max_examples=40, deadline=None)
@given(x=st.lists(st.floats(-100, 100), min_size=1, max_size=30), beta=st.floats(0, 5), dt=st.floats(.001, .5))
def test_one_euro_stays_within_what_it_saw(x, beta, dt):
    f = OneEuro(1., beta)
    out = [float(f.update([v], dt)[0]) for v in x]
    assert out[0] == x[0] and min(x) - 1e-9 <= min(out) and max(out) <= max(x) + 1e-9


def test_time_given_and_time_counted_agree(model):
    frames = [rng.integers(0, 255, (120, 160, 3), dtype=np.uint8) for _ in range(20)]
    a, b = (Live(Recognizer(model, detector=Box((20, 20, 40, 40)))) for _ in range(2))
    for n, f in enumerate(frames):
        x, y = a.step(f), b.step(f, n*1000*STEP)
        assert x.faces[0].label == y.faces[0].label and np.allclose(x.faces[0].probs, y.faces[0].probs)


def test_health_is_watched_told_and_drawn(model, tmp_path):
    "Thirty frames of one dark little face: told on the picture, in the summary and in its text; without `health` nothing is."
    dark = rng.integers(8, 16, (240, 320, 3)).astype(np.uint8)
    clip = video(tmp_path/'dark.avi', [dark]*30)
    watched, left = (demo.run(clip, Recognizer(model, Box((100, 80, 24, 24))), video=tmp_path/f'{h}.avi', window=False, health=h) for h in (True, False))
    assert left['health'] is None and {'small', 'dark'} <= set(watched['health']['warnings']) and watched['health']['frames'] == 30
    assert 'dark' in demo.summary_table(watched) and 'dark' not in demo.summary_table(left).replace('dark.avi', '')
    def last(path):
        cap, frame = cv2.VideoCapture(str(path)), None
        while (got := cap.read())[0]: frame = got[1]
        return frame
    foot = slice(200, None)
    assert last(tmp_path/'True.avi')[foot].max() > 150 > 60 > last(tmp_path/'False.avi')[foot].max()


def test_who_comes_back_gets_the_id_back_and_a_fresh_mood():
    t = Tracker()
    assert t.update([[500, 100, 60, 70]], 0) == [1]
    assert t.update([[520, 110, 64, 72]], 4500) == [1]          # near, about as large, within five seconds
    assert t.update([[520, 110, 64, 72]], 4500 + 5300) == [2]   # too late
    assert t.update([[100, 110, 64, 72]], 4500 + 6300) == [3]   # elsewhere
    assert t.update([[110, 110, 140, 150]], 4500 + 8300) == [4] # not the size
    s = Stabilisers(threshold=0)
    sure = lambda c: [np.where(np.array(CLASSES) == c, .9, .1/6)]
    for k in range(10): s.update([1], sure('happy'), t=40*k)
    assert s.update([1], sure('sad'), t=3000)[0].label == 'sad'


def test_memory_of_the_tracker_is_bounded():
    t = Tracker()
    for k in range(400): t.update(rng.uniform(0, 5000, (3, 4)) + [0, 0, 20, 20], k*40.)
    assert len(t.ids) <= 3*17 + 64


# ---- keys, recordings, logs ----

class Hands:
    "A window whose user presses keys at given frames."
    def __init__(self, **at): self.controls, self.at, self.n, self.states = Controls(), {int(k[1:]): v for k, v in at.items()}, 0, []
    def show(self, image, wait=1.):
        self.n += 1
        for key in self.at.get(self.n, ''): self.controls.press(ord(key))
        self.states.append(self.controls.state())
        return not self.controls.ended
    def close(self): pass


def test_keys_in_a_file_session(model, tmp_path, monkeypatch):
    path = video(tmp_path/'v.avi', [np.full((60, 80, 3), 9*n, np.uint8) for n in range(20)], fps=100)
    hands = Hands(_3='r', _5='p', _9=' ', _12='r', _14='l', _18='q')
    monkeypatch.setattr(demo, 'open_window', lambda notes: hands)
    s = demo.run(path, Recognizer(model, detector=Box((5, 5, 30, 30))), recordings=tmp_path/'tapes')
    assert s['ended'] == 'the window was closed' and s['frames'] == 18 - 4  # four shows of the paused picture
    assert len(s['recordings']) == 1 and len(list(Source(s['recordings'][0]))) == 12 - 3 - 4
    assert hands.states[5] == 'paused, RECORDING' and hands.states[14] == 'labels off'


def test_pause_in_a_camera_session_is_not_counted_as_dropping(model, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, 'VideoCapture', camera(10**6))
    hands = Hands(_5='p', _25='p', _60='q')
    monkeypatch.setattr(demo, 'open_window', lambda notes: hands)
    s = demo.run(0, Recognizer(model, detector=Box()), log=tmp_path/'s.jsonl')
    lines = lines_of(tmp_path/'s.jsonl')
    gap = max(np.diff([d['frame'] for d in lines]))
    assert s['ended'] == 'the window was closed' and gap > 5 and sum(d['dropped'] for d in lines) == s['dropped'] < lines[-1]['frame'] + 1 - len(lines)


def test_nothing_is_stored_unless_asked(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = video(tmp_path/'v.avi', [np.zeros((60, 80, 3), np.uint8)]*5)
    s = demo.run(path, Recognizer(model, detector=Box((5, 5, 30, 30))), window=False)
    assert s['recordings'] == [] and [p.name for p in tmp_path.iterdir()] == ['v.avi']


def test_a_failing_session_leaves_no_half_recording(tmp_path):
    with pytest.raises(ValueError), Tape(tmp_path/'v.avi', 25, Controls()) as tape:
        tape.write(np.zeros((60, 80, 3), np.uint8))
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_a_recording_keeps_the_time(tmp_path):
    out = Recorder(tmp_path/'v.avi', 25)
    for t in np.cumsum(rng.uniform(5, 150, 60)): out.write(np.zeros((60, 80, 3), np.uint8), 1000 + t); last = 1000 + t; first = locals().get('first', last)
    out.close()
    assert abs(len(list(Source(tmp_path/'v.avi'))) - (last - first)/40 - 1) <= 1


def test_a_parquet_log_without_pyarrow_is_one_clear_error(model, tmp_path):
    path = video(tmp_path/'v.avi', [np.zeros((60, 80, 3), np.uint8)]*3)
    code = ('import sys\nsys.modules["pyarrow"] = None\nfrom fer_core.live import demo\nfrom fer_core.artifacts import FerError\n'
            'try: demo.run(sys.argv[1], sys.argv[2], detector="retinaface", log=sys.argv[3], window=False)\nexcept FerError as e: print(e.code, e)')
    out = subprocess.run([sys.executable, '-c', code, path, model, tmp_path/'s.parquet'], capture_output=True, text=True, cwd=ROOT, check=False)
    assert out.stdout.startswith('bad_parameter') and 'pip install pyarrow' in out.stdout and not list(tmp_path.glob('*parquet*')), out.stderr


def test_a_parquet_log_holds_what_the_csv_holds(model, tmp_path):
    pq = pytest.importorskip('pyarrow.parquet', reason='pyarrow is optional')
    path = video(tmp_path/'v.avi', [rng.integers(0, 255, (60, 80, 3), dtype=np.uint8) for _ in range(8)])
    demo.run(path, Recognizer(model, detector=Box((5, 5, 30, 30), (40, 5, 30, 30))), csv=tmp_path/'s.csv', log=tmp_path/'s.parquet', window=False)
    rows, table = list(csv.DictReader(open(tmp_path/'s.csv'))), pq.read_table(tmp_path/'s.parquet')
    assert table.column_names == demo.COLUMNS and table.num_rows == len(rows) == 16
    for c in demo.COLUMNS:
        for a, b in zip(table[c].to_pylist(), rows): assert (a is None and b[c] == '') or str(a) == b[c] or float(a) == float(b[c])
    def stop(done, total): raise KeyboardInterrupt
    demo.run(path, Recognizer(model, detector=Box()), log=tmp_path/'cut.parquet', window=False, progress=stop)
    assert pq.read_table(tmp_path/'cut.parquet')['frame'].to_pylist() == [0]


def test_a_jsonl_log_is_whole_after_a_kill(model, tmp_path):
    path = video(tmp_path/'v.avi', [rng.integers(0, 255, (120, 160, 3), dtype=np.uint8) for _ in range(300)])
    p = subprocess.Popen([sys.executable, ROOT/'demo'/'realtime_demo.py', path, '--model', model, '--detector', 'retinaface', '--log', tmp_path/'s.jsonl', '--no-window'], env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while p.poll() is None and time.monotonic() < end and not ((tmp_path/'s.jsonl').exists() and (tmp_path/'s.jsonl').read_text().count('\n') > 5): time.sleep(.02)
    p.kill(); p.wait()
    lines = lines_of(tmp_path/'s.jsonl')
    assert len(lines) > 5 and [d['frame'] for d in lines] == list(range(len(lines)))


def test_an_unknown_kind_of_log_is_an_error(model, tmp_path):
    path = video(tmp_path/'v.avi', [np.zeros((60, 80, 3), np.uint8)]*2)
    with pytest.raises(FerError, match='xlsx'): demo.run(path, Recognizer(model, detector=Box()), log=tmp_path/'s.xlsx', window=False)


def test_overlay_bars_are_as_long_as_the_probabilities():
    from fer_core.live.recognise import Face
    p = np.array([.05, .05, .1, .6, .05, .05, .1])
    out = demo.draw(np.zeros((400, 500, 3), np.uint8), [Face((50., 50., 120., 150.), np.zeros((5, 2)), 'happy', p, .6, False, 1)], bars=True)
    happy = np.array(demo.draw.__globals__['_BGR']['happy'])
    panel = (out[55:150, 175:400] == happy).all(-1)
    assert 25 <= panel.sum(1).max() <= 40 and panel.any(1).sum() >= 3  # 0.6 of a bar of 42 px, some rows high


def test_overlay_bars_leave_the_neighbours_free():
    from fer_core.live.recognise import Face
    boxes = [(300., 200., 80., 90.), (395., 205., 80., 90.), (490., 200., 80., 90.)]
    faces = [Face(b, np.zeros((5, 2)), 'happy', np.full(7, 1/7), .6, False, i) for i, b in enumerate(boxes)]
    grey = np.full((480, 900, 3), 128, np.uint8)
    out = demo.draw(grey, faces, bars=True)
    for x, y, w, h in np.array(boxes, int): assert (out[y + 6:y + h - 6, x + 6:x + w - 6] == 128).all()  # a panel darkens what it covers
    assert ((out < 60).all(-1)).sum() > 3*112*60  # and all three panels are there


def test_the_window_opens_as_large_as_its_picture(tmp_path):
    if not shutil.which('Xvfb'): pytest.skip('needs Xvfb')
    code = """if 1:
        import numpy as np, cv2, time
        from fer_core.live.overlay import Window
        for size in ((360, 640), (1080, 1920)):
            w = Window()
            for _ in range(5): assert w.show(np.zeros((*size, 3), np.uint8), 20)
            print(*cv2.getWindowImageRect(w.title)[2:]); w.close()
    """
    read, write = os.pipe()
    x = subprocess.Popen(['Xvfb', '-displayfd', str(write), '-screen', '0', '1600x1000x24', '-nolisten', 'tcp'], pass_fds=[write], stderr=subprocess.DEVNULL)
    try:
        number = os.fdopen(read).readline().strip()
        done = subprocess.run([sys.executable, '-c', code], env=os.environ | {'DISPLAY': f':{number}'}, cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally: os.close(write); x.terminate(); x.wait()
    assert done.stdout.split() == ['640', '360', '1280', '720'], done.stderr


def test_live_faces_on_a_picture_of_twelve(model, shared):
    yunet = shared/'weights'/'face_detection_yunet_2023mar.onnx'
    if not yunet.is_file(): pytest.skip('needs the YuNet file of FER_CORE_SHARED')
    photo = cv2.imread(str(shared/'data'/'faces'/'photos'/'single_face.jpg'))
    h, w = photo.shape[:2]; k = 220/max(h, w)
    small = cv2.copyMakeBorder(p := cv2.resize(photo, None, fx=k, fy=k), 0, 240 - p.shape[0], 0, 240 - p.shape[1], cv2.BORDER_REPLICATE)
    live = Live(Recognizer(model, detector=str(yunet)))
    for n in range(3): step = live.step(np.tile(small, (3, 4, 1)), n*40.)
    assert len(step.faces) == 12 and {f.track_id for f in step.faces} == set(range(1, 13))

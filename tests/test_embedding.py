"""fer_core inside other programs: threads, event loops, streams without end, and the examples of demo/."""
import asyncio, json, os, subprocess, sys, threading, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import cv2, numpy as np, pytest
import fer_core
from fer_core.artifacts import FerError
from fer_core.data.preprocess import Preprocess
from fer_core.faces import detect
from fer_core.live import recognise
from fer_core.live.recognise import Recognizer, toy_model

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get('FER_CORE_SHARED') or ROOT.parent/'shared')
PHOTOS, YUNET = SHARED/'data'/'faces'/'photos', SHARED/'weights'/'face_detection_yunet_2023mar.onnx'
DETECTORS = ['retinaface', pytest.param(str(YUNET), marks=pytest.mark.skipif(not YUNET.is_file(), reason='needs the YuNet file of FER_CORE_SHARED'))]


@pytest.fixture(scope='module')
def model(tmp_path_factory): return toy_model(tmp_path_factory.mktemp('model')/'toy.onnx', Preprocess(size=48, margin=.1))


def drawn(scale=1., shift=0): # a face of nobody, in a picture of scale x 320 by 240
    image = np.full((240, 320, 3), (150, 140, 120), np.uint8)
    for centre, axes, colour in (((160, 106), (57, 75), (30, 40, 60)), ((160, 121), (48, 66), (150, 180, 225))): cv2.ellipse(image, centre, axes, 0, 0, 360, colour, -1)
    for x in (140, 180):
        cv2.ellipse(image, (x, 109), (10, 5), 0, 0, 360, (245, 245, 245), -1); cv2.circle(image, (x, 109), 4, (50, 40, 30), -1); cv2.ellipse(image, (x, 97), (13, 4), 0, 180, 360, (30, 40, 60), 3)
    cv2.ellipse(image, (160, 127), (7, 12), 0, 30, 150, (110, 140, 190), 2); cv2.ellipse(image, (160, 145), (18, 9), 0, 10, 170, (80, 80, 190), 5)
    return cv2.resize(np.roll(cv2.GaussianBlur(image, (0, 0), 1.8), shift, 1), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


class Box:
    "A detector that finds one face, where the picture's first pixel says, after a while."
    name = 'box'
    def __init__(self, wait=0.): self.wait, self.calls = wait, 0
    def detect(self, image):
        self.calls += 1
        if self.wait: time.sleep(self.wait)
        return detect.Detections.make([[int(image[0, 0, 0]), 10, 60, 60]], np.zeros((1, 5, 2)), [1.])


def frames(n, seed=0, side=120):
    rng = np.random.default_rng(seed)
    for i in range(n):
        image = np.full((side, side + 40, 3), 90, np.uint8)
        image[20:60, 20:60] = rng.integers(0, 255, 3)
        image[0, 0, 0] = i % 30
        yield image


def same(a, b): return len(a) == len(b) and all(np.allclose(x.box, y.box, atol=1e-3) and x.label == y.label and np.allclose(x.probs, y.probs, atol=1e-5) for x, y in zip(a, b))


def python(code, *args, **env):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'} | env, check=False)


# ---- threads

@pytest.mark.parametrize('detector', DETECTORS)
def test_threads_with_images_of_different_sizes_agree_with_one_thread(model, detector):
    r = Recognizer(model, detector, threads=1)
    images = [drawn(s, k) for s, k in ((.5, 0), (.8, 10), (1., -20), (1.3, 5))] + [drawn()[:50]]
    if PHOTOS.is_dir(): images += [cv2.resize(cv2.imread(str(p)), None, fx=.4, fy=.4, interpolation=cv2.INTER_AREA) for p in sorted(PHOTOS.glob('*.jpg'))[:4]]
    want = [r.faces(i) for i in images]
    assert sum(map(len, want)) >= 4
    def work(seed):
        order = np.random.default_rng(seed).integers(0, len(images), 30)
        return [int(i) for i in order if not same(r.faces(images[i]), want[i])]
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(work, range(4))) == [[]]*4


def test_a_detector_with_a_size_of_its_own_is_used_by_one_thread_at_a_time():
    class Net: # keeps its size as OpenCV's network does
        def setInputSize(self, size): time.sleep(2e-4); self.size = size
        def detect(self, image):
            time.sleep(2e-4)
            if image.shape[1::-1] != self.size: raise RuntimeError('another size')
            return 1, np.full((1, 15), image.shape[0], np.float32)
    net, bad = object.__new__(detect.YuNet), []
    net._net, net._size, net._lock, net.max_side = Net(), None, threading.Lock(), 640
    def work(side):
        for _ in range(100):
            try: bad.extend([] if net.detect(np.zeros((side, side), np.uint8)).scores[0] == side else [side])
            except RuntimeError: bad.append(side)
    threads = [threading.Thread(target=work, args=(s,)) for s in (30, 60, 90)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not bad


def test_first_images_of_many_threads_make_one_detector(model, monkeypatch):
    made = []
    def make(name, threads=None): time.sleep(.05); made.append(name); return Box()
    monkeypatch.setattr(recognise, 'make_detector', make)
    r = Recognizer(model)
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(lambda _: r.faces(next(frames(1))), range(8)))
    assert made == ['auto'] and all(same(f, found[0]) for f in found)


# ---- files, streams

def test_files_goes_on_after_a_bad_one(model, tmp_path):
    cv2.imwrite(str(tmp_path/'a.png'), drawn()); (tmp_path/'b.png').write_bytes(b'none'); cv2.imwrite(str(tmp_path/'c.png'), drawn(1.2))
    r, seen = Recognizer(model, Box()), []
    with pytest.raises(FerError) as e:
        for path, found in r.files(tmp_path/n for n in ('a.png', 'b.png', 'gone.png', 'c.png')): seen.append((path.name, len(found)))
    assert seen == [('a.png', 1), ('c.png', 1)] and e.value.code == 'undecodable_image' and 'b.png' in e.value.what and 'gone.png' in e.value.what
    assert [len(f) for _, f in r.files(str(tmp_path/'a.png'))] == [1] # one path is not a list of letters


def test_a_stream_is_lazy_and_agrees_with_single_images(model):
    r, taken = Recognizer(model, Box()), []
    def source():
        for f in frames(50): taken.append(1); yield f
    stream = r.stream(source())
    first = next(stream)
    assert len(taken) == 1 and same(first, r.faces(next(frames(1))))
    assert all(same(a, r.faces(f)) for a, f in zip(r.stream(frames(20)), frames(20)))
    with pytest.raises(FerError) as e: r.stream(frames(1), alpha=.5)
    assert e.value.code == 'bad_parameter'


def test_tracked_streams_keep_ids_each_its_own(model):
    r = Recognizer(model, Box())
    a, b = r.stream(frames(40), track=True), r.stream(frames(40, seed=1), track=True)
    pairs = list(zip(a, b))
    want = list(fer_core.live.demo.Live(r).step(f).faces for f in [next(frames(1))])
    assert {f.track_id for x, y in pairs for f in x + y} == {1} and same(pairs[0][0], want[0])
    live = fer_core.live.demo.Live(r)
    assert all(same(x, live.step(f).faces) for (x, _), f in zip(pairs, frames(40))) # what `Live` gives, frame by frame
    hasty = list(r.stream(frames(40), track=True, alpha=0, delta=0, need=1, of=1))
    for (x,), (y,) in zip(hasty, map(r.faces, frames(40))): assert x.label == y.label and np.allclose(x.probs, y.probs, atol=1e-5) # no smoothing is no smoothing


GROWTH = '''
import sys; sys.path.insert(0, sys.argv[2])
import asyncio
from test_embedding import Box, frames
from fer_core.live.recognise import Recognizer
def rss(): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('VmRSS'))
r, marks = Recognizer(sys.argv[1], Box(), threads=1), []
def mark(n):
    if n in (1000, 5000): marks.append(rss())
for n, found in enumerate(r.stream(frames(5001), track=True)): mark(n)
async def later():
    n = 0
    async for found in r.astream(frames(5001)): mark(n); n += 1
asyncio.run(later())
print(marks[1] - marks[0], marks[3] - marks[2], marks[0])
'''


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the resident memory from /proc')
def test_memory_stays_flat_over_thousands_of_frames(model):
    done = python(GROWTH, model, ROOT/'tests')
    assert done.returncode == 0, done.stderr
    tracked, waited, base = map(float, done.stdout.split())
    assert tracked < 4 and waited < 4, done.stdout # MB over 4,000 frames of 58 kB: keeping them would be 230 MB


# ---- event loops

def run(coroutine): return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_the_loop_goes_on_while_a_face_is_read(model):
    async def program():
        r, ticks = Recognizer(model, Box(wait=.3)), 0
        work = asyncio.ensure_future(r.afaces(next(frames(1))))
        while not work.done(): await asyncio.sleep(.005); ticks += 1
        return ticks, await work, r.faces(next(frames(1)))
    ticks, found, want = run(program())
    assert ticks > 10 and same(found, want)


def test_answers_come_to_whom_they_belong(model):
    async def program():
        async with Recognizer(model, Box()) as r:
            return await asyncio.gather(*[r.afaces(f) for f in frames(60)]), [r.faces(f) for f in frames(60)]
    got, want = run(program())
    assert all(map(same, got, want))


def test_cancelled_calls_leave_nothing_behind(model):
    complaints = []
    async def program():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        box = Box(wait=.1)
        async with Recognizer(model, box) as r:
            waiting = [asyncio.ensure_future(r.afaces(f)) for f in frames(10)]
            await asyncio.sleep(.03)
            for w in waiting: w.cancel()
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            with pytest.raises(TimeoutError): await asyncio.wait_for(r.afaces(next(frames(1))), .01)
            box.wait = 0
            found = await r.afaces(next(frames(1)))
            assert all(isinstance(e, asyncio.CancelledError) for e in ended) and same(found, r.faces(next(frames(1))))
            return box.calls
    calls = run(program())
    assert calls <= 4 and not complaints # those that had not begun never ran


@pytest.mark.parametrize('kind', ['plain', 'async'])
def test_an_async_stream(model, kind):
    async def source():
        for f in frames(25): await asyncio.sleep(0); yield f
    async def program():
        r = Recognizer(model, Box())
        got = [found async for found in r.astream(frames(25) if kind == 'plain' else source(), track=True)]
        first = []
        async for found in r.astream(source() if kind == 'async' else frames(25)):
            first.append(found)
            if len(first) == 2: break # who leaves early leaves the recogniser usable
        return got, list(r.stream(frames(25), track=True)), first
    got, want, first = run(program())
    assert len(got) == 25 and all(map(same, got, want)) and len(first) == 2


def test_a_blocking_camera_does_not_hold_up_the_loop_nor_other_calls(model):
    async def program():
        async with Recognizer(model, Box()) as r:
            def camera():
                for f in frames(2): time.sleep(.3); yield f
            async def watch(): return [f async for f in r.astream(camera())]
            watching, began = asyncio.ensure_future(watch()), time.perf_counter()
            await asyncio.sleep(.02)
            await r.afaces(next(frames(1)))
            took = time.perf_counter() - began
            return took, await watching
    took, seen = run(program())
    assert took < .3 and len(seen) == 2


def test_errors_come_through(model):
    def broken():
        yield next(frames(1))
        raise OSError('the camera is gone')
    async def program():
        r = Recognizer(model, Box())
        with pytest.raises(OSError): [f async for f in r.astream(broken())]
        with pytest.raises(FerError) as e: await r.afaces(np.zeros((3, 3), np.float32))
        assert e.value.code == 'undecodable_image'
    run(program())


def test_close_answers_those_that_wait_and_refuses_others(model):
    async def program():
        r = Recognizer(model, Box(wait=.05))
        waiting = [asyncio.ensure_future(r.afaces(f)) for f in frames(3)]
        await asyncio.sleep(0)
        await asyncio.to_thread(r.close); r.close() # twice is once
        assert [len(f) for f in await asyncio.gather(*waiting)] == [1]*3
        with pytest.raises(FerError) as e: await r.afaces(next(frames(1)))
        assert e.value.code == 'bad_parameter' and 'closed' in e.value.what
        return r
    r = run(program())
    for call in (lambda: r.faces(next(frames(1))), lambda: r.classify([np.zeros((9, 9), np.uint8)])):
        with pytest.raises(FerError): call()
    with Recognizer(model, Box()) as own: assert len(own.faces(next(frames(1)))) == 1
    with pytest.raises(FerError): own.faces(next(frames(1)))


def test_asynchrony_costs_nothing_until_it_is_used(model):
    code = ('import sys, threading\nimport fer_core\nassert not {"numpy", "cv2", "asyncio"} & set(sys.modules)\nr = fer_core.Recognizer(sys.argv[1])\n'
            'print(sorted({"torch", "timm", "pandas", "scipy", "cryptography", "fer_core.live.demo"} & set(sys.modules)), threading.active_count())')
    done = python(code, model)
    assert done.stdout.strip() == '[] 1', done.stderr + done.stdout


# ---- the examples

@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp('photo')/'drawn.png'
    cv2.imwrite(str(path), drawn())
    return path


def demo(name, *args): return subprocess.run([sys.executable, ROOT/'demo'/name, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'}, timeout=60)


def test_the_script_example(photo, tmp_path):
    done = demo('embed_script.py', photo, '--detector', 'retinaface') # the released student: nothing was trained here
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told['file'] == str(photo) and len(told['faces']) == 1 and 0 < told['faces'][0]['confidence'] <= 1
    done = demo('embed_script.py', photo, tmp_path/'gone.jpg', '--detector', 'retinaface')
    assert done.returncode == 13 and len(done.stdout.splitlines()) == 1 and 'gone.jpg' in done.stderr


def test_the_async_example(model, tmp_path):
    path = tmp_path/'clip.avi'
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 25, (320, 240))
    for k in range(8): out.write(drawn(1., 2*k))
    out.release()
    done = demo('embed_async.py', path, '--model', model, '--detector', 'retinaface')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all(line.startswith('#1 ') for line in lines)


def test_the_web_example(model, photo):
    server = subprocess.Popen([sys.executable, ROOT/'demo'/'embed_web.py', '--port', '0', '--model', model, '--detector', 'retinaface'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'})
    try:
        url = server.stdout.readline().strip()
        assert url.startswith('http://127.0.0.1:')
        def post(data, **headers):
            try:
                with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as reply: return reply.status, json.load(reply)
            except urllib.error.HTTPError as e: return e.code, json.load(e)
        want = Recognizer(model, 'retinaface').faces(cv2.imread(str(photo)))[0]
        with ThreadPoolExecutor(4) as pool: replies = list(pool.map(lambda _: post(photo.read_bytes()), range(8)))
        assert all(status == 200 and np.allclose(told['faces'][0]['box'], want.box, atol=1e-3) and abs(told['faces'][0]['probs']['happy'] - want.probs[3]) < 1e-5 for status, told in replies)
        assert post(b'no picture')[0] == 400 and post(b'x', **{'Content-Length': '99999999999'})[0] == 413 and post(b'')[0] == 411
        bomb = cv2.imencode('.png', np.zeros((6000, 6000), np.uint8))[1].tobytes() # 36 million pixels in some kilobytes
        assert len(bomb) < 100_000 and post(bomb)[0] == 400 and post(photo.read_bytes())[0] == 200
    finally: server.terminate(); server.wait(10)


def test_the_notebook_example(model, tmp_path, monkeypatch):
    import nbformat
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')  # as in JupyterLab; conftest sets agg
    from nbconvert.preprocessors import ExecutePreprocessor
    path = ROOT/'demo'/'embed_notebook.ipynb'
    nb = nbformat.read(path, as_version=4)
    assert all(not c.get('outputs') and c.get('execution_count') is None for c in nb.cells if c.cell_type == 'code') # kept clean
    first = next(c for c in nb.cells if c.cell_type == 'code')
    first.source += f'\nmodel, detector = {str(model)!r}, "retinaface"'
    ExecutePreprocessor(timeout=60, kernel_name='python3').preprocess(nb, {'metadata': {'path': str(tmp_path)}})
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert any('image/png' in o.get('data', {}) for o in outputs) and any("[('" in o.get('data', {}).get('text/plain', '') for o in outputs)

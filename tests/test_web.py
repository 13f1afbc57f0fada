"""The live demo in a browser: what the socket takes and refuses, how it ends, and the page itself in a headless Chromium with a filmed camera."""
import asyncio, base64, csv, http.client, json, os, re, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import cv2, numpy as np, pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect
from fer_core.artifacts import FerError
from fer_core.data.preprocess import Preprocess
from fer_core.faces.detect import Detections
from fer_core.labels import CLASSES
from fer_core.live import demo, web
from fer_core.live.recognise import Recognizer, toy_model
from fer_core.live.stabilise import count_flips
from browser import Page, chromium, in_browser

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get('FER_CORE_SHARED', ROOT.parent/'shared'))
CLIP = SHARED/'data'/'faces'/'videos'/'single_face.mp4'


class Box:
    "A detector that always finds the same faces, after a while."
    name = 'box'
    def __init__(self, *boxes, seconds=0.): self.boxes, self.seconds = boxes, seconds
    def detect(self, image): time.sleep(self.seconds); return Detections.make(self.boxes, np.zeros((len(self.boxes), 5, 2)), np.ones(len(self.boxes)))


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_model(tmp_path_factory.mktemp('model')/'toy.onnx', Preprocess(size=48, margin=.1))


@pytest.fixture
def served(toy): # -> a running server with one face
    with web.Server(Recognizer(toy, Box((20, 20, 60, 60)))) as server: yield server
    assert not server._thread.is_alive()


def picture(seed=0, size=(120, 160)): return cv2.GaussianBlur(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8), (0, 0), 3)
def jpeg(image): return cv2.imencode('.jpg', image)[1].tobytes()
def frame(seq, image=None, t=None): return web.HEAD.pack(seq, 40*seq if t is None else t) + jpeg(picture() if image is None else image)
def address(server, path='/ws', key=None): return f'ws://127.0.0.1:{server.port}{path}?{web.KEY}={server.key if key is None else key}'
async def client(server, path='/ws', key=None, **headers): return await websocket_connect(HTTPRequest(address(server, path, key), headers=headers), max_message_size=10**8)
async def heard(c, seconds=10): return await asyncio.wait_for(c.read_message(), seconds)
async def ask(c, message): await c.write_message(message, binary=isinstance(message, bytes)); return json.loads(await heard(c))


# ---- the door ----

def get(server, path, **headers):
    c = http.client.HTTPConnection('127.0.0.1', server.port, timeout=10)
    c.request('GET', path, headers=headers)
    r = c.getresponse()
    return r.status, r.read().decode(), r.headers


def test_the_page_asks_for_its_key(served):
    good = served.url[served.url.index('/?'):]
    status, text, headers = get(served, good)
    assert status == 200 and text == served.text
    assert "default-src 'none'" in headers['Content-Security-Policy'] and 'unsafe' not in headers['Content-Security-Policy'] and headers['Referrer-Policy'] == 'no-referrer'
    for path in ('/', '/?key=', good[:-1], good + 'x', good.upper(), f'/?token={served.key}', '/?key=%C3%A9%00'):
        status, text, _ = get(served, path)
        assert status == 403 and served.key not in text and '<script>' not in text, path
    assert get(served, good, Origin='http://evil.org')[0] == 403
    assert get(served, '/../../etc/passwd' + good[1:])[0] == 404 and get(served, '/page.html' + good[1:])[0] == 404
    assert get(served, '/user/ann/proxy/8080' + good)[0] == 200  # a proxy that leaves its prefix in the path


def test_keys_are_long_and_new_each_time(toy):
    servers = [web.Server(Recognizer(toy, Box())) for _ in range(3)]
    assert len({s.key for s in servers}) == 3 and all(len(base64.urlsafe_b64decode(s.key + '=')) == 32 for s in servers)
    for s in servers: assert s.key not in repr(s); s.stop()
    for s in servers: assert get_closed(s.port)


def get_closed(port): # nobody listens
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) != 0


def test_the_socket_refuses_strangers(served):
    async def main():
        here = f'http://127.0.0.1:{served.port}'
        for kwargs in (dict(key=''), dict(key='x'*43), dict(Origin='http://evil.org'), dict(Origin='null'), dict(Origin=f'http://127.0.0.1:{served.port + 1}'), dict(Origin=here, key='x'), {'Origin': 'http://evil.org', 'Sec-Fetch-Site': 'same-origin'}):
            with pytest.raises(HTTPClientError) as e: await client(served, **kwargs)
            assert e.value.code == 403
        for kwargs in (dict(), dict(Origin=here), dict(Origin=here, path='/proxy/1/ws')):
            c = await client(served, **kwargs)
            assert (await ask(c, frame(1)))['type'] == 'faces'
            c.close()
    asyncio.run(main())
    assert served.frames == 3


def test_a_welcome_origin(toy):
    async def main(s):
        c = await client(s, Origin='https://hub.example.org')
        assert (await ask(c, frame(1)))['type'] == 'faces'; c.close()
        with pytest.raises(HTTPClientError): await client(s, Origin='http://hub.example.org')
    with web.Server(Recognizer(toy, Box()), origins=['https://hub.example.org']) as s: asyncio.run(main(s))


# ---- frames ----

def test_an_answer_is_what_the_live_path_makes_of_the_frame(served, toy):
    recognizer, image = Recognizer(toy, Box((20, 20, 60, 60))), cv2.imdecode(np.frombuffer(jpeg(picture()), np.uint8), cv2.IMREAD_COLOR)
    want = recognizer.faces(image)[0]
    async def main():
        c = await client(served)
        a = await ask(c, frame(2**32 - 1))
        c.close()
        return a
    a = asyncio.run(main())
    assert a['seq'] == 2**32 - 1 and a['size'] == [160, 120] and a['dropped'] == 0
    (f,) = a['faces']
    assert f['id'] == 1 and f['box'] == [20, 20, 60, 60] and f['label'] == CLASSES[int(np.argmax(f['probs']))] and f['confidence'] == max(f['probs'])
    assert np.abs(np.array(f['raw']) - want.probs).max() < .03  # another JPEG decoder may round otherwise
    assert f['abstained'] == (f['confidence'] < recognizer.threshold)


def test_malformed_messages_are_answered_and_the_session_goes_on(served):
    whole = jpeg(picture())
    big = cv2.imencode('.jpg', np.zeros((1920, 1920, 3), np.uint8))[1].tobytes()
    head = web.HEAD.pack(1, 40.)
    bad = [b'', b'\1', head[:-1], head, head + b'\xff\xd8\xff\xe0' + b'\0'*50, head + whole[:len(whole)//2], head + cv2.imencode('.png', picture())[1].tobytes(), head + big, head + os.urandom(5000), frame(1, t=float('nan')), frame(1, t=float('inf'))]
    async def main():
        c = await client(served)
        for i, message in enumerate(bad):
            a = await ask(c, message)
            assert a['type'] == 'error' and a['code'] == ('undecodable_image' if 3 <= i <= 8 else 'bad_parameter') and a['text'], i
            assert a['seq'] == (1 if i >= 3 else None)
        assert '1920 x 1920' in (await ask(c, bad[7]))['text']
        assert (await ask(c, 'text'))['code'] == 'bad_parameter'
        grey = await ask(c, web.HEAD.pack(2, 80.) + jpeg(picture()[..., 0]))
        assert grey['type'] == 'faces' and grey['faces'][0]['id'] == 1
        tiny = await ask(c, frame(3, np.zeros((1, 1, 3), np.uint8)))
        assert tiny['type'] == 'faces'
        c.close()
    asyncio.run(main())


def test_an_error_inside_is_a_message_not_a_crash(toy, caplog):
    class Broken(Box):
        def detect(self, image): raise RuntimeError('boom')
    async def main(s):
        c = await client(s)
        for i in range(2): assert {**await ask(c, frame(i)), 'dropped': 0} == {'type': 'error', 'seq': i, 'code': 'unexpected', 'text': 'RuntimeError: boom', 'dropped': 0}
        c.close()
    with web.Server(Recognizer(toy, Broken())) as s: asyncio.run(main(s))
    assert 'boom' in caplog.text


def test_an_oversize_message_closes_its_connection_only(served):
    async def main():
        a, b = await client(served), await client(served)
        await a.write_message(b'\0'*(web.LIMIT + 1), binary=True)
        assert await heard(a) is None and a.close_code == 1009
        assert (await ask(b, frame(1)))['type'] == 'faces'
        b.close()
    asyncio.run(main())


def test_two_pages_have_ids_of_their_own(toy):
    detector = Box((20, 20, 60, 60))
    async def main(s):
        a, b = await client(s), await client(s)
        ids = []
        for n in range(6):
            detector.boxes = ((20 + 2*n, 20, 60, 60),)
            ids.append((await ask(a, frame(n)))['faces'][0]['id'])
        detector.boxes = ((20, 20, 40, 40), (100, 60, 40, 40))
        other = [f['id'] for f in (await ask(b, frame(9)))['faces']]
        detector.boxes = ((32, 20, 60, 60),)
        ids.append((await ask(a, frame(10)))['faces'][0]['id'])
        assert ids == [1]*7 and other == [1, 2]
        a.close(); b.close()
    with web.Server(Recognizer(toy, detector)) as s: asyncio.run(main(s))


def test_places_are_few_and_given_back(toy):
    async def main(s):
        a, b = await client(s), await client(s)
        c = await client(s)
        assert await heard(c) is None and c.close_code == 1013 and '2 places' in c.close_reason
        a.close()
        for _ in range(100):
            if len(s.open) == 1: break
            await asyncio.sleep(.02)
        d = await client(s)
        assert (await ask(d, frame(1)))['type'] == 'faces' and (await ask(b, frame(1)))['type'] == 'faces'
        b.close(); d.close()
    with web.Server(Recognizer(toy, Box()), connections=2) as s: asyncio.run(main(s))


def test_of_a_flood_the_newest_frame_wins(toy):
    async def main(s):
        c, other = await client(s), await client(s)
        for n in range(40): await c.write_message(frame(n), binary=True)
        seqs, dropped = [], 0
        while not seqs or seqs[-1] != 39: a = json.loads(await heard(c)); seqs.append(a['seq']); dropped = a['dropped']
        t0 = time.perf_counter()
        assert (await ask(other, frame(1)))['type'] == 'faces' and time.perf_counter() - t0 < 2
        assert seqs == sorted(seqs) and len(seqs) + dropped == 40 and dropped > 10
        c.close(); other.close()
    with web.Server(Recognizer(toy, Box((20, 20, 60, 60), seconds=.1))) as s: asyncio.run(main(s))


# ---- start and end ----

def test_stop_closes_pages_and_port_and_may_be_called_twice(toy):
    s = web.Server(Recognizer(toy, Box(seconds=.05))).start()
    async def main():
        c = await client(s)
        await ask(c, frame(1))
        await c.write_message(frame(2), binary=True)
        threading.Thread(target=s.stop).start()
        while (m := await heard(c)) is not None: assert json.loads(m)['seq'] == 2
        assert c.close_code == 1001
    asyncio.run(main())
    s._thread.join(5)
    assert not s._thread.is_alive() and get_closed(s.port)
    s.stop()


@pytest.mark.parametrize('bad', [dict(port=-1), dict(port=65536), dict(host='203.0.113.7'), dict(host='no.such.host.invalid'), dict(every=0), dict(alpha=1.5)])
def test_what_cannot_be_served(toy, bad):
    with pytest.raises(FerError) as e: web.Server(Recognizer(toy, Box()), **bad)
    assert e.value.code == 'bad_parameter'


def test_a_taken_port_is_named(served, toy):
    with pytest.raises(FerError, match=f'port {served.port}') as e: web.Server(Recognizer(toy, Box()), port=served.port)
    assert e.value.code == 'bad_parameter'


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_its_address_answers_and_ends_on_ctrl_c(toy, how):
    p = subprocess.Popen([sys.executable, '-c', 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom fer_core.cli import main; main()', 'demo', '--web', '--model', toy, '--detector', 'retinaface', '--json'],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'})
    try:
        line = p.stderr.readline()
        url = re.search(r'http://127\.0\.0\.1:(\d+)/\?key=([\w-]{43})$', line.strip())
        assert url, line
        async def main():
            c = await websocket_connect(f'ws://127.0.0.1:{url[1]}/ws?key={url[2]}')
            assert (await ask(c, frame(1)))['type'] == 'faces'
            p.send_signal(how)
            assert await heard(c) is None and c.close_code == 1001
        asyncio.run(main())
        out, err = p.communicate(timeout=15)
        assert p.returncode == 0 and 'Traceback' not in err, err
        assert json.loads(out) == {'port': int(url[1]), 'pages': 1, 'frames': 1, 'ended': 'interrupted'}
    finally: p.kill(); p.wait()


def test_serving_loads_nothing_heavy_and_importing_no_tornado(toy):
    code = ('import sys\nfrom fer_core.live import web\nassert "tornado" not in sys.modules\nfrom fer_core.live.recognise import Recognizer\nimport urllib.request\n'
            'with web.Server(Recognizer(sys.argv[1], "retinaface")) as s: urllib.request.urlopen(s.url).read(); s.visit().answer(b"1234")\n'
            'print(sorted({"torch", "timm", "pandas", "scipy", "matplotlib", "IPython", "jupyter_server"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code, toy], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'


def test_the_page_is_in_the_wheel(tmp_path):
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path, 'build_py', '--build-lib', tmp_path/'lib'], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'lib'/'fer_core'/'live'/'page.html').read_bytes() == web.PAGE.read_bytes()
    assert 'include fer_core/live/page.html' in (ROOT/'MANIFEST.in').read_text().splitlines()


# ---- in a notebook ----

def test_a_notebook_finds_the_way_through_its_proxy(toy, monkeypatch, tmp_path):
    s = web.Server(Recognizer(toy, Box()))
    monkeypatch.delenv('JUPYTERHUB_SERVICE_PREFIX', raising=False); monkeypatch.delenv('JPY_PARENT_PID', raising=False)
    assert web.jupyter_base() is None and web.frame_url(s) == s.url
    with pytest.raises(FerError, match='Jupyter'): web.frame_url(s, proxy=True)
    monkeypatch.setenv('JUPYTER_RUNTIME_DIR', str(tmp_path)); monkeypatch.setenv('JPY_PARENT_PID', '4711')
    assert web.jupyter_base() is None
    (tmp_path/'jpserver-4711.json').write_text('{"base_url": "/lab7/", "pid": 4711}')
    assert web.frame_url(s, proxy=True) == f'/lab7/proxy/{s.port}/?key={s.key}'
    monkeypatch.setenv('JUPYTERHUB_SERVICE_PREFIX', '/user/ann/')
    assert web.frame_url(s, proxy=True) == f'/user/ann/proxy/{s.port}/?key={s.key}' and web.frame_url(s, proxy=False) == s.url
    s.stop()


# ---- the page in a browser ----

@pytest.fixture(scope='module')
def browser(tmp_path_factory): # -> DevTools port, and the frames that its camera shows
    folder = tmp_path_factory.mktemp('chromium')
    frames = film(CLIP, folder/'camera.mjpeg') if CLIP.is_file() else None
    with chromium(folder, folder/'camera.mjpeg' if frames else None) as port: yield port, frames


def film(clip, path): # a video as the MJPEG that Chromium's fake camera plays; -> its frames
    cap, frames = cv2.VideoCapture(str(clip)), []
    while (got := cap.read())[0]: frames.append(got[1])
    with open(path, 'wb') as f: f.writelines(cv2.imencode('.jpg', x, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for x in frames)
    return frames


def rows_of(path):
    with open(path, newline='') as f: return list(csv.DictReader(f))


@in_browser
@pytest.mark.skipif(not CLIP.is_file(), reason='needs the clips of FER_CORE_SHARED')
def test_a_session_in_the_browser(browser, tmp_path):
    (port, frames), recognizer = browser, Recognizer()
    ours = [f.probs for x in frames[::6] for f in recognizer.faces(x)[:1]]  # the reference: the frames themselves, without browser and smoothing

    async def main(server):
        prefix = f'http://127.0.0.1:{server.port}/user/ann/proxy/1/'
        async with Page(port) as page:
            await page('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path/'saved'))
            await page.open(prefix + f'?key={server.key}')
            assert await page.js('document.getElementById("csv").disabled') and not server.open
            assert await page.js('fetch("http://127.0.0.1:9/").then(() => "went out", () => "held back")') == 'held back'  # the policy
            refused = len(page.complaints())
            assert refused in (1, 2)  # that one
            for scheme, ground in (('dark', 'rgb(20, 23, 27)'), ('light', 'rgb(245, 246, 248)')):
                await page('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
                assert await page.js('getComputedStyle(document.body).backgroundColor') == ground
            for width in (360, 800, 1280):
                await page('Emulation.setDeviceMetricsOverride', width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
                assert await page.js('document.documentElement.scrollWidth') <= width  # a long camera name among it
            await page.press('Tab', 9)  # the keyboard is enough
            assert await page.js('document.activeElement.id') == 'toggle'
            await page.press('Enter', 13, '\r')
            await page.until('S.answers && S.answers.length > 12 && S.faces.length > 0')
            assert await page.js('document.getElementById("status").textContent') == 'live' and len(server.open) == 1
            pixels = await page.js('[...view.getContext("2d").getImageData(0, 0, view.width, view.height).data].filter((v, i) => i % 4 == 3 && v == 255).length / (view.width*view.height)')
            assert pixels > .99  # the analysed frame is drawn
            drawn = await page.js('[...chart.getContext("2d").getImageData(0, 0, chart.width, chart.height).data].filter((v, i) => i % 4 == 3 && v > 0).length')
            assert drawn > 2000
            assert re.fullmatch(r'face \d+ (\w+ \d+\u202f%|unsure)(, .*)?', await page.js('view.getAttribute("aria-label")'))
            chosen = await page.js('S.chosen')
            await page.js('document.querySelector("#faces button").focus()')
            await page.press('Enter', 13, '\r')
            assert await page.js('S.pinned && document.querySelector("#faces button").getAttribute("aria-pressed")') == 'true'
            assert re.match(f'Expression of face {chosen}', await page.js('document.getElementById("h-chart").textContent'))
            state = await page.js('new Promise(r => setTimeout(() => { stop(); setTimeout(() => r({sent: S.seq, seen: S.seen, rows: S.rows.length, flips: document.getElementById("flips").textContent, fps: +document.getElementById("fps").textContent, latency: document.getElementById("latency").textContent}), 200) }, 3000))')
            assert state['seen'] >= state['sent'] > 12 and state['fps'] > 0 and re.fullmatch(r'\d+ / \d+ ms', state['latency']), state
            for _ in range(100):
                if not server.open: break
                await asyncio.sleep(.05)
            assert not server.open  # stopping hangs up
            await page.js('document.getElementById("csv").click()')
            for _ in range(100):
                saved = list((tmp_path/'saved').glob('*.csv')) if (tmp_path/'saved').is_dir() else []
                if saved: break
                await asyncio.sleep(.1)
            assert page.complaints()[refused:] == []
            own = (prefix, prefix.replace('http', 'ws'), 'data:', 'blob:', 'http://127.0.0.1:9/')
            assert page.asked() and all(u.startswith(own) for u in page.asked()), page.asked()
            return state, saved[0]

    with web.Server(recognizer) as server: state, saved = asyncio.run(main(server))
    rows = rows_of(saved)
    assert len(rows) == state['rows'] and list(rows[0]) == [*demo.COLUMNS, 'latency_ms']  # the table of `fer demo --csv`
    assert all(float(r['latency_ms']) >= float(r['total_ms']) > 0 for r in rows) and sum(int(r['dropped']) for r in {r['frame']: r for r in rows}.values()) <= state['seen'] - len({r['frame'] for r in rows})
    seen = [r for r in rows if r['track_id']]
    raw, smooth = (np.array([[float(r[f'{kind}_{c}']) for c in CLASSES] for r in seen]) for kind in ('raw', 'smooth'))
    assert len(seen) > .8*len(rows) and np.allclose(raw.sum(1), 1, atol=1e-3) and np.allclose(smooth.sum(1), 1, atol=1e-3)
    assert [r['raw_label'] for r in seen] == [CLASSES[i] for i in raw.argmax(1)]
    assert np.abs(raw.mean(0) - np.mean(ours, 0)).max() < .1  # what the browser sent is what was filmed
    times = [float(r['t_ms']) for r in rows]
    assert times == sorted(times)
    tracks = {r['track_id'] for r in seen}
    minutes = len(seen)*(times[-1] - times[0])/1000/(len(set(times)) - 1)/60
    flips = [sum(count_flips([r[k] for r in seen if r['track_id'] == i]) for i in tracks)/minutes for k in ('raw_label', 'label')]
    shown = [float(v) for v in state['flips'].split(' → ')]
    assert np.allclose(shown, flips, rtol=.05, atol=.6), (shown, flips)  # two digits are shown


@in_browser
def test_what_goes_wrong_is_said_in_the_page(browser, toy):
    async def main(server):
        async with Page(browser[0]) as page:
            status = 'document.getElementById("status").textContent'
            await page.open(server.url)
            server.connections = 0
            await page.js('document.getElementById("toggle").click()')
            await page.until(f'{status}.includes("places are taken")')
            server.connections = 4
            await page.js('navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("no", "NotAllowedError"))')
            await page.js('document.getElementById("toggle").click()')
            await page.until(f'{status}.includes("not allowed")')
            assert await page.js('document.getElementById("toggle").textContent') == 'Start'
            await page.js('delete navigator.mediaDevices.getUserMedia')
            await page.js('document.getElementById("toggle").click()')  # the filmed camera, or Chromium's own test picture
            await page.until('S.answers && S.answers.length > 3')
            server.stop()
            await page.until(f'{status}.includes("fer has stopped")')
            assert await page.js('!S.running && S.stream === null && video.srcObject === null')
            await page.js('document.getElementById("toggle").click()')
            await page.until(f'{status}.includes("is fer still running")')
    with web.Server(Recognizer(toy, Box((20, 20, 200, 200)))) as server: asyncio.run(main(server))


@in_browser
def test_a_video_file_in_place_of_a_camera(browser, toy, tmp_path):
    path = tmp_path/'clip.webm'
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'VP80'), 10, (160, 120))
    if not out.isOpened(): pytest.skip('this OpenCV build writes no WebM')
    for n in range(20): out.write(picture(n))
    out.release()
    async def main(server):
        async with Page(browser[0]) as page:
            await page.open(server.url)
            await page.js('(() => { const s = document.getElementById("source"); s.value = "file"; s.dispatchEvent(new Event("change")) })()')
            node = (await page('Runtime.evaluate', expression='document.getElementById("file")'))['result']['objectId']
            await page('DOM.setFileInputFiles', files=[str(path)], objectId=node)
            await page.until('document.getElementById("status").textContent === "the file has ended"')
            assert await page.js('S.rows.length') > 3 and page.complaints() == []
            assert await page.js('shot.width + "x" + shot.height') == '160x120'
    with web.Server(Recognizer(toy, Box((20, 20, 60, 60)))) as server: asyncio.run(main(server))

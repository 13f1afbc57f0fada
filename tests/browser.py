"""A headless Chromium driven over the DevTools protocol, for tests of pages."""
import asyncio, base64, contextlib, json, os, shutil, signal, subprocess, time
from pathlib import Path
import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium (Debian: apt-get install chromium)')

FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars '
         '--remote-debugging-port=0 --use-fake-ui-for-media-stream --use-fake-device-for-media-stream').split()


@contextlib.contextmanager
def chromium(folder, camera=None): # folder for its profile; MJPEG that its camera shows -> DevTools port
    p = subprocess.Popen([CHROMIUM, *FLAGS, *([f'--use-file-for-fake-video-capture={camera}'] if camera else []), f'--user-data-dir={folder}/profile', 'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        told, until = Path(folder)/'profile'/'DevToolsActivePort', time.monotonic() + 60
        while not told.is_file() or len(told.read_text().split()) < 2:
            assert time.monotonic() < until and p.poll() is None, 'Chromium does not start'
            time.sleep(.05)
        yield int(told.read_text().split()[0])
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
        p.wait()


class Page:
    "A tab of a Chromium, driven over the DevTools protocol."
    def __init__(self, port): self.port, self.events, self.replies, self.n = port, [], {}, 0

    async def __aenter__(self):
        self.target = json.loads((await AsyncHTTPClient().fetch(HTTPRequest(f'http://127.0.0.1:{self.port}/json/new?about:blank', method='PUT', body=b''))).body)
        self.socket = await websocket_connect(self.target['webSocketDebuggerUrl'], max_message_size=10**9)
        self.reader = asyncio.ensure_future(self.read())
        for domain in ('Page', 'Runtime', 'Network', 'Log'): await self(f'{domain}.enable')
        return self

    async def __aexit__(self, *_):
        await AsyncHTTPClient().fetch(f'http://127.0.0.1:{self.port}/json/close/{self.target["id"]}')
        self.reader.cancel(); self.socket.close()

    async def read(self):
        while (m := await self.socket.read_message()) is not None:
            m = json.loads(m)
            if 'id' in m: self.replies.pop(m['id']).set_result(m)
            else: self.events.append((m['method'], m['params']))

    async def __call__(self, method, **params):
        self.n += 1
        reply = self.replies[self.n] = asyncio.get_running_loop().create_future()
        await self.socket.write_message(json.dumps({'id': self.n, 'method': method, 'params': params}))
        m = await asyncio.wait_for(reply, 30)
        assert 'error' not in m, (method, m)
        return m['result']

    async def js(self, code): # -> the value of an expression in the page, as if a person had clicked
        r = await self('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        assert 'exceptionDetails' not in r, r
        return r['result'].get('value')

    async def press(self, key, code, text=''): # a key on the keyboard
        for kind in ('keyDown', 'keyUp'): await self('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code, **({'text': text} if text and kind == 'keyDown' else {}))

    async def until(self, code, seconds=30): # waits for an expression to become true
        end = time.monotonic() + seconds
        while not (value := await self.js(code)): assert time.monotonic() < end, (code, await self.js('document.body.innerText')); await asyncio.sleep(.1)
        return value

    async def open(self, url):
        def loads(): return sum(m == 'Page.loadEventFired' for m, _ in self.events)
        n, end = loads(), time.monotonic() + 30
        await self('Page.navigate', url=url)
        while loads() == n: assert time.monotonic() < end, url; await asyncio.sleep(.05)

    async def picture(self, path, width=1280, height=900, dark=False): # a screenshot
        await self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        await self('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])
        await asyncio.sleep(.6)
        shot = await self('Page.captureScreenshot', format='png', captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot['data']))

    def complaints(self): # exceptions and errors of the page
        return [p for m, p in self.events if m == 'Runtime.exceptionThrown' or m == 'Log.entryAdded' and p['entry']['level'] == 'error']

    def asked(self): # every address that the page asked for
        return [p['request']['url'] for m, p in self.events if m == 'Network.requestWillBeSent'] + [p['url'] for m, p in self.events if m == 'Network.webSocketCreated']

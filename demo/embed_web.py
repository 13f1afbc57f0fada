"""An HTTP service in twenty lines: POST a picture, get its faces as JSON. One recogniser serves all threads.

    python demo/embed_web.py --port 8000 &
    curl --data-binary @photo.jpg http://127.0.0.1:8000/

For this machine only: who lets others in puts a server with authentication and TLS before it. No picture is kept.
"""
import argparse, json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**25))  # a small file may unpack to gigabytes; read when OpenCV is loaded
import cv2, numpy as np  # noqa: E402
import fer_core  # noqa: E402

LIMIT = 10_000_000  # bytes of a picture


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = self.headers.get('Content-Length', '')
        n = int(length) if length.isdecimal() else 0
        if not 0 < n <= LIMIT: return self.answer(413 if n else 411, {'error': f'send 1 to {LIMIT} bytes and their number as Content-Length'})
        try: image = cv2.imdecode(np.frombuffer(self.rfile.read(n), np.uint8), cv2.IMREAD_COLOR)
        except cv2.error: image = None  # more pixels than allowed
        if image is None: return self.answer(400, {'error': 'this is no picture that can be decoded'})
        self.answer(200, {'faces': [{'box': f.box, 'label': None if f.abstained else f.label, 'probs': dict(zip(fer_core.CLASSES, f.probs.tolist()))} for f in self.server.recognizer.faces(image)]})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        for k, v in {'Content-Type': 'application/json', 'Content-Length': len(body), 'Connection': 'close'}.items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--port', type=int, default=8000, help='0 = any free one')
    p.add_argument('--model', help='ONNX file of fer_core (default: the released student)')
    p.add_argument('--detector', default='auto')
    a = p.parse_args()
    with fer_core.Recognizer(a.model, detector=a.detector) as recognizer, ThreadingHTTPServer(('127.0.0.1', a.port), Handler) as server:
        server.recognizer = recognizer
        print(f'http://127.0.0.1:{server.server_port}/', flush=True)
        try: server.serve_forever()
        except KeyboardInterrupt: pass

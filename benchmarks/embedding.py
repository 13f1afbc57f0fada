"""Frames a second and memory of `Recognizer.stream` and `astream` over a long stream; prints Markdown.

    python benchmarks/embedding.py --frames 100000                 # an untrained toy model and a detector that always finds one face: our own code and nothing else
    python benchmarks/embedding.py --frames 2000 --model released  # the released student behind a real detector, on a drawn face that moves
"""
import argparse, asyncio, datetime, tempfile, time
from pathlib import Path
import cv2, numpy as np
from fer_core.artifacts import environment
from fer_core.data.preprocess import Preprocess
from fer_core.faces.detect import Detections
from fer_core.live.recognise import Recognizer, toy_model


class Box:
    "A detector that always finds one face."
    name = 'box'
    def detect(self, image): return Detections.make([[40, 10, 60, 60]], np.zeros((1, 5, 2)), [1.])


def rss(): return next(int(line.split()[1])/1024 for line in open('/proc/self/status') if line.startswith('VmRSS'))  # MB


def face(): # drawn: nobody's
    image = np.full((240, 320, 3), (150, 140, 120), np.uint8)
    for centre, axes, colour in (((160, 106), (57, 75), (30, 40, 60)), ((160, 121), (48, 66), (150, 180, 225))): cv2.ellipse(image, centre, axes, 0, 0, 360, colour, -1)
    for x in (140, 180): cv2.ellipse(image, (x, 109), (10, 5), 0, 0, 360, (245, 245, 245), -1); cv2.circle(image, (x, 109), 4, (50, 40, 30), -1)
    cv2.ellipse(image, (160, 145), (18, 9), 0, 10, 170, (80, 80, 190), 5)
    return cv2.GaussianBlur(image, (0, 0), 1.8)


def frames(n, size): # each a new array, as a camera's
    image, shift = cv2.resize(face(), size), np.random.default_rng(0).integers(-size[0]//20, size[0]//20, n)
    for s in shift: yield np.roll(image, s, 1)


def watched(found, n): # an iterator of results -> frames/s and memory after a warm-up tenth, in the middle, at the end
    marks, seen, began = [], 0, None
    for i, faces in enumerate(found):
        seen += len(faces)
        if i + 1 in (max(1, n//10), n//2, n): marks.append(rss())
        if i + 1 == max(1, n//10): began = time.perf_counter()
    return (n - max(1, n//10))/(time.perf_counter() - began), marks, seen


async def awatched(stream, n):
    marks, seen, began, i = [], 0, None, 0
    async for faces in stream:
        i, seen = i + 1, seen + len(faces)
        if i in (max(1, n//10), n//2, n): marks.append(rss())
        if i == max(1, n//10): began = time.perf_counter()
    return (n - max(1, n//10))/(time.perf_counter() - began), marks, seen


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--frames', type=int, default=20_000)
    p.add_argument('--model', default='toy', help="'toy', 'released' or an ONNX file of ours")
    p.add_argument('--detector', default='auto', help='with a model that is no toy')
    p.add_argument('--threads', type=int, default=1)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        toy = a.model == 'toy'
        path, size = (toy_model(Path(tmp)/'toy.onnx', Preprocess(size=48)), (160, 120)) if toy else (None if a.model == 'released' else a.model, (320, 240))
        told = environment()
        print(f'{datetime.date.today()}: {a.frames:,} frames of {size[0]} x {size[1]}, model {a.model}, {a.threads} thread(s), {told["cores"]} cores of {told["cpu"]}, onnxruntime {told["packages"]["onnxruntime"]}, OpenCV {told["packages"]["opencv-python"]}\n')
        print('| how | detector | faces | frames/s | MB after a tenth | half-way | at the end | growth |\n|---|---|---|---|---|---|---|---|', flush=True)
        for name, track, asynchronous in (('stream', False, False), ('stream, tracked', True, False), ('astream', False, True)):
            with Recognizer(path, Box() if toy else a.detector, threads=a.threads) as r:
                fps, m, seen = asyncio.run(awatched(r.astream(frames(a.frames, size)), a.frames)) if asynchronous else watched(r.stream(frames(a.frames, size), track=track), a.frames)
                print(f'| {name} | {r.detector.name} | {seen:,} | {fps:,.0f} | {m[0]:.1f} | {m[1]:.1f} | {m[2]:.1f} | {m[2] - m[0]:+.1f} |', flush=True)


if __name__ == '__main__': main()

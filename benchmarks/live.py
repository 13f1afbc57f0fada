"""The live path against a plain loop and published models behind the same detector, as ratios measured in one run; or a soak.

    python benchmarks/live.py --video CLIP [--yunet FILE] [--peers FOLDER] [--side 320] [--rounds 3]
    python benchmarks/live.py --video CLIP --minutes 30        # loop the clip: memory, latency and ids over time

Decoding and drawing are left out: the clip is decoded before. Every variant runs in a process of its own and gets every
frame, some at a time, in turns and in another order each time, so that a busy machine is unfair to none; each has its own
detector on a picture of `--side` pixels. `cpu` is processor time of all threads per frame (median), which neighbours disturb
less than the clock. FOLDER holds ONNX files named
NAME_<size>x<size>_gray.onnx (input in -1..1) or NAME_<size>x<size>_rgb255.onnx, as of the packages they were taken from.
"""
import argparse, multiprocessing, os, re, resource, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np
from fer_core.data.preprocess import face_of, normalise, standardise
from fer_core.faces.align import crop
from fer_core.faces.detect import detector
from fer_core.live.log import Meter
from fer_core.live.recognise import Recognizer, open_session, read_model, softmax
from fer_core.live.session import Live
from fer_core.live.source import Source


def ours(a, **options):
    live = Live(Recognizer(a.model, detector(a.detector, max_side=a.side), a.threads), **options)
    return lambda frame, t: len(live.step(frame, t).faces)


def plain(a):
    "Detect, crop, preprocess, classify, frame by frame: nothing is kept, nothing smoothed."
    find, r = detector(a.detector, max_side=a.side), Recognizer(a.model, threads=a.threads)
    def step(frame, t):
        labels = []
        found = find.detect(frame)
        for box, marks in zip(found.boxes, found.landmarks):
            x = normalise(standardise(face_of(frame, box, marks, r.spec), r.spec), r.spec)
            labels.append(softmax(r._session.run(['logits'], {'input': x[None]})[0], r.temperature).argmax())
        return len(labels)
    return step


def peer(a, path):
    "A published model with its own preprocessing behind the same detector."
    size, kind = re.search(r'_(\d+)x\d+_(gray|rgb255)$', path.stem).groups()
    find, s, size = detector(a.detector, max_side=a.side), open_session(path.read_bytes(), path.name, a.threads), int(size)
    inp = s.get_inputs()[0]
    def prepare(face):
        if kind == 'gray': return (cv2.resize(cv2.cvtColor(face, cv2.COLOR_BGR2GRAY), (size, size)).astype(np.float32)/255 - .5)*2
        return cv2.resize(face, (size, size))[..., ::-1].astype(np.float32).transpose(2, 0, 1)
    def step(frame, t):
        labels = [s.run(None, {inp.name: prepare(crop(frame, box)).reshape(1, *inp.shape[1:])})[0].argmax() for box in find.detect(frame).boxes]
        return len(labels)
    return step


def read(a): # [(ms, frame)] of the clip
    frames = []
    for t, f in Source(a.video):
        frames.append((t, cv2.resize(f, tuple(map(int, a.size.split('x')))) if a.size else f))
        if len(frames) == a.max_frames: break
    return frames


def variants(a):
    "Name -> what makes its `step(frame, t)`."
    peers = [f for f in sorted(a.peers.glob('*.onnx')) if re.search(r'_\d+x\d+_(gray|rgb255)$', f.stem)] if a.peers else []
    return {'ours: ids, smoothing, abstention': lambda: ours(a), 'ours, searching every 3rd frame': lambda: ours(a, every=3), 'plain loop, same model': lambda: plain(a),
            **{f'{f.stem}, plain loop': lambda f=f: peer(a, f) for f in peers}}


def worker(a, name, pipe):
    "A variant in a process of its own, so that one's threads do not spin on another's time: gets (first, last, shift in ms), gives a row per frame."
    cv2.setNumThreads(a.cv_threads)
    frames, step = read(a), variants(a)[name]()
    for t, frame in frames[:20]: step(frame, t - 1e6)  # warm-up
    while part := pipe.recv():
        rows = []
        for t, frame in frames[part[0]:part[1]]:
            c, w = time.process_time(), time.perf_counter()
            n = step(frame, t + part[2])
            rows.append((1e3*(time.perf_counter() - w), 1e3*(time.process_time() - c), n))
        pipe.send(rows)


def in_turns(a, frames, chunk=12):
    "Wall and processor ms per frame and faces found, by variant; each gets some frames, then the next one does."
    context, rng, period = multiprocessing.get_context('spawn'), np.random.default_rng(0), frames[-1][0] + 40
    pipes = {}
    for name in variants(a):
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(a, name, theirs), daemon=True).start()
    rows = {name: [] for name in pipes}
    for k in range(a.rounds):
        for i in range(0, len(frames), chunk):
            for name in rng.permutation(list(pipes)):
                pipes[name].send((i, i + chunk, k*period))
                rows[name] += pipes[name].recv()
    for p in pipes.values(): p.send(None)
    return {n: [r[0] for r in v] for n, v in rows.items()}, {n: [r[1] for r in v] for n, v in rows.items()}, {n: sum(r[2] for r in v) for n, v in rows.items()}


def table(took, cpu, faces):
    base = next(iter(took))
    print(f"{'ms a frame':40}{'mean':>8}{'p50':>8}{'p95':>8}{'least':>8}{'cpu':>8}{'faces':>7}   frame rate of the first line / this one's: clock, cpu")
    for name, w in took.items():
        print(f'{name:40}{np.mean(w):>8.2f}{np.median(w):>8.2f}{np.percentile(w, 95):>8.2f}{min(w):>8.2f}{np.median(cpu[name]):>8.2f}{faces[name]/len(w):>7.2f}'
              f'{np.median(w)/np.median(took[base]):>12.2f}{np.median(cpu[name])/np.median(cpu[base]):>8.2f}')
    print(f'p95 / p50 of the first line: {np.percentile(took[base], 95)/np.median(took[base]):.2f}')


def cold_start(a, times=3):
    "From starting Python to the first label: wall and processor seconds, the best of some."
    code = ('import sys, cv2, time; from fer_core.faces.detect import detector; from fer_core.live.recognise import Recognizer; from fer_core.live.session import Live\n'
            'ok, f = cv2.VideoCapture(sys.argv[1]).read(); s = Live(Recognizer(sys.argv[2] or None, detector(sys.argv[3]), int(sys.argv[4])), side=int(sys.argv[5])).step(f); print(len(s.faces), time.process_time())')
    rows = []
    for _ in range(times):
        t = time.perf_counter()
        out = subprocess.run([sys.executable, '-c', code, a.video, str(a.model or ''), a.detector, str(a.threads), str(a.side)], capture_output=True, text=True, check=True).stdout.split()
        rows.append((time.perf_counter() - t, float(out[1])))
    return tuple(map(min, zip(*rows)))


def rss(): # MB resident
    if sys.platform.startswith('linux'): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20


def soak(a, frames):
    "Loop the clip; a line every tenth of the time, then what changed between the second tenth and the last."
    live, meter, began, rows, rounds = Live(Recognizer(a.model, detector(a.detector, max_side=a.side), a.threads), a.every), Meter(), time.monotonic(), [], 0
    period, window, ids = frames[-1][0] + 40, [], set()
    print(f"{'minute':>7}{'frames':>9}{'RSS MB':>9}{'p50 ms':>9}{'p95 ms':>9}{'ids here':>9}{'ids in all':>11}")
    while True:
        for t, frame in frames:
            step = live.step(frame, t + rounds*period)
            meter.add(t + rounds*period, step, live.tracker.ids)
            window.append(step.ms['total']); ids |= {f.track_id for f in step.faces}
            minutes = (time.monotonic() - began)/60
            if minutes >= (len(rows) + 1)*a.minutes/10:
                rows.append((rss(), np.median(window)))
                print(f'{minutes:>7.2f}{meter.frames:>9}{rows[-1][0]:>9.1f}{rows[-1][1]:>9.2f}{np.percentile(window, 95):>9.2f}{len(ids):>9}{meter.tracks:>11}', flush=True)
                window, ids = [], set()
                if len(rows) == 10:
                    print(f'{meter.frames} frames, {rounds} whole rounds: RSS {rows[-1][0] - rows[1][0]:+.1f} MB, p50 latency x{rows[-1][1]/rows[1][1]:.2f} (last tenth against the second); {meter.tracks} ids, {meter.tracks/max(rounds, 1):.2f} a round')
                    return
        rounds += 1


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--video', required=True); p.add_argument('--peers', type=Path); p.add_argument('--model', type=Path); p.add_argument('--yunet', dest='detector', default='auto', help='YuNet file, or a name of a detector')
    p.add_argument('--side', type=int, default=320, help='longest side of the searched picture'); p.add_argument('--every', type=int, default=1); p.add_argument('--size', help='resize the clip first, e.g. 640x360')
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--max-frames', type=int, default=300); p.add_argument('--threads', type=int, default=1, help='of each model; helper threads spin while the detector works'); p.add_argument('--cv-threads', type=int, default=2, help='of OpenCV, detector included'); p.add_argument('--minutes', type=float, help='soak for so long instead')
    a = p.parse_args()
    cv2.setNumThreads(a.cv_threads)
    frames = read(a)
    h, w = frames[0][1].shape[:2]
    print(f'{Path(a.video).name}: {len(frames)} frames of {w}x{h}; searched at {a.side} px by {detector(a.detector).name}; model {read_model(a.model)[1].name}; threads: models {a.threads}, OpenCV {a.cv_threads}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
    if a.minutes: sys.exit(soak(a, frames))
    table(*in_turns(a, frames))
    wall, cpu = cold_start(a)
    print(f'cold start to the first label: {wall:.2f} s, {cpu:.2f} s of processor time')

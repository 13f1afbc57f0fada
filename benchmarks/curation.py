"""Curation at the size of the whole field: time, peak memory and growth from 50,000 to 466,284 generated pictures.

    python benchmarks/curation.py --folder /tmp/corpus [--sizes 50000 150000 466284] [--kill] [--write benchmarks/curation.md]

Pictures are smooth random fields of 48×48 pixels, JPEG, in class folders; one in fifty is a copy (exact, mirrored or recompressed) of an
earlier one. Each size is curated in a process of its own; --kill ends the largest one once with SIGKILL half way and starts it again: its
seconds are then those of both starts together.
"""
from __future__ import annotations
import argparse, json, multiprocessing, os, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np
from fer_core.labels import CLASSES

PER_FOLDER = 2000


def _field(rng):
    low = cv2.resize(rng.normal(0, 1, (9, 9)).astype(np.float32), (48, 48), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 45*low + rng.normal(0, 6, (48, 48)), 0, 255).astype(np.uint8)


def _part(args):
    folder, start, stop = args
    rng, last = np.random.default_rng([7, start]), None
    for i in range(start, stop):
        c = CLASSES[int(rng.choice(7, p=[.14, .04, .14, .25, .16, .1, .17]))]
        image = _field(rng)
        if last is not None and i % 50 == 0: image, c = (last, last[:, ::-1], cv2.GaussianBlur(last, (3, 3), .5))[i//50 % 3], c
        top = folder/c/f'{i//PER_FOLDER:04d}'
        top.mkdir(parents=True, exist_ok=True)
        (top/f'{i:06d}.jpg').write_bytes(cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
        last = image
    return stop - start


def generate(folder, n):
    "n pictures in class folders; what is there is kept."
    note = folder/'.made'
    if note.is_file() and note.read_text() == str(n): return
    shutil.rmtree(folder, ignore_errors=True)
    steps = [(folder, i, min(i + PER_FOLDER, n)) for i in range(0, n, PER_FOLDER)]
    with multiprocessing.get_context('spawn').Pool(min(4, os.cpu_count())) as pool:
        for k, _ in enumerate(pool.imap_unordered(_part, steps)): print(f'\rgenerating {min((k + 1)*PER_FOLDER, n):,}/{n:,}', end='', file=sys.stderr)
    note.write_text(str(n))


def one(folder, out):
    "Curate, open the manifest, print the figures as JSON."
    from fer_core.data.curate import curate
    began, steps = time.monotonic(), {}
    def tell(done, total, text): steps.setdefault('first portion', time.monotonic() - began); steps['decoded'] = time.monotonic() - began
    summary = curate({'folder': str(folder)}, out, progress=tell)
    seconds = time.monotonic() - began
    import pandas as pd
    opened = time.monotonic()
    rows = len(pd.read_csv(Path(out)/'classification_manifest.csv'))
    print(json.dumps({'rows': rows, 'seconds': seconds, 'decoding': steps['decoded'], 'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024,
                      'open_s': time.monotonic() - opened, 'dropped': summary['dropped']}))


def run(folder, out, kill_after=None):
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, __file__, '--one', str(folder), str(out)], stdout=subprocess.PIPE, text=True)
    if kill_after is None: return json.loads(process.communicate()[0].splitlines()[-1])
    while process.poll() is None and len(list((out/'.prints').glob('[!.]*.npz'))) < kill_after: time.sleep(.2)
    process.send_signal(signal.SIGKILL); process.wait()
    return {'seconds': time.monotonic() - began, 'portions': len(list((out/'.prints').glob('[!.]*.npz')))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, help='where the corpora go (some 2 GB)')
    parser.add_argument('--sizes', type=int, nargs='+', default=[50_000, 150_000, 466_284], help='pictures')
    parser.add_argument('--kill', action='store_true', help='SIGKILL the largest size half way, then start it again')
    parser.add_argument('--write', type=Path, help='write the table to this file as well')
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return one(*args.one)
    if args.folder is None: parser.error('--folder is needed')
    lines = [f'Curation and validation of generated pictures, {os.cpu_count()} cores, one process. Made by `python benchmarks/curation.py`.', '',
             '| pictures | seconds | of which decoding | pictures/s | peak memory, MB | manifest opens in pandas, s |', '|---|---|---|---|---|---|']
    print('\n'.join(lines))
    found = []
    for n in args.sizes:
        folder, out, before, kills = args.folder/f'{n}', args.folder/f'out-{n}', 0., args.kill and n == max(args.sizes)
        generate(folder, n)
        shutil.rmtree(out, ignore_errors=True)
        if kills:
            out.mkdir(parents=True)
            killed = run(folder, out, n//2048//2)
            before = killed['seconds']
        r = run(folder, out)
        total = before + r['seconds']
        found.append((n, total))
        lines.append(f'| {n:,} | {total:.0f} | {r["decoding"]:.0f}{" in the second start" if kills else ""} | {n/total:.0f} | {r["peak_mb"]:.0f} | {r["open_s"]:.1f} |')
        print(lines[-1], flush=True)
    extra = f'\nGrowth: seconds ~ pictures^{np.polyfit(*np.log(np.array(found)).T, 1)[0]:.2f}.' if len(found) > 1 else ''
    if args.kill: extra += f'\n\nThe largest one was killed (SIGKILL) after {before:.0f} s with {killed["portions"]} of {-(-max(args.sizes)//2048)} portions of decoded pictures stored, and started again: the second start took {r["seconds"]:.0f} s and decoded the rest only.'
    print(extra)
    lines.append(extra)
    if args.write: args.write.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__': main()

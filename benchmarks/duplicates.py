"""Planted duplicates: how many altered copies of a face the near-duplicate search finds, and how many strangers it takes for copies.

    python benchmarks/duplicates.py --data CURATED [--n 3000] [--write benchmarks/duplicates.md]

Originals are pictures of a curated folder between which the search itself finds nothing; of each one altered copy is planted. A pair
of a copy and its original is a hit; any other pair with a copy in it is a false alarm. A second table plants the same picture in
another face box and asks twice: the fingerprints alone, and with faces brought onto the template (fer_core.data.aligned).
"""
from __future__ import annotations
import argparse
from pathlib import Path
import cv2, numpy as np
from fer_core.artifacts import read_json
from fer_core.data.aligned import AGREEMENT, aligned_face, aligned_pairs
from fer_core.data.fingerprint import CORRELATION, NEAR, Prints, fingerprints, near_pairs
from fer_core.data.images import read_image, root_of
from fer_core.data.manifest import data_roots, read_manifest
from fer_core.faces.detect import detector


def jpeg(image, quality): return cv2.imdecode(cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_UNCHANGED)


def cropped(image, share): # so much of each side is cut off, the rest enlarged again
    d = max(1, round(share*image.shape[0]))
    return cv2.resize(image[d:-d, d:-d], image.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def shifted(image, share): # a window moved to one side, as another face box would
    d = max(1, round(share*image.shape[0]))
    return cv2.resize(image[d:, d:], image.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def resized(image, factor): return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def turned(image, degrees):
    h, w = image.shape[:2]
    return cv2.warpAffine(image, cv2.getRotationMatrix2D((w/2, h/2), degrees, 1), (w, h), borderMode=cv2.BORDER_REPLICATE)


ALTERED = {
    'mirror image': lambda im: im[:, ::-1],
    'JPEG, quality 75': lambda im: jpeg(im, 75),
    'JPEG, quality 30': lambda im: jpeg(im, 30),
    'mirror image, JPEG 50': lambda im: jpeg(im[:, ::-1], 50),
    'half size': lambda im: resized(im, .5),
    'twice the size': lambda im: resized(im, 2),
    'brightness +40': lambda im: cv2.add(im, 40),
    'contrast × 0.6': lambda im: cv2.convertScaleAbs(im, alpha=.6, beta=40),
    'blur, σ 0.8': lambda im: cv2.GaussianBlur(im, (0, 0), .8),
    'noise, σ 8': lambda im: np.clip(im + np.random.default_rng(0).normal(0, 8, im.shape), 0, 255).astype(np.uint8),
    'crop 2 % a side': lambda im: cropped(im, .02),
    'crop 5 % a side': lambda im: cropped(im, .05),
    'crop 10 % a side': lambda im: cropped(im, .10),
    'shift 4 %': lambda im: shifted(im, .04),
    'rotation 3°': lambda im: turned(im, 3),
}


def boxed(image, left, top, right, bottom, side=64): # another face box, squeezed to a square as collections do; shares of the sides are cut off
    h, w = image.shape[:2]
    part = image[round(top*h):h - round(bottom*h), round(left*w):w - round(right*w)]
    return cv2.resize(part, (side, side), interpolation=cv2.INTER_CUBIC)


BOXES = {
    'narrower by 17 %': lambda im: boxed(im, .085, 0, .085, 0),
    'lower by 17 %': lambda im: boxed(im, 0, .17, 0, 0),
    'smaller by 25 %, to one side': lambda im: boxed(im, .04, .1, .21, .15),
    'narrower by 17 %, mirrored': lambda im: boxed(im, .085, 0, .085, 0)[:, ::-1],
}


def joined(a, b): return Prints(*(np.concatenate([getattr(a, f), getattr(b, f)]) for f in Prints.__dataclass_fields__))


def pairs_of(prints): return np.concatenate([near_pairs(prints), aligned_pairs(prints.face)]) if prints.face.shape[1] else near_pairs(prints)


def originals(data, n, seed, look):
    "Pictures of a curated folder between which the search finds nothing, and their fingerprints."
    df, roots = read_manifest(Path(data)/'classification_manifest.csv'), data_roots(data)
    rows = np.random.default_rng(seed).permutation(len(df))[:n]
    images = [read_image(root_of(roots, df['source'].iat[i]), df['path'].iat[i], df['box'].iat[i]) for i in rows]
    prints = fingerprints(images, look)
    alone = np.setdiff1d(np.arange(len(images)), np.unique(pairs_of(prints)))
    _, first = np.unique(prints.sha256[alone], return_index=True)
    alone = alone[np.sort(first)]
    return [images[i] for i in alone], prints.take(alone)


def without_faces(prints): return Prints(**{f: getattr(prints, f) for f in Prints.__dataclass_fields__} | {'face': np.zeros((len(prints), 0, 0), np.uint8)})


def measure(images, prints, alter, look=None):
    "Recall, precision, false alarms of one alteration."
    n, copies = len(images), fingerprints([np.ascontiguousarray(alter(im)) for im in images], look)
    pairs = pairs_of(joined(prints if look else without_faces(prints), copies))
    hits = {i for i, j in pairs if j == i + n} | set(np.flatnonzero(prints.sha256 == copies.sha256))
    crossing = [(i, j) for i, j in pairs if i < n <= j and j != i + n]
    return len(hits)/n, len(hits)/max(1, len(hits) + len(crossing)), len(crossing)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='curated data folder (a curate run)')
    parser.add_argument('--n', type=int, default=3000, help='pictures drawn')
    parser.add_argument('--seed', type=int, default=0, help='of the draw')
    parser.add_argument('--write', type=Path, help='write the table to this file as well')
    args = parser.parse_args()
    finds = detector('retinaface')
    look = lambda image: aligned_face(image, finds)
    images, prints = originals(args.data, args.n, args.seed, look)
    digest = read_json(Path(args.data)/'clean_report.json')['dataset_sha256']
    lines = [f'Planted copies of {len(images):,} pictures (dataset {digest[:12]}, seed {args.seed}); pHash distance ≤ {NEAR}, detail correlation ≥ {CORRELATION:g}. Made by `python benchmarks/duplicates.py`.', '',
             '| copy | recall | precision | false alarms |', '|---|---|---|---|']
    print('\n'.join(lines))
    for name, alter in ALTERED.items():
        recall, precision, alarms = measure(images, prints, alter)
        lines.append(f'| {name} | {recall:.3f} | {precision:.3f} | {alarms} |')
        print(lines[-1], flush=True)
    faced = prints.face.any((1, 2)).mean()
    more = ['', f'Another face box. The detector finds a face in {faced:.1%} of the originals; agreement after registration ≥ {AGREEMENT:g}.', '',
            '| copy | recall, fingerprints alone | recall, with faces | precision, with faces | false alarms |', '|---|---|---|---|---|']
    print('\n'.join(more))
    for name, alter in BOXES.items():
        (alone, *_), (recall, precision, alarms) = (measure(images, prints, alter, l) for l in (None, look))
        more.append(f'| {name} | {alone:.3f} | {recall:.3f} | {precision:.3f} | {alarms} |')
        print(more[-1], flush=True)
    lines += more
    if args.write: args.write.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__': main()

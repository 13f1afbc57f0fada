"The pack under kills, damage and full disks; batches that stay the same to the bit; mixing against timm; samplers against their formulas."
import hashlib, json, os, shutil, subprocess, sys, time

import cv2, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare

from fer_core.artifacts import FerError, sha256_file
from fer_core.compat import mend_torchvision
from fer_core.data import pack as pack_module
from fer_core.data.augment import Augment, Mix, Mixed, augment_batch, draw_mix, draw_views, mix_batch, mix_plan
from fer_core.data.loader import Feeder, made_ahead, open_pack
from fer_core.data.manifest import write_manifest
from fer_core.data.preprocess import Preprocess, standardise
from fer_core.data.samplers import Sampler, class_shares, sample_rows
from fer_core.data.adapter import COLUMNS
from fer_core.faces.align import crop
from fer_core.labels import CLASSES

SPEC, N, CHUNK = Preprocess(size=24), 330, 50  # six chunks and a bit


def curated(folder, root, rows, **told):
    "A curated folder as far as the loader looks at it."
    folder.mkdir(parents=True)
    table = pd.DataFrame(rows)
    for c in COLUMNS:
        if c not in table: table[c] = 0 if c in ('width', 'height', 'quality') else ''
    write_manifest(table, folder/'classification_manifest.csv')
    (folder/'source.json').write_text(json.dumps({'source': 'folder', 'root': str(root), **told}))
    return folder


def row(i, path, **more): return {'id': f'r{i:04d}', 'path': path, 'label': CLASSES[i*i % 7], 'source': 'folder', 'split': ('train', 'val', 'test')[i % 10 > 7], 'sha256': f'{i:064x}', **more}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home, rng = tmp_path_factory.mktemp('loader'), np.random.default_rng(0)
    (home/'faces').mkdir()
    for i in range(N): cv2.imwrite(str(home/'faces'/f'{i}.png'), cv2.GaussianBlur(rng.integers(0, 256, (32, 32, 3), np.uint8), (0, 0), 2))
    return home


@pytest.fixture(scope='module')
def data(home): return curated(home/'data', home/'faces', [row(i, f'{i}.png') for i in range(N)])


@pytest.fixture(scope='module')
def whole(data): # -> an uninterrupted pack
    return open_pack(data, SPEC)


@pytest.fixture
def chunks(monkeypatch): # -> the rows of every chunk that is decoded
    seen, faces = [], pack_module._faces
    monkeypatch.setattr(pack_module, 'CHUNK_ROWS', CHUNK)
    monkeypatch.setattr(pack_module, '_faces', lambda roots, rows, *more: seen.append(rows.index[0]//CHUNK) or faces(roots, rows, *more))
    return seen


class Interrupted(Exception): pass


def interrupt(data, cache, after):
    "Build until so many chunks are done."
    files = pack_module._save_chunk
    def save(part, *args):
        if len(part.done) == after: raise Interrupted
        files(part, *args)
    pack_module._save_chunk = save
    try:
        with pytest.raises(Interrupted): open_pack(data, SPEC, cache)
    finally: pack_module._save_chunk = files


def same(cache, data): # the only pack in `cache` has the bytes of an uninterrupted build, and nothing lies beside it
    mine, other = sorted(cache.iterdir()), sorted((data/'.packs').iterdir())
    assert [p.name for p in mine] == [p.name for p in other if p.stem == mine[0].stem]
    for p in mine: assert sha256_file(p) == sha256_file(data/'.packs'/p.name)


# -- the pack: killed, damaged, full -----------------------------------------------------------------------------------------

SCRIPT = '''
import os, signal, sys
from fer_core.data import pack
from fer_core.data.preprocess import Preprocess
pack.CHUNK_ROWS, (what, when) = 50, sys.argv[3].split(':')
owner, name = {'fsync': (pack.os, 'fsync'), 'note': (pack, 'write_json'), 'rename': (pack.os, 'replace'), 'unlink': (pack.Path, 'unlink')}[what]
real, calls = getattr(owner, name), []
def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(when): os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, deadly)
pack.open_pack(sys.argv[1], Preprocess(size=24), sys.argv[2])
'''


# An atomic write is an fsync and then a rename. So of chunk k, fsync 2k + 1 is its bytes and 2k + 2 its note, rename k + 1 its note; then the note of the whole, then its name.
@pytest.mark.parametrize('instant, again', [('fsync:1', range(7)), ('fsync:6', range(2, 7)), ('note:4', range(3, 7)), ('rename:5', range(4, 7)), ('note:8', []), ('rename:9', []), ('unlink:9', [])])
def test_a_build_killed_at_any_instant_goes_on_where_it_was(data, whole, chunks, tmp_path, instant, again):
    done = subprocess.run([sys.executable, '-c', SCRIPT, data, tmp_path, instant], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert bool(list(tmp_path.glob('pack-*.npy'))) == (instant == 'unlink:9')
    assert np.array_equal(open_pack(data, SPEC, tmp_path).pixels, whole.pixels)
    assert chunks == list(again)
    if instant != 'unlink:9': same(tmp_path, data)


def test_a_process_killed_from_outside(data, whole, chunks, tmp_path):
    slow = "import time; from fer_core.data import pack; from fer_core.data.preprocess import Preprocess; import sys; pack.CHUNK_ROWS = 50; f = pack._face; pack._face = lambda *a: time.sleep(.004) or f(*a); pack.open_pack(sys.argv[1], Preprocess(size=24), sys.argv[2])"
    proc, end = subprocess.Popen([sys.executable, '-c', slow, data, tmp_path]), time.monotonic() + 30
    while not (notes := list(tmp_path.glob('pack-*.part.json'))) or json.loads(notes[0].read_text())['rows_done'] < 100:
        assert proc.poll() is None and time.monotonic() < end
        time.sleep(.01)
    proc.kill(); proc.wait()
    kept = json.loads(notes[0].read_text())['rows_done']//CHUNK
    assert not list(tmp_path.glob('pack-*.npy'))
    assert np.array_equal(open_pack(data, SPEC, tmp_path).pixels, whole.pixels)
    assert chunks == list(range(kept, 7)) and kept >= 2


def damage_altered(part, note): f = open(part, 'r+b'); f.seek(128 + 60*24*24); f.write(b'\1\2\3'); f.close() # in chunk 1
def damage_cut(part, note): os.truncate(part, 128 + 130*24*24)                                                # in the middle of chunk 2
def damage_header(part, note): f = open(part, 'r+b'); f.write(b'junk'); f.close()
def damage_grown(part, note): open(part, 'ab').write(b'tail')
def damage_note(part, note): note.write_text('{"about"')
def damage_gone(part, note): part.unlink()
def damage_other(part, note): note.write_text(note.read_text().replace('"clahe": 2.0', '"clahe": 3.0'))


@pytest.mark.parametrize('damage, again', [(damage_altered, [1, 4, 5, 6]), (damage_cut, [2, 3, 4, 5, 6]), (damage_header, [4, 5, 6]), (damage_grown, [4, 5, 6]),
                                           (damage_note, [*range(7)]), (damage_gone, [*range(7)]), (damage_other, [*range(7)])])
def test_a_damaged_part_is_noticed(data, whole, chunks, tmp_path, damage, again):
    interrupt(data, tmp_path, 4)
    damage(next(tmp_path.glob('*.part')), next(tmp_path.glob('*.part.json')))
    chunks.clear()
    open_pack(data, SPEC, tmp_path)
    assert chunks == again
    same(tmp_path, data)


def test_progress_counts_what_was_done_before(home, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, 'CHUNK_ROWS', 300)
    big, told = curated(tmp_path/'big', home/'faces', [row(i, f'{i % N}.png') for i in range(1600)]), []
    def stop(done, total):
        told.append(done)
        if done == 1000: raise Interrupted                           # in the fourth chunk: 900 rows are kept
    with pytest.raises(Interrupted): open_pack(big, SPEC, progress=stop)
    open_pack(big, SPEC, progress=lambda done, total: told.append((done, total)))
    assert told == [500, 1000, (1000, 1600), (1500, 1600)]


def test_a_finished_pack_that_was_altered_is_refused(data, tmp_path):
    open_pack(data, SPEC, tmp_path)
    path = next(tmp_path.glob('*.npy'))
    with open(path, 'r+b') as f: f.seek(5000); f.write(b'\7\7')
    with pytest.raises(FerError) as e: open_pack(data, SPEC, tmp_path)
    assert e.value.code == 'hash_mismatch'
    path.unlink()                                                    # what the message says
    open_pack(data, SPEC, tmp_path)
    same(tmp_path, data)


def test_a_full_disk_midway(data, whole, chunks, tmp_path, monkeypatch):
    real, calls = os.fsync, []
    def full(fd):
        calls.append(1)
        if len(calls) == 7: raise OSError(28, 'No space left on device')
        real(fd)
    with monkeypatch.context() as m:
        m.setattr(pack_module.os, 'fsync', full)
        with pytest.raises(FerError) as e: open_pack(data, SPEC, tmp_path)
    assert e.value.code == 'disk_full' and 'resumes' in e.value.mend
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ['.json', '.part'] and not list(tmp_path.glob('*.npy'))
    chunks.clear()
    open_pack(data, SPEC, tmp_path)
    assert chunks == [3, 4, 5, 6]
    same(tmp_path, data)


FULL = '''
import subprocess, sys
from fer_core.artifacts import FerError
from fer_core.data import pack
from fer_core.data.preprocess import Preprocess
cache = sys.argv[2]
if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=160k', 'none', cache]).returncode: sys.exit(77)
pack.CHUNK_ROWS = 50
if sys.argv[3] == 'late': pack.shutil.disk_usage = lambda path: type('U', (), {'free': 1 << 40})
try: pack.open_pack(sys.argv[1], Preprocess(size=24), cache)
except FerError as e: print(e.code, sorted(p.suffix for p in __import__('pathlib').Path(cache).iterdir()))
'''


@pytest.mark.parametrize('noticed', ['early', 'late'])
def test_a_really_full_disk(data, tmp_path, noticed):
    if not shutil.which('unshare'): pytest.skip('unshare is not installed')
    done = subprocess.run(['unshare', '-rm', sys.executable, '-c', FULL, data, tmp_path, noticed], capture_output=True, text=True)
    if done.returncode == 77 or 'unshare' in done.stderr: pytest.skip('no private mounts here')
    assert done.stdout.startswith('disk_full') and '.npy' not in done.stdout and '.tmp' not in done.stdout, done.stdout + done.stderr
    assert done.stdout.split()[1:] == (["['.part']"] if noticed == 'early' else ["['.json',", "'.part']"])


# -- the pack: workers, neighbours, boxes, several roots ---------------------------------------------------------------------

def test_two_workers_give_the_same_bytes(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, 'CHUNK_ROWS', CHUNK)
    interrupt(data, tmp_path, 2)
    open_pack(data, SPEC, tmp_path, workers=2)
    same(tmp_path, data)


def test_a_picture_that_a_worker_cannot_decode(home, tmp_path):
    (home/'faces'/'broken.png').write_bytes((home/'faces'/'3.png').read_bytes()[:300])
    bad = curated(tmp_path/'bad', home/'faces', [row(0, '0.png'), row(1, 'broken.png')])
    for workers in (0, 1):
        with pytest.raises(FerError) as e: open_pack(bad, SPEC, workers=workers)
        assert e.value.code == 'undecodable_image' and 'broken.png' in e.value.what
    assert not list((bad/'.packs').glob('*.npy')) and not list((bad/'.packs').glob('*.lock'))


def test_two_builders_share_the_work(data, tmp_path):
    code = "import sys; from fer_core.data import pack; from fer_core.data.preprocess import Preprocess; n = []; f = pack._faces; pack._faces = lambda *a: n.append(1) or f(*a); pack.open_pack(sys.argv[1], Preprocess(size=24), sys.argv[2]); print(len(n))"
    procs = [subprocess.Popen([sys.executable, '-c', code, data, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(int(p.communicate()[0]) for p in procs) == [0, 1]
    same(tmp_path, data)


def test_boxes_and_several_roots(home, tmp_path):
    other = tmp_path/'other'; other.mkdir()
    cv2.imwrite(str(other/'0.png'), 255 - cv2.imread(str(home/'faces'/'0.png')))
    boxes = ['', '3 4 20 15', '-2.5 6 14 30']
    rows = [row(i, f'{i}.png', box=b) for i, b in enumerate(boxes)] + [row(3, '0.png', source='second', box='8 8 16 16')]
    spec = Preprocess(size=24, colour='rgb', margin=.2)
    seen = open_pack(curated(tmp_path/'both', '/nowhere', rows, roots={'folder': str(home/'faces'), 'second': str(other)}), spec)
    for i, b in enumerate(boxes):
        image = cv2.imread(str(home/'faces'/f'{i}.png'))
        assert np.array_equal(seen.pixels[i], standardise(crop(image, tuple(map(float, b.split())), margin=.2) if b else image, spec))
    assert np.array_equal(seen.pixels[3], standardise(crop(cv2.imread(str(other/'0.png')), (8, 8, 16, 16), margin=.2), spec))


def test_names_and_numbers_of_old_runs_still_hold(tmp_path):
    # digests taken with the loader as it was before it could resume: a change here makes recorded runs unrepeatable
    lines = ['emotion,pixels,Usage'] + [f'{i},{" ".join(str((7*i + 3*k) % 256) for k in range(48*48))},Training' for i in range(7)]
    (tmp_path/'fer2013.csv').write_text('\n'.join(lines) + '\n')
    pack = open_pack(curated(tmp_path/'data', tmp_path, [row(i, f'fer2013.csv#{i}') for i in range(7)]), Preprocess(size=48, clahe=0))
    path = next((tmp_path/'data'/'.packs').glob('*.npy'))
    order = np.concatenate([r for _, _, r in Feeder(pack, seed=3).batches(np.arange(7), 4, epoch=9)])
    digest = lambda a: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]
    assert (path.name, sha256_file(path)[:16]) == ('pack-309f2ac1d4a4d1f9.npy', '2bb1c0d73d4fe2c3')
    assert (digest(draw_views(50, 3, 5)), order.tolist()) == ('d14e5687dd9e2450', [1, 5, 3, 6, 2, 4, 0])


@pytest.mark.parametrize('colour', ['grey', 'rgb'])
def test_on_the_fly_is_what_a_pack_would_hold(data, colour):
    raw, spec = open_pack(data, Preprocess(size=24, clahe=0, colour=colour)), Preprocess(size=24, clahe=4., tiles=3, mean=.4, colour=colour)
    fly, stored = raw.under(spec), open_pack(data, spec)
    rows = stored.rows('train')
    for a, b in zip(Feeder(fly, augment=Augment()).batches(rows, 64, epoch=0, view=0), Feeder(stored, augment=Augment()).batches(rows, 64, epoch=0, view=0), strict=True):
        assert torch.equal(a[0], b[0]) and np.array_equal(a[2], b[2])
    assert fly.spec == spec and fly.pixels[rows[:0]].shape == (0, *stored.pixels.shape[1:])
    assert np.array_equal(fly.pixels[5:9], stored.pixels[5:9]) and np.array_equal(fly.pixels[7], stored.pixels[7]) and np.array_equal(np.array(fly.pixels), stored.pixels)
    half = raw.under(Preprocess(size=12, clahe=0, colour=colour))
    assert half.pixels.shape == (N, spec.channels, 12, 12) and half.pixels[:4].std() > 5
    for wrong in (Preprocess(size=48, colour=colour), Preprocess(size=24, colour=colour, margin=.1), Preprocess(size=24, colour={'grey': 'rgb', 'rgb': 'grey'}[colour])):
        with pytest.raises(FerError): raw.under(wrong)


# -- batches -----------------------------------------------------------------------------------------------------------------

def assert_same_batches(one, other, rows, epoch, view):
    n = 0
    for a, b in zip(one.batches(rows, 32, epoch, view), other.batches(rows, 32, epoch, view), strict=True):
        parts = zip(a[1], b[1], strict=True) if isinstance(a[1], Mixed) else [(a[1], b[1])]
        assert type(a[1]) is type(b[1]) and torch.equal(a[0], b[0]) and all(torch.equal(p, q) for p, q in parts) and np.array_equal(a[2], b[2])
        n += len(a[2])
    assert n >= len(rows) - 1


@pytest.mark.parametrize('options', [{}, {'augment': Augment()}, {'augment': Augment(), 'sampler': Sampler('sqrt'), 'mix': Mix(mixup=.2, cutmix=1.)}])
def test_a_thread_changes_no_bit_and_no_order(whole, options):
    rows, plain, ahead = whole.rows('train'), Feeder(whole, seed=5, **options), Feeder(whole, seed=5, prefetch=3, **options)
    for epoch, view in ((None, None), (None, 1), (2, 2)): assert_same_batches(plain, ahead, rows, epoch, view)


@pytest.mark.parametrize('options', [{}, {'augment': Augment()}, {'augment': Augment(), 'sampler': Sampler('sqrt'), 'mix': Mix(mixup=.2, cutmix=1.)}, {'augment': Augment(), 'views': 2, 'prefetch': 2}])
def test_pixels_in_device_memory_give_the_same_batches(data, whole, options):
    rows, fly = whole.rows('train'), open_pack(data, Preprocess(size=24, clahe=0)).under(SPEC)
    for pack in (whole, fly):
        resident, streamed = Feeder(pack, seed=5, resident=True, **options), Feeder(whole, seed=5, resident=False, **options)
        assert resident.pixels.shape == whole.pixels.shape and streamed.pixels is None
        for epoch, view in ((None, None), (None, 1), (2, 2)): assert_same_batches(resident, streamed, rows, epoch, view)


def test_pixels_go_to_a_gpu_if_they_leave_half_of_it(whole, monkeypatch):
    from fer_core.data.loader import _fits
    need, gpu = whole.pixels.size, torch.device('cuda')
    for free, fits in ((2*need - 2, False), (2*need, False), (2*need + 2, True)):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, 10*free))
        assert _fits(whole, gpu) == fits
    assert not _fits(whole, torch.device('cpu')) and Feeder(whole).pixels is None


@pytest.mark.parametrize('resident', [True, False])
def test_every_step_of_a_batch_is_on_the_device(whole, resident): # `meta` computes nothing and, like a GPU, refuses to mix devices
    with pytest.raises(RuntimeError, match='device'): torch.zeros(3, device='meta') + torch.zeros(3)
    feed, rows = Feeder(whole, 'meta', seed=5, augment=Augment(), mix=Mix(mixup=.2, cutmix=1.), resident=resident), whole.rows('train')
    shapes = [(x.shape, r) for x, _, r in Feeder(whole, seed=5, augment=Augment()).batches(rows, 32, 0, 0)]
    for (x, y, r), (shape, want) in zip(feed.batches(rows, 32, 0, 0), shapes, strict=True):
        assert {x.device.type, *(part.device.type for part in y)} == {'meta'} and x.shape == shape and np.array_equal(r, want)
    assert (feed.pixels is not None) == resident and all(y.device.type == 'meta' for _, y, _ in feed.batches(rows, 32))


def test_a_thread_is_left_behind_by_nobody(whole):
    import threading
    before = threading.active_count()
    for _ in Feeder(whole, augment=Augment(), prefetch=2).batches(whole.rows('train'), 16, epoch=0, view=0): break
    def fails(i):
        if i == 3: raise ValueError('third')
        return i
    seen = []
    with pytest.raises(ValueError, match='third'):
        for i in made_ahead(fails, range(9), 2): seen.append(i)
    assert seen == [0, 1, 2] and threading.active_count() == before


def test_a_thread_works_ahead(): # two results are ready while the first is in use
    made = []
    for i in made_ahead(lambda i: made.append(i) or i, range(6), 2):
        end = time.monotonic() + 5
        while len(made) < min(6, i + 3) and time.monotonic() < end: time.sleep(.001)
        assert len(made) == min(6, i + 3)


def test_default_batches_are_each_row_once(whole):
    rows = whole.rows('train')
    seen = np.concatenate([r for _, _, r in Feeder(whole).batches(rows, 32, epoch=0)])
    assert len(seen) == len(rows) - (len(rows) % 32 == 1) and len(np.unique(seen)) == len(seen)


# -- mixing ------------------------------------------------------------------------------------------------------------------

def timm_elem(x, y, lam, cut, box, monkeypatch):
    "timm's own mixing of each element, with our λ before correction and our centres."
    mend_torchvision()
    from timm.data import mixup
    m = mixup.Mixup(mixup_alpha=1., cutmix_alpha=1., mode='elem', label_smoothing=0., num_classes=7)
    centres = iter(c for c, is_cut, l in zip(box, cut, lam) if is_cut and l != 1 for c in c)
    monkeypatch.setattr(m, '_params_per_elem', lambda n: (lam.copy(), cut))
    monkeypatch.setattr(mixup.np.random, 'randint', lambda *a, **k: next(centres))
    return m(x.clone(), y)


@pytest.mark.parametrize('mix', [Mix(mixup=.4), Mix(cutmix=1.), Mix(mixup=.3, cutmix=.7, share=.7)])
@pytest.mark.parametrize('shape', [(16, 1, 48, 48), (10, 3, 33, 40)])
def test_mixing_agrees_with_timm(mix, shape, monkeypatch):
    from scipy.stats import beta
    g = torch.Generator().manual_seed(1)
    x, y, u = torch.randn(shape, generator=g), torch.randint(0, 7, shape[:1], generator=g), draw_mix(shape[0], 4, 2)
    cut = u[:, 1] < .5 if mix.mixup and mix.cutmix else np.full(len(u), mix.cutmix > 0)
    alpha = np.where(cut, mix.cutmix, mix.mixup)
    lam = np.where(u[:, 0] < mix.share, beta.ppf(u[:, 2].astype(np.float64), alpha, alpha), 1.)
    centres = (u[:, 3:5].astype(np.float64)*shape[2:]).astype(int)
    want = timm_elem(x, y, lam, cut, centres, monkeypatch)
    seen = mix_batch(x, y, u, mix)
    torch.testing.assert_close(seen[0], want[0].to(torch.float32), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[1], want[1].to(torch.float32), atol=1e-5, rtol=1e-5)


ALPHA = st.just(0.) | st.floats(.001, 2)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(8, 40), st.integers(8, 40), ALPHA, ALPHA, st.floats(0, 1), st.integers(0, 99))
def test_targets_say_what_the_picture_holds(n, h, w, mixup, cutmix, share, seed):
    if not mixup + cutmix: return
    mix, u = Mix(mixup, cutmix, share), draw_mix(n, seed, 0)
    marks = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 1, h, w)
    y = torch.arange(n) % 7
    x, target = mix_batch(marks, y, u, mix)
    lam = torch.from_numpy(mix_plan(u, mix, (h, w))[0]).float()
    assert ((lam >= 0) & (lam <= 1)).all()
    first = torch.arange(n).float()
    torch.testing.assert_close(x.mean((1, 2, 3)), first*lam + first.flip(0)*(1 - lam), atol=1e-4, rtol=1e-4) # the mean picture is the mix the target names
    torch.testing.assert_close(target.sum(1), torch.ones(n))
    soft = mix_batch(marks, torch.nn.functional.one_hot(y, 7).float(), u, mix)
    assert torch.equal(soft[0], x) and torch.equal(soft[1], target)


def test_cutout_is_one_full_square_of_grey():
    cutout = Augment(flip=0, rotate=0, scale=0, shift=0, contrast=0, light=0, erase=1., erase_side=.5, erase_least=1.)
    u = draw_views(500, 1, 1)
    hole = (augment_batch(torch.ones(500, 1, 32, 32), torch.from_numpy(u), cutout)[:, 0] == 0).numpy()
    at = (np.arange(32) + .5)/32
    want = (np.abs(at - u[:, 9:10]) < .25)[:, None, :] & (np.abs(at - u[:, 10:11]) < .25)[:, :, None]
    assert np.array_equal(hole, want)


# -- samplers ----------------------------------------------------------------------------------------------------------------

COUNTS = np.array([40, 5, 41, 72, 48, 32, 0])


def test_effective_numbers_are_geometric_series():
    for b in (0., .5, .9, .999):
        effective = [sum(b**k for k in range(n)) for n in COUNTS]                 # Cui et al. 2019, proposition 1
        share = np.array([n/e if n else 0 for n, e in zip(COUNTS, effective)])
        np.testing.assert_allclose(class_shares(COUNTS, 'effective', b), share/share.sum(), rtol=1e-9)
    np.testing.assert_allclose(class_shares(COUNTS, 'effective', 0.), class_shares(COUNTS, 'none'))
    np.testing.assert_allclose(class_shares(COUNTS, 'effective', 1 - 1e-12), class_shares(COUNTS, 'balanced'), rtol=1e-3)
    root = np.sqrt(COUNTS)
    np.testing.assert_allclose(class_shares(COUNTS, 'sqrt'), root/root.sum())
    with pytest.raises(FerError): class_shares(COUNTS, 'fair')
    with pytest.raises(FerError): class_shares(COUNTS, 'effective', 1.)


@pytest.mark.parametrize('how', ['none', 'sqrt', 'balanced', 'effective'])
def test_classes_are_drawn_at_their_shares(how):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), COUNTS))
    rows, pick = np.arange(len(labels))*3 + 2, Sampler(how, .98)
    epochs = [pick(rows, labels, 1, e) for e in range(300)]
    assert all(len(e) == len(rows) and np.isin(e, rows).all() for e in epochs)
    assert np.array_equal(pick(rows, labels, 1, 7), epochs[7]) and not np.array_equal(pick(rows, labels, 2, 7), epochs[7])
    shares, drawn = class_shares(COUNTS, how, .98), np.bincount(labels[(np.concatenate(epochs) - 2)//3], minlength=7)
    assert drawn[6] == 0
    np.testing.assert_allclose(drawn/drawn.sum(), shares, atol=5e-4)
    per_row = np.bincount((np.concatenate(epochs) - 2)//3, minlength=len(rows))
    for c in range(6): assert chisquare(per_row[labels == c]).pvalue > 1e-3       # within a class no picture is preferred
    one = np.bincount((epochs[0] - 2)//3, minlength=len(rows))
    assert all(np.ptp(one[labels == c]) <= 1 for c in range(6))
    if how == 'none': assert np.array_equal(np.sort(epochs[0]), rows)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=7, max_size=7).filter(any), st.sampled_from(['none', 'sqrt', 'balanced', 'effective']), st.integers(0, 9))
def test_an_epoch_keeps_its_length(counts, how, seed):
    labels = np.repeat(np.arange(7), counts)
    shares = class_shares(counts, how)
    drawn = sample_rows(np.arange(len(labels)), labels, shares, seed, 0)
    n = np.bincount(labels[drawn], minlength=7)
    assert len(drawn) == len(labels) and np.all(np.abs(n - shares*len(labels)) < 1 + 1e-6)


def test_a_sampled_epoch_trains_as_many_steps(whole):
    rows = whole.rows('train')
    plain, drawn = (len(list(Feeder(whole, sampler=s).batches(rows, 32, epoch=0))) for s in (None, Sampler()))
    assert plain == drawn

"""Faces a second of the pack against a folder of pictures read with PIL, and against timm's loader; and what of a training step is waiting for faces.

    python benchmarks/loader.py [--data CURATED] [--size 48] [--batch 64] [--faces 4096]

Every pipeline ends in the same thing, normalised float batches of grey faces at --size. `augmented` adds mirror, rotation, scale, shift, contrast,
light and erasing (timm: its random resized crop, jitter and erasing). The others skip CLAHE, which they would pay for in every epoch.
Pipelines take turns, and each figure is the median over the turns, so that a busy machine is unfair to none. Files are in the page cache.
Beside other work a second OpenMP thread mostly waits for its turn: OMP_NUM_THREADS=1 gives steadier training steps then.
"""
import argparse, os, random, statistics, tempfile, time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # before anything loads OpenMP
import cv2, numpy as np, torch
from PIL import Image, ImageEnhance
from fer_core.compat import mend_torchvision
mend_torchvision()
from timm.data import ImageDataset, create_loader
from fer_core.artifacts import read_json
from fer_core.data.curate import curate
from fer_core.data.images import iter_images
from fer_core.data.loader import Augment, Feeder, open_pack
from fer_core.data.preprocess import Preprocess
from fer_core.data.synthetic import write_dataset
from fer_core.labels import CLASS_ID, CLASSES
from fer_core.models.backbones import Classifier, ModelConfig
from fer_core.train.loop import TrainConfig, make_optimizer
from fer_core.train.losses import ce_loss

STUDENTS = {'resnet10t': 32, 'mobilenetv3_small_050': 16}  # smallest students of the plans, with the output stride they have there


class Folder(torch.utils.data.Dataset):
    "What a PIL pipeline is when nobody hurries: open, convert, resize, augment, to tensor."
    def __init__(self, root, size, augment):
        self.files, self.size, self.a = sorted(Path(root).glob('*/*.png')), size, augment

    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as file: image = file.convert('L').resize((self.size, self.size), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(self._move(image) if self.a else image, np.float32)/255)[None].sub_(.5).div_(.25)
        if self.a and random.random() < self.a.erase:
            (h, w), (y, z) = ((int(self.size*self.a.erase_side*random.uniform(.25, 1)) for _ in range(2)), (random.randrange(self.size) for _ in range(2)))
            x[:, max(0, y - h//2):y + h//2, max(0, z - w//2):z + w//2] = 0
        return x, CLASS_ID[self.files[i].parent.name]

    def _move(self, image):
        a, c = self.a, self.size/2
        angle, zoom, flip = np.radians(random.uniform(-a.rotate, a.rotate)), 1/random.uniform(1 - a.scale, 1 + a.scale), random.choice((-1, 1))
        cos, sin, dx, dy = zoom*np.cos(angle), zoom*np.sin(angle), *(self.size*random.uniform(-a.shift, a.shift) for _ in range(2))
        image = image.transform(image.size, Image.Transform.AFFINE, (flip*cos, -sin, c - flip*cos*c + sin*c + dx, flip*sin, cos, c - flip*sin*c - cos*c + dy), Image.Resampling.BILINEAR)
        image = ImageEnhance.Contrast(image).enhance(random.uniform(1 - a.contrast, 1 + a.contrast))
        return ImageEnhance.Brightness(image).enhance(random.uniform(1 - a.light*.25/.5, 1 + a.light*.25/.5))


def write_folder(root, data, rows, table):
    "The source pictures of some rows as <class>/<row>.png, what an ImageFolder wants."
    told = read_json(Path(data)/'source.json')
    for name in CLASSES: (root/name).mkdir(parents=True)
    for i, image in iter_images(told.get('roots') or told['root'], table.iloc[rows]): cv2.imwrite(str(root/table['label'].iat[i]/f'{i}.png'), image)
    return root


def pil_loader(root, a, augment, workers):
    return torch.utils.data.DataLoader(Folder(root, a.size, augment), a.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def timm_loader(root, a, augment, workers):
    aug = dict(is_training=True, scale=(.7, 1.), ratio=(.9, 1.1), hflip=.5, color_jitter=augment.contrast, re_prob=augment.erase) if augment else dict(is_training=True, no_aug=True)
    return create_loader(ImageDataset(str(root), input_img_mode='L'), (1, a.size, a.size), a.batch, mean=(.5,), std=(.25,), num_workers=workers,
                         persistent_workers=workers > 0, use_prefetcher=False, device=torch.device('cpu'), **aug)


def run_through(batches):
    "Seconds for all batches, and how many faces they held."
    start, n = time.perf_counter(), 0
    for x, *_ in batches(): n += len(x)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start, n


def turns(variants, n):
    "Median faces a second of each variant, taking turns; the first turn is a warm-up."
    seen = {name: [] for name in variants}
    for _ in range(n + 1):
        for name, f in variants.items(): seconds, faces = run_through(f); seen[name].append(faces/seconds)
    return {name: statistics.median(s[1:]) for name, s in seen.items()}


def table(title, rates, *bases):
    "One line a variant, with its ratio to each base."
    print(f'\n{title:42}{"faces/s":>12}' + ''.join(f'{"/ " + b:>27}' for b in bases))
    for name, r in rates.items(): print(f'  {name:40}{r:>12,.0f}' + ''.join(f'{r/rates[b]:>27.2f}' for b in bases))


def loading(a, data, device):
    spec, raw = Preprocess(size=a.size), Preprocess(size=a.size, clahe=0)
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        pack = open_pack(data, spec, home)
        took = time.perf_counter() - start
        start = time.perf_counter()
        open_pack(data, replace(spec, clahe=3.), home, workers=a.workers)
        print(f'\npacking {len(pack):,} faces: {took:.1f} s, {len(pack)/took:,.0f} faces/s; with {a.workers} workers {time.perf_counter() - start:.1f} s')
        rows = np.random.default_rng(0).permutation(pack.rows('train'))[:a.faces]
        root, on_the_fly = write_folder(Path(home)/'folder', data, rows, pack.table), open_pack(data, raw, home).under(spec)
        for augment in (None, Augment()):
            view, epochs = {} if augment is None else {'view': 0}, iter(range(10**6))
            feeds = {'pack': Feeder(pack, device, augment=augment), 'pack, a thread ahead': Feeder(pack, device, augment=augment, prefetch=2), 'pack without CLAHE, CLAHE on the fly': Feeder(on_the_fly, device, augment=augment)}
            others = {f'{name}, {w} workers': make(root, a, augment, w) for w in sorted({0, a.workers}) for name, make in (('PIL folder', pil_loader), ('timm loader', timm_loader))}
            variants = {n: lambda f=f: f.batches(rows, a.batch, epoch=next(epochs), **view) for n, f in feeds.items()} | {n: l.__iter__ for n, l in others.items()}
            table(f'Loading {len(rows):,} faces, {"augmented" if augment else "plain"}', turns(variants, a.turns), *[n for n in others if n.endswith(f'{a.workers} workers')])
            variants.clear(); others.clear()


def make_step(backbone, stride, device):
    model = Classifier(ModelConfig(backbone, output_stride=stride)).to(device, memory_format=torch.channels_last).train()
    opt = make_optimizer(model, TrainConfig())
    def step(x, y):
        opt.zero_grad(set_to_none=True)
        ce_loss(model(x), y).backward()
        opt.step()
        if device == 'cuda': torch.cuda.synchronize()
    return step


def waiting(batches, step):
    "(seconds waited for batches, seconds in steps, steps) of one epoch."
    wait = work = n = 0.
    stream = batches()
    while True:
        a = time.perf_counter()
        if (got := next(stream, None)) is None: return wait, work, int(n)
        b = time.perf_counter()
        step(got[0], got[1])
        wait, work, n = wait + b - a, work + time.perf_counter() - b, n + 1


def training(a, data, device):
    with tempfile.TemporaryDirectory() as home:
        pack = open_pack(data, Preprocess(size=a.size), home)
        rows, epochs = pack.rows('train')[:min(a.faces, a.batch*24)], iter(range(10**6))
        root = write_folder(Path(home)/'folder', data, rows, pack.table)
        feeds = {'pack': Feeder(pack, device, augment=Augment()), 'pack, a thread ahead': Feeder(pack, device, augment=Augment(), prefetch=2)}
        others = {f'PIL folder, {a.workers} workers': pil_loader(root, a, Augment(), a.workers), f'timm loader, {a.workers} workers': timm_loader(root, a, Augment(), a.workers)}
        for backbone, stride in STUDENTS.items():
            step = make_step(backbone, stride, device)
            variants = {n: lambda f=f: f.batches(rows, a.batch, epoch=next(epochs), view=0) for n, f in feeds.items()} | {n: (lambda l=l: ((x.to(device), y.to(device)) for x, y in l)) for n, l in others.items()}
            seen = {n: [] for n in variants}
            for _ in range(a.turns + 1):
                for n, f in variants.items(): seen[n].append(waiting(f, step))
            print(f'\n{"A training step of " + backbone:42}{"ms a step":>12}{"ms waiting":>12}{"waiting":>9}{"faces/s":>10}')
            for n, s in seen.items():
                wait, work = (statistics.median(t[k]/t[2] for t in s[1:]) for k in (0, 1))
                print(f'  {n:40}{1e3*(wait + work):>12.1f}{1e3*wait:>12.2f}{wait/(wait + work):>9.1%}{a.batch/(wait + work):>10,.0f}')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', help='curated data folder; default: procedural faces made for the purpose')
    p.add_argument('--size', type=int, default=48, help='side of the input, pixels'); p.add_argument('--batch', type=int, default=64)
    p.add_argument('--faces', type=int, default=4096, help='faces of an epoch'); p.add_argument('--turns', type=int, default=5, help='epochs timed of each')
    p.add_argument('--workers', type=int, default=2, help='processes that the others may use')
    a = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print(f'{device}, {torch.get_num_threads()} threads, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {a.size} px, batch {a.batch}')
    with tempfile.TemporaryDirectory() as home:
        data = a.data or Path(home)/'curated'
        if not a.data: curate(write_dataset(Path(home)/'faces', n_train=a.faces, n_val=70, n_test=70), data)
        loading(a, data, device)
        training(a, data, device)

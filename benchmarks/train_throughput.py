"""Faces a second of our training loop against timm's, for the same model, batch and precision; and what `fast_training` brings to a step.

    python benchmarks/train_throughput.py [--case resnet18:48:fp32 ...] [--batch 64] [--steps 12] [--repeats 5] [--data CURATED] [--json FILE]

The loops take turns within one process, an epoch of timm's before each of ours, so that a busy machine is unfair to neither; the first turn is a
warm-up. Ours is `fer_core.train.loop.fit` over a `Feeder`, timed from its asking for the first batch to the end of the last step; validation and
files are left out, of both. timm's is the course of its train.py (pytorch-image-models, Ross Wightman, Apache-2.0; the script is not in the wheel)
put together again from timm's own parts: dataset, loader with its prefetcher and persistent workers, augmentation, loss, AdamW, cosine schedule,
clipping, weight averaging and meters, in the same order, at the settings that suit it best here: channels-last, fused AdamW, faces already cut,
equalised and of the right size. What it has no counterpart for (rotation, shift) it is spared. Only train.py's log lines and accumulation are left out.
"""
import argparse, json, logging, os, statistics, tempfile, time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # before anything loads OpenMP
import cv2, torch
from fer_core.compat import mend_torchvision
mend_torchvision()
import timm
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad
from fer_core.artifacts import Run
from fer_core.data.curate import curate
from fer_core.data.loader import Augment, Feeder, open_pack
from fer_core.data.preprocess import Preprocess
from fer_core.data.synthetic import write_dataset
from fer_core.labels import CLASSES, N_CLASSES
from fer_core.models.backbones import Classifier, ModelConfig
from fer_core.models.speed import ease
from fer_core.train.loop import TrainConfig, fit, make_optimizer
from fer_core.train.losses import ce_loss
from fer_core.train.objective import LabelLoss, label_objective

CASES = ('resnet18:48:bf16', 'mobilenetv1_100:96:bf16', 'mobilenetv3_large_100:64:fp32')
PRECISION = {'fp32': '32-true', 'bf16': 'bf16-mixed'}
SMOOTHING = .1


class TimedFeeder(Feeder):
    "A feeder that notes of every training epoch (seconds, seconds waited for batches, faces)."
    turns = ()

    def batches(self, *args, epoch=None, **more):
        stream = super().batches(*args, epoch=epoch, **more)
        if epoch is None: yield from stream; return
        start, wait, n = time.perf_counter(), 0., 0
        try:
            while True:
                asked = time.perf_counter()
                batch = next(stream, None)
                wait += time.perf_counter() - asked
                if batch is None: break
                n += len(batch[0])
                yield batch
        finally: self.turns = (*self.turns, (time.perf_counter() - start, wait, n))


class TimmLoop:
    "timm's training loop, an epoch at a time."
    def __init__(self, model, folder, size, bf16, a, cfg, device):
        self.model = timm.create_model(model, num_classes=N_CLASSES, in_chans=1).to(device, memory_format=torch.channels_last)
        self.cfg, self.device, self.turns = cfg, device, []
        self.autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext
        self.loader = create_loader(create_dataset('', root=str(folder), is_training=True, input_img_mode='L'), (1, size, size), cfg.batch_size, is_training=True,
                                    scale=(.7, 1.), ratio=(.9, 1.1), hflip=.5, color_jitter=Augment().contrast, re_prob=Augment().erase, interpolation='bilinear',
                                    mean=(.5,), std=(.25,), num_workers=a.workers, device=device)
        self.optimizer = create_optimizer_v2(self.model, opt='adamw', lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        self.ema = ModelEmaV3(self.model, decay=cfg.ema, use_warmup=True)
        self.schedule, _ = create_scheduler_v2(self.optimizer, sched='cosine', num_epochs=cfg.epochs, warmup_epochs=1, warmup_lr=1e-5, step_on_epochs=False, updates_per_epoch=len(self.loader))
        self.loss = LabelSmoothingCrossEntropy(smoothing=SMOOTHING)

    def epoch(self, epoch):
        "One epoch: train.py's train_one_epoch without accumulation, mixing and log lines."
        losses, waits, done = AverageMeter(), AverageMeter(), epoch*len(self.loader)
        self.model.train()
        start = asked = time.perf_counter()
        self.optimizer.zero_grad()
        for x, y in self.loader:
            x = x.contiguous(memory_format=torch.channels_last)
            waits.update(time.perf_counter() - asked)
            with self.autocast(): loss = self.loss(self.model(x), y)
            loss.backward()
            dispatch_clip_grad(model_parameters(self.model), value=self.cfg.clip, mode='norm')
            self.optimizer.step()
            losses.update(loss.item(), x.size(0))
            done += 1
            self.optimizer.zero_grad()
            self.ema.update(self.model, step=done)
            self.schedule.step_update(num_updates=done, metric=losses.avg)
            asked = time.perf_counter()
        self.turns.append((time.perf_counter() - start, waits.sum, losses.count))


def write_faces(pack, rows, root):
    "The faces of a pack as <class>/<row>.png, what timm reads."
    for name in CLASSES: (root/name).mkdir(parents=True)
    for r in rows: cv2.imwrite(str(root/pack.table['label'].iat[r]/f'{r}.png'), pack.pixels[r].transpose(1, 2, 0) if pack.pixels[r].ndim == 3 else pack.pixels[r])
    return root


def spread(values): # median, least, most
    return [statistics.median(values), min(values), max(values)]


def compare_loops(case, a, data, device):
    "Both loops through the same faces."
    name, size, precision = case.split(':')
    cfg = TrainConfig(epochs=a.repeats + 1, batch_size=a.batch, precision=PRECISION[precision])
    with tempfile.TemporaryDirectory() as home:
        pack = open_pack(data, Preprocess(size=int(size)), home)
        pack.table.loc[pack.table.index[pack.rows('train')[a.batch*a.steps:]], 'split'] = 'none' # whole batches for both
        rows = pack.rows('train')
        torch.manual_seed(0)
        theirs = TimmLoop(name, write_faces(pack, rows, Path(home)/'faces'), int(size), precision == 'bf16', a, cfg, device)
        feed = TimedFeeder(pack, device, augment=Augment(), prefetch=a.prefetch)
        fit(Run.create(Path(home)/'run', 'benchmark'), Classifier(ModelConfig(name)), feed, label_objective(LabelLoss(smoothing=SMOOTHING)), cfg, on_epoch=lambda model, epoch: theirs.epoch(epoch))
    seen = {'timm': theirs.turns[1:], 'ours': feed.turns[1:]}
    assert all(n == len(rows) for turns in seen.values() for *_, n in turns), 'the loops saw different numbers of faces'
    rates = {k: [n/s for s, _, n in turns] for k, turns in seen.items()}
    return {'case': case, 'batch': a.batch, **{f'{k}_faces_s': spread(v) for k, v in rates.items()}, **{f'{k}_waiting': spread([w/s for s, w, _ in turns]) for k, turns in seen.items()},
            'ratio': spread([o/t for o, t in zip(rates['ours'], rates['timm'])])}


def make_step(name, size, precision, batch, eased, device):
    "A function that makes one training step."
    torch.manual_seed(0)
    model = Classifier(ModelConfig(name)).to(device, memory_format=torch.channels_last).train()
    if eased: ease(model)
    opt = make_optimizer(model, TrainConfig())
    x, y = torch.randn(batch, 1, size, size, device=device).contiguous(memory_format=torch.channels_last), torch.randint(0, N_CLASSES, (batch,), device=device)
    def step():
        opt.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16'): loss = ce_loss(model(x), y, SMOOTHING)
        loss.backward()
        opt.step()
        if device.type == 'cuda': torch.cuda.synchronize()
    return step


def compare_steps(case, a, device):
    "A step plain and eased, in both precisions, in wall and in processor time."
    name, size, _ = case.split(':')
    variants = {f'{p}{", eased" if eased else ""}': make_step(name, int(size), p, a.batch, eased, device) for p in PRECISION for eased in (False, True)}
    wall, cpu = {n: [] for n in variants}, {n: [] for n in variants}
    for _ in range(a.repeats + 1):
        for n, step in variants.items():
            w, c = time.perf_counter(), time.process_time()
            step()
            wall[n].append(time.perf_counter() - w); cpu[n].append(time.process_time() - c)
    return {'case': case, 'batch': a.batch, 'steps': {n: {'faces_s': a.batch/statistics.median(wall[n][1:]), 'ratio': spread([b/t for b, t in zip(wall['fp32'][1:], wall[n][1:])]),
                                                          'ratio_cpu': spread([b/t for b, t in zip(cpu['fp32'][1:], cpu[n][1:])])} for n in variants}}


def show_loops(rows):
    print(f'\n{"loop":34}{"timm faces/s":>13}{"ours faces/s":>13}{"ratio (least .. most)":>24}{"timm waits":>12}{"ours waits":>12}')
    for r in rows: print(f'  {r["case"]:32}{r["timm_faces_s"][0]:>13,.0f}{r["ours_faces_s"][0]:>13,.0f}{"{:.2f} ({:.2f} .. {:.2f})".format(*r["ratio"]):>24}{r["timm_waiting"][0]:>12.1%}{r["ours_waiting"][0]:>12.1%}')


def show_steps(rows):
    print(f'\n{"step":42}{"faces/s":>9}{"wall against fp32":>24}{"processor time":>24}')
    for r in rows:
        for n, s in r['steps'].items(): print(f'  {r["case"].rpartition(":")[0] + " " + n:40}{s["faces_s"]:>9,.0f}{"{:.2f} ({:.2f} .. {:.2f})".format(*s["ratio"]):>24}{"{:.2f} ({:.2f} .. {:.2f})".format(*s["ratio_cpu"]):>24}')


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--case', nargs='+', default=CASES, help='model:size:precision, precision fp32 or bf16')
    p.add_argument('--batch', type=int, default=64); p.add_argument('--steps', type=int, default=12, help='steps of an epoch, that is of a turn')
    p.add_argument('--repeats', type=int, default=5, help='turns timed')
    p.add_argument('--workers', type=int, default=len(os.sched_getaffinity(0)), help="processes of timm's loader; default: one a core")
    p.add_argument('--prefetch', type=int, default=0, help='batches our feeder makes ahead; 0 as in the stages')
    p.add_argument('--data', help='curated data folder; default: procedural faces made for the purpose')
    p.add_argument('--only', choices=('loops', 'steps'), help='one of the two tables'); p.add_argument('--json', help='write the figures to this file too')
    return p.parse_args()


if __name__ == '__main__':
    a = arguments()
    logging.getLogger('lightning.fabric').setLevel(logging.WARNING); logging.getLogger('lightning_fabric').setLevel(logging.WARNING) # says its precision at every step of the way
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    told = {'device': str(device), 'threads': torch.get_num_threads(), 'cores': len(os.sched_getaffinity(0)), 'load': round(os.getloadavg()[0], 1), 'torch': torch.__version__, 'timm': timm.__version__, 'loops': [], 'steps': []}
    print(', '.join(f'{k} {v}' for k, v in told.items() if v != []) + f'; batch {a.batch}, {a.steps} steps a turn, {a.repeats} turns')
    with tempfile.TemporaryDirectory() as home:
        data = a.data or Path(home)/'curated'
        if a.only != 'steps':
            if not a.data: curate(write_dataset(Path(home)/'faces', n_train=int(a.batch*a.steps*1.02) + 8, n_val=70, n_test=70), data) # a few look too much alike and are dropped
            told['loops'] = [compare_loops(c, a, data, device) for c in a.case]
            show_loops(told['loops'])
        if a.only != 'loops':
            told['steps'] = [compare_steps(c, a, device) for c in a.case]
            show_steps(told['steps'])
    if a.json: Path(a.json).write_text(json.dumps(told, indent=1) + '\n')

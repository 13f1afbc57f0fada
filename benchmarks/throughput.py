"""Training throughput as ratios measured in one run: decode-once pack against decoding, bf16 against fp32, fused against plain AdamW.

    python benchmarks/throughput.py [--size 48] [--batch 64]

Variants take turns, and each figure is the median over the turns, so that a busy machine is unfair to none.
"""
import argparse, statistics, tempfile, time
from pathlib import Path
import torch
from fer_core.data.curate import curate
from fer_core.data.loader import Augment, Feeder, open_pack
from fer_core.data.preprocess import Preprocess, standardise
from fer_core.data.images import read_image
from fer_core.data.synthetic import write_dataset
from fer_core.models.backbones import Classifier, ModelConfig
from fer_core.train.loop import TrainConfig, make_optimizer
from fer_core.train.losses import ce_loss


def turns(variants, n=7):
    "Median seconds of each variant, taking turns; the first turn is a warm-up."
    took = {name: [] for name in variants}
    for _ in range(n + 1):
        for name, f in variants.items():
            start = time.perf_counter(); f(); took[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in took.items()}


def table(title, took, faces):
    base = next(iter(took.values()))
    print(f'\n{title}')
    for name, s in took.items(): print(f'  {name:34}{faces/s:>10,.0f} faces/s   ratio {base/s:6.2f}')


def loading(pack, root, batch):
    feed, rows = Feeder(pack, augment=Augment()), pack.rows('train')[:batch*4]
    paths, spec = [pack.table['path'].iat[i] for i in rows], pack.spec
    table('Loading', turns({'decode and standardise every time': lambda: [standardise(read_image(root, p), spec) for p in paths],
                            'pack': lambda: list(feed.batches(rows, batch)),
                            'pack, augmented': lambda: list(feed.batches(rows, batch, epoch=1, view=1))}), len(rows))


def step(backbone, size, batch, bf16=False, fused=True):
    model = Classifier(ModelConfig(backbone, output_stride=16)).to(memory_format=torch.channels_last).train()
    opt = make_optimizer(model, TrainConfig())
    if not fused: opt = torch.optim.AdamW([{k: g[k] for k in ('params', 'lr', 'weight_decay')} for g in opt.param_groups])
    x, y = torch.randn(batch, 1, size, size).contiguous(memory_format=torch.channels_last), torch.randint(0, 7, (batch,))
    def run():
        opt.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = ce_loss(model(x), y)
        loss.backward(); opt.step()
    return run


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=48); p.add_argument('--batch', type=int, default=64)
    a = p.parse_args()
    print(f'{torch.get_num_threads()} threads, {a.size} px, batch {a.batch}')
    with tempfile.TemporaryDirectory() as home:
        root, data = write_dataset(Path(home)/'faces', n_train=a.batch*4, n_val=70, n_test=70), Path(home)/'curated'
        curate(root, data)
        loading(open_pack(data, Preprocess(size=a.size)), root, a.batch)
    for backbone in ('mobilenetv3_large_100', 'resnet18', 'mobilenetv1_100'):
        table(f'A training step of {backbone}', turns({'fp32, plain AdamW': step(backbone, a.size, a.batch, fused=False), 'fp32, fused AdamW': step(backbone, a.size, a.batch),
                                                       'bf16 autocast, fused AdamW': step(backbone, a.size, a.batch, bf16=True)}, 5), a.batch)

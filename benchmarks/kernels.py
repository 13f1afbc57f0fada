"""What it costs to start a stage's kernel afresh and as a fork: one sweep of short trainings, in turns, in one run; prints Markdown.

    python benchmarks/kernels.py --turns 6       # about three minutes on two idle cores
"""
import argparse, datetime, os, platform, statistics, tempfile, time
from pathlib import Path
from fer_core.compat import cores
from fer_core.runs.kernels import start_warm, warm
from fer_core.runs.stage import run_stage


def seconds(data, root, seed): # what it takes: a training of one epoch on 100 drawn faces, whole: notebook, figures, hashes
    began = time.perf_counter()
    run_stage('teacher', {'data': data, 'backbone': 'resnet10t', 'head': 'linear', 'size': 32, 'epochs': 1, 'seed': str(seed)}, root)
    return time.perf_counter() - began


def afresh(*given):
    where = os.environ.pop('FER_CORE_KERNELS')
    try: return seconds(*given)
    finally: os.environ['FER_CORE_KERNELS'] = where


def turns(n, root): # -> seconds of each training afresh, and forked
    data = str(run_stage('curate', {'faces': '140'}, root).folder)
    with warm():
        began = time.perf_counter()
        start_warm()
        while not Path(os.environ['FER_CORE_KERNELS']).exists(): time.sleep(.01)
        loading = time.perf_counter() - began
        both = [(afresh(data, root, 2*i), seconds(data, root, 2*i + 1)) for i in range(n)]
    return loading, *zip(*both)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--turns', type=int, default=6)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as home: loading, cold, fork = turns(a.turns, Path(home))
    ratios = sorted(f/c for c, f in zip(cold, fork))
    print(f'`python benchmarks/kernels.py --turns {a.turns}`, {datetime.date.today()}, {platform.machine()}, {cores()} cores, load {os.getloadavg()[0]:.1f}. '
          f'A training of ResNet-10, one epoch on 100 drawn faces at 32 px, from the call to the hashed run folder; in turns.\n')
    print('| kernel | median, s | least | most |\n| --- | ---: | ---: | ---: |')
    for name, s in (('afresh', cold), ('forked', fork)): print(f'| {name} | {statistics.median(s):.2f} | {min(s):.2f} | {max(s):.2f} |')
    print(f'\nForked over afresh: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}). The process that is forked took {loading:.1f} s to load, once for a plan.')


if __name__ == '__main__': main()

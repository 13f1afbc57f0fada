"""A sweep on a Dask cluster of this machine: what becomes of faults, what deaths in its middle cost, and what a run costs beside its training.

    python benchmarks/cluster.py --folder /tmp/cluster [--part faults deaths speed] [--write benchmarks/cluster.md]

24 teachers on drawn faces, real stages and kernels, two workers. *faults*: 14 runs are left alone, 4 have a learning rate that explodes,
3 start from a torn file, 3 have their kernel killed by SIGKILL once. *deaths*: a worker, the scheduler, and everything at once are
killed as the sweep goes, and the same command is given again. *speed*: eight runs with one worker on one core and with two workers on
two, on a machine of two cores that does nothing else.
"""
from __future__ import annotations
import argparse, contextlib, json, os, platform, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
from fer_core.artifacts import read_json, sha256_file, write_text

BIN, CORES = Path(sys.executable).parent, len(os.sched_getaffinity(0))
TEACHER = "stage: teacher, data: '@data', backbone: mobilenetv3_small_050, size: 32, batch_size: 16, output_stride: 16, epochs: 3"
PLAN = 'data: {stage: curate, faces: 560, face_size: 32}\n'
FAULTS = PLAN + f'''good: {{{TEACHER}, lr: 0.003, each: {{seed: {list(range(14))}}}}}
explodes: {{{TEACHER}, lr: 1.0e+30, each: {{seed: [0, 1, 2, 3]}}}}
torn: {{{TEACHER}, lr: 0.003, pretrained: torn.safetensors, each: {{seed: [0, 1, 2]}}}}
killed: {{{TEACHER}, lr: 0.003, each: {{seed: [100, 101, 102]}}}}
'''


class Cluster:
    "A scheduler and workers of one thread each, as a context."
    def __init__(self, folder, workers, core=None): self.folder, self.n, self.core, self.processes = folder, workers, core, [] # core: the only one that workers may use

    def __enter__(self):
        from fer_core.runs.cluster import Workers
        told = self.folder/'scheduler.json'
        told.unlink(missing_ok=True)
        self.start('scheduler', '--port', '0', '--no-dashboard', '--scheduler-file', str(told))
        while not (told.is_file() and told.read_text().strip().endswith('}')): time.sleep(.1)
        self.address = json.loads(told.read_text())['address']
        self.start('worker', self.address, '--nworkers', str(self.n), '--nthreads', '1', '--no-dashboard', '--local-directory', str(self.folder/'scratch'))
        with Workers(self.address) as w:
            while w.jobs < self.n or not w.workers(): time.sleep(.1)
            self.pids = list(w.client.run(os.getpid).values())
        return self

    def start(self, *what):
        with open(self.folder/'cluster.log', 'a') as log: self.processes.append(subprocess.Popen([*(['taskset', '-c', str(self.core)] if self.core is not None and what[0] == 'worker' else []), BIN/'dask', *what], stdout=log, stderr=log, start_new_session=True))

    def __exit__(self, *_):
        for p in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
            p.wait()


def begin(folder, cluster, *more):
    "The plan of a folder under way."
    with open(folder/'plan.log', 'a') as log: return subprocess.Popen([BIN/'fer', 'quickstart', '--plan', folder/'plan.yaml', '--out', folder/'runs', '--reports', folder/'reports', '--scheduler', cluster.address, *more], cwd=folder, stdout=log, stderr=log, start_new_session=True)


def manifests(folder):
    "run.json of every teacher by folder."
    return {p.parent.name: read_json(p) for p in sorted((folder/'runs').glob('*-teacher-*/run.json'))}


def ended(folder): return {n for n, m in manifests(folder).items() if m['status'] == 'accepted'}


def fresh(folder, plan):
    "An empty folder with a plan."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder/'plan.yaml', plan)
    return folder


def holders(lock):
    "Processes that have a file open."
    found = []
    for p in Path('/proc').glob('[0-9]*/fd/*'):
        with contextlib.suppress(OSError):
            if os.readlink(p) == str(lock): found.append(int(p.parts[2]))
    return found


def faults(folder):
    "24 runs of which ten meet a fault."
    fresh(folder, FAULTS)
    (folder/'torn.safetensors').write_bytes(b'\x40\x00\x00\x00\x00\x00\x00\x00{"head.weight"')
    shot, began = set(), time.time()
    with Cluster(folder, 2) as c:
        p = begin(folder, c, '--retries', '1')
        while p.poll() is None:
            for name, m in manifests(folder).items(): # each once, when it trains
                lock = folder/'runs'/name/'run.lock'
                if m['parameters']['seed'] >= 100 and name not in shot and m['status'] == 'running' and (folder/'runs'/name/'last.ckpt').is_file() and (pids := holders(lock)):
                    for pid in pids: os.kill(pid, signal.SIGKILL)
                    shot.add(name)
            time.sleep(.2)
    m = manifests(folder)
    codes = Counter('ended' if r['status'] == 'accepted' else f'failed: {(r["failure"] or {}).get("code")}' for r in m.values())
    silent = 24 - sum(n for k, n in codes.items() if k != 'failed: None')
    return [f'## Faults\n\n{len(m)} of 24 runs were begun, {len(shot)} kernels killed while they trained and started again; exit code {p.returncode}, {time.time() - began:.0f} s.\n', '| outcome | runs |', '| --- | ---: |',
            *(f'| {k} | {n} |' for k, n in sorted(codes.items())), f'| silent | {silent} |', '']


def seal(folder):
    "What ended, with when and the hash of its logits."
    return {n: (manifests(folder)[n]['ended'], sha256_file(folder/'runs'/n/'logits.npz')) for n in ended(folder)}


def deaths(folder):
    "24 runs through three deaths."
    fresh(folder, PLAN + f'a: {{{TEACHER}, lr: 0.003, each: {{seed: {list(range(24))}}}}}\n')
    rows, kept, began = [], {}, time.time()
    def reach(n, p): # wait until so many have ended; those that had before must be as they were
        while len(ended(folder)) < n and p.poll() is None: time.sleep(.2)
        now = seal(folder)
        assert all(now.get(k) == v for k, v in kept.items()), 'a finished run was repeated or lost'
        kept.update(now)
    with Cluster(folder, 2) as c:
        p = begin(folder, c)
        reach(5, p); os.kill(c.pids[0], signal.SIGKILL); rows.append(f'| a worker | {len(kept)} | goes on |')
        reach(10, p); os.killpg(c.processes[0].pid, signal.SIGKILL); rows.append(f'| the scheduler | {len(kept)} | ends with {p.wait()} |')
    with Cluster(folder, 2) as c:
        p = begin(folder, c)
        reach(16, p); os.killpg(p.pid, signal.SIGKILL); p.wait(); rows.append(f'| plan, scheduler and workers | {len(kept)} | killed |')
    with Cluster(folder, 2) as c:
        p = begin(folder, c)
        code = p.wait(); reach(24, p)
    m = manifests(folder)
    again = sum(any('resumed' in n or 'interrupted' in n for n in r['notes']) for r in m.values())
    return ['## Deaths\n', '| killed | ended before | the plan |', '| --- | ---: | --- |', *rows, '',
            f'The last start ended with {code}: {len(ended(folder))} of 24 ended in {len(m)} folders, {again} of them after an interruption. No run that had ended before a death was repeated (its end and the hash of its logits are the same) or lost. {time.time() - began:.0f} s.', '']


def speed(folder):
    "The same eight runs with one worker and with two."
    walls, trains = {}, {}
    for n in (1, 2):
        fresh(folder, PLAN + f'a: {{{TEACHER}, lr: 0.003, each: {{seed: {list(range(8))}}}}}\n')
        with Cluster(folder, n, 0 if n == 1 else None) as c: # a thread for each training in both
            subprocess.run([BIN/'fer', 'run', 'curate', '-p', 'faces=560', '-p', 'face_size=32', '--out', folder/'runs'], check=True, capture_output=True)
            began = time.time()
            begin(folder, c).wait()
            walls[n] = time.time() - began
        trains[n] = [m['seconds'] for m in manifests(folder).values()]
        assert len(ended(folder)) == 8
    return ['## Speed\n', '| workers | wall, 8 runs | a run | in its notebook |', '| ---: | ---: | ---: | ---: |', *(f'| {n} | {walls[n]:.1f} s | {walls[n]*n/8:.1f} s of a worker | {sum(trains[n])/8:.1f} s |' for n in walls), '', f'Two workers are {walls[1]/walls[2]:.2f} times one.', '']


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--folder', type=Path, required=True, help='working folder; its subfolders faults, deaths and speed are emptied')
    ask.add_argument('--part', nargs='+', choices=('faults', 'deaths', 'speed'), default=('faults', 'deaths', 'speed'))
    ask.add_argument('--write', type=Path, help='write the tables to this file as well')
    args = ask.parse_args()
    lines = ['# A sweep on a Dask cluster of one machine\n', f'`python benchmarks/cluster.py`, {platform.machine()}, {CORES} cores, {time.strftime("%Y-%m-%d")}. 24 teachers (mobilenetv3_small_050, 32 px, 3 epochs) on 560 drawn faces; two workers of one thread.\n']
    for part in args.part:
        lines += globals()[part](args.folder.absolute()/part)
        print('\n'.join(lines), flush=True)
    if args.write: write_text(args.write, '\n'.join(lines))


if __name__ == '__main__': main()

"""Runs the lesson cells of every library notebook with nbdev_test, each in its own process and two at a time, and says what each took.

The processes are forks of this one, which has loaded the large libraries: starting afresh, most notebooks take longer to import than to run.
A full run has the kernels that notebooks start forked too (fer_core.runs.kernels).

Stage notebooks are left to papermill (tests/ and `fer quickstart`). A notebook is over its time when both its wall time and its CPU time are:
a busy neighbour lengthens the one and not the other."""
import argparse, atexit, contextlib, hashlib, importlib, json, os, signal, sys, tempfile, time
from pathlib import Path
from settings import ROOT

RECORD = ROOT/'.work'/'lessons.json'


def notebooks(): # -> the library's notebooks, in the order of the house
    return [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if 'stages' not in p.parts and not any(x.startswith(('.', '_')) for x in p.relative_to(ROOT).parts)]


def fingerprint():
    "Hash of everything that lesson cells depend on within the checkout."
    digest = hashlib.sha256()
    for p in [ROOT/'settings.ini', *notebooks(), *sorted((ROOT/'fer_core').rglob('*.py')), *sorted((ROOT/'reports').glob('*.json'))]:
        digest.update(str(p.relative_to(ROOT)).encode() + p.read_bytes())
    return digest.hexdigest()


def preload():
    "Load what most notebooks load, before the first fork; nothing of fer_core, and no thread is started."
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # notebooks share the cores
    os.environ['MPLBACKEND'] = 'agg'
    for name in ('nbdev.test', 'torch', 'pandas', 'matplotlib.pyplot', 'scipy.stats', 'sklearn.metrics', 'onnx', 'onnxruntime', 'cv2', 'torch._dynamo', 'lightning_fabric', 'papermill'): importlib.import_module(name)


@contextlib.contextmanager
def forked_kernels():
    "Kernels that lessons start are forks too; fer_core, which lessons load themselves, is forgotten here."
    from fer_core.runs.kernels import start_warm, warm
    with warm():
        start_warm(IN_TEST='1', OMP_NUM_THREADS='1')  # as lessons have it, by nbdev_test and `preload`
        for name in [n for n in sys.modules if n.partition('.')[0] == 'fer_core']: del sys.modules[name]
        yield


def test(path, flags, log): # in the child: path of a notebook; log: file that takes what it prints
    "Run a notebook's cells; the exit code."
    from nbdev.test import nbdev_test
    os.setsid()
    for fd in (1, 2): os.dup2(log.fileno(), fd)
    try: nbdev_test(path=str(path), n_workers=0, flags=flags)
    except SystemExit as e: return e.code or 0
    return 0


def start(path, flags, kill): # kill: seconds after which it is given up
    "A notebook on its way, in a fork."
    log = tempfile.TemporaryFile()
    if pid := os.fork(): return {'path': path, 'pid': pid, 'log': log, 'start': time.monotonic(), 'kill': kill}
    code = 1
    try: code = test(path, flags, log)
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        with contextlib.suppress(Exception): atexit._run_exitfuncs()
        os._exit(code)


def ended(job): # as `start` made it
    "The row of a notebook that is through, or None."
    if time.monotonic() - job['start'] > job['kill']:
        with contextlib.suppress(ProcessLookupError): os.killpg(job['pid'], signal.SIGKILL)
    pid, status, usage = os.wait4(job['pid'], os.WNOHANG)
    if not pid: return None
    wall = time.monotonic() - job['start']
    job['log'].seek(0)
    text = job['log'].read().decode(errors='replace')
    ok = status == 0 and 'Success.' in text
    if wall >= job['kill']: text += f"\ngiven up after {job['kill']} s"
    return {'notebook': str(Path(job['path']).relative_to(ROOT)), 'ok': ok, 'wall': round(wall, 1), 'cpu': round(usage.ru_utime + usage.ru_stime, 1), 'output': '' if ok else text}


def run_all(paths, flags, workers, kill):
    "Run notebooks side by side, a line for each as it ends."
    preload()
    waiting, jobs, rows = list(paths), [], {}
    try:
        while waiting or jobs:
            while waiting and len(jobs) < workers: jobs.append(start(waiting.pop(0), flags, kill))
            for job in list(jobs):
                if (row := ended(job)) is None: continue
                jobs.remove(job)
                rows[job['path']] = row
                print(f"  {'ok    ' if row['ok'] else 'FAILED'} {row['wall']:6.1f} s  {row['cpu']:6.1f} s CPU  {row['notebook']}", flush=True)
            time.sleep(.05)
    finally:
        for job in jobs:
            with contextlib.suppress(ProcessLookupError): os.killpg(job['pid'], signal.SIGKILL)
    return [rows[p] for p in paths]


def recorded(key):
    "The rows of an earlier run on the very same files, or None."
    try: record = json.loads(RECORD.read_text())
    except (OSError, ValueError): return None
    return record['rows'] if record['key'] == key else None


def verdict(rows, limit): # limit: seconds
    "Print what failed or was slow; the exit code."
    for row in rows:
        if not row['ok']: print(f"\n=== {row['notebook']}\n{row['output']}")
    slow = [row for row in rows if min(row['wall'], row['cpu']) > limit]
    for row in slow: print(f"{row['notebook']}: {min(row['wall'], row['cpu']):.0f} s, over its {limit:.0f} s")
    bad = sum(not row['ok'] for row in rows)
    print(f"lessons: {len(rows) - bad} of {len(rows)} notebooks pass, {sum(r['wall'] for r in rows):.0f} s in all, slowest {max(rows, key=lambda r: r['wall'])['notebook']}")
    return 1 if bad or slow else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all')
    parser.add_argument('--flags', default='', help='cells to run that are otherwise skipped, e.g. slow')
    parser.add_argument('--limit', type=float, default=float('inf'), help='seconds a notebook may take')
    parser.add_argument('--kill', type=float, default=300, help='seconds after which a notebook is given up')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--recorded', action='store_true', help='take the times of the last full run if nothing has changed since')
    a = parser.parse_args()
    everything, key = not a.notebooks and not a.flags, fingerprint()
    rows = recorded(key) if a.recorded and everything else None
    if rows is None:
        with forked_kernels() if everything else contextlib.nullcontext(): rows = run_all([p.absolute() for p in a.notebooks] or notebooks(), a.flags, a.workers, a.kill)
        if everything and all(r['ok'] for r in rows):
            RECORD.parent.mkdir(exist_ok=True)
            RECORD.write_text(json.dumps({'key': key, 'rows': rows}, indent=1))
    else: print('lessons: nothing changed since the last run, its times stand')
    sys.exit(verdict(rows, a.limit))


if __name__ == '__main__': main()

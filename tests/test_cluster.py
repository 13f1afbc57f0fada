"Plans on the workers of a Dask scheduler, in real processes: faults, deaths of a worker, of the scheduler and of the plan's process, and what the same command makes of it afterwards. Toy stages as in test_sweep."
import contextlib, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from fer_core.artifacts import FAILURES, FerError, read_json
from fer_core.runs.cluster import Workers, read_queue
from test_sweep import CORES, alive, ended, told, toy_plan, toys  # noqa: F401  (toys is a fixture)

DASK = str(Path(sys.executable).parent/'dask')
HOLD = "data: {stage: curate}\na: {stage: teacher, data: '@data', hold: 300, each: {seed: [0, 1]}}"


def until(asked, seconds=100): # waits for something true
    end = time.monotonic() + seconds
    while not (value := asked()): assert time.monotonic() < end, 'it did not come'; time.sleep(.1)
    return value


class Cluster:
    "A scheduler and its two workers."
    def __init__(self, home, env):
        self.file, self.processes, self.env = home/'scheduler.json', [], env
        self.file.unlink(missing_ok=True)
        self.scheduler = self.start('scheduler', '--port', '0', '--no-dashboard', '--scheduler-file', str(self.file))
        until(lambda: self.file.is_file() and self.file.read_text().strip().endswith('}'))
        self.address = json.loads(self.file.read_text())['address']
        self.start('worker', self.address, '--nworkers', '2', '--nthreads', '1', '--no-dashboard', '--local-directory', str(home/'scratch'))
        with Workers(self.address) as w:
            until(lambda: w.jobs == 2)
            self.pids = list(w.client.run(os.getpid).values())

    def start(self, *what):
        self.processes.append(subprocess.Popen([DASK, *what], env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True))
        return self.processes[-1]

    def end(self):
        for p in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
            p.wait()


@pytest.fixture
def cluster(toys, request): # noqa: F811  -> a plan of the test's own, and workers for it
    plan = toy_plan(toys, request.node.name, HOLD)
    c = Cluster(plan.home, plan.env)
    yield plan, c
    c.end()


def begin(plan, cluster): # the plan under way on both workers -> its process, and the notes of the two runs
    process = subprocess.Popen([*plan.command, '--scheduler', cluster.address], env=plan.env, cwd=plan.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    under_way = until(lambda: process.poll() is not None or (len(found := list((plan.home/'runs').glob('*-teacher-*/told.json'))) == 2 and found))
    assert under_way is not True, process.communicate()
    return process, under_way


def all_gone(notes): return until(lambda: not any(alive(p) for f in notes for p in read_json(f)['pids']))


def test_a_sweep_with_faults_ends_with_every_run_done_or_failed_by_code(cluster):
    plan, c = cluster
    (plan.home/'plan.yaml').write_text("data: {stage: curate}\na: {stage: teacher, data: '@data', each: {lr: [0.1, 0.2, 5.0], seed: [0, 13]}}\npage: {stage: compare, runs: ['@a']}")
    first = plan.go('--scheduler', c.address)
    steps = ended(first)
    assert {n: w[:2] for n, w in steps.items() if w[0] == 'failed'} == {'a[lr=0.1,seed=13]': ['failed', 'kernel_died:'], 'a[lr=0.2,seed=13]': ['failed', 'kernel_died:'], 'a[lr=5.0,seed=0]': ['failed', 'nan_loss:'], 'a[lr=5.0,seed=13]': ['failed', 'nan_loss:']}
    assert {n for n, w in steps.items() if w[0] == 'accepted'} == {'data', 'a[lr=0.1,seed=0]', 'a[lr=0.2,seed=0]', 'page'} and '4 of 8 steps failed' in first.stderr and 'Traceback' not in first.stderr
    assert told(steps['a[lr=0.1,seed=0]'])['threads'] == max(1, CORES//2)  # not the one thread that Dask tells its workers to use
    again = plan.go('--scheduler', c.address, '--retries', '1')  # the two that die are started once more, the others would only fail again
    assert again.stdout.count('it is started again') == 2 and again.stdout.count('nan_loss') == 2 and again.stdout.count('reused') == 4  # page among them: the same runs failed
    (plan.home/'common'/'mended').touch()
    last = plan.go('--scheduler', c.address)
    assert last.returncode == 0, last.stderr
    assert {n for n, w in ended(last).items() if w[1] == 'reused'} == {'data', 'a[lr=0.1,seed=0]', 'a[lr=0.2,seed=0]'}  # none repeated, none lost


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks into /proc')
def test_the_steps_of_a_killed_worker_are_taken_up_by_another(cluster):
    plan, c = cluster
    process, notes = begin(plan, c)
    pids = [p for f in notes for p in read_json(f)['pids']]
    (plan.home/'common'/'mended').touch()  # what is started now does not wait
    for pid in c.pids: os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0 and not any(map(alive, pids)), err
    assert {read_json(f.parent/'run.json')['status'] for f in notes} == {'accepted'}  # in the folders that were begun
    assert all(any('interrupted' in n for n in read_json(f.parent/'run.json')['notes']) for f in notes) and len(list((plan.home/'runs').glob('*-teacher-*'))) == 2


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks into /proc')
@pytest.mark.parametrize('what', ['plan', 'scheduler'])
def test_a_death_loses_nothing_and_the_same_command_goes_on(cluster, what):
    plan, c = cluster
    process, notes = begin(plan, c)
    if what == 'scheduler': os.killpg(c.scheduler.pid, signal.SIGKILL)
    else: process.kill()
    out, err = process.communicate(timeout=100)
    if what == 'scheduler':
        assert process.returncode == FAILURES['kernel_died'].exit_code and '2 of 3 steps failed' in err and c.address in out and 'Traceback' not in err, err
    all_gone(notes)
    (plan.home/'common'/'mended').touch()
    if what != 'plan': c.end(); c.__init__(plan.home, plan.env)  # its workers are there still
    again = plan.go('--scheduler', c.address)
    assert again.returncode == 0, again.stderr
    assert ended(again)['data'][1] == 'reused' and {ended(again)[f'a[seed={s}]'][-1] for s in (0, 1)} == {str(f.parent) for f in notes}


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks into /proc')
def test_ctrl_c_interrupts_the_steps_and_leaves_the_workers(cluster):
    plan, c = cluster
    process, notes = begin(plan, c)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == FAILURES['interrupted'].exit_code and '2 under way' in err, err
    assert {read_json(f.parent/'run.json')['failure']['code'] for f in notes} == {'interrupted'} and all_gone(notes)
    (plan.home/'common'/'mended').touch()
    assert plan.go('--scheduler', c.address).returncode == 0


def test_nobody_there_is_an_error_and_no_wait_for_ever(toys, tmp_path): # noqa: F811
    with pytest.raises(FerError, match='no scheduler answers at tcp://127.0.0.1:9 .*dask scheduler'): Workers('tcp://127.0.0.1:9')
    import distributed
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as empty, Workers(empty.scheduler_address, patience=1) as place:
        assert place.jobs == 1
        told = place.run('a', {'stage': 'teacher', 'cwd': str(tmp_path)})
    assert told['code'] == 'kernel_died' and 'no worker has been at' in told['what']


def test_a_queue_brings_its_workers(toys): # noqa: F811
    plan = toy_plan(toys, 'queue', "data: {stage: curate}\na: {stage: teacher, data: '@data', meet: 2, each: {lr: [0.1, 0.2]}}")
    (plan.home/'queue.yaml').write_text(f"queue: local\njobs: 2\noptions: {{cores: 1, processes: 1, memory: 1GB, log_directory: {plan.home/'logs'}, local_directory: {plan.home/'scratch'}}}\n")
    assert read_queue(plan.home/'queue.yaml').jobs == 2
    done = plan.go('--scheduler', str(plan.home/'queue.yaml'))
    assert done.returncode == 0 and {w[0] for w in ended(done).values()} == {'accepted'}, done.stderr  # the two met
    done = plan.go('--scheduler', str(plan.home/'queue.yaml'), '--jobs', '2')
    assert done.returncode == FAILURES['bad_parameter'].exit_code and 'beside --scheduler' in done.stderr

"""What every test shares: quiet threads, and the real data for those that want it."""
import os, signal
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # before anything loads OpenMP: idle threads sleep instead of spinning
os.environ.setdefault('MPLBACKEND', 'agg')
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers are the parallelism: a file of tests each

import pytest  # noqa: E402

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C need it heard.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SLOW = 'pipeline loop runs sweep cluster distill kernels live sources session prune selfsup release embedding compress ensemble mixing data'.split()  # longest first: none is left over for one worker at the end


def pytest_collection_modifyitems(items):
    stem = lambda item: item.path.stem.removeprefix('test_')
    items.sort(key=lambda item: SLOW.index(stem(item)) if stem(item) in SLOW else len(SLOW))


@pytest.fixture(scope='session')
def root(): # -> the checkout
    return ROOT


@pytest.fixture(scope='session')
def shared(): # -> folder with real data and weights (data/, weights/), read-only
    folder = Path(os.environ.get('FER_CORE_SHARED') or ROOT.parent/'shared')
    if not (folder/'data').is_dir(): pytest.skip(f'real data: {folder} is not there (set FER_CORE_SHARED)')
    return folder


@pytest.fixture(scope='session', autouse=True)
def kernels(): # beside other tests, stages start in forks of one process that has loaded the libraries
    if 'PYTEST_XDIST_WORKER' not in os.environ: yield; return
    from fer_core.runs.kernels import start_warm, warm
    with warm():
        start_warm()
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory): # a curated folder of drawn discs, seven classes: 56 to train on, 21 to choose by, 21 to test
    import torch
    from fer_core.data.curate import curate
    from fer_core.data.synthetic import write_discs
    torch.set_num_threads(1)
    at = tmp_path_factory.mktemp('discs')
    curate(write_discs(at/'raw', train=8, val=3, test=3), at/'data', source='folder', near=None)
    return at/'data'

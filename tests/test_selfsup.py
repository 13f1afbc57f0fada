"Self-supervised starts: both losses against independent references, what is hidden and what is seen, exact resume, the file a teacher starts from."
import json, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_core.artifacts import FAILURES, FerError, Run, sha256_file
from fer_core.data.curate import curate
from fer_core.data.loader import Feeder, open_pack
from fer_core.data.preprocess import Preprocess
from fer_core.data.synthetic import write_dataset
from fer_core.models.backbones import ModelConfig
from fer_core.teach.teacher import start_model
from fer_core.train.loop import load_state
from fer_core.train.mae import MAE, draw_orders, hidden_loss, n_visible, to_patches, to_pictures
from fer_core.train.optim import TrainConfig
from fer_core.train.selfsup import METHODS, fit_data, pretrain, probe_table, run_pretraining, start_pretraining, starting_weights
from fer_core.train.simclr import SimCLR, nt_xent

FER = str(Path(sys.executable).parent/'fer')
CNN = ModelConfig('resnet10t', options=(('stem_width', 16),))
VIT = ModelConfig('vit_tiny_patch16_224', options=(('patch_size', 4), ('embed_dim', 32), ('depth', 2), ('num_heads', 2), ('global_pool', 'avg'), ('fc_norm', False)))
BACKBONE = {'simclr': CNN, 'mae': VIT}
SHORT = TrainConfig(epochs=3, batch_size=32, lr=2e-3, precision='32-true')
seeds = st.integers(0, 2**31 - 1)


# ---- the losses

@pytest.mark.parametrize('T', [.1, .2, .5, 1.])
def test_nt_xent_equals_pytorch_metric_learning(T):
    "Loss and gradients of both views, in float64."
    from fer_core.compat import mend_torchvision
    mend_torchvision()
    theirs = pytest.importorskip('pytorch_metric_learning.losses').NTXentLoss(temperature=T)
    torch.manual_seed(0)
    a, b = (torch.randn(24, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    c, d = (x.detach().clone().requires_grad_() for x in (a, b))
    ours, want = nt_xent(a, b, T), theirs(torch.cat([c, d]), torch.arange(24).repeat(2))
    ours.backward(), want.backward()
    assert abs(ours.item() - want.item()) < 1e-12
    for x, y in ((a, c), (b, d)): torch.testing.assert_close(x.grad, y.grad, atol=1e-14, rtol=1e-9)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_nt_xent_is_blind_to_length_to_order_and_to_which_view_is_first(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(8, 5, dtype=torch.float64, generator=g) for _ in range(2))
    order, want = torch.randperm(8, generator=g), nt_xent(a, b)
    lengths = torch.rand(8, 1, dtype=torch.float64, generator=g) + .1
    for other in (nt_xent(b, a), nt_xent(a[order], b[order]), nt_xent(a*lengths, b)): assert other.item() == pytest.approx(want.item(), rel=1e-12)
    assert nt_xent(a, a).item() < want.item()


def test_the_masked_loss_by_loops_and_its_gradient():
    rng = np.random.default_rng(0)
    patches, guess, hidden = rng.normal(2, 3, (4, 9, 12)), rng.normal(size=(4, 9, 12)), rng.random((4, 9)) < .6
    total, count = 0., 0
    for i, j in zip(*np.nonzero(hidden)):
        p = patches[i, j]
        y = (p - p.mean())/np.sqrt(p.var(ddof=1) + 1e-6)
        total, count = total + np.mean((guess[i, j] - y)**2), count + 1
    g = torch.tensor(guess, requires_grad=True)
    loss = hidden_loss(g, torch.tensor(patches), torch.tensor(hidden))
    assert loss.item() == pytest.approx(total/count, rel=1e-13)
    loss.backward()
    assert (g.grad[torch.tensor(~hidden)] == 0).all() and (g.grad[torch.tensor(hidden)] != 0).any(1).all()
    assert torch.autograd.gradcheck(lambda z: hidden_loss(z, torch.tensor(patches), torch.tensor(hidden)), g)


@given(seeds, st.integers(1, 40), st.integers(2, 200), st.floats(.02, .98))
@settings(max_examples=60, deadline=None)
def test_every_face_hides_exactly_as_many_patches(seed, n, patches, ratio):
    rows, keep = np.arange(n) + 7, round(patches*(1 - ratio))
    if not 0 < keep < patches:
        with pytest.raises(FerError) as e: n_visible(patches, ratio)
        assert e.value.code == 'bad_parameter'
        return
    assert n_visible(patches, ratio) == keep
    orders = draw_orders(rows, patches, seed, 2)
    hidden = orders.argsort(1) >= keep
    assert (hidden.sum(1) == patches - keep).all() and (hidden.gather(1, orders[:, :keep]) == 0).all()
    assert torch.equal(orders, draw_orders(rows, patches, seed, 2))


def test_patches_are_those_of_unfold():
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    theirs = F.unfold(x, 6, stride=6).mT.reshape(2, 16, 3, 36).transpose(2, 3).reshape(2, 16, 108) # unfold has the channel outermost
    assert torch.equal(to_patches(x, 6), theirs) and torch.equal(to_pictures(theirs, 3), x)


@pytest.mark.parametrize('extra', [{}, {'global_pool': 'token', 'class_token': True}, {'fc_norm': True}, {'class_token': True, 'global_pool': 'token', 'reg_tokens': 2, 'no_embed_class': True}])
def test_with_nothing_hidden_the_encoder_is_timms(extra):
    torch.manual_seed(0)
    net = MAE(ModelConfig('vit_tiny_patch16_224', options=tuple((dict(VIT.options) | {'img_size': 32, 'class_token': False} | extra).items()))).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(net.encode(x, torch.arange(64).expand(2, -1)), net.backbone.forward_features(x))
    net(x, draw_orders([0, 1], 64, 0, 0)).backward()
    still = [n for n, p in net.backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []  # all that the classifier will use is trained


# ---- the loop

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    home = tmp_path_factory.mktemp('selfsup')
    write_dataset(home/'faces', n_train=140, n_val=70, n_test=35, size=32)
    curate(home/'faces', home/'data', near=None)
    return home/'data'


@pytest.fixture(scope='module')
def pack(data): return open_pack(data, Preprocess(size=32))


def train(folder, pack, method, cfg=SHORT, show=None):
    "Pretrain in a folder, new or begun; the run and the network."
    run = Run(folder) if (folder/'run.json').is_file() else Run.create(folder, 'pretrain')
    net = start_pretraining(method, fit_data(BACKBONE[method], pack.spec), cfg.seed)
    feed = Feeder(pack, 'cpu', cfg.seed, METHODS[method][2])
    return run, net, pretrain(run, net, METHODS[method][1](feed), feed, cfg, (method,), show)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Stop(BaseException): pass


@pytest.mark.parametrize('method', METHODS)
def test_stopped_in_any_batch_it_ends_as_if_it_had_not_been(method, pack, tmp_path, monkeypatch):
    _, whole, history = train(tmp_path/'whole', pack, method)
    calls, progress = [0], Run.progress
    def stopping(self, done, total, text=''):
        calls[0] += 1
        if calls[0] in (3, 12): raise Stop  # in the first epoch, and in a later one
        progress(self, done, total, text)
    monkeypatch.setattr(Run, 'progress', stopping)
    for _ in range(2):
        with pytest.raises(Stop): train(tmp_path/'cut', pack, method)
    _, again, resumed = train(tmp_path/'cut', pack, method)
    assert same(whole, again) and calls[0] > 12
    for h in history + resumed: h.pop('seconds')
    assert history == resumed and len(history) == 3 and history[-1]['train_loss'] < history[0]['train_loss']


@pytest.mark.parametrize('method', METHODS)
def test_only_training_faces_and_no_labels_count(method, pack, tmp_path):
    from dataclasses import replace
    _, net, _ = train(tmp_path/'a', pack, method, replace(SHORT, epochs=1))
    pixels, table = np.array(pack.pixels), pack.table.copy()
    seen = (table['split'] == 'train').to_numpy()
    pixels[~seen] = 255 - pixels[~seen]
    table['label'] = table['label'].to_numpy()[::-1]
    _, other, _ = train(tmp_path/'b', replace(pack, pixels=pixels, table=table), method, replace(SHORT, epochs=1))
    assert same(net, other)
    pixels[np.flatnonzero(seen)[0]] = 0
    _, other, _ = train(tmp_path/'c', replace(pack, pixels=pixels), method, replace(SHORT, epochs=1))
    assert not same(net, other)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_state(pack, tmp_path):
    run, good = Run.create(tmp_path/'run', 'pretrain'), tmp_path/'good.ckpt'
    net = start_pretraining('simclr', fit_data(CNN, pack.spec))
    feed = Feeder(pack, 'cpu', 0, METHODS['simclr'][2])
    objective = METHODS['simclr'][1](feed)
    def poisoned(net, x, y, rows, epoch):
        if epoch == 1: x = x*float('nan')
        return objective(net, x, y, rows, epoch)
    with pytest.raises(FerError) as e: pretrain(run, net, poisoned, feed, SHORT, (), lambda h: shutil.copy(run.path('last.ckpt'), good))
    assert e.value.code == 'nan_loss' and 'epoch 2 batch 1' in str(e.value)
    assert sha256_file(run.path('last.ckpt')) == sha256_file(good)
    state = load_state(good)
    assert state['epoch'] == 1 and all(torch.isfinite(v).all() for v in state['model'].values())


def test_a_state_of_other_settings_or_half_a_file_is_refused(pack, tmp_path):
    from dataclasses import replace
    train(tmp_path/'run', pack, 'mae', replace(SHORT, epochs=1))
    for other in (replace(SHORT, epochs=2), replace(SHORT, epochs=1, seed=1)):
        with pytest.raises(FerError) as e: train(tmp_path/'run', pack, 'mae', other)
        assert e.value.code == 'corrupt_artifact' and 'other settings' in str(e.value)
    path = tmp_path/'run'/'last.ckpt'
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FerError) as e: train(tmp_path/'run', pack, 'mae', replace(SHORT, epochs=1))
    assert e.value.code == 'corrupt_artifact' and 'last.ckpt' in str(e.value)


def test_what_does_not_fit_is_named(pack, tmp_path):
    for make in (lambda: start_pretraining('mae', CNN), lambda: start_pretraining('moco', CNN), lambda: SimCLR(CNN, T=0.)(torch.randn(2, 1, 32, 32), torch.randn(2, 1, 32, 32)),
                 lambda: train(tmp_path/'p', pack, 'mae', TrainConfig(epochs=1, schedule='plateau'))):
        with pytest.raises(FerError) as e: make()
        assert e.value.code == 'bad_parameter'


# ---- the file, and what it is worth

def test_a_run_stands_for_its_file_and_everything_else_for_itself(tmp_path):
    run = Run.create(tmp_path/'run', 'pretrain')
    with pytest.raises(FerError) as e: starting_weights(run.folder)
    assert e.value.code == 'missing_checkpoint' and 'backbone.safetensors' in str(e.value)
    run.path('backbone.safetensors').touch()
    assert starting_weights(run.folder) == str(run.path('backbone.safetensors'))
    for other in ('none', 'hub', 'weights/file.pth'): assert starting_weights(other) == other


@pytest.mark.parametrize('method, config', [('simclr', CNN), ('simclr', ModelConfig('mobilenetv3_small_050', output_stride=16)), ('mae', VIT)])
def test_a_teacher_starts_from_the_file(method, config, pack, tmp_path):
    "No backbone tensor is missing, and batch norm is not taken for a folded one."
    run = Run.create(tmp_path/'run', 'pretrain')
    history, table = run_pretraining(run, pack, method, config, TrainConfig(epochs=1, batch_size=70, precision='32-true'), fractions=(.2, 1.))
    config, feed = fit_data(config, pack.spec), Feeder(pack)
    model, report = start_model(config, feed, starting_weights(run.folder))
    assert report['missing'] == [] and report['unexpected'] == [] and 'refitted_bn' not in report
    assert report['sha256'] == json.loads(run.path('config.json').read_text())['weights_sha256']
    scratch, _ = start_model(config, feed, 'none')
    again = start_pretraining(method, config).backbone.state_dict()
    moved = [k for k, v in scratch.backbone.state_dict().items() if not torch.equal(v, again[k])]
    assert moved == (['pos_embed'] if method == 'mae' else [])  # both begin at the same weights
    assert not same(model.backbone, scratch.backbone)
    assert list(table['labels']) == [len(pack.thinned(f).rows('train')) for f in (.2, 1.)]*2
    mine = probe_table({'pretrained': model.backbone}, pack, fractions=(.2, 1.))
    assert mine['macro_f1'].tolist() == table['macro_f1'].tolist()[2:]  # the file is the network that was judged


# ---- the stage

@pytest.fixture(scope='module')
def curated(tmp_path_factory):
    out = tmp_path_factory.mktemp('curated')
    subprocess.run([FER, 'run', 'curate', '-p', 'faces=280', '-p', 'face_size=32', '-p', 'find_faces=false', '--out', str(out)], check=True, capture_output=True, timeout=400)
    return next(out.glob('*-curate-*'))


def command(curated, out, *more):
    return [FER, 'run', 'pretrain', '-p', f'data={curated}', '-p', 'method=mae', '-p', 'backbone=vit_tiny_patch16_224', '-p', f'options={[list(o) for o in VIT.options]}', '-p', 'size=32', '-p', 'epochs=3',
            '-p', 'batch_size=16', '-p', 'precision=32-true', '-p', 'fractions=[0.2, 1.0]', *more, '--out', str(out)]


def wait_for(out, done, process):
    "Wait until a run's progress passes a number of epochs."
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        for p in Path(out).glob('*/progress.json'):
            try: state = json.loads(p.read_text())
            except ValueError: continue
            if state['text'].startswith('epoch') and state['done'] >= done: return
        time.sleep(.01)


def test_the_stage_keeps_the_contract_survives_a_kill_and_feeds_a_teacher(curated, tmp_path):
    subprocess.run(command(curated, tmp_path/'whole'), check=True, capture_output=True, timeout=500)
    process = subprocess.Popen(command(curated, tmp_path/'cut'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path/'cut', 1.1, process)
    process.send_signal(signal.SIGKILL); process.wait()
    subprocess.run(command(curated, tmp_path/'cut'), check=True, capture_output=True, timeout=500)
    whole, cut = (next((tmp_path/k).glob('*-pretrain-*')) for k in ('whole', 'cut'))
    for name in ('backbone.safetensors', 'metrics.json'): assert (whole/name).read_bytes() == (cut/name).read_bytes(), name
    m = Run(cut).manifest
    assert any('resumed' in note for note in m.notes) and m.status == 'accepted'
    assert m.seeds == {'train': 0} and m.dataset['sha256'] and m.parents['data'].id == curated.name and m.reliability['pretraining']['method'] == 'mae'
    assert {k for k in m.metrics} == {f'{b} {f}/val' for b in ('before', 'pretrained') for f in ('0.2', '1')}
    for name in ('config.json', 'history.json', 'train_log.csv', 'last.ckpt', 'hash_manifest.json', 'pretrain.ipynb'): assert (whole/name).is_file(), name
    assert subprocess.run([FER, 'verify', str(cut)], capture_output=True, timeout=200).returncode == 0
    teacher = [FER, 'run', 'teacher', '-p', f'data={curated}', '-p', f'pretrained={whole/"backbone.safetensors"}', '-p', 'backbone=vit_tiny_patch16_224', '-p', f'options={[list(o) for o in (*VIT.options, ("img_size", 32))]}',
               '-p', 'size=32', '-p', 'epochs=1', '-p', 'batch_size=32', '-p', 'label_fraction=0.5', '--out', str(tmp_path/'teacher')]
    subprocess.run(teacher, check=True, capture_output=True, timeout=500)
    start = Run(next((tmp_path/'teacher').glob('*-teacher-*'))).manifest.reliability['start']
    assert start['missing'] == [] and start['sha256'] == sha256_file(whole/'backbone.safetensors')


def test_a_wrong_method_ends_the_stage_in_one_line(curated, tmp_path):
    done = subprocess.run([FER, 'run', 'pretrain', '-p', f'data={curated}', '-p', 'method=mea', '-p', 'size=32', '--out', str(tmp_path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == FAILURES['bad_parameter'].exit_code and "'mea'" in done.stderr and 'Traceback' not in done.stderr

"The training loop: accumulation, layer-wise rates, averaged weights, schedules, NaN, processes, and runs that are killed."
import os, signal, subprocess, sys, time

import numpy as np, pytest, torch
from torch import nn

from fer_core.compat import mend_torchvision
mend_torchvision()
from timm.optim import param_groups_layer_decay

from fer_core.artifacts import FerError, Run, read_json
from fer_core.data.curate import curate
from fer_core.data.loader import Augment, Feeder, open_pack
from fer_core.data.preprocess import Preprocess
from fer_core.data.synthetic import write_discs
from fer_core.evaluate.metrics import nll, softmax
from fer_core.models.backbones import Classifier, ModelConfig, load_model
from fer_core.teach.teacher import train_teacher
from fer_core.train.average import PER_EPOCH
from fer_core.train.judge import read_logits
from fer_core.train.loop import TrainConfig, fit, load_state, make_optimizer, predict_logits
from fer_core.train.losses import ce_loss
from fer_core.train.objective import LabelLoss, label_objective
from fer_core.train.parallel import together
from fer_core.train.optim import plateau_factor, rate_of

SPEC = Preprocess(size=32, clahe=0)
BASE = {'epochs': 4, 'batch_size': 16, 'lr': 4e-3, 'ema': .9, 'seed': 1, 'precision': '32-true'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Curated discs whose height is the class: 112 train, 42 val, 42 test."
    root = tmp_path_factory.mktemp('discs')
    curate(write_discs(root/'pictures'), root/'data', source='folder', near=None)
    return root/'data'


@pytest.fixture(scope='module')
def pack(data): return open_pack(data, SPEC)


def plain_loss(net, x, y, rows, epoch): return ce_loss(net(x, y), y)


def trained(folder, pack, objective=plain_loss, on_epoch=None, prefetch=0, backbone='resnet10t', **settings):
    "Train, or go on, with everything built anew: history without times, and the bytes of the best weights."
    torch.manual_seed(0)
    run = Run(folder) if (folder/'run.json').exists() else Run.create(folder, 'lesson')
    feed = Feeder(pack, seed=1, augment=Augment(flip=0, erase=0), prefetch=prefetch)
    try: fit(run, Classifier(ModelConfig(backbone, dropout=.1)), feed, objective, TrainConfig(**BASE | settings), on_epoch)
    except KeyboardInterrupt: pass
    return [{k: v for k, v in e.items() if k != 'seconds'} for e in read_json(folder/'history.json')], (folder/'best.safetensors').read_bytes()


# -- accumulation ------------------------------------------------------------------------------------------------------------

class Tiny(nn.Module):
    "No batch norm and no dropout: the gradient of a batch is the mean of its parts'."
    def __init__(self):
        super().__init__()
        self.backbone, self.config = nn.Sequential(nn.Flatten(), nn.Linear(32*32, 16), nn.GELU(), nn.Linear(16, 7)), ModelConfig('resnet10t')
    def forward(self, x, y=None): return self.backbone(x)
    embed = regress = with_tokens = forward


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulated_parts_make_the_large_batch(pack, tmp_path, parts, monkeypatch):
    import fer_core.train.loop as loop
    monkeypatch.setattr(loop, 'save_model', lambda *a, **k: None) # this network is none of ours to save
    weights = {}
    for name, size, accumulate in (('large', 24, 1), ('parts', 24//parts, parts)): # 112 = 4 x 24 + 16: the last step is a smaller one
        torch.manual_seed(3)
        model = Tiny()
        fit(Run.create(tmp_path/name, 'lesson'), model, Feeder(pack, seed=1), plain_loss, TrainConfig(**BASE | {'epochs': 2, 'batch_size': size, 'accumulate': accumulate, 'ema': 0}))
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(weights['large'], weights['parts'], atol=2e-6)
    assert (weights['large'] - torch.cat([p.detach().flatten() for p in Tiny().parameters()])).abs().max() > 1e-2


# -- rates -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('backbone', ['resnet10t', 'convnext_atto', 'mobilenetv3_small_050', 'vit_tiny_patch16_224'])
def test_layer_rates_are_timms(backbone):
    model = Classifier(ModelConfig(backbone))
    cfg = TrainConfig(lr=.01, backbone_lr=.5, layer_decay=.8, weight_decay=.05)
    opt = make_optimizer(model, cfg)
    ours = {id(p): (g['lr'], g['weight_decay']) for g in opt.param_groups for p in g['params']}
    spared = model.backbone.no_weight_decay() if hasattr(model.backbone, 'no_weight_decay') else ()
    theirs = {id(p): (.01*.5*g['lr_scale'], g['weight_decay']) for g in param_groups_layer_decay(model.backbone, .05, spared, layer_decay=.8) for p in g['params']}
    assert set(ours) == {id(p) for p in model.parameters()} and all(ours[k] == pytest.approx(v) for k, v in theirs.items())
    assert {ours[id(p)][0] for p in model.head.parameters()} == {.01} and len({v[0] for v in theirs.values()}) > 3


def test_sgd_on_a_plateau_is_torchs(pack, tmp_path):
    model = Classifier(ModelConfig('resnet10t'))
    assert isinstance(make_optimizer(model, TrainConfig(optimizer='sgd')), torch.optim.SGD)
    losses, opt = [3, 2, 2, 2, 2, 1.9, 2, 2, 2, 2, 2], torch.optim.SGD(model.parameters(), lr=.3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=.1, patience=2)
    for k in range(len(losses)):
        ours = rate_of(TrainConfig(schedule='plateau', plateau_patience=2, warmup_epochs=0), 5, k + 1, [{'val_loss': v} for v in losses[:k + 1]])
        theirs.step(losses[k])
        assert .3*ours(0) == pytest.approx(opt.param_groups[0]['lr'])
    assert plateau_factor(losses, 2) < .02
    history, _ = trained(tmp_path/'r', pack, optimizer='sgd', schedule='plateau', lr=.05, epochs=3)
    assert len(history) == 3 and history[-1]['train_loss'] < history[0]['train_loss']


def test_early_stopping_has_a_floor(pack, tmp_path, monkeypatch):
    import fer_core.train.loop as loop
    monkeypatch.setattr(loop, 'validation_row', lambda *a, **k: {'val_loss': 1., 'val_accuracy': .5, 'val_macro_f1': .5}) # the first epoch stays the best
    epochs = lambda name, **more: len(trained(tmp_path/name, pack, epochs=8, patience=1, **more)[0])
    assert epochs('a', min_epochs=1) == 2 and epochs('b', min_epochs=4) == 4 and epochs('c', min_epochs=1, swa=.4) == 5 # averaging begins with the fifth
    assert len(trained(tmp_path/'d', pack, epochs=3)[0]) == 3 # no patience, no early stop


@pytest.mark.parametrize('flip, precision', [(False, '32-true'), (True, '32-true'), (True, 'bf16-mixed')])
def test_validation_asks_as_the_verdict_does(data, pack, tmp_path, flip, precision):
    run = Run.create(tmp_path/'r', 'teacher')
    metrics, history = train_teacher(run, data, ModelConfig('resnet10t'), SPEC, TrainConfig(**BASE | {'epochs': 3, 'precision': precision}), flip=flip)
    best, logits = max(history, key=lambda h: (h['val_macro_f1'], -h['val_loss'])), read_logits(tmp_path/'r'/'logits.npz')[0]['val']
    assert nll(softmax(logits), pack.labels[pack.rows('val')]) == pytest.approx(best['val_loss'], rel=1e-4)
    assert metrics['val']['macro_f1'] == pytest.approx(best['val_macro_f1']) and metrics['val']['accuracy'] == pytest.approx(best['val_accuracy'])
    model, _, _ = load_model(tmp_path/'r')
    other = predict_logits(model, Feeder(pack), pack.rows('val'), flip=not flip)
    assert abs(nll(softmax(other), pack.labels[pack.rows('val')]) - best['val_loss']) > 1e-3*best['val_loss'] # the other way of asking would have been seen


# -- averaged weights --------------------------------------------------------------------------------------------------------

def test_the_last_epochs_are_averaged_and_batch_norm_is_measured_anew(pack, tmp_path):
    seen = []
    class Watch(torch.optim.AdamW):
        def step(self, *a, **k):
            out = super().step(*a, **k)
            seen.append(self.param_groups[0]['params'][0].detach().clone())
            return out
    import fer_core.train.loop as loop
    real, loop.make_optimizer = loop.make_optimizer, lambda model, cfg: Watch([{'params': list(model.parameters()), 'lr': cfg.lr, 'factor': 1.}])
    try: history, _ = trained(tmp_path/'r', pack, epochs=5, swa=.4)
    finally: loop.make_optimizer = real
    assert [h['weights'] for h in history] == ['ema']*3 + ['mean']*2 and history[-1]['lr'] == pytest.approx(.2*BASE['lr'])
    steps, state = len(seen)//5, load_state(tmp_path/'r'/'last.ckpt')
    due = [i for i in range(steps) if (i + 1)*PER_EPOCH//steps > i*PER_EPOCH//steps]
    taken = [seen[e*steps + i] for e in (3, 4) for i in due]
    model = Classifier(ModelConfig('resnet10t', dropout=.1))
    first = next(n for n, _ in model.named_parameters())
    assert len(taken) == 2*PER_EPOCH == int(state['average']['mean']['n_averaged']) and torch.allclose(torch.stack(taken).mean(0), state['average']['mean'][f'module.{first}'], atol=1e-6)
    weights = {k.removeprefix('module.'): v for k, v in state['average']['mean'].items() if k != 'n_averaged'}
    model.load_state_dict(weights)
    feed, rows = Feeder(pack, seed=1, augment=Augment(flip=0, erase=0)), pack.rows('train')
    torch.optim.swa_utils.update_bn((x for x, _, _ in feed.batches(rows, 16, epoch=4, view=4)), model)
    assert all(torch.allclose(model.state_dict()[k], v, atol=1e-4, rtol=1e-4) for k, v in weights.items() if 'running' in k)


@pytest.mark.parametrize('settings', [{'swa': .5}, {'swa': .5, 'ema': 0.}, {'schedule': 'plateau', 'optimizer': 'sgd', 'lr': .02}, {'accumulate': 3, 'layer_decay': .8, 'retries': 1}])
def test_a_stopped_run_ends_as_if_it_had_not_been(pack, tmp_path, settings):
    "Stopped between epochs, inside the averaging too, and with another number of workers each time."
    whole = trained(tmp_path/'whole', pack, **settings)
    for k, until in enumerate((1, 3, 4)):
        def stop(model, epoch):
            if epoch >= until: raise KeyboardInterrupt
        parts = trained(tmp_path/'parts', pack, on_epoch=stop, prefetch=k, **settings)
    assert parts == whole and len(whole[0]) == 4


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_loop import SPEC, open_pack, trained
trained(Path({folder!r}), open_pack({data!r}, SPEC), prefetch=int(sys.argv[1]), epochs=5, swa=.4)
"""


def test_kill_9_at_any_instant_loses_nothing(data, pack, tmp_path):
    "Killed again and again at random instants, each time with another number of workers, until it gets through."
    whole = trained(tmp_path/'whole', pack, epochs=5, swa=.4)
    code, rng, kills = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path/'killed'), data=str(data)), np.random.default_rng(5), []
    for attempt in range(40):
        child = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, str(attempt % 3)], env=os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        begun = len(_epochs(tmp_path/'killed'))
        while child.poll() is None and len(_epochs(tmp_path/'killed')) == begun and not (tmp_path/'killed'/'progress.json').exists(): time.sleep(.02)
        if attempt < 3: # once training has really begun: somewhere in the next epoch or so
            while child.poll() is None and len(_epochs(tmp_path/'killed')) <= begun: time.sleep(.01)
            time.sleep(rng.uniform(0, .6))
        if attempt < 3 and child.poll() is None: child.send_signal(signal.SIGKILL); kills.append(len(_epochs(tmp_path/'killed')))
        _, error = child.communicate(timeout=300)
        if child.returncode == 0: break
        assert child.returncode == -signal.SIGKILL, error.decode()[-2000:]
    assert kills and trained(tmp_path/'killed', pack, epochs=5, swa=.4) == whole


def _epochs(folder):
    try: return read_json(folder/'history.json')
    except FerError: return []


# -- a loss that is no number ------------------------------------------------------------------------------------------------

def nan_once(at):
    "A loss that breaks in one batch of epoch 3, the first time it gets there."
    left = [at]
    def objective(net, x, y, rows, epoch):
        loss = plain_loss(net, x, y, rows, epoch)
        if epoch == 2 and left:
            left[0] -= 1
            if left[0] < 0: left.clear(); return loss*float('nan')
        return loss
    return objective


def test_a_nan_stops_the_run_and_leaves_the_last_good_epoch(pack, tmp_path):
    with pytest.raises(FerError) as e: trained(tmp_path/'r', pack, nan_once(3))
    assert e.value.code == 'nan_loss' and 'epoch 3 batch 4' in e.value.what
    good = load_state(tmp_path/'r'/'last.ckpt')
    assert good['epoch'] == 2 and all(torch.isfinite(v).all() for v in good['model'].values() if v.is_floating_point())
    assert trained(tmp_path/'r', pack) == trained(tmp_path/'whole', pack) # the cause mended, it goes on as if nothing had been


def test_a_picture_that_is_no_number_is_caught_as_well(pack, tmp_path):
    feed = Feeder(pack, seed=1)
    whole = feed._batch
    feed._batch = lambda r, *a: (lambda x, y, r: (x.index_fill(0, torch.tensor([0]), float('nan')), y, r))(*whole(r, *a))
    with pytest.raises(FerError) as e: fit(Run.create(tmp_path/'r', 'lesson'), Classifier(ModelConfig('resnet10t')), feed, plain_loss, TrainConfig(**BASE))
    assert e.value.code == 'nan_loss' and 'epoch 1 batch 1' in e.value.what and not (tmp_path/'r'/'last.ckpt').exists()


def test_with_retries_it_goes_back_and_on_at_half_the_rate(pack, tmp_path):
    history, _ = trained(tmp_path/'r', pack, nan_once(3), retries=1)
    plain, _ = trained(tmp_path/'whole', pack, retries=1)
    assert [h['rate'] for h in history] == [1, 1, .5, .5] and history[:2] == plain[:2] and history[2]['lr'] == pytest.approx(plain[2]['lr']/2)
    assert any('back to epoch 2' in n for n in Run(tmp_path/'r').manifest.notes)
    def always(net, x, y, rows, epoch): return plain_loss(net, x, y, rows, epoch)*(float('nan') if epoch == 0 else 1)
    with pytest.raises(FerError) as e: trained(tmp_path/'n', pack, always, retries=2)
    assert e.value.code == 'nan_loss' and len(Run(tmp_path/'n').manifest.notes) == 2


def test_weights_broken_by_the_last_step_are_not_kept(pack, tmp_path):
    steps = [0]
    class Breaks(torch.optim.AdamW):
        def step(self, *a, **k):
            out, steps[0] = super().step(*a, **k), steps[0] + 1
            if steps[0] == 14: # the last of the second epoch: no later batch sees it
                with torch.no_grad(): self.param_groups[0]['params'][0].fill_(float('nan'))
            return out
    import fer_core.train.loop as loop
    real, loop.make_optimizer = loop.make_optimizer, lambda model, cfg: Breaks([{'params': list(model.parameters()), 'lr': cfg.lr, 'factor': 1.}])
    try:
        with pytest.raises(FerError) as e: trained(tmp_path/'r', pack, ema=0)
    finally: loop.make_optimizer = real
    assert e.value.code == 'nan_loss' and 'validation' in e.value.what and load_state(tmp_path/'r'/'last.ckpt')['epoch'] == 1


# -- several processes -------------------------------------------------------------------------------------------------------

def gradients(part):
    "Gradients of one batch in float64, this process's pictures of it only."
    import torch.distributed as dist
    from fer_core.train.parallel import share_batchnorm
    torch.manual_seed(0)
    model, (k, n) = Classifier(ModelConfig('resnet10t')).double().train(), part
    x, y = torch.randn(16, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 7
    if n > 1: dist.init_process_group('gloo', init_method='env://', rank=k, world_size=n); share_batchnorm(model)
    nn.functional.cross_entropy(model(x[k::n]), y[k::n]).backward()
    for p in model.parameters():
        if n > 1: dist.all_reduce(p.grad); p.grad /= n
    return {name: p.grad.flatten()[:40].tolist() for name, p in model.named_parameters()} | {name: b.flatten()[:40].tolist() for name, b in model.named_buffers()}


def test_gradients_and_statistics_of_two_processes_are_those_of_one():
    one, two = gradients((0, 1)), together(2, gradients)
    assert set(one) == set(two) and sum('running' in k for k in one) > 10
    for name in one: np.testing.assert_allclose(one[name], two[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize('settings', [{}, {'mixup': .3, 'accumulate': 2}])
def test_two_processes_do_what_one_does(data, tmp_path, settings):
    "resnet10t with its batch norms; a small rate keeps what float32 sums in another order make of each other small, and the weights' way is compared, not where they are."
    mix, more = {k: v for k, v in settings.items() if k == 'mixup'}, {k: v for k, v in settings.items() if k == 'accumulate'}
    torch.manual_seed(1)
    found, start = {}, Classifier(ModelConfig('resnet10t', 'arcface', m=.2)).state_dict()
    for n in (1, 2):
        run = Run.create(tmp_path/str(n), 'teacher')
        _, history = train_teacher(run, data, ModelConfig('resnet10t', 'arcface', m=.2), SPEC, TrainConfig(**BASE | {'epochs': 2, 'lr': 1e-4, 'optimizer': 'sgd', 'ema': 0} | more), Augment(flip=0, erase=0), margin_warmup=0, margin_ramp=1, processes=n, **mix)
        state = load_state(tmp_path/str(n)/'last.ckpt')['model']
        found[n] = history, torch.cat([(state[k] - start[k]).flatten() for k in state if state[k].is_floating_point() and 'running' not in k]), run.manifest.reliability
    assert found[2][2]['processes'] == 2 and found[2][2]['start']['shared_batchnorms'] > 5
    for a, b in zip(found[1][0], found[2][0]):
        assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-4) and a['val_loss'] == pytest.approx(b['val_loss'], rel=1e-4)
    assert found[1][1].norm() > 0 and (found[1][1] - found[2][1]).norm() < .01*found[1][1].norm()


def test_two_processes_go_on_where_another_run_stopped(data, tmp_path):
    train = lambda name, epochs, **more: train_teacher(Run.create(tmp_path/name, 'teacher'), data, ModelConfig('resnet10t'), SPEC, TrainConfig(**BASE | {'epochs': epochs}), **more)[1]
    first, both = train('a', 1), train('b', 2, processes=2, resume_from=str(tmp_path/'a'))
    written = Run(tmp_path/'b').manifest
    assert both[:1] == first and len(both) == 2
    assert {'data', 'resumed_from'} <= set(written.parents) and {'start', 'precision', 'processes'} <= set(written.reliability) # one process writes, or they would write over each other


def test_an_error_in_a_process_is_told_with_its_code(data, tmp_path):
    with pytest.raises(FerError) as e: train_teacher(Run.create(tmp_path/'r', 'teacher'), data, ModelConfig('resnet10t', output_stride=16), SPEC, TrainConfig(**BASE), pretrained=str(tmp_path/'no.pth'), processes=2)
    assert e.value.code == 'missing_checkpoint' and 'no.pth' in str(e.value)


# -- labels ------------------------------------------------------------------------------------------------------------------

def test_votes_in_place_of_labels(pack):
    torch.manual_seed(0)
    votes = torch.from_numpy(pack.votes())
    assert torch.equal(votes.argmax(1), torch.from_numpy(pack.labels)) and (votes.sum(1) == 1).all()
    votes[3] = torch.tensor([.5, 0, 0, .25, 0, 0, .25])
    rows, logits = np.array([3, 4]), torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    net = lambda x, y: logits
    net.head = nn.Identity()
    loss = label_objective(LabelLoss(0.), votes=votes)(net, torch.zeros(2, 1, 4, 4), torch.from_numpy(pack.labels)[rows], rows, 0)
    assert loss.item() == pytest.approx(-(votes[rows].double()*logits.log_softmax(1)).sum(1).mean().item())


def test_votes_are_asked_of_data_that_has_none(data, tmp_path):
    with pytest.raises(FerError) as e: train_teacher(Run.create(tmp_path/'r', 'teacher'), data, ModelConfig('resnet10t'), SPEC, TrainConfig(**BASE), votes=True)
    assert e.value.code == 'bad_parameter' and 'no votes' in str(e.value)


def test_a_fraction_of_the_labels(pack):
    part = pack.thinned(.25, seed=1)
    assert part.counts().tolist() == [4]*7 and part.counts('val').tolist() == pack.counts('val').tolist() and (part.table['split'] == 'unlabelled').sum() == 84
    assert np.array_equal(part.rows('train'), pack.thinned(.25, seed=1).rows('train')) and not np.array_equal(part.rows('train'), pack.thinned(.25, seed=2).rows('train'))
    assert pack.thinned(.001).counts().tolist() == [1]*7
    with pytest.raises(FerError): pack.thinned(0.)


def test_adjusted_afterwards(data, tmp_path):
    run = Run.create(tmp_path/'r', 'teacher')
    train_teacher(run, data, ModelConfig('resnet10t'), SPEC, TrainConfig(**BASE | {'epochs': 1}), posthoc=True)
    told = read_json(tmp_path/'r'/'adjustment.json')
    assert told['val_macro_f1']['with'] >= told['val_macro_f1']['without'] and 'teacher/test_adjusted' in run.manifest.metrics
    # discs are of equal numbers: a prior that is the same for all classes changes no decision
    assert told['test']['accuracy'] == pytest.approx(read_json(tmp_path/'r'/'metrics.json')['test']['accuracy'])


def test_a_manifest_with_its_copies_is_judged_without_them_too(data, tmp_path):
    from fer_core.data.loader import Pack
    from fer_core.evaluate.metrics import evaluate
    from fer_core.train.judge import write_verdict
    pack, rng = open_pack(data, SPEC), np.random.default_rng(0)
    table = pack.table.copy()
    test, train = np.flatnonzero(table['split'] == 'test'), np.flatnonzero(table['split'] == 'train')
    table.loc[table.index[test[:10]], 'group'] = table.loc[table.index[train[:10]], 'group'] = [f'g{i}' for i in range(10)]
    table.loc[table.index[test[10:12]], 'group'] = 'alone' # of one group, but with no training row
    kept = Pack(pack.pixels, table, SPEC, pack.dataset_sha256)
    logits = {s: rng.normal(size=(len(kept.rows(s)), 7)).astype(np.float32) for s in ('val', 'test')}
    told = write_verdict(Run.create(tmp_path/'keep', 'teacher'), kept, logits, 'teacher')
    rest = evaluate(logits['test'][10:], kept.labels[test[10:]], 'test', False, told['test']['temperature'], .35, kept.dataset_sha256)
    assert told['test_unseen']['n'] == len(test) - 10 and told['test_unseen']['macro_f1'] == rest['macro_f1'] != told['test']['macro_f1']
    assert 'test_unseen' not in write_verdict(Run.create(tmp_path/'drop', 'teacher'), pack, logits, 'teacher')

"Mixed pictures and weights of rows in every loss and in whole runs: closed forms, no gradient where there is no weight, resume to the bit, errors."
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.special import rel_entr, softmax

from fer_core.artifacts import FAILURES, FerError, Run, read_json
from fer_core.data.augment import Augment, Mix, Mixed, make_mix
from fer_core.data.hard import train_weights
from fer_core.data.loader import Feeder, open_pack
from fer_core.data.preprocess import Preprocess
from fer_core.distill.dkd import dkd_loss, dkd_terms
from fer_core.distill.kd import kd_loss, mixed_teacher
from fer_core.distill.objective import dkd_objective, kd_objective
from fer_core.distill.student import train_student
from fer_core.models.backbones import Classifier, ModelConfig
from fer_core.teach.teacher import margin_schedule, train_teacher
from fer_core.train.objective import LabelLoss, label_objective, training_logits
from fer_core.train.losses import ce_loss, prior_weights, weigh
from fer_core.train.loop import TrainConfig, fit

SPEC, N = Preprocess(size=32, clahe=0), 9
seeds = st.integers(0, 2**31 - 1)


def drawn(seed, n=N): # -> logits of student and teacher, mixed targets, weights of ten rows, rows
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(7, (n,), generator=g)
    share = torch.rand(n, generator=g, dtype=torch.float64)
    share[0], share[1] = 1, 0
    return 3*torch.randn(n, 7, generator=g, dtype=torch.float64), 3*torch.randn(n, 7, generator=g, dtype=torch.float64), Mixed(y, y.flip(0), share), torch.rand(10, generator=g, dtype=torch.float64)*2, np.random.default_rng(seed).permutation(10)[:n]


def each_ce(z, y): return -z.log_softmax(1).gather(1, y[:, None])[:, 0]


# -- closed forms ------------------------------------------------------------------------------------------------------------

@given(seeds)
@settings(max_examples=40, deadline=None)
def test_cross_entropy_of_a_mix_is_the_mix_of_both(seed):
    z, _, y, _, _ = drawn(seed)
    want = (y.share*each_ce(z, y.first) + (1 - y.share)*each_ce(z, y.second)).mean()
    assert ce_loss(z, y).item() == pytest.approx(want.item(), rel=1e-6)                          # the loss is in float32
    assert ce_loss(z, y).item() == pytest.approx(F.cross_entropy(z, y.probs().double()).item(), rel=1e-5)
    assert ce_loss(z, y, .1).item() == pytest.approx(F.cross_entropy(z, y.probs().double(), label_smoothing=.1).item(), rel=1e-5)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_class_weights_row_weights_and_shares_multiply(seed):
    z, _, y, w, rows = drawn(seed)
    classes = prior_weights(np.array([.1, .02, .1, .3, .2, .08, .2]), .5)
    a, b = y.share*w[rows], (1 - y.share)*w[rows].flip(0)
    target, total = weigh(y, w, rows)
    want = (a*each_ce(z, y.first) + b*each_ce(z, y.second)).mean()
    assert ce_loss(z, target, sample=total).item() == pytest.approx(want.item(), rel=1e-5)
    want = (a*classes[y.first]*each_ce(z, y.first) + b*classes[y.second]*each_ce(z, y.second)).sum()/(target.share*classes[y.first] + (1 - target.share)*classes[y.second]).sum()
    assert ce_loss(z, target, weights=classes, sample=total).item() == pytest.approx(want.item(), rel=1e-5)
    plain, of_rows = weigh(y.first, w, rows)
    want = (of_rows*classes[plain]*each_ce(z, plain)).sum()/classes[plain].sum()                # PyTorch's mean under class weights
    assert ce_loss(z, plain, weights=classes, sample=of_rows).item() == pytest.approx(want.item(), rel=1e-5)


@given(seeds, st.floats(.5, 8))
@settings(max_examples=40, deadline=None)
def test_distillation_of_a_mix_follows_the_mixed_probabilities(seed, T):
    z, t, y, w, rows = drawn(seed)
    p, q, lam = softmax(t.numpy()/T, 1), softmax(z.numpy()/T, 1), y.share.numpy()[:, None]
    mix = lam*p + (1 - lam)*p[::-1]
    both = mixed_teacher(t, y.share, T)
    np.testing.assert_allclose(softmax(both.numpy()/T, 1), mix, atol=1e-12)
    assert kd_loss(z, both, T).item() == pytest.approx(T**2*rel_entr(mix, q).sum(1).mean(), rel=1e-9, abs=1e-12)
    target, total = weigh(y, w, rows)
    a, b = w[rows].numpy()[:, None]*lam, w[rows].numpy()[::-1, None]*(1 - lam)
    mix = (a*p + b*p[::-1])/(a + b)
    assert kd_loss(z, mixed_teacher(t, target.share, T), T, total).item() == pytest.approx(T**2*((a + b)[:, 0]*rel_entr(mix, q).sum(1)).mean(), rel=1e-6, abs=1e-9)
    parts = [2*tc + 5*nc for tc, nc in (dkd_terms(z, both, label, T) for label in (y.first, y.second))]
    assert dkd_loss(z, both, y, 2., 5., T).item() == pytest.approx(T**2*(y.share*parts[0] + (1 - y.share)*parts[1]).mean().item(), rel=1e-9)


def test_a_share_of_one_is_no_mix_in_any_loss():
    z, t, y, _, _ = drawn(0)
    whole = y._replace(share=torch.ones(N, dtype=torch.float64))
    assert torch.equal(mixed_teacher(t, whole.share, 4.).log_softmax(1).argmax(1), t.argmax(1))
    for mixed, plain in ((ce_loss(z, whole, .1), ce_loss(z, y.first, .1)), (kd_loss(z, mixed_teacher(t, whole.share, 4.), 4.), kd_loss(z, t, 4.)), (dkd_loss(z, t, whole), dkd_loss(z, t, y.first))):
        assert mixed.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize('head, margin', [('linear', None), ('arcface', 0.), ('arcface', 1.)])
def test_the_backbone_runs_once_and_a_margin_asks_for_each_label(head, margin):
    torch.manual_seed(0)
    net, calls = Classifier(ModelConfig('resnet10t', head, m=.3)).train(), []
    if margin is not None: net.head.set_margin(margin)
    net.backbone.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(4, 1, 32, 32), torch.arange(4)
    z = training_logits(net, x, Mixed(y, y.flip(0), torch.full((4,), .5)))
    assert calls == [1] and isinstance(z, tuple) == bool(margin)
    if margin:
        rows, (first, second) = torch.arange(4), z
        others = torch.ones_like(first).scatter(1, y[:, None], 0).scatter(1, y.flip(0)[:, None], 0).bool()
        assert (first[rows, y] < second[rows, y]).all() and (second[rows, y.flip(0)] < first[rows, y.flip(0)]).all()   # each is lowered at its own label
        assert torch.equal(first[others], second[others])


# -- no weight, no say -------------------------------------------------------------------------------------------------------

class Net:
    "A network whose logits are given."
    head = None
    def __init__(self, z): self.z = z
    def __call__(self, x, y=None): return self.z
    def regress(self, x): return self.z, self.z[:, :3]


def losses(soft, w): # -> name: f(logits, targets, rows)
    view = lambda e: 0
    def of(objective): return lambda z, y, rows: objective(Net(z), torch.zeros(len(rows)), y, rows, 0)
    return {'ce': of(label_objective(LabelLoss(.1), None, w)), 'kd': of(kd_objective(soft, view, 2., .5, .1, sample=w)), 'dkd': of(dkd_objective(soft, view, 2., 1., 4., 1, .1, sample=w)),
            'hint': of(kd_objective(soft, view, 2., .5, .1, hint=.7, sample=w))}


def soft_labels(seed, n=10):
    g = torch.Generator().manual_seed(seed)
    return SimpleNamespace(views=3*torch.randn(1, n, 7, generator=g), hints=torch.randn(1, n, 3, generator=g))


@pytest.mark.parametrize('name', ['ce', 'kd', 'dkd', 'hint'])
def test_rows_without_weight_have_no_gradient(name):
    z, _, y, w, rows = drawn(3)
    w[rows[[2, 5]]] = 0
    z = z.float().requires_grad_()
    losses(soft_labels(1), w.float())[name](z, y.first, rows).backward()
    assert (z.grad.abs().sum(1) > 0).tolist() == [k not in (2, 5) for k in range(N)]


@pytest.mark.parametrize('name', ['ce', 'kd', 'dkd'])
def test_rows_without_weight_have_no_say_in_a_mix(name):
    z, _, y, w, rows = drawn(4)
    w[rows[[2, 8]]] = 0                                                    # 8 and 0 are partners, and 0 is wholly itself
    soft, other = soft_labels(1), soft_labels(1)
    other.views[0, rows[[2, 8]]] = 9*torch.eye(7)[[1, 6]]
    label = y.first.clone(); label[[2, 8]] = (label[[2, 8]] + 3) % 7       # other labels and another teacher for them
    changed = Mixed(label, label.flip(0), y.share)
    out = []
    for s, target, weights in ((soft, y, w), (other, changed, w), (other, changed, torch.ones(10))):
        logits = z.float().requires_grad_()
        loss = losses(s, weights.float())[name](logits, Mixed(target.first, target.second, target.share.float()), rows)
        out.append((loss.item(), torch.autograd.grad(loss, logits)[0]))
    assert out[0][0] == pytest.approx(out[1][0], rel=1e-6) and torch.allclose(out[0][1], out[1][1], atol=1e-7)
    assert not torch.allclose(out[1][1], out[2][1], atol=1e-3)             # with weight they would have had one


def test_a_pair_without_any_weight_is_finite():
    z, _, y, _, rows = drawn(5)
    for name in ('ce', 'kd', 'dkd'):
        logits = z.float().requires_grad_()
        loss = losses(soft_labels(1), torch.zeros(10))[name](logits, Mixed(y.first, y.second, y.share.float()), rows)
        loss.backward()
        assert loss.item() == 0 and logits.grad.eq(0).all()


@pytest.mark.parametrize('name', ['ce', 'kd', 'dkd', 'hint'])
def test_weights_of_one_change_no_loss(name):
    z, _, y, _, rows = drawn(6)
    plain, weighed = (losses(soft_labels(1), w)[name](z.float(), y.first, rows).item() for w in (None, torch.ones(10)))
    assert plain == pytest.approx(weighed, rel=1e-6)


@pytest.mark.parametrize('name', ['ce', 'kd'])
def test_losses_stay_on_the_device(name): # `meta` refuses to mix devices, as a GPU does; weights and soft labels come from the CPU
    y = torch.zeros(N, dtype=torch.long, device='meta')
    z, rows, classes = torch.zeros(N, 7, device='meta'), np.arange(N), torch.ones(7)
    soft, w = soft_labels(1), torch.ones(10)
    objective = label_objective(LabelLoss(.1, class_power=.5, tau=1.), np.ones(7), w) if name == 'ce' else kd_objective(soft, lambda e: 0, 2., .5, .1, classes.to('meta'), sample=w)
    for target in (y, Mixed(y, y, torch.zeros(N, device='meta'))): assert objective(Net(z), torch.zeros(N, device='meta'), target, rows, 0).device.type == 'meta'


# -- runs --------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pack(data): return open_pack(data, SPEC)


def weights_file(path, pack, change=None): # a third of the training rows count triple, one row nothing
    train = pack.table[pack.table['split'] == 'train']
    table = pd.DataFrame({'id': train['id'], 'label': train['label'], 'weight': np.where(np.arange(len(train)) % 3, '1', '3')}).astype(object)
    table.loc[table.index[4], 'weight'] = '0'
    if change: table = change(table)
    table.to_csv(path, index=False)
    return path


TINY = TrainConfig(epochs=4, batch_size=16, lr=4e-3, ema=.9, seed=1, precision='32-true')


def trained(folder, pack, kind, until=4, mix=Mix(mixup=.4, cutmix=1.), w=None, bound=()):
    "Train, or go on training, with everything built anew; stop like Ctrl-C before an epoch."
    torch.manual_seed(0)
    config = ModelConfig('resnet10t', 'arcface' if kind == 'arcface' else 'linear', m=.2, dropout=.1)
    run = Run(folder) if (folder/'run.json').exists() else Run.create(folder, 'lesson')
    feed = Feeder(pack, seed=1, augment=Augment(flip=0, erase=0), views=0 if kind == 'arcface' else 3, mix=mix)
    soft = SimpleNamespace(views=3*torch.randn(3, len(pack), 7, generator=torch.Generator().manual_seed(2)))
    objective = {'arcface': label_objective(LabelLoss(.1), None, w), 'kd': kd_objective(soft, feed.view_of, 2., .5, sample=w), 'dkd': dkd_objective(soft, feed.view_of, 2., 1., 2., 2, sample=w)}[kind]
    margin = margin_schedule(.2, 1, 1)
    def before_epoch(model, epoch):
        if epoch >= until: raise KeyboardInterrupt
        margin(model, epoch)
    try: fit(run, Classifier(config), feed, objective, TINY, before_epoch, bound=bound)
    except KeyboardInterrupt: pass
    return [{k: v for k, v in e.items() if k != 'seconds'} for e in read_json(folder/'history.json')], (folder/'best.safetensors').read_bytes()


@pytest.mark.parametrize('kind', ['arcface', 'kd', 'dkd'])
def test_a_stopped_run_with_mixing_and_weights_ends_as_if_it_had_not_been(pack, tmp_path, kind):
    w = torch.from_numpy(train_weights(weights_file(tmp_path/'w.csv', pack), pack.table))
    whole = trained(tmp_path/'whole', pack, kind, w=w)
    for until in (1, 3, 4): parts = trained(tmp_path/'parts', pack, kind, until, w=w)
    assert parts == whole and len(whole[0]) == 4
    assert [k for k in whole[0][0] if 'accuracy' in k] == ['val_accuracy']                      # nothing on mixed labels is called accuracy


def test_mixing_and_weights_each_change_the_training(pack, tmp_path):
    w = torch.from_numpy(train_weights(weights_file(tmp_path/'w.csv', pack), pack.table))
    losses = [trained(tmp_path/str(k), pack, 'arcface', 1, mix, weights)[0][0]['train_loss'] for k, (mix, weights) in enumerate([(None, None), (Mix(mixup=.4), None), (Mix(cutmix=1.), None), (None, w)])]
    assert len(set(losses)) == 4


def test_a_stopped_run_does_not_go_on_under_another_mix_or_other_weights(pack, tmp_path):
    trained(tmp_path/'run', pack, 'arcface', 1, bound=('sample_weights ab',))
    for other in ({'mix': Mix(mixup=.5, cutmix=1.)}, {'mix': None}, {'bound': ('sample_weights cd',)}, {'bound': ()}):
        with pytest.raises(FerError) as e: trained(tmp_path/'run', pack, 'arcface', 2, **{'bound': ('sample_weights ab',), **other})
        assert e.value.code == 'corrupt_artifact' and 'other settings' in e.value.what


def teacher(folder, data, **more):
    run = Run.create(folder, 'teacher')
    _, history = train_teacher(run, data, ModelConfig('resnet10t', 'arcface', m=.2), SPEC, TrainConfig(epochs=1, batch_size=16, lr=3e-3, ema=.9, precision='32-true'), Augment(flip=0, erase=0), margin_warmup=0, margin_ramp=0, **more)
    return run.manifest, history[0]['train_loss'], (folder/'best.safetensors').read_bytes()


def test_weights_that_are_all_alike_are_none_to_the_bit(data, pack, tmp_path):
    alike = weights_file(tmp_path/'alike.csv', pack, lambda t: t.assign(weight='0.7'))
    plain, weighed = teacher(tmp_path/'plain', data), teacher(tmp_path/'weighed', data, sample_weights=str(alike))
    assert plain[1:] == weighed[1:]
    assert 'sample_weights' not in plain[0].parents and weighed[0].parents['sample_weights'].sha256 and 'mixing' not in plain[0].reliability


def test_a_run_records_its_mixing_and_its_file_of_weights(data, pack, tmp_path):
    from fer_core.artifacts import sha256_file, write_hashes
    from fer_core.runs.report import verify_run
    path = weights_file(tmp_path/'w.csv', pack)
    manifest, loss, _ = teacher(tmp_path/'run', data, mixup=.2, cutmix=1., sample_weights=str(path))
    entry, told = manifest.parents['sample_weights'], manifest.reliability['sample_weights']
    w = train_weights(path, pack.table)[pack.rows('train')].astype(float)
    assert entry.sha256 == sha256_file(path) and manifest.reliability['mixing'] == {'mixup': .2, 'cutmix': 1., 'share': 1., 'switch': .5}
    assert told['least'] == 0 and told['greatest'] == pytest.approx(w.max()) and told['effective_rows'] == pytest.approx(w.sum()**2/(w**2).sum(), abs=.1) and np.isfinite(loss)
    write_hashes(tmp_path/'run')
    state = lambda: {r['what']: r['state'] for r in verify_run(tmp_path/'run')}[f'parent sample_weights: {tmp_path.name}/w.csv']
    assert state() == 'ok'
    path.write_text(path.read_text().replace(',3\n', ',2\n'))
    assert state() == 'changed'


def twice(t): return pd.concat([t, t.iloc[[3]]])
def unknown(t): t.loc[t.index[3], 'id'] = 'nobody'; return t
def relabelled(t): t.loc[t.index[3], 'label'] = 'sad' if t['label'].iloc[3] != 'sad' else 'happy'; return t
def weight(text): return lambda t: t.assign(weight=np.where(np.arange(len(t)) == 3, text, t['weight']))


@pytest.mark.parametrize('change, code, words', [
    (unknown, 'softlabel_misaligned', 'w.csv line 5: nobody'), (relabelled, 'softlabel_misaligned', 'w.csv line 5'), (twice, 'duplicate_id', 'stands on line 5 already'),
    (weight('nan'), 'bad_parameter', "w.csv line 5: weight 'nan'"), (weight('-1'), 'bad_parameter', "w.csv line 5: weight '-1'"), (weight('inf'), 'bad_parameter', "w.csv line 5: weight 'inf'"),
    (weight('much'), 'bad_parameter', "w.csv line 5: weight 'much'"), (weight(''), 'bad_parameter', 'w.csv line 5'), (lambda t: t.assign(weight='0'), 'bad_parameter', 'w.csv: all 56 training rows have weight 0'),
    (lambda t: t.drop(columns='weight'), 'corrupt_artifact', 'lacks the columns weight')])
def test_a_wrong_file_of_weights_is_named_with_its_row(data, pack, tmp_path, change, code, words):
    with pytest.raises(FerError) as e: teacher(tmp_path/'run', data, sample_weights=str(weights_file(tmp_path/'w.csv', pack, change)))
    assert e.value.code == code and words in e.value.what and not (tmp_path/'run'/'last.ckpt').exists()


def test_a_missing_file_of_weights(data, tmp_path):
    with pytest.raises(FerError) as e: teacher(tmp_path/'run', data, sample_weights=str(tmp_path/'none.csv'))
    assert e.value.code == 'missing_file' and 'none.csv' in e.value.what


def test_validation_rows_may_be_listed_and_count_for_nothing(pack, tmp_path):
    val = pack.table[pack.table['split'] == 'val']
    more = pd.DataFrame({'id': val['id'], 'label': val['label'], 'weight': '50'})
    with_val, without = (train_weights(weights_file(tmp_path/f'{k}.csv', pack, change), pack.table) for k, change in enumerate([lambda t: pd.concat([t, more]), None]))
    rows = pack.rows('train')
    assert np.array_equal(with_val[rows], without[rows]) and with_val[rows].mean() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize('given', [{'mixup': -.1}, {'cutmix': float('nan')}, {'mixup': .2, 'cutmix': float('inf')}])
def test_a_wrong_alpha_is_refused_before_anything_runs(tmp_path, given):
    with pytest.raises(FerError) as e: teacher(tmp_path/'run', tmp_path/'no data', **given)
    assert e.value.code == 'bad_parameter' and [k for k in given if k in e.value.what]
    assert make_mix(0., 0.) is None


@pytest.mark.parametrize('phase', ['kd', 'dkd'])
def test_a_hint_beside_mixing_is_refused_before_anything_runs(tmp_path, phase):
    run = Run.create(tmp_path/'run', 'student')
    with pytest.raises(FerError) as e: train_student(run, tmp_path/'no data', phase, ModelConfig('resnet10t'), SPEC, TrainConfig(), 'before', 'soft', loss={'hint': 2.}, mixup=.2)
    assert e.value.code == 'bad_parameter' and 'hint=2' in e.value.what and 'mixup=0' in e.value.mend


def test_the_stages_take_the_parameters(data, pack, tmp_path):
    path, out = weights_file(tmp_path/'w.csv', pack), tmp_path/'runs'
    fer = [str(Path(sys.executable).parent/'fer'), 'run', 'teacher', '--out', str(out), '-p', f'data={data}', '-p', 'backbone=resnet10t', '-p', 'size=32', '-p', 'clahe=0', '-p', 'epochs=1', '-p', 'batch_size=16']
    done = subprocess.run([*fer, '-p', 'mixup=0.2', '-p', 'cutmix=1.0', '-p', f'sample_weights={path}'], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(next(out.glob('*-teacher-*/run.json')).read_text())
    assert told['parameters']['mixup'] == .2 and told['reliability']['mixing']['cutmix'] == 1 and told['parents']['sample_weights']['path'] == str(path)
    done = subprocess.run([*fer, '-p', 'cutmix=-1'], capture_output=True, text=True, timeout=400)
    assert done.returncode == FAILURES['bad_parameter'].exit_code and 'cutmix=-1' in done.stderr
    from fer_core.runs.stage import parameters
    off = {stage: {k: parameters(stage)[k]['default'] for k in ('mixup', 'cutmix', 'sample_weights')} for stage in ('teacher', 'student')}
    assert off == dict.fromkeys(('teacher', 'student'), {'mixup': 0., 'cutmix': 0., 'sample_weights': ''})


def test_a_plan_that_mixes_beside_a_hint_or_lacks_its_weights_ends_before_it_runs(tmp_path):
    from fer_core.runs.plan import Step, run_plan
    for asked, code in ((dict(hint=1., mixup=.2), 'bad_parameter'), (dict(sample_weights=str(tmp_path/'gone.csv')), 'missing_file')):
        with pytest.raises(FerError) as e: run_plan([Step("kd", "student", asked)], tmp_path)
        assert e.value.code == code and 'step kd' in str(e.value) and not list(tmp_path.iterdir())

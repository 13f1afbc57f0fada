"""Structured pruning: a network that loads without its pruner, measures against closed forms, runs that stop and go on, what is refused."""
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from fer_core.artifacts import FerError, Run, read_json, sha256_file, write_json
from fer_core.compress import prune as P
from fer_core.compress.release import stratified
from fer_core.data.loader import Augment, Feeder, open_pack
from fer_core.data.preprocess import Preprocess
from fer_core.distill.student import adopted_run, started_from, train_student
from fer_core.evaluate.gates import evaluate_gates
from fer_core.models.backbones import Classifier, ModelConfig, PrunedConfig, load_model, model_size, save_model, smaller, with_projector
from fer_core.teach.softlabels import export_softlabels, fusion_of
from fer_core.teach.teacher import train_teacher
from fer_core.train.loop import TrainConfig, load_state

GREY, STILL = Preprocess(size=32, clahe=0), Augment(erase=0, rotate=0, scale=0, shift=0, contrast=0, light=0)
QUICK = TrainConfig(epochs=2, batch_size=16, lr=1e-3, precision='32-true', ema=0.)
TINY = ModelConfig('resemotenet_c')


def lively(config): # random weights whose batch norms do something
    torch.manual_seed(0)
    model = Classifier(config).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d): m.weight.uniform_(.5, 1.5); m.bias.normal_(0, .2); m.running_mean.normal_(0, .2); m.running_var.uniform_(.5, 2)
    return model


def pictures(spec, n=4): return torch.randn(n, spec.channels, spec.size, spec.size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def first(data, tmp_path_factory): # a student with a projector, as distillation leaves one
    run = Run.create(tmp_path_factory.mktemp('runs')/'ce', 'student', {'phase': 'ce'})
    train_student(run, data, 'ce', TINY, GREY, QUICK, augment=STILL)
    run.finish()
    return run.folder


@pytest.fixture(scope='module')
def pruned(data, first): # a finished prune run
    run = Run.create(first.parent/'prune', 'prune')
    out = P.prune_student(run, data, first, P.Cut(target=.4, importance='l1'), QUICK, augment=STILL, keep=True)
    run.finish()
    return run, out


# ---- the network

NETS = {'resnet10t, ArcFace, RGB': (ModelConfig('resnet10t', 'arcface', channels=3, output_stride=16), Preprocess(size=32, colour='rgb', clahe=0)),
        'mobilenetv3_large_100, grey': (ModelConfig('mobilenetv3_large_100', output_stride=16), GREY),
        'resemotenet_c, RGB': (replace(TINY, channels=3), Preprocess(size=32, colour='rgb', clahe=0)),
        'resnet10t, CBAM, grey': (ModelConfig('resnet10t', attention='cbam', stem_stride=1), GREY)}


ALONE = '''
import sys
sys.modules['torch_pruning'] = None # an import of it fails
import numpy as np, torch
torch.set_num_threads(1)
from fer_core.models.backbones import load_model
for at in sys.argv[1:]:
    model = load_model(at)[0]
    z = model(torch.from_numpy(np.load(at + '/x.npy'))).detach().numpy()
    assert np.array_equal(z, np.load(at + '/z.npy')), (at, np.abs(z - np.load(at + '/z.npy')).max())
try: import torch_pruning
except ImportError: print('absent', len(sys.argv) - 1)
'''


def test_pruned_networks_come_back_exactly_and_without_the_pruner(tmp_path):
    import torch_pruning as tp
    folders = []
    for (name, (config, spec)), scope in zip(NETS.items(), (*P.SCOPES, *P.SCOPES)):
        whole, x, at = lively(config), pictures(spec), tmp_path/name.split(',')[0]/scope
        was = {k: v.clone() for k, v in whole.state_dict().items()}
        small = P._less(whole, spec, P.Cut(importance='l1', scope=scope), .3) # as the pruner left it
        want = small(x).detach()
        at.mkdir(parents=True)
        save_model(at, P.rebuilt(small, spec), spec)
        np.save(at/'x.npy', x.numpy()); np.save(at/'z.npy', want.numpy())
        folders.append(str(at))
        again, _, told = load_model(at)
        assert torch.equal(again(x), want) and told['model']['shapes'] and again.head.weight.shape[0] == 7
        for m in again.modules(): # what a module says of itself is what its tensors are
            if isinstance(m, nn.Conv2d): assert m.weight.shape[:2] == (m.out_channels, m.in_channels//m.groups)
            elif isinstance(m, nn.Linear): assert m.weight.shape == (m.out_features, m.in_features)
            elif isinstance(m, nn.BatchNorm2d): assert len(m.running_mean) == len(m.weight) == m.num_features
        params, seen = tp.utils.count_ops_and_params(P._Seen(again), x[:1])[1], model_size(again, spec)['params']
        assert params == seen - (0 if config.head == 'arcface' else 7) # the pruner's view of a head has no bias
        assert seen == sum(v.numel() for k, v in again.state_dict().items() if not any(s in k for s in ('running', 'num_batches'))) < model_size(whole, spec)['params']
        assert all(torch.equal(v, was[k]) for k, v in whole.state_dict().items()) # the network it was cut from is as it was
    assert subprocess.run([sys.executable, '-c', ALONE, *folders], capture_output=True, text=True, check=True).stdout == f'absent {len(NETS)}\n'


@pytest.mark.parametrize('name', NETS)
def test_what_remains_is_a_multiple_of_eight_and_nothing_loses_more_than_it_may(name):
    config, spec = NETS[name]
    whole = lively(config)
    before = whole.state_dict()
    for cut, ratio in ((P.Cut(importance='l1'), .4), (P.Cut(importance='l1', scope='global', most=.5), .45)):
        after = P.prune(whole, spec, cut, ratio).state_dict()
        rows = [(k, v.shape[0], after[k].shape[0]) for k, v in before.items() if k.endswith('.weight') and v.ndim > 1]
        changed = [(k, a, b) for k, a, b in rows if a != b]
        assert len(changed) >= len(rows)//(4 if config.attention else 2) and all(b % 8 == 0 and b >= 8 for _, _, b in changed)
        if cut.scope == 'layer': assert all(abs(b - .6*a) <= 5 for _, a, b in changed) # nearest multiple, and the ceiling of a count
        else: assert all(b >= .5*a for _, a, b in changed) and len({round(b/a, 2) for _, a, b in changed}) > 3


def test_a_ratio_takes_out_its_square():
    whole = lively(TINY)
    for p in (.25, .5): # of powers of two, not rounded: nothing is lost
        small = P.prune(whole, GREY, P.Cut(importance='l1', round_to=1), p)
        inner = [k for k, v in whole.state_dict().items() if k.startswith('backbone.blocks') and v.ndim == 4]
        left = sum(small.get_parameter(k).numel() for k in inner)/sum(whole.get_parameter(k).numel() for k in inner)
        assert left == pytest.approx((1 - p)**2)


def test_multiply_adds_by_torch_pruning():
    import torch_pruning as tp
    config, spec = NETS['resnet10t, ArcFace, RGB']
    net = P.prune(lively(config), spec, P.Cut(importance='l1'), .3)
    layers = tp.utils.count_ops_and_params(P._Seen(net), pictures(spec, 1), layer_wise=True)[2]
    theirs = sum(v for m, v in layers.items() if isinstance(m, (nn.Conv2d, nn.Linear)) and v)
    bias = sum(m.bias.numel() for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    assert bias == 0 and P.size_of(net, spec)['macs'] == theirs


# ---- importance

def test_importance_in_closed_form(data):
    model, feed = lively(TINY), Feeder(open_pack(data, GREY))
    rows = feed.pack.rows('train')[:20]
    P.gradients(model, feed, rows, 8)
    x, y, _ = next(feed.batches(rows, 20))
    g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), names := [model.get_parameter(f'backbone.stem.{k}.weight') for k in (0, 5)])
    for p, q in zip(names, g): np.testing.assert_allclose(p.grad, q, rtol=1e-3, atol=1e-6) # the mean over batches of eight is that of all
    (a, b), (da, db), s = [p.detach().numpy() for p in names], [q.numpy() for q in g], model.get_parameter('backbone.stem.1.weight').detach().numpy()
    forms = {'l1': (np.abs(a).sum((1, 2, 3)) + np.abs(s) + np.abs(b).sum((0, 2, 3)))/3, 'bn': np.abs(s),
             'taylor': (np.abs(a*da).sum((1, 2, 3)) + np.abs(b*db).sum((0, 2, 3)))/2}
    for kind, want in forms.items():
        net = P._Seen(model)
        graph = P._pruner(net, GREY, P.Cut(importance=kind), 0.).DG
        group = next(h for h in graph.get_all_groups(ignored_layers=[net.last], root_module_types=[nn.Conv2d]) if h[0].dep.target.module is model.backbone.stem[0])
        got = P.scorer(kind)(group).numpy()
        np.testing.assert_allclose(got, want/want.mean(), rtol=1e-3)
        small = P.prune(model, GREY, P.Cut(importance=kind), .5, 'backbone.stem.0')
        kept = np.sort(np.argsort(want)[4:])
        np.testing.assert_array_equal(small.get_parameter('backbone.stem.0.weight').detach(), a[kept])


def test_global_pruning_takes_the_least_important_channels_wherever_they_are():
    model = lively(TINY)
    with torch.no_grad(): # one layer's channels are all but nothing, half of them less than that
        for k in (0, 3): model.backbone.blocks[1].body[k].weight.div_(1e3)
    layer, everywhere = (P.prune(model, GREY, P.Cut(importance='l1', scope=s), .3) for s in P.SCOPES)
    assert len({len(m.weight)/len(w.weight) for m, w in zip(layer.backbone.blocks[1:], model.backbone.blocks[1:]) for m, w in ((m.body[0], w.body[0]),)}) == 1
    scores = []
    net = P._Seen(model)
    for g in P._pruner(net, GREY, P.Cut(importance='l1'), 0.).DG.get_all_groups(ignored_layers=[net.last], root_module_types=[nn.Conv2d, nn.Linear]): scores.append(P.scorer('l1')(g))
    bar = torch.cat(scores).sort().values[int(.3*sum(map(len, scores)))]
    names = {m: n for n, m in net.named_modules()}
    graph = P._pruner(net, GREY, P.Cut(importance='l1'), 0.).DG
    for g, s in zip(graph.get_all_groups(ignored_layers=[net.last], root_module_types=[nn.Conv2d, nn.Linear]), scores):
        left = everywhere.get_submodule(names[g[0].dep.target.module]).weight.shape[0]
        assert abs(left - max(8, int((s > bar).sum()))) <= 8


# ---- how much

def test_the_least_ratio_reaches_its_target_and_a_smaller_one_does_not():
    model, cut = lively(TINY), P.Cut(importance='l1')
    whole = P.size_of(model, GREY)
    small, ratio = P.least_ratio(model, GREY, cut, .4, whole)
    assert min(P.gone(small, GREY, whole).values()) >= .4 > min(P.gone(P.prune(model, GREY, cut, ratio - .01), GREY, whole).values())
    assert torch.equal(P.prune(model, GREY, cut, ratio)(pictures(GREY)), small(pictures(GREY)))


def test_steps_take_equal_parts_of_the_ratio():
    model, cut = lively(TINY), P.Cut(ratio=.5, importance='l1', steps=2)
    whole = P.size_of(model, GREY)
    half, r = P.next_cut(model, GREY, cut, 0, whole)
    full, q = P.next_cut(half, GREY, cut, 1, whole)
    assert (r, q) == (.25, pytest.approx(1/3)) and [len(m.backbone.blocks[2].body[0].weight) for m in (model, half, full)] == [256, 192, 128]
    assert isinstance(full.config, PrunedConfig) and dict(full.config.shapes)['backbone.blocks.2.body.0.weight'][0] == 128


# ---- saving and loading

@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path, P.prune(lively(TINY), GREY, P.Cut(importance='l1'), .4), GREY)
    return tmp_path


def spoil(folder, change): # the config as another program might have left it
    config = read_json(folder/'config.json')
    change(config['model'])
    write_json(folder/'config.json', config)


def test_a_truncated_file_is_refused(saved):
    (saved/'best.safetensors').write_bytes((saved/'best.safetensors').read_bytes()[:-100])
    with pytest.raises(FerError) as e: load_model(saved)
    assert e.value.code == 'hash_mismatch'
    config = read_json(saved/'config.json')
    write_json(saved/'config.json', config | {'weights_sha256': sha256_file(saved/'best.safetensors')})
    with pytest.raises(FerError) as e: load_model(saved)
    assert e.value.code == 'corrupt_artifact'


@pytest.mark.parametrize('change', [
    lambda m: m.pop('shapes'), lambda m: m['shapes'].pop(), lambda m: m['shapes'][0][1].__setitem__(0, 9999), lambda m: m['shapes'][0][1].__setitem__(0, 0), lambda m: m['shapes'][0][1].__setitem__(0, 7.5),
    lambda m: m['shapes'][0][1].pop(), lambda m: m['shapes'][0].__setitem__(0, 'backbone.none.weight'), lambda m: m['shapes'][0][1].__setitem__(-1, 1), lambda m: m['shapes'][0][1].__setitem__(0, m['shapes'][0][1][0] - 1)],
    ids=['no shapes', 'one missing', 'too wide', 'nothing', 'no integer', 'too few dimensions', 'no such tensor', 'another kernel', 'not the file\'s'])
def test_a_config_that_does_not_fit_its_file_is_refused(saved, change):
    spoil(saved, change)
    with pytest.raises(FerError) as e: load_model(saved)
    assert e.value.code == 'corrupt_artifact'


def test_layers_that_do_not_fit_each_other_are_refused(tmp_path):
    model = lively(TINY)
    odd = Classifier(PrunedConfig(**asdict(TINY), shapes=(('backbone.stem.0.weight', (4, 1, 3, 3)),))) # its reader still expects eight
    save_model(tmp_path, odd, GREY)
    with pytest.raises(FerError, match='do not fit each other') as e: load_model(tmp_path)
    assert e.value.code == 'corrupt_artifact' and len(model.backbone.stem[0].weight) == 8


def test_an_unpruned_config_is_as_it_was():
    assert 'shapes' not in asdict(TINY) and type(ModelConfig.from_dict(json.loads(json.dumps(asdict(TINY))))) is ModelConfig
    assert smaller(lively(TINY).state_dict(), lively(TINY).state_dict()) == ()


def test_a_pruned_network_takes_a_projector_and_puts_it_off():
    small = P.prune(lively(TINY), GREY, P.Cut(importance='l1'), .4)
    x, guessing = pictures(GREY), with_projector(small, 5)
    z, h = guessing.eval().regress(x)
    assert h.shape == (4, 5) and torch.equal(z, small(x)) and torch.equal(with_projector(guessing, 0).eval()(x), small(x))


# ---- runs

def test_a_prune_run_is_a_student_run(pruned, first, data):
    run, (metrics, history, networks) = pruned
    m, found = Run(run.folder).manifest, read_json(run.path('prune.json'))
    model, spec, _ = load_model(run.folder)
    whole = P.size_of(load_model(first)[0], spec)
    assert adopted_run(run.folder) == run.folder and started_from(run.folder) == 'random weights' and m.parameters['phase'] == 'prune' and m.parameters['size'] == 32
    assert m.compression['params'] == sum(p.numel() for p in model.parameters()) and m.compression['before'] == whole and min(m.compression['gone'].values()) >= .4
    assert [n['network'] for n in found['networks']] == ['unpruned', 'pruned 1', 'recovered 1'] and len(history) == QUICK.epochs
    sha = Run(data).manifest.dataset['sha256'] if (data/'run.json').is_file() else m.dataset['sha256']
    assert all((n['val_n'], n['test_n'], n['dataset']) == (21, 21, sha) for n in found['networks'])
    assert networks[0]['val_macro_f1'] == pytest.approx(read_json(first/'metrics.json')['val']['macro_f1']) # judged as it was
    z = np.load(run.path('logits.npz'))
    x, _, _ = next(Feeder(open_pack(data, spec)).batches(open_pack(data, spec).rows('test'), 32))
    np.testing.assert_allclose(z['test'], model(x).detach(), atol=1e-4)
    assert networks[-1]['test_macro_f1'] == metrics['test']['macro_f1'] and {'val', 'test', 'test_raw'} <= set(read_json(run.path('metrics.json')))


def test_its_gate_is_judged_on_validation_and_decides_what_stands(pruned, first, data):
    run, (metrics, _, networks) = pruned
    verdicts = {v['rule']: v for v in Run(run.folder).manifest.gates}
    drop = networks[0]['val_macro_f1'] - metrics['val']['macro_f1']
    assert verdicts['prune.params_cut']['value'] == pytest.approx(1 - networks[-1]['params']/networks[0]['params']) and verdicts['prune.params_cut']['passed'] and verdicts['prune.flops_cut']['passed']
    assert verdicts['prune.macro_f1_drop']['value'] == pytest.approx(drop) and verdicts['prune.macro_f1_drop']['split'] == 'val'
    assert not verdicts['prune.macro_f1_drop']['passed'] and 'at least 100' in verdicts['prune.macro_f1_drop']['reason'] # 21 faces prove nothing
    again = Run.create(first.parent/'strict', 'prune')
    P.prune_student(again, data, first, P.Cut(ratio=.2, importance='bn'), replace(QUICK, epochs=1), augment=STILL)
    told = again.manifest.reliability['adoption']
    assert not told['adopted'] and adopted_run(again.folder) == first and told['stands'] == first.name and 'n = 21' in str(again.manifest.gates) + told['reason']
    good = evaluate_gates({'prune.params_cut': .31, 'prune.flops_cut': .3, 'prune.macro_f1_drop': {'value': .0149, 'split': 'val', 'n': 3589}}, 'G-prune')
    assert all(v['passed'] for v in good)


def test_a_later_phase_and_another_cut_go_on_from_it(pruned, data):
    run, _ = pruned
    nl = Run.create(run.folder.parent/'nl', 'student', {'phase': 'nl'})
    train_student(nl, data, 'nl', ModelConfig(), GREY, replace(QUICK, epochs=1), before=run.folder, augment=STILL)
    model = load_model(run.folder)[0]
    assert load_model(nl.folder)[0].config == model.config
    ban = Run.create(run.folder.parent/'ban', 'student', {'phase': 'ban'})
    train_student(ban, data, 'ban', ModelConfig(), GREY, replace(QUICK, epochs=1), before=run.folder, augment=STILL)
    assert load_model(ban.folder)[0].config == model.config # a generation of the same narrow network, from new weights
    twice = Run.create(run.folder.parent/'twice', 'prune')
    P.prune_student(twice, data, run.folder, P.Cut(ratio=.3, importance='l1'), replace(QUICK, epochs=1), augment=STILL, keep=True)
    assert twice.manifest.compression['before']['params'] == run.manifest.compression['params'] > twice.manifest.compression['params']


def test_soft_labels_of_an_ensemble_teach_as_well(data, first, tmp_path):
    teacher = Run.create(tmp_path/'teacher', 'teacher')
    train_teacher(teacher, data, TINY, GREY, replace(QUICK, epochs=1), STILL)
    soft = Run.create(tmp_path/'soft', 'ensemble')
    export_softlabels(soft, data, [teacher.folder], fusion_of(teacher.folder)[0], views=2, augment=STILL)
    run = Run.create(tmp_path/'prune', 'prune')
    P.prune_student(run, data, first, P.Cut(ratio=.3, importance='l1'), replace(QUICK, epochs=1), softlabels=soft.folder, keep=True)
    assert run.manifest.parents['softlabels'].sha256 == sha256_file(soft.folder/'softlabels.npz')


def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(data, first, tmp_path):
    class Stop(Exception): pass
    def prune(run, stop=None):
        seen = []
        def show(history):
            seen.append(len(history))
            if len(seen) == stop: raise Stop
        return P.prune_student(run, data, first, P.Cut(ratio=.4, steps=2, faces=28), QUICK, keep=True, show=show)
    whole = Run.create(tmp_path/'whole', 'prune')
    prune(whole)
    broken = Run.create(tmp_path/'broken', 'prune')
    for stop in (1, 1, 1): # in the first step, between two, in the last
        with pytest.raises(Stop): prune(Run(broken.folder), stop)
    assert len(load_state(broken.path('last.ckpt'))['history']) == 1
    prune(Run(broken.folder))
    for name in ('best.safetensors', 'step_1/best.safetensors', 'pruned_1/pruned.safetensors', 'pruned_2/pruned.safetensors', 'metrics.json', 'prune.json'): assert sha256_file(whole.path(name)) == sha256_file(broken.path(name)), name


def test_the_scan_is_of_each_layer_alone(data, first, tmp_path):
    run = Run.create(tmp_path/'scan', 'prune')
    scan = P.scan_student(run, data, first, P.Cut(importance='l1'), [.5], 14)
    model, spec, _ = load_model(first)
    names = P.layers_of(model, spec)
    assert list(dict.fromkeys(scan['layer'])) == [n.removeprefix('backbone.') for n in names] and len(scan) == len(names) and (scan['n'] == 14).all()
    row = scan[(scan['layer'] == 'blocks.1.body.0') & (scan['share'] == .5)].iloc[0]
    w = model.backbone.blocks[1]
    per = sum(t[0].numel() for t in (w.body[0].weight, w.body[0].bias, w.body[1].weight, w.body[1].bias)) + w.body[3].weight[:, 0].numel() # what one channel is made of
    assert row['channels'] == len(w.body[0].weight) and row['params_gone'] == pytest.approx(row['channels']//2*per/sum(p.numel() for p in model.parameters()))
    run.path('scan.json').write_text(json.dumps([{'layer': 'x'}]))
    assert list(P.scan_student(run, data, first, P.Cut(), [.25])['layer']) == ['x'] # done is not done again
    assert len(P.scan_student(Run.create(tmp_path/'none', 'prune'), data, first, P.Cut(), [])) == 0


# ---- what is refused

@pytest.mark.parametrize('given', [{'importance': 'l2'}, {'scope': 'all'}, {'ratio': .8}, {'ratio': -.1}, {'target': 0.}, {'target': 1.}, {'most': 1.}, {'steps': 0}, {'round_to': 0}, {'faces': 0}])
def test_a_cut_that_is_none_is_refused(given):
    with pytest.raises(FerError) as e: P.Cut(**given)
    assert e.value.code == 'bad_parameter' and next(iter(given)) in str(e.value)


def test_what_cannot_be_cut_is_refused(data, first, tmp_path):
    model = lively(TINY)
    with pytest.raises(FerError, match='takes 90%'): P.least_ratio(model, GREY, P.Cut(importance='l1', most=.3), .9, P.size_of(model, GREY), 3)
    with pytest.raises(FerError, match='no channel'): P.next_cut(model, GREY, P.Cut(ratio=.001, importance='l1', round_to=64), 0, P.size_of(model, GREY))
    transformer = Classifier(ModelConfig('vit_tiny_patch16_224', options=(('img_size', 32), ('patch_size', 16), ('depth', 1)))).eval()
    with pytest.raises(FerError, match='convolutional') as e: P.prune(transformer, GREY, P.Cut(importance='l1'), .3)
    assert e.value.code == 'bad_parameter'
    run = Run.create(tmp_path/'run', 'prune')
    with pytest.raises(FerError, match='asked live'): P.prune_student(run, data, first, P.Cut(), QUICK, teaching='view')
    with pytest.raises(FerError, match="no 'beta'"): P.prune_student(run, data, first, P.Cut(), QUICK, loss={'beta': 1})
    with pytest.raises(FerError, match='scan'): P.scan_student(run, data, first, P.Cut(importance='l1'), [0.])


def test_taylor_reads_a_stratified_draw(data):
    pack = open_pack(data, GREY)
    assert np.bincount(pack.labels[stratified(pack, 28)], minlength=7).min() == 4


def test_the_plan_shares_its_parents_and_sweeps_the_ratio(root):
    from fer_core.runs.plan import read_plan
    steps, twin = ({s.name: s for s in read_plan(root/'papermill_runs'/f'{name}.yaml')} for name in ('prune_cpu', 'fer2013_cpu'))
    assert all(steps[k].given == twin[k].given for k in ('data', 'face', 'imagenet', 'ensemble', 'student_ce', 'student_kd', 'student_dkd')) # taken, not trained again
    assert {s.given['ratio'] for k, s in steps.items() if k.startswith('curve[')} == {.1, .2, .3, .4, .5} and steps['compress'].given['student'] == '@slim'

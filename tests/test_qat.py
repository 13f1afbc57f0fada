"""Quantisation-aware training: rounding as ONNX Runtime rounds, hooks that leave no trace, runs that stop and go on, what is refused."""
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fer_core.artifacts import FerError, Run, read_json, sha256_file, write_json
from fer_core.compress import qat as A
from fer_core.compress.export import export_onnx, onnx_logits
from fer_core.compress.quantize import quantize_static_int8
from fer_core.data.loader import Augment
from fer_core.data.preprocess import Preprocess
from fer_core.distill.student import adopted_run, train_student
from fer_core.models.backbones import Classifier, ModelConfig, load_model, save_model
from fer_core.train.average import Average
from fer_core.train.loop import TrainConfig, load_state

GREY, STILL = Preprocess(size=32, clahe=0), Augment(erase=0, rotate=0, scale=0, shift=0, contrast=0, light=0)
QUICK = TrainConfig(epochs=2, batch_size=8, lr=2e-4, ema=0.)
TINY = ModelConfig('resemotenet_c')


def pictures(n, side=24, seed=0): # smooth random pictures
    return nn.functional.interpolate(torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)), size=side, mode='bicubic').numpy()


def lively(model, x): # batch norms with statistics of x and factors of either sign
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, -1.5, 1.5); nn.init.normal_(m.bias); m.momentum = None
    with torch.no_grad(): model.train()(torch.as_tensor(x))
    return model.eval()


class Block(nn.Module):
    def __init__(self, n): super().__init__(); self.body = nn.Sequential(nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU(True), nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)); self.last = nn.ReLU(True)
    def forward(self, x): y = self.body(x); y += x; return self.last(y) # in place, as timm's blocks do


def little():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 12, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(12), nn.Hardswish(True), Block(12), nn.AvgPool2d(2),
                        nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.add_module('head', nn.Linear(16, 7))
    return net


@pytest.fixture(scope='module')
def small(tmp_path_factory): # -> network, inputs, float file, INT8 file
    torch.set_num_threads(1)
    x, at = pictures(160), tmp_path_factory.mktemp('onnx')
    net = lively(little(), x)
    fp32 = export_onnx(net, at/'fp32.onnx', Preprocess(size=24))
    return net, x, fp32, quantize_static_int8(fp32, at/'int8.onnx', x)


@pytest.fixture(scope='module')
def first(data, tmp_path_factory): # a student that INT8 breaks: one channel so loud that the others round to nothing
    run = Run.create(tmp_path_factory.mktemp('runs')/'ce', 'student', {'phase': 'ce'})
    train_student(run, data, 'ce', TINY, GREY, replace(QUICK, epochs=6, batch_size=8, lr=4e-3), augment=STILL)
    model, spec, _ = load_model(run.folder)
    s = model.backbone.stem
    with torch.no_grad():
        for bn, reader in ((s[1], s[5]), (s[6], s[10])): bn.weight[0] *= 1000; bn.bias[0] *= 1000; reader.weight[:, 0] /= 1000
    save_model(run.folder, model, spec)
    run.finish()
    return run.folder


@pytest.fixture(scope='module')
def trained(data, first): # a finished run
    run = Run.create(first.parent/'qat', 'qat')
    out = A.qat_student(run, data, first, QUICK, augment=STILL, faces=56, drop=-1)
    run.finish()
    return run, out


# ---- rounding

def test_weights_and_ranges_are_those_of_the_file(small):
    net, x, _, int8 = small
    graph = onnx.load(int8).graph
    held = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    theirs = sorted((float(held[n.input[1]]), int(held[n.input[2]])) for n in graph.node if n.op_type == 'QuantizeLinear')
    with A.fake_quantised(net, x) as quant: ours = sorted(A.grid(*v) for v in quant.ranges.values())
    theirs = [t for i, t in enumerate(theirs) if not i or abs(t[0] - theirs[i - 1][0]) > 1e-6] # pools and reshapes repeat those of their input
    ours = [t for i, t in enumerate(ours) if not i or abs(t[0] - ours[i - 1][0]) > 1e-6]
    assert len(ours) == len(theirs) >= 7 and [z for _, z in ours] == [z for _, z in theirs]
    np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in theirs], rtol=1e-5)
    stored = [held[n.input[0]].astype(float)*held[n.input[1]].reshape(-1, *[1]*(held[n.input[0]].ndim - 1)) for n in graph.node if n.op_type == 'DequantizeLinear' and n.input[0] in held and held[n.input[0]].dtype == np.int8]
    convs = [(net[0], net[1]), (net[3].body[0], net[3].body[1]), (net[3].body[3], net[3].body[4]), (net[5], net[6])]
    for conv, bn in convs: # folded, then rounded, as the file has it
        w = A.round_weights(conv.weight)*(bn.weight/(bn.running_var + bn.eps).sqrt())[:, None, None, None]
        assert min(np.abs(w.detach().numpy() - t).max() for t in stored if t.shape == tuple(w.shape)) < 1e-5
    head = A.round_weights(net.head.weight).detach().numpy()
    assert min(min(np.abs(head - u).max() for u in (t, t.T) if u.shape == head.shape) for t in stored if head.shape in (t.shape, t.T.shape)) < 1e-6


def test_logits_are_those_of_onnxruntime(small):
    net, x, fp32, int8 = small
    fresh = pictures(64, seed=1)
    with A.fake_quantised(net, x): ours = net(torch.as_tensor(fresh)).detach().numpy()
    theirs, plain = onnx_logits(int8, fresh), onnx_logits(fp32, fresh)
    assert np.abs(ours - theirs).mean() < .6*np.abs(theirs - plain).mean() # biases of 32 bits tip values to the next step, 0.1 % a layer, and these tip others


def test_an_activation_rounds_as_quantizelinear_does():
    import onnxruntime as ort
    from fer_core.compat import session_options
    h = onnx.helper
    x = np.concatenate([np.random.default_rng(0).normal(0, 2, 5000), np.arange(-300, 300)*.0125]).astype(np.float32)
    for low, high in ((-1.3, 2.7), (0., 6.), (.5, 2.), (-3., -.1), (0., 0.)):
        s, z = A.grid(low, high)
        consts = [onnx.numpy_helper.from_array(np.float32(s), 's'), onnx.numpy_helper.from_array(np.uint8(z), 'z')]
        graph = h.make_graph([h.make_node('QuantizeLinear', ['x', 's', 'z'], ['q']), h.make_node('DequantizeLinear', ['q', 's', 'z'], ['y'])], 'g', [h.make_tensor_value_info('x', 1, [None])], [h.make_tensor_value_info('y', 1, [None])], consts)
        session = ort.InferenceSession(h.make_model(graph, opset_imports=[h.make_opsetid('', 20)], ir_version=10).SerializeToString(), session_options(), providers=['CPUExecutionProvider'])
        y, ours = session.run(None, {'x': x})[0], A.round_activation(torch.as_tensor(x), low, high).numpy()
        off = np.abs(y - ours) > 1e-5
        assert off.mean() < .002 and np.abs(y - ours).max() <= s*1.001 # ties alone may fall to the other side
        assert 0 <= z <= 255 and A.round_activation(torch.zeros(1), low, high).item() == 0 # zero stays zero


def test_gradients_pass_in_range_and_stop_outside():
    x = torch.tensor([-5., -1., 0., .3, 1.9, 2.5, 40.], requires_grad=True)
    A.round_activation(x, -1., 2.).mul(torch.arange(1., 8.)).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 0]
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    A.round_weights(w).sum().backward()
    assert (w.grad == 1).all() and all(len(r.unique()) <= 255 for r in A.round_weights(w))
    assert torch.equal(A.round_weights(torch.zeros(2, 3)), torch.zeros(2, 3))


# ---- hooks

def test_nothing_is_left_of_the_rounding(small):
    net, x, _, _ = small
    t, names, before = torch.as_tensor(x[:8]), list(net.state_dict()), {k: v.clone() for k, v in net.state_dict().items()}
    want = net(t)
    with A.fake_quantised(net, x):
        assert not torch.equal(net(t), want) and list(net.state_dict()) == names and [n for n, _ in net.named_parameters()] == [n for n in names if 'running' not in n and 'num_b' not in n]
        with pytest.raises(RuntimeError): net(torch.zeros(1, 3, 24, 24)) # a pass that fails in a layer
        assert 'weight' not in vars(net[0])
        net.train()(t) # training mode leaves the statistics where they are
    net.eval()
    assert torch.equal(net(t), want) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(KeyError), A.fake_quantised(net, x): raise KeyError
    assert torch.equal(net(t), want)


def test_a_training_step_moves_all_weights_and_an_average_rounds_its_own(small):
    net, x, _, _ = small
    net, t = deepcopy(net), torch.as_tensor(x[:16])
    with A.fake_quantised(net, x):
        average = Average(net, TrainConfig(ema=.5))
        net.train()(t).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        with torch.no_grad():
            for p in net.parameters(): p.mul_(1.1)
        copy = average.judged(0)
        rounded = copy(t)
        plain = little().eval()
        plain.load_state_dict(copy.state_dict())
        assert not torch.equal(rounded, plain(t)) and (rounded - plain(t)).abs().mean() < (rounded - net.eval()(t)).abs().mean() # rounded, and its own weights
    assert torch.equal(copy(t), plain(t)) # the copy is plain as well from here on


def test_every_layer_of_a_backbone_is_rounded_in_training_as_in_evaluation():
    from fer_core.models.speed import fast_training
    torch.manual_seed(0)
    model, x = Classifier(ModelConfig('mobilenetv3_small_050', output_stride=16)), pictures(24, 32)
    lively(model, x)
    t = torch.as_tensor(x)
    with A.fake_quantised(model, x), torch.no_grad(): want = model.eval()(t)
    with A.fake_quantised(model, x), fast_training(model, '32-true', 'cpu') as eased:
        got = model.train()(t) # eased convolutions, frozen statistics, no dropout in it
    assert eased > 0 and not torch.equal(want, model.eval()(t))
    near = (got - want).abs().mean() # other kernels add in another order: some values fall to the other side
    assert near < .7*(model(t) - want).abs().mean() + 1e-6


# ---- runs

def test_a_qat_run_is_a_student_run_and_better_in_int8(trained, first, data):
    run, (rows, history) = trained
    m, found = Run(run.folder).manifest, read_json(run.path('qat.json'))
    model, spec, _ = load_model(run.folder)
    f1 = {(r['network'], r['precision']): r['val_macro_f1'] for r in rows}
    assert list(f1) == [('before', 'float'), ('before', 'INT8'), ('after', 'float'), ('after', 'INT8')] and len(history) == QUICK.epochs
    assert f1['before', 'float'] - f1['before', 'INT8'] > .015 # the reason why
    told = m.reliability['adoption']
    assert told['adopted'] == (f1['after', 'INT8'] > f1['before', 'INT8']) and told['adopted'] and adopted_run(run.folder) == run.folder
    assert m.parameters['phase'] == 'qat' and m.parameters['size'] == 32 and found['lost'] == pytest.approx(f1['before', 'float'] - f1['before', 'INT8'])
    assert list(model.state_dict()) == list(load_model(first)[0].state_dict()) and m.parents['before'].sha256 == sha256_file(first/'best.safetensors')
    whole, now = load_model(first)[0].state_dict(), model.state_dict()
    assert all(torch.equal(whole[k], now[k]) for k in whole if 'running' in k) and not torch.equal(whole['head.weight'], now['head.weight'])
    assert read_json(run.path('metrics.json'))['val']['macro_f1'] == f1['after', 'float'] and m.metrics['after, INT8/val'].macro_f1 == f1['after', 'INT8']


def test_what_compresses_takes_it(trained, data, tmp_path, monkeypatch):
    from fer_core.compress import release
    monkeypatch.setattr(release, 'compare', lambda files, threads: {v: {'p50_ms': 1., 'p95_ms': 1., 'threads': threads} for v in files}) # the clock is not what is asked
    run, (rows, _) = trained
    released = Run.create(tmp_path/'compress', 'compress')
    facts = release.compress_student(released, data, run.folder, run.folder, faces=56, threads=1)
    assert released.manifest.parents['student'].sha256 == sha256_file(run.path('best.safetensors'))
    scaled = read_json(released.path('calibration.json'))['int8']['scaling']['method']
    if scaled == 'temperature': assert facts['variants']['int8']['macro_f1'] == pytest.approx(rows[-1]['test_macro_f1']) # one way to make a file


def test_a_student_that_int8_does_not_hurt_is_left_alone(trained, data, first, tmp_path):
    run = Run.create(tmp_path/'qat', 'qat')
    write_json(run.path('before.json'), read_json(trained[0].path('before.json'))) # judged already
    rows, history = A.qat_student(run, data, first, QUICK, augment=STILL, faces=56, drop=1.)
    told = run.manifest.reliability['adoption']
    assert history == [] and len(rows) == 2 and not told['adopted'] and 'not trained' in told['reason'] and adopted_run(run.folder) == first and not run.path('best.safetensors').is_file()


def test_a_worse_one_does_not_stand(data, first, tmp_path, monkeypatch):
    run, given = Run.create(tmp_path/'qat', 'qat'), iter((.6, .6))
    real = A._judged
    monkeypatch.setattr(A, 'judge_int8', lambda model, feed, drawn, method: (lambda m, f: {s: v | {'macro_f1': f} for s, v in m.items()})(real(model, feed), next(given)))
    A.qat_student(run, data, first, replace(QUICK, epochs=1), augment=STILL, faces=56, drop=-1)
    told = run.manifest.reliability['adoption']
    assert not told['adopted'] and 'must be higher' in told['reason'] and told['stands'] == first.name and adopted_run(run.folder) == first


def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(trained, data, first, tmp_path, monkeypatch):
    class Stop(Exception): pass
    def stop(history): raise Stop
    run, judged = Run.create(tmp_path/'broken', 'qat'), []
    before = read_json(trained[0].path('before.json'))
    monkeypatch.setattr(A, 'judge_int8', lambda model, feed, drawn, method: judged.append(1) or before['before, INT8'])
    with pytest.raises(Stop): A.qat_student(run, data, first, QUICK, augment=STILL, faces=56, drop=-1, show=stop)
    assert len(load_state(run.path('last.ckpt'))['history']) == 1
    A.qat_student(Run(run.folder), data, first, QUICK, augment=STILL, faces=56, drop=-1)
    for name in ('best.safetensors', 'metrics.json'): assert sha256_file(run.path(name)) == sha256_file(trained[0].path(name)), name
    assert len(judged) == 2 and read_json(run.path('before.json')) == before # what was done is not done again


# ---- what is refused

@pytest.mark.parametrize('cfg, given, says', [
    (QUICK, {'method': 'median'}, 'median'), (QUICK, {'faces': 0}, 'faces=0'), (QUICK, {'drop': 1.5}, 'drop=1.5'), (replace(QUICK, swa=.2), {}, 'swa'),
    (QUICK, {'loss': {'beta': 1}}, 'beta'), (QUICK, {'teaching': 'view'}, 'asked live')], ids=lambda v: v if isinstance(v, str) else '')
def test_what_makes_no_sense_is_refused(cfg, given, says, data, first, tmp_path):
    with pytest.raises(FerError, match=says) as e: A.qat_student(Run.create(tmp_path/'qat', 'qat'), data, first, cfg, **given)
    assert e.value.code == 'bad_parameter'


def test_ranges_need_faces_and_finite_weights(small):
    net, x, _, _ = small
    with pytest.raises(FerError, match='no inputs'), A.fake_quantised(net, x[:0]): pass
    broken = deepcopy(net)
    with torch.no_grad(): broken[3].body[0].weight[0, 0, 0, 0] = float('inf')
    with pytest.raises(FerError, match='range of') as e, A.fake_quantised(broken, x): pass
    assert e.value.code == 'nan_loss'


def test_the_stage_has_its_parameters_and_its_place():
    from fer_core.runs.stage import STAGES, parameters, resolve
    given = parameters('qat')
    assert STAGES.index('prune') < STAGES.index('qat') < STAGES.index('compress') and given['drop'] == {'type': 'float', 'default': A.DROP, 'help': given['drop']['help'], 'choices': []} and given['method']['choices'] == ['minmax', 'percentile', 'entropy']
    assert all(v['help'] for v in given.values()) and resolve('qat', {'epochs': '2'})['epochs'] == 2 and 'swa' not in given

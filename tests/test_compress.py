"""Export, quantisation and latency: parity on a real backbone, metadata that survive, files that fail well."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fer_core.artifacts import FerError, sha256_file
from fer_core.compress import quantize as Q
from fer_core.compress.export import METADATA, export_onnx, onnx_logits, parity, read_metadata, torch_logits, write_metadata
from fer_core.compress.latency import cold_start, compare, latency, time_calls
from fer_core.data.preprocess import Preprocess, normalise, standardise
from fer_core.labels import CLASSES
from fer_core.models.heads import ArcFaceHead


def pictures(n, side=48, channels=1, seed=0): # smooth random pictures with a little noise
    g = torch.Generator().manual_seed(seed)
    x = nn.functional.interpolate(torch.randn(n, channels, 7, 7, generator=g), size=side, mode='bicubic')
    return (x + .2*torch.randn(n, channels, side, side, generator=g)).numpy()


def spread(model, x): # random weights answer everything with one class: give each logit mean 0 and spread 1 on x
    z = torch.as_tensor(torch_logits(model, x))
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.sub_(z.mean(0)).div_(z.std(0))
        last.weight.div_(z.std(0)[:, None])
    return model


class Excite(nn.Module):
    def __init__(self, n): super().__init__(); self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, 8, 1), nn.ReLU(), nn.Conv2d(8, n, 1), nn.Hardsigmoid())
    def forward(self, x): return x*self.gate(x)


def little(channels=1, head=None): # what MobileNetV3 is made of, small
    conv = lambda i, o, **kw: [nn.Conv2d(i, o, bias=False, **kw), nn.BatchNorm2d(o), nn.Hardswish()]
    torch.manual_seed(0)
    return nn.Sequential(*conv(channels, 16, kernel_size=3, stride=2, padding=1), *conv(16, 16, kernel_size=3, stride=2, padding=1, groups=16), Excite(16),
                         *conv(16, 32, kernel_size=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head or nn.Linear(32, 7))


@pytest.fixture(scope='module')
def files(tmp_path_factory): # -> (folder, model, spec, float file, INT8 file, calibration inputs)
    folder, spec, x = tmp_path_factory.mktemp('onnx'), Preprocess(size=48), pictures(128)
    model = spread(little(), x)
    fp32 = export_onnx(model, folder/'student.onnx', spec, temperature=1.7, threshold=.4, licence='test', run_id='run', weights_sha256='ab'*32)
    return folder, model, spec, fp32, Q.quantize_static_int8(fp32, folder/'student_int8.onnx', x), x


@pytest.fixture(scope='module')
def mobilenet(tmp_path_factory):
    from fer_core.compat import mend_torchvision
    mend_torchvision()
    import timm
    torch.manual_seed(0)
    net, x = timm.create_model('mobilenetv3_large_100', num_classes=7, in_chans=1), torch.as_tensor(pictures(64))
    with torch.no_grad(): net.train()(x)
    spread(net.eval(), pictures(64))
    return net, export_onnx(net, tmp_path_factory.mktemp('mobilenet')/'student.onnx', Preprocess(size=48))


# ---- export

def test_mobilenet_parity_at_every_batch(mobilenet):
    net, path = mobilenet
    x = pictures(300, seed=1)
    found = parity(path, net, x)
    assert found['n'] == 300 and found['top1_agreement'] >= .99 and found['max_abs_logit'] < 1e-3
    assert len(np.unique(torch_logits(net, x).argmax(1))) > 3  # agreement means something: several classes are given
    want = torch_logits(net, x[:5])
    for batch in (1, 2, 5): np.testing.assert_allclose(onnx_logits(path, x[:5], batch=batch, threads=1), want, atol=1e-3)


def test_mobilenet_pools_globally(mobilenet):
    types = [n.op_type for n in onnx.load(mobilenet[1]).graph.node]
    assert types.count('GlobalAveragePool') == 9 and 'ReduceMean' not in types and 'BatchNormalization' not in types


@pytest.mark.parametrize('colour', ['grey', 'rgb'])
def test_arcface_classifier_exports_and_quantises(tmp_path, colour):
    spec = Preprocess(size=32, colour=colour)
    model, x = little(spec.channels, ArcFaceHead(32, 7)), pictures(96, 32, spec.channels)
    path = export_onnx(model, tmp_path/'a.onnx', spec)
    assert parity(path, model, x)['max_abs_logit'] < 1e-4 and read_metadata(path)['colour_order'] == ('grey' if colour == 'grey' else 'RGB')
    int8 = onnx_logits(Q.quantize_static_int8(path, tmp_path/'b.onnx', x), x)
    assert np.abs(int8 - onnx_logits(path, x)).max() < 3  # of a range of ±30


def test_a_mean_that_is_no_pooling_stays(tmp_path):
    class Means(nn.Module):
        def forward(self, x): return x.mean((1, 2))[:, :7] + x.mean((2, 3)) # over channels and rows: no pooling; and one that drops its axes
    path = export_onnx(Means(), tmp_path/'m.onnx', Preprocess(size=16))
    assert 'GlobalAveragePool' not in [n.op_type for n in onnx.load(path).graph.node]
    assert parity(path, Means(), pictures(8, 16))['max_abs_logit'] < 1e-5


def test_the_model_comes_back_as_it_was(files, tmp_path):
    model = little()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, tmp_path/'x.onnx', Preprocess(size=48))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_of_this_machine_is_in_the_files(files):
    for path in files[3:5]:
        content = path.read_bytes()
        assert not [w for w in (str(os.getcwd()), 'site-packages', 'stack_trace', 'test_compress', sys.prefix) if w.encode() in content]


def test_export_is_quiet(files, capfd, tmp_path):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        path = export_onnx(files[1], tmp_path/'quiet.onnx', files[2])
        Q.quantize_static_int8(path, tmp_path/'q.onnx', files[5][:40], method='entropy')
    out, err = capfd.readouterr()
    assert out == '' and err == ''


def test_equal_models_give_equal_bytes(files, tmp_path):
    again = export_onnx(files[1], tmp_path/'again.onnx', files[2], temperature=1.7, threshold=.4, licence='test', run_id='run', weights_sha256='ab'*32)
    assert sha256_file(again) == sha256_file(files[3])


def test_a_failed_export_leaves_the_old_file(files, tmp_path):
    path = export_onnx(files[1], tmp_path/'s.onnx', files[2])
    before = path.read_bytes()
    with pytest.raises(FerError): export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(48*48, 8)), path, files[2])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['s.onnx']


# ---- metadata

def test_metadata_hold_the_contract(files):
    for path, precision in ((files[3], 'fp32'), (files[4], 'int8')):
        raw = {p.key: p.value for p in onnx.load(path).metadata_props}
        assert set(raw) <= set(METADATA) and raw['format'] == 'fer_core/1' and json.loads(raw['class_order']) == list(CLASSES)
        assert Preprocess.from_dict(json.loads(raw['preprocess'])) == files[2]
        assert (raw['input_size'], raw['colour_order'], float(raw['mean']), float(raw['std']), float(raw['clahe'])) == ('48', 'grey', .5, .25, 2)
        assert (raw['licence'], raw['run_id'], raw['weights_sha256'], raw['precision']) == ('test', 'run', 'ab'*32, precision)
        told = read_metadata(path)
        assert (told['temperature'], told['abstention_threshold'], told['preprocess'], told['class_order']) == (1.7, .4, files[2], CLASSES)


def test_recogniser_reads_both_files(files):
    from fer_core.live.recognise import Recognizer
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, 256, (60, 50), dtype=np.uint8) for _ in range(4)]
    a, b = (Recognizer(p).classify(crops) for p in files[3:5])
    assert a.shape == (4, 7) and np.allclose(a.sum(1), 1, atol=1e-5) and np.abs(a - b).max() < .15


def test_refitting_changes_metadata_only(files, tmp_path):
    path = tmp_path/'refit.onnx'
    path.write_bytes(files[4].read_bytes())
    before = onnx_logits(path, files[5][:9], threads=1)
    assert write_metadata(path, temperature='2.5', run_id='later')['temperature'] == 2.5
    assert np.array_equal(onnx_logits(path, files[5][:9], threads=1), before)
    told = read_metadata(path)
    assert (told['temperature'], told['run_id'], told['precision'], told['licence']) == (2.5, 'later', 'int8', 'test')


@pytest.mark.parametrize('change', [{'temperature': 'nan'}, {'temperature': -1}, {'abstention_threshold': 1.5}, {'preprocess': '{}'}, {'precission': 'int8'}])
def test_wrong_changes_are_refused_and_leave_the_file(files, change):
    before = files[3].read_bytes()
    with pytest.raises(FerError) as e: write_metadata(files[3], **change)
    assert e.value.code == 'bad_parameter' and files[3].read_bytes() == before


def test_broken_files_say_so(files, tmp_path):
    cut, foreign = tmp_path/'cut.onnx', tmp_path/'foreign.onnx'
    cut.write_bytes(files[3].read_bytes()[:2000])
    proto = onnx.load(files[3])
    proto.ClearField('metadata_props')
    onnx.save(proto, foreign)
    onnx.helper.set_model_props(proto, {p.key: p.value for p in onnx.load(files[3]).metadata_props} | {'class_order': json.dumps(sorted(CLASSES))})
    onnx.save(proto, tmp_path/'order.onnx')
    for path, code in ((tmp_path/'none.onnx', 'missing_checkpoint'), (cut, 'corrupt_artifact'), (foreign, 'corrupt_artifact'), (tmp_path/'order.onnx', 'class_order_mismatch')):
        with pytest.raises(FerError) as e: read_metadata(path)
        assert e.value.code == code and path.name in str(e.value)
    for path in (tmp_path/'none.onnx', cut):
        with pytest.raises(FerError) as e: onnx_logits(path, files[5][:2])
        assert path.name in str(e.value)


# ---- quantisation

@pytest.mark.parametrize('method', list(Q.METHODS))
def test_int8_stays_close(files, tmp_path, method):
    folder, model, spec, fp32, _, x = files
    z, q = (onnx_logits(p, pictures(400, seed=5)) for p in (fp32, Q.quantize_static_int8(fp32, tmp_path/'q.onnx', x, method=method)))
    top = np.sort(z, 1)
    sure = top[:, -1] - top[:, -2] > .7  # random weights give many near ties, which say nothing
    assert sure.sum() > 50 and (z.argmax(1) == q.argmax(1))[sure].mean() > .97 and np.corrcoef(z.ravel(), q.ravel())[0, 1] > .97
    assert not np.array_equal(z, q)


def test_int8_holds_8_bit_weights_and_is_smaller(mobilenet, tmp_path):
    path = Q.quantize_static_int8(mobilenet[1], tmp_path/'q.onnx', pictures(32))
    weights = onnx.load(path).graph.initializer
    held = sum(np.prod(w.dims) for w in weights if w.data_type == onnx.TensorProto.INT8)
    assert held > 4e6 and path.stat().st_size < mobilenet[1].stat().st_size/3
    scales = {w.name: w for w in weights if w.data_type == onnx.TensorProto.FLOAT}
    assert any(s.dims and s.dims[0] == 960 for s in scales.values())  # per channel


def test_8_bit_products_are_added_exactly_on_every_cpu(tmp_path):
    """255 x 127, a row long: an x86 CPU without VNNI saturates there unless it is told not to."""
    from onnx import TensorProto as T, helper as h, numpy_helper as nh
    from fer_core.compress.export import open_onnx
    from fer_core.live.recognise import open_session
    weights = np.resize(np.array([127, -127], np.int8), 8)[None].repeat(64, 0)
    graph = h.make_graph([h.make_node('MatMulInteger', ['input', 'w'], ['logits'])], 'worst', [h.make_tensor_value_info('input', T.UINT8, ['n', 64])],
                         [h.make_tensor_value_info('logits', T.INT32, ['n', 8])], [nh.from_array(weights, 'w')])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid('', 17)], ir_version=8), tmp_path/'worst.onnx')
    a = np.full((3, 64), 255, np.uint8)
    for session in (open_onnx(tmp_path/'worst.onnx', 1), open_session((tmp_path/'worst.onnx').read_bytes(), 'worst.onnx', 1)):
        assert np.array_equal(session.run(None, {'input': a})[0], a.astype(int) @ weights.astype(int))


def test_the_released_student_gives_what_its_integers_say():
    """The fused 8-bit graph against the same graph run literally, roundings in float arithmetic."""
    import onnxruntime as ort
    from fer_core.compat import session_options
    from fer_core.data.synthetic import make_face
    from fer_core.live.recognise import Recognizer, read_model
    ours, literal = Recognizer(), session_options(1)
    literal.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    faces = [make_face(CLASSES[i % 7], seed=i) for i in range(35)]
    x = np.stack([normalise(standardise(f, ours.spec), ours.spec) for f in faces])
    want = ort.InferenceSession(read_model()[0], literal, providers=['CPUExecutionProvider']).run(['logits'], {'input': x})[0]
    assert np.abs(ours.logits(faces) - want).max() < .1 < want.std()


def test_logits_are_not_rounded(files):
    assert {n.op_type for n in onnx.load(files[4]).graph.node if 'logits' in n.output} == {'Gemm'}
    z = onnx_logits(files[4], pictures(400, seed=5))
    assert max(len(np.unique(z[:, k])) for k in range(7)) > 300  # 256 steps would give 256 values at most


def test_excluded_nodes_stay_float(files, tmp_path):
    fp32, x = files[3], files[5]
    graph = onnx.load(Q.quantize_static_int8(fp32, tmp_path/'q.onnx', x, exclude=('Gemm',))).graph
    made = {o: n.op_type for n in graph.node for o in n.output}
    assert [made.get(i, 'weights') for n in graph.node if n.op_type == 'Gemm' for i in n.input][1:] == ['weights', 'weights']
    none = onnx.load(Q.quantize_static_int8(fp32, tmp_path/'all.onnx', x, exclude=sorted({n.op_type for n in onnx.load(fp32).graph.node}))).graph
    assert not [n for n in none.node if n.op_type == 'QuantizeLinear']
    assert read_metadata(tmp_path/'q.onnx')['float_nodes'].startswith('node_')


class Planted(nn.Module):
    "One unit of the last layer's input is a thousand times larger and ignored: its range ruins the rounding of the others."
    def __init__(self):
        super().__init__()
        self.body, self.wide, self.last = little(head=nn.Identity()), nn.Linear(32, 33), nn.Linear(33, 7)
        with torch.no_grad(): self.wide.weight[32], self.last.weight[:, 32] = 3000*self.wide.weight[0], 0.

    def forward(self, x): return self.last(self.wide(self.body(x)))


def test_sensitive_nodes_find_a_planted_outlier(tmp_path):
    torch.manual_seed(0)
    net, x = Planted(), pictures(64, 32)
    fp32 = export_onnx(net, tmp_path/'f.onnx', Preprocess(size=32))
    int8 = Q.quantize_static_int8(fp32, tmp_path/'q.onnx', x)
    worst = Q.sensitive_nodes(int8, fp32, x)
    assert worst[0]['type'] == 'Gemm' and worst[0]['nodes'] == ['node_linear', 'node_linear_1'] and worst[0]['gain'] > .5
    shift = lambda p: np.abs(onnx_logits(p, x) - onnx_logits(fp32, x)).mean()
    assert shift(Q.quantize_static_int8(fp32, tmp_path/'k.onnx', x, exclude=worst[0]['nodes'])) < .5*shift(int8)


def test_only_what_must_stays_float(tmp_path):
    """The planted unit ruins INT8 until its one place stays float; a model that answers alike at once is left alone."""
    torch.manual_seed(0)
    x = pictures(64, 32)
    fp32 = export_onnx(spread(Planted(), x), tmp_path/'f.onnx', Preprocess(size=32))
    nodes, tries = Q.choose_float(fp32, x, agreement=1., most=3)
    assert tries[0]['agreement'] < .9 and nodes and set(nodes) >= {'node_linear', 'node_linear_1'}
    best = max(t['agreement'] for t in tries)
    z = onnx_logits(Q.quantize_static_int8(fp32, tmp_path/'k.onnx', x, exclude=nodes), x)
    assert (z.argmax(1) == onnx_logits(fp32, x).argmax(1)).mean() == best > tries[0]['agreement']
    assert Q.choose_float(fp32, x, agreement=0., most=3)[0] == []


def test_half_and_dynamic_files_answer_as_the_float_one(files, tmp_path):
    *_, fp32, _, x = files
    want = onnx_logits(fp32, x)
    for make, name, close in ((Q.to_float16, 'fp16', .03), (Q.quantize_dynamic_int8, 'int8_dynamic', .1)):
        path = make(fp32, tmp_path/f'{name}.onnx')
        told = read_metadata(path)
        assert told['precision'] == name and told['temperature'] == read_metadata(fp32)['temperature'] and told['preprocess'] == read_metadata(fp32)['preprocess']
        assert 0 < np.abs(onnx_logits(path, x) - want).max() < close*np.abs(want).max()
    assert {w.data_type for w in onnx.load(tmp_path/'fp16.onnx').graph.initializer if len(w.dims) == 4} == {onnx.TensorProto.FLOAT16}


def test_calibration_memory_is_bounded(files, tmp_path, monkeypatch):
    "Entropy calibration keeps the intermediate maps of one batch, whatever the number of faces."
    from onnxruntime.quantization import calibrate
    held, collect = [], calibrate.HistogramCollector.collect
    monkeypatch.setattr(calibrate.HistogramCollector, 'collect', lambda self, maps: (held.append(max(sum(len(a) for a in v) for v in maps.values())), collect(self, maps))[1])
    Q.quantize_static_int8(files[3], tmp_path/'q.onnx', files[5][:100], method='entropy', batch=16)
    assert held == [16]*6 + [4]


def test_quantising_does_not_depend_on_hash_order(files, tmp_path):
    "The same bytes from processes with other string hashes."
    np.save(tmp_path/'x.npy', files[5][:32])
    code = 'import sys, numpy as np; from fer_core.compress.quantize import quantize_static_int8 as q; q(sys.argv[1], sys.argv[3], np.load(sys.argv[2]))'
    digests = set()
    for seed in '12':
        subprocess.run([sys.executable, '-W', 'ignore', '-c', code, files[3], tmp_path/'x.npy', tmp_path/f'{seed}.onnx'], check=True, env=os.environ | {'PYTHONHASHSEED': seed}, timeout=300)
        digests.add(sha256_file(tmp_path/f'{seed}.onnx'))
    assert len(digests) == 1


@pytest.mark.parametrize('inputs, more', [
    (pictures(4, 32), {}), (pictures(4, 48, 3), {}), (pictures(0), {}), (np.full((2, 1, 48, 48), np.nan, np.float32), {}),
    (pictures(4), {'method': 'kl'}), (pictures(4), {'exclude': ['no_such_node']})])
def test_wrong_calibration_is_refused(files, tmp_path, inputs, more):
    with pytest.raises(FerError) as e: Q.quantize_static_int8(files[3], tmp_path/'q.onnx', inputs, **more)
    assert e.value.code == 'bad_parameter' and not (tmp_path/'q.onnx').exists()


# ---- latency

def test_turns_are_fair():
    "Every model runs once a round, each is first equally often."
    order = []
    ms = time_calls({k: (lambda k=k: order.append(k)) for k in 'abc'}, n_warmup=3, n_timed=6)
    rounds = [order[i:i + 3] for i in range(0, 27, 3)]
    assert all(sorted(r) == list('abc') for r in rounds) and all(sum(r[0] == k for r in rounds) == 3 for k in 'abc')
    assert all(v.shape == (6,) and (v >= 0).all() for v in ms.values())


def test_compare_and_latency_report_the_protocol(files):
    rows = compare({'fp32': files[3], 'int8': files[4]}, n_warmup=2, n_timed=30, threads=1)
    for row in rows.values():
        assert row['samples_ms'].shape == (30,) and row['threads'] == 1 and row['batch'] == 1 and row['provider'] == 'CPUExecutionProvider' and row['n_timed'] == 30
        assert 0 < row['p50_ms'] <= row['p95_ms'] <= row['p99_ms'] <= row['samples_ms'].max() and row['cold_ms'] > 0
        assert row['p50_ms'] == np.median(row['samples_ms'])
    assert [r['threads'] for r in latency(files[3], n_warmup=1, n_timed=5, threads=(1, 2)).values()] == [1, 2]
    assert latency(files[3], n_warmup=1, n_timed=5, threads=(1,), batch=4)[1]['batch'] == 4


def test_peak_memory_is_the_model_process_own(files):
    "Not this process's, which holds torch and a large array."
    hoard = np.ones(40_000_000)  # 320 MB
    assert 10 < cold_start(files[3], 1)['peak_rss_mb'] < 200
    assert hoard.all()


def test_wrong_latency_calls_fail_well(files, tmp_path):
    for call in (lambda: latency(tmp_path/'none.onnx'), lambda: latency(files[3], provider='NoExecutionProvider'), lambda: latency(files[3], n_timed=0), lambda: compare({})):
        with pytest.raises(FerError): call()


# ---- calibration beyond a temperature

def by_class():
    from fer_core.evaluate.scaling import Scaling
    return Scaling('vector', tuple(np.linspace(.4, 1.2, 7).tolist()), tuple(np.linspace(-1, 1, 7).tolist()))


def by_answer():
    from fer_core.evaluate.answer import AnswerScaling
    return AnswerScaling(1.3, .8, tuple(np.linspace(-2, 1, 7).tolist()))


@pytest.mark.parametrize('scaling', [by_class(), by_answer()], ids=['class', 'answer'])
@pytest.mark.parametrize('which', [3, 4], ids=['float', 'int8'])
def test_a_scaling_is_part_of_the_graph(files, tmp_path, which, scaling):
    from fer_core.compress.export import scale_logits
    from fer_core.live.recognise import Recognizer
    x, path = pictures(40, seed=5), tmp_path/'m.onnx'
    shutil.copy(files[which], path)
    plain = onnx_logits(path, x)
    scale_logits(path, scaling)
    assert np.abs(onnx_logits(path, x) - scaling(plain)).max() < 1e-4 and np.abs(onnx_logits(path, x[:1]) - scaling(plain[:1])).max() < 1e-4
    assert json.loads(read_metadata(path)['scaling']) == json.loads(json.dumps(scaling.to_dict()))
    crops = [np.random.default_rng(k).integers(0, 256, (60, 60), np.uint8) for k in range(3)]
    was, now = Recognizer(files[which]), Recognizer(path)
    assert np.abs(now.logits(crops) - scaling(was.logits(crops))).max() < 1e-4
    with pytest.raises(FerError, match='scaled already'): scale_logits(path, scaling)
    with pytest.raises(FerError, match='graph'): write_metadata(path, scaling='none')


@pytest.mark.parametrize('scaling', [by_class(), by_answer()], ids=['class', 'answer'])
def test_a_variant_that_needs_more_than_a_temperature_gets_it(files, tmp_path, monkeypatch, scaling):
    import pandas as pd
    from types import SimpleNamespace
    from fer_core.artifacts import Run
    from fer_core.compress import release
    from fer_core.evaluate.scaling import Scaling
    x, path = pictures(140, seed=6), tmp_path/'m.onnx'
    shutil.copy(files[3], path)
    plain = onnx_logits(path, x)
    split, labels = np.repeat(['val', 'test'], 70), np.tile(np.arange(7), 20)
    rows = {s: np.flatnonzero(split == s) for s in ('val', 'test')}
    pack = SimpleNamespace(dataset_sha256='d'*64, labels=labels, rows=rows.get, table=pd.DataFrame({'id': [f'r{i}' for i in range(140)]}))
    run = Run.create(tmp_path/'run', 'compress')
    run.record(dataset={'priors': dict.fromkeys(CLASSES, 1/7)})
    monkeypatch.setattr(release, 'choose_scaling', lambda z, y, minority, seed: (scaling, {'reason': 'asked for by a test', 'own': list(CLASSES)}))
    judged = release._judge_variant(run, pack, path, 'fp32', {s: x[r] for s, r in rows.items()}, {s: labels[r] for s, r in rows.items()})
    logits, metrics, calibration = judged['logits'], judged['metrics'], judged['calibration']
    assert np.abs(logits['test'] - onnx_logits(path, x[70:])).max() < 1e-4 and np.abs(scaling(plain[70:]) - logits['test']).max() < 1e-4 # what is judged is what the file says
    assert read_metadata(path)['temperature'] == calibration['temperature'] == metrics['fp32/test']['temperature'] == 1 and calibration['safeguards'] == 'asked for by a test'
    assert metrics['fp32/test']['scaling'] == calibration['method'] == scaling.method and Scaling.from_dict(calibration['scaling']) == scaling
    from fer_core.evaluate.metrics import ece, softmax
    assert metrics['fp32/test_raw']['ece_width'] == pytest.approx(ece(softmax(plain[70:]), labels[70:]), abs=1e-6) # raw is before any calibration
    again = tmp_path/'int8.onnx'
    shutil.copy(files[4], again) # another file gets the same kind, fitted to its own logits
    kind = release._judge_variant(run, pack, again, 'int8', {s: x[r] for s, r in rows.items()}, {s: labels[r] for s, r in rows.items()}, like=judged['choice'])
    fitted = Scaling.from_dict(json.loads(read_metadata(again)['scaling']))
    assert fitted.method == scaling.method and fitted == Scaling.from_dict(kind['calibration']['scaling']) != scaling


def test_answers_stay_through_ties_and_large_logits(tmp_path):
    "The nodes alone, behind logits that are given: sd .01 to 100, ties, neighbours in float32; every row and both kinds of rows."
    import onnx, onnxruntime as ort
    from fer_core.compress.export import _answer_nodes
    scaling, rng = by_answer(), np.random.default_rng(0)
    nodes, constants = _answer_nodes(scaling)
    graph = onnx.helper.make_graph(nodes, 'g', [onnx.helper.make_tensor_value_info('unscaled_logits', 1, ['n', 7])], [onnx.helper.make_tensor_value_info('logits', 1, ['n', 7])], [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()])
    session = ort.InferenceSession(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 20)], ir_version=10).SerializeToString())
    z = np.concatenate([rng.normal(0, s, (300, 7)) for s in (.01, 1, 5, 30, 100)]).astype(np.float32)
    top, second = (np.sort(z, 1)[:, -k] for k in (1, 2))
    z = np.concatenate([z, np.where(z == top[:, None], second[:, None], z), np.where(z == top[:, None], np.nextafter(second, np.float32(np.inf))[:, None], z)])
    said = session.run(None, {'unscaled_logits': z})[0]
    assert np.isfinite(said).all() and (said.argmax(1) == z.argmax(1)).all() and set(z.argmax(1)) == set(range(7))
    assert .05 < scaling.holds(z).mean() < .95 and np.abs(said - scaling(z)).max() < 1e-3
    edge = np.sort(said, 1)[:, -1] - np.sort(said, 1)[:, -2]
    assert edge.min() > .019 and (said.astype(np.float16).argmax(1) == z.argmax(1))[np.abs(said).max(1) < 16].all()

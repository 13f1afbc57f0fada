"Backbones in the shared loop: CBAM against its equations, ResEmoteNet by name, transformers, weights of another size, students from scratch."
import json
from copy import deepcopy
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np, pytest, torch, yaml
from safetensors.torch import save_file
from scipy.special import log_softmax, rel_entr, softmax
from torch.nn import functional as F

from fer_core.artifacts import FerError, Run, read_json, write_json
from fer_core.compress.export import export_onnx, parity
from fer_core.data.curate import curate
from fer_core.data.loader import Augment
from fer_core.data.preprocess import Preprocess
from fer_core.data.synthetic import write_discs
from fer_core.distill.student import LOSS, _phase_objective, adopted_run, started_from, train_student
from fer_core.models.backbones import Classifier, ModelConfig, fit_input, load_model, load_pretrained, make_backbone, model_size, save_model, tokens
from fer_core.models.cbam import Cbam, stages_of
from fer_core.models.resemotenet import PARAMS, VARIANTS, ResEmoteNet
from fer_core.models.swin import LITTLE, SIZES, swin, window_of
from fer_core.runs.plan import read_plan
from fer_core.runs.stage import parameters
from fer_core.teach.softlabels import export_softlabels
from fer_core.teach.teacher import train_teacher
from fer_core.train.loop import TrainConfig
from fer_core.train.objective import LabelLoss, label_objective

NAMES = {'resemotenet': 'teacher', 'resemotenet_a': 'A', 'resemotenet_b': 'B', 'resemotenet_c': 'C'}


def count(net): return sum(p.numel() for p in net.parameters())


def stirred(net, seed=0): # the same network with nothing at its start
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, t in net.state_dict().items():
            if t.is_floating_point(): t.copy_(.5 + torch.rand(t.shape, generator=g) if n.endswith('var') else t + .2*torch.randn(t.shape, generator=g))
    return net


# -- CBAM --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('channels', [16, 128])
def test_cbam_follows_its_equations(channels):
    "Woo et al. 2018, eq. 2 and 3, in float64, with the batch norm behind the 7x7 convolution that timm and the authors have."
    m = stirred(Cbam(channels)).double().eval()
    w, x = {k: v.numpy() for k, v in m.state_dict().items()}, np.random.default_rng(0).normal(size=(2, channels, 5, 6))
    sigmoid = lambda z: 1/(1 + np.exp(-z))
    mlp = lambda v: np.maximum(v @ w['channel.fc1.weight'][..., 0, 0].T, 0) @ w['channel.fc2.weight'][..., 0, 0].T
    of_channels = sigmoid(mlp(x.mean((2, 3))) + mlp(x.max((2, 3))))
    f = x*of_channels[:, :, None, None]
    padded = np.pad(np.stack([f.mean(1), f.max(1)], 1), ((0, 0), (0, 0), (3, 3), (3, 3)))
    z = np.array([[[(padded[n, :, i:i + 7, j:j + 7]*w['spatial.conv.conv.weight'][0]).sum() for j in range(6)] for i in range(5)] for n in range(2)])
    z = (z - w['spatial.conv.bn.running_mean'])/np.sqrt(w['spatial.conv.bn.running_var'] + m.spatial.conv.bn.eps)*w['spatial.conv.bn.weight'] + w['spatial.conv.bn.bias']
    want = 4*f*sigmoid(z)[:, None]
    assert np.abs(want - x).max() > .1 and w['channel.fc1.weight'].shape[0] == max(4, channels//16)
    np.testing.assert_allclose(m(torch.from_numpy(x)).detach().numpy(), want, rtol=1e-10, atol=1e-12)


def test_gradients_of_cbam():
    m, x = stirred(Cbam(16)).double().eval(), torch.randn(1, 16, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(m, (x,))


@pytest.mark.parametrize('name, stages', [('resnet10t', 4), ('mobilenetv3_small_050', 4), ('convnext_atto', 4), ('efficientnet_b0', 5), ('regnetx_002', 4), ('resemotenet_c', 3)])
def test_cbam_starts_at_the_identity_behind_every_stage(name, stages):
    torch.manual_seed(0)
    plain, config = make_backbone(ModelConfig(name)).eval(), ModelConfig(name, attention='cbam')
    net, x = make_backbone(config).eval(), torch.randn(2, 1, 64, 64, generator=torch.manual_seed(0))
    report = net.load_state_dict(plain.state_dict(), strict=False)
    assert len(net.cbam) == len(stages_of(plain)) == stages and all(k.startswith('cbam.') for k in report.missing_keys) and not report.unexpected_keys
    assert torch.equal(net(x), plain(x))
    net = stirred(net)
    twin = deepcopy(net)                                       # as the averaged weights of training are made
    with torch.no_grad():
        before = net(x)
        for p in twin.cbam.parameters(): p.zero_()             # the copy's attention is the copy's own
        assert torch.equal(net(x), before) and not torch.allclose(twin(x), before)
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.cbam.parameters())


def test_cbam_with_short_strides_and_grey_weights(tmp_path):
    config = ModelConfig('resnet10t', attention='cbam', output_stride=16, stem_stride=1)
    model = Classifier(config).eval()
    assert model.backbone.forward_features(torch.zeros(1, 1, 48, 48)).shape[-1] == 6
    colour = make_backbone(ModelConfig('resnet10t', channels=3))
    save_file(stirred(colour).state_dict(), tmp_path/'w.safetensors')
    report = load_pretrained(model.backbone, tmp_path/'w.safetensors')
    assert report['missing'] == [k for k in model.backbone.state_dict() if k.startswith('cbam.')] and not report['unexpected']
    assert torch.allclose(model.backbone.conv1[0].weight, colour.conv1[0].weight.sum(1, keepdim=True))
    in_order = dict(zip((f't{i}' for i in range(200)), colour.state_dict().values()))         # as torchvision's files: same order, other names
    save_file(in_order, tmp_path/'t.safetensors')
    with pytest.raises(FerError, match='fits only'): load_pretrained(Classifier(config).backbone, tmp_path/'t.safetensors') # safetensors sorts by name
    torch.save(in_order, tmp_path/'t.pth')
    assert load_pretrained(Classifier(config).backbone, tmp_path/'t.pth')['missing'] == report['missing']


@pytest.mark.parametrize('name', ['resnet10t', 'resnet18', 'resnet50d', 'mobilenetv3_small_050', 'efficientnet_b0', 'regnetx_002', 'resemotenet_c'])
def test_strides_can_be_taken_out_of_any_shortcut(name):
    side = lambda stride: (lambda net: net.forward_features(torch.zeros(1, 1, 64, 64)) if hasattr(net, 'forward_features') else net.blocks(net.se(net.stem(torch.zeros(1, 1, 64, 64)))))(make_backbone(ModelConfig(name, output_stride=stride)).eval()).shape[-1]
    assert side(16) == 2*side(32) and side(8) == 4*side(32)


def test_cbam_survives_saving_and_export(tmp_path):
    model, spec = stirred(Classifier(ModelConfig('resnet10t', attention='cbam', output_stride=16))).eval(), Preprocess(size=48)
    save_model(tmp_path, model, spec)
    again, _, stored = load_model(tmp_path)
    x = torch.randn(3, 1, 48, 48, generator=torch.manual_seed(0))
    assert stored['model']['attention'] == 'cbam' and torch.equal(again(x), model(x))
    with torch.no_grad():
        plain = deepcopy(model)
        for h in [m for m in plain.modules() if m._forward_hooks]: h._forward_hooks.clear()
        assert not torch.allclose(plain(x), model(x), rtol=1e-2)                              # the attention has a say in what is compared
        scale = model(x).abs().max().item()
    told = parity(export_onnx(model, tmp_path/'m.onnx', spec), model, x.numpy())
    assert told['top1_agreement'] == 1 and told['max_abs_logit'] < 1e-4*max(1, scale)


def test_configs_written_before_attention_still_load(tmp_path):
    model = Classifier(ModelConfig('resnet10t', options=[['zero_init_last', False]]))
    save_model(tmp_path, model, Preprocess(size=48))
    config = read_json(tmp_path/'config.json')
    del config['model']['attention']
    write_json(tmp_path/'config.json', config)
    again, _, _ = load_model(tmp_path)
    assert again.config == model.config and again.config.options == (('zero_init_last', False),) and not hasattr(again.backbone, 'cbam')
    with pytest.raises(FerError, match='neither cbam'): ModelConfig(attention='se')
    for name in ('vit_tiny_patch16_224', 'swinv2_tiny_window8_256'):
        with pytest.raises(FerError, match='transformers attend'): make_backbone(ModelConfig(name, attention='cbam'))


# -- ResEmoteNet by name -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', NAMES)
def test_resemotenet_by_name_has_the_published_count(name):
    with torch.device('meta'):
        whole = Classifier(ModelConfig(name, 'linear', channels=3))
        grey = Classifier(ModelConfig(name, 'linear', channels=1))
    width = VARIANTS[NAMES[name]][0]
    assert count(whole) == PARAMS[NAMES[name]] == {'teacher': 80_238_599, 'A': 20_069_383, 'B': 5_022_215, 'C': 1_259_911}[NAMES[name]]
    assert count(whole) - count(grey) == 2*9*width and whole.backbone.num_features == 4*width and isinstance(whole.backbone, ResEmoteNet)
    assert whole(torch.zeros(2, 3, 64, 64, device='meta')).shape == (2, 7)


def test_resemotenet_by_name_is_the_network_itself(tmp_path):
    net, model = stirred(ResEmoteNet('C')).eval(), Classifier(ModelConfig('resemotenet_c', channels=3)).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.manual_seed(0))
    model.backbone.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith('head.')}, strict=True)
    model.head.load_state_dict(net.head.state_dict())
    assert torch.allclose(model(x), net(x)) and torch.allclose(model.embed(x), net.embed(x))
    save_model(tmp_path, model, Preprocess(size=64, colour='rgb'))
    assert torch.equal(load_model(tmp_path)[0](x), model(x))
    for wrong in ({'options': [['depth', 3]]}, {'stem_stride': 1}):
        with pytest.raises(FerError) as e: make_backbone(ModelConfig('resemotenet_c', **wrong))
        assert e.value.code == 'bad_parameter'
    with pytest.raises(FerError, match='no weights on the hub'): make_backbone(ModelConfig('resemotenet'), hub=True)


def test_the_published_recipe_is_a_checked_plan(root):
    steps = {s.name: s for s in read_plan(root/'papermill_runs'/'resemotenet_cpu.yaml')}
    students = {n: s for n, s in steps.items() if s.stage == 'student'}
    assert {s.given['backbone']: round(1 - s.given['alpha'], 2) for s in students.values()} == {'resemotenet_a': .20, 'resemotenet_b': .15, 'resemotenet_c': .20}
    for s in (steps['teacher'], *students.values()):
        assert (s.given['optimizer'], s.given['lr'], s.given['schedule'], s.given['batch_size'], s.given['class_power'], s.given['size'], s.given['colour']) == ('sgd', .001, 'plateau', 16, 1, 64, 'rgb')
    assert all(s.given['T'] == 3 and s.given['phase'] == 'kd' and 'before' not in s.given for s in students.values())
    flips_only = {'erase': 0, 'rotate': 0, 'zoom': 0, 'shift': 0, 'light': 0}
    assert all({k: steps[n].given[k] for k in flips_only} == flips_only for n in ('teacher', 'softlabels'))
    raw = yaml.safe_load((root/'papermill_runs'/'resemotenet_cpu.yaml').read_text())
    assert raw['compare']['reference'] == 'mini_resemotenet' and len(raw['compare']['names']) == len(raw['compare']['runs'])


def test_both_training_stages_take_the_same_methods():
    "What a teacher can be trained with, a student can, but for what is a teacher's own."
    teacher, student = parameters('teacher'), parameters('student')
    own = {'votes', 'label_fraction', 'posthoc', 'processes', 'flip_average', 'scale', 'margin', 'margin_warmup', 'margin_ramp', 'start', 'pretext'}
    assert set(teacher) - set(student) <= own
    assert {k for k in teacher if k in student and teacher[k]['type'] != student[k]['type']} == set()


# -- transformers and the other families -------------------------------------------------------------------------------------

FAMILIES = {'resnet18': {}, 'mobilenetv3_small_100': {}, 'efficientnet_b3': {}, 'convnext_atto': {'options': (('patch_size', 2),)}, 'convnext_tiny': {'options': (('depths', (1, 1, 1, 1)),)},
            'vit_tiny_patch16_224': {'options': (('depth', 2),)}, 'swinv2_tiny_window8_256': {'options': tuple({**LITTLE['student'], 'window_size': 4}.items())}}


@pytest.mark.parametrize('size', [48, 64])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_learns_is_saved_and_comes_back(name, size, tmp_path):
    config = fit_input(ModelConfig(name, 'arcface', **FAMILIES[name]), size)
    model = Classifier(config)
    x, y = torch.randn(4, 1, size, size, generator=torch.manual_seed(0)), torch.arange(4)
    F.cross_entropy(model(x, y), y).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without and all(p.grad.isfinite().all() for p in model.parameters())
    save_model(tmp_path, model, Preprocess(size=size))
    again, spec, _ = load_model(tmp_path)
    assert spec.size == size and again.config == config and torch.equal(again(x), model.eval()(x)) and json.loads(json.dumps(asdict(config)))


def test_swin_pair_has_equal_tokens_and_one_pass_gives_logits_too():
    teacher, student = (Classifier(swin(n, 64)).eval() for n in LITTLE)
    x = torch.randn(2, 1, 64, 64, generator=torch.manual_seed(0))
    z, seen = student.with_tokens(x)
    assert torch.allclose(z, student(x), atol=1e-6) and all(torch.equal(a, b) for a, b in zip(seen, tokens(student, x)))
    assert [t.shape[:2] for t in seen] == [t.shape[:2] for t in tokens(teacher, x)] == [(2, 256), (2, 64), (2, 16), (2, 4)]
    sum(t.square().mean() for t in student.train().with_tokens(x)[1]).backward()
    assert student.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
    with torch.no_grad(): last = student.eval().backbone.norm(tokens(student, x)[-1]).mean(1)   # tokens are the features that the head pools
    assert torch.allclose(student.head(last), student(x), atol=1e-5)


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_100', 'efficientnet_b0', 'mobilenetv1_100', 'convnext_atto', 'vit_tiny_patch16_224'])
def test_tokens_come_with_the_same_logits(name):
    model = stirred(Classifier(fit_input(replace(ModelConfig(name), weights_mean=.45, weights_std=.22), 64))).eval()
    x = torch.randn(2, 1, 64, 64, generator=torch.manual_seed(0))
    z, seen = model.with_tokens(x)
    assert torch.allclose(z, model(x), rtol=1e-4, atol=1e-4*z.abs().max().item()) and all(t.ndim == 3 and len(t) == 2 for t in seen)


def test_published_swins_fit_every_size():
    for size in (64, 96, 128, 160, 192, 224, 256):
        with torch.device('meta'): net = make_backbone(swin('tiny', size, 3))
        blocks = [layer.blocks[0] for layer in net.layers]
        assert [b.input_resolution[0] for b in blocks] == [size//4, size//8, size//16, size//32] and all(b.input_resolution[0] % b.window_size[0] == 0 for b in blocks)
    with torch.device('meta'): counts = {n: count(make_backbone(swin(n, 256, 3)))/1e6 for n in SIZES}
    assert {n: round(c) for n, c in counts.items()} == {'tiny': 28, 'small': 49, 'base': 87} # the paper's table: 28, 50, 88 with the classifier of 1,000
    with pytest.raises(FerError): window_of(48)


def test_multiply_adds_of_attention_are_counted():
    "SwinV2-T at 256 px: 5.9 G in the paper (table 4); a linear layer counts once a token."
    with torch.device('meta'): told = model_size(Classifier(swin('tiny', 256, 3)), Preprocess(size=256, colour='rgb'))
    assert told['mmacs'] == pytest.approx(5900, rel=.02)
    with torch.device('meta'): assert model_size(Classifier(ModelConfig('resnet18', channels=3)), Preprocess(size=224, colour='rgb'))['mmacs'] == pytest.approx(1814, rel=.005) # torchvision's table: 1.81 GFLOPS


# -- weights of another size -------------------------------------------------------------------------------------------------

def test_positions_of_another_size_are_resized(tmp_path):
    depth = ('depth', 1)
    big, small = (make_backbone(ModelConfig('vit_tiny_patch16_224', channels=3, options=(('img_size', s), depth))) for s in (128, 64))
    with torch.no_grad(): big.pos_embed[:] = torch.cat([torch.zeros(1), torch.linspace(-1, 1, 8).repeat(8)])[None, :, None]   # a class token, then 8 lines from left to right
    torch.save({'state_dict': {f'module.{k}': v for k, v in big.state_dict().items()}}, tmp_path/'vit.pth')
    report = load_pretrained(small, tmp_path/'vit.pth')
    assert report['resized'] == ['pos_embed'] and not report['missing'] + report['unexpected']
    row = small.pos_embed[0, 1:, 0].view(4, 4)
    assert (row[:, 1:] > row[:, :-1]).all() and torch.allclose(row, row[:1].expand(4, 4), atol=1e-5)  # left to right as before, the same in every line
    before = make_backbone(ModelConfig('vit_tiny_patch16_224', options=(('img_size', 64), ('patch_size', 8), depth)))
    assert set(load_pretrained(before, tmp_path/'vit.pth')['resized']) == {'patch_embed.proj.weight'}   # 128/16 = 64/8 places


def test_bias_tables_and_windows_of_another_size(tmp_path):
    little = tuple(LITTLE['student'].items())
    v1 = lambda window: make_backbone(ModelConfig('swin_tiny_patch4_window7_224', options=(('img_size', 64), ('window_size', window), *little)))
    torch.save(v1(8).state_dict(), tmp_path/'swin.pth')
    report = load_pretrained(v1(4), tmp_path/'swin.pth')
    assert report['resized'] and all(k.endswith('relative_position_bias_table') for k in report['resized']) and not report['missing'] + report['unexpected']
    v2 = lambda size: stirred(make_backbone(swin('student', size)))
    torch.save(v2(128).state_dict(), tmp_path/'v2.pth')
    report = load_pretrained(net := make_backbone(swin('student', 64)), tmp_path/'v2.pth')
    assert not report['missing'] + report['unexpected'] + report['resized'] and torch.equal(net.norm.weight, v2(128).norm.weight)


def test_what_cannot_be_resized_or_read_is_a_clear_error(tmp_path):
    net = make_backbone(ModelConfig('vit_tiny_patch16_224', options=(('img_size', 64), ('depth', 1))))
    state = net.state_dict()
    torch.save(state | {'pos_embed': torch.zeros(1, 17, 100)}, tmp_path/'narrow.pth')
    with pytest.raises(FerError) as e: load_pretrained(net, tmp_path/'narrow.pth')
    assert e.value.code == 'corrupt_artifact' and 'pos_embed' in e.value.what
    torch.save(make_backbone(ModelConfig('resnet10t')).state_dict(), tmp_path/'resnet.pth')
    for other in (net, make_backbone(swin('student'))):
        with pytest.raises(FerError, match='another backbone'): load_pretrained(other, tmp_path/'resnet.pth')


# -- a student distilled from scratch ----------------------------------------------------------------------------------------

SPEC, QUICK = Preprocess(size=32, clahe=0), TrainConfig(epochs=1, batch_size=16)


@pytest.fixture(scope='module')
def home(tmp_path_factory): # curated data, a teacher of one epoch, and its soft labels
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp('scratch')
    curate(write_discs(home/'discs', train=8, val=3, test=3), home/'data', source='folder', near=None)
    train_teacher(Run.create(home/'teacher', 'teacher'), home/'data', ModelConfig('resemotenet_c'), SPEC, QUICK)
    run = Run.create(home/'soft', 'ensemble')
    export_softlabels(run, home/'data', [home/'teacher'], {'weights': [1.], 'temperatures': [1.], 'temperature': 1.}, views=2, augment=Augment(erase=0, rotate=0, scale=0, shift=0, contrast=0, light=0))
    return home


def test_kd_from_scratch_stands_and_later_phases_go_on_from_it(home):
    kd, dkd = Run.create(home/'kd', 'student'), Run.create(home/'dkd', 'student')
    sgd = replace(QUICK, optimizer='sgd', schedule='plateau', ema=0, clip=0, warmup_epochs=0)
    metrics, history = train_student(kd, home/'data', 'kd', ModelConfig('resnet10t', attention='cbam'), SPEC, sgd, softlabels=home/'soft', loss={'T': 3., 'alpha': .8, 'class_power': 1.})
    verdict = kd.manifest.reliability['adoption']
    assert len(history) == 1 and metrics['test']['n'] == 21
    assert verdict == {'adopted': True, 'reason': 'KD from scratch: nothing stood before it', 'stands': 'kd', 'compared_with': ''}
    assert set(kd.manifest.parents) == {'data', 'softlabels'} and adopted_run(home/'kd') == home/'kd' and started_from(home/'kd') == 'random weights'
    train_student(dkd, home/'data', 'dkd', ModelConfig(), SPEC, QUICK, before=home/'kd', softlabels=home/'soft')
    assert dkd.manifest.reliability['adoption']['compared_with'] == 'kd' and dkd.manifest.parameters['attention'] == 'cbam'
    model, _, _ = load_model(home/'dkd')
    assert model.config.attention == 'cbam' and len(model.backbone.cbam) == 4 and started_from(home/'dkd') == 'random weights'


def test_a_transformer_is_distilled_from_scratch_without_naming_its_size(home):
    run = Run.create(home/'vit', 'student')
    train_student(run, home/'data', 'dkd', ModelConfig('vit_tiny_patch16_224', options=(('depth', 1), ('patch_size', 8))), SPEC, QUICK, softlabels=home/'soft')
    assert dict(load_model(home/'vit')[0].config.options)['img_size'] == 32


@pytest.mark.parametrize('phase, given, says', [
    ('kd', {}, 'needs soft labels'), ('dkd', {'before': 'run'}, 'needs soft labels'), ('mimic', {}, 'none of'),
    ('kd', {'softlabels': 'soft', 'loss': {'gamma': 2.}}, 'belongs to the ce phase'), ('dkd', {'softlabels': 'soft', 'loss': {'tau': 1.}}, 'belongs to the ce phase'),
    ('ce', {'loss': {'gama': 2.}}, "no 'gama'"), ('ce', {'loss': {'contrast': .5}, 'mixup': .2}, 'beside mixed pictures'), ('ce', {'loss': {'class_beta': .99, 'class_power': 1.}}, 'choose one')])
def test_what_a_phase_cannot_do_is_said_before_anything_runs(tmp_path, phase, given, says):
    with pytest.raises(FerError, match=says) as e: train_student(Run.create(tmp_path/'run', 'student'), tmp_path/'no data', phase, ModelConfig(), SPEC, QUICK, **given)
    assert e.value.code == 'bad_parameter'


@pytest.mark.parametrize('theirs', [.10, .15, .20])
def test_the_published_loss_is_ours_at_one_minus_alpha(theirs):
    "Mini-ResEmoteNet: a CE + (1 - a) T² KL, class weights on the CE, in float64 by scipy."
    g, T = torch.Generator().manual_seed(0), 3.
    z, t, y = 3*torch.randn(5, 7, generator=g, dtype=torch.float64), 3*torch.randn(1, 9, 7, generator=g, dtype=torch.float64), torch.tensor([0, 1, 6, 3, 3])
    rows, counts = np.array([8, 2, 5, 0, 1]), np.array([30, 4, 31, 55, 38, 24, 38])
    p = LOSS | {'T': T, 'alpha': 1 - theirs, 'smoothing': 0., 'class_power': 1.}
    feed = SimpleNamespace(pack=SimpleNamespace(counts=lambda: counts), view_of=lambda e: 0, device='cpu')
    ours = _phase_objective('kd', SimpleNamespace(views=t), feed, p, None)(lambda x: z, None, y, rows, 0)
    w = (1/counts)[y]
    ce = (w*-log_softmax(z.numpy(), 1)[np.arange(5), y]).sum()/w.sum()
    kl = rel_entr(softmax(t[0, rows].numpy()/T, 1), softmax(z.numpy()/T, 1)).sum(1).mean()
    assert ours.item() == pytest.approx(theirs*ce + (1 - theirs)*T**2*kl, rel=1e-5)


def test_the_ce_phase_takes_the_losses_of_a_teacher():
    g, counts = torch.Generator().manual_seed(0), np.array([30, 4, 31, 55, 38, 24, 38])
    z, y, rows = torch.randn(5, 7, generator=g), torch.tensor([0, 1, 6, 3, 3]), np.arange(5)
    feed, net = SimpleNamespace(pack=SimpleNamespace(counts=lambda: counts), device='cpu'), lambda x, y=None: z
    say = lambda loss: _phase_objective('ce', None, feed, LOSS | loss, None)(net, z, y, rows, 0).item()
    want = lambda loss: label_objective(LabelLoss(**loss), counts)(net, z, y, rows, 0).item()
    asked = [{'smoothing': 0.}, {'class_beta': .999}, {'gamma': 2., 'smoothing': 0.}, {'tau': 1.}, {'class_power': .5}]
    assert [say(a) for a in asked] == [want(a) for a in asked] and len({say(a) for a in asked}) == len(asked)

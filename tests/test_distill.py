"""Phases of a student beyond KD and DKD: born-again, mutual and negative learning, manifold terms, trust, votes."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import chisquare

from fer_core.artifacts import FerError, Run, read_json, write_json
from fer_core.data.augment import Mixed
from fer_core.data.curate import curate
from fer_core.data.loader import Augment, open_pack
from fer_core.data.preprocess import Preprocess
from fer_core.data.synthetic import write_discs
from fer_core.distill import objective as O
from fer_core.distill.born_again import generations
from fer_core.distill.manifold import manifold_loss, merge_tokens, pair_tokens, stages_loss
from fer_core.distill.mutual import Pair, mutual_objective
from fer_core.distill.negative import complement, negative_loss, negative_objective
from fer_core.distill.student import adopted_run, started_from, train_student
from fer_core.models.backbones import Classifier, ModelConfig, load_model
from fer_core.models.swin import swin
from fer_core.teach.softlabels import LiveTeachers
from fer_core.teach.teacher import train_teacher
from fer_core.train.loop import TrainConfig, load_state
from fer_core.train.optim import make_optimizer

SPEC, QUICK, STILL = Preprocess(size=32, clahe=0), TrainConfig(epochs=1, batch_size=16, precision='32-true'), Augment(erase=0, rotate=0, scale=0, shift=0, contrast=0, light=0)
TINY = ModelConfig('resemotenet_c')


@pytest.fixture(scope='module')
def first(data, tmp_path_factory): # a student trained on labels
    run = Run.create(tmp_path_factory.mktemp('runs')/'ce', 'student', {'phase': 'ce'})
    train_student(run, data, 'ce', TINY, SPEC, QUICK)
    return run.folder


def beside(first, name, phase): return Run.create(first.parent/name, 'student', {'phase': phase})


def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- trust and votes

@pytest.mark.parametrize('trust', [.5, 1., 3.])
def test_trusted_faces_by_numpy(trust):
    t, y, sample = 3*random(40, 7), torch.arange(40) % 7, torch.rand(40)
    p = softmax(t.float().numpy(), 1)
    alone = p[np.arange(40), y]**trust
    np.testing.assert_allclose(O.trusted(t, y, trust, sample).numpy(), sample.numpy()*alone/alone.mean(), rtol=1e-5)
    share = torch.rand(40)
    mixed = (share.numpy()*p[np.arange(40), y] + (1 - share.numpy())*p[np.arange(40), y.flip(0)])**trust
    np.testing.assert_allclose(O.trusted(t, Mixed(y, y.flip(0), share), trust).numpy(), mixed/mixed.mean(), rtol=1e-5)
    assert O.trusted(t, y, 0., sample) is sample


def test_votes_and_trust_in_the_objectives_by_scipy():
    z, t, people, y, rows = random(5, 7), 3*random(1, 9, 7, seed=1), torch.softmax(random(9, 7, seed=2), 1), torch.tensor([0, 1, 6, 3, 3]), np.array([8, 2, 5, 0, 1])
    soft, T = SimpleNamespace(views=t), 2.
    w = softmax(t[0, rows].float().numpy(), 1)[np.arange(5), y]**2
    kl = rel_entr(softmax(t[0, rows].numpy()/T, 1), softmax(z.numpy()/T, 1)).sum(1)
    ce = -(people[rows].numpy()*log_softmax(z.numpy(), 1)).sum(1).mean()
    ours = O.kd_objective(soft, lambda e: 0, T, .3, trust=2., votes=people)(lambda x: z, None, y, rows, 0)
    assert ours.item() == pytest.approx(.7*ce + .3*T**2*(w/w.mean()*kl).mean(), rel=1e-5)
    tckd_only = O.dkd_objective(soft, lambda e: 0, T, 1., 0., 0, votes=people)(lambda x: z, None, y, rows, 0).item()
    pair = lambda v: (lambda p: np.stack([p[np.arange(5), y], 1 - p[np.arange(5), y]], 1))(softmax(v.numpy()/T, 1))
    assert tckd_only == pytest.approx(ce + T**2*rel_entr(pair(t[0, rows]), pair(z)).sum(1).mean(), rel=1e-5) # the target class is the label still


# --- manifold terms

def test_stages_are_paired_from_the_deepest_and_the_finer_is_merged():
    s, t = [random(3, 64, 4), random(3, 16, 6, seed=1)], [random(3, 256, 2, seed=2), random(3, 256, 5, seed=3), random(3, 16, 7, seed=4)]
    g = lambda: torch.Generator().manual_seed(5)
    one, two, ours = g(), g(), stages_loss(s, t, g())
    assert one.get_state().equal(two.get_state())
    by_hand = (manifold_loss(s[1], t[2], generator=one) + manifold_loss(s[0], merge_tokens(t[1]), generator=one))/2
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert [x.shape[1] for x in pair_tokens(s[0], s[1])] == [16, 16]
    with pytest.raises(FerError, match='64 tokens beside one of 36'): pair_tokens(s[0], random(3, 36, 2))


def test_a_swin_pair_learns_relations_live(data, tmp_path):
    teacher = Run.create(tmp_path/'teacher', 'teacher')
    train_teacher(teacher, data, swin('teacher', 64), Preprocess(size=64, clahe=0), QUICK)
    run = Run.create(tmp_path/'student', 'student')
    given = dict(softlabels=teacher.folder, augment=STILL, teaching='live', loss={'manifold': 1.})
    heard, real = [], O.stages_loss
    S_loss = lambda s, t: heard.append((len(s), [x.shape[1] for x in s], [x.shape[2] for x in t])) or real(s, t)
    try:
        O.stages_loss = S_loss
        train_student(run, data, 'kd', swin('student', 64), Preprocess(size=64, clahe=0), QUICK, **given)
    finally: O.stages_loss = real
    assert heard and heard[0] == (4, [256, 64, 16, 4], [32, 64, 128, 256])
    assert read_json(run.path('run.json'))['parents']['softlabels']['path'].endswith('best.safetensors')
    pack = open_pack(data, Preprocess(size=64, clahe=0))
    live, rows = LiveTeachers(teacher.folder, data, 0, STILL), pack.rows('val')
    z, inside = live.with_tokens(0, rows)
    assert torch.allclose(z, live[0, rows], atol=1e-5) and len(inside) == 4
    with pytest.raises(FerError, match='tokens are not stored'): train_student(Run.create(tmp_path/'s2', 'student'), data, 'kd', swin('student', 64), Preprocess(size=64, clahe=0), QUICK, **{**given, 'teaching': 'view'})


# --- born-again generations

def test_a_generation_is_a_new_start_of_the_same_network_under_its_predecessor(data, first):
    heard, run = [], beside(first, 'ban1', 'ban')
    real = O.kd_loss
    try:
        O.kd_loss = lambda z, t, *more: heard.append(t) or real(z, t, *more)
        train_student(run, data, 'ban', ModelConfig('resnet10t'), SPEC, replace(QUICK, seed=3), before=first, augment=STILL, loss={'T': 1.})
    finally: O.kd_loss = real
    model, _, _ = load_model(run.folder)
    assert model.config.backbone == 'resemotenet_c' == run.manifest.parameters['backbone'] and started_from(run.folder) == 'random weights'
    pack = open_pack(data, SPEC)
    said = LiveTeachers(first, data, 3, STILL)[0, pack.rows('train')]
    assert all((said - row).abs().sum(1).min() < 1e-4 for row in torch.cat(heard)) # the predecessor's own answers
    verdict = run.manifest.reliability['adoption']
    assert verdict['compared_with'] == 'ce' and verdict['adopted'] == (read_json(run.path('metrics.json'))['val']['macro_f1'] >= read_json(first/'metrics.json')['val']['macro_f1'])
    assert run.manifest.reliability['start']['generation'] == 1 and generations(run.folder) == [first, run.folder]


def test_a_generation_that_is_worse_is_set_aside_and_the_next_learns_from_the_one_that_stands(data, first):
    worse = beside(first, 'ban-worse', 'ban')
    train_student(worse, data, 'ban', TINY, SPEC, replace(QUICK, seed=4), before=first, augment=STILL)
    told = read_json(worse.path('run.json'))
    told['reliability']['adoption'] = {'adopted': False, 'reason': 'not adopted: worse', 'stands': 'ce', 'compared_with': 'ce'}
    write_json(worse.path('run.json'), told)
    assert adopted_run(worse.folder) == first
    after = beside(first, 'ban-after', 'ban')
    train_student(after, data, 'ban', TINY, SPEC, replace(QUICK, seed=5), before=worse.folder, augment=STILL)
    assert after.manifest.reliability['adoption']['compared_with'] == 'ce' and generations(after.folder) == [first, after.folder]


# --- mutual learning

def test_each_of_two_students_gets_the_gradient_of_its_own_loss():
    a, b, y = random(6, 7).requires_grad_(), random(6, 7, seed=1).requires_grad_(), torch.arange(6)
    mutual_objective(3., .4, .1)(SimpleNamespace(both=lambda x: (a, b)), None, y, None, 0).backward()
    for mine, other in ((a, b), (b, a)):
        z = mine.detach().clone().requires_grad_()
        kl = (F.softmax(other.detach()/3, 1)*(F.log_softmax(other.detach()/3, 1) - F.log_softmax(z/3, 1))).sum(1).mean()
        (.6*F.cross_entropy(z, y, label_smoothing=.1) + .4*9*kl).backward()
        assert (z.grad - mine.grad).abs().max() < 1e-6


def test_both_learn_and_the_first_is_kept(data, first):
    run = beside(first, 'dml', 'dml')
    train_student(run, data, 'dml', TINY, SPEC, replace(QUICK, epochs=2), before=first, loss={'T': 1.})
    model, _, config = load_model(run.folder)
    state = load_state(run.path('last.ckpt'))['model']
    assert type(model) is Classifier and {k.split('.')[0] for k in state} == {'kept', 'peer'}
    assert not any(torch.equal(state[f'kept.{k}'], state[f'peer.{k}']) for k, v in model.named_parameters() if v.ndim > 1) # two starts
    assert run.manifest.compression['params'] == sum(p.numel() for p in model.parameters()) and run.manifest.reliability['adoption']['compared_with'] == 'ce'
    assert started_from(run.folder) == 'random weights'


def test_a_pair_that_is_stopped_ends_as_if_it_had_not_been(data, tmp_path):
    class Stop(Exception): pass
    def stop(history):
        if len(history) == 1: raise Stop
    cfg = replace(QUICK, epochs=2)
    def train(run, show=None): return train_student(run, data, 'dml', TINY, SPEC, cfg, show=show)
    whole, cut = (Run.create(tmp_path/n, 'student', {'phase': 'dml'}) for n in ('whole', 'cut'))
    train(whole)
    with pytest.raises(Stop): train(cut, stop)
    train(Run(cut.folder))
    a, b = (load_state(r.path('last.ckpt'))['model'] for r in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_peer_may_be_another_network_and_the_optimiser_moves_both():
    pair = Pair(Classifier(TINY), Classifier(ModelConfig('resnet10t')))
    moved = {id(p) for g in make_optimizer(pair, TrainConfig()).param_groups for p in g['params']}
    assert moved == {id(p) for p in pair.parameters()} and pair.kept.config == pair.config == TINY
    with pytest.raises(FerError, match='neither student'): Pair(Classifier(replace(TINY, hint=4)), Classifier(TINY))


# --- negative learning

def test_complementary_labels_are_uniform_among_the_others():
    y = torch.arange(21000) % 7
    other = complement(y, generator=torch.Generator().manual_seed(0))
    away = np.bincount((other - y) % 7, minlength=7)
    assert away[0] == 0 and chisquare(away[1:]).pvalue > 1e-3


def test_the_negative_loss_and_its_gradient_in_closed_form():
    z, against = random(8, 7).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    loss = negative_loss(z, against)
    loss.sum().backward()
    p = softmax(z.detach().numpy(), 1)
    k = p[np.arange(8), against]
    np.testing.assert_allclose(loss.detach().numpy(), -np.log1p(-k), rtol=1e-9)
    want = -p*(k/(1 - k))[:, None]
    want[np.arange(8), against] = k
    np.testing.assert_allclose(z.grad.numpy(), want, rtol=1e-7, atol=1e-12)


def test_sure_faces_learn_their_label_and_the_others_a_complementary_one():
    z, y, sample = random(6, 7).float(), torch.arange(6), torch.rand(9)
    rows, p = np.array([8, 2, 5, 0, 1, 3]), softmax(random(6, 7).float().numpy(), 1)
    sure = float(np.median(p[np.arange(6), y]))
    torch.manual_seed(2); ours = negative_objective(sure, sample=sample)(lambda x: z, None, y, rows, 0).item()
    torch.manual_seed(2); other = complement(y)
    believed = p[np.arange(6), y] >= sure
    each = np.where(believed, -np.log(p[np.arange(6), y]), -np.log1p(-p[np.arange(6), other]))
    assert 0 < believed.sum() < 6 and ours == pytest.approx((sample[rows].numpy()*each).mean(), rel=1e-5)


def test_negative_learning_goes_on_from_what_stands(data, first):
    run = beside(first, 'nl', 'nl')
    train_student(run, data, 'nl', ModelConfig('resnet10t'), SPEC, QUICK, before=first)
    assert load_model(run.folder)[0].config.backbone == 'resemotenet_c' and run.manifest.reliability['adoption']['compared_with'] == 'ce' and run.manifest.reliability['start']['pretrained'] == str(first)


# --- what cannot be

@pytest.mark.parametrize('phase, given, says', [
    ('ban', {}, 'needs the generation before'), ('ban', {'before': 'x', 'softlabels': 'soft'}, 'which reads none'), ('dml', {'softlabels': 'soft'}, 'which reads none'),
    ('kd', {'softlabels': 'soft', 'peer': 'resnet18'}, 'only students of phase dml'), ('nl', {'mixup': .2}, 'beside mixed pictures'), ('ce', {'votes': True, 'cutmix': 1.}, 'beside mixed pictures'),
    ('nl', {'votes': True}, 'votes in phase nl'), ('dml', {'loss': {'hint': 1.}}, 'belongs to kd and dkd'), ('kd', {'softlabels': 'soft', 'loss': {'manifold': 1.}, 'mixup': .2}, 'beside mixed pictures')])
def test_what_cannot_go_together_is_said_before_anything_runs(tmp_path, phase, given, says):
    with pytest.raises(FerError, match=says) as e: train_student(Run.create(tmp_path/'run', 'student'), tmp_path/'no data', phase, TINY, SPEC, QUICK, **given)
    assert e.value.code == 'bad_parameter'


def test_votes_where_there_are_none_and_a_teacher_of_other_data(data, first, tmp_path):
    with pytest.raises(FerError, match='has no votes'): train_student(Run.create(tmp_path/'a', 'student'), data, 'ce', TINY, SPEC, QUICK, votes=True)
    curate(write_discs(tmp_path/'raw', train=4, val=2, test=2, seed=9), tmp_path/'data', source='folder', near=None)
    with pytest.raises(FerError, match='was made on dataset'): train_student(Run.create(tmp_path/'b', 'student'), tmp_path/'data', 'ban', TINY, SPEC, QUICK, before=first)

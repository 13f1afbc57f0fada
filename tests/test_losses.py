"""Heads, ResEmoteNet and distillation losses against independent references, and where floating point is at its edge."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from fer_core.artifacts import FerError
from fer_core.distill.dkd import dkd_loss, dkd_terms, dkd_warmup
from fer_core.distill.kd import kd_loss
from fer_core.distill.manifold import manifold_loss, manifold_terms, merge_tokens, tokens
from fer_core.models.heads import ArcFaceHead, CosFaceHead, add_margin, make_head, margin_at
from fer_core.models.resemotenet import PARAMS, ResEmoteNet
from fer_core.train.adjust import adjust_logits, choose_tau
from fer_core.train.contrastive import supcon_loss
from fer_core.train.losses import ce_loss, effective_weights, prior_weights
from fer_core.train.objective import LabelLoss, label_objective

seeds = st.integers(0, 2**31 - 1)


def draw(seed, *shape, scale=3.):
    return torch.as_tensor(np.random.default_rng(seed).normal(0, scale, shape))


# ---- ArcFace

@pytest.fixture(scope='module')
def reference():
    from fer_core.compat import mend_torchvision
    mend_torchvision()
    return pytest.importorskip('pytorch_metric_learning.losses').ArcFaceLoss


@pytest.mark.parametrize('m', [.2, .35, .6])
def test_arcface_equals_pytorch_metric_learning(reference, m):
    "Loss and both gradients, in float64, with embeddings on every side of their class, beyond pi - m too."
    torch.manual_seed(0)
    head = ArcFaceHead(6, 7, s=30, m=m).double()
    theirs = reference(num_classes=7, embedding_size=6, margin=math.degrees(m), scale=30).double()
    theirs.W.data = head.weight.data.T.clone()
    y = torch.arange(60) % 7
    mix = torch.linspace(1, -1, 60, dtype=torch.float64)[:, None]
    ours_x = (mix*F.normalize(head.weight.data)[y] + .03*draw(0, 60, 6, scale=1.)).requires_grad_()
    theirs_x = ours_x.detach().clone().requires_grad_()
    angles = F.cosine_similarity(ours_x, head.weight[y]).acos()
    assert (angles > math.pi - m).any() and (angles < .3).any()  # both branches are really visited
    ours, want = F.cross_entropy(head(ours_x, y), y), theirs(theirs_x, y)
    ours.backward(), want.backward()
    assert abs(ours.item() - want.item()) < 1e-6
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.weight.grad, theirs.W.grad.T, atol=1e-6, rtol=1e-5)


@given(seeds, st.floats(0, 1.4))
@settings(max_examples=50, deadline=None)
def test_margin_only_lowers_the_target_and_only_in_training(seed, m):
    head = ArcFaceHead(5, 7, m=m).double()
    x, y = draw(seed, 9, 5), torch.as_tensor(np.random.default_rng(seed).integers(0, 7, 9))
    plain, marked = head(x), head(x, y)
    assert (marked.gather(1, y[:, None]) <= plain.gather(1, y[:, None]) + 3e-5).all()  # the clamp moves cos by 1e-7, times s
    others = F.one_hot(y, 7) == 0
    assert torch.equal(marked[others], plain[others])
    assert torch.equal(head.eval()(x, y), plain)
    assert (plain.abs() <= 30 + 1e-9).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('cos', [-1., 1., -1.0000001, 1.0000001])
def test_margin_is_finite_at_the_poles(dtype, cos):
    c = torch.tensor([cos], dtype=dtype, requires_grad=True)
    add_margin(c, .35).sum().backward()
    assert c.grad.isfinite().all()


@pytest.mark.parametrize('x', [torch.zeros(2, 4), torch.full((2, 4), 1e18), torch.full((2, 4), 1e-20)])
def test_arcface_survives_odd_embeddings(x):
    "All zeros, as a dead ReLU gives, very long and very short ones."
    head, x = ArcFaceHead(4, 7), x.clone().requires_grad_()
    F.cross_entropy(head(x, torch.tensor([0, 1])), torch.tensor([0, 1])).backward()
    assert x.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_arcface_is_full_precision_under_autocast():
    head, x, y = ArcFaceHead(64, 7), torch.randn(16, 64), torch.arange(16) % 7
    with torch.autocast('cpu', torch.bfloat16): low = head(x, y)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, head(x, y))


def test_margin_schedule_is_monotone_and_continuous():
    e = np.linspace(0, 30, 3001)
    m = np.array([margin_at(v, 5, 10, .35) for v in e])
    assert (np.diff(m) >= 0).all() and np.diff(m).max() < .35/10*.011
    assert m[e <= 5].max() == 0 and (m[e >= 15] == .35).all()
    head = ArcFaceHead(4, 7, m=.35)
    for epoch in (0, 9, 40):
        head.set_margin(margin_at(epoch, 5, 10))
        assert head.margin == pytest.approx(margin_at(epoch, 5, 10, .35))
    assert 'margin' not in head.state_dict()


@pytest.mark.parametrize('wrong', [
    lambda: make_head('softmax', 8, 7), lambda: make_head('linear', 8, 7, s=30), lambda: ArcFaceHead(8, 7, m=2.), lambda: ArcFaceHead(8, 7, s=0),
    lambda: ArcFaceHead(8, 7)(torch.zeros(3, 8), torch.zeros(2, dtype=torch.long)), lambda: ArcFaceHead(8, 7)(torch.zeros(3, 8), torch.zeros(3)),
    lambda: ArcFaceHead(8, 7).set_margin(1.5), lambda: ResEmoteNet('teachers')])
def test_wrong_heads_are_refused(wrong):
    with pytest.raises(FerError) as e: wrong()
    assert e.value.code == 'bad_parameter'


# ---- ResEmoteNet

def test_resemotenet_counts():
    with torch.device('meta'): counts = {v: sum(p.numel() for p in ResEmoteNet(v).parameters()) for v in PARAMS}
    assert counts == {'teacher': 80_238_599, 'A': 20_069_383, 'B': 5_022_215, 'C': 1_259_911}


def test_resemotenet_runs_and_every_parameter_learns():
    torch.manual_seed(0)
    net = ResEmoteNet('C')
    F.cross_entropy(net(torch.randn(6, 3, 64, 64)), torch.arange(6)).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None]
    assert net.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7)  # a batch of one


# ---- KD and DKD

def kd_by_scipy(s, t, T):
    s, t = s.numpy()/T, t.numpy()/T
    return T**2*rel_entr(softmax(t, 1), softmax(s, 1)).sum(1).mean()


@given(seeds, st.floats(.3, 30), st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_kd_equals_scipy(seed, T, classes):
    s, t = draw(seed, 5, classes), draw(seed + 1, 5, classes)
    assert float(kd_loss(s, t, T)) == pytest.approx(kd_by_scipy(s, t, T), abs=1e-9, rel=1e-9)


@given(seeds, st.floats(.3, 30))
@settings(max_examples=40, deadline=None)
def test_kd_ignores_a_shift_of_logits_and_vanishes_at_the_teacher(seed, T):
    s, t = draw(seed, 5, 7), draw(seed + 1, 5, 7)
    assert float(kd_loss(s + 11., t - 4., T)) == pytest.approx(float(kd_loss(s, t, T)), rel=1e-9)
    assert abs(float(kd_loss(t, t, T))) < 1e-9 <= float(kd_loss(s, t, T))


def test_kd_gives_the_teacher_no_gradient_and_widens_half_precision():
    s, t = draw(0, 8, 7).float().requires_grad_(), draw(1, 8, 7).float().requires_grad_()
    kd_loss(s, t, 4).backward()
    assert t.grad is None and s.grad.abs().sum() > 0
    half = kd_loss(s.detach().half(), t.detach().half(), 4)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(kd_loss(s, t, 4).item(), rel=2e-3)


@given(seeds, st.floats(.5, 10))
@settings(max_examples=60, deadline=None)
def test_dkd_identity(seed, T):
    "KD = TCKD + (1 - p_t) NCKD for each example, with p_t from scipy."
    s, t = draw(seed, 6, 7), draw(seed + 1, 6, 7)
    y = torch.as_tensor(np.random.default_rng(seed).integers(0, 7, 6))
    tckd, nckd = dkd_terms(s, t, y, T)
    p = torch.as_tensor(softmax(t.numpy()/T, 1))
    assert float((tckd + (1 - p.gather(1, y[:, None])[:, 0])*nckd).mean())*T**2 == pytest.approx(kd_by_scipy(s, t, T), rel=1e-9, abs=1e-9)


@given(seeds, st.floats(0, 3), st.floats(0, 10), st.floats(.5, 10))
@settings(max_examples=60, deadline=None)
def test_dkd_equals_a_plain_derivation(seed, alpha, beta, T):
    "Each example on its own: the binary KL, and the KL of the other classes renormalised."
    s, t, rng = draw(seed, 6, 7), draw(seed + 1, 6, 7), np.random.default_rng(seed)
    y, total = rng.integers(0, 7, 6), 0.
    for a, b, k in zip(s.numpy(), t.numpy(), y):
        q, p = softmax(a/T), softmax(b/T)
        rest = np.arange(7) != k
        total += alpha*rel_entr([p[k], p[rest].sum()], [q[k], q[rest].sum()]).sum() + beta*rel_entr(softmax(b[rest]/T), softmax(a[rest]/T)).sum()
    assert float(dkd_loss(s, t, torch.as_tensor(y), alpha, beta, T)) == pytest.approx(T**2*total/6, rel=1e-7, abs=1e-9)


def test_dkd_is_exact_where_probabilities_underflow():
    "A student 200 logits sure of the wrong class, in float32, against mathematics in logs."
    s, t, y = torch.tensor([[0., 200, 0]]).requires_grad_(), torch.tensor([[3., 0, 1]]), torch.tensor([0])
    loss = dkd_loss(s, t, y, 1, 0, 1)
    ls, p = log_softmax(s.detach().numpy().astype(float), 1)[0], softmax(t.numpy().astype(float), 1)[0]
    rest = np.logaddexp(ls[1], ls[2])
    assert loss.item() == pytest.approx(p[0]*(np.log(p[0]) - ls[0]) + (1 - p[0])*(np.log(1 - p[0]) - rest), rel=1e-5)
    loss.backward()
    assert s.grad.isfinite().all() and s.grad[0, 1] > 0  # it is told to be less sure


def test_dkd_gradient_is_the_numerical_one():
    s, t, y = draw(3, 4, 7).requires_grad_(), draw(4, 4, 7), torch.tensor([0, 6, 2, 2])
    assert torch.autograd.gradcheck(lambda z: dkd_loss(z, t, y, 1., 8., 4.), (s,))


@pytest.mark.parametrize('wrong', [
    lambda: kd_loss(torch.zeros(4, 7), torch.zeros(1, 7), 4), lambda: kd_loss(torch.zeros(4, 7), torch.zeros(4, 8), 4), lambda: kd_loss(torch.zeros(4, 7), torch.zeros(4, 7), 0),
    lambda: dkd_loss(torch.zeros(4, 7), torch.zeros(4, 7), torch.zeros(3, dtype=torch.long), 1, 8, 4), lambda: dkd_loss(torch.zeros(4, 7), torch.zeros(4, 7), torch.zeros(4), 1, 8, 4)])
def test_misaligned_distillation_is_refused(wrong):
    with pytest.raises(FerError): wrong()


def test_dkd_warmup():
    assert [dkd_warmup(e, 4) for e in (1, 2, 4, 9)] == [.25, .5, 1, 1]


# ---- manifold distillation

@given(seeds, st.integers(1, 4), st.sampled_from([1, 4, 9]), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_manifold_equals_the_full_gram_matrix(seed, B, P, k):
    "One Gram matrix over all B·P tokens; each relation is a set of its entries."
    s, t = draw(seed, B, P, 5), draw(seed + 1, B, P, 3)
    cos = lambda x: np.einsum('ad,bd->ab', *[(x/x.norm(dim=2, keepdim=True)).flatten(0, 1).numpy()]*2)
    error = (cos(s) - cos(t))**2
    image, place = np.repeat(np.arange(B), P), np.tile(np.arange(P), B)
    d = torch.randperm(B*P, generator=torch.Generator().manual_seed(seed % 1000))[:k].numpy()
    want = {'patch': error[image[:, None] == image].mean(), 'sample': error[place[:, None] == place].mean(), 'random': error[np.ix_(d, d)].mean()}
    got = manifold_terms(s, t, k, torch.Generator().manual_seed(seed % 1000))
    assert {n: float(v) for n, v in got.items()} == pytest.approx(want, rel=1e-9, abs=1e-12)
    total = manifold_loss(s, t, .5, 2., .7, k, torch.Generator().manual_seed(seed % 1000))
    assert float(total) == pytest.approx(.5*want['sample'] + 2*want['patch'] + .7*want['random'], rel=1e-9, abs=1e-12)


def test_manifold_draws_by_its_generator():
    s, t = draw(0, 4, 16, 5), draw(1, 4, 16, 5)
    one = [float(manifold_loss(s, t, 0, 0, 1, 10, torch.Generator().manual_seed(i))) for i in (1, 1, 2)]
    assert one[0] == one[1] != one[2]


def test_tokens_of_a_map_and_its_merged_form_keep_every_value():
    x = draw(0, 2, 3, 8, 8)
    t = tokens(x)
    assert t.shape == (2, 64, 3) and torch.equal(t[1, 8*3 + 5], x[1, :, 3, 5])
    m = merge_tokens(t)
    assert m.shape == (2, 16, 12) and torch.equal(m.flatten().sort().values, t.flatten().sort().values)
    assert torch.equal(m[0, 4*1 + 2, :3], x[0, :, 2, 4])  # the upper left corner of block (1, 2)
    with pytest.raises(FerError): merge_tokens(t[:, :60])
    with pytest.raises(FerError): manifold_loss(t, m)


# ---- other margins and losses on labels

@pytest.fixture(scope='module')
def metric_learning():
    from fer_core.compat import mend_torchvision
    mend_torchvision()
    return pytest.importorskip('pytorch_metric_learning')


@pytest.mark.parametrize('m', [.1, .35])
def test_cosface_equals_pytorch_metric_learning(metric_learning, m):
    from pytorch_metric_learning.losses import CosFaceLoss
    torch.manual_seed(1)
    head = CosFaceHead(6, 7, s=20, m=m).double()
    theirs = CosFaceLoss(num_classes=7, embedding_size=6, margin=m, scale=20).double()
    theirs.W.data = head.weight.data.T.clone()
    y = torch.arange(40) % 7
    ours_x = draw(3, 40, 6).requires_grad_()
    theirs_x = ours_x.detach().clone().requires_grad_()
    ours, want = F.cross_entropy(head(ours_x, y), y), theirs(theirs_x, y)
    ours.backward(), want.backward()
    assert abs(ours.item() - want.item()) < 1e-9
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(head.weight.grad, theirs.W.grad.T, atol=1e-9, rtol=1e-7)


@given(seeds, st.floats(.05, 1.))
@settings(max_examples=20, deadline=None)
def test_supervised_contrast_equals_pytorch_metric_learning(seed, T):
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import DoNothingReducer
    e, y = draw(seed, 14, 5).requires_grad_(), torch.as_tensor(np.random.default_rng(seed).integers(0, 5, 14))
    theirs_e = e.detach().clone().requires_grad_()
    each = SupConLoss(temperature=T, reducer=DoNothingReducer())(theirs_e, y)['loss']['losses']
    paired = ((y[:, None] == y).sum(1) > 1)
    ours = supcon_loss(e, y, T)
    if not paired.any():
        assert ours == 0
        return
    want = each[paired].mean()
    torch.testing.assert_close(ours, want, atol=1e-9, rtol=1e-7)
    ours.backward(), want.backward()
    torch.testing.assert_close(e.grad, theirs_e.grad, atol=1e-8, rtol=1e-6)


@given(seeds, st.floats(.5, 4.))
@settings(max_examples=30, deadline=None)
def test_focal_loss_equals_torchvisions_of_two_classes(seed, gamma):
    from torchvision.ops import sigmoid_focal_loss
    z, y = draw(seed, 20, 2).requires_grad_(), torch.as_tensor(np.random.default_rng(seed).integers(0, 2, 20))
    ours, want = ce_loss(z, y, gamma=gamma), sigmoid_focal_loss(z[:, 1] - z[:, 0], y.double(), alpha=-1, gamma=gamma, reduction='mean')
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(ours, z)[0], torch.autograd.grad(want, z)[0], atol=1e-12, rtol=1e-8)


def test_focal_loss_of_seven_classes_weights_and_soft_labels():
    rng = np.random.default_rng(0)
    z, soft, w = draw(0, 9, 7), torch.as_tensor(rng.dirichlet(np.ones(7), 9)), torch.as_tensor(rng.uniform(.3, 2, 7))
    p = softmax(z.numpy(), 1)
    by_hand = -(soft.numpy()*w.numpy()*(1 - p)**1.5*np.log(p)).sum(1).mean()
    assert ce_loss(z, soft, weights=w, gamma=1.5).item() == pytest.approx(by_hand, rel=1e-10)
    y = torch.arange(9) % 7
    weighted = -(w.numpy()[y]*(1 - p[range(9), y])**1.5*np.log(p[range(9), y])).sum()/w.numpy()[y].sum()
    assert ce_loss(z, y, weights=w, gamma=1.5).item() == pytest.approx(weighted, rel=1e-10)
    sample = torch.tensor([0.] + [1.]*8)
    grad = torch.autograd.grad(ce_loss(z.requires_grad_(), y, gamma=2., sample=sample), z)[0]
    assert (grad[0] == 0).all() and (grad[1:] != 0).any()


@given(seeds, st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_logit_adjustment_in_its_closed_form(seed, tau):
    "Menon et al. 2021, eq. 10: log(1 + sum over other classes of (pi'/pi)^tau exp(z' - z))."
    rng = np.random.default_rng(seed)
    counts, z, y = rng.integers(5, 900, 7), draw(seed, 6, 7), torch.as_tensor(rng.integers(0, 7, 6))
    pi = counts/counts.sum()
    by_hand = np.mean([np.log(1 + sum((pi[k]/pi[c])**tau*np.exp(zi[k] - zi[c]) for k in range(7) if k != c)) for zi, c in zip(z.numpy(), y.tolist())])
    assert F.cross_entropy(adjust_logits(z, pi, -tau), y).item() == pytest.approx(by_hand, rel=1e-9)
    assert np.allclose(adjust_logits(adjust_logits(z.numpy(), pi, tau), pi, -tau), z.numpy())


def test_the_strength_of_the_adjustment_is_found_on_validation():
    rng = np.random.default_rng(0)
    y = rng.choice(7, 4000, p=[.4, .25, .15, .1, .05, .03, .02])
    z = np.eye(7)[y]*1.5 + rng.normal(size=(4000, 7))
    pi = np.bincount(y, minlength=7)/len(y)
    tau, scores = choose_tau(z + np.log(pi), y, pi)   # a model that knows the frequencies
    assert .2 < tau < 1.2 and max(scores) > scores[0] + .02
    with pytest.raises(FerError): adjust_logits(z, np.ones(7), 1.)


@given(seeds, st.floats(0, .99999))
@settings(max_examples=30, deadline=None)
def test_effective_numbers_as_published(seed, beta):
    "Cui et al. 2019: (1 - beta)/(1 - beta^n), the sum of a geometric series in the denominator."
    counts = np.random.default_rng(seed).integers(1, 3000, 7)
    w = np.array([1/sum(beta**i for i in range(n)) for n in counts])
    assert np.allclose(effective_weights(counts, beta), w*counts.sum()/(w*counts).sum(), rtol=1e-4)
    assert np.isclose((effective_weights(counts, beta).numpy()*counts).sum(), counts.sum(), rtol=1e-5)


def test_the_objectives_defaults_are_plain_smoothed_cross_entropy():
    z, y = draw(2, 8, 7).float(), torch.arange(8) % 7
    class Net:
        head = None
        def __call__(self, x, y=None): return z
    assert torch.equal(label_objective()(Net(), None, y, np.arange(8), 0), F.cross_entropy(z, y, label_smoothing=.1))
    weights = prior_weights(np.arange(1, 8)/28, .5)
    assert torch.equal(label_objective(LabelLoss(0., class_power=.5), np.arange(1, 8))(Net(), z, y, np.arange(8), 0), F.cross_entropy(z, y, weight=weights))
    with pytest.raises(FerError): label_objective(LabelLoss(tau=1.))
    with pytest.raises(FerError): LabelLoss(class_power=1., class_beta=.9)


def test_gradients_of_all_of_them():
    y, pi = torch.tensor([0, 1, 2, 0, 1, 2]), np.array([.6, .3, .1])
    check = lambda f: torch.autograd.gradcheck(f, draw(5, 6, 3).requires_grad_())
    assert check(lambda z: ce_loss(z, y, .1, torch.tensor([1., 2., 3.], dtype=torch.float64), gamma=2.)) and check(lambda z: ce_loss(adjust_logits(z, pi, -1.), y))
    assert check(lambda z: supcon_loss(z, y, .3)) and check(lambda z: CosFaceHead(3, 3).double()(z, y).logsumexp(1).sum() if torch.manual_seed(0) else None)


@pytest.mark.parametrize('gamma', [.5, 1., 2.])
def test_focal_gradients_stay_finite_where_the_label_is_certain(gamma):
    z = torch.tensor([[200., 0., 0.], [0., 0., 0.]], requires_grad=True)
    loss = ce_loss(z, torch.tensor([0, 1]), gamma=gamma)
    assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all() and torch.isfinite(loss)


def test_contrast_is_as_precise_under_autocast():
    e, y = draw(1, 16, 8).float(), torch.arange(16) % 4
    with torch.autocast('cpu', torch.bfloat16): low = supcon_loss(e, y, .05)
    assert low.item() == pytest.approx(supcon_loss(e, y, .05).item(), rel=1e-6)

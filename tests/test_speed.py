"""Eased training: the same numbers as the plain layers, in every shape, and nothing left behind."""
from copy import deepcopy
import numpy as np, pytest, torch
from torch import nn
from fer_core.compat import mend_torchvision
mend_torchvision()
from timm.layers import Conv2dSame
from fer_core.models.backbones import Classifier, ModelConfig
from fer_core.models.resemotenet import ResEmoteNet
from fer_core.models.speed import DepthwiseConv, Eased, conv_pads, ease, fast_training, out_size, tiny_conv, unease

CL = torch.channels_last


def make(same, i, o, k, stride, groups=1, pad=None):
    more = {} if same else {'padding': k//2 if pad is None else pad}
    return (Conv2dSame if same else nn.Conv2d)(i, o, k, stride=stride, groups=groups, **more).double().to(memory_format=CL)


def same_as_plain(conv, detour, size, n=3):
    "Outputs and the three gradients of a detour and of autograd through the plain layer."
    x = torch.randn(n, conv.in_channels, *size, dtype=torch.float64).contiguous(memory_format=CL).requires_grad_()
    plain, other, ends = conv(x), detour(conv, x), [x, conv.weight, conv.bias]
    g = torch.randn_like(plain)
    torch.testing.assert_close(other, plain, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(other, ends, g), torch.autograd.grad(plain, ends, g)): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def depthwise(conv, x): return DepthwiseConv.apply(x, conv.weight, conv.bias, conv.stride[0], conv_pads(conv, x.shape[-2:]))


@pytest.mark.parametrize('size', [(8, 8), (9, 9), (8, 7), (5, 6), (2, 2), (1, 1), (1, 4)], ids=str)
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('k', [3, 5, 7])
@pytest.mark.parametrize('same', [False, True], ids=['symmetric', 'same'])
def test_depthwise_gradients_are_autograds(same, k, stride, size):
    torch.manual_seed(0)
    same_as_plain(make(same, 6, 6, k, stride, groups=6), depthwise, size)


@pytest.mark.parametrize('pad', [0, 1])
def test_depthwise_with_less_padding(pad):
    torch.manual_seed(0)
    for stride in (1, 2): same_as_plain(make(False, 4, 4, 5, stride, groups=4, pad=pad), depthwise, (9, 8))


def test_depthwise_gradient_by_finite_differences():
    torch.manual_seed(0)
    conv = make(True, 2, 2, 3, 2, groups=2)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: DepthwiseConv.apply(x, w, b, 2, conv_pads(conv, (4, 5))), (x, conv.weight, conv.bias))


TINY = [(k, stride, pad, same, size) for k, stride, pad, same in ((3, 1, 1, False), (3, 2, 1, False), (3, 2, 0, True), (5, 2, 2, False), (1, 1, 0, False), (1, 2, 0, False), (3, 1, 0, False), (2, 2, 0, False), (3, 1, 3, False))
        for size in ((1, 1), (2, 2), (1, 3), (3, 4), (4, 4)) if same or min(size) + 2*pad >= k]


@pytest.mark.parametrize('k, stride, pad, same, size', TINY, ids=str)
def test_tiny_convolutions_are_convolutions(k, stride, pad, same, size):
    torch.manual_seed(0)
    conv = make(same, 5, 7, k, stride, pad=pad)
    assert out_size(conv, size) == list(conv(torch.zeros(1, 5, *size, dtype=torch.float64)).shape[-2:])
    same_as_plain(conv, lambda c, x: tiny_conv(x, c), size)


def gradients(net, x, bf16):
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = torch.logsumexp(net(x).float() if bf16 else net(x), 1).sum()
    net.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()]).double()


@pytest.mark.parametrize('config', [ModelConfig('mobilenetv3_small_050'), ModelConfig('mobilenetv1_100', options=(('pad_type', 'same'),)), ModelConfig('resnet10t'),
                                    ModelConfig('convnext_atto'), ModelConfig('efficientnet_b0', 'cosine'), 'C'], ids=lambda c: c if isinstance(c, str) else c.backbone)
def test_whole_networks_train_alike(config):
    "In float64 the detours give the plain networks' loss, gradient and batch statistics."
    torch.manual_seed(0)
    net = (ResEmoteNet(config, channels=1) if isinstance(config, str) else Classifier(config)).double().to(memory_format=CL)
    eased, x = deepcopy(net), torch.randn(4, 1, 64, 64, dtype=torch.float64)
    assert ease(eased)
    out = []
    for n in (net, eased):
        torch.manual_seed(1)
        out.append(gradients(n.train(), x, False))
    torch.testing.assert_close(out[1][0], out[0][0], rtol=1e-10, atol=0)
    assert (out[1][1] - out[0][1]).norm() <= 1e-9*out[0][1].norm()
    for (name, a), b in zip(net.state_dict().items(), eased.state_dict().values()): torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)


def test_bfloat16_loses_no_more_than_the_plain_layer():
    "Against float64, the eased gradient is as near as the plain one."
    torch.manual_seed(0)
    for k, stride in ((3, 2), (5, 1), (5, 2)):
        conv = nn.Conv2d(32, 32, k, stride, k//2, groups=32)
        x, errors = torch.randn(8, 32, 12, 12).bfloat16().contiguous(memory_format=CL), []
        exact = deepcopy(conv).double()
        exact.weight.data = conv.weight.data.bfloat16().double()
        def way(c, x):
            x = x.requires_grad_()
            with torch.autocast('cpu', torch.bfloat16, enabled=x.dtype != torch.float64): y = c.train()(x)
            g = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16()
            return [t.double() for t in torch.autograd.grad(y, [x, c.weight], g.to(y.dtype))]
        want, plain = way(exact, x.double()), way(conv, x.detach())
        ease(conv)
        assert isinstance(conv, Eased)
        for e, p, w in zip(way(conv, x.detach()), plain, want): errors.append(((e - w).norm()/w.norm(), (p - w).norm()/w.norm()))
        for e, p in errors: assert e <= max(1.5*p, 4e-3), (k, stride, errors)


def test_the_detours_are_taken_in_training_alone(monkeypatch):
    import fer_core.models.speed as speed
    taken = []
    monkeypatch.setattr(speed, 'tiny_conv', lambda x, conv: taken.append(conv) or tiny_conv(x, conv))
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 2, 2)
    ease(conv)
    conv.eval()(x)
    with torch.no_grad(): conv.train()(x)
    assert not taken
    conv(x)
    assert taken == [conv]
    conv(torch.randn(2, 4, 3, 3))
    assert len(taken) == 1


def test_nothing_is_left_behind(tmp_path):
    "Layers, state, copies and the exported graph are those of the plain network."
    torch.manual_seed(0)
    net = Classifier(ModelConfig('mobilenetv3_small_050')).to(memory_format=CL)
    kinds, inplace = [type(m) for m in net.modules()], [getattr(m, 'inplace', None) for m in net.modules()]
    state, x = deepcopy(net.state_dict()), torch.randn(2, 1, 48, 48)
    plain = net.eval()(x)
    with pytest.raises(KeyError), fast_training(net, 'bf16-mixed', 'cpu') as n:
        assert n and any(isinstance(m, Eased) for m in net.modules())
        copy = deepcopy(net)
        assert torch.equal(net(x), plain) and torch.equal(copy(x), plain)
        copy.head.weight.data.zero_()
        assert torch.equal(net(x), plain) and not torch.equal(copy(x), plain)
        raise KeyError
    assert [type(m) for m in net.modules()] == kinds and [getattr(m, 'inplace', None) for m in net.modules()] == inplace
    assert list(net.state_dict()) == list(state) and all(torch.equal(a, state[k]) for k, a in net.state_dict().items())
    assert unease(copy) == n and unease(copy) == 0
    with fast_training(net, 'bf16-mixed', 'cuda') as n: assert n == 0
    ease(net)
    pictures = np.random.default_rng(0).standard_normal((3, 1, 48, 48), dtype=np.float32)
    torch.onnx.export(net.eval(), (x,), tmp_path/'eased.onnx', input_names=['input'], dynamo=False)
    import onnxruntime
    got = onnxruntime.InferenceSession(tmp_path/'eased.onnx', providers=['CPUExecutionProvider']).run(None, {'input': pictures[:2]})[0]
    unease(net)
    np.testing.assert_allclose(got, net(torch.from_numpy(pictures[:2])).detach().numpy(), rtol=1e-4, atol=1e-5)

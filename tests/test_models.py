"Networks: what a smaller one takes of a larger one."
import pytest, torch
from torch import nn
from fer_core.models.backbones import ModelConfig, make_backbone
from fer_core.models.inherit import inherit


def among_dead(state, seed): # the same network with dead channels between its own: they have no gain and nobody reads them
    g, big, places = torch.Generator().manual_seed(seed), dict(state), {}
    def widen(key, n): # where n channels of a tensor group lie among one and a half times as many
        if key not in places: places[key] = torch.randperm(n + n//2, generator=g)[:n].sort().values
        return places[key]
    def put(w, axis, at):
        shape = list(w.shape); shape[axis] = len(at) + len(at)//2
        return torch.zeros(shape).index_copy(axis, at, w)
    def norm(name, at):
        for k, dead in (('weight', 0.), ('bias', 0.), ('running_mean', 0.), ('running_var', 1.)):
            v = state[f'{name}.{k}']
            big[f'{name}.{k}'] = torch.full((len(at) + len(at)//2,), dead).index_copy(0, at, v)
    stream = widen('stem', len(state['conv_stem.weight']))
    big['conv_stem.weight'] = put(state['conv_stem.weight'], 0, stream); norm('bn1', stream)
    blocks = sorted({tuple(map(int, k.split('.')[1:3])) for k in state if k.startswith('blocks.')})
    for s, b in blocks:
        at = f'blocks.{s}.{b}'
        if f'{at}.conv.weight' in state: big[f'{at}.conv.weight'] = put(state[f'{at}.conv.weight'], 1, stream); continue
        inverted = f'{at}.conv_pwl.weight' in state
        last, its_norm = ('conv_pwl', 'bn3') if inverted else ('conv_pw', 'bn2')
        hidden = widen(at, len(state[f'{at}.conv_dw.weight'])) if inverted else stream
        if inverted: big[f'{at}.conv_pw.weight'] = put(put(state[f'{at}.conv_pw.weight'], 0, hidden), 1, stream); norm(f'{at}.bn1', hidden)
        big[f'{at}.conv_dw.weight'] = put(state[f'{at}.conv_dw.weight'], 0, hidden); norm(f'{at}.bn2' if inverted else f'{at}.bn1', hidden)
        if f'{at}.se.conv_reduce.weight' in state:
            big[f'{at}.se.conv_reduce.weight'] = put(state[f'{at}.se.conv_reduce.weight'], 1, hidden)
            for k in ('weight', 'bias'): big[f'{at}.se.conv_expand.{k}'] = put(state[f'{at}.se.conv_expand.{k}'], 0, hidden)
        out = widen(f'stage{s}', len(state[f'{at}.{last}.weight']))
        big[f'{at}.{last}.weight'] = put(put(state[f'{at}.{last}.weight'], 0, out), 1, hidden); norm(f'{at}.{its_norm}', out)
        stream = out
    return big


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'mobilenetv3_large_100'])
def test_live_channels_are_found_among_dead_ones_through_the_whole_network(name):
    "Wiring: every convolution must read the channels that the one before it kept, stem to head."
    torch.manual_seed(0)
    net = make_backbone(ModelConfig(name)).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var): nn.init.uniform_(t, .5, 1.5)
            for t in (m.bias, m.running_mean): nn.init.normal_(t, 0., .1)
    donor = among_dead(net.state_dict(), 1)
    assert donor['blocks.1.0.conv_pw.weight'].shape[1] > net.state_dict()['blocks.1.0.conv_pw.weight'].shape[1]
    heir = make_backbone(ModelConfig(name)).eval()
    report, x = inherit(heir, donor), torch.randn(2, 1, 48, 48)
    assert not report['missing'] and torch.equal(heir(x), net(x))

"What only real pictures can show; skipped where they are absent."
import subprocess, sys
import numpy as np, pytest, torch
from fer_core.compress.export import export_onnx, parity
from fer_core.data.preprocess import Preprocess, normalise, standardise
from fer_core.models.backbones import Classifier, ModelConfig, load_pretrained, refit_batchnorm


@pytest.fixture(scope='module')
def pixels(shared):
    path = shared/'data'/'fer2013'/'fer2013_train_public.npz'
    if not path.is_file(): pytest.skip(f'{path} is not there')
    z = np.load(path)
    return z['pixels'][z['usage'] == 1][:2000]


def test_onnx_agrees_with_torch_on_two_thousand_faces(pixels, tmp_path):
    torch.manual_seed(0)
    spec, model = Preprocess(size=48), Classifier(ModelConfig('mobilenetv3_large_100', output_stride=16)).eval()
    x = np.stack([normalise(standardise(p, spec), spec) for p in pixels])
    refit_batchnorm(model.backbone, torch.from_numpy(x[:256])) # statistics of faces, so that logits differ between faces
    seen = parity(export_onnx(model, tmp_path/'m.onnx', spec), model, x)
    assert seen['n'] == 2000 and seen['top1_agreement'] >= .99


def test_folded_face_weights_survive_refitting(shared, pixels):
    weights = shared/'weights'/'timm_mobilenetv1_100_vggface2_hse.pth'
    if not weights.is_file(): pytest.skip(f'{weights} is not there')
    spec, config = Preprocess(size=96), ModelConfig('mobilenetv1_100', weights_mean=.458, weights_std=1/255, options=(('pad_type', 'same'),))
    model = Classifier(config).eval()
    report = load_pretrained(model.backbone, weights)
    assert not report['missing'] and not report['unexpected']
    x = torch.from_numpy(np.stack([normalise(standardise(p, spec), spec) for p in pixels[:96]]))
    with torch.no_grad(): before = model.embed(x)
    scaled = x*(config.std/config.weights_std) + (config.mean - config.weights_mean)/config.weights_std
    assert refit_batchnorm(model.backbone, scaled) == 27
    with torch.no_grad(): after, training = model.embed(x), model.train().embed(x)
    scale = before.abs().mean()
    assert (before - after).abs().mean() < .01*scale       # the function is unchanged
    assert (training - after).abs().mean() < .05*scale     # and one step in training mode no longer destroys it


@pytest.mark.parametrize('film', ['single_face.mp4', 'no_face.mp4'])
def test_demo_command_on_films(shared, film, tmp_path):
    from pathlib import Path
    from fer_core.live.recognise import toy_model
    source = shared/'data'/'faces'/'videos'/film
    if not source.is_file(): pytest.skip(f'{source} is not there')
    model = toy_model(tmp_path/'toy.onnx')
    done = subprocess.run([str(Path(sys.executable).parent/'fer'), 'demo', '--source', str(source), '--model', str(model), '--csv', str(tmp_path/'out.csv'), '--no-window', '--max-frames', '40'], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    frames = {line.split(',')[0] for line in (tmp_path/'out.csv').read_text().splitlines()[1:]}
    assert len(frames) == 40 and 'frames/s' in done.stdout

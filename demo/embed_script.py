"""Expressions of the faces in some photos, as JSON lines, in twenty lines: the shape of a batch job.

    python demo/embed_script.py photo.jpg *.png
"""
import argparse, json, sys
import fer_core

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('photos', nargs='+')
p.add_argument('--model', help='ONNX file of fer_core (default: the released student)')
p.add_argument('--detector', default='auto', help="'auto', 'yunet', 'retinaface' or a YuNet file")
a = p.parse_args()

try:
    with fer_core.Recognizer(a.model, detector=a.detector) as recognizer:
        for path, faces in recognizer.files(a.photos):
            print(json.dumps({'file': path, 'faces': [{'box': [round(v) for v in f.box], 'label': None if f.abstained else f.label, 'confidence': round(f.confidence, 3)} for f in faces]}))
except fer_core.FerError as e:
    sys.exit(print(e, file=sys.stderr) or e.exit_code)

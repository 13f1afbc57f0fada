"""The live demo as a program of one's own: a camera or a video in, labelled faces out.

    python demo/realtime_demo.py                         # camera 0
    python demo/realtime_demo.py clip.mp4 --csv out.csv  # a file; add --no-window on a server

Keys in the window: p or space pause, r record, l labels, b bars, q quit.
"""
import argparse, sys
import fer_core

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('source', nargs='?', default='0', help='video file, stream URL or camera index (default: 0)')
p.add_argument('--model', help='ONNX file of fer_core (default: the released student)')
p.add_argument('--detector', default='auto', help="'auto', 'yunet', 'retinaface' or a YuNet file")
p.add_argument('--csv', help='write a row per face and frame here')
p.add_argument('--video', help='write the labelled video here (stores images of people)')
p.add_argument('--log', help='write a log of the kind its suffix names: .csv, .jsonl or .parquet')
p.add_argument('--every', type=int, default=1, help='search every k-th frame, follow the faces between')
p.add_argument('--side', type=int, help="longest side of the searched picture, pixels (default: the detector's own)")
p.add_argument('--bars', action='store_true', help='a bar for each class beside each face')
p.add_argument('--max-frames', type=int, help='end after so many frames')
p.add_argument('--no-window', action='store_true', help='run without a window')
a = p.parse_args()

try:
    recognizer = fer_core.Recognizer(a.model, detector=a.detector)
    summary = fer_core.live.demo.run(a.source, recognizer, csv=a.csv, log=a.log, video=a.video, side=a.side, bars=a.bars, window=not a.no_window, every=a.every, max_frames=a.max_frames)
except fer_core.FerError as e:
    sys.exit(print(e, file=sys.stderr) or e.exit_code)
print(fer_core.live.demo.summary_table(summary))

"""A camera or a video in a program with an event loop: the loop goes on while faces are read, twenty lines.

    python demo/embed_async.py clip.mp4
"""
import argparse, asyncio
import fer_core

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('source', nargs='?', default='0', help='video file, stream URL or camera index (default: 0)')
p.add_argument('--model', help='ONNX file of fer_core (default: the released student)')
p.add_argument('--detector', default='auto')
a = p.parse_args()


async def watch():
    frames = (frame for _, frame in fer_core.live.demo.Source(a.source))
    async with fer_core.Recognizer(a.model, detector=a.detector) as recognizer:
        async for faces in recognizer.astream(frames, track=True, every=3):
            print(' '.join(f'#{f.track_id} {"unsure" if f.abstained else f.label} {f.confidence:.2f}' for f in faces) or '-', flush=True)


try: asyncio.run(watch())
except KeyboardInterrupt: pass

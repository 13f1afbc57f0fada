"""The set-up behind every make target: .venv with torch's right build, the project with its dev tools, and its Jupyter kernel.

Standard library only; runs under the system's Python. Variables: TORCH_INDEX=URL|none (where torch comes from),
FER_CORE_OPENCV=auto|gui|headless (auto takes the headless build where libGL is absent)."""
import argparse, os, platform, shutil, subprocess, sys, threading, time, urllib.request, venv
from pathlib import Path
from settings import ROOT, read_settings, requirements

CPU_INDEX = 'https://download.pytorch.org/whl/cpu'


def say(text): print(f'set-up: {text}', flush=True)


def fail(text): sys.exit(f'set-up stopped: {text}')


def make_venv(folder, minimum): # minimum: '3.11'
    "Create the virtual environment, unless a working one is there; return its Python."
    python = folder/('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    if sys.version_info[:2] < tuple(map(int, minimum.split('.'))):
        fail(f'Python {platform.python_version()} is too old, {minimum} or newer is needed: make PYTHON=/path/to/python{minimum} …')
    if python.exists() and not subprocess.run([python, '-m', 'pip', '--version'], capture_output=True).returncode: return python
    say(f'creating {folder.name} with Python {platform.python_version()}')
    try: venv.create(folder, clear=True, with_pip=True)
    except subprocess.CalledProcessError: fail("Python's venv cannot install pip here; on Debian and Ubuntu: apt install python3-venv")
    return python


def has_gpu():
    "Whether an NVIDIA GPU answers."
    smi = shutil.which('nvidia-smi')
    return bool(smi) and b'GPU' in subprocess.run([smi, '-L'], capture_output=True).stdout


def answers(url, seconds=3):
    "Whether a URL answers in time; name look-ups have no timeout of their own, hence the thread."
    found = []
    def ask():
        try:
            with urllib.request.urlopen(urllib.request.Request(url + '/torch/', method='HEAD'), timeout=seconds): found.append(True)
        except OSError: found.append(False)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start(); thread.join(seconds + .5)
    return found == [True]


def torch_source():
    "pip's arguments for torch: nothing where a GPU is (the CUDA build is the default), else PyTorch's CPU index if it answers."
    chosen = os.environ.get('TORCH_INDEX', '')
    if chosen: return [] if chosen == 'none' else ['--extra-index-url', chosen]
    if has_gpu(): say('a GPU answers: torch with CUDA'); return []
    if sys.platform != 'linux': return []  # the default wheels elsewhere are CPU builds
    if answers(CPU_INDEX): say("no GPU: torch's CPU build"); return ['--extra-index-url', CPU_INDEX]
    say(f"no GPU, and {CPU_INDEX} does not answer: torch from pip's own configuration (TORCH_INDEX=URL names another index)")
    return []


def pip(python, *args):
    "Run pip in the environment; progress bars only for a person."
    quiet = [] if sys.stdout.isatty() else ['-qq']
    done = subprocess.run([python, '-m', 'pip', *args[:1], *quiet, '--disable-pip-version-check', *args[1:]], cwd=ROOT)
    if done.returncode: fail(f"pip {' '.join(map(str, args))} failed (above); the same make command goes on from here")


def import_error(python, module):
    "The last line of the error that importing a module gives, or '' if it imports."
    done = subprocess.run([python, '-c', f'import {module}'], capture_output=True, text=True, cwd=ROOT)
    return (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1] if done.returncode else ''


def settle_opencv(python, requirement): # requirement: settings.ini's line for opencv-python
    "OpenCV's usual build needs libGL and X libraries; put the headless one in its place where they are absent."
    wish, headless = os.environ.get('FER_CORE_OPENCV', 'auto'), requirement.replace('opencv-python', 'opencv-python-headless')
    if wish not in ('auto', 'gui', 'headless'): fail(f'FER_CORE_OPENCV={wish} is none of auto, gui, headless')
    error = '' if wish == 'headless' else import_error(python, 'cv2')
    if wish != 'headless' and not error: return
    if wish == 'gui' or (error and '.so' not in error):
        fail(f"OpenCV does not import ({error}). Install libGL (Debian: apt install libgl1), or take the build without windows: FER_CORE_OPENCV=headless make …"
             f", which is: pip uninstall opencv-python; pip install '{headless}'")
    say(f'OpenCV without windows ({error or "as asked"}): `fer demo` writes files and opens no window here')
    pip(python, 'uninstall', '-y', 'opencv-python', 'opencv-python-headless')  # both own the folder cv2/: never side by side
    pip(python, 'install', headless)
    if error := import_error(python, 'cv2'): fail(f'OpenCV still does not import: {error}')


def main(folder): # folder: the virtual environment
    "Everything, then the stamp that make looks at."
    start, s = time.time(), read_settings()
    python, wanted = make_venv(folder, s['min_python']), requirements(s)
    say('torch'); pip(python, 'install', *torch_source(), *[r for r in wanted if r.startswith('torch')])
    say('the project, its requirements and tools'); pip(python, 'install', '-e', '.[dev]')
    settle_opencv(python, next(r for r in wanted if r.startswith('opencv-python')))
    for module in ('torch', 'onnxruntime', 'fer_core'):
        if error := import_error(python, module): fail(f'{module} does not import: {error}')
    for name in ('python3', s['lib_name']):
        subprocess.run([python, '-m', 'ipykernel', 'install', '--sys-prefix', '--name', name, '--display-name', name], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (folder/'.ready').write_text(f'{time.time() - start:.0f} s\n')
    say(f'ready in {time.time() - start:.0f} s')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--venv', type=Path, default=ROOT/'.venv', help='folder of the virtual environment')
    try: main(parser.parse_args().venv.absolute())
    except KeyboardInterrupt: fail('interrupted; the same make command goes on from here')

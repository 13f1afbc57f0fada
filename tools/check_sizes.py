"""Does git hold, or would it take, a file over 8 MB outside fer_core/release?"""
import subprocess, sys
from settings import ROOT

LIMIT = 8e6  # bytes


def main():
    done = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: print('sizes: not a git checkout, nothing to look at'); return
    paths = [ROOT/name for name in done.stdout.split('\0') if name and not name.startswith('fer_core/release/')]
    rows = [f'{p.relative_to(ROOT)}: {p.stat().st_size/1e6:.1f} MB' for p in paths if p.is_file() and p.stat().st_size > LIMIT]
    if rows: sys.exit('files over 8 MB:\n  ' + '\n  '.join(rows))
    print(f'sizes: {len(paths)} files, none over {LIMIT/1e6:.0f} MB')


if __name__ == '__main__': main()

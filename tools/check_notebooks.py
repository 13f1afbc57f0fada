"""Are the notebooks fit to commit: clean as nbdev_clean leaves them, no path of this machine in an output, stages without logic?"""
import json, re, sys
from execnb.nbio import dict2nb, nb2str
from nbdev.clean import clean_nb
from nbdev.config import get_config
from settings import ROOT

MACHINE_PATH = re.compile(r'(?<![\w.:/])/(?:work|home|root|tmp|Users|var/folders|private|mnt|opt|usr/(?:local/)?lib)/[\w.-]+')


def is_clean(text): # text of a notebook file
    "Whether nbdev_clean would leave the file as it is."
    cfg, nb = get_config(path=ROOT), dict2nb(json.loads(text))
    clean_nb(nb, cfg.clear_all, cfg.get('allowed_metadata_keys', '').split(), cfg.get('allowed_cell_metadata_keys', '').split(), cfg.clean_ids)
    return nb2str(nb) == text


def output_texts(cell):
    "Every text that a cell's outputs hold; images' bytes left out."
    for out in cell.get('outputs', []):
        parts = [out.get('text', ''), '\n'.join(out.get('traceback', []))] + [v for k, v in out.get('data', {}).items() if not k.startswith('image/') or 'svg' in k]
        for part in parts: yield part if isinstance(part, str) else json.dumps(part) if isinstance(part, dict) else ''.join(part)


def cell_findings(cell):
    "What is wrong with one code cell's outputs."
    for text in output_texts(cell):
        if m := MACHINE_PATH.search(text): yield f'an output holds a path of this machine: {m.group()}'
    if any(o['output_type'] == 'error' for o in cell.get('outputs', [])): yield 'a stored error'
    if cell.get('execution_count') is not None: yield 'an execution count'


def stage_findings(cells):
    "What a stage notebook must have and must not have."
    tagged = sum('parameters' in c['metadata'].get('tags', []) for c in cells)
    if tagged != 1: yield f'{tagged} cells tagged `parameters`, one is needed'
    if any(re.search(r'^\s*(async def|def|class) ', ''.join(c['source']), re.M) for c in cells if c['cell_type'] == 'code'): yield 'a stage defines functions; they belong in the library'


def findings(path): # a notebook
    "Each reason not to commit it, one line."
    text = path.read_text(encoding='utf-8')
    cells = json.loads(text)['cells']
    if not is_clean(text): yield 'not clean: run nbdev_clean'
    for i, cell in enumerate(cells):
        if cell['cell_type'] == 'code': yield from (f'cell {i}: {f}' for f in cell_findings(cell))
    if path.parent.name == 'stages': yield from stage_findings(cells)


def main():
    paths = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    rows = [f'{p.relative_to(ROOT)}: {f}' for p in paths for f in findings(p)]
    if rows: sys.exit('notebooks not fit to commit:\n  ' + '\n  '.join(rows))
    print(f'notebooks: {len(paths)} clean')


if __name__ == '__main__': main()

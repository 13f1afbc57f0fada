"""README.md from nbs/index.ipynb, executed first so that its tables are of today. With --check: are both as committed?"""
import contextlib, posixpath, re, sys
import nbformat
from execnb.nbio import nb2str, read_nb
from execnb.shell import CaptureShell
from nbconvert import MarkdownExporter
from nbdev.clean import clean_nb
from settings import ROOT
from traitlets.config import Config

SOURCE, TARGET = ROOT/'nbs'/'index.ipynb', ROOT/'README.md'
NOTE = '<!-- Written by tools/readme.py from nbs/index.ipynb (make readme): edit that instead. -->\n\n'
LINK = re.compile(r'(\]\()([^)\s#]+)([^)]*\))')


def execute(path): # notebook
    "The text of the notebook, run from its own folder in this process and left as nbdev_clean leaves it."
    nb, shell = read_nb(path), CaptureShell(path)
    with contextlib.chdir(path.parent): shell.run_all(nb, exc_stop=True)
    clean_nb(nb, allowed_cell_metadata_keys=['tags'])
    return nb2str(nb)


def at_root(match):
    "A link relative to nbs/, as one relative to the root."
    if re.match(r'\w+:', match[2]): return match[0]
    return match[1] + posixpath.normpath(posixpath.join('nbs', match[2])) + match[3]


def broken_links(text): # the README
    "Targets that are not in the checkout."
    return sorted({m[2] for m in LINK.finditer(text) if not re.match(r'\w+:', m[2]) and not (ROOT/m[2]).exists()})


def markdown(nb): # an executed notebook
    "The README: prose and outputs, with the code of cells that say neither `echo: false` nor `hide`."
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide\s*$', c.source, re.M)]
    for cell in nb.cells:
        if cell.cell_type == 'code' and re.search(r'^#\|\s*echo:\s*false', cell.source, re.M): cell.metadata['tags'] = ['no-source']
    hide = Config({'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': {'no-source'}}})
    text, _ = MarkdownExporter(config=hide).from_notebook_node(nb)
    text = re.sub(r'\n{3,}', '\n\n', LINK.sub(at_root, text)).strip() + '\n'
    return NOTE + text


def main():
    text = execute(SOURCE)
    files = {SOURCE: text, TARGET: markdown(nbformat.reads(text, as_version=4))}
    stale = [p for p, text in files.items() if not p.exists() or p.read_text(encoding='utf-8') != text]
    if '--check' not in sys.argv: [p.write_text(files[p], encoding='utf-8') for p in stale]
    elif stale: sys.exit(f"{', '.join(str(p.relative_to(ROOT)) for p in stale)}: out of step with nbs/index.ipynb or what it reads; run `make readme`")
    if lost := broken_links(files[TARGET]): sys.exit(f"README.md links to what is not there: {', '.join(lost)}")
    print(f"README.md: {'in step' if '--check' in sys.argv or not stale else 'written'}")


if __name__ == '__main__': main()

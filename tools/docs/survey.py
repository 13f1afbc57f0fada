"""What the site holds, read from the notebooks before any page is written: pages, chapters, and where the library's names are explained."""
import posixpath, re
from collections import Counter
from types import SimpleNamespace
from execnb.nbio import read_nb
from nbdev.maker import ModuleMaker
from fer_core.runs.stage import STAGES

ORDER = ['', 'tutorials', 'faces', 'data', 'models', 'evaluate', 'train', 'teach', 'distill', 'compress', 'live', 'runs', 'stages']  # chapters, the way the pipeline runs
FIRST = {folder: names if isinstance(names, tuple) else names.split() for folder, names in {  # a chapter's pages as they are best read; those not named follow, each after what it imports
    '': 'index findings ethics labels artifacts compat cli review_labels', 'tutorials': 'live dataset student gate', 'faces': 'detect align', 'stages': STAGES,
    'data': 'images adapter folders fer2013 affectnet rafdb expw sources manifest opinions fingerprint prints aligned splits validate curate review suspects hard preprocess augment corruptions samplers pack loader synthetic',
    'models': 'backbones heads cbam resemotenet swin inherit exported speed', 'teach': 'teacher ensemble softlabels', 'distill': 'kd dkd born_again mutual manifold negative teaching objective student',
    'evaluate': 'metrics calibrate scaling statistics paired conformal answer rules gates errors embeddings drift shift figures', 'compress': 'prune qat export portable quantize latency release publish',
    'train': 'losses adjust contrastive objective optim average loop judge baseline mining parallel simclr mae selfsup', 'live': 'source recognise track stabilise session overlay log health replay demo web',
    'runs': 'stage pipeline plan sweep cluster kernels report browse compare reproduce pages board appendix planned ledger tracking shift'}.items()}
DEFINED = re.compile(r'^(?:async def|def|class) (\w+)|^(\w[\w, ]*?) *(?::[^=\n]+)?=(?!=)(?:.*?\s# (.+))?', re.M)  # function or class, names of an assignment and the comment behind it


def heading(cells):
    "Title of a notebook and what it says of itself: its one-line subtitle, or its first sentence."
    text = next((c.source for c in cells if c.cell_type == 'markdown'), '')
    title, about = re.search(r'^# (.+)$', text, re.M), re.search(r'^> (.+)$', text, re.M) or re.search(r'^# .+\n+([^\n#>].*?(?:\.(?=\s|$)|$))', text, re.M)
    return title and title[1].replace('`', ''), about[1] if about else ''


def exported(cell): # code cell of a library notebook
    "Public name -> the comment beside it; names that a cell only passes on (`_all_`) are left out."
    notes = {n.strip(): m[3] or '' for m in DEFINED.finditer(cell.source) for n in (m[1] or m[2]).split(',')}
    return {n: notes[n] for n in ModuleMaker.make_all(None, [cell]) if n in notes}


def facts(nbs, path):
    "What other pages and the menu need of a notebook."
    source, cells = path.relative_to(nbs).as_posix(), read_nb(path).cells
    title, about = heading(cells)
    target, title = ('overview.html', 'Overview') if source == 'index.ipynb' else (f'{source[:-6]}.html', title or path.stem)
    page = SimpleNamespace(source=source, folder=posixpath.dirname(source), target=target, title=title, about=about, module='', names={}, needs=set())
    section = page.title
    for c in cells:
        if c.cell_type == 'markdown': section = ([*re.findall(r'^#{2,4} (.+)$', c.source, re.M)] or [section])[-1].replace('`', '')
        elif found := re.search(r'^#\|\s*default_exp\s+([\w.]+)', c.source, re.M): page.module = found[1]
        elif re.search(r'^#\|\s*export\b', c.source, re.M):
            page.needs |= set(re.findall(r'^\s*(?:from|import) fer_core\.([\w.]+)', c.source, re.M))
            for n, note in exported(c).items(): page.names.setdefault(n, SimpleNamespace(note=note, section=section, cell=c.id))
    return page


def in_order(pages): # of one chapter
    "Those that FIRST names, then each after what it imports."
    first, rest, out = FIRST.get(pages[0].folder, ()), sorted(pages, key=lambda p: p.source), []
    def stem(p): return posixpath.basename(p.source)[:-6]
    for n in first: out += [p for p in rest if stem(p) == n]
    rest = [p for p in rest if p not in out]
    while rest:
        modules = {p.module for p in rest if p.module}
        out.append(next((p for p in rest if not p.needs & (modules - {p.module})), rest[0]))
        rest.remove(out[-1])
    return out


def references(lessons):
    "A page of the API reference for each package, and the lessons it is made from."
    packages = {}
    for p in lessons:
        if p.module: packages.setdefault(p.module.rpartition('.')[0], []).append(p)
    for package, members in packages.items():
        full = f'fer_core.{package}'.rstrip('.')
        about = f'Names, signatures and parameters of {", ".join(p.module.rpartition(".")[2] for p in members)}'
        page = SimpleNamespace(source='', folder='reference', target=f'reference/{full}.html', title=full, about=about, module='', members=members)
        for p in members: p.reference = f'{page.target}#{p.module.rpartition(".")[2]}'
        yield page


def survey(nbs, out, reports): # folders
    "The site as a whole: its pages in reading order, its chapters, and where names are explained."
    folders = {}
    for path in sorted(nbs.rglob('*.ipynb')):
        if any(x.startswith(('.', '_')) for x in path.relative_to(nbs).parts): continue
        page = facts(nbs, path)
        folders.setdefault(page.folder, []).append(page)
    chapters = [(f.capitalize() or 'Start', in_order(folders[f])) for f in sorted(folders, key=lambda f: ORDER.index(f) if f in ORDER else len(ORDER))]
    chapters.append(('Reference', list(references([p for _, pages in chapters for p in pages]))))
    if reports: chapters.append(('Reports', [SimpleNamespace(source='', folder='reports', target='reports.html', title='Reports by date', about='Executed notebooks, the newest first', module='')]))
    chapters = [c for c in chapters if c[1]]
    for name, pages in chapters:
        for p in pages: p.chapter = name
    site = SimpleNamespace(nbs=nbs, out=out, reports=reports, chapters=chapters, pages=[p for _, pages in chapters for p in pages])
    site.sources, site.known = {p.source: p for p in site.pages if p.source}, known(site.pages)
    return site


def known(pages):
    "What prose may call a name of the library -> the page and anchor that explain it."
    where, bare = {}, Counter(n for p in pages if p.module for n in p.names)
    for p in pages:
        if not p.module: continue
        where[p.module], last = p.target, p.module.rpartition('.')[2]
        for n in p.names:
            href = f'{p.reference}.{n}'
            where |= {f'{p.module}.{n}': href, f'{last}.{n}': href} | ({n: href} if bare[n] == 1 else {})
    return where

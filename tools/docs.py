"""Every notebook and report as an HTML page in _docs/, with an index; nbconvert only, no Quarto."""
import html, re, shutil
import nbformat
from nbconvert import HTMLExporter
from settings import ROOT, read_settings
from traitlets.config import Config

OUT = ROOT/'_docs'
ORDER = ['', 'faces', 'data', 'models', 'evaluate', 'train', 'teach', 'distill', 'compress', 'live', 'runs', 'stages']  # the way the pipeline runs
OUTSIDE_LINK = re.compile(r'\]\((?:\.\./)+((?:README|LICENSE|settings|reports|papermill_runs|demo|tests|benchmarks)[^)]*)\)')  # out of nbs/, where no pages are
REPOSITORY = f"{read_settings()['git_url']}/blob/{read_settings()['branch']}/"
NOTEBOOK_LINK = re.compile(r'(\]\([^):]+)\.ipynb\b')
PAGE = '''<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}}li{{margin:.2rem 0}}small{{opacity:.75}}</style></head>
<body><h1>{title} <small>{version}</small></h1><p>{description}</p>
{body}</body></html>
'''


def heading(nb):
    "Title and one-line subtitle of a notebook."
    text = next((c.source for c in nb.cells if c.cell_type == 'markdown'), '')
    title, about = re.search(r'^# (.+)$', text, re.M), re.search(r'^> (.+)$', text, re.M)
    return title and title[1], about[1] if about else ''


def readable(nb):
    "A notebook for readers: no hidden cells, no directives, links between notebooks as links between pages."
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M)]
    for c in nb.cells:
        if re.search(r'^#\|\s*echo:\s*false', c.source, re.M): c.metadata['tags'] = [*c.metadata.get('tags', []), 'no-source']
        if c.cell_type == 'code': c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
        else: c.source = NOTEBOOK_LINK.sub(r'\1.html', OUTSIDE_LINK.sub(rf']({REPOSITORY}\1)', c.source))
    return nb


def convert(path, target): # notebook; HTML file
    "Write one page; its title and subtitle."
    nb = nbformat.read(path, as_version=4)
    title, about = heading(nb)
    hide = Config({'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': {'no-source'}}})
    body, _ = HTMLExporter(config=hide).from_notebook_node(readable(nb), {'metadata': {'name': title or path.stem}})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(body, encoding='utf-8')
    return title or path.stem, about


def entry(target, title, about=''): # page; its heading
    return f'<li><a href="{target.relative_to(OUT).as_posix()}">{html.escape(title)}</a> <small>{html.escape(about)}</small></li>'


def library():
    "Index sections of the notebooks, folder by folder."
    folders = {}
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if any(x.startswith(('.', '_')) for x in path.relative_to(ROOT).parts): continue
        target = OUT/('overview.html' if path.name == 'index.ipynb' else path.relative_to(ROOT/'nbs').with_suffix('.html'))
        folder = path.parent.relative_to(ROOT/'nbs').as_posix().strip('.')
        folders.setdefault(folder, []).append(entry(target, *convert(path, target)))
    for folder in sorted(folders, key=lambda f: ORDER.index(f) if f in ORDER else len(ORDER)):
        yield f"<h2>{folder or 'fer_core'}</h2><ul>{''.join(folders[folder])}</ul>"


def reports():
    "Index section of the dated reports, which are HTML already."
    pages = sorted((ROOT/'reports').rglob('*.html'))
    for p in pages:
        (OUT/p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, OUT/p.relative_to(ROOT))
    return f"<h2>reports</h2><ul>{''.join(entry(OUT/p.relative_to(ROOT), p.stem) for p in pages)}</ul>" if pages else ''


def main():
    s = read_settings()
    shutil.rmtree(OUT, ignore_errors=True)
    body = '\n'.join([*library(), reports()])
    shutil.copytree(ROOT/'nbs'/'images', OUT/'images', dirs_exist_ok=True)
    (OUT/'index.html').write_text(PAGE.format(title=html.escape(s['title']), version=s['version'], description=html.escape(s['description']), body=body), encoding='utf-8')
    print(f'docs: {len(list(OUT.rglob("*.html")))} pages, open {(OUT/"index.html").relative_to(ROOT)}')


if __name__ == '__main__': main()

"""The documentation site in _docs/: every notebook as a page, a reference of the library, the reports, a search. Needs no Quarto and no network; works from file://.

A link that leads nowhere is an error."""
import html, json, os, posixpath, re, shutil, sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote
from markupsafe import Markup
from pygments.formatters import HtmlFormatter
from tqdm import tqdm
from settings import ROOT

sys.path.insert(0, str(Path(__file__).parent/'docs'))
from fer_core.compat import cores, mend_nbformat  # noqa: E402

mend_nbformat()
from nbconvert.filters.markdown_mistune import MarkdownWithMath  # noqa: E402
from frame import ASSETS, SETTINGS, TEMPLATES, write  # noqa: E402
from lesson import lesson  # noqa: E402
from prose import Prose  # noqa: E402
from reference import reference  # noqa: E402
from survey import survey  # noqa: E402

OUT = ROOT/'_docs'
SITE = []  # in a process that writes pages


def contents(site):
    "The first page: every chapter with what its pages say of themselves."
    page = SimpleNamespace(source='', folder='', target='index.html', title=SETTINGS['title'], about=SETTINGS['description'], module='', chapter='')
    markdown = MarkdownWithMath(renderer=Prose(site, page))
    for p in site.pages: p.shown = Markup(re.sub('</?p>', '', markdown.render(p.about)))
    body = TEMPLATES.get_template('contents.html').render(title=page.title, about=page.about, version=SETTINGS['version'], chapters=site.chapters)
    return write(site, page, Markup(body), [(2, name.lower(), name) for name, _ in site.chapters]), []


def told(reports):
    "Page of a report -> what reports/index.html says it is about."
    index = reports/'index.html'
    return dict(re.findall(r'<tr><td class=text><a href="([^"]+)">[^<]*</a></td><td class=text>([^<]*)</td>', index.read_text(encoding='utf-8'))) if index.is_file() else {}


def report_list(site, page):
    "The reports by date; their entries for the search."
    days, about = {}, told(site.reports)
    for p in sorted(site.reports.glob('*/*.html'), key=lambda p: p.parent.name, reverse=True):
        day, _, name = p.parent.name[:10], p.parent.name[10], p.parent.name[11:]
        days.setdefault(day, []).append(SimpleNamespace(target=f'reports/{p.parent.name}/{p.name}', title=name, about=html.unescape(about.get(f'{p.parent.name}/{p.name}', ''))))
    body = TEMPLATES.get_template('reports.html').render(days=days.items(), table=(site.reports/'index.html').is_file())
    return write(site, page, Markup(body), []), [[r.title, r.target, f'Reports › {day}', r.about] for day, rs in days.items() for r in rs]


def broken(site, found): # `Links` of every page
    "'page: link' of each that leads nowhere; the insides of reports are theirs."
    ids, names = {f.target: f.ids for f in found}, {p.target: f'nbs/{p.source}' for p in site.pages if p.source}
    for f in found:
        for link in dict.fromkeys(f.links):
            path, _, anchor = unquote(link).partition('#')
            target = posixpath.normpath(posixpath.join(posixpath.dirname(f.target), path)) if path else f.target
            if not (site.out/target).is_file() or anchor and target in ids and anchor not in ids[target]: yield f'{names.get(f.target, f.target)}: {link}'


def copied(site):
    "Reports as they are, pictures beside notebooks, and the site's own files."
    for p in sorted(site.reports.rglob('*.html')) if site.reports else (): put(p, site.out/'reports'/p.relative_to(site.reports))
    for p in sorted(site.nbs.rglob('*')):
        if p.suffix in ('.svg', '.png', '.jpg', '.webp'): put(p, site.out/p.relative_to(site.nbs))
    for name in ('site.css', 'site.js'): put(ASSETS/name, site.out/'assets'/name)
    def colours(style): return ''.join(f'{line}\n' for line in HtmlFormatter(style=style).get_style_defs('.highlight').splitlines() if line.startswith('.highlight .'))
    (site.out/'assets'/'code.css').write_text(f'{colours("default")}@media (prefers-color-scheme: dark) {{\n{colours("github-dark")}}}\n', encoding='utf-8')


def put(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def start(site):
    "What a process that writes pages has to know."
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    SITE.append(site)


def make(n):
    "Page n of the site."
    site, page = SITE[-1], SITE[-1].pages[n]
    try: return (lesson if page.source else report_list if page.folder == 'reports' else reference)(site, page)
    except Exception as e: e.add_note(f'on the page {page.target}'); raise


def build(nbs, out, reports=None, workers=None): # folders of notebooks, of the site, of reports; None = as many as there are cores
    "Write the site anew; the links that lead nowhere."
    shutil.rmtree(out, ignore_errors=True)
    site = survey(Path(nbs), Path(out), Path(reports) if reports else None)
    copied(site)
    order = sorted(range(len(site.pages)), key=lambda n: site.pages[n].folder != 'reference')  # the longest first
    with ProcessPoolExecutor(workers or cores(), initializer=start, initargs=(site,)) as pool:
        jobs = {pool.submit(make, n): n for n in order}
        done = {jobs[j]: j.result() for j in tqdm(as_completed(jobs), total=len(jobs), desc='docs', unit='page', disable=None)}
    results = [contents(site), *(done[n] for n in sorted(done))]
    entries = [e for _, es in results for e in es]
    (site.out/'assets'/'search.js').write_text('const SEARCH = ' + json.dumps(entries, ensure_ascii=False, separators=(',', ':')) + '\n', encoding='utf-8')
    return site, list(broken(site, [f for f, _ in results]))


def main():
    site, lost = build(ROOT/'nbs', OUT, ROOT/'reports' if any((ROOT/'reports').glob('*/*.html')) else None)
    if lost: sys.exit(f'docs: {len(lost)} links lead nowhere\n  ' + '\n  '.join(lost))
    print(f'docs: {len(site.pages) + 1} pages, open {(OUT/"index.html").relative_to(ROOT)}')


if __name__ == '__main__': main()

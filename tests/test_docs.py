"""The documentation site: its frame, formulas, search, reference and links, built from a few notebooks."""
import asyncio, json, re, shutil, sys
from pathlib import Path
import pytest
from browser import Page, chromium, in_browser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs  # noqa: E402  (puts tools/docs on the path)
import nbformat  # noqa: E402  (after docs, which makes it load at once)
from prose import mathml, slug  # noqa: E402
from survey import FIRST, ORDER, survey  # noqa: E402

INDEX = '''# A project
> What it is for

It knows `labels.CLASSES`, `to_class`, `cores()` and `nothing_of_ours`, see [labels](labels.ipynb#What-each-dataset-calls-them), [its licence](../LICENSE), [a report](../reports/2026-01-02-teacher-abcdef/teacher.html).

## The formula
Entropy is $H=-\\sum_i p_i\\log p_i$, and with a margin $$\\mathcal L = \\frac{1}{n}\\sum_i \\mathrm{KL}(p_i \\,\\|\\, q_i) \\pm 1.$$

## A table
| model | figure |
| --- | --- |
| one | 0.5 |

## A picture
![the way](images/way.svg), and [back](#the-formula)'''


def notebook(path, *cells): # markdown, or code that starts with #|
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[(nbformat.v4.new_code_cell if c.startswith('#|') else nbformat.v4.new_markdown_cell)(c) for c in cells]), path)


@pytest.fixture(scope='module')
def built(tmp_path_factory): # -> the site of five notebooks and a report; the links that lead nowhere
    root = tmp_path_factory.mktemp('docs')
    notebook(root/'nbs'/'index.ipynb', INDEX)
    notebook(root/'nbs'/'tutorials'/'first.ipynb', '# The first steps\nRead [labels](../labels.ipynb) first. Then more.', '#| hide\nsecret = 1', '#| echo: false\nquiet = 2')
    for name in ('labels', 'compat', 'faces/align'): (root/'nbs'/name).parent.mkdir(exist_ok=True); shutil.copy(ROOT/'nbs'/f'{name}.ipynb', root/'nbs'/f'{name}.ipynb')
    (root/'nbs'/'images').mkdir(); (root/'nbs'/'images'/'way.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 10"/>')
    report = root/'reports'/'2026-01-02-teacher-abcdef'; report.mkdir(parents=True)
    (report/'teacher.html').write_text('<a href="nowhere.html">its own affair</a>'); (root/'LICENSE').touch()
    (root/'reports'/'index.html').write_text('<table><tr><td class=text><a href="2026-01-02-teacher-abcdef/teacher.html">2026-01-02-teacher-abcdef</a></td><td class=text>resnet18 &amp; more</td></tr></table>')
    return docs.build(root/'nbs', root/'out', root/'reports')


def read(built, name): return (built[0].out/name).read_text()


def test_every_page_has_the_frame(built):
    site, _ = built
    assert [c for c, _ in site.chapters] == ['Start', 'Tutorials', 'Faces', 'Reference', 'Reports']
    assert [p.target for p in site.pages] == ['overview.html', 'labels.html', 'compat.html', 'tutorials/first.html', 'faces/align.html', 'reference/fer_core.html', 'reference/fer_core.faces.html', 'reports.html']
    for n, page in enumerate(site.pages):
        text, up = read(built, page.target), '../'*page.target.count('/')
        assert re.findall(r'<summary>(\w+)</summary>', text) == [c for c, _ in site.chapters]
        assert re.findall(r'href="([^"]+)" aria-current="page"', text) == [up + page.target] and f'<details open><summary>{page.chapter}' in text
        assert re.findall(r'rel="(?:prev|next)" href="([^"]+)"', text) == [up + p.target for p in [*site.pages[max(n - 1, 0):n], *site.pages[n + 1:n + 2]]]
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', text), 'asks the network'
    for page in site.pages: assert f'href="{page.target}"' in read(built, 'index.html')


def test_a_lesson_is_made_for_readers(built):
    text, first = read(built, 'overview.html'), read(built, 'tutorials/first.html')
    assert '<math' in text and 'ℒ' in text and '<mi>KL</mi>' in text and '<mo>&#x000B1;</mo>' in text and '$' not in re.sub(r'<script.*', '', text, flags=re.S)
    assert re.findall(r'<li class="level2"><a href="#([^"]+)">', text) == ['the-formula', 'a-table', 'a-picture']
    assert '<div class="wide"><table>' in text and 'src="images/way.svg"' in text and 'href="#the-formula"' in text
    assert 'href="labels.html#what-each-dataset-calls-them"' in text and f'href="{docs.SETTINGS["git_url"]}/blob/main/LICENSE"' in text and 'href="reports/2026-01-02-teacher-abcdef/teacher.html"' in text
    assert 'secret' not in first and 'quiet' not in first and 'href="../labels.html"' in first
    assert built[0].sources['tutorials/first.ipynb'].about == 'Read [labels](../labels.ipynb) first.'


def test_names_of_the_library_lead_to_the_reference_and_back(built):
    text, page, lesson = read(built, 'overview.html'), read(built, 'reference/fer_core.html'), read(built, 'labels.html')
    for name in ('labels.CLASSES', 'labels.to_class', 'compat.cores'): assert f'href="reference/fer_core.html#{name}"><code>' in text and f'id="{name}"' in page
    assert '<code>nothing_of_ours</code>' in text and 'nothing_of_ours</code></a>' not in text
    from fer_core import labels
    assert re.findall(r'id="labels\.(\w+)"', page) == [n for n in built[0].sources['labels.ipynb'].names] and set(labels.__all__) == set(built[0].sources['labels.ipynb'].names)
    item = re.search(r'id="labels.to_class".*?</article>', page, re.S)[0]
    assert labels.to_class.__doc__.split(';')[0] in item and re.search(r'<code>source</code></td><td><code>str</code></td><td>a key of <a href="#labels.MAPS">', item) and '<em>returns</em>' in item
    cell = re.search(r'href="\.\./labels\.html#(code-\w+)">What each dataset calls them', item)[1]
    assert re.search(rf'id="{cell}">reference: .*href="reference/fer_core.html#labels.to_class"', lesson)


def test_the_reports_are_listed(built):
    assert re.search(r'id="2026-01-02".*href="reports/2026-01-02-teacher-abcdef/teacher.html">teacher-abcdef</a> <span>resnet18 &amp; more<', read(built, 'reports.html'), re.S)
    assert 'its own affair' in read(built, 'reports/2026-01-02-teacher-abcdef/teacher.html')


def test_the_search_knows_headings_sentences_and_names(built):
    entries = json.loads(read(built, 'assets/search.js').removeprefix('const SEARCH = '))
    found = {(title, href): (where, text) for title, href, where, text in entries}
    assert found['A project', 'overview.html'][0] == 'Start' and 'What it is for' in found['A project', 'overview.html'][1]
    assert found['The formula', 'overview.html#the-formula'][0] == 'Start › Overview'
    assert found['to_class', 'reference/fer_core.html#labels.to_class'][0] == 'fer_core.labels'
    assert found['teacher-abcdef', 'reports/2026-01-02-teacher-abcdef/teacher.html'] == ('Reports › 2026-01-02', 'resnet18 & more')
    assert not [e for e in entries if '<' in e[0] or '#' in e[0]]


def test_no_link_is_broken_and_a_broken_one_is_told(built, tmp_path, monkeypatch):
    assert built[1] == []
    notebook(tmp_path/'nbs'/'index.ipynb', '# Title', 'to [a page](gone.ipynb), [an anchor](data/other.ipynb#no-such), [one that is](data/other.ipynb#part), ![picture](no.png), [out](https://x.org)', '[up](../elsewhere.md)')
    notebook(tmp_path/'nbs'/'data'/'other.ipynb', '# Other\n## Part')
    monkeypatch.setattr(docs, 'ROOT', tmp_path)
    monkeypatch.setattr(docs, 'OUT', tmp_path/'_docs')
    with pytest.raises(SystemExit) as e: docs.main()
    assert re.findall(r'^  (.*)$', str(e.value), re.M) == [f'nbs/index.ipynb: {x}' for x in ('gone.ipynb', 'data/other.html#no-such', 'no.png', '../elsewhere.md')]


def test_every_notebook_of_the_project_has_its_place(tmp_path):
    site = survey(ROOT/'nbs', tmp_path, None)
    folders = [posix for posix in dict.fromkeys(p.folder for p in site.pages)]
    assert folders == [f for f in ORDER if f in folders] + ['reference']
    for folder, names in FIRST.items():
        stems = [Path(p.source).stem for p in site.pages if p.folder == folder]
        assert stems[:len(names)] == [n for n in names if n in stems][:len(names)] and len(set(stems)) == len(stems)
    assert not [p.source for p in site.sources.values() if not p.about and p.module]


def test_formulas_and_anchors():
    assert mathml(r'\undefined{').startswith(('<math', '<code>'))
    assert slug('Weights, <code>alpha</code> &amp; β') == 'weights-alpha--β'


@in_browser
def test_it_is_found_by_keyboard_from_a_file_and_fits_a_telephone(built, tmp_path):
    async def main(port):
        async with Page(port) as page:
            for p in built[0].pages:
                await page.open((built[0].out/p.target).as_uri())
                for width in (1280, 400):
                    await page('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
                    assert await page.js('document.documentElement.scrollWidth') <= width, (p.target, width)
            await page.open((built[0].out/'faces'/'align.html').as_uri())
            assert await page.js('getComputedStyle(document.querySelector("header button")).display != "none" && getComputedStyle(document.getElementById("side")).display') == 'none'
            await page.js('document.querySelector("header button").click()')
            assert await page.js('document.getElementById("side").offsetWidth') > 200
            await page.press('Escape', 27)
            await page.press('/', 191, '/')
            for c in 'to_cl': await page('Input.insertText', text=c)
            await page.until('document.querySelectorAll("#found [role=option]").length > 0')
            await page.press('ArrowDown', 40)
            assert await page.js('document.querySelector("#found [aria-selected=true] b").textContent') == 'to_class'
            await page.press('Enter', 13, '\r')
            await page.until('location.href.endsWith("reference/fer_core.html#labels.to_class")')
            assert not page.complaints() and not [u for u in page.asked() if not u.startswith(('file:', 'data:'))]
    with chromium(tmp_path) as port: asyncio.run(main(port))

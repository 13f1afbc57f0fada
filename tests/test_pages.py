"""Report pages: what they link and list, how their tables sort, and that they fit a telephone, in a headless Chromium."""
import asyncio, re
from pathlib import Path
import nbformat, pandas as pd, pytest
from typer.testing import CliRunner
from fer_core.artifacts import FerError, Run, parent
from fer_core.cli import app
from fer_core.runs.pages import index_page, publish, status_page
from browser import Page, chromium, in_browser

REPORTS = Path(__file__).parents[1]/'reports'


def finished(root, name, cells=(), **more): # a finished run with its executed notebook
    stage = name.split('-')[3]
    run = Run.create(root/name, stage, **{'parameters': {'seed': 0}, 'seeds': {'train': 0}, 'dataset': {'sha256': 'ab'*32, 'sources': ['synthetic'], 'splits': {'train': 700, 'test': 140}}} | more)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f'# The {stage} <b>'), *cells])
    nbformat.write(nb, run.path(f'{stage}.ipynb'))
    run.record(metrics={f'{stage}/test': {'n': 140, 'split': 'test', 'in_sample': False, 'accuracy': .71, 'macro_f1': .68}, f'{stage}/val': {'n': 70, 'split': 'val', 'in_sample': True, 'accuracy': .9, 'macro_f1': .9}})
    run.finish()
    return run


def table(frame): # a cell that shows a table as pandas does
    return nbformat.v4.new_code_cell('table', outputs=[nbformat.v4.new_output('execute_result', {'text/html': frame.to_html(), 'text/plain': 'table'})])


def links(page): return [h for h in re.findall(r'href="([^"]+)"', page.read_text()) if not h.startswith('#')]


def test_a_report_is_listed_with_what_it_measured_and_every_link_leads_somewhere(tmp_path):
    teacher = finished(tmp_path, '2026-01-01-teacher-a1b2c3', parameters={'backbone': 'resnet18', 'size': 48})
    (teacher.folder/'best.txt').write_text('weights')
    student = finished(tmp_path, '2026-01-02-student-d4e5f6', parents={'teacher': parent(teacher.folder, 'best.txt')}, parameters={'backbone': 'mobilenetv3_large_100', 'size': 64, 'phase': 'kd'})
    reports = tmp_path/'reports'
    pages = [publish(r, reports) for r in (teacher, student)]
    index = reports/'index.html'
    assert links(index) == [f'{p.parent.name}/{p.name}' for p in reversed(pages)]
    for page in (*pages, index):
        for link in links(page): assert (page.parent/link).is_file(), (page, link)
    assert '<title>The student &lt;b&gt;</title>' in pages[1].read_text()
    assert f'runs/{teacher.folder.name}.json' in links(pages[1])
    heads, *rows = [re.findall(r'<t[hd][^>]*>(?:<a[^>]*>)?(.*?)(?:</a>)?</t[hd]>', r) for r in re.findall('<tr>(.*?)</tr>', index.read_text())]
    rows = [dict(zip(heads, r, strict=True)) for r in rows]
    assert [(r['about'], r['macro f1'], r['n'], r['model']) for r in rows] == [('mobilenetv3_large_100, 64 px, kd', '0.6800', '140', 'student'), ('resnet18, 48 px', '0.6800', '140', 'teacher')]


def test_a_folder_that_is_no_report_is_not_listed_and_pages_come_back(tmp_path):
    run = finished(tmp_path, '2026-01-01-teacher-a1b2c3')
    page = publish(run, tmp_path/'reports')
    (tmp_path/'reports'/'notes').mkdir()
    torn = tmp_path/'reports'/'2026-01-03-teacher-ffffff'; (torn/'runs').mkdir(parents=True)
    before = page.read_bytes(); page.unlink()
    told = CliRunner().invoke(app, ['report', 'index', str(tmp_path/'reports'), '--anew'])
    assert told.exit_code == 0 and told.output.strip().endswith('index.html') and page.read_bytes() == before
    assert len(links(tmp_path/'reports'/'index.html')) == 1
    (torn/'runs'/f'{torn.name}.json').write_text('{"half')
    with pytest.raises(FerError, match='ffffff.json'): index_page(tmp_path/'reports')
    assert index_page(tmp_path/'none').is_file()  # nothing yet: a page that says so


def test_links_of_a_stage_notebook_stay_links_inside_the_clone_and_become_text_elsewhere(tmp_path):
    run = finished(tmp_path, '2026-01-01-teacher-a1b2c3', [nbformat.v4.new_markdown_cell('see [scaling](../evaluate/scaling.ipynb#a), [gone](no.ipynb), [out](https://x.org/a), ![no](link.png)')])
    page = publish(run, tmp_path/'reports').read_text()
    assert 'see scaling, gone, <a href="https://x.org/a">out</a>' in page
    clone = tmp_path/'clone'; (clone/'nbs'/'stages').mkdir(parents=True); (clone/'nbs'/'evaluate').mkdir()
    for name in ('stages/teacher', 'evaluate/scaling'): (clone/'nbs'/f'{name}.ipynb').write_text('{}')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FER_CORE_STAGES', str(clone/'nbs'/'stages'))
        page = publish(run, clone/'reports')
        again = page.read_text(); index_page(clone/'reports', anew=True)
    assert 'see <a href="../../nbs/evaluate/scaling.ipynb#a">scaling</a>, gone' in page.read_text() == again


@in_browser
def test_tables_sort_and_filter(tmp_path):
    odd = pd.DataFrame({'name': ['b', 'a10', 'a9', ''], 'score': ['0.5 ± 0.1', '1,234', '−3', '32.6 %'], 'day': ['2026-11-02', '2026-01-30', '2025-12-31', '2026-11-01']})
    run = finished(tmp_path, '2026-01-01-teacher-a1b2c3', [table(odd), table(pd.DataFrame({'i': range(20)})), table(odd.set_index(['name', 'day']).groupby(level=[0, 1]).first())])
    page_file = publish(run, tmp_path/'reports')

    async def main(port):
        async with Page(port) as page:
            await page.open(page_file.as_uri())
            async def column(i): return await page.js(f'[...document.querySelector("table").tBodies[0].rows].map(r => r.cells[{i}].textContent)')
            async def click(i): await page.js(f'document.querySelector("table").tHead.rows[0].cells[{i}].click()')
            await click(2); assert await column(2) == ['−3', '0.5 ± 0.1', '32.6 %', '1,234']
            await click(2); assert await column(2) == ['1,234', '32.6 %', '0.5 ± 0.1', '−3']
            assert await page.js('[...document.querySelectorAll("[aria-sort]")].map(h => h.textContent + h.getAttribute("aria-sort"))') == ['scoredescending']
            await click(2); assert await column(2) == odd['score'].tolist()  # as it was
            await click(1); assert await column(1) == ['a9', 'a10', 'b', '']
            await click(1); assert await column(1) == ['b', 'a10', 'a9', '']  # empty ones stay at the end
            await page.js('document.querySelector("table").tHead.rows[0].cells[3].focus()')
            await page.press('Enter', 13, '\r'); assert await column(3) == sorted(odd['day'])
            assert await page.js('document.querySelectorAll("input[type=search]").length') == 1  # of the long one
            await page.js('f = document.querySelector("input[type=search]"); f.value = "19"; f.oninput()')
            assert await page.js('[...document.querySelectorAll("table")[1].tBodies[0].rows].filter(r => !r.hidden).length') == 1
            assert not page.complaints() and not [u for u in page.asked() if not u.startswith(('file:', 'data:'))]
    with chromium(tmp_path) as port: asyncio.run(main(port))


@in_browser
def test_no_committed_report_overflows_or_loads_from_elsewhere(tmp_path):
    pages = [p for p in sorted(REPORTS.glob('**/*.html'))] + [status_page(tmp_path, tmp_path/'status.html')]
    assert len(pages) > 15

    async def main(port):
        async with Page(port) as page:
            for p in pages:
                await page.open(p.as_uri())
                for width in (1280, 400):
                    await page('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
                    assert await page.js('document.documentElement.scrollWidth') <= width, (p, width)
                assert await page.js('[...document.images].every(i => i.naturalWidth > 0 && i.alt)'), p
            assert not page.complaints() and not [u for u in page.asked() if not u.startswith(('file:', 'data:'))]
    with chromium(tmp_path) as port: asyncio.run(main(port))


def test_every_link_of_the_committed_reports_leads_somewhere():
    pages = sorted(REPORTS.glob('**/*.html'))
    assert REPORTS/'index.html' in pages
    for page in pages:
        for link in links(page):
            if not link.startswith('http'): assert (page.parent/link).is_file(), (page, link)

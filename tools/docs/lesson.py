"""Notebooks as pages."""
import re
from functools import cache
import nbformat
from jinja2 import pass_context
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.exporters import TemplateExporter
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from traitlets.config import Config
from frame import write
from prose import Prose, hop, plain


class Lesson(HTMLExporter):
    "Notebooks as HTML without a frame; they are ours, so nothing is taken out of them, which is most of nbconvert's time."
    def __init__(self):
        super().__init__(template_name='basic', exclude_input_prompt=True, exclude_output_prompt=True, config=Config({'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': {'no-source'}}}))
        self.register_filter('clean_html', lambda text: text)
        self.register_filter('highlight_code', Highlight2HTML(pygments_lexer='ipython3', parent=self))

    @pass_context
    def markdown2html(self, context, source):
        self.parts.append(self.markdown.render(source))
        return re.sub('<table>.*?</table>', wide, self.parts[-1], flags=re.S)

    def body(self, nb, prose): # readable notebook; renderer of its page -> HTML, the HTML of its prose alone
        self.markdown, self.parts = MarkdownWithMath(renderer=prose), []
        text, _ = TemplateExporter.from_notebook_node(self, nb)
        return text, '\n'.join(self.parts)


@cache
def exporter(): return Lesson()  # once in a process


def wide(m): # a table of prose
    "It in a box that scrolls; its short cells do not wrap."
    def cell(c): return c[0] if len(plain(c[3])) > 40 else f'<{c[1]} class="short"{c[2]}>{c[3]}</{c[1]}>'
    return '<div class="wide">' + re.sub(r'<(t[dh])\b([^>]*)>(.*?)</t[dh]>', cell, m[0], flags=re.S) + '</div>'


def defines(page, cell):
    "The line above a cell that says where the reference has its names; links of the reference lead to it."
    names = [n for n, x in page.names.items() if x.cell == cell.id]
    links = ', '.join(f'<a href="{hop(page, page.reference)}.{n}"><code>{n}</code></a>' for n in names)
    return [nbformat.v4.new_markdown_cell(f'<p class="defines" id="code-{cell.id}">reference: {links}</p>')] if names else []


def readable(page, nb):
    "A notebook for readers: no hidden cells, no directives; figures described by the heading they stand under; no links of outputs into the folder they were made in."
    section, cells = page.title, []
    for c in nb.cells:
        if re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M): continue
        if c.cell_type == 'markdown': section = ([*re.findall(r'^#+ (.+)$', c.source, re.M)] or [section])[-1]
        if c.cell_type == 'code':
            cells += defines(page, c)
            if re.search(r'^#\|\s*echo:\s*false', c.source, re.M): c.metadata['tags'] = [*c.metadata.get('tags', []), 'no-source']
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
            for o in c.outputs:
                if 'image/png' in o.get('data', {}) or 'image/jpeg' in o.get('data', {}): o.metadata['alt'] = f'Figure: {section}'
                if 'text/html' in o.get('data', {}): o.data['text/html'] = re.sub(r'<a href="(?![\w+.-]+:|#)[^"]*">(.*?)</a>', r'\1', o.data['text/html'], flags=re.S)
        cells.append(c)
    nb.cells = cells
    return nb


def sections(page, text): # HTML of its prose
    "Search entries: from each heading to the next."
    parts = re.split(r'<h[1-6] id="([^"]*)">(.*?)</h[1-6]>', re.sub('<p class="defines".*?</p>', '', text), flags=re.S)
    for n, (name, title, prose) in enumerate(zip(parts[1::3], parts[2::3], parts[3::3])):
        yield [plain(title), page.target + (f'#{name}' if n else ''), page.chapter if not n else f'{page.chapter} › {page.title}', plain('<p>' + prose)]


def lesson(site, page):
    "The page of a notebook; its entries for the search."
    prose = Prose(site, page)
    body, text = exporter().body(readable(page, nbformat.read(site.nbs/page.source, as_version=4)), prose)
    return write(site, page, Markup(body), prose.toc), list(sections(page, text))


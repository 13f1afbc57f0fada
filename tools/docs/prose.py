"""Markdown of the notebooks as HTML of the site: formulas, anchors, links, and names that lead to the reference."""
import html, posixpath, re
from collections import Counter
from urllib.parse import unquote
from latex2mathml.converter import convert as to_mathml
from markupsafe import Markup, escape
from nbconvert.filters.markdown_mistune import IPythonRenderer
from frame import BRANCH, REPOSITORY


def slug(text): # a heading, perhaps with tags
    "Its anchor, as GitHub makes it."
    return re.sub(r'[^\w\- ]', '', plain(text).lower()).replace(' ', '-')


def plain(text): # HTML
    return ' '.join(html.unescape(re.sub(r'<math.*?</math>|<style.*?</style>|<a class="anchor".*?</a>|<[^>]+>', ' ' if '<p' in text else '', text, flags=re.S)).split())


def mathml(tex, display='inline'):
    "A formula as browsers draw it themselves; what cannot be put so is shown as TeX."
    try: text = to_mathml(tex, display=display)
    except Exception: return f'<code>{escape(tex)}</code>'
    script = {c: chr(0x1d49c + ord(c) - 65) for c in map(chr, range(65, 91))} | dict(zip('BEFHILMR', 'ℬℰℱℋℐℒℳℛ'))  # browsers know no mathvariant but normal
    text = re.sub(r'<mi mathvariant="script">([A-Z])</mi>', lambda m: f'<mi>{script[m[1]]}</mi>', text)
    text = re.sub(r'(?:<mi mathvariant="normal">\w</mi>){2,}', lambda m: f'<mi>{re.sub("<[^>]+>", "", m[0])}</mi>', text).replace('"negativethinmathspace"', '"-0.167em"')
    text = re.sub(r'<mi>(&#x0(?:00B1|230A|230B);|;)</mi>', r'<mo>\1</mo>', text)  # ± ⌊ ⌋ ; are no identifiers
    return f'<span class="formula">{text}</span>' if display == 'block' else text


def hop(page, target): # from one page to another, or to a file of the site
    path, _, anchor = target.partition('#')
    return ('' if path == page.target else posixpath.relpath(path, posixpath.dirname(page.target) or '.')) + ('#' + anchor if anchor else '')


def address(site, page, url): # as a notebook writes it
    "The address on the site: of a page, a report or a picture; else in the repository. What is nowhere stays as it is."
    if re.match(r'[\w+.-]+:|//', url): return url
    path, _, anchor = unquote(url).partition('#')
    anchor = '#' + slug(anchor) if anchor else ''
    if not path: return anchor
    target = posixpath.normpath(posixpath.join('nbs', page.folder, path))
    inside = target.removeprefix('nbs/')
    if inside in site.sources: return hop(page, site.sources[inside].target + anchor) or '#'
    if inside != target and (site.out/inside).is_file(): return hop(page, inside)
    if target.startswith('reports/') and (site.out/target).is_file(): return hop(page, target)
    return f'{REPOSITORY}/blob/{BRANCH}/{target}{anchor}' if not target.startswith('..') and (site.nbs.parent/target).exists() else url


def named(site, page, text): # what stands between backticks
    "The address of the library's name that it is, or None. A plain word is one only when it is called."
    found = re.fullmatch(r'(?:fer_core\.)?([A-Za-z]\w*(?:\.\w+)*)(\(.*\))?', text, re.S)
    if not found or not (found[2] or re.search(r'[A-Z_.]', text)): return None
    name = found[1]
    own = f'{page.module}.{name}' if page.module else name
    target = site.known.get(own) or site.known.get(name) or site.known.get(name.rpartition('.')[0] if re.match('[A-Z]', name) else None)
    return hop(page, target) or None if target else None


class Prose(IPythonRenderer):
    "Markdown of one page."
    def __init__(self, site, page):
        super().__init__(escape=False)
        self.site, self.page, self.toc, self.ids = site, page, [], Counter()

    def heading(self, text, level, **attrs):
        text = re.sub(r'</?a\b[^>]*>', '', text)
        name = slug(text)
        self.ids[name] += 1
        if self.ids[name] > 1: name += f'-{self.ids[name] - 1}'
        if 1 < level < 4: self.toc.append((level, name, Markup(text)))
        return f'<h{level} id="{name}">{text}<a class="anchor" href="#{name}" aria-label="Link to this section">#</a></h{level}>\n'

    def inline_math(self, body): return mathml(body)
    def block_math(self, body): return mathml(body, 'block')
    def latex_environment(self, name, body): return mathml(rf'\begin{{{name}}}{body}\end{{{name}}}', 'block')
    def image(self, text, url, title=None): return super().image(text, address(self.site, self.page, url), title)
    def link(self, text, url, title=None): return super().link(re.sub(r'</?a\b[^>]*>', '', text), address(self.site, self.page, url), title)

    def codespan(self, text):
        href = named(self.site, self.page, html.unescape(text))
        return f'<a href="{href}">{super().codespan(text)}</a>' if href else super().codespan(text)

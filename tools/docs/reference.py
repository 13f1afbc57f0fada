"""The API reference, from the library itself: docments' tables of every public name, a page for each package."""
import html, importlib, inspect, re
from types import SimpleNamespace
from typing import ForwardRef, NamedTuple
from fastcore.docments import docments
from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from settings import ROOT
from frame import TEMPLATES, write
from prose import hop, named


def shown(value): # type or default
    if value is inspect.Parameter.empty or value is type(None): return ''
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.isbuiltin(value): return value.__name__
    if isinstance(value, ForwardRef): return value.__forward_arg__
    text = re.sub(r'<(?:function |class )?([\w.\']+)(?: object)? at 0x\w+>', r'<\1>', repr(value).replace(f'{ROOT}/', ''))
    return text if len(text) < 160 else text[:150] + ' …'


def marked(site, page, text): # a comment or a docstring
    "It as HTML, with the names between backticks as links."
    def code(m): return f'<code>{m[1]}</code>' if not (href := named(site, page, html.unescape(m[1]))) else f'<a href="{href}"><code>{m[1]}</code></a>'
    return Markup(re.sub('`([^`]+)`', code, str(escape(text))))


def parameters(symbol):
    "Rows of a signature as docments has them."
    if NamedTuple in getattr(symbol, '__orig_bases__', ()): symbol.__dataclass_fields__ = {}  # a named tuple: its fields' comments are read as a dataclass's are
    found = docments(symbol, full=True, args_kwargs=True)
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    rows = [SimpleNamespace(name=stars.get(d.get('kind'), '') + n, type=d.anno if isinstance(d.anno, str) else shown(d.anno), default=shown(d.default), about=d.docment or '') for n, d in found.items() if n not in ('self', 'cls')]
    return [r for r in rows if r.name != 'return' or not inspect.isclass(symbol) and (r.about or r.type)]


def signature(name, rows):
    "A call as it is written, on one line where it fits."
    words = [r.name + (f':{r.type}' if r.type else '') + (f'={r.default}' if r.default else '') for r in rows if r.name != 'return']
    gives = ''.join(f'->{r.type}' for r in rows if r.name == 'return' and r.type)
    text = f'{name}({", ".join(words)}){gives}'
    if len(text) > 88: text = f'{name}(' + (',\n' + ' '*(len(name) + 1)).join(words) + f'){gives}'
    return Markup(highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)))


def item(site, page, name, symbol, **more): # -> what the template shows of a function, class, method or value
    rows = parameters(symbol) if callable(symbol) else []
    doc = inspect.getdoc(symbol) if callable(symbol) and getattr(symbol, '__doc__', None) else ''
    for r in rows: r.about = marked(site, page, r.about)
    if not callable(symbol): more['signature'] = Markup(highlight(f'{name} = {shown(symbol)}', PythonLexer(), HtmlFormatter(nowrap=True)))
    else: more.setdefault('signature', signature(name.rpartition('.')[2], rows))
    return SimpleNamespace(**{'kind': '', 'member': False, 'lesson': '', 'name': name, 'text': doc, 'about': marked(site, page, doc), 'rows': rows if any(r.about for r in rows) else [], **more})


def methods(cls):
    "Public methods and properties that a class of ours defines: (name, function, kind)."
    for n, x in vars(cls).items():
        f = getattr(x, 'fget', None) or getattr(x, 'func', None) or getattr(x, '__func__', None) or x
        kind = {property: 'property', classmethod: 'class method', staticmethod: 'static method'}.get(type(x), 'property' if hasattr(x, 'func') else '')
        if not n.startswith('_') and inspect.isfunction(f): yield n, f, kind


def items(site, page, lesson, module): # page of the reference; a lesson; its module, imported
    "Every public name that the module defines, classes with their methods."
    last = lesson.module.rpartition('.')[2]
    for n, x in lesson.names.items():
        if n not in module.__all__: continue
        symbol = getattr(module, n)
        kind = 'class' if inspect.isclass(symbol) else '' if callable(symbol) else type(symbol).__name__
        one = item(site, page, n, symbol, id=f'{last}.{n}', kind=kind, lesson=hop(page, f'{lesson.target}#code-{x.cell}'), section=x.section)
        if x.note and not (callable(symbol) and one.text): one.text, one.about = x.note, marked(site, page, x.note)
        yield one
        for m, f, kind in methods(symbol) if inspect.isclass(symbol) else ():
            yield item(site, page, f'{n}.{m}', f, id=f'{last}.{n}.{m}', kind=kind, member=True, **({'signature': ''} if kind == 'property' else {}))


def reference(site, page):
    "The page of a package; its entries for the search."
    modules, toc, entries = [], [], []
    for p in page.members:
        module, last = importlib.import_module(f'fer_core.{p.module}'), p.module.rpartition('.')[2]
        found = list(items(site, page, p, module))
        others = [(n, site.known.get(f'{getattr(getattr(module, n), "__module__", "")}.{n}'.removeprefix('fer_core.'))) for n in module.__all__ if n not in p.names]
        modules.append(SimpleNamespace(id=last, name=f'fer_core.{p.module}', about=marked(site, page, p.about), title=p.title, lesson=hop(page, p.target), items=found, elsewhere=[(n, hop(page, to)) for n, to in others if to]))
        toc += [(2, last, last), *((3, i.id, i.name) for i in found if not i.member)]
        entries += [[i.name, f'{page.target}#{i.id}', f'fer_core.{p.module}', i.text] for i in found]
    return write(site, page, Markup(TEMPLATES.get_template('reference.html').render(title=page.title, modules=modules)), toc), entries

"""The frame that all pages of the site share, and the links in them."""
import re
from html.parser import HTMLParser
from pathlib import Path
from jinja2 import Environment, FileSystemLoader
from settings import read_settings

SETTINGS, ASSETS = read_settings(), Path(__file__).parent
REPOSITORY, BRANCH = SETTINGS['git_url'], SETTINGS['branch']
TEMPLATES = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write(site, page, body, toc):
    "The page in the frame that all share; what it offers and asks in links."
    at = site.pages.index(page) if page in site.pages else -1
    text = TEMPLATES.get_template('page.html').render(page=page, body=body, toc=toc, name=SETTINGS['title'], root='../'*page.target.count('/'), repository=REPOSITORY, branch=BRANCH, chapters=site.chapters,
        before=site.pages[at - 1] if at > 0 else None, after=site.pages[at + 1] if at + 1 < len(site.pages) else None)
    file = site.out/page.target
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding='utf-8')
    return Links(page.target, text)


class Links(HTMLParser):
    "Anchors and local links of a page."
    def __init__(self, target, text):
        super().__init__()
        self.target, self.ids, self.links = target, set(), []
        self.feed(re.sub(r'"data:[^"]*"', '"data:"', text))

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k == 'id' or k == 'name' and tag == 'a': self.ids.add(v)
            elif k in ('href', 'src') and v is not None and not re.match(r'[\w+.-]+:|//', v): self.links.append(v)

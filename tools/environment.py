"""Derives environment.yml (conda) from settings.ini; with --check only says whether it is in step."""
import sys
from settings import ROOT, read_settings, requirements

TEMPLATE = '''# Written by tools/environment.py from settings.ini (make environment): edit that instead.
#   conda env create -f environment.yml && conda activate {name}
# Without a GPU on Linux, first:  export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Without libGL, afterwards:      pip uninstall -y opencv-python && pip install '{headless}'
name: {name}
channels:
  - conda-forge
dependencies:
  - python>={python}
  - pip
  - pip:
{lines}
      - --editable .
'''


def environment(settings): # the [DEFAULT] section of settings.ini
    "The text of environment.yml."
    wanted = requirements(settings, dev=True)
    headless = next(r for r in wanted if r.startswith('opencv-python')).replace('opencv-python', 'opencv-python-headless')
    return TEMPLATE.format(name=settings['lib_name'], python=settings['min_python'], headless=headless,
                           lines='\n'.join(f'      - {r}' for r in wanted))


if __name__ == '__main__':
    path, text = ROOT/'environment.yml', environment(read_settings())
    if '--check' not in sys.argv: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text: sys.exit('environment.yml is out of step with settings.ini: run `make environment`')
    else: print('environment.yml: in step with settings.ini')

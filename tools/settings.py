"""settings.ini, read once for everything that is derived from it: setup.py, environment.yml, the set-up, the tests."""
import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPDX = {'apache2': 'Apache-2.0'}  # nbdev's word for the licence -> its SPDX name


def read_settings(root=ROOT): # folder of settings.ini
    "The [DEFAULT] section; '=' is the only delimiter, since console_scripts holds colons."
    parser = configparser.ConfigParser(delimiters=['='])
    with open(Path(root)/'settings.ini', encoding='utf-8') as f: parser.read_file(f)
    return parser['DEFAULT']


def requirements(settings, dev=False): # dev: also what only tests and notebooks' tools need
    "The requirement strings, in the order they are written."
    return (settings['requirements'] + (' ' + settings['dev_requirements'] if dev else '')).split()

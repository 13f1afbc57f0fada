"""Name, version and requirements come from settings.ini; nothing is written twice (tests/test_project.py checks it)."""
import sys
from pathlib import Path
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT/'tools'))
from settings import SPDX, read_settings, requirements  # noqa: E402

s = read_settings(ROOT)
setup(
    name=s['lib_name'], version=s['version'], description=s['description'], keywords=s['keywords'].split(),
    author=s['author'], author_email=s['author_email'], url=s['git_url'], license=SPDX[s['license']],
    long_description=(ROOT/'README.md').read_text(encoding='utf-8') if (ROOT/'README.md').exists() else '', long_description_content_type='text/markdown',
    python_requires=f">={s['min_python']}",
    install_requires=requirements(s),
    extras_require={'dev': s['dev_requirements'].split(), 'study': s['study_requirements'].split(), 'sign': s['sign_requirements'].split(), 'cluster': s['cluster_requirements'].split(), 'mlflow': s['mlflow_requirements'].split()},
    entry_points={'console_scripts': s['console_scripts'].split()},
    packages=find_packages(include=['fer_core', 'fer_core.*']),
    package_data={'fer_core': ['release/*', 'rules/*', 'live/*.html']},
    zip_safe=False,
)

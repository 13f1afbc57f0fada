__version__ = "0.1.0"

# Hand-written, except for the line above, which nbdev keeps. Importing fer_core loads nothing else; names resolve on
# first use (PEP 562), so that `fer_core.Recognizer` or `fer_core.data.sources` work without naming their imports, and
# the live path never pays for torch.
import importlib as _importlib, pathlib as _pathlib

_NAMES = {'Recognizer': 'live.recognise', 'Face': 'live.recognise', 'CLASSES': 'labels', 'FerError': 'artifacts'}
_HERE = _pathlib.Path(__file__).parent


def _lazy(package, folder, names=()):
    "Module-level `__getattr__` and `__dir__` that import a package's submodules on first use."
    def submodules(): return sorted({p.stem for p in folder.glob('[a-z]*') if p.suffix == '.py' or (p/'__init__.py').is_file()})

    def getattr_(name):
        if name in names: return getattr(_importlib.import_module(f'{package}.{names[name]}'), name)
        if not name.startswith('_') and name in submodules(): return _importlib.import_module(f'{package}.{name}')
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    return getattr_, lambda: sorted({*_importlib.import_module(package).__dict__, *names, *submodules()})


__getattr__, __dir__ = _lazy(__name__, _HERE, _NAMES)
for _p in sorted(_HERE.glob('*/__init__.py')):  # faces, data, models, ...: packages with empty __init__ files
    _sub = _importlib.import_module(f'{__name__}.{_p.parent.name}')
    _sub.__getattr__, _sub.__dir__ = _lazy(_sub.__name__, _p.parent)

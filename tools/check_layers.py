"""Do modules import only downwards, and does the live path stay light? Read from the source with ast; nothing is imported."""
import ast, sys
from settings import ROOT

# Data flows down this list; a module imports only from lines above its own, or from its own line without a circle.
LAYERS = ['labels', 'compat', 'artifacts', 'faces', 'data', 'models', 'evaluate', 'train', 'teach', 'distill', 'compress', 'live', 'runs', 'cli']
HEAVY = {'torch', 'torchvision', 'timm', 'pandas', 'lightning', 'lightning_fabric', 'torchmetrics'}
LIGHT = ['', 'labels', 'artifacts', 'faces', 'data.preprocess', 'live']  # '' = fer_core itself


def parse(root=ROOT): # checkout
    "Module name below fer_core ('' for the package) -> syntax tree."
    trees = {}
    for p in sorted((root/'fer_core').rglob('*.py')):
        parts = p.relative_to(root/'fer_core').with_suffix('').parts
        if parts[-1] != '_modidx': trees['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = ast.parse(p.read_text(encoding='utf-8'), str(p))
    return trees


def eager(tree):
    "The nodes that run at import: everything outside function bodies and type-checking blocks."
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test): continue
        todo += ast.iter_child_nodes(node)


def absolute(node, name, is_package): # an ImportFrom of module `name`
    "The full module name an import statement starts from."
    if not node.level: return node.module or ''
    base = ['fer_core', *filter(None, name.split('.'))]
    base = base[:len(base) - node.level + is_package]
    return '.'.join(base + ([node.module] if node.module else []))


def imports(nodes, name, trees):
    "(line, full module name) of each import among `nodes`; `from package import module` counts as the module."
    package = any(k.startswith(name + '.') for k in trees) or not name
    for node in nodes:
        if isinstance(node, ast.Import): yield from ((node.lineno, a.name) for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = absolute(node, name, package)
            inner = [f'{base}.{a.name}' for a in node.names if f'{base}.{a.name}'.removeprefix('fer_core.') in trees]
            yield from ((node.lineno, m) for m in inner or [base])


def ours(module): return module.removeprefix('fer_core').lstrip('.') if module == 'fer_core' or module.startswith('fer_core.') else None


def rank(name): # a module below fer_core
    "Its line in LAYERS, or None for a stranger."
    return LAYERS.index(name.split('.')[0]) if name.split('.')[0] in LAYERS else None


def upward(trees):
    "Imports that run upwards or in a circle; fer_core/__init__ may import from everywhere."
    below = {n: {ours(m) for _, m in imports(ast.walk(t), n, trees) if ours(m)} for n, t in trees.items()}
    def reaches(a, b, seen): return b in below.get(a, ()) or any(reaches(c, b, seen | {c}) for c in below.get(a, set()) - seen if rank(c) == rank(b))
    for name, tree in trees.items():
        if not name: continue
        if rank(name) is None: yield f'fer_core.{name}: not in LAYERS of tools/check_layers.py'; continue
        for line, module in imports(ast.walk(tree), name, trees):
            target = ours(module)
            if not target or rank(target) is None: continue
            if rank(target) > rank(name): yield f'fer_core.{name} line {line}: imports {module}, which stands below it'
            elif rank(target) == rank(name) and reaches(target, name, {target}): yield f'fer_core.{name} line {line}: a circle with {module}'


def heavy_path(name, trees, seen=()):
    "The chain of imports by which importing `name` loads something heavy, or None."
    parents = [name.rsplit('.', i)[0] for i in range(1, name.count('.') + 1)] + ['']
    for _, module in [m for n in [name, *parents] if n in trees for m in imports(eager(trees[n]), n, trees)]:
        if module.split('.')[0] in HEAVY: return [f'fer_core.{name}'.rstrip('.'), module]
        target = ours(module)
        if target in trees and target not in seen and target != name:
            if chain := heavy_path(target, trees, (*seen, name)): return [f'fer_core.{name}'.rstrip('.'), *chain]
    return None


def heavy(trees):
    "Light modules whose import loads torch, timm, pandas or their like."
    for name in trees:
        if any(name == l or (l and name.startswith(l + '.')) for l in LIGHT) and (chain := heavy_path(name, trees)): yield ' -> '.join(chain) + ': heavy on the live path'


def main():
    trees = parse()
    rows = [*upward(trees), *heavy(trees)]
    if rows: sys.exit('layers:\n  ' + '\n  '.join(rows))
    print(f'layers: {len(trees)} modules import downwards, the live path is light')


if __name__ == '__main__': main()

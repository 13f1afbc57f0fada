"""How much of a model's advantage is test pictures that it saw in training.

    python benchmarks/leak.py --published RUN… --clean RUN… --curation FOLDER [--write benchmarks/leak.md]

Two models, or several seeds of each, on one test: one trained on everything as published, one without the copies of test rows. FOLDER is
the curation that took the copies out; what it dropped as a copy of test rows says which test rows have a copy in Training. The advantage
on the rows without a copy is what better training gave; the rest of the advantage on all rows is the copies' doing.
"""
from __future__ import annotations
import argparse
from pathlib import Path
import numpy as np, pandas as pd
from fer_core.artifacts import FerError, Run, atomic_path
from fer_core.data.manifest import read_manifest
from fer_core.evaluate.metrics import confusion, rates


def copied(folder):
    "Ids of the test rows whose group lost training rows because of them."
    manifest = read_manifest(Path(folder)/'classification_manifest.csv')
    dropped = pd.read_csv(Path(folder)/'dropped.csv', dtype=str, keep_default_na=False)
    groups = set(dropped.loc[dropped['reason'].str.contains('copy of test|near-duplicate of test'), 'group']) - {''}
    if not groups: raise FerError('bad_parameter', f'{folder} dropped no copy of a test row', "give a curation with copies='drop'")
    test = manifest[manifest['split'] == 'test']
    return set(test.loc[test['group'].isin(groups), 'id'])


def answers(run):
    "Test ids, labels and decided classes of a run, in the order of the ids."
    path = Path(run)/'logits.npz'
    if not path.is_file(): raise FerError('missing_checkpoint', f'{path} is not there', 'give a teacher, student or ensemble run')
    z = np.load(path, allow_pickle=False)
    order = np.argsort(z['test_ids'])
    return z['test_ids'][order], z['test_labels'][order], z['test'][order].argmax(1)


def figures(label, said):
    "Accuracy and macro-F1, means over the seeds."
    f1 = [rates(confusion(s, label))[2].mean() for s in said]
    return np.mean(said == label), float(np.mean(f1))


def share(label, published, clean, seen):
    "The part of the advantage in accuracy that is gone on the rows without a copy."
    gain = lambda rows: (published[:, rows] == label[rows]).mean() - (clean[:, rows] == label[rows]).mean()
    return (gain(np.ones(len(label), bool)) - gain(~seen))/gain(np.ones(len(label), bool))


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--published', nargs='+', required=True, help='runs on the manifest with its copies, one a seed')
    ask.add_argument('--clean', nargs='+', required=True, help='runs on the manifest without them')
    ask.add_argument('--curation', required=True, help='curated folder whose dropped.csv names the copies')
    ask.add_argument('--write', default='', help='Markdown file')
    told = ask.parse_args()
    found = {name: [answers(r) for r in runs] for name, runs in (('published', told.published), ('clean', told.clean))}
    ids, label, _ = found['published'][0]
    for name, runs in found.items():
        for run, (i, y, _) in zip(getattr(told, name), runs):
            if len(i) != len(ids) or (i != ids).any() or (y != label).any(): raise FerError('softlabel_misaligned', f'{run} was judged on other test rows', 'give runs on one and the same test')
    said = {name: np.stack([s for _, _, s in runs]) for name, runs in found.items()}
    seen = np.isin(ids, list(copied(told.curation)))
    rng, n = np.random.default_rng(0), len(ids)
    draws = [share(label[i], said['published'][:, i], said['clean'][:, i], seen[i]) for i in (rng.integers(0, n, n) for _ in range(2000))]
    lines = ['# What the copies in Training are worth', '', f'`python benchmarks/leak.py`; test n = {n:,}, of which {seen.sum():,} have a copy in Training by {Path(told.curation).name}. Means over the seeds.', '',
             '| training set | seeds | all rows | rows with a copy | rows without |', '|---|---|---|---|---|']
    for name, runs in (('published, with copies', 'published'), ('without copies', 'clean')):
        cells = [' / '.join(f'{v:.3f}' for v in figures(label[rows], said[runs][:, rows])) for rows in (np.ones(n, bool), seen, ~seen)]
        lines.append(f'| {name} | {len(said[runs])} | ' + ' | '.join(cells) + ' |')
    low, high = np.quantile(draws, [.025, .975])
    lines += ['', f'Accuracy / macro-F1. Of the advantage in accuracy on all rows, {share(label, said["published"], said["clean"], seen):.2f} is gone on the rows without a copy (95 % interval over the faces {low:.2f} to {high:.2f}; what another seed would change is not in it).', '']
    for name in ('published', 'clean'):
        for run in getattr(told, name):
            m = Run(run).manifest
            lines.append(f'- {name}: {m.experiment_id}, seed {m.seeds.get("train")}, {m.parameters.get("backbone", m.stage)} at {m.parameters.get("size", "?")} px, {m.parameters.get("epochs", "?")} epochs, dataset {m.dataset["sha256"][:12]}, train {m.dataset["splits"].get("train", 0):,}')
    text = '\n'.join(lines) + '\n'
    if told.write:
        with atomic_path(told.write) as tmp: Path(tmp).write_text(text)
    print(text)


if __name__ == '__main__':
    try: main()
    except FerError as e: raise SystemExit(f'{e}') from None

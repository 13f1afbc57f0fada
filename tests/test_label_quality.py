"""Label quality under adverse conditions: planted noise, killed writers, two writers, changed pictures, reviewers who disagree, foreign weights."""
import json, signal, subprocess, sys, textwrap
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from fer_core.artifacts import FerError
from fer_core.data.hard import hard_samples, sample_weights, write_hard_samples
from fer_core.data.review import Page, Review, append_decision, apply_decisions, conflicts, latest, progress, read_decisions, review_page
from fer_core.data.adapter import COLUMNS
from fer_core.data.suspects import flag_issues, group_keys, label_scores, noise_table, out_of_fold, rank_suspects, read_suspects, write_suspects
from fer_core.labels import CLASSES

NAMES = np.array(CLASSES)


def manifest(n, **columns):
    "Rows with the manifest's columns."
    return pd.DataFrame({c: [''] * n for c in COLUMNS}).assign(**({'id': [f'set/{k:05d}' for k in range(n)], 'path': [f'{k}.png' for k in range(n)], 'sha256': [f'{k:064x}' for k in range(n)], 'split': 'train', 'label': 'happy'} | columns))


def noisy(n=1500, rate=.12, seed=0):
    "Embeddings, the labels given to them, and which of those are wrong."
    rng = np.random.default_rng(seed)
    truth = rng.choice(7, n, p=[.14, .05, .14, .25, .17, .11, .14])
    x = rng.normal(0, 1, (7, 24))[truth] + rng.normal(0, 1., (n, 24))
    wrong = rng.random(n) < rate
    return x, np.where(wrong, (truth + rng.integers(1, 7, n)) % 7, truth), wrong


# ranking

@pytest.mark.parametrize('method', ['self_confidence', 'normalised_margin'])
def test_planted_wrong_labels_come_first(method):
    x, given_labels, wrong = noisy()
    ranked = rank_suspects(manifest(len(x), label=NAMES[given_labels]), out_of_fold(x, given_labels), method)
    hit = wrong[ranked['id'].str[4:].astype(int)]
    assert hit[:100].mean() > .9 > .3 > wrong.mean() and hit[:wrong.sum()].mean() > .75
    assert wrong[ranked.loc[ranked['flagged'], 'id'].str[4:].astype(int)].mean() > .6


def test_probabilities_of_ones_own_are_taken_and_checked():
    x, y, wrong = noisy(300)
    own = np.full((300, 7), .05); own[np.arange(300), y] = .7
    own[wrong] = np.roll(own[wrong], 1, axis=1)  # an oracle
    ranked = rank_suspects(manifest(300, label=NAMES[y]), own.astype(np.float32))
    assert set(ranked['id'].head(wrong.sum())) == {f'set/{k:05d}' for k in np.flatnonzero(wrong)}
    for bad in (own[:-1], own*2, np.where(own > .5, np.nan, own)):
        with pytest.raises(FerError) as e: label_scores(bad, y)
        assert e.value.code == 'bad_parameter'


def test_a_group_does_not_vouch_for_its_own_wrong_label():
    rng = np.random.default_rng(0)
    x, y, _ = noisy(400, 0)
    film = np.repeat(np.arange(100), 4)                    # four frames of each of a hundred films
    x = x[film] + rng.normal(0, .01, (400, x.shape[1]))    # frames alike
    y = y[film]
    off = film < 12                                        # twelve films, wrongly labelled throughout
    y = np.where(off, (y + 3) % 7, y)
    wide = np.c_[x, rng.normal(0, 3., (100, 300))[film]]   # room for learning films by heart
    def own(groups): return label_scores(out_of_fold(wide, y, groups, strength=1e5, components=400), y, 'self_confidence')[off].mean()
    assert own(film) < .35 < .65 < own(None)


def test_rows_without_a_group_are_groups_of_their_own():
    keys = group_keys(manifest(5, group=['', 'a', 'a', '', 'row set/00000']))
    assert keys[1] == keys[2] and len(set(keys)) == 4


def test_classes_that_are_rare_or_missing():
    x, y, _ = noisy(300)
    y = np.where(y == 1, 0, y); y[0] = 1                   # a single disgust
    probs = out_of_fold(x, y)
    assert np.allclose(probs.sum(1), 1) and not flag_issues(probs, y)[0] and noise_table(probs, y).to_numpy().sum() == 300
    assert len(rank_suspects(manifest(300, label=NAMES[np.where(y == 1, 0, y)]), probs)) == 300


def test_a_ranking_survives_its_file(tmp_path):
    x, y, _ = noisy(200)
    ranked = rank_suspects(manifest(200, label=NAMES[y]), out_of_fold(x, y), top=50)
    write_suspects(ranked, tmp_path/'suspects.csv')
    pd.testing.assert_frame_equal(read_suspects(tmp_path/'suspects.csv'), ranked, check_dtype=False, rtol=1e-5)
    with pytest.raises(FerError) as e: rank_suspects(manifest(200, label='contempt'), out_of_fold(x, y))
    assert e.value.code == 'unknown_label'


# the decisions file

def script(text, *args, **kw):
    "A Python process that runs a script."
    return subprocess.Popen([sys.executable, '-c', 'import sys\nfrom fer_core.data.review import *\n' + textwrap.dedent(text), *map(str, args)], stdout=subprocess.PIPE, text=True, **kw)


def test_a_killed_writer_loses_nothing_it_had_confirmed(tmp_path):
    file = tmp_path/'d.jsonl'
    writer = script('''
        for k in range(100_000):
            append_decision(sys.argv[1], f'set/{k:05d}', 'sha', 'keep', '', 'ana', 'x'*300)
            print(k, flush=True)
    ''', file)
    told = [int(writer.stdout.readline()) for _ in range(60)]
    writer.send_signal(signal.SIGKILL)
    told += [int(line) for line in writer.stdout]
    writer.wait()
    append_decision(file, 'after', 'sha', 'drop', '', 'ben')
    there = read_decisions(file)
    assert set(there.rows['id']) >= {f'set/{k:05d}' for k in told} | {'after'} and len(there.torn) <= 1


def test_killed_in_the_middle_of_a_line(tmp_path):
    file = tmp_path/'d.jsonl'
    append_decision(file, 'a', 'sha', 'drop', '', 'ana')
    writer = script('''
        import fcntl, os, signal
        f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX)
        f.write(b'{"id": "b", "sha256": "sh'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)
    ''', file)
    assert writer.wait() == -signal.SIGKILL
    there = read_decisions(file)
    assert list(there.rows['id']) == ['a'] and there.torn == [2]
    append_decision(file, 'c', 'sha', 'drop', '', 'ana')  # the dead writer's lock is gone
    there = read_decisions(file)
    assert list(there.rows['id']) == ['a', 'c'] and there.torn == [2] and file.read_bytes().count(b'\n') == 3
    assert apply_decisions(manifest(1), there)[1]['torn_lines'] == [2]


def test_a_full_disk_tears_a_line_and_is_told(tmp_path):
    file = tmp_path/'d.jsonl'
    append_decision(file, 'a', 'sha', 'drop', '', 'ana')
    writer = script('''
        import os, resource
        size = os.path.getsize(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        try: append_decision(sys.argv[1], 'b', 'sha', 'drop', '', 'ana')
        except OSError as e: print('told', e.errno)
    ''', file)
    assert writer.communicate()[0].startswith('told')
    assert list(read_decisions(file).rows['id']) == ['a'] and read_decisions(file).torn == [2]
    append_decision(file, 'c', 'sha', 'drop', '', 'ana')
    assert list(read_decisions(file).rows['id']) == ['a', 'c']


def test_a_line_that_lacks_only_its_end_counts(tmp_path):
    file = tmp_path/'d.jsonl'
    append_decision(file, 'a', 'sha', 'drop', '', 'ana')
    file.write_bytes(file.read_bytes()[:-1])
    assert list(read_decisions(file).rows['id']) == ['a']
    append_decision(file, 'b', 'sha', 'drop', '', 'ana')
    assert list(read_decisions(file).rows['id']) == ['a', 'b'] and not read_decisions(file).torn


def test_two_writers_at_once(tmp_path):
    file = tmp_path/'d.jsonl'
    text = '''
        for k in range(80): append_decision(sys.argv[1], f'{sys.argv[2]}/{k}', 'sha', 'keep', '', sys.argv[2], 'é'*200)
    '''
    writers = [script(text, file, who) for who in ('ana', 'ben')]
    assert [w.wait() for w in writers] == [0, 0]
    there = read_decisions(file)
    assert len(there.rows) == 160 and not there.torn and list(there.rows['line']) == list(range(1, 161))
    for who in ('ana', 'ben'): assert list(there.rows.loc[there.rows['reviewer'] == who, 'id']) == [f'{who}/{k}' for k in range(80)]


def test_a_writer_that_holds_the_lock_too_long(tmp_path):
    file = tmp_path/'d.jsonl'
    append_decision(file, 'a', 'sha', 'drop', '', 'ana')
    import fcntl
    with open(file, 'ab') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(FerError) as e: append_decision(file, 'b', 'sha', 'drop', '', 'ben', wait=.05)
    assert e.value.code == 'interrupted' and len(read_decisions(file).rows) == 1


@pytest.mark.parametrize('change, code', [({'action': 'delete'}, 'bad_parameter'), ({'action': 'relabel', 'label': 'contempt'}, 'unknown_label'), ({'action': 'relabel', 'label': ''}, 'unknown_label'),
                                          ({'label': 'sadness'}, 'unknown_label'), ({'reviewer': None}, 'corrupt_artifact'), ({'sha256': ''}, 'corrupt_artifact'), ({'note': 7}, 'corrupt_artifact')])
def test_a_wrong_decision_names_file_and_line(tmp_path, change, code):
    file = tmp_path/'of_ana.jsonl'
    append_decision(file, 'a', 'sha', 'keep', '', 'ana')
    line = json.loads(file.read_text()) | change
    file.write_text(file.read_text() + json.dumps(line) + '\n')
    with pytest.raises(FerError) as e: apply_decisions(manifest(2), file)
    assert e.value.code == code and 'of_ana.jsonl line 2' in str(e.value)


def test_damage_is_not_taken_for_a_crash(tmp_path):
    file = tmp_path/'d.jsonl'
    for k in 'abc': append_decision(file, k, 'sha', 'keep', '', 'ana')
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:30] + b'\n' + lines[2])
    with pytest.raises(FerError) as e: read_decisions(file)
    assert e.value.code == 'corrupt_artifact' and 'line 2' in str(e.value)


def test_the_latest_decision_wins_undo_withdraws_ones_own_and_conflicts_are_listed(tmp_path):
    file = tmp_path/'d.jsonl'
    def say(who, what, label='', sha='1'): append_decision(file, 'x', sha, what, label, who)
    def stands(): return [(d.action, d.label, d.reviewer) for d in latest(read_decisions(file)).itertuples()]
    say('ana', 'relabel', 'sad'); say('ben', 'drop')
    assert stands() == [('drop', '', 'ben')] and conflicts(read_decisions(file)).to_dict('records') == [{'id': 'x', 'decided': 'ana: relabel to sad; ben: drop', 'wins': 'drop'}]
    say('ana', 'undo')
    assert stands() == [('drop', '', 'ben')] and conflicts(read_decisions(file)).empty
    say('ben', 'undo'); say('ben', 'undo')
    assert stands() == []
    say('ana', 'keep'); say('ben', 'keep', 'happy'); say('ana', 'drop', sha='2')
    assert conflicts(read_decisions(file)).empty  # ben saw another picture
    assert stands() == [('drop', '', 'ana')]


# applying

def test_stale_test_and_copies(tmp_path):
    file, df = tmp_path/'d.jsonl', manifest(6, split=['train', 'train', 'val', 'test', 'train', 'train'], soft_label='0 0 0 1 0 0 0')
    df.loc[4, 'sha256'], df.index = df.loc[0, 'sha256'], list('uvwxyz')  # the fifth is a copy of the first
    sha = df['sha256'].tolist()
    for k, action, label in ((0, 'relabel', 'sad'), (2, 'drop', ''), (3, 'drop', ''), (5, 'keep', '')): append_decision(file, df['id'].iloc[k], sha[k], action, label, 'ana')
    append_decision(file, df['id'].iloc[1], 'of another picture', 'drop', '', 'ana')
    out, log = apply_decisions(df, file)
    assert list(out.index) == ['u', 'v', 'x', 'y', 'z'] and list(out['label']) == ['sad', 'happy', 'happy', 'sad', 'happy']
    assert list(out['soft_label'] == '') == [True, False, False, True, False] and (df['label'] == 'happy').all()
    assert log['stale'] == ['set/00001'] and log['counts'] == {'relabelled': 2, 'dropped': 1, 'kept': 1, 'unchanged': 0, 'stale': 1, 'absent': 0, 'test untouched': 1}
    json.dumps(log)
    assert 'x' not in apply_decisions(df, file, test=True)[0].index
    append_decision(file, df['id'].iloc[4], sha[4], 'keep', '', 'ben')  # the copy's own decision counts for it
    assert apply_decisions(df, file)[0].loc['y', 'label'] == 'happy'
    with pytest.raises(FerError): apply_decisions(df.assign(sha256=''), file)


def test_decisions_for_rows_that_are_gone(tmp_path):
    file, df = tmp_path/'d.jsonl', manifest(2)
    append_decision(file, 'elsewhere', 'no such picture', 'drop', '', 'ana')
    append_decision(file, 'renamed', df['sha256'][1], 'relabel', 'fear', 'ana')  # the picture is there under another id
    out, log = apply_decisions(df, file)
    assert list(out['label']) == ['happy', 'fear'] and log['counts']['absent'] == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(['keep', 'relabel', 'drop', 'undo']), st.sampled_from(CLASSES), st.sampled_from(['ana', 'ben'])), max_size=12))
def test_applying_agrees_with_a_plain_replay(tmp_path_factory, said):
    file, df = tmp_path_factory.mktemp('d')/'d.jsonl', manifest(6)
    stacks = {}
    file.touch()
    for n, (k, action, label, who) in enumerate(said):
        append_decision(file, df['id'][k], df['sha256'][k], action, label if action == 'relabel' else '', who)
        own = stacks.setdefault((k, who), [])
        if action != 'undo': own.append((n, action, label))
        elif own: own.pop()
    want = {k: 'happy' for k in range(6)}
    for k in range(6):
        tops = sorted(s[-1] for (i, _), s in stacks.items() if i == k and s)
        if tops and tops[-1][1] == 'drop': del want[k]
        elif tops and tops[-1][1] == 'relabel': want[k] = tops[-1][2]
    out, _ = apply_decisions(df, file)
    assert dict(zip(out.index, out['label'])) == want
    pd.testing.assert_frame_equal(apply_decisions(out, file)[0], out)  # once is enough


# weights

def mined(tmp_path, n=200):
    rng = np.random.default_rng(0)
    df = manifest(n, label=NAMES[np.arange(n) % 7], split=np.where(np.arange(n) % 4, 'train', 'val'))
    hard = hard_samples(df, rng.dirichlet(np.ones(7), n))
    write_hard_samples(hard, tmp_path/'hard_samples.csv')
    return df, hard, tmp_path/'hard_samples.csv'


def test_weights_find_their_rows_in_any_order(tmp_path):
    df, hard, file = mined(tmp_path)
    want = dict.fromkeys(df['id'], 1.) | dict(zip(hard['id'], hard['weight']))
    for seed in range(3):
        other = df.sample(frac=1, random_state=seed)
        w = sample_weights(file, other)
        assert w.dtype == np.float32 and dict(zip(other['id'], w)) == want
    assert {1., 2.} == set(want.values())


def test_weights_of_other_data_are_refused(tmp_path):
    df, hard, file = mined(tmp_path)
    id = hard['id'][5]
    cases = {'softlabel_misaligned': [df[df['id'] != id], df.assign(label=np.where(df['id'] == id, 'disgust' if hard['label'][5] != 'disgust' else 'sad', df['label']))],
             'split_leakage': [df.assign(split='test')]}
    for code, tables in cases.items():
        for table in tables:
            with pytest.raises(FerError) as e: sample_weights(file, table)
            assert e.value.code == code and 'hard_samples.csv line' in str(e.value)
    text = file.read_text().splitlines()
    for broken, code in ((text + text[1:2], 'duplicate_id'), ([text[0], text[1].replace(',2,', ',lots,').replace(',1,', ',lots,')], 'bad_parameter'), ([text[0].replace('weight', 'w'), text[1]], 'corrupt_artifact')):
        file.write_text('\n'.join(broken) + '\n')
        with pytest.raises(FerError) as e: sample_weights(file, df)
        assert e.value.code == code


def test_mining_the_test_split_is_refused_and_its_listing_has_no_weights(tmp_path):
    df, probs = manifest(20, split='test'), np.full((20, 7), 1/7)
    with pytest.raises(FerError) as e: hard_samples(df, probs)
    assert e.value.code == 'split_leakage'
    listed = hard_samples(df, probs, test=True)
    assert len(listed) == 20 and listed['weight'].isna().all()


def test_a_contradicted_label_gets_no_more_weight():
    probs = np.full((3, 7), .01); probs[0, 3], probs[1, 4], probs[2, 4] = .94, .94, .6; probs[2, 3] = .35
    hard = hard_samples(manifest(3), probs/probs.sum(1, keepdims=True), boost=5)
    assert dict(zip(hard['id'], zip(hard['reason'], hard['weight']))) == {'set/00001': ('contradicted', 1.), 'set/00002': ('misclassified', 5.)}


# the page, without a browser

def review_of(tmp_path, n=7):
    df = manifest(n, label=NAMES[np.arange(n) % 7], suggested='sad', confidence=.8)
    return Review(df, tmp_path/'d.jsonl', lambda row: np.full((48, 48), 90, np.uint8), 'ana')


def test_clicks_write_decisions_and_undo_takes_them_back(tmp_path):
    pytest.importorskip('ipywidgets')
    review = review_of(tmp_path)
    page = Page(review, per_page=4)
    assert bytes(page.cards[0].image.value).startswith(b'\x89PNG') and list(tmp_path.iterdir()) == []  # the picture is nowhere on disk
    page.cards[0].keep.click(); page.cards[1].drop.click()
    page.cards[2].classes.value = 'neutral'; page.cards[2].relabel.click()
    page.next.click(); page.cards[2].relabel.click()  # the model's class is preset
    assert [(d.id[-1], d.action, d.label) for d in latest(read_decisions(tmp_path/'d.jsonl')).itertuples()] == [('0', 'keep', ''), ('1', 'drop', ''), ('2', 'relabel', 'neutral'), ('6', 'relabel', 'sad')]
    page.undo.click(); page.back.click(); page.undo.click()
    assert progress(review) == {'total': 7, 'decided': 2, 'keep': 1, 'relabel': 0, 'drop': 1} and '2 of 7' in page.progress.value
    assert [c.state.value for c in page.cards] == ['keep', 'drop', '&nbsp;', '&nbsp;'] and 'solid #000000' in page.cards[1].box.layout.border
    assert len(read_decisions(tmp_path/'d.jsonl').rows) == 6  # nothing was ever removed
    again = Page(review, per_page=2)                   # a new kernel goes on where the old one stopped
    assert again.first == 2 and not again.undo.disabled


def test_a_click_that_cannot_be_recorded_says_so(tmp_path):
    pytest.importorskip('ipywidgets')
    review = review_of(tmp_path)
    page = Page(review)
    (tmp_path/'d.jsonl').mkdir()  # a folder stands where the file should
    page.cards[0].keep.click()
    assert 'not recorded' in page.message.value and page.cards[0].state.value == '&nbsp;'


def test_without_ipywidgets_there_is_a_table_and_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    review = review_of(tmp_path)
    review.decide('set/00003', 'relabel', 'fear')
    table = review_page(review)
    assert 'pip install ipywidgets' in capsys.readouterr().out and list(table['decision']) == ['']*3 + ['relabel to fear'] + ['']*3


# a real run, tiny

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    import torch
    from fer_core.artifacts import Run, parent
    from fer_core.data.curate import curate
    from fer_core.data.loader import Feeder, open_pack
    from fer_core.data.preprocess import Preprocess
    from fer_core.data.synthetic import write_discs
    from fer_core.models.backbones import Classifier, ModelConfig
    from fer_core.train.judge import judge_model
    from fer_core.train.loop import TrainConfig, fit
    from fer_core.train.losses import ce_loss
    home = tmp_path_factory.mktemp('run')
    curate(write_discs(home/'raw', train=6, val=3, test=3), home/'data', source='folder', near=None)
    pack, run = open_pack(home/'data', Preprocess(size=32, clahe=0)), Run.create(home/'teacher', 'teacher')
    run.record(dataset={'sha256': pack.dataset_sha256}, parents={'data': parent(home/'data', 'classification_manifest.csv')}, reliability={'flip_averaged': True})
    torch.manual_seed(0)
    model, feed = Classifier(ModelConfig('mobilenetv3_small_050')), Feeder(pack)
    fit(run, model, feed, lambda net, x, y, rows, epoch: ce_loss(net(x, y), y), TrainConfig(epochs=1, batch_size=16, precision='32-true'))
    from fer_core.models.backbones import load_model
    judge_model(run, load_model(run.folder)[0], feed, flip=True)
    return run.folder


def test_probabilities_of_a_run_are_those_it_was_judged_by(run):
    from fer_core.artifacts import read_json
    from fer_core.data.loader import Feeder, open_pack
    from fer_core.evaluate.metrics import softmax
    from fer_core.models.backbones import load_model
    from fer_core.train.judge import read_logits
    from fer_core.train.loop import predict_logits
    from fer_core.train.mining import run_probs
    rows, probs = run_probs(run, ('train', 'val', 'test'))
    assert rows['split'].value_counts().to_dict() == {'train': 42, 'val': 21, 'test': 21}
    model, spec, _ = load_model(run)
    feed, T = Feeder(open_pack(run.parent/'data', spec)), read_json(run/'calibration.json')['temperature']
    assert (rows['id'] == feed.pack.table['id']).all()
    fresh = softmax(predict_logits(model, feed, np.arange(84), flip=True), T)
    assert np.allclose(probs, fresh, atol=1e-5)
    assert np.allclose(probs[rows['split'] == 'test'], softmax(read_logits(run/'logits.npz')[0]['test'], T))


def test_mining_a_run(run, tmp_path):
    from fer_core.train.mining import mine_run, suspects_of_run
    hard = mine_run(run, tmp_path)
    note = json.loads((tmp_path/'hard_samples.json').read_text())
    assert note['run'] == 'teacher' and note['rows'] == 63 and note['hard'] == len(hard) > 0 and not set(hard['split']) - {'train', 'val'}
    table = pd.read_csv(run.parent/'data'/'classification_manifest.csv', dtype=str, keep_default_na=False)
    assert set(sample_weights(tmp_path/'hard_samples.csv', table)) <= {1., 2.}
    with pytest.raises(FerError) as e: mine_run(run, tmp_path/'t', splits=('test',))
    assert e.value.code == 'split_leakage' and not (tmp_path/'t').exists()
    assert len(suspects_of_run(run, tmp_path, folds=3)) == 63 and (tmp_path/'suspects.csv').is_file()


def test_a_finished_run_is_not_written_into_and_other_data_are_refused(run, tmp_path):
    import shutil
    from fer_core.artifacts import Run, verify_hashes
    from fer_core.data.manifest import read_manifest, write_manifest
    from fer_core.train.mining import mine_run, run_probs
    copy = tmp_path/'teacher'
    shutil.copytree(run, copy); shutil.copytree(run.parent/'data', tmp_path/'data')
    Run(copy).finish()
    with pytest.raises(FerError) as e: mine_run(copy, copy)
    assert 'finished' in str(e.value) and set(verify_hashes(copy).values()) == {'ok'}
    table = read_manifest(tmp_path/'data'/'classification_manifest.csv')
    table.loc[0, 'label'] = 'sad' if table['label'][0] != 'sad' else 'fear'
    write_manifest(table, tmp_path/'data'/'classification_manifest.csv')
    with pytest.raises(FerError) as e: run_probs(copy)
    assert e.value.code == 'softlabel_misaligned'

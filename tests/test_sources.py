"Published layouts to the letter, several sources merged, what the web does to pictures and lists, a planted leak, a killed curation."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest
from PIL import Image
from fer_core.artifacts import FAILURES, FerError
from fer_core.data.curate import curate, parse_datasets
from fer_core.data.manifest import read_manifest, write_manifest
from fer_core.data.sources import ADAPTERS, detect_source, read
from fer_core.data.splits import leave_source_out
from fer_core.data.validate import validate
from fer_core.labels import CLASSES

FER = str(Path(sys.executable).parent/'fer')
SHARED = Path(os.environ.get('FER_CORE_SHARED', Path(__file__).parents[2]/'shared'))


def face(rng, side=100): return cv2.GaussianBlur(rng.integers(0, 256, (side, side), np.uint8), (0, 0), side/24)


def save(path, image, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image, **kw)


# -- every source in the layout its authors publish -----------------------------------------------------------------------------

def rafdb(root, rng, n=21, aligned=True):
    lines = []
    for i in range(n):
        name = f'train_{i + 1:05d}' if i % 3 else f'test_{i + 1:04d}'
        lines.append(f'{name}.jpg {i % 7 + 1}')
        save(root/'Image'/('aligned' if aligned else 'original')/(f'{name}_aligned.jpg' if aligned else f'{name}.jpg'), face(rng, 100 if aligned else 160))
        (root/'Annotation'/'boundingbox').mkdir(parents=True, exist_ok=True)
        (root/'Annotation'/'boundingbox'/f'{name}_boundingbox.txt').write_text('20.5 10.25 120.5 130.25 ')
    (root/'EmoLabel').mkdir(exist_ok=True)
    (root/'EmoLabel'/'list_patition_label.txt').write_text('\n'.join(lines) + '\n')
    return root


def affectnet_csv(root, rng, n=21):
    head = 'subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal'
    lists = root/'Manually_Annotated_file_lists'
    lists.mkdir(parents=True)
    for part in ('training', 'validation'):
        lines = [head]
        for i in range(n):
            name = f'{i % 4}/{part}{i:04d}.jpg'
            save(root/'Manually_Annotated_Images'/name, face(rng, 120))
            lines.append(f'{name},10,12,90,88,30.0;40.0;50.1;60.2,{i % 11},0.1,-0.2')
        (lists/f'{part}.csv').write_text('\n'.join(lines) + '\n')
    return root


def affectnet_npy(root, rng, n=22):
    for part in ('train_set', 'val_set'):
        for i in range(n):
            save(root/part/'images'/f'{i}.jpg', face(rng, 112))
            (root/part/'annotations').mkdir(exist_ok=True)
            for kind, value in (('exp', str(i % 8)), ('val', '0.5'), ('aro', '0.1'), ('lnd', '1;2')): np.save(root/part/'annotations'/f'{i}_{kind}.npy', np.array(value))
    return root


def expw(root, rng, n=21):
    lines = []
    for i in range(n):
        name = f'feeling_person_{i//2}.jpg'
        if i % 2 == 0: save(root/'image'/'origin'/name, np.hstack([face(rng, 120), face(rng, 120)]))
        lines.append(f'{name} {i % 2} 10 {10 + 120*(i % 2)} {110 + 120*(i % 2)} 110 {30 + i:.4f} {i % 7}')
    (root/'label').mkdir()
    (root/'label'/'label.lst').write_text('\n'.join(lines) + '\n')
    return root


def rafml(root, rng, n=12):
    (root/'EmoLabel').mkdir(parents=True)
    lines, parts = [], []
    for i in range(n):
        share = np.full(6, .04); share[i % 6] = .8
        lines.append(f'{i + 1:04d}.jpg ' + ' '.join(f'{v:.2f}' for v in share)); parts.append(f'{i + 1:04d}.jpg {int(i % 4 == 0)}')
        save(root/'Image'/'aligned'/f'{i + 1:04d}_aligned.jpg', face(rng))
    (root/'EmoLabel'/'distribution.txt').write_text('\n'.join(lines) + '\n')
    (root/'EmoLabel'/'partition_label.txt').write_text('\n'.join(parts) + '\n')
    return root


@pytest.mark.parametrize('make, source, labels, splits', [
    (lambda r, g: rafdb(r, g), 'rafdb_basic', ['surprise', 'fear', 'disgust'], {'train': 14, 'test': 7}),
    (lambda r, g: rafdb(r/'basic', g).parent, 'rafdb_basic', ['surprise', 'fear', 'disgust'], {'train': 14, 'test': 7}),
    (lambda r, g: rafdb(r, g, aligned=False), 'rafdb_basic', ['surprise', 'fear', 'disgust'], {'train': 14, 'test': 7}),
    (lambda r, g: rafdb(r/'compound', g).parent, 'rafdb_compound', ['surprise', 'fear', 'disgust'], {'train': 6, 'test': 3}),
    (affectnet_csv, 'affectnet', ['neutral', 'happy', 'sad'], {'train': 14, 'test': 14}),
    (affectnet_npy, 'affectnet', ['neutral', 'happy', 'sad'], {'train': 20, 'test': 20}),
    (expw, 'expw', ['angry', 'disgust', 'fear'], {'train': 21}),
    (rafml, 'rafml', ['surprise', 'fear', 'disgust'], {'train': 9, 'test': 3}),
])
def test_published_layouts(make, source, labels, splits, tmp_path):
    root = make(tmp_path/'data', np.random.default_rng(0))
    assert detect_source(root) == source
    df = read('auto', root)
    assert df['split'].value_counts().to_dict() == splits and not df['id'].duplicated().any()
    if source in ('affectnet', 'expw', 'rafml', 'rafdb_basic') and 'npy' not in str(make): assert df['label'].tolist()[:3] == labels
    assert all(ADAPTERS[source][k] for k in ('licence', 'citation', 'layout', 'label_note'))
    roots = {source: root} | ({} if source not in ('rafml', 'rafdb_compound') else {'rafdb_basic': rafdb(tmp_path/'basic', np.random.default_rng(9))}) # alone they lack classes
    curate(roots, tmp_path/'out', test_fraction=.2, near=None)
    kept = read_manifest(tmp_path/'out'/'classification_manifest.csv')
    assert validate(kept, roots, near=None).ok and (kept['source'] == source).any() and (kept[['width', 'height']] > 0).all(axis=None)
    clean = json.loads((tmp_path/'out'/'clean_report.json').read_text())
    assert source in clean['sources'] and (clean['deviations_from_published'][source] if 'published' in ADAPTERS[source] else True)


def test_boxes_are_what_is_fingerprinted(tmp_path):
    root = expw(tmp_path/'data', np.random.default_rng(0))
    curate(root, tmp_path/'out', near=None)
    df = read_manifest(tmp_path/'out'/'classification_manifest.csv')
    assert not df['sha256'].duplicated().any() and set(zip(df['width'], df['height'])) == {(100, 100)} # two faces of one photograph are two pictures
    assert df.groupby('group')['split'].nunique().max() == 1


def test_ck_like_counts_are_compared_with_the_published_ones(tmp_path):
    curate(rafdb(tmp_path/'data', np.random.default_rng(0)), tmp_path/'out', near=None)
    rows = json.loads((tmp_path/'out'/'clean_report.json').read_text())['deviations_from_published']['rafdb_basic']
    assert {'split': 'train', 'class': 'happy', 'published': 4772, 'read': 2, 'difference': -4770} in rows


def test_a_table_with_a_map(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(14): save(tmp_path/'pics'/f'{i}.png', face(rng))
    told = {'csv': 'my.csv', 'folder': 'pics', 'columns': {'path': 'f', 'label': 'l', 'split': 's', 'group': 'g'}, 'labels': {'joy': 'happy', 'n/a': None}, 'splits': {'hold': 'test'}, 'soft': {'p1': 'happy', 'p2': 'sad'}, 'licence': 'CC0', 'citation': 'me'}
    (tmp_path/'columns.json').write_text(json.dumps(told))
    lines = ['\ufefff,l,s,g,p1,p2'] + [f'{i}.png,{("joy", "Sadness")[i % 2]},{"hold" if i > 9 else "train"},p{i//2},{.7 if i % 2 == 0 else .2},{.3 if i % 2 == 0 else .8}' for i in range(13)] + ['13.png,n/a,train,p9,0,0']
    (tmp_path/'my.csv').write_bytes('\r\n'.join(lines).encode())
    df = read('auto', tmp_path)
    assert len(df) == 13 and df['label'].tolist()[:2] == ['happy', 'sad'] and df['split'].tolist().count('test') == 3 and df.attrs['dropped'] == {'label n/a': 1}
    assert np.allclose(np.array(df['soft_label'][0].split(), float)[[3, 4]], [.7, .3])
    told['columns'].pop('label'); (tmp_path/'columns.json').write_text(json.dumps(told))
    with pytest.raises(FerError) as e: read('auto', tmp_path)
    assert e.value.code == 'bad_parameter' and "'label'" in str(e.value)


# -- several sources -------------------------------------------------------------------------------------------------------------

def test_two_datasets_with_the_same_file_names_and_one_shared_picture(tmp_path):
    rng = np.random.default_rng(3)
    for source in ('a', 'b'):
        for c in CLASSES:
            for k in range(6): save(tmp_path/source/'train'/c/f'{k}.png', face(rng))
            save(tmp_path/source/'test'/c/'t.png', face(rng))
    shared = cv2.imread(str(tmp_path/'a'/'test'/'sad'/'t.png'), 0)
    save(tmp_path/'b'/'train'/'fear'/'leak.png', cv2.imdecode(cv2.imencode('.jpg', shared[:, ::-1])[1], 0)) # a's test face: mirrored, recompressed
    save(tmp_path/'b'/'train'/'sad'/'5.png', cv2.imread(str(tmp_path/'a'/'train'/'happy'/'5.png'), 0))       # one picture, two opinions
    (tmp_path/'b'/'columns.json').write_text(json.dumps({'csv': 'list.csv', 'columns': {'path': 'p', 'label': 'c', 'split': 's'}, 'source': 'mine'}))
    rows = [f'{p.relative_to(tmp_path/"b").as_posix()},{p.parent.name},{p.parent.parent.name}' for p in sorted((tmp_path/'b').rglob('*.png'))]
    (tmp_path/'b'/'list.csv').write_text('\n'.join(['p,c,s', *rows]))
    curate({'folder': tmp_path/'a', 'csv': tmp_path/'b'}, tmp_path/'out', policy='majority')
    df = read_manifest(tmp_path/'out'/'classification_manifest.csv').set_index('id')
    assert set(df['source']) == {'folder', 'mine'} and 'mine/train/fear/leak.png' not in df.index and not df['sha256'].duplicated().any()
    assert df.loc['folder/train/happy/5.png', 'opinions'] == 'folder:happy mine:sad' and df.loc['folder/train/happy/5.png', 'label'] == 'sad' # csv has priority 8, folder 9
    lost = pd.read_csv(tmp_path/'out'/'dropped.csv').set_index('id')['reason']
    assert lost['mine/train/fear/leak.png'] == 'near-duplicate of test' and lost['mine/train/sad/5.png'] == 'same picture as folder'
    test = read_manifest(tmp_path/'out'/'test_all_sources.csv')
    assert test.groupby(['source', 'label']).size().nunique() == 1 and test['source'].nunique() == 2
    from fer_core.data.loader import open_pack
    from fer_core.data.preprocess import Preprocess
    assert len(open_pack(tmp_path/'out', Preprocess(size=32))) == len(df)
    left = leave_source_out(df.reset_index(), 'mine')
    assert set(left['source'][left['split'] == 'test']) == {'mine'} and not set(left['group'][left['split'] == 'test']) & set(left['group'][left['split'] != 'test']) - {''}


def test_datasets_on_the_command_line(tmp_path):
    rafdb(tmp_path/'x', np.random.default_rng(0))
    assert parse_datasets([f'rafdb_basic={tmp_path/"x"}']) == {'rafdb_basic': str(tmp_path/'x')} == parse_datasets(tmp_path/'x')
    with pytest.raises(FerError) as e: parse_datasets([f'rafdb_basic={tmp_path/"x"}', str(tmp_path/'x')])
    assert 'twice' in str(e.value)
    with pytest.raises(FerError) as e: parse_datasets(['fer2013=/no/such'])
    assert e.value.code == 'missing_file' and '/no/such' in str(e.value)


def test_a_planted_leak_fails_validation_by_name(tmp_path):
    "A flipped, recompressed test face put into training by hand."
    rng = np.random.default_rng(5)
    for c in CLASSES:
        for k in range(4): save(tmp_path/'d'/'train'/c/f'{k}.png', face(rng, 48))
        save(tmp_path/'d'/'test'/c/'t.png', face(rng, 48))
    curate(tmp_path/'d', tmp_path/'out', val_fraction=.2)
    df = read_manifest(tmp_path/'out'/'classification_manifest.csv')
    save(tmp_path/'d'/'train'/'happy'/'leak.jpg', cv2.imread(str(tmp_path/'d'/'test'/'happy'/'t.png'), 0)[:, ::-1], params=[cv2.IMWRITE_JPEG_QUALITY, 60])
    leak = df[df['split'] == 'train'].iloc[0].to_dict() | {'id': 'folder/train/happy/leak.jpg', 'path': 'train/happy/leak.jpg', 'label': 'happy', 'sha256': '', 'group': ''}
    write_manifest(pd.concat([df, pd.DataFrame([leak])], ignore_index=True), tmp_path/'leaky.csv')
    report = validate(tmp_path/'leaky.csv', tmp_path/'d')
    assert [p.code for p in report.problems] == ['split_leakage'] and 'leak.jpg' in report.problems[0].where and 't.png' in report.problems[0].message
    (tmp_path/'leaky.csv').replace(tmp_path/'out'/'classification_manifest.csv')
    done = subprocess.run([FER, 'data', 'validate', str(tmp_path/'out')], capture_output=True, text=True, timeout=100)
    assert done.returncode == FAILURES['split_leakage'].exit_code and 'leak.jpg' in done.stderr


# -- what the web does -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def wild(tmp_path):
    rng, root = np.random.default_rng(8), tmp_path/'wild'
    for c in CLASSES:
        for k in range(4): save(root/'train'/c/f'{k}.png', face(rng, 48))
    picture = Image.fromarray(face(rng, 60)).convert('RGB')
    exif = Image.Exif(); exif[0x0112] = 6
    picture.resize((40, 60)).save(root/'train'/'happy'/'turned.JPEG', exif=exif)
    picture.rotate(90).convert('CMYK').save(root/'train'/'happy'/'print.JPG')
    picture.rotate(180).save(root/'train'/'sad'/'moving.GIF', save_all=True, append_images=[picture])
    cv2.imwrite(str(root/'train'/'sad'/'deep.Png'), face(rng, 64).astype(np.uint16)*257)
    save(root/'train'/'fear'/('ünïcödé 表情 ' + 'x'*180 + '.png'), face(rng, 48))
    (root/'train'/'fear'/'zero.png').write_bytes(b'')
    whole = (root/'train'/'fear'/'1.png').read_bytes()
    (root/'train'/'fear'/'cut.png').write_bytes(whole[:len(whole)//2])
    (tmp_path/'elsewhere.png').write_bytes(whole)
    (root/'train'/'fear'/'out.png').symlink_to(tmp_path/'elsewhere.png')
    return root


def test_wild_pictures_are_read_or_named(wild, tmp_path):
    with pytest.raises(FerError) as e: curate(wild, tmp_path/'strict')
    assert 'out.png' in str(e.value) and not (tmp_path/'strict'/'classification_manifest.csv').exists()
    curate(wild, tmp_path/'out', strict=False, test_fraction=.2)
    clean, df = json.loads((tmp_path/'out'/'clean_report.json').read_text()), read_manifest(tmp_path/'out'/'classification_manifest.csv')
    assert clean['faults']['by_code'] == {'bad_parameter': 1, 'undecodable_image': 2}
    assert {'zero.png', 'cut.png', 'out.png'} == {n for p in clean['faults']['list'] for n in ('zero.png', 'cut.png', 'out.png') if n in p['where'] + p['message']}
    for name in ('turned.JPEG', 'print.JPG', 'moving.GIF', 'deep.Png', 'ünïcödé'): assert df['path'].str.contains(name, regex=False).sum() == 1, name
    turned = df[df['path'].str.contains('turned')].iloc[0]
    assert (turned['width'], turned['height']) == (60, 40)
    assert validate(df, wild).ok


def test_a_half_extracted_archive(tmp_path):
    root = rafdb(tmp_path/'d', np.random.default_rng(0))
    for p in sorted((root/'Image'/'aligned').iterdir())[:5]: p.unlink()
    with pytest.raises(FerError) as e: curate(root, tmp_path/'out')
    assert e.value.code == 'missing_file' and '4 more problems' in str(e.value)
    curate(root, tmp_path/'loose', strict=False, near=None)
    assert json.loads((tmp_path/'loose'/'clean_report.json').read_text())['faults']['by_code'] == {'missing_file': 5}


def test_a_wrong_folder_says_what_it_found(tmp_path):
    (tmp_path/'stuff').mkdir(); (tmp_path/'notes.txt').write_text('')
    with pytest.raises(FerError) as e: detect_source(tmp_path)
    for word in ('notes.txt', 'stuff/', 'fer2013.csv', 'label.lst', 'list_patition_label.txt'): assert word in str(e.value)


def test_boxes_outside_their_picture(tmp_path):
    root = expw(tmp_path/'d', np.random.default_rng(0))
    lines = (root/'label'/'label.lst').read_text().splitlines()
    lines[3] = ' '.join([*lines[3].split()[:2], '500', '500', '600', '600', '30', '3'])
    (root/'label'/'label.lst').write_text('\ufeff' + '\r\n'.join(lines))
    curate(root, tmp_path/'out', strict=False, near=None)
    faults = json.loads((tmp_path/'out'/'clean_report.json').read_text())['faults']['list']
    assert len(faults) == 1 and faults[0]['code'] == 'bad_parameter' and '500 500 100 100' in faults[0]['message']


def test_votes_that_sum_to_zero_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [' '.join(map(str, face(rng, 48).ravel())) for _ in range(3)]
    (tmp_path/'fer2013.csv').write_text('emotion,pixels,Usage\n' + '\n'.join(f'3,{p},Training' for p in pixels) + '\n')
    head = 'Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF'
    (tmp_path/'fer2013new.csv').write_bytes(('\ufeff' + '\r\n'.join([head, 'Training,a.png,0,9,1,0,0,0,0,0,0,0', 'Training,b.png' + ',0'*10, 'Training,c.png,x' + ',0'*9])).encode())
    df = read('ferplus', tmp_path, strict=False)
    assert len(df) == 1 and df.attrs['dropped'] == {'no votes': 1} and [p.where for p in df.attrs['problems']] == ['fer2013new.csv row 4']


def test_the_stage_lists_what_it_left_out(wild, tmp_path):
    done = subprocess.run([FER, 'run', 'curate', '-p', f'data={wild}', '--out', str(tmp_path/'runs')], capture_output=True, text=True, timeout=200)
    assert done.returncode == FAILURES['bad_parameter'].exit_code and 'out.png' in done.stderr
    done = subprocess.run([FER, 'run', 'curate', '-p', f'data={wild}', '-p', 'strict=false', '-p', 'folds=2', '-p', 'max_ratio=2', '--out', str(tmp_path/'ok')], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    run = next((tmp_path/'ok').iterdir())
    assert (run/'folds.csv').is_file() and 'undecodable_image' in (run/'curate.ipynb').read_text()


def test_killed_it_goes_on_where_it_stopped(tmp_path):
    rng = np.random.default_rng(0)
    for c in CLASSES:
        for k in range(700): save(tmp_path/'d'/c/f'{k}.png', face(rng, 24))
    script = f'''
from fer_core.data.curate import curate
import time
def slow(done, total, text):
    if done < total: time.sleep(.1)
curate({str(tmp_path/'d')!r}, {str(tmp_path/'out')!r}, near=None, progress=slow)
'''
    process = subprocess.Popen([sys.executable, '-c', script])
    prints, end = tmp_path/'out'/'.prints', time.monotonic() + 100
    while time.monotonic() < end and not (prints.is_dir() and list(prints.glob('[!.]*.npz'))): time.sleep(.02)
    process.send_signal(signal.SIGKILL); process.wait()
    stored = {p.name: p.stat().st_mtime_ns for p in prints.glob('[!.]*.npz')}
    assert stored and not (tmp_path/'out'/'classification_manifest.csv').exists()
    calls, kept = [], {}
    def tell(done, total, text):
        calls.append(done)
        if done == total: kept.update({p.name: p.stat().st_mtime_ns for p in prints.glob('[!.]*.npz')})
    curate(tmp_path/'d', tmp_path/'out', near=None, progress=tell)
    assert {n: kept[n] for n in stored} == stored and calls[0] == 2048 # the first portion was not decoded again
    curate(tmp_path/'d', tmp_path/'anew', near=None)
    assert (tmp_path/'anew'/'classification_manifest.csv').read_bytes() == (tmp_path/'out'/'classification_manifest.csv').read_bytes() and not prints.exists()


# -- the real thing ----------------------------------------------------------------------------------------------------------------

def test_fer2013_and_ferplus_become_one_row_a_picture(tmp_path):
    unpack = SHARED/'data'/'fer2013'/'unpack.py'
    if not unpack.is_file(): pytest.skip(f'{unpack} is not there: set FER_CORE_SHARED')
    subprocess.run([sys.executable, str(unpack), str(tmp_path/'fer')], check=True, capture_output=True)
    facts = curate([f'fer2013={tmp_path/"fer"}', f'ferplus={tmp_path/"fer"}'], tmp_path/'out', max_rows=6000)
    df, clean = read_manifest(tmp_path/'out'/'classification_manifest.csv'), json.loads((tmp_path/'out'/'clean_report.json').read_text())
    assert not df['path'].duplicated().any() and set(df['source']) <= {'fer2013', 'ferplus'} and facts['n']['test'] > 0
    between = next(o for o in clean['opinions'] if {o['source_a'], o['source_b']} == {'fer2013', 'ferplus'})
    assert .25 < between['share'] < .45


def test_pictures_without_a_face_score_nothing(tmp_path):
    class OnlyBright: # stands in for a detector
        def detect(self, image): return [0] if image.mean() > 128 else []
    rng = np.random.default_rng(4)
    for c in CLASSES:
        for k in range(4): save(tmp_path/'d'/c/f'{k}.png', np.clip(rng.integers(40, 216, (48, 48)) + (40 if k % 2 else -40), 0, 255).astype(np.uint8))
    curate(tmp_path/'d', tmp_path/'out', near=None, detector=OnlyBright(), test_fraction=0, val_fraction=0)
    df = read_manifest(tmp_path/'out'/'classification_manifest.csv')
    assert (df['quality'][df['path'].str.endswith(('0.png', '2.png'))] == 0).all() and (df['quality'][df['path'].str.endswith(('1.png', '3.png'))] > 0).all()
    hq = read_manifest(tmp_path/'out'/'classification_manifest_hq_train.csv')
    assert len(hq) and (hq['quality'] >= .5).all()


def test_a_reviewers_decisions_are_applied(tmp_path):
    from fer_core.data.review import append_decision
    rng = np.random.default_rng(6)
    for c in CLASSES:
        for k in range(3): save(tmp_path/'d'/'train'/c/f'{k}.png', face(rng, 48))
        save(tmp_path/'d'/'test'/c/'t.png', face(rng, 48))
    curate(tmp_path/'d', tmp_path/'before', val_fraction=0)
    df = read_manifest(tmp_path/'before'/'classification_manifest.csv').set_index('id')
    for row, action, label in (('folder/train/sad/0.png', 'relabel', 'fear'), ('folder/train/happy/1.png', 'drop', ''), ('folder/test/sad/t.png', 'drop', '')):
        append_decision(tmp_path/'d.jsonl', row, df.loc[row, 'sha256'], action, label, 'ann', '')
    curate(tmp_path/'d', tmp_path/'after', val_fraction=0, decisions=tmp_path/'d.jsonl')
    after = read_manifest(tmp_path/'after'/'classification_manifest.csv').set_index('id')
    assert after.loc['folder/train/sad/0.png', 'label'] == 'fear' and 'folder/train/happy/1.png' not in after.index and 'folder/test/sad/t.png' in after.index
    assert json.loads((tmp_path/'after'/'clean_report.json').read_text())['decisions']['file'] == 'd.jsonl'
    assert 'dropped by review' in pd.read_csv(tmp_path/'after'/'dropped.csv')['reason'].tolist()

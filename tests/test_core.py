"""Names that are refused, files that are whole or absent; and that this takes nothing but Python's own library."""
import re, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from xprune_nb.core import one_of, write_whole

says = lambda *parts: '.*'.join(map(re.escape, parts))
found = lambda folder: sorted(p.name for p in Path(folder).rglob('*') if p.is_file())

# --- a name is there, or it is said what is ---

@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True), st.text(max_size=12))
@settings(max_examples=100, deadline=None)
def test_one_of_passes_what_is_there_and_names_it_all(table, value):
    if value in table: assert one_of(value, table, 'thing') == value
    else:
        with pytest.raises(ValueError) as e: one_of(value, table, 'thing')
        assert str(e.value).startswith(f"no thing called '{value}'") and str(e.value).endswith(', '.join(table))

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

# --- for those who want no more ---

def test_asks_for_nothing_but_python():
    code = "import sys; import xprune_nb.core; print(*{m.partition('.')[0] for m in sys.modules})"
    alone = {m.partition('.')[0] for m in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()}
    site = subprocess.run([sys.executable, '-c', "import sys; print(*{m.partition('.')[0] for m in sys.modules})"], capture_output=True, text=True, check=True).stdout.split()
    assert alone - set(site) - sys.stdlib_module_names == {'xprune_nb'}

"""README.md is nbs/index.ipynb, read from the top of the repository.

    python tests/readme.py          says whether README.md is what the notebook makes
    python tests/readme.py --write  makes it

Stored outputs go along: text as it stands, pictures as files in figures/readme/. Nothing is executed.
"""
import posixpath, re, sys
from pathlib import Path
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

ROOT = Path(__file__).resolve().parent.parent
INDEX, PICTURES = 'nbs/index.ipynb', 'figures/readme'
OUTSIDE = re.compile(r'[a-z]+:|#|/')  # an address, an anchor, a path from the root: left as it is
LINK = re.compile(r'(\]\(|\b(?:src|href)=")([^)"\s]+)')

def from_root(text:str)->str:
    "Links written to be followed from nbs/, as they read one folder up"
    def move(m):
        if OUTSIDE.match(m[2]): return m[0]
        return m[1]+posixpath.normpath(posixpath.join(posixpath.dirname(INDEX), m[2]))
    return LINK.sub(move, text)

class ForReadme(Preprocessor):
    "Hidden cells and nbdev's `#|` lines are for the notebook alone; of an output's forms, the README shows the plainest picture or text"
    def preprocess(self, nb, resources):
        nb.metadata.language_info = dict(name='python')
        nb.metadata.language_info = dict(name='python')
        nb.cells = [c for c in nb.cells if not re.search(r'^#\| *hide\b', c.source, re.M)]
        for c in nb.cells:
            if c.cell_type == 'markdown': c.source = from_root(c.source)
            else: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            joined = []
            for o in c.get('outputs', []):
                if 'data' in o: o.data = next(({k: o.data[k]} for k in ('text/markdown','image/png','text/plain') if k in o.data), {})
                if joined and o.output_type == joined[-1].output_type == 'stream' and o.name == joined[-1].name: joined[-1].text += o.text
                else: joined.append(o)
            if c.cell_type == 'code': c.outputs = joined
        return nb, resources

def render(root:Path=ROOT)->dict[str,bytes]:
    "File name -> content: README.md and the pictures it shows"
    made = MarkdownExporter(preprocessors=[ForReadme])
    text,res = made.from_filename(root/INDEX, resources=dict(unique_key='cell', output_files_dir=PICTURES))
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip()+'\n'
    note = f'<!-- Made from {INDEX} by tests/readme.py: edit the notebook. -->\n\n'
    return {'README.md':(note+text).encode(), **{o.replace('\\','/'):b for o,b in res['outputs'].items()}}

def differing(root:Path=ROOT)->list[str]:
    "The files that are not what the notebook makes, pictures it no longer shows included"
    files = render(root)
    old = {o.relative_to(root).as_posix() for o in (root/PICTURES).glob('*')}
    return sorted({o for o,b in files.items() if not (root/o).is_file() or (root/o).read_bytes() != b} | (old-set(files)))

def write(root:Path=ROOT):
    "Make them so"
    files = render(root)
    for o in differing(root):
        if o not in files: (root/o).unlink()
        else:
            (root/o).parent.mkdir(parents=True, exist_ok=True)
            (root/o).write_bytes(files[o])

if __name__ == '__main__':
    names = differing()
    if '--write' in sys.argv: write(); print('Written: '+', '.join(names) if names else 'README.md is up to date.')
    elif names: sys.exit(f"{', '.join(names)}: not what {INDEX} makes; `python tests/readme.py --write` makes it.")
    else: print(f'README.md is what {INDEX} makes.')

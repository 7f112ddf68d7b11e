"""The documentation site, made from the notebooks.

    python docs/build.py [OUT]               build it in OUT (else _docs/): outputs as they are stored, nothing is executed
    python docs/build.py --execute [NB ...]  run notebooks in place, two at a time, and store what they show
                                             (else all of them but those that `conf.SLOW` names)

nbdev reads the notebooks and carries out their directives; this page turns what it leaves into pages for Sphinx:
public names with the docments of their definition, charts that draw themselves, links between pages.
"""
import argparse, ast, io, json, os, re, shutil, subprocess, sys, tempfile, tokenize
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from html import escape
from pathlib import Path
from posixpath import basename, dirname, join, normpath, relpath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'docs'))
import conf

import nbformat.v4 as v4

# --- names and their docments ---

parse = cache(ast.parse)
DEFS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef

class Name(NamedTuple):
    "A public name of the package"
    module:str # xprune_nb.data
    name:str # Data.take
    kind:str # of Sphinx's Python domain: function, class, method, property, data
    doc:str # the first line said about it
    page:str # 00_data

    @property
    def full(self): return f'{self.module}.{self.name}'

@cache
def comments(source:str) -> dict[int, str]:
    "Line -> its comment"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('#').strip() for t in tokens if t.type == tokenize.COMMENT}

class Parameter(NamedTuple):
    name:str # 'return' for what comes back
    type:str
    default:str|None
    doc:str

def fields(node:ast.ClassDef) -> list[ast.AnnAssign]:
    "The fields of a dataclass or a NamedTuple, in order"
    named = any(ast.unparse(b) == 'NamedTuple' for b in node.bases)
    if not named and not any('dataclass' in ast.unparse(d) for d in node.decorator_list): return []
    return [s for s in node.body if isinstance(s, ast.AnnAssign)]

def init(node:ast.ClassDef): return next((s for s in node.body if isinstance(s, DEFS) and s.name == '__init__'), None)

@cache
def parameters(
    node:ast.AST, # a definition
    source:str, # the cell that holds it
) -> list[Parameter]: # by docments' own rule: the comment on a parameter's line, else those right above it
    said, text = comments(source), lambda n: ' '.join(ast.get_source_segment(source, n).split()) if n else ''
    late = lambda a: isinstance(a, ast.Constant) and isinstance(a.value, str) # a type that is imported late: 'pd.DataFrame'
    typed = lambda a: a.value if late(a) else text(a)
    if isinstance(node, ast.ClassDef):
        if found := fields(node):
            rows = [(f.target.id, typed(f.annotation), text(f.value) if f.value else None, f.lineno) for f in found]
        else: return [p for p in parameters(init(node), source) if p.name != 'return'] if init(node) else []
    else:
        a = node.args
        both = [*a.posonlyargs, *a.args]
        defaults = [None]*(len(both) - len(a.defaults)) + a.defaults
        rows = [(p.arg, typed(p.annotation), text(d) if d else None, p.lineno) for p, d in zip(both, defaults)]
        if a.vararg: rows.append(('*' + a.vararg.arg, typed(a.vararg.annotation), None, a.vararg.lineno))
        rows += [(p.arg, typed(p.annotation), text(d) if d else None, p.lineno) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
        if a.kwarg: rows.append(('**' + a.kwarg.arg, typed(a.kwarg.annotation), None, a.kwarg.lineno))
        if node.returns: rows.append(('return', typed(node.returns), None, node.returns.lineno))
    last = {line: name for name, *_, line in rows} # of several on a line, the last has the comment
    def doc(name, line):
        if last[line] != name: return ''
        if line in said: return said[line]
        above = []
        while (line := line - 1) in said and line not in last: above.insert(0, said[line])
        return ' '.join(above)
    return [Parameter(n, t, d, doc(n, line)) for n, t, d, line in rows if n not in ('self', 'cls')]

def signature(node:ast.AST, source:str) -> str:
    "Names and defaults, without types: those stand in the table"
    rows = [p for p in parameters(node, source) if p.name != 'return']
    said = [p.name if p.default is None else f'{p.name}={p.default}' for p in rows]
    of = init(node) if isinstance(node, ast.ClassDef) else node
    star = None
    if isinstance(node, ast.ClassDef) and fields(node):
        star = 0 if any('kw_only=True' in ast.unparse(d) for d in node.decorator_list) else None
    elif of is not None and of.args.kwonlyargs and not of.args.vararg:
        star = [p.name for p in rows].index(of.args.kwonlyargs[0].arg)
    if star is not None: said.insert(star, '*')
    return f'({", ".join(said)})'

def public(node:ast.ClassDef, source:str) -> list[ast.AST]:
    "The methods that say something of themselves"
    return [m for m in node.body if isinstance(m, DEFS[:2]) and m.name[0] != '_' and (
        ast.get_docstring(m) or any(p.doc for p in parameters(m, source)))]

def assigned(node:ast.AST) -> list[str]:
    "Public names on the left of an assignment"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return [n for n in names if n[0] != '_']

def kind(node:ast.AST, inside:bool=False) -> str:
    if isinstance(node, ast.ClassDef): return 'class'
    if not inside: return 'function'
    return 'property' if any('property' in ast.unparse(d) for d in node.decorator_list) else 'method'

def said(node:ast.AST, source:str) -> str:
    "What stands beside an assignment, as a comment"
    return comments(source).get(node.end_lineno) or comments(source).get(node.lineno, '')

def names(cells:list, module:str, page:str) -> list[Name]:
    "The public names that a notebook exports"
    found = []
    for source in (c.source for c in cells if exported(c)):
        for node in parse(source).body:
            if isinstance(node, DEFS) and node.name[0] != '_':
                found.append(Name(module, node.name, kind(node), ast.get_docstring(node) or '', page))
                if isinstance(node, ast.ClassDef):
                    for m in public(node, source):
                        doc = ast.get_docstring(m) or ''
                        found.append(Name(module, f'{node.name}.{m.name}', kind(m, True), doc, page))
            else: found += [Name(module, n, 'data', said(node, source), page) for n in assigned(node)]
    return found

# --- markdown ---

OUTSIDE = re.compile(r'[a-z]+:|#|/')
LINK = re.compile(r'(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^)\s]+)(?P<rest>[^)]*)\)')
FENCE = re.compile(r'^\s*(```+|~~~+)')
TICKS = re.compile(r'(?<![`\\\w])`([^`\s]+?)(\(\))?`(?!`)')

def code(text:str, bars:bool=False) -> str: # bars: inside a table
    "Inline code of any text"
    fence = '``' if '`' in text else '`'
    return f'{fence}{text}{fence}'.replace('|', r'\|' if bars else '|')

def plain(text:str, lookup, bars:bool=False) -> str:
    "A comment or a docstring as markdown: only backticks mean something"
    parts = re.split(r'(`[^`]+`)', ' '.join(text.split()))
    safe = lambda s: re.sub(r'([\\*_<>\[\]$~^|#])', r'\\\1', s)
    return ''.join(lookup.link(code(p[1:-1], bars)) if i % 2 else safe(p) for i, p in enumerate(parts))

class Lookup:
    "Public names -> where they are described"
    def __init__(self, names:list[Name]):
        self.names, self.module = names, ''
        self.by = {}
        for n in names: self.by.setdefault(n.name, []).append(n); self.by[n.full] = [n]

    def find(self, name:str) -> Name|None: # on this page, or the only one there is
        found = self.by.get(name, [])
        return next((n for n in found if n.module == self.module), found[0] if len(found) == 1 else None)

    def link(self, text:str) -> str:
        "Text with `names` in backticks made links"
        def linked(m):
            n = self.find(m[1])
            return f'{{py:obj}}`{m[1]}{m[2] or ""} <{n.full}>`' if n else m[0]
        return TICKS.sub(linked, text)

    def typed(self, text:str) -> str:
        "A type, in code, the package's own names in it made links"
        parts = re.split(r'([A-Za-z_][\w.]*)', text)
        out, plain = '', ''
        for i, p in enumerate(parts):
            n = self.find(p) if i % 2 else None
            if n is None or n.kind != 'class': plain += p; continue
            out += (code(plain, True) if plain else '') + f'{{py:obj}}`{p} <{n.full}>`'; plain = ''
        return out + (code(plain, True) if plain else '')

def rows(found:list[Parameter], lookup:Lookup, what:str) -> str:
    "The table of parameters"
    if not any(p.doc or p.type for p in found): return ''
    columns = [what, 'type', *(['default'] if any(p.default is not None for p in found) else []),
               *(['description'] if any(p.doc for p in found) else [])]
    cell = {what: lambda p: '**returns**' if p.name == 'return' else code(p.name, True), 'type': lambda p: lookup.typed(p.type),
            'default': lambda p: '' if p.default is None else code(p.default, True),
            'description': lambda p: plain(p.doc, lookup, True)}
    line = lambda texts: f'| {" | ".join(texts)} |'
    return '\n'.join([line(columns), line(['---']*len(columns)), *(line([cell[c](p) for c in columns]) for p in found)])

def directive(name:str, argument:str, options:dict, *body:str, depth:int=4) -> str:
    fence = '`'*depth
    return '\n'.join([f'{fence}{{{name}}} {argument}', *(f':{k}: {v}'.rstrip() for k, v in options.items()), '',
                      '\n\n'.join(b for b in body if b), fence])

def described(source:str, module:str, lookup:Lookup, only:str|None=None) -> str: # only: this name of the cell's
    "What an exported cell defines for others, by its docments"
    out = []
    for node in parse(source).body:
        if only and only not in (getattr(node, 'name', None), *assigned(node)): continue
        if isinstance(node, DEFS) and node.name[0] != '_':
            doc, found = plain(ast.get_docstring(node) or '', lookup), parameters(node, source)
            inner = []
            if isinstance(node, ast.ClassDef):
                for m in public(node, source):
                    flags = {o: '' for o in ('classmethod', 'staticmethod') if o in map(ast.unparse, m.decorator_list)}
                    k = kind(m, True)
                    inner.append(directive(f'py:{k}', m.name + (signature(m, source) if k == 'method' else ''), flags,
                        plain(ast.get_docstring(m) or '', lookup), rows(parameters(m, source), lookup, 'parameter')))
            what = 'field' if isinstance(node, ast.ClassDef) and fields(node) else 'parameter'
            out.append(directive(f'py:{kind(node)}', node.name + signature(node, source), dict(module=module),
                                 doc, rows(found, lookup, what), *inner, depth=6))
        elif found := assigned(node):
            value = ' '.join(ast.get_source_segment(source, node.value).split()) if len(found) == 1 else ''
            short = dict(value=json.dumps(value)) if 0 < len(value) <= 90 else {}
            out += [directive('py:data', n, dict(module=module, **short), plain(said(node, source), lookup))
                    for n in found if only in (None, n)]
    return '\n\n'.join(out)

def prose(text:str, page:'Page', lookup:Lookup) -> str:
    "A markdown cell with its links led to pages and copies, and names in backticks made links"
    lines, fence = [], None
    for line in text.split('\n'):
        mark = FENCE.match(line)
        if mark and (fence is None or mark[1].startswith(fence)): fence = None if fence else mark[1]
        elif fence is None and not line.startswith('    '):
            out, at = '', 0
            safe = (lambda s: s) if line.startswith('#') else lookup.link
            for m in LINK.finditer(line):
                out += safe(line[at:m.start()]) + page.lead(m); at = m.end()
            line = out + safe(line[at:])
        lines.append(line)
    return '\n'.join(lines)

# --- notebooks ---

def exported(cell) -> bool: return cell.cell_type == 'code' and bool({'export', 'exports'} & set(cell.directives_))

def only_imports(source:str) -> bool:
    try: body = parse(source).body
    except SyntaxError: return False # a cell with magics
    called = lambda s: isinstance(s, ast.Expr) and ast.unparse(s) == 'charts()'
    return bool(body) and all(isinstance(s, (ast.Import, ast.ImportFrom)) or called(s) for s in body)

CHART, WIDGET = re.compile(r'application/vnd\.vegalite\.v\d+\+json'), 'application/vnd.jupyter.widget-view+json'
KEPT = 'text/html', 'text/markdown', 'image/svg+xml', 'image/png', 'image/jpeg', 'text/latex', 'text/plain'
joined = lambda s: ''.join(s) if isinstance(s, list) else s

def chart_of(output) -> str|None: return next(filter(CHART.match, output.get('data') or {}), None)

def titles(spec:dict) -> list[str]:
    "The title of a chart, or else of its panels"
    title = spec.get('title') or ''
    title = title.get('text', '') if isinstance(title, dict) else title
    title = ' '.join(title) if isinstance(title, list) else title
    panels = [p for k in ('hconcat', 'vconcat', 'concat') for p in spec.get(k, [])]
    return [title] if title else [t for p in panels for t in titles(p)]

class Linked:
    "Something whose links lead to files of the repository"
    def __init__(self, name:str, source:str, site:Path): # its page; its path from the root; Sphinx's source folder
        self.name, self.source, self.base, self.site = name, source, dirname(source), site
        self.up, self.texts = '../'*name.count('/'), set() # texts: markdown files that it links to

    def lead(self, m:re.Match) -> str:
        "A link or a picture, to where the site has it"
        to, _, anchor = m['to'].partition('#')
        text = m['text']
        if OUTSIDE.match(m['to']) or to.startswith('attachment:'): return m[0]
        if inner := LINK.fullmatch(text): text = self.lead(inner) # a picture that is a link
        path = normpath(join(self.base, to)) # from the root
        if path.startswith('nbs/') and path.endswith('.ipynb'):
            return f'[{text}]({relpath(path[4:], dirname(self.name) or ".")}{"#"*bool(anchor)}{anchor}{m["rest"]})'
        if (ROOT/path).is_dir(): return text # a folder can't be shown
        if not (ROOT/path).is_file():
            raise ValueError(f'{self.source} links to {m["to"]}, which does not exist')
        if path == 'README.md': return f'[{text}]({self.up}index.ipynb{m["rest"]})' # made from it
        if path.endswith('.md'):
            self.texts.add(path)
            return f'[{text}]({self.up}{basename(path)}{m["rest"]})'
        return f'{m["image"]}[{text}]({self.copied(path)}{m["rest"]})'

    def copied(self, path:str) -> str: # path from the root -> path from this page
        "Have a file of the repository copied into the site"
        to = self.site/'repo'/path
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/path, to)
        return f'{self.up}repo/{path}'

class Page(Linked):
    "A notebook on its way to a page"
    def __init__(self, name:str, path:Path, site:Path): # site: Sphinx's source folder
        from nbdev.processors import FilterDefaults
        from nbdev.process import NBProcessor
        ours = 'FrontmatterProc', 'insert_warning', 'exec_show_docs', 'rm_export', 'add_links', 'add_fold'
        super().__init__(name, f'nbs/{name}.ipynb', site)
        self.charts = 0
        p = NBProcessor(path, procs=[o for o in FilterDefaults().base_procs() if o.__name__ not in ours])
        p.process()
        self.cells = p.nb.cells
        self.module = next((f'xprune_nb.{c.directives_["default_exp"][0]}' for c in self.cells
                            if 'default_exp' in c.get('directives_', {})), None)
        for c in self.cells: c.setdefault('directives_', {})
        first = next((c.source for c in self.cells if c.cell_type == 'markdown'), '')
        title = re.match(r'# +(.+)', first)
        if not title: raise ValueError(f'nbs/{name}.ipynb has no title: its first cell must begin with "# "')
        self.title = title[1].strip()

    def output(self, o:dict) -> dict|None:
        "What the page shows of an output"
        if o['output_type'] in ('stream', 'error'): return None if o.get('name') == 'stderr' else o
        data = {k: v for k, v in o['data'].items()}
        if k := chart_of(o): data = {'text/html': self.chart(data[k], data.get('image/png'))}
        elif WIDGET in data: # the kernel that it needs is gone: its picture, if it has one
            data = {k: v for k, v in data.items() if k.startswith('image/')}
        best = next((k for k in KEPT if k in data), None)
        text = joined(data[best]) if best else ''
        if best == 'text/markdown': text = text.replace(' ± ', '\xa0±\xa0')
        return dict(output_type='display_data', data={best: text}, metadata={}) if best else None

    def chart(self, spec:dict, png:str|None) -> str:
        "A box with the picture, for readers without scripts, and what the chart is drawn from"
        self.charts += 1
        said = spec.get('description') or '; '.join(titles(spec)) or 'chart'
        picture = ''
        if png:
            file = self.site.parent/'extra'/'_charts'/f'{self.name.replace("/", "-")}-{self.charts}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b64decode(joined(png)))
            wide = int.from_bytes(file.read_bytes()[16:20], 'big')/1.5 # drawn at 1.5 pixels a pixel
            picture = f'<img src="{self.up}_charts/{file.name}" alt="{escape(said)}" width="{wide:.0f}">'
        spec = json.dumps(spec, separators=(',', ':')).replace('</', '<\\/')
        return f'<div class="chart">{picture}<script type="application/json">{spec}</script></div>'

    def made(self, lookup:Lookup) -> dict:
        "The page as a notebook for myst-nb"
        out, lookup.module, folded = [], self.module, self.name in conf.FOLDED
        sources = {n: c.source for c in self.cells if exported(c) for n in self.defined(c.source)}
        done = set() # names that were described already
        for c in self.cells:
            if c.cell_type == 'markdown':
                out.append(v4.new_markdown_cell(prose(c.source, self, lookup)))
                if len(out) == 1 and self.module:
                    out.append(v4.new_markdown_cell(f'```{{py:module}} {self.module}\n```'))
                continue
            if c.cell_type != 'code' or 'default_exp' in c.directives_ or 'exporti' in c.directives_: continue
            if m := re.search(r'^show_doc\(([\w.]+)', c.source, re.M): # nbdev adds one for each public definition
                name = m[1].split('.')[0]
                if name in sources and name not in done:
                    out.append(v4.new_markdown_cell(described(sources[name], self.module, lookup, name)))
                    done.add(name)
                continue
            source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip('\n')
            directives = {k.rstrip(':'): v for k, v in c.directives_.items()}
            off = lambda k: directives.get(k, [''])[0] == 'false'
            shown = [] if off('output') or off('include') else [x for o in c.get('outputs', []) if (x := self.output(o))]
            if off('include'): continue
            cell = v4.new_code_cell(source, outputs=[nbformat_output(o) for o in shown])
            tags, prompt = [], None
            if off('echo'): tags = ['remove-input']
            elif exported(c):
                left = [n for n in self.defined(source) if n not in done]
                done |= set(left)
                if text := '\n\n'.join(described(source, self.module, lookup, n) for n in left):
                    out.append(v4.new_markdown_cell(text))
                prompt = 'Imports of the module' if only_imports(source) else 'Source' if left else 'Source of private helpers'
            elif only_imports(source): prompt = 'Imports'
            elif folded or directives.get('code-fold', [''])[0] in ('true', 'hide'): prompt = 'Code'
            if 'exports' in directives: prompt = None
            if prompt:
                tags = ['hide-input']
                cell.metadata['mystnb'] = dict(code_prompt_show=prompt, code_prompt_hide=prompt)
            if tags: cell.metadata['tags'] = tags
            out.append(cell)
        meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'),
                    language_info=dict(name='python', pygments_lexer='ipython3'))
        return v4.new_notebook(cells=out, metadata=meta)

    def defined(self, source:str) -> list[str]:
        "The public names of a cell, in order"
        body = parse(source).body
        return [n for s in body for n in ([s.name] if isinstance(s, DEFS) else assigned(s)) if n[0] != '_']

def nbformat_output(o:dict):
    if o['output_type'] == 'stream': return v4.new_output('stream', name=o['name'], text=joined(o['text']))
    if o['output_type'] == 'error':
        return v4.new_output('error', ename=o['ename'], evalue=o['evalue'], traceback=list(o['traceback']))
    return v4.new_output(o['output_type'], data=o['data'], metadata=o['metadata'])

# --- pages that no notebook holds ---

def home(page:Page, pages:dict[str, Page], order:dict[str, list[str]]) -> None:
    "The first page: its title, one sentence, two buttons and a picture above what the notebook says; then all pages"
    first = page.cells[0]
    title, sentence, rest = (first.source.split('\n\n', 2) + [''])[:3]
    button = lambda to, text, more='': f'[{text}]({to}.ipynb){{.button{more}}}' if to in pages else ''
    start = next((s for s in conf.SECTIONS['Start'] if s in pages), '')
    picture = next((f'figures/{h}' for h in conf.HERO if (ROOT/'figures'/h).exists()), None)
    alt = page.title
    if picture and (again := re.search(rf'!\[([^\]]*)\]\([./]*{re.escape(picture)}\)\n*', rest)): # shown once
        alt, rest = again[1], rest.replace(again[0], '')
    hero = ['::::{container} hero', ':::{container} hero-text', sentence,
            button(start, 'Start in ten minutes', ' .first') + ' ' + button('study', 'The study'), ':::',
            f'![{alt}]({page.up}../{picture})' if picture else '', '::::']
    first.source = '\n\n'.join([title, *(h for h in hero if h.strip()), rest])
    trees = [f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(
        f'{label(p, pages)} <{p}>' for p in here) + '\n```' for caption, here in order.items()]
    page.trees = '\n\n'.join(trees)

MADE = dict(api='Index of names', figures='Figures')

def label(name:str, pages:dict[str, Page]) -> str:
    "A page in the sidebar"
    title = conf.SHORT.get(name) or MADE.get(name) or pages[name].title
    number = re.match(r'(\d\d)(?:_(\d))?_', name)
    return f'{number[1]}{"."+number[2] if number[2] else ""} {title}' if number else title

def api(found:list[Name], lookup:Lookup, pages:dict[str, Page]) -> str:
    "All public names"
    out = ['# Index of names', '> What is there, and where is it described?',
           f'All {len([n for n in found if "." not in n.name]):,} names that the rooms export, room by room. '
           'Each leads to its parameters, its source, and the prose around it.']
    for module in dict.fromkeys(n.module for n in found):
        here = [n for n in found if n.module == module]
        lookup.module = module
        out.append(f'## {module}\nDescribed in [{label(here[0].page, pages)}]({here[0].page}.ipynb).')
        lines = ['| name | kind | |', '| --- | --- | --- |']
        for n in sorted(here, key=lambda n: n.name.lower()):
            lines.append(f'| {{py:obj}}`{n.name} <{n.full}>` | {n.kind} | {plain(n.doc, lookup, True)} |')
        out.append('\n'.join(lines))
    return '\n\n'.join(out) + '\n'

def figures(site:Path) -> str:
    "What is in figures/, each beside its table"
    out = ['# Figures', '> What was drawn, and from which numbers?',
           'Each is kept as a picture (SVG, PNG) beside the table that it was drawn from.']
    for folder in sorted(p for p in (ROOT/'figures').iterdir() if p.is_dir() and list(p.glob('*.png'))):
        out.append(f'## {folder.name}')
        for png in sorted(folder.glob('*.png')):
            to = site/'repo'/'figures'/folder.name
            to.mkdir(parents=True, exist_ok=True)
            files = [f for s in ('.csv', '.svg', '.png') if (f := png.with_suffix(s)).exists()]
            for f in files: shutil.copy(f, to)
            name = f'repo/figures/{folder.name}'
            out.append(f'### {png.stem.replace("_", " ")}\n\n![{png.stem}, {folder.name}]({name}/{png.name})\n\n' + ' · '.join(
                f'[{f.name}]({name}/{f.name})' for f in files))
    return '\n\n'.join(out) + '\n'

# --- the two commands ---

def notebooks(nbs:Path) -> dict[str, Path]: # '00_data', 'howto/gpu', ... -> its file
    files = sorted(p for p in nbs.rglob('*.ipynb') if not re.search(r'[/\\][._]', str(p.relative_to(nbs.parent))))
    return {p.relative_to(nbs).with_suffix('').as_posix(): p for p in files}

def build(
    out:Path, # where the site shall be; what an older build left there is removed
    nbs:Path=ROOT/'nbs',
) -> list[str]: # what Sphinx warned of, with notebooks named by their path
    "Make the site"
    from sphinx.application import Sphinx
    import vl_convert
    if out.exists() and any(out.iterdir()) and not (out/'searchindex.js').exists():
        raise ValueError(f'{out} is not a site that was built here, and not empty: name another folder')
    os.chdir(ROOT) # nbdev looks for settings.ini
    files = notebooks(nbs)
    order = conf.sections([*files, *MADE])
    with tempfile.TemporaryDirectory() as tmp:
        site, extra = Path(tmp)/'nbs', Path(tmp)/'extra'
        site.mkdir(), extra.mkdir()
        pages = {n: Page(n, p, site) for n, p in files.items()}
        found = [n for p in pages.values() if p.module for n in names(p.cells, p.module, p.name)]
        lookup = Lookup(found)
        home(pages['index'], pages, order)
        for n, p in pages.items():
            nb = p.made(lookup)
            if n == 'index': nb.cells.append(v4.new_markdown_cell(p.trees))
            for i, c in enumerate(nb.cells): c['id'] = f'c{i:03d}'
            to = site/f'{n}.ipynb'
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(json.dumps(nb), encoding='utf-8')
        for t in sorted(set().union(*(p.texts for p in pages.values()))): # they link to no other text
            name = basename(t).removesuffix('.md')
            text = prose((ROOT/t).read_text(encoding='utf-8'), Linked(name, t, site), lookup)
            (site/f'{name}.md').write_text(f'---\norphan: true\n---\n{text}', encoding='utf-8')
        (site/'api.md').write_text(api(found, lookup, pages), encoding='utf-8')
        (site/'figures.md').write_text(figures(site), encoding='utf-8')
        made, warnings = Path(tmp)/'html', io.StringIO()
        app = Sphinx(site, ROOT/'docs', made, Path(tmp)/'trees', 'html', freshenv=True, status=None, warning=warnings,
                     confoverrides={'html_extra_path': [str(extra)]}, parallel=os.cpu_count() or 1)
        app.build()
        (made/'_static'/'vega.js').write_text(f'(()=>{{{vl_convert.javascript_bundle()}}})();', encoding='utf-8')
        for junk in '.buildinfo', '.doctrees': (made/junk).unlink(missing_ok=True)
        if out.exists(): shutil.rmtree(out)
        shutil.copytree(made, out)
        text = re.sub(r'\x1b\[[0-9;]*m', '', warnings.getvalue()).replace(f'{tmp}/', '')
        return [line for line in text.splitlines() if line.strip()]

def execute(path:Path) -> str: # '' or what went wrong, in one sentence
    "Run a notebook from the top and store its outputs, without what only a live kernel shows; on an error it is left as it was"
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbdev.process import extract_directives
    from nbdev.config import get_config
    from traitlets.config import Config
    nb = nbformat.read(path, 4)
    flags = set(get_config().get('tst_flags', '').split())
    for c in nb.cells: # nbdev_test leaves these out, and so do we
        d = extract_directives(nbformat.NotebookNode(c), remove=False) if c.cell_type == 'code' else {}
        if flags & set(d) or d.get('eval:', [''])[0] == 'false': c.metadata.setdefault('tags', []).append('skip-execution')
    with tempfile.TemporaryDirectory(prefix='xprune') as sockets: # not TCP: kernels that start at once take each other's ports
        config = Config(KernelManager=dict(transport='ipc', ip=f'{sockets}/k'))
        client = NotebookClient(nb, timeout=3600, kernel_name='python3', config=config,
                                resources={'metadata': {'path': str(path.parent)}})
        try: client.execute()
        except CellExecutionError as e: return f'{path.name} failed, and was left as it was: {e.ename}: {e.evalue}'
    for c in nb.cells:
        if 'skip-execution' in c.metadata.get('tags', []): c.metadata.tags.remove('skip-execution')
        if c.cell_type != 'code': continue
        live = lambda o: o.get('name') == 'stderr' or (WIDGET in o.get('data', {}) and 'image/png' not in o.data)
        c.outputs = [o for o in c.outputs if not live(o)]
        for o in c.outputs:
            o.get('data', {}).pop(WIDGET, None)
            if 'image/png' in o.get('data', {}): o.data.pop('image/jpeg', None) # a PIL image shows itself as both
    nb.metadata = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.write_text(nbformat.writes(nb) + '\n', encoding='utf-8')
    subprocess.run([sys.executable, '-c', 'import sys; from nbdev.clean import nbdev_clean; nbdev_clean(sys.argv[1])', path], check=True)
    return ''

def main() -> int:
    says = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    says.add_argument('out', nargs='?', type=Path, default=ROOT/'_docs', help='where the site shall be')
    says.add_argument('--execute', nargs='*', type=Path, metavar='NB', help='run these notebooks and store what they show')
    given = says.parse_args()
    if given.execute is None:
        try: warnings = build(given.out.resolve())
        except ValueError as e: return print(e, file=sys.stderr) or 1
        for w in warnings: print(w, file=sys.stderr)
        print(f'The site is in {given.out}: open {given.out/"index.html"}')
        return int(bool(warnings))
    os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    paths = [p.resolve() for p in given.execute] or [p for n, p in notebooks(ROOT/'nbs').items() if n not in conf.SLOW]
    command = [sys.executable, '-c', 'import sys, pathlib; sys.path.insert(0, sys.argv[1]); import build; '
               'sys.exit(build.execute(pathlib.Path(sys.argv[2])) or 0)', str(ROOT/'docs')]
    with ThreadPoolExecutor(2) as two:
        done = list(two.map(lambda p: subprocess.run([*command, str(p)], cwd=ROOT).returncode, paths))
    print(f'{done.count(0)} of {len(paths)} notebooks ran and store what they show')
    return int(any(done))

if __name__ == '__main__': sys.exit(main())

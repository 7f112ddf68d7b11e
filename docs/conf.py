"""How the site is put together: the order of its pages, and what Sphinx needs to know. `build.py` makes the pages."""
import re
from fnmatch import fnmatchcase

from docutils import nodes
from latex2mathml.converter import convert

# --- the order of the pages ---

SECTIONS = { # caption in the sidebar -> patterns of pages (notebooks by their path in nbs/, or pages made by build.py)
    'Start': ['start', 'explore'],
    'Rooms': ['core', 'charts', 'graph', '0[01]_*', *(f'criteria/{o}' for o in ('attribution', 'relevance', 'scores', 'importance')),
              *(f'pruning/{o}' for o in ('plan', 'dead', 'cut', 'unstructured')), '0[3-4]_*',
              *(f'experiments/{o}' for o in ('run', 'warm', 'progress', 'store', 'thesis')), '0[6-9]_*'],
    'The study': ['study', 'thesis', 'run'],
    'Tutorials': ['tutorials/*'],
    'How-to': ['howto/*'],
    'Explanation': ['explain/*'],
    'Reference': ['api', 'glossary', 'figures']}
SHORT = {'start': 'Ten minutes', 'tutorials/ranking': 'Images, steps, price', 'tutorials/coupling': 'Choosing or agreeing',
         'run': 'One run', 'study': 'The thesis and ours',
         'thesis': "The thesis' grid"}
FOLDED = ['study', 'thesis', 'run', 'tutorials/ranking'] # pages read for what they show: their code waits behind a click
SLOW = ['tutorials/ranking'] # `--execute` runs these only when they are named: minutes to hours
HERO = ['lab/explorer.png', 'explorer.png', 'cpu/oneshot.png'] # the home page's picture: the first that is in figures/

def sections(
    pages:list[str], # 'index', '00_data', 'howto/gpu', ...
) -> dict[str, list[str]]: # caption -> its pages, in order; captions without a page are left out
    "Each page in the first section that names it, by its pattern and then by its name (`ValueError` if none does)"
    left, found = sorted(p for p in pages if p != 'index'), {}
    for caption, patterns in SECTIONS.items():
        for pattern in patterns:
            here = [p for p in left if fnmatchcase(p, pattern)]
            left = [p for p in left if p not in here]
            if here: found[caption] = found.get(caption, []) + here
    if left:
        raise ValueError(f'no section of the site holds nbs/{left[0]}.ipynb; put it into one of '
                         f'{", ".join(SECTIONS)} by a pattern in docs/conf.py')
    return found

# --- Sphinx ---

project, author, language = 'xprune_nb', 'The xprune_nb authors', 'en'
project_copyright = '2026, The xprune_nb authors. Apache-2.0'
extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_inline', 'deflist', 'html_image']
myst_heading_anchors = 4
add_module_names = False
toc_object_entries_show_parents = 'hide'
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
exclude_patterns = ['repo/**']
html_theme, html_title, html_logo, html_favicon = 'furo', 'xprune_nb', '_static/logo.svg', '_static/logo.svg'
html_static_path, html_css_files = ['_static'], ['site.css']
html_copy_source = html_show_sourcelink = False
html_math_renderer = 'mathml'
pygments_style, pygments_dark_style = 'friendly', 'monokai'
html_theme_options = dict(
    navigation_with_keys=True,
    light_css_variables={'color-brand-primary': '#0072b2', 'color-brand-content': '#0072b2', 'color-brand-visited': '#0072b2'},
    dark_css_variables={'color-brand-primary': '#56b4e9', 'color-brand-content': '#7cc5ee', 'color-brand-visited': '#7cc5ee'})

TIDY = [
    (re.compile('<mi>(&#x02032;|′)</mi>'), r'<mo lspace="0" rspace="0">\1</mo>'), # a prime is no letter
    # browsers take a bar for an operator, and a minus behind an opening or a comma for a difference
    (re.compile('<mo stretchy="false">(?=[|∣]|&#x0007C;|&#x02223;)'), '<mo stretchy="false" lspace="0" rspace="0">'),
    (re.compile('(<mo[^>]*>(?:&#x00028;|&#x0002C;|&#x0003D;|&#x0005B;|[(,=[])</mo>)<mo>(?=[-−]|&#x02212;)'), r'\1<mo form="prefix">')]

def mathml(self, node):
    "A formula as MathML, which browsers draw themselves: no script, no font, no network"
    block = isinstance(node, nodes.math_block)
    text = convert(node.astext(), display='block' if block else 'inline')
    for odd, even in TIDY: text = odd.sub(even, text)
    self.body.append(f'<div class="math">{text}</div>' if block else text)
    raise nodes.SkipNode

def charts(app, page, template, context, doctree):
    "The drawing library is loaded by pages that have charts"
    if 'class="chart"' in context.get('body', ''):
        for script in 'vega.js', 'charts.js': app.add_js_file(script, loading_method='defer')

def setup(app):
    app.add_html_math_renderer('mathml', (mathml, None), (mathml, None))
    app.connect('html-page-context', charts)

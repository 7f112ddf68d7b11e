"What settings.ini says, told to setuptools; there is nothing to edit here"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser()
ini.read_string((here/'settings.ini').read_text(encoding='utf-8'))
cfg = ini['DEFAULT']
lines = lambda key: [o for o in cfg.get(key, '').splitlines() if o]  # one requirement a line
readme = here/'README.md'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    license=cfg['license'], author=cfg['author'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    classifiers=[f"Intended Audience :: {cfg['audience']}", f"Natural Language :: {cfg['language']}", 'Framework :: Jupyter',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_path']: [str(o.relative_to(here/cfg['lib_path'])) for o in (here/cfg['lib_path']/'assets').rglob('*') if o.is_file()]},
    python_requires='>='+cfg['min_python'],
    install_requires=lines('requirements'),
    extras_require={k.removesuffix('_requirements'): lines(k) for k in cfg if k.endswith('_requirements')},  # dev_requirements: '.[dev]'
    entry_points=dict(console_scripts=lines('console_scripts')),
    zip_safe=False,
)

"""Pictures against Pillow's; charts that ask no address."""
import base64, io, json, re

import altair as alt
import numpy as np
import pytest
import torch
from PIL import Image

from xprune_nb.charts import charts, sheet

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

// Each .chart holds a picture and its Vega-Lite specification: draw it, and only then hide the picture.
// A chart wider than its box is scaled a little, else its panels go below one another, else it scrolls inside the box.
(async () => {
  const options = {mode: 'vega-lite', renderer: 'svg',
    actions: {export: {svg: true, png: true}, source: false, compiled: false, editor: false}}
  const below = s => { // panels side by side -> below one another
    const facet = s.facet && s.columns ? s : s.encoding?.facet?.columns ? s.encoding.facet : null
    if (s.hconcat) { s.vconcat = s.hconcat; delete s.hconcat; return true }
    if (s.concat) { s.columns = 1; return true }
    if (facet) { facet.columns = 1; return true }
    return (s.vconcat || []).map(below).some(x => x)
  }
  const views = s => s.vconcat ? s.vconcat.flatMap(views) : s.concat ? s.concat.flatMap(views) : s.spec ? views(s.spec) : [s]
  const narrower = (s, by) => { // whatever has a width in pixels
    const some = views(s).filter(v => v.width === undefined || typeof v.width == 'number')
    for (const v of some) v.width = Math.max(140, (v.width ?? 300) - by)
    return some.length > 0
  }
  const draw = async box => {
    const spec = JSON.parse(box.querySelector('script').textContent), target = document.createElement('div')
    delete spec.$schema
    box.prepend(target)
    const style = getComputedStyle(box), room = box.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight)
    const embed = async () => { await vegaEmbed(target, spec, options); return target.querySelector('svg') }
    const wide = svg => svg.getBoundingClientRect().width - room
    try {
      let svg = await embed()
      if (wide(svg) > 0 && wide(svg) < .4*room && room > 500 && !spec.params) Object.assign(svg.style, {width: '100%', height: 'auto'})
      if (wide(svg) > 0 && room < 500) { // a phone: legends go below, too
        spec.config = {...spec.config, legend: {...spec.config?.legend, orient: 'bottom', columns: 2, symbolLimit: 40}}
        svg = await embed()
      }
      if (wide(svg) > 0 && below(spec)) svg = await embed()
      if (wide(svg) > 0 && narrower(spec, Math.ceil(wide(svg)) + 2)) svg = await embed()
      box.classList.add('drawn')
    } catch (e) { target.remove(); console.error(e) }
  }
  for (const box of document.querySelectorAll('.chart')) await draw(box)
  document.documentElement.dataset.charts = 'drawn'
})()

// Search as you type over assets/search.js, the menu's place, the table of contents open where there is room. No network: works from file://.
const root = document.currentScript.dataset.root
const field = document.getElementById('asked'), list = document.getElementById('found')
let entries = null, at = -1

const here = document.querySelector('#side [aria-current]'), side = document.getElementById('side')
if (here) side.scrollTop = here.offsetTop - side.clientHeight / 2
const toc = document.querySelector('.toc'), roomy = matchMedia('(min-width: 80rem)')
function unfold() { if (toc) toc.open = roomy.matches }
unfold(); roomy.addEventListener('change', unfold)
for (const box of document.querySelectorAll('main pre, .wide, .output_subarea')) if (box.scrollWidth > box.clientWidth) box.tabIndex = 0 // keys scroll it

function load() { // once, when first asked
  if (entries) return
  entries = []
  const script = document.createElement('script')
  script.src = root + 'assets/search.js'
  script.onload = () => { entries = SEARCH.map(([title, href, where, text]) => ({title, href, where, text, low: title.toLowerCase(), body: (where + ' ' + text).toLowerCase()})); show() }
  document.head.append(script)
}

function score(e, terms) { // how well an entry answers; 0 = a word is missing
  let sum = 0
  for (const t of terms) {
    const i = e.low.indexOf(t), j = i < 0 ? e.body.indexOf(t) : -1
    if (i < 0 && j < 0) return 0
    const starts = i >= 0 ? !i || !/[\p{L}\d]/u.test(e.low[i - 1]) : !j || !/[\p{L}\d]/u.test(e.body[j - 1])
    sum += e.low === t ? 100 : i >= 0 ? (i ? 20 : 30) + (starts ? 20 : 0) - Math.min(e.low.length, 60) / 10 : starts ? 6 : 2
  }
  return sum
}

function marked(text, terms) { // text around the first word found, the words marked
  const low = text.toLowerCase(), first = Math.min(...terms.map(t => low.indexOf(t)).filter(i => i >= 0), text.length)
  const from = first === text.length || first < 60 ? 0 : text.lastIndexOf(' ', first - 40) + 1
  const span = document.createElement('span'), cut = (from ? '… ' : '') + text.slice(from, from + 160) + (text.length > from + 160 ? ' …' : '')
  const words = new RegExp('(' + terms.map(t => t.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('|') + ')', 'gi')
  for (const [i, part] of cut.split(words).entries()) span.append(i % 2 ? Object.assign(document.createElement('mark'), {textContent: part}) : part)
  return span
}

function option(e, i, terms) {
  const li = document.createElement('li'), a = document.createElement('a')
  li.id = 'found' + i; li.setAttribute('role', 'option')
  a.href = root + e.href; a.tabIndex = -1
  a.append(Object.assign(document.createElement('b'), {textContent: e.title}), Object.assign(document.createElement('small'), {textContent: e.where}), marked(e.text, terms))
  li.append(a)
  return li
}

function show() {
  const terms = field.value.toLowerCase().split(/\s+/).filter(Boolean)
  const best = terms.length ? entries.map(e => [score(e, terms), e]).filter(r => r[0]).sort((a, b) => b[0] - a[0]).slice(0, 20) : []
  list.replaceChildren(...best.map(([, e], i) => option(e, i, terms)))
  if (terms.length && !best.length) list.append(Object.assign(document.createElement('li'), {className: 'none', textContent: entries.length ? 'Nothing found' : 'Loading …'}))
  list.hidden = !terms.length
  field.setAttribute('aria-expanded', !list.hidden)
  pick(-1)
}

function pick(i) { // the option that Enter opens
  const options = list.querySelectorAll('[role=option]')
  at = options.length ? Math.max(-1, Math.min(i, options.length - 1)) : -1
  options.forEach((o, k) => o.setAttribute('aria-selected', k === at))
  if (at < 0) return field.removeAttribute('aria-activedescendant')
  field.setAttribute('aria-activedescendant', 'found' + at)
  options[at].scrollIntoView({block: 'nearest'})
}

function close() { list.hidden = true; field.setAttribute('aria-expanded', false) }

field.onfocus = load
field.oninput = () => { load(); show() }
field.onkeydown = e => {
  if (e.key === 'ArrowDown' || e.key === 'ArrowUp') { e.preventDefault(); pick(at + (e.key === 'ArrowDown' ? 1 : -1)) }
  else if (e.key === 'Enter') list.querySelectorAll('[role=option] a')[Math.max(at, 0)]?.click()
  else if (e.key === 'Escape') close()
}
list.onclick = close
document.onkeydown = e => { if (e.key === '/' && !e.ctrlKey && !e.metaKey && !/^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) { e.preventDefault(); field.focus(); field.select() } }
document.onclick = e => { if (!e.target.closest('.search')) close() }
if (field === document.activeElement) load()

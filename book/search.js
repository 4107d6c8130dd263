// Search in the sections of the book. The index is a script, so that it also works from file://.
(() => {
  const field = document.getElementById("search")
  const list = document.getElementById("results")
  const status = document.getElementById("search-status")
  const GREEK = Object.fromEntries("alpha α beta β gamma γ delta δ epsilon ε zeta ζ eta η theta θ kappa κ lambda λ mu μ nu ν pi π rho ρ sigma σ tau τ phi φ chi χ psi ψ omega ω"
    .split(" ").flatMap((x, i, all) => i % 2 ? [] : [[x, all[i + 1]]]))
  const SHOWN = 12  // Hits that are shown
  const FEW = 4  // With fewer hits than these, similar words are looked for too
  let loading, hits = [], chosen = -1

  // The index is fetched when first needed: [page, title, sections], a section [anchor, heading, kind, text, code].
  function index() {
    loading ||= new Promise((ready, fail) => {
      const script = document.createElement("script")
      script.src = "assets/search-index.js"
      script.onload = () => ready(prepared(window.bookIndex))
      script.onerror = fail
      document.head.append(script)
    })
    return loading
  }

  function prepared(pages) {
    const entries = pages.flatMap(([page, title, sections]) => sections.map(([anchor, heading, kind, text, code]) => ({
      page, title, anchor, heading, kind, text, code,
      low: { title: fold(title), name: fold(heading).replace(/^[\d.]+\s/, ""), text: fold(text), code: fold(code) },
    })))
    const words = new Set()
    for (const { low } of entries) {
      const text = `${low.name} ${low.text} ${low.code}`
      for (const word of text.match(/[\p{L}\p{N}_]{3,}/gu) || []) for (const part of [word, ...word.split("_")]) if (part.length > 2) words.add(part)
    }
    return { entries, words: [...words, ...Object.keys(GREEK)] }
  }

  // Lower case, with accents kept apart from their letters.
  function fold(text) { return text.toLowerCase().normalize("NFC") }

  // How well `entry` fits the word in any of its spellings: names first, then text, then code; 0 for not at all.
  function fit({ low, kind }, spellings) {
    let best = 0
    for (const word of spellings) {
      let sum = 0
      if (low.name.includes(word)) {
        sum += low.name === word || low.name.split(".").pop() === word ? 120 : low.name.startsWith(word) ? 60 : 30
        if (kind === "api") sum += 40
        if (kind === "page") sum += 20
      }
      if (low.text.includes(word)) sum += 5 + Math.min(5, low.text.split(word).length - 1)
      else if (low.code.includes(word)) sum += 3
      else if (!sum && low.title.includes(word)) sum = 1
      best = Math.max(best, sum)
    }
    return best
  }

  // The entries that fit all words, best first; `words` holds the spellings of each.
  function ranked(entries, words) {
    const found = []
    for (const entry of entries) {
      const fits = words.map(w => fit(entry, w))
      if (!fits.includes(0)) found.push([fits.reduce((a, b) => a + b), entry])
    }
    return found.sort((a, b) => b[0] - a[0]).slice(0, SHOWN).map(([, e]) => ({ ...e, words: words.flat() }))
  }

  function find({ entries, words }, query) {
    const asked = fold(query).split(/\s+/).filter(Boolean)
    if (!asked.length) return []
    const exact = ranked(entries, asked.map(w => greek([w])))
    if (exact.length >= FEW) return exact
    const near = ranked(entries, asked.map(w => greek([w, ...similar(w, words)]))).filter(e => !exact.some(x => x.page === e.page && x.anchor === e.anchor))
    return [...exact, ...near.map(e => ({ ...e, near: true }))].slice(0, SHOWN)
  }

  function greek(words) { return words.flatMap(w => GREEK[w] ? [w, GREEK[w]] : [w]) }

  // The book's words that start like `word` but for one slip of the keys, two in a long word; the closest only.
  function similar(word, words) {
    const most = word.length >= 8 ? 2 : word.length >= 4 ? 1 : 0
    let best = most, found = []
    for (const other of most ? words : []) {
      if (other.length < word.length - most) continue
      const slips = distance(word, other, best)
      if (slips < best) found = []
      if (slips <= best) { best = slips; found.push(other) }
    }
    return found
  }

  // Slips (a letter too many, too few, wrong, or two swapped) between `a` and the start of `b` nearest to it; past `most` it may stop.
  function distance(a, b, most) {
    let before, row = Array.from({ length: b.length + 1 }, (_, j) => j)
    for (let i = 1; i <= a.length; i++) {
      const next = [i]
      for (let j = 1; j <= b.length; j++) {
        next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]))
        if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) next[j] = Math.min(next[j], before[j - 2] + 1)
      }
      if (Math.min(...next) > most) return most + 1
      before = row
      row = next
    }
    return Math.min(...row)
  }

  // `text` as nodes, with the words marked.
  function marked(text, words) {
    const box = document.createDocumentFragment()
    const low = fold(text)
    let at = 0
    while (at < text.length) {
      const next = words.map(w => [low.indexOf(w, at), w]).filter(([i]) => i >= 0).sort((a, b) => a[0] - b[0] || b[1].length - a[1].length)[0]
      if (!next) break
      const mark = document.createElement("mark")
      mark.textContent = text.slice(next[0], next[0] + next[1].length)
      box.append(text.slice(at, next[0]), mark)
      at = next[0] + next[1].length
    }
    box.append(text.slice(at))
    return box
  }

  // The piece of the text that has the words, or of the code where only that has them.
  function excerpt({ text, code, low, words }) {
    const has = where => words.some(w => where.includes(w))
    const [source, folded] = !text || has(low.code) && !has(low.text) && !has(low.name) ? [code, low.code] : [text, low.text]
    const at = Math.min(...words.map(w => folded.indexOf(w)).filter(i => i >= 0), source.length)
    const start = at > 50 && at < source.length ? source.indexOf(" ", at - 50) + 1 : 0
    const line = document.createElement(source === code ? "code" : "span")
    line.append(marked((start ? "… " : "") + source.slice(start, start + 150) + (source.length > start + 150 ? " …" : ""), words))
    return line
  }

  function hitLink(hit, i) {
    const link = document.createElement("a")
    link.href = hit.page + (hit.anchor ? "#" + encodeURIComponent(hit.anchor) : "")
    link.id = "result-" + i
    link.className = "hit-" + hit.kind
    link.tabIndex = -1
    link.setAttribute("role", "option")
    const name = document.createElement("b"), place = document.createElement("small"), line = document.createElement("p")
    name.append(marked(hit.heading, hit.words))
    place.textContent = (hit.kind === "page" ? "chapter" : hit.title) + (hit.near ? " · similar" : "")
    line.append(excerpt(hit))
    link.append(name, place, line)
    link.addEventListener("click", close)
    link.addEventListener("pointermove", () => { if (chosen !== i) choose(i, false) })
    return link
  }

  function draw() {
    list.replaceChildren(...hits.map(hitLink))
    if (!hits.length) {
      const none = document.createElement("p")
      none.className = "none"
      none.textContent = "Nothing found."
      list.append(none)
    }
    list.hidden = false
    list.scrollTop = 0
    field.setAttribute("aria-expanded", "true")
    status.textContent = hits.length ? hits.length + " results" : "Nothing found"
    choose(-1)
  }

  // Mark hit `i`, the one that Enter opens; with -1 none is marked, and Enter opens the first.
  function choose(i, scroll = true) {
    chosen = i
    list.querySelectorAll("a").forEach((link, j) => {
      link.setAttribute("aria-selected", i === j)
      if (i === j && scroll) link.scrollIntoView({ block: "nearest" })
    })
    if (i >= 0) field.setAttribute("aria-activedescendant", "result-" + i)
    else field.removeAttribute("aria-activedescendant")
  }

  function close() {
    list.hidden = true
    field.setAttribute("aria-expanded", "false")
    field.removeAttribute("aria-activedescendant")
  }

  // Look for what the field says now; false when meanwhile it says something else.
  async function look() {
    const query = field.value
    if (!query.trim()) { close(); return false }
    try {
      const made = await index()
      if (query !== field.value) return false
      hits = find(made, query)
      draw()
      return true
    } catch (e) { status.textContent = "The search index could not be read"; return false }
  }

  field.addEventListener("focus", () => index().catch(() => {}))
  field.addEventListener("input", look)
  field.addEventListener("keydown", async e => {
    if (e.isComposing) return
    if (e.key === "Escape") { field.value = ""; close(); field.blur() }
    if (e.key === "Enter") {
      e.preventDefault()
      if (!list.hidden || await look()) list.querySelectorAll("a")[Math.max(chosen, 0)]?.click()
    }
    if (list.hidden || !hits.length) return
    if (e.key === "ArrowDown") { choose((chosen + 1) % hits.length); e.preventDefault() }
    if (e.key === "ArrowUp") { choose((Math.max(chosen, 0) - 1 + hits.length) % hits.length); e.preventDefault() }
  })
  document.addEventListener("keydown", e => {
    const typing = e.target.closest && e.target.closest("input, textarea, select, [contenteditable]")
    if (e.key === "/" && !typing && !e.ctrlKey && !e.metaKey && !e.altKey) { field.focus(); e.preventDefault() }
  })
  document.addEventListener("click", e => { if (!e.target.closest(".search")) close() })
  field.setAttribute("aria-expanded", "false")
})()

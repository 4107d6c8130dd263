// Search in the sections of the book. The index is a script, so that it also works from file://.
(() => {
  const field = document.getElementById("search")
  const list = document.getElementById("results")
  const status = document.getElementById("search-status")
  let loading, hits = [], chosen = -1

  // The index is fetched when first needed: [page, anchor, chapter, heading, kind, text] per section.
  function index() {
    loading ||= new Promise((ready, fail) => {
      const script = document.createElement("script")
      script.src = "assets/search-index.js"
      script.onload = () => ready(window.bookIndex.map(([page, anchor, chapter, heading, kind, text]) => (
        { page, anchor, chapter, heading, kind, text, name: fold(heading), body: fold(text) })))
      script.onerror = fail
      document.head.append(script)
    })
    return loading
  }

  // Lower case, with accents kept apart from their letters.
  function fold(text) { return text.toLowerCase().normalize("NFC") }

  // How well `entry` fits all `words`: names first, then headings, then text; 0 for not at all.
  function score(entry, words) {
    let sum = 0
    for (const word of words) {
      const inName = entry.name.indexOf(word), inBody = entry.body.indexOf(word)
      if (inName < 0 && inBody < 0 && !fold(entry.chapter).includes(word)) return 0
      if (inName >= 0) {
        const bare = entry.name.replace(/^[\d.]+\s/, "")
        sum += bare === word || bare.split(".").pop() === word ? 120 : bare.startsWith(word) ? 60 : 30
        if (entry.kind === "api") sum += 40
        if (entry.kind === "page") sum += 20
      }
      if (inBody >= 0) sum += 5 + Math.min(5, entry.body.split(word).length - 1)
    }
    return sum
  }

  function find(entries, query) {
    const words = fold(query).split(/\s+/).filter(Boolean)
    if (!words.length) return []
    return entries.map(e => [score(e, words), e]).filter(([s]) => s > 0)
      .sort((a, b) => b[0] - a[0]).slice(0, 12).map(([, e]) => ({ ...e, words }))
  }

  // `text` as nodes, with the words marked.
  function marked(text, words) {
    const box = document.createDocumentFragment()
    const low = fold(text)
    let at = 0
    while (at < text.length) {
      const next = words.map(w => [low.indexOf(w, at), w]).filter(([i]) => i >= 0).sort((a, b) => a[0] - b[0])[0]
      if (!next) break
      const mark = document.createElement("mark")
      mark.textContent = text.slice(next[0], next[0] + next[1].length)
      box.append(text.slice(at, next[0]), mark)
      at = next[0] + next[1].length
    }
    box.append(text.slice(at))
    return box
  }

  function excerpt({ text, body, words }) {
    const at = Math.min(...words.map(w => body.indexOf(w)).filter(i => i >= 0), text.length)
    const start = at > 50 && at < text.length ? text.indexOf(" ", at - 50) + 1 : 0
    return (start ? "… " : "") + text.slice(start, start + 150) + (text.length > start + 150 ? " …" : "")
  }

  function draw() {
    list.replaceChildren(...hits.map((hit, i) => {
      const link = document.createElement("a")
      link.href = hit.page + (hit.anchor ? "#" + encodeURIComponent(hit.anchor) : "")
      link.id = "result-" + i
      link.className = "hit-" + hit.kind
      link.tabIndex = -1
      link.setAttribute("role", "option")
      const name = document.createElement("b"), place = document.createElement("small"), line = document.createElement("p")
      name.append(marked(hit.heading, hit.words))
      place.textContent = hit.kind === "page" ? "chapter" : hit.chapter
      line.append(marked(excerpt(hit), hit.words))
      link.append(name, place, line)
      link.addEventListener("click", () => close())
      return link
    }))
    if (!hits.length) {
      const none = document.createElement("p")
      none.className = "none"
      none.textContent = "Nothing found."
      list.append(none)
    }
    list.hidden = false
    field.setAttribute("aria-expanded", "true")
    status.textContent = hits.length ? hits.length + " results" : "Nothing found"
    choose(hits.length ? 0 : -1)
  }

  function choose(i) {
    chosen = i
    list.querySelectorAll("a").forEach((link, j) => {
      link.setAttribute("aria-selected", i === j)
      if (i === j) link.scrollIntoView({ block: "nearest" })
    })
    if (i >= 0) field.setAttribute("aria-activedescendant", "result-" + i)
    else field.removeAttribute("aria-activedescendant")
  }

  function close() {
    list.hidden = true
    field.setAttribute("aria-expanded", "false")
    field.removeAttribute("aria-activedescendant")
  }

  field.addEventListener("focus", () => index().catch(() => {}))
  field.addEventListener("input", async () => {
    const query = field.value
    if (!query.trim()) return close()
    try {
      const entries = await index()
      if (query === field.value) { hits = find(entries, query); draw() }
    } catch (e) { status.textContent = "The search index could not be read" }
  })
  field.addEventListener("keydown", e => {
    if (e.key === "Escape") { field.value = ""; close(); field.blur() }
    if (list.hidden) return
    if (e.key === "ArrowDown") { choose((chosen + 1) % hits.length); e.preventDefault() }
    if (e.key === "ArrowUp") { choose((chosen - 1 + hits.length) % hits.length); e.preventDefault() }
    if (e.key === "Enter" && chosen >= 0) { list.children[chosen].click(); e.preventDefault() }
  })
  document.addEventListener("keydown", e => {
    const typing = e.target.closest && e.target.closest("input, textarea, select, [contenteditable]")
    if (e.key === "/" && !typing && !e.ctrlKey && !e.metaKey && !e.altKey) { field.focus(); e.preventDefault() }
  })
  document.addEventListener("click", e => { if (!e.target.closest(".search")) close() })
  field.setAttribute("aria-expanded", "false")
})()

// What a page does besides searching: colors, the list of chapters, copying code, the place in the text.
(() => {
  const root = document.documentElement
  const dark = matchMedia("(prefers-color-scheme: dark)")

  // Colors: as the system says, until the reader chooses.
  const button = document.getElementById("theme")
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark"
  const show = () => button.setAttribute("aria-pressed", isDark())
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark"
    try { localStorage.setItem("theme", root.dataset.theme) } catch (e) { /* private mode: kept for this page */ }
    show()
  })
  dark.addEventListener("change", show)
  show()

  // The list of chapters on narrow screens.
  const menu = document.getElementById("menu")
  const open = yes => {
    root.classList.toggle("menu-open", yes)
    menu.setAttribute("aria-expanded", yes)
  }
  const current = document.querySelector("#sidebar [aria-current]")
  const bringUp = () => {  // the chapter that is read, in a list that is longer than the screen
    const list = document.getElementById("sidebar")
    if (current) list.scrollTop += current.getBoundingClientRect().top - list.getBoundingClientRect().top - list.clientHeight / 2
  }
  bringUp()
  menu.addEventListener("click", () => { open(!root.classList.contains("menu-open")); bringUp() })
  document.addEventListener("keydown", e => {
    if (e.key === "Escape" && root.classList.contains("menu-open")) { open(false); menu.focus() }
  })

  // A button on each block of code.
  for (const block of document.querySelectorAll("div.sourceCode")) {
    const copy = document.createElement("button")
    copy.type = "button"
    copy.className = "copy"
    copy.textContent = "Copy"
    copy.setAttribute("aria-label", "Copy the code")
    copy.addEventListener("click", async () => {
      copy.textContent = await put(block.querySelector("code").textContent) ? "Copied" : "Select and copy by hand"
      setTimeout(() => { copy.textContent = "Copy" }, 1500)
    })
    block.append(copy)
  }
  async function put(text) {
    try { await navigator.clipboard.writeText(text); return true } catch (e) { /* not allowed from file:// everywhere */ }
    const area = document.createElement("textarea")
    area.value = text
    document.body.append(area)
    area.select()
    const done = document.execCommand("copy")
    area.remove()
    return done
  }

  // What scrolls in its place can be reached and moved with the keyboard, and has a name.
  const boxes = [...document.querySelectorAll("article :is(pre, .table-wrap, .formula, .long-formula, .output-figure)")]
  const label = box => {
    if (box.matches(".formula, .long-formula")) return "Formula"
    const caption = box.closest("figure")?.querySelector(".caption-number")
    if (box.matches(".table-wrap, .output-figure")) return caption ? caption.textContent : box.matches(".table-wrap") ? "Table" : "Figure"
    return box.closest(".output") ? "Output" : "Code"
  }
  const reach = () => {
    for (const [box, scrolls] of boxes.map(b => [b, b.scrollWidth > b.clientWidth + 1 || b.scrollHeight > b.clientHeight + 1])) {
      if (!scrolls) { for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name); continue }
      box.tabIndex = 0
      box.setAttribute("role", "region")
      box.setAttribute("aria-label", label(box) + ", scrolls")
    }
  }
  // On paper nothing scrolls: what is wider than a page of A4 is printed smaller.
  const PAPER = 172 / 25.4 * 96, ROOT = 11 / 72 * 96  // width of the text and size of the root's letters there, in CSS pixels
  const scale = PAPER / ROOT * parseFloat(getComputedStyle(root).fontSize)
  for (const [box, width] of boxes.map(b => [b, b.scrollWidth])) {
    const room = box.matches(".formula") ? .9 * scale : scale  // the number stands beside a formula
    if (width > room) box.style.setProperty("--print-zoom", (Math.floor(100 * room / width) / 100))
  }
  reach()
  addEventListener("resize", reach)
  document.addEventListener("toggle", reach, true)
  document.fonts.ready.then(reach)

  // Mark in the table of contents where the reader is.
  const links = new Map()
  for (const link of document.querySelectorAll(".toc a")) links.set(decodeURIComponent(link.hash.slice(1)), link)
  const headings = [...links.keys()].map(id => document.getElementById(id)).filter(Boolean)
  let now
  const place = () => {
    let here
    for (const h of headings) if (h.getBoundingClientRect().top < innerHeight * 0.3) here = h
    if (here === now) return
    if (now) links.get(now.id).classList.remove("now")
    if (here) {
      links.get(here.id).classList.add("now")
      const box = links.get(here.id).closest(".toc")
      const link = links.get(here.id).getBoundingClientRect(), frame = box.getBoundingClientRect()
      if (link.top < frame.top || link.bottom > frame.bottom) box.scrollTop += link.top - frame.top - frame.height / 2
    }
    now = here
  }
  if (headings.length) { addEventListener("scroll", place, { passive: true }); place() }

  // A printed page shows what is folded.
  addEventListener("beforeprint", () => document.querySelectorAll("article details:not(.toc-inline)").forEach(d => { d.open = true }))

  // A link to something inside a folded block opens it.
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)))
    if (!target) return
    for (let d = target.closest("details"); d; d = d.parentElement.closest("details")) d.open = true
    target.scrollIntoView()
  }
  addEventListener("hashchange", reveal)
  if (location.hash) reveal()
})()

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
  menu.addEventListener("click", () => open(!root.classList.contains("menu-open")))
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

  // Code and outputs that scroll can be reached with the keyboard.
  for (const box of document.querySelectorAll("pre")) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0
  }

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

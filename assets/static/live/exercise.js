// Exercises in the page: a box for the answer, the sentences that the notebook's check would say. What was answered is
// remembered in this browser only.

/** Digits as a number; a comma stands between thousands or, as in 0,125, for the point */
function number(text = "") {
  text = text.replaceAll("_", "")
  const thousands = /^[-+]?[1-9]\d{0,2}(,\d{3})+(?![\d,])/.test(text)
  return text ? Number(thousands ? text.replaceAll(",", "") : text.replace(",", ".")) : NaN
}

/** Text as the kind of value that is asked for; null where it is none */
export function parse(text, like) {
  text = text.trim()
  if (Array.isArray(like)) {
    const parts = text.replace(/^[([]|[)\]]$/g, "").split(text.includes(";") ? ";" : ",")
      .map((part, i) => parse(part, like[i % like.length]))
    return parts.includes(null) ? null : parts
  }
  if (typeof like === "string") return text.replace(/^["'`]|["'`]$/g, "") || null
  if (typeof like === "boolean") return { true: true, yes: true, false: false, no: false }[text.toLowerCase()] ?? null
  const [, above, below, percent] = /^([-+]?[\d_.,]+(?:e[-+]?\d+)?)(?:\s*\/\s*([-+]?[\d_.,]+))?\s*(%?)$/i.exec(text) ?? []
  const value = number(above) / number(below ?? "1") / (percent && Math.abs(like) <= 1 ? 100 : 1) // 50 % of a share is 0.5
  return Number.isFinite(value) ? value : null
}

/** Equal up to rounding, as the notebook's `same` */
export function same(a, b) {
  if (Array.isArray(a)) return Array.isArray(b) && a.length === b.length && a.every((part, i) => same(part, b[i]))
  if (typeof a === "number" && typeof b === "number")
    return Math.abs(a - b) <= Math.max(1e-6 * Math.max(Math.abs(a), Math.abs(b)), 1e-12)
  if (typeof a === "string" && typeof b === "string") return a.trim().toLowerCase() === b.trim().toLowerCase()
  return a === b
}

/** What an answer is worth: [state, sentence] */
export function mark(text, { right, within, wrong, ok, other }) {
  const answer = parse(text, right)
  if (answer === null) {
    const kind = Array.isArray(right) ? `${right.length} values with commas between them` : typeof right === "string" ? "a word"
      : typeof right === "boolean" ? "yes or no" : "a number, such as 12, 0.5 or 3/4"
    return ["wrong", `This could not be read: type ${kind}.`]
  }
  if (same(answer, right) || within && Math.abs(answer - right) < within) return ["right", ok]
  return ["wrong", wrong.find(([mistake]) => same(answer, mistake))?.[1] ?? other]
}

/** The control in place of a form's sentence */
function open(form, number) {
  const known = JSON.parse(form.dataset.known), key = `${location.pathname} exercise ${number}`
  const box = Object.assign(document.createElement("input"), { type: "text", autocomplete: "off", spellcheck: false })
  const button = Object.assign(document.createElement("button"), { type: "submit", textContent: "check" })
  const said = document.createElement("p"), label = document.createElement("label")
  said.setAttribute("role", "status")
  label.append("your answer ", box)
  form.replaceChildren(label, " ", button, said)
  const answer = () => {
    const [state, sentence] = mark(box.value, known)
    form.dataset.state = state
    said.innerHTML = ""
    said.append(Object.assign(document.createElement("b"), { textContent: state === "right" ? "Right. " : "Not yet. " }), sentence)
    try { localStorage.setItem(key, box.value) } catch { /* private windows remember nothing */ }
  }
  form.onsubmit = event => { event.preventDefault(); answer() }
  try {
    box.value = localStorage.getItem(key) ?? ""
    if (box.value) answer()
  } catch { /* the same */ }
}

if (globalThis.document) document.querySelectorAll("form.exercise").forEach(open)

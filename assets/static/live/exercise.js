// Exercises in the page: a box for the answer, or what there is to choose from, and the sentences that the notebook's check would say. What was answered is
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

/** The answers to choose from, in an order that tells nothing; null where one is typed */
export function choices({ right, wrong }) {
  if (typeof right === "boolean") return ["yes", "no"]
  if (typeof [right].flat()[0] !== "string") return null
  return [...new Set([right, ...wrong.map(([mistake]) => mistake)].map(answer => [answer].flat().join(", ")))].sort()
}

/** What an answer is worth: [state, sentence] */
export function mark(text, { right, within, wrong, ok, other }) {
  const answer = parse(text, right)
  if (answer === null && choices({ right, wrong })) return ["wrong", "Choose an answer first."]
  if (answer === null) {
    const kind = Array.isArray(right) ? `${right.length} values with commas between them` : typeof right === "string" ? "a word"
      : typeof right === "boolean" ? "yes or no" : "a number, such as 12, 0.5 or 3/4"
    return ["wrong", `This could not be read: type ${kind}.`]
  }
  if (same(answer, right) || within && Math.abs(answer - right) < within) return ["right", ok]
  return ["wrong", wrong.find(([mistake]) => same(answer, mistake))?.[1] ?? other]
}

const make = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties)
  element.append(...children)
  return element
}

/** The control in place of a form's sentence */
function open(form, number) {
  const known = JSON.parse(form.dataset.known), key = `${location.pathname} exercise ${number}`, listed = choices(known)
  const said = make("p"), button = make("button", { type: "submit", textContent: "check" })
  const inputs = listed ? listed.map(value => make("input", { type: "radio", name: "answer", value }))
    : [make("input", { type: "text", autocomplete: "off", spellcheck: false })]
  said.setAttribute("role", "status")
  form.replaceChildren(listed ? make("fieldset", { className: "live-parts" }, make("legend", { textContent: "your answer" }),
    ...inputs.map(input => make("label", {}, input, input.value))) : make("label", {}, "your answer ", ...inputs), " ", button, said)
  const answer = () => {
    const text = inputs.find(input => !listed || input.checked)?.value ?? "", [state, sentence] = mark(text, known)
    form.dataset.state = state
    said.innerHTML = ""
    said.append(make("b", { textContent: state === "right" ? "Right. " : "Not yet. " }), sentence)
    if (listed && !text) return
    try { localStorage.setItem(key, text) } catch { /* private windows remember nothing */ }
  }
  form.onsubmit = event => { event.preventDefault(); answer() }
  try {
    const before = localStorage.getItem(key) ?? "", chosen = inputs.find(input => !listed || input.value === before)
    if (!before || !chosen) return
    Object.assign(chosen, listed ? { checked: true } : { value: before })
    answer()
  } catch { /* the same */ }
}

if (globalThis.document) document.querySelectorAll("form.exercise").forEach(open)

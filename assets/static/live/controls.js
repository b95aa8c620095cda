// What the figures that can be touched have in common.

/** An element with properties and children */
export function make(name, properties = {}, ...children) {
  const { aria = {}, ...rest } = properties, element = Object.assign(document.createElement(name), rest)
  for (const [key, value] of Object.entries(aria)) element.setAttribute(key, value)
  element.append(...children)
  return element
}

function slider(name, text, options, value, changed) {
  const label = make("label"), input = make("input"), shown = make("span") // not <output>: it would be read out beside the sentence
  Object.assign(input, { type: "range", min: 0, max: options.length - 1, value: options.indexOf(value) })
  const tell = () => {
    shown.textContent = options[input.value]
    input.setAttribute("aria-valuetext", `${text}: ${options[input.value]}`)
  }
  input.oninput = () => { tell(); changed(name, options[input.value]) }
  label.append(Object.assign(document.createElement("b"), { textContent: name }), ` ${text} `, shown, input)
  tell()
  return label
}

/** Sliders above, a drawing and one sentence below; `draw(sizes)` returns the sentence */
export function build(figure, sizes, controls, draw, drawing) {
  const panel = document.createElement("div"), told = document.createElement("p")
  panel.className = "live-sliders"
  told.setAttribute("role", "status")
  const changed = (name, value) => {
    sizes[name] = value
    told.textContent = draw(sizes)
  }
  panel.append(...controls.map(([name, text, options]) => slider(name, text, options, sizes[name], changed)))
  figure.prepend(panel, drawing, told)
  figure.querySelector(".live-fallback").hidden = true
  told.textContent = draw(sizes)
}

export const range = (first, last, step = 1) => Array.from({ length: (last - first) / step + 1 }, (_, i) => first + i * step)

/** A click on a drawing of tiles, so many from top to bottom, moves the first two sliders: row and column */
export function point(figure, drawing, rows, column = x => x) {
  drawing.onpointerdown = drawing.onpointermove = event => {
    if (event.type === "pointermove" && (event.buttons !== 1 || event.pointerType !== "mouse")) return
    const box = drawing.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * drawing.width / drawing.height * rows
    const wanted = [(event.clientY - box.top) / box.height * rows, column(x)]
    for (const [n, input] of [...figure.querySelectorAll("input")].slice(0, 2).entries()) {
      input.value = Math.floor(wanted[n]) // the slider keeps it within its ends
      input.oninput()
    }
  }
}

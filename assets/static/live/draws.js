// Augmentation one draw at a time: the picture as it is, beside what a part of the recipe made of it.
// A <figure class="live-draws"> brings a sheet of draws, a row for each part, the picture itself in front; without a
// script the sheet is what is seen.
import { make } from "./controls.js"

function show(figure, number) {
  const rows = JSON.parse(figure.dataset.draws), sheet = figure.querySelector("img"), names = Object.keys(rows)
  const side = sheet.naturalHeight / names.length, at = Object.fromEntries(names.map(name => [name, 0])), said = make("p")
  const drawing = make("canvas", { width: 2.1 * side, height: side }), pen = drawing.getContext("2d")
  drawing.setAttribute("aria-hidden", "true") // the sentence says what was drawn
  said.setAttribute("role", "status")
  let part = names[0]
  const draw = () => {
    const row = names.indexOf(part), all = rows[part].length
    for (const [column, left] of [[0, 0], [at[part] + 1, 1.1 * side]])
      pen.drawImage(sheet, column * side, row * side, side, side, left, 0, side, side)
    said.textContent = `${part}, draw ${at[part] + 1} of ${all}. ${rows[part][at[part]]}`
  }
  const again = () => { at[part] = (at[part] + 1) % rows[part].length; draw() }
  const choices = names.map((name, i) => make("label", {}, make("input", { type: "radio", name: `draws-${number}`, value: name,
    checked: !i, onchange: () => { part = name; draw() } }), name))
  figure.prepend(make("fieldset", { className: "live-parts" }, make("legend", { textContent: "Part of the recipe" }), ...choices),
    drawing, make("button", { type: "button", className: "live-start", textContent: "Draw again", onclick: again }), said)
  sheet.hidden = true
  draw()
}

document.querySelectorAll("figure.live-draws").forEach((figure, number) =>
  figure.querySelector("img").decode().then(() => show(figure, number)))

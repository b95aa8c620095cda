// A sheet to draw on, by mouse, finger or keys; what is on it is handed on when a stroke ends.
import { make } from "./controls.js"

const INKS = { black: "#1b1b1b", white: "#ffffff", red: "#c62828", brown: "#8d5a2b", yellow: "#f4c430", green: "#2e7d32", blue: "#4a90d9" }
const ROOM = 320, STEP = ROOM / 16 // of the sheet, and of a key
const KEYS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP], " ": [0, 0] }
let sheets = 0

/** A fold that holds the sheet, its colours, "Clear" and the answer; `done(canvas)` hears of every change */
export function sketch(answer, done) {
  const number = ++sheets, brush = make("i"), hint = make("p", { id: `sketch-${number}`, textContent:
    "Draw with the mouse or a finger. By keys: arrows move the brush, with Shift they draw, Space makes a dot." })
  const sheet = make("canvas", { width: ROOM, height: ROOM, tabIndex: 0,
    aria: { role: "application", "aria-label": "sheet to draw on", "aria-describedby": hint.id } }), pen = sheet.getContext("2d")
  let at = [ROOM / 2, ROOM / 2], drawing = false
  const place = to => {
    at = to.map(v => Math.min(ROOM, Math.max(0, v)))
    brush.style.cssText = `left: ${100 * at[0] / ROOM}%; top: ${100 * at[1] / ROOM}%`
  }
  const line = to => {
    pen.beginPath()
    pen.moveTo(...at)
    place(to)
    pen.lineTo(at[0] + 0.01, at[1]) // a dot is a short line
    pen.stroke()
  }
  const clear = () => {
    pen.fillStyle = INKS.white
    pen.fillRect(0, 0, ROOM, ROOM)
  }
  const under = event => {
    const box = sheet.getBoundingClientRect()
    return [(event.clientX - box.left) / box.width * ROOM, (event.clientY - box.top) / box.height * ROOM]
  }
  sheet.onpointerdown = event => {
    if (event.button) return
    sheet.setPointerCapture(event.pointerId)
    drawing = true
    place(under(event))
    line(at)
  }
  sheet.onpointermove = event => drawing && line(under(event))
  sheet.onpointerup = sheet.onpointercancel = () => {
    if (drawing) done(sheet)
    drawing = false
  }
  sheet.onkeydown = event => {
    const step = KEYS[event.key], to = step?.map((v, i) => at[i] + v)
    if (!step) return
    event.preventDefault() // the page stays where it is
    event.shiftKey || event.key === " " ? line(to) : place(to)
  }
  sheet.onkeyup = event => (event.key === " " || event.shiftKey && event.key in KEYS) && done(sheet)
  const inks = Object.entries(INKS).map(([name, colour]) => {
    const swatch = make("span"), choice = make("input", { type: "radio", name: `ink-${number}`, checked: name === "black",
      onchange: () => { pen.strokeStyle = colour }, aria: { "aria-label": name } })
    swatch.style.background = colour
    return make("label", { title: name }, choice, swatch)
  })
  Object.assign(pen, { lineWidth: 26, lineCap: "round", strokeStyle: INKS.black })
  clear()
  place(at)
  return make("details", { className: "live-sketch" }, make("summary", { textContent: "or draw one" }),
    make("fieldset", { className: "live-inks" }, make("legend", { textContent: "colour" }), ...inks),
    make("div", {}, sheet, brush), answer,
    make("button", { type: "button", textContent: "Clear", onclick: () => { clear(); done(sheet) } }), hint)
}

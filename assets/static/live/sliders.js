// Figures with sliders: what h, d, k and p make of a network, a knife that cuts a photograph into patches, and who
// looks at whom in one layer of attention, where a poked network moves.
// Each stands in a <figure> that shows something without a script, too.
import { build, point, range } from "./controls.js"

const whole = number => Math.round(number).toLocaleString("en")

/** Weights, multiplications and the side of the window of a ConvMixer on square images, as module anatomy counts them */
export function anatomy({ h, d, k, p, n = 1000, c = 3, s = 224 }) {
  const side = Math.floor(s / p)
  return { side, parameters: h * (d * (k * k + h + 6) + c * p * p + n + 3) + n, field: p * (1 + d * (k - 1)),
    macs: side * side * (c * p * p * h + d * h * (h + k * k)) + h * n }
}

/** What a knife makes of a picture of s x s pixels and c colours */
export function patches({ p, c = 3, s = 224 }) {
  const places = Math.floor(s / p) ** 2
  return { places, numbers: c * p * p, pairs: places * places }
}

function showAnatomy(figure) {
  const s = 224, drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  drawing.setAttribute("viewBox", `-2 -2 ${s + 4} ${s + 4}`)
  drawing.setAttribute("aria-hidden", "true")
  const draw = sizes => {
    const { side, parameters, macs, field } = anatomy(sizes), p = sizes.p, middle = p * Math.floor(side / 2) + p / 2
    const seen = [Math.max(0, middle - field / 2), Math.min(s, middle + field / 2)], extent = seen[1] - seen[0]
    const lines = range(0, side).map(i => `M${i * p} 0V${side * p}M0 ${i * p}H${side * p}`).join("")
    drawing.innerHTML = `<rect class="image" width="${s}" height="${s}"/><rect class="field" x="${seen[0]}" y="${seen[0]}" width="${extent}"
      height="${extent}"/><path class="grid" d="${lines}"/><rect class="place" x="${middle - p / 2}" y="${middle - p / 2}" width="${p}" height="${p}"/>`
    return `${whole(parameters)} weights and ${(macs / 1e9).toFixed(2)} billion multiplications for an image of ${s} pixels. A grid of ${side} by ` +
      `${side} positions; the one in the middle can see ${whole(field)} pixels across${extent >= s ? ", all of the image" : ""}.`
  }
  build(figure, { h: 256, d: 4, k: 5, p: 7 }, [["h", "width", range(64, 1536, 64)], ["d", "depth", range(1, 32)],
    ["k", "kernel", range(1, 15, 2)], ["p", "patch", [1, 2, 4, 7, 8, 14, 16, 28, 32]]], draw, drawing)
}

function showKnife(figure) {
  const photo = figure.querySelector("img"), s = 224, room = 320, drawing = document.createElement("canvas")
  Object.assign(drawing, { width: room, height: room })
  drawing.setAttribute("aria-hidden", "true")
  const draw = ({ p }) => {
    const { places, numbers, pairs } = patches({ p }), side = s / p, pen = drawing.getContext("2d")
    const gap = Math.min(6, 0.3 * p), tile = (room - gap * (side - 1)) / side
    pen.clearRect(0, 0, room, room)
    for (const i of range(0, side - 1)) for (const j of range(0, side - 1))
      pen.drawImage(photo, j * p, i * p, p, p, j * (tile + gap), i * (tile + gap), tile, tile)
    return `${side} by ${side} makes ${whole(places)} patches of ${whole(numbers)} numbers each. If every patch looked at every other: ` +
      `${whole(pairs)} pairs.`
  }
  photo.decode().then(() => build(figure, { p: 16 }, [["p", "patch, in pixels", [2, 4, 7, 8, 14, 16, 28, 32, 56, 112]]], draw, drawing))
}

/** What share of its attention position i gives to each, by softmax of the fits; the queries (N, h) are the keys, too */
export function attend(query, i) {
  const fits = query.map(key => key.reduce((sum, value, c) => sum + value * query[i][c], 0) / Math.sqrt(query[i].length))
  const top = Math.max(...fits), parts = fits.map(fit => Math.exp(fit - top)), all = parts.reduce((sum, part) => sum + part, 0)
  return parts.map(part => part / all)
}

/** How many positions get half of the attention, those with the largest shares first, and how far the farthest of them is */
export function reach(shares, i, side) {
  let sum = 0
  const order = shares.map((_, n) => n).sort((a, b) => shares[b] - shares[a])
  const half = order.slice(0, 1 + order.findIndex(n => (sum += shares[n]) >= 0.5))
  return { count: half.length, far: Math.max(...half.map(n =>
    Math.hypot(Math.floor(n / side) - Math.floor(i / side), n % side - i % side))) }
}

function showAttention(figure) {
  const { query, colours } = JSON.parse(figure.dataset.positions), side = Math.sqrt(query.length), tile = 10, room = side * tile
  const drawing = Object.assign(document.createElement("canvas"), { width: 2 * room + tile, height: room }), pen = drawing.getContext("2d")
  Object.assign(pen, { strokeStyle: "white", lineWidth: 2 })
  drawing.setAttribute("aria-hidden", "true") // the sliders and the sentence say it all
  const fill = (colour, left, n) => {
    pen.fillStyle = colour
    pen.fillRect(left + n % side * tile, Math.floor(n / side) * tile, tile, tile)
  }
  const draw = ({ row, column }) => {
    const i = (row - 1) * side + column - 1, shares = attend(query, i), top = Math.max(...shares), { count, far } = reach(shares, i, side)
    colours.forEach((colour, n) => fill(`rgb(${colour})`, 0, n))
    shares.forEach((share, n) => fill(`rgb(${Array(3).fill(255 * share / top)})`, room + tile, n))
    for (const left of [0, room + tile]) {
      fill("rgb(230, 102, 0)", left, i)
      pen.strokeRect(left + i % side * tile, Math.floor(i / side) * tile, tile, tile)
    }
    return `Half of its attention goes to ${count} of ${query.length} positions; the farthest of them is ${far.toFixed(0)} steps away.`
  }
  const places = range(1, side)
  build(figure, { row: Math.ceil(side / 4), column: Math.ceil(side / 2) },
    [["row", "from the top", places], ["column", "from the left", places]], draw, drawing)
  point(figure, drawing, side, x => x > side + 0.5 ? x - side - 1 : x) // the row beside the image, too
}

const gelu = x => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)))

/** A grid, values (h, side * side), and what becomes of it after each half of each block, without biases and BatchNorm */
export function halves(grid, blocks, side, residual) {
  const steps = [grid]
  for (const { depthwise, pointwise } of blocks) {
    const now = steps.at(-1), k = Math.sqrt(depthwise[0].length), half = (k - 1) / 2
    const near = (values, kernel, n) => kernel.reduce((sum, weight, i) => {
      const y = Math.floor(n / side) + Math.floor(i / k) - half, x = n % side + i % k - half
      return y < 0 || x < 0 || y >= side || x >= side ? sum : sum + weight * values[y * side + x]
    }, 0)
    steps.push(now.map((values, c) => values.map((value, n) => gelu(near(values, depthwise[c], n)) + (residual ? value : 0))))
    steps.push(pointwise.map(row => now[0].map((_, n) => gelu(row.reduce((sum, weight, c) => sum + weight * steps.at(-1)[c][n], 0)))))
  }
  return steps
}

function showPoke(figure) {
  const { grid, blocks } = JSON.parse(figure.dataset.network), side = Math.sqrt(grid[0].length), tile = 10, middle = Math.ceil(side / 2)
  const drawing = Object.assign(document.createElement("canvas"), { width: side * tile, height: side * tile }), pen = drawing.getContext("2d")
  drawing.setAttribute("aria-hidden", "true")
  const names = ["the poke", ...blocks.flatMap((_, i) => [`depthwise ${i + 1}`, `pointwise ${i + 1}`])]
  const draw = ({ row, column, after, residual }) => {
    const at = (row - 1) * side + column - 1, poked = grid.map((values, c) => values.map((value, n) => value + (c === 0 && n === at)))
    const [was, is] = [grid, poked].map(start => halves(start, blocks, side, residual === "with")[names.indexOf(after)])
    const change = is.map((values, c) => values.map((value, n) => Math.abs(value - was[c][n])))
    const largest = grid[0].map((_, n) => Math.max(...change.map(values => values[n]))), top = Math.max(...largest)
    largest.forEach((value, n) => {
      pen.fillStyle = `rgb(${Array(3).fill(value > 1e-9 ? 60 + 195 * value / top : 0)})`
      pen.fillRect(n % side * tile, Math.floor(n / side) * tile, tile - 1, tile - 1)
    })
    Object.assign(pen, { strokeStyle: "rgb(230, 102, 0)", lineWidth: 2 }).strokeRect((column - 1) * tile, (row - 1) * tile, tile - 1, tile - 1)
    return `${largest.filter(value => value > 1e-9).length} of ${largest.length} positions have moved, in ` +
      `${change.filter(values => Math.max(...values) > 1e-9).length} of ${grid.length} channels; the poked position by ${largest[at].toFixed(3)}.`
  }
  build(figure, { row: middle, column: middle, after: names[1], residual: "with" }, [["row", "from the top", range(1, side)],
    ["column", "from the left", range(1, side)], ["after", "which half", names], ["residual", "in blocks", ["without", "with"]]],
  draw, drawing)
  point(figure, drawing, side)
}

for (const figure of document.querySelectorAll("figure.live-anatomy")) showAnatomy(figure)
for (const figure of document.querySelectorAll("figure.live-knife")) showKnife(figure)
for (const figure of document.querySelectorAll("figure.live-attention")) showAttention(figure)
for (const figure of document.querySelectorAll("figure.live-poke")) showPoke(figure)

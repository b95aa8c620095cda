// Kernels of a trained network, and what each answers on a photograph: choose a block and a kernel.
// A <div class="live-kernels"> brings the kernels and their channels along; without a script, and on paper, the picture
// of all kernels is what is seen.
import { build, make, point, range } from "./controls.js"
import { depthwise, halves } from "./network.js"

/** How far a kernel's weights lie from its middle, in positions: the root of the mean square, as the page computes it */
export function reach(kernel) {
  const k = Math.sqrt(kernel.length), half = (k - 1) / 2, squares = kernel.map(weight => weight * weight)
  const far = squares.map((square, n) => square * ((Math.floor(n / k) - half) ** 2 + (n % k - half) ** 2))
  return Math.sqrt(far.reduce((a, b) => a + b) / squares.reduce((a, b) => a + b))
}

/** Every kernel with the channel it is for: half precision as text, for each its bias, its weights and its channel */
export function unpack(text, { k, side, channels }) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), all = halves(new Uint16Array(bytes.buffer))
  const length = 1 + k * k + side * side
  return channels.map((row, block) => row.map((channel, n) => {
    const own = all.subarray((block * row.length + n) * length, (block * row.length + n + 1) * length)
    return { channel, weight: own.slice(1, 1 + k * k), map: own.slice(1 + k * k), bias: own.slice(0, 1) }
  }))
}

export const answers = ({ map, ...kernel }, { k, side }) => depthwise(map, kernel, side, k)

/** Numbers as grey squares, zero in the middle of the scale */
function paint(pen, values, side, tile, left = 0, top = 0) {
  const most = values.reduce((most, v) => Math.max(most, Math.abs(v)), 1e-9)
  values.forEach((value, n) => {
    pen.fillStyle = `rgb(${Array(3).fill(127.5 + 127.5 * value / most)})`
    pen.fillRect(left + n % side * tile, top + Math.floor(n / side) * tile, tile, tile)
  })
}

function frame(pen, ...box) {
  Object.assign(pen, { strokeStyle: "rgb(230, 102, 0)", lineWidth: 3 }).strokeRect(...box)
}

function show(figure) {
  const shape = JSON.parse(figure.dataset.shape), { k, side } = shape, all = unpack(figure.dataset.kernels, shape)
  const photo = figure.querySelector("img"), room = 10 * side, cell = 6, tile = (k + 1) * cell, views = {}
  const overview = make("canvas", { className: "live-pick", width: all[0].length * tile, height: all.length * tile })
  const view = name => {
    views[name] = { pen: make("canvas", { width: room, height: room }).getContext("2d"), words: make("span") }
    return make("div", {}, views[name].pen.canvas, views[name].words)
  }
  const drawing = make("div", { aria: { "aria-hidden": "true" } }, overview, // the sliders and the sentence say it all
    make("div", { className: "live-views" }, ...["photo", "map", "kernel", "answer"].map(view)))
  const draw = ({ block, kernel }) => {
    const chosen = all[block - 1][kernel - 1], found = answers(chosen, shape), pen = overview.getContext("2d")
    pen.clearRect(0, 0, overview.width, overview.height)
    all.forEach((row, y) => row.forEach(({ weight }, x) => paint(pen, weight, k, cell, (x + 0.08) * tile, (y + 0.08) * tile)))
    frame(pen, (kernel - 1) * tile + 1.5, (block - 1) * tile + 1.5, tile - 3, tile - 3)

    const at = found.reduce((best, v, n) => Math.abs(v) > Math.abs(found[best]) ? n : best, 0), row = Math.floor(at / side), column = at % side
    const window = [(column - (k - 1) / 2) * 10, (row - (k - 1) / 2) * 10, 10 * k, 10 * k], { photo: seen, map, kernel: grid, answer } = views
    seen.pen.imageSmoothingEnabled = false
    seen.pen.drawImage(photo, 0, 0, room, room)
    paint(map.pen, chosen.map, side, 10)
    paint(grid.pen, chosen.weight, k, room / k)
    paint(answer.pen, found, side, 10)
    frame(seen.pen, ...window)
    frame(map.pen, ...window)
    frame(answer.pen, column * 10, row * 10, 10, 10)
    seen.words.textContent = "the photograph"
    map.words.textContent = `channel ${chosen.channel}, as it comes to block ${block}`
    grid.words.textContent = "the kernel"
    answer.words.textContent = "its response"
    return `Channel ${chosen.channel}: the weights lie ${reach(chosen.weight).toFixed(2)} positions from the kernel's middle. Its strongest ` +
      `response is ${found[at].toFixed(1).replace("-", "−")}, in row ${row + 1} from the top, column ${column + 1} from the left.`
  }
  build(figure, { block: 1, kernel: 1 }, [["block", "from the first to the last", range(1, all.length)],
    ["kernel", "the largest first", range(1, all[0].length)]], draw, drawing)
  point(figure, overview, all.length)
}

for (const figure of document.querySelectorAll(".live-kernels")) figure.querySelector("img").decode().then(() => show(figure))

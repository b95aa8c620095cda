// The network in the page. A <figure class="live"> holds stored answers; this turns them into something to play with,
// once asked. Without JavaScript, or if anything fails, the answers stay.
import { make } from "./controls.js"
import { order, shuffled } from "./network.js"
import { sketch } from "./sketch.js"

const here = new URL(".", import.meta.url)
const percent = part => part < 0.01 ? "under 1 %" : part > 0.99 ? "over 99 %" : `${Math.round(100 * part)} %`
const OFFER = "Wake the network (1.2 MB)"

/** Any picture as the network gets it: its middle square, 32 x 32, as bytes (H, W, 4) */
function bytes(picture, size) {
  const canvas = make("canvas", { width: size, height: size }), pen = canvas.getContext("2d", { willReadFrequently: true })
  const w = picture.naturalWidth ?? picture.width, h = picture.naturalHeight ?? picture.height, side = Math.min(w, h)
  if (side > 2 * size) { // halve it until a smooth step is enough: no false patterns
    const half = Math.min(Math.ceil(side / 2), 2048), smaller = make("canvas", { width: half, height: half }) // phones have a limit
    smaller.getContext("2d").drawImage(picture, (w - side) / 2, (h - side) / 2, side, side, 0, 0, half, half)
    return bytes(smaller, size)
  }
  pen.fillStyle = "#fff" // behind what is transparent
  pen.fillRect(0, 0, size, size)
  pen.imageSmoothingQuality = "high"
  pen.drawImage(picture, (w - side) / 2, (h - side) / 2, side, side, 0, 0, size, size)
  return pen.getImageData(0, 0, size, size).data
}

class Live {
  constructor(figure) {
    this.figure = figure
    this.stored = figure.querySelector("ul")
    this.start = make("button", { type: "button", className: "live-start", textContent: OFFER })
    this.progress = make("progress", { hidden: true, aria: { "aria-label": "fetched" } }) // a status would be read out at each step
    this.status = make("p", { className: "live-status", aria: { role: "status" } })
    this.start.onclick = event => { // the second half of a double click cancels nothing
      if (event.detail < 2) this.worker ? this.stop() : this.wake()
    }
    this.file = make("input", { type: "file", accept: "image/*",
      onchange: () => this.file.files[0] && this.own(this.file.files[0]) })
    this.door = make("label", { className: "live-own" }, "or a picture of your own: choose, drop or paste ", this.file)
    this.stored.after(this.start, this.door, this.progress, this.status)
    addEventListener("paste", event => {
      const file = event.clipboardData?.files[0], typing = event.target.matches?.("[type=text], [type=search], textarea")
      if (file && !typing) this.own(file)
    })
    figure.ondragover = event => event.preventDefault()
    figure.ondrop = event => { event.preventDefault(); this.own(event.dataTransfer.files[0]) }
  }

  stop(sentence = "") {
    this.worker?.terminate()
    this.shell?.forEach(part => part.remove())
    this.worker = this.panel = this.wanted = null
    this.file.value = ""
    this.stored.hidden = this.start.hidden = false
    this.progress.hidden = true
    this.status.textContent = sentence
    this.start.textContent = OFFER
  }

  wake() {
    this.worker = new Worker(new URL("worker.js", here), { type: "module" })
    this.worker.onerror = () => this.stop("This browser did not start the network. The stored answers stay.")
    this.worker.onmessage = ({ data }) => this.hear(data)
    this.worker.postMessage({ load: new URL("run/", here).href })
    this.start.textContent = "Cancel"
    this.status.textContent = "fetching …"
    this.progress.removeAttribute("value")
    this.progress.hidden = false
  }

  hear({ have, all, ready, error, id, took, chances, stages }) {
    if (all !== undefined) Object.assign(this.progress, { max: all || 1, value: have })
    else if (ready) {
      try {
        this.open(ready)
      } catch (problem) {
        this.stop(`The network could not be shown: ${problem.message}. The stored answers stay.`)
      }
    } else if (!this.panel) this.stop(`The network could not be fetched: ${error}. The stored answers stay.`)
    else {
      this.thinking = false
      if (id !== this.asked.id) this.send()
      else if (error) {
        this.panel.classList.remove("live-busy")
        this.status.textContent = `No answer: ${error}.`
      } else this.show(took, chances, stages)
    }
  }

  /** Ready: the stored answers become a row of pictures to choose from, and a panel */
  open(shape) {
    Object.assign(this, { shape, stages: null, thinking: false })
    const pictures = [...this.stored.querySelectorAll("img")], name = `live-${Math.random()}`
    this.choices = make("div", { className: "live-choices", aria: { role: "radiogroup", "aria-label": "pictures" } })
    for (const [i, img] of pictures.entries()) {
      const radio = make("input", { type: "radio", name, onchange: () => { this.file.value = ""; this.take(img) }, aria: { "aria-label": img.alt } })
      this.choices.append(make("label", {}, radio, Object.assign(img.cloneNode(), { alt: "" })))
      if (!i) radio.checked = true
    }
    this.canvas = make("canvas", { className: "live-picture", width: 320, height: 320, aria: { role: "img" } })
    this.mix = make("input", { type: "checkbox", onchange: () => this.ask() })
    this.bars = make("ol", { className: "live-bars" })
    this.maps = make("div", { className: "live-maps" })
    this.slider = make("input", { type: "range", min: 0, max: shape.depth, value: shape.depth,
      oninput: () => this.draw(), aria: { "aria-label": "stage of the network" } })
    this.echo = make("b", { aria: { "aria-hidden": "true" } }) // the answer near a drawing; the status is what is read out
    this.stageName = make("span") // an <output> would be read out beside the slider's own text
    this.panel = make("div", { className: "live-panel" },
      make("div", {}, this.canvas, make("label", { className: "live-switch" }, this.mix, " shuffle the patches")),
      make("div", {}, this.bars, make("label", { className: "live-stage" }, this.stageName, this.slider), this.maps))
    this.shell = [this.choices, sketch(this.echo, canvas => { this.file.value = ""; this.own(canvas, "your drawing") }), this.panel]
    this.door.before(this.choices)
    this.door.after(...this.shell.slice(1))
    if (document.activeElement === this.start) this.choices.querySelector("input").focus()
    this.stored.hidden = this.start.hidden = this.progress.hidden = true
    const wanted = this.wanted
    this.take(pictures[0])
    if (wanted) this.own(wanted)
  }

  take(img) {
    Object.assign(this, { wanted: img, name: img.alt, given: bytes(img, this.shape.size), mine: false })
    this.ask()
  }

  /** A picture that somebody gives: one that comes first wakes the network and waits for it */
  async own(file, name = "your picture") {
    this.wanted = file
    try {
      const picture = await createImageBitmap(file)
      if (this.wanted !== file) return // another one was chosen meanwhile
      if (!this.panel) return this.worker || this.wake()
      this.choices.querySelectorAll("input").forEach(radio => { radio.checked = false })
      Object.assign(this, { name, given: bytes(picture, this.shape.size), mine: true })
      picture.close()
      this.ask()
    } catch {
      if (this.wanted !== file) return
      this.wanted = null
      this.status.textContent = "That file is no picture this browser can read."
    }
  }

  ask() {
    const { size, p } = this.shape, count = (size / p) ** 2
    const pixels = this.mix.checked ? shuffled(this.given, size, p, order(count)) : Uint8ClampedArray.from(this.given)
    const small = make("canvas", { width: size, height: size }), pen = this.canvas.getContext("2d"), step = this.canvas.width * p / size
    small.getContext("2d").putImageData(new ImageData(pixels, size), 0, 0)
    pen.imageSmoothingEnabled = false
    pen.drawImage(small, 0, 0, this.canvas.width, this.canvas.height)
    pen.fillStyle = "#fff6"
    for (let i = 1; i < size / p; i++) {
      pen.fillRect(i * step, 0, 1, this.canvas.height)
      pen.fillRect(0, i * step, this.canvas.width, 1)
    }
    this.canvas.setAttribute("aria-label", `${this.name}, ${size} by ${size} pixels, in patches of ${p}`)
    this.panel.classList.add("live-busy")
    this.asked = { id: (this.asked?.id ?? 0) + 1, pixels }
    if (!this.thinking) this.send()
  }

  /** The newest question, one at a time: none waits behind those that nobody wants answered any more */
  send() {
    this.thinking = true
    this.worker.postMessage(this.asked)
  }

  show(took, chances, stages) {
    this.panel.classList.remove("live-busy")
    this.stages = stages
    const best = chances.map((chance, i) => [chance, this.shape.classes[i]]).sort((a, b) => b[0] - a[0]).slice(0, 3)
    this.bars.replaceChildren(...best.map(([chance, name]) => {
      const bar = make("li", {}, make("span", { textContent: name }), make("span", { textContent: percent(chance) }))
      bar.style.setProperty("--part", chance)
      return bar
    }))
    const [chance, name] = best[0]
    const doubt = this.mine && chance < 0.5 ? " It knows ten words. This may be none of them." : ""
    this.status.textContent = `${this.name}: ${name}, ${percent(chance)}.${doubt} Live, ${Math.round(took)} ms.`
    this.echo.textContent = `${name}, ${percent(chance)}`
    this.draw()
  }

  draw() {
    const stage = +this.slider.value, side = this.shape.size / this.shape.p
    this.stageName.textContent = stage ? `block ${stage} of ${this.shape.depth}` : "patches"
    this.slider.setAttribute("aria-valuetext", this.stageName.textContent)
    this.maps.replaceChildren(...(this.stages?.[stage] ?? []).map(({ channel, grey }) => {
      const canvas = make("canvas", { width: side, height: side, aria: { role: "img", "aria-label": `channel ${channel}` } })
      const image = new ImageData(side, side)
      grey.forEach((v, i) => image.data.set([v, v, v, 255], 4 * i))
      canvas.getContext("2d").putImageData(image, 0, 0)
      return canvas
    }))
  }
}

for (const figure of document.querySelectorAll(".live")) new Live(figure)

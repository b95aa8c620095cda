// The network at work beside the page: {load: folder} fetches it, {id, pixels} asks it.
import { answer, network, softmax } from "./network.js"

let net = null

/** Six channel maps of a stage, those that differ most between places, as grey bytes */
function maps(x, places) {
  const all = []
  for (let c = 0; c < x.length / places; c++) {
    const map = x.subarray(c * places, (c + 1) * places), mean = map.reduce((a, b) => a + b, 0) / places
    all.push({ c, map, spread: map.reduce((sum, v) => sum + (v - mean) ** 2, 0) })
  }
  return all.sort((a, b) => b.spread - a.spread).slice(0, 6).map(({ c, map }) => {
    const low = Math.min(...map), high = Math.max(...map)
    return { channel: c, grey: Uint8ClampedArray.from(map, v => 255 * (v - low) / (high - low || 1)) }
  })
}

async function load(folder) {
  const file = async name => {
    const found = await fetch(folder + name)
    if (!found.ok) throw new Error(`${name} is not there (${found.status})`)
    return found
  }
  const run = await (await file("config.json")).json(), weights = await file("model.safetensors")
  const all = +weights.headers.get("content-length") || 0, pieces = []
  let have = 0
  for (const reader = weights.body.getReader(); ;) {
    const { done, value } = await reader.read()
    if (done) break
    pieces.push(value)
    have += value.length
    postMessage({ have, all: Math.max(all, have) })
  }
  net = network(run, await new Blob(pieces).arrayBuffer())
}

onmessage = async ({ data }) => {
  try {
    if (data.load) {
      await load(data.load)
      postMessage({ ready: { classes: net.classes, size: net.size, p: net.p, depth: net.depth } })
      return
    }
    const stages = [], started = performance.now(), side = net.size / net.p
    const logits = answer(net, data.pixels, (i, x) => stages.push(x.slice()))
    const took = performance.now() - started
    postMessage({ id: data.id, took, chances: softmax(logits), stages: stages.map(x => maps(x, side * side)) })
  } catch (error) {
    postMessage({ id: data.id, error: error.message })
  }
}

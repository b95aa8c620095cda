// The forward pass of a ConvMixer, on plain arrays: no library, no GPU. Runs in a page, in a worker and in node.
// Activations lie channel after channel, (h, s*s) with s positions along a side, as in PyTorch.

/** float16 bits to numbers */
export function halves(bits) {
  const table = new Float32Array(65536)
  for (let i = 0; i < 65536; i++) {
    const sign = i >> 15 ? -1 : 1, exponent = (i >> 10) & 31, fraction = i & 1023
    table[i] = sign * (exponent === 31 ? (fraction ? NaN : Infinity)
      : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024))
  }
  return Float32Array.from(bits, b => table[b])
}

/** A file of safetensors: names to numbers */
export function tensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true)), start = 8 + length
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)))
  delete header.__metadata__
  return Object.fromEntries(Object.entries(header).filter(([, t]) => t.dtype === "F16").map(([name, t]) =>
    [name, halves(new Uint16Array(buffer.slice(start + t.data_offsets[0], start + t.data_offsets[1])))]))
}

/** The network of a run: its config.json and the buffer of its model.safetensors */
export function network(run, buffer) {
  const t = tensors(buffer), { dim, depth, kernel_size: k, patch_size: p } = run.config
  const unit = (convolution, norm) => {
    const scale = t[norm + ".weight"].map((w, i) => w / Math.sqrt(t[norm + ".running_var"][i] + 1e-5))
    return { weight: t[convolution + ".weight"], bias: t[convolution + ".bias"], scale,
      shift: t[norm + ".bias"].map((b, i) => b - t[norm + ".running_mean"][i] * scale[i]) }
  }
  const blocks = Array.from({ length: depth }, (_, d) =>
    [unit(`${d + 3}.0.fn.0`, `${d + 3}.0.fn.2`), unit(`${d + 3}.1`, `${d + 3}.3`)])
  return { dim, depth, k, p, size: run.image_size[0], channels: run.channels, classes: run.classes, mean: run.mean,
    std: run.std, patch: unit("0", "2"), blocks, head: { weight: t[`${depth + 5}.weight`], bias: t[`${depth + 5}.bias`] } }
}

const STEP = 1 / 512, REACH = 8 // of the table: beyond it GELU is 0 or the number itself
const GELU = new Float32Array(2 * REACH / STEP + 2)
for (let i = 0; i < GELU.length; i++) {
  const x = i * STEP - REACH, z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z)
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
  const erf = 1 - tail * Math.exp(-z * z) // Abramowitz and Stegun 7.1.26: 1.5e-7
  GELU[i] = x * 0.5 * (1 + Math.sign(x) * erf)
}

/** GELU, then BatchNorm as a factor and a summand of each channel, in place */
function settle(x, { scale, shift }, places) {
  for (let c = 0, i = 0; c < scale.length; c++) {
    for (const end = i + places; i < end; i++) {
      let v = x[i]
      if (v <= -REACH) v = 0
      else if (v < REACH) {
        const at = (v + REACH) / STEP, low = at | 0
        v = GELU[low] + (at - low) * (GELU[low + 1] - GELU[low])
      }
      x[i] = v * scale[c] + shift[c]
    }
  }
}

/** 1 x 1 convolution: (n, places) from (c, places), four outputs at four places at a time */
function pointwise(x, { weight, bias }, places) {
  const n = bias.length, c = weight.length / n, out = new Float32Array(n * places)
  for (let o = 0; o < n; o += 4) {
    const [w0, w1, w2, w3] = [0, 1, 2, 3].map(i => weight.subarray((o + i) * c, (o + i + 1) * c))
    for (let p = 0; p < places; p += 4) {
      let a0 = bias[o], a1 = a0, a2 = a0, a3 = a0, b0 = bias[o + 1], b1 = b0, b2 = b0, b3 = b0
      let c0 = bias[o + 2], c1 = c0, c2 = c0, c3 = c0, d0 = bias[o + 3], d1 = d0, d2 = d0, d3 = d0
      for (let i = 0, at = p; i < c; i++, at += places) {
        const x0 = x[at], x1 = x[at + 1], x2 = x[at + 2], x3 = x[at + 3]
        let w = w0[i]
        a0 += w * x0; a1 += w * x1; a2 += w * x2; a3 += w * x3
        w = w1[i]
        b0 += w * x0; b1 += w * x1; b2 += w * x2; b3 += w * x3
        w = w2[i]
        c0 += w * x0; c1 += w * x1; c2 += w * x2; c3 += w * x3
        w = w3[i]
        d0 += w * x0; d1 += w * x1; d2 += w * x2; d3 += w * x3
      }
      const y = o * places + p
      out.set([a0, a1, a2, a3], y); out.set([b0, b1, b2, b3], y + places)
      out.set([c0, c1, c2, c3], y + 2 * places); out.set([d0, d1, d2, d3], y + 3 * places)
    }
  }
  return out
}

/** k x k convolution of each channel by itself, zeros around */
export function depthwise(x, { weight, bias }, side, k) {
  const out = new Float32Array(x.length), wide = side + k - 1, before = (k - 1) >> 1
  const padded = new Float32Array(wide * wide)
  for (let c = 0; c < bias.length; c++) {
    const plane = c * side * side
    for (let y = 0; y < side; y++)
      padded.set(x.subarray(plane + y * side, plane + (y + 1) * side), (y + before) * wide + before)
    const taps = weight.subarray(c * k * k, (c + 1) * k * k)
    for (let y = 0; y < side; y++)
      for (let z = 0; z < side; z++) {
        let sum = bias[c]
        for (let i = 0, t = 0; i < k; i++)
          for (let j = 0, at = (y + i) * wide + z; j < k; j++) sum += taps[t++] * padded[at++]
        out[plane + y * side + z] = sum
      }
  }
  return out
}

/** The patches of an image (c, H, W) as columns: (c*p*p, places) */
function columns(image, channels, size, p) {
  const side = size / p, out = new Float32Array(image.length)
  for (let c = 0, row = 0; c < channels; c++)
    for (let i = 0; i < p; i++)
      for (let j = 0; j < p; j++, row++)
        for (let y = 0; y < side; y++)
          for (let z = 0; z < side; z++)
            out[row * side * side + y * side + z] = image[c * size * size + (y * p + i) * size + z * p + j]
  return out
}

/** Bytes (H, W, 4), as a canvas has them, to logits; `see(stage, activations)` is shown every stage, 0 the patches */
export function answer(net, pixels, see = () => {}) {
  const { size, channels, k, p } = net, side = size / p, places = side * side
  const image = new Float32Array(channels * size * size)
  for (let c = 0, i = 0; c < channels; c++)
    for (let at = c; at < 4 * size * size; at += 4) image[i++] = (pixels[at] / 255 - net.mean[c]) / net.std[c]
  let x = pointwise(columns(image, channels, size, p), net.patch, places)
  settle(x, net.patch, places)
  see(0, x)
  net.blocks.forEach(([deep, point], d) => {
    const mixed = depthwise(x, deep, side, k)
    settle(mixed, deep, places)
    for (let i = 0; i < x.length; i++) mixed[i] += x[i]
    x = pointwise(mixed, point, places)
    settle(x, point, places)
    see(d + 1, x)
  })
  const mean = Float32Array.from({ length: net.dim }, (_, c) =>
    x.subarray(c * places, (c + 1) * places).reduce((a, b) => a + b, 0) / places)
  return Array.from(net.head.bias, (bias, n) =>
    mean.reduce((sum, m, c) => sum + m * net.head.weight[n * net.dim + c], bias))
}

/** Logits to probabilities */
export function softmax(logits) {
  const most = Math.max(...logits), parts = logits.map(l => Math.exp(l - most)), all = parts.reduce((a, b) => a + b)
  return parts.map(p => p / all)
}

/** The same order of the patches for every image: `order[i]` is the patch that comes to place i */
export function order(count, seed = 1) {
  const all = Array.from({ length: count }, (_, i) => i)
  for (let i = count - 1; i > 0; i--) { // Fisher and Yates, with Lehmer's generator
    seed = seed * 48271 % 2147483647
    const j = seed % (i + 1)
    ;[all[i], all[j]] = [all[j], all[i]]
  }
  return all
}

/** Bytes (H, W, 4) with their patches in this order */
export function shuffled(pixels, size, p, order) {
  const out = new Uint8ClampedArray(pixels.length), side = size / p
  order.forEach((from, to) => {
    for (let i = 0; i < p; i++) {
      const source = ((Math.floor(from / side) * p + i) * size + from % side * p) * 4
      out.set(pixels.subarray(source, source + 4 * p), ((Math.floor(to / side) * p + i) * size + to % side * p) * 4)
    }
  })
  return out
}

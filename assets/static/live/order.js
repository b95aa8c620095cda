// Put the changes in the order of what they cost, then compare: with the paper, and with our runs.
// A <figure class="live-order"> brings the numbers along; without a script its table is there as ever.
import { make } from "./controls.js"

/** How many pairs of `names` stand in the order of falling `value`, and how many pairs there are; equal ones count as right */
export function agreement(names, value) {
  let right = 0, all = 0
  names.forEach((a, i) => names.slice(i + 1).forEach(b => {
    all += 1
    right += value[a] >= value[b]
  }))
  return [right, all]
}

const points = value => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`

function show(figure) {
  const rows = JSON.parse(figure.dataset.rows), list = make("ol"), said = make("p"), least = Math.max(...rows.map(row => Math.abs(row.ours)), 1)
  said.setAttribute("role", "status")
  const move = (item, step) => {
    const other = step < 0 ? item.previousElementSibling : item.nextElementSibling
    if (other) step < 0 ? other.before(item) : other.after(item)
    said.textContent = `${item.dataset.name}: now number ${[...list.children].indexOf(item) + 1} of ${rows.length}.`
  }
  for (const { name } of [...rows].sort((a, b) => a.name < b.name ? -1 : 1)) { // by name: no hint
    const item = make("li", {}, make("span", { textContent: name }))
    item.dataset.name = name
    for (const [step, sign, words] of [[-1, "↑", "costs more than the one above"], [1, "↓", "costs less than the one below"]]) {
      const button = make("button", { type: "button", textContent: sign, onclick: () => { move(item, step); button.focus() } })
      button.setAttribute("aria-label", `${name}: ${words}`)
      item.append(button)
    }
    list.append(item)
  }
  const compare = make("button", { type: "button", className: "live-start", textContent: "Compare", onclick: () => {
    const names = [...list.children].map(item => item.dataset.name), by = key => Object.fromEntries(rows.map(row => [row.name, -row[key]]))
    const [paper, all] = agreement(names, by("paper")), [ours] = agreement(names, by("ours"))
    for (const item of list.children) {
      const row = rows.find(row => row.name === item.dataset.name), bar = make("i")
      bar.style.setProperty("--part", Math.abs(row.ours) / least)
      bar.className = row.ours < 0 ? "live-less" : "live-more"
      item.querySelector("small")?.remove()
      item.append(make("small", {}, `paper ${points(row.paper)}, ours ${points(row.ours)} `, bar))
    }
    said.textContent = `Of ${all} pairs, ${paper} stand in the paper's order and ${ours} in that of our runs.`
  } })
  figure.prepend(list, compare, said)
  figure.querySelector(".live-fallback").hidden = true
}

for (const figure of document.querySelectorAll("figure.live-order")) show(figure)

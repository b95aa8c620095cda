// How the book is searched: chapters stand above the API's pages, and a result shows a sentence of
// the page's text. Sphinx reads this file before its own searchtools.js, which takes `Scorer` from here.
var Scorer = {
  score: ([page, title, anchor, description, score]) => /(^|\/)api(\/|$)/.test(page) ? score - 100 : score,
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
}

document.addEventListener("DOMContentLoaded", () => {
  const ignored = ".headerlink, script, style, svg, details, form, h1, .cell_input, .live, .exported, .cost"
  Search.htmlToText = (text, anchor) => {
    const page = new DOMParser().parseFromString(text, "text/html")
    page.querySelectorAll(ignored).forEach(part => part.remove())
    const article = page.querySelector("article.bd-article")
    const at = anchor ? article?.querySelector(`#${CSS.escape(anchor.slice(1))}`) : null
    const found = at?.matches("dt") ? at.parentElement.querySelector(`#${CSS.escape(at.id)} ~ dd`) : at || article // of a term, what it means
    return found ? found.textContent.replace(/\s+/g, " ").trim() : ""
  }
  Search.makeSearchSummary = (page, words, anchor) => {
    const text = Search.htmlToText(page, anchor), low = text.toLowerCase()
    const at = Math.max(0, [...words].map(word => low.indexOf(word.toLowerCase())).find(place => place >= 0) ?? 0)
    const start = Math.max(text.lastIndexOf(". ", at) + 1, at - 160, 0), end = text.indexOf(". ", at + 40)
    const summary = document.createElement("p")
    summary.className = "context"
    summary.textContent = text.slice(start, end < 0 ? start + 240 : Math.min(end + 1, start + 240)).trim()
    return text && summary
  }
})

// What Sphinx's search makes of a match. A module's page comes after every chapter.
var Scorer = {
  score: ([page, , , , score]) => page.startsWith("nbs/api") ? score - 1000 : score,
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
}

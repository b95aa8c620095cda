"""Every symbol and term is explained on the page of the story that first uses it; as a program, this prints where."""

import re
from pathlib import Path

import prose
import pytest
import yaml
from conftest import ROOT

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
STORY = [Path(chapter["file"]).name for part in TOC["parts"][:3] for chapter in part["chapters"]]
NOTATION = (ROOT / "nbs" / "notation.md").read_text("utf8")
SYMBOLS = {symbol: (meaning, page) for symbols, meaning, page in re.findall(
    r"^\| ([\w, ]+) \| ((?:`\w+`)? ?\| .+?) \| \[[^]]+\]\((\w+)\.ipynb\) \|", NOTATION, re.M)
    for symbol in symbols.split(", ")}
TERMS = dict(re.findall(r"^([\w ]+)\n  (.+)", NOTATION.partition(":::{glossary}")[2], re.M))


def plain(markdown):
    """Return the prose of a cell as a reader sees it, formulas included."""
    markdown = re.sub(r"```.*?```|`[^`\n]+`|<[^>]*>", " ", markdown, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", markdown)


def first_use(pattern):
    """Return (page, cell) where the story first uses a word, or None."""
    for page in STORY:
        for cell in prose.cells(ROOT / "nbs" / f"{page}.ipynb", "markdown"):
            if re.search(pattern, plain(cell)):
                return page, cell


def word(term):
    """Return a pattern for a term: in the plural and at the start of a sentence too, not as a part of a longer term."""
    longer = [other for other in TERMS if term in other and term != other]
    before = "".join(f"(?<!{other.partition(term)[0]})" for other in longer if not other.startswith(term))
    after = "".join(f"(?!{other.removeprefix(term)})" for other in longer if other.startswith(term))
    return rf"(?<![\w-]){before}(?i:{term[0]}){term[1:].replace(' ', '[ -]')}{after}(s|es)?(?![\w-])"


def explains(page, term):
    """Return how a page explains a term: in italics or bold, or by a link to its entry or to the entry's chapter."""
    text = "\n\n".join(prose.cells(ROOT / "nbs" / f"{page}.ipynb", "markdown"))
    if any(re.search(word(term), span) for _, span in re.findall(r"(\*{1,2})(?=\S)([^*\n]+)(?<=\S)\1(?!\*)", text)):
        return "in italics"
    targets = [f"notation.md#term-{term.replace(' ', '-')}", *re.findall(r"\]\((\w+\.ipynb)\)", TERMS[term])]
    for shown, target in re.findall(r"\[([^]]+)\]\(([^)]+)\)", text):
        if target in targets and re.search(word(term), shown):
            return f"by a link to {target}"


def symbol(letter):
    """Return a pattern for a letter that stands alone and is neither a unit nor a part of a name."""
    return rf"(?<![\w'’.§-])(?<!\d )(?<!App )(?<!App\. ){letter}(?![\w'’-])(?!\. [A-Z])"


def beside(letter, cell):
    """Return the words of a symbol's name and meaning that stand in a cell too."""
    hints = {hint.rstrip("s") for hint in re.findall(r"[a-z]{5,}", SYMBOLS[letter][0])}
    return sorted(hint for hint in hints if hint in plain(cell).lower())


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_explained_where_the_story_first_uses_it(term):
    used = first_use(word(term))
    assert used is None or explains(used[0], term), f"{term} is new in {used[0]}: set it in italics or link its entry"


@pytest.mark.parametrize("letter", SYMBOLS)
def test_a_symbol_is_explained_where_the_story_first_uses_it(letter):
    first, cell = first_use(symbol(letter))
    assert first == SYMBOLS[letter][1], f"{letter} is first used in {first}: mend the table of symbols, or the page"
    assert beside(letter, cell), f"{letter} stands in {first} without a word on what it is"


if __name__ == "__main__":
    for name in SYMBOLS:
        page, cell = first_use(symbol(name))
        print(f"{name:26} first used in {page:18} beside {', '.join(beside(name, cell))}")
    for name in TERMS:
        page, _ = first_use(word(name)) or (None, None)
        print(f"{name:26} " + (f"first used in {page:18} {explains(page, name)}" if page else "not in the story"))

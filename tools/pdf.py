"""Print the book's story, the paper and its appendix, from the built pages into one file: python tools/pdf.py [FILE.pdf]

The pages are put into one, in the order of _toc.yml, so that a link from one to another stays within the file. Needs Chromium.
"""

import contextlib
import sys
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import yaml
from browser import chromium, visit
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
STORY = HTML / "convmixer-edu.pdf"  # beside the pages: nbs/references.md leads there
PARTS = 3  # of the book: the start, the paper, its appendix
USELESS = "script, form, .headerlink, .exported, figure.live, .live, .tag_cost, button, details.fold, .tag_check"
STYLE = """<style>html { font-size: 12px } body { display: block } .page { break-before: page } .page h1 { margin-top: 0 }
  figure, table, pre, div.cell_output { break-inside: avoid } nav li { list-style: none } section { max-width: none !important }
  div.cell { overflow: visible } div.cell pre { white-space: pre-wrap } details > summary { break-after: avoid }</style>"""


def chapter(page, inside, base):
    """Return a page's article as text: ids that name the page, links that stay inside where they can."""
    soup = BeautifulSoup((HTML / f"{page}.html").read_text("utf8"), "html.parser")
    article = soup.select_one("article.bd-article")
    for part in article.select(USELESS):
        part.decompose()
    for cell in article.select("div.cell"):
        if not cell.get_text(strip=True) and not cell.select("img, svg"):
            cell.decompose()  # its code was folded, nothing came out
    for part in article.select("details"):
        part["open"] = ""
    for part in article.select("[id]"):
        if not part.find_parent("svg"):  # which ask for theirs by name
            part["id"] = f"{page}--{part['id']}"
    for link in article.select("a[href]"):
        address, anchor = urldefrag(urljoin(f"{base}{page}.html", link["href"]))
        target = address.removeprefix(base).removesuffix(".html")
        link["href"] = f"#{target}{'--' * bool(anchor)}{anchor}" if target in inside else f"{address}{'#' * bool(anchor)}{anchor}"
    return f'<article class="bd-article page" id="{page}">{article.decode_contents()}</article>'


@contextlib.contextmanager
def joined():
    """Put the pages into one, where what they name is found; yield its path and the chapters' titles."""
    toc, about = (yaml.safe_load((ROOT / name).read_text("utf8")) for name in ("_toc.yml", "_config.yml"))
    pages = [chapter["file"] for part in toc["parts"][:PARTS] for chapter in part["chapters"]]
    if missing := [page for page in pages if not (HTML / f"{page}.html").exists()]:
        raise SystemExit(f"{missing[0]} is not in {HTML}: build the book first, with make book")
    base = about["html"]["baseurl"]
    texts = [chapter(page, set(pages), base) for page in pages]
    titles = [BeautifulSoup(text, "html.parser").h1.get_text() for text in texts]
    head = [str(tag) for tag in BeautifulSoup((HTML / f"{pages[1]}.html").read_text("utf8"), "html.parser").select(
        "head link[rel=stylesheet], head script[src*=mathjax], head script:-soup-contains('window.MathJax')")]
    contents = "".join(f'<li><a href="#{page}">{title}</a></li>' for page, title in zip(pages, titles))
    whole = (f'<!DOCTYPE html><html lang="en" data-theme="light" data-content_root="../"><head><meta charset="utf-8"><title>'
             f'{about["title"]}</title>{"".join(head)}{STYLE}</head><body><article class="bd-article"><h1>{about["title"]}</h1>'
             f'<p>{about["author"]}. With all the code, and with what can be touched: <a href="{base}">{base}</a></p><nav><ul>{contents}</ul></nav>'
             f'</article>{"".join(texts)}</body></html>')
    page = HTML / "nbs" / "_story.html"
    page.write_text(whole, "utf8")
    try:
        yield page, titles
    finally:
        page.unlink()


def main():
    out = Path(sys.argv[1] if sys.argv[1:] else STORY).resolve()
    with joined() as (page, titles), chromium() as browser:
        visit(tab := browser.new_page(), page.as_uri())
        tab.pdf(path=out, format="A4", print_background=True, outline=True, tagged=True, display_header_footer=True,
                header_template="<span></span>", margin={"top": "0.7in", "right": "0.4in", "bottom": "0.8in", "left": "0.4in"},
                footer_template='<div style="width:100%;text-align:center;font-size:8px"><span class="pageNumber"></span></div>')
    print(f"{out}: {len(titles)} chapters, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

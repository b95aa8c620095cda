"""What a page of the built book weighs, and how it is found: a page loads only what it uses.

MathJax comes as one file of the parts that the formulas need, icon fonts hold the icons that are drawn,
a lost reader meets a page with a search, and a link that is shared shows the picture of its part of the book.
"""

import re
import shutil
from importlib.metadata import distribution
from pathlib import Path

import yaml
from fontTools import subset

ROOT = Path(__file__).resolve().parent.parent
MATHJAX = ("startup", "core", "input/tex-base", "input/tex/extensions/ams", "output/chtml", "output/chtml/fonts/tex",
           "a11y/assistive-mml")
SCROLL = """MathJax.startup.promise.then(() => document.querySelectorAll("mjx-container[display]").forEach(formula => {
  if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0
}))"""  # a formula wider than a phone is reached by keys
FONTS = "output/chtml/fonts/woff-v2"
USED = {  # part of a script's or style's name -> what stands in a page that uses it
    "sphinx-design": r'class="[^"]*\bsd-', "design-tabs": r'class="sd-tab', "togglebutton": r'class="[^"]*\b(toggle|dropdown)\b',
    "clipboard": r'class="highlight', "copybutton": r'class="highlight', "live/live.js": r'class="live"',
    "mathjax": r'class="math', "MathJax": r'class="math', "live/sliders": r'class="live-(anatomy|knife|attention|poke)', "live/order": r'class="live-order',
    "live/draws": r'class="live-draws', "live/kernels": r'class="live-kernels', "live/exercise": r'class="exercise',
    "live/live.css": r'class="(live|exercise)',
}
RULE = r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\(\w+)"\}'  # of Font Awesome's style sheet: names of an icon, its letter
LOST = """<section><h1>There is no such page</h1>
<p>It may have been renamed. Search the book, or go to <a href="nbs/index.html">its first page</a>.</p>
<form action="search.html" method="get" role="search">
<input type="search" name="q" class="form-control" aria-label="Search the book" placeholder="Search the book" />
</form></section>"""


def parts():
    """Return {page: the part of the book that it stands in}, as _toc.yml has them."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    return {chapter["file"]: part["caption"] for part in toc["parts"] for chapter in part["chapters"]}


def picture(page):
    """Return the name of the picture that others show beside a link to a page: one for each part."""
    part = re.sub(r"\W+", "-", parts().get(page, "").lower())
    return f"share-{part}.png" if part else "share.png"


def copy_mathjax(app):
    """Put MathJax beside the pages: as a wheel carries it, without its menu."""
    if app.builder.format != "html":
        return
    home = Path(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax"))
    target = Path(app.outdir) / "mathjax"
    shutil.copytree(home / FONTS, target / FONTS, dirs_exist_ok=True)
    text = "\n".join((home / f"{part}.js").read_text("utf8") for part in MATHJAX)
    (target / "mathjax.js").write_text(f"{text}\n{SCROLL}", "utf8")


def fit_page(app, pagename, templatename, context, doctree):
    """Leave scripts and styles out of a page that has nothing for them to do; tell a lost page where the book begins."""
    def wanted(file):
        name = str(file.filename or file.attributes.get("body", ""))
        return all(re.search(mark, context.get("body", "")) for part, mark in USED.items() if part in name)

    for kind in ("css_files", "script_files"):
        context[kind] = [file for file in context[kind] if wanted(file)]
    if pagename == "404":  # a server shows it at any address
        base = re.sub(r"^https?://[^/]+", "", app.config.html_baseurl)
        context["metatags"] = f'{context.get("metatags", "")}<base href="{base}" />'


def lost_page(app):
    """The page that a server answers with where there is none."""
    return [("404", {"title": "There is no such page", "body": LOST}, "page.html")]


def shrink_icons(app, error):
    """Take out of the icon fonts what no page draws: some forty of two thousand icons stay."""
    static = Path(app.outdir) / "_static"
    style = static / "styles" / "pydata-sphinx-theme.css"
    if error or app.builder.format != "html" or ".woff2" not in (css := style.read_text("utf8")):
        return
    text = "".join(path.read_text("utf8") for path in [*Path(app.outdir).rglob("*.html"), *static.glob("scripts/*theme.js")])
    names = set(re.findall(r"\bfa-([\w-]+)", text))
    letters = [letter for rule, letter in re.findall(RULE, css) if names & set(re.findall(r"fa-([\w-]+):", rule))]
    own = re.sub(RULE, "", css) + (static / "styles" / "sphinx-book-theme.css").read_text("utf8")
    letters += re.findall(r'"\\([ef]\w{3})"', own)
    for font in static.glob("vendor/fontawesome/webfonts/*.ttf"):
        subset.main([str(font), f"--unicodes={','.join(letters)}", f"--output-file={font}.part", "--ignore-missing-unicodes"])
        Path(f"{font}.part").replace(font)
        font.with_suffix(".woff2").unlink()
    style.write_text(re.sub(r'url\([^)]*\.woff2\) format\("woff2"\),', "", css), "utf8")


def add_citation(app, docname, source):
    """Put what CITATION.cff says, as BibTeX, where a page asks for it, and the address of the story in one file."""
    if "{citation}" in source[0]:
        about = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
        fields = {"title": about["title"], "author": " and ".join(f"{{{author['name']}}}" for author in about["authors"]),
                  "version": about["version"], "url": about["url"]}
        lines = "".join(f"  {name:7} = {{{value}}},\n" for name, value in fields.items())
        source[0] = source[0].replace("{citation}", f"@software{{convmixer_edu,\n{lines}}}")
        source[0] = source[0].replace("{story}", f"{app.config.html_baseurl}convmixer-edu.pdf")  # tools/pdf.py puts it there


def setup(app):
    """Connect the above to Sphinx."""
    app.connect("builder-inited", copy_mathjax)
    app.connect("source-read", add_citation)
    app.connect("html-collect-pages", lost_page)
    app.connect("html-page-context", fit_page, priority=950)
    app.connect("build-finished", shrink_icons, priority=900)
    return {"parallel_read_safe": True, "version": "1"}

"""The built book: no warning, no traceback, no outside request, every figure described."""

import dataclasses
import functools
import gzip
import http.server
import inspect
import itertools
import json
import re
import subprocess
import sys
import threading
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
import prose
from browser import browser_page, find_browser
from bs4 import BeautifulSoup
from conftest import HOUR, ROOT, environment, real_data
from first_cell import reference
from nbdev.config import get_config
from nbdev_reader import POLICY
from PIL import Image

from convmixer_edu.anatomy import count_macs
from convmixer_edu.claims import claims
from convmixer_edu.model import ConvMixer
from convmixer_edu.recipe import Config

HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
MODULES = sorted(path.stem for path in (ROOT / "convmixer_edu").glob("[!_]*.py"))
CHAPTERS = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
PAGES = CHAPTERS + [f"nbs/api/{module}" for module in MODULES]
NOTEBOOKS = [page for page in PAGES if (ROOT / f"{page}.ipynb").exists()]
every_page = pytest.mark.parametrize("page", PAGES)
every_notebook = pytest.mark.parametrize("page", NOTEBOOKS)


@pytest.fixture(scope="session")
def built():
    """The book, built in full and strictly, with CIFAR-10 where there is one: what it printed."""
    data = {"CONVMIXER_DATA": source} if (source := real_data()) else {}
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [tool, "build", "-W", "-n", "--keep-going", "--all", "."]
    done = subprocess.run(command, cwd=ROOT, env=environment(**data), text=True, timeout=HOUR,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@functools.cache
def soup(page):
    """Return a page of the built book, parsed."""
    return BeautifulSoup((HTML / f"{page}.html").read_text("utf8"), "html.parser")


def test_strict_build_has_no_warning(built):
    # a kernel's own notice on its transport is not about the book
    lines = [line for line in built.split("\n") if "WARNING" in line and "IPKernelApp" not in line]
    assert not lines


@every_page
def test_page_shows_no_failure(built, page):
    article = soup(page).find("article")
    text = article.get_text()
    assert "Traceback (most recent call last)" not in text
    stderr = [node.get_text()[:300] for node in article.select(".output.stderr")]
    assert not stderr, f"written to stderr: {stderr}"
    assert not re.search(r"^#\|", text, re.M), "a directive of nbdev is shown"
    assert not article.select(".error, .problematic, .system-message")
    assert not [p.get_text()[:60] for p in article.find_all("p") if p.get_text().startswith("|")], "a table as text"


@every_page
def test_page_asks_no_other_host(built, page):
    wanted = [tag.get("src") or tag.get("data") or tag.get("poster")
              for tag in soup(page).select("[src], object[data], video[poster]")]
    wanted += [tag["href"] for tag in soup(page).select("link[href]") if "canonical" not in tag.get("rel", [])]
    scripts = "\n".join(tag.get_text() for tag in soup(page).find_all("script"))
    outside = [address for address in wanted if address and urlsplit(address).netloc]
    assert not outside
    assert not re.search(r"(import|fetch|importScripts)\s*\(?\s*[\"'](https?:)?//", scripts)
    (policy,) = soup(page).select("head meta[http-equiv=Content-Security-Policy]")
    assert policy["content"] == POLICY and not policy.find_previous("script"), "the policy comes after a script"
    assert "default-src 'none'" in POLICY and "//" not in POLICY and "*" not in POLICY
    assert "thebe" not in (HTML / f"{page}.html").read_text("utf8")
    leaving = [link for link in soup(page).select("a[href]") if urlsplit(link["href"]).netloc]
    assert not [link["href"] for link in leaving if "noopener" not in link.get("rel", [])]


def test_the_policy_of_a_page_stops_a_request(site, tab):
    """A picture of another host, put into a page, is not asked for: a browser that heeds the policy says so."""
    asked, complaints = tab.open(f"{site}{PAGES[0]}.html")
    assert not complaints
    script = """new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
        new Image().src = "http://127.0.0.1:9/x.png"; setTimeout(done, 5000)})"""
    assert tab.evaluate(script) == "http://127.0.0.1:9/x.png"


@every_page
def test_links_lead_somewhere(built, page):
    here = HTML / f"{page}.html"
    for link in soup(page).select("article a[href]"):
        address, anchor = urldefrag(link["href"])
        if urlsplit(address).scheme:
            continue
        target = (here.parent / unquote(address)).resolve() if address else here
        assert target.exists(), link["href"]
        if anchor and target.suffix == ".html":
            name = target.relative_to(HTML.resolve()).with_suffix("").as_posix() if address else page
            assert soup(name).find(id=unquote(anchor)), link["href"]


@every_page
def test_figures_are_described(built, page):
    article = soup(page).find("article")
    for image in article.find_all("img"):
        assert image.get("alt", "").strip(), f"no alternative text: {image.get('src', '')[:80]}"
        assert "_images/" not in image["alt"], "the alternative text is a file name"
    for figure in article.find_all("svg"):
        inside = figure.find_parent(attrs={"aria-label": True}) or figure
        title = figure.find("title")
        assert (inside.get("aria-label") or (title and title.get_text())
                or figure.find_parent(attrs={"aria-hidden": "true"})), "an inline figure without a description"


@every_notebook
def test_numbers_in_prose_are_computed_or_claims(built, page):
    """A number that a page tells stands in code or output near it, or is a claim of the paper, or has a reason."""
    path, text = ROOT / f"{page}.ipynb", lambda tree: "\n".join(node.get_text(" ") for node in tree.select(".cell_output"))
    outputs = {prose.plain(head.get_text().removesuffix("#")): text(head.parent) for head in soup(page).select("article section > h2")}
    assert not prose.unbound_on(path, {**outputs, None: text(soup(page))})
    assert not [wrong for _, told, _ in prose.sections(path) for piece in told for wrong in prose.wrong_claims(piece)]


def test_every_claim_is_shown_in_its_chapter(built):
    for claim in claims().values():
        page = soup(f"nbs/{claim.chapter}")
        assert page.select(f"a[href='claims.html#{claim.id}']"), f"{claim.id} is not in {claim.chapter}"


def test_sentences_about_the_paper_name_a_claim(built):
    """Each paragraph that says what the paper says leads to a row it can be traced to."""
    bare = [(page, node.get_text()[:80]) for page in NOTEBOOKS for node in soup(page).select("article p")
            if node.get_text().startswith("What the paper says") and not node.select("a.claim")]
    assert not bare


@every_notebook
def test_every_figure_is_numbered_and_says_what_to_see(built, page):
    """Whatever a cell draws stands in a figure with a number and a caption, which is not its alternative text."""
    for drawn in soup(page).select("article .cell_output svg[role=img]"):
        figure = drawn.find_parent("figure")
        assert figure and figure.get("id", "").startswith("fig-"), drawn["aria-label"]
        assert figure.select_one(".caption-number"), figure["id"]
        caption = figure.select_one(".caption-text").get_text()
        assert len(caption) > 20 and caption != drawn["aria-label"], figure["id"]


def test_symbols_are_the_names_in_the_code():
    text = (ROOT / "nbs" / "notation.md").read_text("utf8")
    named = set(re.findall(r"^\| [\w, ]+ \| `(\w+)` \|", text, re.M))
    known = set(inspect.signature(ConvMixer).parameters) | set(inspect.signature(count_macs).parameters)
    known |= {field.name for field in dataclasses.fields(Config)}
    assert len(named) > 6 and named <= known


@every_notebook
def test_colab_button_leads_to_the_notebook(built, page):
    config = get_config(path=ROOT)
    wanted = (f"https://colab.research.google.com/github/{config.user}/{config.repo}"
              f"/blob/{reference(config)}/{page}.ipynb")
    found = {link["href"] for link in soup(page).select(".bd-header-article a[href*='colab.research.google.com']")}
    assert found == {wanted}


def test_the_first_page_opens_the_first_chapter_in_colab(built):
    (link,) = soup(TOC["root"]).select("article a[href*='colab.research.google.com']")
    assert link["href"].endswith(f"/blob/{reference(get_config(path=ROOT))}/{PAGES[1]}.ipynb")


def test_two_steps_lead_from_the_first_page_to_a_trained_network(built):
    """Run in Colab, then Run all; or Read, and there it was trained; or install, then one line."""
    first, start = soup(TOC["root"]), soup(PAGES[1])
    assert first.select(f"article a[href='{Path(PAGES[1]).name}.html']")
    trained = " ".join(output.get_text() for output in start.select(".cell_output"))
    assert re.search(r"\d % of \d+ digits it has never seen, after \d+ s", trained)
    assert re.search(r"^convmixer train --preset \w+ --out \S+$", first.select_one("article pre").get_text(), re.M)


def test_the_first_page_calls_each_page_by_its_title(built):
    """Cards, sidebar and pages agree: one page, one name."""
    cards = {card["href"]: card.get_text() for card in soup(TOC["root"]).select("article section section li > p > a, "
                                                                                "article section section li > a")}
    sidebar = {link["href"]: link.get_text(strip=True) for link in soup(TOC["root"]).select("nav.bd-links a.internal")}
    for page in CHAPTERS[1:]:
        title = soup(page).select_one("article h1").find(string=True, recursive=False)
        assert f"{Path(page).name}.html" in cards, f"write a card for {page} into nbs/index.ipynb"
        assert cards[f"{Path(page).name}.html"] == title, page
        assert sidebar[f"{Path(page).name}.html"] == title, page
    assert len(cards) == len(CHAPTERS) - 1


MARKS = {"mathjax": ".math", "live/exercise": "form.exercise", "live/order": ".live-order", "live/draws": ".live-draws",
         "live/kernels": ".live-kernels", "sphinx-design": "[class*='sd-']",
         "live/sliders": ".live-anatomy, .live-knife, .live-attention, .live-poke", "live/live.js": ".live", "copybutton.js": ".highlight"}


@every_page
def test_a_page_loads_what_it_uses(built, page):
    """A script is there where something on the page needs it, and not elsewhere."""
    text = str(soup(page).head)
    for part, mark in MARKS.items():
        assert (part in text) == bool(soup(page).select_one("article").select(mark)), part


def test_a_shared_link_shows_a_picture_of_its_part(built):
    shown = {part["caption"]: {soup(chapter["file"]).select_one("meta[property='og:image']")["content"]
                               for chapter in part["chapters"]} for part in TOC["parts"]}
    assert all(len(names) == 1 for names in shown.values()) and len(set.union(*shown.values())) == len(shown)
    for (name,) in shown.values():
        picture = HTML / "_static" / Path(name).name
        assert Image.open(picture).size == (1200, 630) and picture.stat().st_size < 100_000


def test_a_page_can_be_mended_by_its_reader(built):
    config = get_config(path=ROOT)
    for page in NOTEBOOKS:
        (link,) = soup(page).select("a.btn-source-edit-button")
        assert link["href"].endswith(f"github.com/{config.user}/{config.repo}/edit/{config.branch}/{page}.ipynb"), link["href"]


def test_the_book_says_how_to_cite_it(built):
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    text = soup("nbs/references").select_one(".highlight-bibtex").get_text()
    assert text.startswith("@software{") and all(about[key] in text for key in ("title", "version", "url"))


@every_page
def test_a_page_tells_others_what_it_is_about(built, page):
    said = {tag.get("property") or tag.get("name"): tag["content"] for tag in soup(page).select("head meta[content]")}
    assert len(said["description"]) > 20 and said["description"] == said["og:description"]
    assert said["og:title"] == soup(page).select_one("article h1").find(string=True, recursive=False)
    assert (HTML / "_static" / Path(said["og:image"]).name).exists()
    assert said["og:url"] in (HTML / "sitemap.xml").read_text("utf8") and said["og:url"].endswith(f"/{page}.html")


@every_notebook
def test_long_code_is_folded_and_says_what_it_is(built, page):
    """Imports, long exported code and drawings are behind a line; no cell of a page is lost by it."""
    shown = [cell for cell in soup(page).select("article div.cell_input") if not cell.find_parent("details")]
    for cell in shown:
        lines = [line for line in cell.get_text().split("\n") if line]
        assert not all(re.match(r"(import|from) |\s|\)", line) for line in lines), lines[0]
    for fold in soup(page).select("article details.fold"):
        label, lines = fold.summary.get_text(), len(fold.pre.get_text().rstrip("\n").split("\n"))
        assert label in {"Imports", "The check"} or label.endswith(f", {lines} line{'s' * (lines > 1)}"), label


@every_notebook
def test_exported_cells_are_marked(built, page):
    text = (ROOT / f"{page}.ipynb").read_text("utf8")
    module = re.search(r"#\|\s*default_exp\s+(\w+)", text)
    marks = soup(page).select("p.exported a[href*='api/']")
    assert bool(marks) == bool(module)
    assert all(mark["href"].endswith(f"api/{module[1]}.html#module-convmixer_edu.{module[1]}") for mark in marks)
    assert all(mark.get_text() == f"convmixer_edu.{module[1]}" for mark in marks)


def test_every_module_has_its_page_and_no_other_is_there(built):
    assert sorted(path.stem for path in (HTML / "nbs" / "api").glob("*.html")) == MODULES
    for module in MODULES:
        assert soup(f"nbs/api/{module}").find(id=f"module-convmixer_edu.{module}")


def test_the_search_puts_chapters_above_the_api(site, tab):
    """Also where the word is the name of a function."""
    for word in ("mixup", "claim"):
        tab.open(f"{site}search.html?q={word}")
        script = """new Promise(done => { const list = document.querySelector("#search-results"), look = () => list.innerText.includes("finished") ?
            done([...list.querySelectorAll("li > a")].map(link => link.getAttribute("href"))) : setTimeout(look, 100); look() })"""
        links = tab.evaluate(script)
        api = [link.startswith("nbs/api") for link in links]
        assert any(api) and api == sorted(api)


@pytest.fixture(scope="module")
def site(built):
    """The book, served on this machine: its address."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *message):
            pass

    handler = functools.partial(Handler, directory=HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(site):
    """A tab of a headless browser."""
    if not find_browser():
        pytest.skip("no Chromium or Chrome is installed: the pages were not opened in a browser")
    with browser_page() as tab:
        yield tab


@every_page
def test_page_in_a_browser(site, tab, page):
    for width, dark in ((1280, False), (1280, True), (390, False)):
        tab.look(width, dark=dark)
        asked, complaints = tab.open(f"{site}{page}.html")
        assert not complaints
        assert not [url for url in asked if not url.startswith((site, "data:", "blob:"))]
        assert tab.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "scrolls sideways"
        assert tab.evaluate("document.querySelectorAll('mjx-merror').length") == 0, "a broken formula"
        formulas = tab.evaluate("document.querySelectorAll('article .math').length")
        assert tab.evaluate("document.querySelectorAll('article mjx-container').length") >= formulas


STORY = [chapter["file"] for part in TOC["parts"][:2] for chapter in part["chapters"]]
STORY += ["nbs/A_comparisons", "nbs/B_ablations", "nbs/B1_scaling", "nbs/C_weights", "nbs/D_implementation"]
SHAPE = """(() => { const page = document.querySelector("article.bd-article"), all = page.cloneNode(true), tall = e => e.getBoundingClientRect()
    all.querySelectorAll("div.cell, script, style, svg").forEach(part => part.remove())
    const code = [...page.querySelectorAll("div.cell_input")].filter(e => e.checkVisibility()).reduce((sum, e) => sum + tall(e).height, 0)
    const first = [...page.querySelectorAll("figure, div.cell_output svg, div.cell_output img")].find(e => tall(e).height > 40)
    return [all.textContent.trim().split(/\\s+/).length, code / page.scrollHeight, tall(first).top + scrollY] })()"""


@pytest.mark.parametrize("page", STORY)
def test_a_page_of_the_story_is_short_and_opens_with_a_picture(site, tab, page):
    tab.look(1280, 800)
    tab.open(f"{site}{page}.html")
    words, code, first = tab.evaluate(SHAPE)
    assert words <= 2500 and code < 0.21 and first < 800


SCROLLS = """[...document.querySelectorAll("div.figure > svg")].filter(part => part.checkVisibility()).filter(part => {
    let frame = part.parentElement
    while (getComputedStyle(frame).overflowX === "visible") frame = frame.parentElement
    return part.getBoundingClientRect().width > frame.clientWidth + 1 }).map(part => part.closest("figure").id)"""


@pytest.mark.parametrize("page", STORY)
def test_a_figure_of_the_story_fits_a_phone(site, tab, page):
    tab.look(360, 740)
    tab.open(f"{site}{page}.html")
    assert not tab.evaluate(SCROLLS)


@every_page
def test_a_page_is_light(site, tab, page):
    """At most 1 MB is transferred for a page, by a server that compresses text, before anything is asked of it."""
    tab.look(1280, 800)
    asked, _ = tab.open(f"{site}{page}.html")
    files = {HTML / unquote(urlsplit(url).path).lstrip("/") for url in asked if url.startswith(site)}
    assert sum(len(gzip.compress(file.read_bytes(), 6)) for file in files) < 1_000_000


def test_the_search_puts_chapters_first_and_shows_a_sentence(site, tab):
    tab.look(1280, 800)
    _, complaints = tab.open(f"{site}search.html?q=depthwise")
    assert not complaints
    found = tab.evaluate("""new Promise(done => { const look = () => {
        const items = [...document.querySelectorAll("ul.search li")]
        items.length > 5 && items.slice(0, 3).every(item => item.querySelector("p.context")) ? done(items.map(item =>
            [item.querySelector("a").href, item.querySelector("p.context")?.textContent])) : setTimeout(look, 100) }; look() })""")
    pages = [Path(urlsplit(address).path).stem for address, _ in found]
    assert "api" not in pages or "api" not in pages[:pages.index("api")] and set(pages[pages.index("api"):]) == {"api"}
    for _, sentence in found[:3]:
        assert len(sentence) > 40 and "Contents" not in sentence and "\n" not in sentence


def test_a_lost_reader_can_search(site, built):
    page = BeautifulSoup((HTML / "404.html").read_text("utf8"), "html.parser")
    assert page.find("base")["href"] == urlsplit(get_config(path=ROOT).doc_host + get_config(path=ROOT).doc_baseurl).path
    assert page.select("article form[action='search.html'] input[name=q]") and page.select("article a[href='nbs/index.html']")


@every_page
def test_no_rule_of_accessibility_is_broken(site, tab, page):
    """axe finds nothing, in either theme; nor where a search has led to a word."""
    rules = files("axe_core_python").joinpath("axe.min.js").read_text("utf8")
    searched = ("", "?highlight=depthwise") if page == "nbs/03_model" else ("",)
    for dark, search in itertools.product((False, True), searched):
        tab.look(1280, dark=dark)
        tab.open(f"{site}{page}.html{search}")
        tab.evaluate(f"{rules}; 1")
        broken = tab.evaluate("axe.run(document, {resultTypes: ['violations']}).then(found => found.violations.map("
                              "rule => `${rule.id}: ${rule.nodes[0].html.slice(0, 200)}`))")
        assert broken == []


TYPE = """(text => { const form = document.querySelectorAll('form.exercise')[NUMBER]
    for (const input of form.querySelectorAll('input'))
      if (input.type === 'radio') input.checked = input.value === text; else input.value = text
    form.querySelector('button').click()
    return [form.dataset.state, form.querySelector('p').textContent] })(TEXT)"""


def test_most_exercises_are_answered_in_the_page(built):
    assert sum(len(soup(page).select("form.exercise")) for page in NOTEBOOKS) > 30  # of seventy; many of the rest are code


@every_notebook
def test_exercises_answer_in_the_page(site, tab, page):
    """Typed or chosen: the right answer, each known mistake and nonsense, with the sentences that the notebook has."""
    forms = [json.loads(form["data-known"]) for form in soup(page).select("form.exercise")]
    if not forms:
        return
    tab.open(f"{site}{page}.html")

    def typed(number, value):
        text = ", ".join(map(str, value)) if isinstance(value, list) else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        return tab.evaluate(TYPE.replace("NUMBER", str(number)).replace("TEXT", json.dumps(text)))

    for number, known in enumerate(forms):
        assert typed(number, known["right"]) == ["right", f"Right. {known['ok']}"]
        for mistake, sentence in known["wrong"]:
            if isinstance(mistake, list) == isinstance(known["right"], list):
                assert typed(number, mistake) == ["wrong", f"Not yet. {sentence}"], (known, mistake)
        state, sentence = typed(number, "§ nothing §")
        chosen = bool(tab.evaluate(f"document.querySelectorAll('form.exercise')[{number}].querySelectorAll('[type=radio]').length"))
        assert chosen == isinstance(known["right"], (str, bool)) or chosen and isinstance(known["right"], list)
        assert state == "wrong" and any(words in sentence for words in (["Choose an answer first."] if chosen else
                                                                        ["could not be read", known["other"]]))
        typed(number, known["right"])
    tab.open(f"{site}{page}.html")  # the last answers are remembered
    assert tab.evaluate("[...document.querySelectorAll('form.exercise')].every(form => form.dataset.state === 'right')")

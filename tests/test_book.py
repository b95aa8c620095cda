"""The built book: no warning, no traceback, no outside request, every figure described."""

import dataclasses
import functools
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
import pdf
import prose
from browser import broken_rules, count_bytes, serve, visit
from bs4 import BeautifulSoup
from conftest import HOUR, ROOT, environment, real_data
from first_cell import reference
from nbdev.config import get_config
from nbdev_reader import POLICY
from PIL import Image
from playwright.sync_api import expect
from record_browser import newcomer
from screens import README, SHOWS
from share_pictures import words

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
HOME = TOC["root"]
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
    visit(tab, f"{site}{HOME}.html")
    with tab.expect_event("requestfailed") as asked:
        tab.evaluate("new Image().src = 'http://127.0.0.1:9/x.png'; 1")
    assert asked.value.url == tab.asked.pop() and asked.value.failure == "csp"
    assert len(tab.complaints) == 1 and "Content Security Policy" in tab.complaints.pop()


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


@every_page
def test_the_sidebar_is_folded_by_part(built, page):
    """Where the page is, it is open, and so are the first two parts; each part of the book has its fold."""
    folds = soup(page).select("nav.bd-links details.part")
    captions = [part["caption"] for part in TOC["parts"]]
    here = [part["caption"] for part in TOC["parts"] for chapter in part["chapters"] if page.startswith(chapter["file"])]
    assert [fold.summary.get_text() for fold in folds] == captions
    assert {fold.summary.get_text() for fold in folds if fold.has_attr("open")} == {*captions[:2], *here}
    assert not soup(page).select("nav.bd-links p.caption")


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
    for name, told in words().items():
        assert Image.open(HTML / "_static" / name).text["shows"] == "\n".join(told), "run python assets/share_pictures.py"


def test_a_page_can_be_mended_by_its_reader(built):
    config = get_config(path=ROOT)
    for page in NOTEBOOKS:
        (link,) = soup(page).select("a.btn-source-edit-button")
        assert link["href"].endswith(f"github.com/{config.user}/{config.repo}/edit/{config.branch}/{page}.ipynb"), link["href"]


def test_the_book_says_how_to_cite_it(built):
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    text = soup("nbs/references").select_one(".highlight-bibtex").get_text()
    assert text.startswith("@software{") and all(about[key] in text for key in ("title", "version", "url"))


FRAMES = """[...document.querySelectorAll("figure, div.cell, div.cell_output, details")].filter(
    frame => !frame.innerText.trim() && ![...frame.querySelectorAll("svg, img")].some(part => part.getBoundingClientRect().height > 9)
    ).map(frame => frame.outerHTML.slice(0, 200))"""


def test_the_story_is_one_file(built, tab, tmp_path):
    """Made of the pages: every chapter's title, no empty frame, no link out of it that could stay within; the references lead to it."""
    with pdf.joined() as (page, titles):
        assert titles == [soup(chapter).select_one("article h1").find(string=True, recursive=False) for chapter in STORY]
        visit(tab, page.as_uri())
        tab.emulate_media(media="print")
        assert tab.evaluate(UNPRINTED) == [] and tab.evaluate(FRAMES) == []
        assert tab.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].filter(link => !document.getElementById("
                            "decodeURIComponent(link.hash.slice(1)))).map(link => link.hash)") == []
    out = tmp_path / "story.pdf"
    subprocess.run([sys.executable, "tools/pdf.py", out], cwd=ROOT, check=True, timeout=HOUR)
    made = out.read_bytes()
    for title in titles:  # in the outline that a reader of the file opens
        assert "({})".format(re.sub(r"([()])", r"\\\1", title)).encode() in made, title
    config = get_config(path=ROOT)
    assert soup("nbs/references").select(f"a[href='{config.doc_host}{config.doc_baseurl}{pdf.STORY.relative_to(HTML)}']")


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


@pytest.fixture(scope="module")
def site(built):
    """The book, served on this machine: its address."""
    with serve(HTML) as address:
        yield address


LOOKS = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "light")}
UNPRINTED = """[...document.querySelectorAll("article details > :not(summary), article div.cell")].filter(
    part => !part.checkVisibility({contentVisibilityAuto: true}) && part.textContent.trim()).map(part => part.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("page", [*PAGES, "nbs/03_model?highlight=depthwise"])  # and where a search has led to a word
def test_page_in_a_browser(site, tab, page, look):
    """Its theme, all its formulas, its width; at most 1 MB, by a server that compresses text; no rule of accessibility is broken; printed whole."""
    page, _, search = page.partition("?")
    width, theme = LOOKS[look]
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=theme)
    visit(tab, f"{site}{page}.html?{search}".rstrip("?"))
    expect(tab.locator("html")).to_have_attribute("data-theme", theme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "scrolls sideways"
    expect(tab.locator("mjx-merror")).to_have_count(0)  # a broken formula
    assert tab.locator("article mjx-container").count() >= tab.locator("article .math").count()
    assert count_bytes(tab, site, HTML) < 1_000_000
    drawer = "{exclude: [['.bd-sidebar-secondary']]}"  # a closed one, on a phone, is no region that scrolls
    assert broken_rules(tab, drawer if look == "phone" else "document") == []
    tab.emulate_media(media="print")
    assert tab.evaluate(UNPRINTED) == []


STORY = [chapter["file"] for part in TOC["parts"][:2] for chapter in part["chapters"]]
STORY += ["nbs/A_comparisons", "nbs/B_ablations", "nbs/B1_scaling", "nbs/C_weights", "nbs/D_implementation"]
SHAPE = """(() => { const page = document.querySelector("article.bd-article"), all = page.cloneNode(true), tall = e => e.getBoundingClientRect()
    all.querySelectorAll("div.cell, script, style, svg").forEach(part => part.remove())
    const code = [...page.querySelectorAll("div.cell_input")].filter(e => e.checkVisibility()).reduce((sum, e) => sum + tall(e).height, 0)
    const first = [...page.querySelectorAll("figure, div.cell_output svg, div.cell_output img")].find(e => tall(e).height > 40)
    return [all.textContent.trim().split(/\\s+/).length, code / page.scrollHeight, tall(first).top + scrollY] })()"""


@pytest.mark.parametrize("page", STORY)
def test_a_page_of_the_story_is_short_and_opens_with_a_picture(site, tab, page):
    visit(tab, f"{site}{page}.html")
    words, code, first = tab.evaluate(SHAPE)
    assert words <= 2500 and code < 0.21 and first < 800


SCROLLS = """[...document.querySelectorAll("div.figure > svg")].filter(part => part.checkVisibility()).filter(part => {
    let frame = part.parentElement
    while (getComputedStyle(frame).overflowX === "visible") frame = frame.parentElement
    return part.getBoundingClientRect().width > frame.clientWidth + 1 }).map(part => part.closest("figure").id)"""


@pytest.mark.parametrize("page", STORY)
def test_a_figure_of_the_story_fits_a_phone(site, tab, page):
    tab.set_viewport_size({"width": 360, "height": 740})
    visit(tab, f"{site}{page}.html")
    assert not tab.evaluate(SCROLLS)


@pytest.mark.parametrize("word", ["depthwise", "mixup", "claim"])  # of prose, and names of functions
def test_the_search_puts_chapters_first_and_shows_a_sentence(site, tab, word):
    tab.goto(f"{site}search.html?q={word}")
    expect(tab.locator("#search-results")).to_contain_text("finished")
    found = tab.locator("ul.search li")
    api = [link.get_attribute("href").startswith("nbs/api") for link in found.locator("> a:first-child").all()]
    assert len(api) > 5 and any(api) and api == sorted(api)
    for place in range(3):
        expect(found.nth(place).locator("p.context").first).to_have_text(re.compile(r"^(?!.*Contents)[^\n]{40,}$"))


def test_the_first_page_answers_without_a_script(browser, site):
    with browser.new_page(java_script_enabled=False) as tab:
        tab.goto(f"{site}{HOME}.html")
        assert tab.locator("figure.live li >> visible=true").count() > 2 and not tab.get_by_role("button", name="Wake").count()


FOCUS = """async () => { const part = document.activeElement
    await Promise.all(document.getAnimations().map(moving => moving.finished))
    const style = getComputedStyle(part), box = part.getBoundingClientRect()
    return part === document.body ? null : { order: [...document.querySelectorAll("*")].indexOf(part), what: part.outerHTML.slice(0, 150),
        name: (part.ariaLabel || part.innerText || part.title || [...part.labels ?? [], ...part.querySelectorAll("title")].map(label => label.textContent).join()).trim(),
        ring: style.outlineStyle !== "none" || style.boxShadow !== "none", seen: box.bottom > 0 && box.top < innerHeight && box.width > 0 } }"""


def test_a_newcomer_needs_one_click(site, tab):
    """From opening the book to an answer about a picture of one's own; how long that takes is recorded."""
    assert newcomer(tab, site)["clicks"] == 1


def test_the_readme_shows_the_first_page(site, tab):
    """Its picture remembers the words that it shows, and they are those of the page."""
    visit(tab, f"{site}{HOME}.html")
    assert Image.open(README).text["shows"] == tab.evaluate(SHOWS), "make book, then python tools/screens.py --readme"
    assert f"]({README.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text("utf8") and README.stat().st_size < 200_000


def test_the_first_page_is_walked_by_keys(site, tab):
    """Tab leads to everything once, in its order, each named, seen and ringed; then the network is used by keys alone."""
    tab.emulate_media(reduced_motion="reduce")
    visit(tab, f"{site}{HOME}.html")
    walk = []
    while tab.keyboard.press("Tab") or (here := tab.evaluate(FOCUS)) and here["order"] not in [step["order"] for step in walk]:
        assert here["name"] and here["ring"] and here["seen"], here
        walk.append(here)
    names = [step["name"] for step in walk]
    assert [step["order"] for step in walk] == sorted(step["order"] for step in walk), names
    assert names[0] == "Skip to main content" and len(walk) > 30
    places = [[name.split()[0] for name in names].index(word) for word in ("Read", "Run", "Install", "Wake")]
    assert places == sorted(places)
    tab.reload()
    for _ in range(places[-1] + 1):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    said = tab.locator(".live-status")
    expect(said).to_contain_text("Live,")
    first = said.text_content()
    tab.keyboard.press("ArrowRight")
    expect(said).not_to_have_text(first)
    expect(tab.locator(".live-choices input").nth(1)).to_be_focused()


def test_a_lost_reader_can_search(site, built):
    page = BeautifulSoup((HTML / "404.html").read_text("utf8"), "html.parser")
    assert page.find("base")["href"] == urlsplit(get_config(path=ROOT).doc_host + get_config(path=ROOT).doc_baseurl).path
    assert f"Sitemap: {get_config(path=ROOT).doc_host}{get_config(path=ROOT).doc_baseurl}sitemap.xml" in (HTML / "robots.txt").read_text("utf8")
    assert page.select("article form[action='search.html'] input[name=q]") and page.select("article a[href='nbs/index.html']")


def test_most_exercises_are_answered_in_the_page(built):
    assert sum(len(soup(page).select("form.exercise")) for page in NOTEBOOKS) > 30  # of seventy; many of the rest are code


@pytest.mark.parametrize("by", ["mouse", "keys"])
@every_notebook
def test_exercises_answer_in_the_page(site, tab, page, by):
    """Nonsense, each known mistake and the right answer, typed or chosen: the sentences that the notebook has."""
    forms = [json.loads(form["data-known"]) for form in soup(page).select("form.exercise")]
    if not forms:
        return

    def typed(value):
        return (", ".join(map(str, value)) if isinstance(value, list) else {True: "yes", False: "no"}[value] if isinstance(value, bool)
                else str(value))

    tab.goto(f"{site}{page}.html")
    for known, form in zip(forms, tab.locator("form.exercise").all(), strict=True):
        right, chosen = known["right"], form.get_by_role("radio").count()
        assert bool(chosen) == isinstance(right[0] if isinstance(right, list) else right, (str, bool)), known
        answers = [(None, f"Not yet. {'Choose an answer first.' if chosen else 'This could not be read: type '}"),
                   *((mistake, f"Not yet. {sentence}") for mistake, sentence in known["wrong"] if isinstance(mistake, list) == isinstance(right, list)),
                   (right, f"Right. {known['ok']}")]
        for value, sentence in answers:
            last = form.get_by_role("button")
            if not chosen:
                last = form.get_by_role("textbox")
                last.fill("§ nothing §" if value is None else typed(value))
            elif value is not None:
                last = form.locator(f"[value={json.dumps(typed(value))}]")
                last.check() if by == "mouse" else last.press("Space")
            form.get_by_role("button").click() if by == "mouse" else last.press("Enter")
            expect(form.get_by_role("status")).to_have_text(re.compile("^" + re.escape(sentence) + ("" if value is None else "$")))
            expect(form).to_have_attribute("data-state", "right" if value == right else "wrong")
    tab.reload()  # the last answers are remembered
    expect(tab.locator("form.exercise:not([data-state=right])")).to_have_count(0)

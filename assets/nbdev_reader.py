"""Show nbdev notebooks as pages: their directives act, but are not printed.

Takes the place of MyST-NB's notebook reader. Besides, it makes the build see what decides a page's
outputs (the package, the recorded results, the data), marks the cells that the package is made of,
and puts a policy into the pages, so that a page asks no other host for anything.
"""

import ast
import contextlib
import hashlib
import html
import inspect
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from book_site import parts, picture
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "convmixer_edu"
DIRECTIVE = re.compile(r"\s*#\s*\|\s*(?P<name>[\w-]+):?\s*(?P<value>.*?)\s*$")
EXPORTS = {"export", "exporti", "exports"}
HIDDEN = {"hide", "default_exp"}
FIGURE = {"label", "fig-cap"}
MARKED = {"exercise": "exercise", "check": "check"}  # directive with any value -> a tag
CLAIM = re.compile(r"\[([^\]]+)\]\(claims\.ipynb#([\w-]+)\)")
TERM = re.compile(r"\[([^\]]+)\]\(notation\.md#(term-[\w-]+)\)")  # MyST knows no anchors of a glossary
TAGS = {  # (directive, value) -> the tag that MyST-NB knows
    ("echo", "false"): "remove-input",
    ("output", "false"): "remove-output",
    ("eval", "false"): "skip-execution",
    ("code-fold", "true"): "fold",
    ("code-fold", "false"): "open",
}
COST = re.compile(r"""\bcost\("\w+"\)$""")  # the cell that tells what a chapter takes
DRAWS = re.compile(r"\b(show|plt\.\w+|subplots)\(")
CELL_MAGIC = re.compile(r"^\s*[%!].*$", re.M)  # what IPython knows and Python does not
LONG = {"code": 15, "drawing": 5}  # lines; longer cells are folded
# Scripts and styles stand inside the pages, pictures too; nothing comes from another host or goes to one.
POLICY = ("default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
          "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; worker-src 'self'; base-uri 'self'; "
          "form-action 'self'")


def fold_part(found):
    """Return a part of the book in the sidebar as a fold: open where the page is, and the first parts everywhere."""
    part, pages = found.groups()
    state = " open" if 'class="current' in pages or html.unescape(part) in [*dict.fromkeys(parts().values())][:2] else ""
    return f'<details class="part"{state}><summary><span role="heading" aria-level="2">{part}</span></summary>{pages}</details>'


MENDED = [(re.compile(pattern, re.S), better) for pattern, better in [
    # a page of others, which a link opens, gets no hold on ours
    (r"""<a(?![^>]*\srel=)([^>]*\shref=["'](?:https?:)?//)""", r'<a rel="noopener"\1'),
    # a script of 1.5 MB that draws icons which a font draws as well
    (r"<(script|link)[^>]*fontawesome\.js[^>]*>(</script>)?\n?", ""),
    # half a hundred links in the sidebar
    (r'<p aria-level="2" class="caption" role="heading"><span class="caption-text">(.*?)</span></p>\s*(<ul.*?</ul>)(?=\s*<p aria-level|\s*</div>)', fold_part),
    # what a screen reader stumbles over: a name that is not what stands there, empty heads, no landmark
    (r'(<button[^>]*search-button-field[^>]*) aria-label="Search"', r"\1"),
    (r'(<th class="head[^"]*">)<p></p></th>', "<td></td>"),
    (r'(<a[^>]*>([^<]*)</a><details[^>]*><summary)(><span class="toctree-toggle)', r'\1 aria-label="Pages under \2"\3'),
    (r' role="doc-(biblioentry|backlink)"', ""),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
    (r'<div class="(sidebar-primary-items__start)', r'<div role="navigation" aria-label="The book" class="\1'),
]]


def read(text, digest="", skip=()):
    """Return the notebook in `text`, its nbdev directives turned into cell tags.

    Cells that call `nbdev_export()` are dropped; a directive that has no meaning here is an error.
    """
    notebook = nbformat.reads(text, as_version=4)
    module, cells, last = None, [], []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            directives, cell.source = split_directives(cell.source)
            module = directives.get("default_exp", module)
            if "nbdev_export()" in cell.source or not cell.source:
                continue
            tags = list(cell.metadata.get("tags", []))
            for name, value in directives.items():
                if name in HIDDEN:
                    tags.append("remove-cell")
                elif name in EXPORTS:
                    tags.append(f"module-{value or module}")
                elif name in skip:
                    tags.append("skip-execution")
                elif name in MARKED:
                    tags.append(MARKED[name])
                elif name in FIGURE:
                    cell.metadata[name] = value
                elif (name, value) in TAGS:
                    tags.append(TAGS[name, value])
                else:
                    raise ValueError(f"unknown directive '#| {name} {value}' in: {cell.source[:60]}")
            if COST.search(cell.source):
                tags += ["remove-input", "cost"]
                last.append(cell)
            elif "check" in tags:
                cell.metadata["fold"] = "The check"
                cell.source = re.sub(r"^#@title.*\n", "", cell.source)  # by which Colab hides it
            elif not {"open", "exercise"} & set(tags) and (kind := folded(cell.source, tags)):
                cell.metadata["fold"] = kind
            if tags:
                cell.metadata["tags"] = tags
            # outputs are cached under the cells and their metadata: name what else decides them
            cell.metadata["digest"] = digest
        else:
            cell.source = CLAIM.sub(claim_link, TERM.sub(r'<a href="notation.html#\2">\1</a>', cell.source))
        cells.append(cell)
    notebook.cells = [cell for cell in cells if cell not in last] + last
    return notebook


def folded(source, tags):
    """Return what to say of a cell whose code is shown when it is asked for, or None: imports, long code, drawing."""
    tree, lines = ast.parse(CELL_MAGIC.sub("", source)).body, source.count("\n") + 1
    count = f"{lines} line{'s' * (lines > 1)}"
    module = next((tag.removeprefix("module-") for tag in tags if tag.startswith("module-")), None)
    if all(isinstance(part, ast.Import | ast.ImportFrom) or ast.unparse(part).startswith("warnings.filterwarnings(")
           for part in tree):
        return "Imports"
    drawing = DRAWS.search(source) and not module
    if "fold" in tags or lines > LONG["drawing" if drawing else "code"]:
        return f"{module}.py, {count}" if module else f"The {'drawing' if drawing else 'code'}, {count}"
    return None


def claim_link(match):
    """Return a link to a claim as HTML that names its source; an unknown claim is an error."""
    from convmixer_edu.claims import claim

    return claim(match[2]).link(match[1])


def split_directives(source):
    """Return ({directive: value}, the source below them)."""
    lines, found = source.split("\n"), {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        found[match["name"]] = match["value"]
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def content_digest():
    """Return a digest of what a page's outputs depend on besides its own text."""
    seen = hashlib.sha256((ROOT / "requirements.lock").read_bytes())
    files = [*(ROOT / PACKAGE).glob("*.py"), *(ROOT / "results").rglob("*")]
    for path in sorted(path for path in files if path.is_file()):
        seen.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    source = data_source()
    seen.update(source.encode())
    if Path(source).is_dir():
        for path in sorted(path for path in Path(source).rglob("*") if path.is_file()):
            seen.update(f"{path}{path.stat().st_size}{path.stat().st_mtime_ns}".encode())
    return seen.hexdigest()


def data_source():
    """Return the data the chapters will use; without CONVMIXER_DATA the package is asked."""
    if "CONVMIXER_DATA" in os.environ:
        return os.environ["CONVMIXER_DATA"]
    from convmixer_edu.data import book_source

    with contextlib.redirect_stdout(sys.stderr):
        return book_source()


def use_reader(app, config):
    """Read notebooks with `read`; a changed digest makes Sphinx read every page again."""
    from nbdev.config import get_config

    # this environment has no widgets on purpose: they would ask another host for their code
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    options = {"digest": content_digest(), "skip": get_config(path=ROOT).tst_flags.split()}
    config.nb_custom_formats = {".ipynb": ("nbdev_reader.read", options, False)}


def write_api(app, config):
    """Write a page for each module, named as CONTRIBUTING.md's table does; a page that says the same stays as it is."""
    table = re.findall(r"^\| (\w+) \| [^|]* \| `(\w+)\.py`: (.+?) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf8"), re.M)
    folder = ROOT / "nbs" / "api"
    folder.mkdir(exist_ok=True)
    for page in folder.glob("*.md"):
        if page.stem not in {module for _, module, _ in table}:
            page.unlink()
    for chapter, module, about in table:
        members = "" if module == "cli" else "   :members:\n"  # its functions are commands: W13 shows them
        text = (f"# {module}\n\nThe module `{PACKAGE}.{module}`: {about}. It is written in [](../{chapter}.ipynb).\n\n"
                f"```{{eval-rst}}\n.. automodule:: {PACKAGE}.{module}\n{members}```\n")
        page = folder / f"{module}.md"
        if not page.exists() or page.read_text("utf8") != text:
            page.write_text(text, "utf8")


class NumberFigures(SphinxTransform):
    """Make the output of a cell with a label and a caption a numbered figure that text can point at."""

    default_priority = 100

    def apply(self):
        for cell in list(self.document.findall(nodes.container)):
            about = cell.get("cell_metadata", {})
            if cell.get("nb_element") != "cell_code" or "label" not in about:
                continue
            (output,) = (part for part in cell.children if part.get("nb_element") == "cell_code_output")
            caption = nodes.caption(about["fig-cap"], about["fig-cap"])
            figure = nodes.figure("", output.deepcopy(), caption, names=[about["label"]])
            output.replace_self(figure)
            self.document.note_explicit_target(figure, figure)


def fold_code(app, doctree):
    """Put the code of a cell that is folded behind a line that says what it is."""
    for cell in doctree.findall(nodes.container):
        kind = cell.get("cell_metadata", {}).get("fold")
        if kind and cell.get("nb_element") == "cell_code":
            for part in [part for part in cell.children if part.get("nb_element") == "cell_code_source"]:
                at = cell.index(part)
                cell.insert(at, nodes.raw("", f'<details class="fold"><summary>{kind}</summary>', format="html"))
                cell.insert(at + 2, nodes.raw("", "</details>", format="html"))


def mark_exports(app, doctree):
    """Above a cell that the package is made of, say which module it goes to."""
    for cell in doctree.findall(lambda node: "cell" in node.get("classes", ())
                                if isinstance(node, nodes.container) else False):
        for name in cell["classes"]:
            if name.startswith("tag_module-"):
                module = f"{PACKAGE}.{name.removeprefix('tag_module-')}"
                link = pending_xref("", nodes.literal("", module), refdomain="py", reftype="mod",
                                    reftarget=module, refexplicit=True, refwarn=False)
                cell.insert(0, nodes.paragraph("", "exported to ", link, classes=["exported"]))


def add_docments(app, what, name, obj, options, lines):
    """Add nbdev's parameter comments to a docstring, which is plain text, on the API page."""
    lines[:] = [plain_to_rst(line) for line in lines]
    if what in {"function", "class"} and (chapter := home(obj)):
        lines += ["", f"Defined in :doc:`{chapter}`."]
    if what not in {"function", "method", "class"}:
        return
    from fastcore.docments import docments

    lines.append("")
    comments = docments(obj)
    for parameter in inspect.signature(obj).parameters.values():
        # docments takes the comment at a last `**options` for the one at the result
        if parameter.kind is parameter.VAR_KEYWORD and not comments.get(parameter.name):
            comments[parameter.name] = comments.pop("return", None)
    for parameter, comment in comments.items():
        if comment and parameter not in {"self", "return"}:
            lines.append(f":param {parameter}: {plain_to_rst(' '.join(comment.split()))}")
        elif comment and parameter == "return":
            lines.append(f":returns: {plain_to_rst(' '.join(comment.split()))}")


def home(obj):
    """Return the chapter, as a document of the book, that a function or class is written in."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    found = re.search(r"File to edit: \.\./(nbs/\w+)\.ipynb", inspect.getsource(module)) if module else None
    return found and f"/{found[1]}"


def skip_member(app, what, name, obj, skip, options):
    """Leave timm's entry points, one for each model of the paper, off the API page."""
    return True if name.startswith(f"{PACKAGE}_") else None


def plain_to_rst(text):
    """Return plain text with `code` as reStructuredText."""
    parts = re.split(r"`+([^`]+)`+", text)
    parts[::2] = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    return "".join(parts)


def copy_network(app):
    """Put the run whose network comes with the package where the pages' script looks for it."""
    from convmixer_edu.ledger import pretrained_run

    if app.builder.format == "html":
        target = Path(app.outdir) / "_static" / "live" / "run"
        target.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(pretrained_run() / name, target / name)


def drop_thebe(app, config):
    """Leave out the live code that Jupyter Book brings along: no page uses it, and its scripts name another host."""
    for name in ("builder-inited", "env-before-read-docs", "doctree-resolved"):
        for listener in list(app.events.listeners[name]):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def add_head(app, pagename, templatename, context, doctree):
    """Tell the browser that a page asks no other host for anything, and others what it is about.

    What is left of the live code is taken out."""
    tags = [f'<meta http-equiv="Content-Security-Policy" content="{POLICY}" />']
    if doctree:
        image = f"{app.config.html_baseurl}_static/{picture(pagename)}"
        title = html.unescape(re.sub("<[^>]+>", "", context["title"]))
        about = {"og:type": "article", "og:title": title, "og:description": summary(doctree), "og:image": image,
                 "og:url": f"{app.config.html_baseurl}{pagename}.html"}
        tags += [f'<meta property="{name}" content="{html.escape(text)}" />' for name, text in about.items()]
        tags += [f'<meta name="description" content="{html.escape(about["og:description"])}" />',
                 '<meta name="twitter:card" content="summary_large_image" />']
    context["metatags"] = "".join(tags) + context.get("metatags", "")
    context["css_files"] = [file for file in context["css_files"] if "thebe" not in str(file.filename)]


def summary(doctree):
    """Return what a page begins with, without its standing words, for those who list it."""
    texts = (paragraph.astext() for paragraph in doctree.findall(nodes.paragraph))
    text = " ".join(next((text for text in texts if len(text.split()) > 8), "").split())
    text = re.sub(r"^What the paper says( \([^)]*\))?[.:]? ?", "", text)
    return text if len(text) <= 200 else f"{text[:200].rsplit(' ', 1)[0]} ..."


def finish_pages(app, error):
    """Mend in every page what the theme leaves to be wished for, and list the pages for search engines."""
    if error or app.builder.format != "html":
        return
    home = Path(app.outdir)
    for page in home.rglob("*.html"):
        new = old = page.read_text("utf8")
        for pattern, better in MENDED:
            new = pattern.sub(better, new)
        if new != old:
            page.write_text(new, "utf8")
    base = app.config.html_baseurl
    urls = "".join(f"<url><loc>{base}{name}.html</loc></url>\n" for name in sorted(app.env.found_docs))
    (home / "sitemap.xml").write_text(
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}</urlset>\n', "utf8")
    (home / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {base}sitemap.xml\n", "utf8")


def setup(app):
    """Connect the above to Sphinx."""
    app.add_transform(NumberFigures)
    app.connect("config-inited", use_reader)
    app.connect("config-inited", drop_thebe)
    app.connect("config-inited", write_api)
    app.connect("builder-inited", copy_network)
    app.connect("doctree-read", fold_code)
    app.connect("doctree-read", mark_exports)
    app.connect("autodoc-process-docstring", add_docments)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("html-page-context", add_head, priority=900)
    app.connect("build-finished", finish_pages)
    return {"parallel_read_safe": True, "version": "1"}

"""The first cell of every chapter and the address that Colab opens, both made from settings.ini.

    python tools/first_cell.py

A version with `.dev` is under way: the chapters install the branch as it is now, and Colab opens it. A version without is
a release: they install the release of that very version, and Colab opens its tag. The cell imports the package too,
because `%pip` prints an error and goes on: so an installation that failed fails here. Run this after the version changed.
"""

import json
import re
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent


def settings(root):
    """Return what settings.ini says there; nbdev's own function prefers the one in the working directory."""
    parser = ConfigParser(delimiters="=")
    parser.read_string((root / "settings.ini").read_text("utf8"))
    return SimpleNamespace(**parser["DEFAULT"])


def reference(config):
    """Return the branch or the tag in which the book of this version lies."""
    return config.branch if ".dev" in config.version else f"v{config.version}"


def first_cell(config):
    """Return the source of the cell."""
    if ".dev" in config.version:
        package = f'("{config.git_url}/archive/"\n               "refs/heads/{config.branch}.zip")'
    else:
        package = f'"{config.lib_name}=={config.version}"'
    return f"""#| hide
import sys
if "google.colab" in sys.modules:
    package = {package}
    %pip install -q --no-deps {{package}}
import {Path(config.lib_path).name}"""


def is_first(source):
    """Tell whether this is the cell, of whatever version."""
    return source.startswith('#| hide\nimport sys\nif "google.colab" in sys.modules:\n')


def colab_links(text):
    """Return what Colab is asked to open, as (owner/repository, branch or tag), for each link in a text."""
    return re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/([^/\s\"')]+)/", text)


def write(root, config):
    """Put cell and reference where they belong; return the names of the files that changed."""
    changed = []
    for path in sorted((root / "nbs").glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and is_first("".join(cell["source"])):
                cell["source"] = first_cell(config).splitlines(keepends=True)
        changed += replace(path, json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    text = (root / "README.md").read_text("utf8")
    link = r"(colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/)[^/\s]+/"
    changed += replace(root / "README.md", re.sub(link, rf"\g<1>{reference(config)}/", text))
    text = (root / "_config.yml").read_text("utf8")
    changed += replace(root / "_config.yml", re.sub(r"(?m)^  branch: .*$", f"  branch: {reference(config)}", text))
    return changed


def replace(path, text):
    """Write a file if that changes it; return its name in a list, or none."""
    if path.read_text("utf8") == text:
        return []
    path.write_text(text, "utf8")
    return [path.name]


if __name__ == "__main__":
    print(*write(ROOT, settings(ROOT)), sep="\n")

"""Tell what keeps a tag from being a release: every file must speak of the same version.

    python tools/check_release.py v0.1.0

Prints a sentence for each thing that is wrong and ends with 1, or says that all agree.
"""

import json
import re
import sys
from pathlib import Path

import yaml
from first_cell import colab_links, first_cell, is_first, settings

ROOT = Path(__file__).resolve().parent.parent


def problems(tag, root=ROOT):
    """Return what is wrong with a tag, in sentences."""
    config, found = settings(root), []
    version, again = config.version, "run python tools/first_cell.py"
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        found.append(f"the tag is {tag!r}: expected v and three numbers, such as v0.1.0")
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, settings.ini says version = {version}: change one of them")
    (told,) = re.findall(r'^__version__ = "(.+)"', (root / config.lib_path / "__init__.py").read_text("utf8"), re.M)
    if told != version:
        found.append(f"the package calls itself {told}, settings.ini {version}: run nbdev_export")
    cited = str(yaml.safe_load((root / "CITATION.cff").read_text("utf8"))["version"])
    if cited != version:
        found.append(f"CITATION.cff says {cited}, settings.ini {version}: make them the same")
    first = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text("utf8"), re.M)
    if not first or first[1] != version:
        found.append(f"the first heading of CHANGELOG.md is {first and first[0]!r}: expected '## {version}'")
    branch = yaml.safe_load((root / "_config.yml").read_text("utf8"))["repository"]["branch"]
    if branch != tag:
        found.append(f"_config.yml opens {branch} in Colab, expected {tag}: {again}")
    links = set(colab_links((root / "README.md").read_text("utf8")))
    if links - {(f"{config.user}/{config.repo}", tag)}:
        found.append(f"README.md opens {sorted(links)} in Colab, expected {tag}: {again}")
    for path in sorted((root / "nbs").glob("*.ipynb")):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text("utf8"))["cells"]]
        if [cell for cell in cells if is_first(cell)] != [first_cell(config)]:
            found.append(f"the first cell of {path.name} installs something else: {again}")
    return found


def main():
    """Check the tag that was given."""
    if len(sys.argv) != 2:
        sys.exit("expected one tag: python tools/check_release.py v0.1.0")
    if found := problems(sys.argv[1]):
        sys.exit("\n".join(found))
    print(f"{sys.argv[1]}: all files agree")


if __name__ == "__main__":
    main()

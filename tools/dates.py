"""The day of every commit that a record names, into results/commits.json: python tools/dates.py

A run began on that day or later. A record written from now on tells its own day.
"""

import json
import subprocess
from pathlib import Path

from convmixer_edu.checkpoint import write_json

RESULTS = Path(__file__).resolve().parent.parent / "results"


def commits():
    """Return what the records call the commits that made them."""
    records = (json.loads(file.read_text("utf8")) for file in RESULTS.rglob("*.json"))
    return sorted({r["commit"].removesuffix("-dirty") for r in records if isinstance(r, dict) and r.get("commit")})


def day(commit):
    """Return the day of a commit, by git."""
    return subprocess.run(["git", "show", "-s", "--format=%cs", commit], cwd=RESULTS, check=True, capture_output=True,
                          text=True).stdout.strip()


if __name__ == "__main__":
    write_json(RESULTS / "commits.json", {commit: day(commit) for commit in commits()})

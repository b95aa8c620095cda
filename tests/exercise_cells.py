"""Turn the checked exercises of a chapter into cells that answer them: not at all, rightly, and with each known mistake."""

import re

TRY = '''
import ast
from convmixer_edu import exercises

def run_to_mark(source, space):
    tree = ast.parse(source)
    *before, last = tree.body
    exec(compile(ast.Module(before, []), "check", "exec"), space)
    return eval(compile(ast.Expression(last.value), "check", "eval"), space)

def answer_exercise(number, stub, solution, source):
    space, asked = globals(), {}
    def check(answer, right, wrong=(), by=None, within=0.0):
        asked.update(right=right, wrong=list(wrong.items() if isinstance(wrong, dict) else wrong), by=by, within=within)
        return exercises.check(answer, right, wrong, by, within)
    space["check"] = check
    exec(stub, space)
    mark = run_to_mark(source, space)
    assert mark.state == "open", f"exercise {number}: the dots are {mark}"
    exec(solution, space)
    mark = run_to_mark(source, space)
    assert mark.state == "right", f"exercise {number}: the solution is {mark}"
    sentences = [sentence for _, sentence in asked["wrong"]]
    assert len(set(sentences)) == len(sentences) >= 2, f"exercise {number}: {len(sentences)} known mistakes"
    for mistake, sentence in asked["wrong"]:
        mark = exercises.check(mistake, asked["right"], asked["wrong"], asked["by"], asked["within"])
        assert (mark.state, mark.sentence) == ("wrong", sentence), f"exercise {number}: {mistake!r} gives {mark}"
'''


def exercises(notebook):
    """Return [(number, stub, solution, check)] for the checked exercises of a notebook."""
    found, prose, stubs = [], "", {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            prose = source
        elif match := re.match(r"#\|\s*exercise:\s*(\d+)\n", source):
            solutions = re.findall(r"<details>.*?```python\n(.*?)```.*?</details>", prose, re.S)
            assert len(solutions) == 1, f"exercise {match[1]} has {len(solutions)} solutions in code, expected one"
            assert prose.startswith(f"**{match[1]}."), f"exercise {match[1]} stands under: {prose[:30]}"
            stubs[match[1]] = source[match.end():], solutions[0]
        elif match := re.match(r"#\|\s*check:\s*(\d+)\n", source):
            found.append((match[1], *stubs.pop(match[1]), source[match.end():]))
    assert not stubs, f"exercises without a check: {list(stubs)}"
    return found


def with_answers(notebook):
    """Return the notebook with cells at its end that answer each exercise in every way."""
    sources = [f"answer_exercise(*{exercise!r})" for exercise in exercises(notebook)]
    cells = [{"cell_type": "code", "id": f"answer{i}", "metadata": {}, "outputs": [], "execution_count": None,
              "source": source} for i, source in enumerate([TRY, *sources] if sources else [])]
    return {**notebook, "cells": notebook["cells"] + cells}

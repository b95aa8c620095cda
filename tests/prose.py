"""Find the numbers in a chapter's prose that its page does not compute, and the claims it shows wrongly."""

import json
import re

SMALL = 10  # whole numbers up to here are free: "three channels", "5 blocks"
NAMES = [  # numbers that are parts of names
    r"[A-Za-z]+-[A-Z]?\d[\w./-]*(?:/\d+)*",  # ResNet-50, CIFAR-10, ConvMixer-256/8, ViT-B/16, ImageNet-1k
    r"\b(?:[A-Za-z]+_)+\w+",  # convmixer_1536_20
    r"\b[A-Za-z]+\d[\w.]*",  # float32, H200, B1, k5, RTX4090
    r"\b\d+/\d+\b(?: k\d+| p\d+)*",  # 1536/20
    r"\b(?:RTX|T|V|A|GTX|i)\s?\d+\w*(?: Ti)?",
    r"\b(?:19|20)\d\d\b",  # years
    r"(?:Sec\.|Fig\.|Figs\.|Table|Tables|App\.|Sections?|[Cc]hapters?|[Ee]xercises?|[Ff]igures?|[Ii]ssues?|Python|torch|PyTorch|timm|Colab|"
    r"recipe|torchvision|Pillow|CUDA|Triton|arXiv:|O)\s*\(?[\d.]+(?:(?:,| and|-) ?[\d.]+)*",
    r"^\s*\d+\.\s",  # the numbers of a list
    r"\*\*\d+\.",  # and of an exercise
    r"\w+\^\d+|²|³",
    r"95 (?:%|percent)(?= (?:interval|confidence))",
]
UNITS = r"\s*(?:%|percent|points?\b|s\b|ms\b|seconds?\b|minutes?\b|hours?\b|days?\b|[KMGT]i?B\b|img/s|images a second|times\b|GMACs?|px|pixels wide)"
NUMBER = re.compile(r"(?<![\w.])(\d+(?:,\d{3})*(?:\.\d+)?)(?:(\s*(?:thousand|million|billion|M|G|k))\b)?(" + UNITS + ")?")
SCALE = {"thousand": 1e3, "k": 1e3, "million": 1e6, "M": 1e6, "billion": 1e9, "G": 1e9, "hundred": 100}
ONES = {word: i for i, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split())}
TENS = {word: 10 * i for i, word in enumerate("- - twenty thirty forty fifty sixty seventy eighty ninety".split()) if i > 1}
WORD = re.compile(
    rf"\b(?:(?:{'|'.join(TENS)})(?:-(?:{'|'.join(list(ONES)[1:10])}))?|{'|'.join(ONES)}|half a|a)(?: and a half)?"
    r"(?:[ -](?:hundred|thousand|million|billion))*\b|\b(?:hundred|thousand|million|billion)\b")
CLAIM = re.compile(r"\[([^\]]+)\]\((?:claims\.ipynb)#([\w-]+)\)")
FREE = {  # chapter: {number as written: why it need not be computed}
    "01_question": {"95": "quoted from a review, to show where it is wrong", "256": "a width for the reader to try"},
    "07_imagenet": {"50,000": "the photographs of ImageNet's validation set"},
    "P7_browser": {"sixteen": "four channels at four positions"},
    "W6_train": {"forty": "the page's first trainer goes by this name; its lines are counted where it runs"},
    "W13_command_line": {"130": "a shell's 128 and the number of the signal, 2", "143": "the same with 15, asked in an exercise"},
    "W1_data": {"17": "scikit-learn's digits hold the values 0 to 16", "255": "the largest value of a byte"},
    "W2_augment": {"ninety": "from the note of the claim setup-crop", "fifteen": "the operations, counted two sections further on"},
    "W3_loaders": {"sixteen": "a bicubic look-up has 4 x 4 neighbours", "0.05": "the custom for a chance of error"},
    "W5_machine": {"million": "a figure of speech", "7.5": "the compute capability of a T4; the code has it as two numbers"},
}


def clean(markdown):
    """Return (claims shown, prose without claims, code, formulas, addresses and names)."""
    shown = CLAIM.findall(markdown)
    text = CLAIM.sub(" ", markdown)
    code = re.findall(r"```.*?```|`[^`\n]+`", text, re.S)
    text = re.sub(r"```.*?```|`[^`\n]+`", " ", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$(?: \([\w-]+\))?|\$[^$\n]+\$", " ", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"<[^>]*>|https?://\S+", " ", text)
    for name in NAMES:
        text = re.sub(name, " ", text, flags=re.M)
    return shown, text, "\n".join(code)


def spelled(words):
    """Return the number that English words stand for, such as 'two and a half billion'."""
    value = 0.0
    for word in re.split(r"[ -]", words.replace(" and a half", " plus_half")):
        if word in ONES or word in TENS:
            value += ONES.get(word, TENS.get(word))
        elif word == "plus_half":
            value += 0.5
        elif word == "half":
            value = 0.5
        elif word in SCALE:
            value = (value or 1) * SCALE[word]
    return value


def in_prose(text):
    """Return (as written, value, last digit's worth) for each number that must be bound."""
    found = []
    for match in NUMBER.finditer(text):
        digits, scale, unit = match[1].rstrip(","), (match[2] or "").strip(), match[3]
        value, size = float(digits.replace(",", "")), SCALE.get(scale, 1)
        if value <= SMALL and value == int(value) and "." not in digits and not scale and not unit:
            continue
        places = len(digits.partition(".")[2])
        found.append((match[0].strip(), value * size, 10.0**-places * size))
    for match in WORD.finditer(NUMBER.sub(" ", text)):
        value = spelled(match[0])
        if value > SMALL or any(word in SCALE for word in match[0].split()):
            exact = 1 if value < 100 else 10 ** (len(str(int(value))) - 1)
            found.append((match[0], value, exact / 2 if " and a half" in match[0] else exact))
    return found


def values(text):
    """Return all numbers in code and outputs."""
    found = set()
    for digits, scale in re.findall(r"(?<![A-Za-z_\d.])-?(\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?)(?:\s*(M|G|k|million|billion)\b)?", text):
        try:
            value = float(digits.replace(",", "").replace("_", ""))
        except ValueError:
            continue
        found |= {value, value * SCALE.get(scale, 1)}
        found |= {float(part) for part in re.split(r"[,_]", digits) if re.fullmatch(r"\d+(?:\.\d+)?", part)}
    return found


def unbound(markdown, page):
    """Return the numbers of a Markdown cell that neither code nor outputs of its page hold, to the precision written."""
    _, text, _ = clean(markdown)
    return [written for written, value, worth in in_prose(text)
            if not any(abs(factor * known - value) <= worth / 2 * 1.000001 for known in page for factor in (1, 100))]


def wrong_claims(markdown):
    """Return the claims whose number a Markdown cell shows otherwise than the file; words may link to a claim freely."""
    from convmixer_edu.claims import claim

    wrong = []
    for text, id in clean(markdown)[0]:
        c, bare = claim(id), text
        for name in NAMES:
            bare = re.sub(name, " ", bare)
        told_in_words = not re.search(r"\d", bare) or c.number is None and not re.fullmatch(r"[\d., %]+", text)
        if text != c.text and not told_in_words:
            wrong.append(f"{id} is shown as {text!r}, expected {c.text!r}")
    return wrong


def cells(path, kind="code"):
    """Return the sources of a notebook's cells of one kind."""
    notebook = json.loads(path.read_text("utf8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def plain(title):
    """Return a heading's letters and digits, the same in Markdown and on the page."""
    return re.sub(r"\W+", "", title).lower()


def sections(path):
    """Return [title, Markdown pieces, sources of code] for each section of a notebook; what opens it has no title."""
    found = [["", [], []]]
    for cell in json.loads(path.read_text("utf8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            found[-1][2].append(source)
            continue
        for piece in re.split(r"^(?=## )", source, flags=re.M):
            if piece.startswith("## "):
                found.append([plain(piece[3:].splitlines()[0]), [], []])
            found[-1][1].append(piece)
    return found


def unbound_on(path, outputs):
    """Return (number, sentence) for each number that nothing near it computes.

    Near is a sentence's own section and the one before; what opens a page, sums it up or asks about it may tell any number of the
    page. `outputs` has the text of each section's outputs, by `plain` title, and of the whole page by None."""
    found, free = sections(path), FREE.get(path.stem, {})
    known = [values("\n".join([*code, outputs.get(title, ""), *(clean(text)[2] for text in told)])) for title, told, code in found]
    page = set.union(*known, values(outputs.get(None, "")))
    wrong = []
    for i, (title, told, _) in enumerate(found):
        whole = not title or title.startswith(("whatthepapersays", "exercises"))
        near = page if whole else known[i] | known[i - 1]
        wrong += [(number, text[:60]) for text in told for number in unbound(text, near) if number not in free]
    return wrong

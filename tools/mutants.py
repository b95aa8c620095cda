"""Do the tests of the model and its anatomy notice a mistake? python tools/mutants.py [--only model]

Each mutant is the package with one mistake put in: those that people make in a ConvMixer, written down below, and in
anatomy's formulas one operator or number exchanged at a time. A mutant is killed when a test of that module fails.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {"model": "tests/test_model.py", "anatomy": "tests/test_anatomy.py"}
MISTAKES = (  # what it is, what stands there, what comes instead
    ("BatchNorm before GELU", "Sequential(conv, GELU(), BatchNorm2d(conv.out_channels))",
     "Sequential(conv, BatchNorm2d(conv.out_channels), GELU())"),
    ("no activation", "Sequential(conv, GELU(), BatchNorm2d", "Sequential(conv, nn.Identity(), BatchNorm2d"),
    ("no norm", "GELU(), BatchNorm2d(conv.out_channels))", "GELU(), nn.Identity())"),
    ("tanh in GELU", "Sequential(conv, GELU(), Batch", "Sequential(conv, GELU('tanh'), Batch"),
    ("ReLU for GELU", "Sequential(conv, GELU(), Batch", "Sequential(conv, ReLU(), Batch"),
    ("no residual", "return x + self.fn(x)", "return self.fn(x)"),
    ("residual subtracted", "return x + self.fn(x)", "return x - self.fn(x)"),
    ("residual doubled", "return x + self.fn(x)", "return x + x + self.fn(x)"),
    ("residual around all", "Sequential(Residual(dw()), *unit(Conv2d(dim, dim, 1)))",
     "Sequential(Residual(Sequential(dw(), *unit(Conv2d(dim, dim, 1)))))"),
    ("padding of half a kernel", 'padding="same"', "padding=kernel_size // 2"),
    ("padding reflects", 'padding="same"', 'padding="same", padding_mode="reflect"'),
    ("no groups", ", groups=dim)", ")"),
    ("no bias in the depthwise part", ", groups=dim)", ", groups=dim, bias=False)"),
    ("a block too few", "map(block, range(depth))", "map(block, range(1, depth))"),
    ("a block too many", "map(block, range(depth))", "map(block, range(depth + 1))"),
    ("kernel size ignored", "Conv2d(dim, dim, kernel_size, padding", "Conv2d(dim, dim, 9, padding"),
    ("patch size ignored", "PatchEmbedding(in_chans, dim, patch_size)", "PatchEmbedding(in_chans, dim, 7)"),
    ("channels ignored", "PatchEmbedding(in_chans, dim, patch_size)", "PatchEmbedding(3, dim, patch_size)"),
    ("classes ignored", "Linear(dim, num_classes)", "Linear(dim, 1000)"),
    ("patches overlap", "patch_size, stride=patch_size)", "patch_size, stride=max(1, patch_size - 1))"),
    ("one block, used d times", "*map(block, range(depth))", "*[block(0)] * depth"),
    ("equal first weights", "*map(block, range(depth))",
     "*[__import__('copy').deepcopy(b) for b in [block(0)] for _ in range(depth)]"),
    ("largest value instead of the mean", "AdaptiveAvgPool2d(1), Flatten()", "nn.AdaptiveMaxPool2d(1), Flatten()"),
    ("no check of sizes", "    check_sizes(**locals())\n    dw =", "    dw ="),
    ("size 0 passes", "value < 1", "value < 0"),
    ("an image of one patch is refused", "if height < p or width < p", "if height <= p or width <= p"),
    ("only the height is checked", "if height < p or width < p", "if height < p"),
)
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


def by_hand(source):
    """The mistakes of the list, each a whole source."""
    for name, old, new in MISTAKES:
        if old not in source:
            raise SystemExit(f"{name}: {old!r} does not stand in the module any more, mend the list")
        yield name, source.replace(old, new)


def by_operator(source):
    """Every exchanged operator and every number that is one larger, each a whole source."""
    tree = ast.parse(source)
    places = [node for node in ast.walk(tree)]
    for node in places:
        if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
            old, node.op = node.op, OTHER[type(node.op)]()
            yield f"line {node.lineno}: {ast.unparse(node)}", ast.unparse(tree)
            node.op = old
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
            old, node.ops[0] = node.ops[0], OTHER[type(node.ops[0])]()
            yield f"line {node.lineno}: {ast.unparse(node)}", ast.unparse(tree)
            node.ops[0] = old
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
            yield f"line {node.lineno}: {node.value} for {node.value - 1}", ast.unparse(tree)
            node.value -= 1


def survives(module, source):
    """Whether the module's tests pass with this source."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "convmixer_edu"
        shutil.copytree(ROOT / "convmixer_edu", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / f"{module}.py").write_text(source)
        (Path(folder) / "results").symlink_to(ROOT / "results")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(ROOT / TESTS[module])],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1",
                                                           "PYTHONDONTWRITEBYTECODE": "1"})
    if done.returncode not in (0, 1, 2):
        raise SystemExit(done.stdout + done.stderr)
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TESTS)
    left = []
    for module in [m for m in TESTS if parser.parse_args().only in (None, m)]:
        source, alive, count = (ROOT / "convmixer_edu" / f"{module}.py").read_text(), [], 0
        if not survives(module, source):
            raise SystemExit(f"the tests of {module} fail without any mistake")
        for name, mutant in (by_hand if module == "model" else by_operator)(source):
            count += 1
            if survives(module, mutant):
                alive.append(name)
                print(f"{module}: not noticed: {name}", flush=True)
        print(f"{module}: {count - len(alive)} of {count} mistakes noticed", flush=True)
        left += alive
    sys.exit(bool(left))


if __name__ == "__main__":
    main()

"""What is alive in a page: PyTorch's numbers; by mouse and by keys; there without a script, waited for, given up, out of reach."""

import base64
import contextlib
import functools
import html
import io
import json
import re

import pytest
import torch
from bs4 import BeautifulSoup
from conftest import ROOT, real_data
from nbdev_reader import POLICY
from PIL import Image
from playwright.sync_api import expect
from record_browser import measure, served
from torch import nn

from convmixer_edu.anatomy import count_macs, count_parameters, receptive_field
from convmixer_edu.augment import normalize
from convmixer_edu.data import load_images
from convmixer_edu.inference import load_run
from convmixer_edu.ledger import pretrained_run
from convmixer_edu.live import live_html, photograph, sample_pictures

by_both = pytest.mark.parametrize("by", ["mouse", "keys"])


@pytest.fixture
def show(tab):
    """Open a page with the given body and modules of the live parts, under the book's policy; return its tab."""
    with contextlib.ExitStack() as until_the_end:
        def show(body, *modules):
            tab.goto(until_the_end.enter_context(served(document(body, *modules))))
            return tab

        yield show


def document(body, *modules):
    scripts = "".join(f"<script type=module src=live/{name}.js></script>" for name in modules)
    return (f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel=stylesheet href=live/live.css>'
            f"<style>canvas {{ width: 300px }}</style><body>{body}{scripts}")


def press(part, by, key="Enter"):
    """Use a button, a box or a choice."""
    part.click() if by == "mouse" else part.press(key)


def slide(slider, by, step):
    """Move a slider by a step: with an arrow of the keyboard, or by a click where its knob shall be."""
    value, top = int(slider.input_value()) + step, int(slider.get_attribute("max"))
    box = slider.bounding_box()
    place = {"x": 8 + (box["width"] - 16) * value / top, "y": box["height"] / 2}  # the knob is 16 pixels wide
    slider.click(position=place) if by == "mouse" else slider.press("ArrowRight" if step > 0 else "ArrowLeft")
    assert int(slider.input_value()) == value


def click_at(drawing, x, y):
    """Click on a drawing at a part of its width and height."""
    box = drawing.bounding_box()
    drawing.click(position={"x": x * box["width"], "y": y * box["height"]})


def pictures(count):
    """CIFAR-10 where it is, else windows of photographs, as often as they are needed."""
    if source := real_data():
        return load_images(source, "test", limit=count).images
    images = sample_pictures()[0]
    return torch.stack([images[i % len(images)].roll(i, 2) for i in range(count)])


def test_the_browser_gives_pytorchs_answers(tab):
    found = measure(pictures(100), tab)
    assert found["difference"] < 1e-3 and found["same_class"] == found["images"] == 100


@pytest.fixture(scope="module")
def network():
    model, info = load_run(pretrained_run())
    images, names = sample_pictures()
    return live_html(model, info, images[:3], [*names[:2], 'a "<b>name</b>"'])


def answered(tab):
    """What the network says, once it has thought."""
    expect(tab.locator(".live-status")).to_contain_text("Live,")
    expect(tab.locator(".live-busy")).to_have_count(0)
    return tab.locator(".live-status").text_content()


def wake(tab, by="mouse"):
    press(tab.get_by_role("button", name="Wake"), by)
    return answered(tab)


PICTURE = "document.querySelector('.live-picture').toDataURL()"  # what the network was given


def test_without_a_script_every_answer_is_there(network):
    tiles = BeautifulSoup(network, "html.parser").select("figure.live li")
    assert len(tiles) == 3 and all(tile.b.text in load_run(pretrained_run())[1].classes for tile in tiles)
    assert tiles[2].img["alt"] == tiles[2].small.text.removeprefix("in truth: ") == 'a "<b>name</b>"' and len(tiles[2].find_all("b")) == 1
    assert all("%" in tile.text for tile in tiles)


@by_both
def test_it_is_fetched_when_asked_for_and_given_up(show, network, by):
    """Idle, loading, cancelled: the stored answers stay all the while; a double click cancels nothing."""
    tab = show(network, "live")
    start, held = tab.locator(".live-start"), []
    tab.route("**/model.safetensors", lambda route: held.append(route))
    assert not [url for url in tab.asked if "/run/" in url or "worker" in url], "fetched before it was asked"
    start.dblclick(position={"x": 20, "y": 20}) if by == "mouse" else start.press("Enter")
    expect(start).to_have_text("Cancel")
    expect(tab.locator(".live-status")).to_have_text("fetching …")
    expect(tab.locator(".live progress")).to_be_visible()
    expect(tab.locator(".live-stored li >> visible=true")).to_have_count(3)
    press(start, by)
    expect(start).to_have_text(re.compile("^Wake"))
    expect(tab.locator(".live progress")).to_be_hidden()
    expect(tab.locator(".live-stored li >> visible=true")).to_have_count(3)


@by_both
def test_it_answers_shuffles_and_shows_its_stages(show, network, by):
    tab = show(network, "live")
    first = wake(tab, by)
    choices, mix, stage = tab.locator(".live-choices input"), tab.locator(".live-switch input"), tab.locator(".live-stage input")
    expect(choices.first).to_be_focused()
    expect(tab.locator(".live-bars li")).to_have_count(3)
    expect(tab.locator(".live-maps canvas")).to_have_count(6)
    expect(tab.locator(".live-stored")).to_be_hidden()
    stored = BeautifulSoup(network, "html.parser").select_one("figure.live li").get_text("|").split("|")
    assert f"{stored[0]}, {stored[1].strip()}." in first  # the page said so before

    whole = tab.evaluate(PICTURE)
    press(mix, by, "Space")
    answered(tab)
    assert tab.evaluate(PICTURE) != whole
    press(mix, by, "Space")
    answered(tab)
    assert tab.evaluate(PICTURE) == whole
    while_it_thinks = """() => { document.querySelector(".live-switch input").click()
        return [document.querySelector(".live-busy") !== null, document.querySelectorAll(".live-bars li").length] }"""
    assert tab.evaluate(while_it_thinks) == [True, 3]  # dimmed, not removed
    answered(tab)

    if by == "mouse":
        tab.locator(".live-choices img").nth(2).click()
    else:
        choices.nth(1).focus()
        tab.keyboard.press("ArrowRight")
    expect(choices.nth(2)).to_be_checked()
    assert answered(tab).startswith('a "<b>name</b>":')

    expect(stage).to_have_attribute("aria-valuetext", re.compile(r"block (\d+) of \1"))
    last = tab.locator(".live-maps").inner_html()
    slide(stage, by, -1)
    assert tab.locator(".live-maps").inner_html() != last
    stage.press("Home") if by == "keys" else stage.click(position={"x": 8, "y": 9})
    expect(stage).to_have_attribute("aria-valuetext", "patches")


def file(image):
    """A picture, or what only says that it is one, as a file that a browser gets."""
    kept = io.BytesIO(b"" if image else b"no picture")
    if image:
        image.save(kept, "PNG")
    return {"name": "own.png", "mimeType": "image/png", "buffer": kept.getvalue()}


GIVE = """([kind, data]) => { const all = new DataTransfer(), figure = document.querySelector(".live")
    all.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "own.png", { type: "image/png" }))
    figure.dispatchEvent(kind === "drop" ? new DragEvent("drop", { dataTransfer: all, bubbles: true })
        : new ClipboardEvent("paste", { clipboardData: all, bubbles: true })) }"""


by_each_way = pytest.mark.parametrize("way", ["mouse", "keys", "drop", "paste"])


def hand_over(tab, way, image):
    """Choose, drop or paste a picture, or what is none."""
    if way in {"drop", "paste"}:
        tab.evaluate(GIVE, [way, base64.b64encode(file(image)["buffer"]).decode()])
    else:
        with tab.expect_file_chooser() as chooser:
            press(tab.locator(".live-own input"), way)
        chooser.value.set_files(file(image))


@by_each_way
def test_a_picture_of_ones_own_wakes_it(show, network, way):
    """One step leads from a page that has fetched nothing to an answer; what is no picture fetches nothing."""
    tab = show(network, "live")
    hand_over(tab, way, None)
    expect(tab.locator(".live-status")).to_have_text("That file is no picture this browser can read.")
    assert not [url for url in tab.asked if "/run/" in url or "worker" in url]
    hand_over(tab, way, Image.new("RGB", (300, 200), "blue"))
    assert answered(tab).startswith("your picture: ")
    expect(tab.locator(".live-choices :checked")).to_have_count(0)


@by_each_way
def test_it_takes_a_picture_of_ones_own(show, network, way):
    """Chosen, dropped or pasted; it says when it is not sure; what is no picture leaves the last answer."""
    tab = show(network, "live")
    wake(tab)
    give = functools.partial(hand_over, tab, way)
    status = tab.locator(".live-status")
    doubts = set()
    for image in (Image.new("RGB", (300, 200), "blue"), Image.new("L", (9, 9)), Image.radial_gradient("L")):
        before = tab.evaluate(PICTURE)
        give(image)
        tab.wait_for_function(f"before => {PICTURE} !== before", arg=before)
        said = answered(tab)
        assert said.startswith("your picture: ")
        doubts.add("This may be none of them." in said)
        assert ("This may be none of them." in said) == (int(re.search(r"(\d+) %", said)[1]) < 50)
    assert len(doubts) == 2
    expect(tab.locator(".live-choices :checked")).to_have_count(0)
    give(Image.new("RGBA", (50, 40)))  # transparent: nothing of the last picture shines through
    white = tab.evaluate("""() => { const all = Object.assign(document.createElement("canvas"), { width: 320, height: 320 }), pen = all.getContext("2d")
        pen.fillStyle = "white"; pen.fillRect(0, 0, 320, 320); return all.toDataURL() }""")
    tab.wait_for_function(f"white => {PICTURE} === white", arg=white)
    answered(tab)
    give(None)
    expect(status).to_have_text("That file is no picture this browser can read.")
    expect(tab.locator(".live-bars li")).to_have_count(3)


def inked(tab, x, y):
    """The colour of the middle of patch (x, y) of what the network was given."""
    return tab.locator(".live-picture").evaluate("""(canvas, [x, y]) => { const pen = new OffscreenCanvas(1, 1).getContext("2d")
        pen.drawImage(canvas, -x, -y); return [...pen.getImageData(0, 0, 1, 1).data] }""", [20*x + 10, 20*y + 10])[:3]


def is_red(colour):
    return colour[0] > 150 > 80 > colour[1]


@by_both
def test_it_answers_about_a_drawing(show, network, by):
    """In a chosen colour, by mouse and by keys; each stroke that ends is asked about, a cleared sheet as well; arrows alone only move."""
    tab = show(network, "live")
    wake(tab)
    status, white = tab.locator(".live-status"), [255, 255, 255]
    press(tab.locator(".live-sketch summary"), by)
    sheet = tab.get_by_label("sheet to draw on")
    tab.get_by_label("red").check() if by == "mouse" else tab.get_by_label("white").press("ArrowRight")
    expect(tab.get_by_label("red")).to_be_checked()
    if by == "mouse":
        sheet.scroll_into_view_if_needed()
        box = sheet.bounding_box()
        tab.mouse.move(box["x"] + 0.5*box["width"], box["y"] + 0.5*box["height"])
        tab.mouse.down()
        tab.mouse.move(box["x"] + 0.8*box["width"], box["y"] + 0.5*box["height"])
        tab.mouse.up()
    else:
        sheet.press("Space")
        for _ in range(4):
            sheet.press("Shift+ArrowRight")
    expect(status).to_have_text(re.compile("^your drawing:.*Live"))
    answered(tab)
    assert is_red(inked(tab, 10, 7)) and inked(tab, 3, 7) == white
    expect(tab.locator(".live-sketch b")).to_have_text(re.search(": (.*? %)", status.text_content())[1])  # beside the sheet, too
    press(tab.get_by_role("button", name="Clear"), by)
    tab.wait_for_function(f"before => {PICTURE} !== before", arg=tab.evaluate(PICTURE)) if is_red(inked(tab, 10, 7)) else None
    answered(tab)
    assert inked(tab, 10, 7) == white
    before = status.text_content()
    sheet.press("ArrowUp")
    sheet.press("ArrowUp")
    assert status.text_content() == before and inked(tab, 10, 7) == white
    expect(tab.locator(".live-own input")).to_have_value("")


def test_a_finger_draws(browser, network):
    """On a phone: the sheet takes the finger, the page does not scroll with it."""
    with browser.new_page(viewport={"width": 360, "height": 740}, has_touch=True) as tab, served(document(network, "live")) as address:
        tab.goto(address)
        wake(tab)
        tab.locator(".live-sketch summary").tap()
        tab.get_by_label("red").check()
        sheet = tab.get_by_label("sheet to draw on")
        sheet.scroll_into_view_if_needed()
        box, scrolled = sheet.bounding_box(), tab.evaluate("scrollY")
        finger = tab.context.new_cdp_session(tab)
        for kind, part in (("touchStart", 0.2), ("touchMove", 0.5), ("touchMove", 0.8), ("touchEnd", None)):
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [] if part is None else [
                {"x": box["x"] + 0.5*box["width"], "y": box["y"] + part*box["height"]}]})
        expect(tab.locator(".live-status")).to_have_text(re.compile("^your drawing:.*Live"))
        answered(tab)
        assert is_red(inked(tab, 7, 6)) and tab.evaluate("scrollY") == scrolled


@by_both
@pytest.mark.parametrize("missing, said", [
    ("worker.js", "This browser did not start the network."), ("config.json", "config.json is not there (404)."),
    ("model.safetensors", "model.safetensors is not there (404).")])
def test_what_cannot_be_fetched_is_said_and_can_be_tried_again(show, network, by, missing, said):
    tab = show(network, "live")
    tab.route(f"**/{missing}", lambda route: route.abort() if missing == "worker.js" else route.fulfill(status=404))
    press(tab.locator(".live-start"), by)
    expect(tab.locator(".live-status")).to_have_text(re.compile(re.escape(f"{said} The stored answers stay.") + "$"))
    expect(tab.locator(".live-stored li >> visible=true")).to_have_count(3)
    assert all(missing in complaint for complaint in tab.complaints)
    tab.complaints.clear()
    tab.unroute(f"**/{missing}")
    wake(tab, by)


SLIDERS = """<figure class="live-anatomy"><p class="live-fallback">as ever</p></figure>
    <figure class="live-knife"><img class="live-fallback" src="PHOTO" alt="a photograph"></figure>"""


@by_both
def test_sliders_say_what_the_package_counts(show, by):
    """Each slider moves, the sentence follows, what stood there before is out of the way."""
    sizes = [dict(h=h, d=d, k=k, p=p) for h, d, k, p in ((1536, 20, 9, 7), (64, 1, 1, 32), (256, 8, 5, 2), (768, 32, 7, 14))]
    tab = show(SLIDERS.replace("PHOTO", photograph()), "sliders")
    found = tab.evaluate("sizes => import('/live/sliders.js').then(m => sizes.map(s => [m.anatomy(s), m.patches(s)]))", sizes)
    for s, (net, cut) in zip(sizes, found, strict=True):
        four = s["h"], s["d"], s["k"], s["p"]
        assert (net["parameters"], net["macs"]) == (count_parameters(*four), count_macs(*four))
        assert net["field"] == receptive_field(s["d"], s["k"], s["p"]) and cut["places"] == (224//s["p"])**2
        assert cut["numbers"] == 3*s["p"]**2 and cut["pairs"] == cut["places"]**2
    expect(tab.locator(".live-sliders")).to_have_count(2)
    expect(tab.locator(".live-fallback >> visible=true")).to_have_count(0)
    for number, slider in enumerate(tab.get_by_role("slider").all()):
        said = tab.get_by_role("status").nth(number // 4)
        before = said.text_content(), slider.get_attribute("aria-valuetext")
        assert all(before)
        slide(slider, by, 1)
        expect(said).not_to_have_text(before[0])
        expect(slider).not_to_have_attribute("aria-valuetext", before[1])
    assert number == 4


def test_a_position_shows_its_row_of_attention(show):
    """The shares are PyTorch's; a click and a key choose the position, and the sentence says whose row it is."""
    query = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    rows = (query @ query.T / 3**0.5).softmax(1)
    data = json.dumps({"query": query.tolist(), "colours": [[n, n, n] for n in range(16)]})
    tab = show(f"""<figure class="live-attention" data-positions='{data}'><p class="live-fallback">as ever</p></figure>""", "sliders")
    found = tab.evaluate("query => import('/live/sliders.js').then(m => query.map((_, i) => m.attend(query, i)))", query.tolist())
    assert torch.allclose(torch.tensor(found), rows, atol=1e-6)
    place, said, drawing = tab.locator(".live-sliders span"), tab.get_by_role("status"), tab.locator("canvas")
    expect(place).to_have_text(["1", "2"])
    expect(tab.locator(".live-fallback")).to_be_hidden()
    for x, wanted in ((0.3, ["3", "3"]), (0.9, ["3", "4"])):  # on the image, and on its row beside it
        click_at(drawing, x, 0.6)
        expect(place).to_have_text(wanted)
    order = rows[11].argsort(descending=True)
    count = int((rows[11][order].cumsum(0) < 0.5).sum()) + 1
    far = max(((int(n) // 4 - 2)**2 + (int(n) % 4 - 3)**2)**0.5 for n in order[:count])
    expect(said).to_have_text(f"Half of its attention goes to {count} of 16 positions; the farthest of them is {far:.0f} steps away.")
    slide(tab.get_by_role("slider").first, "keys", -1)
    expect(place).to_have_text(["2", "4"])


def test_a_poke_moves_what_pytorch_moves(show):
    """After each half, with and without the residual: PyTorch's numbers; keys and a click say where and after what."""
    torch.manual_seed(0)
    grid, pairs = torch.randn(2, 9, 9, dtype=torch.float64), [
        (nn.Conv2d(2, 2, 3, groups=2, padding=1, bias=False).double(), nn.Conv2d(2, 2, 1, bias=False).double()) for _ in range(2)]
    data = {"grid": grid.flatten(1).tolist(), "blocks": [{name: conv.weight.flatten(1).tolist() for name, conv in zip(
        ("depthwise", "pointwise"), pair, strict=True)} for pair in pairs]}

    def steps(now, residual):
        for spread, mix in pairs:
            yield (now := nn.functional.gelu(spread(now), approximate="tanh") + residual * now)
            yield (now := nn.functional.gelu(mix(now), approximate="tanh"))

    def sentence(after, residual, row, column):
        poked = grid.clone()
        poked[0, row, column] += 1
        change = ([*steps(poked, residual)][after] - [*steps(grid, residual)][after]).abs().detach()
        moved = change.amax(0) > 1e-9
        return (f"{int(moved.sum())} of 81 positions have moved, in {int((change.flatten(1).amax(1) > 1e-9).sum())} of 2 channels; "
                f"the poked position by {float(change[:, row, column].amax()):.3f}.")

    tab = show(f"""<figure class="live-poke" data-network='{json.dumps(data)}'><p class="live-fallback">as ever</p></figure>""", "sliders")
    for residual in (True, False):
        found = tab.evaluate("([grid, blocks, residual]) => import('/live/sliders.js').then(m => m.halves(grid, blocks, 9, residual))",
                             [data["grid"], data["blocks"], residual])
        for ours, theirs in zip(found[1:], steps(grid, residual), strict=True):
            assert torch.allclose(torch.tensor(ours, dtype=torch.float64), theirs.flatten(1), atol=1e-9)
    said, sliders = tab.get_by_role("status"), tab.get_by_role("slider")
    expect(said).to_have_text(sentence(0, True, 4, 4))
    expect(said).to_have_text(re.compile("^9 of 81 positions have moved, in 1 of 2"))
    for slider, by, step, expected in ((2, "keys", 1, (1, True, 4, 4)), (2, "mouse", 1, (2, True, 4, 4)), (3, "keys", -1, (2, False, 4, 4)),
                                       (0, "keys", -1, (2, False, 3, 4)), (1, "mouse", 1, (2, False, 3, 5))):
        slide(sliders.nth(slider), by, step)
        expect(said).to_have_text(sentence(*expected))
    click_at(tab.locator("canvas"), 0.05, 0.95)
    expect(said).to_have_text(sentence(2, False, 8, 0))


ORDER = [{"name": "a", "paper": -3.0, "ours": 1.0}, {"name": "b", "paper": -1.0, "ours": -2.0}, {"name": "c", "paper": 0.5, "ours": 0.0}]


@by_both
def test_changes_are_put_in_an_order_and_compared(show, by):
    tab = show(f"""<figure class="live-order" data-rows='{json.dumps(ORDER)}'><p class="live-fallback">as ever</p></figure>""", "order")
    items, said = tab.locator(".live-order li"), tab.get_by_role("status")
    expect(items.locator("span")).to_have_text(["a", "b", "c"])
    expect(tab.locator(".live-fallback")).to_be_hidden()
    press(items.nth(1).get_by_role("button").first, by)
    expect(items.locator("span")).to_have_text(["b", "a", "c"])
    expect(said).to_contain_text("now number 1 of 3")
    expect(tab.locator(":focus")).to_have_attribute("aria-label", re.compile("^b:"))  # the focus goes along
    press(tab.get_by_role("button", name="Compare"), by)
    expect(said).to_have_text("Of 3 pairs, 2 stand in the paper's order and 2 in that of our runs.")
    expect(items.nth(1)).to_contain_text("paper −3.0, ours +1.0")


@by_both
def test_draws_of_augmentation_come_one_at_a_time(show, by):
    """The button steps through a part's draws and begins again; the picture beside the sentence is its own."""
    sheet, kept = Image.new("RGB", (30, 20)), io.BytesIO()
    for place in range(6):  # (row, column): a colour of its own
        sheet.paste((0, 40 * place, 255), (place % 3 * 10, place // 3 * 10, place % 3 * 10 + 10, place // 3 * 10 + 10))
    sheet.save(kept, "PNG")
    said = json.dumps({"mixup": ["one half.", "a third."], "erasing": ["a hole.", "a large hole."]})
    tab = show(f"""<figure class="live-draws" data-draws='{said}'><img class="live-fallback" alt="all draws"
        src="data:image/png;base64,{base64.b64encode(kept.getvalue()).decode()}"></figure>""", "draws")

    def shows(said, place):
        expect(tab.get_by_role("status")).to_have_text(said)
        for x, expected in ((5, 3 * (place // 3)), (16, place)):  # left as it is, right the draw
            pixel = tab.locator("canvas").evaluate("""(canvas, x) => { const pen = new OffscreenCanvas(1, 1).getContext("2d")
                pen.drawImage(canvas, -x, -5); return [...pen.getImageData(0, 0, 1, 1).data] }""", x)
            assert pixel[:3] == [0, 40 * expected, 255]

    shows("mixup, draw 1 of 2. one half.", 1)
    expect(tab.locator(".live-fallback")).to_be_hidden()
    for said, place in (("mixup, draw 2 of 2. a third.", 2), ("mixup, draw 1 of 2. one half.", 1)):
        press(tab.get_by_role("button"), by)
        shows(said, place)
    press(tab.get_by_label("erasing" if by == "mouse" else "mixup"), by, "ArrowDown")
    shows("erasing, draw 1 of 2. a hole.", 4)
    expect(tab.get_by_label("erasing")).to_be_focused()


@by_both
def test_a_kernel_answers_what_the_networks_layer_does(show, by):
    """The recorded network's own kernels on a picture: PyTorch's numbers; sliders and a click choose; paper gets what stood there before."""
    net, about = load_run(pretrained_run())
    channels, numbers, layers = [[21, 1, 205], [7, 200, 255]], [], []
    with torch.no_grad():
        z = net[:3](normalize(sample_pictures()[0][:1], about.stats.mean, about.stats.std))
        for block, chosen in zip((net[3], net[4]), channels, strict=True):
            conv = block[0].fn[0]
            numbers.append(torch.cat([conv.bias[chosen, None], conv.weight[chosen].flatten(1), z[0, chosen].flatten(1)], 1))
            layers.append(conv(z)[0, chosen].flatten(1))
            z = block(z)
    k, side, expected, halves = about.config.kernel_size, z.shape[-1], torch.stack(layers), torch.stack(numbers).half()
    shape, packed = {"k": k, "side": side, "channels": channels}, base64.b64encode(halves.numpy().tobytes()).decode()
    tab = show(f"""<div class="live-kernels" data-shape='{json.dumps(shape)}' data-kernels="{packed}"><div class="live-fallback">as ever</div>
        <img hidden src="{photograph(32)}" alt="a temple"></div>""", "kernels")
    found = torch.tensor(tab.evaluate("""([text, shape]) => import('/live/kernels.js').then(m => m.unpack(text, shape).map(row =>
        row.map(kernel => [...m.answers(kernel, shape)])))""", [packed, shape]))
    same = [nn.functional.conv2d(own[:, 26:].view(1, 3, side, side), own[:, 1:26].view(3, 1, k, k), own[:, 0], padding="same", groups=3)
            for own in halves.float()]
    assert (found - torch.cat(same).flatten(2)).abs().max() < 1e-3
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()  # half precision came between

    def sentence(block, n):
        answers, squares = found[block, n], halves[block, n, 1:26].float().view(k, k).square()
        line = torch.arange(k) - (k - 1)/2
        far = float((squares * (line[:, None]**2 + line**2)).sum() / squares.sum())**0.5
        row, column = divmod(int(answers.abs().argmax()), side)
        return (f"Channel {channels[block][n]}: the weights lie {far:.2f} positions from the kernel's middle. Its strongest response is "
                f"{answers[row*side + column]:.1f}, in row {row + 1} from the top, column {column + 1} from the left.").replace(" -", " −")

    said, before, sliders = tab.get_by_role("status"), tab.locator(".live-fallback"), tab.get_by_role("slider")
    expect(said).to_have_text(sentence(0, 0))
    expect(before).to_be_hidden()
    for n, now in ((0, (1, 0)), (1, (1, 1))):
        slide(sliders.nth(n), by, 1)
        expect(said).to_have_text(sentence(*now))
        expect(sliders.nth(n)).to_have_attribute("aria-valuetext", re.compile(": 2$"))
    click_at(tab.locator(".live-pick"), 0.9, 0.2)
    expect(said).to_have_text(sentence(0, 2))
    tab.emulate_media(media="print")
    expect(before).to_be_visible()
    expect(tab.locator(".live-kernels > :visible")).to_have_count(1)


TYPED = [("0,5", 1, 0.5), ("0,125", 1, 0.125), ("2,302585", 1, 2.302585), ("1,024", 1, 1024), ("153,600,000", 1, 153600000),
         ("1_000", 1, 1000), ("3/4", 1, 0.75), ("1e-3", 1, 0.001), ("3/0", 1, None), ("_", 1, None), ("1.2.3", 1, None),
         ("50 %", 0.5, 0.5), ("1.73 %", 1.732, 1.73), ("(1/4, 0.5)", [1, 1], [0.25, 0.5]), ("0,6; 0,8", [1, 1], [0.6, 0.8]),
         ("153,600,000; 7", [1, 1], [153600000, 7]), ("1,", [1, 1], None), ("No", True, False), ("'a.b'", "c", "a.b")]


def test_an_exercise_reads_what_people_type(show):
    found = show("").evaluate("typed => import('/live/exercise.js').then(e => typed.map(([text, like]) => e.parse(text, like)))", TYPED)
    for (text, _, value), read in zip(TYPED, found, strict=True):
        assert read == (pytest.approx(value) if isinstance(value, (float, list)) else value), text


@by_both
@pytest.mark.parametrize("right, wrong, listed", [
    ("hk", [["hp", "Not p."], ["h", "Two."]], ["h", "hk", "hp"]), (False, [[True, "Look again."]], ["yes", "no"]),
    (["a", "b"], [[["a"], "One more."], [["b"], "Another."]], ["a", "a, b", "b"])])
def test_an_answer_is_chosen_where_few_are_known(show, by, right, wrong, listed):
    """Nothing chosen, each known mistake, the right one, which is remembered; a form beside it is its own."""
    known = html.escape(json.dumps({"right": right, "wrong": wrong, "within": 0, "ok": "Yes.", "other": "No."}))
    number = html.escape(json.dumps({"right": 2, "wrong": [[3, "Less."]], "within": 0, "ok": "Yes.", "other": "No."}))
    sentences = {", ".join(m) if isinstance(m, list) else {True: "yes"}.get(m, m): f"Not yet. {s}" for m, s in wrong}
    tab = show(f'<form class="exercise" data-known="{known}">as ever</form><form class="exercise" data-known="{number}">as ever</form>', "exercise")
    form = tab.locator("form").first
    said, button, choices = form.get_by_role("status"), form.get_by_role("button"), form.get_by_role("radio")
    assert [choice.input_value() for choice in choices.all()] == listed
    press(button, by)
    expect(said).to_have_text("Not yet. Choose an answer first.")
    for place, answer in enumerate(listed):
        press(choices.nth(place if by == "mouse" or not place else place - 1), by, "ArrowDown" if place else "Space")
        expect(choices.nth(place)).to_be_checked()
        press(button if by == "mouse" else choices.nth(place), by)
        expect(said).to_have_text(sentences.get(answer, "Right. Yes."))
        if answer not in sentences:
            tab.reload()
            expect(said).to_have_text("Right. Yes.")
            expect(choices.nth(place)).to_be_checked()
    expect(tab.get_by_role("textbox")).to_have_value("")


@pytest.mark.parametrize("body", [SLIDERS.replace("PHOTO", "data:,"), *(f'<figure class="live-{name}"><p class="live-fallback">as ever</p></figure>'
                         for name in ("attention", "poke", "order", "draws", "kernels")), '<form class="exercise"><p class="live-fallback">as ever</p></form>'])
def test_without_a_script_what_stands_there_is_seen(browser, body):
    with browser.new_page(java_script_enabled=False) as tab, served(document(body, "sliders", "order", "draws", "kernels", "exercise")) as address:
        tab.goto(address)
        assert all(part.is_visible() for part in tab.locator(".live-fallback").all())
        expect(tab.locator("button, input, canvas")).to_have_count(0)


def test_each_module_is_short():
    for path in (ROOT / "assets" / "static" / "live").glob("*.js"):
        assert len(path.read_text("utf8").splitlines()) < 200, path.name

"""The network in the page: PyTorch's answers, and a page that works without it, waits for it, loses it, is used by keys."""

import base64
import html
import io
import json
import time

import pytest
import torch
from browser import browser_page, find_browser
from bs4 import BeautifulSoup
from conftest import HOUR, ROOT, real_data
from nbdev_reader import POLICY
from PIL import Image
from record_browser import measure, served
from torch import nn

from convmixer_edu.anatomy import count_macs, count_parameters, receptive_field
from convmixer_edu.augment import normalize
from convmixer_edu.data import load_images
from convmixer_edu.inference import load_run
from convmixer_edu.ledger import pretrained_run
from convmixer_edu.live import live_html, photograph, sample_pictures

needs_browser = pytest.mark.skipif(not find_browser(), reason="no Chromium or Chrome is installed: the network was not "
                                   "asked in a browser")


def pictures(count):
    """CIFAR-10 where it is, else windows of photographs, as often as they are needed."""
    if source := real_data():
        return load_images(source, "test", limit=count).images
    images = sample_pictures()[0]
    return torch.stack([images[i % len(images)].roll(i, 2) for i in range(count)])


@needs_browser
def test_the_browser_gives_pytorchs_answers():
    found = measure(pictures(100))
    assert found["difference"] < 1e-3 and found["same_class"] == found["images"] == 100


@pytest.fixture(scope="module")
def page():
    model, info = load_run(pretrained_run())
    images, names = sample_pictures()
    body = live_html(model, info, images[:3], [*names[:2], 'a "<b>name</b>"'])
    return f"""<html><head><link rel=icon href=data:,><meta http-equiv="Content-Security-Policy" content="{POLICY}">
        <link rel=stylesheet href=live/live.css></head><body>{body}
        <script type=module src=live/live.js></script></body></html>"""


def test_without_a_script_every_answer_is_there(page):
    tiles = BeautifulSoup(page, "html.parser").select("figure.live li")
    assert len(tiles) == 3 and all(tile.b.text in load_run(pretrained_run())[1].classes for tile in tiles)
    assert tiles[2].img["alt"] == tiles[2].small.text.removeprefix("in truth: ") == 'a "<b>name</b>"' and len(tiles[2].find_all("b")) == 1
    assert all("%" in tile.text for tile in tiles)


def until(tab, script):
    """The value of a JavaScript expression, once it is true."""
    deadline = time.monotonic() + HOUR
    while not (value := tab.evaluate(script)):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return value


STATUS = "document.querySelector('.live-status').textContent"
LIVE = f"{STATUS}.includes('Live,') && !document.querySelector('.live-busy') && {STATUS}"
START = "document.querySelector('.live-start')"


@needs_browser
def test_it_wakes_answers_shuffles_and_takes_a_picture_of_ones_own(page):
    with served(page) as address, browser_page() as tab:
        asked, complaints = tab.open(address)
        assert not complaints and not any("safetensors" in url for url in asked), "fetched before it was asked"
        again = f"{START}.dispatchEvent(new MouseEvent('click', {{ detail: 2 }}))"  # a double click's second half
        assert tab.evaluate(f"{START}.click(), {again}, {START}.textContent") == "Cancel"
        assert tab.evaluate(f"{START}.click(), {START}.textContent").startswith("Wake")
        assert tab.evaluate("document.querySelector('.live progress').hidden")
        tab.evaluate(f"{START}.focus(), {START}.click()")
        first = until(tab, LIVE)
        assert tab.evaluate("document.activeElement === document.querySelector('.live-choices input')")
        assert tab.evaluate("document.querySelectorAll('.live-bars li').length") == 3
        assert tab.evaluate("document.querySelectorAll('.live-maps canvas').length") == 6
        stored = BeautifulSoup(page, "html.parser").select_one("figure.live li").get_text("|").split("|")
        assert f"{stored[0]}, {stored[1].strip()}." in first  # the page said so before
        assert tab.evaluate("document.querySelector('.live-stored').offsetParent === null")

        tab.evaluate("document.querySelector('.live-switch input').click()")
        assert until(tab, LIVE)
        shuffled = tab.evaluate("document.querySelector('.live-picture').toDataURL()")
        tab.evaluate("document.querySelector('.live-switch input').click()")
        assert until(tab, LIVE) and tab.evaluate("document.querySelector('.live-picture').toDataURL()") != shuffled

        tab.evaluate("document.querySelectorAll('.live-choices input')[1].focus()")
        for kind in ("rawKeyDown", "keyUp"):
            tab.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
        assert until(tab, f"{STATUS}.startsWith('a \"<b>name</b>\":') && {LIVE}")

        tab.evaluate("{ const s = document.querySelector('.live-stage input'); s.value = 0; s.dispatchEvent(new Event('input')) }")
        assert tab.evaluate("document.querySelector('.live-stage input').getAttribute('aria-valuetext')") == "patches"

        drop = """(async () => { const bytes = Uint8Array.from(atob("%s"), c => c.charCodeAt(0)), all = new DataTransfer()
            all.items.add(new File([bytes], "own.png"))
            document.querySelector(".live").dispatchEvent(new DragEvent("drop", { dataTransfer: all, bubbles: true })) })()"""
        file = io.BytesIO()
        Image.effect_noise((300, 200), 90).convert("RGB").save(file, "PNG")
        tab.evaluate(drop % base64.b64encode(file.getvalue()).decode())
        assert until(tab, f"{STATUS}.startsWith('your picture:') && {LIVE}")
        file = io.BytesIO()
        Image.new("RGBA", (50, 40)).save(file, "PNG")  # transparent: nothing of the last picture shines through
        tab.evaluate(drop % base64.b64encode(file.getvalue()).decode())
        seen = "document.querySelector('.live-picture').getContext('2d').getImageData(0, 0, 320, 320).data"
        assert until(tab, f"{seen}.every(v => v === 255) && {LIVE}")
        tab.evaluate(drop % base64.b64encode(b"no picture").decode())
        assert until(tab, f"{STATUS}.includes('no picture this browser can read') && true")
        assert tab.evaluate("document.querySelectorAll('.live-bars li').length") == 3  # the last answer stays


@needs_browser
def test_a_drawing_is_answered_too(page):
    """By mouse, finger and keys, in a chosen colour; each stroke that ends is asked about, a cleared sheet as well."""
    with served(page) as address, browser_page() as tab:
        tab.open(address)
        tab.evaluate(f"{START}.click()")
        until(tab, LIVE)
        tab.evaluate("document.querySelector('.live-sketch summary').focus()")

        def press(key, code, **more):
            for kind in ("keyDown", "keyUp"):
                tab.send("Input.dispatchKeyEvent", type=kind, key=key, code=key.strip() or "Space", windowsVirtualKeyCode=code, **more)

        def inked(x, y):  # the middle of patch (x, y) of what the network gets: is it not white?
            seen = f"document.querySelector('.live-picture').getContext('2d').getImageData({20*x + 10}, {20*y + 10}, 1, 1).data"
            return tab.evaluate(f"Math.min(...{seen}) < 200")

        answered = f"{STATUS}.startsWith('your drawing:') && {LIVE}"
        again = f"{STATUS.removesuffix('.textContent')}.textContent = ''"
        press("Enter", 13, text="\r")
        assert until(tab, "document.querySelector('.live-sketch').open")
        tab.evaluate("document.querySelector('.live-sketch [type=radio]').focus()")
        press("ArrowRight", 39), press("ArrowRight", 39)
        assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "red"

        tab.evaluate("document.querySelector('.live-sketch canvas').scrollIntoView({ block: 'center' })")
        left, top, side = tab.evaluate("(b => [b.left, b.top, b.width])(document.querySelector('.live-sketch canvas').getBoundingClientRect())")
        for kind, part in (("mousePressed", 0.1), ("mouseMoved", 0.5), ("mouseReleased", 0.5)):
            tab.send("Input.dispatchMouseEvent", type=kind, x=left + part*side, y=top + 0.1*side, button="left", buttons=1, clickCount=1)
        assert until(tab, answered) and inked(4, 1) and not inked(4, 8)
        red, green, _ = tab.evaluate("[...document.querySelector('.live-picture').getContext('2d').getImageData(90, 30, 1, 1).data].slice(0, 3)")
        assert red > 150 > 80 > green

        tab.evaluate(again)
        touch = {"x": left + 0.9*side, "y": top + 0.9*side}
        tab.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[touch])
        tab.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{**touch, "y": top + 0.6*side}])
        tab.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert until(tab, answered) and inked(14, 12)

        tab.evaluate(again)
        tab.evaluate("document.querySelector('.live-sketch button').click()")
        assert until(tab, answered) and not inked(4, 1)
        tab.evaluate(again)
        tab.evaluate("document.querySelector('.live-sketch canvas').focus()")
        for _ in range(3):
            press("ArrowUp", 38)
        assert tab.evaluate(STATUS) == ""  # the brush has only moved
        press(" ", 32, text=" ")
        assert until(tab, answered) and inked(14, 6) and not inked(14, 12)
        tab.evaluate(again)
        press("ArrowLeft", 37, modifiers=8)
        assert until(tab, answered)
        assert tab.evaluate("document.querySelector('[type=file]').value") == ""


@needs_browser
def test_without_its_weights_the_answers_stay_and_it_can_be_tried_again(page):
    with served(page, run=False) as address, browser_page() as tab:
        tab.open(address)
        for _ in range(2):
            tab.evaluate(f"{START}.click()")
            said = until(tab, f"{STATUS}.includes('The stored answers stay.') && {STATUS}")
            assert "config.json is not there (404)" in said
            assert tab.evaluate(f"{START}.textContent").startswith("Wake")
            tab.evaluate(f"{STATUS.removesuffix('.textContent')}.textContent = ''")
        assert tab.evaluate("document.querySelectorAll('.live-stored li').length") == 3


SLIDERS = """<html><head><link rel=icon href=data:,></head><body><figure class="live-anatomy"><p class="live-fallback">as ever</p></figure>
    <figure class="live-knife"><img class="live-fallback" src="PHOTO" alt="a photograph"></figure>
    <script type=module src=live/sliders.js></script></body></html>"""


@needs_browser
def test_sliders_say_what_the_package_counts():
    """By keys: each slider moves, the sentence follows, what stood there before is out of the way."""
    page = SLIDERS.replace("PHOTO", photograph())
    sizes = [dict(h=h, d=d, k=k, p=p) for h, d, k, p in ((1536, 20, 9, 7), (64, 1, 1, 32), (256, 8, 5, 2), (768, 32, 7, 14))]
    with served(page, run=False) as address, browser_page() as tab:
        tab.open(address)
        found = tab.evaluate(f"import('/live/sliders.js').then(m => {json.dumps(sizes)}.map(s => [m.anatomy(s), m.patches(s)]))")
        for s, (net, cut) in zip(sizes, found, strict=True):
            four = s["h"], s["d"], s["k"], s["p"]
            assert (net["parameters"], net["macs"]) == (count_parameters(*four), count_macs(*four))
            assert net["field"] == receptive_field(s["d"], s["k"], s["p"]) and cut["places"] == (224//s["p"])**2
            assert cut["numbers"] == 3*s["p"]**2 and cut["pairs"] == cut["places"]**2
        until(tab, "document.querySelectorAll('.live-sliders').length == 2")
        assert tab.evaluate("[...document.querySelectorAll('.live-fallback')].every(part => part.hidden)")
        for slider in range(5):
            said = "[...document.querySelectorAll('[role=status]')].map(part => part.textContent).join()"
            before = tab.evaluate(said)
            tab.evaluate(f"document.querySelectorAll('.live-sliders input')[{slider}].focus()")
            for kind in ("rawKeyDown", "keyUp"):
                tab.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
            assert until(tab, f"{said} != {json.dumps(before)}")
            assert tab.evaluate("document.activeElement.getAttribute('aria-valuetext')")


@needs_browser
def test_a_position_shows_its_row_of_attention():
    """The shares are PyTorch's; a click and a key choose the position, and the sentence says whose row it is."""
    query = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    rows = (query @ query.T / 3**0.5).softmax(1)
    data = json.dumps({"query": query.tolist(), "colours": [[n, n, n] for n in range(16)]})
    page = SLIDERS.split("<figure")[0] + f"""<style>canvas {{ width: 400px }}</style><figure class="live-attention" data-positions='{data}'>
        <p class="live-fallback">as ever</p></figure><script type=module src=live/sliders.js></script></body></html>"""
    with served(page, run=False) as address, browser_page() as tab:
        tab.open(address)
        found = tab.evaluate(f"import('/live/sliders.js').then(m => {query.tolist()}.map((_, i) => m.attend({query.tolist()}, i)))")
        assert torch.allclose(torch.tensor(found), rows, atol=1e-6)
        said = "document.querySelector('[role=status]').textContent"
        sizes = "[...document.querySelectorAll('output')].map(part => part.textContent).join()"
        assert until(tab, sizes) == "1,2" and tab.evaluate("document.querySelector('.live-fallback').hidden")
        box = tab.evaluate("(b => [b.left, b.top, b.width, b.height])(document.querySelector('canvas').getBoundingClientRect())")
        for part, wanted in ((0.3, "3,3"), (0.9, "3,4")):  # on the image, and on its row beside it
            for kind in ("mousePressed", "mouseReleased"):
                tab.send("Input.dispatchMouseEvent", type=kind, x=box[0] + part*box[2], y=box[1] + 0.6*box[3], button="left", clickCount=1)
            assert until(tab, f"{sizes} == '{wanted}' && {said}")
        order = rows[11].argsort(descending=True)
        count = int((rows[11][order].cumsum(0) < 0.5).sum()) + 1
        far = max(((int(n) // 4 - 2)**2 + (int(n) % 4 - 3)**2)**0.5 for n in order[:count])
        assert tab.evaluate(said) == (f"Half of its attention goes to {count} of 16 positions; the farthest of them is {far:.0f} steps away.")
        tab.evaluate("document.querySelector('input').focus()")
        for kind in ("rawKeyDown", "keyUp"):
            tab.send("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
        assert until(tab, f"{sizes} == '2,4'")


@needs_browser
def test_a_poke_moves_what_pytorch_moves():
    """After each half, with and without the residual: PyTorch's numbers; keys and a click say where and after what."""
    torch.manual_seed(0)
    grid, pairs = torch.randn(2, 9, 9, dtype=torch.float64), [
        (nn.Conv2d(2, 2, 3, groups=2, padding=1, bias=False).double(), nn.Conv2d(2, 2, 1, bias=False).double()) for _ in range(2)]
    data = {"grid": grid.flatten(1).tolist(), "blocks": [{name: conv.weight.flatten(1).tolist() for name, conv in zip(
        ("depthwise", "pointwise"), pair, strict=True)} for pair in pairs]}
    page = SLIDERS.split("<figure")[0] + f"""<style>canvas {{ width: 90px }}</style><figure class="live-poke" data-network='{json.dumps(data)}'>
        <p class="live-fallback">as ever</p></figure><script type=module src=live/sliders.js></script></body></html>"""

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

    with served(page, run=False) as address, browser_page() as tab:
        tab.open(address)
        for residual in (True, False):
            found = tab.evaluate(f"import('/live/sliders.js').then(m => m.halves({json.dumps(data['grid'])}, {json.dumps(data['blocks'])}, "
                                 f"9, {json.dumps(residual)}))")
            for ours, theirs in zip(found[1:], steps(grid, residual), strict=True):
                assert torch.allclose(torch.tensor(ours, dtype=torch.float64), theirs.flatten(1), atol=1e-9)
        said = "document.querySelector('[role=status]')?.textContent"
        assert until(tab, said) == sentence(0, True, 4, 4) and "9 of 81 positions have moved, in 1 of 2" in tab.evaluate(said)
        for slider, key, code, expected in ((2, "ArrowRight", 39, (1, True, 4, 4)), (2, "ArrowRight", 39, (2, True, 4, 4)),
                                            (3, "ArrowLeft", 37, (2, False, 4, 4)), (0, "ArrowLeft", 37, (2, False, 3, 4))):
            tab.evaluate(f"document.querySelectorAll('input')[{slider}].focus()")
            for kind in ("rawKeyDown", "keyUp"):
                tab.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
            assert until(tab, f"{said} == {json.dumps(sentence(*expected))}"), tab.evaluate(said)
        box = tab.evaluate("(b => [b.left, b.top, b.width, b.height])(document.querySelector('canvas').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            tab.send("Input.dispatchMouseEvent", type=kind, x=box[0] + 0.05*box[2], y=box[1] + 0.95*box[3], button="left", clickCount=1)
        assert until(tab, f"{said} == {json.dumps(sentence(2, False, 8, 0))}")


ORDER = [{"name": "a", "paper": -3.0, "ours": 1.0}, {"name": "b", "paper": -1.0, "ours": -2.0}, {"name": "c", "paper": 0.5, "ours": 0.0}]


@needs_browser
def test_changes_are_put_in_an_order_and_compared():
    page = SLIDERS.split("<figure")[0] + f"""<figure class="live-order" data-rows='{json.dumps(ORDER)}'><p class="live-fallback">as ever</p></figure>
        <script type=module src=live/order.js></script></body></html>"""
    with served(page, run=False) as address, browser_page() as tab:
        tab.open(address)
        names = "[...document.querySelectorAll('.live-order li')].map(item => item.dataset.name).join('')"
        assert until(tab, names) == "abc" and tab.evaluate("document.querySelector('.live-fallback').hidden")
        tab.evaluate("document.querySelectorAll('.live-order li')[1].querySelector('button').focus()")
        for kind in ("keyDown", "keyUp"):
            tab.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
        assert until(tab, names + " == 'bac'") and "now number 1 of 3" in tab.evaluate("document.querySelector('[role=status]').textContent")
        assert tab.evaluate("document.activeElement.getAttribute('aria-label').startsWith('b:')")  # the focus goes along
        tab.evaluate("document.querySelector('.live-start').click()")
        assert tab.evaluate("document.querySelector('[role=status]').textContent") == (
            "Of 3 pairs, 2 stand in the paper's order and 2 in that of our runs.")
        assert "paper −3.0, ours +1.0" in tab.evaluate("document.querySelectorAll('.live-order li')[1].textContent")


@needs_browser
def test_draws_of_augmentation_come_one_at_a_time():
    """The button and the keys step through a part's draws and begin again; the picture beside the sentence is its own."""
    sheet, file = Image.new("RGB", (30, 20)), io.BytesIO()
    for place in range(6):  # (row, column): a colour of its own
        sheet.paste((0, 40 * place, 255), (place % 3 * 10, place // 3 * 10, place % 3 * 10 + 10, place // 3 * 10 + 10))
    sheet.save(file, "PNG")
    said = json.dumps({"mixup": ["one half.", "a third."], "erasing": ["a hole.", "a large hole."]})
    page = SLIDERS.split("<figure")[0] + f"""<style>canvas {{ width: 200px }}</style><figure class="live-draws" data-draws='{said}'>
        <img class="live-fallback" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="all draws"></figure>
        <script type=module src=live/draws.js></script></body></html>"""
    with served(page, run=False) as address, browser_page() as tab:
        _, complaints = tab.open(address)
        sentence = "document.querySelector('[role=status]')?.textContent"

        def shows(said, place):
            until(tab, f"{sentence} == {json.dumps(said)}")
            for x, expected in ((5, 3 * (place // 3)), (16, place)):  # left as it is, right the draw
                pixel = f"[...document.querySelector('canvas').getContext('2d').getImageData({x}, 5, 1, 1).data]"
                assert tab.evaluate(pixel)[:3] == [0, 40 * expected, 255]

        def press(key, code, **more):
            for kind in ("keyDown", "keyUp"):
                tab.send("Input.dispatchKeyEvent", type=kind, key=key, code=key.strip() or "Space", windowsVirtualKeyCode=code, **more)

        shows("mixup, draw 1 of 2. one half.", 1)
        assert not complaints and tab.evaluate("document.querySelector('.live-fallback').hidden")
        x, y = tab.evaluate("(b => [b.left + b.width/2, b.top + b.height/2])(document.querySelector('button').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            tab.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        shows("mixup, draw 2 of 2. a third.", 2)
        tab.evaluate("document.querySelector('button').focus()")
        press("Enter", 13, text="\r")
        shows("mixup, draw 1 of 2. one half.", 1)
        tab.evaluate("document.querySelector('input').focus()")
        press("ArrowDown", 40)
        shows("erasing, draw 1 of 2. a hole.", 4)
        assert tab.evaluate("document.activeElement.value") == "erasing"


@needs_browser
def test_a_kernel_answers_what_the_networks_layer_does():
    """The recorded network's own kernels on a photograph: PyTorch's numbers; keys and a click choose; paper gets all kernels."""
    net, about = load_run(pretrained_run())
    picture = sample_pictures()[0][:1]
    channels, numbers, layers = [[21, 1, 205], [7, 200, 255]], [], []
    with torch.no_grad():
        z = net[:3](normalize(picture, about.stats.mean, about.stats.std))
        for block, chosen in zip((net[3], net[4]), channels, strict=True):
            conv = block[0].fn[0]
            numbers.append(torch.cat([conv.bias[chosen, None], conv.weight[chosen].flatten(1), z[0, chosen].flatten(1)], 1))
            layers.append(conv(z)[0, chosen].flatten(1))
            z = block(z)
    k, side, expected, weights = about.config.kernel_size, z.shape[-1], torch.stack(layers), torch.stack(numbers)[..., 1:26]
    shape = json.dumps({"k": k, "side": side, "channels": channels})
    packed = base64.b64encode(torch.stack(numbers).half().numpy().tobytes()).decode()
    page = SLIDERS.split("<figure")[0] + f"""<link rel=stylesheet href=live/live.css><style>canvas {{ width: 300px !important }}</style>
        <div class="live-kernels" data-shape='{shape}' data-kernels="{packed}"><div class="live-fallback">as ever</div>
        <img hidden src="{photograph(32)}" alt="a temple"></div><script type=module src=live/kernels.js></script></body></html>"""

    with served(page, run=False) as address, browser_page() as tab:
        _, complaints = tab.open(address)
        found = torch.tensor(tab.evaluate(f"""import('/live/kernels.js').then(m => m.unpack('{packed}', {shape}).map(row =>
            row.map(kernel => [...m.answers(kernel, {shape})])))"""))
        same = [nn.functional.conv2d(own[:, 26:].view(1, 3, side, side), own[:, 1:26].view(3, 1, k, k), own[:, 0], padding="same", groups=3)
                for own in torch.stack(numbers).half().float()]
        assert not complaints and (found - torch.cat(same).flatten(2)).abs().max() < 1e-3
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()  # half precision came between

        def sentence(block, n):
            answers, squares = found[block, n], weights[block, n].reshape(k, k).square()
            line = torch.arange(k) - (k - 1)/2
            far = float((squares * (line[:, None]**2 + line**2)).sum() / squares.sum())**0.5
            row, column = divmod(int(answers.abs().argmax()), side)
            return (f"Channel {channels[block][n]}: the weights lie {far:.2f} positions from the kernel's middle. Its strongest response is "
                    f"{answers[row*side + column]:.1f}, in row {row + 1} from the top, column {column + 1} from the left.").replace(" -", " −")

        said = "document.querySelector('[role=status]')?.textContent"
        assert until(tab, said) == sentence(0, 0)
        assert tab.evaluate("document.querySelector('.live-fallback').checkVisibility()") is False
        for slider, expected_now in ((0, (1, 0)), (1, (1, 1))):
            tab.evaluate(f"document.querySelectorAll('input')[{slider}].focus()")
            for kind in ("rawKeyDown", "keyUp"):
                tab.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
            assert until(tab, f"{said} == {json.dumps(sentence(*expected_now))}")
            assert tab.evaluate("document.activeElement.getAttribute('aria-valuetext')").endswith(": 2")
        box = tab.evaluate("(b => [b.left, b.top, b.width, b.height])(document.querySelector('canvas').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            tab.send("Input.dispatchMouseEvent", type=kind, x=box[0] + 0.9*box[2], y=box[1] + 0.2*box[3], button="left", clickCount=1)
        assert until(tab, f"{said} == {json.dumps(sentence(0, 2))}")
        tab.send("Emulation.setEmulatedMedia", media="print")
        assert tab.evaluate("[...document.querySelector('.live-kernels').children].filter(part => part.checkVisibility()).length") == 1
        assert tab.evaluate("document.querySelector('.live-fallback').checkVisibility()")


TYPED = [("0,5", 1, 0.5), ("0,125", 1, 0.125), ("2,302585", 1, 2.302585), ("1,024", 1, 1024), ("153,600,000", 1, 153600000),
         ("1_000", 1, 1000), ("3/4", 1, 0.75), ("1e-3", 1, 0.001), ("3/0", 1, None), ("_", 1, None), ("1.2.3", 1, None),
         ("50 %", 0.5, 0.5), ("1.73 %", 1.732, 1.73), ("(1/4, 0.5)", [1, 1], [0.25, 0.5]), ("0,6; 0,8", [1, 1], [0.6, 0.8]),
         ("153,600,000; 7", [1, 1], [153600000, 7]), ("1,", [1, 1], None), ("No", True, False), ("'a.b'", "c", "a.b")]


@needs_browser
def test_an_exercise_reads_what_people_type():
    with served(run=False) as address, browser_page() as tab:
        tab.open(address)
        cases = json.dumps([case[:2] for case in TYPED])
        found = tab.evaluate(f"import('/live/exercise.js').then(e => {cases}.map(([text, like]) => e.parse(text, like)))")
    for (text, _, value), read in zip(TYPED, found, strict=True):
        assert read == (pytest.approx(value) if isinstance(value, (float, list)) else value), text


@needs_browser
@pytest.mark.parametrize("right, wrong, listed", [
    ("hk", [["hp", "Not p."], ["h", "Two."]], ["h", "hk", "hp"]), (False, [[True, "Look again."]], ["yes", "no"]),
    (["a", "b"], [[["a"], "One more."], [["b"], "Another."]], ["a", "a, b", "b"])])
def test_an_answer_is_chosen_where_few_are_known(right, wrong, listed):
    """By keys: nothing chosen, each known mistake, the right one, which is remembered; a form beside it is its own."""
    known = html.escape(json.dumps({"right": right, "wrong": wrong, "within": 0, "ok": "Yes.", "other": "No."}))
    number = html.escape(json.dumps({"right": 2, "wrong": [[3, "Less."]], "within": 0, "ok": "Yes.", "other": "No."}))
    page = SLIDERS.split("<figure")[0] + f"""<form class="exercise" data-known="{known}">as ever</form><form class="exercise"
        data-known="{number}">as ever</form><script type=module src=live/exercise.js></script></body></html>"""
    with served(page, run=False) as address, browser_page() as tab:
        def press(name, code, **more):
            for kind in ("keyDown", "keyUp"):
                tab.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)

        said = "document.querySelector('form [role=status]').textContent"
        sentences = {", ".join(m) if isinstance(m, list) else {True: "yes"}.get(m, m): f"Not yet. {s}" for m, s in wrong}
        tab.open(address)
        assert until(tab, "[...document.querySelectorAll('form')].map(form => form.elements.length).join()").endswith(",2")
        assert tab.evaluate("[...document.querySelectorAll('[type=radio]')].map(part => part.value)") == listed
        tab.evaluate("document.querySelector('form button').focus()")
        press("Enter", 13, text="\r")
        assert until(tab, said) == "Not yet. Choose an answer first."
        tab.evaluate("document.querySelector('[type=radio]').focus()")
        press(" ", 32, text=" ")
        for answer in listed:
            assert until(tab, "document.activeElement.checked && document.activeElement.value") == answer
            press("Enter", 13, text="\r")
            assert tab.evaluate(said) == sentences.get(answer, "Right. Yes.")
            if answer not in sentences:
                tab.open(address)
                assert until(tab, f"{said} == 'Right. Yes.' && document.querySelector(':checked').value") == answer
                tab.evaluate("document.querySelector(':checked').focus()")
            press("ArrowDown", 40)
        assert tab.evaluate("document.querySelector('[type=text]').value") == ""


def test_each_module_is_short():
    for path in (ROOT / "assets" / "static" / "live").glob("*.js"):
        assert len(path.read_text("utf8").splitlines()) < 200, path.name

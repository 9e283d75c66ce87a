"""The explorer in a real browser where something fails: what is shown belongs together, or is said to be
missing.

The pages are made here, with untrained solvers and a stand-in for onnxruntime-web."""

import base64
import io
import re
import struct
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import data
from companion.explorer import page as explorer_page
from companion.explorer.live import SETTINGS, decibels
from companion.explorer.weights import unpack
from flowlib import Blur
from flowlib.images import to_tensor
from tests.conftest import CHROMIUM, ROOT, QuietHandler
from tests.test_explorer import experiment  # noqa: F401

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
# Answers with the measurement; the file of denoising is cut off.
RUNTIME = """
export const env = { wasm: {} };
export class Tensor { constructor(type, data) { this.data = data; } }
export const InferenceSession = { create: async (file) => {
  globalThis.given = file;
  return { run: async ({ y, step_size: { data: { length: K } } }) => {
    const folds = new Float32Array(K * y.data.length);
    for (let k = 0; k < K; k++) folds.set(y.data, k * y.data.length);
    return { folds: { data: folds }, latent_norms: { data: new Float32Array(K) } };
  } };
} };
"""


@pytest.fixture(scope="module")
def folder(experiment):  # noqa: F811
    explorer_page.write_explorer(experiment)
    packed = experiment.build / "explorer/denoising.bin"
    packed.write_bytes(packed.read_bytes()[:-1000])
    (experiment.build / "runtime.mjs").write_text(RUNTIME, encoding="utf-8")
    return experiment.build


@pytest.fixture
def open_page(browser, folder):
    """open_page(html) -> its page in a browser, from a server that has the explorer's files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages, held = [], []

        def open_(html, without="", width=1000, script="", hold=""):
            (folder / "index.html").write_text(f"<meta charset=utf-8>{html}", encoding="utf-8")
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.add_init_script(script)
            pages.append(page)
            if without:
                page.route(f"**/*{without}*", lambda route: route.abort())
            if hold:
                page.route(f"**/*{hold}*", lambda route: held.append(route))
                page.release = lambda: [route.continue_() for route in held]
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            return page

        yield open_
        for page in pages:
            page.close()
        server.shutdown()


def html_of(folder, ort=None):
    return explorer_page.page(folder / "explorer", "explorer", ort)


def status(page, text):
    said = f"document.querySelector('.status')?.textContent.includes({text!r})"
    page.wait_for_function(said, timeout=60_000)
    return page.locator(".status").inner_text()


def is_blank(page, number):
    """Whether a canvas of the panels shows nothing."""
    context = f"document.querySelectorAll('.panels canvas')[{number}].getContext('2d')"
    return page.evaluate(f"{context}.getImageData(0, 0, 64, 64).data.every((v) => v === 0)")


def test_two_explorers_on_one_page(open_page, folder):
    page = open_page(html_of(folder) + html_of(folder))
    page.wait_for_function("document.querySelectorAll('.flow-explorer .panels strong').length === 2")
    first, second = page.locator(".flow-explorer").all()
    first.locator("input[value='1']").check(force=True)
    second.locator("input[value='2']").check(force=True)
    shown = [part.locator(".panels .caption").last.inner_text() for part in (first, second)]
    assert "test image 2" in shown[0] and "test image 3" in shown[1]
    assert page.locator(":is(.tasks, .images) input:checked").count() == 4  # a task and an image in each
    ids = page.evaluate("Array.from(document.querySelectorAll('[id]')).map((node) => node.id)")
    assert len(set(ids)) == len(ids) == 4


def test_a_grid_that_cannot_be_loaded(open_page, folder):
    page = open_page(html_of(folder), without="inpainting.jpeg")
    assert "the precomputed pictures (inpainting) could not be loaded" in status(page, "Nothing to show")
    assert is_blank(page, 1) and not is_blank(page, 0)
    page.locator("input[value=denoising]").check(force=True)  # whose grid is there
    status(page, "Precomputed pictures")
    assert not is_blank(page, 1)


def test_a_grid_is_asked_for_again(open_page, folder):
    page = open_page(html_of(folder), without="inpainting.jpeg")
    status(page, "Nothing to show")
    page.unroute("**/*inpainting.jpeg*")
    page.locator("input[value=denoising]").check(force=True)
    page.locator("input[value=inpainting]").check(force=True)
    page.wait_for_function("document.querySelector('.flow-explorer').explorer.sprite", timeout=20_000)
    assert not is_blank(page, 1)


def test_the_solver_answers_without_its_grid(open_page, folder):
    page = open_page(html_of(folder, "runtime.mjs"), without="inpainting.jpeg")
    status(page, "Live: the solver runs")
    assert not is_blank(page, 1)


def picture(size=(80, 64), kind="png"):
    file = io.BytesIO()
    Image.fromarray(data.draw_faces([5], size=64)[0]).resize(size).save(file, kind)
    return file.getvalue()


def test_nothing_old_beside_a_new_measurement(open_page, folder):
    """An own photo, then a task whose solver fails: no reconstruction of it is known."""
    page = open_page(html_of(folder, "runtime.mjs"))
    status(page, "Live: the solver runs")
    photo = {"name": "face.png", "mimeType": "image/png", "buffer": picture()}
    page.locator("input[type=file]").set_input_files(photo)
    page.get_by_role("button", name="Done").click()
    page.locator("input[value=denoising]").check(force=True)
    assert "its file is cut off or broken" in status(page, "reload this page")
    assert is_blank(page, 1) and not is_blank(page, 0)
    assert "dB" not in page.locator(".panels strong").inner_text()
    assert not page.locator(".curves").is_visible()
    page.locator("input[value='0']").check(force=True)  # back to a test image, of which there is a grid
    assert not is_blank(page, 1) and "dB" in page.locator(".panels strong").inner_text()


def test_a_perfect_measurement(open_page, folder):
    page = open_page(html_of(folder, "runtime.mjs"))
    status(page, "Live: the solver runs")
    slider = "(s) => { s.value = 0; s.dispatchEvent(new Event('input', { bubbles: true })); }"
    page.get_by_label("hole", exact=True).first.evaluate(slider)
    assert "exact" in page.locator(".panels .caption").first.inner_text()


def live(open_page, folder, **options):
    page = open_page(html_of(folder, "runtime.mjs"), **options)
    status(page, "Live: the solver runs")
    return page


def move(page, label, value):
    slider = "(s, v) => { s.value = v; s.dispatchEvent(new Event('input', { bubbles: true })); }"
    page.get_by_label(label, exact=True).first.evaluate(slider, value)


def explorer(page, what):
    return page.evaluate(
        f"(() => {{ const e = document.querySelector('.flow-explorer').explorer; return {what} }})()"
    )


def all_points(page):
    """PSNR at the plots' points once all are there: (over the factor of μ, over the shift of λ)."""
    rows = "e.table.rows[2], e.table.rows.map((row) => row[4])"
    page.wait_for_function(
        "() => { const e = document.querySelector('.flow-explorer').explorer;"
        f" return [{rows}].every((v, i) => v.filter(Number.isFinite).length === [9, 5][i]) }}",
        timeout=60_000,
    )
    return explorer(page, f"[{rows}]")


def test_plots_stay_whatever_is_measured(open_page, folder):
    page = live(open_page, folder)
    of_grid = all_points(page)
    for change in (lambda: move(page, "hole", 30), lambda: page.locator(".panels canvas").first.click()):
        change()
        assert page.locator(".curves").is_visible()
        found = all_points(page)  # the stand-in answers with the measurement, whatever the sliders say
        y, x = np.array(explorer(page, "Array.from(e.y)")), np.array(explorer(page, "Array.from(e.x)"))
        assert np.allclose(sum(found, []), -10 * np.log10(((y - x) ** 2).mean()), atol=1e-3)
        assert found != of_grid
        points = [
            len(line.get_attribute("points").split()) for line in page.locator(".curves polyline").all()
        ]
        assert points == [9, 5] and page.locator(".curves .trained").count() == 2


def test_trained_values_restore_everything(open_page, folder):
    page = live(open_page, folder)
    before = explorer(page, "[e.mu, e.lambda, Array.from(e.mask), Array.from(e.y)]")
    page.locator("summary").click()
    for label, value in (("hole", 30), ("step size μ", 1.5), ("shrinkage λ", 0.1), ("μ fold 2", 1.9)):
        move(page, label, value)
    assert explorer(page, "e.changed") and explorer(page, "[e.mu, e.lambda]") != before[:2]
    page.get_by_role("button", name="Trained values").click()
    assert explorer(page, "[e.mu, e.lambda, Array.from(e.mask), Array.from(e.y)]") == before
    assert not explorer(page, "e.changed") and page.get_by_label("hole").input_value() == "19"
    of_grid = explorer(page, "e.task.psnr[0]")
    assert explorer(page, "e.table.rows") == of_grid


def test_a_painted_mask_stays_until_it_is_cleared(open_page, folder):
    page = live(open_page, folder)
    trained = explorer(page, "Array.from(e.mask)")
    canvas = page.locator(".panels canvas").first
    width = canvas.bounding_box()["width"]
    canvas.click(position={"x": width / 8, "y": width / 8})  # pixel (8, 8)
    painted = explorer(page, "Array.from(e.mask)")
    assert painted[8 * 64 + 8] == 0 and painted != trained
    move(page, "μ fold 2", 1.9)
    move(page, "hole", 30)
    page.get_by_role("button", name="Trained values").click()
    assert explorer(page, "Array.from(e.mask)") == painted and explorer(page, "e.mu") == explorer(
        page, "e.task.mu"
    )
    page.locator("input[value='1']").check(force=True)
    page.locator("input[value=denoising]").check(force=True)
    status(page, "cut off")
    page.locator("input[value=inpainting]").check(force=True)
    status(page, "Live: the solver runs")
    assert explorer(page, "Array.from(e.mask)") == painted
    page.get_by_role("button", name="Clear mask").click()
    assert explorer(page, "Array.from(e.mask)") == trained


def test_sliders_reach_what_was_trained(open_page, folder):
    html = html_of(folder, "runtime.mjs").replace('"mu": [0.5, 0.5]', '"mu": [0.5, 2.469]')
    page = open_page(html)
    status(page, "Live: the solver runs")
    page.locator("summary").click()
    slider = page.get_by_label("μ fold 2", exact=True)
    assert float(slider.input_value()) == pytest.approx(2.469, abs=0.01)
    assert float(slider.get_attribute("max")) >= 1.5 * 2.469


@pytest.mark.parametrize("width", [1280, 390])
def test_what_is_wrong_with_a_photo_is_said_beside_its_button(open_page, folder, width):
    page = open_page(
        f"<meta name=viewport content='width=device-width'>{html_of(folder, 'runtime.mjs')}", width=width
    )
    status(page, "Live: the solver runs")
    file = page.locator("input[type=file]")
    file.set_input_files({"name": f"{'notes' * 20}.png", "mimeType": "image/png", "buffer": b"only text"})
    alert = page.get_by_role("alert")
    alert.wait_for()
    ours, its = alert.bounding_box(), page.locator(".own").bounding_box()
    assert "is no image" in alert.inner_text() and abs(ours["y"] - its["y"]) < 100
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    file.set_input_files({"name": "face.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("dialog[open]")
    assert alert.count() == 0  # nothing is said


def test_readouts_and_what_is_said_of_sliders(open_page, folder):
    page = live(open_page, folder)
    page.locator("summary").click()
    for row in page.locator(".slider").all():
        words = row.locator("input").get_attribute("aria-valuetext")
        assert words and words == row.locator("output").text_content()
    readout = page.locator(".sliders output").first
    assert readout.inner_text().startswith("× 1.00 (mean")
    move(page, "μ fold 2", 1.9)
    assert readout.inner_text() == "× 1.00, fold 2 at 1.900"
    move(page, "μ fold 1", 0.1)
    assert readout.inner_text() == "× 1.00, folds 1 2 moved"
    assert page.get_by_label("step size μ").get_attribute("aria-valuetext") == readout.inner_text()


def test_what_runs_and_its_size_are_said_and_it_is_loaded_when_its_tab_is_opened(open_page, folder):
    page = live(open_page, folder)
    packed = folder / "explorer/inpainting.bin"
    size = round(packed.stat().st_size / 1e6, 1)
    assert f"{size:g} MB" in page.locator(".tasks label").first.inner_text()
    said = page.locator(".about").inner_text()
    assert "GLOW prox, 2 folds" in said and "12.35 dB on 4 test images" in said and "drawn faces" in said
    given = bytes(page.evaluate("Array.from(given)"))
    assert given == unpack(packed.read_bytes())  # the script unpacks as Python does
    asked = "performance.getEntriesByType('resource').map((r) => r.name.match(/[a-z]+(?=.bin$)/)?.[0])"
    assert [name for name in page.evaluate(asked) if name] == ["inpainting"]
    page.locator("input[value=denoising]").check(force=True)
    assert "3 folds" in page.locator(".about").inner_text()
    status(page, "its file is cut off or broken")
    assert [name for name in page.evaluate(asked) if name] == ["inpainting", "denoising"]


def ramp(size):
    """A photo with the column in red and the row in green."""
    column, row = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    file = io.BytesIO()
    Image.fromarray(np.stack([column, row, 0 * row], axis=-1).astype(np.uint8)).save(file, "png")
    return {"name": "ramp.png", "mimeType": "image/png", "buffer": file.getvalue()}


def square(page):
    """(left, top, side) of what is shown of a ramp, in its pixels."""
    x = (np.array(explorer(page, "Array.from(e.x)")).reshape(3, 64, 64) + 0.5) * 255
    side = (x[0, 0, -1] - x[0, 0, 0]) * 64 / 63
    return x[0, 0, 0] + 0.5 - side / 128, x[1, 0, 0] + 0.5 - side / 128, side


def test_a_photo_is_cropped(open_page, folder):
    page = live(open_page, folder)
    page.locator("input[type=file]").set_input_files(ramp((250, 128)))
    page.wait_for_selector("dialog[open]")
    assert square(page) == pytest.approx((61, 0, 128), abs=1.5)  # the middle
    box = page.locator("dialog canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - box["width"] / 4, middle[1] + 50, steps=4)
    page.mouse.up()
    assert square(page) == pytest.approx((61 + 32, 0, 128), abs=1.5)  # there is no more above
    move(page, "zoom", 2)
    assert square(page) == pytest.approx((61 + 64, 32, 64), abs=1.5)
    page.locator("dialog canvas").focus()
    for key in ["ArrowLeft"] * 10 + ["ArrowDown"] * 10:
        page.keyboard.press(key)
    assert square(page) == pytest.approx((61 + 48, 48, 64), abs=1.5)
    page.mouse.wheel(0, 100_000)
    page.wait_for_function("document.querySelector('dialog input').value === '1'")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Crop…").click()
    page.keyboard.press("Escape")
    page.locator("input[value='1']").check(force=True)
    assert not page.locator("dialog").is_visible() and not page.get_by_text("Crop…").is_visible()


SHIFTS_OF_LAYOUT = """window.moved = 0; new PerformanceObserver((list) => list.getEntries().forEach((e) => {
  if (!e.hadRecentInput) window.moved += e.value })).observe({ type: "layout-shift", buffered: true });"""


@pytest.mark.parametrize("width", [1000, 390])
def test_nothing_moves_while_it_loads(open_page, folder, width):
    html = html_of(folder, "runtime.mjs") + "<p>What stands below.</p>" * 30
    page = open_page(
        f"<meta name=viewport content='width=device-width'>{html}", width=width, script=SHIFTS_OF_LAYOUT
    )
    status(page, "Live: the solver runs")
    page.wait_for_timeout(300)
    assert page.evaluate("moved") < 0.05
    assert page.evaluate("document.documentElement.scrollWidth") <= width


SLOW = """const decode = createImageBitmap;
window.bitmaps = [];
window.createImageBitmap = async (source, ...options) => {
  if (source.name?.startsWith("slow")) await new Promise((resolve) => setTimeout(resolve, 1000));
  const bitmap = await decode(source, ...options);
  bitmaps.push(bitmap);
  return bitmap;
};"""


def drop(page, where, photo):
    """Drops a file; whether the browser is kept from opening it."""
    transfer = page.evaluate_handle(
        "([name, bytes]) => { const d = new DataTransfer();"
        " d.items.add(new File([new Uint8Array(bytes)], name, { type: 'image/png' })); return d }",
        [photo["name"], list(photo["buffer"])],
    )
    event = (
        "(node, dataTransfer) => !node.dispatchEvent("
        "new DragEvent('{}', {{ dataTransfer, bubbles: true, cancelable: true }}))"
    )
    return all([page.locator(where).evaluate(event.format(name), transfer) for name in ("dragover", "drop")])


def test_a_photo_is_dropped_anywhere(open_page, folder):
    page = open_page(f"<h1>A page</h1>{html_of(folder, 'runtime.mjs')}{html_of(folder, 'runtime.mjs')}")
    page.wait_for_function("document.querySelectorAll('.is-live').length === 2", timeout=60_000)
    for where in ("h1", ".caption >> nth=2", ".curves >> nth=0", ".sliders >> nth=0"):
        page.locator("input[value='0']").first.check(force=True)
        assert drop(page, where, ramp((100, 100)))
        page.wait_for_selector("dialog[open]")
        assert square(page) == pytest.approx((0, 0, 100), abs=1.5)
        assert page.locator("dialog[open]").count() == 1  # of one explorer
        page.get_by_role("button", name="Done").click()
    assert drop(page, ".sliders >> nth=1", ramp((100, 100)))
    page.wait_for_selector(".flow-explorer >> nth=1 >> dialog[open]")


def test_a_photo_that_comes_early_waits_for_the_solver(open_page, folder):
    """And the page has what it needs from the start, none of it blank."""
    page = open_page(f"<h1>A page</h1>{html_of(folder, 'runtime.mjs?slow')}", hold="slow")
    assert "Loading the solver" in page.locator(".status").inner_text()
    for part in (".own", ".status", ".controls", ".folds", ".sliders", ".curves polyline >> nth=0"):
        assert page.locator(part).is_visible(), part
    assert page.locator(".controls").get_attribute("inert") is not None
    state = page.locator(".status").bounding_box()
    assert state["y"] + state["height"] <= page.locator(".panels").bounding_box()["y"] < 500
    drop(page, "h1", ramp((100, 100)))
    page.wait_for_selector("dialog[open]")
    page.get_by_role("button", name="Done").click()
    assert "Your photo is next" in status(page, "Loading")
    assert not is_blank(page, 0) and is_blank(page, 1)
    page.release()
    status(page, "Live: the solver runs")
    assert square(page) == pytest.approx((0, 0, 100), abs=1.5) and not is_blank(page, 1)


def test_the_later_choice_counts(open_page, folder):
    page = live(open_page, folder, script=SLOW)
    slow, fast = ramp((128, 128)) | {"name": "slow.png"}, ramp((64, 64))
    drop(page, ".status", slow)
    page.locator("input[value='1']").check(force=True)
    page.wait_for_timeout(1500)
    assert not explorer(page, "e.photo") and not page.locator("dialog").is_visible()
    drop(page, ".status", slow)
    drop(page, ".status", fast)
    page.wait_for_function("document.querySelector('.flow-explorer').explorer.square?.bitmap.height === 64")
    page.wait_for_function("bitmaps.length >= 3")
    assert square(page) == pytest.approx((0, 0, 64), abs=1.5)
    drop(page, ".status", {"name": "slow notes.png", "buffer": b"only text"})
    drop(page, ".status", fast)
    page.wait_for_timeout(1500)
    assert page.get_by_role("alert").count() == 0
    open_ = "() => bitmaps.filter((bitmap) => bitmap.width).length"
    page.wait_for_function("bitmaps.length === 4")
    page.wait_for_timeout(500)
    assert page.evaluate(open_) == 1 and page.evaluate("bitmaps.length") == 4
    for _ in range(2):  # larger than what is kept
        drop(page, ".status", {"name": "face.png", "buffer": picture((1600, 1300))})
        page.wait_for_function(
            "document.querySelector('.flow-explorer').explorer.square.bitmap.height === 1024"
        )
    assert page.evaluate(open_) == 1
    page.get_by_role("button", name="Done").click()
    page.locator("input[value='0']").click(force=True)
    page.wait_for_function(f"({open_})() === 0")


def test_escape_closes_the_dialog_whatever_the_page_does_with_it(open_page, folder):
    swallow = "<script>document.addEventListener('keydown', (event) => event.preventDefault())</script>"
    page = open_page(swallow + html_of(folder, "runtime.mjs"))
    status(page, "Live: the solver runs")
    page.locator("input[type=file]").set_input_files(ramp((100, 100)))
    for act in (lambda: page.locator("dialog p").click(), lambda: page.locator("dialog canvas").focus()):
        page.wait_for_selector("dialog[open]")
        act()
        page.keyboard.press("Escape")
        assert not page.locator("dialog").is_visible()
        page.get_by_role("button", name="Crop…").click()


NOISE = """const read = CanvasRenderingContext2D.prototype.getImageData;
CanvasRenderingContext2D.prototype.getImageData = function (...place) {
  const data = read.apply(this, place);
  for (let i = 0; i < data.data.length; i++) if (i % 4 < 3) data.data[i] = 256 * Math.random();
  return data;
};"""


def test_a_browser_that_gives_noise_for_pixels(open_page, folder):
    """Its settings for privacy do: the faces are as they are, an own photo is refused."""
    page = live(open_page, folder, script=NOISE)
    before = explorer(page, "Array.from(e.x)"), page.locator(".panels").inner_text()
    strip = np.asarray(Image.open(folder / "explorer/originals.png"))[:, :64]
    assert np.allclose(
        np.array(before[0]).reshape(3, 64, 64), strip.transpose(2, 0, 1) / 255 - 0.5, atol=1e-6
    )
    page.locator("input[type=file]").set_input_files(ramp((100, 100)))
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "let this page read canvases" in alert.inner_text()
    assert (explorer(page, "Array.from(e.x)"), page.locator(".panels").inner_text()) == before


def profile(red, green, blue, gamma):
    """An ICC profile: colours of the primaries, (X, Y, Z) each for white at D50, and a power."""

    def tag(kind, *values):
        return kind + bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    white = tag(b"XYZ ", 0.9642, 1, 0.8249)
    name = b"desc" + bytes(4) + struct.pack(">I", 2) + b"a\0" + bytes(78)
    tags = {b"desc": name + bytes(-len(name) % 4), b"cprt": b"text" + bytes(8), b"wtpt": white}
    tags |= {
        key: tag(b"XYZ ", *values) for key, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), (red, green, blue))
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    at, table = 132 + 12 * len(tags), struct.pack(">I", len(tags))
    for key, value in tags.items():
        table += key + struct.pack(">II", at, len(value))
        at += len(value)
    head = struct.pack(">I4xI4s4s4s12x4s", at, 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp").ljust(
        68, b"\0"
    )
    head += b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1, 0.8249))
    return head.ljust(128, b"\0") + table + b"".join(tags.values())


DISPLAY_P3 = (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), 2.2
ADOBE_RGB = (0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446), 2.2


@pytest.mark.parametrize("kind, expected", [(DISPLAY_P3, (219, 67, 48)), (ADOBE_RGB, (231, 79, 57))])
def test_photos_with_colour_profiles_and_turned_ones(open_page, folder, kind, expected):
    page = live(open_page, folder)
    image = Image.new("RGB", (90, 160), (200, 80, 60))
    image.paste((0, 0, 0), (0, 0, 90, 60))  # above, once it is turned by what EXIF says
    turned, exif, file = image.rotate(90, expand=True), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    turned.save(file, "jpeg", quality=98, exif=exif, icc_profile=profile(*kind))
    page.locator("input[type=file]").set_input_files(
        {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}
    )
    page.wait_for_selector("dialog[open]")
    x = (np.array(explorer(page, "Array.from(e.x)")).reshape(3, 64, 64) + 0.5) * 255
    assert x[:, 50, 32] == pytest.approx(expected, abs=6) and x[:, 5, 32] == pytest.approx((0, 0, 0), abs=6)
    assert explorer(page, "[e.square.bitmap.width, e.square.bitmap.height]") == [90, 160]


def test_what_lies_beyond_a_plot_is_marked(open_page, folder):
    page = open_page(html_of(folder))
    status(page, "Precomputed pictures")
    assert page.locator(".beyond").count() == 0 or explorer(page, "e.task.psnr[0].flat().some((v) => v < 10)")
    rows = [[-14.4, 20, 25, 30, None, 20, 15, 15, -20]] * 5
    page.evaluate(
        "(rows) => { const e = document.querySelector('.flow-explorer').explorer;"
        " e.task.psnr[0] = rows; e.table = null; e.update() }",
        rows,
    )
    first, second = page.locator(".curves svg").all()
    assert (
        first.locator(".beyond").count() == 4
    )  # two, and what is not finite as a point and where the sliders are
    assert "≤ 15" in first.text_content() and "not finite" in page.locator(".panels strong").inner_text()
    move(page, "step size μ", 0)
    assert page.locator(".panels strong").inner_text().startswith("−14.40 dB")
    assert first.locator(".beyond").count() == 4 and second.locator(".beyond").count() == 0


def test_controls_say_their_state(open_page, folder):
    page = live(open_page, folder)
    brush, told = (page.get_by_role("radiogroup", name=name) for name in ("Brush", "Hole told to"))
    assert brush.get_by_label("hide").is_checked() and told.get_by_label("last fold").is_checked()
    brush.get_by_label("hide").focus()
    page.keyboard.press("ArrowRight")
    assert explorer(page, "e.restoring") and brush.get_by_label("restore").is_checked()
    told.get_by_label("all folds").check(force=True)
    assert explorer(page, "!e.lastOnly")
    page.get_by_role("button", name="Trained values").click()
    assert brush.get_by_label("hide").is_checked() and not explorer(page, "e.restoring")
    assert told.get_by_label("all folds").is_checked()


@pytest.mark.parametrize("without", ["runtime.mjs", "inpainting.bin", "npm"])
def test_without_what_runs_it_the_page_says_what_to_do(open_page, folder, without):
    page = open_page(html_of(folder, None if without == "npm" else "runtime.mjs"), without=without)
    said = status(page, "For the solver itself and your own photo, ")
    assert ("install npm and build this book again" if without == "npm" else "reload this page: ") in said
    assert page.locator(".status").bounding_box()["y"] < page.locator(".panels").bounding_box()["y"]
    assert not page.locator(".own").is_visible() and "module" not in said
    assert drop(page, ".status", ramp((100, 100)))
    assert "For your own photo, " in page.get_by_role("alert").inner_text()


SMALL = """() => ["button", "summary", "a", "label", "input[type=range]"].flatMap((name) =>
  [...document.querySelectorAll(`.flow-explorer ${name}`)]).filter((node) =>
  node.checkVisibility({ visibilityProperty: true }) && node.getBoundingClientRect().height < 32)
  .map((node) => node.outerHTML)"""


def test_controls_are_large_enough_for_fingers(open_page, folder):
    page = open_page(
        f"<meta name=viewport content='width=device-width'>{html_of(folder, 'runtime.mjs')}", width=390
    )
    status(page, "Live: the solver runs")
    page.locator("summary").click()
    page.locator("input[type=file]").set_input_files(ramp((100, 100)))
    page.wait_for_selector("dialog[open]")
    assert page.evaluate(SMALL) == []


def test_the_slider_of_the_blur_ends_where_the_answer_stays(open_page, folder):
    page = live(open_page, folder)
    page.evaluate(
        "() => { const e = document.querySelector('.flow-explorer').explorer; e.sigmaB = 5;"
        " e.task = { ...e.task, task: 'deblurring', sigma_b: 5, kernel_size: 3 }; e.buildControls() }"
    )
    widest = float(page.get_by_label("blur σ_b").get_attribute("max"))
    assert widest == SETTINGS["deblurring"][1][1] == 5
    x = to_tensor(data.draw_faces([0]))
    assert (Blur(widest).A(x) - Blur(100).A(x)).abs().max() < 0.01


def test_one_minus_sign(open_page, folder):
    page = live(open_page, folder)
    page.locator("summary").click()
    move(page, "shrinkage λ", -0.2)
    move(page, "noise σ" if page.get_by_label("noise σ").count() else "hole", 40)
    told = page.locator(".flow-explorer").inner_text() + "".join(page.locator("svg text").all_text_contents())
    assert "−" in told and not re.search(r"-\d", told)
    assert decibels(-14.4) == "−14.40 dB" and decibels(float("-inf")) == "not finite"


UPLOAD = """<script type="module">
import upload from "./upload.js";
window.sent = [];
const el = document.body, model = { set: (_, value) => sent.push(...value), save_changes: () => {} };
upload.render({ model, el });
</script>"""


def test_a_large_photo_is_made_small_before_it_is_sent(open_page, folder):
    """Jupyter closes the connection at messages of more than 10 MB."""
    (folder / "upload.js").write_bytes((ROOT / "companion/explorer/upload.js").read_bytes())
    page = open_page(UPLOAD)
    face = np.asarray(Image.open(io.BytesIO(picture((5000, 4000)))))
    noise = np.random.default_rng(0).integers(-20, 20, face.shape)
    file = io.BytesIO()
    Image.fromarray((face + noise).clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=98)
    assert file.tell() > 10 * 2**20
    chosen = page.locator("input[type=file]")
    files = ("a.jpg", file.getvalue()), ("a.jpg", file.getvalue()), ("b.png", b"no image")
    for count, (name, content) in enumerate(files, 1):
        chosen.set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": content})
        page.wait_for_function(f"sent.length === {count}")
    chosen.set_input_files({"name": "c.heic", "mimeType": "image/heic", "buffer": bytes(9 * 2**20)})
    page.wait_for_function("sent.length === 4")  # the same file twice is sent twice
    encode = "btoa(new Uint8Array(content.buffer).reduce((all, byte) => all + String.fromCharCode(byte), ''))"
    get = f"({{ problem, content }}) => ({{ problem, content: content && {encode} }})"
    large, again, small, too_large = (page.evaluate(f"({get})(sent[{i}])") for i in range(4))
    sent = base64.b64decode(large["content"])
    assert len(sent) < 8 * 2**20 and large == again
    both = (sent, file.getvalue())
    ours, direct = (data.decode(content, "a").astype(float) for content in both)
    assert np.abs(ours - direct).mean() < 2
    assert base64.b64decode(small["content"]) == b"no image" and "too large" in too_large["problem"]

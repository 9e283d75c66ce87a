"""The explorer in a real browser where something fails: what is shown belongs together, or is said to be
missing.

The pages are made here, with untrained solvers and a stand-in for onnxruntime-web."""

import io
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import data
from companion.explorer import page as explorer_page
from tests.conftest import CHROMIUM, ROOT, QuietHandler
from tests.test_explorer import experiment  # noqa: F401

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
# Answers with the measurement; the file of denoising is broken.
RUNTIME = """
export const env = { wasm: {} };
export class Tensor { constructor(type, data) { this.data = data; } }
export const InferenceSession = { create: async (address) => {
  if (address.includes("denoising")) throw new Error("a broken file");
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
    (experiment.build / "runtime.mjs").write_text(RUNTIME, encoding="utf-8")
    return experiment.build


@pytest.fixture
def open_page(browser, folder):
    """open_page(html) -> its page in a browser, from a server that has the explorer's files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = []

        def open_(html, without=""):
            (folder / "index.html").write_text(f"<meta charset=utf-8>{html}", encoding="utf-8")
            page = browser.new_page()
            pages.append(page)
            if without:
                page.route(f"**/*{without}*", lambda route: route.abort())
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
    assert page.locator("input:checked").count() == 4  # a task and an image in each
    ids = page.evaluate("Array.from(document.querySelectorAll('[id]')).map((node) => node.id)")
    assert len(set(ids)) == len(ids) == 4


def test_a_grid_that_cannot_be_loaded(open_page, folder):
    page = open_page(html_of(folder), without="inpainting.jpeg")
    assert "the precomputed grid (inpainting) could not be loaded" in status(page, "Nothing to show")
    assert is_blank(page, 1) and not is_blank(page, 0)
    page.locator("input[value=denoising]").check(force=True)  # whose grid is there
    status(page, "Precomputed grid")
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
    assert "a broken file" in status(page, "not available")
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
    for name, content in (("a.jpg", file.getvalue()), ("a.jpg", file.getvalue()), ("b.png", b"no image")):
        chosen.set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": content})
        page.wait_for_timeout(1500)
    chosen.set_input_files({"name": "c.heic", "mimeType": "image/heic", "buffer": bytes(9 * 2**20)})
    page.wait_for_function("sent.length === 4")  # the same file twice is sent twice
    get = "({ problem, content }) => ({ problem, content: content && [...new Uint8Array(content.buffer)] })"
    large, again, small, too_large = (page.evaluate(f"({get})(sent[{i}])") for i in range(4))
    assert len(large["content"]) < 8 * 2**20 and large == again
    both = (bytes(large["content"]), file.getvalue())
    ours, direct = (data.decode(content, "a").astype(float) for content in both)
    assert np.abs(ours - direct).mean() < 2
    assert bytes(small["content"]) == b"no image" and "too large" in too_large["problem"]

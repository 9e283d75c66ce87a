"""The explorer in a real browser: what the page shows is what the solver in PyTorch says, live and from the
grid."""

import contextlib
import functools
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import papermill
import pytest
import torch
from PIL import Image

import data
from companion.experiment import Experiment
from companion.explorer.page import SCALES, SHIFTS, grid, measure, normals, shown, solve_with
from companion.records import last_fold_only
from flowlib import Blur, Denoising, Inpainting, psnr
from flowlib.images import to_tensor
from tests.conftest import CHROMIUM, ROOT, SMOKE_BUILD

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PATH = "notebooks/explorer.html"
EXPERIMENT = Experiment("smoke", build=ROOT / SMOKE_BUILD)
# What the page knows, as JSON.
STATE = """() => {
  const e = document.querySelector(".flow-explorer").explorer;
  const list = (a) => a && Array.from(a);
  return { mu: e.mu, lambda: e.lambda, value: e.value, y: list(e.y), x: list(e.x), mask: list(e.mask),
  generation: e.generation,
           folds: list(e.result?.folds), solved: e.result?.generation, milliseconds: e.result?.milliseconds };
}"""


@pytest.fixture
def open_page(browser, site):
    """open_page(address=..., script=..., **options of the context) -> page, with no error of a script
    allowed."""
    contexts, errors = [], []

    def open_(address=site + PATH, script=None, **options):
        context = browser.new_context(viewport={"width": 1000, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        if script:
            page.add_init_script(script)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def live(open_page, smoke_book):
    if not (smoke_book / "ort/ort.wasm.min.mjs").exists():
        pytest.skip("the book was built without npm, so without the live solver")
    page = open_page()
    page.wait_for_selector(".flow-explorer.is-live", timeout=60_000)
    return page


def settled(page):
    """The page's state once the solver has answered the last change."""
    page.wait_for_function(
        "() => { const e = document.querySelector('.flow-explorer').explorer;"
        " return e.result?.generation === e.generation }",
        timeout=30_000,
    )
    return page.evaluate(STATE)


def move(page, label, value):
    """Moves a slider as a reader does: its input event is what counts."""
    slider = page.get_by_label(label, exact=True).first
    slider.evaluate(
        "(s, v) => { s.value = v; s.dispatchEvent(new Event('input', { bubbles: true })); }", value
    )


def choose(page, task):
    page.locator(f"input[value={task}]").check(force=True)
    page.wait_for_selector(".flow-explorer.is-live", timeout=60_000)


def image(values):
    return torch.tensor(values).reshape(-1, 3, 64, 64)


@functools.cache
def on_the_page():
    return shown(EXPERIMENT)


def load_solver(task):
    return on_the_page()[3][task][1]


def check(page, task, operator, y=None):
    """What the page computed is what PyTorch computes from the same measurement, and its PSNR text says
    so."""
    state = settled(page)
    solver = load_solver(task)
    if y is not None:
        torch.testing.assert_close(image(state["y"]), y, atol=1e-5, rtol=0)
    scalars = torch.tensor(state["mu"]), torch.tensor(state["lambda"])
    with torch.no_grad():
        _, folds = solve_with(solver, *scalars, image(state["y"]), operator, return_folds=True)
    expected = torch.cat([fold.x for fold in folds])
    assert (image(state["folds"]) - expected).abs().max() < 1e-3
    value = psnr(expected[-1:], image(state["x"])).item()
    assert state["value"] == pytest.approx(value, abs=0.02)
    assert page.locator(".panels strong").inner_text().startswith(f"{state['value']:.2f} dB")
    return state


def last_fold_told(operator):
    return last_fold_only(Inpainting(19), operator, load_solver("inpainting").num_folds)


def config():
    return json.loads((EXPERIMENT.build / "explorer/config.json").read_text())


def face(index=0):
    return on_the_page()[0][index : index + 1]


def test_live_answers_are_those_of_pytorch(live):
    for task, operator in (
        ("inpainting", Inpainting(19)),
        ("denoising", Denoising(0.2)),
        ("deblurring", Blur(5.0)),
    ):
        choose(live, task)
        trained = check(live, task, operator, measure(operator, face(), 0))
        move(live, "step size μ", 1.5)
        move(live, "shrinkage λ", 0.1)
        moved = check(live, task, operator)
        assert moved["mu"] == pytest.approx([1.5 * v for v in trained["mu"]])
        assert moved["folds"] != trained["folds"]
        live.get_by_role("button", name="Trained values").click()
        assert settled(live)["mu"] == pytest.approx(trained["mu"])
    assert "ms for this image" in live.locator(".status").inner_text()


def test_every_fold_can_be_moved(live):
    live.locator("summary", has_text="Each fold").click()
    before = settled(live)
    move(live, "μ fold 2", 1.9)
    after = check(live, "inpainting", Inpainting(19))
    assert [a != b for a, b in zip(after["mu"], before["mu"])] == [False, True, False, False]


def test_noise_blur_and_hole(live):
    choose(live, "denoising")
    move(live, "noise σ", 0.1)
    check(live, "denoising", Denoising(0.1), face() + 0.1 * normals(0, (1, 3, 64, 64)))
    live.get_by_role("button", name="New noise").click()
    check(live, "denoising", Denoising(0.1), face() + 0.1 * normals(len(config()["labels"]), (1, 3, 64, 64)))
    choose(live, "deblurring")
    move(live, "blur σ_b", 0.6)
    check(live, "deblurring", Blur(0.6), Blur(0.6).A(face()))
    choose(live, "inpainting")
    move(live, "hole", 30)
    check(live, "inpainting", last_fold_told(Inpainting(30)), Inpainting(30).A(face()))
    # The plots follow what is measured now.
    rows = "document.querySelector('.flow-explorer').explorer.table.rows"
    row = f"{rows}[{SHIFTS.index(0)}]"
    live.wait_for_function(f"{row}.filter(Number.isFinite).length === {len(SCALES)}", timeout=60_000)
    solver, y = load_solver("inpainting"), Inpainting(30).A(face())
    with torch.no_grad():
        operators = last_fold_told(Inpainting(30))
        moved = solve_with(solver, 0.5 * solver.step_size, solver.shrinkage, y, operators)
    assert live.evaluate(f"{row}[{SCALES.index(0.5)}]") == pytest.approx(psnr(moved, face()).item(), abs=0.02)


def test_a_mask_is_painted(live):
    live.locator(".panels").scroll_into_view_if_needed()
    box = live.locator(".panels canvas").first.bounding_box()
    live.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
    live.mouse.down()
    live.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.1 * box["height"], steps=8)
    live.mouse.up()
    mask = torch.tensor(settled(live)["mask"]).reshape(64, 64)
    assert mask[6, 12] == 0 and mask[32, 32] == 0 and mask[50, 12] == 1
    painted = Inpainting.from_mask(mask)
    state = check(live, "inpainting", last_fold_told(painted))
    assert image(state["y"])[0, :, 6, 12].abs().max() == 0
    live.get_by_role("radiogroup", name="Hole told to").get_by_label("all folds").check(force=True)
    assert check(live, "inpainting", painted)["folds"] != state["folds"]
    live.get_by_role("button", name="Clear mask").click()
    live.get_by_role("radiogroup", name="Hole told to").get_by_label("last fold").check(force=True)
    check(live, "inpainting", Inpainting(19), Inpainting(19).A(face()))
    assert live.request.get(live.get_by_role("link", name="holes of other shapes").evaluate("a => a.href")).ok


def picture(size, kind):
    """A face as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(data.draw_faces([5], size=64)[0]).resize(size).save(file, kind)
    return file.getvalue()


def test_own_photos(live):
    before = settled(live)
    photo = live.locator("input[type=file]")
    photo.set_input_files({"name": "face.png", "mimeType": "image/png", "buffer": picture((64, 64), "png")})
    live.wait_for_function("document.querySelector('.flow-explorer').explorer.photo")
    after = check(live, "inpainting", Inpainting(19))
    exact = to_tensor(data.draw_faces([5], size=64))
    assert (image(after["x"]) - exact).abs().max() < 1e-6 and after["x"] != before["x"]

    huge = {"name": "huge.jpg", "mimeType": "image/jpeg", "buffer": picture((6000, 4000), "jpeg")}
    photo.set_input_files(huge)
    live.wait_for_function(
        "(g) => document.querySelector('.flow-explorer').explorer.generation > g", arg=after["generation"]
    )
    state = check(live, "inpainting", Inpainting(19))
    middle = (
        Image.open(io.BytesIO(huge["buffer"]))
        .crop((1000, 0, 5000, 4000))
        .resize((64, 64), Image.Resampling.LANCZOS)
    )
    assert (image(state["x"]) - to_tensor(np.asarray(middle)[None])).abs().mean() < 0.02

    photo.set_input_files({"name": "notes.png", "mimeType": "image/png", "buffer": b"only text"})
    live.wait_for_function("document.querySelector('[role=alert]').textContent.includes('notes.png')")
    assert "is no image that this browser can read" in live.get_by_role("alert").inner_text()
    assert live.evaluate(STATE)["x"] == state["x"]


def grid_answer(index, row, column, task="inpainting"):
    return grid(load_solver(task), Inpainting(19), face(index), seed=index)[row, column]


def test_without_webassembly_the_grid_answers(open_page):
    page = open_page(script="delete window.WebAssembly")
    page.wait_for_function("document.querySelector('.status')?.textContent.includes('Precomputed pictures')")
    assert "no WebAssembly" in page.locator(".status").inner_text()
    assert not page.locator(".controls").is_visible()
    slider = page.get_by_label("step size μ")
    slider.focus()
    page.keyboard.press("ArrowRight")  # one position of the grid
    page.keyboard.press("ArrowRight")
    page.get_by_label("shrinkage λ").focus()
    page.keyboard.press("ArrowLeft")
    page.locator("input[value='1']").check(force=True)  # the second image
    row, column = SHIFTS.index(-0.1), SCALES.index(1.5)
    expected = grid_answer(1, row, column)
    value = psnr(expected[None], face(1)).item()
    assert page.locator(".panels strong").inner_text().startswith(f"{value:.2f} dB")
    shown = page.evaluate(
        "() => Array.from(document.querySelectorAll('.panels canvas')[1]"
        ".getContext('2d').getImageData(0, 0, 64, 64).data)"
    )
    shown = torch.tensor(shown).reshape(64, 64, 4)[..., :3].permute(2, 0, 1) / 255 - 0.5
    assert (shown - expected.clamp(-0.5, 0.5)).abs().mean() < 0.02  # JPEG keeps about this much
    trained = grid_answer(1, SHIFTS.index(0), SCALES.index(1))
    assert (shown - trained.clamp(-0.5, 0.5)).abs().mean() > (shown - expected.clamp(-0.5, 0.5)).abs().mean()


def test_opened_as_a_file(open_page, smoke_book):
    page = open_page((smoke_book / "html" / PATH).as_uri())
    page.wait_for_function("document.querySelector('.status')?.textContent.includes('opened as a file')")
    before = page.locator(".panels strong").inner_text()
    page.get_by_label("step size μ").focus()
    page.keyboard.press("Home")
    value = psnr(grid_answer(0, SHIFTS.index(0), 0)[None], face()).item()
    after = page.locator(".panels strong").inner_text()
    assert after != before and after.startswith(f"{value:.2f} dB")


def test_without_javascript_the_grids_are_shown(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("noscript").count()
    assert page.locator("article img").count() >= 3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(open_page, theme):
    page = open_page(color_scheme=theme)
    page.wait_for_selector(".flow-explorer .panels strong")
    light = (
        "(node) => { const [r, g, b] = getComputedStyle(node).color.match(/[0-9.]+/g);"
        " return (+r + +g + +b) / 3 }"
    )
    assert (page.locator(".flow-explorer .panels .caption").first.evaluate(light) > 128) == (theme == "dark")
    ground = "(node) => getComputedStyle(node.closest('.text_html')).backgroundColor"
    assert page.locator(".flow-explorer").evaluate(ground) == "rgba(0, 0, 0, 0)"


def test_live_notebook_in_jupyterlab(browser, smoke_book):
    """End to end: a kernel, its widgets in a browser, a slider moved with the keyboard."""
    notebook = EXPERIMENT.build / "live.ipynb"
    parameters = {"profile": "smoke", "build": str(smoke_book)}
    papermill.execute_notebook(
        ROOT / "notebooks/live_explorer.ipynb", notebook, parameters, prepare_only=True
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    options = [
        f"--port={address[17:]}",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        f"--notebook-dir={ROOT}",
    ]
    options += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(EXPERIMENT.build / "logs/lab.log", "w", encoding="utf-8") as log:
        lab = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options], stdout=log, stderr=log, cwd=ROOT
        )
    page, left = browser.new_page(viewport={"width": 1200, "height": 1400}), []
    local = (address, address.replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(local) or left.append(request.url))
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api"):
                break
            time.sleep(0.1)
        page.goto(f"{address}/lab/tree/{notebook.relative_to(ROOT).as_posix()}?reset", timeout=120_000)
        page.locator(".jp-NotebookPanel .jp-Cell").first.click(timeout=60_000)
        page.locator("text=/ipykernel.* Idle/").wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator('[data-command="runmenu:run-all"]').click()
        status = page.locator("text=/^PSNR .* dB$/").first
        status.wait_for(timeout=120_000)
        before = status.inner_text()
        page.locator(".noUi-handle").nth(1).focus()  # after the setting: the factor of μ
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        page.wait_for_function("(old) => !document.body.innerText.includes(old)", arg=before, timeout=30_000)
        # A photo of more than 10 MB, twice: Jupyter would close the connection at such a message.
        noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "png")
        photo = {"name": "noise.png", "mimeType": "image/png", "buffer": file.getvalue()}
        number = page.get_by_label("image", exact=True)
        for _ in range(2):
            page.get_by_label("Own image").set_input_files(photo)
            page.wait_for_function("(box) => box.value === '0'", arg=number.element_handle(), timeout=60_000)
            number.fill("1")
            number.press("Enter")
            page.wait_for_function("(box) => box.value === '1'", arg=number.element_handle(), timeout=60_000)
        page.wait_for_function(  # the grid, through anywidget
            "document.querySelector('.flow-explorer .panels strong')?.textContent.includes('dB')",
            timeout=60_000,
        )
        assert left == []
    finally:
        page.close()
        lab.terminate()
        lab.wait(30)

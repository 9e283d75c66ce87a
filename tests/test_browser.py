"""The smoke book in a real browser: no errors, no request to elsewhere, fits wide and narrow, light and
dark."""

import pytest

from tests.conftest import CHROMIUM

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def is_complaint(message):
    return message.type == "error" or (message.type == "warning" and "mathjax" in message.text.lower())


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "path",
    [
        "index.html",
        "book/method.html",
        "notebooks/in_distribution-inpainting.html",
        "notebooks/explorer.html",
    ],
)
def test_page(browser, site, path, width, theme):
    # The book's theme follows the system's unless the reader says otherwise.
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page = context.new_page()
    problems = []
    local = (site, "data:", "blob:")
    page.on("console", lambda message: is_complaint(message) and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(local) or problems.append(f"left: {request.url}")
    )
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    page.on("response", lambda answer: answer.ok or problems.append(f"{answer.status}: {answer.url}"))

    page.goto(site + path)
    page.wait_for_selector("article h1")  # index.html forwards to the front page
    page.wait_for_load_state("networkidle")
    for image in page.locator("article img:visible").all():
        image.scroll_into_view_if_needed()

    assert page.evaluate("document.documentElement.dataset.theme") == theme
    shown = "Array.from(document.images).filter(i => i.getClientRects().length"
    broken = shown + " && !i.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []
    assert all(table.is_visible() for table in page.locator("article table").all())
    if page.locator("article .math").count():
        page.wait_for_selector("article mjx-container")
        assert page.locator("article .math:not(:has(mjx-container))").count() == 0
        assert page.locator("mjx-merror").count() == 0
    if "in_distribution" in path:
        assert page.locator("article table").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    context.close()


def test_the_search_page_hides_no_letter(browser, site):
    page = browser.new_page()
    page.goto(site + "search.html?q=photo")
    icon, left, padding = page.evaluate(
        """() => {
            const form = document.querySelector(".bd-search-container form");
            const field = form.querySelector("input");
            return [form.querySelector("i").getBoundingClientRect().right, field.getBoundingClientRect().left,
                    parseFloat(getComputedStyle(field).paddingLeft)];
        }"""
    )
    assert icon < left + padding
    page.wait_for_selector("#search-results li")  # "photo" is found
    page.close()

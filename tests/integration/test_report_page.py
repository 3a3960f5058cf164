"""report.html of a real run, and the page of a comparison, in a browser: loading, sorting, pointing, all widths."""

import re

import browser
import pytest
import tiny
from pictures import make_photos

import hfft
from hfft.cli import main

RECIPE = """
name: bugs
model: {checkpoint: convnext}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, num_train_epochs: 2, logging_steps: 2}
precision: float32
replay: {mode: "off"}
phases:
  - {name: head, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 1}, learning_rate: 1.0e-3}
"""
COUNTS = {"train/ant": 6, "train/bee": 6, "train/cat <b>": 6}
COUNTS |= {f"validation/{name}": 3 for name in ("ant", "bee", "cat <b>")}
COUNTS |= {"test/ant": 3, "test/bee": 3, "test/cat <b>": 4}

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs, one of which has hardly learned, and their comparison."""
    home = tmp_path_factory.mktemp("page")
    make_photos(home / "photos", COUNTS)
    make_photos(home, {"more/ant": 2, "more/bee": 1})
    for photo in (home / "more/ant").iterdir():
        photo.rename(home / "photos/test/bee" / f"really_an_ant_{photo.name}")
    tiny.save(home / "convnext", "convnext")
    (home / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        hfft.finetune(hfft.load_recipe("recipe.yaml"))
        hfft.finetune(hfft.load_recipe("recipe.yaml", ["name=weak", "training.max_steps=1"]))
        assert main(["compare", "runs/bugs", "runs/weak", "--html", "compared.html"]) == 0
    return home


@pytest.fixture(scope="module")
def window():
    with browser.chromium() as page:
        yield page


@pytest.fixture
def opened(window):
    """Opens a file in a page of its own, which must neither complain nor ask for anything else."""
    told, asked = [], []
    contexts = []

    def open_file(path, **options):
        contexts.append(window.context.browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_file
    assert told == []
    assert {url for url in asked if not url.startswith("data:")} <= {page.pages[0].url for page in contexts}
    for context in contexts:
        context.close()


def column(page, table, place):
    return [cell.inner_text() for cell in page.query_selector_all(f"{table} tbody tr > :nth-child({place})")]


def test_figures_are_there_and_shown(home, opened):
    page = opened(home / "runs/bugs/report.html")
    assert page.title() == "bugs"
    charts = page.query_selector_all("figure.chart svg")
    assert len(charts) >= 4
    assert all(chart.bounding_box()["height"] > 100 for chart in charts)
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") > 0
    assert all(image.get_attribute("alt") for image in page.query_selector_all("img"))
    assert page.evaluate("getComputedStyle(document.querySelector('.chart .dot')).fill") == "rgb(180, 84, 10)"


def test_a_table_is_sorted_by_its_headers_with_mouse_and_keyboard(home, opened):
    page = opened(home / "runs/bugs/report.html")
    assert column(page, "#class-table", 1) == ["ant", "bee", "cat <b>"]
    head = page.locator("#class-table th", has_text="images")
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "#class-table", 2) == ["5", "4", "3"]
    assert column(page, "#class-table", 1) == ["bee", "cat <b>", "ant"]
    page.keyboard.press("Enter")  # the button has the focus
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "#class-table", 2) == ["3", "4", "5"]
    page.locator("#class-table th", has_text="class").first.locator("button").press("Space")
    assert column(page, "#class-table", 1) == ["ant", "bee", "cat <b>"]
    assert head.get_attribute("aria-sort") == "none"


def cells_of(page):
    """Class and answer of each cell of the matrix to what is said when it is pointed at."""
    side, left, top = (float(page.get_attribute("svg.matrix", f"data-{name}")) for name in ("side", "left", "top"))
    box = page.locator("svg.matrix").bounding_box()
    said = {}
    for row in range(3):
        for place in range(3):
            page.mouse.move(box["x"] + left + (place + 0.5) * side, box["y"] + top + (row + 0.5) * side)
            said[row, place] = page.inner_text("#tip")
            assert page.inner_text("#matrix-readout") == said[row, place]
    return said


def test_pointing_at_a_cell_tells_class_answer_count_and_share(home, opened):
    page = opened(home / "runs/bugs/report.html", viewport={"width": 1280, "height": 1000})
    confusion = hfft.Run(home / "runs/bugs").metrics["confusion"]["test"]
    names, images = ("ant", "bee", "cat <b>"), {"ant": 3, "bee": 5, "cat <b>": 4}
    page.locator("svg.matrix").scroll_into_view_if_needed()

    def words(label, given):
        count = confusion.get(label, {}).get(given, 0)
        share = f"{count} of {images[label]} images ({100 * count / images[label]:.1f} %)"
        return f"{label}: {share} {'recognised' if label == given else f'taken for {given}'}"

    assert cells_of(page) == {(row, place): words(names[row], names[place]) for row in range(3) for place in range(3)}
    page.select_option("#matrix-order", "images")
    order = ("bee", "cat <b>", "ant")
    assert cells_of(page) == {(row, place): words(order[row], order[place]) for row in range(3) for place in range(3)}
    page.select_option("#matrix-order", "model")
    page.focus("svg.matrix")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#matrix-readout") == words(names[1], names[1])


def test_rows_names_and_counts_move_together(home, opened):
    page = opened(home / "runs/bugs/report.html")

    def heights(selector):
        return {e.text_content(): round(e.bounding_box()["y"]) for e in page.query_selector_all(selector)}

    before = heights(".matrix .rows text")
    page.select_option("#matrix-order", "images")
    after = heights(".matrix .rows text")
    assert sorted(before, key=before.__getitem__) == ["ant", "bee", "cat <b>"]
    assert sorted(after, key=after.__getitem__) == ["bee", "cat <b>", "ant"]
    total = sum(int(e.text_content()) for e in page.query_selector_all(".matrix .counts text"))
    assert total == 12
    for text in page.query_selector_all(".matrix .counts text"):
        cell = page.query_selector(f".cells rect[data-cell^='{text.get_attribute('data-cell')} ']")
        outer, inner = cell.bounding_box(), text.bounding_box()
        assert outer["y"] < inner["y"] < inner["y"] + inner["height"] < outer["y"] + outer["height"]


def test_a_dot_of_a_curve_tells_its_number(home, opened):
    page = opened(home / "runs/bugs/report.html")
    dot = page.locator(".chart .dot").first
    dot.scroll_into_view_if_needed()
    dot.hover()
    assert re.fullmatch(r"head, epoch .*, step \d+: training \d\.\d{4}", page.inner_text("#tip"))
    assert page.evaluate("getComputedStyle(document.getElementById('tip')).visibility") == "visible"


@pytest.mark.parametrize("file", ["runs/bugs/report.html", "compared.html"])
@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_scrolls_in_one_direction_alone(file, width, home, opened):
    page = opened(home / file, viewport={"width": width, "height": 844}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def luminance(color):
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("file", ["runs/bugs/report.html", "compared.html"])
def test_letters_can_be_read_in_both_schemes(file, scheme, home, opened):
    """WCAG AA: a contrast of 4.5 for text."""
    page = opened(home / file, color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    colors = page.evaluate(
        """[...document.querySelectorAll("main *, header *, footer *, nav *")]
            .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
            .filter(e => !["SCRIPT", "STYLE", "OPTION", "PRE"].includes(e.tagName) && !e.closest(".counts"))
            .map(e => e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color)"""
    )
    assert len(set(colors)) > 1
    for color in set(colors):
        light, dark = sorted((luminance(color), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, color


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_counts_can_be_read_on_the_strongest_cell(scheme, home, opened):
    page = opened(home / "runs/bugs/report.html", color_scheme=scheme)
    paper, ink, fills = page.evaluate(
        """() => {
            const cells = [...document.querySelectorAll(".cells rect")];
            for (const cell of cells) cell.style.setProperty("--s", 1);
            const style = cell => getComputedStyle(cell);
            return [style(document.body).backgroundColor, style(document.querySelector(".counts text")).fill,
                    cells.map(cell => [style(cell).fill, Number(style(cell).fillOpacity)])];
        }"""
    )
    ground = [int(part) for part in re.findall(r"\d+", paper)]
    for fill, opacity in fills:
        mixed = [
            round(opacity * int(over) + (1 - opacity) * under)
            for over, under in zip(re.findall(r"\d+", fill), ground, strict=True)
        ]
        light, dark = sorted((luminance(ink), luminance(f"rgb{tuple(mixed)}")), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (fill, opacity)


def test_what_is_printed_is_light_and_whole(home, opened):
    page = opened(home / "runs/bugs/report.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.1
    assert not page.is_visible("nav")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every(fold => fold.open)")
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_runs_are_compared_on_a_page_that_can_be_sorted(home, opened):
    page = opened(home / "compared.html")
    assert column(page, "#run-table", 1) == ["bugs", "weak"]
    page.locator("#run-table th", has_text="run").first.locator("button").click()
    page.keyboard.press("Enter")
    assert column(page, "#run-table", 1) == ["weak", "bugs"]
    page.locator("#run-table th", has_text="time").locator("button").click()
    keys = [float(cell.get_attribute("data-key")) for cell in page.query_selector_all("#run-table td:last-child")]
    assert keys == sorted(keys)
    assert "weak minus bugs, on the 12 images of both" in page.inner_text("#pair")
    assert column(page, "#retention-table", 1) == ["bugs", "weak"]

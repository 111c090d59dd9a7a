"""Pages of `shortcut report` in a real browser: Chromium, driven by Playwright.

Skipped where one of them is missing; `.ci/run` installs both (the extra `browser`, and the system's Chromium).
"""

import json
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import quiet, without_workers
from markupsafe import Markup
from test_report_comparison import arm, made

from shortcut_cli.config import reading
from shortcut_cli.inference.prompts import Given
from shortcut_cli.kept import codec_scores
from shortcut_cli.report import page as shell
from shortcut_cli.report import tracks
from shortcut_cli.report.axis import Axis
from shortcut_cli.stages import pipeline, reporting

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

HOSTILE = "<script>window.hit=1</script> 'a' \"b\" & é 😀"
KINDS = ("run", "runs", "shards", "codec", "comparison")
PAPER = {"width": 700, "height": 1000}  # about A4


@pytest.fixture(scope="module")
def pages(text_run, tmp_path_factory):
    """A page of each kind, by its name; the folders have hostile names."""
    root = tmp_path_factory.mktemp("pages") / HOSTILE
    for model in ("gpt", "shortcut"):
        shutil.copytree(text_run / model, root / model)
        pipeline.score(root / model / "run.pt", text_run / "shards", "test", device="cpu", report=quiet)
    ckpt = root / "shortcut" / "run.pt"
    for each in (ckpt, root / "gpt" / "run.pt"):
        pipeline.draw(each, None, Given(), ["sample.n=1", "sample.tokens=40"], None, device="cpu", report=quiet)
    pipeline.look(ckpt, Given(), text_run / "shards", "val", 2, ckpt.parent / "attention", device="cpu", report=quiet)
    shutil.copytree(text_run / "shards", root / "shards")
    codec_folder(root / "codec")
    given = {
        "run": [root / "shortcut"],
        "runs": [root / "gpt", root / "shortcut"],
        "shards": [root / "shards"],
        "codec": [root / "codec"],
        "comparison": [comparison_folder(root / "comparison")],
        "samples": [root / "gpt" / "samples"],
    }
    return {kind: reporting.write(paths, root / f"{kind}.html")["report"] for kind, paths in given.items()}


def comparison_folder(folder):
    """A folder with a compare.json of more arms than there are colours, with long names, and one that diverged."""
    result = made()
    for number in range(9):
        result["arms"].append(arm(1, "conv") | {"label": f"an_architecture_with_a_rather_long_name_{number}"})
    result["arms"].append(arm(1, "conv") | {"label": HOSTILE, "nats_per_token": [None] * 3, "diverged": {"1": HOSTILE}})
    result["notices"].append(HOSTILE)
    folder.mkdir()
    (folder / "compare.json").write_text(json.dumps(result))
    return folder


def codec_folder(folder):
    """A folder with a codec.pt and what `codec eval` says of it."""
    from shortcut_cli.codec import checkpoint

    recipe = reading.read_codec("codec-mini", [])
    folder.mkdir()
    checkpoint.save(
        folder / "codec.pt", recipe, checkpoint.network(recipe.codec).state_dict(), step=3, scores={"mel_6kbps": 1.5}
    )
    lines = ['{"step": 2, "mel": 2.0, "lr": 1e-4, "seconds": 1.0}', '{"step": 2, "mel_6kbps": 1.5, "si_sdr_6kbps": -3}']
    lines += [line.replace('"step": 2', '"step": 4') for line in lines]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    row = {"kbps": 6.0, "si_sdr_db": 4.0, "log_mel": 0.5, "stoi": None, "pesq": None}
    result = {"weights": HOSTILE, "files": 2, "rejects": [], "seconds": 3.0, "threads": 1, "perplexity": [5.0]}
    result |= {"bandwidths": [row | {"kbps": 1.5}, row], "opus": row, "encode_x_realtime": 9.0}
    codec_scores.keep(folder, result | {"decode_x_realtime": 9.0}, None)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-extensions"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def context(browser, tmp_path_factory):
    """A context with these options, which keeps an empty page: other pages then need no process of their own."""
    empty, made = tmp_path_factory.mktemp("empty") / "empty.html", {}
    empty.touch()

    def of(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = browser.new_context(**options)
            made[key].new_page().goto(f"file://{empty}")
        return made[key]

    return of


@pytest.fixture
def opened(context):
    """Opens a page; what it complains of and what it asks for are in `errors` and `requests`."""
    pages = []

    def open_page(path, *, width=1000, **options):
        page = context(viewport={"width": width, "height": 900}, **options).new_page()
        pages.append(page)
        found = SimpleNamespace(errors=[], requests=[])
        page.on("console", lambda line: found.errors.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(f"file://{path}".replace("%", "%25").replace("#", "%23").replace("?", "%3F"))
        return page, found

    yield open_page
    for page in pages:
        page.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_without_an_error_and_asks_for_nothing_else(pages, opened, kind):
    page, found = opened(pages[kind])
    page.mouse.move(500, 500)
    for step in range(20):
        page.mouse.move(200 + 30 * step, 450)
    assert page.locator("h1").count() == 1
    assert found.errors == []
    assert len(found.requests) == 1
    assert found.requests[0].startswith("file://")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_have_a_minus_not_a_hyphen(pages, opened, kind):
    """In whatever can be read, also by a screen reader; recipes and samples apart, which are what a file has."""
    page, _ = opened(pages[kind])
    said = page.evaluate("""() => {
        document.querySelectorAll("pre, code, script, style").forEach((each) => each.remove());
        const names = ["aria-label", "aria-valuetext", "alt", "title"];
        const every = [...document.querySelectorAll("*")];
        const labels = every.flatMap((each) => names.map((name) => each.getAttribute(name)));
        return [document.body.textContent, ...labels.filter(Boolean)].join("\\n");
    }""")
    assert re.findall(r".{0,40}(?:(?<![\w-])-|(?<=\de)-)[\d.]+", said) == []
    assert len(said) > 500


@pytest.mark.parametrize("kind", KINDS)
def test_names_with_markup_are_text(pages, opened, kind):
    page, _ = opened(pages[kind])
    assert page.evaluate("window.hit") is None
    assert HOSTILE in page.inner_text("body")
    assert page.locator("script").count() == 1


def test_a_script_that_got_into_a_page_would_not_run(pages, opened, tmp_path):
    changed = (
        Path(pages["run"]).read_text().replace("</main>", "<img src=x onerror='hit=1'><script>hit=1</script></main>")
    )
    (tmp_path / "page.html").write_text(changed)
    page, found = opened(tmp_path / "page.html")
    assert page.evaluate("window.hit") is None
    assert len([line for line in found.errors if "Content Security Policy" in line]) >= 2
    assert page.locator(".tip").count() == 1  # ours does


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wider_than_the_window(pages, opened, kind):
    page, _ = opened(pages[kind], width=360)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for width in (360, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_SVG) == []


@pytest.mark.parametrize("kind", [*KINDS, "samples"])
def test_tables_fit_or_say_that_they_scroll(pages, opened, kind):
    page, _ = opened(pages[kind], width=360)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for width in (360, 800, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(HIDDEN) == []
        assert page.evaluate(BROKEN) == []
    page.emulate_media(media="print")
    page.set_viewport_size(PAPER)
    assert page.evaluate(HIDDEN) == []
    assert page.evaluate(BROKEN) == []


def test_recipes_of_several_runs_are_not_printed(pages, opened):
    """One is, in columns, whole."""
    for kind, printed in (("run", True), ("runs", False)):
        page, _ = opened(pages[kind], width=PAPER["width"])
        page.emulate_media(media="print")
        recipes = page.locator("pre[id^=toml-]").all()
        assert [one.is_visible() for one in recipes] == [printed] * len(recipes) != []
        assert page.get_by_text("Recipes are not printed").is_visible() is not printed
        if printed:
            assert recipes[0].evaluate("pre => pre.scrollHeight <= pre.clientHeight + 1")
        page.emulate_media(media="screen")
        assert not page.get_by_text("Recipes are not printed").is_visible()


def test_the_label_of_a_prompt_is_one_line_within_the_picture(opened, tmp_path):
    shares = [0.004, 0.05, 0.28, 0.31, 0.5, 1.0]
    panel = tracks.Panel("", "", Markup(""), 90)
    stacks = [tracks.stack([panel], Axis("seconds", 0.0, 1.0), shaded=share) for share in shares]
    (tmp_path / "page.html").write_text(shell.render("page", [shell.Section("a", "A", Markup("").join(stacks))]))
    page, _ = opened(tmp_path / "page.html", width=360)
    for share, one in zip(shares, page.locator(".tracks").all(), strict=True):
        lines, label, over, given = one.evaluate(LABEL)
        assert lines == 1
        assert over[0] - 1 <= label[0] < label[1] <= over[1] + 1
        before = label[1] <= given[1] + 1
        assert before is (share > 0.3)
        assert before or label[0] >= given[1]


# How many lines the label of a prompt has, and from where to where it, the picture and the prompt are.
LABEL = """(tracks) => {
  const range = document.createRange(), label = tracks.querySelector(".given span");
  range.selectNodeContents(label);
  const at = (part) => { const box = part.getBoundingClientRect(); return [box.left, box.right]; };
  return [new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size,
          at(label), at(tracks.querySelector(".over")), at(tracks.querySelector(".given"))];
}"""


# Tables that are wider than what is seen of them, if the box around can't be scrolled by keyboard or has no shadow at
# its edge; and those whose rows should be blocks. Only tables of numbers by two names are left to scroll.
HIDDEN = """() => [...document.querySelectorAll("table")].filter((table) => {
  const box = table.closest(".wide");
  if (table.scrollWidth <= box.clientWidth + 1) return false;
  const shadow = getComputedStyle(box).backgroundAttachment.split(", ");
  return !table.matches(".heat") || box.tabIndex !== 0 || !box.getAttribute("aria-label")
    || !shadow.includes("local") || !shadow.includes("scroll");
}).map((table) => table.textContent.slice(0, 80))"""
# Intervals, with a number before them, that stand on more than one line.
BROKEN = """() => {
  const found = [], walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    if (walk.currentNode.parentElement.closest("pre, p")) continue;
    for (const match of walk.currentNode.data.matchAll(/\\[[^\\],]+,[^\\],]+\\]/g)) {
      const range = document.createRange();
      range.setStart(walk.currentNode, match.index);
      range.setEnd(walk.currentNode, match.index + match[0].length);
      if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) found.push(match[0]);
    }
  }
  return found;
}"""


# Words of plots that lie outside of their plot.
CUT_SVG = """() => [...document.querySelectorAll("svg text")].filter((text) => {
  const svg = text.closest("svg"), outer = svg.getBoundingClientRect(), inner = text.getBoundingClientRect();
  return outer.width && getComputedStyle(svg).overflow !== "visible"
    && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
}).map((text) => text.textContent)"""


@pytest.mark.parametrize("kind", [*KINDS, "samples", "audio", "midi"])
def test_axe_finds_nothing(pages, sounding, opened, kind):
    """Of no severity; in the dark only colours change."""
    path = sounding[kind][0] if kind in sounding else pages[kind]
    page, _ = opened(path, color_scheme="light", bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast", "link-in-text-block"]})):
        page.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(page, options={"resultTypes": ["violations"]} | rules).response["violations"]
        assert [(each["id"], each["impact"], each["nodes"][0]["html"]) for each in found] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_values_by_keyboard_says_how(pages, opened, kind):
    page, _ = opened(pages[kind])
    found = page.locator("svg[data-series], [data-walk], [data-rows]").all()
    assert found
    assert {one.get_attribute("aria-describedby") for one in found} == {"keys"}
    words = page.locator("#keys").inner_text()
    assert all(key in words for key in ("arrow", "Page Up", "Page Down", "Home", "End", "Escape"))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_fit_into_their_column(pages, opened, kind):
    page, _ = opened(pages[kind])
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for width in (1600, 1280, 800):
        page.set_viewport_size({"width": width, "height": 900})
        boxes = page.evaluate(
            """[...document.querySelectorAll('.wide')].map((box) => [
                 box.scrollWidth - box.clientWidth,
                 box.getBoundingClientRect().right - box.closest('section').getBoundingClientRect().right,
               ])"""
        )
        assert boxes or kind == "codec"
        assert all(max(box) <= 1 for box in boxes), (width, boxes)


def test_samples_of_two_runs_have_names_of_their_own(pages, opened):
    page, _ = opened(pages["runs"])
    names = [one.get_attribute("aria-label") for one in page.locator(".words, audio").all()]
    assert len(names) > 3
    assert len(set(names)) == len(names)


# Each text on the page with its colour and what is behind it.
COLOURS = """() => {
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(getComputedStyle(at).backgroundColor);
    return [...layers, "rgb(255, 255, 255)"];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const style = getComputedStyle(element);
    if (!own || !element.getClientRects().length || style.visibility === "hidden") continue;
    if (element.closest("script, style, .visually-hidden")) continue;
    const ink = element instanceof SVGElement ? style.fill : style.color;
    found.push([element.textContent.trim().slice(0, 40), ink, behind(element)]);
  }
  return found;
}"""


def parts(colour):
    """Red, green, blue and opacity, 0 to 1, of "rgb(r, g, b)", "rgba(r, g, b, a)" or "color(srgb r g b / a)"."""
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", colour.removeprefix("color(srgb"))]
    scale = 1 if colour.startswith("color(") else 255
    return [number / scale for number in numbers[:3]], (numbers[3] if len(numbers) > 3 else 1.0)


def seen(layers):
    """The colour that is seen of layers, the topmost first; the last one is opaque."""
    colour, _ = parts(layers[-1])
    for layer in reversed(layers[:-1]):
        over, opacity = parts(layer)
        colour = [opacity * a + (1 - opacity) * b for a, b in zip(over, colour, strict=True)]
    return colour


def luminance(colour):
    """Relative luminance of a colour, WCAG 2.2."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(ink, ground):
    """Of a colour on layers of others."""
    low, high = sorted((luminance(seen([ink, *ground])), luminance(seen(ground))))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("look", ["light", "dark", "print"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_has_the_contrast_of_wcag_aa(pages, opened, kind, look):
    page, _ = opened(pages[kind], color_scheme="light" if look == "light" else "dark")
    if look == "print":
        page.emulate_media(media="print")
        page.set_viewport_size(PAPER)
    found = page.evaluate(COLOURS)
    assert len(found) > 20
    assert [(words, ink, ground) for words, ink, ground in found if contrast(ink, ground) < 4.5] == []


# Each shape of a picture that stands for a value: its colours, and what is behind it.
SHAPES = """() => {
  const found = [];
  for (const shape of document.querySelectorAll("main :is(path, rect, circle, line)")) {
    const style = getComputedStyle(shape), behind = [];
    if (!shape.getClientRects().length || style.visibility === "hidden") continue;
    if (shape.matches(".grid, .band, .seed, .faint path") || shape.closest(".seed, .faint")) continue;
    for (let at = shape; at; at = at.parentElement) behind.push(getComputedStyle(at).backgroundColor);
    const inks = [style.fill, style.stroke].filter((ink) => ink !== "none");
    found.push([shape.outerHTML.slice(0, 80), inks, [...behind, "rgb(255, 255, 255)"]]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", [*KINDS, "audio", "midi"])
def test_what_is_drawn_can_be_seen(pages, sounding, opened, kind, scheme):
    """WCAG 2.2, 1.4.11: 3 to 1, of one of the colours of each shape."""
    page, _ = opened(sounding[kind][0] if kind in sounding else pages[kind], color_scheme=scheme)
    found = page.evaluate(SHAPES)
    assert found
    assert [shape for shape, inks, ground in found if max(contrast(ink, ground) for ink in inks) < 3] == []


@pytest.mark.parametrize("kind", [*KINDS, "audio", "midi"])
def test_tab_goes_through_a_page_in_order_with_the_focus_in_sight(pages, sounding, opened, kind):
    page, _ = opened(sounding[kind][0] if kind in sounding else pages[kind])
    walked = []
    for _ in range(400):
        page.keyboard.press("Tab")
        told = page.evaluate(FOCUS)
        if told is None:
            break
        walked.append(told)
    assert len(walked) > 5
    assert told is None
    assert [one["html"] for one in walked if not one["after"]] == []
    assert [one["html"] for one in walked if not one["ringed"]] == []
    assert [one["html"] for one in walked if not one["seen"]] == []


# Of the element that has the focus: whether it comes after the one before, is outlined, and in the window.
FOCUS = """() => {
  const at = document.activeElement, before = window.walkedTo;
  if (at === document.body) return null;
  window.walkedTo = at;
  const style = getComputedStyle(at), box = at.getBoundingClientRect();
  return {
    html: at.outerHTML.slice(0, 80),
    after: !before || before === at || Boolean(before.compareDocumentPosition(at) & Node.DOCUMENT_POSITION_FOLLOWING),
    ringed: at.matches("audio") || (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1),
    seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
  };
}"""


@pytest.mark.parametrize("kind", KINDS)
def test_letters_of_twice_the_size_fit(pages, opened, kind):
    page, _ = opened(pages[kind], width=1000)
    before = page.evaluate("getComputedStyle(document.querySelector('main p, main dd')).fontSize")
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    after = page.evaluate("getComputedStyle(document.querySelector('main p, main dd')).fontSize")
    assert float(after[:-2]) == 2 * float(before[:-2])
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_colours_that_the_reader_chose_leave_edges(pages, opened, kind):
    page, _ = opened(pages[kind], forced_colors="active")
    page.locator("svg[data-series], .forest ul[data-walk]").first.focus()
    page.keyboard.press("ArrowRight")
    for part in (".tip", ".wide"):
        style = "((one) => [getComputedStyle(one).borderLeftStyle, getComputedStyle(one).borderLeftWidth])"
        assert page.locator(part).first.evaluate(style) == ["solid", "1px"]


@pytest.mark.parametrize("script", [True, False])
def test_what_is_closed_is_printed_open(pages, opened, script):
    page, _ = opened(pages["run"], java_script_enabled=script)
    table, recipe = page.get_by_text("validation loss, nats per token").first, page.get_by_text("[model]")
    assert not table.is_visible()
    if script:
        count = "document.querySelectorAll('details:not([open])').length"
        page.evaluate(f"addEventListener('beforeprint', () => {{ stillClosed = {count}; }})")
        page.pdf()
        assert page.evaluate("stillClosed") == 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")  # the browser's own comes some time after the paper
        assert page.evaluate(count) > 1
    else:
        page.emulate_media(media="print")
        assert recipe.is_visible()
        page.emulate_media(media="screen")
    assert not table.is_visible()


@pytest.mark.parametrize("kind", KINDS)
def test_no_legend_needs_backgrounds_which_a_printer_leaves_out(pages, opened, kind):
    page, _ = opened(pages[kind])
    page.emulate_media(media="print")
    for one in page.locator(".legend li").all():
        assert one.locator("svg").count() > 0
        assert one.evaluate(PAINTED) == []


def test_the_shades_of_notes_need_no_background(sounding, opened):
    page, _ = opened(sounding["midi"][0])
    one = page.locator(".velocities").first
    assert one.locator("rect").count() == 5
    assert one.evaluate(PAINTED) == []


# The elements in one that have a background.
PAINTED = """(one) => [one, ...one.querySelectorAll("*")].map((each) => getComputedStyle(each).backgroundColor)
  .filter((colour) => colour !== "rgba(0, 0, 0, 0)")"""


@pytest.mark.parametrize("kind", ["run", "runs"])
def test_the_keyboard_reaches_and_moves_the_choice_of_axes(pages, opened, kind):
    page, _ = opened(pages[kind])
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "radio":
            break
    visible = "[...document.activeElement.closest('.choice').querySelectorAll('[data-choice]')]" + (
        ".filter((part) => part.getClientRects().length).map((part) => part.dataset.choice)"
    )
    assert page.evaluate(visible) == ["0"]
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.parentElement.textContent.trim()") == "tokens"
    assert page.evaluate(visible) == ["1"]


def test_the_choice_of_axes_needs_no_script(pages, opened):
    page, _ = opened(pages["run"], java_script_enabled=False)
    parts = page.locator(".choice > [data-choice]")
    assert [parts.nth(number).is_visible() for number in range(4)] == [True, False, False, False]
    page.get_by_role("radio", name="seconds").check()
    assert [parts.nth(number).is_visible() for number in range(4)] == [False, False, False, True]


def test_arrow_keys_show_the_values_of_a_plot(pages, opened):
    page, _ = opened(pages["run"])
    page.locator("svg[data-series]").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".tip").splitlines()[0] == "at 2 steps"
    assert "training: " in page.inner_text(".tip")
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".tip").splitlines()[0] == "at 4 steps"
    page.keyboard.press("Escape")
    assert not page.locator(".tip").is_visible()


def test_keys_go_to_the_ends_of_a_plot_and_by_ten(pages, opened):
    page, _ = opened(pages["run"])
    svg = page.locator("svg[data-series]").first
    numbers = range(0, 100, 4)
    at = "\\n".join(map(str, numbers))
    series = json.dumps([{"label": "a", "places": [*numbers], "at": at, "words": at}]).replace("\\\\n", "\\n")
    svg.evaluate("(svg, series) => { svg.dataset.series = series; svg.dataset.x = 's'; }", series)
    svg.focus()
    for key, place in KEYS:
        page.keyboard.press(key)
        assert page.inner_text(".tip") == f"at {numbers[place]} s\na: {numbers[place]}"
    page.keyboard.press("Control+Home")
    assert page.inner_text(".tip").startswith(f"at {numbers[KEYS[-1][1]]} s")


# From the first key on, of 25 places: where each leads.
KEYS = (("PageDown", 0), ("PageDown", 10), ("PageDown", 20), ("PageDown", 24), ("PageUp", 14), ("Home", 0),
        ("PageUp", 0), ("End", 24), ("ArrowLeft", 23))  # fmt: skip


def test_keys_go_through_rows_of_shares(pages, opened):
    page, _ = opened(pages["run"])
    rows = page.locator(".tracks[data-rows]")
    told = json.loads(rows.get_attribute("data-rows"))
    low, high = (float(rows.get_attribute(f"data-{end}")) for end in ("low", "high"))
    count = len(told["edges"]) - 1
    assert count > 25
    rows.focus()
    for key, place in (
        ("End", count - 1),
        ("ArrowLeft", count - 2),
        ("PageUp", count - 12),
        ("Home", 0),
        ("ArrowRight", 1),
    ):
        page.keyboard.press(key)
        head, *lines = page.inner_text(".tip").splitlines()
        assert lines == [f"{name}: {row[place]}" for name, row in zip(told["names"], told["values"], strict=True)]
        start, end = map(float, re.fullmatch(r"([\d.]+) to ([\d.]+) characters", head).groups())
        wanted = [low + (high - low) * told["edges"][place + one] / 1000 for one in (0, 1)]
        assert [start, end] == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        line, over = (page.locator(f".tracks[data-rows] {part}").bounding_box() for part in (".playhead", ".over"))
        middle = (told["edges"][place] + told["edges"][place + 1]) / 2000
        assert line["x"] - over["x"] == pytest.approx(middle * over["width"], abs=2.5)
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()
    assert page.locator(".tracks[data-rows] .playhead").is_hidden()


def test_the_pointer_shows_the_values_of_a_plot(pages, opened):
    page, _ = opened(pages["run"])
    plot = page.locator("svg[data-series]").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 25, box["y"] + box["height"] / 2)
    assert page.inner_text(".tip").splitlines()[0] == "at 12 steps"


def test_the_values_of_a_plot_are_those_near_the_pointer(pages, opened):
    page, _ = opened(pages["run"])
    svg = page.locator("svg[data-series]").first
    svg.evaluate("""(svg) => { svg.dataset.series = JSON.stringify([
      { label: "a", places: [10, 50, 90], at: "1\\n5\\n9", words: "11\\n15\\n19" },
      { label: "b", places: [51, 99], at: "5.1\\n9.9", words: "25\\n29" }]); svg.dataset.x = "s"; }""")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()

    def told(place):
        page.mouse.move(box["x"] + place * box["width"], box["y"] + box["height"] / 2)
        return page.inner_text(".tip")

    assert told(0.12) == "at 1 s\na: 11"
    assert told(0.49) == "at 5 s\na: 15\nb: 25 (at 5.1)"
    assert told(0.91) == "at 9 s\na: 19"


def test_arrow_keys_show_the_values_of_a_comparison(pages, opened):
    page, _ = opened(pages["comparison"])
    for plot in page.locator("svg[data-series]").all():
        plot.focus()
        page.keyboard.press("ArrowLeft")
        lines = page.inner_text(".tip").splitlines()
        assert lines[0].startswith("at ")
        assert ": " in lines[1]
        assert plot.locator(".cursor").get_attribute("visibility") == "visible"


def test_a_tap_shows_the_values_of_a_plot(pages, opened):
    page, _ = opened(pages["run"], width=360, has_touch=True)
    for number in (0, 1):
        page.locator("svg[data-series]:visible").nth(number).tap()
        assert page.locator(".tip").is_visible()
    page.locator("h1").tap()
    assert page.locator(".tip").is_hidden()


def test_the_recipe_is_copied_whole(pages, opened):
    page, _ = opened(pages["run"], permissions=["clipboard-read", "clipboard-write"])
    page.get_by_text("Recipe as TOML").click()
    page.get_by_role("button", name="Copy recipe").click()
    page.get_by_role("button", name="Copied").wait_for()
    words = page.evaluate("navigator.clipboard.readText()")
    folder = pages["run"].rpartition("/")[0]
    path = f"{folder}/copied.toml"
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(words)
    assert reading.read(path).model.name == "shortcut"


def test_the_recipe_of_a_comparison_is_copied_whole(pages, opened):
    page, _ = opened(pages["comparison"], permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy the recipe").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert tomllib.loads(page.evaluate("navigator.clipboard.readText()")) == made()["recipe"]


def test_the_marks_of_a_comparison_show_their_values_and_its_columns_are_one_key_away(pages, opened):
    page, _ = opened(pages["comparison"])
    seed = page.locator(".seed[data-tip]").first
    seed.hover()
    assert page.inner_text(".tip") == seed.get_attribute("data-tip")
    mark = page.locator(".mark[data-tip]").first
    mark.locator("path").hover()
    assert page.inner_text(".tip") == mark.get_attribute("data-tip")
    words = page.get_by_text("Memory of the process of a run")
    assert not words.is_visible()
    page.locator("summary", has_text="What each column means").first.focus()
    page.keyboard.press("Enter")
    assert words.is_visible()


@pytest.mark.parametrize(("kind", "box"), [("comparison", ".forest ul"), ("run", ".words.read"), ("midi", ".draw")])
def test_arrow_keys_go_through_the_values_of_marks(pages, sounding, opened, kind, box):
    page, _ = opened(sounding["midi"][0] if kind == "midi" else pages[kind])
    walked = page.locator(f"{box}[data-walk]").first
    tips = [mark.get_attribute("data-tip") for mark in walked.locator("[data-tip]").all()]
    assert len(tips) > 2
    walked.focus()
    for key, place in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert page.locator(".tip").text_content() == tips[place]
        assert walked.locator(".pointed").count() == 1
    page.keyboard.press("Tab")
    assert page.locator(".tip").is_hidden()
    assert page.locator(".pointed").count() == 0


@pytest.fixture(scope="module")
def sounding(tmp_path_factory):
    """A page of shards of sound, and one of MIDI: for each, the seconds of its documents as they were decoded."""
    import soundfile

    from shortcut_cli.demo import material
    from shortcut_cli.report import documents, music
    from shortcut_cli.stages.preparation import prepare

    root, found = tmp_path_factory.mktemp("sounding"), {}
    make = {"audio": material.write_audio, "midi": material.write_midi}
    for domain, recipe in (("audio", "audio-tiny"), ("midi", "music-tiny")):
        (root / domain).mkdir()
        make[domain](root / domain, pieces=3, seed=1)
        shards = root / f"{domain}-shards"
        resolved = reading.read(recipe, [f"data.shards={shards}"])
        with without_workers():
            prepare(resolved, [str(root / domain)], shards, n_workers=1, max_bad="0", report=quiet)
        place = reporting.write([shards], root / f"{domain}.html")["report"]
        held = documents.Documents(shards, "train")
        files = [held.file(index, length - 1) for index, length in enumerate(held.lengths)]
        if domain == "audio":
            found[domain] = place, [soundfile.info(file).duration for file in files]
        else:
            found[domain] = place, [music.read(file).seconds for file in files]
    return found


@pytest.mark.parametrize("domain", ["audio", "midi"])
def test_players_play_all_of_what_they_show(sounding, opened, domain):
    path, seconds = sounding[domain]
    page, found = opened(path)
    players = page.locator("audio")
    assert players.count() == len(seconds)
    lengths = page.evaluate(
        """() => Promise.all([...document.querySelectorAll("audio")].map((player) => new Promise((done, failed) => {
          player.onerror = failed;
          player.onloadedmetadata = () => done(player.duration);
          player.load();
        })))"""
    )
    assert lengths == pytest.approx(
        seconds, abs={"audio": 0.1, "midi": 1.1}[domain]
    )  # an MP3 is padded, a chord sounds on
    players.first.scroll_into_view_if_needed()
    players.first.focus()
    page.keyboard.press("Space")
    for _ in range(300):  # a function to wait for would need to be evaluated, which the page forbids
        if (now := page.evaluate("document.querySelector('audio').currentTime")) > 0.2:
            break
        page.wait_for_timeout(100)
    assert now > 0.2
    assert found.errors == []
    assert all(url.startswith(("data:", "blob:", "file:")) for url in found.requests)

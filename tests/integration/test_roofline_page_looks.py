"""The roofline page as people see it: a phone's first screen, cards, contrast, the link, a model of one's own."""

import json
from dataclasses import replace

import pytest
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_core.roofline.roofline import roofline
from headrace_planner.page import PageContent, PageSetting, build_page

from tests.integration.page_browser import browser, open_page, skip_without_browser

__all__ = ["browser"]

pytestmark = skip_without_browser

_PHONE, _DESK = (420, 900), (1400, 900)

# WCAG 2.1's relative luminance; a background is that of the nearest ancestor that has one.
_CONTRASTS = """
const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const found = numbers(getComputedStyle(node).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found.slice(0, 3);
  }
  return [255, 255, 255];
};
const low = [];
for (const node of document.querySelectorAll('body *')) {
  const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!text || !node.getClientRects().length || node.disabled || node.closest('select')) continue;
  const style = getComputedStyle(node), isDrawn = node instanceof SVGElement;
  const [a, b] = [luminance(numbers(isDrawn ? style.fill : style.color).slice(0, 3)), luminance(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const name = `${node.tagName} ${node.className.baseVal ?? node.className}`;
  if (ratio < 4.5) low.push(`${name} ${node.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
}
return low;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "roofline.html"
    path.write_text(build_page(PageContent(MODELS, HARDWARE, PageSetting())), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _desk(browser):
    browser.resize(*_DESK)
    yield
    browser.resize(*_DESK)


def test_a_phones_first_screen_shows_the_answer_and_not_the_controls(browser, page):
    browser.resize(*_PHONE)
    open_page(browser, page)
    places = browser.run(
        """const place = (selector) => document.querySelector(selector).getBoundingClientRect();
        return [...document.querySelectorAll('#answer strong')]
          .map((node) => [node.textContent, node.getBoundingClientRect().bottom])
          .concat([[document.getElementById('setting').open, place('#reason').bottom]]);"""
    )
    (prefill, first), (decode, second), (is_open, reason) = places
    assert prefill.endswith("ms")
    assert decode.endswith("ms")
    assert max(first, second, reason) < _PHONE[1]
    assert is_open is False
    browser.click("#setting summary")
    assert browser.run("return document.getElementById('model').getClientRects().length") == 1
    browser.resize(*_DESK)
    open_page(browser, page)
    assert browser.run("return document.getElementById('setting').open") is True


@pytest.mark.parametrize("size", [_PHONE, (700, 900), (1100, 800), (1181, 800), _DESK], ids=str)
def test_nothing_is_wider_than_its_card_or_the_window(browser, page, size):
    browser.resize(*size)
    open_page(browser, page)
    wide = browser.run(
        """document.querySelectorAll('details').forEach((node) => { node.open = true; });
        const wide = [...document.querySelectorAll('section, form, .cards, .card, .scroll, #answer > div')]
          .filter((node) => node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).overflowX !== 'auto');
        const tables = [...document.querySelectorAll('table.operations')]
          .filter((node) => node.getBoundingClientRect().right > node.parentElement.getBoundingClientRect().right);
        const names = [...wide, ...tables].map((node) => node.id || node.className);
        return [document.documentElement.scrollWidth, ...names];"""
    )
    assert wide == [size[0]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(browser, page, scheme):
    browser.prefer(scheme)
    open_page(browser, page)
    browser.run("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert browser.run(_CONTRASTS) == []
    browser.run("document.body.style.color = '#999999'; document.querySelector('h1').style.color = '#999999'")
    assert browser.run(_CONTRASTS) or scheme == "dark", "grey on white is found"


def test_the_link_is_copied_without_a_clipboard_as_on_plain_http(browser, page):
    open_page(browser, page, "#batch=77")
    browser.run(
        """Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true });
        document.addEventListener('copy', () => { window.copied = document.activeElement.value; });
        window.said = [];
        new MutationObserver(() => said.push(document.getElementById('share').textContent))
          .observe(document.getElementById('share'), { childList: true });"""
    )
    browser.click("#share")
    assert browser.run("return said[0]") == "Copied"
    copied = browser.run("return window.copied")
    assert copied.startswith("file://")
    assert copied.endswith("#batch=77")


def test_title_and_tags_say_what_is_shown(browser, page):
    open_page(browser, page, "#model=mixtral-8x7b&dtype=bf16")
    title = browser.run("return document.title")
    assert title.startswith("mixtral-8x7b on h200: prefill ")
    tags = browser.run(
        "return [...document.querySelectorAll('meta[property], meta[name]')].map((node) => node.content)"
    )
    assert len(tags) >= 5
    assert all(tags)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_model_of_ones_own_is_computed_as_python_computes_it(browser, page, phase):
    open_page(browser, page, "#hidden=4096&experts=128&chosen=4&width=1024&heads=64&batch=64&prompts=2")
    v3 = MODELS["deepseek-v3"]
    moe = replace(v3.moe, num_experts=128, num_experts_per_token=4, intermediate_size=1024)
    expected = roofline(
        replace(v3, hidden_size=4096, num_heads=64, moe=moe), HARDWARE["h200"], phase=phase, context=4096,
        batch=2 if phase == "prefill" else 64, parallel=Parallelism(1, 8, 8), dtype=Dtype.FP8,
    )  # fmt: skip
    assert browser.run(f"return predict({json.dumps(phase)}, setting).seconds") == pytest.approx(
        expected.time_s, rel=1e-5
    )
    assert browser.run("return document.querySelector('#setting summary').textContent").startswith(
        "deepseek-v3, changed"
    )
    browser.click("#as-published")
    assert browser.run("return location.hash") == "#batch=64&prompts=2"


def test_sliders_of_a_model_of_ones_own_move_the_figures(browser, page):
    open_page(browser, page)
    before = browser.run("return document.querySelector('#answer .decode strong').textContent")
    browser.run(
        """const slider = document.getElementById('width-slider'); slider.value = 13;
        slider.dispatchEvent(new Event('input'))"""
    )
    assert browser.run("return document.getElementById('width').value") == "8192"
    assert browser.run("return document.querySelector('#answer .decode strong').textContent") != before
    browser.run("update({ model: 'llama-3-8b' })")
    assert (
        browser.run("return ['experts', 'chosen', 'width'].map((name) => document.getElementById(name).disabled)")
        == [True] * 3
    )


def test_the_drawing_of_a_layer_follows_the_numbers(browser, page):
    squares = (
        "return ['read', 'read-prefill', 'idle'].map((kind) => document.querySelectorAll(`.expert.${kind}`).length)"
    )
    open_page(browser, page, "#batch=1&dp=1&ep=1&prompts=1")
    assert browser.run(squares) == [8, 248, 0]
    open_page(browser, page)
    assert browser.run(squares) == [32, 0, 0]
    assert "256 experts" in browser.run("return document.querySelector('#layer .off').textContent")
    open_page(browser, page, "#model=llama-3-8b")
    assert browser.run(squares) == [0, 0, 0]
    assert "feed-forward" in browser.run("return document.querySelector('#layer svg').textContent")


def test_hardware_is_chosen_by_its_card_which_says_its_critical_intensity(browser, page):
    open_page(browser, page)
    cards = browser.run("return [...document.querySelectorAll('#machines .card')].map((node) => node.textContent)")
    assert len(cards) == len(HARDWARE)
    assert any(
        card.startswith("h100") and f"{HARDWARE['h100'].critical_intensity():.0f} bf16" in card for card in cards
    )
    browser.run(
        "[...document.querySelectorAll('#machines .card')].find((node) => node.textContent.startsWith('b200')).click()"
    )
    assert browser.run("return [setting.hardware, document.querySelectorAll('[aria-pressed=true]').length]") == [
        "b200",
        1,
    ]


def test_families_and_questions_are_there(browser, page):
    open_page(browser, page)
    rows = browser.run("return [...document.querySelectorAll('#families tbody tr')].map((row) => row.children.length)")
    assert len(rows) == browser.run("return document.querySelectorAll('#families circle').length") >= 15
    assert set(rows) == {7}
    sources = browser.run("return FAMILIES.map((row) => row[7])")
    assert all(sources)
    questions = browser.run(
        "return [...document.querySelectorAll('#questions summary')].map((node) => node.textContent)"
    )
    assert len(questions) >= 6

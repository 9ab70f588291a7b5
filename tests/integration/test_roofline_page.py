"""The roofline page in a real browser: what it computes is what Python computes, whatever is chosen."""

import json
import threading
from dataclasses import asdict

import pytest
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_core.roofline.roofline import roofline
from headrace_core.roofline.routing import Routing
from headrace_core.testing.async_test import WAIT_S
from headrace_planner.measured import MeasuredPoint, MeasuredPoints
from headrace_planner.page import PageContent, PageSetting, build_page
from headrace_planner.page_server import page_server
from headrace_planner.report import summary

from tests.integration.page_browser import browser, open_page, skip_without_browser

__all__ = ["browser"]

_MEASURED = MeasuredPoints(
    source="a test",
    points=[
        MeasuredPoint(phase="decode", operation="attention_absorbed", seconds=0.02),
        MeasuredPoint(phase="prefill", operation="output_proj", seconds=0.05, flops=4e13, bytes=2e10),
    ],
)

pytestmark = skip_without_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    content = PageContent(MODELS, HARDWARE, PageSetting(), measured=_MEASURED)
    path = tmp_path_factory.mktemp("page") / "roofline.html"
    path.write_text(build_page(content), encoding="utf-8")
    return path


_CASES = [
    (PageSetting(), {}),
    (PageSetting("mixtral-8x7b", "h100", "bf16", 100, 3, 1500, tp=4, dp=2, ep=4), {"routing": "Zipf 1.0"}),
    (PageSetting("deepseek-v2-lite", "mi300x", "fp32", 1, 1, 777, 1, 1, 1), {"mla": "absorbed", "cached": 500}),
    (PageSetting("kimi-k2", "b200", "fp8", 4096, 32, 8192, 2, 16, 32), {"routing": "Zipf 0.5", "kv": "fp8"}),
    (PageSetting("llama-3-70b", "tpu-v5p", "bf16", 256, 2, 4096, 8, 1, 1), {}),
]


@pytest.mark.parametrize(("setting", "more"), _CASES, ids=[setting.model for setting, _ in _CASES])
def test_page_computes_what_python_computes(browser, page, setting, more):
    open_page(browser, page)
    chosen = {"kv": "auto", "mla": "auto", "routing": "uniform", "cached": 0, **asdict(setting), **more}
    zipf = {"uniform": 0.0, "Zipf 0.5": 0.5, "Zipf 1.0": 1.0}[chosen["routing"]]
    for phase, batch, new in (
        ("prefill", setting.prompts, setting.context - chosen["cached"]),
        ("decode", setting.batch, 1),
    ):
        kv_dtype = None if chosen["kv"] == "auto" else Dtype(chosen["kv"])
        expected = roofline(
            MODELS[setting.model], HARDWARE[setting.hardware], phase=phase, batch=batch, context=setting.context,
            new_tokens=new, parallel=Parallelism(setting.tp, setting.dp, setting.ep), routing=Routing(zipf),
            dtype=Dtype(setting.dtype), kv_dtype=kv_dtype, mla=chosen["mla"],
        )  # fmt: skip
        shown = browser.run(f"return predict({json.dumps(phase)}, {json.dumps(chosen)})")
        assert [row["name"] for row in shown["operations"]] == [row.name for row in expected.operations]
        for row, prediction in zip(shown["operations"], expected.operations, strict=True):
            operation = prediction.operation
            assert row["bound"] == prediction.bound
            assert [row["flops"], row["bytes"], row["sent"], row["seconds"], row["share"]] == pytest.approx(
                [operation.flops, operation.bytes, operation.comm_bytes, prediction.time_s, prediction.share], rel=1e-5
            )
        figures = summary(expected, kv_dtype)
        assert shown["seconds"] == pytest.approx(figures["time_s"], rel=1e-5)
        assert shown["weightBytes"] == pytest.approx(figures["weight_bytes_per_gpu"])
        assert shown["cacheBytes"] == pytest.approx(figures["kv_bytes_per_gpu"])
        assert shown["summary"]["cost_per_million_tokens"] == pytest.approx(
            figures["cost_per_million_tokens"], rel=1e-5
        )


def test_page_is_small_and_whole_without_a_network(browser, page):
    assert page.stat().st_size < 256 << 10
    open_page(browser, page)
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.run("return document.querySelectorAll('#decode circle').length") > 10


def test_address_holds_the_setting(browser, page):
    open_page(browser, page, "#model=mixtral-8x7b&hardware=b200&batch=32&tp=2&dp=1&ep=2")
    assert browser.run("return [setting.model, setting.hardware, setting.batch, setting.tp, setting.ep]") == [
        "mixtral-8x7b", "b200", 32, 2, 2,
    ]  # fmt: skip
    browser.run(
        "const box = document.getElementById('context'); box.value = 9000; box.dispatchEvent(new Event('change'))"
    )
    address = browser.run("return location.href")
    drawn = browser.run("return document.querySelector('#decode .cards').textContent")
    open_page(browser, address)
    assert "context=9000" in address
    assert browser.run("return document.querySelector('#decode .cards').textContent") == drawn


@pytest.mark.parametrize("bad", ["batch=-1", "model=none", "ep=7", "tp=x&dp=3", "ep=256&tp=1&dp=1", "nonsense"])
def test_address_that_makes_no_sense_still_shows_a_page(browser, page, bad):
    open_page(browser, page, f"#{bad}")
    assert browser.run("return document.querySelectorAll('#prefill circle').length") > 5
    assert browser.errors() == []


def test_every_model_and_hardware_can_be_chosen(browser, page):
    open_page(browser, page)
    # One call a model: a busy machine draws a hundred pages slower than a call may take.
    count = sum(
        browser.run(
            f"""const model = {json.dumps(model)};"""
            """let drawn = 0;
        for (const hardware of Object.keys(CONTENT.hardware)) {
          update({ model, hardware });
          const times = [...document.querySelectorAll('.card strong')].map((node) => node.textContent);
          if (times.some((text) => /NaN|undefined|Infinity/.test(text))) throw new Error(model + hardware + times);
          drawn += 1;
        }
        return drawn;"""
        )
        for model in MODELS
    )
    assert count == len(MODELS) * len(HARDWARE)
    assert browser.errors() == []


def test_formulas_appear_on_click(browser, page):
    open_page(browser, page)
    formula = browser.run(
        """const row = document.querySelector("#decode tr[data-operation='attention_absorbed']");
        row.click();
        return [row.nextSibling.hidden, row.nextSibling.textContent];"""
    )
    assert formula[0] is False
    assert "2·H·Pd·(2·D+R)" in formula[1]


def test_measured_points_are_laid_over(browser, page):
    open_page(browser, page)
    marks = "return [...document.querySelectorAll('.measured')].map((mark) => mark.dataset.operation)"
    assert browser.run(marks) == ["output_proj", "attention_absorbed"]
    assert browser.run("return document.getElementById('measured').textContent") == "Diamonds are measured: a test."


def test_page_is_served(browser):
    server = page_server(build_page(PageContent(MODELS, HARDWARE, PageSetting())), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        open_page(browser, f"http://127.0.0.1:{server.server_port}/")
        assert browser.run("return document.querySelector('h1').textContent") == "Headrace roofline"
        assert browser.run("return document.getElementById('measured').hidden") is True
    finally:
        server.shutdown()
        server.server_close()
        thread.join(WAIT_S)

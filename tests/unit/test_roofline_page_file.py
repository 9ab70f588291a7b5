from pathlib import Path

from headrace_core.roofline.hardware import HARDWARE
from headrace_core.roofline.model_shape import MODELS
from headrace_planner.page import PageContent, PageSetting, build_page

_DOCS = Path(__file__).parents[2] / "docs"


def test_page_in_docs_is_the_one_that_is_built_now():
    built = build_page(PageContent(MODELS, HARDWARE, PageSetting()))
    assert (_DOCS / "roofline.html").read_text(encoding="utf-8") == built, (
        "rebuild it: headrace roofline --model deepseek-v3 --hardware h200 --dtype fp8 --dp 8 --ep 8 --batch 512 "
        "--prefill-batch 8 --build-page docs/roofline.html"
    )


def test_text_inside_the_page_can_not_end_its_script():
    models = {"</script><b>": MODELS["llama-3-8b"]}
    html = build_page(PageContent(models, HARDWARE, PageSetting(model="</script><b>")))
    assert html.count("</script>") == 2

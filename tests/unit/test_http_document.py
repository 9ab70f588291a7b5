"""Bodies made from the endpoints' own OpenAPI document, right and wrong: every answer is one that it names."""

import asyncio
import collections
import http.client
import json
import threading

import pytest
from headrace_router.face.openai.openapi import document
from headrace_router.testing import RouterUnderTest, scripted_worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
POSTS = [path for path, methods in DOCUMENT["paths"].items() if "post" in methods]
GETS = [path for path, methods in DOCUMENT["paths"].items() if "get" in methods]
BOUNDED = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3}
HI = [{"role": "user", "content": "Hi"}]
NO_CLASS = {"service_tier": None, "slo_ttft_ms": None, "slo_itl_ms": None}
PROMPTS = {
    "/v1/completions": {"prompt": "Hi", "prompt_token_ids": None, **NO_CLASS},
    "/v1/chat/completions": {"messages": HI, **NO_CLASS},
    "/v1/responses": {"input": "Hi", **NO_CLASS},
    "/tokenize": {"prompt": None, "messages": HI},
}
"""What the document can't say that a body must have: half of the bodies have it."""
SEEN = {path: collections.Counter() for path in POSTS}
"""Statuses of answers to bodies that fit."""
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def of(schema):
    """Return a strategy of values that fit a schema of the document."""
    if schema is True:
        return ANY
    if "$ref" in schema:
        return st.deferred(lambda: of(SCHEMAS[schema["$ref"].rpartition("/")[2]]))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of(*map(of, several))
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low = schema.get("minimum", -(1 << 33))
            high = schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else schema.get("maximum", 1 << 33)
            return st.sampled_from(sorted({low, high})) | st.integers(low, min(high, low + 40))
        case "number":
            return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case "string":
            if "pattern" in schema:
                return st.from_regex(schema["pattern"], fullmatch=True)
            return st.text(st.characters(codec="utf-8"), max_size=min(12, schema.get("maxLength", 12)))
        case "array":
            most = min(3, schema.get("maxItems", 3))
            return st.lists(of(schema.get("items", {})), min_size=schema.get("minItems", 0), max_size=most)
        case "object" if "properties" in schema:
            required = {
                name: of(each) for name, each in schema["properties"].items() if name in schema.get("required", ())
            }
            rest = {name: of(each) for name, each in schema["properties"].items() if name not in required}
            some = st.sets(st.sampled_from(sorted(rest)), max_size=4) if rest else st.just(set())
            return some.flatmap(lambda names: st.fixed_dictionaries({**required, **{n: rest[n] for n in names}}))
        case "object":
            return st.dictionaries(TEXTS, of(schema.get("additionalProperties") or {}), max_size=3)
        case _:
            return ANY


@st.composite
def bodies(draw, path):
    schema = schema_of(path)
    body = draw(of(schema)) | {name: most for name, most in BOUNDED.items() if name in schema["properties"]}
    return body | PROMPTS[path] | {"model": ""} if draw(st.booleans()) else body


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A router over HTTP, on a thread of its own."""
    loop, folder = asyncio.new_event_loop(), tmp_path_factory.mktemp("router")
    workers = [scripted_worker(role, max_context_tokens=64) for role in ("prefill", "decode")]
    router = RouterUnderTest(folder, settings={"http_listen": "127.0.0.1:0"})
    router.workers = []
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def begin():
        await router.__aenter__()
        for worker in workers:
            await router.add(worker)
        await router.wait_states(["ready"] * 2)

    run(begin())
    yield router.service.addresses["http_address"]
    run(router.wait_empty())
    run(router.__aexit__())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def ask(address, method, path, body=None):
    connection = http.client.HTTPConnection(address, timeout=60)
    headers = {"content-type": "application/json"} if method == "POST" else {}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def check(path, method, status, headers, body):
    """Check that an answer is one of those that the document has, in OpenAI's form."""
    assert str(status) in DOCUMENT["paths"][path][method]["responses"]
    assert status != 500, body
    assert headers["x-request-id"]
    if status >= 400:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    elif headers["content-type"].startswith("text/event-stream"):
        assert body.endswith((b"data: [DONE]\n\n", b"}\n\n"))
        assert b"event: error" not in body


def schema_of(path):
    reference = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return SCHEMAS[reference.rpartition("/")[2]]


@pytest.mark.parametrize("path", POSTS)
@settings(max_examples=150, suppress_health_check=list(HealthCheck))  # how many are served is chance: 8 of 60 were seen
@given(data=st.data())
def test_a_body_that_fits_the_document_has_an_answer_of_the_document(address, path, data):
    body = data.draw(bodies(path))
    status, headers, answer = ask(address, "POST", path, json.dumps(body))
    SEEN[path][status] += 1
    check(path, "post", status, headers, answer)


@pytest.mark.parametrize("path", POSTS)
def test_bodies_that_fit_the_document_are_served_as_well_as_refused(path):
    assert not SEEN[path] or SEEN[path][200] >= 10, SEEN[path]


@pytest.mark.parametrize("path", POSTS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_that_does_not_is_refused_by_the_fields_name_or_served(address, path, data):
    schema, body = schema_of(path), data.draw(bodies(path))
    unknown = data.draw(TEXTS.filter(lambda name: name not in schema["properties"]))
    wrong = data.draw(st.sampled_from([*sorted(schema["properties"]), unknown]))
    status, headers, answer = ask(address, "POST", path, json.dumps({**body, wrong: data.draw(ANY)}))
    check(path, "post", status, headers, answer)
    assert wrong != unknown or status == 400


@pytest.mark.parametrize("path", GETS)
def test_what_is_only_read_has_an_answer_of_the_document(address, path):
    status, _, _ = ask(address, "GET", path)
    assert str(status) in DOCUMENT["paths"][path]["get"]["responses"]


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(POSTS), body=st.binary(max_size=40) | ANY.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_have_an_answer_of_the_document(address, path, body):
    check(path, "post", *ask(address, "POST", path, body))

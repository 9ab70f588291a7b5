"""API keys: what is kept of them, what each may take, and who they make its caller."""

import asyncio
import re

import pytest
from headrace_client.commands.app import app
from headrace_core import api_keys
from headrace_core.api_keys import ApiKey, find, new_key, read_keys, write_entry
from headrace_core.errors import InvalidRequestError, OverloadedError, StartupError, UnauthenticatedError
from headrace_core.shares import Caller
from headrace_core.testing.api_keys import make_keys
from headrace_router.callers.keys import Bucket, Keys
from headrace_router.testing import RouterUnderTest, scripted_worker, text_request, wait_until
from typer.testing import CliRunner


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Context:
    def __init__(self, key="", peer="ipv4:10.0.0.1:1"):
        self.invocation_metadata = lambda: (("authorization", f"Bearer {key}"),) if key else ()
        self.auth_context = dict
        self.peer = lambda: peer


def test_a_key_is_found_by_itself_alone():
    made = {name: new_key(name) for name in ("alice", "bob-2")}
    keys = {name: ApiKey(name, digest) for name, (_, digest) in made.items()}
    alice = made["alice"][0]
    assert find(keys, alice.encode()).name == "alice"
    for wrong in (b"", b"_", b"__", b"hr_alice_", alice.encode() + b"x", alice.encode()[:-1], b"\xff_\xff_\xff"):
        assert find(keys, wrong) is None
    assert find(keys, alice.replace("alice", "bob-2").encode()) is None
    assert find(keys, alice.replace("alice", "nobody").encode()) is None


def test_a_hash_is_compared_in_constant_time_whoever_is_named(monkeypatch):
    compared = []
    monkeypatch.setattr(api_keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    key, digest = new_key("alice")
    for shown in (key, key + "x", "hr_nobody_x", "nonsense"):
        find({"alice": ApiKey("alice", digest)}, shown.encode())
    assert [len(a) == len(b) == 32 for a, b in compared] == [True] * 4


def test_a_file_says_what_was_written():
    keys = [ApiKey("alice", bytes(32)), ApiKey("bob", bytes(range(32)), 60, 100_000)]
    content = "\n".join(map(write_entry, keys)).encode()
    assert read_keys(content) == {key.name: key for key in keys}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "UTF-8"),
        (b"[alice\n", "line 1"),
        (b"alice = 1", "must have sha256"),
        (b"[Alice]\nsha256 = ''", "no name of a key"),
        (b"[alice]", "64 hexadecimal digits"),
        (b"[alice]\nsha256 = 'SECRET'", "64 hexadecimal digits"),
        (b"[alice]\nsecret = 'SECRET'", "must have sha256"),
        (b"[alice]\nsha256 = '" + b"0" * 64 + b"'\nrequests_per_minute = -1", "whole number"),
        (b"[alice]\nsha256 = '" + b"0" * 64 + b"'\ntokens_per_minute = true", "whole number"),
        (b"[alice]\nsha256 = '" + b"0" * 64 + b"'\ntokens_per_minute = 1.5", "whole number"),
    ],
)
def test_a_file_that_is_none_is_refused_and_shows_no_secret(tmp_path, content, problem):
    (tmp_path / "keys.toml").write_bytes(content)
    with pytest.raises(StartupError, match=problem) as caught:
        Keys(tmp_path / "keys.toml")
    assert caught.value.reason == "BAD_KEYS"
    assert "SECRET" not in str(caught.value)


def test_a_file_that_is_missing_ends_the_start(tmp_path):
    with pytest.raises(StartupError) as caught:
        Keys(tmp_path / "none")
    assert caught.value.reason == "BAD_KEYS"


def test_a_bucket_is_full_at_first_and_fills_in_a_minute():
    clock = Clock()
    bucket = Bucket(60, clock)
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60
    assert bucket.take(1) == pytest.approx(1.0)
    assert bucket.take(10) == pytest.approx(10.0)
    clock.now_s += 1.0
    assert bucket.take(1) == 0.0
    clock.now_s += 3600.0
    assert bucket.take(60) == 0.0
    assert bucket.take(1) > 0


def test_what_is_more_than_a_minutes_worth_is_made_up_for():
    clock = Clock()
    bucket = Bucket(60, clock)
    assert bucket.take(180) == 0.0
    clock.now_s += 120.0
    assert bucket.take(60) == pytest.approx(60.0)
    clock.now_s += 60.0
    assert bucket.take(60) == 0.0


def test_what_was_not_used_comes_back_and_no_more():
    bucket = Bucket(60, Clock())
    bucket.take(50)
    bucket.give_back(30)
    assert bucket.take(40) == 0.0
    bucket.give_back(1000)
    assert bucket.take(60) == 0.0
    assert bucket.take(1) > 0


def test_no_limit_is_no_limit():
    bucket = Bucket(0, Clock())
    assert [bucket.take(10**9) for _ in range(3)] == [0.0] * 3


def keys_of(tmp_path, entries, clock):
    (tmp_path / "keys.toml").write_text(entries)
    return Keys(tmp_path / "keys.toml", clock)


def test_a_caller_is_its_key_wherever_it_calls_from(tmp_path):
    made, entries = make_keys("alice", "bob")
    keys = keys_of(tmp_path, entries, Clock())
    here, there = "ipv4:10.0.0.1:1", "ipv4:10.0.0.2:1"
    alice = {keys.caller_of(Context(made["alice"], peer)) for peer in (here, there)}
    assert alice == {Caller("key:alice", "key:alice")}
    assert keys.caller_of(Context(made["bob"], here)) == Caller("key:bob", "key:bob")
    # What is made up says nothing: else one host could be as many callers as it likes.
    assert {keys.caller_of(Context(key, here)).name for key in ("", "a", "hr_alice_x")} == {"10.0.0.1"}


def test_keys_change_with_their_file(tmp_path):
    clock = Clock()
    made, entries = make_keys("alice")
    keys = keys_of(tmp_path, entries, clock)
    others, other_entries = make_keys("bob")
    (tmp_path / "keys.toml").write_text(other_entries)
    clock.now_s += 1.0
    assert keys.caller_of(Context(made["alice"])).name == "10.0.0.1"
    assert keys.caller_of(Context(others["bob"])).name == "key:bob"


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("[bob\n"), lambda path: path.unlink()])
def test_a_file_that_is_spoilt_leaves_the_keys_as_they_were_and_is_told_once(tmp_path, caplog, spoil):
    clock = Clock()
    made, entries = make_keys("alice")
    keys = keys_of(tmp_path, entries, clock)
    spoil(tmp_path / "keys.toml")
    for _ in range(3):
        clock.now_s += 1.0
        assert keys.caller_of(Context(made["alice"])).name == "key:alice"
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["ERROR"]


def test_a_change_of_another_key_gives_nobody_a_new_minute(tmp_path):
    clock = Clock()
    made, entries = make_keys("alice", requests_per_minute=60)
    keys = keys_of(tmp_path, entries, clock)
    for _ in range(60):
        keys.take_request(Context(made["alice"]))
    (tmp_path / "keys.toml").write_text(entries + make_keys("bob")[1])
    clock.now_s += 0.5
    with pytest.raises(OverloadedError):
        keys.take_request(Context(made["alice"]))


def run(tmp_path, test, **limits):
    made, entries = make_keys("alice", "bob", **limits)
    (tmp_path / "keys.toml").write_text(entries)

    async def main():
        settings = {"keys_file": tmp_path / "keys.toml"}
        async with RouterUnderTest(tmp_path, settings=settings, workers=[scripted_worker("both")]) as router:
            await test(router, made)

    asyncio.run(main())


def test_requests_beyond_the_limit_are_refused_with_when_to_come_again(tmp_path):
    async def test(router, keys):
        for _ in range(2):
            await router.generate(text_request("a", sampling={"max_tokens": 1}), token=keys["alice"])
        refused = await router.refused(text_request("a"), token=keys["alice"])
        assert (type(refused), refused.reason) == (OverloadedError, "RATE_LIMITED")
        assert 0 < refused.retry_after_s <= 30
        assert re.search(r"the key alice may take 2 requests a minute; try again in [\d.]+ s", str(refused))
        assert router.metric("headrace_refused_requests_total", reason="RATE_LIMITED") == 1
        await router.generate(text_request("a", sampling={"max_tokens": 1}), token=keys["bob"])

    run(tmp_path, test, requests_per_minute=2)


def test_tokens_are_taken_before_and_what_was_not_used_comes_back(tmp_path):
    async def test(router, keys):
        large, held = text_request("a", sampling={"max_tokens": 900}), router.workers[0].faults.join_gate
        held.clear()
        running = asyncio.create_task(router.generate(large, token=keys["alice"]))
        await wait_until(lambda: len(router.workers[0].starts) == 1)
        refused = await router.refused(large, token=keys["alice"])
        assert (type(refused), refused.reason) == (OverloadedError, "RATE_LIMITED")
        assert 0 < refused.retry_after_s < 60
        running.cancel()
        held.set()
        await asyncio.gather(running, return_exceptions=True)
        await wait_until(lambda: router.service._router.num_running == 0)
        await router.generate(large, token=keys["alice"])  # the first came to few tokens
        await router.generate(large, token=keys["bob"])

    run(tmp_path, test, tokens_per_minute=1000)


def test_without_a_key_nothing_is_counted(tmp_path):
    async def test(router, keys):
        for _ in range(3):
            error = await router.refused(text_request("a"), token=keys["alice"] + "x")
            assert isinstance(error, UnauthenticatedError)
        await router.generate(text_request("a", sampling={"max_tokens": 1}), token=keys["alice"])

    run(tmp_path, test, requests_per_minute=1)


def test_the_command_shows_a_key_once_and_keeps_its_hash(tmp_path):
    path = tmp_path / "keys.toml"
    for name, options in (("alice", []), ("bob", ["--requests-per-minute", "5", "--tokens-per-minute", "6"])):
        result = CliRunner().invoke(app, ["keys", str(path), name, *options])
        assert result.exit_code == 0
        key = result.stdout.strip()
        assert key not in path.read_text()
        assert find(read_keys(path.read_bytes()), key.encode()).name == name
    bob = read_keys(path.read_bytes())["bob"]
    assert (bob.requests_per_minute, bob.tokens_per_minute) == (5, 6)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["", "Alice", "a_b", "-a", "a" * 33, "alice"])
def test_a_name_that_can_not_be_or_is_taken_makes_no_key(tmp_path, name):
    path = tmp_path / "keys.toml"
    path.write_text(make_keys("alice")[1])
    before = path.read_text()
    result = CliRunner().invoke(app, ["keys", "--", str(path), name])
    assert result.exit_code == 2
    assert path.read_text() == before
    with pytest.raises((ValueError, InvalidRequestError)):
        new_key(name) if name != "alice" else read_keys(before.encode() * 2)

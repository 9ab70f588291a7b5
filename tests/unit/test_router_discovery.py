"""Addresses that come from outside, in settings and files: a bad one costs itself, and no other."""

import asyncio
import os
import threading

import pytest
from headrace_core import address_file, discovery
from headrace_core.address import parse_address
from headrace_core.address_file import NOTHING_STANDS_S, STANDS_S
from headrace_core.discovery import Discovery
from headrace_core.errors import StartupError
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_script import scripted
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.testing import VOCAB_SIZE, RouterUnderTest, byte_ids, text_request

GOOD = {
    "10.0.0.1:5000": "10.0.0.1:5000",
    "localhost:00080": "localhost:80",
    "LocalHost:1": "localhost:1",
    "[::1]:5000": "[::1]:5000",
    "[0:0:0::1]:5000": "[::1]:5000",
    "[fe80::1%eth0]:65535": "[fe80::1%eth0]:65535",
    "Prefill-0.ns_a.svc.cluster.local.:50051": "prefill-0.ns_a.svc.cluster.local.:50051",
    "bücher.example:1": "xn--bcher-kva.example:1",
    f"{'a' * 63}:1": f"{'a' * 63}:1",
}
BAD = [
    "", "host", ":5000", "host:", "host:0", "host:70000", "host:-1", "host:+5", "host:5e3", "host:\u0665\u0660",
    "host:" + "9" * 5000, "a..b:5000", ".a:5000", "-a:5000", "a-:5000", f"{'a' * 64}:1", f"{'a.' * 200}b:1", "a b:5000",
    "a\0b:5000", "a\nb:5000", "\udcff:5000", "\u2460.:5", "http://host:5000", "unix:/tmp/socket:1", "dns:///a:1",
    "%41:5000", "a/b:1", "999.1.1.1:5000", "1.2.3:5000", "127:5000", "::1:5000", "[::1:5000", "::1]:5000", "[]:5000",
    "[127.0.0.1]:5000", "[::1%]:5000", "[::1%a b]:5000", "[::1]", "[::1]5000", "host:5000,other:5000", "host:5000 ",
    " host:5000",
]  # fmt: skip


def test_addresses_have_one_spelling():
    assert {text: str(parse_address(text)) for text in GOOD} == GOOD


@pytest.mark.parametrize("text", BAD, ids=ascii)
def test_what_is_no_address_is_refused_in_a_line_of_ascii(text):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_address(text)
    told = str(caught.value)
    assert told.isascii()
    assert told.isprintable()
    assert len(told) < 300


@pytest.mark.parametrize("text", [text for text in BAD if text.strip() and "," not in text and text == text.strip()])
def test_a_setting_that_is_no_address_ends_the_start_and_is_named(text):
    with pytest.raises(StartupError, match="--workers: ") as caught:
        Discovery(f"10.0.0.1:1, {text}", None)
    assert caught.value.reason == "BAD_ADDRESS"


def test_settings_are_followed_once_each_in_their_order():
    found = Discovery("10.0.0.2:1,, 10.0.0.1:01 ,10.0.0.2:1,", None).addresses
    assert found == ["10.0.0.2:1", "10.0.0.1:1"]


LINES = (
    b"\xef\xbb\xbf# comment\r\n10.0.0.1:1\r\n\n  10.0.0.2:2\t# why\n\xff\xfe:5000\na..b:5000\n10.0.0.1:01\n[::1]:3\n"
    b"host\n\x00\n10.0.0.4:70000\n" + b"x" * 100_000 + b"\n10.0.0.5:5"
)
FOUND = ["10.0.0.1:1", "10.0.0.2:2", "[::1]:3", "10.0.0.5:5"]


@async_test
async def test_a_bad_line_costs_itself(tmp_path, caplog):
    path = tmp_path / "workers"
    path.write_bytes(LINES)
    found = Discovery("", path)
    assert await found.read_file()
    assert found.addresses == FOUND
    assert not await found.read_file()
    lines = [record.line for record in caplog.records if hasattr(record, "line")]
    assert lines == [5, 6, 9, 10, 11]
    assert [record.lines for record in caplog.records if hasattr(record, "lines")] == [1]


def _vanish(path):
    path.unlink()


def _become_folder(path):
    path.unlink()
    path.mkdir()


def _become_pipe(path):
    path.unlink()
    os.mkfifo(path)


def _become_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def _become_loop(path):
    path.unlink()
    path.symlink_to(path)


def _grow(path):
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def _become_nonsense(path):
    path.write_bytes(b"\x00\xff\n" * 99)


SPOILED = [_vanish, _become_folder, _become_pipe, _become_device, _become_loop, _grow, _become_nonsense]


class Clock:
    """Time for a file of addresses."""

    def __init__(self, found):
        self.now_s = 100.0
        found._file._clock = lambda: self.now_s

    async def read(self, found, *, after_s=0.0):
        """Read after so long; return the addresses."""
        self.now_s += after_s
        await found.read_file()
        return found.addresses


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__.strip("_"))
@async_test
async def test_a_file_that_can_not_be_used_keeps_what_it_said(tmp_path, caplog, spoil):
    path = tmp_path / "workers"
    path.write_text("10.0.0.1:1\n")
    found = Discovery("", path)
    clock = Clock(found)
    await found.read_file()
    spoil(path)
    for _ in range(3):
        assert await clock.read(found, after_s=60.0) == ["10.0.0.1:1"]
    said = [record.getMessage() for record in caplog.records]
    assert said.count("can't use the file of addresses") == 1
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text("10.0.0.2:1\n")
    await clock.read(found)
    assert await clock.read(found, after_s=STANDS_S) == ["10.0.0.2:1"]


@async_test
async def test_a_file_that_is_written_anew_in_place_costs_nobody_a_worker(tmp_path, caplog):
    """As `cp` does: empty for a moment, then there up to any byte."""
    path = tmp_path / "workers"
    old, new = b"10.0.0.1:1\n10.0.0.2:50051\n", b"10.0.0.3:50051\n10.0.0.2:50051\n"
    path.write_bytes(old)
    found = Discovery("", path)
    clock = Clock(found)
    await found.read_file()
    for size in range(len(new) + 1):
        path.write_bytes(new[:size])
        addresses = await clock.read(found)
        assert {"10.0.0.1:1", "10.0.0.2:50051"} <= set(addresses)
        assert set(addresses) <= {"10.0.0.1:1", "10.0.0.2:50051", "10.0.0.3:50051"}, "half a line is no address"
        assert ("10.0.0.3:50051" in addresses) == (size > new.index(b"\n")), "what is new is followed at once"
    assert await clock.read(found, after_s=STANDS_S) == ["10.0.0.3:50051", "10.0.0.2:50051"]
    assert [record.problem for record in caplog.records if "it lists nothing" in getattr(record, "problem", "")]


@async_test
async def test_what_a_file_lists_no_more_is_left_when_it_has_stood_so(tmp_path):
    path = tmp_path / "workers"
    path.write_text("10.0.0.1:1\n10.0.0.2:1\n")
    found = Discovery("", path)
    clock = Clock(found)
    await found.read_file()
    for number in range(3):  # only what it lists has to stand, not what else it says
        path.write_text(f"# written {number}\n10.0.0.1:1\n")
        assert await clock.read(found, after_s=STANDS_S / 4) == ["10.0.0.1:1", "10.0.0.2:1"]
    path.write_text("# written at last\n10.0.0.1:1\n")
    assert await clock.read(found, after_s=STANDS_S / 2) == ["10.0.0.1:1"]
    path.write_text("10.0.0.1:1\n10.0.0.3:1")
    assert await clock.read(found) == ["10.0.0.1:1"]
    assert await clock.read(found, after_s=STANDS_S) == ["10.0.0.1:1", "10.0.0.3:1"]


@async_test
async def test_an_empty_file_is_believed_at_last(tmp_path, caplog):
    path = tmp_path / "workers"
    path.write_text("10.0.0.1:1\n")
    found = Discovery("", path)
    clock = Clock(found)
    await found.read_file()
    path.write_text("# nobody\n\n")
    await clock.read(found)
    assert await clock.read(found, after_s=NOTHING_STANDS_S - 1) == ["10.0.0.1:1"]
    assert [record.problem for record in caplog.records] == [
        "it lists nothing; what it listed is kept until it has for 10 s"
    ]
    assert await clock.read(found, after_s=1.0) == []


@async_test
async def test_a_file_on_a_disk_that_does_not_answer_holds_up_nobody(tmp_path, monkeypatch, caplog):
    path = tmp_path / "workers"
    path.write_text("10.0.0.1:1\n")
    gate = threading.Event()
    read = address_file._read

    def slow(path):
        assert gate.wait(WAIT_S)
        return read(path)

    monkeypatch.setattr(address_file, "_READ_TIMEOUT_S", 0.01)
    monkeypatch.setattr(address_file, "_read", slow)
    found = Discovery("10.0.0.2:1", path)
    num_threads = threading.active_count()
    for _ in range(5):
        assert not await found.read_file()
    assert threading.active_count() <= num_threads + 1
    assert found.addresses == ["10.0.0.2:1"]
    assert [record.problem for record in caplog.records] == ["no answer in 0.01 s"]
    gate.set()
    while not await found.read_file():
        pass
    assert found.addresses == ["10.0.0.2:1", "10.0.0.1:1"]
    await found.close()


@async_test
async def test_60_000_lines_are_followed_as_far_as_one_router_can(tmp_path, caplog):
    path = tmp_path / "workers"
    lines = [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}:1" for i in range(60_000)]
    path.write_text("\n".join(lines))
    found = Discovery("", path)
    await found.read_file()
    for _ in range(2):
        assert found.addresses == lines[: discovery.MAX_ADDRESSES]
    assert [record.getMessage() for record in caplog.records] == [
        "too many worker addresses; the first ones are followed"
    ]


@async_test
async def test_a_file_of_more_than_a_mebibyte_is_no_list_of_workers(tmp_path, caplog):
    path = tmp_path / "workers"
    path.write_text("10.0.0.1:1\n" + "#" * (1 << 20))
    found = Discovery("", path)
    assert not await found.read_file()
    assert "larger than 1 MiB" in caplog.records[0].problem
    path.write_text("10.0.0.1:1\n" + "#" * 1_000_000)
    assert await found.read_file()
    assert found.addresses == ["10.0.0.1:1"]


def test_the_router_serves_on_whatever_becomes_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(address_file, "STANDS_S", 0.1)

    async def main():
        worker = FakeWorker("both", next_token=scripted(byte_ids("abc")), vocab_size=VOCAB_SIZE)
        async with RouterUnderTest(tmp_path, workers=[worker]) as router:
            await router.wait_states(["ready"])
            path = tmp_path / "workers"
            good = f"{worker.address}\n".encode()
            for lines in (
                b"\xff:5000",
                b"a..b:5000",
                b"h:" + b"9" * 5000,
                b"h:\xd9\xa5",
                b"x" * (1 << 19),
                b"\x00" * 99,
            ):
                path.write_bytes(lines + b"\n127.0.0.2:1\n" + good)
                await router.wait_states(["ready", "unreachable"])
                path.write_bytes(lines + b"\n" + good)
                await router.wait_states(["ready"])
                await router.generate(text_request("a", sampling={"max_tokens": 3}))
            for spoil in (_vanish, _become_folder):
                spoil(path) if path.is_file() else path.touch()
                await router.generate(text_request("a", sampling={"max_tokens": 3}))
            assert not router.service.failed.done()

    asyncio.run(main())

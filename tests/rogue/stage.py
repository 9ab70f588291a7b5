"""A router, a prefill and a decode worker in this process, with identities and keys, for rogues to come to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from headrace_client import AsyncClient, ConnectionOptions
from headrace_client.commands.certs import make
from headrace_core import rpc
from headrace_core.config import DecodeSettings, PrefillSettings, RouterSettings
from headrace_core.identity import ChannelTls, Identity, Role
from headrace_core.request import SamplingParams
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.worker_pair import running
from headrace_core.worker.loading import LoadedModel
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.service import RouterService
from headrace_router.testing import write_tokenizer

PROMPT = list(range(1, 40))
_SAMPLING = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
MESSAGE_TIMEOUT_S = 1.0
FINGERPRINT = "fa4e" * 8
UNHEARD = "unheard"


@dataclass
class Stage:
    """Where everybody is, and what shows that they are well."""

    folder: Path
    key: str
    addresses: dict[Role, str]
    patience_s: float = WAIT_S
    """How long a rogue waits for what it does not hope for."""
    wanted: tuple[int, ...] = ()

    @property
    def identities(self) -> Path:
        """As `headrace certs` makes them."""
        return self.folder / "identities"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What an honest client sends."""
        return (("authorization", f"Bearer {self.key}"),)

    def tls(self, role: Role, server: Role) -> ChannelTls:
        """Return what `role` reaches a `server` with."""
        identity = Identity(self.identities / role.value, role)
        return identity.to_router() if server is Role.ROUTER else identity.to_worker()

    def channel(self, role: Role, server: Role) -> grpc.aio.Channel:
        """Return a channel of `role` to a `server`, with a connection of its own."""
        return rpc.own_channel(self.addresses[server], tls=self.tls(role, server))

    async def check(self) -> None:
        """Generate as an honest client does, and see that the answer is what it always was."""
        options = ConnectionOptions(identity=self.identities / "client", api_key=self.key)
        async with AsyncClient(self.addresses[Role.ROUTER], options) as client:
            answer = await client.generate(PROMPT, _SAMPLING, timeout_s=self.patience_s)
        self.wanted = self.wanted or answer.token_ids
        assert answer.token_ids == self.wanted, "an honest client's answer is another one now"


@asynccontextmanager
async def stage(folder: Path) -> AsyncGenerator[Stage]:
    """Start everybody; afterwards see that an honest client is served and every page is free."""
    if not (folder / "identities").exists():
        make(folder / "identities")
        write_tokenizer(folder / "tiny")
    keys, entries = make_keys("honest")
    (folder / "keys.toml").write_text(entries)
    it = Stage(folder, keys["honest"], {})
    prefill = PrefillService(PrefillSettings(**_settings(it, Role.PREFILL)), loader=_load)
    decode = DecodeService(DecodeSettings(**_settings(it, Role.DECODE)), loader=_load)
    async with running(prefill, decode) as addresses:
        it.addresses |= dict(zip((Role.PREFILL, Role.DECODE), addresses, strict=True))
        router = RouterService(
            RouterSettings(
                model=folder / "tiny",
                listen="127.0.0.1:0",
                workers=",".join(addresses),
                tls=it.identities / "router",
                keys_file=folder / "keys.toml",
                message_timeout_s=MESSAGE_TIMEOUT_S,
            )
        )
        try:
            it.addresses[Role.ROUTER] = await router.start()
            await it.check()
            yield it
            await it.check()
        finally:
            await router.stop()


def _load(_: Any) -> LoadedModel:
    return loaded_fake_model(fingerprint=FINGERPRINT)


def _settings(it: Stage, role: Role) -> dict[str, Any]:
    return {"model": ".", "tls": it.identities / role.value, "transport": "grpc"}


async def outcome(call: Any, *, most: int = 1, timeout_s: float = WAIT_S) -> str:
    """Read at most so many answers of a call and end it; return "served", or the reason why not.

    A refusal without one of our reasons is its code's name. UNHEARD: grpc was still sending when the server ended the
    call, and then says so in place of the server's status.
    """
    try:
        async with asyncio.timeout(timeout_s):
            for _ in range(most):
                if await call.read() is grpc.aio.EOF:
                    break
        return "served"
    except TimeoutError:
        return "still open"
    except grpc.aio.AioRpcError as error:
        return UNHEARD if error.details() == "Internal error from Core" else rpc.raised_from(error).reason
    finally:
        call.cancel()

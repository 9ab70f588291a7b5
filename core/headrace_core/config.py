"""Settings of each process: read once in `main`, frozen, passed down by constructor.

Every setting is a command-line option (`--max-step-tokens 512`) and an environment variable
(`HEADRACE_PREFILL_MAX_STEP_TOKENS=512`); the option wins.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from headrace_core.address import parse_address
from headrace_core.roofline.hardware import HARDWARE, find_hardware
from headrace_core.slo import read_classes


def _listen(text: str) -> str:
    parse_address(text, least_port=0)
    return text


def _listen_or_not(text: str) -> str:
    return _listen(text) if text else text


def _reachable(text: str) -> str:
    if text:
        parse_address(text)
    return text


def _classes(text: str) -> str:
    read_classes(text)
    return text


Listen = Annotated[str, AfterValidator(_listen)]
"""host:port, where port 0 lets the kernel choose."""
Reachable = Annotated[str, AfterValidator(_reachable)]
"""host:port at which others find a process, or nothing."""


def _config(name: str) -> SettingsConfigDict:
    return SettingsConfigDict(
        env_prefix=f"HEADRACE_{name}_",
        frozen=True,
        extra="forbid",
        cli_prog_name=f"python -m headrace_{name.lower()}",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
    )


class ProcessSettings(BaseSettings):
    """What every process has."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "")  # it is the help, where indentation would show

    listen: Listen = Field("127.0.0.1:0", description="host:port to serve gRPC on; port 0 lets the kernel choose")
    tls: Path | None = Field(
        None,
        description="folder with this process's identity: tls.crt, tls.key, ca.crt, as `headrace certs` makes them; "
        "read again when they change; none: nothing is encrypted and nobody is asked who it is",
    )
    metrics_listen: Listen = Field("127.0.0.1:0", description="host:port to serve Prometheus metrics on")
    ready_file: Path | None = Field(None, description="written when the process serves: JSON with its addresses")
    log_format: Literal["text", "json"] = Field("text", description="json: one object per line")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least severe line shown")
    drain_s: float = Field(10.0, ge=0, description="seconds that work under way has after SIGTERM")
    trace_sample: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of requests that are traced, 0 to 1; one that comes with a sampled trace always is, and "
        "workers follow their router, whatever their share; not given: none, at no cost",
    )


class WorkerSettings(ProcessSettings):
    """What both kinds of worker have.

    A worker is one process, or a group of ranks: as many as the environment says (`ranks.place`), all given the same
    settings. The first serves; addresses and files are its alone.
    """

    model: Path = Field(
        description="folder of a Hugging Face checkpoint, or its name on the hub, from where it is downloaded then"
    )
    revision: str = Field("", description="of a name on the hub: branch, tag or commit; default: its main branch")
    model_name: str = Field("", description="name clients may ask for; default: the folder's name, or that on the hub")
    advertise: Reachable = Field("", description="host:port at which others reach this worker; default: --listen")
    peers: str = Field(
        "",
        description="host:port,...: workers that this one may dial to take pages from; a DNS name stands for all its "
        "addresses; default: with --tls whoever has a worker's certificate, else loopback addresses alone",
    )
    peers_file: Path | None = Field(
        None, description="one peer's address per line, # begins a comment; read again when it changes"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of weights and compute; auto: the checkpoint's"
    )
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = Field(
        "auto",
        description="how cached latents are kept; auto: as values of --dtype; fp8_e4m3: in 8 bits, MLA only",
    )
    weights_dtype: Literal["auto", "int8", "fp8_e4m3"] = Field(
        "auto",
        description="how weights are held; auto: as values of --dtype; int8: in 8 bits, on a CPU, which is faster and "
        "gives other tokens; fp8_e4m3: in blocks of FP8 as the checkpoint stores them, in half of bfloat16's memory; "
        "all workers of a fleet alike",
    )
    dispatch_dtype: Literal["auto", "fp8_e4m3"] = Field(
        "auto",
        description="as what tokens reach routed experts, here or on other ranks; auto: as values of --dtype; "
        "fp8_e4m3: in 8 bits, half of the bytes and other tokens; all workers of a fleet alike",
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where to compute; cuda: the first GPU this process sees, NVIDIA or AMD"
    )
    kernels: Literal["auto", "reference", "cpu", "triton", "aiter"] = Field(
        "auto",
        description="what computes; auto: the best that is there; reference: plain torch, anywhere; cpu: compiled for "
        "a CPU; triton: on a GPU; aiter: ROCm/aiter's, on AMD's; a name that can't be had is refused",
    )
    numerics: Literal["fast", "exact"] = Field(
        "fast",
        description="exact: a token's bits do not depend on batch, chunks, pages or kind of worker; compiled CPU "
        "kernels only, prompts take longer; all workers of a fleet alike",
    )
    threads: int = Field(0, ge=0, description="CPU threads for compute; 0: all cores")
    lend_threads: Path | None = Field(
        None,
        description="folder that workers of this machine share: who computes there has the --threads of those that do "
        "not; compiled CPU kernels only; none: each keeps to its own",
    )
    page_size: int = Field(64, ge=1, le=1024, description="tokens a page holds")
    kv_pool_mib: int = Field(256, ge=1, description="memory for pages, MiB")
    max_context_tokens: int = Field(0, ge=0, description="longest sequence; 0: the model's own limit")
    max_step_tokens: int = Field(512, ge=1, description="tokens a step may compute")
    max_step_sequences: int = Field(64, ge=1, description="sequences a step may run")
    max_waiting_sequences: int = Field(512, ge=1, description="queue length at which new work is refused")
    transport: Literal["auto", "grpc", "nixl", "shm"] = Field(
        "auto", description="how pages move; auto: the best that works between two workers; a name never falls back"
    )
    frame_kib: int = Field(2048, ge=4, le=4096, description="payload of one transfer frame, KiB")
    transfer_timeout_s: float = Field(30.0, gt=0, description="longest time that one run of pages may take to move")
    attention_tp: int = Field(
        0,
        ge=0,
        description="of a group of ranks: how many share the heads of a sequence's attention (tensor parallelism, TP); "
        "0: all; fewer than all: lanes, each with sequences and pages of its own (data parallelism, DP)",
    )
    experts: Literal["tp", "ep"] = Field(
        "ep",
        description="of a group of ranks: ep: each has whole experts (expert parallelism); tp: a part of every one's "
        "columns",
    )
    rebalance: str = Field(
        "off",
        pattern=r"^(off|auto(:[1-9][0-9]{0,5})?)$",
        description="of a group of ranks with whole experts: auto: move experts while serving, where ranks would wait "
        "less for the busiest, looked at every minute; auto:N: every N seconds; tokens stay the same, and are always "
        "dispatched; off: experts stay",
    )
    redundant_experts: int = Field(
        0,
        ge=0,
        description="with --rebalance: copies of busy experts that each layer has room for, over all ranks, which must "
        "divide them",
    )
    two_batch_rows: int = Field(
        0,
        ge=0,
        description="of a group of ranks: rows of every lane from which on a decode step is computed as two "
        "micro-batches, of which one computes while the other's tokens travel; 0: never",
    )
    rank_timeout_s: float = Field(
        10.0, gt=0, description="longest time that one rank lets the others wait in a step; then its group ends"
    )
    rank_start_timeout_s: float = Field(
        600.0, gt=0, description="longest time that ranks wait for one another while they start and load"
    )
    ranks_in_clear: bool = Field(
        False,
        description="with --tls, let ranks on several machines talk all the same: what they say to each other is never "
        "encrypted, so nobody else may reach their network",
    )
    roofline_every_steps: int = Field(
        64, ge=0, description="one step in so many is measured operation by operation; 0: none"
    )
    hardware: str = Field(
        "cpu",
        description=f"what the roofline predicts for: cpu, measured when the worker starts; {', '.join(HARDWARE)}",
    )

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint's module for multi-token prediction is run."""
        return False

    @field_validator("hardware")
    @classmethod
    def _check_hardware(cls, name: str) -> str:
        if name != "cpu":
            find_hardware(name)
        return name


class PrefillSettings(WorkerSettings):
    """Prefill worker: computes prompts and holds their pages until a decode worker took them.

    Examples:
      python -m headrace_prefill --model DIR --listen 127.0.0.1:50051
      python -m headrace_prefill --model deepseek-ai/DeepSeek-V2-Lite --kv-pool-mib 4096
      HEADRACE_PREFILL_MODEL=DIR python -m headrace_prefill

    Each option is a variable of the environment, too. On one machine `headrace up` starts all of them.
    """

    model_config = _config("PREFILL")

    speculate: str = Field(
        "off",
        pattern=r"^(off|mtp(:[1-9])?)$",
        description="mtp: compute what decode workers with --speculate mtp need of prompts; all of a fleet alike",
    )

    @property
    def has_mtp(self) -> bool:
        """See `WorkerSettings`."""
        return self.speculate.startswith("mtp")


class DecodeSettings(WorkerSettings):
    """Decode worker: takes sequences from prefill workers and generates; with --role both it computes prompts too.

    Examples:
      python -m headrace_decode --model DIR --listen 127.0.0.1:50052
      python -m headrace_decode --model DIR --role both
      HEADRACE_DECODE_MODEL=DIR python -m headrace_decode

    Each option is a variable of the environment, too. On one machine `headrace up` starts all of them.
    """

    model_config = _config("DECODE")

    role: Literal["decode", "both"] = Field("decode", description="both: prefill and decode in this one worker")
    speculate: str = Field(
        "off",
        pattern=r"^(off|lookup(:[1-9][0-9]?)?|mtp(:[1-9])?)$",
        description="guess up to K tokens and check them in one step: the same tokens in fewer steps; lookup:K: (4) by "
        "what followed the newest ones before, in prompt and output; mtp:K: (1) by the checkpoint's own module, all "
        "workers of a fleet alike, prefill workers, too; off: one token a step",
    )

    @property
    def has_mtp(self) -> bool:
        """See `WorkerSettings`."""
        return self.speculate.startswith("mtp")


class RouterSettings(ProcessSettings):
    """Router: takes clients' requests, batches them, binds them to workers, streams text.

    Examples:
      python -m headrace_router --model DIR --workers 127.0.0.1:50051,127.0.0.1:50052
      python -m headrace_router --model DIR --workers-file FILE --http-listen 127.0.0.1:8000
      HEADRACE_ROUTER_MODEL=DIR python -m headrace_router --workers 127.0.0.1:50051

    Each option is a variable of the environment, too. On one machine `headrace up` starts all of them.
    """

    model_config = _config("ROUTER")

    listen: Listen = Field(
        "127.0.0.1:50050",
        description="host:port to serve clients on; port 0 lets the kernel choose",
    )
    model: Path = Field(
        description="folder with tokenizer.json and config.json, or a name on the hub; weights are not read"
    )
    revision: str = Field("", description="of a name on the hub: branch, tag or commit; default: its main branch")
    model_name: str = Field("", description="name clients may ask for; default: the folder's name, or that on the hub")
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="auto: what a request leaves open of temperature, top_p, top_k and repetition_penalty is as the "
        "model's generation_config.json says; none: off, temperature 1",
    )
    workers: str = Field(
        "",
        description="workers, host:port; a DNS name stands for all its addresses; comma-separated",
    )
    workers_file: Path | None = Field(
        None, description="one worker address per line, # begins a comment; read again when it changes"
    )
    http_listen: Annotated[str, AfterValidator(_listen_or_not)] = Field(
        "", description="host:port to serve OpenAI's API on, over HTTP; port 0 lets the kernel choose; none: not served"
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="router processes behind these ports, each with its own queue, limits and metrics (in a row); "
        "the kernel gives each connection to one of them",
    )
    max_queued_requests: int = Field(1024, ge=1, description="queue length at which requests are refused")
    max_queued_tokens: int = Field(
        1 << 22,
        ge=1,
        description="prompt tokens that wait together at which requests are refused; a client of which nothing else "
        "waits is let in all the same",
    )
    max_open_requests: int = Field(
        4096, ge=1, description="requests open at a time, queued, running and not yet read; one client has half at most"
    )
    max_body_mib: int = Field(256, ge=16, description="memory for requests' messages, read and being read, MiB")
    message_timeout_s: float = Field(10.0, gt=0, description="longest time a request's message may take to arrive")
    max_prompt_bytes: int = Field(
        4 << 20,
        ge=1,
        description="largest prompt accepted, UTF-8 bytes; tokenizing takes up to 230 times as much memory",
    )
    plain_user_text: bool = Field(
        False,
        description="keep what users and tools say in a conversation from being read as control tokens of the model; "
        "off: as transformers, which reads it so",
    )
    placement: Literal["prefix-cache", "affinity", "power-of-two", "session", "round-robin"] = Field(
        "prefix-cache",
        description="which prefill worker gets a prompt that several could take: where the fewest tokens are to be "
        "computed, by what workers say of their prefix caches; by its beginning; the less loaded of two drawn; by its "
        "client; one after the other",
    )
    local_below_tokens: int = Field(
        0,
        ge=0,
        description="prompt tokens at most that a decode worker lacks and computes itself; a page at least where it is "
        "known to have the beginning",
    )
    predict_local: bool = Field(
        False,
        description="in place of --local-below-tokens: as many as are likely to be cheaper computed there, by what "
        "hand-offs and steps took; until enough was measured, as that option says",
    )
    max_attempts: int = Field(4, ge=1, description="attempts a request has before its failure is the client's")
    request_timeout_s: float = Field(600.0, gt=0, description="deadline of a request that brings none")
    no_workers_timeout_s: float = Field(30.0, gt=0, description="how long a request waits when no worker is ready")
    slo_ttft_ms: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="objective for the time to a first token, ms; for metrics, 0: none"
    )
    slo_itl_ms: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="objective for the gap between two tokens, ms; for metrics, 0: none"
    )
    slo_classes: Annotated[str, AfterValidator(_classes)] = Field(
        "",
        description="classes that requests and keys may name: NAME=TTFT/ITL, milliseconds, comma-separated; a request "
        "that can't have its target is refused",
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="vllm: show metrics by vLLM's names as well, for dashboards and autoscalers that read those"
    )
    dns_refresh_s: float = Field(5.0, gt=0, description="how often DNS names are looked up again")
    tls_cert: Path | None = Field(
        None,
        description="PEM certificate chain shown to clients in place of --tls; needs --tls-key; none is asked of them",
    )
    tls_key: Path | None = Field(None, description="its PEM private key")
    keys_file: Path | None = Field(
        None, description="API keys that clients must show, as `headrace keys` writes them; read again when it changes"
    )

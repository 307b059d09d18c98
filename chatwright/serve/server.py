"""The verb `serve`: a model behind an OpenAI-compatible interface and a chat page, on one port."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from chatwright.config import UsageError, UserError, parse

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from chatwright.language_model import LanguageModel
    from chatwright.serve.pool import ModelPool


QUOTA = ("max_conversations", "max_owner_mb", "max_store_mb")
"""The settings that are `feedback.quota.Quota`'s."""


@dataclass(frozen=True)
class ServeConfig:
    """How a model is served."""

    host: str = "127.0.0.1"
    """Address to listen on. Other machines reach the server only when this is not a loopback address."""
    port: int = 8000
    """TCP port; 0 picks a free one."""
    name: str | None = None
    """Name of the model in the interface; default: the name by which it was loaded."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Host names the server answers to beside this machine's own. Empty: any name, if `host` is not loopback."""
    max_requests: int = 64
    """Answers that may be under way or waiting at a time, per model; more are refused with status 429."""
    models: list[str] = field(default_factory=list)
    """More models, each `MODEL` or `NAME=MODEL`, loaded when they are first asked for: --models '["small=runs/tiny", "smollm2"]'."""
    memory_gb: float = 0.0
    """Most memory, in GB, for all models together; those unused longest are put away for others. 0: no limit."""
    dtype: str = "auto"
    """Weights while generating: fp32, bf16, int8 or int4 (compiled CPU kernels); auto takes bf16 for models above 20 M."""
    store: str = ""
    """Where conversations are kept: a SQLite file or a SQLAlchemy URL; default: chatwright/conversations.db in the user's data
    directory; `none` keeps nothing beyond the process (in memory)."""
    max_conversations: int = 2000
    """Conversations that are kept for one owner: a browser, and with API keys a key's name in it. 0: no limit."""
    max_owner_mb: float = 200.0
    """Most MB of conversations that are kept for one owner. 0: no limit."""
    max_store_mb: float = 2000.0
    """Most MB of conversations that are kept for all owners together; without API keys anybody can be any number of owners. 0: no limit."""
    api_keys: str | None = None
    """File of hashed API keys (`chatwright key NAME --file FILE` makes one); read again when it changes. Keys in clear may stand in the environment: CHATWRIGHT_API_KEYS, comma separated."""
    insecure: bool = False
    """Listen on an address that others reach although there are no API keys."""
    proxies: list[str] = field(default_factory=list)
    """Addresses or networks of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto headers are believed."""
    cors_origins: list[str] = field(default_factory=list)
    """Other sites whose pages may use /v1, such as '["http://localhost:3000"]'. Empty: none."""
    max_body: int = 1 << 20
    """Largest request, in bytes; larger ones are refused with status 413."""
    max_new_tokens: int = 0
    """Longest answer, in tokens; requests for longer ones are cut to it. 0: the context is the only limit."""
    max_prompt_tokens: int = 0
    """Longest prompt, in tokens; longer ones are refused with status 400. 0: the context is the only limit."""
    timeout: float = 0.0
    """Seconds for a request, from its arrival to its last token, loading a model included; then status 504. 0: no limit."""
    drain_seconds: float = 30.0
    """Time, in seconds, that answers under way get to finish after SIGTERM or the first Ctrl-C."""
    access_log: str = ""
    """File to which one line of JSON per request is added; `-` is standard error. Empty: none. It holds no texts."""
    log_prompts: bool = False
    """Prompts and answers go into the access log as well."""
    engine: Literal["chatwright", "vllm"] = "chatwright"
    """What computes: chatwright itself, or vLLM (a program of its own, for GPUs), to which the model is exported."""
    engine_args: list[str] = field(default_factory=list)
    """Further arguments for vLLM, as they are: --engine_args '["--tensor-parallel-size", "2"]'."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: ports are 0 to 65535")
        if self.max_requests < 1:
            raise UsageError(f"--max_requests {self.max_requests}: at least 1")
        if not 0 <= self.memory_gb < float("inf"):
            raise UsageError(f"--memory_gb {self.memory_gb}: 0 (no limit) or more")
        if self.max_body < 1024:
            raise UsageError(f"--max_body {self.max_body}: at least 1024 bytes")
        for name in (*QUOTA, "max_new_tokens", "max_prompt_tokens", "timeout", "drain_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"--{name} {getattr(self, name)}: 0 or more")
        if self.log_prompts and not self.access_log:
            raise UsageError("--log_prompts adds texts to the access log: give --access_log as well")
        if self.engine_args and self.engine == "chatwright":
            raise UsageError("--engine_args are for --engine vllm")


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C. Raises UserError when the port, the model or the extra `serve` is missing."""
    config, positionals = parse(
        ServeConfig,
        argv,
        prog="chatwright serve",
        description="Serve MODEL: chat page and OpenAI-compatible interface.",
        positionals={"model": "A run, a model directory, smollm2, hf:owner/name or a .gguf file."},
    )
    if config.engine == "vllm":
        from chatwright.serve import vllm

        return vllm.launch(str(positionals["model"]), config)
    try:
        import fastapi  # noqa: F401
        import markdown_it  # noqa: F401
        import nh3  # noqa: F401
        import prometheus_client  # noqa: F401
        import pygments  # noqa: F401
        import sqlalchemy  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; run: pip install 'chatwright[serve]'") from None
    check_exposure(config)
    listener = listen(config.host, config.port)  # before the model is read: a busy port shows at once
    try:
        from chatwright.language_model import load

        source = str(positionals["model"])
        return serve(make_pool(load(source, dtype=config.dtype), source, config), listener, config)
    finally:
        listener.close()


def check_exposure(config: ServeConfig) -> None:
    """Raise UserError when everybody in reach could use the server, or the keys or the origins make no sense."""
    from chatwright.serve.operation.cors import check_origins
    from chatwright.serve.operation.guard import is_loopback
    from chatwright.serve.operation.keys import open_keys

    check_origins(config.cors_origins)
    if open_keys(config.api_keys) is None and not is_loopback(config.host) and not config.insecure:
        raise UserError(
            f"--host {config.host}: everybody who reaches this machine could use the model, and there are no API keys. "
            "Make one with `chatwright key NAME --file keys.txt` and give --api_keys keys.txt; or, where nobody else is in "
            "reach, --insecure"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the port is taken, not allowed, or the address is not ours."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: this name has no address") from None
    problem = OSError()
    for family, kind, protocol, _, address in addresses:
        try:
            listener = socket.socket(family, kind, protocol)
        except OSError as error:  # IPv6 may be switched off
            problem = error
            continue
        try:
            if (
                os.name == "posix"
            ):  # start again at once; on Windows this option would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            problem = error
    if problem.errno == errno.EADDRINUSE:
        raise UserError(f"port {port} on {host} is in use; choose another with --port (0 picks a free one)")
    if problem.errno == errno.EACCES:
        raise UserError(
            f"port {port} on {host} needs more rights than you have; choose one above 1023 with --port"
        )
    raise UserError(f"cannot listen on {host} port {port}: {problem.strerror}")


def build_app(pool: ModelPool, config: ServeConfig) -> FastAPI:
    """The application that serves the models of `pool`. Raises UserError: keys, log or store that cannot be opened."""
    from chatwright.feedback.quota import Quota
    from chatwright.serve.app import Operation, create_app
    from chatwright.serve.operation.access_log import AccessLog
    from chatwright.serve.operation.cors import check_origins
    from chatwright.serve.operation.guard import is_loopback
    from chatwright.serve.operation.keys import open_keys

    operation = Operation(
        hosts=config.allowed_hosts if config.allowed_hosts or is_loopback(config.host) else None,
        origins=check_origins(config.cors_origins),
        keys=open_keys(config.api_keys),
        max_body=config.max_body,
        log=AccessLog(config.access_log) if config.access_log else None,
        keep_texts=config.log_prompts,
        quota=Quota(**{name: getattr(config, name) for name in QUOTA}),
        drain_seconds=config.drain_seconds,
    )
    return create_app(pool, operation=operation, store=config.store)


def make_pool(model: LanguageModel, source: str, config: ServeConfig) -> ModelPool:
    """The models to serve: `model`, which `source` names and which is in memory, and those of --models."""
    from chatwright.serve.pool import ModelPool, Spec, parse_specs
    from chatwright.serve.service import Limits

    specs = [Spec(config.name or model.name, source, config.dtype), *parse_specs(config.models, config.dtype)]
    budget = int(config.memory_gb * 1e9) or None
    limits = Limits(config.max_requests, config.max_new_tokens, config.max_prompt_tokens, config.timeout)
    pool = ModelPool(specs, budget=budget, limits=limits)
    pool.adopt(pool.default, model)
    return pool


def serve(pool: ModelPool, listener: socket.socket, config: ServeConfig) -> int:
    """Serve on `listener` until SIGTERM or Ctrl-C and finish what is under way. Returns the exit code."""
    app = build_app(pool, config)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"chatwright serves {', '.join(pool.names)}", file=sys.stderr)
    print(f"  chat page   http://{shown}:{port}/", file=sys.stderr)
    print(f"  OpenAI API  http://{shown}:{port}/v1", file=sys.stderr)
    if app.state.keys is not None:
        print("  API keys are needed", file=sys.stderr)
    print("Ctrl-C stops.", file=sys.stderr, flush=True)
    try:
        make_server(app, config).run(sockets=[listener])
    finally:
        pool.close()  # when it was ended at once, uvicorn has not said so
    print("stopped", file=sys.stderr)
    return 0


def make_server(app: FastAPI, config: ServeConfig | None = None) -> uvicorn.Server:
    """The server that runs `app`."""
    from chatwright.serve.operation.running import Server

    config = config or ServeConfig()
    return Server(app, drain_seconds=config.drain_seconds, proxies=config.proxies)

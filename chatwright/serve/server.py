"""The verb `serve`: a model behind an OpenAI-compatible interface and a chat page, on one port."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatwright.config import UsageError, UserError, parse

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from chatwright.language_model import LanguageModel
    from chatwright.serve.pool import ModelPool


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
    """Answers that may be under way or waiting at a time; more are refused with status 429."""
    models: list[str] = field(default_factory=list)
    """More models, each `MODEL` or `NAME=MODEL`, loaded when they are first asked for: --models '["small=runs/tiny", "smollm2"]'."""
    memory_gb: float = 0.0
    """Most memory, in GB, for all models together; those unused longest are put away for others. 0: no limit."""
    dtype: str = "auto"
    """Weights while generating: fp32, bf16, int8 or int4 (compiled CPU kernels); auto takes bf16 for models above 20 M."""
    store: str = ""
    """Where conversations are kept: a SQLite file or a SQLAlchemy URL; default: chatwright/conversations.db in the user's data
    directory; `none` keeps nothing beyond the process (in memory)."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: ports are 0 to 65535")
        if self.max_requests < 1:
            raise UsageError(f"--max_requests {self.max_requests}: at least 1")
        if not 0 <= self.memory_gb < float("inf"):
            raise UsageError(f"--memory_gb {self.memory_gb}: 0 (no limit) or more")


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C. Raises UserError when the port, the model or the extra `serve` is missing."""
    config, positionals = parse(
        ServeConfig,
        argv,
        prog="chatwright serve",
        description="Serve MODEL: chat page and OpenAI-compatible interface.",
        positionals={"model": "A run, a model directory, smollm2, hf:owner/name or a .gguf file."},
    )
    try:
        import fastapi  # noqa: F401
        import markdown_it  # noqa: F401
        import nh3  # noqa: F401
        import pygments  # noqa: F401
        import sqlalchemy  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; run: pip install 'chatwright[serve]'") from None
    listener = listen(config.host, config.port)  # before the model is read: a busy port shows at once
    try:
        from chatwright.language_model import load

        source = str(positionals["model"])
        return serve(make_pool(load(source, dtype=config.dtype), source, config), listener, config)
    finally:
        listener.close()


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
    """The application that serves the models of `pool`."""
    from chatwright.serve.app import create_app
    from chatwright.serve.guard import is_loopback

    hosts = config.allowed_hosts if config.allowed_hosts or is_loopback(config.host) else None
    return create_app(pool, hosts=hosts, store=config.store)


def make_pool(model: LanguageModel, source: str, config: ServeConfig) -> ModelPool:
    """The models to serve: `model`, which `source` names and which is in memory, and those of --models."""
    from chatwright.serve.pool import ModelPool, Spec, parse_specs

    specs = [Spec(config.name or model.name, source, config.dtype), *parse_specs(config.models, config.dtype)]
    budget = int(config.memory_gb * 1e9) or None
    pool = ModelPool(specs, budget=budget, max_requests=config.max_requests)
    pool.adopt(pool.default, model)
    return pool


def serve(pool: ModelPool, listener: socket.socket, config: ServeConfig) -> int:
    """Serve on `listener` until Ctrl-C; answers under way are ended properly. Returns the exit code."""
    app = build_app(pool, config)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"chatwright serves {', '.join(pool.names)}", file=sys.stderr)
    print(f"  chat page   http://{shown}:{port}/", file=sys.stderr)
    print(f"  OpenAI API  http://{shown}:{port}/v1", file=sys.stderr)
    print("Ctrl-C stops.", file=sys.stderr, flush=True)
    try:
        make_server(app).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has shut down and hands the signal on
        print("stopped", file=sys.stderr)
    return 0


def make_server(app: FastAPI) -> uvicorn.Server:
    """A uvicorn server for `app` that ends streams when it is told to stop, instead of waiting for their ends."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.pool.cancel_all()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, ws="none"
    )
    return Server(config)

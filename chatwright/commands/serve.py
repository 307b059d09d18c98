"""Talk to a model in the browser; an OpenAI-compatible API on the same port."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatwright.commands.chat import tell_about
from chatwright.config import UserError, parse
from chatwright.serve.config import QUOTA, ServeConfig

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from chatwright.language_model import LanguageModel
    from chatwright.serve.pool import ModelPool


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
    listener = listen(config.host, config.port)  # before the model is loaded: a busy port fails at once
    try:
        from chatwright.language_model import load

        source = str(positionals["model"])
        model = load(source, dtype=config.dtype)
        tell_about(model)
        return serve(make_pool(model, source, config), listener, config)
    finally:
        listener.close()


def check_exposure(config: ServeConfig) -> None:
    """Raise UserError when everybody who reaches the server could use it, or keys or origins are invalid."""
    from chatwright.serve.operation.cors import check_origins
    from chatwright.serve.operation.guard import is_loopback
    from chatwright.serve.operation.keys import open_keys

    check_origins(config.cors_origins)
    if open_keys(config.api_keys) is None and not is_loopback(config.host) and not config.insecure:
        raise UserError(
            f"--host {config.host}: everybody who reaches this machine could use the model, and there are no "
            "API keys. Make one with `chatwright key NAME --file keys.txt` and give --api_keys keys.txt; or, "
            "where nobody else is in reach, --insecure"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the port is taken or not allowed, or the address is not this
    machine's."""
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
            if os.name == "posix":
                # Allows a restart at once. On Windows this option would let two servers share a port.
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
    """The application that serves the models of `pool`. Raises UserError when the keys, the log or the store
    cannot be opened."""
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
    """The models to serve: `model`, already loaded from `source`, and those of --models."""
    from chatwright.serve.pool import ModelPool, Spec, parse_specs
    from chatwright.serve.service import Limits

    specs = [Spec(config.name or model.name, source, config.dtype), *parse_specs(config.models, config.dtype)]
    budget = int(config.memory_gb * 1e9) or None
    limits = Limits(config.max_requests, config.max_new_tokens, config.max_prompt_tokens, config.timeout)
    pool = ModelPool(specs, budget=budget, limits=limits, own_defaults=config.defaults == "model")
    pool.adopt(pool.default, model)
    return pool


def serve(pool: ModelPool, listener: socket.socket, config: ServeConfig) -> int:
    """Serve on `listener` until SIGTERM or Ctrl-C, then finish the work under way. Returns the exit code."""
    from chatwright.model_names import weights_note

    app = build_app(pool, config)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"chatwright serves {', '.join(pool.names)}", file=sys.stderr)
    print(f"  chat page   http://{shown}:{port}/", file=sys.stderr)
    print(f"  OpenAI API  http://{shown}:{port}/v1", file=sys.stderr)
    if app.state.keys is not None:
        print("  API keys are needed", file=sys.stderr)
    if note := weights_note(pool.default):
        print(f"  {note}", file=sys.stderr)
    print("Ctrl-C stops.", file=sys.stderr, flush=True)
    try:
        make_server(app, config).run(sockets=[listener])
    finally:
        pool.close()  # after a forced exit, uvicorn may not have closed it
    print("stopped", file=sys.stderr)
    return 0


def make_server(app: FastAPI, config: ServeConfig | None = None) -> uvicorn.Server:
    """The server that runs `app`."""
    from chatwright.serve.operation.running import Server

    config = config or ServeConfig()
    return Server(app, drain_seconds=config.drain_seconds, proxies=config.proxies)

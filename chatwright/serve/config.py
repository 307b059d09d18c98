"""Settings of `chatwright serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from chatwright.config import UsageError

QUOTA = ("max_conversations", "max_owner_mb", "max_store_mb")
"""Settings that are passed on to `feedback.quota.Quota`."""


@dataclass(frozen=True)
class ServeConfig:
    """How a model is served."""

    host: str = "127.0.0.1"
    """Address to listen on. Other machines reach the server only when this is not a loopback address."""
    port: int = 8000
    """TCP port; 0 picks a free one."""
    name: str | None = None
    """Name of the model in the interface, which requests give as `model`; default: MODEL as it was written,
    which requests may give in any case."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Host names the server answers to beside this machine's own. Empty: any name, if `host` is not loopback.
    """
    max_requests: int = 64
    """Answers that may be under way or waiting at a time, per model; more are refused with status 429."""
    models: list[str] = field(default_factory=list)
    """More models, each `MODEL` or `NAME=MODEL`, loaded when they are first asked for: --models
    '["small=runs/tiny", "smollm2"]'."""
    memory_gb: float = 0.0
    """Most memory, in GB, for all models together; those unused longest are put away for others. 0: no limit.
    """
    dtype: str = "auto"
    """Weights while generating: fp32, bf16, int8 or int4 (compiled CPU kernels); auto takes bf16 for models
    above 20 M."""
    store: str = ""
    """Where conversations are kept: a SQLite file or a SQLAlchemy URL; default: chatwright/conversations.db
    in the user's data directory; `none` keeps nothing beyond the process (in memory)."""
    max_conversations: int = 2000
    """Conversations that are kept for one owner: a browser, and with API keys a key's name in it. 0: no
    limit."""
    max_owner_mb: float = 200.0
    """Most MB of conversations that are kept for one owner. 0: no limit."""
    max_store_mb: float = 2000.0
    """Most MB of conversations that are kept for all owners together; without API keys anybody can be any
    number of owners. 0: no limit."""
    api_keys: str | None = None
    """File of hashed API keys (`chatwright key NAME --file FILE` makes one); read again when it changes. Keys
    in clear may stand in the environment: CHATWRIGHT_API_KEYS, comma separated."""
    insecure: bool = False
    """Listen on an address that others reach although there are no API keys."""
    proxies: list[str] = field(default_factory=list)
    """Addresses or networks of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto headers are
    believed."""
    cors_origins: list[str] = field(default_factory=list)
    """Other sites whose pages may use /v1, such as '["http://localhost:3000"]'. Empty: none."""
    max_body: int = 1 << 20
    """Largest request, in bytes; larger ones are refused with status 413."""
    max_new_tokens: int = 0
    """Longest answer, in tokens; requests for longer ones are cut to it. 0: the context is the only limit."""
    defaults: Literal["model", "openai"] = "model"
    """Sampling settings that a request leaves out: the model's own (generation_config.json, else temperature
    0.7), or OpenAI's (temperature 1, nothing left out)."""
    max_prompt_tokens: int = 0
    """Longest prompt, in tokens; longer ones are refused with status 400. 0: the context is the only limit.
    """
    timeout: float = 0.0
    """Seconds for a request, from its arrival to its last token, loading a model included; then status 504.
    0: no limit."""
    drain_seconds: float = 30.0
    """Time, in seconds, that answers under way get to finish after SIGTERM or the first Ctrl-C."""
    access_log: str = ""
    """File to which one line of JSON per request is added; `-` is standard error. Empty: none. It holds no
    texts."""
    log_prompts: bool = False
    """Prompts and answers go into the access log as well."""
    engine: Literal["chatwright", "vllm"] = "chatwright"
    """What computes: chatwright itself, or vLLM (a program of its own, for GPUs), to which the model is
    exported."""
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

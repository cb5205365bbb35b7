"""The settings of the server, beside those of the service."""

from __future__ import annotations

from dataclasses import dataclass

from duoserve.errors import ConfigError

DAY_S = 86_400


@dataclass(frozen=True)
class ServerSettings:
    """``name`` is the model's name in requests and answers. Without an ``api_key`` every client may ask.

    ``shutdown_s`` is how long running requests may go on after SIGTERM, ``ping_s`` how long a stream may be silent.
    With ``allowed_hosts``, a request whose Host header names anything else is refused. This stops web pages that point
    their own domain at this machine (DNS rebinding).
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    shutdown_s: float = 30.0
    ping_s: float = 10.0
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 32 << 10
    text_s: float = 10.0  # limit for rendering and tokenizing one request; a template's process must start in less

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, but must be in 0..65535 (0: any that is free)")
        if not 0 <= self.shutdown_s <= DAY_S:
            raise ConfigError(f"the shutdown timeout is {self.shutdown_s} s, but must be in 0..{DAY_S}")
        if not 0 < self.ping_s <= DAY_S:
            raise ConfigError(f"the ping interval is {self.ping_s} s, but must be more than 0 and at most {DAY_S}")
        if not self.host:
            raise ConfigError("the host is empty: give an address to listen on; 0.0.0.0 is all of this machine's")
        if self.api_key == "":
            raise ConfigError("the API key is empty: give one, or none at all")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise ConfigError("the API key begins or ends with white space, which no request can show")
        if self.api_key is not None and not self.api_key.isprintable():
            raise ConfigError("the API key has a line break, a byte that is not UTF-8, or else what cannot be printed")
        try:
            self.name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the model's name {self.name!r} is not UTF-8: see --served-model-name") from error

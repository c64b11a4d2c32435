"""The settings of `exlstm serve` and their limits; free of torch, so that the command line answers at once."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

KEY = "EXLSTM_KEY"
TEMPLATE = "{Role}: {content}\n\n"
# Whole numbers and what they may be: everything that a client can make large is bounded by one of them.
WHOLE = {
    "port": (0, 65535),
    "slots": (1, 4096),
    "queue": (0, 100_000),
    "max_tokens": (1, 2**24),
    "max_prompt": (1, 2**24),
    "max_choices": (1, 4096),
    "max_body": (1024, 2**30),
    "prefix_mib": (0, 2**20),
}


@dataclass(frozen=True)
class Serve:
    """Serve the model of a run: an OpenAI-compatible API and a page, for this machine alone until there is a key.

    POST /v1/completions and /v1/chat/completions, GET /v1/models, /health, /metrics and the page at /. Needs exlstm[serve].
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")] = ""
    """run folder, or one of its checkpoints, or a saved model"""
    host: str = "127.0.0.1"
    """address to listen at; another than this machine's own wants a key"""
    port: int = 8000
    """port to listen at; 0: any that is free"""
    key: str = ""
    """what clients have to send as "Authorization: Bearer KEY"; better in the environment, as EXLSTM_KEY: there nobody sees it"""
    name: str = ""
    """the model's name for clients; left out: the name of its folder"""
    slots: int = 16
    """texts that are written at the same time"""
    queue: int = 128
    """requests that may wait for a slot; further ones are told to come again later (429)"""
    max_tokens: int = 4096
    """tokens that a request may ask for, at most"""
    max_prompt: int = 131072
    """tokens of a prompt, at most; the state of a recurrent model does not grow with them"""
    max_choices: int = 32
    """texts that a request may ask for, at most: its prompts times n"""
    max_body: int = 1 << 20
    """bytes of a request, at most"""
    timeout: float = 300.0
    """seconds that a request may take, waiting included"""
    drain: float = 30.0
    """seconds that running requests get to end after SIGTERM or Ctrl-C"""
    prefix_mib: int = 256
    """MiB for states of prompts that were read: one that begins alike is read from there on; 0: none are kept"""
    cors: tuple[str, ...] = ()
    """origins of other pages whose scripts may ask, as in http://localhost:3000; * for all, which wants a key"""
    template: str = TEMPLATE
    """how a chat becomes a text, message by message; it holds {content}, and in front {role}, which becomes user, assistant or
    system, or {Role}, which becomes User, Assistant or System"""
    eos: tuple[int, ...] = ()
    """tokens that end every text"""
    device: str = "auto"
    """cpu, cuda, ...; auto: the accelerator if there is one"""
    int8: bool = False
    """weights in int8, a scale a row: half the bytes of bfloat16; wants exlstm[int8]"""

    def secret(self) -> str:
        """The key: of the command line, or else of the environment."""
        return self.key or os.environ.get(KEY, "")

    def title(self) -> str:
        """The model's name for clients."""
        return self.name or Path(self.model).resolve().name

    def is_local(self) -> bool:
        """Whether only this machine reaches the host."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self):
        """ValueError, in one sentence, where the settings do not fit."""
        if not self.model:
            raise ValueError("serve wants the folder of a run, as in: exlstm serve runs/stdlib")
        for name, (least, most) in WHOLE.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}, wanted a whole number from {least} to {most}")
        for name, least in (("timeout", 1e-3), ("drain", 0.0)):
            value = getattr(self, name)
            if not math.isfinite(value) or not least <= value <= 1e6:
                raise ValueError(f"{name} is {value}, wanted seconds from {least:g} to 1000000")
        key = self.secret()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("the key holds something else than visible ASCII characters, which no header can carry")
        if not key and not self.is_local():
            raise ValueError(f"host {self.host} can be reached from elsewhere, wanted a key for it: --key or ${KEY}")
        if not key and "*" in self.cors:
            raise ValueError(f"cors * lets scripts of every page ask, wanted a key for that: --key or ${KEY}")
        wrong = next((o for o in self.cors if o != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", o)), None)
        if wrong is not None:
            raise ValueError(
                f"cors holds {wrong!r}, wanted origins such as http://localhost:3000, without a path, or *"
            )
        before, content, behind = self.template.partition("{content}")
        roles = before.count("{role}") + before.count("{Role}")
        if not content or roles != 1 or any(word in behind for word in ("{role}", "{Role}", content)):
            wanted = "{role} or {Role}, and behind it {content}, in it, once each"
            raise ValueError(f"template is {self.template!r}, wanted {wanted}")

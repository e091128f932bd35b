"""The endpoints of a command made ready to be asked: started, probed, with prompts that all of them take.

Knows servers, probes and prompt makers; runs no load but the warm-up of a server that was just started.
"""

from __future__ import annotations

import msgspec

from tabstop.bench.client import Endpoint
from tabstop.bench.compare import Arm
from tabstop.bench.options import Options, make_endpoint
from tabstop.bench.probe import ServerFacts, probe
from tabstop.bench.report import Endpoints, describe_endpoint
from tabstop.bench.run import RunSetup, counter_for, make_maker, warm_up
from tabstop.bench.servers import Fleet, Server
from tabstop.bench.tokens import RemoteCounter
from tabstop.bench.workers import WorkerPool
from tabstop.bench.workloads.prompts import IdMaker, LooseMaker, PromptMaker, TextMaker
from tabstop.errors import ConfigError


class Target(msgspec.Struct, kw_only=True):
    """An endpoint that was probed and can be asked."""

    endpoint: Endpoint
    facts: ServerFacts
    maker: PromptMaker
    described: Endpoints


def make_target(options: Options, setup: RunSetup, fleet: Fleet, number: int, label: str) -> Target:
    """The fleet's `number`th server, running. Raises InputError for whatever the probe finds wrong."""
    command = fleet.servers[number].command
    endpoint, facts = probe(make_endpoint(options, fleet.use(number)[0], label, number))
    is_chat = setup.workload.name == "chat"
    if is_chat and endpoint.dialect == "openai-completions" and options.dialect == "auto":
        endpoint, facts = probe(msgspec.structs.replace(endpoint, dialect="openai-chat"))
    counter = None
    if is_chat or setup.tokens.form == "text" or not facts.takes_ids:
        counter = counter_for(endpoint, setup.tokens)
        endpoint, facts = probe(endpoint, counter)  # again, to learn what the server adds to a text
    maker = make_maker(endpoint, facts, setup.tokens, counter)
    if is_chat:
        maker = TextMaker(counter) if counter else LooseMaker()  # lengths of messages, without the template
    return Target(endpoint=endpoint, facts=facts, maker=maker, described=describe_endpoint(endpoint, facts, command))


def short_name(number: int, server: Server) -> str:
    """ "A http://…" or "B llama_cpp.server": short enough for a column."""
    words = server.name.split()
    is_command = server.command is not None
    name = next((word for word in words[1:] if "." in word or word == "serve"), words[0]) if is_command else words[0]
    return f"{'ABCDEFGHIJ'[number % 10]} {name}"[:40]


def names_of(servers: list[Server], labels: list[str]) -> list[str]:
    """The given labels, then short names. Raises ConfigError if two are equal or there are too many."""
    names = labels + [short_name(i, server) for i, server in enumerate(servers)][len(labels) :]
    if len(names) != len(servers) or len(set(names)) < len(names):
        raise ConfigError(f"{len(servers)} endpoints need as many different names: give --label once for each")
    return names


def same_maker(targets: list[Target], *, one_at_a_time: bool) -> None:
    """All endpoints get the same prompts: text for all if one of them does not take ids.

    Raises ConfigError where the text would have to be counted by a server that does not run all the time.
    """
    ranks = {IdMaker: 0, LooseMaker: 1, TextMaker: 2}
    maker = max((target.maker for target in targets), key=lambda maker: ranks[type(maker)])
    if one_at_a_time and isinstance(maker, TextMaker) and isinstance(maker.counter, RemoteCounter):
        raise ConfigError("--one-at-a-time with text prompts needs --tokenizer: the server that counts them is stopped")
    for target in targets:
        target.maker = maker


def make_arm(fleet: Fleet, number: int, targets: list[Target], pool: WorkerPool, setup: RunSetup) -> Arm:
    """Another name of the same URL gets other prompts, or its own cache would answer."""
    target = targets[number]
    same = [i for i in range(number) if targets[i].endpoint.url == target.endpoint.url and not fleet.one_at_a_time]

    def enter() -> Endpoint:
        url, is_new = fleet.use(number)
        is_started = fleet.servers[number].command is not None
        endpoint = msgspec.structs.replace(target.endpoint, url=url) if is_started else target.endpoint
        if is_new:
            warm_up(pool, endpoint, setup, target.maker)
        return endpoint

    return Arm(label=target.described.label, maker=target.maker, enter=enter, salt=len(same))

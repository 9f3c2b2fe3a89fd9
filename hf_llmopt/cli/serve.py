"""`hf-llmopt serve`: a model behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import ui
from .command import Device, Dtype, MaxModelLen, Model, ServedLlmopt, TensorParallel, UserError, keyword
from .replicas import serve_replicas
from .service import MAX_BODY_BYTES, MAX_WAITING, bound, end_if_lost, keys_of, make, room

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Model = "demo",
    llmopt: ServedLlmopt = "true",
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine reaches the default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    served_name: Annotated[str | None, typer.Option(help="What clients call the model; by default MODEL.")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys that are let in, one a line, # for comments; HF_LLMOPT_API_KEYS adds others."),
    ] = None,
    max_model_len: MaxModelLen = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1,
            help="Requests that may wait or be prepared, so the largest burst, whatever --llmopt says; others get 429.",
        ),
    ] = MAX_WAITING,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request's body.")] = MAX_BODY_BYTES,
    deadline: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds after which an answer ends with an error.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose web pages may read answers, or * for all; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that clients may call this server by, besides localhost and addresses; or * for any."
        ),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(
            metavar="hermes|llama3_json|mistral|none",
            help="How the model writes tool calls, if not as its template tells.",
        ),
    ] = None,
    tensor_parallel: TensorParallel = 1,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="So many engines behind one address, on this machine or Ray's cluster.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --replicas: more of them under load, up to so many.")
    ] = None,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds that running requests have when it stops.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Serve a model over OpenAI's API. The log goes to stderr, one JSON object a line.

    SIGTERM or Ctrl-C lets running requests end and refuses new ones; the second one stops at once.
    """
    wanted = keyword(llmopt)
    if wanted is False:
        raise UserError("--llmopt false is stock transformers, which `transformers serve` serves")
    if max_replicas is not None and replicas is None:
        raise UserError(f"--max-replicas {max_replicas} needs --replicas, how many there are at least")
    serving = room()
    from hf_llmopt.serving import garbage, logs
    from hf_llmopt.serving.app import known_origins
    from hf_llmopt.serving.hosts import known_hosts, loopback
    from hf_llmopt.serving.service import check_parser

    # What can be wrong is found before a model is loaded.
    check_parser(tool_parser)
    known_origins(allow_origin or ())
    known_hosts(allowed_host or ())
    keys = keys_of(api_key_file)
    if host not in LOOPBACK and not len(keys):
        ui.warn(f"whoever reaches {host} may use this server; --api-key-file asks for a key")
    if replicas is not None:
        return serve_replicas(
            host,
            port,
            replicas=replicas,
            max_replicas=max_replicas,
            drain=drain,
            model=model,
            llmopt=wanted,
            dtype=dtype,
            device=device,
            served_name=served_name,
            max_model_len=max_model_len,
            max_waiting=max_waiting,
            max_body_bytes=max_body_bytes,
            deadline=deadline,
            keys=keys,
            log_prompts=log_prompts,
            tool_parser=tool_parser,
            origins=tuple(allow_origin or ()),
            hosts=tuple(allowed_host or ()),
            tensor_parallel=tensor_parallel,
        )
    with bound(host, port) as listening:
        service = make(
            model,
            wanted,
            dtype,
            device,
            served_name,
            max_model_len,
            max_waiting,
            max_body_bytes,
            deadline,
            tensor_parallel,
            keys=keys,
            log_prompts=log_prompts,
            tool_parser=tool_parser,
        )
        hosts = list(allowed_host or ())
        if hosts or loopback(listening.getsockname()[0]):
            hosts.append(host)
        logs.to_stderr()
        garbage.freeze()
        server = serving.Server(service, drain, allow_origin or (), hosts)
        listening.listen(serving.server.BACKLOG)
        where = f"[{host}]" if ":" in host else host
        address = f"http://{where}:{listening.getsockname()[1]}"
        ui.talk(f"serving {service.name} on {address}/v1")
        logs.LOGGER.info("serving", extra={"fields": {**service.summary, "page": f"{address}/"}})
        server.run(sockets=[listening])
        end_if_lost(service)

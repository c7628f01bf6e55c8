"""`qspec serve`: the OpenAI-compatible server."""

import argparse
import ipaddress
import os
import sys

from qspec_llm.cli.common import load
from qspec_llm.errors import QSpecError

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    try:
        from qspec_llm.server.app import ServerOptions
        from qspec_llm.server.run import serve
    except ImportError as error:
        raise QSpecError(
            f"the server needs {error.name}; install it with `pip install qspec-llm[server]`"
        ) from None
    keys = tuple(args.api_key or ())
    if not keys and (key := os.environ.get("QSPEC_API_KEY")):
        keys = (key,)
    if any(not key.strip() for key in keys):
        raise QSpecError("an API key is empty")
    llm = load(args)
    # measured now rather than under a request; one may ask for "auto" whatever the default is
    llm.engine.gammas.costs = llm.step_costs()
    options = ServerOptions(
        names=args.served_model_name or [str(args.model)],
        api_keys=keys,
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body_bytes,
    )
    if not keys and not _is_loopback(args.host):
        print(
            f"qspec: note: {args.host} is reachable by others and there is no --api-key",
            file=sys.stderr,
        )
    print(f"qspec: serving {options.names[0]} on http://{args.host}:{args.port}", file=sys.stderr)
    serve(llm, options, host=args.host, port=args.port, log_level=args.log_level)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

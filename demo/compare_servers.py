"""Concurrent streams on the CPU: `qspec serve` and llama-cpp-python's server, same file, in turn.

    pip install 'llama-cpp-python[server]==0.3.36'   # here or in an environment of its own
    python demo/compare_servers.py [--llama-python PYTHON] [--model smollm2] [--threads 2]

Both servers run all the time; one of them is asked at a time, each round with prompts that no cache
has seen: qspec, llama, qspec again. llama-cpp-python's server answers one request after the other.
Greedy, answers of a fixed length where the server can (llama's may end early); counted are the
tokens that clients received.
"""

import argparse
import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx2 as httpx

from qspec_llm.bench.serve import Load, run_load, summarise
from qspec_llm.hub import resolve_model

NAME = "m"
START_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--target", default="int4")
    parser.add_argument("--gamma", default="0")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    path, ports = str(resolve_model(args.model)), _free_ports()
    threads = str(args.threads)
    program = "import sys; from qspec_llm.cli import main; sys.exit(main())"
    qspec = [sys.executable, "-c", program, "serve", path, "--target", args.target]
    qspec += ["--gamma", args.gamma, "--threads", threads, "--max-batch", str(args.streams)]
    qspec += ["--served-model-name", NAME, "--port", str(ports[0]), "--log-level", "warning"]
    llama = [args.llama_python, "-m", "llama_cpp.server", "--model", path, "--model_alias", NAME]
    llama += ["--n_threads", threads, "--n_threads_batch", threads, "--n_ctx", "2048"]
    llama += ["--logits_all", "false", "--interrupt_requests", "false", "--port", str(ports[1])]
    rates: dict[str, list[float]] = {"qspec": [], "llama": [], "qspec again": []}
    with _running(qspec, ports[0], "/health"), _running(llama, ports[1], "/v1/models"):
        for number in range(-1, args.rounds):  # the first one warms up
            for index, name in enumerate(rates):
                is_llama = name == "llama"
                load = Load(
                    num_requests=args.requests if number >= 0 else 2,
                    concurrency=args.streams,
                    max_tokens=args.tokens,
                    body={} if is_llama else {"ignore_eos": True},
                    seed=3 * number + index,
                )
                url = f"http://127.0.0.1:{ports[is_llama]}"
                outcomes = asyncio.run(run_load(url, NAME, load, key=None, advance=lambda: None))
                found = summarise(load, outcomes)
                if found["failed"]:
                    sys.exit(f"{name}: {found['first_error']}")
                if number >= 0:
                    rates[name].append(found["tokens_per_second"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:<12} {medians[name]:7.1f} tokens/s ({min(values):.1f} to {max(values):.1f})")
    ratio, control = medians["qspec"] / medians["llama"], medians["qspec again"] / medians["qspec"]
    print(f"qspec : llama-cpp-python {ratio:.2f} with {args.streams} streams, A/A {control:.3f}")


def _free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return [one.getsockname()[1], two.getsockname()[1]]


@contextlib.contextmanager
def _running(command: list[str], port: int, path: str) -> Iterator[None]:
    """A server, from when it answers on."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"it did not start: {' '.join(command)}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()


if __name__ == "__main__":
    main()

"""Plain decoding of one GGUF file by QSpec (int4 target) and by llama.cpp, turn by turn.

    pip install llama-cpp-python==0.3.36      # here or in an environment of its own
    python demo/compare_llama_cpp.py [--llama-python PYTHON] [--model smollm2] [--threads 2]

Each engine runs in its own process; they take turns of one answer, so that both see the same
machine. Counted are the tokens after the first, greedy, end tokens ignored.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


def serve_llama(path: str, threads: int, num_tokens: int) -> None:
    """Answer each line on stdin with tokens a second."""
    from llama_cpp import Llama

    llm = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=2048, verbose=False)
    prompt = llm.tokenize(PROMPT.encode())
    for _ in sys.stdin:
        llm.reset()
        tokens = llm.generate(prompt, temp=0)
        next(tokens)
        started = time.perf_counter()
        for _, _ in zip(range(num_tokens), tokens, strict=False):
            pass
        print(json.dumps(num_tokens / (time.perf_counter() - started)), flush=True)


def serve_qspec(path: str, threads: int, num_tokens: int) -> None:
    """The same."""
    from qspec_llm import LLM, SamplingParams
    from qspec_llm.kernels import get_backend

    get_backend("cpu").configure(threads, None)
    llm = LLM(path, target="int4", backend="cpu")
    prompt = llm.tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0, max_tokens=num_tokens + 1, ignore_eos=True)
    for _ in sys.stdin:
        engine = llm.new_engine(gamma=0)
        engine.add(prompt, params)
        engine.step()  # the prompt and the first token
        started = time.perf_counter()
        while engine.has_work:
            engine.step()
        print(json.dumps(num_tokens / (time.perf_counter() - started)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=["llama", "qspec"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve = {"llama": serve_llama, "qspec": serve_qspec}[args.serve]
        serve(args.model, args.threads, args.tokens)
        return

    from qspec_llm.hub import resolve_model

    path = str(resolve_model(args.model))
    pythons = {"qspec": sys.executable, "llama": args.llama_python, "qspec again": sys.executable}
    workers = {
        name: _start(python, name.split()[0], path, args) for name, python in pythons.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in workers}
    for round_number in range(args.rounds + 1):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            rate = json.loads(worker.stdout.readline())
            if round_number:  # the first warms up
                rates[name].append(rate)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:<12} {medians[name]:7.1f} tokens/s ({min(values):.1f} to {max(values):.1f})")
    print(
        f"qspec : llama.cpp {medians['qspec'] / medians['llama']:.2f}, "
        f"A/A {medians['qspec again'] / medians['qspec']:.3f}"
    )


def _start(python: str, name: str, path: str, args: argparse.Namespace) -> Any:
    command = [python, str(Path(__file__)), "--serve", name, "--model", path]
    command += ["--threads", str(args.threads), "--tokens", str(args.tokens)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()

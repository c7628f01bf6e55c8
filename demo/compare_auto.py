"""Draft lengths that the engine chooses against plain decoding, for some numbers of streams.

    python demo/compare_auto.py TARGET [STREAMS ...]

Three engines over the same weights decode the same prompts, a step in turn: plain, plain again
(what noise alone does) and gamma "auto". A number of streams with an L behind it has 1400 tokens
more in each prompt. Prompts and first tokens do not count.
"""

import json
import sys
from pathlib import Path

from qspec_llm import LLM, SamplingParams
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.request import Request

PROMPTS = Path(__file__).parent / "agreement.jsonl"
LONG = 1400  # tokens
NUM_TOKENS = 64  # an answer; twice as many where there is only one


def main() -> None:
    """Print one line a number of streams."""
    target, *streams = sys.argv[1:]
    llm = LLM("smollm2", target=target, gamma="auto", max_batch=16, max_tokens_in_kv=8192)
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    for each in streams or ["1", "4", "8", "16", "1L", "4L"]:
        size, context = int(each.rstrip("L")), LONG if each.endswith("L") else 0
        print(f"{target} {each:>3} streams: {compare(llm, prompts(llm, texts, size, context))}")


def prompts(llm: LLM, texts: list[str], size: int, context: int) -> list[list[int]]:
    """`size` chats, each behind the same long text, which the cache then shares."""
    story = llm.tokenizer.encode(" ".join(texts) * 40)[:context]
    found = []
    for index in range(size):
        again = " Then explain why." * (index // len(texts))
        message = {"role": "user", "content": texts[index % len(texts)] + again}
        found.append(story + llm.tokenizer.encode_chat([message]))
    return found


def compare(llm: LLM, tokens: list[list[int]]) -> str:
    """Decode in turn, whichever engine has used least time; prompts do not count."""
    num_tokens = NUM_TOKENS * 2 if len(tokens) == 1 else NUM_TOKENS
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    engines = [llm.new_engine(gamma) for gamma in (0, 0, "auto")]
    requests = [[group[0] for group in llm.submit(each, tokens, params)] for each in engines]
    before = []
    for engine, group in zip(engines, requests, strict=True):
        while not all(request.output for request in group):
            engine.step()
        before.append((engine.seconds.total, num_output(group)))
    while waiting := [index for index, engine in enumerate(engines) if engine.has_work]:
        next_one = min(waiting, key=lambda index: used(engines[index], before[index]))
        engines[next_one].step()
    plain, again, auto = (
        (num_output(group) - start[1]) / used(engine, start)
        for engine, group, start in zip(engines, requests, before, strict=True)
    )
    is_same = [r.output for r in requests[0]] == [r.output for r in requests[2]]
    num_drafted = sum(request.num_drafted for request in requests[2])
    return (
        f"plain {plain:.1f}, auto {auto:.1f} tokens/s: {2 * auto / (plain + again):.3f}x; "
        f"A/A {again / plain:.3f}; {num_drafted} drafted; "
        f"{'all tokens identical' if is_same else 'THE TOKENS DIFFER'}"
    )


def used(engine: Engine, start: tuple[float, int]) -> float:
    """Seconds since the prompts were done."""
    return engine.seconds.total - start[0]


def num_output(group: list[Request]) -> int:
    """Tokens generated."""
    return sum(len(request.output) for request in group)


if __name__ == "__main__":
    main()

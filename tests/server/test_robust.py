"""What must not bring the server down, and what it does when it must go down."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2 as httpx
import pytest

from helpers_server import running

BODY = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0}


def post(url, content, **headers):
    headers = {"content-type": "application/json", **headers}
    return httpx.post(f"{url}/v1/completions", content=content, headers=headers)


def is_refused(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 1100
    return True


# Hostile bodies


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"prompt"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"prompt": "a", "prompt": 5}',
        b'{"prompt": "a", "stop": "\\udfff"}',
        b'{"prompt": "a", "\\ud800": 1}',
        json.dumps({"prompt": "a", "stop": ["x"] * 300_000}).encode(),
        json.dumps({"prompt": "a", "stop": [f"{i}" for i in range(300_000)]}).encode(),
        json.dumps({"prompt": [[1]] * 100_000}).encode(),
        json.dumps({"prompt": "a" * 3_000_000}).encode(),
        json.dumps({"prompt": "a", "logit_bias": {str(i): 1 for i in range(100_000)}}).encode(),
        json.dumps({"prompt": "a", "x" * 100_000: 1}).encode(),
        json.dumps({"prompt": "a", "n": 64, "max_tokens": 10**18}).encode(),
    ],
    ids=lambda content: content[:24].decode(errors="replace"),
)
def test_hostile_bodies_get_a_400(server, content):
    assert is_refused(post(server.url, content))
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_deep_schemas_and_messages_are_refused(server):
    deep: dict = {}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": deep}}
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    response = httpx.post(
        f"{server.url}/v1/chat/completions", json={**chat, "response_format": form}, timeout=30
    )
    assert response.status_code in (200, 400)
    for pattern in ("(a*)*b", "(" * 500 + ")" * 500, "(a{1,1000}){1,1000}"):
        schema = {"type": "string", "pattern": pattern}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json={**chat, "response_format": form}, timeout=30
        )
        assert response.status_code in (200, 400), response.text
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_body_that_is_too_long_is_a_413_with_or_without_its_length(make_llm):
    with running(make_llm(max_tokens_in_kv=512), max_body_bytes=10_000) as server:
        assert is_refused(post(server.url, b"x" * 10_001), 413)

        def chunks():
            for _ in range(100):
                yield b"x" * 1000

        assert is_refused(post(server.url, chunks()), 413)
        assert post(server.url, json.dumps(BODY)).status_code == 200


def test_another_content_type_is_refused(server):
    for kind in ("text/plain", "multipart/form-data", "nonsense"):
        response = post(server.url, json.dumps(BODY), **{"content-type": kind})
        assert is_refused(response)
        assert "application/json" in response.json()["error"]["message"]
    unknown = post(server.url, json.dumps({**BODY, "max_token": 4}))
    assert is_refused(unknown)
    assert unknown.json()["error"]["message"] == "max_token is no option here"


def test_half_a_request_holds_up_nobody(server):
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        assert post(server.url, json.dumps(BODY)).status_code == 200
    server.wait_until_idle()


def test_a_wrong_stream_is_refused_before_it_begins(server):
    for wrong in ({"stop_token_ids": [9999]}, {"logit_bias": {"9999": 1}}, {"prompt": [9999]}):
        body = {**BODY, **wrong, "stream": True}
        assert is_refused(httpx.post(f"{server.url}/v1/completions", json=body))
    form = {"type": "json_object"}
    chat = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
    response = httpx.post(
        f"{server.url}/v1/chat/completions", json={**chat, "stream": True, "ignore_eos": True}
    )
    assert is_refused(response)


# Keys


def test_keys(make_llm):
    with running(make_llm(max_tokens_in_kv=512), api_keys=["s3cret", "other"]) as server:
        url = f"{server.url}/v1/models"
        for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": "s3cret"},
                      {"authorization": "Basic s3cret"}, {"authorization": "Bearer s3cret2"},
                      {"authorization": "Bearer \xff"}):  # fmt: skip
            encoded = {key: value.encode("latin-1") for key, value in wrong.items()}
            assert is_refused(httpx.get(url, headers=encoded), 401)
            assert is_refused(httpx.post(f"{server.url}/tokenize", headers=encoded), 401)
        for key in ("s3cret", "other"):
            assert httpx.get(url, headers={"authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/", "/health", "/version", "/metrics"):
            assert httpx.get(server.url + path).status_code == 200


def test_keys_are_compared_in_constant_time():
    import inspect

    from qspec_llm.server import app

    assert "hmac.compare_digest" in inspect.getsource(app._Guard)


# Clients that go away


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(server, is_stream):
    body = {"prompt": "b", "max_tokens": 1000, "ignore_eos": True, "stream": is_stream, "n": 3}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
        deadline = time.monotonic() + 10
        while not server.llm.engine.has_work:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    server.wait_until_idle(5)


def test_too_many_waiting_get_a_429(make_llm):
    with running(make_llm(max_batch=1, max_tokens_in_kv=1024), max_waiting=2) as server:
        statuses = []

        def ask():
            body = {"prompt": "c", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
            response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            statuses.append(response.status_code)
            if response.status_code == 429:
                is_refused(response, 429)
                assert response.headers["retry-after"]

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        server.wait_until_idle()


# The engine's end


def held_until_there_are(number, engine):
    """The engine's `advance`, which does nothing until it has had that many requests at once."""
    advance, is_held = engine.advance, True

    def held():
        nonlocal is_held
        is_held &= len(engine.scheduler.waiting) + len(engine.scheduler.running) < number
        return [] if is_held else advance()

    return held


def test_a_crash_of_the_engine_fails_what_runs_and_is_seen(make_llm):
    llm = make_llm(max_tokens_in_kv=1024)
    with running(llm) as server:
        step = held_until_there_are(2, llm.engine)

        def fail_later():
            running = llm.engine.scheduler.running
            if running and all(len(request.output) > 20 for request in running):
                raise RuntimeError("the kernels are on fire")
            return step()

        llm.engine.advance = fail_later
        body = {"prompt": "d", "max_tokens": 800, "ignore_eos": True, "temperature": 0}
        answers = {}

        def ask(is_stream):
            answers[is_stream] = httpx.post(
                f"{server.url}/v1/completions", json={**body, "stream": is_stream}, timeout=30
            )

        threads = [threading.Thread(target=ask, args=(kind,)) for kind in (False, True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[False].status_code == 500
        assert "on fire" in answers[False].json()["error"]["message"]
        last = answers[True].text.strip().splitlines()[-1]
        assert "on fire" in json.loads(last.removeprefix("data: "))["error"]["message"]
        health = httpx.get(f"{server.url}/health")
        assert is_refused(health, 503)
        assert "on fire" in health.json()["error"]["message"]
        assert is_refused(post(server.url, json.dumps(BODY)), 503)


# Signals


@pytest.fixture
def process(model_dir, tmp_path, request):
    """`qspec serve` as a user starts it; parameters are more options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from qspec_llm.cli import main; sys.exit(main())"]
    command += ["serve", str(model_dir), "--port", str(port), "--served-model-name", "tiny"]
    command += ["--target", "int8", "--threads", "1", "--log-level", "warning"]
    command += getattr(request, "param", ("--max-batch", "2", "--kv-cache-bytes", "1M"))
    env = {**os.environ, "QSPEC_CACHE": str(tmp_path), "QSPEC_API_KEY": "k"}
    child = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    child.url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert child.poll() is None, child.stderr.read()
            try:
                if httpx.get(f"{child.url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield child
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def stream_from(process, max_tokens, lines):
    body = {**BODY, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    headers = {"authorization": "Bearer k"}
    url = f"{process.url}/v1/completions"
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)  # at once: tests wait for the first
    except httpx.TransportError as error:
        lines.append(repr(error))


def wait_for_one_of(lines):
    deadline = time.monotonic() + 20
    while not lines:
        assert time.monotonic() < deadline, "no answer began"
        time.sleep(0.005)


def test_sigterm_drains(process):
    lines: list[str] = []
    thread = threading.Thread(target=stream_from, args=(process, 900, lines))
    thread.start()
    wait_for_one_of(lines)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{process.url}/health")
    thread.join(60)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(20) == 0


def test_a_second_signal_stops_at_once(process):
    lines: list[str] = []
    threads = [threading.Thread(target=stream_from, args=(process, 1000, lines)) for _ in range(12)]
    for thread in threads:
        thread.start()
    wait_for_one_of(lines)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    process.wait(20)
    assert time.monotonic() - started < 8
    for thread in threads:
        thread.join(20)
    assert sum(line == "data: [DONE]" for line in lines) < 12


# The log


def test_acceptance_below_what_pays_is_a_warning(make_llm, caplog, monkeypatch):
    from qspec_llm.server import metrics as module

    engine = make_llm(max_tokens_in_kv=512).engine
    engine.gammas.least_acceptance = lambda: 0.5
    for accepted, is_warned in ((0, True), (9, False)):
        metrics = module.Metrics()
        for _ in range(240):
            metrics.cycle(10, accepted, accepted + 1)
        metrics.state(engine)
        assert not caplog.records
        metrics._window.since -= module.WARN_EVERY
        metrics.state(engine)
        assert ("drafting pays from 50% on" in caplog.text) == is_warned
        caplog.clear()


# Under load


def test_short_steps_of_many_answers_share_their_chunks(server, offline, monkeypatch):
    """Many streams: a chunk carries some steps' tokens. One stream: a chunk a step."""
    from qspec_llm import SamplingParams
    from qspec_llm.server import worker

    # every step here is short beside such chunks, however slow the machine
    monkeypatch.setattr(worker, "CHUNK_SECONDS", 1.0)
    monkeypatch.setattr(worker, "LONGEST_WAIT", 1.0)
    monkeypatch.setattr(server.llm.engine, "advance", held_until_there_are(8, server.llm.engine))

    def ask(index):
        body = {"prompt": f"stream {index}", "max_tokens": 300, "ignore_eos": True, "stream": True}
        body |= {"temperature": 0, "logprobs": 0, "speculative": False}
        lines = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line[6:])["choices"][0] for line in lines[:-2]]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(8)))
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    for index, chunks in enumerate(answers):
        (wanted,) = offline.generate([f"stream {index}"], params)
        assert "".join(chunk["text"] for chunk in chunks) == wanted.outputs[0].text
        assert sum(len(chunk["logprobs"]["tokens"]) for chunk in chunks) == 300
        offsets = [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]]
        assert offsets == sorted(offsets)
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
            "length"
        ]
    assert sum(map(len, answers)) < 8 * 300 / 2
    assert len(ask(8)) == 300


class Here:
    """An event loop that calls at once, for a worker alone."""

    def call_soon_threadsafe(self, call):
        call()


def test_requests_that_come_together_begin_together(make_llm, monkeypatch):
    """The first step after a rest waits for what is being read, and for nothing else."""
    from qspec_llm import SamplingParams
    from qspec_llm.server import worker as module
    from qspec_llm.server.jobs import Job, Submission
    from qspec_llm.server.metrics import Metrics

    monkeypatch.setattr(module, "GATHER_SECONDS", 20.0)
    engine = make_llm(max_tokens_in_kv=512).engine
    advance, sizes, failures = engine.advance, [], []

    def watched():
        grown = advance()
        sizes.append(len(grown))
        return grown

    engine.advance = watched
    one = module.Worker(engine, Here(), Metrics())
    one.start()

    def submit(index):
        news = []
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        one.submit(Job([Submission([index, 2, 3], params, gamma=0)], news.extend, failures.append))
        return news

    def wait_for(*all_news):
        deadline = time.monotonic() + 10
        while not all(news and news[-1].finished for news in all_news):
            assert time.monotonic() < deadline, "an answer never came"
            time.sleep(0.001)

    for _ in range(3):
        one.expect()
    group = [submit(1), submit(2)]
    time.sleep(0.1)
    assert sizes == []
    wait_for(*group, submit(3))
    assert sizes[0] == 3
    one.expect()  # a client alone waits for nobody
    wait_for(submit(4))
    one.stop()
    one.join(10)
    assert not failures
    assert not one.is_alive()


def random_body(rng, prompts):
    prompt = rng.choice(prompts)[: rng.randint(1, 160)]
    body = {"prompt": prompt, "max_tokens": rng.randint(1, 60), "temperature": 0}
    body["ignore_eos"] = rng.random() < 0.5
    body["speculative"] = rng.choice([None, False, {"gamma": 1}, {"gamma": 5}, {"gamma": "auto"}])
    body["stream"] = rng.random() < 0.5
    if rng.random() < 0.2:
        body["frequency_penalty"] = 0.7
    return body


async def disturb(client, rng, prompts):
    """Something else than greedy text; what it says is not looked at."""
    text = rng.choice(prompts)
    messages = [{"role": "user", "content": text[:30]}]
    form = {"messages": messages, "max_tokens": 30, "response_format": {"type": "json_object"}}
    path, body, status = rng.choice(
        (
            ("completions", {"prompt": text, "n": 3, "temperature": 1, "max_tokens": 20}, 200),
            ("completions", {"prompt": text, "echo": True, "logprobs": 5, "max_tokens": 1}, 200),
            ("completions", {"prompt": text * 40}, 400),
            ("chat/completions", form, 200),
        )
    )
    response = await client.post(f"/v1/{path}", json=body)
    assert response.status_code == status, response.text


async def one_client(client, rng, prompts, results, num_bodies):
    for _ in range(num_bodies):
        if rng.random() < 0.15:
            await disturb(client, rng, prompts)
        body = random_body(rng, prompts)
        fate = rng.random()
        try:
            timeout = rng.uniform(0.01, 0.3) if fate < 0.25 else 120
            async with asyncio.timeout(timeout):
                if body["stream"]:
                    async with client.stream("POST", "/v1/completions", json=body) as response:
                        lines = [line async for line in response.aiter_lines() if line]
                    assert lines[-1] == "data: [DONE]", lines[-1]
                    chunks = [json.loads(line[6:]) for line in lines[:-1]]
                    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
                else:
                    response = await client.post("/v1/completions", json=body)
                    assert response.status_code == 200, response.text
                    text = response.json()["choices"][0]["text"]
            results.append((body, text))
        except TimeoutError:
            pass  # the client hung up, as it meant to


WATCH = """
import sys, time, httpx2
client = httpx2.Client(base_url=sys.argv[1])
client.get("/health")  # connects, and imports what the client needs
while True:
    started = time.perf_counter()
    assert client.get("/health").status_code == 200
    print(time.perf_counter() - started, flush=True)
    time.sleep(0.02)
"""


@contextmanager
def watched_health(url, path):
    """A function: the seconds that each answer of /health took so far, to a process of its own.

    Written to a file: a pipe that nobody reads would fill up and stop the watch.
    """
    with path.open("w") as written:
        watch = subprocess.Popen([sys.executable, "-c", WATCH, url], stdout=written)

    def latencies():
        assert watch.poll() is None, "an answer of /health was not 200, or never came"
        return [float(line) for line in path.read_text().split()]

    try:
        while not latencies():  # its process takes a while to start
            time.sleep(0.01)
        yield latencies
    finally:
        watch.terminate()
        watch.wait(10)


async def load(url, seed, num_clients, num_bodies, key="none"):
    """Clients that ask at random and hang up at random; what was answered."""
    rng = random.Random(seed)
    words = [bytes(rng.randrange(32, 127) for _ in range(160)).decode() for _ in range(3)]
    prompts = [word[: rng.randint(20, 150)] + words[0] for word in words for _ in range(4)]
    results, headers = [], {"authorization": f"Bearer {key}"}
    options = {"limits": httpx.Limits(max_connections=num_clients), "headers": headers}
    async with httpx.AsyncClient(base_url=url, timeout=180, **options) as client:
        tasks = [
            one_client(client, random.Random(f"{seed} {index}"), prompts, results, num_bodies)
            for index in range(num_clients)
        ]
        await asyncio.gather(*tasks)
    return results


def check_against_offline(offline, results):
    from qspec_llm import SamplingParams

    seen = {}
    for body, text in results:
        key = tuple(
            body.get(k) for k in ("prompt", "max_tokens", "ignore_eos", "frequency_penalty")
        )
        seen.setdefault(key, set()).add(text)
    for (prompt, max_tokens, ignore_eos, penalty), texts in seen.items():
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            frequency_penalty=penalty or 0.0,
        )
        (result,) = offline.generate([prompt], params)
        assert texts == {result.outputs[0].text}


def test_load_with_hang_ups_and_a_tiny_cache(make_llm, offline, tmp_path):
    """64 clients, room for two or three requests: everything is preempted and evicted."""
    llm = make_llm(max_batch=16, max_tokens_in_kv=512)
    with running(llm) as server:
        with watched_health(server.url, tmp_path / "latencies") as latencies:
            results, num_loads = [], 0
            while num_loads == 0 or len(latencies()) <= 100:
                num_loads += 1
                results += asyncio.run(load(server.url, num_loads, 64, 2))
            seconds = sorted(latencies())
        server.wait_until_idle()
        assert len(results) > 64 * num_loads
        assert llm.engine.scheduler.num_preempted > 0
        assert llm.engine.scheduler.blocks.num_evicted > 0
        # clients and server share one process here, and two cores with other tests
        assert seconds[int(len(seconds) * 0.95)] < 0.1
    check_against_offline(offline, results)


@pytest.mark.soak
@pytest.mark.parametrize(
    "process", [("--max-batch", "16", "--kv-cache-bytes", "128K")], indirect=True
)
def test_load_for_longer_keeps_memory_flat_and_health_quick(process, offline, tmp_path):
    """Server, clients and the one who asks for its health are three processes."""
    import psutil

    def read(name):
        lines = httpx.get(f"{process.url}/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"qspec:{name} ")))

    server, sizes = psutil.Process(process.pid), []
    with watched_health(process.url, tmp_path / "latencies") as latencies:
        for seed in range(8):
            results = asyncio.run(load(process.url, seed, 64, 6, key="k"))
            deadline = time.monotonic() + 20
            while read("num_requests_running") or read("num_requests_waiting"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert read("kv_cache_usage_perc") == 0
            sizes.append(server.memory_info().rss)
            check_against_offline(offline, results)
        seconds = sorted(latencies())
    assert len(seconds) > 100
    # a machine that others use has its own stalls; one of the server's would be longer
    assert seconds[int(len(seconds) * 0.95)] < 0.1
    assert seconds[-1] < 2
    assert read("num_preemptions_total") > 0
    assert sizes[-1] - sizes[3] < 16 << 20

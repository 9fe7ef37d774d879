"""A random day of traffic against the real server: nothing fails, nothing is lost, nobody's answer depends on the neighbours."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest

from toka.model_source import ModelSource, read_hf_config
from toka.text.tokenizer import Tokenizer

NUM_CLIENTS = 64
NUM_REQUESTS = 200
NUM_CHECKED = 12  # greedy answers held against the reference
READY_TIMEOUT_S = 300


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen[bytes]

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as reply:
            text = reply.read().decode()
        [value] = re.findall(rf"^toka:{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.MULTILINE)
        return float(value)


@pytest.fixture(scope="module")
def server(smollm2: ModelSource) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A cache that holds 24 prompts of full length, so that requests wait and are preempted.
    flags = [
        f"model={smollm2.path}",
        f"port={port}",
        "quantize=none",
        "kv_cache_num_tokens=36000",
        "stats_report_seconds=0",
    ]
    process = subprocess.Popen([sys.executable, "-m", "toka", *flags])
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _is_ready(port):
            assert process.poll() is None and time.monotonic() < deadline, "the server is not ready"
            time.sleep(0.2)
        yield Server(port, process)
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0


def _is_ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
    except OSError:
        return False
    return True


@dataclass
class Outcome:
    prompt: list[int]
    tokens_asked: int
    texts: list[str]
    greedy: bool


class Client:
    """One of many: asks, streams, gives up half-way, asks again."""

    def __init__(self, port: int, tokens: list[int], seed: int):
        self._random = random.Random(seed)
        self._tokens = tokens
        self._api = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600
        )
        self.outcomes: list[Outcome] = []
        self.num_aborted = 0

    async def work(self, queue: asyncio.Queue[int]) -> None:
        while not queue.empty():
            queue.get_nowait()
            await self._one_request()
        await self._api.close()

    async def _one_request(self) -> None:
        rng = self._random
        length = min(int(rng.paretovariate(0.6) * rng.randint(1, 40)), 1500)
        start = rng.choice((0, 0, rng.randrange(len(self._tokens) - 1500)))  # many share the prefix that begins at 0
        prompt = self._tokens[start : start + length]
        greedy = rng.random() < 0.5
        body = {
            "model": "default",
            "prompt": prompt,
            "max_tokens": rng.randint(1, 40),
            "n": rng.choice((1, 1, 1, 2, 8)),
            "temperature": 0.0 if greedy else rng.uniform(0.1, 1.5),
            "seed": rng.randrange(2**31),
            "extra_body": {"ignore_eos": True, "top_k": rng.choice((0, 5, 50)), "min_p": rng.choice((0.0, 0.05))},
        }
        await asyncio.sleep(rng.uniform(0, 0.3))
        if rng.random() < 0.25:
            await self._abort_half_way(body)
        elif rng.random() < 0.5:
            reply = await self._api.completions.create(**body)
            assert reply.usage.completion_tokens == body["max_tokens"] * body["n"]
            assert reply.usage.prompt_tokens == length
            self.outcomes.append(Outcome(prompt, body["max_tokens"], [choice.text for choice in reply.choices], greedy))
        else:
            await self._stream(body, prompt, greedy)

    async def _stream(self, body: dict, prompt: list[int], greedy: bool) -> None:
        texts = [""] * body["n"]
        reasons: list[str | None] = [None] * body["n"]
        async for chunk in await self._api.completions.create(**body, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert reasons == ["length"] * body["n"]
        self.outcomes.append(Outcome(prompt, body["max_tokens"], texts, greedy))

    async def _abort_half_way(self, body: dict) -> None:
        self.num_aborted += 1
        if self._random.random() < 0.5:  # before the first token, without a stream
            with pytest.raises((asyncio.TimeoutError, openai.APITimeoutError, httpx.TimeoutException)):
                await asyncio.wait_for(
                    self._api.completions.create(**(body | {"max_tokens": 1000})), self._random.uniform(0.01, 0.5)
                )
            return
        stream = await self._api.completions.create(**(body | {"max_tokens": 1000}), stream=True)
        remaining = self._random.randint(1, 10)
        async for _ in stream:
            remaining -= 1
            if not remaining:
                break
        await stream.close()


async def all_clients(port: int, tokens: list[int]) -> list[Client]:
    queue: asyncio.Queue[int] = asyncio.Queue()
    for number in range(NUM_REQUESTS):
        queue.put_nowait(number)
    clients = [Client(port, tokens, seed) for seed in range(NUM_CLIENTS)]
    await asyncio.gather(*(client.work(queue) for client in clients))
    return clients


def test_a_random_day(server: Server, smollm2: ModelSource, smollm2_reference, questions: list[str]) -> None:
    tokenizer = Tokenizer.load(smollm2.tokenizer_path, read_hf_config(smollm2)["eos_token_id"])
    tokens = tokenizer.encode("\n".join(questions[:120]))
    clients = asyncio.run(all_clients(server.port, tokens))

    outcomes = [outcome for client in clients for outcome in client.outcomes]
    assert len(outcomes) + sum(client.num_aborted for client in clients) == NUM_REQUESTS
    deadline = time.monotonic() + 30
    while server.metric("num_requests_running") + server.metric("num_requests_waiting") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    assert server.metric("kv_cache_usage_perc") == 0.0
    assert server.metric("compiles_after_ready_total") == 0
    assert server.metric("prefix_cache_hits_total") > 0

    greedy = [outcome for outcome in outcomes if outcome.greedy]
    assert len(greedy) > NUM_CHECKED
    for outcome in greedy:
        assert len(set(outcome.texts)) == 1, "greedy samples of one prompt differ"
    num_checked = 0
    for outcome in random.Random(0).sample(greedy, len(greedy)):
        generated = tokenizer.encode(outcome.texts[0], add_special_tokens=False)
        if (
            len(generated) == outcome.tokens_asked and num_checked < NUM_CHECKED
        ):  # else the text does not spell its own tokens
            smollm2_reference.assert_greedy(outcome.prompt, generated, "in the day's traffic")
            num_checked += 1
    assert num_checked == NUM_CHECKED


def test_a_seeded_answer_does_not_depend_on_its_neighbours(server: Server, questions: list[str]) -> None:
    async def ask(num_neighbours: int) -> list[str]:
        api = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)

        async def one(prompt: str, seed: int) -> str:
            reply = await api.completions.create(
                model="default", prompt=prompt, max_tokens=24, temperature=0.8, seed=seed
            )
            return reply.choices[0].text

        neighbours = [
            asyncio.create_task(one(question, i)) for i, question in enumerate(questions[20 : 20 + num_neighbours])
        ]
        texts = await asyncio.gather(*(one(question, 7) for question in questions[:4]))
        await asyncio.gather(*neighbours)
        await api.close()
        return texts

    assert asyncio.run(ask(0)) == asyncio.run(ask(40))

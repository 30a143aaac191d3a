"""bench/server_ttft.py against a stand-in for the client: what it sends, what it counts, what it refuses."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # the bench is not part of the package

from bench import server_ttft


class Client:
    """Streams like a server. `prunes`: whether it knows the plugin."""

    def __init__(self, prunes=True, mode="sparse"):
        self.sent = []
        self.prunes, self.mode = prunes, mode
        self.chat = types.SimpleNamespace(completions=self)

    def create(self, **request):
        self.sent.append(request)
        asked = request["extra_body"]["vllm_xargs"]
        piece = types.SimpleNamespace(choices=[types.SimpleNamespace(delta=types.SimpleNamespace(content=""))])
        yield types.SimpleNamespace(choices=piece.choices, usage=None)
        piece.choices[0].delta.content = "word"
        yield types.SimpleNamespace(choices=piece.choices, usage=None)
        usage = types.SimpleNamespace(prompt_tokens=100)
        if asked["specprefill"] and self.prunes:
            usage.specprefill = {"mode": self.mode, "reason": "r", "kept_tokens": 9, "seconds": {"a": 0.5, "b": 0.25}}
        yield types.SimpleNamespace(choices=[], usage=usage)


def test_ways_take_turns_and_no_prompt_comes_twice():
    client = Client()
    rows = server_ttft.measure(client, "m", 50, [0.1, 0.3], rounds=3, seed=1)
    asked = [request["extra_body"]["vllm_xargs"].get("keep_ratio") for request in client.sent]
    assert asked == [None, 0.1, 0.3] * 4
    texts = [request["messages"][0]["content"] for request in client.sent]
    assert len({text.split("\n")[0] for text in texts}) == 12
    bodies = ["\n".join(text.split("\n")[1:]) for text in texts]
    assert all(len(set(bodies[first : first + 3])) == 1 for first in range(0, 12, 3))  # a round's ways read the same
    assert len(set(bodies)) == 4
    assert all(text.endswith(server_ttft.QUESTION) for text in texts)
    assert [(row["keep_ratio"], row["prompt_tokens"], row["kept_tokens"]) for row in rows] == [
        (0.1, 100, 9),
        (0.3, 100, 9),
    ]
    assert all(row["selection_seconds"] == 0.75 and len(row["sparse_runs"]) == 3 for row in rows)
    assert all(row["ratio"] == row["full_seconds"] / row["sparse_seconds"] for row in rows)
    assert server_ttft.table(rows).count("\n") == 2


@pytest.mark.parametrize(
    ("client", "message"), [(Client(prunes=False), "does not know the plugin"), (Client(mode="dense"), "did not prune")]
)
def test_a_server_that_does_not_prune_is_no_measurement(client, message):
    with pytest.raises(RuntimeError, match=message):
        server_ttft.first_token(client, "m", "text", 0.1)
    assert server_ttft.first_token(client, "m", "text", None)["prompt_tokens"] == 100


def test_prompts_are_as_long_as_asked():
    assert len(server_ttft.prose(300, random.Random(0)).split(" ")) == 300

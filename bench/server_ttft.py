"""Time to first token of a running OpenAI-compatible server with the vLLM plugin: full prompts and pruned ones in turn.

    python -m bench.server_ttft --words 1400 --keep 0.1,0.3 --rounds 5

docs/integrations.md says how to start the server. What is timed is what a client sees: from sending the request to the
first piece of text of the stream. Each request begins with a line of its own, so that no cache helps. Results:
server_ttft.json under --out.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from bench.environment import command, environment

QUESTION = "What is this text about? Answer in one sentence."


def prose(words: int, generator: random.Random) -> str:
    """Real text, from another place each time."""
    text = " ".join(pydoc_data.topics.topics.values()).split(" ")
    start = generator.randrange(max(1, len(text) - words))
    return " ".join(text[start : start + words])


def prompt(text: str, generator: random.Random) -> str:
    """The text behind a line that no other prompt has."""
    return f"Document {uuid.UUID(int=generator.getrandbits(128))}\n\n{text}\n\n{QUESTION}"


def first_token(client: Any, model: str, text: str, keep: float | None) -> dict[str, Any]:
    """One streamed request: seconds to its first text, and what the server says that it did."""
    xargs = {"specprefill": False} if keep is None else {"specprefill": True, "keep_ratio": keep}
    started = time.perf_counter()
    first, usage = None, None
    for event in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=2,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": xargs, "ignore_eos": True},
    ):
        if first is None and event.choices and event.choices[0].delta.content:
            first = time.perf_counter() - started
        usage = event.usage or usage
    if first is None or usage is None:
        raise RuntimeError("the server's stream had no text or no usage")
    report = getattr(usage, "specprefill", None)
    if keep is not None and (report is None or report["mode"] != "sparse"):
        reason = "it does not know the plugin" if report is None else report["reason"]
        raise RuntimeError(f"the server did not prune the prompt: {reason}")
    return {"seconds": first, "prompt_tokens": usage.prompt_tokens, "report": report}


def measure(client: Any, model: str, words: int, keeps: list[float], rounds: int, seed: int) -> list[dict[str, Any]]:
    """A row for each ratio: medians over the rounds; in each round all ways read the same text."""
    generator = random.Random(seed)
    ways: list[float | None] = [None, *keeps]
    found: dict[float | None, list[dict[str, Any]]] = {way: [] for way in ways}
    text = prose(words, generator)
    for way in ways:  # once before it counts
        first_token(client, model, prompt(text, generator), way)
    for round_ in range(rounds):
        text = prose(words, generator)  # the same for all ways
        for way in ways:
            found[way].append(first_token(client, model, prompt(text, generator), way))
            print(f"  round {round_ + 1} of {rounds}, {'full' if way is None else f'keep {way}'}: "
                  f"{found[way][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)  # fmt: skip
    full = statistics.median(one["seconds"] for one in found[None])
    rows = []
    for keep in keeps:
        runs = found[keep]
        seconds = statistics.median(one["seconds"] for one in runs)
        spent = [sum(one["report"]["seconds"].values()) for one in runs]
        rows.append(
            {
                "keep_ratio": keep,
                "prompt_tokens": statistics.median(one["prompt_tokens"] for one in runs),
                "kept_tokens": statistics.median(one["report"]["kept_tokens"] for one in runs),
                "full_seconds": full,
                "sparse_seconds": seconds,
                "selection_seconds": statistics.median(spent),
                "ratio": full / seconds,
                "full_runs": [one["seconds"] for one in found[None]],
                "sparse_runs": [one["seconds"] for one in runs],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'keep':>5} {'prompt':>7} {'kept':>6} {'full s':>8} {'sparse s':>9} {'selection s':>12} {'ratio':>6}"
    lines = [
        f"{row['keep_ratio']:>5} {row['prompt_tokens']:>7.0f} {row['kept_tokens']:>6.0f} {row['full_seconds']:>8.2f} "
        f"{row['sparse_seconds']:>9.2f} {row['selection_seconds']:>12.2f} {row['ratio']:>6.2f}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--words", type=int, default=1400, help="of each prompt")
    parser.add_argument("--keep", default="0.1,0.3", help="comma-separated keep ratios")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    given = parser.parse_args(argv)
    try:
        import openai
    except ModuleNotFoundError:
        parser.error("the client is missing: pip install openai (vLLM's environment has it)")
    with openai.OpenAI(base_url=given.url, api_key="none", max_retries=0, timeout=3600) as client:
        try:
            model = given.model or client.models.list().data[0].id
            keeps = [float(keep) for keep in given.keep.split(",")]
            rows = measure(client, model, given.words, keeps, given.rounds, given.seed)
        except (openai.OpenAIError, RuntimeError) as error:
            print(f"bench.server_ttft: {given.url}: {error}", file=sys.stderr)
            return 1
    print(table(rows))
    given.out.mkdir(parents=True, exist_ok=True)
    shown = command("python -m bench.server_ttft", sys.argv[1:] if argv is None else argv)
    result = {"environment": environment("cpu"), "command": shown, "model": model, "rows": rows}
    (given.out / "server_ttft.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

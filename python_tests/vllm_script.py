"""What a user's script does offline: vLLM's engine in a process of its own. Run by test_vllm_offline.py.

    python vllm_script.py plugin   ordinary requests, then pruned ones that the speculator selects for
    python vllm_script.py half     the same ordinary requests without the plugin, then the plugin in this process alone

Prints one line of JSON, after whatever vLLM prints.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def rows(outputs: list[Any]) -> list[dict[str, Any]]:
    """What a user can see of each output."""
    seen = []
    for output in outputs:
        (completion,) = output.outputs
        picked = zip(completion.token_ids, completion.logprobs)
        report = getattr(output, "specprefill", None)
        seen.append(
            {
                "prompt": len(output.prompt_token_ids),
                "tokens": list(completion.token_ids),
                "logprobs": [row[token].logprob for token, row in picked],
                "report": None if report is None else {**report.to_json(), "spans": report.spans},
            }
        )
    return seen


def main(case: str, prompts: list[str]) -> None:
    if case == "half":
        # The engine's process starts anew and loads no plugin; what this one knows of plugins stays here.
        os.environ["VLLM_PLUGINS"] = ""
        os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    from vllm import LLM, SamplingParams
    from vllm_engine import CONTEXT, ENVIRONMENT, MODEL

    from specprefill_kernels import models

    os.environ.update(ENVIRONMENT)
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT, "max_num_batched_tokens": 256}

    def greedy(**extra: Any) -> Any:
        return SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True, extra_args=extra or None)

    def start() -> Any:
        return LLM(model=str(models.ensure(MODEL)), seed=0, **options)

    llm = start()
    printed: dict[str, Any] = {"client": type(llm.llm_engine.engine_core).__name__}
    printed["ordinary"] = rows(llm.generate(prompts, greedy(), use_tqdm=False))
    if case == "half":
        from specprefill_kernels.integrations.vllm import register

        llm.llm_engine.engine_core.shutdown()
        register()
        llm = start()
    asked = [greedy(specprefill=True, keep_ratio=0.3) for _ in prompts]
    printed["asked"] = rows(llm.generate(prompts, asked, use_tqdm=False))
    if case == "plugin":
        mixed = llm.generate([prompts[0], *prompts], [asked[0], greedy(), *asked[1:]], use_tqdm=False)
        printed["mixed"] = rows(mixed)
        printed["cached"] = [output.num_cached_tokens for output in mixed]
        kept_all = llm.generate(prompts[:1], greedy(specprefill=True, keep_ratio=1.0), use_tqdm=False)
        short = llm.generate("Once upon a time", greedy(specprefill=True), use_tqdm=False)
        printed["dense"] = rows([*kept_all, *short])
    llm.llm_engine.engine_core.shutdown()
    print(json.dumps(printed), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.stdin.read()))

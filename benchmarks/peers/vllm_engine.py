"""vLLM's CPU build, offline. Precisions: float32, bfloat16."""

from __future__ import annotations

import os
from typing import Any

from driver import serve


class Vllm:
    def __init__(self, path: str, precision: str, num_threads: int):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
        from vllm import LLM, SamplingParams

        self._params: Any = SamplingParams
        self._llm = LLM(path, dtype=precision, max_model_len=2048, enable_prefix_caching=True)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = self._params(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        outputs = self._llm.generate([{"prompt_token_ids": each} for each in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Vllm)

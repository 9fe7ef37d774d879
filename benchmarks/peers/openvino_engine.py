"""OpenVINO GenAI, which reads GGUF files itself: continuous batching, as its server does. Precisions are GGUF files."""

from __future__ import annotations

from typing import Any

from driver import serve


class OpenVino:
    def __init__(self, path: str, precision: str, num_threads: int):
        import numpy as np
        import openvino
        import openvino_genai

        self._genai: Any = openvino_genai
        self._tensor = lambda ids: openvino.Tensor(np.array([ids], dtype=np.int64))
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 2, 512, True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads}
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        results = self._pipeline.generate([self._tensor(each) for each in prompts], [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]


if __name__ == "__main__":
    serve(OpenVino)

"""toka as the library. Precisions: float32, float16, int8 (int8_channel_dynamic), int4 (the GGUF file as it is)."""

from __future__ import annotations

from driver import serve

FLAGS = {
    "float32": {"quantize": "none", "dtype": "float32"},
    "float16": {"quantize": "none", "dtype": "float16"},
    "int8": {"quantize": "int8_channel_dynamic", "quantize_lm_head": True},
    "int4": {"quantize": "auto"},
}


class Toka:
    def __init__(self, path: str, precision: str, num_threads: int):
        from toka import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(path, quiet=True, num_threads=num_threads, **FLAGS[precision])

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = self._params(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.completions[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Toka)

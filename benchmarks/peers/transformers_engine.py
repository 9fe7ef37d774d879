"""transformers' `generate` over a static batch, which suits it. Precisions: float32, bfloat16."""

from __future__ import annotations

from typing import Any

from driver import serve


class Transformers:
    def __init__(self, path: str, precision: str, num_threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._torch: Any = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, precision)).eval()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return tokens


if __name__ == "__main__":
    serve(Transformers)

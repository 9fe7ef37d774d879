"""llama.cpp through llama-cpp-python's low-level binding: one llama_decode call a step for all sequences, as its own server batches.

Precisions are GGUF files, made beforehand.
"""

from __future__ import annotations

import ctypes
from typing import Any

from driver import serve

MAX_BATCH = 512
CONTEXT_TOKENS = 64 * 320


class LlamaCpp:
    def __init__(self, path: str, precision: str, num_threads: int):
        import llama_cpp

        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT_TOKENS, MAX_BATCH, MAX_BATCH, 64
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        made: list[list[int]] = [[] for _ in prompts]
        waiting = [
            (row, position, token) for row, prompt in enumerate(prompts) for position, token in enumerate(prompt)
        ]
        while waiting:
            step, waiting = waiting[:MAX_BATCH], waiting[MAX_BATCH:]
            for row, token in self._decode(step, prompts):
                made[row].append(token)
        for _ in range(num_tokens - 1):
            step = [(row, len(prompts[row]) + len(tokens) - 1, tokens[-1]) for row, tokens in enumerate(made)]
            for row, token in self._decode(step, prompts):
                made[row].append(token)
        return made

    def _decode(self, step: list[tuple[int, int, int]], prompts: list[list[int]]) -> list[tuple[int, int]]:
        """One batch of (sequence, position, token); returns the greedy successors of those at or behind a prompt's end."""
        batch = self._batch
        batch.n_tokens = len(step)
        for i, (row, position, token) in enumerate(step):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = position >= len(prompts[row]) - 1
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [(row, self._likeliest(i)) for i, (row, _, _) in enumerate(step) if batch.logits[i]]

    def _likeliest(self, i: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, i)
        array = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
        return int(array.argmax())


if __name__ == "__main__":
    serve(LlamaCpp)

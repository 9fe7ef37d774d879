"""From a configuration to an engine that is warm (floor 7)."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from toka.config import Config
from toka.engine.constraints import Constraints
from toka.engine.core import EngineCore
from toka.engine.executor import Executor, LocalExecutor, StreamExecutor
from toka.messages import Ready
from toka.model_source import ModelSource, read_hf_config
from toka.scheduler.scheduler import Scheduler
from toka.text.grammar import GrammarVocabulary
from toka.text.tokenizer import Tokenizer
from toka.warmup.run import warm_up
from toka.warmup.setup import settle
from toka.weights.loader import open_checkpoint


def build_engine(config: Config, source: ModelSource, *, quiet: bool = False) -> tuple[EngineCore, Ready]:
    """Load, compile and warm the model; returns the engine and what it has to say when ready.

    quiet: no progress on stderr. Raises ConfigError if checkpoint, flags, compiler or memory do not allow it.
    """
    setup = settle(config, source)
    reader = open_checkpoint(source.path)
    if setup.device.type == "cuda":
        warm = warm_up(setup, reader, quiet=quiet)
        executor: Executor = StreamExecutor(warm.runner)
    else:
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")
        warm = thread.submit(warm_up, setup, reader, quiet=quiet).result()
        executor = LocalExecutor(warm.runner, thread)
    scheduler_config = dataclasses.replace(setup.limits, num_blocks=warm.num_kv_blocks)
    constraints = Constraints(partial(_vocabulary, source, setup.spec.vocab_size), setup.spec.vocab_size)
    engine = EngineCore(Scheduler(scheduler_config), executor, warm.runner.compiled, constraints)
    ready = Ready(
        vocab_size=setup.spec.vocab_size,
        max_context_tokens=setup.config.max_context_tokens,
        max_request_tokens=scheduler_config.max_tokens_per_request - (setup.pooling is not None),
        num_kv_blocks=warm.num_kv_blocks,
        block_size=setup.config.block_size,
        dtype=setup.config.dtype,
        device=setup.config.device,
        longest_step_s=warm.report.longest_step_s,
        startup_s=warm.report.phases_s,
        report=warm.report.to_dict(),
        pooling=setup.pooling,
    )
    return engine, ready


def _vocabulary(source: ModelSource, vocab_size: int) -> GrammarVocabulary:
    """What grammars must know of a model's tokens. ConfigError if it cannot be had."""
    tokenizer = Tokenizer.load(source.tokenizer_path, read_hf_config(source)["eos_token_id"])
    return GrammarVocabulary(tokenizer.to_json(), tokenizer.eos_token_ids, vocab_size)

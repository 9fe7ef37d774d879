"""Runs plans: changes to the tables, inputs into their bucket, the compiled step, sampled ids back (floor 5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from toka.compile.bucket import bucket_of, ladder
from toka.compile.capture import Capturer, Replay
from toka.compile.compiled_model import CompiledModel
from toka.errors import InvariantError
from toka.params import MAX_LOGPROBS
from toka.plan import MAX_SHARED_LEVELS, BatchPlan, StepLogprobs, StepResult, TokenMasks
from toka.runner.adjustment_tables import AdjustmentTables
from toka.runner.device_tables import DeviceTables
from toka.runner.kv_cache import KVCache
from toka.runner.step_buffers import Bucket, StepBuffers
from toka.runner.step_program import num_mask_words, scored_ids
from toka.runner.token_mask_buffer import TokenMaskBuffer

_MIN_BLOCK_TOKENS = 8  # of any page size: a step of T tokens changes about T / 8 entries of the block table at most


@dataclass(frozen=True)
class RunnerSizes:
    """max_tokens, max_rows: in one step. max_table_rows: rows of the request table. max_blocks_per_row: of one request.

    max_captured_tokens: steps of up to so many tokens are captured whole, so their sizes follow from their number of tokens alone;
    0 = none is. token_step: buckets of tokens are multiples of it, below it powers of two; 0 = the usual ladder. max_in_flight: steps
    launched before the first one's result is read. max_shared_groups: groups of rows that share a prefix, in one step.
    vocab_size: bits of a token mask. block_size: tokens in one KV block. vector_width: numbers of a prompt's vector, 0 = the engine
    generates. sums_width: of the running sums that mean pooling keeps, 0 = none.
    """

    max_tokens: int
    max_rows: int
    max_table_rows: int
    max_blocks_per_row: int
    max_captured_tokens: int = 0
    token_step: int = 0
    max_in_flight: int = 2
    max_shared_groups: int = 0
    vocab_size: int = 0
    block_size: int = 16
    vector_width: int = 0
    sums_width: int = 0

    def token_buckets(self) -> tuple[int, ...]:
        """Numbers of tokens that steps are padded to, ascending."""
        if not self.token_step:
            return ladder(self.max_tokens)
        small = [2**i for i in range(self.token_step.bit_length())]
        sizes = {*small, *range(self.token_step, self.max_tokens, self.token_step), self.max_tokens}
        return tuple(sorted(size for size in sizes if size <= self.max_tokens))

    @property
    def num_captured(self) -> int:
        """Buckets that are captured."""
        return sum(size <= self.max_captured_tokens for size in self.token_buckets())

    def tables(self, device: torch.device) -> DeviceTables:
        """The tables on the device; in one copy come the changes of almost any step."""
        return DeviceTables(
            self.max_table_rows,
            self.max_blocks_per_row,
            device,
            max_blocks=self.max_rows + self.max_tokens // _MIN_BLOCK_TOKENS,
            max_settings=self.max_rows,
        )

    def sums(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The running sums of mean pooling, float32 [max_table_rows, sums_width], by name; empty if there are none."""
        if not self.sums_width:
            return {}
        return {"pooled_sums": torch.zeros((self.max_table_rows, self.sums_width), dtype=torch.float32, device=device)}

    def buffers(self, tables: DeviceTables, device: torch.device) -> StepBuffers:
        """The step's inputs on the device."""
        return StepBuffers(
            self.max_tokens,
            self.max_rows,
            tables,
            device,
            max_shared_groups=self.max_shared_groups,
            max_shared_members=MAX_SHARED_LEVELS * self.max_rows,
            depth=self.max_in_flight,
        )

    def adjustments(self, device: torch.device) -> AdjustmentTables:
        """What stays on the device of the rows whose logits are adjusted."""
        return AdjustmentTables(self.max_table_rows, self.block_size, device)

    def masks(self, device: torch.device) -> TokenMaskBuffer:
        """Where the masks of a step lie."""
        return TokenMaskBuffer(self.max_rows, num_mask_words(self.vocab_size), device)


# On the CPU: what was drawn, and if anybody asked their logprobs: the outputs of the step graph and of its follow-up. Or vectors.
_Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class BegunStep:
    """A step of which all is launched but what follows the compiled graph. outputs: the graph's."""

    plan: BatchPlan
    inputs: Mapping[str, torch.Tensor]
    outputs: Sequence[torch.Tensor]


class PendingStep:
    """A step that was launched. On CUDA the device may still be at it; elsewhere it is done."""

    def __init__(self, plan: BatchPlan, outputs: _Outputs, ready: torch.cuda.Event | None, spare: deque[_Outputs]):
        self._plan, self._outputs, self._ready, self._spare = plan, outputs, ready, spare

    def result(self) -> StepResult:
        """Wait for the step and give what it drew and scored; to be called once."""
        if self._ready is not None:
            self._ready.synchronize()
        result = self._read()
        if self._ready is not None:
            self._spare.append(self._outputs)
        return result

    def _read(self) -> StepResult:
        plan = self._plan
        drawn, *scored = (tensor.numpy() for tensor in self._outputs)
        sampled = np.zeros(plan.num_rows, dtype=np.int32)
        sampled[plan.samples] = drawn[: np.count_nonzero(plan.samples)]
        logprobs = None
        if plan.scoring is not None:
            logprobs = StepLogprobs(*(array[: plan.num_samples].copy() for array in scored))
        return StepResult(plan.step, sampled, logprobs)


class PendingVectors(PendingStep):
    """The same of a step that pools."""

    def _read(self) -> StepResult:
        [vectors] = self._outputs
        sampled = np.zeros(self._plan.num_rows, dtype=np.int32)
        return StepResult(self._plan.step, sampled, vectors=vectors[: self._plan.num_samples].numpy().copy())


class ModelRunner:
    """Owns all state on the device but the weights. Not thread-safe: one thread launches steps, in order."""

    def __init__(self, compiled: CompiledModel, sizes: RunnerSizes, device: torch.device):
        self.compiled, self.sizes = compiled, sizes
        self.token_sizes = sizes.token_buckets()
        self.sample_sizes = ladder(sizes.max_rows)
        self._device = device
        self._tables = sizes.tables(device)
        self._buffers = sizes.buffers(self._tables, device)
        self._masks = sizes.masks(device)
        self._no_masks = torch.zeros((1, num_mask_words(sizes.vocab_size)), dtype=torch.int32, device=device)
        self._adjustments = sizes.adjustments(device)
        self._sums = sizes.sums(device)
        self._static = {**self._tables.values(), **self._sums}
        self._capturer = Capturer(device)
        self._captured: dict[Bucket, Replay] = {}
        self._results: deque[_Outputs] = deque()  # pinned memory on the host that no step writes to

    @property
    def table_bytes(self) -> int:
        """Size of the step's inputs and of the tables that stay on the device."""
        tables = (*self._tables.values().values(), *self._sums.values())
        of_rows = sum(tensor.nbytes for tensor in tables) + self._adjustments.num_bytes
        return self._buffers.num_bytes + of_rows + self._masks.num_bytes

    def attach(self, cache: KVCache) -> None:
        """Use this KV cache from now on; what was captured with another is dropped."""
        self._captured.clear()
        for layer, (key_cache, value_cache) in enumerate(zip(cache.keys, cache.values, strict=True)):
            self._static[f"key_cache.{layer}"] = key_cache
            self._static[f"value_cache.{layer}"] = value_cache
        if cache.keys:  # encoders have none
            self._adjustments.attach(len(cache.keys[0]))

    def bucket_for(self, num_tokens: int, num_samples: int) -> Bucket:
        tokens = bucket_of(num_tokens, self.token_sizes)
        rows = min(tokens, self.sizes.max_rows)
        is_captured = tokens <= self.sizes.max_captured_tokens
        return Bucket(tokens, rows, rows if is_captured else bucket_of(max(num_samples, 1), self.sample_sizes))

    @torch.no_grad()
    def begin(self, plan: BatchPlan) -> BegunStep:
        """Begin a step behind those before it, which must be finished. On CUDA this returns at once, elsewhere when the graph is run."""
        bucket = self.bucket_for(plan.num_tokens, plan.num_samples)
        inputs = self._inputs(plan, bucket)
        captured = self._captured.get(bucket)
        return BegunStep(plan, inputs, self.compiled.run(inputs) if captured is None else captured())

    @torch.no_grad()
    def finish(self, begun: BegunStep, masks: TokenMasks | None = None) -> PendingStep:
        """Launch what follows a step's graph. masks: those of its masked draws, if it has any."""
        plan = begun.plan
        pending = PendingVectors if self.sizes.vector_width else PendingStep
        outputs = self._follow_ups(begun, masks)
        if self._device.type == "cpu":
            return pending(plan, outputs, None, self._results)
        num_samples = plan.num_samples
        on_host = self._results.popleft() if self._results else self._new_result()
        for on_device, target in zip(outputs, on_host, strict=False):
            target[:num_samples].copy_(on_device[:num_samples], non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return pending(plan, on_host, ready, self._results)

    def run(self, plan: BatchPlan, masks: Callable[[], TokenMasks] | None = None) -> StepResult:
        """Run one step to its end. masks: asked for those of its masked draws, if it has any, once its graph is run."""
        begun = self.begin(plan)
        return self.finish(begun, None if masks is None else masks()).result()

    @torch.no_grad()
    def warm(self, plan: BatchPlan, bucket: Bucket, masks: TokenMasks | None = None) -> None:
        """Run every region once on this plan and bucket (see CompiledModel.warm) and what follows; without samples, all but the last."""
        inputs = self._inputs(plan, bucket)
        step = self.compiled.warm(inputs, to_the_end=bucket.num_samples > 0)
        if step:
            self._follow_ups(BegunStep(plan, inputs, step), masks)
            if plan.adjusting is not None:  # whose logits are of a type of their own
                self._follow_ups(BegunStep(replace(plan, adjusting=None), inputs, step), masks)

    @torch.no_grad()
    def capture(self, plan: BatchPlan, bucket: Bucket) -> None:
        """Capture the bucket's whole step; `plan` fills it. From now on steps of this bucket are replayed."""
        self._captured[bucket] = self._capturer.capture(partial(self.compiled.run, self._inputs(plan, bucket)))

    def _follow_ups(self, begun: BegunStep, masks: TokenMasks | None) -> _Outputs:
        """What was drawn, late too, and if anybody asks logprobs, ranks, likeliest ids and their logprobs."""
        plan, drawn = begun.plan, begun.outputs[0]
        if plan.adjusting is not None:
            self._adjustments.take(plan.adjusting, begun.inputs)
        if plan.masked is not None or (plan.adjusting is not None and plan.adjusting.drawn.any()):
            # Each place is drawn by one of the two and is 0 in the other's result.
            drawn = drawn + self._draw_late(begun, masks)
        if plan.scoring is None:
            return (drawn,)
        wanted = {"scored_ids": scored_ids(begun.inputs["sample_targets"], drawn)}
        return drawn, *self.compiled.follow_up("token_logprobs", wanted, begun.outputs)

    def _draw_late(self, begun: BegunStep, masks: TokenMasks | None) -> torch.Tensor:
        """Tokens of the rows that the graph passed over: drawn from adjusted logits, under masks, or both."""
        plan, outputs = begun.plan, begun.outputs
        values = {**begun.inputs, **self._adjustments.values(), "masks": self._no_masks}
        if plan.masked is not None:
            if masks is None:
                raise InvariantError(f"step {plan.step} has masked draws and got no masks")
            values["masks"] = self._masks.send(masks)
        if plan.adjusting is not None:
            outputs = (outputs[0], *self.compiled.follow_up("adjust_logits", values, outputs))
        return self.compiled.follow_up("sample", values, outputs)[0]

    def _inputs(self, plan: BatchPlan, bucket: Bucket) -> dict[str, torch.Tensor]:
        return {**self._static, **self._buffers.fill(plan, bucket)}

    def _new_result(self) -> _Outputs:
        """Room for what was drawn and for logprobs, ranks, likeliest ids and their logprobs; or for vectors."""

        def pinned(dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.empty((self.sizes.max_rows, *width), dtype=dtype, pin_memory=True)

        ints, floats = torch.int32, torch.float32
        if self.sizes.vector_width:
            return (pinned(floats, self.sizes.vector_width),)
        return pinned(ints), pinned(floats), pinned(ints), pinned(ints, MAX_LOGPROBS), pinned(floats, MAX_LOGPROBS)

"""What changes every step, padded to its bucket, in one static buffer on the device (floor 5).

Legend: T tokens of the bucket, R rows of the bucket, S sampled rows of the bucket; all include padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from toka.plan import I32, BatchPlan, SharedPrefixPlan
from toka.runner.device_tables import DeviceTables
from toka.runner.staging import ArraySpec, Staging
from toka.runner.step_program import DRAWN_TARGET, NO_TARGET

PADDING_ROW = -1
NONE_SHARED = SharedPrefixPlan(
    groups=np.empty((0, 5), dtype=np.int32), members=np.empty(0, dtype=np.int32), lens=np.empty(0, dtype=np.int32)
)
_OF_SAMPLES = (
    "sample_index",
    "sample_rows",
    "sample_seq_lens",
    "draw_rows",
    "sample_targets",
    "late_rows",
    "mask_of",
    "adjusted_rows",
)
NO_MASK = -1


@dataclass(frozen=True)
class Bucket:
    """The sizes a step is padded to. num_rows follows from num_tokens: no row has fewer tokens than one. num_samples is 0 in the warmup
    only: the step then ends before its last region.
    """

    num_tokens: int
    num_rows: int
    num_samples: int


class StepBuffers:
    """Static inputs of a step, all int32, and the way in for changes of the tables:

    token_ids, token_rows, positions [T]; rows, seq_lens [R]; query_start [R + 1];
    sample_index [S] (place in the batch of a token whose logits are wanted: first those whose successor is drawn, then those of prompts
    that are scored), sample_rows, sample_seq_lens [S]; sample_query_start [S + 1] (query_start for these tokens alone, one query each);
    draw_rows [S] (the row for which the sampler draws; -1 = none); sample_targets [S] (whose logprob is wanted: an id, DRAWN_TARGET or
    NO_TARGET; written where the plan has a Scoring);
    late_rows, mask_of, adjusted_rows [S] (the row for which a token is drawn once the rest of the step is done, the place of its mask
    among the step's or NO_MASK, and the row again if its logits are adjusted before; written where the plan has MaskedDraws or
    Adjusting, whose rows are then none of draw_rows);
    shared_groups [G, 5], shared_members [N], shared_lens [max_rows]: which rows share a prefix, as in plan.SharedPrefixPlan; of one size
    for all buckets.
    Padding: tokens have row -1, rows are -1 with no tokens, samples have row -1 and no target; groups have no members.

    max_shared_groups, max_shared_members: of one step. depth: steps that the host may write before the device has read the
    first of them.
    """

    def __init__(
        self,
        max_tokens: int,
        max_rows: int,
        tables: DeviceTables,
        device: torch.device,
        *,
        max_shared_groups: int = 0,
        max_shared_members: int = 1,
        depth: int = 2,
    ):
        sizes = {
            **dict.fromkeys(("token_ids", "token_rows", "positions"), max_tokens),
            **dict.fromkeys(("rows", "seq_lens", *_OF_SAMPLES), max_rows),
            **dict.fromkeys(("query_start", "sample_query_start"), max_rows + 1),
        }
        # One group more than there can be, so that one without members always ends the list.
        self._shared = {
            "shared_groups": ArraySpec(torch.int32, max_shared_groups + 1, (5,)),
            "shared_members": ArraySpec(torch.int32, max_shared_members),
            "shared_lens": ArraySpec(torch.int32, max_rows),
        }
        step = {**{name: ArraySpec(torch.int32, size) for name, size in sizes.items()}, **self._shared}
        self._tables = tables
        self._staging = Staging({**step, **tables.staged_arrays()}, device, depth)
        self._counting = np.arange(max_rows + 1, dtype=np.int32)
        # By name and size; complete once the warmup has met every size of each ladder.
        self._views: dict[tuple[str, int], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Size on the device."""
        return self._staging.num_bytes

    def fill(self, plan: BatchPlan, bucket: Bucket) -> dict[str, torch.Tensor]:
        """Bring a plan to the device: its changes into the tables, its inputs, padded to the bucket, into the static buffer.

        Returns the inputs by name, which for a bucket are always the same tensors.
        """
        parts = list(self._tables.parts(plan.table, plan.settings))
        for part in parts:
            self._staging.begin()
            self._tables.stage(self._staging, plan.table, plan.settings, part)
            if part is parts[-1]:
                self._write_step(plan, bucket)
            self._staging.send()
            self._tables.apply(self._staging, plan.table, plan.settings, part)
        return self._views_of(bucket)

    def _write_step(self, plan: BatchPlan, bucket: Bucket) -> None:
        write, rows = self._staging.write, plan.num_rows
        write("token_ids", plan.token_ids, bucket.num_tokens, 0)
        write("token_rows", plan.token_rows(), bucket.num_tokens, PADDING_ROW)
        write("positions", plan.positions(), bucket.num_tokens, 0)
        write("rows", plan.rows, bucket.num_rows, PADDING_ROW)
        write("seq_lens", plan.seq_lens, bucket.num_rows, 0)
        write("query_start", plan.query_start, bucket.num_rows + 1, plan.num_tokens)
        index, sample_rows = plan.query_start[1 : rows + 1][plan.samples] - 1, plan.rows[plan.samples]
        seq_lens = plan.seq_lens[plan.samples]
        if plan.masked is None and plan.adjusting is None:
            write("draw_rows", sample_rows, bucket.num_samples, PADDING_ROW)
        else:
            self._write_late_draws(plan, sample_rows, bucket)
        if plan.scoring is not None:
            places = plan.scoring.places
            drawn = np.where(plan.scoring.drawn, np.int32(DRAWN_TARGET), np.int32(NO_TARGET))
            write("sample_targets", np.concatenate((drawn, plan.scoring.targets)), bucket.num_samples, NO_TARGET)
            index = np.concatenate((index, places))
            sample_rows = np.concatenate((sample_rows, plan.token_rows()[places]))
            seq_lens = np.concatenate((seq_lens, plan.positions()[places] + np.int32(1)))
        num_samples = len(index)
        write("sample_index", index, bucket.num_samples, 0)
        write("sample_rows", sample_rows, bucket.num_samples, PADDING_ROW)
        write("sample_query_start", self._counting[: num_samples + 1], bucket.num_samples + 1, num_samples)
        write("sample_seq_lens", seq_lens, bucket.num_samples, 0)
        shared = NONE_SHARED if plan.shared is None else plan.shared
        write("shared_groups", shared.groups, len(shared.groups) + 1, 0)
        write("shared_members", shared.members)
        write("shared_lens", shared.lens, self._shared["shared_lens"].size, 0)

    def _write_late_draws(self, plan: BatchPlan, rows: I32, bucket: Bucket) -> None:
        """Part the rows that draw into those that do it late, under a mask or from adjusted logits, and the others."""
        write, num_samples, none = self._staging.write, bucket.num_samples, np.int32(PADDING_ROW)
        nobody = np.zeros(len(rows), dtype=np.bool_)
        masked = nobody if plan.masked is None else plan.masked.drawn
        adjusted = nobody if plan.adjusting is None else plan.adjusting.drawn
        late = masked | adjusted
        write("draw_rows", np.where(late, none, rows), num_samples, PADDING_ROW)
        write("late_rows", np.where(late, rows, none), num_samples, PADDING_ROW)
        write("mask_of", np.where(masked, np.cumsum(masked) - 1, NO_MASK), num_samples, NO_MASK)
        write("adjusted_rows", np.where(adjusted, rows, none), num_samples, PADDING_ROW)

    def _views_of(self, bucket: Bucket) -> dict[str, torch.Tensor]:
        sizes = {
            **dict.fromkeys(("token_ids", "token_rows", "positions"), bucket.num_tokens),
            **dict.fromkeys(("rows", "seq_lens"), bucket.num_rows),
            **dict.fromkeys(_OF_SAMPLES, bucket.num_samples),
            "query_start": bucket.num_rows + 1,
            "sample_query_start": bucket.num_samples + 1,
            **{name: spec.size for name, spec in self._shared.items()},
        }
        return {name: self._view(name, size) for name, size in sizes.items()}

    def _view(self, name: str, size: int) -> torch.Tensor:
        view = self._views.get((name, size))
        if view is None:
            view = self._views[name, size] = self._staging.on_device(name, size)
        return view

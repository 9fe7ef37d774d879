"""Launch parameters of the Triton kernels: shipped per architecture and shape class, measured at warmup, never changed under traffic.

A kernel's module declares its *candidates*: for an architecture and a key, the launch parameters worth trying, the shipped choice
first. `lookup` answers with what was recorded for that key, else with the shipped choice; `tune` measures and records. A key names a
shape class, for example (head_dim, group, dtype); it must not hold the batch's size where parameters decide an order of summation,
or results would depend on what runs beside a row.

torch's operators carry no context, so the process has one table, TABLE.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toka.errors import ConfigError, InvariantError

Capability = tuple[int, int]  # CUDA's compute capability, for example (9, 0)
Key = tuple[int | str, ...]

INTERPRETER: Capability = (0, 0)
TABLE_VERSION = 1
# Products and sums become one instruction. Said outright, since Triton's own default changes from version to version.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class LaunchParameters:
    """How a kernel is launched. constants: the kernel's `tl.constexpr` block sizes by name.

    max_registers: of a thread. ptxas spills values on a guess of how many programs should share a multiprocessor; this tells it. 0 = guess.
    """

    num_warps: int
    num_stages: int
    constants: tuple[tuple[str, int], ...] = ()
    max_registers: int = 0

    @classmethod
    def of(cls, num_warps: int, num_stages: int, max_registers: int = 0, **constants: int) -> LaunchParameters:
        return cls(num_warps, num_stages, tuple(sorted(constants.items())), max_registers)

    def __getitem__(self, name: str) -> int:
        return dict(self.constants)[name]

    @property
    def options(self) -> dict[str, int]:
        """Triton's options, without the constants."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILE_OPTIONS, **limit}

    @property
    def keywords(self) -> dict[str, int]:
        """Keyword arguments of the launch: `kernel[grid](..., **parameters.keywords)`."""
        return {**dict(self.constants), **self.options}


Candidates = Callable[[Capability, Key], Sequence[LaunchParameters]]
Place = tuple[str, Capability, Key]


class TuningTable:
    """Candidates by kernel, and what was measured best by (kernel, capability, key)."""

    def __init__(self) -> None:
        self._candidates: dict[str, Candidates] = {}
        self._best: dict[Place, LaunchParameters] = {}
        self._seen: dict[Place, LaunchParameters] = {}
        self._frozen = False

    def declare(self, kernel: str, candidates: Candidates) -> None:
        """Say which launch parameters `kernel` can have, at least one for every capability and key, the shipped choice first."""
        if kernel in self._candidates:
            raise InvariantError(f"candidates of Triton kernel {kernel!r} are declared twice")
        self._candidates[kernel] = candidates

    def candidates(self, kernel: str, capability: Capability, key: Key) -> tuple[LaunchParameters, ...]:
        """What can be tried, without repetition, the shipped choice first. Raises ConfigError if the device has no room for any."""
        found = tuple(dict.fromkeys(self._candidates[kernel](capability, key)))
        if not found:
            raise ConfigError(f"no launch parameters of Triton kernel {kernel} fit this device at {key}.")
        return found

    def lookup(self, kernel: str, capability: Capability, key: Key) -> LaunchParameters:
        """What to launch `kernel` with."""
        place = (kernel, capability, key)
        known = self._best.get(place) or self._seen.get(place)
        if known is None:
            known = self._seen[place] = self.candidates(kernel, capability, key)[0]
        return known

    def seen(self) -> tuple[Place, ...]:
        """What was looked up so far and has no measurement: the places that are worth a `tune`."""
        return tuple(place for place in self._seen if place not in self._best)

    def tune(
        self, kernel: str, capability: Capability, key: Key, run: Callable[[LaunchParameters], float]
    ) -> LaunchParameters:
        """Measure all candidates and record the fastest.

        run: how long the kernel takes with these parameters, any unit, inf if the device can't launch it so. While it measures,
        `lookup` answers with the parameters it was given, so it may run the operator itself, or all of a step.
        Raises ConfigError if no candidate can be launched, InvariantError after `freeze`.
        """
        self._check_thawed("tune")
        place = (kernel, capability, key)
        before = self._best.get(place)
        times: dict[LaunchParameters, float] = {}
        try:
            for candidate in self.candidates(kernel, capability, key):
                self._best[place] = candidate
                times[candidate] = run(candidate)
        except BaseException:
            self._restore(place, before)
            raise
        fastest = min(times, key=times.__getitem__)
        if math.isinf(times[fastest]):
            self._restore(place, before)
            raise ConfigError(f"no launch parameters of Triton kernel {kernel} fit this device at {key}: {list(times)}")
        self._best[place] = fastest
        return fastest

    def freeze(self) -> None:
        """From now on `lookup` answers the same for ever; called when warmup ends."""
        self._frozen = True

    def to_json(self) -> dict[str, Any]:
        """What was measured, in plain values, to be kept beside the compiled graph."""
        return {
            "version": TABLE_VERSION,
            "entries": [
                {
                    "kernel": kernel,
                    "capability": list(capability),
                    "key": list(key),
                    "num_warps": best.num_warps,
                    "num_stages": best.num_stages,
                    "max_registers": best.max_registers,
                    "constants": dict(best.constants),
                }
                for (kernel, capability, key), best in self._best.items()
            ],
        }

    def load_json(self, saved: Mapping[str, Any]) -> None:
        """Take over what `to_json` wrote. Raises ConfigError if it has another version or the wrong form."""
        self._check_thawed("load a table")
        if saved.get("version") != TABLE_VERSION:
            raise ConfigError(f"the tuning table has version {saved.get('version')}, this toka reads {TABLE_VERSION}.")
        try:
            self._best.update(_read_entries(saved["entries"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the tuning table is damaged: {type(error).__name__}: {error}") from error

    def _check_thawed(self, action: str) -> None:
        if self._frozen:
            raise InvariantError(f"can't {action}: the table of Triton's launch parameters is frozen")

    def _restore(self, place: Place, before: LaunchParameters | None) -> None:
        if before is None:
            self._best.pop(place, None)
        else:
            self._best[place] = before


def _read_entries(entries: Iterable[Mapping[str, Any]]) -> dict[Place, LaunchParameters]:
    read: dict[Place, LaunchParameters] = {}
    for entry in entries:
        major, minor = entry["capability"]
        constants = {str(name): int(value) for name, value in entry["constants"].items()}
        sizes = (int(entry[name]) for name in ("num_warps", "num_stages", "max_registers"))
        parameters = LaunchParameters.of(*sizes, **constants)
        read[entry["kernel"], (int(major), int(minor)), tuple(entry["key"])] = parameters
    return read


@functools.cache
def capability_of(device: torch.device) -> Capability:
    """The device's compute capability; INTERPRETER for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


TABLE = TuningTable()

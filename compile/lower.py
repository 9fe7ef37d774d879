"""From a region's graph to something that can be called: ahead-of-time compiled by inductor, or run eagerly (floor 4)."""

from __future__ import annotations

import logging
import os
import subprocess
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import ExportedProgram

from toka.errors import ConfigError

log = logging.getLogger(__name__)

# Takes a list of tensors (parameters, then inputs; the callee may empty the list) and returns the outputs.
RegionCode = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

INDUCTOR_OPTIONS: Mapping[str, object] = MappingProxyType(
    {
        "aot_inductor.compile_wrapper_opt_level": "O1",  # the wrapper only calls kernels: O3 adds seconds and gains nothing
    }
)


def compile_to_file(program: ExportedProgram, path: Path) -> None:
    """Compile one region ahead of time into `path` (.pt2). The file appears whole or not at all. Weights are not in it.

    Raises ConfigError with the compiler's last words if it fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.pt2")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            options = dict(INDUCTOR_OPTIONS)  # inductor adds to what it is given
            aoti_compile_and_package(program, package_path=str(unfinished), inductor_configs=options)
        os.replace(unfinished, path)
    except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
        last = str(error).strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(
            f"the compiler failed on {path.stem}: {last[0][:300]}. Check the C++ compiler (CXX), or start with torch_compile=F"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_compiled(path: Path) -> RegionCode:
    """Load what `compile_to_file` wrote; nothing is compiled."""
    package = aoti_load_package(str(path))
    boxed: RegionCode = package.loader.boxed_run
    return boxed


def eager(program: ExportedProgram) -> RegionCode:
    """Run the graph node by node through PyTorch."""
    module = program.graph_module

    def run(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return tuple(module(*tensors))

    return run

"""From a region's graph to something that can be called: ahead-of-time compiled by inductor, or run eagerly (floor 4).

Compiling imports inductor and dynamo, three seconds that a start from an artifact need not spend: so they are imported where they are used.
"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from toka.compile.region_graph import RegionGraph
from toka.errors import ConfigError

# Takes a list of tensors (parameters, then inputs; the callee may empty the list) and returns the outputs.
RegionCode = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

INDUCTOR_OPTIONS: Mapping[str, object] = MappingProxyType(
    {
        "aot_inductor.package": True,
        "aot_inductor.compile_wrapper_opt_level": "O1",  # the wrapper only calls kernels: O3 adds seconds and gains nothing
        "aot_inductor.precompile_headers": False,  # they would be left behind outside of our cache directory
        "cpp.vec_isa_ok": True,  # what the processor says of itself is enough: no trial compilations
    }
)


def import_compiler() -> None:
    """Import all that `compile_to_file` needs."""
    import torch._inductor.codegen.cpp
    import torch._inductor.codegen.cpp_wrapper_cpu
    import torch._inductor.compile_fx
    import torch._inductor.package.package  # noqa: F401


def compile_to_file(graph: RegionGraph, path: Path) -> None:
    """Compile one region ahead of time into `path` (.pt2). Weights are not in it.

    Raises ConfigError with the compiler's last words if it fails.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            options = dict(INDUCTOR_OPTIONS)  # inductor adds to what it is given
            values = tuple(node.meta["val"] for node in graph.placeholders)
            files: Any = aot_compile(graph.module, values, options=options)
            package_aoti(str(path), files)
    except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
        last = str(error).strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(
            f"the compiler failed on {path.stem}: {last[0][:300]}. Check the C++ compiler (CXX), or start with torch_compile=F"
        ) from error


def load_compiled(path: Path, device: torch.device) -> RegionCode:
    """Load what `compile_to_file` wrote; nothing is compiled. RuntimeError if it cannot be loaded."""
    # One runner, single-threaded: steps run in order, and only so may a CUDA graph capture them.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, device.index or -1)
    boxed: RegionCode = loader.boxed_run
    return boxed


def eager(graph: RegionGraph) -> RegionCode:
    """Run the graph node by node through PyTorch."""

    def run(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return tuple(graph.module(*tensors))

    return run

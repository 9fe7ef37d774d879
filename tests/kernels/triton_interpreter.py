"""A process that runs Triton's operators on CPU tensors; started with TRITON_INTERPRET=1, which holds for a process as a whole.

Reads (operator, arguments) from standard input, one after the other, and answers each with its result, or with the exception that it
raised; either as pickled bytes that torch.save wrote, since pickle alone does not know tensors of float8.
"""

from __future__ import annotations

import io
import pickle
import sys

import numpy as np
import torch

from toka.kernels.triton.library import load


def main() -> None:
    load()
    np.seterr(all="ignore")  # the interpreter computes what GPUs compute silently: NaN, inf
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        op, arguments = torch.load(io.BytesIO(request), weights_only=False)
        try:
            answer = getattr(torch.ops.toka_triton, op).default(*arguments)
        except Exception as error:
            answer = error
        saved = io.BytesIO()
        torch.save(answer, saved)
        pickle.dump(saved.getvalue(), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

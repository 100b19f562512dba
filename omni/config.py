"""Every setting of a run: typed, validated, from YAML with dotted command-line overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from omni.errors import ConfigError
from omni.storage.path import Place, join, place, why, without_secrets


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _absolute(path: str) -> str:
    """Workers have another working directory than the command that started the run."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _workers(value: Any) -> Any:
    given = [value] if isinstance(value, int) else value
    whole = isinstance(given, (list, tuple)) and all(type(n) is int and n > 0 for n in given)
    if not whole or not 1 <= len(given) <= 2 or list(given) != sorted(given):
        raise ValueError("expected a number over 0, or [min, max] with min <= max")
    return given[0] if len(given) == 1 else tuple(given)


def _distinct(value: Any) -> Any:
    if isinstance(value, list) and (not value or len(set(map(str, value))) < len(value)):
        raise ValueError("expected last, all, or different numbers of layers")
    return value


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] <= value[1]:
        raise ValueError("expected [least, most] with least <= most")
    return value


def _lm(value: str) -> str:
    kind, _, name = value.partition(":")
    if value != "scratch" and (kind not in ("nanochat", "hf", "ms") or not name):
        raise ValueError("expected scratch, nanochat:DIR, hf:ID_OR_DIR or ms:ID")
    # Workers have another working directory than the command that started the run.
    if kind == "nanochat" or (kind == "hf" and Path(name).expanduser().is_dir()):
        return f"{kind}:{_absolute(name)}"
    return value


_SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len", "window_pattern")
Paths = Annotated[list[str], BeforeValidator(_as_list)]
Sources = Annotated[
    list[
        Annotated[
            Annotated[str, Tag("path")] | Annotated["SourceConfig", Tag("mixture")],
            Discriminator(
                lambda given: "mixture" if isinstance(given, (dict, Section)) else "path"
            ),
        ]
    ],
    BeforeValidator(lambda value: [value] if isinstance(value, (str, dict)) else value),
]
Language = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+([-_][A-Za-z0-9]+)*$")]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Decibels = Annotated[
    tuple[Annotated[float, Field(ge=-60, le=60)], Annotated[float, Field(ge=-60, le=60)]],
    AfterValidator(_rising),
]
Speed = Annotated[float, Field(ge=0.5, le=2)]
_Seconds = Annotated[float, Field(gt=0, le=5)]
Reverberation = Annotated[tuple[_Seconds, _Seconds], AfterValidator(_rising)]
Tracker = Literal["wandb", "mlflow", "swanlab"]
Fingerprint = Literal["data.train", "tokenizer", "plan", "model", "encoder", "augment"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class RunConfig(Section):
    """Where a run lives. The same name in the same storage continues that run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "omni"
    storage: Annotated[str, AfterValidator(_absolute)] = "runs"
    # ^ a folder that every node sees, or a bucket's URI
    seed: Annotated[int, Field(ge=0)] = 0
    override_fingerprint: Annotated[list[Fingerprint], BeforeValidator(_as_list)] = []
    # ^ what may differ from the run that is continued; anything else that differs is refused
    grace_seconds: Annotated[float, Field(gt=0)] = 25  # after SIGTERM or Ctrl-C, for a checkpoint
    trackers: Annotated[list[Tracker], BeforeValidator(_as_list)] = []
    # ^ besides TensorBoard, which is always written; their keys are in the driver's environment


class TaskConfig(Section):
    """One kind of thing that is asked for; rows name theirs in the field `task`."""

    prompt: str = ""  # where a row has none
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its tokens in the loss


class SourceConfig(Section):
    """One part of a mixture; a plain path is one of weight 1."""

    source: str
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0  # how often its rows occur in an epoch
    prompt: str | None = None  # of rows that have none; null: data.prompt
    language: Language | None = None  # of rows that name none; null: data.language


class DataConfig(Section):
    """Manifests (JSON lines), tar shards, folders of jobs.index, or embedded:train, :dev, :test."""

    train: Sources = ["embedded:train"]
    dev: Paths = ["embedded:dev"]
    test: Paths = []
    prompt: str = ""  # asks for the transcript; the audio comes first, or where it has <|audio|>
    unicode: Literal["NFC", "NFKC", "none"] = "NFC"  # form of all text
    case: Literal["keep", "lower", "upper"] = "keep"  # of transcripts
    punctuation: Literal["keep", "strip"] = "keep"  # of transcripts
    language: Language | None = None  # of rows that name none; null: scored as en, not tagged
    language_tag: bool = False  # the prompt ends with the row's language: lang:fr
    tasks: dict[str, TaskConfig] = {}  # by name; none: the rows' own names, all alike
    template: Literal["auto", "plain", "chat"] = "auto"  # auto: chat for a chat model of hf: or ms:
    allow_absolute: bool = False  # manifests may name files outside their own folder
    max_rejects: Share = 0.05  # of the utterances seen; more stop the run
    cache: str | None = "auto"  # encoder features: a folder or URI; auto: <run.storage>/cache
    cache_gb: Annotated[float, Field(gt=0)] | None = None  # limit of that folder; null: none
    buffer_mb: Positive | None = None  # object store for blocks under way; null: Ray's choice
    loaders: Positive = 2  # tasks that decode audio at a time, one logical CPU each
    loader_rate: Annotated[float, Field(gt=0)] | None = None
    # ^ audio seconds a second that each of them reads at most: spares storage that others use


class AugmentConfig(Section):
    """What is changed in the training audio, drawn anew in every epoch; nothing by default.

    Changes are made in this order. Ranges are drawn from evenly, once per recording.
    """

    speed: list[Speed] = [1.0]  # tempo and pitch; [0.9, 1.0, 1.1]: Ko et al. 2015
    reverb_probability: Share = 0.0
    reverb: Paths = []  # manifests of room impulse responses; none: made ones
    reverb_seconds: Reverberation = (0.2, 0.8)  # of a made one, to -60 dB: rooms, not halls
    noise_probability: Share = 0.0
    noise: Paths = []  # manifests of recordings
    noise_snr_db: Decibels = (5.0, 20.0)  # from music's 5 to babble's 20: Snyder et al. 2018
    telephone_probability: Share = 0.0  # 8 kHz, 300 to 3400 Hz, 8-bit mu-law: ITU-T G.711, G.712
    gain_probability: Share = 0.0
    gain_db: Decibels = (-6.0, 6.0)
    # SpecAugment without warping, Park et al. 2019: its policies have two masks of each kind, of up
    # to 27 of 80 mel bins, and of up to 0.7 or 1 s and a fifth (SM) or all (LD) of the clip.
    time_masks: Annotated[int, Field(ge=0)] = 0
    time_mask_seconds: Annotated[float, Field(gt=0)] = 1.0  # at most, each
    time_mask_share: Share = 0.2  # of the clip, at most, each
    freq_masks: Annotated[int, Field(ge=0)] = 0
    freq_mask_bins: Positive = 27  # at most, each

    @model_validator(mode="after")
    def _consistent(self) -> AugmentConfig:
        if not self.speed or len(set(self.speed)) < len(self.speed):
            raise ValueError("speed: expected different factors; [1.0] leaves it as it is")
        for name in ("noise", "reverb"):
            if getattr(self, name) and not getattr(self, f"{name}_probability"):
                raise ValueError(f"{name}_probability: at 0 no {name} is added; expected a share")
        if self.noise_probability and not self.noise:
            raise ValueError("noise: expected a manifest of recordings to add")
        return self

    @property
    def masks(self) -> bool:
        return self.time_masks + self.freq_masks > 0

    @property
    def clean_share(self) -> float:
        """How much of the training audio an epoch leaves as it is."""
        if self.masks:
            return 0.0
        share = self.speed.count(1.0) / len(self.speed)
        for name in ("reverb", "noise", "telephone", "gain"):
            share *= 1 - float(getattr(self, f"{name}_probability"))
        return share


class EncoderConfig(Section):
    """The frozen Whisper encoder and the actors that run it."""

    weights: str = "embedded"  # embedded, hub (WHISPER_MS_ID, WHISPER_HF_ID), or a folder
    layers: Annotated[
        Literal["last", "all"] | list[Annotated[int, Field(ge=0)]], BeforeValidator(_distinct)
    ] = "last"  # several are mixed by learnt weights; 0 is the input of the first
    mode: Literal["trim", "full"] = "trim"
    margin_seconds: Annotated[float, Field(ge=0, le=30)] = 0.5
    dtype: Literal["bf16", "fp32"] = "bf16"
    format: Literal["exact", "int8"] = "exact"  # of features in the cache and on the wire
    frame_budget: Annotated[int, Field(ge=0)] | None = None  # frames per batch; null: by device
    actors: Positive | Literal["auto"] = 1  # auto: from the cluster and measured rates
    gpus: Annotated[float, Field(ge=0)] = 0  # per actor; fractions share a GPU
    cpus: Annotated[float, Field(gt=0)] = 0.5  # logical CPUs per actor
    threads: Positive = 1  # torch threads per actor
    labels: dict[str, str] = {}  # only on nodes with them, as `ray start --labels` gives them


class TokenizerConfig(Section):
    path: str | None = None  # tokenizer.json, or nanochat's tokenizer.pkl; null trains one
    vocab_size: Annotated[int, Field(ge=265)] = 1024


class ModelConfig(Section):
    """Projector and language model. Names are nanochat's where it has one.

    lm: scratch builds the GPT that n_layer to window_pattern describe; nanochat:DIR[@STEP],
    hf:ID_OR_DIR[@REVISION] and ms:ID[@REVISION] load one, which has a shape of its own.
    """

    lm: Annotated[str, AfterValidator(_lm)] = "scratch"
    n_layer: Positive = 6
    n_head: Positive = 4
    n_kv_head: Positive | None = None  # null: n_head
    n_embd: Annotated[int, Field(ge=24)] = 256
    sequence_len: Positive = 2048
    window_pattern: str = "L"
    stack: Positive = 4  # encoder frames per soft token (50 frames/s)
    projector: Literal["mlp", "swiglu", "conv"] | None = None  # null: mlp for a GPT, else swiglu
    projector_hidden: Positive | None = None  # null: the language model's width
    dropout: Rate = 0.0
    token_dropout: Rate = 0.0  # share of text inputs hidden in training
    audio_dropout: Rate = 0.0  # share of soft tokens hidden in training
    train: list[Literal["projector", "lm", "lora"]] = ["projector", "lm"]  # the rest is frozen
    lora_rank: Positive = 16  # of the adapters that `lora` puts into the language model
    lora_alpha: Positive | None = None  # null: twice the rank
    lora_targets: list[str] = []  # names of linear layers; none: all

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if not self.train:
            raise ValueError("train: expected at least one of projector, lm, lora")
        if {"lm", "lora"} <= set(self.train):
            raise ValueError("train: lora leaves the language model's own weights frozen: drop lm")
        if self.lm == "scratch":
            if "lora" in self.train:
                raise ValueError("train: lora adapts a language model that is trained: set lm")
            return self
        for name in _SHAPE:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {self.lm} has its own; leave it out")
        return self


class OptimConfig(Section):
    """Batch geometry, optimizer and schedule.

    A step consumes bins_per_step bins of bin_positions positions over all workers, whatever their
    number. One block (microbatch) of one worker holds bins_per_block bins.
    """

    bin_positions: Positive = 1024
    bins_per_step: Positive = 2
    bins_per_block: Positive = 1
    steps: Positive = 1000
    lr: Annotated[float, Field(gt=0)] = 1e-3  # AdamW: embeddings, scalars, and matrices w/o Muon
    projector_lr: Annotated[float, Field(gt=0)] | None = None  # null: lr
    lora_lr: Annotated[float, Field(gt=0)] | None = None  # null: lr
    muon_lr: Annotated[float, Field(gt=0)] | None = None  # Muon for the GPT's matrices; null: AdamW
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    final_lr: Share = 0.02  # share of the peak at the end of the cosine
    clip: Annotated[float, Field(gt=0)] = 1.0
    spike: Annotated[float, Field(gt=1)] | None = 100.0  # x the mean gradient norm: skip the step
    max_skips: Positive = 5  # steps in a row without a usable gradient; more stop the run
    ce_weight: Annotated[float, Field(ge=0)] = 1.0  # cross-entropy of the answers
    ctc_weight: Annotated[float, Field(ge=0)] = 0.0  # auxiliary CTC on the soft tokens
    listen_steps: Annotated[int, Field(ge=0)] = 0  # first ones, CTC alone: the LM is not run
    kl_weight: Annotated[float, Field(ge=0)] = 0.0  # divergence from the LM that reads the text
    kl_temperature: Annotated[float, Field(gt=0)] = 2.0
    kl_end_weight: Annotated[float, Field(gt=0)] = 2.0  # of the token that ends an answer
    ema: Rate = 0.0  # decay of the averaged weights that are evaluated and saved; 0: off

    @model_validator(mode="after")
    def _listens(self) -> OptimConfig:
        if self.listen_steps and not self.ctc_weight:
            raise ValueError("listen_steps: these steps train by CTC alone; expected a ctc_weight")
        return self


class TrainConfig(Section):
    workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    # ^ or [min, max]: as many as the cluster has room for, while it grows and shrinks
    strategy: Literal["ddp", "fsdp"] = "ddp"  # fsdp: parameters and optimizer state are sharded
    gpus: Annotated[float, Field(ge=0, le=1)] = 0  # per worker: 1, or a share beside an encoder
    cpus: Annotated[float, Field(gt=0)] = 1  # logical CPUs per worker
    threads: Positive = 1  # torch threads per worker
    labels: dict[str, str] = {}  # only on nodes with them; empty: anywhere
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = False  # keep layers' inputs only: less memory, a third more time
    max_failures: Annotated[int, Field(ge=-1)] = 3  # in a row without a checkpoint; -1: no limit
    timeout_seconds: Annotated[float, Field(gt=0)] = 600  # without progress: restart what hangs
    log_every: Positive = 10
    checkpoint_every: Positive = 200
    keep_checkpoints: Positive = 2  # newest ones, besides the best

    @property
    def least(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class EvalConfig(Section):
    every: Positive = 200  # steps
    max_utterances: Positive = 1000  # of dev and of test, held in the workers' memory
    wer_utterances: Positive = 64  # of dev, decoded at each evaluation; all of test at the end
    examples: Annotated[int, Field(ge=0)] = 2
    best: Literal["dev_loss", "dev_wer", "dev_cer"] = "dev_loss"
    patience: Positive | None = None  # evaluations without a better `best` before stopping


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    encoder: EncoderConfig = EncoderConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def run_dir(self) -> Place:
        return place(self.run.storage) / self.run.name

    @property
    def cache(self) -> str | None:
        """Where features are kept: an absolute path, a URI, or None."""
        if self.data.cache is None or "://" in self.data.cache:
            return self.data.cache
        if self.data.cache == "auto":
            return join(self.run.storage, "cache")
        return _absolute(self.data.cache)

    @property
    def cache_dir(self) -> Place | None:
        """Where measured audio lengths are kept: the same, or beside the runs for a URI."""
        if self.cache is None:
            return None
        return place(join(self.run.storage, "cache") if "://" in self.cache else self.cache)

    @property
    def locations(self) -> list[str]:
        """Where corpora lie, credentials included."""
        corpora = [*self.data.train, *self.data.dev, *self.data.test]
        named = [entry if isinstance(entry, str) else entry.source for entry in corpora]
        return [*named, *self.augment.noise, *self.augment.reverb]

    def to_yaml(self) -> str:
        """For the run's directory and its checkpoints: without credentials."""
        values = self.model_dump(mode="json")
        return without_secrets(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def load_config(path: str | Place | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as ["--optim.lr", "3e-4"].

    A repeated override of a list collects its values. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(place(path).read_text())
        except OSError as error:
            raise ConfigError(f"--config {place(path)}: {why(error)}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path}: not YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"--config {path}: expected sections, found {type(loaded).__name__}")
        values = loaded or {}
    for key, value in _parse_overrides(overrides).items():
        _set(values, key, value)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate plain values. Raises ConfigError with one line per wrong field."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--") or "." not in flag.partition("=")[0]:
            raise ConfigError(f"{flag}: unknown argument; settings are --section.field VALUE")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise ConfigError(f"--{key}: expected a value")
            value = pending.pop(0)
        found.setdefault(key, []).append(_value_of(key, value))
    return {
        key: values
        if len(values) > 1 or _is_list(key) and not isinstance(values[0], list)
        else values[0]
        for key, values in found.items()
    }


def _value_of(key: str, text: str) -> Any:
    """Text where the field takes text, else what YAML makes of it."""
    annotation = _annotation(key)
    listed = annotation == list[str] and not text.startswith("[")
    if annotation is str or listed or (annotation == str | None and text != "null"):
        return text
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"--{key}: cannot read {text!r}") from None


def _is_list(key: str) -> bool:
    return get_origin(_annotation(key)) is list


def _annotation(key: str) -> Any:
    """The declared type of a dotted field; None for a field that does not exist."""
    if key == "data.train":
        return list[str]  # a command line names paths; mixtures are for files, or YAML: [{...}]
    annotation: Any = Config
    for part in key.split("."):
        fields = getattr(annotation, "model_fields", {})
        if part not in fields:
            return None
        annotation = fields[part].annotation
    return annotation


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if values.get(section) is None:  # a section that is empty in the file
            values[section] = {}
        nested = values[section]
        if not isinstance(nested, dict):
            raise ConfigError(f"{key}: {section} is not a section")
        values = nested
    values[name] = value


def _explain(error: Any) -> str:
    parts = list(error["loc"])
    # Behind the number of an entry of data.train stands which kind it is of: no field's name.
    names = [
        str(p) for before, p in zip([None, *parts], parts, strict=False) if type(before) is not int
    ]
    location = ".".join(names)
    if error["type"] != "extra_forbidden":
        given = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
        return f"{location}: {error['msg'].removeprefix('Value error, ')}{given}"
    known = _fields(error["loc"][:-1])
    close = difflib.get_close_matches(names[-1], known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{location}: unknown field{hint}; expected one of: {', '.join(known)}"


def _fields(location: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at a location."""
    section: type[BaseModel] = Config
    for part in location:
        if part == "mixture":
            section = SourceConfig
        annotation = getattr(section.model_fields.get(str(part)), "annotation", None)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
        elif get_origin(annotation) is dict:
            section = get_args(annotation)[1]
    return list(section.model_fields)

"""Every setting of a run. The sentence below a field is its entry in --help and docs/settings.md.

`make settings` writes docs/settings.md and configs/schema.json from this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    model_validator,
)

from omni.config.field_types import (
    AbsolutePath,
    Base,
    Best,
    Columns,
    DecibelRange,
    Fingerprints,
    Language,
    LanguageModel,
    Layers,
    MemoryShare,
    Name,
    NodeIds,
    NotNegative,
    NotNegativeFloat,
    Paths,
    PlugIns,
    Positive,
    PositiveFloat,
    Projector,
    Rate,
    SecondsRange,
    Share,
    SpeedFactor,
    Trackers,
    Workers,
    absolute,
)
from omni.storage.path import StoragePath, as_path, join
from omni.storage.uri import redacted

_MANY = 1 << 30  # actors whose number is not known yet
_GPT_SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len", "window_pattern")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_default=True, frozen=True, use_attribute_docstrings=True
    )


class RunConfig(Section):
    """Name and storage of a run: the same name in the same storage continues that run."""

    name: Name = "omni"
    """Name of the run, and of its directory in `run.storage`."""
    storage: AbsolutePath = "runs"
    """Folder that every node sees, or a bucket's URI, that holds the run directories."""
    seed: NotNegative = 0
    """Seed of initial weights, order of utterances, dropout and augmentation."""
    override_fingerprint: Fingerprints = []
    """Parts that may differ from the run being continued; any other difference is refused."""
    grace_seconds: PositiveFloat = 25
    """Seconds after SIGTERM or Ctrl-C in which the run finishes its step and saves a checkpoint."""
    lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 60
    """Seconds without a heartbeat of its driver after which another may take over the run."""
    check_nodes: bool = True
    """Examine the nodes of a cluster before the start, and leave out those not in order."""
    exclude_nodes: NodeIds = []
    """Ids (`ray list nodes`) of nodes to leave out, besides those that the check finds."""
    trackers: Trackers = []
    """Experiment trackers to report to besides TensorBoard, with keys from the environment."""


class TaskConfig(Section):
    """Prompt, answer, scoring and weights of one task.

    Rows name their task in the field `task`; with `answer`, every recording also serves the task.
    """

    prompt: str = ""
    """Prompt of the task's rows that have none of their own."""
    prompts: list[str] = []
    """Paraphrases; training draws one per utterance by seed, evaluation asks the first."""
    answer: str | None = None
    """Template of the answer over the labels and columns of a row, such as {{ gender }}."""
    choices: list[str] = []
    """All answers of a closed task, to be scored by likelihood; empty: any text."""
    metric: Literal["wer", "cer", "accuracy", "macro_f1", "exact_match", "bleu", "chrf"] | None = (
        None
    )
    """Figure that sums up the task; null: accuracy of choices, wer of what is said and of tags."""
    weight: PositiveFloat = 1.0
    """Weight in the loss of each token of the task's answers."""
    share: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Occurrences of each of the task's utterances in an epoch; 0: the task is left out."""

    @model_validator(mode="before")
    @classmethod
    def _first_prompt(cls, given: Any) -> Any:
        prompts = given.get("prompts") if isinstance(given, dict) else None
        if isinstance(prompts, list) and prompts and not given.get("prompt"):
            return {**given, "prompt": prompts[0]}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        if self.prompts and self.prompt != self.prompts[0]:
            raise ValueError("prompts: expected prompt or prompts, not both")
        if self.answer is not None and not self.prompt:
            raise ValueError("prompt: expected one beside answer: it says what is asked")
        known = [" ".join(choice.casefold().split()) for choice in self.choices]
        if self.choices and (len(known) < 2 or len(set(known)) < len(known) or "" in known):
            raise ValueError("choices: expected two or more texts that differ beyond their case")
        return self


class SourceConfig(Section):
    """One part of a mixture; a plain path is a source of weight 1."""

    source: str
    """Manifest, tar shards, or folder of an index."""
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    """Number of times that each row occurs in an epoch; fractions draw a part of the rows."""
    prompt: str | None = None
    """Prompt of rows that have none of their own; null: `data.prompt`."""
    language: Language | None = None
    """Language code of rows that name none; null: `data.language`."""


_Source = Annotated[
    Annotated[str, Tag("path")] | Annotated[SourceConfig, Tag("mixture")],
    Discriminator(lambda given: "mixture" if isinstance(given, (dict, Section)) else "path"),
]
Sources = Annotated[
    list[_Source],
    BeforeValidator(
        lambda value: [value] if isinstance(value, (str, dict)) else value,
        json_schema_input_type=_Source | list[_Source],
    ),
]


class DataConfig(Section):
    """Corpora, their text, and how they are loaded and cached.

    A corpus is a manifest (JSON lines), tar shards, the folder of an index (`omni index`), a small
    corpus of any shape that `omni index` reads, or embedded:train, embedded:dev or embedded:test.
    """

    train: Sources = ["embedded:train"]
    """Corpora to train on: paths, or entries of `source`, `weight`, `prompt` and `language`."""
    dev: Paths = ["embedded:dev"]
    """Corpora for evaluations during training."""
    test: Paths = []
    """Corpora for the evaluation at the end."""
    prompt: str = ""
    """Prompt of rows that have none; the audio comes before it, or in place of <|audio|>."""
    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalization form of all text."""
    case: Literal["keep", "lower", "upper"] = "keep"
    """Letter case of transcripts."""
    punctuation: Literal["keep", "strip"] = "keep"
    """Keep or remove the punctuation of transcripts."""
    language: Language | None = None
    """Language code of rows that name none; null: scored as English and not tagged."""
    language_tag: bool = False
    """End each prompt with the row's language, such as lang:fr."""
    keep: Columns = []
    """Columns of manifests that become labels, for tasks; an index has those of `omni index`."""
    tasks: dict[str, TaskConfig] = {}
    """Tasks by name (docs/tasks.md); empty: the rows' own, weighted alike."""
    template: Literal["auto", "plain", "chat"] = "auto"
    """Layout of a sequence; auto: the chat template of a chat model of hf: or ms:, else plain."""
    allow_absolute: bool = False
    """Let manifests name audio files outside their own folder."""
    allow_private_hosts: bool = False
    """Let rows name recordings on web servers of private and local networks."""
    download_mb: Positive = 1024
    """Largest recording that is fetched from a server that a row names, in MiB."""
    download_seconds: PositiveFloat = 300
    """Longest time that fetching such a recording may take, in seconds."""
    max_rejects: Share = 0.05
    """Largest share of the utterances seen that may be rejected before the run stops."""
    window_utterances: Positive = 262_144
    """Utterances that are shuffled and packed together; a larger corpus is planned in windows."""
    duration_tolerance: Share = 0.1
    """Share of the duration in a manifest that a recording may lack before it is rejected."""
    cache: str | None = "auto"
    """Folder or URI of the feature cache; auto: `<run.storage>/cache`; null: no cache."""
    cache_gb: PositiveFloat | None = None
    """Largest size of the feature cache in gigabytes; null: no limit."""
    buffer_mb: Positive | None = None
    """Object store for blocks between the stages in MiB; null: Ray Data's own limit."""
    block_mb: Positive = 32
    """Largest block of the stream in MiB, as far as one step of a rank is not larger."""
    block_seconds: PositiveFloat = 0.5
    """Seconds that a rank trains on one block of the stream, as far as a step is not longer."""
    streams: Positive | None = None
    """Streams that feed the ranks, each with loaders and encoders of its own; null: by nodes."""
    loaders: Positive = 2
    """Number of tasks that read and decode audio at a time, one logical CPU each."""
    loader_rate: PositiveFloat | None = None
    """Seconds of audio that each loader reads per second at most; null: no limit."""


class AugmentConfig(Section):
    """Random changes of the training audio, drawn anew in each epoch; none by default.

    Changes are applied in the order of the settings. A range is drawn from uniformly, once per
    recording. SpecAugment is without time warping; Park et al. 2019 use two masks of each kind, of
    up to 27 of 80 mel bins, and of up to 0.7 s or 1 s and a fifth (SM) or all (LD) of the clip.
    """

    speed: list[SpeedFactor] = [1.0]
    """Factors of tempo and pitch to choose from; Ko et al. 2015 use [0.9, 1.0, 1.1]."""
    reverb_probability: Share = 0.0
    """Share of recordings that are convolved with a room impulse response."""
    reverb: Paths = []
    """Manifests of room impulse responses; empty: synthetic ones."""
    reverb_seconds: SecondsRange = (0.2, 0.8)
    """Range of the reverberation time (decay by 60 dB) of a synthetic response, in seconds."""
    noise_probability: Share = 0.0
    """Share of recordings that noise is added to."""
    noise: Paths = []
    """Manifests of noise recordings."""
    noise_snr_db: DecibelRange = (5.0, 20.0)
    """Range of the signal-to-noise ratio in dB; the default is the one of Snyder et al. 2018."""
    telephone_probability: Share = 0.0
    """Share of recordings sent through a telephone line: 8 kHz, 300 to 3400 Hz, 8-bit mu-law."""
    gain_probability: Share = 0.0
    """Share of recordings whose loudness is changed."""
    gain_db: DecibelRange = (-6.0, 6.0)
    """Range of the change of loudness in dB."""
    effects: PlugIns = []
    """Effects of your own (package.module:Class), applied in this order after the others."""
    effects_probability: Share = 0.0
    """Share of recordings that each of `effects` changes."""
    time_masks: NotNegative = 0
    """Number of SpecAugment masks over time."""
    time_mask_seconds: PositiveFloat = 1.0
    """Longest time mask in seconds."""
    time_mask_share: Share = 0.2
    """Longest time mask as a share of the clip."""
    freq_masks: NotNegative = 0
    """Number of SpecAugment masks over frequency."""
    freq_mask_bins: Positive = 27
    """Widest frequency mask in mel bins."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentConfig:
        if not self.speed or len(set(self.speed)) < len(self.speed):
            raise ValueError("speed: expected different factors; [1.0] changes nothing")
        for name in ("noise", "reverb"):
            if getattr(self, name) and not getattr(self, f"{name}_probability"):
                raise ValueError(f"{name}_probability: at 0 no {name} is added; expected a share")
        if self.effects and not self.effects_probability:
            raise ValueError("effects_probability: at 0 no effect is applied; expected a share")
        if self.noise_probability and not self.noise:
            raise ValueError("noise: expected a manifest of recordings to add")
        return self

    @property
    def masks(self) -> bool:
        return self.time_masks + self.freq_masks > 0

    @property
    def clean_share(self) -> float:
        """Expected share of the training audio that an epoch leaves unchanged."""
        if self.masks:
            return 0.0
        share = self.speed.count(1.0) / len(self.speed)
        for name in ("reverb", "noise", "telephone", "gain"):
            share *= 1 - float(getattr(self, f"{name}_probability"))
        return share * float((1 - self.effects_probability) ** len(self.effects))


class EncoderConfig(Section):
    """The frozen Whisper encoder and the Ray actors that run it."""

    weights: str = "embedded"
    """embedded (Whisper tiny.en), hub (WHISPER_MS_ID, then WHISPER_HF_ID), or a folder."""
    layers: Layers = "last"
    """Layers whose outputs are mixed by learnt weights: last, all, or numbers; 0 is the input."""
    mode: Literal["trim", "full"] = "trim"
    """trim: encode the real length and `margin_seconds`; full: pad each window to 30 s."""
    margin_seconds: Annotated[float, Field(ge=0, le=30)] = 0.5
    """Seconds of silence after a recording in mode trim."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the encoder's weights and computation."""
    format: Literal["exact", "int8"] = "exact"
    """Number format of features in the cache and between the stages; exact: that of `dtype`."""
    frame_budget: NotNegative | None = None
    """Largest number of encoder frames per batch; null: chosen by the device."""
    actors: Positive | Literal["auto"] = 1
    """Number of encoder actors; auto: from the cluster and from rates measured in a trial."""
    gpus: NotNegativeFloat = 0
    """GPUs per actor; actors with fractions share a GPU."""
    gpu_memory: MemoryShare | None = None
    """Share of its GPU's memory that an actor may allocate; null: no limit."""
    cpus: PositiveFloat = 0.5
    """Logical CPUs per actor."""
    threads: Positive = 1
    """Torch threads per actor."""
    labels: dict[str, str] = {}
    """Labels of the nodes that may run actors (`ray start --labels`); empty: any node."""

    @property
    def actor_count(self) -> int:
        """Number of actors. The driver resolves `auto` before anything asks for it."""
        if self.actors == "auto":
            raise ValueError("encoder.actors: auto has not been resolved to a number")
        return self.actors


class TokenizerConfig(Section):
    """Text tokenizer; a pretrained language model brings its own, unless `path` names another."""

    path: str | None = None
    """tokenizer.json or nanochat's tokenizer.pkl; null: the model's own, or one that is trained."""
    vocab_size: Annotated[int, Field(ge=265)] = 1024
    """Number of tokens of a tokenizer that is trained on the training text."""


def _null_is_default(value: Any, info: ValidationInfo) -> Any:
    """Let null unset a size of the GPT that a config file gives."""
    return ModelConfig.model_fields[str(info.field_name)].default if value is None else value


_GptSize = Annotated[
    Positive, BeforeValidator(_null_is_default, json_schema_input_type=Positive | None)
]


class ModelConfig(Section):
    """Projector and language model, with nanochat's names where it has one.

    `lm: scratch` builds the GPT that n_layer to window_pattern describe; nanochat:DIR[@STEP],
    hf:ID_OR_DIR[@REVISION] and ms:ID[@REVISION] load a language model, which brings its own shape:
    set theirs to null over a config that gives one.
    """

    lm: LanguageModel = "scratch"
    """scratch, nanochat:DIR[@STEP], hf:ID_OR_DIR[@REVISION] or ms:ID[@REVISION]."""
    base: Base | None = None
    """Checkpoint of omni whose weights and tokenizer training starts from, or omni-tiny."""
    n_layer: _GptSize = 6
    """Number of transformer layers of a GPT from scratch."""
    n_head: _GptSize = 4
    """Number of attention heads."""
    n_kv_head: Positive | None = None
    """Number of key and value heads; null: `n_head`."""
    n_embd: Annotated[
        Annotated[int, Field(ge=24)],
        BeforeValidator(
            _null_is_default, json_schema_input_type=Annotated[int, Field(ge=24)] | None
        ),
    ] = 256
    """Width of the embeddings."""
    sequence_len: _GptSize = 2048
    """Longest sequence in positions."""
    window_pattern: Annotated[
        str, BeforeValidator(_null_is_default, json_schema_input_type=str | None)
    ] = "L"
    """Attention window per layer, repeated: L for the whole context, S for a quarter."""
    stack: Positive = 4
    """Encoder frames per soft token, at 50 frames per second."""
    projector: Projector | None = None
    """Kind or package.module:Class; null: mlp for a GPT (scratch or nanochat), else swiglu."""
    projector_hidden: Positive | None = None
    """Hidden width of the projector; null: the language model's width."""
    summary_tokens: NotNegative = 0
    """Soft tokens per recording that summarise all of it, before those of its frames; 0: none."""
    dropout: Rate = 0.0
    """Dropout on embeddings and residual branches of a GPT."""
    token_dropout: Rate = 0.0
    """Share of text inputs that are masked in training."""
    audio_dropout: Rate = 0.0
    """Share of soft tokens that are masked in training."""
    train: list[Literal["projector", "lm", "lora"]] = ["projector", "lm"]
    """Parts that train, among projector, lm and lora; the others are frozen."""
    lora_rank: Positive = 16
    """Rank of the LoRA adapters of the language model."""
    lora_alpha: Positive | None = None
    """Scale of the LoRA adapters; null: twice the rank."""
    lora_targets: list[str] = []
    """Names of the linear layers that get adapters; empty: all."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if not self.train:
            raise ValueError("train: expected at least one of projector, lm, lora")
        if {"lm", "lora"} <= set(self.train):
            raise ValueError("train: lora leaves the language model's own weights frozen: drop lm")
        if self.lm == "scratch":
            if "lora" in self.train:
                raise ValueError(
                    "train: lora adapts a language model that is trained already: set lm"
                )
            return self
        for name in _GPT_SHAPE:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {self.lm} has its own; leave it out, or null")
        return self


class OptimConfig(Section):
    """Batch geometry, optimizer, schedule and losses.

    A step consumes `bins_per_step` bins of `bin_positions` positions over all workers, whatever
    their number. A microbatch of a worker holds `bins_per_block` bins.
    """

    bin_positions: Positive = 1024
    """Positions of a bin, in which whole utterances are packed."""
    bins_per_step: Positive = 2
    """Bins per optimizer step, over all workers."""
    bins_per_block: Positive = 1
    """Bins per forward pass of a worker; the gradients of a step accumulate."""
    steps: Positive = 1000
    """Number of optimizer steps of the run."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW, for all parameters whose role has none of its own below."""
    projector_lr: PositiveFloat | None = None
    """Peak learning rate of the projector and of the summary tokens; null: `lr`."""
    mix_lr: PositiveFloat | None = None
    """Peak learning rate of the weights of several encoder layers; null: 0.03."""
    lora_lr: PositiveFloat | None = None
    """Peak learning rate of the LoRA adapters; null: `lr`."""
    embedding_lr: PositiveFloat | None = None
    """Peak learning rate of the language model's embedding tables; null: `lr`."""
    unembedding_lr: PositiveFloat | None = None
    """Peak learning rate of the language model's output head; null: `lr`."""
    scalar_lr: PositiveFloat | None = None
    """Peak learning rate of the language model's scalars, gates, norms, biases; null: `lr`."""
    muon_lr: PositiveFloat | None = None
    """Peak learning rate of Muon for the GPT's matrices; null: they train with AdamW at `lr`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's two moments."""
    weight_decay: NotNegativeFloat = 0.05
    """Weight decay; a step at the peak shrinks a matrix by lr x weight_decay at any own rate."""
    warmup_steps: NotNegative = 100
    """Steps of linear warm-up; the language model's begin after `ctc_only_steps`."""
    final_lr: Share = 0.02
    """Learning rate at the end of the cosine, as a share of the peak."""
    clip: PositiveFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    spike: Annotated[float, Field(gt=1)] | None = 100.0
    """Skip a step whose gradient norm is over this many times the mean; null: never."""
    max_skips: Positive = 5
    """Skipped steps in a row that are allowed; more stop the run."""
    ce_weight: NotNegativeFloat = 1.0
    """Weight of the cross-entropy of the answers."""
    ctc_weight: NotNegativeFloat = 0.0
    """Weight of an auxiliary CTC loss on the soft tokens; 0: off."""
    ctc_only_steps: NotNegative = 0
    """Initial steps that train with CTC alone, without running the language model."""
    kl_weight: NotNegativeFloat = 0.0
    """Weight of the divergence from the language model given the transcript; 0: off."""
    kl_temperature: PositiveFloat = 2.0
    """Temperature of both distributions of that divergence."""
    kl_end_weight: PositiveFloat = 2.0
    """Weight of the token that ends an answer, in that divergence."""
    ema: Rate = 0.0
    """Decay of the averaged weights that are evaluated and saved; 0: off."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.ctc_only_steps and not self.ctc_weight:
            raise ValueError(
                "ctc_only_steps: these steps train by CTC alone; expected a ctc_weight"
            )
        return self


class TrainConfig(Section):
    """Workers, their resources, failures, logging and checkpoints."""

    workers: Workers = 1
    """Number of training workers, or [min, max] to follow the capacity of the cluster."""
    resize_seconds: NotNegativeFloat = 120
    """Seconds without further change before [min, max] workers become more on a growing cluster."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds the whole model; fsdp: parameters and optimizer are sharded."""
    gpus: Share = 0
    """GPUs per worker: 1, or a share beside an encoder."""
    gpu_memory: MemoryShare | None = None
    """Share of its GPU's memory that a worker may allocate; null: no limit."""
    cpus: PositiveFloat = 1
    """Logical CPUs per worker."""
    threads: Positive = 1
    """Torch threads per worker."""
    labels: dict[str, str] = {}
    """Labels of the nodes that may run workers (`ray start --labels`); empty: any node."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of forward and backward passes; parameters stay in fp32."""
    recompute: bool = False
    """Keep only the inputs of layers and recompute the rest: less memory, a third more time."""
    compile: bool = True
    """On a GPU, compile the layers of a GPT that is not sharded; it takes seconds at the start."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failures in a row without a new checkpoint that are retried; -1: no limit."""
    timeout_seconds: PositiveFloat = 600
    """Seconds without progress after which a worker or stage that hangs is restarted."""
    log_every: Positive = 10
    """Steps between two lines of the log."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints to keep, besides the best."""

    @property
    def least(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class EvalConfig(Section):
    """Evaluations on dev during training, and on dev and test at the end."""

    every: Positive = 200
    """Steps between two evaluations."""
    max_utterances: Positive = 1000
    """Utterances of dev, and of test, to use; they are held in the workers' memory."""
    wer_utterances: Positive = 64
    """Utterances of dev that are transcribed at each evaluation; all of dev and test at the end."""
    max_new_tokens: Positive | None = None
    """Most tokens of a decoded answer; null: twice the longest one of training."""
    decode: Literal["auto", "lm", "ctc", "joint"] = "auto"
    """Decoder of what is said: language model, CTC head or both; auto: joint if there is a head."""
    ctc_weight: PositiveFloat = 0.5
    """Weight of CTC's log-probability beside the language model's, in decoding by both."""
    beam: Positive = 1
    """Answers that the language model searches side by side, here and wherever it decodes later."""
    examples: NotNegative = 2
    """Number of transcripts to log at each evaluation."""
    metrics: PlugIns = []
    """Metrics of transcripts of your own (package.module:Class), beside WER and CER."""
    best: Best = "dev_loss"
    """Metric that chooses the best checkpoint; dev_task_metrics.TASK: the figure of a task."""
    patience: Positive | None = None
    """Evaluations without a better `best` after which training stops; null: never."""


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    encoder: EncoderConfig = EncoderConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        encoder, train = self.encoder, self.train
        for name, section in (("encoder", encoder), ("train", train)):
            if section.gpu_memory is not None and not section.gpus:
                raise ValueError(f"{name}.gpu_memory: expected {name}.gpus above 0, or null")
        shares = encoder.gpu_memory or 0.0, train.gpu_memory or 0.0
        for encoders, workers in _sharing(self):
            if encoders * shares[0] + workers * shares[1] > 1 + 1e-9:
                raise ValueError(
                    f"encoder.gpu_memory, train.gpu_memory: {encoders} x {shares[0]:g} and "
                    f"{workers} x {shares[1]:g} on one GPU (encoder.gpus {encoder.gpus:g}, "
                    f"train.gpus {train.gpus:g}); expected at most 1 together"
                )
        return self

    @property
    def run_dir(self) -> StoragePath:
        return as_path(self.run.storage) / self.run.name

    @property
    def cache(self) -> str | None:
        """Absolute path or URI of the feature cache; None where there is none."""
        if self.data.cache is None or "://" in self.data.cache:
            return self.data.cache
        if self.data.cache == "auto":
            return join(self.run.storage, "cache")
        return absolute(self.data.cache)

    @property
    def cache_dir(self) -> StoragePath | None:
        """Folder of measured audio lengths: the cache's, or beside the runs for a cache's URI."""
        if self.cache is None:
            return None
        return as_path(join(self.run.storage, "cache") if "://" in self.cache else self.cache)

    @property
    def locations(self) -> list[str]:
        """Paths and URIs of all corpora, credentials included."""
        corpora = [*self.data.train, *self.data.dev, *self.data.test]
        named = [entry if isinstance(entry, str) else entry.source for entry in corpora]
        return [*named, *self.augment.noise, *self.augment.reverb]

    def to_yaml(self) -> str:
        """Write all settings as YAML without credentials, for run directories and checkpoints."""
        values = redacted(self.model_dump(mode="json"))
        return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    @property
    def with_credentials(self) -> list[str]:
        """Names of settings whose values `to_yaml` does not write as they are."""
        values = self.model_dump(mode="json")
        return [
            f"{section}.{name}"
            for section, fields in values.items()
            for name, value in fields.items()
            if redacted(value) != value
        ]


def _sharing(config: Config) -> Iterator[tuple[int, int]]:
    """Yield the numbers of encoder actors and workers that Ray may place on one GPU."""
    encoder, train = config.encoder, config.train
    actors = encoder.actors if isinstance(encoder.actors, int) else _MANY
    for workers in range(min(train.most, int(1 / train.gpus + 1e-9)) + 1 if train.gpus else 1):
        left = 1 - workers * train.gpus
        fit = int(left / encoder.gpus + 1e-9) if encoder.gpus else 0
        yield min(actors, fit), workers

# SPDX-License-Identifier: Apache-2.0
"""Every setting of a training run, as one frozen dataclass from which the flags and the YAML keys are made."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsek_megatron.errors import UserError
from sparsek_megatron.flags import FlagParser, closest


def _setting(default: Any, text: str, *, kind: Any = None, choices: Sequence[Any] | None = None) -> Any:
    """A field with its `--help` text; `kind` is the type of one value where the default does not show it."""
    metadata = {"help": text, "kind": kind or type(default), "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one run. `--num-layers` sets `num_layers`, and so on; names are Megatron's where it has one."""

    # Model
    num_layers: int = _setting(0, "transformer layers")
    hidden_size: int = _setting(0, "width of the residual stream")
    ffn_hidden_size: int | None = _setting(None, "width of the SwiGLU MLP; default 8/3 of hidden, up to 64", kind=int)
    num_attention_heads: int = _setting(0, "query heads")
    num_query_groups: int | None = _setting(None, "KV heads; default the number of query heads", kind=int)
    kv_channels: int | None = _setting(None, "size of one head; default hidden size / heads", kind=int)
    seq_length: int = _setting(0, "tokens of one training sequence")
    max_position_embeddings: int | None = _setting(None, "longest sequence meant; default --seq-length", kind=int)
    rotary_base: int = _setting(10_000, "base of the rotary embedding")
    norm_epsilon: float = _setting(1e-5, "epsilon of RMSNorm")
    init_method_std: float = _setting(0.02, "standard deviation of the initial weights")
    untie_embeddings_and_output_weights: bool = _setting(False, "separate input and output embeddings")
    make_vocab_size_divisible_by: int = _setting(128, "pad the vocabulary to a multiple of this times TP")

    # SparseK attention
    sparsek_topk: int = _setting(512, "selected keys of a query")
    sparsek_window: int = _setting(512, "local window in tokens")
    sparsek_stride: int = _setting(64, "queries that share a refresh of the selection")
    sparsek_pool: int | None = _setting(None, "candidates that the threshold is solved on; default 4 x topk", kind=int)
    sparsek_gate: str = _setting(
        "key_value", "where the gate multiplies", choices=("key_value", "value", "logit")
    )
    sparsek_hard_selection: bool = _setting(False, "allow pool == topk: gates are 1, the scorer gets no gradient")
    sparsek_initial_slope: float | None = _setting(
        None,
        "what a score falls by against newer keys over all positions, at initialisation; default 1 in topk tokens",
        kind=float,
    )
    sparsek_lr_mult: float = _setting(1.0, "learning-rate multiplier of the scorer's parameters")

    # Parallelism and precision
    tensor_model_parallel_size: int = _setting(1, "ranks that share each layer")
    sequence_parallel: bool = _setting(False, "shard activations along the sequence over the tensor-parallel ranks")
    async_tensor_parallel: bool = _setting(
        False, "gather and reduce in pieces beside the matrix products of --tensor-model-parallel-size (NVLink)"
    )
    pipeline_model_parallel_size: int = _setting(1, "pipeline stages (1 only: DeepSpeed drives this trainer)")
    context_parallel_size: int = _setting(1, "ranks that share each sequence: rank r holds chunks r and 2 CP - 1 - r")
    cp_comm_type: str = _setting(
        "p2p", "what crosses ranks: selected keys and a halo, or heads for tokens", choices=("p2p", "a2a")
    )
    zero_stage: int = _setting(1, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    offload_optimizer: bool = _setting(False, "keep the optimizer's state in host memory and update there (ZeRO 1-3)")
    deepspeed_config: str | None = _setting(
        None, 'JSON file of further DeepSpeed settings; "auto" is filled from this run', kind=str
    )
    bf16: bool | None = _setting(None, "bfloat16 weights; default on GPU, float32 on CPU", kind=bool)
    apply_rope_fusion: bool = _setting(False, "rotary embedding in one kernel: Transformer Engine's, or a compiled one")
    recompute_granularity: str | None = _setting(
        None, "recompute activations in backward", kind=str, choices=("full", "selective")
    )
    recompute_method: str = _setting(
        "uniform", "full recompute of every layer, or of the first --recompute-num-layers alone (block)",
        choices=("uniform", "block"),
    )  # fmt: skip
    recompute_num_layers: int = _setting(1, "layers of one checkpoint (uniform), or layers recomputed (block)")
    cpu_offloading_num_layers: int = _setting(
        0, "layers whose recompute checkpoint waits in pinned CPU memory; needs --recompute-granularity full"
    )
    recompute_inputs: int = _setting(
        0, "of these layers, how many keep no checkpoint: the layer before computes it again, one more forward"
    )
    mlp_tile_tokens: int | None = _setting(
        None, "compute MLPs in tiles of this many tokens, again in backward; default whole", kind=int
    )
    loss_chunk_tokens: int | None = _setting(
        None, "tokens whose logits exist at a time; default 2^28 logits; 0 keeps whole logits", kind=int
    )
    distributed_timeout_minutes: int = _setting(10, "minutes until a stuck collective ends the run")
    hang_timeout_seconds: float = _setting(
        900.0, "seconds without a micro-batch, validation batch or growing checkpoint until a process ends; 0 never"
    )

    # Optimisation
    micro_batch_size: int = _setting(1, "sequences of one forward pass on one data-parallel rank")
    global_batch_size: int | None = _setting(None, "sequences of one step; default micro batch x DP", kind=int)
    train_iters: int = _setting(0, "optimizer steps of the whole run")
    lr: float = _setting(3e-4, "peak learning rate")
    min_lr: float = _setting(0.0, "learning rate that the decay ends at")
    lr_decay_style: str = _setting("cosine", "shape of the decay", choices=("cosine", "linear", "constant"))
    lr_decay_iters: int | None = _setting(None, "step at which the decay ends; default --train-iters", kind=int)
    lr_warmup_iters: int = _setting(0, "steps of linear warm-up")
    weight_decay: float = _setting(0.1, "decoupled weight decay; norms and position slopes have none")
    adam_beta1: float = _setting(0.9, "decay of Adam's first moment")
    adam_beta2: float = _setting(0.95, "decay of Adam's second moment")
    adam_eps: float = _setting(1e-8, "Adam's epsilon")
    clip_grad: float = _setting(1.0, "largest global gradient norm; 0 does not clip")
    max_skipped_steps: int = _setting(10, "steps in a row whose gradient may be non-finite: skipped, then the run ends")
    seed: int = _setting(1234, "seed of the weights and of the data order")

    # Data
    tokenizer_model: str = _setting("", "SentencePiece model that made the data")
    data_path: tuple[str, ...] = _setting((), "dataset prefixes, or pairs of weight and prefix", kind=str)
    split: str = _setting("95,5,0", "train,valid,test parts of --data-path")
    train_data_path: tuple[str, ...] = _setting((), "training prefixes, or pairs of weight and prefix", kind=str)
    valid_data_path: tuple[str, ...] = _setting((), "validation prefixes, or pairs of weight and prefix", kind=str)
    data_cache_path: str | None = _setting(None, "folder of the index cache; default inside --save", kind=str)
    num_workers: int = _setting(0, "processes that load data on each rank")

    # Validation, logging, checkpoints
    eval_interval: int = _setting(100, "steps between validations")
    eval_iters: int = _setting(
        10,
        "global batches of one validation, the same ones each time; 0 for none, which needs no validation data "
        "(the valid part of --split does not train all the same)",
    )
    log_interval: int = _setting(10, "steps between log lines, and between looks at the selection")
    peak_tflops: float | None = _setting(
        None, "bfloat16 peak of one GPU for MFU; default from its name, where known", kind=float
    )
    save: str = _setting("", "folder for checkpoints, TensorBoard and the loss curve")
    load: str | None = _setting(None, "folder to resume from; the --save folder may still be empty", kind=str)
    save_interval: int = _setting(1000, "steps between checkpoints")
    exit_interval: int | None = _setting(None, "save and exit at steps divisible by this", kind=int)
    keep_last_n: int = _setting(3, "checkpoints to keep; 0 keeps all")
    checkpoint_read_back: bool = _setting(
        True, "read a checkpoint's files back from the disk before it counts; without, a save takes half as long there"
    )

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks among `world_size` processes."""
        return world_size // (self.tensor_model_parallel_size * self.context_parallel_size)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """`vocab_size` rounded up so that every tensor-parallel rank's shard has the same, aligned size."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-vocab_size // multiple) * multiple

    @property
    def query_groups(self) -> int:
        """KV heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """Width of the MLP: as given, or 8/3 of the hidden size rounded up to a multiple of 64."""
        return self.ffn_hidden_size or -(-8 * self.hidden_size // (3 * 64)) * 64


FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}


def flag_of(name: str) -> str:
    """`num_layers` -> `--num-layers`."""
    return "--" + name.replace("_", "-")


def build_parser() -> FlagParser:
    """A flag for each field of `TrainingConfig`, and the flags of the launch itself."""
    parser = FlagParser(description="Pretrain a GPT with SparseK attention.", argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="YAML", help="settings by flag name; flags on the command line win")
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N",
        help="start N processes on this machine through torchrun; leave out where torchrun starts this program",
    )  # fmt: skip
    for name, field in FIELDS.items():
        kind, choices = field.metadata["kind"], field.metadata["choices"]
        options: dict[str, Any] = {"help": field.metadata["help"], "dest": name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": choices}
            if isinstance(field.default, tuple):
                options["nargs"] = "+"
        parser.add_argument(flag_of(name), **options)
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[TrainingConfig, int | None]:
    """(settings, --nproc-per-node) of a command line: defaults, then the YAML file, then flags.

    Raises:
        UserError: unknown flag or key (the closest is suggested), a value of the wrong type, a missing setting.
    """
    flags = vars(build_parser().parse_args(argv))
    processes = flags.pop("nproc_per_node", None)
    path = flags.pop("config", None)
    settings = (_read_yaml(path) if path else {}) | flags
    for name in ("data_path", "train_data_path", "valid_data_path"):
        if name in settings:
            settings[name] = tuple(settings[name])
    config = TrainingConfig(**settings)
    for name in (
        "num_layers", "hidden_size", "num_attention_heads", "seq_length", "train_iters", "tokenizer_model", "save"
    ):  # fmt: skip
        if not getattr(config, name):
            raise UserError(f"{flag_of(name)} is missing; give it on the command line or in the --config file")
    return config, processes


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"--config {path}: cannot be read ({err}); check the path") from None
    except yaml.YAMLError as err:
        raise UserError(f"--config {path}: not valid YAML ({err}); mend the file") from None
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: must be a mapping of flag names to values")
    settings = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            known = [n.replace("_", "-") for n in FIELDS]
            raise UserError(f"--config {path}: unknown key {key!r}; {closest(str(key).replace('_', '-'), known)}")
        if value is not None:
            settings[name] = _typed(path, str(key), value, FIELDS[name])
    return settings


def _typed(path: str, key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    kind, choices = field.metadata["kind"], field.metadata["choices"]
    where = f"--config {path}: {key}: {value!r}"
    if isinstance(field.default, tuple):
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false")
        return value
    try:
        # From text, as a flag would be: YAML reads 1e-3 as a string and 512 as an integer.
        typed = kind(str(value))
    except ValueError:
        raise UserError(f"{where} is not {'an integer' if kind is int else 'a number'}") from None
    if choices and typed not in choices:
        raise UserError(f"{where} must be one of {', '.join(map(str, choices))}")
    return typed

"""Build a model that no rank holds whole: without data, then split, then filled row by row.

Weights are those that one rank would start from, bit for bit. Initial values are drawn on every
rank tensor by tensor, of which each keeps its rows; of a published language model, each rank reads
its rows from the files. Where transformers makes the weights from those of the files, rank 0 loads
them whole, and sends them to the others tensor by tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from omni.config import Config
from omni.model.lm.hf import ALLOWED_BF16, HFLanguageModel
from omni.model.lm.lm_rows import NotByRows, plain_name
from omni.model.lm.lora import is_adapter
from omni.model.lm.pretrained import empty_lm, lm_rows, load_lm
from omni.model.precision import compute_dtype
from omni.model.shards import allocate, copy_, parameters_on_meta, set_rows
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.train.distributed import broadcast, is_first_rank
from omni.train.lockstep import in_step, whole_root


def build_sharded(
    config: Config,
    shape: OmniConfig,
    device: torch.device,
    world: int,
    frozen: torch.dtype | None,
    resuming: bool,
) -> OmniModel:
    """Build the model of this rank, with initial or published weights. A collective call.

    frozen: dtype of a published language model that is not trained; None: fp32. resuming: leave
    weights that a checkpoint holds without values. Raises SourceError.
    """
    seed = config.run.seed
    with parameters_on_meta():
        lm = None if shape.source is None else empty_lm(shape, frozen)
        model = OmniModel(shape, lm, seed)
    model.train_parts(config.model.train)
    wanted = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    dtype = compute_dtype(wanted, device)
    _split(model, device, world, dtype)
    allocate(model, device)
    if not resuming:
        model.init_weights(seed)
    if shape.source is not None:
        _read_published(model, frozen, resuming)
        # A checkpoint brings the size, and weights that have no values yet.
        if isinstance(model.lm, HFLanguageModel) and not resuming:
            _measure(model, model.lm, dtype)
    return model


def _split(model: OmniModel, device: torch.device, world: int, dtype: torch.dtype) -> None:
    """Split the model over the ranks.

    Layers compute in weights that are gathered in the dtype of autocast: it would otherwise keep a
    copy of every layer until the end of a step. Their inputs stay as they are, so that the residual
    stream has the dtype that it has without sharding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype != torch.float32:
        policy = replace(policy, param_dtype=dtype, reduce_dtype=torch.float32)
    for part in model.lm.shards():
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def _read_published(model: OmniModel, frozen: torch.dtype | None, resuming: bool) -> None:
    """Fill the language model with its published weights, but those that a checkpoint brings."""
    wanted = {
        name: parameter
        for name, parameter in model.lm.named_parameters()
        if not is_adapter(name) and not (resuming and not model.kept_by_reference(f"lm.{name}"))
    }
    try:
        rows = lm_rows(model.config, model.lm)
    except NotByRows:
        _receive(model, wanted, frozen)
        return
    for name, parameter in wanted.items():
        set_rows(parameter, functools.partial(rows.read, name))


def _receive(model: OmniModel, wanted: Mapping[str, Tensor], frozen: torch.dtype | None) -> None:
    """Let rank 0 load the published language model, and send it tensor by tensor."""
    whole = load_lm(model.config, frozen) if is_first_rank() else None
    tensors = None if whole is None else dict(whole.named_parameters())
    for name, parameter in wanted.items():
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        if tensors is not None:
            values.copy_(tensors[plain_name(name)].detach())
        copy_(parameter, broadcast(values.to(parameter.device)))


@torch.no_grad()
def _measure(model: OmniModel, lm: HFLanguageModel, dtype: torch.dtype) -> None:
    """Check the head, and set the size of soft tokens, as for a language model that is whole.

    dtype: that of the gathered layers.
    """
    lm.eval()  # As transformers loads it.
    rounded = dtype == torch.bfloat16
    autocast = torch.autocast(lm.device.type, dtype, enabled=rounded)
    with whole_root(model), in_step(model), autocast:
        size = lm.embedding_size()
        lm.check_head(ALLOWED_BF16 if rounded else None)
    assert model.soft_size is not None
    model.soft_size.fill_(size)

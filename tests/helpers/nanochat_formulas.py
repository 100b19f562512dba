"""nanochat's forward pass written out position by position in fp64: a second referee.

It shares nothing with omni's GPT but the names of the parameters. test_nanochat.py first holds it
against logits that nanochat itself computed, and then judges other shapes by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omni.model.lm.gpt_block import GPTConfig

Weights = dict[str, Tensor]


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def turn(x_D: Tensor, position: int) -> Tensor:
    """Rotary embedding of one vector."""
    half = len(x_D) // 2
    out = x_D.clone()
    for j in range(half):
        angle = position * 100_000.0 ** (-2 * j / len(x_D))
        a, b = x_D[j], x_D[j + half]
        out[j] = a * math.cos(angle) + b * math.sin(angle)
        out[j + half] = b * math.cos(angle) - a * math.sin(angle)
    return out


def windows(config: GPTConfig) -> list[int]:
    """Positions to the left that each layer sees."""
    short = math.ceil(config.sequence_len / 4 / 128) * 128
    letters = (config.window_pattern * config.n_layer)[: config.n_layer - 1] + "L"
    return [short if letter == "S" else config.sequence_len for letter in letters]


def logits_of(config: GPTConfig, weights: Weights, ids: list[int]) -> Tensor:
    """(T, V) logits of one sequence."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    embedded = [rms(w["transformer.wte.weight"][i]) for i in ids]
    xs = [embedded[0]]
    for before, x in zip(embedded, embedded[1:], strict=False):
        gate = torch.sigmoid(w["smear_gate.weight"] @ x[:24])
        xs.append(x + w["smear_lambda"] * gate * before)
    x0 = torch.stack(xs)
    x, middle = x0, x0
    for layer, window in enumerate(windows(config)):
        x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
        x = x + _attention(config, w, layer, window, rms(x), ids)
        hidden = torch.relu(rms(x) @ w[f"transformer.h.{layer}.mlp.c_fc.weight"].T) ** 2
        x = x + hidden @ w[f"transformer.h.{layer}.mlp.c_proj.weight"].T
        if layer == config.n_layer // 2:
            middle = x
    x = rms(x - w["backout_lambda"] * middle)
    raw = (x @ w["lm_head.weight"].T)[:, : config.vocab_size]
    return 15 * torch.tanh(raw / 15)


def _attention(
    config: GPTConfig, w: Weights, layer: int, window: int, x: Tensor, ids: list[int]
) -> Tensor:
    name = f"transformer.h.{layer}.attn"
    heads, groups, width = config.n_head, config.n_kv_head, config.n_embd // config.n_head
    q = (x @ w[f"{name}.c_q.weight"].T).view(-1, heads, width)
    k = (x @ w[f"{name}.c_k.weight"].T).view(-1, groups, width)
    v = (x @ w[f"{name}.c_v.weight"].T).view(-1, groups, width)
    if f"value_embeds.{layer}.weight" in w:
        extra = w[f"value_embeds.{layer}.weight"][ids].view(-1, groups, width)
        gate = 3 * torch.sigmoid(x[:, :12] @ w[f"{name}.ve_gate.weight"].T)
        v = v + gate[..., None] * extra
    out = torch.zeros(len(ids), heads, width, dtype=torch.float64)
    for h in range(heads):
        g = h * groups // heads
        keys = torch.stack([1.2 * rms(turn(k[t, g], t)) for t in range(len(ids))])
        for t in range(len(ids)):
            first = max(0, t - window)
            query = 1.2 * rms(turn(q[t, h], t))
            scores = keys[first : t + 1] @ query / math.sqrt(width)
            out[t, h] = scores.softmax(0) @ v[first : t + 1, g]
    return out.flatten(1) @ w[f"{name}.c_proj.weight"].T

"""Continuous batching: prompts are continued side by side, and the place of an answer that has
ended is taken by the next prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from omni.model.chat_template import AUDIO
from omni.model.lm.beam import Beam
from omni.model.lm.gpt import GPT
from omni.model.lm.hf import HFLanguageModel
from omni.model.lm.kv_cache import KVCache
from omni.model.lm.prompts import EmbeddedPrompt, embed_prompt
from omni.model.lm.sampling import GREEDY, Sampling, choose
from omni.model.packed_attention import SegmentLayout
from omni.model.speech_lm import OmniModel

SLOTS = 32
"""Answers that are written side by side."""
_REFILL = 4
"""Free places that are worth a call for the prompts alone, while more prompts wait than fit."""


@dataclass(frozen=True)
class Answer:
    """Token ids that were generated, without the end token."""

    ids: list[int]
    cut: bool
    """True where the limit came before the end."""
    log_prob: float | None = field(default=None, compare=False)
    """Log-probability of these tokens, and of the end where it was reached, in nats."""


@dataclass(frozen=True)
class Continued:
    """Keep keys, values and hidden states of a prompt and an answer, to score other answers."""

    prompt: EmbeddedPrompt
    ids: list[int]
    """Tokens after the prompt."""
    keys: list[Tensor]
    """Of each layer, (G, P, D) of the prompt and these tokens."""
    values: list[Tensor]
    hidden_SC: Tensor
    """Final hidden states of the prompt's last position and of each of the tokens."""


@dataclass(frozen=True)
class Finished:
    """An answer, by the key of its prompt. held: None unless the generator keeps it."""

    key: int
    prompt: EmbeddedPrompt
    answer: Answer
    held: Continued | None
    others: Sequence[Answer] = ()
    """Answers of a beam search that ended and are not the best one."""


@dataclass
class _Row:
    """A prompt that is being continued, or waits for it."""

    key: int
    prompt: EmbeddedPrompt
    limit: int
    sampling: Sampling
    draws: np.random.Generator
    ids: list[int] = field(default_factory=list)
    log_prob: float = 0.0
    hidden: list[Tensor] = field(default_factory=list)
    beam: Beam | None = None

    @property
    def length(self) -> int:
        """Positions that the cache holds of it: the last token is yet to be read."""
        written = self.ids if self.beam is None else self.beam.steps
        return len(self.prompt.x_TC) + max(0, len(written) - 1)


class Generator:
    """Continue prompts that are added at any time.

    end: the token that ends an answer. slots: answers written side by side. beam: hypotheses of
    each answer, see `omni.model.lm.beam`. keep: return what the language model holds of each
    finished answer.
    """

    def __init__(
        self,
        lm: GPT | HFLanguageModel,
        end: int,
        *,
        slots: int = SLOTS,
        beam: int = 1,
        keep: bool = False,
    ) -> None:
        self._lm, self._end, self._keep, self._beam = lm, end, keep, beam
        self._slots = max(1, slots // beam)
        self._waiting: list[_Row] = []
        self._rows: list[_Row | None] = []
        """By slot; None: free. With beams, a row has `beam` places in the cache."""
        self._cache = KVCache(0)
        self._tokens_B: Tensor | None = None
        """Last token of each place in the cache."""
        positions = lm.learnt_positions() if isinstance(lm, HFLanguageModel) else None
        self._positions = float("inf") if positions is None else positions

    def add(
        self,
        key: int,
        prompt: EmbeddedPrompt,
        limit: int,
        sampling: Sampling = GREEDY,
        draw: int | None = None,
    ) -> None:
        """Add a prompt, whose answer has at most `limit` tokens, its end included.

        key: any number of the caller's. The limit is lower where the model has learnt a vector for
        each position, and has no more of them. draw: number that the draws depend on beside the
        seed; None: the key. Raises ValueError where a beam is to draw.
        """
        if self._beam > 1 and sampling.draws_tokens:
            raise ValueError("expected a beam, or a temperature, not both")
        limit = int(max(1, min(limit, self._positions - len(prompt.x_TC))))
        draws = sampling.draws(key if draw is None else draw)
        self._waiting.append(_Row(key, prompt, limit, sampling, draws))

    @property
    def waiting(self) -> int:
        """Prompts that have no place yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Answers that are being written."""
        return sum(row is not None for row in self._rows)

    def written(self, key: int) -> Sequence[int]:
        """Return the tokens of an answer so far; with a beam, or before it is begun, none."""
        return next((row.ids for row in self._rows if row is not None and row.key == key), ())

    @property
    def slots(self) -> int:
        return self._slots

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Write one token of each answer; return those that ended.

        The host waits for the device once.
        """
        found = self._fill() if self._wants_filling() else []
        if not self.active:
            return found
        assert self._tokens_B is not None
        step = self._tokens_B[:, None]
        layout = SegmentLayout.plain(
            (self._cache.batch, 1), self._tokens_B.device, self._cache.lengths_B
        )
        hidden = self._lm.trunk(self._lm.embed(step), step, layout, None, self._cache)[:, 0]
        return found + self._write(hidden)

    def _wants_filling(self) -> bool:
        free = self._slots - self.active
        return bool(self._waiting and free) and (
            not self.active or free >= min(_REFILL, len(self._waiting))
        )

    def _fill(self) -> list[Finished]:
        """Read the prompts that take the free places; returns answers of one token."""
        places = [place for place, row in enumerate(self._rows) if row is None]
        while len(self._rows) < self._slots and len(places) < len(self._waiting):
            places.append(len(self._rows))
            self._rows.append(None)
        chosen = self._next_prompts(len(places))
        prompts = [row.prompt for row in chosen]
        x = torch.nn.utils.rnn.pad_sequence([p.x_TC for p in prompts], batch_first=True)
        ids_BT = torch.nn.utils.rnn.pad_sequence([p.ids_T for p in prompts], batch_first=True)
        lengths = torch.tensor([len(p.x_TC) for p in prompts], device=x.device)
        layout = SegmentLayout.plain((len(prompts), x.shape[1]), x.device, lengths_B=lengths)
        cache = KVCache(len(prompts))
        hidden = layout.last(self._lm.trunk(x, ids_BT.clamp(min=0), layout, ids_BT != AUDIO, cache))
        places = places[: len(chosen)]
        for place, row in zip(places, chosen, strict=True):
            self._rows[place] = row
        if self._beam > 1:
            cache.take(torch.arange(len(chosen), device=x.device).repeat_interleave(self._beam))
            hidden = hidden.repeat_interleave(self._beam, 0)
        self._take_in(places, cache)
        tokens = self._tokens_B
        if tokens is None or len(tokens) < self._cache.batch:
            more = torch.zeros(self._cache.batch, dtype=torch.long, device=x.device)
            if tokens is not None:
                more[: len(tokens)] = tokens
            self._tokens_B = more
        return self._write(hidden, places)

    def _next_prompts(self, most: int) -> list[_Row]:
        """Take the prompt that waits longest, and others of similar length: padding costs time."""
        first = self._waiting[0]
        order = sorted(self._waiting, key=lambda row: len(row.prompt.x_TC))
        at = next(n for n, row in enumerate(order) if row is first)
        begin = max(0, min(at, len(order) - most))
        chosen = order[begin : begin + most]
        taken = {id(row) for row in chosen}
        self._waiting = [row for row in self._waiting if id(row) not in taken]
        return chosen

    def _take_in(self, places: Sequence[int], cache: KVCache) -> None:
        """Put the keys and values of prompts into the places."""
        wide = len(self._rows) * self._beam
        if not self._cache.batch and len(places) == len(self._rows):
            self._cache = cache
            return
        if self._cache.batch < wide:
            self._cache.widen(wide)
        self._cache.put(self._in_cache(places), cache)

    def _in_cache(self, places: Sequence[int]) -> Tensor:
        every = [place * self._beam + n for place in places for n in range(self._beam)]
        return torch.tensor(every, device=next(self._lm.parameters()).device)

    def _write(self, hidden_BC: Tensor, places: Sequence[int] | None = None) -> list[Finished]:
        """Choose the next token of rows, all of them or those in `places`; take out what ended."""
        at = range(len(self._rows)) if places is None else places
        rows = [self._rows[place] for place in at]
        logits = self._lm.logits(hidden_BC)
        if self._beam > 1:
            finished = self._extend_beams(rows, at, logits, hidden_BC)
        else:
            finished = self._extend(rows, at, logits, hidden_BC)
        for place, done in zip(at, finished, strict=True):
            if done is not None:
                self._rows[place] = None
        ended = [done for done in finished if done is not None]
        if ended or places is not None:
            self._compact()
            device = hidden_BC.device
            lengths = [0 if row is None else row.length for row in self._rows]
            if lengths:
                wide = [n for n in lengths for _ in range(self._beam)]
                self._cache.set_lengths(wide, device)
        return ended

    def _extend(
        self,
        rows: Sequence[_Row | None],
        at: Sequence[int],
        logits_BV: Tensor,
        hidden_BC: Tensor,
    ) -> list[Finished | None]:
        """Add a token to each row."""
        samplings = [GREEDY if row is None else row.sampling for row in rows]
        draws = [None if row is None else row.draws for row in rows]
        tokens, log_probs = choose(logits_BV, samplings, draws)
        assert self._tokens_B is not None
        if len(at) == len(self._tokens_B):
            self._tokens_B = tokens
        else:
            self._tokens_B = self._tokens_B.index_copy(0, self._in_cache(at), tokens)
        # Both in one tensor: the host waits for the device once.
        both = torch.stack((tokens.double(), log_probs.double())).tolist()
        finished: list[Finished | None] = []
        for n, (row, token, log_prob) in enumerate(zip(rows, *both, strict=True)):
            if row is None:
                finished.append(None)
                continue
            if self._keep:
                row.hidden.append(hidden_BC[n])
            row.log_prob += log_prob
            ended = int(token) == self._end
            if not ended:
                row.ids.append(int(token))
            if ended or len(row.ids) >= row.limit:
                answer = Answer(row.ids, not ended, row.log_prob)
                finished.append(self._finished(row, at[n], answer, row.ids))
            else:
                finished.append(None)
        return finished

    def _extend_beams(
        self,
        rows: Sequence[_Row | None],
        at: Sequence[int],
        logits_BV: Tensor,
        hidden_BC: Tensor,
    ) -> list[Finished | None]:
        """Extend the hypotheses of each row, and let the places in the cache follow them."""
        for n, row in enumerate(rows):
            if row is not None and row.beam is None:
                row.beam = Beam(self._beam, self._end, row.limit)
                if self._keep:
                    row.hidden.append(hidden_BC[n * self._beam])
        beams = [None if row is None else row.beam for row in rows]
        chosen = Beam.extend(beams, logits_BV.log_softmax(-1), self._beam)
        sources = list(range(self._cache.batch))
        assert self._tokens_B is not None
        tokens = self._tokens_B.tolist()
        finished: list[Finished | None] = []
        for n, (row, step) in enumerate(zip(rows, chosen, strict=True)):
            if row is None or step is None:
                finished.append(None)
                continue
            base = at[n] * self._beam
            for place, (parent, token) in enumerate(step):
                sources[base + place], tokens[base + place] = base + parent, token
            assert row.beam is not None
            hypotheses = row.beam.ended()
            done = None
            if hypotheses:
                found, *others = (Answer(h.ids, h.cut, h.log_prob) for h in hypotheses)
                done = replace(self._finished(row, at[n], found, []), others=others)
            finished.append(done)
        device = self._tokens_B.device
        if sources != list(range(len(sources))):
            self._cache.take(torch.tensor(sources, device=device))
        self._tokens_B = torch.tensor(tokens, device=device)
        return finished

    def _finished(self, row: _Row, place: int, answer: Answer, ids: list[int]) -> Finished:
        """ids: tokens of the answer whose hidden states were kept, but perhaps for the last one."""
        held = None
        if self._keep:
            read = ids[: len(row.hidden) - 1]
            positions = len(row.prompt.x_TC) + len(read)
            keys, values = self._cache.row(place * self._beam, positions)
            held = Continued(row.prompt, read, keys, values, torch.stack(row.hidden))
        return Finished(row.key, row.prompt, answer, held)

    def _compact(self) -> None:
        """Give up free places when nobody waits for them and half of them are free."""
        if self._waiting or not self._rows or 2 * self.active > len(self._rows):
            return
        kept = [place for place, row in enumerate(self._rows) if row is not None]
        self._rows = [self._rows[place] for place in kept]
        if not kept:
            self._cache, self._tokens_B = KVCache(0), None
            return
        chosen = self._in_cache(kept)
        self._cache.take(chosen)
        assert self._tokens_B is not None
        self._tokens_B = self._tokens_B.index_select(0, chosen)


def generate(
    model: OmniModel,
    prompts: Sequence[Sequence[int]],
    features: Sequence[Sequence[Tensor]],
    *,
    end: int,
    max_new_tokens: int | None = None,
) -> list[Answer]:
    """Generate the answer to each prompt greedily.

    prompts: ids, with AUDIO for each recording. features: for each prompt, one (T, d) tensor at
    50 frames/s per recording. max_new_tokens: most tokens of an answer, its end token included, so
    that a model that loops is stopped; None: `EmbeddedPrompt.usual_limit`.
    """
    with torch.inference_mode():
        embedded = [
            embed_prompt(model, prompt, recordings)
            for prompt, recordings in zip(prompts, features, strict=True)
        ]
    limits = [max_new_tokens or prompt.usual_limit for prompt in embedded]
    found = continue_prompts(model.lm, embedded, end, limits)
    if max_new_tokens is not None:
        return [finished.answer for finished in found]
    return [within(f.answer, limit) for f, limit in zip(found, limits, strict=True)]


def within(answer: Answer, limit: int) -> Answer:
    """Leave out the last token of an answer of `EmbeddedPrompt.usual_limit`, which only tells
    whether it ended there."""
    return replace(answer, ids=answer.ids[: limit - 1])


def continue_prompts(
    lm: GPT | HFLanguageModel,
    prompts: Sequence[EmbeddedPrompt],
    end: int,
    limits: Iterable[int],
    *,
    slots: int = SLOTS,
    beam: int = 1,
    keep: bool = False,
) -> list[Finished]:
    """Write the answers to prompts, in their order; see `Generator`."""
    generator = Generator(lm, end, slots=slots, beam=beam, keep=keep)
    for key, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        generator.add(key, prompt, limit)
    found: list[Finished] = []
    while generator.active or generator.waiting:
        found += generator.step()
    return sorted(found, key=lambda finished: finished.key)

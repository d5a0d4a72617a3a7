"""A device whose rows say what they were computed from, and which checks every row that it reads.

A row holds its token, its position, and a hash over all tokens up to it and the expert reduction; the next
token is a hash of that, the seed and the position. So a row that is lost, stale, shifted or another's is
found when it is read, by whoever reads it, and no rounding hides it.
"""

import collections
import dataclasses

import numpy as np

from mla_jax import steps
from mla_jax.completion import Logprobs

DEAD = np.uint64(0xDEAD_DEAD_DEAD_DEAD)  # what a slot without a row holds
TOKEN, POSITION, CHAIN = range(3)
_ODD = np.uint64(0x9E37_79B9_7F4A_7C15)


class CanaryError(AssertionError):
    """A row that was read is not what its reader wrote there."""


def mix(values) -> np.ndarray:
    """Returns a hash of each of some integers: the last steps of splitmix64."""
    values = np.asarray(values).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))


def number(reduction) -> np.uint64:
    """Returns where the chain of an expert reduction begins."""
    return np.uint64(hash(reduction) & 0xFFFF_FFFF)


def rows_of(tokens, reduction, start=0, before=None) -> np.ndarray:
    """Returns the rows u64[T, 3] of `tokens` from position `start` on, after the chain value `before`."""
    tokens = np.asarray(tokens, np.uint64)
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    links = mix((tokens + np.uint64(1)) * _ODD + mix(positions))
    begin = mix([number(reduction)]) if before is None else np.asarray([before])
    chain = begin + np.cumsum(links, dtype=np.uint64)
    return np.stack([tokens, positions, chain], axis=-1)


def next_token(chain, seed, position, vocab_size) -> int:
    """Returns what the model draws at `position`, after tokens whose chain is `chain`."""
    value = mix(mix([chain]) + mix([seed]) * _ODD + np.uint64(position))[0]
    return int(value % np.uint64(vocab_size))


def lone_text(prompt, count, *, seed, reduction, vocab_size, bias=(), ends=frozenset()) -> list[int]:
    """Returns what a request draws that is alone in the world."""
    tokens = list(prompt)
    for _ in range(count):
        chain = rows_of(tokens, reduction)[-1, CHAIN]
        tokens.append(_drawn(chain, seed, len(tokens), vocab_size, bias))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


class CanaryDevice:
    """As `mla_jax.serve.device.Device`, in NumPy.

    Attributes:
      pool: u64[Z, G, 3] rows, a part of it for each group.
      is_sound: False once a fault took the rows along.
      calls: how often each phase was entered.
      faults: (phase, which call of it from now on, error, whether the rows go with it), once each.
      infinite: seeds of requests whose logits are not finite, by the position from which on.
      written: (page, place) of every row written since it was last cleared.
      log: what was decoded, as the seeds of each batch.
    """

    def __init__(
        self,
        *,
        num_pages,
        page_size=4,
        widths=(8,),
        max_rows=4,
        vocab_size=320,
        eog_ids=frozenset(),
        num_groups=1,
    ):
        self.num_pages, self.page_size, self.vocab_size = num_pages, page_size, vocab_size
        self.num_groups = num_groups
        self.widths, self.batches, self.num_compiled = widths, (1, max_rows), 0
        self.calls, self.faults, self.infinite = collections.Counter(), [], {}
        self.written, self.log, self._eog_ids = set(), [], eog_ids
        self.before_step = lambda: None
        self.reset()

    def reset(self):
        self.pool = np.full((self.num_pages, self.page_size, 3), DEAD, np.uint64)
        self.is_sound = True

    def programs(self):
        return [("nothing", lambda: None)]

    def prefill(self, parts, width):
        self._enter("prefill")
        self._check_groups(parts, 1)
        for part in parts:
            if not 0 < len(part.tokens) <= width or width not in self.widths:
                raise CanaryError(f"{len(part.tokens)} tokens in a piece of {width}")
            before = self._attend(part.pages, part.start, part.reduction)
            self._write(part.pages, part.start, rows_of(part.tokens, part.reduction, part.start, before))

    def decode(self, rows, num_steps):
        self._enter("decode")
        self.log.append([row.sampling.seed for row in rows])
        self._check_groups(rows, self.batches[-1])
        texts, drawn = [list(row.tokens) for row in rows], [[] for _ in rows]
        ended = set()
        for _ in range(num_steps):
            for i, row in enumerate(rows):
                room = len(row.pages) * self.page_size
                token = self._step(row, texts[i]) if len(texts[i]) <= room else 0
                texts[i].append(max(token, 0))
                drawn[i].append(token)
                ended |= {i} if token in self._eog_ids else set()
            if len(ended) == len(rows):
                break
        return drawn

    def draw(self, rows):
        self._enter("draw")
        self.log.append([row.sampling.seed for row in rows])
        self._check_groups(rows, self.batches[-1])
        drawn = []
        for row in rows:
            token = self._step(row, row.tokens)
            told = None
            if row.num_logprobs is not None:
                told = Logprobs(chosen=-1.0, top=tuple((i, -2.0 - i) for i in range(row.num_logprobs)))
            drawn.append((token, told))
        return drawn

    def copy(self, pairs):
        if pairs:
            self._enter("copy")
            sources, targets = (np.asarray(part) for part in zip(*pairs, strict=True))
            self.pool[targets] = self.pool[sources]
            self.written |= {(page, place) for page in targets.tolist() for place in range(self.page_size)}

    def take(self, pages):
        self._enter("take")
        return self.pool[list(pages)].copy()

    def put(self, pages, layers):
        self._enter("put")
        for page, rows in zip(pages, layers, strict=False):
            self.pool[page] = rows
            self.written |= {(page, place) for place in range(self.page_size)}

    def save(self, path, tokens, layers, expert_reduction):
        rows = layers.reshape(-1, 3)[: len(tokens)]
        np.savez(path, tokens=np.asarray(tokens, np.int64), rows=rows, about=expert_reduction)
        return rows.nbytes

    def load(self, path, expert_reduction):
        file = np.load(path)
        if str(file["about"]) != expert_reduction:
            raise ValueError(f"{path} must be of {expert_reduction}, got {file['about']}.")
        tokens = file["tokens"].tolist()
        whole = np.full((-(-len(tokens) // self.page_size) * self.page_size, 3), DEAD, np.uint64)
        whole[: len(tokens)] = file["rows"]
        return whole.reshape(-1, self.page_size, 3), tokens

    def _check_groups(self, parts, most):
        """Checks that each is on pages of one group, in the order of groups, and how many a group has."""
        size = self.num_pages // self.num_groups
        groups = [{page // size for page in part.pages} for part in parts]
        if any(len(found) != 1 for found in groups):
            raise CanaryError(f"pages of the groups {groups}")
        found = [group for (group,) in groups]
        if found != sorted(found) or max(collections.Counter(found).values()) > most:
            raise CanaryError(f"a call for the groups {found}, of at most {most} each")

    def _enter(self, phase):
        if not self.is_sound:
            raise RuntimeError("the rows are gone")
        self.calls[phase] += 1
        for fault in list(self.faults):
            if fault.phase == phase:
                fault.countdown -= 1
                if fault.countdown < 0:
                    self.faults.remove(fault)
                    self.is_sound = not fault.loses_rows
                    raise fault.error

    def _step(self, row, tokens):
        """Writes the row of the newest token, and returns the next one."""
        start = len(tokens) - 1
        before = self._attend(row.pages, start, row.reduction, tokens[:-1])
        new = rows_of(tokens[-1:], row.reduction, start, before)
        self._write(row.pages, start, new)
        if len(tokens) >= self.infinite.get(row.sampling.seed, len(tokens) + 1):
            return steps.NOT_FINITE
        allowed = row.allowed
        return _drawn(new[0, CHAIN], row.sampling.seed, len(tokens), self.vocab_size, row.bias, allowed)

    def _attend(self, pages, length, reduction, tokens=None):
        """Checks the first `length` rows, and returns their chain."""
        places = np.arange(length)
        if length > len(pages) * self.page_size:
            raise CanaryError(f"{length} rows on {len(pages)} pages")
        found = self.pool[np.asarray(pages, np.int64)[places // self.page_size], places % self.page_size]
        wanted = rows_of(found[:, TOKEN] if tokens is None else tokens, reduction)
        if not np.array_equal(found, wanted):
            place = int(np.argmax((found != wanted).any(axis=-1)))
            raise CanaryError(f"row {place} of {length} is {found[place]}, must be {wanted[place]}")
        return found[-1, CHAIN] if length else None

    def _write(self, pages, start, rows):
        for slot, row in enumerate(rows, start):
            page, place = pages[slot // self.page_size], slot % self.page_size
            self.pool[page, place] = row
            self.written.add((page, place))


@dataclasses.dataclass
class Fault:
    """What goes wrong, and when."""

    phase: str
    countdown: int
    error: Exception
    loses_rows: bool = False


def live_rows(scheduler, first_page=0) -> set[tuple[int, int]]:
    """Returns (page, place) of every row that somebody may yet read."""
    table, size, live = scheduler.table, scheduler.table.page_size, set()

    def add(pages, count):
        live.update((first_page + pages[slot // size], slot % size) for slot in range(count))

    for job in scheduler.running:
        add(table.pages(job.pages), job.num_rows)
    for slot in scheduler.slots:
        if slot.kept:
            add(table.pages(slot.kept.pages), len(slot.kept.tokens))
    for page in scheduler.prefix._pages.values():
        add([page], size)
    return live


def kill_the_rest(device, schedulers) -> None:
    """Poisons every slot that nobody may read, of one group after the other."""
    dead = np.ones(device.pool.shape[:2], bool)
    for group, scheduler in enumerate(schedulers):
        for page, place in live_rows(scheduler, group * scheduler.table.num_pages):
            dead[page, place] = False
    device.pool[dead] = DEAD


def check_pages(scheduler) -> None:
    """Checks that every page has as many owners as there are who have it, and is free if nobody has."""
    table, owners = scheduler.table, collections.Counter(scheduler.prefix._pages.values())
    assert all(count == 1 for count in owners.values())
    names = [job.pages for job in scheduler.running]
    names += [slot.kept.pages for slot in scheduler.slots if slot.kept]
    assert sorted(names) == sorted(table._sequences) and len(set(names)) == len(names)
    for name in names:
        pages = table.pages(name)
        assert len(set(pages)) == len(pages) == table.pages_for(table.length(name))
        owners.update(pages)
    assert [owners[page] for page in range(table.num_pages)] == table._owners
    free = table._free
    assert len(set(free)) == len(free) and set(free) == set(range(table.num_pages)) - set(owners)


def _drawn(chain, seed, position, vocab_size, bias, allowed=None):
    """Draws a token, or the one that a bias of 100 or more asks for, or the next that is allowed."""
    token = next_token(chain, seed, position, vocab_size)
    token = next((other for other, value in bias if value >= 100), token)
    while allowed is not None and not (int(allowed[token // 32]) >> (token % 32)) & 1:
        token = (token + 1) % vocab_size
    return token

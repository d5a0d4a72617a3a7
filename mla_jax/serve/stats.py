"""What the engine tells about itself."""

import dataclasses

from mla_jax.sampler import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Numbers of now, and counts since the start.

    Attributes:
      num_slots: places to run in.
      num_running: requests that have one.
      num_waiting: requests that wait for one.
      waiting_tokens: tokens of the prompts of those.
      pages_total: pages of the pool.
      pages_free: that nobody has.
      pages_cached: that are kept for prompts that begin alike; those that nobody runs on make room.
      page_size: tokens in a page.
      seconds_since_step: since the last step ended, None while there is nothing to do.
      requests: that were taken.
      rejected: that were not, for lack of room in the queue.
      finished: requests by reason.
      failed: requests that ended by an error.
      prompt_tokens: tokens of prompts that were let in.
      cached_tokens: of these, those whose rows were there.
      drawn_tokens: tokens that were drawn.
      steps: plans that were carried out.
      preemptions: requests that were swapped out.
      compiles: programs that were compiled in this process.
    """

    num_slots: int
    num_running: int
    num_waiting: int
    waiting_tokens: int
    pages_total: int
    pages_free: int
    pages_cached: int
    page_size: int
    seconds_since_step: float | None
    requests: int
    rejected: int
    finished: dict[str, int]
    failed: int
    prompt_tokens: int
    cached_tokens: int
    drawn_tokens: int
    steps: int
    preemptions: int
    compiles: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotInfo:
    """What a slot does, or what it keeps of its last request.

    Attributes:
      id: from 0 on.
      salt: of who asked.
      is_busy: whether a request runs in it.
      request_id: of that request.
      num_prompt: tokens of its prompt.
      num_cached: of these, those whose rows were there.
      num_drawn: tokens that it has drawn.
      num_kept: tokens whose rows are kept, where none runs.
      sampling: how it draws.
    """

    id: int
    salt: str = ""
    is_busy: bool = False
    request_id: int | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_drawn: int = 0
    num_kept: int = 0
    sampling: SamplingParams | None = None

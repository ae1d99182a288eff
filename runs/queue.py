"""A queue of prompts, decoded so many at a time: a row that is done takes the next one.

    for numbers, t in queue.stream(m, prompts, 16, max_new_tokens=256): ...     # the settings of decode.generate

Dimensions: B rows at a time, R rows that took a step, P tokens of a prompt, N response.
"""

import torch

import decode


@torch.no_grad()
def stream(m, prompts, batch_size=None, *, mask_id=None, generator=None, on_step=None, **settings):
    """Decode prompts, batch_size rows at a time -> yields (their numbers, decode.Trajectory) as rows finish.

    The batch stays full while prompts wait. Each row is what it is when decoded alone, but for the rounding of the
    model.

    prompts: token ids [P] each, of any lengths; the longest first need the least padding.
    batch_size: None = all prompts together.
    generator: a function of a prompt's number that makes its torch.Generator; None = torch's global one.
    on_step: called after each step as on_step(now, response [B, N], entropy [B, N]), where now [R] is the number of the
        step, in each row that took one, on the host.
    The rest is as in decode.generate.
    """
    rows = min(batch_size or len(prompts), len(prompts))
    device = prompts[0].device if prompts else "cpu"
    run = decode.start(m, rows, mask_id, device, **settings)
    waiting, held = list(reversed(range(len(prompts)))), {}  # numbers of prompts; row -> that of its prompt
    while True:
        free = run.done.nonzero()[:, 0].tolist()
        finished = [row for row in free if row in held]
        if finished:
            yield [held.pop(row) for row in finished], run.trajectory(finished)
        new = free[: len(waiting)]
        for row in new:
            held[row] = waiting.pop()
        if not held:
            return
        if new:
            run.fit(max(len(prompts[i]) for i in held.values()))
        for row in new:
            run.put(row, prompts[held[row]], generator and generator(held[row]))
        now = run.advance()
        if on_step is not None and len(now):
            on_step(now, *run.so_far())

"""How fast answers were decoded: T3D's length, steps and tokens a step (its Table 3), and tokens a second.

    watch = pace.Stopwatch(tok.stop_ids)                # decoding begins
    watch.stop(records)                                 # these answers are there; grading begins
    watch.go_on()                                       # and ends
    watch.speed(processes)                              # {"tokens_per_second": 657.7, "timed": 500}
    pace.pace(records, tok.stop_ids)                    # {"mean_length": 721.9, "mean_steps": 196.2, ...}

Tokens are those up to the first that ends a response, which counts, in all of these numbers.
"""

import time

from tokenizer import first_end


def length_and_steps(record, stop_ids):
    """(how many tokens a response has up to the one that ends it, in how many different steps these were decoded).
    Masks, which were never decoded, count in neither."""
    end = first_end(record["response_ids"], stop_ids) + 1
    steps = [step for step, order in zip(record["step"][:end], record["order"][:end]) if order != -1]
    return len(steps), len(set(steps))


def pace(records, stop_ids):
    """dict(mean_length, mean_steps, tokens_per_pass), the means over all records and the quotient of the two."""
    lengths, steps = zip(*(length_and_steps(record, stop_ids) for record in records))
    mean_length, mean_steps = sum(lengths) / len(records), sum(steps) / len(records)
    per_pass = mean_length / max(mean_steps, 1e-9)
    return dict(mean_length=round(mean_length, 2), mean_steps=round(mean_steps, 2), tokens_per_pass=round(per_pass, 3))


class Stopwatch:
    """The tokens and seconds of decoding on this process, without what happens between stop() and go_on()."""

    def __init__(self, stop_ids):
        self.stop_ids, self.answers, self.tokens, self.seconds = stop_ids, 0, 0, 0.0
        self.go_on()

    def go_on(self):
        self.since = time.perf_counter()

    def stop(self, records):
        """So many answers more are decoded."""
        self.seconds += time.perf_counter() - self.since
        self.answers += len(records)
        self.tokens += sum(length_and_steps(record, self.stop_ids)[0] for record in records)

    def speed(self, processes):
        """dict(tokens_per_second, timed: the answers that this is of) of all processes together, which decode at the
        same time; tokens_per_second is None where nothing was decoded. Every process has to call this."""
        answers, tokens, seconds = processes.sum([self.answers, self.tokens, self.seconds])
        rate = round(tokens * processes.count / seconds, 1) if answers else None
        return dict(tokens_per_second=rate, timed=int(answers))

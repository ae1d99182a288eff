"""The student as it was some optimizer steps ago.

    reference = baselines.Reference(m)                       # an adapter on m: now the base model
    reference = baselines.Reference(m, load=again)           # all of m is trained: again() loads it once more
    reference(ids, attention_mask=mask, positions=positions) # logits, without gradient and dropout
    reference.step_done(step)                                # after each optimizer step

T3D (arXiv 2602.12262) compares the student with it.
"""

import torch

import lora


class Reference:
    """Called like the student, it computes what the student did at the last `update`: of a student with an adapter it
    keeps a copy of the adapter alone, and before the first update the adapter is off; of one whose weights are all
    trained it is a second model, which costs its memory.

    steps: optimizer steps after which `step_done` makes the student the reference. kept: parameter's name -> tensor,
    for a checkpoint; empty = as at the start. Raises ValueError for a student without an adapter and no way to load
    it."""

    def __init__(self, student, load=None, steps=10):
        self.student, self.steps, self.kept, self.copy = student, steps, {}, None
        if not lora.layers(student):
            if load is None:
                raise ValueError("a reference needs an adapter on the model, or load=: a function that loads it again")
            self.copy = load().eval().requires_grad_(False)

    def step_done(self, step):
        """The student has made its step-th optimizer step, counted from 1."""
        if step % self.steps == 0:
            self.update()

    def update(self):
        """The student as it is now becomes the reference."""
        self.restore(dict(self.student.named_parameters()))

    @torch.no_grad()
    def restore(self, stored):
        """Take over the weights in `stored`, name -> tensor, such as the `kept` of another one."""
        if self.copy is None:
            for name, p in self.student.named_parameters():
                if ".lora_A." in name or ".lora_B." in name:
                    self.kept[name] = stored[name].detach().to(p.device, copy=True)
            return
        if hasattr(self.copy, "reshard"):  # FSDP: a pass without a backward leaves embedding and head whole
            self.copy.reshard()
        self.kept = dict(self.copy.named_parameters())
        for name, p in self.kept.items():
            p.copy_(stored[name])  # in place and one by one: no third model is in memory

    @torch.no_grad()
    def __call__(self, *inputs, **options):
        if self.copy is not None:
            return self.copy(*inputs, **options)
        training = self.student.training
        self.student.eval()
        try:
            if self.kept:
                return torch.func.functional_call(self.student, self.kept, inputs, options)
            with lora.disabled(self.student):
                return self.student(*inputs, **options)
        finally:
            self.student.train(training)

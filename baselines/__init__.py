"""What TABOM is compared with, and the exact forms of what it approximates. Importing this package adds them to the
tables of objectives.py, so that --objective, --ranking and --entropy-context have them.

    import baselines, objectives
    baselines.transition(m, batch)["loss"].backward()                       # one of the objectives below
    objectives.tabom(m, batch, ranking="kl")                                # one of the rankings below
    reference = baselines.Reference(m)
    baselines.t3d(m, batch, reference=reference)["loss"].backward()

    timesteps.py     transition (dInfer), traj (naive trajectory distillation)
    preference.py    t3d, and its states            reference.py     the student as it was, for t3d
    certainty.py     dparallel                      weighted.py      Eq. 1 as SDAR and A2D weigh it
    exact.py         Eq. 6, the likelihood of a decode order, and entropies at each token's step (Eq. 5)
    ideal.py         Eq. 4, with the KL of exact.py
    measures.py      what only experiments ask: pairs out of order, the loss at a mask ratio (Figure 3)

The batch, m and all dimensions are those of objectives.py.
"""

import objectives
from baselines.certainty import DPARALLEL, dparallel
from baselines.exact import boltzmann_kl, entropies_by_step, listwise_loss
from baselines.ideal import IDEAL, ideal
from baselines.measures import entropies_when_decoded, inversions, masked_loss, windows_of_replay
from baselines.preference import T3D, t3d
from baselines.reference import Reference
from baselines.timesteps import TRAJ, TRANSITION, draw_state, traj, transition
from baselines.weighted import NELBO, nelbo

__all__ = [
    "Reference",
    "boltzmann_kl",
    "dparallel",
    "draw_state",
    "entropies_by_step",
    "entropies_when_decoded",
    "ideal",
    "inversions",
    "listwise_loss",
    "masked_loss",
    "nelbo",
    "t3d",
    "traj",
    "transition",
    "windows_of_replay",
]

# Eq. 1 with more weightings takes the place of Eq. 1 alone.
objectives.OBJECTIVES.update(nelbo=NELBO, ideal=IDEAL, transition=TRANSITION, traj=TRAJ, t3d=T3D, dparallel=DPARALLEL)

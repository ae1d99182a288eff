"""What docs/method.md and docs/choices.md say of the paper, by enumeration, with the numbers that the pages quote; and
what docs/choices.md and docs/recipes.md say of its tables and of other checkpoints.

python -m pytest tests/test_method.py
"""

import itertools
import json
import math
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import FOLDER, ROOT
from programs import REAL, needs_data
from safetensors.torch import load_file, save_file

import data
import decode
import lora
import model
import objectives
from baselines import boltzmann_kl, inversions, preference


def says(page, *texts):
    """Whether a page of docs/ has these texts, however its lines are broken."""
    words = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    for text in texts:
        assert text in words, f"{page} does not say {text!r}"


def subsets(W):
    """All 2^W sets of positions."""
    found = []
    for size in range(W + 1):
        found += map(frozenset, itertools.combinations(range(W), size))
    return found


def score(h, U, beta=1.0):
    """S(U) of lemma 1."""
    return -beta * sum(h[r] for r in U)


def boltzmann(h, beta=1.0):
    """Eq. 3 and 5 by their definition: {U: p(U)}."""
    weights = {U: math.exp(score(h, U, beta)) for U in subsets(len(h))}
    Z = sum(weights.values())
    return {U: w / Z for U, w in weights.items()}


def kl(q, p):
    """KL(q || p) of two {state: probability}, in nats."""
    return sum(x * math.log(x / p[state]) for state, x in q.items() if x > 0)


def kl_of(base, h):
    """KL(q* || p) of two lists of entropies by the function that is trained with."""
    return float(boltzmann_kl(torch.tensor(h).double(), torch.tensor(base).double()))


def sorted_states(h):
    """The states from the least to the most probable."""
    return sorted(subsets(len(h)), key=lambda U: (round(score(h, U), 9), sorted(U)))


def some_entropies(W, seed):
    g = random.Random(seed)
    return [g.uniform(0.01, 3) for _ in range(W)]


# -------------------------------------------------------------------------------------------- Eq. 1: which U is uniform


def test_a_ratio_first_makes_every_number_of_masks_equally_likely():
    """The integral of C(N, k) t^k (1 - t)^(N - k) is 1 / (N + 1). Of all subsets C(N, k) / 2^N have k members."""
    for N in (1, 2, 5, 8):
        for k in range(N + 1):
            beta = math.gamma(k + 1) * math.gamma(N - k + 1) / math.gamma(N + 2)
            assert math.comb(N, k) * beta == pytest.approx(1 / (N + 1))
    says("choices.md", "every subset equally likely", "binomial")


def test_the_two_readings_of_eq_1_differ_at_256_tokens():
    """Within 8 of half of the tokens lie 71 % of the subsets, and 7 % of the numbers of masks."""
    near = range(128 - 8, 128 + 9)
    binomial = sum(math.comb(256, k) for k in near) / 2**256
    assert round(100 * binomial) == 71 and round(100 * len(near) / 257) == 7
    says("choices.md", "71 % of all subsets", "7 % of the masks")


# ------------------------------------------------------------------------------------------------- propositions 1 and 2


class Joint:
    """A model that predicts the exact conditionals of one joint distribution over responses, {tokens: probability}."""

    def __init__(self, joint):
        self.joint, self.N = joint, len(next(iter(joint)))
        self.vocab = 1 + max(max(x) for x in joint)
        self.config = SimpleNamespace(mask_id=self.vocab)

    def conditional(self, known):
        """p(x_r | known) of every position: [N, V]. known: {position: token}."""
        table = torch.zeros(self.N, self.vocab + 1, dtype=torch.float64)
        for x, p in self.joint.items():
            if all(x[r] == token for r, token in known.items()):
                for r in range(self.N):
                    table[r, x[r]] += p
        return table / table.sum(1, keepdim=True)

    def __call__(self, ids, attention_mask=None, positions=None):
        B, L = ids.shape
        logits = torch.zeros(B, L, self.vocab + 1)
        for b in range(B):
            response = ids[b, L - self.N :].tolist()
            known = {r: token for r, token in enumerate(response) if token != self.config.mask_id}
            logits[b, L - self.N :] = self.conditional(known).clamp(min=1e-30).log().float()
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


@pytest.mark.parametrize("N", range(1, 6))
def test_proposition_1_every_position_counts_alike(N):
    """A position's share of the mean over M in Eq. 1, in expectation over M: 1/N, however M's size is drawn."""
    sets = [M for M in subsets(N) if M]
    for probability in (lambda M: 1 / len(sets), lambda M: 1 / (N * math.comb(N, len(M)))):
        assert sum(map(probability, sets)) == pytest.approx(1)
        for r in range(N):
            assert sum(probability(M) / len(M) for M in sets if r in M) == pytest.approx(1 / N)


# The first token is 0 with probability 0.9, and the second repeats it with probability 0.99.
ECHO = {(0, 0): 0.9 * 0.99, (0, 1): 0.9 * 0.01, (1, 1): 0.1 * 0.99, (1, 0): 0.1 * 0.01}


def entropy_of(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def decoded(m, N):
    return decode.generate(m, torch.zeros(1, 1, dtype=torch.long), max_new_tokens=N, tokens_per_step=1)


def test_proposition_2_each_step_takes_the_least_entropy():
    """The first half, on random joint distributions: Eq. 2 as decode.generate has it."""
    g = random.Random(0)
    for _ in range(20):
        weights = {x: g.random() for x in itertools.product(range(2), repeat=4)}
        total = sum(weights.values())
        m = Joint({x: w / total for x, w in weights.items()})
        t = decoded(m, 4)
        known = {}
        for r in t.order[0].argsort().tolist():
            h = [entropy_of(row.tolist()) for row in m.conditional(known)]
            assert h[r] == pytest.approx(min(h[s] for s in range(4) if s not in known), abs=1e-5)
            assert float(t.entropy[0, r]) == pytest.approx(h[r], abs=1e-5)
            known[r] = int(t.response[0, r])


def test_proposition_2_own_step_entropies_may_fall():
    """The second half: a trajectory of Eq. 2 that runs from uncertain to certain."""
    t = decoded(Joint(ECHO), 2)
    assert t.order[0].tolist() == [0, 1] and t.response[0].tolist() == [0, 0]
    h = t.entropy[0].tolist()
    assert h == pytest.approx([0.325, 0.056], abs=5e-4)
    assert h[0] == pytest.approx(entropy_of([0.9, 0.1]), abs=1e-5)
    second = entropy_of([ECHO[0, 0] + ECHO[1, 0], ECHO[0, 1] + ECHO[1, 1]])  # before the first is known
    assert second == pytest.approx(0.342, abs=5e-4) and second > h[0]
    counted = inversions(t.entropy[0])
    assert (counted["inverted"].tolist(), counted["pairs"].tolist()) == ([1], [1])
    says("method.md", "0.325", "0.342", "0.056")


def test_more_context_lowers_an_entropy_on_average():
    """Of one joint distribution: the mean over x0 of h(1 given x0) is at most h(1). So falling is the usual case."""
    m = Joint(ECHO)
    before = entropy_of(m.conditional({})[1].tolist())
    after = [entropy_of(m.conditional({0: token})[1].tolist()) for token in (0, 1)]
    assert 0.9 * after[0] + 0.1 * after[1] < before


# --------------------------------------------------------------------------------------------------------- definition 1


@pytest.mark.parametrize("N", range(2, 9))
def test_definition_1_one_trajectory_is_far_from_uniform(N):
    """Whatever the weights of its N states, the KL from all 2^N subsets is log(2^N / N) at least."""
    uniform = dict.fromkeys(subsets(N), 2.0**-N)
    states = [frozenset(range(k)) for k in range(N)]
    least = math.log(2**N / N)
    assert kl(dict.fromkeys(states, 1 / N), uniform) == pytest.approx(least)
    g = random.Random(N)
    for _ in range(20):
        weights = [g.random() for _ in states]
        q = {U: w / sum(weights) for U, w in zip(states, weights)}
        assert kl(q, uniform) >= least - 1e-12


def test_definition_1_at_256_tokens():
    """172 nats from every subset alike, 125 from the states that a mask ratio draws."""
    N = 256
    assert round(N * math.log(2) - math.log(N)) == 172
    each = [math.log((N + 1) * math.comb(N, k) / N) for k in range(N)]  # log of 1/N over 1 / ((N + 1) C(N, k))
    assert round(sum(each) / N) == 125
    says("method.md", "172 nats", "125 nats")


# ----------------------------------------------------------------------------------------------------------- Eq. 3 to 6


@pytest.mark.parametrize("seed", range(5))
def test_eq_3_says_little_about_states(seed):
    """Each position is visible on its own, with probability 1/2 at most; the empty state is the most probable one."""
    h = some_entropies(4, seed)
    p = boltzmann(h)
    visible = [sum(x for U, x in p.items() if r in U) for r in range(4)]
    for r in range(4):
        assert visible[r] == pytest.approx(1 / (1 + math.exp(h[r]))) and visible[r] <= 0.5
    for U, x in p.items():
        alone = [visible[r] if r in U else 1 - visible[r] for r in range(4)]
        assert x == pytest.approx(math.prod(alone))
        assert x <= p[frozenset()]
    assert sum(len(U) * x for U, x in p.items()) == pytest.approx(sum(visible))


@pytest.mark.parametrize("seed", range(5))
def test_eq_3_given_the_size_prefers_the_least_entropies(seed):
    h = some_entropies(5, seed)
    p = boltzmann(h)
    rising = sorted(range(5), key=h.__getitem__)
    for size in range(6):
        best = max((U for U in p if len(U) == size), key=p.__getitem__)
        assert best == frozenset(rising[:size])


def test_eq_3_of_a_falling_trajectory_prefers_a_state_that_it_never_visits():
    h = decoded(Joint(ECHO), 2).entropy[0].tolist()  # the states are {} and {0}
    p = boltzmann(h)
    assert p[frozenset({1})] > p[frozenset({0})]
    # And Eq. 8 asks for the other order, although the KL of these entropies is 0.
    assert float(objectives.ranking_loss(torch.tensor(h), 0.0)) == pytest.approx(0.269, abs=5e-4)
    assert kl_of(h, h) == 0
    says("method.md", "0.269")


@pytest.mark.parametrize("seed", range(5))
def test_eq_6_is_the_expectation_that_the_paper_expands(seed):
    """KL = E_q*[log q*] - E_q*[S(U) - log Z], the second term the one to maximise; and KL by the closed form."""
    base, h = some_entropies(4, seed), some_entropies(4, seed + 100)
    q, p = boltzmann(base), boltzmann(h)
    log_Z = sum(math.log1p(math.exp(-x)) for x in h)
    to_maximise = sum(x * (score(h, U) - log_Z) for U, x in q.items())
    entropy_q = -sum(x * math.log(x) for x in q.values())
    assert kl(q, p) == pytest.approx(-entropy_q - to_maximise)
    assert kl_of(base, h) == pytest.approx(kl(q, p))


# ------------------------------------------------------------------------------------------------ theorem 1 and lemma 1

BASE = [0.2, 0.4, 0.6, 1.2]  # q*
SCALED = [0.4, 0.8, 1.2, 2.4]  # the same order of all states
SWAPPED = [0.2, 0.5, 0.8, 1.0]  # the same order of the tokens


def test_theorem_1_the_order_of_all_states_does_not_fix_the_distribution():
    assert sorted_states(SCALED) == sorted_states(BASE)
    found = []
    for factor in (1, 2, 4, 8):
        h = [factor * x for x in BASE]
        assert float(objectives.ranking_loss(torch.tensor(h), 0.1)) == 0
        assert kl_of(BASE, h) == pytest.approx(kl(boltzmann(BASE), boltzmann(h)))
        found.append(round(kl_of(BASE, h), 2))
    assert found == [0, 0.16, 1.06, 3.61]  # without a bound
    says("method.md", "0, 0.16, 1.06 and 3.61 nats")


@pytest.mark.parametrize("seed", range(5))
def test_theorem_1_what_a_ranking_loss_of_zero_gives(seed):
    """After every state of the trajectory the next token is the most probable one to be added, and every state is the
    most probable one of its size."""
    h = sorted(some_entropies(5, seed))
    assert float(objectives.ranking_loss(torch.tensor(h), 0.0)) == 0
    p = boltzmann(h)
    for size in range(5):
        state = frozenset(range(size))
        following = {r: p[state | {r}] for r in range(size, 5)}
        assert max(following, key=following.get) == size
        assert max((U for U in p if len(U) == size), key=p.__getitem__) == state


@pytest.mark.parametrize("seed", range(5))
def test_theorem_1_the_converse_holds(seed):
    """KL = 0 only where every entropy is the base model's, and then the orders are the same."""
    base = some_entropies(4, seed)
    for r in range(4):
        h = list(base)
        h[r] += 0.01
        assert kl_of(base, h) > 1e-7
    assert kl_of(base, base) == pytest.approx(0, abs=1e-12)


def leads(A, B, W):
    """How many more members A has than B from position j on, for every j, the positions in decode order."""
    return [sum(r >= j for r in A) - sum(r >= j for r in B) for j in range(W)]


def decided(A, B, W):
    """Whether every h with 0 < h(0) < h(1) < ... puts the sets in the same order. The difference of their sums is the
    sum over j of (h(j) - h(j - 1)) leads[j]."""
    found = leads(A, B, W)
    return not min(found) < 0 < max(found)


def with_a_step_at(j, W):
    """Rising entropies with one large step, before position j."""
    return [0.01 * (k + 1) + (k >= j) for k in range(W)]


# W: of the pairs of sets of one size, and of all pairs, the share in % that the order of the tokens decides.
SHARES = {2: (100, 100), 3: (100, 96), 4: (96, 92), 5: (91, 87), 6: (85, 82)}


@pytest.mark.parametrize("W", SHARES)
def test_lemma_1_the_order_of_tokens_decides_a_share_of_the_pairs(W):
    pairs, sure, of_one_size, sure_of_one_size = 0, 0, 0, 0
    for A, B in itertools.combinations(subsets(W), 2):
        known, equal = decided(A, B, W), len(A) == len(B)
        pairs, sure = pairs + 1, sure + known
        of_one_size, sure_of_one_size = of_one_size + equal, sure_of_one_size + (known and equal)
        found = leads(A, B, W)
        if not known:  # two models with this order of tokens and either order of the sets
            one, other = with_a_step_at(found.index(max(found)), W), with_a_step_at(found.index(min(found)), W)
            assert (score(one, A) < score(one, B)) and (score(other, A) > score(other, B))
        elif equal:  # one is below the other token by token
            below = [x <= y for x, y in zip(sorted(A), sorted(B))]
            assert all(below) or not any(x < y for x, y in zip(sorted(A), sorted(B)))
    assert (round(100 * sure_of_one_size / of_one_size), round(100 * sure / pairs)) == SHARES[W]
    says("method.md", f"| {W} | {sure_of_one_size} of {of_one_size} | {sure} of {pairs} | {SHARES[W][1]} |")


def test_lemma_1_two_models_with_the_same_order_of_tokens():
    """Eq. 8 is 0 for both. One has another order of the states; the other has that of all states, and a KL 17 times as
    large."""
    for h in (BASE, SCALED, SWAPPED):
        assert h == sorted(h) and float(objectives.ranking_loss(torch.tensor(h), 0.1)) == 0
    inner, outer = {1, 2}, {0, 3}
    assert score(BASE, inner) > score(BASE, outer) and score(SWAPPED, inner) < score(SWAPPED, outer)
    assert sorted_states(SCALED) == sorted_states(BASE) != sorted_states(SWAPPED)
    assert kl_of(BASE, SWAPPED) == pytest.approx(0.0094, abs=5e-5)
    assert kl_of(BASE, SCALED) == pytest.approx(0.163, abs=5e-4)
    assert round(kl_of(BASE, SCALED) / kl_of(BASE, SWAPPED)) == 17
    says("method.md", "0.0094", "0.163")


# ---------------------------------------------------------------------------------------------------------- Eq. 7 and 8


@pytest.mark.parametrize("seed", range(3))
def test_eq_7_is_an_equivalence(seed):
    W, beta = 5, 0.7
    h = some_entropies(W, seed)
    for r, s in itertools.permutations(range(W), 2):
        for base in subsets(W):
            if not base & {r, s}:
                higher = score(h, base | {r}, beta) > score(h, base | {s}, beta)
                assert higher == (h[r] < h[s])


@pytest.mark.parametrize("W", range(2, 7))
def test_the_pair_set_has_a_pair_for_every_two_tokens(W):
    rank = {r: r for r in range(W)}  # decode order
    pairs = [(r, s) for r, s in itertools.permutations(rank, 2) if rank[r] < rank[s]]
    assert len(pairs) == W * (W - 1) // 2
    h = some_entropies(W, W)
    mean = sum(max(0.0, h[r] - h[s] + 0.2) for r, s in pairs) * 2 / (W * (W - 1))  # as Eq. 9 writes it
    assert float(objectives.ranking_loss(torch.tensor(h), 0.2)) == pytest.approx(mean, rel=1e-5)


def test_beta_goes_into_the_margin_and_the_weight():
    h = torch.tensor(some_entropies(6, 0))
    beta, margin, weight = 2.5, 0.2, 0.7
    found = weight * objectives.ranking_loss(beta * h, margin)
    torch.testing.assert_close(found, weight * beta * objectives.ranking_loss(h, margin / beta))


# ----------------------------------------------------------------------------------------------------- T3D's statements


def softmax_tables(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).log_softmax(-1) for shape in shapes]


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_t3d_is_jensens(seed):
    """Its Eq. 7, expectations inside the sigmoid, is at most its Eq. 23, where they are outside: all 9 responses of 2
    tokens."""
    p, ref, trajectory = softmax_tables(seed, (2, 3), (2, 3), (9,))
    both = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # [9, 2]
    log_p, log_ref = ((x[0, both[:, 0]] + x[1, both[:, 1]]) for x in (p, ref))  # [9]
    D, real, fake = log_p - log_ref, trajectory.exp(), log_ref.exp()
    loss = -F.logsigmoid((real * D).sum()) - F.logsigmoid(-(fake * D).sum())
    bound = -(real * F.logsigmoid(D)).sum() - (fake * F.logsigmoid(-D)).sum()
    assert loss <= bound + 1e-12


def fake_term(logits, ref, chosen=None):
    """-log(1 - sigma(d)) of one token: d exact over the reference, or of the token chosen, as t3d has it."""
    logp = logits.log_softmax(-1)
    if chosen is None:
        return -F.logsigmoid(-(ref.exp() * (logp - ref)).sum())
    batch, place = dict(response_ids=torch.tensor([[0]])), torch.tensor([[0]])
    tables = logp[None, None], ref[None, None], batch, place, torch.tensor([[chosen]])  # [1, 1, V], ...
    with_fake, without = (preference.ddo(*tables, alpha, 1.0, lambda d: d[:, 0]) for alpha in (1.0, 0.0))
    return (with_fake - without)[0]


def test_the_exact_second_term_of_ddo_has_no_gradient_at_the_start_of_a_round():
    """The student is the reference then. With the argmax there is one; with a sample it is 0 on average."""
    (ref,) = softmax_tables(0, (5,))
    logits = ref.clone().requires_grad_()

    def gradient(chosen=None):
        return torch.autograd.grad(fake_term(logits, ref, chosen), logits)[0]

    assert gradient().abs().max() < 1e-12
    samples = torch.stack([gradient(token) for token in range(5)])  # [5, 5]
    assert samples.abs().amax(1).min() > 0.05
    assert (ref.exp() @ samples).abs().max() < 1e-12
    best = int(ref.argmax())
    assert gradient(best)[best] > 0.05  # descent takes probability from the reference's choice
    elsewhere = ref.clone()
    elsewhere[0] += 1
    moved = elsewhere.requires_grad_()
    assert torch.autograd.grad(fake_term(moved, ref), moved)[0].abs().max() > 0.01
    says("choices.md", "gradient of the exact expectation is 0")


# -------------------------------------------------------------------------------------------------- the paper's numbers


@pytest.fixture(scope="module")
def paper():
    return json.loads((REAL / "paper.json").read_text(encoding="utf-8"))


def cells(table):
    """(model, row, column, value) of a table of paper.json."""
    for name, rows in table["rows"].items():
        for row, values in rows.items():
            for column, value in zip(table["columns"], values):
                yield name, row, column, value


needs_paper = pytest.mark.skipif(not (REAL / "paper.json").is_file(), reason="no paper.json in TABOM_DATA")


@needs_data
@needs_paper
def test_t3ds_cells_are_means(paper):
    """Of SFT-SD and dInfer, in Tables 2 and 3 and not in Table 4."""
    means, others = 0, 0
    for table in ("table2", "table3", "table4"):
        for rows in paper[table]["rows"].values():
            for x, a, b in zip(rows["T3D"], rows["SFT-SD"], rows["dInfer"]):
                close = abs(x - (a + b) / 2) < 0.00501  # the last digit, rounded or cut off
                means, others = means + (close and table != "table4"), others + (close and table == "table4")
    assert (means, others) == (20, 0)
    says("choices.md", "in 20 of 20 cells")


@needs_data
@needs_paper
def test_the_paper_against_itself(paper):
    main, two, window = (paper[f"table{n}"]["rows"] for n in (3, 4, 9))
    gsm8k, humaneval = main["Dream"]["TABOM"][0], main["Dream"]["TABOM"][2]
    assert window["32"] == [84.08, 60.37] and [gsm8k, humaneval] == [84.31, 58.54]
    mbpp = {row: values[3] for row, values in two["Dream"].items()}
    assert mbpp["dInfer"] == mbpp["T3D"] == 49.2 and round(49.2 - mbpp["No-SFT"], 2) == 5.6
    says("choices.md", "84.08 and 60.37", "84.31 and 58.54", "49.20", "5.60")


QUESTIONS = dict(GSM8K=1319, MATH500=500, HumanEval=164, MBPP=500)


def is_a_share(percent, n):
    """Whether so many percent, rounded or cut off after two digits, are a whole number of n questions."""
    nearest = round(percent * n / 100)
    for k in (nearest - 1, nearest, nearest + 1):
        exact = 100 * k / n
        if percent in (round(exact, 2), math.floor(exact * 100 + 1e-9) / 100):
            return True
    return False


@needs_data
@needs_paper
def test_cells_that_are_no_whole_number_of_questions(paper):
    odd, seen = {}, set()
    for table in ("table2", "table3", "table4", "table5"):
        for name, row, column, value in cells(paper[table]):
            if row != "T3D" and column in QUESTIONS and not is_a_share(value, QUESTIONS[column]):
                odd.setdefault(column, set()).add(value)
            seen.add((table, name, row, column))
    assert odd["HumanEval"] == {52.66, 61.55, 36.01, 42.01, 56.11, 38.9, 40.3, 56.45, 57.5, 56.8}
    assert odd["MATH500"] == {41.1, 35.5, 35.7, 36.5} and odd["MBPP"] == {40.1, 40.12, 58.7}
    assert odd["GSM8K"] == {81.41, 52.33, 81.81, 80.12, 83.1, 82.5}
    for values in odd.values():
        says("choices.md", ", ".join(f"{value:.2f}" for value in sorted(values)))


def rows_of(page, head):
    """The rows of the table of docs/page that begins with this line, as lists of cells without the first."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n")
    found = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(head) + 2 :]):
        name, *values = [cell.strip() for cell in line.strip("|").split("|")]
        found[name] = values
    return found


def test_t3ds_averages():
    """Of the eight columns with few steps, as Table 1 prints them: two are not those of their rows."""
    main = rows_of("t3d.md", "| model, b, TokPS | original | naive TD | T3D |")
    more = rows_of("t3d.md", "| model, b, TokPS | SFT | ReDi | dParallel |")
    printed = rows_of("t3d.md", "| model, TokPS | original | SFT | ReDi | dParallel | naive TD | T3D |")
    wrong = {}
    for name, values in printed.items():
        size, tokens = name.split(", ")
        rows = []
        for b in (4, 8):
            original, naive, t3d = main[f"{size}, {b}, {tokens}"]
            rows.append([original, *more[f"{size}, {b}, {tokens}"], naive, t3d])
        for method, value, *cells in zip(("original", "SFT", "ReDi", "dParallel", "naive TD", "T3D"), values, *rows):
            numbers = [float(x) for cell in cells for x in cell.split("/")]
            mean = sum(numbers) / len(numbers)
            if abs(mean - float(value)) > 0.01:
                wrong[name, method] = float(value), round(mean, 2)
    assert wrong == {("4B, 2", "SFT"): (46.76, 45.07), ("4B, 4", "naive TD"): (28.92, 29.1)}
    says("t3d.md", "46.76; its eight columns average 45.07", "28.92; 29.10")
    assert not any(is_a_share(x, 500) for x in (54.44, 52.22)) and not any(is_a_share(x, 164) for x in (9.0, 10.0))


@needs_data
@needs_paper
def test_the_papers_scores_are_those_of_the_tables(paper):
    """docs/recipes.md has Tables 2 and 3, in its order of the benchmarks."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    tasks = ("GSM8K", "MATH500", "HumanEval", "MBPP", "IFEval")
    for table, dataset in (("table3", "PRM12K"), ("table2", "Ling-Coder")):
        place = [paper[table]["columns"].index(task) for task in tasks]
        for name, rows in paper[table]["rows"].items():
            for row, values in rows.items():
                numbers = " | ".join(f"{values[i]:.2f}" for i in place)
                first = f"{name} | - | base" if row == "No-SFT" else f"{name} | {dataset} | {row}"
                assert f"| {first} | {numbers} |" in text


def test_the_mathematics_dataset_is_read_as_it_is(tmp_path):
    """A row of MixChain-Z-PRM12K with its columns: the solution, or the column that is named, is the answer."""
    solution = "One and one: $1 + 1 = \\boxed{\\frac{4}{2}}$."
    row = dict(question="What is 1 + 1?", answer=solution, target="\\frac{4}{2}", solution_0=solution, solution_1="2")
    row |= dict(correct_1=True, solution_1_token=1, __index_level_0__=0)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    for field, expected in ((None, solution), ("target", row["target"])):
        lines = []
        (example,) = data.read_examples(file, answer_field=field, warn=lines.append)
        # One solution is the answer once more; with another answer it is a column that is not used.
        unused = [line for line in lines if "the column 'solution_0' looks like input, and is not used" in line]
        assert len(unused) == (field == "target")
        assert (example["prompt"], example["answer"]) == (row["question"], expected)


def test_the_citation_names_the_authors_of_the_paper():
    readme, cited = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CITATION.cff"))
    authors = " ".join(re.search(r"author = \{(.*?)\}", readme, re.DOTALL)[1].split()).split(" and ")
    found = re.findall(r"family-names: (\w+), given-names: (\w+)", cited)
    assert [", ".join(name) for name in found] == authors and len(authors) == 12
    assert "2605.11854" in cited


# --------------------------------------------------------------------------------------------- decoders and checkpoints


def test_dreams_schedule_is_not_one_token_a_step(toy):
    t = decode.generate(toy(), torch.zeros(1, 1, dtype=torch.long), max_new_tokens=256, steps=256)
    steps = t.step[0].tolist()
    assert len(set(steps)) == 255 and min(steps) == 1 and steps.count(255) == 2
    assert max(steps.count(step) for step in range(255)) == 1
    says("choices.md", "255 steps for 256 tokens")


# What their config.json says, as far as it decides: model_type, and what else is not a model's that is known here.
REFUSED = {
    "LLaDA-MoE-7B-A1B": dict(model_type="llada", num_experts=64, hidden_size=2048),
    "LLaDA2.0-mini": dict(model_type="llada2_moe", num_experts=256, hidden_size=2048),
    "Fast_dLLM_v2": dict(model_type="Fast_dLLM_Qwen", bd_size=32, hidden_size=3584),
    "open-dcoder-0.5B": dict(model_type="qwen2", hidden_size=896),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_does_not_load_says_why(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REFUSED[name]))
    with pytest.raises(ValueError, match="mixture of experts|model_type is") as e:
        model.load(tmp_path)
    assert "\n" not in str(e.value)
    says("choices.md", name)


def test_dreamreasoners_tensors_are_not_dreams(tmp_path):
    """It calls itself Dream and has Qwen3's tensors: norms of q and k, and no biases."""
    folder = shutil.copytree(FOLDER / "dream-tiny", tmp_path / "reasoner")
    width = 12  # of a head
    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        for name in list(tensors):
            if name.endswith("q_proj.bias"):
                del tensors[name]
                tensors[name.replace("q_proj.bias", "q_norm.weight")] = torch.ones(width)
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="q_norm|q_proj"):
        model.load(folder)
    says("choices.md", "DreamReasoner-8B")


# The authors' four, at commit dc582b2 of their repository.
ADAPTERS = {
    "dream_prm12k": ("Dream-org/Dream-v0-Instruct-7B", "FEATURE_EXTRACTION"),
    "dream_ling_coder": ("Dream-org/Dream-v0-Instruct-7B", "FEATURE_EXTRACTION"),
    "llada_prm12k": ("GSAI-ML/LLaDA-8B-Instruct", "CAUSAL_LM"),
    "llada_ling_coder": ("GSAI-ML/LLaDA-8B-Instruct", "CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_authors_adapters_are_read(name, tmp_path):
    """Their adapter_config.json, written by PEFT 0.17."""
    base, kind = ADAPTERS[name]
    config = dict(base_model_name_or_path=base, task_type=kind, peft_type="LORA", inference_mode=True)
    config |= dict(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], bias="none")
    config |= dict.fromkeys("alpha_pattern loftq_config rank_pattern megatron_config revision".split())
    config |= dict.fromkeys("fan_in_fan_out lora_bias use_dora use_qalora use_rslora".split(), False)
    config |= dict(init_lora_weights=True, megatron_core="megatron.core", qalora_group_size=16, corda_config=None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    s = lora.settings(tmp_path)
    assert (s.rank, s.alpha, sorted(s.targets)) == (16, 16, ["q_proj", "v_proj"])
    says("recipes.md", f"checkpoints/{name}")

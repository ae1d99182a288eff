"""release/credit.py against a plain decoder that has all of C: python -m pytest tests/test_credit.py

test_decode.py has what the authors' own code decoded."""

import json

import pytest
import torch
from helpers import FOLDER, Golden, flags, last_json, run
from safetensors.torch import load_file

import data
import decode
import tabom
from release import credit
from runs import queue

PROMPT = torch.tensor([1, 5, 2, 8])
VOCABULARY = 40


def plain(m, prompt, N, block, each, suppress=(), last=(), threshold=None, strategy="confidence"):
    """The response, steps and logged entropies of one row: `each` tokens a step, C as a matrix of all positions."""
    P, ids = len(prompt), torch.cat((prompt, torch.full((N,), m.config.mask_id)))
    step_of, entropy, step = torch.full((N,), -1), torch.full((N,), float("nan")), 0
    for begin in range(0, N, block):
        C = torch.zeros(N, VOCABULARY)
        first = True
        while masked := [r for r in range(begin, begin + block) if ids[P + r] == m.config.mask_id]:
            z = m(ids[None])[0, P:].float()
            h = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
            z[:, list(suppress)] = torch.finfo(z.dtype).min
            C = C if first else 0.8 * C
            first = False
            for r in range(N):
                if ids[P + r] == m.config.mask_id:
                    p = z[r].softmax(-1)
                    C[r, p.argmax()] += p.max() ** 0.2
            z = z + 0.7 * torch.log(C + 1)
            token, scored = z.argmax(-1), z.clone()
            scored[:, list(last)] = torch.finfo(z.dtype).min
            p = scored.softmax(-1)
            score = p.gather(-1, token[:, None])[:, 0]
            if strategy == "entropy":
                score = (p * torch.log(p + 1e-10)).sum(-1)
            best = sorted(masked, key=lambda r: (-float(score[r]), r))
            chosen = best[:each]
            if threshold is not None:
                chosen = [r for i, r in enumerate(best) if i == 0 or score[r] >= threshold]
            for r in chosen:
                ids[P + r], step_of[r], entropy[r] = token[r], step, h[r]
            step += 1
    return ids[P:], step_of, entropy


OPTIONS = [
    dict(block=8, each=1),
    dict(block=4, each=1),
    dict(block=24, each=1),
    dict(block=8, each=3),
    dict(block=12, each=1, threshold=0.3),
    dict(block=6, each=1, suppress=(3, 39)),
    dict(block=6, each=1, strategy="entropy"),
    dict(block=12, each=2, last=(4, 5, 6)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_plain_decoder(toy, options):
    m, N = toy(vocab=VOCABULARY, scale=0.7), 24
    expected = plain(m, PROMPT, N, **options)
    names = dict(suppress="suppress", last="decode_last", threshold="threshold", strategy="strategy")
    given = dict(strategy="confidence", schedule="credit", max_new_tokens=N, block_length=options["block"])
    given |= {names[name]: value for name, value in options.items() if name in names}
    if options["each"] > 1:
        given["tokens_per_step"] = options["each"]
    t = decode.generate(m, PROMPT[None], **given)
    assert torch.equal(t.response[0], expected[0]) and torch.equal(t.step[0], expected[1])
    torch.testing.assert_close(t.entropy[0], expected[2])  # the model's own
    other = decode.generate(m, PROMPT[None], **{**given, "schedule": "llada"})
    assert not (torch.equal(other.step, t.step) and torch.equal(other.response, t.response))  # credit decides something


def test_a_row_is_what_it_is_alone(toy):
    """In a padded batch, and in a queue whose rows begin anew."""
    m = toy(vocab=VOCABULARY, scale=0.7)
    prompts = [PROMPT, PROMPT[1:], PROMPT[:2], PROMPT.flip(0), PROMPT[2:]]
    options = dict(strategy="confidence", schedule="credit", max_new_tokens=12, block_length=6)
    alone = [decode.generate(m, prompt[None], **options) for prompt in prompts]
    seen = []
    for numbers, t in queue.stream(m, prompts, 2, **options):
        for row, i in enumerate(numbers):
            seen.append(i)
            assert torch.equal(t.response[row], alone[i].response[0]) and torch.equal(t.step[row], alone[i].step[0])
            torch.testing.assert_close(t.confidence[row], alone[i].confidence[0])
    assert sorted(seen) == list(range(5))


@pytest.mark.parametrize("seed", range(2))
def test_credit_does_not_depend_on_the_parts_of_a_step(toy, monkeypatch, seed):
    """Rows with fewer masks than others have a place twice. It gets credit once, wherever the two are computed."""
    m = toy(vocab=VOCABULARY, scale=0.5, seed=seed)
    prompts = torch.randint(0, 30, (8, 4), generator=torch.Generator().manual_seed(seed))
    options = dict(strategy="confidence", schedule="credit", max_new_tokens=16, threshold=0.2)
    whole = decode.generate(m, prompts, **options)
    monkeypatch.setattr(decode, "CACHED", VOCABULARY)
    parts = decode.generate(m, prompts, **options)
    assert torch.equal(parts.response, whole.response) and torch.equal(parts.step, whole.step)


def test_the_authors_case_is_not_what_llada_decodes():
    cases = json.loads((FOLDER / "release" / "decode-llada.json").read_text())
    (k,) = [k for k, case in enumerate(cases) if case["alg"] == "credit"]
    file = load_file(FOLDER / "release" / "decode-llada.safetensors")
    options = dict(strategy="confidence", block_length=cases[k]["block"], max_new_tokens=cases[k]["new"])
    t = decode.generate(Golden("llada").load(), file[f"decode.{k}.prompt"], schedule="llada", **options)
    assert not torch.equal(t.step, file[f"decode.{k}.step"])


def test_credit_is_of_the_dtype_of_the_logits(toy):
    table = toy(vocab=VOCABULARY, scale=0.7)

    def half(*inputs, **more):
        return table(*inputs, **more).bfloat16()

    half.config = table.config
    made = credit.Credit(max_new_tokens=6, block_length=3)
    run = credit.CreditRun(half, 1, None, made, "cpu")
    run.fit(4)
    run.put(0, PROMPT)
    first = torch.zeros(3, 1, dtype=torch.long)  # the step of each place
    fused, _, credit_of = run.fuse(half(run.ids)[0, 4:7], run.tokens[0, :3], run.credit[0, :3], first)
    assert (fused.dtype, credit_of.dtype) == (torch.bfloat16, torch.float32)


def test_the_three_decoders_of_llada_prm12k(capsys, tiny, puzzles, tmp_path):
    """Distilled from nothing: three files, each with its method, which the recipe reads together."""
    made = dict(default=dict(strategy="confidence"), entropy=dict(strategy="entropy"))  # the tiny model's own: entropy
    made["credit"] = dict(strategy="confidence", schedule="credit")
    made["credit, entropy"] = dict(strategy="entropy", schedule="credit")  # not the authors'
    files = []
    for method, more in made.items():
        folder = tmp_path / method
        run(capsys, "distill", model=tiny, data=puzzles, out=folder, keep="all", format="release", **more)
        rows = [row for _, row in data.read_rows(folder / "release.jsonl")]
        assert {row["method"] for row in rows} == {method} and len(rows) == 12
        files += [str(folder / "release.jsonl")] * ("," not in method)
    options = dict(model=tiny, data=",".join(files), recipe="llada-prm12k", raw=True, epochs=1, out=tmp_path / "R")
    assert tabom.main(["train", *flags(**options)]) == 0
    assert last_json(capsys.readouterr().out)["examples"] == 36

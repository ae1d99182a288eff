"""model.py: the network against the official one and against a plain loop, and folders in and out.

python -m pytest tests/test_model.py
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model

TIED = {"llada": "weight_tying", "dream": "tie_word_embeddings"}
GOLDEN = Path(__file__).parent / "golden"


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def config_of(folder, **changes):
    """The content of a config.json with some keys changed; None removes one."""
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    return {k: v for k, v in raw.items() if v is not None}


def naive(m, ids):
    """Logits [L, V] of one row of ids [L]: one head and one position at a time, in float64."""
    c, L = m.config, len(ids)
    E, group = c.head_width, c.heads // c.kv_heads
    block = torch.arange(L) // (c.block_length or L)
    hidden = block[None, :] > block[:, None]  # [query, key]: later blocks
    w = {name: p.detach().double() for name, p in m.named_parameters()}

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def head(x, layer, part, h):  # the h-th slice of E outputs
        rows = slice(h * E, (h + 1) * E)
        y = x @ w[f"{layer}.{part}.weight"][rows].T
        if c.qkv_bias:
            y = y + w[f"{layer}.{part}.bias"][rows]
        if c.qk_norm and part != "v_proj":
            y = norm(y, w[f"{layer}.{part[0]}_norm.weight"])
        return y

    def turn(x):  # the complex number (x_e, x_e+E/2) at place i turns by i * theta^(-2e/E)
        angle = torch.arange(L)[:, None] * c.rope_theta ** (-torch.arange(0, E, 2).double() / E)
        z = torch.complex(x[:, : E // 2], x[:, E // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), dim=1)

    x = w["embed.weight"][ids]
    for i in range(c.layers):
        layer = f"layers.{i}"
        y = norm(x, w[f"{layer}.attn_norm.weight"])
        attn, mlp, heads = f"{layer}.attn", f"{layer}.mlp", []
        for h in range(c.heads):
            q = turn(head(y, attn, "q_proj", h))
            k, v = turn(head(y, attn, "k_proj", h // group)), head(y, attn, "v_proj", h // group)
            scores = (q @ k.T / E**0.5).masked_fill(hidden, -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, dim=1) @ w[f"{attn}.o_proj.weight"].T
        y = norm(x, w[f"{layer}.mlp_norm.weight"])
        gate = y @ w[f"{mlp}.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ w[f"{mlp}.up_proj.weight"].T)) @ w[f"{mlp}.down_proj.weight"].T
    logits = norm(x, w["norm.weight"]) @ w["embed.weight" if c.tied else "head.weight"].T
    return torch.stack([logits[max(i - 1, 0)] for i in range(L)]) if c.shifted else logits


# ------------------------------------------------------------------------------------------------------ the network


@torch.no_grad()
def test_logits_are_the_official_ones(golden):
    e = golden.expected
    close(golden.load()(e["logits.ids"]), e["logits.aligned"])


@torch.no_grad()
def test_padded_logits_are_the_official_ones(golden):
    e = golden.expected
    mask = e["padded.mask"].bool()
    assert not mask.all() and mask[:, 11:].all()
    close(golden.load()(e["padded.ids"], e["padded.mask"])[:, 11:], e["padded.aligned"][:, 11:])


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_official_bfloat16(golden):
    """Sums in bfloat16 come out differently on every kind of processor: ours may be off by the same amount, and as far
    from the official ones as two such errors are from each other."""
    e = golden.expected
    ours = golden.load(dtype=torch.bfloat16)(e["logits.ids"])
    assert ours.dtype == torch.bfloat16
    rounding = (e["bf16.aligned"] - e["logits.aligned"]).abs().mean()
    assert (ours.float() - e["logits.aligned"]).abs().mean() <= 1.5 * rounding
    assert (ours.float() - e["bf16.aligned"]).abs().mean() <= 2 * rounding


@torch.no_grad()
@pytest.mark.parametrize("weight_first", [False, True])
def test_rmsnorm_casts_and_scales_in_the_familys_order(weight_first):
    """The wrong order costs as much as bfloat16 itself, so that whole logits do not show it."""
    norm = model.RMSNorm(64, SimpleNamespace(norm_eps=1e-6, weight_first=weight_first))
    norm.weight.copy_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    norm = norm.to(torch.bfloat16)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    scaled, cast = (norm.weight * y).to(torch.bfloat16), norm.weight * y.to(torch.bfloat16)
    assert not torch.equal(scaled, cast)
    assert torch.equal(norm(x), scaled if weight_first else cast)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_equals_the_network_written_as_loops(golden, kv, tied):
    key = {"llada": "n_kv_heads", "dream": "num_key_value_heads"}[golden.family]
    raw = config_of(golden.folder, **{key: kv, TIED[golden.family]: tied})
    m = model.create(raw, generator=torch.Generator().manual_seed(kv))
    for p in m.parameters():  # large weights and biases that are not zero, so that a wrong one shows
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    ids = torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(1))
    close(m(ids[None])[0].double(), naive(m, ids))
    assert tied == all("head" not in name for name, _ in m.named_parameters())


def test_attention_can_be_replaced_on_one_model(golden):
    m, other, calls = golden.load(), golden.load(), []

    def counted(q, k, v, mask):
        calls.append((q.shape, k.shape, mask))
        return model.attend(q, k, v, mask)

    for block in m.layers:
        block.attn.attend = counted
    ids = golden.expected["logits.ids"]
    close(m(ids, positions=torch.zeros(2, 3, dtype=torch.long)), other(ids)[:, :1].expand(-1, 3, -1))
    c = m.config
    queries = [(2, c.heads, 24, c.head_width), (2, c.heads, 3, c.head_width)]  # the last block: 3 places only
    assert [tuple(q) for q, _, _ in calls] == queries
    assert all(tuple(k) == (2, c.kv_heads, 24, c.head_width) and mask is None for _, k, mask in calls)


@torch.no_grad()
def test_chosen_positions_are_those_of_the_full_logits(golden):
    m, ids = golden.load(), golden.expected["logits.ids"]
    positions = torch.tensor([[0, 5, 7, 7], [23, 1, 2, 0]])
    full = m(ids)
    some = m(ids, positions=positions)
    assert some.shape == (2, 4, m.config.vocab_size)
    close(some, torch.stack([full[b, positions[b]] for b in range(2)]), 1e-5)
    assert m(ids, positions=positions[:, :0]).shape == (2, 0, m.config.vocab_size)  # nothing is asked


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(golden, side):
    m, ids = golden.load(), golden.expected["logits.ids"]
    lengths = [24, 15]
    rows = [row[:n] for row, n in zip(ids, lengths)]
    padded, mask = torch.full((2, 24), m.config.pad_id), torch.zeros(2, 24)
    for b, row in enumerate(rows):
        at = slice(24 - len(row), 24) if side == "left" else slice(0, len(row))
        padded[b, at], mask[b, at] = row, 1
    other = padded.where(mask.bool(), 7)  # what the padding holds does not matter either
    for batch in (padded, other):
        logits = m(batch, mask)
        for b, row in enumerate(rows):
            skip = int(side == "left" and m.config.shifted and b == 1)  # Dream's first token after padding
            real = logits[b][mask[b].bool()][skip:]
            close(real, m(row[None])[0, skip:], 1e-5)


@torch.no_grad()
def test_a_full_mask_is_no_mask_and_padding_stays_finite(golden):
    m, ids = golden.load(), golden.expected["logits.ids"]
    close(m(ids, torch.ones_like(ids)), m(ids), 1e-5)
    mask = torch.ones_like(ids)
    mask[1] = 0  # a row of nothing but padding
    assert m(ids, mask).isfinite().all()


def test_a_tied_head_learns_through_the_embedding(golden):
    raw = config_of(golden.folder, **{TIED[golden.family]: True})
    m = model.create(raw, generator=torch.Generator().manual_seed(0))
    m(torch.tensor([[1, 2, 3]]))[..., 9].sum().backward()
    assert m.embed.weight.grad[9].abs().sum() > 0  # token 9 is not in the input: only the head can reach it


def test_gradient_checkpointing_gives_the_same_gradients(golden):
    ids, mask, found = golden.expected["padded.ids"], golden.expected["padded.mask"], []
    for checkpointing in (False, True):
        m, calls = golden.load(), []
        m.gradient_checkpointing = checkpointing
        m.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        m(ids, mask)[:, 12:].logsumexp(-1).sum().backward()
        assert len(calls) == 1 + checkpointing  # it is computed again in the backward pass
        found.append({name: p.grad for name, p in m.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


# --------------------------------------------------------------------------------------------------- load and save


def tensors_by_file(folder):
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors")) if "model" in file.name}


def test_save_writes_what_was_loaded(golden, tmp_path):
    model.save(golden.load(), tmp_path / "out")
    official, ours = tensors_by_file(golden.folder), tensors_by_file(tmp_path / "out")
    assert {f: list(t) for f, t in official.items()} == {f: list(t) for f, t in ours.items()}
    for file, tensors in official.items():
        for name, tensor in tensors.items():
            assert ours[file][name].dtype == tensor.dtype
            assert torch.equal(ours[file][name], tensor), name  # shape and every bit
    written = {file.name: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    assert set(written) == {"config.json"} | ({"model.safetensors.index.json"} if golden.family == "dream" else set())
    for name, content in written.items():
        assert content == json.loads((golden.folder / name).read_text())


def test_safetensors_say_that_they_are_torch(golden, tmp_path):
    model.save(golden.load(), tmp_path)  # transformers refuses files without this
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_bfloat16_round_trip(golden, tmp_path):
    half = golden.load(dtype=torch.bfloat16)
    model.save(half, tmp_path)
    assert {t.dtype for tensors in tensors_by_file(tmp_path).values() for t in tensors.values()} == {torch.bfloat16}
    for dtype in (torch.bfloat16, torch.float32):
        again = model.load(tmp_path, dtype=dtype)
        for (name, a), b in zip(half.named_parameters(), again.parameters()):
            assert b.dtype == dtype and torch.equal(a.to(dtype), b), name


def test_a_tied_model_round_trips_without_a_head(golden, tmp_path):
    raw = config_of(golden.folder, **{TIED[golden.family]: True})
    m = model.create(raw, generator=torch.Generator().manual_seed(0))
    model.save(m, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {m.checkpoint_name(n) for n, _ in m.named_parameters()}
    ids = golden.expected["logits.ids"]
    assert torch.equal(model.load(tmp_path)(ids), m(ids))


def test_create_is_determined_by_its_generator(golden):
    raw = config_of(golden.folder)
    a, b, c = (model.create(raw, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.layers[0].attn.q_proj.weight, c.layers[0].attn.q_proj.weight)


def test_a_loaded_model_is_complete_and_in_eval_mode(golden):
    m = golden.load(dtype=torch.bfloat16)
    assert {p.device.type for p in m.parameters()} == {"cpu"}  # none is left on the meta device
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert not any(part.training for part in m.modules())
    assert m.config.family == golden.family
    assert (m.config.vocab_size, m.config.mask_id, m.config.eos_id, m.config.pad_id) == (320, 300, 301, 301)


@torch.no_grad()
def test_a_loaded_model_needs_its_files_no_more(golden, tmp_path):
    folder = shutil.copytree(golden.folder, tmp_path / "m")
    m = model.load(folder)
    for file in folder.glob("*.safetensors"):  # same inode: a mapping that is still in use would show it
        size = file.stat().st_size
        with open(file, "r+b") as f:
            f.write(b"\xff" * size)
            f.truncate(size // 2)
    close(m(golden.expected["logits.ids"]), golden.expected["logits.aligned"])


def change_file(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_stored_copy_of_a_tied_head_must_be_equal(golden, tmp_path):
    m = model.create(config_of(golden.folder, **{TIED[golden.family]: True}), torch.Generator().manual_seed(0))
    model.save(m, tmp_path)
    file, head, embed = tmp_path / "model.safetensors", m.checkpoint_name("head.weight"), "embed.weight"
    change_file(file, lambda tensors: tensors.update({head: tensors[m.checkpoint_name(embed)].clone()}))
    for dtype in (torch.float32, torch.bfloat16, None):
        again = model.load(tmp_path, dtype=dtype)
        assert torch.equal(again.embed.weight, m.embed.weight.to(dtype or torch.float32))
    change_file(file, lambda tensors: tensors[head][5, 7].add_(1))
    assert f"{head} differs from the embedding" in error(tmp_path)


@pytest.mark.parametrize("old, new", [("dream", "llada"), ("llada", "dream"), ("dream", "dream")])
def test_saving_over_an_old_model_leaves_nothing_of_it(old, new, tmp_path):
    model.save(model.load(GOLDEN / f"{old}-tiny"), tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"a shard of an older one still")
    (tmp_path / "notes.txt").write_text("mine")
    m = model.load(GOLDEN / f"{new}-tiny")
    with torch.no_grad():
        m.embed.weight.add_(1)
    model.save(m, tmp_path)
    assert torch.equal(model.load(tmp_path).embed.weight, m.embed.weight)
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    weights = {"llada": {"model.safetensors"}, "dream": shards}[new]
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "notes.txt", *weights}


def test_a_save_that_fails_leaves_the_old_model(golden, tmp_path, monkeypatch):
    m = golden.load()
    model.save(m, tmp_path)

    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(model, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        model.save(m, tmp_path)
    assert torch.equal(model.load(tmp_path).embed.weight, m.embed.weight)


def test_files_have_the_mode_of_the_umask(golden, tmp_path):
    (tmp_path / "plain").touch()
    model.save(golden.load(), tmp_path / "m")
    assert {file.stat().st_mode for file in (tmp_path / "m").iterdir()} == {(tmp_path / "plain").stat().st_mode}


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def copy(golden, tmp_path):
    """A copy of the golden folder that a test may break."""
    return shutil.copytree(golden.folder, tmp_path / "m")


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(config_of(folder, **changes)))


def change_tensors(folder, change):
    """Apply change(dict of tensors) to the last safetensors file."""
    file = sorted(folder.glob("model*.safetensors"))[-1]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def error(folder, kind=ValueError):
    with pytest.raises(kind) as e:
        model.load(folder)
    return str(e.value)


@pytest.mark.parametrize("name", ["missing", "./a/b", "/no/such/folder", "a/b/c", "-a/b", "a b/c", "../a/b", ""])
def test_no_such_folder_is_said_without_asking_the_hub(name, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert name in error(name, FileNotFoundError)


def test_a_repo_id_is_downloaded_without_pickles(golden, monkeypatch, tmp_path):
    hub, asked = pytest.importorskip("huggingface_hub"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(golden.folder))
    assert model.load("owner/name-1.0_x").config.family == golden.family
    ((args, options),) = asked
    assert args == ("owner/name-1.0_x",)
    assert "*.py" in options["allow_patterns"]  # kept beside merged weights, never run
    assert not any(p.endswith((".bin", ".pt", ".pkl", "*")) for p in options["allow_patterns"])


def test_a_failed_download_is_one_error(monkeypatch, tmp_path):
    def offline(*args, **options):
        raise OSError("the network is down\nand so on")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", offline)
    message = error("owner/name", FileNotFoundError)
    assert "owner/name" in message and "the network is down" in message and "\n" not in message


def test_no_config(copy):
    (copy / "config.json").unlink()
    assert "config.json" in error(copy, FileNotFoundError)


@pytest.mark.parametrize("content", ["{", "", "[1]", "\xff", "null", "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_invalid_json(copy, file, content):
    (copy / file).write_text(content, encoding="latin-1")
    assert file in error(copy)


def test_json_may_begin_with_a_byte_order_mark(golden, copy):
    for file in copy.glob("*.json"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert model.load(copy).config.family == golden.family


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(copy, bad, dtype):
    file = sorted(copy.glob("model*.safetensors"))[-1]
    name = sorted(load_file(file))[3]

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = bad

    change_tensors(copy, change)
    message = error(copy)
    assert f"{name} in {file.name} has values that are not finite" in message and "\n" not in message


def test_quantized_weights_are_refused(copy):
    name = sorted(load_file(sorted(copy.glob("model*.safetensors"))[-1]))[3]
    change_tensors(copy, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} is of I8 in model" in error(copy) and "quantized, the config wants [" in error(copy)


def test_a_flipped_bit_is_seen_by_the_manifest(copy):
    hashes = {}
    for file in copy.glob("*.*"):
        hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(hashes))
    model.load(copy)
    file = sorted(copy.glob("model*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert f"{file.name} was damaged or changed" in error(copy)


def test_an_adapter_is_not_a_model(golden):
    assert "is an adapter, not a model" in error(golden.folder / "adapter", FileNotFoundError)


@pytest.mark.parametrize("kind", ["llama", 3, None, "a2d"])
def test_unknown_model_type(copy, kind):
    change_config(copy, model_type=kind)
    assert repr(kind) in error(copy) and "config.json" in error(copy)


def test_every_wrong_key_is_named_in_one_error(golden, copy):
    keys = dict(mask_token_id=None, eos_token_id=5000, rms_norm_eps="small", attention_dropout=0.1)
    if golden.family == "llada":
        wrong = dict(block_type="sequential", layer_norm_type="default", d_model=None, n_layers=-2)
    else:
        wrong = dict(use_sliding_window=True, rope_scaling={"type": "yarn"}, hidden_size=None, num_hidden_layers=1.5)
    change_config(copy, **keys, **wrong)
    message = error(copy)
    assert all(key in message for key in {*keys, *wrong} - {"eos_token_id"}), message


@pytest.mark.parametrize("changes", [dict(eos_token_id=320), dict(heads=5), dict(heads=16), dict(kv_heads=3)])
def test_numbers_that_do_not_fit_together(golden, copy, changes):
    names = dict(heads="num_attention_heads", kv_heads="num_key_value_heads")
    if golden.family == "llada":
        names = dict(heads="n_heads", kv_heads="n_kv_heads")
    change_config(copy, **{names.get(k, k): v for k, v in changes.items()})
    assert str(*changes.values()) in error(copy)


BOOKKEEPING = dict(
    _attn_implementation="sdpa",
    _attn_implementation_autoset=True,
    _commit_hash="abc",
    attn_implementation="flash_attention_2",
    attention_bias=True,
    bad_words_ids=None,
    chunk_size_feed_forward=0,
    dtype="bfloat16",
    id2label={"0": "LABEL_0"},
    label2id={"LABEL_0": 0},
    layer_types=["full_attention", "full_attention"],
    length_penalty=1.0,
    max_length=20,
    num_beams=1,
    problem_type=None,
    pruned_heads={"0": [1]},  # fewer heads than the config says would be other shapes
    mystery_switch=True,
    block_size=None,
    num_experts=0,
    rope_scaling={"rope_type": "default"},
    sep_token_id=5,
    suppress_tokens=[],
    temperature=1.0,
    train_max_sequence_length=1024,
    transformers_version="5.0.0",
    unsloth_version="2025.1",
)


@pytest.mark.parametrize("key", BOOKKEEPING)
def test_keys_that_change_no_computation_are_accepted(golden, key):
    plain = model.parse_config(config_of(golden.folder))
    config = model.parse_config({**config_of(golden.folder), key: BOOKKEEPING[key]})
    assert config.raw.pop(key) == BOOKKEEPING[key]  # and kept for save()
    plain.raw.pop(key, None)
    assert config == plain


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("nested", [False, True])
def test_rope_parameters_may_hold_the_theta(golden, key, nested):
    raw = config_of(golden.folder)
    theta = raw["rope_theta"]
    settings = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0}
    raw[key] = {"full_attention": settings} if nested else settings
    assert model.parse_config(raw).rope_theta == theta
    del raw["rope_theta"]
    assert model.parse_config(raw).rope_theta == theta


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 7.0}),
        ("rope_parameters", {"partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_type": "linear"}}),
        ("rope_parameters", [1]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("head_dim", 99),
        ("quantization_config", {"bits": 4}),
        ("block_size", 32),
        ("block_length", 8),
    ],
)
def test_keys_that_change_the_computation_are_refused(golden, copy, key, value):
    change_config(copy, **{key: value})
    assert key in error(copy)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_mixture_of_experts_is_one_short_line(golden, copy, key):
    change_config(copy, **{key: 64, "moe_intermediate_size": 128, "norm_topk_prob": True})
    assert error(copy).endswith(f"config.json: {key}: no mixture of experts and no quantized weights are supported")
    change_config(copy, model_type="sdar_moe", **{key: None})
    assert "model_type is 'sdar_moe'; this code knows llada, dream" in error(copy)


def test_alone_it_loads_its_families_and_names_the_folder_of_others(tmp_path):
    root = Path(model.__file__).parent
    shutil.copyfile(root / "model.py", tmp_path / "model.py")
    script = """
import sys, model
for folder in sys.argv[1:]:
    try:
        print(model.load(folder).config.family)
    except ValueError as e:
        print(str(e).rpartition("; ")[2])
"""
    folders = [str(GOLDEN / f"{family}-tiny") for family in ("llada", "dream", "sdar", "a2d")]
    done = subprocess.run([sys.executable, "-c", script, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    blocks = ", ".join(f"{kind} (with blocks/)" for kind in ("sdar", "a2d-qwen3", "a2d-qwen2"))
    told = f"this code knows llada, dream, {blocks}"
    assert done.stdout.splitlines() == ["llada", "dream", told, told]


def test_a_folder_is_imported_when_its_family_is_named():
    """And not before; whether it was imported first by somebody else changes nothing."""
    script = """
import sys, model
model.load(sys.argv[1])
assert not any(name.startswith("blocks") for name in sys.modules)
m = model.load(sys.argv[2])
from blocks import network
assert type(m) is network.BlockTransformer
"""
    folders = [str(GOLDEN / "dream-tiny"), str(GOLDEN / "sdar-tiny")]
    root = Path(model.__file__).parent
    done = subprocess.run([sys.executable, "-c", script, *folders], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_context_length_is_known(golden):
    raw = config_of(golden.folder)
    assert model.parse_config(raw).max_length == 4096
    key = {"llada": "max_sequence_length", "dream": "max_position_embeddings"}[golden.family]
    assert model.parse_config(config_of(golden.folder, **{key: None})).max_length is None
    assert model.parse_config(config_of(golden.folder, **{key: 64})).max_length == 64


def test_of_several_ends_the_first_counts(golden):
    config = model.parse_config({**config_of(golden.folder), "eos_token_id": [7, 301]})
    assert (config.eos_id, config.raw["eos_token_id"]) == (7, [7, 301])


@pytest.mark.parametrize("odd", [None, True, "x", "", -1, 0, 1.5, [], {}, [1]])
def test_an_odd_value_is_a_value_error_or_works(golden, odd):
    raw = json.loads((golden.folder / "config.json").read_text())
    for key in [*raw, "n_kv_heads", "use_mrope", "something_new"]:
        for content in ({**raw, key: odd}, {**raw, key: odd, "mlp_hidden_size": None}):
            try:
                model.parse_config(content)
            except ValueError as e:
                assert "config.json" in str(e)


@pytest.mark.parametrize("left", [0, 4, 200, 0.5, 0.999])
def test_truncated_file(copy, left):
    file = sorted(copy.glob("model*.safetensors"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[: left if isinstance(left, int) else int(left * len(content))])
    assert file.name in error(copy)


def test_missing_files_are_named(golden, copy):
    files = sorted(copy.glob("model*.safetensors"))
    for file in files:
        file.unlink()
    message = error(copy, FileNotFoundError)
    assert all(file.name in message for file in files)


def test_a_save_that_fails_leaves_what_was_there_and_nothing_else(golden, tmp_path):
    """Also what others have there: a .tmp may be anybody's, and a link may lead into a cache that others read."""
    m, cache, folder = golden.load(), tmp_path / "cache", tmp_path / "m"
    cache.write_bytes(b"of others")
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(cache)
    (folder / "model.safetensors.tmp").write_text("mine")

    def broken(parameter):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        model.save(m, folder, whole=broken)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "model.safetensors.tmp"]
    model.save(m, folder)
    assert cache.read_bytes() == b"of others" and (folder / "model.safetensors.tmp").read_text() == "mine"
    assert torch.equal(model.load(folder).embed.weight, m.embed.weight)
    assert not [p for p in folder.iterdir() if p.is_dir()]


@pytest.mark.parametrize("path", ["../m/x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", 3, None])
def test_an_index_cannot_name_files_elsewhere(copy, path):
    names = list(load_file(sorted(copy.glob("model*.safetensors"))[0]))
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, path)}))
    with pytest.raises((ValueError, FileNotFoundError), match=index.name):
        model.load(copy)


@pytest.mark.parametrize("golden", ["dream"], indirect=True)
def test_the_index_says_which_file_counts(golden, copy):
    change_tensors(copy, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(320, 48)}))
    assert torch.equal(model.load(copy).embed.weight, golden.load().embed.weight)  # the index names the first file


def test_every_tensor_is_accounted_for(copy):
    names = sorted(load_file(sorted(copy.glob("model*.safetensors"))[-1]))

    def change(tensors):
        del tensors[names[0]]
        tensors[names[1]] = tensors[names[1]][1:].clone()
        tensors["surplus"] = torch.zeros(1)

    change_tensors(copy, change)
    message = error(copy)
    assert f"missing {names[0]};" in message and "unexpected surplus" in message and f"{names[1]} is [" in message


def test_wrong_shape_gives_both_shapes(copy):
    def change(tensors):
        tensors.update({n: torch.zeros(3, 5) for n in tensors if n.endswith("q_proj.weight")})

    change_tensors(copy, change)
    assert "q_proj.weight is [3, 5], the config wants [48, 48]" in error(copy)


def test_a_long_list_is_cut(copy):
    change_tensors(copy, lambda tensors: tensors.update({f"surplus.{i}": torch.zeros(1) for i in range(500)}))
    message = error(copy)
    assert message.count("surplus") == 20 and "480 more" in message


def test_loading_peaks_at_the_models_size_and_one_tensor(tmp_path):
    """In a process of its own, whose peak resident memory only rises: file pages must go."""
    raw = json.loads((Path(__file__).parent / "golden" / "dream-tiny" / "config.json").read_text())
    raw.update(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16)
    model.save(model.create(raw, dtype=torch.bfloat16), tmp_path)
    script = f"""
import resource, torch, model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
m = model.load({str(tmp_path)!r}, dtype=torch.bfloat16)
sizes = [p.numel() * p.element_size() for p in m.parameters()]
print((peak() - before - max(sizes)) / sum(sizes))
"""
    root = Path(model.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.15

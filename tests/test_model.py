"""model.py: the network against the official one and against a plain loop, and folders in and out.

python -m pytest tests/test_model.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model

TIED = {"llada": "weight_tying", "dream": "tie_word_embeddings"}


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def config_of(folder, **changes):
    """The content of a config.json with some keys changed; None removes one."""
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    return {k: v for k, v in raw.items() if v is not None}


def naive(m, ids):
    """Logits [L, V] of one row of ids [L]: one head and one position at a time, in float64."""
    c, L = m.config, len(ids)
    E, group = c.width // c.heads, c.heads // c.kv_heads
    w = {name: p.detach().double() for name, p in m.named_parameters()}

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def head(x, layer, part, h):  # the h-th slice of E outputs
        rows = slice(h * E, (h + 1) * E)
        y = x @ w[f"{layer}.{part}.weight"][rows].T
        return y + w[f"{layer}.{part}.bias"][rows] if c.qkv_bias else y

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
            heads.append((q @ k.T / E**0.5).softmax(-1) @ v)
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
def test_bfloat16_is_closer_to_the_official_bfloat16_than_that_to_float32(golden):
    e = golden.expected
    ours = golden.load(dtype=torch.bfloat16)(e["logits.ids"])
    assert ours.dtype == torch.bfloat16
    rounding = (e["bf16.aligned"] - e["logits.aligned"]).abs().mean()
    assert (ours.float() - e["bf16.aligned"]).abs().mean() <= rounding / 4


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
    assert not torch.equal(a.layers[0].q_proj.weight, c.layers[0].q_proj.weight)


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


@pytest.mark.parametrize("kind", ["llama", 3, None])
def test_unknown_model_type(copy, kind):
    change_config(copy, model_type=kind)
    assert repr(kind) in error(copy) and "config.json" in error(copy)


def test_every_wrong_key_is_named_in_one_error(golden, copy):
    keys = dict(mystery_switch=True, mask_token_id=None, eos_token_id=5000, rms_norm_eps="small", attention_dropout=0.1)
    if golden.family == "llada":
        wrong = dict(block_type="sequential", layer_norm_type="default", d_model=None, n_layers=-2)
    else:
        wrong = dict(use_sliding_window=True, rope_scaling={"type": "yarn"}, hidden_size=None, num_hidden_layers=1.5)
    change_config(copy, **keys, **wrong)
    message = error(copy)
    assert all(key in message for key in {*keys, *wrong} - {"eos_token_id"}), message


@pytest.mark.parametrize("changes", [dict(eos_token_id=320), dict(heads=5), dict(heads=16), dict(kv_heads=3)])
def test_numbers_that_do_not_fit_together(golden, copy, changes):
    names = model.READ[golden.family] | ({"kv_heads": "n_kv_heads"} if golden.family == "llada" else {})
    change_config(copy, **{names.get(k, k): v for k, v in changes.items()})
    assert str(*changes.values()) in error(copy)


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
    assert f"missing {names[0]};" in message and "unexpected surplus;" in message and f"{names[1]} is [" in message


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


def test_a_cache_over_the_whole_sequence_changes_nothing(golden):
    m, ids = golden.load(), golden.expected["logits.ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    cache, exact = m.new_cache(), m(ids, positions=positions)
    torch.testing.assert_close(m(ids, positions=positions, cache=cache), exact)
    torch.testing.assert_close(m(ids, positions=positions, cache=cache, span=(0, ids.shape[1])), exact)
    torch.testing.assert_close(m(ids, positions=positions[:, 5:8], cache=cache, span=(5, 8)), exact[:, 5:8])
    changed = ids.clone()
    changed[:, 6] += 1
    near = m(changed, positions=positions[:, 5:8], cache=cache, span=(5, 8))
    assert not torch.allclose(near, exact[:, 5:8]) and not torch.allclose(near, m(changed)[:, 5:8])  # approximate

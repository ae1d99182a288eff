"""lora.py: adapters against W + (alpha / rank) B A by hand, and PEFT folders in and out.

python -m pytest tests/test_lora.py
"""

import hashlib
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import model

IDS = torch.arange(40).view(2, 20)


def fill(m, seed=0):
    """Random lora_B, so that the adapter does something. Returns m."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora.layers(m).values():
            layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=g))
    return m


def base_weights(m):
    return {name: p.detach().clone() for name, p in m.named_parameters() if "lora_" not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Tiny(nn.Module):
    """Any module will do, in any nesting; no checkpoint_name."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict(dict(q_proj=nn.Linear(6, 8), v_proj=nn.Linear(6, 8, bias=False)))
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.inner["q_proj"](x) * self.inner["v_proj"](x))


# ---------------------------------------------------------------------------------------------------------- forward


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_adapter_logits_are_those_of_peft(golden, merged):
    m = lora.load(golden.load(), golden.folder / "adapter")
    if merged:
        lora.merge(m)
    e = golden.expected
    torch.testing.assert_close(m(e["logits.ids"]), e["adapter.aligned"], rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(golden, dtype):
    m = golden.load(dtype=dtype)
    before = m(IDS)
    lora.inject(m)
    assert len(lora.layers(m)) == 2 * m.config.layers
    assert torch.equal(m(IDS), before)


@torch.no_grad()
def test_forward_is_the_formula(golden):
    m = golden.load()
    layer = fill(lora.inject(m, rank=3, alpha=5, targets=("v_proj",))).layers[1].attn.v_proj
    x = torch.randn(2, 7, m.config.width)
    by_hand = x @ (layer.weight + 5 / 3 * layer.lora_B.weight @ layer.lora_A.weight).T
    by_hand = by_hand if layer.bias is None else by_hand + layer.bias
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("target", ["q_proj", "o_proj", "down_proj", "head"])
def test_an_adapter_anywhere_takes_effect_and_merges(golden, target):
    m = golden.load()
    names = [m.checkpoint_name(name) for name, _ in m.named_modules() if name.endswith(target)]
    before = m(IDS)
    fill(lora.inject(m, rank=2, alpha=1, targets=names))
    unmerged = m(IDS)
    assert (unmerged - before).abs().max() > 0.01
    torch.testing.assert_close(lora.merge(m)(IDS), unmerged, rtol=1e-3, atol=1e-3)


def test_dropout_acts_in_training_only(golden):
    m = golden.load()
    fill(lora.inject(m, dropout=0.5))  # m is in eval mode
    torch.testing.assert_close(m(IDS), m(IDS), rtol=0, atol=0)
    m.train()
    assert not torch.equal(m(IDS), m(IDS))


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_float32_adapter_trains(golden, dtype):
    m = lora.inject(golden.load(dtype=dtype), rank=4)
    trained = {name: p for name, p in m.named_parameters() if p.requires_grad}
    assert set(map(id, trained.values())) == set(map(id, lora.tensors(m).values()))
    assert {p.dtype for p in trained.values()} == {torch.float32}
    base, start = base_weights(m), {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        logits = m(IDS)
        assert logits.dtype == dtype
        logits.float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(base, base_weights(m))
    assert not any(torch.equal(start[name], p) for name, p in trained.items())


def test_inject_is_determined_by_its_generator(golden):
    a, b, c = (lora.inject(golden.load(), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert same(lora.tensors(a), lora.tensors(b))
    assert not same(lora.tensors(a), lora.tensors(c))


# ---------------------------------------------------------------------------------------------------- merge, disable


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_w_plus_ba_once_and_unmerge_is_exact(golden, dtype):
    m = fill(lora.inject(golden.load(dtype=dtype), rank=4, alpha=8))
    base, adapters, before = base_weights(m), {k: p.clone() for k, p in lora.tensors(m).items()}, m(IDS)
    by_hand = {
        name: (layer.weight.float() + 2 * layer.lora_B.weight @ layer.lora_A.weight).to(dtype)
        for name, layer in lora.layers(m).items()
    }
    for _ in range(2):  # twice is as good as once
        lora.merge(m)
        for name, weight in by_hand.items():
            assert torch.equal(m.get_submodule(name).weight, weight), name
        assert same(lora.tensors(m), adapters)
    for _ in range(2):
        lora.unmerge(m)
        assert same(base_weights(m), base) and same(lora.tensors(m), adapters)
        assert torch.equal(m(IDS), before)


@torch.no_grad()
def test_merged_model_saves_and_loads_as_a_plain_one(golden, tmp_path):
    m = lora.merge(lora.load(golden.load(), golden.folder / "adapter"))
    model.save(m, tmp_path)
    e = golden.expected
    plain = model.load(tmp_path)
    assert not lora.layers(plain)
    torch.testing.assert_close(plain(e["logits.ids"]), e["adapter.aligned"], rtol=0, atol=1e-3)
    lora.inject(plain)  # and it can be adapted again


def test_an_unmerged_adapter_is_not_saved_as_a_model(golden, tmp_path):
    m = lora.inject(golden.load())
    with pytest.raises(ValueError, match="lora_A.*merge"):
        model.save(m, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_nests_and_survives_exceptions(golden, merged):
    m = golden.load()
    base = m(IDS)
    fill(lora.inject(m))
    if merged:
        lora.merge(m)
    adapted = m(IDS)
    assert not torch.equal(adapted, base)
    with lora.disabled(m):
        with pytest.raises(KeyError), lora.disabled(m):
            raise KeyError
        assert torch.equal(m(IDS), base)
    assert torch.equal(m(IDS), adapted)


# ----------------------------------------------------------------------------------------------------- save and load


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_round_trip_in_the_names_of_peft(golden, tmp_path, merged):
    official = load_file(golden.folder / "adapter" / "adapter_model.safetensors")
    m = fill(lora.inject(golden.load(), rank=4, alpha=8))
    if merged:
        lora.merge(m)
    lora.save(m, tmp_path, base="owner/name")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in stored.items()} == {k: (v.shape, v.dtype) for k, v in official.items()}

    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, golden.folder / "adapter"))
    assert ours.pop("base_model_name_or_path") == "owner/name"
    assert theirs | ours | {"inference_mode": None} == theirs | {"inference_mode": None}

    for target in (golden.load(), lora.inject(golden.load(), rank=4, alpha=99)):  # a base model, or filled up in place
        again = lora.load(target, tmp_path)
        assert same(lora.tensors(again), lora.tensors(m))
        assert torch.equal(again(IDS), lora.unmerge(m)(IDS))


def test_an_adapter_on_some_layers_round_trips(golden, tmp_path):
    pattern = golden.load().checkpoint_name("layers.1.attn.q_proj").replace(".", r"\.")
    m = fill(lora.inject(golden.load(), rank=2, targets=pattern))
    assert list(lora.layers(m)) == ["layers.1.attn.q_proj"]
    lora.save(m, tmp_path)
    assert same(lora.tensors(lora.load(golden.load(), tmp_path)), lora.tensors(m))


@torch.no_grad()
def test_loading_over_a_merged_adapter_replaces_it(golden):
    m = lora.merge(fill(lora.inject(golden.load(), rank=4, alpha=8)))
    e = golden.expected
    logits = lora.load(m, golden.folder / "adapter")(e["logits.ids"])
    torch.testing.assert_close(logits, e["adapter.aligned"], rtol=0, atol=1e-3)


def test_a_stored_dropout_does_not_act_in_eval_mode(golden, adapter):
    change_config(adapter, lora_dropout=0.5)
    m = lora.load(golden.load(), adapter)
    assert torch.equal(m(IDS), m(IDS))


def test_an_adapter_loaded_into_another_brings_its_dropout(golden, adapter):
    m = lora.load(golden.load(), adapter)
    change_config(adapter, lora_dropout=0.5)
    assert {layer.dropout for layer in lora.layers(lora.load(m, adapter)).values()} == {0.5}


def test_a_pattern_does_not_fit_what_is_inside_of_an_adapter(golden):
    pattern = r".*\.q_proj.*"
    m = lora.inject(golden.load(), targets=pattern)
    assert lora.find(m, pattern).keys() == lora.layers(m).keys()


NUMBERS = [
    dict(lora_alpha=4),
    dict(lora_alpha=7, use_rslora=True),
    dict(lora_alpha=7, rank_pattern={"v_proj": 2}, alpha_pattern={"inner.q_proj": 3}, use_rslora=True),
]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("numbers", NUMBERS)
def test_peft_loads_ours_and_we_load_its(tmp_path, numbers):
    peft = pytest.importorskip("peft")
    base, x = Tiny(), torch.randn(3, 6)
    weights = {k: v.clone() for k, v in base.state_dict().items()}

    def fresh():
        m = Tiny()
        m.load_state_dict(weights)
        return m

    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **numbers))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora.load(fresh(), tmp_path / "theirs")
    torch.testing.assert_close(ours(x), theirs(x))

    lora.save(ours, tmp_path / "ours")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours")(x), theirs(x))


# ------------------------------------------------------------------------------------------------ numbers per layer


def by_hand(layer, scaling, x):
    y = x @ (layer.weight + scaling * layer.lora_B.weight @ layer.lora_A.weight).T
    return y if layer.bias is None else y + layer.bias


@torch.no_grad()
def test_patterns_and_rslora_give_each_layer_its_numbers(golden, tmp_path):
    first, second = (golden.load().checkpoint_name(f"layers.{i}.attn.q_proj") for i in (0, 1))
    patterns = dict(rank_pattern={first: 2}, alpha_pattern={"v_proj": 3, second: 5})
    m = fill(lora.inject(golden.load(), rank=4, alpha=8, rslora=True, **patterns))
    numbers = {name: (layer.rank, layer.alpha) for name, layer in lora.layers(m).items()}
    assert numbers == {
        "layers.0.attn.q_proj": (2, 8),
        "layers.0.attn.v_proj": (4, 3),
        "layers.1.attn.q_proj": (4, 5),
        "layers.1.attn.v_proj": (4, 3),
    }
    layer, x = m.layers[0].attn.q_proj, torch.randn(3, m.config.width)
    torch.testing.assert_close(layer(x), by_hand(layer, 8 / 2**0.5, x), rtol=1e-4, atol=1e-4)

    lora.save(m, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["use_rslora"]) == (4, {first: 2}, True)
    for target in (golden.load(), lora.inject(golden.load(), rank=4, alpha=1, rank_pattern={first: 2})):
        again = lora.load(target, tmp_path)
        assert {name: (layer.rank, layer.alpha) for name, layer in lora.layers(again).items()} == numbers
        assert torch.equal(again(IDS), m(IDS))
    torch.testing.assert_close(lora.merge(again)(IDS), m(IDS), rtol=1e-3, atol=1e-3)


def test_a_name_that_ends_another_keeps_its_numbers(tmp_path):
    def nested():
        m = nn.Module()
        m.inner, m.proj = nn.ModuleDict(dict(proj=nn.Linear(4, 4))), nn.Linear(4, 4)
        return m

    m = lora.inject(nested(), targets=("proj",), rank=2, rank_pattern={"^proj": 3}, alpha_pattern={"^proj": 5})
    lora.save(m, tmp_path)
    again = lora.load(nested(), tmp_path)
    for name, numbers in {"proj": (3, 5), "inner.proj": (2, 16)}.items():
        layer = lora.layers(again)[name]
        assert (layer.rank, layer.alpha) == numbers


@pytest.mark.parametrize(
    "key, name, hit",
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.xq_proj", False),
        ("proj", "model.q_proj", False),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        ("layers.[01].q_proj", "model.layers.1.q_proj", True),
        ("^q_proj", "model.q_proj", False),
        ("q_proj", "q_proj.lora_A", False),
    ],
)
def test_a_pattern_fits_the_end_of_a_name(key, name, hit):
    assert lora.by_pattern({key: 2}, name, 1) == 1 + hit


def test_settings_are_those_of_the_adapter(golden, tmp_path):
    lora.save(lora.inject(golden.load(), 3, 6, ("k_proj",), 0.25), tmp_path)
    expected = lora.Settings(rank=3, alpha=6, targets=["k_proj"], dropout=0.25)
    assert lora.settings(tmp_path) == expected
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")  # an editor's mark at the beginning
    assert lora.settings(tmp_path) == expected


def test_targets_that_the_model_does_not_have_are_no_layers(golden, adapter):
    change_config(adapter, target_modules=["q_proj", "v_proj", "c_attn", "w1", "query_key_value"])
    m = lora.load(golden.load(), adapter)
    assert same(lora.tensors(m), lora.tensors(lora.load(golden.load(), golden.folder / "adapter")))


def test_adapters_come_from_the_hub(golden, monkeypatch, tmp_path):
    hub, asked = pytest.importorskip("huggingface_hub"), []
    monkeypatch.chdir(tmp_path)

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(golden.folder / "adapter")

    monkeypatch.setattr(hub, "snapshot_download", download)
    m = lora.load(golden.load(), "owner/adapter")
    assert len(lora.layers(m)) == 4
    assert asked == [("owner/adapter", ["adapter_config.json", "adapter_model.safetensors"])]

    def offline(*args, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    refused(golden, "owner/adapter", "owner/adapter.*no network$", FileNotFoundError)


def test_files_have_the_mode_of_the_umask(golden, tmp_path):
    (tmp_path / "plain").touch()
    for _ in range(2):  # a new folder, and the same one again
        lora.save(lora.inject(golden.load()), tmp_path / "a")
    assert {file.stat().st_mode for file in (tmp_path / "a").iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def adapter(golden, tmp_path):
    """A copy of the golden adapter that a test may break."""
    return shutil.copytree(golden.folder / "adapter", tmp_path / "adapter")


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(golden, folder, message, kind=ValueError):
    """lora.load raises the message, and the model is as it was: no adapter, nothing frozen, the same weights."""
    m = golden.load()
    base = base_weights(m)
    with pytest.raises(kind, match=message):
        lora.load(m, folder)
    assert not lora.layers(m) and same(base_weights(m), base) and all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_load_names_a_missing_file(golden, adapter, file):
    (adapter / file).unlink()
    refused(golden, adapter, file, FileNotFoundError)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_load_refuses_a_broken_file(golden, adapter, file, content):
    (adapter / file).write_bytes(content)
    refused(golden, adapter, re.escape(str(adapter)))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_load_refuses_a_config_without(golden, adapter, key):
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config[key]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refused(golden, adapter, key)


# checkpoints/*/adapter_config.json of tonyckc/TABOM at commit dc582b2, written by PEFT 0.17. The four differ in the
# base model and in task_type: FEATURE_EXTRACTION for Dream, CAUSAL_LM for LLaDA.
AUTHORS = """{"alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct",
"bias": "none", "corda_config": null, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
"inference_mode": true, "init_lora_weights": true, "layer_replication": null, "layers_pattern": null,
"layers_to_transform": null, "loftq_config": {}, "lora_alpha": 16, "lora_bias": false, "lora_dropout": 0.0,
"megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null, "peft_type": "LORA",
"qalora_group_size": 16, "r": 16, "rank_pattern": {}, "revision": null, "target_modules": ["q_proj", "v_proj"],
"target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_dora": false,
"use_qalora": false, "use_rslora": false}"""


@pytest.mark.parametrize("task_type", ["FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_the_authors_adapter_folder_loads(golden, tmp_path, task_type):
    """Their config over tensors of its shape, beside other files, and with a setting that no PEFT has yet."""
    m = fill(lora.inject(golden.load(), rank=16, alpha=16))
    lora.save(m, tmp_path)
    (tmp_path / "adapter_config.json").write_text(AUTHORS)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    change_config(tmp_path, task_type=task_type)
    change_config(tmp_path, a_later_setting=None, another=False)  # it is off: nothing to compute
    loaded = lora.load(golden.load(), tmp_path)
    assert same(lora.tensors(loaded), lora.tensors(m)) and torch.equal(loaded(IDS), m(IDS))
    change_config(tmp_path, a_later_setting=7)
    refused(golden, tmp_path, "unsupported adapter settings a_later_setting = 7")


UNSUPPORTED = dict(
    peft_type="IA3",
    use_dora=True,
    use_qalora=True,
    lora_bias=True,
    bias="all",
    fan_in_fan_out=True,
    modules_to_save=["norm"],
    layers_to_transform=[0],
    trainable_token_indices=[1],
    alora_invocation_tokens=[1, 2],
    init_lora_weights="pissa",
)


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_load_refuses_a_variant_that_it_does_not_compute(golden, adapter, key):
    change_config(adapter, **{key: UNSUPPORTED[key]})
    refused(golden, adapter, key)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(r=8), r"lora_A.weight is \[4, 48\], not \[8, 48\]"),
        (dict(target_modules=["q_proj"]), "unexpected .*v_proj"),
        (dict(target_modules=["q_proj", "v_proj", "k_proj"]), "missing .*k_proj"),
        (dict(target_modules=["nothing"]), "nothing"),
        (dict(target_modules=[]), "no target"),
        (dict(target_modules=None), "target_modules"),
        (dict(lora_dropout=1.5), "dropout 1.5"),
        (dict(lora_alpha=float("inf")), "alpha inf"),
        (dict(rank_pattern={"q_proj": 2}), r"q_proj.lora_A.weight is \[4, 48\], not \[2, 48\]"),
        (dict(rank_pattern={"q_proj": "x"}), "rank 'x'"),
        (dict(rank_pattern={"(": 2}), "does not map"),
        (dict(alpha_pattern=["q_proj"]), "does not map"),
        (dict(alpha_pattern={"q_proj": 0}), "alpha 0"),
    ],
)
def test_load_refuses_what_does_not_fit(golden, adapter, changes, message):
    change_config(adapter, **changes)
    refused(golden, adapter, message)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_load_refuses_values_that_are_not_finite(golden, adapter, bad):
    name = sorted(load_file(adapter / "adapter_model.safetensors"))[1]
    change_tensors(adapter, lambda tensors: tensors[name].view(-1)[7:8].fill_(bad))
    refused(golden, adapter, f"adapter.*{name} has values that are not finite")


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", "PROMPT_TUNING", None])
def test_other_methods_than_lora_are_named(golden, adapter, kind):
    (adapter / "adapter_config.json").write_text(json.dumps(dict(peft_type=kind, feedforward_modules=[])))
    (adapter / "adapter_model.safetensors").unlink()
    refused(golden, adapter, f"peft_type is {kind!r}, and only LoRA")


def test_a_pickle_is_named_and_not_read(golden, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(golden, adapter, "adapter_model.bin is a pickle", FileNotFoundError)


def test_a_run_names_its_newest_checkpoint(golden, adapter, tmp_path):
    for name, step in (("epoch-1", 9), ("step-12", 12), ("epoch-2", 18), ("step-11", 11)):
        shutil.copytree(adapter, tmp_path / "run" / name)
        (tmp_path / "run" / name / "trainer.json").write_text(json.dumps(dict(step=step)))
    refused(golden, tmp_path / "run", "is a run: take one.*epoch-2$", FileNotFoundError)


def test_no_folder_and_a_model_folder(golden, tmp_path):
    refused(golden, tmp_path / "nothing", "no adapter .*nothing", FileNotFoundError)
    refused(golden, golden.folder, "is a model, not an adapter", FileNotFoundError)
    refused(golden, tmp_path, "no adapter_config.json", FileNotFoundError)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_is_seen_by_the_manifest(golden, adapter, file):
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in adapter.iterdir()}
    (adapter / "manifest.json").write_text(json.dumps(hashes))
    lora.load(golden.load(), adapter)
    if file == "adapter_config.json":
        change_config(adapter, lora_alpha=16)
    else:
        content = bytearray((adapter / file).read_bytes())
        content[-2] ^= 1
        (adapter / file).write_bytes(content)
    refused(golden, adapter, f"{file} was damaged or changed")


def test_load_lists_all_tensors_that_do_not_fit(golden, adapter):
    names = sorted(load_file(adapter / "adapter_model.safetensors"))

    def change(tensors):
        del tensors[names[0]]
        tensors["surplus"] = torch.zeros(1)
        tensors[names[2]] = torch.zeros(7, 7)

    change_tensors(adapter, change)
    lookahead = (f"missing {names[0]}", "unexpected surplus", rf"{names[2]} is \[7, 7\]")
    refused(golden, adapter, "".join(f"(?=.*{part})" for part in lookahead))


def test_load_into_an_adapter_of_another_rank(golden):
    m = lora.inject(golden.load(), rank=2)
    before = {k: p.detach().clone() for k, p in lora.tensors(m).items()}
    with pytest.raises(ValueError, match="rank 4.* has rank 2"):
        lora.load(m, golden.folder / "adapter")
    assert same(before, lora.tensors(m)) and {layer.alpha for layer in lora.layers(m).values()} == {16}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(targets=("q_proj", "query")), "query.* there are .*q_proj"),
        (dict(targets=()), "no target"),
        (dict(targets="q_pro"), "q_pro"),  # a pattern is for the whole name
        (dict(rank=0), "rank 0"),
        (dict(alpha=0), "alpha 0"),
        (dict(rank_pattern={"q_proj": 0}), "rank 0"),
        (dict(dropout=1.0), "dropout 1.0"),
    ],
)
def test_inject_refuses(golden, options, message):
    m = golden.load()
    with pytest.raises(ValueError, match=message):
        lora.inject(m, **options)
    assert not lora.layers(m) and all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("merged", [False, True])
def test_inject_refuses_a_second_adapter(golden, merged):
    m = lora.inject(golden.load())
    if merged:
        lora.merge(m)
    with pytest.raises(ValueError, match="already"):
        lora.inject(m)


def test_save_refuses_a_model_without_adapter(golden, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        lora.save(golden.load(), tmp_path)

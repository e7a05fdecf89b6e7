"""Pretrained transformers from a local folder: texts in, adapters out, with nothing fetched."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from fl_lightning import FederatedDataModule, fit
from fl_lightning.data.hidden_states import hidden_states
from fl_lightning.data.sentence_features import sentence_features
from fl_lightning.data.sources import load
from fl_lightning.data.tokenized import tokenized_text
from fl_lightning.networks import pretrained
from fl_lightning.networks.adapters import write_adapters

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

WORDS = "grain oil ship trade money bank rate crude wheat gold the of a".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of 2 layers and its tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(names) + "\n")
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Sixty texts about grain or oil, by six authors."""
    path = tmp_path_factory.mktemp("texts") / "news.csv"
    rows = ["who,text,topic"]
    for i in range(60):
        words = " ".join(WORDS[(i * k) % 13] for k in range(1, 2 + i % 7))
        rows.append(
            f"author {i % 6},{'grain wheat' if i % 2 else 'oil crude'} {words},{'ab'[i % 2]}"
        )
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def texts(folder, table, **options):
    options = {"max_tokens": 8, "test_fraction": 0.2, "client": "who"} | options
    return tokenized_text(table, "text", options.pop("label", "topic"), folder, **options)


def test_texts_become_tokens_and_their_mask(folder, table):
    arrays = texts(folder, table)
    assert (len(arrays.x_train), len(arrays.x_test), arrays.num_classes) == (48, 12, 2)
    inputs = arrays.fields.unpack(arrays.x_train)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert set(inputs) == {"input_ids", "attention_mask"}
    row = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
    assert tokenizer.decode(row).startswith("[CLS] oil crude")
    assert len(arrays.client_train.unique()) == 6


def test_the_next_token_is_a_target_where_there_is_one(folder, table):
    arrays = texts(folder, table, label=None)
    inputs = arrays.fields.unpack(arrays.x_train)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert arrays.num_classes == 0
    there = arrays.y_train != -100
    assert torch.equal(there[:, :-1], mask[:, 1:] > 0)
    assert not there[:, -1].any()
    assert torch.equal(arrays.y_train[:, :-1][there[:, :-1]], ids[:, 1:][there[:, :-1]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"label": "nothing"}, "'nothing' is not a column"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
        ({"classes": ["a"]}, "'b' is not among classes"),
        ({"client": "x"}, "'x' is not a column"),
    ],
)
def test_what_the_table_lacks_is_said(folder, table, options, words):
    with pytest.raises(ValueError, match=words):
        texts(folder, table, **options)


def test_a_folder_without_a_model_is_said(table, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer=.*no pretrained model can be had"):
        texts(str(tmp_path), table)
    with pytest.raises(ValueError, match=r"model=.*no pretrained model can be had"):
        pretrained.text_classifier(str(tmp_path))


@pytest.mark.parametrize("start", ["frozen_a", "orthogonal", "default"])
def test_low_rank_updates_start_at_the_pretrained_model(folder, table, start):
    inputs = load(texts(folder, table)).fields.unpack(texts(folder, table).x_train)
    head = pretrained.text_classifier(folder, train="head")
    adapted = pretrained.text_classifier(folder, train="lora", lora_start=start)
    adapted.head.load_state_dict(head.head.state_dict())
    assert torch.allclose(adapted(**inputs), head(**inputs), atol=1e-5)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert any("lora_B" in n for n in trained)
    assert any("lora_A" in n for n in trained) == (start != "frozen_a")
    gradients = torch.autograd.grad(
        adapted(**inputs).square().sum(), [p for p in adapted.parameters() if p.requires_grad]
    )
    zero = sum(not bool(g.any()) for g in gradients)
    assert (zero > 0) == (start == "default")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0"),
        ({"lora_targets": ["nothing"]}, r"lora_targets=\['nothing'\]"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_options_out_of_range_are_said(folder, options, words):
    with pytest.raises(ValueError, match=words):
        pretrained.text_classifier(folder, **options)


def command(folder, table, run, *options):
    return [
        f"--run_dir={run}", "--data.source=tokenized_text", f"--data.source_args.path={table}",
        "--data.source_args.text=text", "--data.source_args.label=topic",
        f"--data.source_args.tokenizer={folder}", "--data.source_args.max_tokens=8",
        "--data.source_args.test_fraction=0.2", "--data.num_clients=2", "--trainer.max_epochs=2",
        "--trainer.logger=false", *options,
    ]  # fmt: skip


def test_an_adapter_is_trained_and_exported(folder, table, tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    run = tmp_path / "run"
    fit.main(
        command(
            folder, table, run, "--model.network=fl_lightning.networks.pretrained.text_classifier",
            f"--model.network.model={folder}", "--model.execution=loop",
            "--model.metrics=torchmetrics.classification.MulticlassF1Score",
            "--model.metrics.num_classes=2", "--model.metrics.average=macro",
        )
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["test_metrics"]) == {"MulticlassF1Score"}
    from fl_lightning.export import export

    written = export(str(run), None)
    assert {p.name for p in (written / "adapter_body").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    body = transformers.AutoModel.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that peft still uses
        loaded = peft.PeftModel.from_pretrained(body, str(written / "adapter_body"))
    weights = {n: p for n, p in loaded.named_parameters() if "lora_B" in n}
    from safetensors.torch import load_file

    whole = load_file(written / "model.safetensors")
    assert weights
    assert all(torch.equal(p, whole[f"body.{n}"]) for n, p in weights.items())
    assert any(bool(p.any()) for p in weights.values())


def test_a_head_alone_trains_on_features_computed_once(folder, table, tmp_path, monkeypatch):
    monkeypatch.setenv("AADP_FL_DATA_DIR", str(tmp_path / "cache"))
    data = FederatedDataModule(
        texts(folder, table), num_clients=2, transform="sentence_features",
        transform_args={"model": folder, "normalize": False},
    )  # fmt: skip
    network = pretrained.text_classifier(folder, train="head", normalize=False)
    inputs = texts(folder, table)
    with torch.no_grad():
        want = network(**inputs.fields.unpack(inputs.x_test))
        assert torch.allclose(network.head(data._prepared.arrays.x_test), want, atol=1e-5)
    assert data.transform_problem == ""
    assert isinstance(network.head, nn.Linear)


@pytest.mark.parametrize("train", ["lora", "all"])
def test_frozen_layers_computed_once_give_the_whole_network(
    folder, table, tmp_path, monkeypatch, train
):
    """Outputs and gradients of what is trained, padding included; and what vmap makes of them."""
    monkeypatch.setenv("AADP_FL_DATA_DIR", str(tmp_path / "cache"))
    arrays = texts(folder, table)
    data = FederatedDataModule(
        arrays, num_clients=2, transform="hidden_states",
        transform_args={"model": folder, "frozen_layers": 1},
    )  # fmt: skip
    options = {"train": train, "lora_start": "orthogonal"}
    upper = pretrained.text_classifier(folder, frozen_layers=1, **options)
    whole = pretrained.text_classifier(folder, **options)
    names = [n for n, p in upper.named_parameters() if p.requires_grad]
    missing = whole.load_state_dict(upper.state_dict(), strict=False).missing_keys
    assert all("layer.0." in n or "embeddings." in n for n in missing)
    inputs = arrays.fields.unpack(arrays.x_test)
    assert not inputs["attention_mask"].all()
    states = data._prepared.arrays.x_test
    assert data.transform_problem == ""
    assert torch.equal((states != 0).any(-1), inputs["attention_mask"] > 0)
    want, have = whole(**inputs), upper(states)
    assert torch.allclose(have, want, atol=1e-5)
    assert torch.allclose(torch.vmap(upper)(states[:, None])[:, 0], want, atol=1e-5)
    own = (dict(net.named_parameters()) for net in (whole, upper))
    grads = (
        torch.autograd.grad(out.square().sum(), [parameters[n] for n in names])
        for out, parameters in zip((want, have), own, strict=True)
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
    assert not any("layer.0." in n for n in names)


@pytest.mark.parametrize("count", [-1, 2])
def test_a_number_of_layers_that_no_part_can_have_is_said(folder, table, count):
    arrays = texts(folder, table)
    inputs = arrays.fields.unpack(arrays.x_test)
    with pytest.raises(ValueError, match=f"frozen_layers={count} must be from 1 to 1"):
        hidden_states(inputs, model=folder, frozen_layers=count)
    with pytest.raises(ValueError, match=f"frozen_layers={count} must be from 1 to 1"):
        pretrained.text_classifier(folder, frozen_layers=count)


def test_an_adapter_of_upper_layers_is_one_of_the_whole(folder, table, tmp_path):
    upper = pretrained.text_classifier(folder, frozen_layers=1, lora_start="orthogonal")
    spec = {
        "class_path": "fl_lightning.networks.pretrained.text_classifier",
        "init_args": {"model": folder, "frozen_layers": 1, "lora_start": "orthogonal"},
    }
    with torch.no_grad():
        for name, parameter in upper.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    write_adapters(spec, upper.state_dict(), tmp_path)
    arrays = texts(folder, table)
    inputs = arrays.fields.unpack(arrays.x_test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that peft still uses
        body = transformers.AutoModel.from_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(body, str(tmp_path / "adapter_body")).eval()
    whole = pretrained.TextClassifier(loaded, 16, 2)
    whole.head.load_state_dict(upper.head.state_dict())
    with torch.no_grad():
        want = upper(hidden_states(inputs, model=folder, frozen_layers=1))
        assert torch.allclose(whole(**inputs), want, atol=1e-5)


def test_a_head_starts_as_a_classifier_by_likeness(folder, table):
    head = pretrained.label_head(folder, ["grain wheat", "oil crude"], 5.0)
    whole = pretrained.text_classifier(folder, labels=["grain wheat", "oil crude"], label_scale=5.0)
    arrays = texts(folder, table)
    inputs = arrays.fields.unpack(arrays.x_train)
    with torch.no_grad():
        rows = sentence_features(inputs, model=folder)
        assert torch.allclose(whole(**inputs), head(rows), atol=1e-5)
    assert torch.allclose(head.weight.norm(dim=1), torch.full((2,), 5.0))
    assert not head.bias.any()
    for words, options in (
        ("labels=.* at least 2", {"labels": ["one"]}),
        ("scale=-1", {"labels": ["a", "b"], "scale": -1.0}),
    ):
        with pytest.raises(ValueError, match=words):
            pretrained.label_head(folder, **options)
    with pytest.raises(ValueError, match="num_classes=2"):
        pretrained.text_classifier(folder, labels=["a"])


def test_without_the_package_the_extra_is_named(tmp_path):
    code = (
        "import sys; from fl_lightning.networks.pretrained import text_classifier\n"
        "sys.modules['transformers'] = None\n"
        "text_classifier('x')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs the package transformers: install the extra pretrained" in found.stderr

"""What a user of the command can get wrong: one line that names the argument and its value."""

import pytest

from fl_lightning import ledger as ledgers
from fl_lightning.fit import main
from fl_lightning.ledger import Ledger

# By the command line ----------------------------------------------------------------------------

TYPED = "--trainer.max_epochs 1 --trainer.logger false --run_dir run --data.num_clients 3"
# What is typed, and what the one line of the error must have in it: argument and value.
BAD_COMMANDS = [
    ("--privacy.epsilon 0", "epsilon=0"),
    ("--privacy.epsilon -1", "epsilon=-1"),
    ("--privacy.epsilon []", "epsilon=[]"),
    ("--privacy.epsilon lots", "privacy.epsilon", "lots"),
    ("--privacy.epsilon [1,2,3,4]", "epsilon=[1.0, 2.0, 3.0, 4.0]", "3 clients"),
    ("--privacy.delta 1", "delta=1"),
    ("--privacy.delta 0.01", "delta=0.01"),
    ("--privacy.delta 0", "delta=0", "laplace"),
    ("--privacy.setting nobody", "privacy.setting", "nobody"),
    ("--privacy.setting client+secure_sum --model.dropout 0.1", "min_survivors=null"),
    ("--privacy.setting client+secure_sum --privacy.min_survivors 9", "min_survivors=9"),
    ("--privacy.setting client+local --privacy.cohort_sampling poisson", "cohort_sampling='poi"),
    ("--privacy.setting client+local --privacy.thresholds quantile", "thresholds='quantile'"),
    ("--privacy.setting client+local --privacy.adjacency zero_out", "adjacency='zero_out'"),
    ("--privacy.mechanism exponential", "privacy.mechanism", "exponential"),
    ("--privacy.mechanism laplace --privacy.clip_order 2", "clip_order=2"),
    ("--privacy.noise_multiplier -2", "noise_multiplier=-2"),
    ("--privacy.noise_multiplier 0", "noise_multiplier=0", "epsilon=8"),
    ("--privacy.thresholds median", "privacy.thresholds", "median"),
    ("--privacy.clip_norm 0", "clip_norm=0"),
    ("--privacy.clip_norm [1,2,3,4,5]", "clip_norm=[1.0, 2.0, 3.0, 4.0, 5.0]"),
    ("--privacy.vote_share 1", "vote_share=1"),
    ("--privacy.rng mt19937", "privacy.rng", "mt19937"),
    ("--privacy.seed -1", "seed=-1"),
    ("--privacy.nonsense 1", "privacy.nonsense"),
    ("--nonsense 1", "nonsense"),
    ("--model.sampling_rate 2", "sampling_rate=2"),
    ("--model.sampling_rate null --model.batch_size 4", "batch_size=4"),
    ("--model.client_lr -1", "client_lr=-1"),
    ("--model.client_momentum 1", "client_momentum=1"),
    ("--model.clients_per_round 4", "clients_per_round=4"),
    ("--model.local_steps 0", "local_steps=0"),
    ("--model.dropout 1", "dropout=1"),
    ("--model.deadline 0", "deadline=0"),
    ("--model.memory_budget 0", "memory_budget=0"),
    ("--model.execution parallel", "model.execution", "parallel"),
    ("--model.network nowhere.Network", "model.network", "nowhere.Network"),
    ("--model.network.image_size 12", "network", "(1, 8, 8)"),
    ("--model.network.channels wide", "channels", "wide"),
    ("--model.weighting sizes", "model.weighting", "sizes"),
    ("--model.planned_rounds 0", "planned_rounds=0"),
    ("--model.server_optimizer torch.optim.LBFGS", "server_optimizer=LBFGS"),
    ("--data.source cifar", "source='cifar'"),
    ("--data.source mnist --data.data_dir nowhere", "data_dir", "nowhere"),
    ("--data.num_clients 0", "num_clients=0"),
    ("--data.num_clients 100000", "num_clients=100000"),
    ("--data.val_fraction 1", "val_fraction=1"),
    ("--data.partition sorted", "data.partition", "sorted"),
    ("--data.partition dirichlet --data.alpha 0", "alpha=0"),
    ("--seed_everything -3", "seed_everything=-3"),
    ("--seed_everything 4294967296", "seed_everything=4294967296"),
    ("--checkpoint.every_n_rounds 0", "every_n_rounds=0"),
    ("--trainer.max_epochs -1", "max_epochs=-1"),
    ("--trainer.max_epochs many", "trainer.max_epochs", "many"),
    ("--trainer.strategy ddp_spawn --trainer.devices 2 --trainer.accelerator cpu", "ddp_spawn"),
    ("--trainer.strategy fsdp --trainer.devices 2", "trainer.strategy=fsdp"),
    ("--trainer.strategy deepspeed_stage_2", "trainer.strategy=deepspeed_stage_2"),
    ("--trainer.strategy ddp --trainer.accelerator cpu --trainer.sync_batchnorm true", "sync_batc"),
    ("--trainer.accumulate_grad_batches 2", "accumulate_grad_batches=2"),
    ("--trainer.gradient_clip_val 1", "gradient_clip_val=1"),
    ("--config nowhere.yaml", "config", "nowhere.yaml"),
    ("--config unknown.yaml", "model.nonsense"),
    ("--config broken.yaml", "config", "line 2"),
    ("--ckpt_path last", "ckpt_path='last'", "no checkpoint"),
    ("--ckpt_path nowhere.ckpt", "ckpt_path=nowhere.ckpt"),
    ("--ckpt_path last --run_dir null", "ckpt_path='last'", "run_dir"),
    ("test", "test"),
]


@pytest.fixture(autouse=True)
def _no_warning_of_lightnings_own(monkeypatch):
    # Lightning uses an old name of jsonargparse.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "unknown.yaml").write_text("model:\n  nonsense: 1\n")
    (tmp_path / "broken.yaml").write_text("model: [1,\n")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "named"), [(c, n) for c, *n in BAD_COMMANDS], ids=[c for c, *_ in BAD_COMMANDS]
)
def test_command(cwd, capsys, typed, named):
    files = set(cwd.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([*TYPED.split(), *typed.split()])
    assert caught.value.code == 2
    (line,) = [o for o in capsys.readouterr().err.splitlines() if "error: " in o]
    assert line.startswith("error: ")
    for part in named:
        assert part in line
    assert set(cwd.rglob("*")) == files, "nothing is written, so nothing can have been released"


def test_a_finished_folder_is_not_written_again(cwd, capsys):
    facts = {"setting": "record+local", "privacy_unit": "record", "trust": "local"}
    facts |= {"adjacency": "zero_out", "mechanism": "gaussian", "delta": 0.0, "epsilon": 1.0}
    release = ledgers.Release(
        client=0,
        round=0,
        steps=1,
        mechanism="gaussian",
        noise_multiplier=1.0,
        sampling_rate=1.0,
        adjacency="zero_out",
        num_layers=1,
        clip_norm=(1.0,),
        shares=(1.0,),
        binding="",
        digest="",
    )
    with Ledger.create(cwd / "run", facts | {"simulated": False}) as ledger:
        ledger.append([release])
    before = (cwd / "run" / "ledger.jsonl").read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(TYPED.split())
    assert caught.value.code == 2
    assert "already has a ledger with releases" in capsys.readouterr().err
    assert (cwd / "run" / "ledger.jsonl").read_bytes() == before

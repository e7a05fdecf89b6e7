"""Help and one-line answers to what cannot be meant, before anything big is imported."""

import subprocess
import sys

import pytest

from fl_lightning import __main__ as aadp
from fl_lightning.command.early import answer
from fl_lightning.command.options import options, sections
from fl_lightning.command.parser_errors import in_a_line
from fl_lightning.fit import FederatedCLI, main

NOT_MEANT = [
    ("--privacy.epsilon lots", "lots: it takes a number or a list such as [1, 2] or null"),
    ("--privacy.epsilon", "--privacy.epsilon needs a value; it takes a number or a list"),
    ("--privacy.epsilon 0", "epsilon=0.0 must be positive"),
    ("--privacy.epsilon=-1", "epsilon=-1.0 must be positive"),
    ("--epsilon 3", "there is no option --epsilon; did you mean --privacy.epsilon?"),
    ("--privacy.epsilom 3", "option --privacy.epsilom; did you mean --privacy.epsilon?"),
    ("--privacy.setting client", "did you mean client+local?"),
    ("--privacy.setting record_local", "did you mean record+local?"),
    ("--privacy.mechanism gauss", "did you mean gaussian?"),
    ("--privacy.mechanism exponential", "it takes one of gaussian, laplace"),
    ("--privacy.delta 1", "delta=1.0"),
    ("--privacy.clip_order 3", "it takes one of 1, 2 or null"),
    ("--privacy.clip_norm wide", "it takes a number or a list such as [1, 2]"),
    ("--privacy.seed 1.5", "it takes a whole number or null"),
    ("--privacy.noise_multiplier -2", "noise_multiplier=-2.0"),
    ("--privacy.clipping flatt", "did you mean flat?"),
    ("--privacy.comparator.votes_on l2", "it takes one of l1, clipped; did you mean l1?"),
    ("--trainer.max_epoch 3", "--trainer.max_epoch; did you mean --trainer.max_epochs?"),
    ("--trainer.max_epochs many", "it takes a whole number or null"),
    ("--rounds 3", "there is no option --rounds"),
    ("--max_epochs 3", "did you mean --trainer.max_epochs?"),
    ("--model.execution parallel", "it takes one of auto, vmap, loop"),
    ("--model.lr 1", "there is no option --model.lr"),
    ("--model.client_lr fast", "it takes a number"),
    ("--model.local_steps 2.5", "it takes a whole number or null"),
    ("--data.num_client 3", "did you mean --data.num_clients?"),
    ("--data.num_clients ten", "it takes a whole number"),
    ("--data.partition diri", "did you mean dirichlet?"),
    ("--data.download maybe", "it takes true or false"),
    ("--client_tables.every_n_round 3", "did you mean --client_tables.every_n_rounds?"),
    ("--config nowhere.yaml", "config=nowhere.yaml: No such file or directory"),
    ("--config fashion_mnist_aad", "did you mean fashion_mnist_aadp?"),
    ("--config unknown.yaml", "config=unknown.yaml: there is no option model.nonsense"),
    ("--config typed.yaml", "config=typed.yaml: data.alpha=big: it takes a number"),
    ("--config broken.yaml", "line 2"),
    ("-epsilon 3", "-epsilon: options begin with two dashes"),
    ("train", "train: no option takes it"),
    ("--help.privat", "the sections are run, privacy"),
]  # fmt: skip
MEANT = [
    "--privacy.epsilon null --privacy.noise_multiplier 1e-1",
    "--privacy.epsilon [1,2.5,3]",
    "--privacy.clip_norm inf --privacy.noise_multiplier 0 --privacy.thresholds fixed "
    "--privacy.epsilon null",
    "--privacy.clip_order 2 --privacy.seed 3",
    "--model.network CNN --model.network.channels [8,16] --model.server_optimizer.lr 0.1",
    "--model.network.help CNN",
    "--model.loss.init_args.weight 1 --data.source_args.files x --data.transform scattering",
    "--trainer.callbacks+=Early --trainer.logger false --trainer.max_time 00:01:00:00",
    "--trainer.limit_val_batches 0.5 --trainer.fast_dev_run true --trainer.devices auto",
    "--config base --config=best/fashion_mnist_clients --print_config",
    "--privacy privacy.yaml --data.source csv",
    "--seed_everything 3 --run_dir -x",
    "--model.deadline 1.5 --model.clients_per_round 3",
]  # fmt: skip


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.yaml").write_text("model:\n  nonsense: 1\n")
    (tmp_path / "typed.yaml").write_text("data:\n  alpha: big\n")
    (tmp_path / "broken.yaml").write_text("model: [1,\n")
    return tmp_path


@pytest.mark.parametrize(("typed", "says"), NOT_MEANT, ids=[typed for typed, _ in NOT_MEANT])
def test_what_cannot_be_meant_is_answered_in_a_line(cwd, typed, says):
    with pytest.raises(ValueError) as caught:
        answer(typed.split())
    (line,) = str(caught.value).splitlines()
    assert says in line
    assert len(line) < 220


@pytest.mark.parametrize("typed", MEANT)
def test_what_may_be_meant_goes_on(cwd, typed):
    assert answer(typed.split()) is None


def test_the_command_ends_with_the_line(cwd, capsys):
    for command in (lambda: main(["--epsilon", "3"]), lambda: aadp.main(["fit", "--epsilon", "3"])):
        with pytest.raises(SystemExit) as caught:
            command()
        assert caught.value.code == 2
        line = "error: there is no option --epsilon; did you mean --privacy.epsilon?\n"
        assert capsys.readouterr().err == line


def test_help_is_short_and_says_what_is_common():
    page = answer(["--help"])
    assert page is not None
    assert len(page.splitlines()) <= 150
    assert page == answer(["-h"])
    for name in (
        "privacy.epsilon",
        "trainer.max_epochs",
        "data.source",
        "run_dir",
    ):
        assert f"--{name} " in page
    assert "[8.0]" in page
    assert "torch.optim.Adagrad" not in page


def test_help_of_a_section_says_all_of_it():
    page, everything = answer(["--help.privacy"]), answer(["--help.all"])
    assert page is not None
    assert everything is not None
    for name, option in options().items():
        assert (f"--{name}" in page) == (option.section == "privacy") or name in page
        assert f"--{name}" in everything
    assert max(map(len, everything.splitlines())) < 250


def test_every_option_of_the_parser_is_known_and_no_other():
    """The sources that are read and the parser that is made of the classes say the same."""
    from fl_lightning import fit

    told = []

    class Seen(Exception):
        pass

    class Looking(FederatedCLI):
        def parse_arguments(self, parser, args):
            fits = parser._subcommands_action._name_parser_map["fit"]
            for action in fits._actions:
                told.extend(
                    o[2:] for o in action.option_strings if o.startswith("--") and o[-1] != "+"
                )
            raise Seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "FederatedCLI", Looking)
        with pytest.raises(Seen):
            main([])
    known = {name for name in told if not name.endswith(".help") and name not in sections()}
    assert known == set(options()) - {"model.network.help"}


@pytest.mark.slow
def test_nothing_big_is_imported_for_an_answer():
    seen = "import sys; bad = {'torch', 'pytorch_lightning', 'numba', 'scipy'} & set(sys.modules); "
    for argument in ("--help", "--epsilon"):
        code = f"import runpy, sys; sys.argv = ['fit', '{argument}', '3']\ntry:\n"
        code += "    runpy.run_module('fl_lightning.fit', run_name='__main__')\n"
        code += f"except SystemExit: {seen}sys.exit(str(bad) if bad else 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# What jsonargparse 4 says, with its walls of types, and the line that is made of it.
UNION = (
    'Parser key "{}": - Expected a path but {} either not accessible or invalid - Does not '
    "validate against any of the Union subtypes Subtypes: [<class 'x'>] Errors: "
)
OF_THE_PARSER = [
    (
        "Parser key \"model.network\": Problem with given class_path 'fl_lightning.models.CNN': "
        "Option 'chanels' is not accepted",
        "--model.network: fl_lightning.models.CNN has no argument chanels; did you mean channels?",
    ),
    (
        "Parser key \"model.network\": Problem with given class_path 'fl_lightning.models.CNN': "
        "Parser key \"channels\": Expected a <class 'collections.abc.Sequence'>. Got value: wide",
        "--model.network.channels wide: it takes a list",
    ),
    (
        UNION.format("model.network", "MPL") + "- Expected a dot import path string: MPL",
        "--model.network MPL: there is no class of that name; did you mean MLP? package.Class "
        "works too",
    ),
    (
        "Parser key \"model.network\": Problem with given class_path 'nowhere.Net': No module "
        "named 'nowhere'",
        "--model.network nowhere.Net: No module named 'nowhere'",
    ),
    (
        UNION.format("data.source_args", "3") + "- Expected a <class 'dict'> - Expected a <class "
        "'NoneType'> Given value type: <class 'str'> Given value: 3",
        "--data.source_args 3: it takes a mapping such as {name: value} or null",
    ),
    (
        UNION.format("trainer.precision", "12") + "- Expected a typing.Literal['64', '32'] - "
        "Expected a <class 'NoneType'> Given value type: <class 'str'> Given value: 12",
        "--trainer.precision 12: it takes 64 or 32 or null",
    ),
    (
        UNION.format("model.server_scheduler", "") + "- Type typing.Callable expects a function or "
        "a callable class: the following arguments are required: gamma - Expected a <class "
        "'NoneType'> Given value type: <class 'Namespace'> Given value: "
        "Namespace(class_path='torch.optim.lr_scheduler.ExponentialLR')",
        "--model.server_scheduler: torch.optim.lr_scheduler.ExponentialLR: required: gamma",
    ),
    (
        "Parser key \"model.network\": Problem with given class_path 'torch.nn.Linear': the "
        "following arguments are required: in_features, out_features",
        "--model.network: torch.nn.Linear: required: in_features, out_features",
    ),
    (
        UNION.format("model.server_scheduler", "") + "- Type typing.Callable expects a function or "
        "a callable class: Parser key \"gamma\": Expected a <class 'float'>. Got value: x. Got "
        "value: Namespace(gamma='x') - Expected a <class 'NoneType'> Given value type: <class 'N'> "
        "Given value: NestedArg(key='gamma', val='x')",
        "--model.server_scheduler.gamma x: it takes a number",
    ),
    ("x " * 200, "x " * 99 + "…"),
]


@pytest.mark.parametrize(("text", "line"), OF_THE_PARSER)
def test_a_wall_of_types_is_a_line(text, line):
    assert in_a_line(ValueError(text)) == line

"""`aadp`: commands by one name, shipped configurations, and no advertisements."""

import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from fl_lightning import __version__, fit
from fl_lightning.__main__ import COMMANDS, main
from fl_lightning.command import shipped
from fl_lightning.output.console import without_advertisements

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_has_a_main_and_help(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in listed
    for name in ("ledger", "export"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert "usage:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("word", "hint"), [("leger", "did you mean ledger?"), ("zzz", "fit, configs, compare")]
)
def test_an_unknown_command_is_one_line(word, hint, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("arguments", "program"), [(None, True), (["fit"], False)])
def test_a_run_by_command_is_its_process_which_is_gone_in_time(monkeypatch, arguments, program):
    def stop(program):
        raise LookupError(program)

    monkeypatch.setattr(fit, "Stop", stop)
    monkeypatch.setattr(sys, "argv", ["aadp", "fit"])
    with pytest.raises(LookupError) as raised:
        main(arguments)
    assert raised.value.args == (program,)


def test_the_console_script_is_this_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"aadp": "fl_lightning.__main__:main"}


def test_a_wrong_command_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from fl_lightning.__main__ import main; main(['leger']); "
        "assert not {'torch', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_shipped_configurations_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = str(ROOT / "configs" / "base.yaml")
    assert shipped.with_shipped(["--config", "base", "--x", "base"]) == [
        "--config", base, "--x", "base",
    ]  # fmt: skip
    best = str(ROOT / "configs" / "best" / "fashion_mnist.yaml")
    assert shipped.with_shipped(["fit", "--config=best/fashion_mnist"]) == [
        "fit", f"--config={best}",
    ]  # fmt: skip
    Path("base").write_text("seed_everything: 2")
    assert shipped.with_shipped(["--config", "base"]) == ["--config", "base"]
    given = ["--config", "missing.yaml", "--config", "seed_everything: 1"]
    assert shipped.with_shipped(given) == given  # for the parser to judge


def test_a_name_that_is_no_configuration_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"=fashion_mnist_adp: .* you mean fashion_mnist_aadp"):
        shipped.with_shipped(["--config", "fashion_mnist_adp"])


def test_the_list_says_what_is_expected(capsys):
    main(["configs"])
    lines = dict(
        line.split(None, 1) for line in capsys.readouterr().out.splitlines() if "%" in line
    )
    assert lines["base"].startswith("digits, IID")
    for path in shipped.shipped().values():
        assert yaml.safe_load(path.read_text())
    for name in shipped.shipped():
        assert "comparators" not in name


def test_advertisements_are_kept_back_and_nothing_else(caplog):
    without_advertisements()
    log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger=log.name):
        log.info("Tip: For seamless cloud logging, try installing litlogger")
        log.info("GPU available: False, used: False")
        log.info("the logger litlogger failed")
    said = [r.getMessage() for r in caplog.records]
    assert said == ["GPU available: False, used: False", "the logger litlogger failed"]

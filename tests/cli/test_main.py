"""Exit codes, streams and start-up of the command line. What a command computes is tested with its package."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from halfbyte import __version__, device
from halfbyte.cli.main import COMMANDS, main
from halfbyte.errors import CheckpointError, InputError, UnsupportedError


def halfbyte(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "halfbyte", *arguments], capture_output=True, text=True, timeout=1800, **options)


def interruptible(before):
    """The command as a program, with Ctrl-C as a terminal gives it, behind the code `before`."""
    code = f"import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); {before}"
    code += "; from halfbyte.__main__ import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)


def raising(error):
    def run(args):
        raise error

    return SimpleNamespace(EXAMPLE="halfbyte doctor", add_arguments=lambda parser: None, run=run)


def test_alone_it_lists_every_command():
    result = halfbyte()
    assert result.returncode == 0 and result.stderr == ""
    assert all(f"  {name} " in result.stdout and text in result.stdout for name, text in COMMANDS.items())


def test_the_list_does_not_wait_for_torch():
    code = "import sys; from halfbyte.cli.main import main; code = main([]); sys.exit(code or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=1800).returncode == 0


@pytest.mark.parametrize("module", ["argparse", "numpy"])
def test_an_interrupt_that_meets_an_import_ends_the_command(module, tmp_path):
    interrupted = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    raise ImportError from None\n"
    (tmp_path / f"{module}.py").write_text(interrupted)
    result = interruptible(f"sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['doctor']")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\nhalfbyte: interrupted\n")


def test_an_interrupt_at_the_very_end_is_one_line():
    result = interruptible("import atexit, os; atexit.register(os.kill, os.getpid(), signal.SIGINT)")
    assert result.stdout.startswith("usage: halfbyte")
    assert (result.returncode, result.stderr) == (130, "\nhalfbyte: interrupted\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: halfbyte {name}") and COMMANDS[name] in " ".join(printed.split())
    assert f"example:\n  halfbyte {name}" in printed and not any(f"(default: {empty})" in printed for empty in ("None", "False", "()", "[]"))


def test_version():
    assert halfbyte("--version").stdout == f"halfbyte {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evl"], "unknown command 'evl'; did you mean 'eval'?"),
        (["frobnicate"], "choose from demo, "),
        (["--frobnicate"], "unrecognized arguments"),
        (["eval"], "required: MODEL"),
        (["eval", "demo", "--limit", "0"], "'0' is not an integer of at least 1"),
        (["eval", "demo", "--limit", "some"], "'some' is not an integer of at least 1"),
        (["eval", "demo", "--activations", "int8"], "invalid choice"),
        (["eval", "demo", "--budget", "-1"], "'-1' is not a percentage of at least 0"),
        (["eval", "demo", "--threads", "0"], "'0' is not a number of threads from 1 to 1024"),
        (["generate", "demo", "x", "--threads", "1000000"], "'1000000' is not a number of threads from 1 to 1024"),
        (["bench", "prepare", "--layers", "1000000000"], "'1000000000' is not a number of layers from 1 to 65536"),
        (["bench", "quantize", "--experts", "1000000000"], "'1000000000' is not a number of experts from 0 to 65536"),
        (["eval", "."], "nothing to measure on: give --questions FILE or --text FILE"),
        (["eval", "demo", "--questions", "demo", "--reference", "demo"], "give --text FILE"),
        (["eval", "demo", "--questions", "demo", "--activations", "auto"], "give --text FILE"),
        (["generate", "demo"], "required: prompt"),
        (["generate", "demo", "1", "--temperature", "-1"], "'-1' is not a temperature of at least 0"),
        (["demo", "--output"], "expected one argument"),
    ],
)
def test_wrong_usage_exits_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("too few", given=1, needed=2), 1), (CheckpointError("damaged"), 1), (UnsupportedError("no kernel"), 3), (KeyboardInterrupt(), 130)],
)
def test_errors_become_exit_codes(error, code, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "halfbyte.cli.doctor", raising(error))
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("\nhalfbyte: interrupted\n" if code == 130 else f"halfbyte: error: {error}\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "priv/config.json"), "priv/config.json: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "halfbyte.cli.doctor", raising(error))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"halfbyte: error: {line}\n"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda args: torch.empty(1 << 60, dtype=torch.uint8), "can't allocate memory: you tried to allocate 1152921504606846976 bytes"),
        (lambda args: bytearray(1 << 62), "MemoryError"),
        (raising(torch.OutOfMemoryError("CUDA out of memory.")).run, "CUDA out of memory"),
    ],
)
def test_too_little_memory_is_one_line(run, reason, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "halfbyte.cli.doctor", SimpleNamespace(EXAMPLE="", add_arguments=lambda parser: None, run=run))
    assert main(["doctor"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"halfbyte: error: out of memory: {reason}") and line.endswith("Ask for less at a time")


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("another")])
def test_a_mistake_of_ours_is_not_dressed_up(error, monkeypatch):
    monkeypatch.setitem(sys.modules, "halfbyte.cli.doctor", raising(error))
    with pytest.raises(type(error)):
        main(["doctor"])


@pytest.mark.parametrize("command", [["quantize", "demo", "fp4"], ["bench", "quantize"], ["generate", "demo", "1"]])
def test_a_device_that_computes_nothing_is_refused_first(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", "meta"]) == 3
    assert capsys.readouterr().err == "halfbyte: error: --device: no kernels for this kind of device (given meta; needed cpu or cuda)\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), (">&- 2>&- <&-", 0)])
def test_streams_may_be_closed(closed, code):
    assert subprocess.run(f"{sys.executable} -m halfbyte {closed}", shell=True, stderr=subprocess.PIPE, timeout=1800).stderr == b""
    assert subprocess.run(f"{sys.executable} -m halfbyte {closed}", shell=True, timeout=1800).returncode == code


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen([sys.executable, "-m", "halfbyte"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=1800) == 141


def test_eval_prints_exactly_one_document(capfd, monkeypatch):
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: False)
    assert main(["eval", "demo", "--text", "demo", "--windows", "1", "--reference", "demo", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["dtype"] == "float32"
    assert document["kl"] == 0 and document["text_tokens"] == 511 and 5 < document["perplexity"] < 50
    assert document["exact_match"] is None and document["kinds"] == {}


@pytest.mark.slow
def test_eval_chooses_the_fastest_activations_within_the_budget(capsys, tmp_path):
    assert main(["quantize", "demo", str(tmp_path / "fp4"), "--format", "nvfp4"]) == 0
    chosen = ["eval", str(tmp_path / "fp4"), "--text", "demo", "--windows", "1", "--activations", "auto", "--json", "--budget"]
    documents = {}
    for budget in ("100", "0"):
        capsys.readouterr()
        assert main([*chosen, budget]) == 0
        documents[budget] = json.loads(capsys.readouterr().out)
    generous, strict = documents["100"], documents["0"]
    assert generous["activations"] == "fp8" and generous["perplexity"] == generous["perplexities"]["fp8"] != generous["perplexities"]["bf16"]
    rose = strict["perplexities"]["fp8"] > strict["perplexities"]["bf16"]
    assert strict["activations"] == ("bf16" if rose else "fp8") and strict["perplexity"] == strict["perplexities"][strict["activations"]]


def test_eval_names_a_model_that_is_not_there(capsys, tmp_path):
    assert main(["eval", str(tmp_path / "nowhere"), "--text", "demo"]) == 1
    assert "nowhere: not a model directory" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--text", "demo"]) == 1
    assert f"{tmp_path}/config.json: missing file. A model directory has config.json" in capsys.readouterr().err


def test_generate_streams_text_and_reports_speed_apart(capsys, monkeypatch):
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: False)
    assert main(["generate", "demo", "7 + 5 ="]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == "12"
    assert "tokens/s in float32" in captured.err
    assert main(["generate", "demo", "<bos>Q: 7 + 5 =\nA:", "--raw", "--json", "--max-new-tokens", "2", "--dtype", "bfloat16"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "12".startswith(document["text"].strip()) and document["new_tokens"] == 2
    assert document["dtype"] == "bfloat16"


def test_generate_refuses_what_it_cannot_do(capsys):
    assert main(["generate", "demo", "", "--raw"]) == 1
    assert main(["generate", "demo", "1", "--device", "nowhere"]) == 3
    assert capsys.readouterr().out == ""


def test_a_stream_may_lack_letters(monkeypatch):
    """As one in the locale C: what it cannot print is written out."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    assert main(["inspect", "gr\u00fc\u00dfe"]) == 1
    sys.stderr.flush()
    assert raw.getvalue().startswith(b"halfbyte: error: gr\\xfc\\xdfe: not a model directory")

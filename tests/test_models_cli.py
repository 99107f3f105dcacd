"""The commands of the systems as a user meets them; most in this process, which spares the imports."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from training_runs import SETTINGS, environment, quaver, text, train

from quaver import cli
from quaver.pymodels import cli as models_cli
from quaver.pymodels import tokenizers
from quaver.pymodels.baseline.model import Baseline
from quaver.pymodels.errors import InputError
from quaver.pymodels.systems import NAMES, find
from quaver.pymodels.verify import components, self_check

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    program = typer.Typer(add_completion=False)
    for function in models_cli.COMMANDS:
        program.command()(function)
    return program


@pytest.fixture
def say(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> Say:
    """say(*arguments): exit code, stdout and stderr of the program."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["quaver", *map(str, arguments)])
        out, error = io.StringIO(), io.StringIO()
        threads = torch.get_num_threads()
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
        with streams[0], streams[1], pytest.raises(SystemExit) as ended:
            cli.run(app)
        torch.set_num_threads(threads)
        return int(ended.value.code or 0), out.getvalue(), error.getvalue()

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return train(folder, "run")


def test_from_text_to_text(folder: Path, say: Say) -> None:
    out = folder / "new"
    code, printed, error = say(
        *(
            "train",
            "baseline",
            *(key for key in SETTINGS if "steps" not in key),
            f"data.cache={folder / 'cache'}",
            "--data",
            text(folder),
        ),
        *("--steps", "3", "--seed", "4", "--out", out),
    )
    assert (code, error) == (0, "")
    assert "step 3/3  loss " in printed
    assert f"{out}: 3 steps; validation: loss " in printed.replace("\n", " ")
    code, printed, error = say("evaluate", "baseline", "--out", out, "--split", "test", "--json", folder / "x.json")
    assert (code, error) == (0, "")
    found = json.loads((folder / "x.json").read_text())
    assert found["step"] == 3
    assert found["split"] == "test"
    assert 5 < found["loss"] < 6
    assert f"{found['loss']:.4f}" in printed
    assert "word perplexity" in printed
    code, printed, error = say("generate", "baseline", "--out", out, "--prompt", "the ", "--max-tokens", "5")
    assert (code, error) == (0, "")
    assert printed.startswith("the ")
    again = say("generate", "baseline", "--out", out, "--prompt", "the ", "--max-tokens", "5")
    assert again[1] == printed
    code, printed, error = say("plot", out)
    assert (code, error) == (0, "")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # A run goes on with the settings that it has.
    code, printed, error = say("train", "baseline", "--out", out, "--resume", "--steps", "4")
    assert (code, error) == (0, "")
    assert "step 4/4  loss " in printed
    assert "step 3/" not in printed


def test_evaluation_of_other_text_and_weights(folder: Path, run: Path, say: Say) -> None:
    other = folder / "other.txt"
    other.write_text("zzz qqq\n" * 200)
    losses = []
    for arguments in ((), ("--data", other), ("--checkpoint", "last"), ("--checkpoint", run / "last.safetensors")):
        code, _, error = say("evaluate", "baseline", "--out", run, "--json", folder / "y.json", *arguments)
        assert (code, error) == (0, "")
        losses.append(json.loads((folder / "y.json").read_text())["loss"])
    assert losses[1] > losses[0] + 0.5
    assert losses[2] == losses[3]


def test_several_prompts_and_an_interactive_one(run: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ("--max-tokens", "4", "--temperature", "0")
    code, printed, _ = say("generate", "baseline", "--out", run, "--prompt", "a", "--prompt", "bc", *short)
    assert code == 0
    assert [line[:6] for line in printed.splitlines() if line.startswith("---")] == ["--- 1 ", "--- 2 "]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nbc\n"))
    code, interactive, _ = say("generate", "baseline", "--out", run, "--interactive", *short)
    assert code == 0
    parts = [part.split("\n", 1)[1].rstrip("\n") for part in printed.split("--- ")[1:]]
    assert interactive == "".join(part + "\n" for part in parts) + "\n"


def test_plots_of_several_runs(folder: Path, run: Path, say: Say) -> None:
    train(folder, "second", "train.seed=1", "train.steps=5")
    code, printed, _ = say("plot", run, folder / "second", "--out", folder / "both.png")
    assert (code, printed) == (0, f"{folder / 'both.png'}\n")
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.part"))


# ---- verify ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_verify(name: str, say: Say) -> None:
    preset = "tiny"
    code, printed, error = say("verify", name, "--preset", preset)
    assert (code, error) == (0, "")
    system = find(name)
    config = system.run_config(preset)
    rows = components(system.build(config.model, 0))
    total = sum(count for _, count in rows)
    assert total == sum(p.numel() for p in system.build(config.model, 0).parameters())
    assert f"{total:,}" in printed
    assert printed.count("\nok  ") >= 6
    assert "ok  causal" in printed


def test_verify_finds_a_model_that_sees_the_future() -> None:
    class Leaky(Baseline):
        def forward(self, tokens: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            logits = super().forward(tokens, *arguments, **keywords)
            return logits + 1e-3 * logits.mean(1, keepdim=True)

    class Stuck(Baseline):
        def forward(self, tokens: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            return super().forward(tokens, *arguments, **keywords).detach() + 0 * self.norm.weight.sum()

    baseline = find("baseline")
    for broken, message in ((Leaky, "a token changes the logits before it"), (Stuck, "no gradient reaches embedding")):
        system = dataclasses.replace(baseline, build=broken)
        with pytest.raises(AssertionError, match=message):
            list(self_check(system, baseline.run_config("tiny")))


# ---- what is wrong --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("train", "baselin"), "system 'baselin': did you mean 'baseline'?"),
        (("train", "baseline", "--preset", "5n"), "preset '5n' of baseline: did you mean '5m'?"),
        (("train", "baseline", "model.widht=3"), "model.widht: there is no such key: did you mean 'width'?"),
        (("train", "baseline", "modle.width=3"), "modle.width: there is no section 'modle': did you mean 'model'?"),
        (("train", "baseline", "width"), "'width': expected section.key=value, such as train.lr=3e-4"),
        (("train", "baseline", "train.lr=fast"), "train.lr: expected float, got 'fast'"),
        (("train", "baseline", "train.precision=b16"), "train.precision: 'b16' is not valid: "),
        (("train", "baseline", "--steps", "0"), "train.steps: expected 1 or more, got 0"),
        (("train", "baseline", "--config", "/nowhere.yaml"), "/nowhere.yaml: No such file or directory"),
        (("train", "baseline", "--data", "/nowhere.txt", "--out", "@/a"), "data.source: '/nowhere.txt' is no file"),
        (("train", "baseline", "--data", "@/empty.txt", "--out", "@/b"), "data.source: @/empty.txt is empty"),
        (("train", "baseline", "--data", "@/binary.txt", "--out", "@/c"), "@/binary.txt: byte 4 is 0: a binary file"),
        (("train", "baseline", "--data", "@/latin.txt", "--out", "@/d"), "@/latin.txt: not UTF-8 text (invalid contin"),
        (
            ("train", "baseline", "--data", "@/short.txt", "--out", "@/e", "data.tokenizer=bytes"),
            "model.context: 256 tokens and their successors need 257 tokens of training text, got ",
        ),
        (("evaluate", "baseline", "--out", "@/none"), "@/none: there is no run in this folder: quaver train SYSTEM"),
        (("generate", "baseline", "--out", "@/none"), "@/none: there is no run in this folder"),
        (("plot", "@/none"), "@/none: there is no metrics.csv in this folder: no run, or none that has begun"),
        (("verify", "baseline", "model.heads=3"), "model.width: expected a multiple of 2 heads = 6, got 256"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path: Path, say: Say, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(b"text\0text\n" * 900)
    (tmp_path / "latin.txt").write_bytes("naïve text\n".encode("latin-1") * 900)
    (tmp_path / "short.txt").write_text("short\n")
    code, _, error = say(*(argument.replace("@", str(tmp_path)) for argument in arguments))
    assert code == 2
    assert error.startswith(f"quaver: {message.replace('@', str(tmp_path))}"), error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*/config.yaml"))


def test_text_that_the_vocabulary_lacks(tmp_path: Path, say: Say) -> None:
    run = train(tmp_path, "run", "train.steps=2", "data.tokenizer=characters")
    (tmp_path / "greek.txt").write_text("the cat λ\n" * 50)
    code, _, error = say("evaluate", "baseline", "--out", run, "--data", tmp_path / "greek.txt")
    assert code == 2
    assert "the character 'λ' (U+03BB) of the text is not among the " in error
    assert "the model was trained on another text" in error


def test_a_tokenizer_of_another_run(tmp_path: Path, say: Say) -> None:
    run = train(tmp_path, "run", "train.steps=2", "data.tokenizer=characters", "model.vocab_size=40")
    tokenizers.save(tokenizers.Bytes(), run / "tokenizer.json")
    code, _, error = say("generate", "baseline", "--out", run)
    assert code == 2
    assert "tokenizer.json: 256 tokens, the model has 40" in error


def test_settings_in_a_file(tmp_path: Path, say: Say) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("system: baseline\npreset: tiny\nmodel:\n  layers: 1\ntrain:\n  lr: 1e-3\n")
    code, printed, _ = say("verify", "baseline", "--config", file, "--preset", "tiny", "model.width=32")
    assert code == 0
    assert "1 x attention" in printed
    for content, message in (
        ("- a\n", "expected a mapping with model, data, train, got list"),
        ("model: {wide: 1}\n", "model.wide: there is no such key"),
        ("model: 3\n", "model: expected keys with values, got 3"),
        ("modell: {}\n", "modell: there is no such section: did you mean 'model'?"),
        ("system: chaos\n", "settings of chaos, the command is for baseline"),
        ("x: !!python/object/apply:os.system [touch /tmp/ran]\n", "not YAML: could not determine a constructor"),
    ):
        file.write_text(content)
        code, _, error = say("verify", "baseline", "--config", file)
        assert code == 2
        assert message in error


def test_every_file_of_configs_is_valid() -> None:
    from quaver.pymodels.config import override, read_yaml

    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        plain = read_yaml(file)
        system = find(plain.pop("system"))
        override(system.run_config(plain.pop("preset")), plain)


def test_the_installed_program_has_the_commands() -> None:
    done = quaver("train", "--help")
    assert done.returncode == 0, done.stderr
    assert "quaver train baseline --preset tiny --data book.txt --out runs/book" in done.stdout
    done = quaver("verify", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "quaver: system 'nothing': expected one of baseline, chaos\n"


def test_without_the_packages_of_the_models() -> None:
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'lightning' else find(name, *a)\n"
        "import quaver.cli; sys.argv[1:] = ['train', 'baseline', '--preset', 'tiny']; quaver.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "quaver: not installed: lightning: pip install 'quaver[models]'\n"


def test_the_folder_has_a_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, say: Say) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = say("evaluate", "baseline", "--preset", "tiny")
    assert code == 2
    assert error.startswith("quaver: runs/baseline-tiny: there is no run in this folder")
    with pytest.raises(InputError, match="runs/baseline-5m"):
        models_cli.generate("baseline")

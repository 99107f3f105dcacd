"""`quaver train | evaluate | generate | plot | verify`: the command line of the systems."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .config import RunConfig, nested, override, read_yaml
from .errors import InputError
from .files import write_atomically
from .systems import NAMES, find

System = Annotated[str, typer.Argument(help=f"which model: {', '.join(NAMES)}", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings as section.key=value, such as model.width=128 train.lr=3e-4 data.tokenizer=bytes"),
]
Preset = Annotated[str | None, typer.Option(help="a named size and its settings; verify shows the list")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="settings from a YAML file, as configs/ has them")]
Data = Annotated[
    str | None,
    typer.Option(
        help="text: a file (.txt, .jsonl, .parquet; .gz, .xz), a folder with a file for each split, wikitext-2, hf:NAME"
    ),
]
Out = Annotated[Path | None, typer.Option(help="the run's folder; runs/SYSTEM-PRESET when not given")]
Seed = Annotated[int | None, typer.Option(help="of everything that is drawn: weights, order of the data, noise")]
Checkpoint = Annotated[str, typer.Option(help="best, last, or the path of a .safetensors file of the same model")]


def _console() -> Console:
    # Output that goes to a file or a pipe is not folded to the 80 columns that rich assumes there.
    # Nor is [anything] in a path taken for a colour.
    return Console(width=None if sys.stdout.isatty() else 132, markup=False, highlight=False)


def _first_preset(system: str) -> str:
    return next(iter(find(system).presets))


def _folder(system: str, preset: str | None, out: Path | None) -> Path:
    return out or Path("runs") / f"{system}-{preset or _first_preset(system)}"


def _settings(
    config: RunConfig, file: Path | None, given: dict[str, dict[str, Any]], overrides: list[str] | None
) -> RunConfig:
    """Over a configuration: those of a file, then those of options, then those of section.key=value."""
    if file is not None:
        plain = read_yaml(file)
        named = plain.pop("system", config.system)
        plain.pop("preset", None)
        if named != config.system:
            raise InputError(f"{file}: settings of {named}, the command is for {config.system}")
        config = override(config, plain)
    for section, values in given.items():
        config = override(config, {section: {key: value for key, value in values.items() if value is not None}})
    return override(config, nested(overrides or ()))


def train(
    system: System,
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    data: Data = None,
    steps: Annotated[int | None, typer.Option(help="updates of the weights, in all")] = None,
    seed: Seed = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the folder's last checkpoint; begin where there is none")
    ] = False,
) -> None:
    """Train a model, and keep everything of the run in one folder.

    \b
      quaver train baseline --preset tiny --data book.txt --out runs/book
      quaver train baseline --out runs/book --resume --steps 2000

    CTRL-C saves and stops; a run that was killed loses what came after its last checkpoint, and --resume makes the same
    steps again. In the folder: config.yaml, tokenizer.json, last.safetensors, best.safetensors, last.pt (the rest of
    the state), metrics.csv, tensorboard/, data/ (tokens).
    """
    from .runs import CONFIG, load_config
    from .training.loop import is_first_process
    from .training.loop import train as run

    console = _console()
    folder = _folder(system, preset, out)
    if resume and (folder / CONFIG).exists():
        start = load_config(folder)
        if start.system != system:
            raise InputError(f"{folder}: a run of {start.system}, not of {system}")
        if preset is not None and preset != start.preset:
            raise InputError(f"--preset {preset}: the run was begun with {start.preset}")
    else:
        named = read_yaml(config).get("preset") if config is not None else None
        start = find(system).run_config(preset or named or _first_preset(system))
    given: dict[str, dict[str, Any]] = {"data": {"source": data}, "train": {"steps": steps, "seed": seed}}
    settings = _settings(start, config, given, overrides)
    finished = run(settings, folder, resume=resume, console=console)
    if not is_first_process():
        return
    if finished.stopped:
        console.print(f"stopped at step {finished.step} of {settings.train.steps}; --resume goes on")
        raise typer.Exit(130)
    text = ", ".join(f"{name} {value:.4g}" for name, value in finished.validation.items() if name != "tokens")
    console.print(f"{folder}: {finished.step} steps" + (f"; validation: {text}" if text else ""))


def evaluate(
    system: System,
    overrides: Overrides = None,
    preset: Preset = None,
    data: Data = None,
    out: Out = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "validation",
    checkpoint: Checkpoint = "best",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers to this file")] = None,
) -> None:
    """Score a split of text: loss, perplexity per token and per word, next-token accuracy.

    Each token is scored once, from the tokens before it in its window. --data scores another text with the run's
    tokenizer.
    """
    from . import runs
    from .training.evaluate import evaluate as score
    from .training.loop import device_of, prepared

    run = runs.load(_folder(system, preset, out), system, checkpoint, nested(overrides or ()))
    settings = _settings(run.config, None, {"data": {"source": data}}, None)
    device = device_of(settings)
    text = prepared(run.system, settings, run.folder, run.tokenizer)
    batch = settings.train.batch_size // settings.train.accumulate
    found = score(run.model.to(device), text, split, batch, device=device, evaluating=run.system.evaluating)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,.0f}" if value > 1000 or name == "tokens" else f"{value:.4f}")
    console = _console()
    console.print(f"{run.folder}, step {run.step}, {split} split of {settings.data.source}")
    console.print(table)
    if json_file is not None:
        content = {"run": str(run.folder), "step": run.step, "split": split, "source": settings.data.source, **found}
        write_atomically(json_file, json.dumps(content, indent=1).encode())


def generate(
    system: System,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="text to go on with; repeatable, all at once")] = None,
    preset: Preset = None,
    out: Out = None,
    checkpoint: Checkpoint = "best",
    max_tokens: Annotated[int, typer.Option(help="tokens to make for each prompt, at most")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 1 is wilder")] = 1.0,
    top_k: Annotated[int, typer.Option(help="choose among the k likeliest tokens; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(help="choose among the likeliest tokens that reach p together")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="equal seeds give equal texts")] = 0,
    interactive: Annotated[bool, typer.Option("--interactive", help="read a prompt a line from the terminal")] = False,
) -> None:
    """Go on with prompts, in the words of a trained model. Text appears as it is made."""
    from . import runs
    from .generate import Sampling
    from .generate import generate as make
    from .training.loop import device_of

    sampling = Sampling(temperature, top_k, top_p, max_tokens, tuple(stop or ()), seed)
    run = runs.load(_folder(system, preset, out), system, checkpoint, nested(overrides or ()))
    if run.tokenizer is None:
        raise InputError(f"{run.folder}: the run has no tokenizer: {system} makes no text")
    run.model.to(device_of(run.config))

    def write(text: str) -> None:
        # What the terminal's encoding lacks is replaced.
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()

    def one(text: str) -> None:
        write(text)
        make(run.model, run.tokenizer, [text], sampling, on_text=lambda _, piece: write(piece))
        write("\n")

    if interactive:
        if sys.stdin.isatty():
            Console(stderr=True).print("a prompt a line; CTRL-D ends")
        try:
            while True:
                one(input("> " if sys.stdin.isatty() else ""))
        except (EOFError, KeyboardInterrupt):
            write("\n")
        return
    prompts = prompt or [""]
    if len(prompts) == 1:
        one(prompts[0])
        return
    for number, made in enumerate(make(run.model, run.tokenizer, prompts, sampling), 1):
        write(f"--- {number} ({made.reason}, {len(made.tokens)} tokens)\n{made.prompt}{made.text}\n")


def plot(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; several are drawn over each other")],
    out: Annotated[Path | None, typer.Option(help="the PNG; curves.png in the first folder when not given")] = None,
) -> None:
    """Draw the curves of runs: loss, perplexity, accuracy, gradient norm, learning rate, speed."""
    from .plots import plot_runs

    path = out or runs[0] / "curves.png"
    plot_runs(runs, path)
    _console().print(str(path))


def verify(
    system: System,
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    seed: Seed = None,
) -> None:
    """Print a model's parameters by component, and check in seconds that it is causal, learns and can be saved."""
    from .verify import components, self_check

    found = find(system)
    console = _console()
    settings = _settings(
        found.run_config(preset or _first_preset(system)), config, {"train": {"seed": seed}}, overrides
    )
    table = Table("component", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    rows = components(found.build(settings.model, settings.train.seed))
    total = sum(count for _, count in rows)
    for name, count in [*rows, ("all", total)]:
        table.add_row(name, f"{count:,}", f"{count / max(total, 1):.1%}")
    console.print(f"{system}, preset {settings.preset} of {', '.join(found.presets)}: {found.summary}")
    console.print(table)
    try:
        for name, result in self_check(found, settings):
            console.print(f"ok  {name}: {result}")
    except AssertionError as error:
        raise InputError(f"verify: {error}") from None


COMMANDS = (train, evaluate, generate, plot, verify)
